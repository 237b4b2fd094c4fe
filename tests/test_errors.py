"""The error tree and its messages."""

from __future__ import annotations

import inspect

import pytest

from crossenc import errors


def test_the_docstring_draws_the_whole_tree():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.CrossencError)]
    assert len(kinds) == 11
    assert all(kind.__name__ in errors.__doc__ for kind in kinds)


def test_a_missing_extra_says_what_to_install():
    assert errors.require("json", "any").dumps([]) == "[]"
    with pytest.raises(errors.MissingExtraError, match=r"needs not_there; .*: pip install 'crossenc\[lora\]'"):
        errors.require("not_there", "lora")

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


def test_a_message_of_the_parser_says_why_an_option_cannot_be_used():
    said = """Does not validate against any of the Union subtypes
Subtypes: [<class 'lightning.pytorch.loggers.logger.Logger'>, <class 'bool'>, <class 'NoneType'>]
Errors:
  - Not a valid subclass of Logger
    Subclass types expect one of:
    - a class path (str)
    - a dict with class_path entry
  - Problem with given class_path 'WandbLogger':
      Requirement 'wandb' not met. HINT: Try running `pip install -U wandb`
  - Expected a <class 'bool'>
  - Expected a <class 'NoneType'>
Given value type: <class 'list'>
Given value: [Namespace(class_path='WandbLogger', init_args=Namespace(name=None))]"""
    assert errors.parser_line(said) == (
        "- Problem with given class_path 'WandbLogger': Requirement 'wandb' not met. HINT: Try running "
        "`pip install -U wandb` - Expected a <class 'bool'>"
    )

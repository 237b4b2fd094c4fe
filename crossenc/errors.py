"""Errors for bad input. On the command line, each is one line on stderr and exit code 2.

CrossencError           anything that a user can fix; never raised itself
├── DataError           a file, row, column or label cannot be used; names file and row
├── BackboneError       a backbone or model cannot be loaded, or cannot have a single-logit head
├── CheckpointError     a checkpoint is missing, not crossenc's, or does not match the run that would resume from it
├── ExportError         an export would overwrite a folder, or its scores differ from the checkpoint's
├── OutputError         a file already exists, belongs to other work, or cannot be written
├── HubError            the Hugging Face Hub is out of reach, or does not have what was requested
├── UsageError          an option has an invalid value, or options do not go together
├── LostProcessError    another process of the run has ended; exit code 1
├── StoppedError        a signal stopped the run after a checkpoint was written; exit code 143 or 130
└── MissingExtraError   a feature needs an optional package that is not installed
"""

from __future__ import annotations

import re
from importlib import import_module
from numbers import Real
from types import ModuleType
from typing import Any, get_args


class CrossencError(Exception):
    """Base of all errors that a user can fix. The message is one line: what is wrong, where, and what fixes it."""

    exit_code = 2


class DataError(CrossencError):
    """A file, row, column or label cannot be used."""


class BackboneError(CrossencError):
    """A backbone or a model's file cannot be loaded, or cannot have a single-logit head."""


class CheckpointError(CrossencError):
    """A checkpoint is missing, not crossenc's, or does not match the run that would resume from it."""


class ExportError(CrossencError):
    """An export would overwrite a folder, or its scores differ from the checkpoint's."""


class OutputError(CrossencError):
    """A file already exists, belongs to other work, or cannot be written."""


class HubError(CrossencError):
    """The Hub is out of reach, or does not have what was requested."""


class UsageError(CrossencError):
    """An option has an invalid value, or options do not go together."""


class LostProcessError(CrossencError):
    """Another process of the run has ended."""

    exit_code = 1


class StoppedError(CrossencError):
    """A signal stopped the run after its checkpoint was written."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MissingExtraError(CrossencError):
    """An optional package is not installed."""


def require_choice(name: str, value: object, choices: object) -> None:
    """Raise `UsageError` if a value is not one of a `Literal`'s: only the command line checks this by itself."""
    if value not in get_args(choices):
        raise UsageError(f"{name} {value!r} is not one of {', '.join(get_args(choices))}")


def require_count(name: str, value: Any, least: int = 1) -> int:
    """The value as Python's int, whatever kind of number it is; raises `UsageError` if it is not whole or too small."""
    if not isinstance(value, Real) or value // 1 != value or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)  # type: ignore[call-overload,no-any-return]


def offline_remedy(asked_for: str, reason: object) -> str:
    """The message of a `HubError`: what was requested, why it failed, and how to work without the Hub."""
    return (
        f"{asked_for} could not be read from the Hugging Face Hub ({one_line(reason)}); to work without the Hub, give "
        "pairs as a local file and a model as a local folder"
    )


def one_line(text: object) -> str:
    """The text with each run of white space replaced by one space, without terminal colour codes, and with every other
    control character, which could steer a terminal, replaced by U+FFFD."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split())
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)


# Lines of jsonargparse's messages that list the other types of an option, or repeat all that it was given.
_PARSER_NOISE = re.compile(
    r"(- )?Does not validate against|Subtypes: |Errors:$|- Not a valid subclass of \S+$|Subclass types expect one of:$"
    r"|- Expected a <class '(NoneType|collections.abc.Iterable)'>$|- a class path|- a dict with|Given value type: "
    r"|Given value: .*(Namespace|NestedArg)\("
)


def parser_line(error: object) -> str:
    """A message of jsonargparse in one line, without what hides why an option cannot be used."""
    lines = (line.strip() for line in str(error).splitlines())
    return one_line(" ".join(dict.fromkeys(line for line in lines if not _PARSER_NOISE.match(line))))


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise `MissingExtraError` with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"this needs {error.name}; install it with: pip install 'crossenc[{extra}]'") from error

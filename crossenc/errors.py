"""The errors that bad input ends in. On the command line each is one line on stderr and exit code 2.

CrossencError           anything a user can mend; never raised itself
├── DataError           a file, row, column or label that cannot be used; names file and row
├── BackboneError       a backbone that cannot be loaded, or that has no room for a single-logit head
├── CheckpointError     a checkpoint that is missing, not crossenc's, or of another run than the one that would go on
├── ExportError         an export that would overwrite, or whose scores differ from the checkpoint's
├── OutputError         a file that is there already, or that cannot be written
├── HubError            the Hugging Face Hub is out of reach, or does not have what was asked for
├── UsageError          options that do not go together
├── LostProcessError    another process of the run is gone; exit code 1
├── StoppedError        a signal ended the run after a checkpoint was written; exit code 143 or 130
└── MissingExtraError   a feature whose optional package is not installed
"""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType
from typing import get_args


class CrossencError(Exception):
    """Base of all errors that a user can mend. The message is one line: what, where, and the remedy."""

    exit_code = 2


class DataError(CrossencError):
    """A file, row, column or label cannot be used."""


class BackboneError(CrossencError):
    """A backbone or a model's file cannot be loaded, or cannot carry a single-logit head."""


class CheckpointError(CrossencError):
    """A checkpoint is missing, not crossenc's, or of another run than the one that would go on from it."""


class ExportError(CrossencError):
    """An export would overwrite a folder, or does not score as its checkpoint does."""


class OutputError(CrossencError):
    """A file is there already, belongs to other work, or cannot be written."""


class HubError(CrossencError):
    """The Hub is out of reach, or does not have what was asked for."""


class UsageError(CrossencError):
    """Options do not go together."""


class LostProcessError(CrossencError):
    """Another process of the run is gone."""

    exit_code = 1


class StoppedError(CrossencError):
    """A signal ended the run after its checkpoint was written."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MissingExtraError(CrossencError):
    """An optional package is not installed."""


def require_choice(name: str, value: object, choices: object) -> None:
    """Raise `UsageError` where a value is none of a `Literal`'s, which the command line alone would look at."""
    if value not in get_args(choices):
        raise UsageError(f"{name} {value!r} is not one of {', '.join(get_args(choices))}")


def offline_remedy(asked_for: str, reason: object) -> str:
    """The message of a `HubError`: what was asked for, why it failed, and how to work without the Hub."""
    return (
        f"{asked_for} could not be read from the Hugging Face Hub ({one_line(reason)}); without the Hub, give what is "
        "on this machine: pairs as a file, a model as a folder"
    )


def one_line(text: object) -> str:
    """The text with every run of white space folded into one blank, and without a terminal's colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split())


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise `MissingExtraError` with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"this needs {error.name}; install it with: pip install 'crossenc[{extra}]'") from error

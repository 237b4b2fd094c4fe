"""Arrays kept on disk one by one, each written whole or not at all, so that a broken run goes on with them."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import OutputError

FACTS_FILE = "facts.json"


class Parts:
    """Numbered arrays of one piece of work: files in a folder, or without a folder in memory.

    Args:
        folder: where they lie; made for the first of them. Parts that lie there already are taken over.
        facts: what the arrays depend on, in plain types; parts of other facts are refused.
        overwrite: drop parts of other facts instead.

    Raises:
        OutputError: the folder holds the parts of other work, or cannot be made.
    """

    def __init__(self, folder: Path | None, facts: dict[str, Any], overwrite: bool = False) -> None:
        self.folder, self.facts = folder, facts
        self.kept: dict[int, NDArray[Any]] = {}
        if folder is None:
            return
        file = folder / FACTS_FILE
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if known is not None and known != facts:
            differing = [name for name in sorted(known.keys() | facts) if known.get(name) != facts.get(name)]
            if not overwrite:
                raise OutputError(
                    f"{folder} holds unfinished work with other {', '.join(differing)}; "
                    "go on with the same, or drop it with --overwrite"
                )
            shutil.rmtree(folder)

    def __contains__(self, number: int) -> bool:
        return number in self.kept if self.folder is None else self._file(number).is_file()

    def __getitem__(self, number: int) -> NDArray[Any]:
        found: NDArray[Any] = self.kept[number] if self.folder is None else np.load(self._file(number))
        return found

    def __setitem__(self, number: int, array: NDArray[Any]) -> None:
        if self.folder is None:
            self.kept[number] = array
            return
        content = io.BytesIO()
        np.save(content, array)
        with writing(self.folder):
            if not (facts := self.folder / FACTS_FILE).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(facts, (json.dumps(self.facts, indent=2) + "\n").encode())
            _write(self._file(number), content.getbuffer())

    def all(self, count: int) -> Iterator[NDArray[Any]]:
        """The first `count` parts, in order."""
        return (self[number] for number in range(count))

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:08d}.npy"


def _write(file: Path, content: bytes | memoryview) -> None:
    # Its own name for each process: an earlier run that was thought dead may still be writing.
    unfinished = file.with_name(f".{file.name}-{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(file)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The name to write a file under, which takes the file's place when it is whole and is gone if something fails."""
    unfinished = file.with_name(f".{file.name}-unfinished")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn a full disk, a read-only one and the like into one line: what could not be written, and what is kept."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; finished parts are kept: free some space and give the same command again" if full else ""
        raise OutputError(f"{what} cannot be written: {error.strerror or error}{advice}") from error

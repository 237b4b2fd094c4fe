"""Arrays that are kept on disk one by one, each whole or not at all, so that an interrupted run can continue."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, OutputError, one_line


class Parts:
    """Numbered arrays of one piece of work, as files in a folder; work that is not to be resumed takes a dict instead.

    Args:
        folder: where they are kept; it is made for the first one. Parts that are there already are reused.
        facts: what the arrays depend on, in plain types; parts of other facts are refused.
        overwrite: drop parts of other facts instead.

    Raises:
        OutputError: the folder holds the parts of other work; or, when a part is set, it cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], overwrite: bool = False) -> None:
        self.folder, self.facts, self.facts_file = folder, dict(facts), folder / "facts.json"
        self.begun = False
        # Part of each file's name, so that runs with other facts that start at the same time do not mix their parts.
        self.mark = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:8]
        try:
            self.begun = self._is_begun()
        except (DataError, OutputError):
            if not overwrite:
                raise
            shutil.rmtree(folder)

    def _is_begun(self) -> bool:
        """Whether the folder holds these facts; raises `OutputError` if it holds others."""
        known = read_json(self.facts_file)
        if known and known != self.facts:
            differing = [name for name in sorted(known.keys() | self.facts) if known.get(name) != self.facts.get(name)]
            raise OutputError(
                f"{self.folder} holds work that differs in {', '.join(differing)}; "
                "continue with the same, or drop it with --overwrite"
            )
        return bool(known)

    def __contains__(self, number: int) -> bool:
        return self._file(number).is_file()

    def __getitem__(self, number: int) -> NDArray[Any]:
        found: NDArray[Any] = np.load(self._file(number))
        return found

    def __setitem__(self, number: int, array: NDArray[Any]) -> None:
        content = io.BytesIO()
        np.save(content, array)
        with writing(self.folder):
            if not self.begun:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._is_begun()  # another run may have begun it in the meantime
                _write(self.facts_file, (json.dumps(self.facts, indent=2) + "\n").encode())
                self.begun = True
            with content.getbuffer() as view:  # an error would hold on to it, and Python 3.13 complain at the end
                _write(self._file(number), view)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}-{self.mark}.npy"


Arrays: TypeAlias = Parts | dict[int, NDArray[Any]]


def _write(file: Path, content: bytes | memoryview) -> None:
    with replacing(file, alone=False) as unfinished:  # an earlier run that was thought dead may still be writing
        unfinished.write_bytes(content)


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds, empty if there is no file; raises `DataError` if the file is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise DataError(f"{file} is damaged: {one_line(error)}; delete it, or replace it with an intact one") from error
    return content


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(file: Path, alone: bool = True) -> Iterator[Path]:
    """A temporary name to write a file under. At the end it replaces the file; if something fails, it is removed.

    Each process has its own name, so that two never write into one file. If `alone`, what others have under theirs is
    dropped: they were killed, or they fail at the end, and only the later one replaces the file.
    """
    unfinished = file.with_name(f".{file.name}-unfinished-{os.getpid()}")
    for left in file.parent.glob(f".{glob.escape(file.name)}-unfinished-*") if alone else ():
        with suppress(OSError):  # Windows keeps a file that is open
            left.unlink()
    try:
        yield unfinished
        with unfinished.open("r+b") as written:  # Windows flushes no file that is open for reading only
            os.fsync(written.fileno())  # or a crash of the machine may leave the name without the content
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """An empty hidden folder to build the target's replacement in; one that a killed process left is dropped.

    So is that of another process which is still at work, but that process never finds the new folder in its place.
    """
    target = target.absolute()  # "." has no name
    space = target.with_name(f".{target.name}-unfinished")
    with writing(target):
        shutil.rmtree(space, ignore_errors=True)
        space.mkdir(parents=True)
        own = tempfile.mkdtemp(dir=space)
    try:
        yield Path(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):  # it is gone, or holds another process's folder
            space.rmdir()


def try_writing(path: Path) -> None:
    """Raise `OutputError` if nothing can be written under this name, without making its folders."""
    with writing(path), tempfile.TemporaryFile(dir=next(f for f in path.absolute().parents if f.exists())):
        pass


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn errors such as a full or read-only disk into one line: what could not be written, and what is kept."""
    from safetensors import SafetensorError

    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        hint = "; finished work is kept: free some space and run the same command again (fit: with --ckpt_path last)"
        raise OutputError(
            f"{what} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}{hint * full}"
        ) from error

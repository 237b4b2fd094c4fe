"""Parts of one piece of work: taken over by the same work, and never mixed with those of another."""

from __future__ import annotations

import errno
import fcntl
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from crossenc.errors import OutputError
from crossenc.parts import Parts, file_digest, folder_beside, replacing, writing


def test_parts_are_for_the_same_work_only(tmp_path: Path):
    folder = tmp_path / "parts"
    one, same, other = Parts(folder, {"model": "a"}), Parts(folder, {"model": "a"}), Parts(folder, {"model": "b"})
    assert not folder.exists()  # there is nothing to go on with yet
    one[0] = np.arange(3)
    same[1] = np.arange(4)
    with pytest.raises(OutputError, match="work that differs in model"):  # they began at the same time
        other[0] = np.zeros(3)
    with pytest.raises(OutputError, match="work that differs in model"):
        Parts(folder, {"model": "b"})
    again = Parts(folder, {"model": "a"})
    assert [again[number].tolist() for number in (0, 1)] == [[0, 1, 2], [0, 1, 2, 3]]
    assert 2 not in again
    other_process = folder / f".{again._file(1).name}-unfinished-1"  # which may still be writing the same
    other_process.touch()
    again[1] = np.arange(4)
    assert other_process.exists()
    dropped = Parts(folder, {"model": "b"}, overwrite=True)
    assert 0 not in dropped
    with pytest.raises(OutputError):  # work that goes on after its folder was dropped does not take it back
        again[2] = np.arange(5)
    dropped[0] = np.zeros(1)
    assert Parts(folder, {"model": "b"})[0].tolist() == [0]


def test_parts_of_other_work_are_not_taken_over_even_if_nothing_is_known_of_them(tmp_path: Path):
    one = Parts(tmp_path, {"model": "a"})
    one[0] = np.arange(3)
    (tmp_path / "facts.json").unlink()  # as a kill leaves it while the folder is removed
    assert 0 not in Parts(tmp_path, {"model": "b"})
    assert Parts(tmp_path, {"model": "a"})[0].tolist() == [0, 1, 2]


def test_a_digest_is_of_the_whole_file(tmp_path: Path):
    content = bytes(range(256)) * 10_000  # longer than what is read at once
    (tmp_path / "weights").write_bytes(content)
    assert file_digest(tmp_path / "weights") == sha256(content).hexdigest()


def test_a_part_that_cannot_be_written_whole_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = Parts(tmp_path, {"model": "a"})
    parts[0] = np.arange(3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device; finished work is kept: free some"):
        parts[1] = np.arange(4)
    assert (0 in parts, 1 in parts) == (True, False)
    with pytest.raises(BrokenPipeError), writing("out"):  # a reader that has enough is no error of the disk
        raise BrokenPipeError


def test_a_file_is_replaced_by_a_whole_one_only(tmp_path: Path):
    file = tmp_path / "figures.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(file) as unfinished:
        _ = unfinished.write_text("half") / 0
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("figures.json", "old")]
    with replacing(file) as unfinished:
        unfinished.write_text("new")
    assert file.read_text() == "new"


def test_of_two_that_write_one_file_only_the_later_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "out[1].csv"
    with pytest.raises(OutputError, match="No such file"), writing(file), replacing(file) as first:  # noqa: PT012
        first.write_text("first")
        monkeypatch.setattr("os.getpid", lambda: 1)
        with replacing(file) as second:
            assert not first.exists()
            second.write_text("second")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out[1].csv", "second")]


def test_a_file_is_flushed_as_windows_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fsync(number: int) -> None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("os.fsync", fsync)
    with replacing(tmp_path / "figures.json") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "figures.json").read_text() == "new"


def test_of_two_that_make_one_folder_neither_takes_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "model"
    with folder_beside(target) as first:
        (first / "new").mkdir()
        with folder_beside(target) as second:
            assert not list(second.iterdir())
            (second / "new").mkdir()
            assert not (first / "new").exists()
            (second / "new").rename(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.chdir(target)
    with folder_beside(Path()) as space:
        assert space.parent.parent == tmp_path
    (tmp_path / ".model-unfinished").write_text("in the way")
    with pytest.raises(OutputError, match="model cannot be written: File exists"), folder_beside(target):
        pass
    with folder_beside(tmp_path / "new" / "model") as space:
        assert not list(space.iterdir())

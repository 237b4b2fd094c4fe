"""Tables: what a format can hold comes back, and nothing is written over by mistake."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.errors import DataError, OutputError, UsageError
from crossenc.tables import claim_output, open_table, read_texts, write_table


def test_tsv_has_tabs_and_lists_are_json(tmp_path: Path):
    output = tmp_path / "out.tsv"
    with write_table(str(output), ["a", "b"]) as take:
        take([{"a": "x, y", "b": [1, {"z": "é"}]}, {"a": "tab\there", "b": None, "c": "left out"}])
    lines = output.read_text().splitlines()
    assert lines[0] == "a\tb"
    rows = list(csv.DictReader(lines, delimiter="\t"))
    assert rows == [{"a": "x, y", "b": '[1, {"z": "é"}]'}, {"a": "tab\there", "b": ""}]


def test_json_has_no_nan(tmp_path: Path):
    with write_table(str(tmp_path / "out.jsonl"), ["a"]) as take:
        take([{"a": math.nan, "b": [1.5, -math.inf]}, {"a": "NaN"}])
    assert (tmp_path / "out.jsonl").read_text() == '{"a": null, "b": [1.5, null]}\n{"a": "NaN"}\n'


def test_nothing_is_written_over_that_was_not_to_be(tmp_path: Path):
    (tmp_path / "out.csv").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a folder; name a file"):
            claim_output(str(tmp_path / "out.csv"), (".csv",), overwrite)
    (tmp_path / "file.csv").write_text("a")
    with pytest.raises(OutputError, match="give --overwrite"):
        claim_output(str(tmp_path / "file.csv"), (".csv",), False)
    claim_output(str(tmp_path / "file.csv"), (".csv",), True)
    with pytest.raises(UsageError, match=r"must end in \.csv, or be -"):
        claim_output(str(tmp_path / "file.txt"), (".csv",), True)
    claim_output(str(tmp_path / "new" / "deep" / "file.csv"), (".csv",), False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.csv", "out.csv"]
    with write_table(str(tmp_path / "new" / "deep" / "file.csv"), ["a"]) as take:
        take([{"a": 1}])
    with pytest.raises(ZeroDivisionError), write_table(str(tmp_path / "file.csv"), ["a"]) as take:
        take([{"a": 1 / 0}])
    assert (tmp_path / "file.csv").read_text() == "a"


def test_a_frame_is_read_in_chunks_to_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crossenc.tables.CHUNK", 2)
    with open_table(pd.DataFrame({"n": range(5)}), ["n"]) as table:
        assert [row["n"] for row in table] == [0, 1, 2, 3, 4]


def test_arrays_are_lists_whole_and_in_any_depth(tmp_path: Path):
    """As which pandas reads a column of lists; what a broken run may take over hangs on all of it."""
    frame = pd.DataFrame({"n": [np.arange(2_000.0)], "deep": [{"a": np.float32(0.5), "b": [np.arange(2)]}]})
    with open_table(frame, ["n"]) as table:
        rows, digest = list(table), table.digest()
    assert rows[0]["n"] == list(range(2_000))
    for name in ("out.jsonl", "out.csv"):
        with write_table(str(tmp_path / name), ["deep"]) as take:
            take(rows)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == rows[0] | {"deep": {"a": 0.5, "b": [[0, 1]]}}
    assert json.loads(pd.read_csv(tmp_path / "out.csv")["deep"][0]) == {"a": 0.5, "b": [[0, 1]]}
    frame["n"][0][1_000] = -1
    with open_table(frame, ["n"]) as table:
        assert table.digest() != digest


def test_a_table_of_arrow_is_a_frame():
    columns = {"n": ["a", None, "c"], "id": pa.array([2**53 + 1, None, 3])}  # the first is no float
    polars = SimpleNamespace(columns=["n", "id"], to_arrow=lambda: pa.table(columns))
    for source in (pa.table(columns), pa.record_batch(columns), polars):
        with open_table(source, ["n"]) as table:
            assert list(table) == [{"n": "a", "id": 2**53 + 1}, {"n": None, "id": None}, {"n": "c", "id": 3}]
            assert table.schema().field("id").type == pa.int64()


def test_frames_of_other_libraries_are_those_of_pandas():
    frame = SimpleNamespace(columns=["n"], to_pandas=lambda: pd.DataFrame({"n": ["a"]}))  # such as Ibis
    with open_table(frame, ["n"]) as table:
        assert list(table) == [{"n": "a"}]


def test_the_copy_of_standard_input_is_closed_before_it_is_read_and_gone_after(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
    with open_table("-", ["text"]) as table:
        assert str(table.source) not in {os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()}
        assert list(table) == list(table) == [{"text": "a"}]
    assert not table.source.parent.exists()
    monkeypatch.setattr("shutil.copyfileobj", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OutputError, match="the copy of standard input cannot be written"), open_table("-", ["text"]):
        pass


def test_the_keys_of_a_dict_are_no_rows():
    """Such as BEIR's loader makes of queries and corpus, and `datasets` of splits."""
    with (
        pytest.raises(DataError, match=r"^a dict is not a list of rows; .* or rows such as \[\{'text': \.\.\.\}\]$"),
        open_table({"q1": "How to swim?"}, ["text"]),
    ):
        pass


def test_a_title_goes_before_its_text_where_it_is_asked_for(tmp_path: Path, caplog):
    pq.write_table(pa.table({"_id": ["x"], "title": ["Dogs"], "text": ["What is one?"]}), tmp_path / "a.parquet")
    with open_table(tmp_path / "a.parquet", ["text"]) as table:
        with caplog.at_level("INFO"):
            assert read_texts(table, None) == (["x"], ["What is one?"], [])
        assert caplog.messages == [f"{table.where}: texts from column text"]
        assert read_texts(table, None, titled=True)[1] == ["Dogs What is one?"]
        assert read_texts(table, "title")[1] == ["Dogs"]
        assert table.schema().names == ["_id", "title", "text"]

"""Tables of rows in files, lists or DataFrames: read row by row with the broken ones named, and written completely or
not at all."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow.parquet

from .errors import DataError, OutputError, UsageError, one_line
from .pairs import SUFFIXES, is_local, open_parquet, refuse_twice, rows_of_file, separator_hint, what_is_wrong
from .parts import file_digest, replacing, try_writing, writing

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

Row: TypeAlias = Mapping[str, Any]
STANDARD = "-"  # standard input or output, in jsonl
# Rows that are read, scored and written together; a run that is killed keeps its finished chunks.
CHUNK = 10_000


class Table:
    """Rows of a file, a list or a DataFrame, which can be read any number of times. `where` is its name in messages."""

    def __init__(self, source: Path | Sequence[Row | str] | pandas.DataFrame, where: str) -> None:
        self.source, self.where = source, where

    def __iter__(self) -> Iterator[Row | str]:
        """The rows; a string in place of a row says what is wrong with it."""
        if isinstance(self.source, Path):
            yield from rows_of_file(self.source, self.where)
        elif isinstance(self.source, Sequence):
            yield from self.source
        else:
            for start in range(0, len(self.source), CHUNK):
                chunk = self.source.iloc[start : start + CHUNK].rename(columns=str)
                rows = chunk.astype(object).where(chunk.notna(), None).to_dict("records")  # JSON has no NaN
                # pandas reads a column of lists as arrays, and the repr of a long array omits values.
                yield from (
                    {name: value.tolist() if _is_numpy(value) else value for name, value in row.items()} for row in rows
                )

    def digest(self) -> str:
        """A hash of the table's whole content."""
        if isinstance(self.source, Path):
            return file_digest(self.source)
        digest = sha256()
        for row in self:
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def schema(self) -> pyarrow.Schema | None:
        """The types of the columns if the source has them (a parquet file, a DataFrame), else None."""
        if not isinstance(self.source, Path):
            return None if isinstance(self.source, Sequence) else pyarrow.Schema.from_pandas(self.source, False)
        if self.source.suffix.lower() == ".parquet":
            with open_parquet(self.source, self.where) as file:
                schema = file.schema_arrow
                # Of the metadata, only pandas' is kept, since it says which column is the index. Other tools' metadata
                # would lack the new columns; and pandas' type of the column names, which may be numbers, would not fit.
                pandas = json.loads((schema.metadata or {}).get(b"pandas", "{}"))
                return schema.with_metadata({"pandas": json.dumps(pandas | {"column_indexes": []})} if pandas else None)
        return None


@contextmanager
def open_table(source: Any, names: Sequence[str]) -> Iterator[Table]:
    """The table in a file (`-` for standard input), a DataFrame, or a list of rows, tuples or single values.

    `names` are the columns of a list's tuples. Standard input is copied to a temporary file, since rows are read more
    than once.

    Raises:
        DataError: There is no such file, its name does not tell its format, or the source is something else.
    """
    if isinstance(source, str | Path):
        if str(source) == STANDARD:
            # Windows opens no file twice that goes away when it is closed, and after an error one may still be open.
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                copy = Path(folder, "input.jsonl")
                with writing("the copy of standard input"), copy.open("wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file)
                yield Table(copy, "standard input")
            return
        path = Path(source)
        if not is_local(str(source)) or path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{source}: unknown file format; the name must end in {', '.join(SUFFIXES)}, or be -")
        yield Table(path, str(source))
    elif hasattr(source, "columns"):
        source = source.to_arrow() if hasattr(source, "to_arrow") else source  # polars
        if isinstance(source, pyarrow.Table | pyarrow.RecordBatch):
            source = source.to_pandas(integer_object_nulls=True)  # as floats, long ids would lose digits
        elif hasattr(source, "to_pandas"):
            source = source.to_pandas()
        refuse_twice(list(map(str, source.columns)), "the DataFrame")
        yield Table(source, "the DataFrame")
    elif not isinstance(source, Iterable):
        raise DataError(f"{source!r} is not a file, a DataFrame or a list")
    elif isinstance(source, Mapping):  # its keys would become the rows
        row = f"{{{', '.join(f'{name!r}: ...' for name in names)}}}"
        raise DataError(f"a {type(source).__name__} is not a list of rows; give a DataFrame, or rows such as [{row}]")
    else:
        yield Table([_as_row(item, names) for item in source], "the list")


def _as_row(item: Any, names: Sequence[str]) -> Row | str:
    if isinstance(item, Mapping):
        return item
    values = (item,) if isinstance(item, str) or not isinstance(item, Iterable) else tuple(item)
    if len(values) != len(names):
        return f"not {' and '.join(names)} but {one_line(repr(item))[:60]}"
    return dict(zip(names, values, strict=True))


def chunked(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """The rows in lists of `CHUNK`; the last may be shorter."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def claim_output(output: str, suffixes: Sequence[str], overwrite: bool) -> None:
    """Check that an output can be written, before any work is done.

    Raises:
        OutputError: It already exists, or its folder cannot be written to.
        UsageError: Its name does not tell its format.
    """
    if output == STANDARD:
        return
    path = Path(output)
    if path.suffix.lower() not in suffixes:
        known = ", ".join(suffixes)
        raise UsageError(f"{output}: unknown file format; the name must end in {known}, or be - for standard output")
    if path.is_dir():
        raise OutputError(f"{output} is a folder; name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{output} already exists; choose another name, or give --overwrite")
    try_writing(path)


@contextmanager
def write_table(
    output: str, columns: Sequence[str], schema: pyarrow.Schema | None = None
) -> Iterator[Callable[[list[Row]], None]]:
    """Yields a function that writes rows to csv, tsv, jsonl or parquet, by the suffix of `output`, or as jsonl to
    standard output. The file gets its name only when it is complete. csv and tsv have only the `columns`; parquet needs
    a `schema`.
    """
    if output == STANDARD:
        yield lambda rows: sys.stdout.writelines(_json_lines(rows))
        sys.stdout.flush()
        return
    path = Path(output)
    with writing(output), replacing(path) as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".parquet":
            with pyarrow.parquet.ParquetWriter(unfinished, schema) as file:
                yield lambda rows: file.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            return
        with unfinished.open("w", encoding="utf-8", newline="") as text:
            if path.suffix.lower() == ".jsonl":
                yield lambda rows: text.writelines(_json_lines(rows))
            else:
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                # Python before 3.13 quotes a field with a carriage return only if the line terminator contains one.
                lines: Any = SimpleNamespace(write=lambda row: text.write(row.removesuffix("\r\n") + "\n"))
                writer = csv.writer(lines, delimiter=separator, lineterminator="\r\n")
                writer.writerow(columns)
                yield lambda rows: writer.writerows([_field(row.get(name)) for name in columns] for row in rows)


def _json_lines(rows: Iterable[Row]) -> Iterator[str]:
    return (_json(row) + "\n" for row in rows)


def _field(value: Any) -> Any:
    return _json(value) if isinstance(value, dict | list) else value


def _json(value: Any) -> str:
    dump = partial(json.dumps, ensure_ascii=False, default=lambda item: item.tolist() if _is_numpy(item) else str(item))
    try:
        return dump(value, allow_nan=False)
    except ValueError:  # JSON has no NaN and no infinity: they become null
        return dump(json.loads(dump(value), parse_constant=lambda _: None))


def _is_numpy(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic)


TEXT_NAMES = ("text", "question", "query", "sentence", "contents", "body", "question1", "sentence1", "text_a")
ID_NAMES = ("id", "_id", "qid", "query_id", "query-id", "doc_id", "docid", "pid", "corpus_id", "corpus-id")


def read_texts(
    table: Table, column: str | None, on_error: str | None = None, titled: bool = False
) -> tuple[list[Any], list[str], list[Row]]:
    """Ids (or row numbers from 0), texts, and the broken rows that were skipped.

    Args:
        column: The column of the texts; None takes one of the usual names.
        on_error: `stop` or `skip`; None also stops, with messages that name no options, for callers without them.
        titled: Put the `title` of a row that has one before its text.

    Raises:
        DataError: A row is broken, an id occurs twice, or there are no texts.
    """
    ids: list[Any] = []
    texts: list[str] = []
    skipped: list[Row] = []
    advice = ("; name it with --column", "; --on_error skip leaves out such rows") if on_error else ("; rename one", "")
    text_column: str | None = None
    id_column: str | None = None
    for number, row in enumerate(table):
        problem = row if isinstance(row, str) else None
        if isinstance(row, Mapping):
            found_id = next((name for name in ID_NAMES if name in row), None)
            if text_column is None:
                text_column = next((name for name in ((column,) if column else TEXT_NAMES) if name in row), None)
                id_column = found_id
                if text_column and not column:
                    log.info("%s: texts from column %s", table.where, text_column)
                if text_column is None and on_error != "skip":
                    wanted = repr(column) if column else " or ".join(map(repr, TEXT_NAMES[:4]))
                    remedy = separator_hint(list(row)) + advice[0]
                    raise DataError(f"{table.where} has no column {wanted}; it has {list(row)}{remedy}")
            row_id = row.get(id_column) if id_column else number
            if text_column is None:
                problem = f"no text; it has {list(row)}"
            elif found_id and not id_column:
                problem = f"has an id, {found_id!r}, but the first row has none"
            elif row_id is None or isinstance(row_id, dict | list):
                problem = f"{id_column} is null or not a single value"
            elif not (problem := what_is_wrong(row, [text_column])):
                ids.append(row_id)
                title = row.get("title") if titled else None
                known = title and title == title  # NaN, which is pandas' null, is not equal to itself
                texts.append(f"{title} {row[text_column]}" if known else row[text_column])
        if problem:
            if on_error != "skip":
                raise DataError(f"{table.where}, row {number + 1}: {problem}{advice[1]}")
            skipped.append({"row": number + 1, "error": problem})
    if not texts:
        first = "".join(f"; row {row['row']}: {row['error']}" for row in skipped[:1])
        raise DataError(f"{table.where} has no texts{first}")
    most_common, times = Counter(map(str, ids)).most_common(1)[0]  # as text, because most files can hold nothing else
    if times > 1:
        raise DataError(f"{table.where} has the {id_column} {most_common!r} more than once")
    return ids, texts, skipped


def tell_skipped(skipped: list[Row], output: str) -> None:
    """List broken rows in `OUTPUT.skipped.jsonl`; if there are none, remove the list that an earlier output left."""
    where = skipped_file(output)
    if not skipped:
        where.unlink(missing_ok=True)
        return
    log.warning("%s broken rows are left out: %s", f"{len(skipped):,}", where)
    with write_table(str(where), ["row", "error"]) as write:
        write(skipped)


def skipped_file(output: str) -> Path:
    """The file that lists the broken rows left out of an output."""
    return Path(f"{output}.skipped.jsonl")

"""Tables of rows, whatever holds them: read row by row with what is wrong named, and written whole or not at all."""

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
# Rows that are read, scored and written together: what is kept of a broken run is whole chunks.
CHUNK = 10_000


class Table:
    """Rows that can be read again and again: of a file, a list or a DataFrame. `where` is what messages call it."""

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
                rows = chunk.astype(object).where(chunk.notna(), None).to_dict("records")  # NaN is no JSON
                # pandas reads a column of lists as arrays, whose text leaves out what is long.
                yield from (
                    {name: value.tolist() if _is_numpy(value) else value for name, value in row.items()} for row in rows
                )

    def digest(self) -> str:
        """A hash of all that the table holds."""
        if isinstance(self.source, Path):
            return file_digest(self.source)
        digest = sha256()
        for row in self:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def schema(self) -> pyarrow.Schema | None:
        """The types of the columns where the source has them: a parquet file, a DataFrame; else None."""
        if not isinstance(self.source, Path):
            return None if isinstance(self.source, Sequence) else pyarrow.Schema.from_pandas(self.source, False)
        if self.source.suffix.lower() == ".parquet":
            with open_parquet(self.source, self.where) as file:
                schema = file.schema_arrow
                # Which column is pandas' index stays. What others say of the columns would lack the new ones, and
                # what pandas says of the columns' names, which may be numbers, would not hold for these.
                pandas = json.loads((schema.metadata or {}).get(b"pandas", "{}"))
                return schema.with_metadata({"pandas": json.dumps(pandas | {"column_indexes": []})} if pandas else None)
        return None


@contextmanager
def open_table(source: Any, names: Sequence[str]) -> Iterator[Table]:
    """The table behind a file's name, `-`, a DataFrame, or a list: of rows, or of tuples or single values.

    `names` are the columns of a list's tuples. Standard input is copied to a temporary file, since rows are read more
    than once.

    Raises:
        DataError: there is no such file, or its format cannot be told from its name.
    """
    if isinstance(source, str | Path):
        if str(source) == STANDARD:
            with tempfile.NamedTemporaryFile(suffix=".jsonl") as spool:
                with writing("the copy of standard input"):
                    shutil.copyfileobj(sys.stdin.buffer, spool)
                    spool.flush()
                yield Table(Path(spool.name), "standard input")
            return
        path = Path(source)
        if not is_local(str(source)) or path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{source}: cannot tell its format; give a file named {', '.join(SUFFIXES)}, or -")
        yield Table(path, str(source))
    elif hasattr(source, "columns"):
        source = source.to_arrow() if hasattr(source, "to_arrow") else source  # of polars
        if isinstance(source, pyarrow.Table | pyarrow.RecordBatch):
            source = source.to_pandas(integer_object_nulls=True)  # a float would not hold every id
        elif hasattr(source, "to_pandas"):
            source = source.to_pandas()
        refuse_twice(list(map(str, source.columns)), "the DataFrame")
        yield Table(source, "the DataFrame")
    elif not isinstance(source, Iterable):
        raise DataError(f"{source!r} is no file, no DataFrame and no list")
    elif isinstance(source, Mapping):  # of whose keys a loop would make the rows
        row = f"{{{', '.join(f'{name!r}: ...' for name in names)}}}"
        raise DataError(f"a {type(source).__name__} is no list of rows; give a DataFrame, or a list of rows like {row}")
    else:
        yield Table([_as_row(item, names) for item in source], "the list")


def _as_row(item: Any, names: Sequence[str]) -> Row | str:
    if isinstance(item, Mapping):
        return item
    values = (item,) if isinstance(item, str) or not isinstance(item, Iterable) else tuple(item)
    if len(values) != len(names):
        return f"not {' and '.join(names)} but {one_line(repr(item))[:60]}"
    return dict(zip(names, values, strict=True))


def chunked(rows: Iterable[Any], size: int = CHUNK) -> Iterator[list[Any]]:
    """The rows in lists of `size`; the last may be shorter."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def claim_output(output: str, suffixes: Sequence[str], overwrite: bool) -> None:
    """Make sure that an output can be written, before any work is done.

    Raises:
        OutputError: it is there already, or its folder cannot be written to.
        UsageError: its format cannot be told from its name.
    """
    if output == STANDARD:
        return
    path = Path(output)
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{output}: cannot tell its format; name it {', '.join(suffixes)}, or - for standard output")
    if path.is_dir():
        raise OutputError(f"{output} is a folder; name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{output} is there already; choose another name, or give --overwrite")
    try_writing(path)


@contextmanager
def write_table(
    output: str, columns: Sequence[str], schema: pyarrow.Schema | None = None
) -> Iterator[Callable[[list[Row]], None]]:
    """Write rows to csv, tsv, jsonl or parquet by the name's suffix, or jsonl to standard output; gives the function
    that takes them. The file gets its name at the end only. In csv and tsv a row's columns beside `columns` are left
    out; parquet needs a `schema`.
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
                # Python before 3.13 quotes a carriage return only where it is a part of the line's end.
                lines: Any = SimpleNamespace(write=lambda row: text.write(row.removesuffix("\r\n") + "\n"))
                writer = csv.writer(lines, delimiter=separator, lineterminator="\r\n")
                writer.writerow(columns)
                yield lambda rows: writer.writerows([_field(row.get(name)) for name in columns] for row in rows)


def _json_lines(rows: Iterable[Row]) -> Iterator[str]:
    return (_json(row) + "\n" for row in rows)


def _field(value: Any) -> Any:
    return _json(value) if isinstance(value, dict | list) else value


def _json(value: Any) -> str:
    make = partial(json.dumps, ensure_ascii=False, default=lambda item: item.tolist() if _is_numpy(item) else str(item))
    try:
        return make(value, allow_nan=False)
    except ValueError:  # NaN and infinity, for which JSON has no word
        return make(json.loads(make(value), parse_constant=lambda _: None))


def _is_numpy(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic)


TEXT_NAMES = ("text", "question", "query", "sentence", "contents", "body", "question1", "sentence1", "text_a")
ID_NAMES = ("id", "_id", "qid", "query_id", "query-id", "doc_id", "docid", "pid", "corpus_id", "corpus-id")


def read_texts(
    table: Table, column: str | None, on_error: str | None = None, titled: bool = False
) -> tuple[list[Any], list[str], list[Row]]:
    """Ids (or row numbers from 0), texts, and the broken rows that were skipped.

    Args:
        column: the column of the texts; None takes one of the usual names.
        on_error: `stop` or `skip`; None stops, and its messages name no options, which the caller doesn't have.
        titled: put a `title`, where a row has one, before its text.

    Raises:
        DataError: a row is broken, an id stands there twice, or there are no texts.
    """
    ids: list[Any] = []
    texts: list[str] = []
    skipped: list[Row] = []
    advice = ("; name it with --column", "; --on_error skip leaves out such rows") if on_error else ("; rename one", "")
    name: str | None = None
    key: str | None = None
    for number, row in enumerate(table):
        wrong = row if isinstance(row, str) else None
        if isinstance(row, Mapping):
            found = next((name for name in ID_NAMES if name in row), None)
            if name is None:
                name, key = next((name for name in ((column,) if column else TEXT_NAMES) if name in row), None), found
                if name and not column:
                    log.info("%s: texts from column %s", table.where, name)
                if name is None and on_error != "skip":
                    asked = repr(column) if column else " or ".join(map(repr, TEXT_NAMES[:4]))
                    remedy = separator_hint(list(row)) + advice[0]
                    raise DataError(f"{table.where} has no column {asked}; it has {list(row)}{remedy}")
            known = row.get(key) if key else number
            if name is None:
                wrong = f"no text; it has {list(row)}"
            elif found and not key:
                wrong = f"an id, {found!r}, where the first row has none"
            elif known is None or isinstance(known, dict | list):
                wrong = f"{key} is null or no text"
            elif not (wrong := what_is_wrong(row, [name])):
                ids.append(known)
                texts.append(f"{row['title']} {row[name]}" if titled and row.get("title") else row[name])
        if wrong:
            if on_error != "skip":
                raise DataError(f"{table.where}, row {number + 1}: {wrong}{advice[1]}")
            skipped.append({"row": number + 1, "error": wrong})
    if not texts:
        first = "".join(f"; row {row['row']}: {row['error']}" for row in skipped[:1])
        raise DataError(f"{table.where} has no texts{first}")
    twice, times = Counter(map(str, ids)).most_common(1)[0]  # as text, which is all that most files can hold
    if times > 1:
        raise DataError(f"{table.where} has the {key} {twice!r} more than once")
    return ids, texts, skipped


def tell_skipped(skipped: list[Row], output: str) -> None:
    """List broken rows in `OUTPUT.skipped.jsonl`; without any, remove the list of an output that was in its place."""
    where = skipped_file(output)
    if not skipped:
        where.unlink(missing_ok=True)
        return
    log.warning("%s broken rows are left out: %s", f"{len(skipped):,}", where)
    with write_table(str(where), ["row", "error"]) as take:
        take(skipped)


def skipped_file(output: str) -> Path:
    """Where the broken rows that an output leaves out are listed."""
    return Path(f"{output}.skipped.jsonl")

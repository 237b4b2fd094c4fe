"""`score`: a score for every pair of a file of any size, a list or a DataFrame.

1 check   read every row once, to report a broken one before anything is scored
2 score   chunk by chunk; the logits of each are one part in `.OUTPUT.parts/`, written whole or not at all
3 join    read the input's rows again, and write them with their scores to the output, in the input's order

An interrupted run leaves its parts, and the same command continues with them. Memory holds a few chunks, whatever the
size of the input.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from .calibration import sigmoid
from .errors import DataError, UsageError, one_line, require_choice
from .loading import read_threshold
from .pairs import SUFFIXES, match_columns, what_is_wrong
from .parts import Arrays, Parts
from .progress import progress
from .scorer import Backend, Logits, Precision, Scoring, score_chunks
from .tables import CHUNK, STANDARD, Row, Table, chunked, claim_output, open_table, skipped_file, write_table

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

OnError: TypeAlias = Literal["stop", "skip"]
_Make: TypeAlias = Callable[[Logits], NDArray[Any]]  # makes a new column from the logits


def score(
    model: str | Path,
    pairs: Any,
    output: str | None = None,
    *,
    columns: dict[str, str] | None = None,
    column: str = "score",
    logit: bool = False,
    decision: str | None = None,
    both_orders: bool = False,
    precision: Precision = "32-true",
    backend: Backend = "torch",
    devices: int = 1,
    on_error: OnError = "stop",
    overwrite: bool = False,
) -> Path | pandas.DataFrame | Logits:
    """Score pairs, from 0 (they ask different things) to 1 (the same).

    An interrupted run continues where it was when it is called again with the same arguments.

    Args:
        model: An export's folder, a Hub id, or a `.ckpt` file of fit.
        pairs: A csv, tsv, jsonl or parquet file, `-` (standard input, in jsonl), a DataFrame, or a list of pairs.
        output: The file to write, in the format of its suffix, or `-` (standard output, in jsonl): the input's columns
            in their order, and the new ones.
        columns: Column names of the input: `{text_a: left, text_b: right}`. Not needed for common names.
        column: Name of the new column.
        logit: Add a column `logit` too; the score is the sigmoid of it.
        decision: Name of a column to add that says whether the pair is a duplicate: whether its score is at or above
            the threshold stored in the model.
        both_orders: Score each pair in both orders of its texts and take the mean logit; takes twice the time.
        precision: `32-true`; `bf16-mixed`, with bf16 where it pays; or `bf16-true`, with the weights in bf16 too.
        backend: `torch`, or the `onnx` or `onnx-int8` file of an export that has one.
        devices: Number of GPUs, or of processes on a CPU, that share the pairs. In a script, several need
            `if __name__ == "__main__":`.
        on_error: `stop` before anything is scored if a row is broken, or `skip` broken rows: they are left out and
            listed in `OUTPUT.skipped.jsonl`; in a list or DataFrame their score is NaN.
        overwrite: Replace an existing output, and drop unfinished work that does not match.

    Returns:
        The output's path; without an output a copy of the DataFrame with the new columns, or for other input the
        scores, shape (rows,).

    Raises:
        BackboneError, CheckpointError, HubError: The model cannot be loaded.
        DataError: The input cannot be read, or a row is broken.
        OutputError: The output exists already, or cannot be written.
        UsageError: Options do not go together, or `decision` needs a threshold and the model has none.
    """
    scoring = Scoring(model, precision, backend, both_orders, devices)
    require_choice("on_error", on_error, OnError)
    named: list[tuple[str, _Make]] = [("logit", np.asarray)] if logit else []
    named.append((column, sigmoid))
    if decision is not None:
        threshold = read_threshold(model)
        if threshold is None:
            raise UsageError(f"{model} has no stored threshold, which a decision needs; leave out --decision")
        named.append((decision, lambda logits: reaches(sigmoid(logits), threshold)))
    new = dict(named)
    if not all(new) or len(new) < len(named):
        raise UsageError(f"the new columns cannot be named {list(new)}; give each another name: --column, --decision")
    if columns and "label" in columns:
        raise UsageError("columns: labels are not read here; name only text_a and text_b")
    with open_table(pairs, ("text_a", "text_b")) as table:
        if output is not None:
            claim_output(output, SUFFIXES, overwrite)
        if (decision is not None or logit) and output is None and isinstance(table.source, Path | list):
            raise UsageError("a decision or a logit needs a table as output; give a DataFrame, or name an output")
        model_facts = scoring.facts()  # first, because the model may not exist, and reading the input may take long
        with _for_parquet(table.where):
            checked = _check(table, columns or {}, list(new), on_error, str(output).lower().endswith(".parquet"))
        folder = None if output in (None, STANDARD) else parts_folder(str(output))
        facts = {"input": table.digest(), "columns": checked.names, "on_error": on_error, "chunk": CHUNK}
        parts: Arrays = Parts(folder, facts | model_facts, overwrite) if folder else {}
        a, b = checked.names["text_a"], checked.names["text_b"]
        texts = ((row[a], row[b]) for _, row in _good_rows(table, checked.names))
        if output is None:
            return _in_memory(table, checked, score_all(parts, scoring, texts, checked.good), new)
        score_into(parts, scoring, texts, checked.good)
        _join(table, checked, parts, new, output)
        if folder:
            shutil.rmtree(folder)
            log.info("scores of %s pairs: %s", f"{checked.good:,}", output)
        return Path(output)


def score_into(parts: Arrays, scoring: Scoring, pairs: Iterator[tuple[str, str]], total: int) -> None:
    """Score `total` pairs of texts, one part for each chunk, except those that `parts` already has."""
    done = sum(min(CHUNK, total - start) for start in range(0, total, CHUNK) if start // CHUNK in parts)
    if done:
        log.info("%s of %s pairs are scored already", f"{done:,}", f"{total:,}")
    if done == total:
        return
    start = time.monotonic()
    with progress("score pairs", total, done) as advance:
        chunks = (chunk for chunk in enumerate(chunked(pairs)) if chunk[0] not in parts)
        for number, logits in score_chunks(scoring, chunks):
            parts[number] = logits
            advance(len(logits))
    log.info("%s pairs scored, %.0f per second", f"{total - done:,}", (total - done) / (time.monotonic() - start))


def score_all(parts: Arrays, scoring: Scoring, pairs: Iterator[tuple[str, str]], total: int) -> Logits:
    """The logits of `total` pairs of texts, by `score_into`, shape (total,)."""
    score_into(parts, scoring, pairs, total)
    chunks = -(-total // CHUNK)
    return np.concatenate([np.empty(0, dtype=np.float32), *(parts[number] for number in range(chunks))])


def reaches(scores: Logits, threshold: float) -> NDArray[np.bool_]:
    """Which scores make a pair a duplicate."""
    single = np.float32(threshold)
    if decimals(np.array([single])) == [threshold]:  # such as a score that was copied from a file
        return scores >= single
    # In double precision: the threshold may lie between two adjacent fp32 scores.
    return scores.astype(np.float64) >= threshold


def decimals(values: Logits) -> list[float]:
    """Each number with only the digits that tell it from other fp32 numbers, so that files hold no meaningless ones."""
    return [float(text) for text in values.astype(str)]


@dataclass
class _Checked:
    """What the first reading of the input found."""

    names: dict[str, str] = field(default_factory=dict)  # the input's names of the columns text_a and text_b
    columns: dict[str, None] = field(default_factory=dict)  # in the order of their first appearance
    broken: list[tuple[int, str]] = field(default_factory=list)  # the first ten: row number from 1, what is wrong
    rows: int = 0
    good: int = 0
    schema: pyarrow.Schema | None = None


def _check(table: Table, columns: dict[str, str], new: list[str], on_error: str, infer: bool) -> _Checked:
    """Read every row once; raises `DataError` if one is broken and `on_error` is `stop`, or if there is none."""
    found = _Checked(schema=table.schema() if infer else None)
    infer = infer and found.schema is None
    for chunk in chunked(table):
        parsed = [row for row in chunk if not isinstance(row, str)]
        if parsed and not found.names:
            names = dict.fromkeys(name for row in parsed for name in row)  # of all rows: one of jsonl may lack some
            found.names = match_columns(list(names), table.where, columns, labelled=False)
        good = []
        for row in chunk:
            found.rows += 1
            wrong = row if isinstance(row, str) else what_is_wrong(row, found.names.values())
            if wrong is None:
                found.good += 1
                found.columns.update(dict.fromkeys(row))
                good.append(row)
            elif len(found.broken) < 10:
                found.broken.append((found.rows, wrong))
        if infer and good:  # broken rows are not written, and their values may have other types
            found.schema = _widen(found.schema, good)
    if found.schema is not None:
        # Without rows, to find a type that parquet cannot hold before the work and not after it.
        pyarrow.parquet.write_table(found.schema.empty_table(), pyarrow.BufferOutputStream())
    if found.broken and on_error == "stop":
        row, wrong = found.broken[0]
        others = f" (and {found.rows - found.good - 1:,} more)" if found.rows - found.good > 1 else ""
        raise DataError(f"{table.where}, row {row}: {wrong}{others}; --on_error skip leaves such rows out")
    if not found.good:
        first = "".join(f"; row {row}: {wrong}" for row, wrong in found.broken[:1])
        raise DataError(f"{table.where} has no rows that can be scored{first}")
    if taken := [name for name in new if name in found.columns]:
        raise DataError(
            f"{table.where} already has a column {taken[0]}; rename it, or the new one with --column or --decision"
        )
    return found


def _widen(schema: pyarrow.Schema | None, rows: list[Row]) -> pyarrow.Schema:
    names = dict.fromkeys(name for row in rows for name in row)
    found = pyarrow.table({name: [row.get(name) for row in rows] for name in names}).schema
    return found if schema is None else pyarrow.unify_schemas([schema, found], promote_options="permissive")


@contextmanager
def _for_parquet(where: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OverflowError) as error:
        raise DataError(f"{where} has values that parquet cannot hold: {one_line(error)}; write jsonl") from error


def _good_rows(table: Table, names: dict[str, str], skip: Any = None) -> Iterator[tuple[int, Row]]:
    """The rows that can be scored, with their number from 0; `skip` is called with a row for each of the others."""
    for number, row in enumerate(table):
        wrong = row if isinstance(row, str) else what_is_wrong(row, names.values())
        if wrong is None:
            yield number, row  # type: ignore[misc]
        elif skip:
            skip([{"row": number + 1, "error": wrong}])


def parts_folder(output: str) -> Path:
    """Where the finished parts of an output are kept until it is complete."""
    return Path(output).with_name(f".{Path(output).name}.parts")


def _in_memory(table: Table, checked: _Checked, found: Logits, new: Mapping[str, _Make]) -> Any:
    logits = np.full(checked.rows, np.nan, dtype=np.float32)
    logits[[number for number, _ in _good_rows(table, checked.names)]] = found
    if isinstance(table.source, Path | list):
        return sigmoid(logits)
    frame = table.source.copy()  # type: ignore[union-attr]
    for name, make in new.items():
        frame[name] = make(logits)
        if frame[name].dtype == bool and np.isnan(logits).any():  # broken rows have no decision
            frame[name] = frame[name].astype("boolean").mask(np.isnan(logits))
    return frame


def _join(table: Table, checked: _Checked, parts: Arrays, new: Mapping[str, _Make], output: str) -> None:
    schema = checked.schema
    if schema is not None:
        none = np.empty(0, dtype=np.float32)
        kinds = {name: pyarrow.from_numpy_dtype(make(none).dtype) for name, make in new.items()}
        schema = pyarrow.schema([*schema, *kinds.items()], metadata=schema.metadata)
    with _for_parquet(table.where), ExitStack() as stack:
        write = stack.enter_context(write_table(output, [*checked.columns, *new], schema))
        skip = None
        if checked.good < checked.rows and output == STANDARD:
            first = "; ".join(f"row {row}: {wrong}" for row, wrong in checked.broken)
            log.warning("%s broken rows are left out: %s", f"{checked.rows - checked.good:,}", first)
        elif checked.good < checked.rows:
            skip = stack.enter_context(write_table(str(skipped_file(output)), ["row", "error"]))
            log.warning("%s broken rows are left out: %s", f"{checked.rows - checked.good:,}", skipped_file(output))
        for number, chunk in enumerate(chunked(_good_rows(table, checked.names, skip))):
            columns = [make(parts[number]) for make in new.values()]
            values = [column.tolist() if column.dtype == bool else decimals(column) for column in columns]
            write([{**row, **dict(zip(new, own, strict=True))} for (_, row), *own in zip(chunk, *values, strict=True)])
    if not skip:  # an earlier output of this name may have left such a list
        skipped_file(output).unlink(missing_ok=True)

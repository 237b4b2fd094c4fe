"""Read question pairs from any source into one table.

    sample | file | Hub id[:split]  ->  rows as they are  ->  checked  ->  Dataset(row, text_a, text_b, label)

`row` counts from 0 and identifies a pair from here to the output file. Messages count rows from 1, without the header.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet

from . import __version__
from .errors import DataError, HubError, OutputError, UsageError, offline_remedy, one_line

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = "sample"
SPLITS = ("train", "val", "test")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

# Column names in public data sets of question pairs: Quora, GLUE, STS-B, sentence-transformers.
ALIASES = {
    "text_a": ("text_a", "sentence1", "question1", "sentence_a", "text1", "question_a", "anchor", "sentence_A"),
    "text_b": ("text_b", "sentence2", "question2", "sentence_b", "text2", "question_b", "positive", "sentence_B"),
    "label": ("label", "is_duplicate", "labels", "duplicate", "score", "similarity"),
}
_SPLIT_FILES = {"train": ("train",), "val": ("dev", "val", "validation", "valid"), "test": ("test",)}
_WORD_LABELS = {"true": 1.0, "false": 0.0}


def read(
    source: str, subset: str | None = None, columns: Mapping[str, str] | None = None, labelled: bool = True
) -> Dataset:
    """Read one source into a table with the columns `row`, `text_a`, `text_b` and, if labelled, `label`.

    The table is written to an Arrow file in the cache of `datasets`, and read from there the next time.

    Args:
        source: A csv, tsv, jsonl or parquet file; `sample` or `sample:SPLIT`; a Hub data set `ID` or `ID:SPLIT`
            (without a split, `train`); or `FOLDER:SPLIT`, a folder laid out like a Hub data set.
        subset: Configuration of the Hub data set.
        columns: Column names of the source, such as `{"text_a": "left", "text_b": "right", "label": "same"}`.
        labelled: Whether to read `label`, a float from 0 to 1.

    Raises:
        DataError: The file, a column, or a row cannot be used; names the file and the row.
        HubError: The Hub is out of reach or has no such data set.
        OutputError: The cache cannot be written.
        UsageError: The source is a DataFrame or a list, not a name.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    require_name(source)
    origin: dict[str, Any] = {"version": __version__}  # part of the cache key
    if is_local(source):
        path = Path(source)
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: unknown file format; the name must end in {', '.join(SUFFIXES)}")
        # Size and times are part of it too, so that an edited file is read again, even if the edit kept the time of the
        # last modification.
        about = path.stat()
        origin |= {"path": str(path.resolve()), "stamp": [about.st_size, about.st_mtime_ns, about.st_ctime_ns]}
    elif source.partition(":")[0] == SAMPLE:
        origin["sample"] = source.partition(":")[2] or "all"
    else:
        origin["dataset"] = _load_from_hub(source, subset)
    arguments = {"origin": origin, "where": source, "columns": dict(columns or {}), "labelled": labelled}
    features = {"row": "int64", "text_a": "string", "text_b": "string"} | ({"label": "float32"} if labelled else {})
    try:
        return datasets.Dataset.from_generator(
            _checked_rows,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
            gen_kwargs=arguments,
        )
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, DataError):
            raise cause from None
        if isinstance(cause, OSError):
            raise OutputError(
                f"the cache {datasets.config.HF_DATASETS_CACHE} cannot be written: {cause}; free some space, or set "
                "HF_DATASETS_CACHE to another folder"
            ) from error
        raise


def require_name(source: object) -> None:
    """Raise `UsageError` if the source is not a name but the labelled pairs themselves, as a DataFrame or a list."""
    if not isinstance(source, str | Path | None):
        kind = type(source).__name__
        raise UsageError(f"labelled pairs come from a file or the Hub; write the {kind} to a file, and give its name")


def is_local(source: str) -> bool:
    """Whether the source is a local file; raises `DataError` if it is a folder, or looks like a file but is missing."""
    path = Path(source)
    if path.is_file():
        return True
    if path.is_dir():
        raise DataError(f"{source or 'an empty name'} refers to a folder; give one file")
    folder, split = name_and_split(source)
    if folder and split and Path(folder).is_dir():  # it is read like a data set of the Hub
        _refuse_saved(Path(folder))
        return False
    if path.suffix.lower() in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        raise DataError(f"{source}: no such file{'' if path.is_absolute() else f' (looked in {Path.cwd()})'}")
    return False


def name_and_split(source: str) -> tuple[str, str]:
    """The two parts of `ID:SPLIT` or `FOLDER:SPLIT`. Either may have colons: a folder's name, or `train[:100]`."""
    colons = [place for place, character in enumerate(source) if character == ":"]
    at = next((place for place in colons if Path(source[:place]).is_dir()), [*colons, len(source)][0])
    return source[:at], source[at + 1 :]


def _refuse_saved(folder: Path) -> None:
    """Raise `DataError` if the folder is a single table written by `save_to_disk`."""
    if (folder / "state.json").is_file():
        raise DataError(
            f"{folder} was written by save_to_disk; turn it into a file: "
            f"datasets.load_from_disk({str(folder)!r}).to_parquet('pairs.parquet')"
        )


def files_of(folder: Path) -> dict[str, str]:
    """The file of each split in a folder: `train.*`, and any `dev.*` (or `val.*`, `validation.*`) and `test.*`."""
    by_split: dict[str, str] = {}
    for split, stems in _SPLIT_FILES.items():
        files = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise DataError(f"{folder} has {names} for one split; keep one of them, or give --data.source FILE")
        if files:
            by_split[split] = str(files[0])
    if "train" not in by_split:
        _refuse_saved(folder)
        names = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise DataError(
            f"{folder} has no train file ({names}); if it is laid out like a Hub data set, give {folder}:train"
        )
    return by_split


def _load_from_hub(source: str, subset: str | None) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    repo, split = name_and_split(source)
    if not repo.strip():
        raise DataError(f"{source!r} names no data set; give a file, a folder, a Hub id, or ID:SPLIT")
    requested = f"data set {repo}" + (f", subset {subset}" if subset else "")
    try:
        return datasets.load_dataset(repo, subset, split=split or "train")
    except Exception as error:  # the HTTP library's own too, as in `exporting.upload`
        if isinstance(error, OSError) or not isinstance(error, ValueError | RuntimeError | DatasetsError):
            raise HubError(offline_remedy(requested, error)) from error
        # An unknown subset or split (the message lists those that exist), a loading script, or unreadable files.
        raise DataError(f"{requested}, split {split or 'train'}: {one_line(error.__cause__ or error)}") from error


def _checked_rows(origin: dict[str, Any], where: str, columns: dict[str, str], labelled: bool) -> Iterator[Any]:
    """The generator behind `read`: rows with our column names, checked and numbered. Raises `DataError` that names the
    source and the row."""
    rows: Iterable[dict[str, Any] | str]
    if "path" in origin:

        def needed(found: list[str]) -> list[str]:
            return list(match_columns(found, where, columns, labelled).values())

        rows = rows_of_file(Path(origin["path"]), where, needed)
    elif "sample" in origin:
        pairs = sample_pairs()
        rows = (row for split, part in pairs.items() if origin["sample"] in (split, "all") for row in part)
    else:
        tables = origin["dataset"].with_format("arrow").iter(1000)
        rows = (row for table in tables for row in table.to_pylist())
    names: dict[str, str] | None = None
    for row, values in enumerate(rows):
        place = f"{where}, row {row + 1}"
        if isinstance(values, str):
            raise DataError(f"{place}: {values}")
        names = names or match_columns(list(values), where, columns, labelled)
        if problem := what_is_wrong(values, [names["text_a"], names["text_b"]]):
            null = "dataset" in origin and " is null; " in problem
            hint = " (if this is a csv: datasets reads words such as NA as null)" if null else ""
            raise DataError(f"{place}: {problem}{hint}")
        pair: dict[str, Any] = {"row": row, "text_a": values[names["text_a"]], "text_b": values[names["text_b"]]}
        if labelled:
            pair["label"] = _parse_label(values.get(names["label"]), place, names["label"])
        yield pair
    if names is None:
        raise DataError(f"{where} has no rows")


def rows_of_file(
    path: Path, where: str, needed: Callable[[list[str]], list[str]] | None = None
) -> Iterator[dict[str, Any] | str]:
    """The rows of a file, unchanged; a string in place of a row says what is wrong with that row.

    `where` is the file's name in messages. Of a parquet file's columns, only those that `needed` names are read: others
    may be large, such as vectors, or of types that Python does not have.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        with open_parquet(path, where) as file:
            names = file.schema_arrow.names
            refuse_twice(names, where)
            for batch in file.iter_batches(10_000, columns=needed(names) if needed else None):
                yield from batch.to_pylist()
        return
    # utf-8-sig: spreadsheets start a csv with a byte-order mark, which would become part of the first column's name.
    # surrogateescape: a byte that is not UTF-8 makes its own row unusable, and not the whole file.
    try:
        lines = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error
    with lines:
        yield from _rows_of_text(path.suffix.lower(), lines, where)


@contextmanager
def open_parquet(path: Path, where: str) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`; raises `DataError` if it or a value in it cannot be read."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    # OverflowError: a date out of Python's range. UnicodeDecodeError: pyarrow does not check that text is UTF-8.
    except (pyarrow.ArrowException, OverflowError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{where} cannot be read as parquet: {one_line(error)}") from error


def _rows_of_text(suffix: str, lines: Iterable[str], where: str) -> Iterator[dict[str, Any] | str]:
    if suffix == ".jsonl":
        for line in filter(str.strip, lines):
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, or more digits or nested brackets than Python reads
                item = None
            if not isinstance(item, dict):
                item = f"not a JSON object: {line.strip()[:60]!r}"
            # An escape such as \ud800 is not a character either.
            elif SURROGATE.search(json.dumps(item, ensure_ascii=False) if "\\u" in line else line):
                item = NOT_UTF8
            yield item
        return
    csv.field_size_limit(_LONGEST_FIELD)
    lines = _Lines(lines)
    reader = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        header = next(filter(None, reader), None)  # the first line that is not empty
    except csv.Error as error:
        raise DataError(f"{where}, header: {_csv_error(error)}") from error
    if header is None:
        return
    if SURROGATE.search("".join(header)):
        raise DataError(f"{where}, header: {NOT_UTF8}")
    refuse_twice(header, where)
    while True:
        lines.row.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.put_back()
            yield _csv_error(error)
            continue
        if len(fields) == len(header):
            if SURROGATE.search("".join(fields)):
                yield NOT_UTF8
            else:
                # An empty field is how a csv writes a null.
                yield {name: field or None for name, field in zip(header, fields, strict=True)}
        elif fields:
            span = f" (a quote joins {len(lines.row):,} lines into one row)" if len(lines.row) > 1 else ""
            hint = separator_hint(header) or "; quote fields that contain the separator"
            yield f"{len(fields)} fields where the header has {len(header)}{span}{hint}"


def _csv_error(error: csv.Error) -> str:
    return next((ours for theirs, ours in _CSV_ERRORS.items() if theirs in str(error)), str(error))


class _Lines(Iterator[str]):
    """The lines of a csv; those of the current row, except its first, can be put back to be read again.

    When a quote is never closed, the csv reader takes the following lines into its row. Putting them back confines the
    damage to the row of the quote.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines, self.pending = iter(lines), deque[str]()
        self.row: list[str] = []

    def __next__(self) -> str:
        self.row.append(self.pending.popleft() if self.pending else next(self.lines))
        return self.row[-1]

    def put_back(self) -> None:
        self.pending.extendleft(reversed(self.row[1:]))


def refuse_twice(header: list[str], where: str) -> None:
    """Raise `DataError` if two columns have the same name."""
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{where} has more than one column {repeated[0]!r}; rename one")


# Python's own limit (131,072 characters) is too low for a column of long texts. Without any limit, a quote that is
# never closed would read the rest of the file into memory.
_LONGEST_FIELD = 2**24
_CSV_ERRORS = {
    "unexpected end of data": "a quote is never closed",
    "expected after": "text follows a closing quote; double the quotes inside a field",
}
NOT_UTF8 = "not UTF-8; save the file as UTF-8"
SURROGATE = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of a byte that is not UTF-8


def what_is_wrong(values: Mapping[str, Any], columns: Iterable[str]) -> str | None:
    """Why the texts of a row, in these columns, cannot be used; None if they can."""
    for name in columns:
        text = values.get(name)
        if text is None:
            return f"{name} is null; remove the row or fill it in"
        if not isinstance(text, str):
            return f"{name} is not text but {type(text).__name__} ({one_line(text)[:60]})"
        if SURROGATE.search(text):
            return f"{name} is {NOT_UTF8}"
    return None


def match_columns(found: list[str], where: str, columns: Mapping[str, str], labelled: bool) -> dict[str, str]:
    """The source's name for each of the columns `text_a`, `text_b` and, if labelled, `label`; raises `DataError` if one
    is missing."""
    if unknown := set(columns) - set(ALIASES):
        raise DataError(f"columns: {sorted(unknown)} is not one of {list(ALIASES)}; write `text_a: NAME_IN_THE_FILE`")
    names: dict[str, str] = {}
    for ours, aliases in ALIASES.items():
        if ours == "label" and not labelled:
            continue
        wanted = (str(columns[ours]),) if ours in columns else aliases
        match = next((name for name in wanted if name in found), None)
        if match is None:
            raise DataError(
                f"{where} has no column {' or '.join(map(repr, wanted[:3]))} for {ours}; it has {found}"
                f"{separator_hint(found)}; rename one, or name it with --data.columns.{ours} NAME, if the command has "
                f"this option (for score: --columns.{ours} NAME)"
            )
        names[ours] = match
    for one, two in combinations(names, 2):
        if names[one] == names[two]:
            raise DataError(f"{where}: {one} and {two} are both the column {names[one]!r}; name two in columns")
    return names


def separator_hint(names: list[str]) -> str:
    """A hint for messages about columns, if a wrong separator seems to have made one name of them all; else empty."""
    other = re.search("[;\t|,]", str(names[0])) if len(names) == 1 else None
    return f"; is it separated by {other[0]!r}? a .csv file needs commas, a .tsv file tabs" if other else ""


def _parse_label(value: object, place: str, column: str) -> float:
    try:
        number = float(_WORD_LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        problem = "is empty" if value is None else f"{value!r} is not allowed"
        raise DataError(f"{place}: {column} {problem}; use 0 or 1, true or false, or a similarity from 0 to 1")
    return number


@cache
def sample_groups() -> tuple[dict[str, Any], ...]:
    """The groups of the bundled sample, topic by topic: a `topic`, and `questions` that all ask the same thing."""
    text = Path(__file__).with_name("sample").joinpath("questions.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def sample_pairs() -> dict[str, list[dict[str, Any]]]:
    """The pairs of the bundled sample for each split, about 37 % of them duplicates as in Quora; always the same.

    Whole groups are split, so that no question is in two splits: the first five groups of each topic are for training,
    the others for dev or, in every second topic, for test. A group of n questions gives n duplicates (each question
    with the next one, and the last with the first) and 1.7 n non-duplicates. Of these, a third are the pairs across
    groups of the same topic that share the most words, a third are drawn from the other such pairs, and a third pair a
    question with one from another topic.
    """
    by_topic: dict[str, list[dict[str, Any]]] = {}
    for group in sample_groups():
        by_topic.setdefault(group["topic"], []).append(group)
    topics = {"train": [groups[:5] for groups in by_topic.values()]}
    for split, first in (("val", 0), ("test", 1)):
        topics[split] = [groups[5:] for groups in list(by_topic.values())[first::2]]
    return {split: _pairs_of_topics(topics[split], random.Random(0)) for split in SPLITS}


def _pairs_of_topics(topics: list[list[dict[str, Any]]], rng: random.Random) -> list[dict[str, Any]]:
    pairs: list[tuple[str, str, int]] = []
    for number, groups in enumerate(topics):
        duplicates = [
            (question, group["questions"][(i + 1) % len(group["questions"])], 1)
            for group in groups
            for i, question in enumerate(group["questions"])
        ]
        near = [(a, b, 0) for one, two in combinations(groups, 2) for a in one["questions"] for b in two["questions"]]
        rng.shuffle(near)
        near.sort(key=lambda pair: -_shared_words(pair[0], pair[1]))
        third = round(1.7 * len(duplicates) / 3)
        next_topic = [question for group in topics[(number + 1) % len(topics)] for question in group["questions"]]
        far = [(rng.choice(duplicates)[0], rng.choice(next_topic), 0) for _ in range(third)]
        pairs += duplicates + near[:third] + rng.sample(near[third:], min(third, len(near) - third)) + far
    pairs = list(dict.fromkeys(pairs))
    rng.shuffle(pairs)
    # Either question may come first, so that the order reveals nothing.
    turned = [(b, a, label) if rng.random() < 0.5 else (a, b, label) for a, b, label in pairs]
    return [{"text_a": a, "text_b": b, "label": label} for a, b, label in turned]


def _shared_words(a: str, b: str) -> float:
    """The share of words that two questions have in common (Jaccard similarity)."""
    words_a, words_b = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return len(words_a & words_b) / len(words_a | words_b)

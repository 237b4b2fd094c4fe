"""Read question pairs from any source into one table, and split it.

    sample | file | Hub id[:split]  ->  rows as they are  ->  canonical()  ->  Dataset(row, text_a, text_b, label)

`row` counts from 0 and stays the pair's identity until the output file; messages count rows from 1, the header apart.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .errors import DataError, HubError, OutputError, UsageError, offline_remedy, one_line

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = "sample"
SPLITS = ("train", "val", "test")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

# The names that public data sets of question pairs give their columns: Quora, GLUE, STS-B, sentence-transformers.
ALIASES = {
    "text_a": ("text_a", "sentence1", "question1", "sentence_a", "text1", "question_a", "anchor", "sentence_A"),
    "text_b": ("text_b", "sentence2", "question2", "sentence_b", "text2", "question_b", "positive", "sentence_B"),
    "label": ("label", "is_duplicate", "labels", "duplicate", "score", "similarity"),
}
_SPLIT_FILES = {"train": ("train",), "val": ("dev", "val", "validation", "valid"), "test": ("test",)}
_WORD_LABELS = {"true": 1.0, "false": 0.0}


class Group(TypedDict):
    """Questions of the embedded sample that all ask the same thing."""

    topic: str
    questions: list[str]


def read(
    source: str, subset: str | None = None, columns: Mapping[str, str] | None = None, labelled: bool = True
) -> Dataset:
    """Read one source into a table with the columns `row`, `text_a`, `text_b` and, if labelled, `label`.

    Args:
        source: a csv, tsv, jsonl or parquet file; `sample` or `sample:SPLIT`; or a Hub data set `ID` or `ID:SPLIT`
            (split `train` when none is named).
        subset: the Hub data set's configuration.
        columns: the source's own names, such as `{"text_a": "left", "text_b": "right", "label": "same"}`.
        labelled: whether `label` is read: a float from 0 to 1.

    The table lies in an Arrow file in the cache of `datasets`, and is read from there the next time.

    Raises:
        DataError: the file, a column, or a row cannot be used; names the file and the row.
        HubError: the Hub is out of reach or has no such data set.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    require_name(source)
    origin: dict[str, Any]
    if is_local(source):
        path = Path(source)
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: cannot tell its format; name it {', '.join(SUFFIXES)}")
        # Size and time of change stand in the cache's key, so that an edited file is read anew.
        origin = {"path": str(path.resolve()), "stamp": [path.stat().st_size, path.stat().st_mtime_ns]}
    elif source.partition(":")[0] == SAMPLE:
        origin = {"sample": source.partition(":")[2] or "all"}
    else:
        origin = {"dataset": _load_from_hub(source, subset)}
    features = {"row": "int64", "text_a": "string", "text_b": "string"} | ({"label": "float32"} if labelled else {})
    try:
        table = datasets.Dataset.from_generator(
            _canonical_rows,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
            gen_kwargs={
                "origin": origin,
                "where": source,
                "columns": dict(columns or {}),
                "labelled": labelled,
                "version": __version__,
            },
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            raise OutputError(f"{datasets.config.HF_DATASETS_CACHE} cannot be written: {error.__cause__}") from error
        raise
    return table


def require_name(source: object) -> None:
    """Raise `UsageError` where labelled pairs are given themselves, as a DataFrame or a list."""
    if not isinstance(source, str | Path | None):
        kind = type(source).__name__
        raise UsageError(f"labelled pairs come from a file or the Hub: write the {kind} to a file, and give its name")


def is_local(source: str) -> bool:
    """Whether the source is a file on this machine; raises `DataError` if it looks like one and is not there."""
    path = Path(source)
    if path.is_file():
        return True
    if path.is_dir():
        raise DataError(f"{source or 'an empty name'} stands for a folder, where one file is needed")
    if path.suffix.lower() in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        raise DataError(f"{source}: no such file (looked in {Path.cwd()})")
    return False


def files_of(folder: Path) -> dict[str, str]:
    """The file of each split in a folder: `train.*`, and `dev.*` (or `val.*`, `validation.*`) and `test.*` if there."""
    found: dict[str, str] = {}
    for split, stems in _SPLIT_FILES.items():
        files = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise DataError(f"{folder} has {' and '.join(f.name for f in files)}: which one? Give --data.source FILE")
        if files:
            found[split] = str(files[0])
    if "train" not in found:
        raise DataError(f"{folder} has no train file ({', '.join('train' + suffix for suffix in SUFFIXES)})")
    return found


def _load_from_hub(source: str, subset: str | None) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    repo, _, split = source.partition(":")
    asked_for = f"data set {repo}" + (f", subset {subset}" if subset else "")
    try:
        return datasets.load_dataset(repo, subset, split=split or "train")
    except OSError as error:  # of the network and of the Hub
        raise HubError(offline_remedy(asked_for, error)) from error
    # An unknown subset or split, and the message lists those that exist; a loading script; files that cannot be read.
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"{asked_for}, split {split or 'train'}: {one_line(error.__cause__ or error)}") from error


def _canonical_rows(
    origin: dict[str, Any], where: str, columns: dict[str, str], labelled: bool, version: str
) -> Iterator[dict[str, Any]]:
    """The generator behind `read`; `version` is only there to stand in the cache's key."""
    if "path" in origin:
        rows = rows_of_file(Path(origin["path"]), where)
    elif "sample" in origin:
        pairs = sample_pairs()
        rows = (row for split, part in pairs.items() if origin["sample"] in (split, "all") for row in part)
    else:
        tables = origin["dataset"].with_format("arrow").iter(1000)
        rows = (row for table in tables for row in table.to_pylist())
    yield from canonical(rows, where, columns, labelled)


def rows_of_file(path: Path, where: str) -> Iterator[dict[str, Any] | str]:
    """The rows of a file as they stand there; a string in place of a row says what is wrong with it.

    Raises `DataError` where the file as a whole cannot be read; `where` is what messages call it.
    """
    if path.suffix.lower() == ".parquet":
        with open_parquet(path, where) as file:
            refuse_twice(file.schema_arrow.names, where)
            for batch in file.iter_batches(10_000):
                yield from batch.to_pylist()
        return
    # utf-8-sig: spreadsheets begin a csv with a byte-order mark, which else becomes a part of the first column's name.
    # surrogateescape: a byte that is no UTF-8 spoils its row, and not the file.
    try:
        lines = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error
    with lines:
        yield from _rows_of_text(path.suffix.lower(), lines, where)


@contextmanager
def open_parquet(path: Path, where: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; raises `DataError` for what cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OverflowError, OSError) as error:  # a date that Python has not
        raise DataError(f"{where} cannot be read as parquet: {one_line(error)}") from error


def _rows_of_text(suffix: str, lines: Iterable[str], where: str) -> Iterator[dict[str, Any] | str]:
    if suffix == ".jsonl":
        for line in filter(str.strip, lines):
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):  # no JSON, or with more digits or brackets than Python reads
                item = None
            if not isinstance(item, dict):
                item = f"not a JSON object: {line.strip()[:60]!r}"
            # An escape such as \ud800 is no character either.
            elif SURROGATE.search(json.dumps(item, ensure_ascii=False) if "\\u" in line else line):
                item = NOT_UTF8
            yield item
        return
    csv.field_size_limit(_LONGEST_FIELD)
    lines = _Lines(lines)
    reader = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{where}, header: {_csv_error(error)}") from error
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
            over = f" (over {len(lines.row):,} lines, which a quote holds together)" if len(lines.row) > 1 else ""
            hint = separator_hint(header) or "; quote fields that hold the separator"
            yield f"{len(fields)} fields where the header has {len(header)}{over}{hint}"


def _csv_error(error: csv.Error) -> str:
    return next((ours for theirs, ours in _CSV_ERRORS.items() if theirs in str(error)), str(error))


class _Lines(Iterator[str]):
    """Lines of a csv, of which all but the first of the row at hand can be read once more.

    A quote that is never closed takes the lines after it along, but spoils its own only.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines, self.waiting = iter(lines), deque[str]()
        self.row: list[str] = []

    def __next__(self) -> str:
        self.row.append(self.waiting.popleft() if self.waiting else next(self.lines))
        return self.row[-1]

    def put_back(self) -> None:
        self.waiting.extendleft(reversed(self.row[1:]))


def refuse_twice(header: list[str], where: str) -> None:
    """Raise `DataError` where two columns have one name."""
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{where} has more than one column {twice[0]!r} in its header; rename one")


# Python's own limit would not let a long text pass beside the questions; without any, a quote that is never closed
# would take all that follows into memory.
_LONGEST_FIELD = 2**24
_CSV_ERRORS = {
    "unexpected end of data": "a quote is never closed",
    "expected after": "text follows a closing quote; write quotes within a field twice",
}
NOT_UTF8 = "not UTF-8; save the file as UTF-8"
SURROGATE = re.compile("[\ud800-\udfff]")  # what a byte that is no UTF-8 is read as


def canonical(
    rows: Iterable[Mapping[str, Any] | str], where: str, columns: Mapping[str, str], labelled: bool
) -> Iterator[dict[str, Any]]:
    """Rename the columns, check every row and give it its number. Raises `DataError` with the source and the row."""
    names: dict[str, str] | None = None
    for row, values in enumerate(rows):
        place = f"{where}, row {row + 1}"
        if isinstance(values, str):
            raise DataError(f"{place}: {values}")
        names = names or match_columns(list(values), where, columns, labelled)
        if wrong := what_is_wrong(values, [names["text_a"], names["text_b"]]):
            raise DataError(f"{place}: {wrong}")
        pair: dict[str, Any] = {"row": row, **{side: values[names[side]] for side in ("text_a", "text_b")}}
        if labelled:
            pair["label"] = _parse_label(values.get(names["label"]), place, names["label"])
        yield pair
    if names is None:
        raise DataError(f"{where} has no rows")


def what_is_wrong(values: Mapping[str, Any], columns: Iterable[str]) -> str | None:
    """Why the texts of a row, which stand in these columns, cannot be read; or None."""
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
    """The source's own name of each of our columns; raises `DataError` if one is missing."""
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
                f"{separator_hint(found)}; rename one, or where the command has the option, name it with "
                f"--data.columns.{ours} NAME (in score --columns.{ours} NAME)"
            )
        names[ours] = match
    if names["text_a"] == names["text_b"]:
        raise DataError(f"{where}: text_a and text_b are both the column {names['text_a']!r}; name two in columns")
    return names


def separator_hint(names: list[str]) -> str:
    """What a message about columns adds where all names seem to be one."""
    other = re.search("[;\t|,]", str(names[0])) if len(names) == 1 else None
    return f"; is it separated by {other[0]!r}? a .csv has commas, a .tsv tabs" if other else ""


def _parse_label(value: object, place: str, column: str) -> float:
    try:
        number = float(_WORD_LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        wrong = "is empty" if value is None else f"{value!r} is not allowed"
        raise DataError(f"{place}: {column} {wrong}; use 0 or 1, true or false, or a similarity from 0 to 1")
    return number


def sizes(rows: int, val_size: float | None, test_size: float | None, where: str) -> tuple[int, int]:
    """The number of dev and test rows: a size under 1 is a share, of one row at least; None is 10,000 (the reference
    recipe's number), or a tenth of a source with fewer than 100,000 rows. Raises `DataError` for a size that is none,
    and when nothing is left for training."""
    wanted = [min(10_000, rows // 10) if size is None else size for size in (val_size, test_size)]
    if not all(0 <= size < math.inf for size in wanted):
        raise DataError(f"--data.val_size {val_size} and --data.test_size {test_size} must be finite and at least 0")
    val, test = (max(1, round(size * rows)) if 0 < size < 1 else int(size) for size in wanted)
    if val + test >= rows:
        raise DataError(
            f"{where} has {rows:,} rows; {val:,} for dev and {test:,} for test leave none for training; "
            "set --data.val_size and --data.test_size"
        )
    return val, test


def split_by_position(rows: int, val: int, test: int) -> dict[str, Sequence[int]]:
    """The first rows are dev, the next test, the rest training, as in sentence-transformers' Quora example."""
    return {"val": range(val), "test": range(val, val + test), "train": range(val + test, rows)}


def split_by_question(texts_a: Sequence[str], texts_b: Sequence[str], val: int, test: int) -> dict[str, Sequence[int]]:
    """Split so that no question stands in two splits (case and white space apart).

    Pairs that share a question, directly or through others, form a component; whole components are dealt, in an order
    that is random but always the same, to dev and test as long as they fit. What fits neither stays in training.
    """
    ends = [(normalized(a), normalized(b)) for a, b in zip(texts_a, texts_b, strict=True)]
    component = _components(dict.fromkeys(text for pair in ends for text in pair), ends)
    members: dict[int, list[int]] = {}
    for row, (text, _) in enumerate(ends):
        members.setdefault(component[text], []).append(row)
    order = list(members)
    random.Random(0).shuffle(order)
    split: dict[str, list[int]] = {"val": [], "test": [], "train": []}
    room = {"val": val, "test": test}
    for number in order:
        rows = members[number]
        target = next((name for name in room if len(rows) <= room[name] - len(split[name])), "train")
        split[target] += rows
    return {name: sorted(rows) for name, rows in split.items()}


def _components(nodes: Iterable[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The number of each node's component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers = {node: number for number, node in enumerate(nodes)}
    ends = [[numbers[edge[side]] for edge in edges] for side in (0, 1)]
    graph = coo_array((np.ones(len(edges), dtype=bool), ends), shape=(len(numbers), len(numbers)))
    return dict(zip(numbers, connected_components(graph, directed=False)[1].tolist(), strict=True))


def unseen(pairs: Dataset, others: Dataset) -> NDArray[np.bool_]:
    """Of each pair whether neither of its questions stands in the others (case and white space apart); (pairs,)."""
    known = {normalized(text) for side in ("text_a", "text_b") for text in others[side][:]}
    sides = (pairs["text_a"][:], pairs["text_b"][:])
    return np.array([not {normalized(a), normalized(b)} & known for a, b in zip(*sides, strict=True)], dtype=bool)


def add_transitive(pairs: Dataset, evaluated: Iterable[Dataset] = ()) -> Dataset:
    """Add the pairs that follow from others: a~b and b~c make a~c; a~b and b≁c make a≁c (~: a label from 0.5 on).

    Questions that duplicates connect are a group (case and white space apart). All pairs within a group are duplicates,
    and all pairs between two groups are none where one of them is labelled so. A group that holds a pair which is
    labelled as none contradicts itself and adds nothing. A pair that is `evaluated` is not added, whatever follows.
    Added pairs come last, their rows counted on.
    """
    import datasets

    columns = pairs[:]
    texts: dict[str, str] = {}
    known: dict[tuple[str, str], bool] = {}
    same: list[tuple[str, str]] = []
    for a, b, label in zip(columns["text_a"], columns["text_b"], columns["label"], strict=True):
        one, two = (normalized(text) for text in (a, b))
        for key, text in ((one, a), (two, b)):
            texts.setdefault(key, text)
        pair = _unordered(one, two)
        known[pair] = label >= 0.5 and known.get(pair, True)
        if label >= 0.5:
            same.append((one, two))
    group = _components(texts, same)
    members: dict[int, list[str]] = {}
    for key in texts:
        members.setdefault(group[key], []).append(key)
    apart = {(group[a], group[b]) for (a, b), duplicate in known.items() if not duplicate}
    torn = {one for one, two in apart if one == two}
    apart = {(one, two) for one, two in apart if not {one, two} & torn}
    follow = [(pair, 1.0) for one in members.keys() - torn for pair in combinations(members[one], 2)]
    follow += [(pair, 0.0) for one, two in apart for pair in product(members[one], members[two])]
    added = {_unordered(*pair): label for pair, label in follow}
    tables = (part[:] for part in evaluated)
    others = {
        _unordered(normalized(a), normalized(b))
        for part in tables
        for a, b in zip(part["text_a"], part["text_b"], strict=True)
    }
    rows = [(pair, label) for pair, label in sorted(added.items()) if pair not in known and pair not in others]
    first = max(columns["row"]) + 1
    table = {
        "row": list(range(first, first + len(rows))),
        "text_a": [texts[a] for (a, _), _ in rows],
        "text_b": [texts[b] for (_, b), _ in rows],
        "label": [label for _, label in rows],
    }
    return datasets.concatenate_datasets([pairs, datasets.Dataset.from_dict(table, features=pairs.features)])


def _unordered(one: str, two: str) -> tuple[str, str]:
    """What makes two pairs of normalized questions the same: these, in either order."""
    return min(one, two), max(one, two)


def normalized(text: str) -> str:
    """What makes two texts the same question: case and white space do not tell them apart."""
    return " ".join(text.casefold().split())


@cache
def sample_groups() -> tuple[Group, ...]:
    """The question groups of the embedded sample, in the file's order, topic by topic."""
    text = resources.files("crossenc").joinpath("sample/questions.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def sample_pairs() -> dict[str, list[dict[str, Any]]]:
    """The pairs of the embedded sample for each split, about 37 % of them duplicates as in Quora; always the same.

    Groups are split, so that no question stands in two splits: of each topic's groups the first five are for training,
    the others for dev in one topic and for test in the next. A group of n questions gives n duplicates (each question
    with the next, around the circle) and 1.7 n non-duplicates: a third are the pairs across groups of its topic that
    share most words, a third are drawn from the rest of the topic, a third pair it with another topic.
    """
    by_topic: dict[str, list[Group]] = {}
    for group in sample_groups():
        by_topic.setdefault(group["topic"], []).append(group)
    topics: dict[str, list[list[Group]]] = {"train": [groups[:5] for groups in by_topic.values()]}
    for split, first in (("val", 0), ("test", 1)):
        topics[split] = [groups[5:] for groups in list(by_topic.values())[first::2]]
    return {split: _pairs_of_topics(topics[split], random.Random(0)) for split in SPLITS}


def _pairs_of_topics(topics: list[list[Group]], draw: random.Random) -> list[dict[str, Any]]:
    pairs: list[tuple[str, str, int]] = []
    for number, groups in enumerate(topics):
        duplicates = [
            (question, group["questions"][(i + 1) % len(group["questions"])], 1)
            for group in groups
            for i, question in enumerate(group["questions"])
        ]
        near = [(a, b, 0) for one, two in combinations(groups, 2) for a in one["questions"] for b in two["questions"]]
        draw.shuffle(near)
        near.sort(key=lambda pair: -_shared_words(pair[0], pair[1]))
        third = round(1.7 * len(duplicates) / 3)
        elsewhere = [question for group in topics[(number + 1) % len(topics)] for question in group["questions"]]
        far = [(draw.choice(duplicates)[0], draw.choice(elsewhere), 0) for _ in range(third)]
        pairs += duplicates + near[:third] + draw.sample(near[third:], min(third, len(near) - third)) + far
    pairs = list(dict.fromkeys(pairs))
    draw.shuffle(pairs)
    # Either question may come first, so that the order tells nothing.
    turned = [(b, a, label) if draw.random() < 0.5 else (a, b, label) for a, b, label in pairs]
    return [{"text_a": a, "text_b": b, "label": label} for a, b, label in turned]


def _shared_words(a: str, b: str) -> float:
    """The share of words that two questions have in common (Jaccard)."""
    one, two = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return len(one & two) / len(one | two)

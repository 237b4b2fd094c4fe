"""Cut a table of pairs into splits; the pairs that share no question with others, and those that follow from others.

Texts that differ only in case and white space count as the same question.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def sizes(rows: int, val_size: float | None, test_size: float | None, where: str) -> tuple[int, int]:
    """The number of dev and test rows. A size under 1 is a fraction of the rows, and gives at least one; None means
    10,000 (as in the reference recipe), or a tenth of a source with fewer than 100,000 rows. Raises `DataError` if a
    size is negative, neither whole nor under 1, or not finite, or if nothing is left for training."""
    wanted = [min(10_000, rows // 10) if size is None else size for size in (val_size, test_size)]
    if not all(0 <= size < math.inf and (size < 1 or size == int(size)) for size in wanted):
        raise DataError(
            f"--data.val_size {val_size}, --data.test_size {test_size}: each must be null, a whole number, or a "
            "fraction under 1"
        )
    val, test = (max(1, round(size * rows)) if 0 < size < 1 else int(size) for size in wanted)
    if val + test >= rows:
        raise DataError(
            f"{where} has {rows:,} rows; {val:,} for dev and {test:,} for test leave none for training; "
            "set --data.val_size and --data.test_size"
        )
    return val, test


def split_by_position(rows: int, val: int, test: int) -> dict[str, Sequence[int]]:
    """The first rows for dev, the next for test, the rest for training, as in sentence-transformers' Quora example."""
    return {"val": range(val), "test": range(val, val + test), "train": range(val + test, rows)}


def split_by_question(texts_a: Sequence[str], texts_b: Sequence[str], val: int, test: int) -> dict[str, Sequence[int]]:
    """Split so that no question is in two splits (ignoring case and white space).

    Pairs that share a question, directly or through others, form a component. Whole components go to dev and test as
    long as they fit, in a random order that is always the same. Those that fit neither go to training.
    """
    questions = [(normalized(a), normalized(b)) for a, b in zip(texts_a, texts_b, strict=True)]
    component = _components(dict.fromkeys(question for pair in questions for question in pair), questions)
    members: dict[int, list[int]] = {}
    for row, (question, _) in enumerate(questions):
        members.setdefault(component[question], []).append(row)
    order = list(members)
    random.Random(0).shuffle(order)
    split: dict[str, list[int]] = {"val": [], "test": [], "train": []}
    wanted = {"val": val, "test": test}
    for number in order:
        rows = members[number]
        target = next((name for name in wanted if len(rows) <= wanted[name] - len(split[name])), "train")
        split[target] += rows
    return {name: sorted(rows) for name, rows in split.items()}


def _components(nodes: Iterable[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The number of the connected component of each node."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers = {node: number for number, node in enumerate(nodes)}
    ends = [[numbers[edge[side]] for edge in edges] for side in (0, 1)]
    graph = coo_array((np.ones(len(edges), dtype=bool), ends), shape=(len(numbers), len(numbers)))
    return dict(zip(numbers, connected_components(graph, directed=False)[1].tolist(), strict=True))


def unseen(pairs: Dataset, others: Dataset) -> NDArray[np.bool_]:
    """For each pair, whether neither of its questions is in the others (ignoring case and white space), shape
    (pairs,)."""
    known = {question for pair in _questions(others) for question in pair}
    return np.array([known.isdisjoint(pair) for pair in _questions(pairs)], dtype=bool)


def _questions(pairs: Dataset) -> list[tuple[str, str]]:
    """The normalized texts of each pair."""
    return [(normalized(a), normalized(b)) for a, b in zip(pairs["text_a"][:], pairs["text_b"][:], strict=True)]


def add_transitive(pairs: Dataset, evaluated: Iterable[Dataset] = ()) -> Dataset:
    """Add the pairs that follow from others: a~b and b~c make a~c; a~b and b≁c make a≁c (~: a label of at least 0.5).

    Questions connected by duplicates form a group (ignoring case and white space). All pairs within a group are
    duplicates. All pairs between two groups are non-duplicates if one of them is labelled as such. A group that
    contains a labelled non-duplicate contradicts itself, and adds nothing. A pair in `evaluated` is never added. Added
    pairs come last, with the next row numbers.
    """
    import datasets

    columns = pairs[:]
    texts: dict[str, str] = {}
    known: dict[tuple[str, str], bool] = {}
    duplicates: list[tuple[str, str]] = []
    for text_a, text_b, label in zip(columns["text_a"], columns["text_b"], columns["label"], strict=True):
        a, b = normalized(text_a), normalized(text_b)
        texts.setdefault(a, text_a)
        texts.setdefault(b, text_b)
        pair = _unordered(a, b)
        known[pair] = label >= 0.5 and known.get(pair, True)
        if label >= 0.5:
            duplicates.append((a, b))
    group = _components(texts, duplicates)
    members: dict[int, list[str]] = {}
    for key in texts:
        members.setdefault(group[key], []).append(key)
    different = {(group[a], group[b]) for (a, b), duplicate in known.items() if not duplicate}
    contradictory = {one for one, two in different if one == two}
    different = {(one, two) for one, two in different if not {one, two} & contradictory}
    implied = [(pair, 1.0) for one in members.keys() - contradictory for pair in combinations(members[one], 2)]
    implied += [(pair, 0.0) for one, two in different for pair in product(members[one], members[two])]
    added = {_unordered(*pair): label for pair, label in implied}
    held_out = {_unordered(*pair) for part in evaluated for pair in _questions(part)}
    rows = [(pair, label) for pair, label in sorted(added.items()) if pair not in known and pair not in held_out]
    first = max(columns["row"]) + 1
    table = {
        "row": list(range(first, first + len(rows))),
        "text_a": [texts[a] for (a, _), _ in rows],
        "text_b": [texts[b] for (_, b), _ in rows],
        "label": [label for _, label in rows],
    }
    return datasets.concatenate_datasets([pairs, datasets.Dataset.from_dict(table, features=pairs.features)])


def _unordered(one: str, two: str) -> tuple[str, str]:
    """A pair of normalized questions in a fixed order, since (a, b) and (b, a) count as the same pair."""
    return min(one, two), max(one, two)


def normalized(text: str) -> str:
    """The text without differences of case and white space: two texts with the same form count as the same question."""
    return " ".join(text.casefold().split())

"""The order of an epoch: which pairs make a step, and which device takes which of them.

1 permute   all rows, by seed and epoch
2 window    sort the rows of `window` steps by length, every other window from long to short, so that lengths are
            similar across the border between two windows as well
3 cut       into steps with equally many pairs, or with equally many tokens
4 shuffle   the steps
5 deal      the rows of a step to its shares, one for each device and accumulated batch: equally many pairs and tokens

Every device derives the whole plan from (seed, epoch, lengths) alone and takes its own shares. So the steps are the
same for any number of devices, and no device waits for one with longer texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from .errors import DataError

Rows = NDArray[np.int64]
BatchBy: TypeAlias = Literal["pairs", "tokens"]


def plan_steps(
    lengths: Rows, pairs: int, *, by: BatchBy, window: int, shares: int, seed: int, epoch: int
) -> list[Rows]:
    """The steps of an epoch, each an array of row numbers, the longest row first; every row is in exactly one step.

    Args:
        lengths: tokens of each row, shape (rows,).
        pairs: pairs in a step: the maximum, or with `by="tokens"` the mean.
        by: what steps have equal amounts of. Either way, there are rows / pairs steps, rounded up.
        window: number of steps whose rows are sorted by length together; 1 is a plain shuffle.
        shares: devices times accumulated batches. This matters only where a step would have fewer rows than shares:
            then it gets more rows, or there are fewer steps.

    Raises:
        DataError: there are fewer rows than shares.
    """
    count = len(lengths)
    if count < shares:
        raise DataError(f"{count} training pairs are too few for {shares} (devices x accumulated batches); use fewer")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(count)
    window_of = np.arange(count) // (window * pairs)
    if window > 1:
        key = np.where(window_of % 2, -lengths[order], lengths[order])
        order = order[np.lexsort((key, window_of))]
    steps = min(math.ceil(count / pairs), count // shares)
    parts = cut(order, lengths[order] if by == "tokens" else np.ones_like(order), steps, shares)
    return [part[np.argsort(-lengths[part], kind="stable")] for part in (parts[i] for i in rng.permutation(steps))]


def cut(rows: Rows, weights: Rows, parts: int, least: int = 1) -> list[Rows]:
    """Cut rows into `parts` parts of similar weight, each of at least `least` rows, without changing their order."""
    cumulative, number = np.cumsum(weights), np.arange(1, parts)
    borders = np.searchsorted(cumulative, number * cumulative[-1] / parts, side="right")
    # A heavy row can be enough for a part, or for several: each still gets `least` rows.
    borders = np.maximum.accumulate(np.maximum(borders, number * least) - number * least) + number * least
    return np.split(rows, np.minimum(borders, len(rows) - number[::-1] * least))


def deal(rows: Rows, lengths: Rows, shares: int) -> list[Rows]:
    """Deal a step's rows, longest first, into shares of equally many pairs, give or take one, and about as many tokens.

    In each round, every share gets one row; the share with the fewest tokens so far gets the longest row. No two shares
    differ by more tokens than the longest row has.
    """
    if shares == 1:
        return [rows]
    tokens, owner = np.zeros(shares, dtype=np.int64), np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), shares):
        part = slice(start, min(start + shares, len(rows)))
        owner[part] = np.argsort(tokens, kind="stable")[: part.stop - start]
        tokens[owner[part]] += lengths[rows[part]]
    return [rows[owner == share] for share in range(shares)]


def plan_evaluation(lengths: Rows, tokens: int, rank: int, ranks: int) -> list[Rows]:
    """One device's batches for evaluation, the longest rows first; over all devices, every row is in exactly one.

    A batch has up to `tokens` tokens, padding included; a longer row is a batch of its own. All devices have equally
    many batches, if there is a row for each: rows left at the end, too few for one each, go into the last batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = ranks * max(1, tokens // int(lengths[order[start]]))
        if len(order) - start - size < ranks:
            size = len(order) - start
        batches.append(order[start : start + size][rank::ranks])
        start += size
    return batches


class TrainingOrder(DistributedSampler[Any]):
    """Yields the rows of each batch of one device, in the order of `plan_steps`, which differs from epoch to epoch.

    It is a DistributedSampler, so that Lightning sets its epoch and does not replace it with its own sampler. Use it as
    `DataLoader(..., sampler=order, batch_size=None)`. Set `start` to resume in the middle of an epoch.

    With `symmetric`, the data hold every pair once more, after all others, with its texts swapped; each epoch takes one
    of the two at random. With `twice`, a batch holds every pair twice: as it is, or with `symmetric` in both orders.
    """

    def __init__(
        self,
        lengths: Rows,
        batch_size: int,
        *,
        by: BatchBy,
        window: int,
        accumulate: int,
        rank: int,
        ranks: int,
        seed: int,
        symmetric: bool = False,
        twice: bool = False,
    ) -> None:
        super().__init__(lengths, num_replicas=ranks, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.symmetric, self.twice = lengths, symmetric, twice
        self.accumulate, self.start = accumulate, 0
        self.shares = ranks * accumulate
        self.plan = partial(
            plan_steps, lengths, batch_size * self.shares, by=by, window=window, shares=self.shares, seed=seed
        )
        self.steps = len(self.plan(epoch=0))

    def mean_pairs(self) -> float:
        """Mean number of pairs in a batch of one device; the weight of every pair in the loss is its inverse."""
        return len(self.lengths) / (self.steps * self.shares)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the epoch, from batch number `start` on."""
        count = len(self.lengths)
        swap = np.zeros(count, dtype=np.int64)  # added to a row: its swapped pair is `count` rows after it
        if self.symmetric:
            swap += count * (self.twice | (np.random.default_rng((self.seed, self.epoch, 1)).random(count) < 0.5))
        done, skipped = divmod(self.start, self.accumulate)
        for step, rows in enumerate(self.plan(epoch=self.epoch)[done:]):
            parts = deal(rows, self.lengths, self.shares)[self.rank :: self.num_replicas]
            for part in parts[0 if step else skipped :]:
                yield [*(part.tolist() if self.twice else ()), *(part + swap[part]).tolist()]

    def __len__(self) -> int:
        return self.steps * self.accumulate


class EvaluationOrder(DistributedSampler[Any]):
    """Yields the rows of each batch of one device, by `plan_evaluation`: no row twice, for any number of devices."""

    def __init__(self, lengths: Rows, tokens: int, *, rank: int, ranks: int) -> None:
        super().__init__(lengths, num_replicas=ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batches = plan_evaluation(lengths, tokens, rank, ranks)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

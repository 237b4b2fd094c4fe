"""The order of an epoch: which pairs make a step together, and which device takes which of them.

1 permute   all rows, by seed and epoch
2 window    rows of `window` steps are sorted by length together, every other window from long to short, so that
            neighbours across a border are of like length too
3 cut       into steps: of equally many pairs, or of equally many tokens
4 shuffle   the steps
5 deal      each step's rows to its shares, one for each device and accumulated batch: as many pairs and tokens to each

Every device derives the whole plan from (seed, epoch, lengths) alone and takes its own shares, so that the steps are
the same for any number of devices and no device waits for one with longer texts.
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
    """The steps of an epoch, each an array of row numbers from long to short; every row stands in exactly one.

    Args:
        lengths: tokens of each row, shape (rows,).
        pairs: pairs in a step: the most, or with `by="tokens"` the mean.
        by: what all steps have equally much of. There are rows / pairs steps, rounded up, either way.
        window: how many steps' rows are sorted by length together; 1 leaves a plain shuffle.
        shares: devices times accumulated batches. It changes nothing but where a step would have fewer rows: it gets
            more, or there are fewer steps.

    Raises:
        DataError: there are fewer rows than shares.
    """
    count = len(lengths)
    if count < shares:
        raise DataError(f"{count} training pairs are too few for {shares} (devices x accumulated batches); take fewer")
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(count)
    number = np.arange(count) // (window * pairs)
    if window > 1:
        key = np.where(number % 2, -lengths[order], lengths[order])
        order = order[np.lexsort((key, number))]
    steps = min(math.ceil(count / pairs), count // shares)
    parts = cut(order, lengths[order] if by == "tokens" else np.ones_like(order), steps, shares)
    return [part[np.argsort(-lengths[part], kind="stable")] for part in (parts[i] for i in draw.permutation(steps))]


def cut(rows: Rows, weights: Rows, parts: int, least: int = 1) -> list[Rows]:
    """Cut rows into so many parts of like weight, each of at least `least` rows, without changing their order."""
    filled, number = np.cumsum(weights), np.arange(1, parts)
    places = np.searchsorted(filled, number * filled[-1] / parts, side="right")
    # A heavy row may fill a part alone, or several.
    places = np.maximum.accumulate(np.maximum(places, number * least) - number * least) + number * least
    return np.split(rows, np.minimum(places, len(rows) - number[::-1] * least))


def deal(rows: Rows, lengths: Rows, shares: int) -> list[Rows]:
    """A step's rows (from long to short) in shares of equally many pairs, give or take one, and of like many tokens.

    In rounds, each share gets one row of each: the share with the fewest tokens so far gets the longest. No two shares
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
    """Batches of one device for evaluation, longest rows first; over all devices every row stands in exactly one.

    Batches are of up to `tokens` tokens, padding included; a row that is longer makes a batch alone. All devices have
    as many, if there is a row for each: what is left at the end, less than one for each, goes into the last batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = ranks * max(1, tokens // int(lengths[order[start]]))
        if len(order) - start - size < ranks:
            size = len(order) - start
        batches.append(order[start : start + size][rank::ranks])
        start += size
    return [batch for batch in batches if len(batch)]


class TrainingOrder(DistributedSampler[Any]):
    """Yields the rows of each batch of one device, in the order of `plan_steps`, a new one each epoch.

    A DistributedSampler, so that Lightning tells it the epoch and puts no sampler of its own in its place. For use as
    `DataLoader(..., sampler=order, batch_size=None)`. `start` is set to go on in the middle of an epoch.

    With `symmetric` the data hold every pair once more behind all others, its texts in the other order, and each epoch
    takes one of the two at random. With `twice` a batch holds every pair twice: the same, or `symmetric` both orders.
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
        """Pairs in a batch of one device, on average over the epoch: every pair's weight in the loss is its inverse."""
        return len(self.lengths) / (self.steps * self.shares)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the epoch from batch number `start` on."""
        count = len(self.lengths)
        turned = np.zeros(count, dtype=np.int64)  # added to a row: its other order stands `count` rows behind it
        if self.symmetric:
            turned += count * (self.twice | (np.random.default_rng((self.seed, self.epoch, 1)).random(count) < 0.5))
        done, skipped = divmod(self.start, self.accumulate)
        for step, rows in enumerate(self.plan(epoch=self.epoch)[done:]):
            parts = deal(rows, self.lengths, self.shares)[self.rank :: self.num_replicas]
            for part in parts[0 if step else skipped :]:
                yield [*(part.tolist() if self.twice else ()), *(part + turned[part]).tolist()]

    def __len__(self) -> int:
        return self.steps * self.accumulate


class EvaluationOrder(DistributedSampler[Any]):
    """Yields the rows of each batch of one device as `plan_evaluation` has them: no row twice, whatever the devices."""

    def __init__(self, lengths: Rows, tokens: int, *, rank: int, ranks: int) -> None:
        super().__init__(lengths, num_replicas=ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batches = plan_evaluation(lengths, tokens, rank, ranks)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

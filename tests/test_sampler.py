"""Laws of the order: every row once, the same steps for any number of devices, like lengths together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crossenc.errors import DataError
from crossenc.sampler import EvaluationOrder, TrainingOrder, deal, plan_evaluation, plan_steps

LENGTHS = st.lists(st.integers(5, 512), min_size=1, max_size=300).map(lambda found: np.array(found, dtype=np.int64))
BY = st.sampled_from(["pairs", "tokens"])


def padded(lengths: np.ndarray, batches: list[np.ndarray]) -> int:
    return sum(int(lengths[rows].max()) * len(rows) for rows in batches)


@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.integers(1, 70), BY, st.integers(1, 9), st.integers(1, 6), st.integers(0, 3))
@example(np.arange(100) % 7 + 5, 8, "pairs", 3, 2, 0)  # most that are drawn are a step or two
@example(np.arange(100) % 7 + 5, 8, "tokens", 3, 2, 0)
def test_a_plan_holds_each_row_once(lengths, pairs, by, window, shares, epoch):
    if len(lengths) < shares:
        with pytest.raises(DataError, match="too few"):
            plan_steps(lengths, pairs, by=by, window=window, shares=shares, seed=1, epoch=epoch)
        return
    steps = plan_steps(lengths, pairs, by=by, window=window, shares=shares, seed=1, epoch=epoch)
    assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
    assert min(map(len, steps)) >= shares
    assert len(steps) == max(1, min(-(-len(lengths) // pairs), len(lengths) // shares))
    assert all((np.diff(lengths[rows]) <= 0).all() for rows in steps)
    if by == "pairs":
        sizes = list(map(len, steps))
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= pairs or len(lengths) // shares < -(-len(lengths) // pairs)


@pytest.mark.parametrize(("symmetric", "window"), [(False, 1), (True, 1), (False, 10)])
def test_an_epoch_goes_on_from_any_batch_and_is_another_by_seed_and_number(symmetric: bool, window: int):
    def made(seed: int, epoch: int, start: int = 0) -> list[list[int]]:
        lengths = np.arange(100) % 7 + 5
        settings = {"by": "pairs", "window": window, "accumulate": 3, "rank": 0, "ranks": 1, "symmetric": symmetric}
        order = TrainingOrder(lengths, 4, seed=seed, **settings)
        order.set_epoch(epoch)
        order.start = start
        return list(order)

    whole = made(0, 1)
    for start in range(len(whole)):
        assert made(0, 1, start) == whole[start:]
    turned = [
        {row % 100 for batch in epoch for row in batch if row >= 100} for epoch in (whole, made(1, 1), made(0, 2))
    ]
    assert all((turned[0] != other) == symmetric for other in turned[1:])
    assert whole not in (made(1, 1), made(0, 2))


def orders(lengths: np.ndarray, by: str, batch_size: int, accumulate: int, ranks: int, epoch: int = 0) -> list:
    made = [
        TrainingOrder(lengths, batch_size, by=by, window=3, accumulate=accumulate, rank=rank, ranks=ranks, seed=7)
        for rank in range(ranks)
    ]
    for order in made:
        order.set_epoch(epoch)
    return made


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(20, 40), min_size=8, max_size=300).map(np.array), BY, st.integers(0, 2))
def test_devices_and_accumulation_change_no_step(lengths, by, epoch):
    whole = [set(rows) for rows in orders(lengths, by, 8, 1, 1, epoch)[0]]
    for batch_size, accumulate, ranks in ((4, 1, 2), (4, 2, 1), (2, 2, 2), (2, 1, 4)):
        shares = orders(lengths, by, batch_size, accumulate, ranks, epoch)
        batches = list(zip(*shares, strict=True))  # one for each device
        assert len(batches) == len(shares[0]) == len(whole) * accumulate
        steps = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
        for step, rows in zip(steps, whole, strict=True):
            parts = [part for turn in step for part in turn]
            assert sorted(row for part in parts for row in part) == sorted(rows)
            assert min(map(len, parts)) >= 1
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            tokens = [lengths[part].sum() for part in parts]
            assert max(tokens) - min(tokens) <= max(lengths[part].max() for part in parts)
        assert shares[0].mean_pairs() == pytest.approx(len(lengths) / (len(batches) * ranks))


@pytest.mark.parametrize(("by", "least"), [("pairs", 0.95), ("tokens", 0.96)])
def test_windows_save_padding(by: str, least: float):
    lengths = np.random.default_rng(0).lognormal(3.3, 0.4, 9000).astype(np.int64) + 3
    plain = plan_steps(lengths, 64, by="pairs", window=1, shares=1, seed=0, epoch=0)
    sorted_ = plan_steps(lengths, 64, by=by, window=50, shares=1, seed=0, epoch=0)
    assert lengths.sum() / padded(lengths, plain) < 0.5
    assert lengths.sum() / padded(lengths, sorted_) > least
    tokens = [lengths[rows].sum() for rows in sorted_]
    means = [lengths[rows].mean() for rows in sorted_]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3  # steps of long texts do not follow each other
    if by == "tokens":
        assert max(tokens) < 1.1 * np.mean(tokens)


def test_the_share_with_the_fewest_tokens_gets_the_longest_row():
    lengths = np.array([100, 60, 50, 10])
    assert [lengths[part].sum() for part in deal(np.arange(4), lengths, 2)] == [110, 110]


def test_odd_sets_make_plans():
    same = np.full(10, 30)
    assert [len(rows) for rows in plan_steps(same, 5, by="tokens", window=2, shares=1, seed=0, epoch=0)] == [5, 5]
    assert [rows.tolist() for rows in plan_steps(same[:1], 64, by="tokens", window=9, shares=1, seed=0, epoch=0)] == [
        [0]
    ]
    with pytest.raises(DataError, match=r"are too few for 1 \(devices x accumulated batches\); use fewer"):
        plan_steps(same[:0], 64, by="pairs", window=1, shares=1, seed=0, epoch=0)
    assert plan_evaluation(same[:0], 100, 0, 1) == []
    long = np.array([10, 500, 10])
    assert [rows.tolist() for rows in plan_evaluation(long, 100, 0, 1)] == [[1], [0, 2]]
    assert sorted(map(len, plan_steps(long, 1, by="tokens", window=1, shares=1, seed=0, epoch=0))) == [1, 1, 1]


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 5))
def test_evaluation_sees_each_row_once_on_any_number_of_devices(lengths, tokens, ranks):
    shares = [EvaluationOrder(lengths, tokens, rank=rank, ranks=ranks) for rank in range(ranks)]
    batches = [[np.array(rows) for rows in share] for share in shares]
    assert sorted(row for share in batches for rows in share for row in rows) == list(range(len(lengths)))
    for share in batches:
        last = [rows[:-1] for rows in share[-1:] if len(rows) > 1]  # which may hold one row more
        assert all(len(rows) == 1 or padded(lengths, [rows]) <= tokens for rows in share[:-1] + last)
    assert len({len(share) for share in batches}) == 1 or len(lengths) < ranks
    assert [len(list(share)) for share in shares] == [len(share) for share in shares]


@pytest.mark.parametrize("ranks", [1, 2])
def test_symmetric_takes_either_order_and_twice_takes_both(ranks: int):
    lengths = np.random.default_rng(0).integers(5, 90, 400)

    def rows(epoch: int, **options: bool) -> list[list[int]]:
        found = []
        for rank in range(ranks):
            order = TrainingOrder(
                lengths, 8, by="pairs", window=1, accumulate=1, rank=rank, ranks=ranks, seed=3, **options
            )
            order.set_epoch(epoch)
            found += list(order)
        return found

    plain, turned = rows(0), rows(0, symmetric=True)
    assert [[row % 400 for row in batch] for batch in turned] == plain
    assert 150 < sum(row >= 400 for batch in turned for row in batch) < 250
    assert turned == rows(0, symmetric=True)
    orders = {row % 400: row for batch in turned for row in batch}
    later = {row % 400: row for batch in rows(1, symmetric=True) for row in batch}
    assert 150 < sum(orders[row] != later[row] for row in range(400)) < 250
    assert rows(0, twice=True) == [batch * 2 for batch in plain]
    assert rows(0, twice=True, symmetric=True) == [[*batch, *(row + 400 for row in batch)] for batch in plain]

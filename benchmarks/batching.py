"""What the order of an epoch costs and brings, without a model: padding, and how long devices wait for each other.

    python benchmarks/batching.py

`real/padded` is the share of a padded batch's tokens that are text. `slowest rank` is what the rank that computes most
computes, over the mean of all ranks: at each step all wait for it; mean over the steps of one epoch, and the worst
step. Ours computes a batch's tokens without padding; the column beside it counts padded tokens, as the peer computes
them. The peer's row is its own rule: random batches of `batch_size`, whatever their lengths.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from machine import BACKBONE, begin, make_parser, write_record
from numpy.typing import NDArray

from crossenc.backbone import load_tokenizer
from crossenc.encode import encode
from crossenc.pairs import read
from crossenc.sampler import deal, plan_steps

Batches = list[list[NDArray[np.int64]]]


def our_steps(lengths: NDArray[np.int64], batch_size: int, ranks: int, **policy: Any) -> Batches:
    """For each step the rows of each rank."""
    steps = plan_steps(lengths, batch_size * ranks, shares=ranks, seed=1, epoch=0, **policy)
    return [deal(rows, lengths, ranks) for rows in steps]


def peer_steps(lengths: NDArray[np.int64], batch_size: int, ranks: int) -> Batches:
    """Shuffled rows, cut into batches, dealt in turn; the last incomplete step is left out, as it does."""
    order = np.random.default_rng(1).permutation(len(lengths))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i : i + ranks] for i in range(0, len(batches) - ranks + 1, ranks)]


def figures(lengths: NDArray[np.int64], steps: Batches) -> dict[str, float]:
    real = np.array([[lengths[rows].sum() for rows in step] for step in steps])
    padded = np.array([[lengths[rows].max() * len(rows) for rows in step] for step in steps])
    found: dict[str, float] = {"steps": len(steps), "real_over_padded": float(real.sum() / padded.sum())}
    for name, tokens in (("packed", real), ("padded", padded)):
        waits = tokens.max(1) / tokens.mean(1)
        found |= {f"slowest_rank_{name}_mean": float(waits.mean()), f"slowest_rank_{name}_worst": float(waits.max())}
    return found | {"tokens_of_a_step_spread": float(real.sum(1).std() / real.sum(1).mean())}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 5, 20, 50, 200])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = begin(parser, "offline")
    datasets.disable_progress_bars()
    encoded = encode(read(str(arguments.data / "train.tsv")), load_tokenizer(BACKBONE), 512)
    lengths = np.array(encoded["length"][:])
    rows = []
    for ranks in arguments.ranks:
        rows.append(
            {"who": "peer", "ranks": ranks, **figures(lengths, peer_steps(lengths, arguments.batch_size, ranks))}
        )
        for by in ("pairs", "tokens"):
            for window in arguments.windows if ranks == arguments.ranks[0] else [1, 5, 50]:
                steps = our_steps(lengths, arguments.batch_size, ranks, by=by, window=window)
                rows.append({"who": f"by {by}, window {window}", "ranks": ranks, **figures(lengths, steps)})
    write_record(arguments.out, {"rows": rows})
    print(f"{len(lengths):,} pairs, {lengths.mean():.1f} tokens on average, longest {lengths.max()}\n")
    print(
        "| ranks | | steps | real/padded | slowest rank (worst step) | the same, padded | spread of a step's tokens |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        packed, padded = (
            f"{row[f'slowest_rank_{name}_mean']:.3f} ({row[f'slowest_rank_{name}_worst']:.3f})"
            for name in ("packed", "padded")
        )
        print(
            f"| {row['ranks']} | {row['who']} | {row['steps']} | {row['real_over_padded']:.3f} | {packed} | {padded} | "
            f"{100 * row['tokens_of_a_step_spread']:.0f} % |"
        )


if __name__ == "__main__":
    main()

"""`crossenc.score` beside sentence-transformers' `CrossEncoder.predict`: torch in fp32 and bf16, onnxruntime, 8 bits.

    for s in 0 5000 10000 15000; do python benchmarks/backends.py --start $s --out benchmarks/backends.json; done

20,000 pairs of real questions in four rounds of 5,000 (9,999 real pairs, then their questions paired anew); each
contender is a process of its own, which scores the round's pairs in its turn after a warm-up, so that its peak memory
is its own. Ours reads a file and writes one, the peer has a list. Rounds are added to those in the record. The largest
difference of scores is against the peer in fp32. Needs the extras `offline`, `onnx` and `peer`.
"""

from __future__ import annotations

import csv
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import (
    BACKBONE,
    begin,
    make_export,
    make_parser,
    peak_memory,
    quiet,
    read_record,
    read_tsv,
    spread,
    write_record,
    write_tsv,
)

WARM_UP = 200


def run_peer(folder: str, files: Any, replies: Any, bf16: bool) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    quiet()
    model = CrossEncoder(folder, device="cpu", model_kwargs={"dtype": torch.bfloat16 if bf16 else torch.float32})
    for file in iter(files.get, None):
        pairs = [(a, b) for a, b, _ in read_tsv(file)]
        start = time.perf_counter()
        scores = model.predict(pairs, show_progress_bar=False, convert_to_numpy=True)
        replies.put((time.perf_counter() - start, peak_memory(), scores.astype(np.float32)))


def run_ours(folder: str, files: Any, replies: Any, options: dict[str, str]) -> None:
    from crossenc import score

    for file in iter(files.get, None):
        output = str(file).replace(".tsv", f"-{'-'.join(options.values())}.csv")
        start = time.perf_counter()
        score(folder, str(file), output, **options)
        taken = time.perf_counter() - start
        with Path(output).open(encoding="utf-8", newline="") as rows:
            scores = np.array([float(row["score"]) for row in csv.DictReader(rows)], dtype=np.float32)
        replies.put((taken, peak_memory(), scores))


CONTENDERS: dict[str, tuple[Any, Any]] = {
    "peer, fp32": (run_peer, False),
    "peer, bf16": (run_peer, True),
    "ours, torch fp32": (run_ours, {"precision": "32-true"}),
    "ours, torch bf16-mixed": (run_ours, {"precision": "bf16-mixed"}),
    "ours, torch bf16-true": (run_ours, {"precision": "bf16-true"}),
    "ours, onnx fp32": (run_ours, {"backend": "onnx"}),
    "ours, onnx int8": (run_ours, {"backend": "onnx-int8"}),
}


def take_pairs(data: Path, file: Path, start: int, count: int) -> None:
    """Real pairs from row `start` on; after the last of both files their questions are paired anew, off by one."""
    rows = read_tsv(data / "train.tsv") + read_tsv(data / "dev.tsv")
    turned = [[a, b, "0"] for (a, _, _), (_, b, _) in zip(rows, [*rows[1:], rows[0]], strict=True)]
    write_tsv(file, (rows + turned)[start : start + count])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--start", type=int, default=0, help="first pair of this round")
    parser.add_argument("--pairs", type=int, default=5000, help="pairs of this round")
    arguments = begin(parser, "offline", "onnx", "peer")
    quiet()
    from crossenc.onnx_model import write_onnx

    rounds: list[dict[str, Any]] = read_record(arguments.out).get("rounds", [])
    with tempfile.TemporaryDirectory() as space:
        folder, files = Path(space) / "model", [Path(space) / "warm.tsv", Path(space) / "pairs.tsv"]
        make_export(BACKBONE, folder)
        write_onnx(folder, int8=True)
        take_pairs(arguments.data, files[0], 0, WARM_UP)
        take_pairs(arguments.data, files[1], arguments.start, arguments.pairs)
        context = multiprocessing.get_context("spawn")
        found: dict[str, tuple[float, float, Any]] = {}
        for name, (run, options) in CONTENDERS.items():
            tasks, replies = context.Queue(), context.Queue()
            worker = context.Process(target=run, args=(str(folder), tasks, replies, options))
            worker.start()
            for file in files:
                tasks.put(file)
            replies.get()
            found[name] = replies.get()
            tasks.put(None)
            worker.join()
    expected = found["peer, fp32"][2]
    rounds.append(
        {
            name: {"seconds": taken, "peak_mb": memory, "largest_difference": float(abs(scores - expected).max())}
            for name, (taken, memory, scores) in found.items()
        }
        | {"pairs": arguments.pairs, "start": arguments.start}
    )
    write_record(arguments.out, {"rounds": rounds})
    print("| | pairs/s (range) | x peer fp32 | peak, MB | largest difference of scores |\n|---|---|---|---|---|")
    for name in CONTENDERS:
        speeds = [one["pairs"] / one[name]["seconds"] for one in rounds]
        ratio = statistics.median(one["peer, fp32"]["seconds"] / one[name]["seconds"] for one in rounds)
        memory = max(one[name]["peak_mb"] for one in rounds)
        worst = max(one[name]["largest_difference"] for one in rounds)
        print(f"| {name} | {spread(speeds, '.0f')} | {ratio:.2f} | {memory:,.0f} | {worst:.1g} |")


if __name__ == "__main__":
    main()

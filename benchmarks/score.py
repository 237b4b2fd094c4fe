"""Scoring speed beside sentence-transformers' `CrossEncoder.predict`: same export, same pairs, interleaved rounds.

    python benchmarks/score.py

`ours` is `Trainer.predict` from a file that no cache knows: reading, tokenizing and scoring. `score` is
`crossenc.score` from a file into a file, with the loading of the model. The peer, loaded before, gets the pairs as a
list and tokenizes them. MFU is 2 x layer parameters x real tokens over the best matrix product in the same precision,
as if the last layer were computed whole. The largest difference of logits is against the peer in fp32. Needs the extras
`offline` and `peer`.
"""

from __future__ import annotations

import csv
import gc
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from machine import (
    begin,
    best_matrix_product,
    make_export,
    make_parser,
    quiet,
    read_tsv,
    spread,
    take_rows,
    write_record,
)
from train import count, make_backbone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def score_peer(folder: str, pairs: list[tuple[str, str]], bf16: bool, device: str) -> tuple[float, torch.Tensor]:
    """Seconds, and the logits."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, device=device, model_kwargs={"dtype": torch.bfloat16 if bf16 else torch.float32})
    start = time.perf_counter()
    logits = model.predict(pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True, show_progress_bar=False)
    logits = logits.float().cpu()
    return time.perf_counter() - start, logits


def score_ours(folder: str, file: Path, bf16: bool, device: str) -> tuple[float, torch.Tensor]:
    from lightning.pytorch import Trainer

    from crossenc import CrossEncoderModule, PairDataModule

    module = CrossEncoderModule(folder)
    trainer = Trainer(
        precision="bf16-mixed" if bf16 else "32-true", accelerator="gpu" if device == "cuda" else "cpu", devices=1,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    parts: Any = trainer.predict(module, PairDataModule(str(file), backbone=folder))
    rows, logits = (torch.cat([part[name] for part in parts]).cpu() for name in ("row", "logit"))
    return time.perf_counter() - start, torch.empty_like(logits).index_copy_(0, rows, logits)


def score_file(folder: str, file: Path, bf16: bool) -> tuple[float, torch.Tensor]:
    import crossenc

    output, precision = file.with_suffix(".csv"), "bf16-mixed" if bf16 else "32-true"
    start = time.perf_counter()
    crossenc.score(folder, str(file), str(output), logit=True, precision=precision)  # type: ignore[arg-type]
    taken = time.perf_counter() - start
    with output.open(encoding="utf-8", newline="") as rows:
        return taken, torch.tensor([float(row["logit"]) for row in csv.DictReader(rows)])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="minilm", choices=["minilm", "distilroberta"])
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    arguments = begin(parser, "offline", "peer")
    # The peer's fp32 is what all are compared with.
    ways = [f"{who}, {kind}" for who in ("peer", "ours", "score") for kind in arguments.precision]
    contenders = list(dict.fromkeys(["peer, fp32", *ways]))
    import datasets

    quiet()
    pairs = [(a, b) for a, b, _ in islice(cycle(read_tsv(arguments.data / "train.tsv")), arguments.pairs)]
    with tempfile.TemporaryDirectory() as space:
        backbone, folder = make_backbone(arguments.shape, Path(space) / "backbone"), str(Path(space) / "model")
        make_export(backbone, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        found: dict[str, torch.Tensor] = {}
        for number in range(arguments.rounds + 1):
            datasets.config.HF_DATASETS_CACHE = f"{space}/cache-{number}"
            file = Path(space) / f"pairs-{number}.tsv"
            take_rows(arguments.data / "train.tsv", file, arguments.pairs)
            for name in contenders:
                who, kind = name.split(", ")
                if who == "peer":
                    taken, found[name] = score_peer(folder, pairs, kind == "bf16", arguments.device)
                elif who == "score":
                    taken, found[name] = score_file(folder, file, kind == "bf16")
                    file.with_suffix(".csv").unlink()
                else:
                    # A name of its own for each, so that neither finds the other's tokens in the cache.
                    own = file.rename(file.with_name(f"{number}-{kind}.tsv"))
                    taken, found[name] = score_ours(folder, own, kind == "bf16", arguments.device)
                    own.rename(file)
                gc.collect()
                if number:  # the first round warms up
                    seconds[name].append(taken)
        tokens, weights = count(file, folder)
    limits = {p: best_matrix_product(DTYPES[p], arguments.device) for p in {"fp32", *arguments.precision}}
    differences = {name: (found[name] - found["peer, fp32"]).abs().max().item() for name in contenders}
    record = {
        "pairs": arguments.pairs,
        "tokens": tokens,
        "layer_parameters": weights,
        "best_matrix_product_tflops": {p: limit / 1e12 for p, limit in limits.items()},
        "seconds": seconds,
        "largest_logit_difference": differences,
    }
    write_record(arguments.out, record)
    print("| | pairs/s (range) | x peer fp32 | x peer, same precision | MFU | largest logit difference |")
    print("|---" * 6 + "|")
    for name, taken in seconds.items():
        speeds, kind = [arguments.pairs / one for one in taken], name.split(", ")[1]
        ratios = [statistics.median(seconds[f"peer, {of}"]) / statistics.median(taken) for of in ("fp32", kind)]
        mfu = 100 * 2 * weights * tokens / statistics.median(taken) / limits[kind]
        print(
            f"| {name} | {spread(speeds, '.0f')} | {ratios[0]:.2f} | {ratios[1]:.2f} | {mfu:.0f} % | "
            f"{differences[name]:.1g} |"
        )


if __name__ == "__main__":
    main()

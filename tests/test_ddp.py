"""The same training and the same figures on one process and on several: real processes, gloo."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crossenc.backbone import locate

from .conftest import BACKBONE


def run(command: str, devices: int, *arguments: str) -> None:
    words = [sys.executable, "-m", "crossenc", command, "--trainer.accelerator=cpu", f"--trainer.devices={devices}"]
    words += ["--trainer.precision=32-true", "--trainer.strategy=" + ("ddp" if devices > 1 else "auto"), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(locate(BACKBONE), tmp_path_factory.mktemp("backbone") / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("by", ["pairs", "tokens"])
def test_any_number_of_processes_makes_the_same_updates(by: str, quora: Path, without_dropout: Path, tmp_path: Path):
    """Losses of 30 steps on real pairs, in steps of unequal size."""
    losses: dict[int, list[float]] = {}
    for devices in (1, 2, 4):
        run(
            "fit",
            devices,
            f"--data.source={quora / 'train.tsv'}",
            "--data.val_size=0",
            "--data.test_size=0",
            "--data.limit=235",
            f"--data.batch_size={8 // devices}",
            f"--data.batch_by={by}",
            f"--model.backbone={without_dropout}",
            "--model.learning_rate=1e-4",
            "--trainer.log_every_n_steps=1",
            "--trainer.max_steps=30",
            f"--output={tmp_path}",
            f"--run={devices}",
        )
        with (tmp_path / str(devices) / "metrics.csv").open() as file:
            losses[devices] = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        assert len(losses[devices]) == 30
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)


def test_evaluation_and_prediction_are_the_same_on_any_number_of_processes(trained: Path, pairs_file: Path):
    """6 test rows and 60 pairs to score, on 1 process and on 4: neither number can be shared evenly in batches."""
    found, scores = [], []
    for devices in (1, 4):
        where = ["--config", str(trained / "config.yaml"), "--ckpt_path", "best"]
        run("test", devices, *where)
        found.append(json.loads((trained / "metrics.json").read_text()))
        run("predict", devices, *where)
        with (trained / "predictions.csv").open() as file:
            scores.append([(int(row["row"]), float(row["score"])) for row in csv.DictReader(file)])
    assert found[0] == {name: pytest.approx(value, abs=1e-6) for name, value in found[1].items()}
    assert [row for row, _ in scores[1]] == list(range(60))
    assert [score for _, score in scores[0]] == pytest.approx([score for _, score in scores[1]], abs=1e-6)

"""The same training and the same figures on one process and on several: real processes, gloo."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from .conftest import flags, logged, run_on


@pytest.mark.parametrize(
    ("by", "settings"),
    [
        ("pairs", [(1, 8, 1, "auto"), (2, 2, 2, "ddp"), (4, 2, 1, "ddp")]),
        ("tokens", [(1, 8, 1, "auto"), (2, 4, 1, "fsdp")]),
    ],
)
def test_any_number_of_processes_makes_the_same_updates(
    by: str, settings: list[tuple[int, int, int, str]], quora: Path, tiny_backbone: Path, tmp_path: Path
):
    """Losses of 30 unequal steps on real pairs. Settings: devices, batch size, accumulated batches, strategy."""
    steps: list[list[float]] = []
    dev: list[float] = []
    for number, (devices, batch_size, accumulated, strategy) in enumerate(settings):
        named = {
            "data.source": quora / "train.tsv",
            "data.val_size": 40,
            "data.test_size": 0,
            "data.limit": 235,
            "data.batch_size": batch_size,
            "data.batch_by": by,
            "model.backbone": tiny_backbone,
            "model.dropout": 0,
            "model.learning_rate": 1e-3,
            "trainer.strategy": strategy,
            "trainer.precision": "32-true",
            "trainer.accumulate_grad_batches": accumulated,
            "trainer.log_every_n_steps": 1,
            "trainer.max_steps": 30,
            "output": tmp_path,
            "run": number,
        }
        run_on(devices, ["fit", *flags(named)], tmp_path / "log")
        if accumulated == 1:  # else it is the last batch's and not the step's
            steps.append(list(logged(tmp_path / str(number), "train/loss").values()))
        dev.append(json.loads((tmp_path / str(number) / "metrics.json").read_text())["val/loss"])
        shutil.rmtree(tmp_path / str(number))  # checkpoints are large
    assert [len(losses) for losses in steps] == [30] * len(steps)
    assert steps == [pytest.approx(steps[0], rel=1e-5)] * len(steps)
    assert dev == [pytest.approx(dev[0], rel=1e-5)] * len(dev)


def test_evaluation_and_prediction_are_the_same_on_any_number_of_processes(trained: Path, tmp_path: Path):
    """7 test rows and 60 pairs to score, in small batches, on 1 and 3 processes: once each, in the file's order."""
    run, found, scores = shutil.copytree(trained, tmp_path / "short"), [], []
    for devices in (1, 3):
        where = ["--config", str(run / "config.yaml"), f"--output={tmp_path}", "--ckpt_path=best"]
        where += ["--data.eval_tokens=50"]
        where += ["--trainer.precision=32-true", "--trainer.strategy=" + ("ddp" if devices > 1 else "auto")]
        run_on(devices, ["test", *where, "--data.test_size=7"], tmp_path / "log")
        found.append(json.loads((run / "metrics.json").read_text()))
        run_on(devices, ["predict", *where], tmp_path / "log")
        with (run / "predictions.csv").open() as file:
            scores.append([(int(row["row"]), float(row["score"])) for row in csv.DictReader(file)])
    assert found[0]["test/rows"] == 7
    for figures, rows in zip(found[1:], scores[1:], strict=True):
        assert figures == {name: pytest.approx(value, abs=1e-6) for name, value in found[0].items()}
        assert [row for row, _ in rows] == list(range(60))
        assert [score for _, score in rows] == pytest.approx([score for _, score in scores[0]], abs=1e-6)

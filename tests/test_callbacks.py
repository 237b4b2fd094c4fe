"""What a run shows while it trains, on a terminal and elsewhere."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from crossenc import CrossEncoderModule, PairDataModule, callbacks
from crossenc.cli import main

from .conftest import logged

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_plain_log_tells_step_loss_rate_and_speed(
    fit: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_LINES", 0.0)
    assert main([*fit, "--model.head_rate=20"]) == 0
    said = "\n".join(caplog.messages)
    assert re.search(r"^step 1[0-2]/12  loss \d\.\d{4}  lr \d\.\d\de-\d\d  \d+ pairs/s$", said, re.MULTILINE)
    last = r"^step 12  val/loss \d\.\d{4}  val/average_precision \d\.\d{4}  val/f1 \d\.\d{4}$"
    assert len(re.findall(last, said, re.MULTILINE)) == 1
    names = ("train/loss", "train/lr", "train/pairs_per_second", "val/f1")
    losses, rates, speeds, dev = (logged(tmp_path / "run", name) for name in names)
    assert min(losses) == min(rates) == min(speeds) == 9
    assert 0 < rates[9] <= 5e-5  # the layers' rate, and not the head's
    assert list(dev) == [11]


def test_rate_and_speed_are_logged_in_epochs_that_are_shorter_than_the_interval(fit: list[str], tmp_path: Path):
    options = ["--trainer.log_every_n_steps=8", "--trainer.max_epochs=4", "--trainer.accumulate_grad_batches=2"]
    assert main([*fit, *options]) == 0
    rates, speeds = (logged(tmp_path / "run", name) for name in ("train/lr", "train/pairs_per_second"))
    assert list(rates) == list(speeds) == [7, 15, 23]
    assert rates[7] == pytest.approx(5e-5 * (24 - 7) / (24 - 3))  # of the step itself, and no earlier one


def test_the_speed_of_training_is_without_validations(
    pairs_file: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
):
    time = SimpleNamespace(now=0.0, perf_counter=lambda: time.now)
    monkeypatch.setattr(callbacks, "time", time)

    def passes(seconds: float):
        return lambda *_: setattr(time, "now", time.now + seconds)

    module = CrossEncoderModule(tiny_backbone)
    module.on_validation_epoch_start = passes(1000)

    def takes_a_second(_: object, number: int) -> None:
        time.now, module.is_logged = time.now + 1, number == 9

    module.on_train_batch_start = takes_a_second
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=10, val_check_interval=5, callbacks=[callbacks.TrainSpeed()], **quiet)
    trainer.fit(module, PairDataModule(str(pairs_file), batch_size=4, backbone=str(tiny_backbone)))
    assert trainer.callback_metrics["train/pairs_per_second"] == 4


def test_a_terminal_gets_a_bar_with_loss_rate_and_speed(fit: list[str]):
    """In a real pseudo-terminal, since the bar shows only there."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    command = [sys.executable, "-m", "crossenc", *fit]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.returncode == 0, text
    assert re.search(r"Epoch 0/0 .*12/12", text)
    assert re.search(r"train/loss: +\d\.\d+ +train/lr: +\S*[1-9]\S* +train/pairs_per_second: +\d+", text)
    assert "arning" not in text


def clock(monkeypatch: pytest.MonkeyPatch, *seconds: int) -> None:
    """A clock that tells these, or is four seconds further on whenever it is looked at."""
    ticks = iter(seconds or count(100, 4))
    time = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=lambda: next(ticks))
    monkeypatch.setattr(callbacks, "time", time)


@pytest.mark.parametrize(("logged_every", "lines"), [(1, 3), (5, 2)])
def test_the_plain_log_has_a_line_every_ten_seconds_where_there_are_figures(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, logged_every: int, lines: int
):
    clock(monkeypatch)
    figures = {"train/loss": 0.5, "train/lr": 1e-5, "train/pairs_per_second": 9.0}
    trainer: Any = SimpleNamespace(progress_bar_metrics=figures, global_step=1)
    trainer.is_global_zero, module = True, SimpleNamespace(is_logged=True, planned_steps=lambda: 12)
    progress = callbacks.PlainProgress()
    with caplog.at_level(logging.INFO, logger="crossenc"):
        for batch in range(7):  # 24 seconds
            module.is_logged = batch % logged_every == 0
            progress.on_train_batch_end(trainer, module, None, None, batch)
    assert len(caplog.messages) == lines


def test_speed_is_that_of_all_devices_without_validation_and_counts_a_pair_once(monkeypatch: pytest.MonkeyPatch):
    clock(monkeypatch, 100, 200, 250, 260)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-5}])
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer: Any = SimpleNamespace(world_size=4, sanity_checking=False, state=state, optimizers=[optimizer])
    trainer.accumulate_grad_batches, trainer.is_last_batch = 2, False
    told: dict[str, float] = {}
    settings = {"consistency": 1.0, "head_rate": 1.0}
    module: Any = SimpleNamespace(hparams=settings, is_logged=True, log_dict=lambda found, **_: told.update(found))
    speed = callbacks.TrainSpeed()
    speed.on_train_start(trainer, module)
    speed.on_validation_start(trainer, module)
    speed.on_validation_end(trainer, module)
    for batch in (8, 9):  # of one step: five pairs twice each, in 110 seconds of 160
        assert not told
        speed.on_train_batch_start(trainer, module, None, batch)
        speed.on_train_batch_end(trainer, module, None, {"label": range(10)}, batch)
    assert told["train/pairs_per_second"] == pytest.approx(2 * 20 / 110)


def test_cost_is_that_of_all_parts_of_a_run(monkeypatch: pytest.MonkeyPatch):
    clock(monkeypatch, 100, 110, 120)
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    trainer: Any = None
    cost = callbacks.Cost()
    cost.load_state_dict({"seconds": 1000.0, "energy_kwh": 2.0})
    cost.on_train_start(trainer, trainer)
    cost.tracker = SimpleNamespace(start_task=lambda: None, stop_task=lambda: SimpleNamespace(energy_consumed=0.5))
    assert cost.state_dict() == {"seconds": 1010, "energy_kwh": 2.5}
    cost.on_train_end(trainer, trainer)
    assert cost.state_dict() == {"seconds": 1020, "energy_kwh": 3}


def test_codecarbon_tells_energy_where_it_is_installed(capfd: pytest.CaptureFixture[str]):
    """It is in no extra of the tests: each of their runs would have it look at the hardware for seconds."""
    pytest.importorskip("codecarbon", reason="needs codecarbon, from the extra energy")
    trainer: Any = SimpleNamespace(is_global_zero=True)
    cost = callbacks.Cost()
    cost.on_train_start(trainer, trainer)
    end = time.monotonic() + 60
    while cost.tracker is None and time.monotonic() < end:
        time.sleep(0.1)
    first = cost.state_dict()["energy_kwh"]
    time.sleep(1)
    cost.on_train_end(trainer, trainer)
    assert 0 < first < cost.energy_kwh < 0.01
    assert capfd.readouterr() == ("", "")  # it says and writes nothing of its own


def test_each_logger_gets_figures_in_its_own_words():
    """Of Weights & Biases, MLflow and Comet, which are not installed here, as their own signatures have it."""
    given: list[Any] = []

    def log_image(key: str, images: list[Any], step: int | None = None) -> None:
        given.append((key, images, step))

    def log_to_mlflow(run_id: str, figure: Any, artifact_file: str) -> None:
        given.append((run_id, figure, artifact_file))

    def log_to_comet(figure_name: str, figure: Any, overwrite: bool = False, step: int | None = None) -> None:
        given.append((figure_name, figure, step))

    mlflow = SimpleNamespace(experiment=SimpleNamespace(log_figure=log_to_mlflow), run_id="ab")
    comet = SimpleNamespace(experiment=SimpleNamespace(log_figure=log_to_comet))
    for logger in (SimpleNamespace(log_image=log_image), mlflow, comet):
        callbacks._figure_sender(logger)("val/scores", "figure", 7)
    expected = [("val/scores", ["figure"], 7), ("ab", "figure", "val/scores/7.png"), ("val/scores", "figure", 7)]
    assert given == expected
    assert callbacks._figure_sender(SimpleNamespace(experiment=SimpleNamespace())) is None

"""Runs that are killed, stopped, moved, or gone on with under other settings: real processes, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import kill_resume
import numpy as np
import pytest
import torch
from kill_resume import same
from lightning.pytorch import Callback
from machine import make_bert

from crossenc import PairDataModule, checkpoints
from crossenc.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, find_newest
from crossenc.cli import main
from crossenc.errors import OutputError

from .conftest import edit_json, fail, flags, kill_runs, logged

EPOCHS, STEPS = 16, 96


@pytest.fixture(scope="module", autouse=True)
def _quick(no_pictures: None) -> Iterator[None]:
    """What is computed here is too small for two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def options(pairs_file: Path, tiny_backbone: Path) -> dict[str, Any]:
    """Sixteen epochs of 6 steps: dropout, two batches a step, a worker process, validation between checkpoints."""
    return {
        "data.source": pairs_file,
        "data.batch_size": 4,
        "data.num_workers": 1,
        "model.backbone": tiny_backbone,
        "model.learning_rate": 1e-3,
        "trainer.max_epochs": EPOCHS,
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 26,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "checkpoint_every_n_steps": 4,
    }


def fit(options: dict[str, Any], output: Path, **more: Any) -> list[str]:
    named = {**options, "output": output, **{name.replace("__", "."): value for name, value in more.items()}}
    return ["fit", *flags(named)]


def weights(file: Path) -> tuple[int, dict[str, torch.Tensor]]:
    checkpoint = torch.load(file, weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


def start(command: list[str]) -> subprocess.Popen[str]:
    """In a session of its own, so that a signal can be sent to its workers and other ranks too.

    Without loggers there are no pictures, which a validation would spend most of its time on.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "crossenc", *command, "--trainer.logger=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not file.exists():
        if process.poll() is not None or time.monotonic() > until:
            if process.poll() is None:  # else what it says has no end, and neither has the test
                os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no {file}: {process.stderr.read()}")


def kill_when(run: Path, patterns: list[str], command: list[str], log: Path) -> None:
    """Kill a run when it has files of these names, one after the other."""
    with patch.dict(os.environ):
        kill_resume.start_server()
    (process,) = kill_resume.start([*command, "--trainer.logger=false"], 1, log)
    until = time.monotonic() + 120
    for pattern in patterns:
        while not list(run.glob(pattern)):
            if not process.is_alive() or time.monotonic() > until:
                kill_resume.kill([process])
                pytest.fail(f"no {pattern}: {log.read_text()}")
    kill_resume.kill([process])


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main(fit(options, output)) == 0
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert weights(output / "run" / "last.ckpt")[0] == STEPS
    return output / "run"


def copy(whole: Path, target: Path) -> Path:
    return shutil.copytree(whole, target, ignore=shutil.ignore_patterns("model"))


def test_killed_runs_end_with_the_same_bits(capsys):
    """One process, killed three times, and two, killed twice."""
    seed = os.environ.get("CROSSENC_TEST_SEED", str(time.time_ns() % 10**6))
    print(f"CROSSENC_TEST_SEED={seed}")
    kill_runs("--trials=2", "--epochs=3", f"--seed={seed}", "--processes", "1", "2", "--kills", "3", "2")
    assert "2 of 2 ended bit-identical" in capsys.readouterr().out


def test_averaged_weights_go_on_too(options: dict[str, Any], tmp_path: Path, capsys):
    average = ["--trainer.max_epochs=4", "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    assert main([*fit(options, tmp_path / "whole"), *average]) == 0
    run = tmp_path / "whole" / "run"
    figures = json.loads((run / "metrics.json").read_text())
    assert main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]) == 0
    assert json.loads((run / "metrics.json").read_text())["test/loss"] == pytest.approx(figures["test/loss"], abs=1e-6)
    command = [*fit(options, tmp_path / "killed", ckpt_path="last"), *average]
    last = tmp_path / "killed" / "run" / "last.ckpt"
    kill_when(last.parent, ["last.ckpt"], command, tmp_path / "log")
    assert weights(last)[0] < STEPS * 4 / EPOCHS
    assert main(command) == 0
    assert same(last, tmp_path / "whole" / "run" / "last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    plain, averaged = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(value, averaged[name]) for name, value in plain.items() if name in averaged)
    # Without the callback, the average would be taken for the weights that the optimizer was at.
    said = fail(capsys, *fit(options, tmp_path / "killed", ckpt_path="last", trainer__max_epochs=5))
    assert "the callback EMAWeightAveraging (now None), which" in said


def test_no_average_begins_in_the_middle(whole: Path, options: dict[str, Any], tmp_path: Path, capsys):
    copy(whole, tmp_path / "run")
    command = fit(options, tmp_path, ckpt_path="last", trainer__max_epochs=EPOCHS + 1)
    assert main([*command, "--trainer.callbacks+=EMAWeightAveraging"]) == 2
    said = capsys.readouterr().err
    assert "the callback None (now EMAWeightAveraging), which" in said.splitlines()[-1]
    assert "weight_averaging.py" not in said  # Lightning's own warning


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    whole: Path, options: dict[str, Any], tmp_path: Path
):
    command = fit(options, tmp_path, ckpt_path="last")
    last, unfinished = tmp_path / "run" / "last.ckpt", ".last.ckpt-unfinished-*"
    for _ in range(5):  # a kill may come a moment too late
        kill_when(last.parent, ["last.ckpt", unfinished], command, tmp_path / "log")
        if list(last.parent.glob(unfinished)):
            break
    assert list(last.parent.glob(unfinished))
    assert weights(last)[0] < STEPS
    assert find_newest(tmp_path / "run") in (last, last.with_name("best.ckpt"))
    assert main(command) == 0
    assert same(last, whole / "last.ckpt")
    assert not list(last.parent.glob(unfinished))


@pytest.mark.parametrize(
    ("number", "code", "processes", "to_all"),
    [(signal.SIGTERM, 143, 1, True), (signal.SIGINT, 130, 2, True), (signal.SIGTERM, 143, 2, False)],
)
def test_a_signal_ends_the_step_and_tells_how_to_go_on(
    whole: Path,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    processes: int,
    to_all: bool,
):
    """To all processes, loaders' workers too, as a terminal and most schedulers send it; or to the first alone."""
    command = fit(options, tmp_path)
    # `srun -n 4 --pty bash`: in an interactive job of SLURM, Lightning leaves the signals alone.
    job = {"JOB_ID": "12", "JOB_NAME": "bash", "NTASKS": "4", "STEP_NUM_TASKS": "4", "PROCID": "0", "LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    if processes > 1:
        command = fit(options, tmp_path, trainer__devices=2, trainer__strategy="ddp", trainer__max_epochs=500)
    with start(command) as process:
        wait_for(tmp_path / "run" / "last.ckpt", process)
        (os.killpg if to_all else os.kill)(process.pid, number)
        said = process.stderr.read()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "rror" not in said
    step, command = re.search(r"at step (\d+); resume with: python -m crossenc (.*)$", said, re.MULTILINE).groups()
    assert weights(tmp_path / "run" / "last.ckpt")[0] == int(step)
    if processes == 1:
        assert main(shlex.split(command)) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert same(tmp_path / "run" / "last.ckpt", whole / "last.ckpt")


class SavedSteps(Callback):
    """Notes the step of each checkpoint."""

    steps: ClassVar[list[int]] = []
    thresholds: ClassVar[dict[int, float | None]] = {}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        assert trainer.state.fn == "fit"  # what is validated afterwards are the best weights, and not the last
        self.steps.append(checkpoint["global_step"])
        self.thresholds.setdefault(checkpoint["global_step"], pl_module.evaluation()["threshold"])  # of the first


class SavedAfterAWishToStop(SavedSteps):
    """Which comes at once, and may have to wait for the least of steps or epochs."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


SAVED = {"trainer.callbacks": f"{__name__}.SavedSteps"}
STOPPED = {"trainer.callbacks": f"{__name__}.SavedAfterAWishToStop"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [50, 55]),
        ({"checkpoint_every_n_steps": 20}, [20, 40, 55]),
        ({"checkpoint_every_n_minutes": 1e-9, "trainer.max_steps": 3}, [1, 2, 3]),
        # An epoch that ends within a step ends it.
        ({"checkpoint_every_n_minutes": 1e-9, "trainer.max_steps": 3, "trainer.limit_train_batches": 3}, [1, 2, 3]),
        # And at the end, after a validation, the best one too.
        ({"checkpoint_every_n_steps": 4, "data.val_size": 12, "trainer.min_steps": 9} | STOPPED, [4, 8, 9, 9]),
        ({"checkpoint_every_n_steps": 4, "data.val_size": 12, "trainer.min_epochs": 2} | STOPPED, [4, 8, 12, 12]),
    ],
)
def test_checkpoints_come_every_n_steps_and_minutes_and_early(
    options: dict[str, Any], tmp_path: Path, settings: dict[str, Any], expected: list[int]
):
    SavedSteps.steps.clear()
    plain = {**options, "data.num_workers": 0, "data.val_size": 0, "data.test_size": 0, "trainer.max_steps": 55}
    del plain["checkpoint_every_n_steps"]
    assert main(fit(plain | SAVED | settings, tmp_path)) == 0
    assert SavedSteps.steps == expected


def test_minutes_count_from_the_last_checkpoint(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a clock that is 20 seconds further on whenever it is looked at: at each step, and when one is written."""
    clock = count(0, 20)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    SavedSteps.steps.clear()
    plain = {**options, "data.num_workers": 0, "data.val_size": 0, "data.test_size": 0, "trainer.max_steps": 9}
    plain |= {"checkpoint_every_n_steps": 500, "checkpoint_every_n_minutes": 1}
    assert main(fit(plain | SAVED, tmp_path)) == 0
    assert SavedSteps.steps == [3, 6, 9]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Checkpoints every four steps, validations every five, and after the last.
        (
            {"trainer.max_steps": 24, "trainer.val_check_interval": 10},
            {4: False, 5: True, 8: False, 10: True, 12: False, 15: True, 16: False, 20: True, 24: True},
        ),
        # Six steps an epoch, and every other epoch is validated.
        (
            {
                "checkpoint_every_n_steps": 6,
                "trainer.max_epochs": 2,
                "trainer.val_check_interval": 1.0,
                "trainer.check_val_every_n_epoch": 2,
            },
            {6: False, 12: True},
        ),
        # A validation after two thirds of each epoch.
        (
            {"checkpoint_every_n_steps": 2, "trainer.max_epochs": 2, "trainer.val_check_interval": 0.6},
            {2: False, 4: True, 6: False, 8: False, 10: True, 12: True},
        ),
    ],
)
def test_a_checkpoint_has_the_threshold_of_its_own_weights_only(
    options: dict[str, Any], tmp_path: Path, settings: dict[str, Any], expected: dict[int, bool]
):
    SavedSteps.thresholds.clear()
    assert main(fit(options | SAVED | settings, tmp_path)) == 0
    found = {step: threshold is not None for step, threshold in SavedSteps.thresholds.items()}
    assert found == expected


def test_what_a_validation_finds_is_kept_though_its_step_is_saved_already(tmp_path: Path):
    """As it may be where validations come by time, which nobody knows before."""
    saved: list[Path] = []
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False, global_step=7)
    trainer.strategy, trainer.save_checkpoint = SimpleNamespace(broadcast=lambda item: item), saved.append
    trainer.default_root_dir, last = tmp_path, LastCheckpoint()
    last.saved_step = 7
    last.on_validation_end(trainer, trainer)
    assert saved == [tmp_path / "last.ckpt"]


class Signalled(Callback):
    """Gets a SIGTERM at the moment that its class names."""

    moment = ""

    def __init__(self) -> None:
        setattr(self, self.moment, self.note)

    def note(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking or "sanity" in self.moment:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("moment", "step"), [("on_sanity_check_start", 1), ("on_validation_start", 10)])
def test_a_signal_is_noted_before_the_first_step_and_in_a_validation(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, moment: str, step: int
):
    monkeypatch.setattr(Signalled, "moment", moment)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    left = []  # when a run has ended: a second Ctrl-C must end what hangs then
    monkeypatch.setattr(PairDataModule, "on_exception", lambda *_: left.append(signal.getsignal(signal.SIGINT)))
    early = options | {"trainer.accumulate_grad_batches": 1, "trainer.val_check_interval": 10}
    command = fit(early, tmp_path, trainer__callbacks="tests.test_resume.Signalled")
    assert main(command) == 143
    assert left == handlers[1:]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert f"SIGTERM at step {step}; resume with" in capsys.readouterr().err
    assert weights(tmp_path / "run" / "last.ckpt")[0] == step


def test_all_random_generators_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On more devices than before too, where some take over the states of others."""

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draw()
    AtomicCheckpointIO().save_checkpoint({"random_states": [checkpoints._random_states()]}, tmp_path / "last.ckpt")
    expected = draw()
    last, trainer, module = LastCheckpoint(), SimpleNamespace(global_rank=1, global_step=7), SimpleNamespace()
    monkeypatch.setattr(last, "_install_handlers", lambda _: None)
    last.on_load_checkpoint(trainer, module, torch.load(tmp_path / "last.ckpt", weights_only=True))
    last.on_train_start(trainer, module)
    assert draw() == expected


def test_all_processes_must_find_the_checkpoint(
    whole: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    copy(whole, tmp_path / "run")
    monkeypatch.setattr(checkpoints, "gather", lambda trainer, item: [item, True])  # another one has found none
    assert "a folder that all machines share" in fail(capsys, *fit(options, tmp_path, ckpt_path="last"))


def test_last_begins_a_run_that_is_not_there_yet(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = fit(options, tmp_path, trainer__max_steps=1, ckpt_path="last")
    assert main(command) == 0
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "killed").mkdir()  # before its first checkpoint
    assert main(fit(options, tmp_path, run="killed", trainer__max_steps=1, ckpt_path="last")) == 0
    monkeypatch.chdir(tmp_path)  # one path of it relative
    where = {"run": "run", "trainer__max_steps": 2, "ckpt_path": tmp_path / "run" / "last.ckpt"}
    assert main(fit(options, Path(), **where)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "run"]


def test_a_damaged_checkpoint_is_passed_over(
    whole: Path, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Cut short, and with one bit turned in the middle; then the best one is the newest."""
    folder = copy(whole, tmp_path / "run")
    same_step = shutil.copy(folder / "last.ckpt", folder / "step=96.ckpt")  # of a ModelCheckpoint, written before
    assert find_newest(folder) == folder / "last.ckpt"
    Path(same_step).unlink()
    content = (folder / "last.ckpt").read_bytes()
    middle, name = len(content) // 2, content.index(b"PK\x03\x04") + 30  # of an array in the archive
    flipped = [content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] for at, bit in ((middle, 1), (name, 128))]
    for damaged in (content[:middle], *flipped):
        caplog.clear()
        (folder / "last.ckpt").write_bytes(damaged)
        assert find_newest(folder) == folder / "best.ckpt"
        assert "last.ckpt" in caplog.text
        assert "damaged" in caplog.text
    with caplog.at_level(logging.INFO, logger="crossenc"):
        assert main(fit(options, tmp_path, ckpt_path="last")) == 0
    assert f"resuming from {folder / 'best.ckpt'}, step {weights(whole / 'best.ckpt')[0]}" in caplog.text
    assert same(folder / "last.ckpt", whole / "last.ckpt")
    light = torch.load(whole / "last.ckpt", weights_only=True)
    del light["optimizer_states"]
    torch.save(light, folder / "epoch=0.ckpt")  # of a ModelCheckpoint that saves weights only: none to go on with
    for name in ("last.ckpt", "best.ckpt"):
        (folder / name).write_bytes(b"nothing")
    assert find_newest(folder) is None
    assert "epoch=0.ckpt has weights only" in caplog.text


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}

    def full(*_: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 576 vs 534")  # as torch does

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match=r"No space left on device; .* \(fit: with --ckpt_path last\)"):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, file)
    # Beside its target and nowhere else: a folder for temporary files may be small, and nobody cleans it up.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    AtomicCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "deeper" / "last.ckpt")
    assert torch.load(tmp_path / "deeper" / "last.ckpt", weights_only=True) == {"step": 2}


def test_a_run_goes_on_where_its_folder_was_moved_to(whole: Path, options: dict[str, Any], tmp_path: Path):
    """What was best before stays so, unless it is beaten."""
    folder = copy(whole, tmp_path / "moved")
    command = fit(options, tmp_path, run="moved", ckpt_path="last", trainer__max_epochs=EPOCHS + 1)
    assert main(command) == 0
    state, before = (
        next(kept for kept in checkpoint["callbacks"].values() if "best_model_path" in kept)
        for checkpoint in (torch.load(where / "last.ckpt", weights_only=True) for where in (folder, whole))
    )
    figures = logged(whole, "val/average_precision").values()
    assert before["best_model_score"].item() == pytest.approx(max(figures), abs=1e-6)
    assert min(figures) < max(figures)
    assert state["best_model_score"] >= before["best_model_score"]
    assert state["best_model_path"] == str(folder / "best.ckpt")
    assert list(state["best_k_models"]) == [str(folder / "best.ckpt")]


def changed(options: dict[str, Any], what: str, folder: Path) -> dict[str, Any]:
    """Options for other data, another tokenizer, or another backbone."""
    if what == "data":
        (folder / "other.csv").write_text(options["data.source"].read_text().replace("?", "!"))
        return {"data.source": folder / "other.csv"}
    if what == "dev pairs":  # and the training pairs are the same
        lines = options["data.source"].read_text().splitlines(keepends=True)
        (folder / "dev.csv").write_text("".join(lines[:6]))
        return {"data.val_source": folder / "dev.csv", "data.test_size": 12}
    if what == "tokenizer":
        other = shutil.copytree(options["model.backbone"], folder / "other")
        edit_json(other / "tokenizer_config.json", do_lower_case=False)
        return {"model.backbone": other}
    if what == "layers":  # with the same tokenizer
        return {"model.backbone": make_bert(folder / "other", 3, 32, intermediate_size=64)}
    name, value = what.split("=")
    return {name: value}


_OF_THE_MODEL = (
    *("optimizer=SGD", "learning_rate=0.5", "weight_decay=0.1", "layer_decay=0.9", "head_rate=2"),
    *("shared_segments=true", "freeze_layers=1", "lora={r: 4}"),
)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("data", r"training tokens \w{12} of 48 pairs of \S+pairs.csv \(now \w{12} of 48 pairs of \S+other.csv\)"),
        ("dev pairs", r"trained with dev tokens \w{12} of 6 pairs of \S+ \(now \w{12} of 5 pairs of \S+dev.csv\);"),
        ("tokenizer", r"tokenizer \w{12} of \S+backbone \(now \w{12} of \S+other\)"),
        ("data.batch_size=6", r"batch_size 4 \(now 6\)"),
        ("layers", r"\(which do not fit \S+other\), which its optimizer depends on"),
        ("trainer.strategy=fsdp", r"resume without --trainer.strategy fsdp"),
        *((f"model.{change}", f"the run started with model.{change.partition('=')[0]} ") for change in _OF_THE_MODEL),
    ],
)
def test_a_run_goes_on_with_the_same_only(
    whole: Path, options: dict[str, Any], tmp_path: Path, capsys, what: str, said: str
):
    folder = copy(whole, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if "tfevents" not in path.name}
    other = options | changed(options, what, tmp_path)
    line = fail(capsys, *fit(other, tmp_path, ckpt_path="last", trainer__max_epochs=EPOCHS + 1))
    assert re.search(said, line), line
    assert ("--on_mismatch continue" in line) == (what in ("data", "dev pairs", "tokenizer", "data.batch_size=6"))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if "tfevents" not in path.name}


def test_epochs_of_a_part_of_the_batches_go_on_too(options: dict[str, Any], tmp_path: Path):
    part = {**options, "data.num_workers": 0, "trainer.limit_train_batches": 4, "model.schedule": "constant"}
    assert main(fit(part, tmp_path / "whole", trainer__max_epochs=3)) == 0
    assert main(fit(part, tmp_path / "parts", trainer__max_epochs=2)) == 0
    assert main(fit(part, tmp_path / "parts", trainer__max_epochs=3, ckpt_path="last")) == 0
    (step, expected), (ended, found) = (weights(tmp_path / name / "run" / "last.ckpt") for name in ("whole", "parts"))
    assert step == ended == 6
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class Unreadable(Callback):
    """Its state is no plain value."""

    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("here")}


def test_what_cannot_be_read_back_is_told_when_it_is_written(options: dict[str, Any], tmp_path: Path, capsys):
    said = fail(capsys, *fit(options, tmp_path, trainer__callbacks="tests.test_resume.Unreadable"))
    assert "last.ckpt could not be read back (pathlib.PosixPath): the state of a callback or an argument" in said
    assert not list((tmp_path / "run").glob("*.ckpt*"))


def test_another_number_of_devices_is_refused_by_all_of_them(whole: Path, options: dict[str, Any], tmp_path: Path):
    copy(whole, tmp_path / "run")
    with start(fit(options, tmp_path, ckpt_path="last", trainer__devices=2, trainer__strategy="ddp")) as process:
        said = process.stderr.read()
    assert process.returncode == 2, said
    assert said.count("devices 1 (now 2)") == 1
    assert "Traceback" not in said


def test_a_mismatch_goes_on_with_the_next_epoch_if_it_may(whole: Path, options: dict[str, Any], tmp_path: Path, capsys):
    """From a checkpoint in the middle of an epoch, to the batches of the next: 48 pairs, 12 to a step."""
    folder = copy(whole, tmp_path / "run")
    (folder / "last.ckpt").unlink()
    step = weights(folder / "best.ckpt")[0]
    command = fit(options, tmp_path, ckpt_path="last", on_mismatch="continue", data__batch_size=6)
    keep = {"every_n_train_steps": 60, "save_top_k": -1, "dirpath": tmp_path / "kept", "filename": "middle"}
    command += ["--trainer.log_every_n_steps=1", "--trainer.callbacks+=ModelCheckpoint"]
    command += [f"--trainer.callbacks.{name}={value}" for name, value in keep.items()]
    assert main(command) == 0
    assert "batch_size 4 (now 6): resuming at the next epoch" in capsys.readouterr().err
    left = EPOCHS - 1 - step // 6
    end = step + 4 * left
    assert weights(folder / "last.ckpt")[0] == end
    # The learning rate ends with the run, and not where all epochs of such batches would have ended.
    rates = logged(folder, "train/lr")
    assert rates[end - 2] == pytest.approx(2 * rates[end - 1])
    assert rates[end - 1] > 0
    # What goes on after a kill knows of the other batches too.
    whole_end = shutil.copy(folder / "last.ckpt", tmp_path / "end.ckpt")
    (tmp_path / "kept" / "middle.ckpt").rename(folder / "last.ckpt")
    assert main(command) == 0
    assert same(folder / "last.ckpt", Path(whole_end))


def make_unbeatable(checkpoint: Path) -> int:
    """Give what it knows of the best checkpoint a figure that no validation finds; returns its step."""
    loaded = torch.load(checkpoint, weights_only=True)
    (best,) = (state for name, state in loaded["callbacks"].items() if "BestCheckpoint" in name)
    best["best_model_score"] = best["kth_value"] = torch.tensor(2.0)
    best["best_k_models"] = dict.fromkeys(best["best_k_models"], torch.tensor(2.0))
    torch.save(loaded, checkpoint)
    step: int = loaded["global_step"]
    return step


@pytest.mark.parametrize("left", [0, 20_000])
def test_a_best_checkpoint_that_is_gone_counts_no_more(whole: Path, options: dict[str, Any], tmp_path: Path, left: int):
    """Or of which only the first bytes are left."""
    folder = copy(whole, tmp_path / "run")
    best = folder / "best.ckpt"
    content = best.read_bytes()[:left]
    best.unlink()
    if content:
        best.write_bytes(content)
    step = make_unbeatable(folder / "last.ckpt")
    assert main(fit(options, tmp_path, ckpt_path="last", trainer__max_epochs=EPOCHS + 1)) == 0
    assert weights(folder / "best.ckpt")[0] > step


def test_a_checkpoint_from_before_the_first_validation_knows_no_best_one(tmp_path: Path):
    """Though the run that goes back to it has one in its folder."""
    torch.save({}, tmp_path / "best.ckpt")
    best = BestCheckpoint(tmp_path)
    best.load_state_dict(best.state_dict())
    assert (best.best_model_path, best.best_k_models) == ("", {})


def test_other_dev_pairs_change_no_step_of_a_run_that_may_go_on(whole: Path, options: dict[str, Any], tmp_path: Path):
    folder = copy(whole, tmp_path / "run")
    (folder / "last.ckpt").unlink()
    other = options | changed(options, "dev pairs", tmp_path)
    step = make_unbeatable(folder / "best.ckpt")
    assert main(fit(other, tmp_path, ckpt_path="last", on_mismatch="continue")) == 0
    assert same(folder / "last.ckpt", whole / "last.ckpt")
    assert weights(folder / "best.ckpt")[0] > step  # what the old ones found best counts no more


def test_the_command_to_go_on_needs_no_quotes_on_windows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoints, "Path", PureWindowsPath)
    trainer: Any = SimpleNamespace(default_root_dir=r"C:\runs\run", strategy=None)
    words = "--config C:/runs/run/config.yaml --ckpt_path C:/runs/run/last.ckpt"
    assert checkpoints.command_to_go_on(trainer) == f"python -m crossenc fit {words}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")  # where torchrun has started the process
    assert checkpoints.command_to_go_on(trainer) == f"torchrun ... -m crossenc fit {words}"


def test_a_checkpoint_within_a_step_is_none_to_go_on_from(
    options: dict[str, Any], tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
):
    """Its validation fell among the batches of a step, of whose gradients it has none. None of ours is such a one."""
    ends, save = [], LastCheckpoint.save
    monkeypatch.setattr(LastCheckpoint, "save", lambda self, trainer: ends.append(self.stepped) or save(self, trainer))
    within = {"trainer.limit_train_batches": 5, "trainer.val_check_interval": 4, "trainer.max_epochs": 2}
    callbacks = ["+=ModelCheckpoint", ".monitor=val/loss", ".save_top_k=-1"]
    callbacks += ["+=ModelCheckpoint", ".every_n_train_steps=1", ".save_top_k=-1", f".dirpath={tmp_path / 'each'}"]
    assert main([*fit(options | within, tmp_path), *(f"--trainer.callbacks{word}" for word in callbacks)]) == 0
    assert set(ends) == {True}
    # At each step's end, where that of the batch before must not be asked.
    assert {torch.load(file, weights_only=True)["whole_step"] for file in (tmp_path / "each").iterdir()} == {True}
    files = sorted((tmp_path / "run").rglob("epoch*.ckpt"))
    whole = [torch.load(file, weights_only=True)["whole_step"] for file in files]
    assert set(whole) == {True, False}
    for file, is_whole in zip(files, whole, strict=True):
        alone = tmp_path / file.stem
        alone.mkdir()
        file.rename(alone / "best.ckpt")
        assert (find_newest(alone) is not None) == is_whole
        if not is_whole:
            assert main(fit(options | within, tmp_path, ckpt_path=alone / "best.ckpt")) == 2
    assert "was written in the middle of a step" in caplog.text

"""Runs that are killed, stopped, or gone on with under other settings: real processes, bit for bit."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crossenc.callbacks import AtomicCheckpointIO
from crossenc.cli import main

from .conftest import BACKBONE

STEPS = 12


def arguments(pairs_file: Path, output: Path, *more: str) -> list[str]:
    """Two epochs of 6 steps: dropout, two batches a step, a worker process, validation between checkpoints."""
    named = {
        "data.source": pairs_file,
        "data.batch_size": 4,
        "data.num_workers": 1,
        "model.backbone": BACKBONE,
        "model.learning_rate": 1e-3,
        "trainer.max_epochs": 2,
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 10,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "last.every_n_steps": 2,
        "output": output,
    }
    return ["fit", *(f"--{name}={value}" for name, value in named.items()), *more]


def weights(file: Path) -> tuple[int, dict[str, torch.Tensor]]:
    checkpoint = torch.load(file, weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


def same(one: Path, other: Path) -> bool:
    (steps, ours), (others_steps, theirs) = weights(one), weights(other)
    return steps == others_steps and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def start(command: list[str]) -> subprocess.Popen[str]:
    """In a session of its own, so that a kill reaches its workers and other ranks too."""
    return subprocess.Popen(
        [sys.executable, "-m", "crossenc", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert main([*arguments(pairs_file, output), "--run=whole"]) == 0
    assert weights(output / "whole" / "last.ckpt")[0] == STEPS
    return output / "whole"


@pytest.mark.parametrize("number", range(2))
def test_a_killed_run_ends_with_the_same_bits(whole: Path, pairs_file: Path, tmp_path: Path, number: int):
    seed = int(os.environ.get("CROSSENC_TEST_SEED", time.time_ns() % 10**6))
    delay = random.Random(seed + number).uniform(0, 5)
    print(f"CROSSENC_TEST_SEED={seed}: killed {delay:.2f} seconds after the first checkpoint")
    command = [*arguments(pairs_file, tmp_path), "--run=killed"]
    with start(command) as process:
        wait_for(tmp_path / "killed" / "last.ckpt", process)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
    print(f"at step {weights(tmp_path / 'killed' / 'last.ckpt')[0]}")
    assert main([*command, "--ckpt_path=last"]) == 0
    assert same(tmp_path / "killed" / "last.ckpt", whole / "last.ckpt")
    assert same(tmp_path / "killed" / "best.ckpt", whole / "best.ckpt")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_tells_how_to_go_on(
    whole: Path, pairs_file: Path, tmp_path: Path, number: int, code: int
):
    with start([*arguments(pairs_file, tmp_path), "--run=stopped"]) as process:
        wait_for(tmp_path / "stopped" / "last.ckpt", process)
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == code, said
    assert "Traceback" not in said
    step, command = re.search(r"at step (\d+); go on with: python -m crossenc (.*)$", said, re.MULTILINE).groups()
    assert weights(tmp_path / "stopped" / "last.ckpt")[0] == int(step) < STEPS
    assert main(shlex.split(command)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]
    assert same(tmp_path / "stopped" / "last.ckpt", whole / "last.ckpt")


def test_two_processes_resume_exactly(pairs_file: Path, tmp_path: Path):
    two = arguments(pairs_file, tmp_path, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1")
    with start([*two, "--run=whole"]) as process:
        assert process.wait() == 0, process.stderr.read()
    with start([*two, "--run=killed"]) as process:
        wait_for(tmp_path / "killed" / "last.ckpt", process)
        time.sleep(random.uniform(0, 4))
        os.killpg(process.pid, signal.SIGKILL)
    with start([*two, "--run=killed", "--ckpt_path=last"]) as process:
        assert process.wait() == 0, process.stderr.read()
    assert same(tmp_path / "killed" / "last.ckpt", tmp_path / "whole" / "last.ckpt")


def test_last_begins_a_run_that_is_not_there_yet(pairs_file: Path, tmp_path: Path):
    command = [*arguments(pairs_file, tmp_path), "--run=new", "--trainer.max_steps=1", "--ckpt_path=last"]
    assert main(command) == 0
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}


def test_a_run_goes_on_with_the_same_only(whole: Path, pairs_file: Path, capsys):
    """Last in this file, since it goes on with the run that others compare with."""
    command = [*arguments(pairs_file, whole.parent), "--run=whole", "--ckpt_path=last", "--trainer.max_epochs=3"]
    assert main([*command, "--data.batch_size=6"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "batch_size 4 (now 6)" in line
    assert "--on_mismatch continue" in line
    assert weights(whole / "last.ckpt")[0] == STEPS
    assert main([*command, "--data.batch_size=6", "--on_mismatch=continue"]) == 0
    # One more epoch of 48 pairs, 12 to a step.
    assert weights(whole / "last.ckpt")[0] == STEPS + 4
    assert "batch_size 4 (now 6): going on with the next epoch" in capsys.readouterr().err

"""A run's folder, and what fit, validate, test and predict leave in it."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file

from crossenc import data, score
from crossenc.backbone import load_tokenizer
from crossenc.calibration import sigmoid
from crossenc.cli import main
from crossenc.exporting import score_pairs
from crossenc.run import native_precision

from .conftest import BACKBONE, fail, logged

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_fit_leaves_everything_in_its_folder(trained: Path):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "metrics.json", "model", "scores.parquet"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.startswith(".")]
    figures = json.loads((trained / "metrics.json").read_text())
    assert figures["checkpoint"] == "best.ckpt, step 6"
    assert (figures["val/rows"], figures["test/rows"]) == (6, 6)
    assert {"val/average_precision", "test/f1", "test/f1_best", "test/threshold", "test/loss"} <= set(figures)
    swapped = ("swap_gap_mean", "swap_gap_p99", "swap_flips")
    new = ("calibration_error", "calibration_error_raw", "calibration_error_chance", "brier", *swapped)
    assert {f"{split}/{name}" for split in ("val", "test") for name in (*new, "f1_low", "f1_high")} <= set(figures)
    assert figures["test/threshold"] == figures["val/threshold"]
    training, dev, test = (logged(trained, name) for name in ("train/loss", "val/average_precision", "test/f1"))
    assert max(training) == max(dev) < min(test)  # the last look is no point
    assert not logged(trained, "val/swap_flips")  # validations during training take one order, in half the time


def test_a_second_run_of_a_name_gets_a_folder_of_its_own(small: Path):
    before = {path.name: path.stat().st_mtime_ns for path in small.iterdir()}
    config = ["--config", str(small / "config.yaml"), "--trainer.max_steps", "1"]
    assert main(["fit", *config, "--run", "short"]) == 0
    assert (small.parent / "short-2" / "model" / "config.json").is_file()
    assert yaml.safe_load((small.parent / "short-2" / "config.yaml").read_text())["run"] == "short-2"
    shutil.rmtree(small.parent / "short-2")
    assert {path.name: path.stat().st_mtime_ns for path in small.iterdir()} == before


def test_a_run_may_lie_deeper(fit: list[str], tmp_path: Path):
    assert main([*fit, "--run=deep/er", "--trainer.max_steps=1"]) == 0
    config = ["--config", str(tmp_path / "deep" / "er" / "config.yaml")]
    assert main(["fit", *config, "--ckpt_path=last", "--trainer.max_steps=2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]
    assert torch.load(tmp_path / "deep" / "er" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_no_run_goes_on_from_weights_alone_and_no_other_format_is_read(small: Path, tmp_path: Path, capsys):
    light = torch.load(small / "last.ckpt", weights_only=True)
    del light["optimizer_states"]
    torch.save(light, tmp_path / "light.ckpt")
    where = ["--output", str(tmp_path), "--run", "more", "--ckpt_path", str(tmp_path / "light.ckpt")]
    assert "light.ckpt has weights only" in fail(capsys, "fit", "--config", str(small / "config.yaml"), *where)
    assert not (tmp_path / "more").exists()
    later = torch.load(small / "last.ckpt", weights_only=True)
    later["crossenc"]["version"] = 2
    torch.save(later, tmp_path / "later.ckpt")
    said = fail(capsys, "export", str(tmp_path / "later.ckpt"), str(tmp_path / "model"))
    assert "the checkpoint has format 2, but this crossenc reads 1" in said


def test_ckpt_path_last_goes_on_with_the_run(small: Path, tmp_path: Path):
    config = ["--config", str(small / "config.yaml"), "--output", str(tmp_path), "--run", "long"]
    folder = shutil.copytree(small, tmp_path / "long")
    first_log = (folder / "metrics.csv").read_text()
    assert main(["fit", *config, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["long"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] > 6
    assert (folder / "metrics.csv").is_file()
    assert (folder / "metrics-1.csv").read_text() == first_log
    second_log = (folder / "metrics.csv").read_text()
    assert main(["fit", *config, "--trainer.max_epochs", "3", "--ckpt_path", "last"]) == 0
    assert [(folder / f"metrics-{number}.csv").read_text() for number in (1, 2)] == [first_log, second_log]


def test_a_checkpoint_of_another_run_is_only_read(small: Path, tmp_path: Path):
    before = {path.name: path.stat().st_mtime_ns for path in small.iterdir()}
    where = ["--output", str(tmp_path), "--run", "other", "--ckpt_path", str(small / "last.ckpt")]
    assert main(["fit", "--config", str(small / "config.yaml"), *where, "--trainer.max_epochs", "2"]) == 0
    assert (tmp_path / "other" / "best.ckpt").is_file()  # its own, however good the other run's is
    assert {path.name: path.stat().st_mtime_ns for path in small.iterdir()} == before


def test_validate_and_test_repeat_the_fits_figures(trained: Path, capsys):
    before = json.loads((trained / "metrics.json").read_text())
    where = ["--ckpt_path", "best", "--config", str(trained / "config.yaml")]
    for command in ("validate", "test"):
        assert main([command, *where]) == 0
        said = capsys.readouterr()
        assert f"{command.capitalize()} metric" not in said.out  # no table of Lightning's beside ours
        assert "the head is new" not in said.err
        after = json.loads((trained / "metrics.json").read_text())
        assert after == {key: pytest.approx(value, abs=1e-6) for key, value in before.items()}


def test_predict_writes_the_exports_scores_in_the_rows_order(trained: Path, pairs_file: Path, caplog):
    config = ["--config", str(trained / "config.yaml"), "--ckpt_path", "best", "--trainer.precision", "32-true"]
    assert main(["predict", *config, "--return_predictions", "false", "--model.max_length", "8"]) == 0
    assert "model.max_length is taken from the checkpoint: None (not 8)" in caplog.messages
    with (trained / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    with pairs_file.open() as file:
        pairs = [(row["question1"], row["question2"]) for row in csv.DictReader(file)]
    assert [int(row["row"]) for row in rows] == list(range(60))
    assert [float(row["score"]) for row in rows] == pytest.approx(score_pairs(trained / "model", pairs), abs=1e-5)
    logits = np.array([float(row["logit"]) for row in rows], dtype=np.float32)
    assert [float(row["score"]) for row in rows] == sigmoid(logits).tolist()  # equal logits have equal scores
    written = (trained / "predictions.csv").stat().st_mtime_ns
    columns = "--data.columns={label: is_duplicate}"  # which predict does not need
    assert main(["predict", *config, columns, "--data.eval_tokens=99", "--trainer.fast_dev_run=true"]) == 0  # one batch
    assert (trained / "predictions.csv").stat().st_mtime_ns == written


def test_an_output_that_is_asked_for_is_written_to(small: Path, pairs_file: Path, tmp_path: Path):
    """By predict with a checkpoint's calibration."""
    run, output = shutil.copytree(small, tmp_path / "short"), tmp_path / "new"
    loaded = torch.load(run / "best.ckpt", weights_only=True)
    loaded["crossenc"]["calibration"] = [2.0, 0.5]
    torch.save(loaded, run / "best.ckpt")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    where = ["--ckpt_path", str(run / "best.ckpt"), "--output", str(output), "--trainer.accelerator=cpu"]
    assert main(["predict", *where, "--data.source", str(pairs_file)]) == 0
    with (output / "run" / "predictions.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx(score(run / "best.ckpt", pairs_file), abs=0.01)  # which has another precision
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_fast_dev_run_writes_no_model(small: Path, tmp_path: Path):
    config = ["--config", str(small / "config.yaml"), "--output", str(tmp_path), "--run", "dev"]
    assert main(["fit", *config, "--trainer.fast_dev_run", "true"]) == 0
    assert not list(tmp_path.iterdir())
    other = [*config, "--ckpt_path", str(small / "best.ckpt")]
    assert main(["predict", *other, "--trainer.fast_dev_run", "true"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_fit_without_dev_pairs_keeps_its_last_weights(small: Path, pairs_file: Path, tmp_path: Path, caplog):
    where = ["--output", str(tmp_path), "--run", "blind", "--data.test_source", str(pairs_file)]
    assert main(["fit", "--config", str(small / "config.yaml"), *where]) == 0
    figures = json.loads((tmp_path / "blind" / "metrics.json").read_text())
    assert (figures["checkpoint"], figures["test/threshold"], figures["test/rows"]) == ("last.ckpt, step 8", 0.5, 60)
    assert "val/rows" not in figures
    assert "there are no dev pairs to choose the best" in caplog.text
    card = (tmp_path / "blind" / "model" / "README.md").read_text()
    assert "| steps | 8 |\n| epochs | 1 |" in card
    assert "split by" not in card
    # What goes on has other weights under the same name, and no test pairs: it has no figures.
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "2", "--data.val_size", "0", "--data.test_size", "0"]
    assert main(["fit", "--config", str(small / "config.yaml"), *where[:4], *more]) == 0
    assert json.loads((tmp_path / "blind" / "metrics.json").read_text()) == {"checkpoint": "last.ckpt, step 16"}
    card = (tmp_path / "blind" / "model" / "README.md").read_text()
    assert "| steps | 16 |" in card
    assert "None were measured." in card


@pytest.mark.parametrize("label", [0, 1])
def test_dev_pairs_of_one_label_choose_no_threshold(fit: list[str], write, tmp_path: Path, caplog, label: int):
    dev = write("dev.csv", f"question1,question2,label\na,b,{label}\nc,d,{label}\n")
    options = ["--data.val_source", str(dev), "--data.test_size=6", "--trainer.val_check_interval=5"]
    assert main([*fit, *options]) == 0
    assert "all dev pairs have the same label" in caplog.text
    assert not (tmp_path / "run" / "best.ckpt").exists()
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    last = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(last[f"model.{name}"], value) for name, value in exported.items())
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (figures["val/threshold"], figures["test/threshold"]) == (0.5, 0.5)
    assert "crossenc" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "at the threshold 0.5000, which was not chosen on dev pairs" in card
    assert "or more means a duplicate" not in card
    assert "| pairs | 2 | 6 |" in card


def test_two_processes_train_one_model(small: Path, tmp_path: Path):
    """Real DDP over gloo, without dev pairs, into the second folder of a name: the other rank must find the first's."""
    (tmp_path / "twice").mkdir()
    command = [sys.executable, "-m", "crossenc", "fit", "--config", str(small / "config.yaml")]
    command += ["--output", str(tmp_path), "--run", "twice", "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        [*command, "--trainer.max_steps=2", "--data.val_size=0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
    assert "Total params" not in done.stdout + done.stderr  # Lightning's table of layers
    assert done.stdout.count("export: ") == 1
    folder = tmp_path / "twice-2"
    assert {"config.yaml", "last.ckpt", "metrics.json", "model"} <= {path.name for path in folder.iterdir()}
    assert not list((tmp_path / "twice").iterdir())
    assert torch.load(folder / "last.ckpt", weights_only=True)["crossenc"]["training"]["devices"] == 2


@pytest.mark.parametrize(
    ("capability", "precision", "has"),
    [("avx512_bf16", "bf16-mixed", "has"), ("amx_bf16", "bf16-mixed", "has"), ("avx2", "32-true", "does not have")],
)
def test_precision_is_what_the_hardware_does(
    fit: list[str], monkeypatch: pytest.MonkeyPatch, caplog, capability: str, precision: str, has: str
):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {capability: True})
    assert native_precision("mps") == "32-true"
    fit.remove("--trainer.precision=32-true")  # what is asked for is the default
    assert main([*fit, "--trainer.fast_dev_run=true"]) == 0
    assert f"precision {precision}: this hardware {has} native bf16 arithmetic" in caplog.messages


def test_the_models_options_reach_the_data(fit: list[str], tiny_backbone: Path, tmp_path: Path, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load_tokenizer", lambda *given: seen.append(given) or load_tokenizer(given[0]))
    options = ["--model.symmetric=true", "--model.consistency=1", "--model.revision=some", "--trainer.max_steps=1"]
    assert main([*fit, *options, "--data.val_size=0", "--data.test_size=0"]) == 0
    plan = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["PairDataModule"]["plan"]
    assert (plan["symmetric"], plan["twice"]) == (True, True)
    assert seen == [(str(tiny_backbone), "some")]


def test_a_logger_of_the_users_stands_beside_and_examples_are_scored(fit: list[str], tmp_path: Path, capsys):
    options = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'own'}", "--trainer.max_steps=1"]
    assert main([*fit, *options, "--examples=[[one text, another]]"]) == 0
    assert list((tmp_path / "own").rglob("metrics.csv"))
    assert (tmp_path / "run" / "metrics.csv").is_file()
    (score,) = score_pairs(tmp_path / "run" / "model", [("one text", "another")])
    assert f"its scores for the examples:\n  {score:.3f}  one text | another\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "limits",
    [
        ["--trainer.val_check_interval=00:00:00:01"],
        ["--trainer.val_check_interval=0.5"],
        ["--data.val_size=1", "--data.test_size=1"],
        ["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_algorithm=value"],
        ["--trainer.callbacks+=ModelCheckpoint"],
    ],
)
def test_evaluations_may_be_short_and_timed(fit: list[str], tmp_path: Path, limits: list[str]):
    assert main([*fit, *limits]) == 0
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 1 <= figures["val/rows"] <= 6
    assert 1 <= figures["test/rows"] <= 6
    assert (figures["test/rows"] < 6) == ("size" in limits[0])
    kept = figures["checkpoint"].partition(",")[0]
    assert kept == ("last.ckpt" if "size" in limits[0] else "best.ckpt")  # one pair has one label
    assert (tmp_path / "run" / "model" / "modules.json").is_file()


def test_texts_that_are_cut_are_told_of_in_evaluation_too(small: Path, write, tmp_path: Path, caplog):
    path = write("long.csv", f"question1,question2,label\n{'one ' * 600},b,1\nc,d,0\n")
    for command in ("test", "predict"):
        source = ["--data.test_source" if command == "test" else "--data.source", str(path)]
        where = ["--output", str(tmp_path), "--run", command, "--ckpt_path", str(small / "best.ckpt")]
        caplog.clear()
        assert main([command, "--config", str(small / "config.yaml"), *where, *source]) == 0
        assert caplog.text.count("1 of 2") == 1
        assert "pairs are longer than 512 tokens and are truncated: rows 1" in caplog.text


def test_an_output_that_leads_nowhere_is_one_line(fit: list[str], tmp_path: Path, capsys):
    (tmp_path / "disk").symlink_to(tmp_path / "gone")
    assert "disk/run cannot be written" in fail(capsys, *fit, f"--output={tmp_path / 'disk'}")


@pytest.mark.parametrize("command", ["evaluate", "fit"])
def test_sigterm_is_no_success(
    fit: list[str], pairs_file: Path, tiny: Path, tmp_path: Path, monkeypatch, capsys, command: str
):
    """While an evaluation runs, or a fit that writes no checkpoints."""
    from crossenc import CrossEncoderModule

    def step(self, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CrossEncoderModule, "on_validation_batch_end", step)
    words = [*fit, "--trainer.enable_checkpointing=false"]
    if command == "evaluate":
        pairs = ["--data.val_source", str(pairs_file), "--data.eval-tokens=100"]
        words = ["evaluate", str(tiny), "--accelerator=cpu", *pairs, "--output", str(tmp_path / "out")]
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["export", "gone.ckpt", str(tmp_path / "model")]) == 2  # which ends by itself
    assert main(words) == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "ended by SIGTERM" in capsys.readouterr().err


def test_a_signal_in_the_test_after_training_tells_how_to_go_on(fit: list[str], tmp_path: Path, monkeypatch, capsys):
    from crossenc import CrossEncoderModule

    with monkeypatch.context() as patched:
        step = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        patched.setattr(CrossEncoderModule, "on_test_batch_end", step)
        assert main([*fit, "--data.eval_tokens=100"]) == 143
    told = re.search(r"training is done; test and export with: python -m crossenc (.*)$", capsys.readouterr().err, re.M)
    assert told
    assert not (tmp_path / "run" / "model").exists()
    assert main(shlex.split(told[1])) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=0"], True),
        (["--trainer.max_steps=0"], False),
    ],
)
def test_without_a_checkpoint_nothing_is_tested_and_exported(
    fit: list[str], tmp_path: Path, caplog, options: list[str], left: bool
):
    assert main([*fit, *options]) == 0
    assert "there is nothing to test and export" in caplog.text
    assert (tmp_path / "run" / "metrics.csv").is_file() == left
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("told", "devices", "said"),
    [
        ({"NTASKS": "2", "NTASKS_PER_NODE": "1", "STEP_NUM_TASKS": "2"}, 1, "srun started 2 processes, but each would"),
        ({"NTASKS": "2"}, 1, "You set `--ntasks=2` in your SLURM bash script, but this variable is not supported"),
        ({"NTASKS": "1", "NTASKS_PER_NODE": "1"}, 2, "You set `devices=2` in Lightning, but the number of tasks"),
    ],
)
def test_what_slurm_starts_must_be_what_the_options_say(
    fit: list[str], tmp_path: Path, capsys, monkeypatch, told: dict[str, str], devices: int, said
):
    for name, value in {"JOB_NAME": "job", "PROCID": "0", "LOCALID": "0", "NODEID": "0", **told}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert said in fail(capsys, *fit, f"--trainer.devices={devices}")
    assert not list(tmp_path.iterdir())


def test_training_that_diverges_ends_in_one_line(fit: list[str], tmp_path: Path, capsys):
    options = ["--model.learning_rate=1e10", "--trainer.val_check_interval=2"]
    assert re.search(r"step \d+ are NaN or infinite: training has diverged", fail(capsys, *fit, *options))
    assert not (tmp_path / "run" / "best.ckpt").exists()


def test_bars_profilers_and_an_early_stop_are_lightnings(
    fit: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    kept = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=step", "--trainer.callbacks.mode=max"]
    stop = [*kept, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    stop += ["--trainer.callbacks.divergence_threshold=0", "--trainer.val_check_interval=4"]
    options = [*stop, "--trainer.callbacks+=TQDMProgressBar", "--trainer.profiler=simple"]
    assert main([*fit, *options]) == 0
    assert "training ended at step 4 of 12, due to max_time, a callback" in caplog.text
    assert "step 4  val/loss" not in caplog.text  # which the bar shows
    assert "run_training_batch" in (tmp_path / "run" / "fit-profile.txt").read_text()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.filterwarnings("default")  # as outside of tests
def test_a_config_has_what_a_callback_was_given(fit: list[str], tmp_path: Path):
    options = ["--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"]
    assert main([*fit, *options, "--trainer.max_steps=1"]) == 0
    (callback,) = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["callbacks"]
    assert callback["init_args"]["pruning_fn"] == "l1_unstructured"


def test_torchs_profile_lies_in_the_runs_folder(fit: list[str], tmp_path: Path):
    options = ["--trainer.profiler=pytorch", "--trainer.max_steps=2"]
    assert main([*fit, *options]) == 0
    assert "aten::" in (tmp_path / "run" / "fit-profile.txt").read_text()


def test_a_finished_run_of_another_name_is_not_gone_on_with(small: Path, tmp_path: Path, capsys):
    config, last = ["--config", str(small / "config.yaml"), "--output", str(tmp_path)], small / "last.ckpt"
    said = fail(capsys, "fit", *config, "--ckpt_path", str(last), "--run", "new")
    assert f"{last} is already fully trained; raise max_epochs or max_steps" in said
    said = fail(capsys, "fit", *config, "--ckpt_path", str(small))
    assert f"is a folder; name a checkpoint in it: {small / 'best.ckpt'}" in said
    assert not list(tmp_path.iterdir())


def test_scores_of_a_new_head_are_told(pairs_file: Path, small: Path, tmp_path: Path, caplog):
    where = ["--data.source", str(pairs_file), "--output", str(tmp_path)]
    for backbone, is_new in ((BACKBONE, True), (small / "model", False)):
        caplog.clear()
        assert main(["predict", *where, "--model.backbone", str(backbone)]) == 0
        assert ("the head is new" in caplog.text) == is_new


class AsksForAStop(Callback):
    """At the first batch, as one that stops early may."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


class StopsAfterAnEpoch(Callback):
    """Too late for a validation."""

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_epochs": 2, "min_epochs": 2}, [23]),
        ({"max_epochs": 4, "min_epochs": 2, "callbacks": f"{__name__}.AsksForAStop"}, [23]),
        ({"max_epochs": 4, "min_steps": 30, "callbacks": f"{__name__}.AsksForAStop"}, [29]),
        ({"max_epochs": 4, "callbacks": f"{__name__}.StopsAfterAnEpoch"}, []),
        ({"accumulate_grad_batches": 4, "val_check_interval": 6}, [1, 2]),  # not within a step
        ({"check_val_every_n_epoch": 2, "val_check_interval": 1.0}, [11]),  # 1 epoch
        ({"check_val_every_n_epoch": 2, "val_check_interval": 1.0, "max_epochs": 3}, [23, 35]),
        # Epochs that end within a step.
        (
            {"limit_train_batches": 4, "accumulate_grad_batches": 3, "val_check_interval": 1.0, "max_epochs": 3},
            [1, 3, 5],
        ),
    ],
)
def test_the_threshold_is_that_of_the_last_weights(
    fit: list[str], tmp_path: Path, trainer: dict[str, Any], steps: list[int]
):
    """Whether training validated or not: the report, the test figures and the export have the same one."""
    options = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    assert main([*fit, *options]) == 0
    folder = tmp_path / "run"
    assert list(logged(folder, "val/f1")) == steps
    figures = json.loads((folder / "metrics.json").read_text())
    exported = json.loads((folder / "model" / "config.json").read_text())["crossenc"]["threshold"]
    assert figures["val/threshold"] == figures["test/threshold"] == exported
    # What goes on knows the best checkpoint of the same step.
    states = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = (state["best_model_path"] for name, state in states.items() if "BestCheckpoint" in name)
    assert best == (str(folder / "best.ckpt") if steps else "")

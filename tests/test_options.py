"""Options that are refused, in one line and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint

from crossenc.cli import main
from crossenc.errors import UsageError
from crossenc.options import check_callbacks

from .conftest import fail

pytestmark = pytest.mark.usefixtures("no_pictures")


def finder() -> LearningRateFinder:
    return LearningRateFinder()


OF_MODE = "an option cannot be used: - `mode` can be min, max, got high"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--examples=[[one]]"], "examples"),
        (["--trainer.overfit_batches=2"], "set --data.limit instead"),
        *(([f"--trainer.strategy=ddp_{way}"], "use ddp") for way in ("spawn", "fork", "notebook")),
        (["--trainer.accelerator=abacus"], "abacus"),
        (["--trainer.limit_val_batches=2"], "would take only the longest pairs; use --data.limit"),
        (["--trainer.limit_test_batches=0.5"], "would take only the longest pairs; use --data.limit"),
        (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches must be at least 1, not 0"),
        (["--trainer.val_check_interval=0"], "val_check_interval must be above 0"),
        (["--trainer.check_val_every_n_epoch=1"], "; 1.0 is the end of an epoch"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch must be at least 1, or null, not 0"),
        (["--trainer.gradient_clip_val=-0.5"], "gradient_clip_val must be at least 0, not -0.5"),
        (["--seed_everything=4294967296"], "or true or false, not 4294967296"),
        (["--seed_everything=-1"], "--seed_everything must be from 0 to 4294967295, or true or false, not -1"),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:01:00"], "cannot be written"),
        ([f"--trainer.callbacks{word}" for word in ("+=EarlyStopping", ".monitor=val/f1", ".mode=high")], OF_MODE),
        (
            ["--data.max_length=16"],
            "data.max_length, given on the command line, follows from model.max_length; set model",
        ),
        (["--model.max_length=abc"], "\"model.max_length\": - Expected a <class 'int'> Given value: abc"),
        (
            ["--trainer.callbacks+=LearningRateFinder"],
            "LearningRateFinder does not work with crossenc; use --model.learn",
        ),
        ([f"--trainer.callbacks+={__name__}.finder"], "LearningRateFinder does not work with crossenc"),
        (["--trainer.callbacks+=BackboneFinetuning"], "use --model.freeze_layers"),
        (["--trainer.callbacks+=SpikeDetection"], "use --trainer.gradient_clip_val"),
        (["--trainer.barebones=true"], "would leave out the run's checkpoints"),
        (["--trainer.default_root_dir=x"], "is the run's folder; set --output and --run instead"),
        (
            2 * ["--trainer.callbacks+=EMAWeightAveraging"],
            "an option cannot be used: Found more than one stateful callback of type",
        ),
        (
            ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={1: 2}"],
            "GradientAccumulationScheduler does not work with crossenc; use --trainer.accumulate_grad_batches",
        ),
        (
            ["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=x"],
            "use --checkpoint_every_n_minutes",
        ),
        (
            [f"--trainer.callbacks{word}" for word in ("+=StochasticWeightAveraging", ".swa_lrs=1")],
            "use --trainer.callbacks+=EMAWeightAveraging",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
            "choose one of val/loss, val/av",
        ),
        (["--trainer.callbacks+=EMAWeightAveraging", "--trainer.strategy=fsdp"], "which shards the weights; use ddp"),
        (["--trainer.val_check_interval=2.5"], "val_check_interval"),
        (["--model.optimizer=LBFGS"], "model.optimizer: LBFGS cannot train these weights"),
        (["--model.schedule=cosine_with_min_lr"], "model.schedule cosine_with_min_lr: "),
        (
            ["--data.val_size=-0.5"],
            "--data.val_size -0.5, --data.test_size None: each must be null, a whole number, or",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_no_folder(
    fit: list[str], tmp_path: Path, capsys, options: list[str], said: str
):
    assert said in fail(capsys, *fit, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["data:\n  max_length: 16\n", "data.max_length: 16\n"])
def test_a_config_cannot_set_what_follows_from_another_option(
    fit: list[str], write, tmp_path: Path, capsys, content: str
):
    config = write("own.yaml", content)
    said = fail(capsys, *fit, f"--output={tmp_path / 'runs'}", f"--config={config}")
    assert f"data.max_length, given in {config}, follows from model.max_length; set model.max_length instead" in said
    assert not (tmp_path / "runs").exists()


def test_what_follows_from_another_option_cannot_be_set_in_a_file_for_one_section_or_inline_either(
    fit: list[str], write, tmp_path: Path, capsys
):
    section = write("section.yaml", "max_length: 16\n")
    config = write("own.yaml", "data: section.yaml\n")  # relative to the config itself
    sources = {
        f"--data={section}": section,
        f"--config={config}": config,
        f"-c={config}": config,
        f"-c{config}": config,
    }
    inline = "{data: {max_length: 16}}"
    for option, source in (sources | {f"--config={inline}": inline}).items():
        said = f"data.max_length, given in {source}, follows from model.max_length"
        assert said in fail(capsys, *fit, f"--output={tmp_path / 'runs'}", option)
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_not_yaml_is_named_with_the_line(write, tmp_path: Path, capsys):
    config = write("own.yaml", "data:\n  batch_size: [1\nmodel:\n")
    said = fail(capsys, "fit", "--output", str(tmp_path / "runs"), "--config", str(config))
    assert f'a config is not valid YAML: while parsing a flow sequence in "{config}", line 2' in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "trainer:\nmodel: {max_length: 32}\n",
            "the section trainer, in {}, is empty; give it an option, or remove it",
        ),
        ("data: null\n", "the section data, in {}, is empty"),
        ("model: ~\n", "the section model, in {}, is empty"),
        ("# nothing\n", "the config {} has no options"),
        ("[a, b]\n", "the config {} has no options"),
        ("data: {limit: 9}\nrun: a\ndata: {window: 5}\n", 'the key data stands twice in "{}", line 3, column 1'),
        ("data:\n  limit: 9\n  limit: 8\n", 'the key limit stands twice in "{}", line 3, column 3'),
    ],
)
def test_a_config_that_would_undo_options_is_refused(write, tmp_path: Path, capsys, content: str, said: str):
    config = write("own.yaml", content)
    assert said.format(config) in fail(capsys, "fit", "--output", str(tmp_path / "runs"), "-c", str(config))
    assert not (tmp_path / "runs").exists()


def test_words_that_are_named_like_options_and_keys_that_merge_are_fine(write, capsys):
    config = write("own.yaml", "model:\n  <<: &a {max_length: 32}\n  <<: &b {dropout: 0.5}\n")
    for words in (["--run", "data"], ["--data.source", "config"], ["-c", str(config)], [f"-c{config}"]):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["fit", "--print_config", *words])
    said = capsys.readouterr().out
    assert "run: data\n" in said
    assert "source: config\n" in said
    assert said.count("  max_length: 32\n") == said.count("  dropout: 0.5\n") == 2
    assert "expected one argument" in fail(capsys, "fit", "--config")


def test_a_config_with_questions_in_a_list_and_what_looks_like_a_date_is_read(write, capsys):
    config = write("own.yaml", "run: 2026-02-30\nexamples:\n  - [Who is it?, Who is this?]\n")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", str(config), "--print_config"])
    assert "- Who is this?\n" in capsys.readouterr().out


class Own(Callback):
    """Could log a metric of its own."""


def test_a_metric_must_be_known_unless_a_callback_of_the_users_may_log_it():
    check_callbacks([EarlyStopping("val/own"), Own()], "auto")
    check_callbacks([EarlyStopping("val/loss")], "fsdp")
    check_callbacks([ModelCheckpoint(monitor="step")], "auto")
    for callback in (EarlyStopping("val/own"), EarlyStopping("step")):
        with pytest.raises(UsageError, match=f"EarlyStopping: there is no metric {callback.monitor}; choose one of"):
            check_callbacks([callback], "auto")

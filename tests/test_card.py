"""The model card of an export."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from crossenc import export
from crossenc.card import is_hub_id, worst_errors, write_card
from crossenc.checkpoints import owner
from crossenc.cli import main
from crossenc.records import read_scores

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_card_tells_data_metrics_and_settings(trained: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(trained / "model" / "README.md")
    figures = json.loads((trained / "metrics.json").read_text())
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert card.data.model_name == "short"  # the run's name, where the folder's own is `model`
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "text-ranking"
    assert results["test", "f1"] == figures["test/f1"]
    assert {r.task_type for r in card.data.eval_results} == {"cross-encoder-classification"}
    assert "48 pairs for training (43.8 % duplicates)" in card.text
    low, high = (figures[f"val/f1_{end}"] for end in ("low", "high"))
    assert f"| F1 | {figures['val/f1']:.4f} ({low:.4f} to {high:.4f}) |" in card.text
    assert "| learning_rate | 5e-05 |" in card.text
    assert "| weight_decay | 0.0 |" in card.text
    assert "| duration | " in card.text
    assert "| hardware | " in card.text
    assert "| steps | 6 |" in card.text
    assert "| epochs | 1 |" in card.text
    assert f"torch {torch.__version__}" in card.text
    assert f"Of 6 test pairs, {100 * figures['test/duplicates']:.1f} % of them duplicates" in card.text
    assert str(trained.parent) not in card.text
    scores = read_scores(trained, owner(trained / "best.ckpt"))
    dev, test = (worst_errors(scores[split], figures["val/threshold"]) for split in ("val", "test"))
    told = card.text.partition("### Most confident errors on dev pairs")[2]
    assert [" | ".join(row) in told for row in dev + test] == [True] * len(dev) + [False] * len(test)
    assert dev
    assert test
    shown = re.findall(r"!\[.+\]\((figures/\w+\.png)\)", card.text)
    assert shown == [f"figures/{name}.png" for name in ("precision_recall", "reliability", "scores", "learning")]
    assert {str(path.relative_to(trained / "model")) for path in (trained / "model" / "figures").iterdir()} == set(
        shown
    )


def test_the_card_names_the_source_of_each_split_and_what_changed_the_weights(
    fit: list[str], pairs_file: Path, tmp_path: Path
):
    from huggingface_hub import ModelCard

    test = tmp_path / "other.csv"
    test.write_bytes(pairs_file.read_bytes())
    options = ["--data.test_source", str(test), "--data.limit", "40", "--data.val_size", "6", "--trainer.max_steps=1"]
    options += ["--trainer.callbacks+=EMAWeightAveraging", "--model.max_length=16"]
    assert main([*fit, *options]) == 0
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    names = {result.dataset_split: result.dataset_name for result in card.data.eval_results}
    content = json.loads((tmp_path / "run" / "model" / "sentence_bert_config.json").read_text())
    assert content["max_seq_length"] == 16
    assert names["val"] == "pairs.csv (dev)"
    assert names["test"] == "other.csv (test)"
    assert "40 pairs for test (42.5 % duplicates) from `other.csv`." in card.text
    assert "| limit | 40 |" in card.text
    assert "| averaged by | EMAWeightAveraging |" in card.text
    # Other dev pairs are none of the exported model's, whose threshold and calibration they did not choose.
    where = ["--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", str(tmp_path / "run" / "best.ckpt")]
    assert main(["validate", *where, "--data.val_source", str(test), "--data.limit", "11"]) == 0
    card = ModelCard.load(export(str(tmp_path / "run" / "best.ckpt"), str(tmp_path / "again")) / "README.md")
    assert "| pairs | 6 |" in card.text


def test_figures_of_other_test_pairs_are_not_told_of_the_runs(fit: list[str], pairs_file: Path, tmp_path: Path):
    from huggingface_hub import ModelCard

    other = tmp_path / "other.csv"
    other.write_bytes(pairs_file.read_bytes())
    assert main([*fit, "--trainer.max_steps=1"]) == 0
    best = tmp_path / "run" / "best.ckpt"
    where = ["--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", "best", "--data.limit", "50"]
    assert main(["test", *where, "--data.test_source", str(other)]) == 0
    card = ModelCard.load(export(str(best), str(tmp_path / "again")) / "README.md")
    names = {result.dataset_split: result.dataset_name for result in card.data.eval_results}
    assert (names["val"], names["test"]) == ("pairs.csv (dev)", "other.csv (test)")
    dev = tmp_path / "dev.csv"
    dev.write_bytes(pairs_file.read_bytes())
    assert main(["validate", *where[:4], "--data.val_source", str(dev)]) == 0
    assert main(["test", *where[:4]]) == 0  # which knows of its own dev figures, and leaves these
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (figures["val/rows"], Path(figures["val/source"]).name) == (60, "dev.csv")
    assert (figures["test/rows"], Path(figures["test/source"]).name) == (6, "pairs.csv")
    # As with dev pairs of one label, which choose no threshold that would differ.
    one = tmp_path / "one.csv"
    one.write_text("question1,question2,label\na,b,1\nc,d,1\n")
    assert main(["validate", *where[:4], "--data.val_source", str(one)]) == 0
    card = ModelCard.load(export(str(best), str(tmp_path / "third")) / "README.md")
    assert "6 pairs for dev (33.3 % duplicates)" in card.text
    assert {"val", "test"} <= {result.dataset_split for result in card.data.eval_results}  # the latter its own still
    assert main(["validate", *where[:4], "--data.limit", "4"]) == 0  # of the same source, and not all
    card = ModelCard.load(export(str(best), str(tmp_path / "fourth")) / "README.md")
    assert "| pairs | 6 | 6 |" in card.text
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert re.search(r"6 pairs for dev \(33\.3 % duplicates\); 50 pairs for test .* from `other\.csv`\.", card.text)


def test_the_surest_errors_come_first_and_break_no_table():
    columns = {
        "label": [1.0, 0.0, 0.0, 1.0, 1.0],
        "score": [0.4, 0.9, 0.2, 0.01, 0.9],
        "text_a": ["weak", "a | b\nc <b> &lt; \x1b[2J\0", "right", "surest", "right"],
        "text_b": ["x" * 300] * 5,
    }
    found = worst_errors(columns, threshold=0.8)  # the surest by their labels
    assert [row[:2] for row in found] == [["0.010", "1"], ["0.900", "0"], ["0.400", "1"]]
    assert found[1][2] == "a \\| b c \\<b\\> \\&lt; \ufffd\\[2J\ufffd"
    assert len(found[0][3]) == 200
    assert len(worst_errors({name: values * 4 for name, values in columns.items()}, threshold=0.5)) == 10
    assert worst_errors({"label": [1], "score": [0.5], "text_a": ["a"], "text_b": ["b"]}, threshold=0.5) == []


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        ("owner/name", True),
        ("owner/name:train", True),
        ("./folder/name", False),
        ("/folder/name", False),
        ("data.csv", False),
        ("data/train.csv", False),
        ("package:name/model", False),
        ("sample", False),
    ],
)
def test_only_hub_ids_are_named_as_such(name: str, on_hub: bool):
    assert is_hub_id(name) == on_hub


def test_a_folder_that_is_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name")


def made(folder: Path, calibration: list[float], **figures: float) -> Any:
    """The card of a checkpoint with these figures on test pairs, and with ONNX files."""
    from huggingface_hub import ModelCard

    data = {
        "source": "owner/name:train",
        "sources": {"val": "owner/name:train", "test": "other.csv"},
        "subset": "pairs",
        "split": "question",
        "rows": {"train": 800, "val": 100, "test": 1000},
        "duplicates": {"train": 0.4, "val": 0.4, "test": 0.4},
        "transitive": True,
        "plan": {"batch_size": 8, "batch_by": "pairs", "window": 1, "seed": 42},
    }
    checkpoint = {
        "hyper_parameters": {"backbone": "/runs/first/model", "max_length": None},
        "PairDataModule": data,
        "crossenc": {"calibration": calibration, "threshold": 0.25, "training": {}},
        "callbacks": {"Cost": {"seconds": 120.0}},
        "global_step": 100,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 3}}}},
    }
    told = {"val/f1": 0.5} | {f"test/{name}": value for name, value in figures.items()}
    told |= {f"test_unseen/{name}": value for name, value in figures.items()}
    onnx = {"rows": 100, "onnx": 0.9, "onnx-int8": 0.875, "difference": 0.1}
    write_card(folder, "mine", checkpoint, told, 128, {}, onnx=onnx)
    return ModelCard.load(folder / "README.md")


def test_the_card_tells_each_figure_as_what_it_is(tmp_path: Path):
    shares = {"accuracy": 0.9, "recall": 0.8, "precision": 0.7, "average_precision": 0.6}
    bounds = {f"{name}_{end}": shares[name] + by for name in shares for end, by in (("low", -0.05), ("high", 0.05))}
    best = {"precision_best": 0.75, "recall_best": 0.85, "roc_auc": math.nan}
    card = made(tmp_path, [2.0, 0.1], rows=1000, duplicates=0.4, swap_flips=3, **shares, **bounds, **best)
    assert "it classifies 90.0 % (85.0 to 95.0) correctly; it finds 80.0 % (75.0 to 85.0) of the dup" in card.text
    assert "and 70.0 % (65.0 to 75.0) of the pairs that it calls duplicates are duplicates." in card.text
    assert "Its average precision is 60.0 %" in card.text
    assert "changes 3 of the decisions" in card.text
    assert "| precision, own best | 0.7500 |" in card.text
    assert "| recall, own best | 0.8500 |" in card.text
    assert "of 0.2500 or more means a duplicate" in card.text
    assert "at the threshold 0.2500, which was chosen on dev pairs" in card.text
    assert "Scores are calibrated" in card.text
    assert "Scores are calibrated" not in made(tmp_path, [1.0, 0.0]).text
    assert "Pairs of more than 128 tokens are truncated" in card.text
    assert "It was trained from `first/model` and" in card.text  # and no more of the machine
    assert 'CrossEncoder("path/to/this/folder")' in card.text
    assert "| duration | 2.0 minutes |" in card.text
    assert "| transitive | True |" in card.text
    assert "| epochs | 3 |" in card.text
    assert "a change of -0.0250" in card.text
    assert (card.data.base_model, card.data.datasets) == (None, ["owner/name"])  # ids on the Hub only
    told = {(result.dataset_type, result.dataset_config) for result in card.data.eval_results}
    assert told == {("owner/name", "pairs"), ("other.csv", None)}
    assert "`owner/name:train`, subset `pairs`, split by question: 800 pairs for training" in card.text
    assert not [result for result in card.data.eval_results if math.isnan(result.metric_value)]

"""Figures and scores beside a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from crossenc.errors import DataError
from crossenc.records import is_evaluation, read_figures, read_scores, write_figures, write_scores


def test_metrics_json_keeps_figures_of_its_checkpoint_only(tmp_path: Path):
    write_figures(tmp_path, "best.ckpt", {"val/f1": 0.5, "val/rows": 3.0, "val/roc_auc": math.nan}, {})
    write_figures(tmp_path, "best.ckpt", {"test/f1": 0.5, "test_unseen/f1": 0.1}, {"test": "others.csv"})
    write_figures(tmp_path, "best.ckpt", {"test/f1": 0.25}, {"test": "pairs.csv"})
    content = json.loads((tmp_path / "metrics.json").read_text())
    expected = {"test/f1": 0.25, "test/source": "pairs.csv", "val/f1": 0.5, "val/roc_auc": None, "val/rows": 3}
    assert content == {"checkpoint": "best.ckpt", **expected}
    figures, sources = read_figures(tmp_path, "best.ckpt")
    assert math.isnan(figures["val/roc_auc"])
    assert sources == {"test": "pairs.csv"}
    write_figures(tmp_path, "last.ckpt", {"val/f1": 0.4}, {})
    assert read_figures(tmp_path, "best.ckpt") == ({}, {})
    assert read_figures(tmp_path, "last.ckpt") == ({"val/f1": 0.4}, {})


def test_scores_are_kept_for_their_checkpoint_only(tmp_path: Path):
    val, test = ({"row": np.arange(n), "text_a": ["a"] * n, "score": np.arange(n) / n} for n in (3, 2))
    write_scores(tmp_path, "best.ckpt", {"val": val})
    write_scores(tmp_path, "best.ckpt", {"test": test | {"score_swapped": np.zeros(2)}})
    write_scores(tmp_path, "best.ckpt", {"test": test | {"score": np.ones(2), "score_swapped": np.zeros(2)}})
    found = read_scores(tmp_path, "best.ckpt")
    assert found["test"]["score"].tolist() == [1, 1]
    assert list(found) == ["val", "test"]
    assert found["val"]["score"].tolist() == val["score"].tolist()
    assert found["test"]["text_a"].tolist() == ["a", "a"]
    assert read_scores(tmp_path, "last.ckpt") == {}
    write_scores(tmp_path, "last.ckpt", {"test": test})
    assert read_scores(tmp_path, "best.ckpt") == {}
    assert list(read_scores(tmp_path, "last.ckpt")) == ["test"]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_damaged_scores_are_named(tmp_path: Path):
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"scores\.parquet cannot be read as parquet"):
        read_scores(tmp_path, "best.ckpt")


def test_only_a_report_of_its_own_counts_as_an_evaluation(tmp_path: Path):
    assert not is_evaluation(tmp_path)
    write_figures(tmp_path, None, {"val/f1": 0.5}, {})
    write_figures(tmp_path, None, {"test/f1": 0.25}, {})  # of another model
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"checkpoint": None, "test/f1": 0.25}
    assert is_evaluation(tmp_path)
    for name in ("config.yaml", "config.json"):  # a run's, a model's
        (tmp_path / name).touch()
        assert not is_evaluation(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "metrics.json").write_text('{"f1": 0.5}')  # some other tool's
    assert not is_evaluation(tmp_path)

"""Figures against sentence-transformers' evaluator and scikit-learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
from sklearn.metrics import roc_auc_score

from crossenc.metrics import PairMetrics, decision_figures, pair_figures, read_figures, write_figures


class Scores:
    """Stands where the evaluator wants a model: gives the scores at hand."""

    num_labels = 1

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores
        self.model_card_data = self

    def predict(self, *_: object, **__: object) -> np.ndarray:
        return self.scores

    def set_evaluation_metrics(self, *_: object, **__: object) -> None: ...


def peer_figures(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    evaluator = CrossEncoderClassificationEvaluator([["a", "b"]] * len(labels), labels.int().tolist(), write_csv=False)
    return {name: float(value) for name, value in evaluator(Scores(scores.numpy())).items()}


# Few distinct scores make ties, which is where definitions differ.
pair = st.tuples(st.integers(0, 12).map(lambda n: n / 12), st.booleans())


@settings(deadline=None, max_examples=150)
@given(st.lists(pair, min_size=2, max_size=40).filter(lambda rows: len({label for _, label in rows}) == 2))
def test_figures_are_the_peers(rows: list[tuple[float, bool]]):
    scores, labels = torch.tensor([s for s, _ in rows]), torch.tensor([float(label) for _, label in rows])
    ours, theirs = pair_figures(scores, labels), peer_figures(scores, labels)
    for name in ("accuracy", "f1"):
        assert ours[f"{name}_best"] == pytest.approx(theirs[name], abs=1e-6)
    # Where two thresholds give the same F1, rounding may pick either; the figures at the peer's must be the peer's.
    at_peers = decision_figures(scores, labels.long(), theirs["f1_threshold"])
    assert at_peers["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert at_peers["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert ours["average_precision"] == pytest.approx(theirs["average_precision"], abs=1e-6)
    assert ours["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_distinct_scores_give_the_peers_thresholds():
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(1000, generator=draw), (torch.rand(1000, generator=draw) < 0.4).float()
    ours, theirs = pair_figures(scores, labels), peer_figures(scores, labels)
    for ours_name, theirs_name in {
        "accuracy_best": "accuracy",
        "accuracy_best_threshold": "accuracy_threshold",
        "f1_best": "f1",
        "f1_best_threshold": "f1_threshold",
        "precision_best": "precision",
        "recall_best": "recall",
        "average_precision": "average_precision",
    }.items():
        assert ours[ours_name] == pytest.approx(theirs[theirs_name], abs=1e-6), ours_name


def test_a_threshold_from_elsewhere_is_used_and_the_own_best_stands_beside_it():
    figures = pair_figures(torch.tensor([0.9, 0.6, 0.4, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0]), threshold=0.5)
    assert (figures["accuracy"], figures["precision"], figures["recall"]) == (0.5, 0.5, 0.5)
    assert figures["f1_best"] == pytest.approx(0.8)
    assert figures["accuracy_best"] == 0.75


def test_one_label_only_has_no_ranking():
    figures = pair_figures(torch.tensor([0.2, 0.7]), torch.tensor([0.0, 0.0]))
    assert math.isnan(figures["average_precision"])
    assert math.isnan(figures["roc_auc"])
    assert figures["accuracy_best"] == 1.0  # calling none a duplicate is allowed


def test_batches_add_up():
    metrics = PairMetrics()
    scores, labels, losses = torch.rand(7), torch.tensor([0.0, 1, 0, 1, 1, 0, 1]), torch.arange(7.0)
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        metrics.update(scores[part], labels[part], losses[part])
    assert metrics.compute() == {**pair_figures(scores, labels), "loss": 3.0}


def test_metrics_json_keeps_figures_of_its_checkpoint_only(tmp_path: Path):
    write_figures(tmp_path, "best.ckpt", {"val/f1": 0.5, "val/rows": 3.0, "val/roc_auc": math.nan})
    write_figures(tmp_path, "best.ckpt", {"test/f1": 0.25})
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content == {"checkpoint": "best.ckpt", "test/f1": 0.25, "val/f1": 0.5, "val/roc_auc": None, "val/rows": 3}
    write_figures(tmp_path, "last.ckpt", {"val/f1": 0.4})
    assert read_figures(tmp_path / "best.ckpt") == {}
    assert read_figures(tmp_path / "last.ckpt") == {"val/f1": 0.4}

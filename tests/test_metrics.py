"""Figures against sentence-transformers' evaluator and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
from sklearn.metrics import accuracy_score, average_precision_score, brier_score_loss, f1_score, roc_auc_score

from crossenc.calibration import Calibration
from crossenc.metrics import (
    PairMetrics,
    Scored,
    best_thresholds,
    bin_numbers,
    calibration_error,
    chance_calibration_error,
    decision_figures,
    evaluation_figures,
    intervals,
    pair_figures,
    resampled_figures,
    score_columns,
)


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
    scores = torch.rand(1000, generator=draw)
    labels = (torch.rand(1000, generator=draw) < scores).float()
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
    assert 0.1 < ours["f1_best_threshold"] < ours["accuracy_best_threshold"] < 0.9
    at_best = decision_figures(scores, labels.long(), ours["accuracy_best_threshold"])
    assert at_best["accuracy"] == ours["accuracy_best"]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_threshold_lies_between_neighbours(kind: type[np.floating]):
    truth = torch.tensor([1, 0, 0])
    for high in np.random.default_rng(0).random(100).astype(kind):
        scores = torch.from_numpy(np.array([high, np.nextafter(high, kind(0)), 0], dtype=kind))
        figures = pair_figures(scores, truth)
        assert figures["accuracy"] == figures["f1"] == figures["precision_best"] == figures["recall_best"] == 1.0
        assert decision_figures(scores, truth, figures["accuracy_best_threshold"])["accuracy"] == 1.0


def test_a_threshold_from_elsewhere_is_used_and_the_own_best_stands_beside_it():
    figures = pair_figures(torch.tensor([0.9, 0.6, 0.4, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0]), threshold=0.5)
    assert (figures["accuracy"], figures["precision"], figures["recall"]) == (0.5, 0.5, 0.5)
    assert figures["f1_best"] == pytest.approx(0.8)
    assert figures["accuracy_best"] == 0.75
    assert (figures["precision_best"], figures["recall_best"]) == (2 / 3, 1)


def test_one_label_only_has_no_ranking():
    figures = pair_figures(torch.tensor([0.2, 0.7]), torch.tensor([0.0, 0.0]))
    assert math.isnan(figures["average_precision"])
    assert math.isnan(figures["roc_auc"])
    assert figures["f1_best"] == 0.0
    assert figures["accuracy_best"] == 1.0  # calling none a duplicate is allowed
    at_best = decision_figures(torch.tensor([0.2, 0.7]), torch.tensor([0, 0]), figures["accuracy_best_threshold"])
    assert at_best["accuracy"] == 1.0
    assert 0.7 < figures["accuracy_best_threshold"] < 0.71  # just above the highest score


def test_batches_add_up_in_the_order_of_their_rows():
    metrics = PairMetrics()
    rows = torch.tensor([3, ~1, 0, ~3, 2, 1, ~2, ~0])
    logits, losses = torch.where(rows < 0, 10.0 + ~rows, rows), torch.where(rows < 0, 99.0, rows)
    labels = (torch.maximum(rows, ~rows) % 2).float()
    for part in (slice(0, 3), slice(3, 7), slice(7, 8)):
        metrics.update(rows[part], logits[part], labels[part], losses[part])
    scored, loss = metrics.gather()
    assert scored.rows.tolist() == scored.logits.tolist() == [0, 1, 2, 3]
    assert scored.swapped.tolist() == [10, 11, 12, 13]
    assert scored.labels.tolist() == [0, 1, 0, 1]
    assert loss == 1.5
    assert scored.logits.dtype == scored.swapped.dtype == torch.float64  # in which a sigmoid keeps their order
    metrics.reset()
    metrics.update(rows[:2], logits[:2], labels[:2], losses[:2])  # an evaluation that ended early: 3, and 1 turned
    assert metrics.gather()[0].swapped is None
    metrics.reset()
    metrics.update(rows[:1], logits[:1], labels[:1], losses[:1])  # of which torchmetrics makes scalars
    assert metrics.gather()[0].logits.tolist() == [3]


def test_calibration_figures_are_scikit_learns_and_the_definition():
    draw = np.random.default_rng(0)
    scores, labels = draw.random(500), (draw.random(500) < 0.4).astype(float)
    logits = torch.from_numpy(np.log(scores / (1 - scores)))
    scored = Scored(torch.arange(500), torch.from_numpy(labels), logits, None)
    figures = evaluation_figures(score_columns(scored, Calibration()))
    assert figures["brier"] == pytest.approx(brier_score_loss(labels, scores))
    assert "brier_if_calibrated" not in figures  # no calibration is better
    number = (scores * 10).astype(int)
    bins = [(scores[number == b].mean() - labels[number == b].mean(), (number == b).mean()) for b in range(10)]
    assert figures["calibration_error"] == pytest.approx(sum(abs(gap) * share for gap, share in bins), abs=1e-6)
    assert bin_numbers(np.array([0.0, 0.05, 0.1, 0.95, 1.0])).tolist() == [0, 0, 1, 9, 9]
    sure = torch.tensor([1.0, 0.95, 0.95, 0.32, 0.33], dtype=torch.float64)  # two bins
    error = abs(2.9 - 2) / 5 + abs(0.65 - 1) / 5
    assert calibration_error(sure, torch.tensor([0.0, 1, 1, 0, 1])) == pytest.approx(error, abs=1e-12)


def test_what_chance_shows_is_the_mean_calibration_error_of_true_probabilities():
    draw = np.random.default_rng(0)
    scores = draw.beta(0.5, 0.8, 1_000)
    labels = torch.from_numpy((draw.random((400, 1_000)) < scores).astype(float))
    found = [calibration_error(torch.from_numpy(scores), some) for some in labels]
    columns = {"score": scores, "score_raw": scores, "score_crossed": scores, "label": labels[0].numpy()}
    assert evaluation_figures(columns)["calibration_error_chance"] == pytest.approx(np.mean(found), rel=0.04)


def test_the_order_of_texts_is_measured():
    logits, swapped = torch.tensor([2.0, 0.1, -0.1, -2.0]), torch.tensor([2.0, -0.1, 0.2, -2.0])
    scored = Scored(torch.arange(4), torch.tensor([1.0, 1, 0, 0]), logits.double(), swapped.double())
    figures = evaluation_figures(score_columns(scored, Calibration(2.0, 0.0)), threshold=0.5)
    gaps = ((2 * logits).sigmoid() - (2 * swapped).sigmoid()).abs()
    assert figures["swap_flips"] == 2
    assert figures["swap_gap_mean"] == pytest.approx(gaps.mean().item())
    assert figures["swap_gap_p99"] == pytest.approx(np.quantile(gaps.numpy(), 0.99), abs=1e-6)
    assert "swap_flips" not in evaluation_figures(score_columns(scored._replace(swapped=None), Calibration()))


def test_each_figure_is_of_its_own_scores():
    found = {"score": [0.9, 0.3, 0.6, 0.2], "score_raw": [0.8, 0.4, 0.5, 0.1], "score_crossed": [0.7, 0.35, 0.65, 0.15]}
    found |= {"score_swapped": [0.9, 0.6, 0.5, 0.2], "label": [0.5, 0.0, 1.0, 0.0]}  # from one half on a duplicate
    columns = {name: np.array(values) for name, values in found.items()}
    figures = evaluation_figures(columns, threshold=0.6)
    truth = np.array([1, 0, 1, 0])
    assert figures["accuracy"] == 1.0  # a score at the threshold is one of a duplicate
    assert figures["swap_flips"] == 2
    for name, of in (("", "score_crossed"), ("_raw", "score_raw")):
        assert figures[f"brier{name}"] == pytest.approx(brier_score_loss(truth, columns[of]))
        expected = calibration_error(torch.from_numpy(columns[of]), torch.from_numpy(truth))
        assert figures[f"calibration_error{name}"] == pytest.approx(expected)
    assert figures["calibration_error_chance"] == chance_calibration_error(columns["score"])
    assert figures["threshold"] == 0.6
    assert figures["duplicates"] == 0.5
    assert figures["f1_best_threshold"] == pytest.approx(0.45)  # between the two scores that it divides
    assert best_thresholds(torch.tensor([0.2, 0.7]), torch.tensor([0, 0]))[1] == 0.0


def test_scores_by_what_was_fitted_stand_beside_those_that_are_given():
    logits = torch.tensor([2.0, -1.0], dtype=torch.float64)
    scored = Scored(torch.arange(2), torch.tensor([1.0, 0]), logits, None)
    columns = score_columns(scored, Calibration(), Calibration(2.0, 1.0)(logits))
    assert columns["score"] == pytest.approx(logits.sigmoid().numpy())
    assert columns["score_crossed"] == pytest.approx((2 * logits + 1).sigmoid().numpy())
    crossed = score_columns(scored, Calibration(3.0, 0.0), torch.tensor([0.5, 0.25]))
    assert crossed["score"] == pytest.approx((3 * logits).sigmoid().numpy())
    assert crossed["score_crossed"] == pytest.approx(torch.tensor([0.5, 0.25]).sigmoid().numpy())


def world(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with ties, and labels that are drawn with them."""
    draw = np.random.default_rng(seed)
    scores = np.round(draw.beta(0.8, 1.4, count), 3)
    return torch.from_numpy(scores), torch.from_numpy((draw.random(count) < scores).astype(float))


def columns(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    return {"score": scores.numpy(), "label": labels.numpy()}


def test_intervals_cover_the_truth_in_about_95_of_100_samples():
    truth = pair_figures(*world(200_000, 0), threshold=0.5)
    covered = dict.fromkeys(("average_precision", "f1", "accuracy"), 0)
    for seed in range(1, 151):
        found = intervals(columns(*world(300, seed)), threshold=0.5)
        for name in covered:
            covered[name] += found[f"{name}_low"] <= truth[name] <= found[f"{name}_high"]
    assert min(covered.values()) >= 0.9 * 150
    assert max(covered.values()) < 150


def test_intervals_repeat_and_hold_the_figures_themselves():
    scores, labels = world(500, 1)
    found, figures = intervals(columns(scores, labels), 0.4), pair_figures(scores, labels, 0.4)
    assert found == intervals(columns(scores, labels), 0.4)
    for name in ("average_precision", "f1", "accuracy"):
        assert found[f"{name}_low"] < figures[name] < found[f"{name}_high"]
        assert found[f"{name}_high"] - found[f"{name}_low"] < 0.2
    assert intervals(columns(scores, torch.where(labels > 0, 0.5, 0.4)), 0.4) == found  # from one half on a duplicate
    assert intervals(columns(scores, torch.ones_like(labels)), 0.4) == {}


def test_figures_of_a_resample_are_scikit_learns():
    """And its F1 and accuracy, with ties among the scores and pairs that are drawn several times or not at all."""
    scores, labels = world(60, 3)
    weights = np.random.default_rng(0).integers(0, 4, (5, 60)).astype(float)
    at = scores.median().item()  # a score at the threshold is one of a duplicate
    found = resampled_figures(scores.numpy(), labels.numpy() >= 0.5, at, weights)
    for row, (average_precision, f1, accuracy) in zip(weights, found.T, strict=True):
        assert average_precision == pytest.approx(average_precision_score(labels, scores, sample_weight=row))
        assert f1 == pytest.approx(f1_score(labels, scores >= at, sample_weight=row))
        assert accuracy == pytest.approx(accuracy_score(labels, scores >= at, sample_weight=row))
    none = resampled_figures(np.array([0.9, 0.1]), np.array([True, False]), 0.5, np.array([[0.0, 2.0]]))
    assert np.isnan(none[0, 0])  # where no duplicate is drawn
    assert none[1:, 0].tolist() == [0, 1]


def test_resamples_without_a_duplicate_count_for_no_average_precision():
    scores, labels = torch.linspace(1, 0, 20), torch.tensor([1.0] * 3 + [0.0] * 17)
    found = intervals(columns(scores.double(), labels), 0.5)
    assert (found["average_precision_low"], found["average_precision_high"]) == (1, 1)

"""Metrics of one evaluation: ranking, decisions at a threshold, and calibration.

Names mean the same as in sentence-transformers' `CrossEncoderClassificationEvaluator`: a pair is called a duplicate if
its score is at or above the threshold, equal scores are one group, and thresholds lie midway between groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_stat_scores,
)
from torchmetrics.utilities import dim_zero_cat

from .calibration import Calibration, sigmoid


class Scored(NamedTuple):
    """What an evaluation knows about each pair of a data set, ordered by row; each of shape (pairs,).

    Logits are the model's own, in double precision, in which the sigmoid keeps their order. `swapped` holds the logits
    of the same pairs with their texts swapped, or None.
    """

    rows: Tensor
    labels: Tensor
    logits: Tensor
    swapped: Tensor | None


class PairMetrics(Metric):
    """Collects what `Scored` and the loss are made of, over the batches and ranks of an evaluation.

    Rows, logits, labels and losses have shape (pairs,); row ~n is the pair of row n with its texts swapped. Under DDP,
    torchmetrics gathers what all ranks have collected, once.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("rows", "logits", "labels", "losses"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, rows: Tensor, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        for name, values in {"rows": rows, "logits": logits, "labels": labels, "losses": losses}.items():
            getattr(self, name).append(values)

    def gather(self) -> tuple[Scored, float]:
        """All pairs, and their mean loss."""
        # torchmetrics makes a scalar of a single pair.
        rows, logits, labels, losses = (part.cpu().reshape(-1) for part in self.compute())
        order = rows.argsort()
        swapped = order[rows[order] < 0].flip(0)  # ~0 is the last of them
        plain = order[rows[order] >= 0]
        both = torch.equal(~rows[swapped], rows[plain])  # False if `limit_test_batches` ended the evaluation early
        swapped_logits = logits[swapped].double() if both else None
        scored = Scored(rows[plain], labels[plain].float(), logits[plain].double(), swapped_logits)
        return scored, losses[plain].mean().item()

    def compute(self) -> tuple[Tensor, ...]:
        """What was collected, in the order in which it came; call `gather` instead."""
        return tuple(dim_zero_cat(getattr(self, name)) for name in ("rows", "logits", "labels", "losses"))


Columns = Mapping[str, NDArray[Any]]


def score_columns(scored: Scored, applied: Calibration, crossed: Tensor | None = None) -> dict[str, NDArray[Any]]:
    """Columns of shape (pairs,): `row`, `label`, `score`, `score_raw` (before calibration), `score_crossed` (calibrated
    without using the pair's own label), and, if swapped pairs were scored, `score_swapped`.

    `applied` is the calibration of `score`; `crossed` are the logits of `score_crossed`, None for those of `score`.
    """
    logits = {"score": applied(scored.logits), "score_raw": scored.logits}
    logits["score_crossed"] = logits["score"] if crossed is None else crossed
    if scored.swapped is not None:
        logits["score_swapped"] = applied(scored.swapped)
    columns = {"row": scored.rows.numpy(), "label": scored.labels.numpy()}
    return columns | {name: sigmoid(values.numpy()) for name, values in logits.items()}


def evaluation_figures(columns: Columns, threshold: float | None = None) -> dict[str, float]:
    """Figures from the columns of `score_columns`: those of `pair_figures`, of calibration, and of swapped texts.

    `brier` (mean squared difference between score and label, 0 or 1) and `calibration_error` are those of
    `score_crossed`; with `_raw`, those of `score_raw`. `calibration_error_chance` is the error to expect by chance. If
    the scores are not calibrated, the names without a suffix, too, are those of `score_raw`, and `_if_calibrated` those
    of `score_crossed`, if that differs. `swap_gap_mean` and `swap_gap_p99` are the mean and the 99th percentile of the
    difference between a pair's scores in both orders; `swap_flips` is the number of pairs whose decision at the
    threshold depends on the order.

    `threshold` comes from other data; None takes the one with the best F1 here.
    """
    scores, labels = torch.from_numpy(columns["score"]), torch.from_numpy(columns["label"])
    figures = pair_figures(scores, labels, threshold)
    suffixes = {"": "score_crossed", "_raw": "score_raw"}
    if not is_calibrated(columns) and not np.array_equal(columns["score_crossed"], columns["score_raw"]):
        suffixes = {"": "score_raw", "_raw": "score_raw", "_if_calibrated": "score_crossed"}
    for suffix, column in suffixes.items():
        figures[f"brier{suffix}"] = float(((columns[column] - (columns["label"] >= 0.5)) ** 2).mean())
        figures[f"calibration_error{suffix}"] = calibration_error(torch.from_numpy(columns[column]), labels)
    figures["calibration_error_chance"] = chance_calibration_error(columns["score"])
    if "score_swapped" in columns:
        gaps, at = np.abs(columns["score"] - columns["score_swapped"]), figures["threshold"]
        figures["swap_gap_mean"] = float(gaps.mean())
        figures["swap_gap_p99"] = float(np.quantile(gaps, 0.99))
        figures["swap_flips"] = float(((columns["score"] >= at) != (columns["score_swapped"] >= at)).sum())
    return figures


def is_calibrated(columns: Columns) -> bool:
    """Whether a calibration goes into the scores of these columns."""
    return not np.array_equal(columns["score"], columns["score_raw"])


BINS = 10


def bin_numbers(scores: NDArray[Any]) -> NDArray[np.int64]:
    """The bin of each score, shape (pairs,): `BINS` bins of equal width, the last including its upper end."""
    return np.minimum((scores * BINS).astype(np.int64), BINS - 1)


def calibration_error(scores: Tensor, labels: Tensor) -> float:
    """Expected calibration error: how far a bin's mean score is from its share of duplicates, averaged over all pairs.

    Ten bins of equal width, as in Naeini et al. (2015).
    """
    # A score of exactly 1 would get a bin of its own.
    below = torch.nextafter(torch.ones((), dtype=scores.dtype), torch.zeros((), dtype=scores.dtype))
    return binary_calibration_error(scores.clamp(max=below), (labels >= 0.5).long(), n_bins=BINS, norm="l1").item()


def chance_calibration_error(scores: NDArray[Any]) -> float:
    """The mean `calibration_error` that chance causes if the scores are true probabilities.

    The sum of a bin's labels is then almost normally distributed around the sum of its scores p, with variance
    sum(p (1 - p)), and the mean absolute deviation of a normal distribution is sqrt(2 / pi) standard deviations.
    """
    variances = np.bincount(bin_numbers(scores), weights=scores * (1 - scores))
    return float(np.sqrt(2 / np.pi * variances).sum() / len(scores))


RESAMPLES = 1_000


def intervals(columns: Columns, threshold: float) -> dict[str, float]:
    """95 % bootstrap intervals of average precision, and of F1 and accuracy at a fixed threshold: `f1_low`, `f1_high`.

    Pairs are drawn with replacement, as many as there are (Efron's plain percentile method; seeded). Empty if all
    labels are the same.
    """
    truth = columns["label"] >= 0.5
    if truth.all() or not truth.any():
        return {}
    rng, size = np.random.default_rng(0), 50  # resamples at a time, to save memory
    chances = np.full(len(truth), 1 / len(truth))
    draws = (rng.multinomial(len(truth), chances, size=size).astype(np.float64) for _ in range(RESAMPLES // size))
    found = [resampled_figures(columns["score"], truth, threshold, times) for times in draws]
    ends = np.nanquantile(np.concatenate(found, axis=1), [0.025, 0.975], axis=1)
    names = ("average_precision", "f1", "accuracy")
    return {
        f"{name}_{end}": float(value)
        for end, values in zip(("low", "high"), ends, strict=True)
        for name, value in zip(names, values, strict=True)
    }


def resampled_figures(
    scores: NDArray[np.float64], truth: NDArray[np.bool_], threshold: float, times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision (NaN without a duplicate), F1 and accuracy of each resample, shape (3, resamples).

    `scores` and `truth` have shape (pairs,); `times`, (resamples, pairs), says how often a resample contains a pair.
    """
    order = np.argsort(-scores, kind="stable")
    scores, truth, times = scores[order], truth[order], times[:, order]
    ends = np.flatnonzero(np.diff(scores, append=-np.inf))  # equal scores are one group
    hits, drawn = (np.cumsum(counts, axis=1)[:, ends] for counts in (times * truth, times))
    positives = hits[:, -1]
    precisions = (np.diff(hits, axis=1, prepend=0) * hits / np.maximum(drawn, 1)).sum(1)
    average_precision = np.where(positives > 0, precisions / np.maximum(positives, 1), np.nan)
    called = scores >= threshold
    f1 = 2 * (times @ (called & truth)) / np.maximum(times @ called + positives, 1)
    return np.stack([average_precision, f1, times @ (called == truth) / times.sum(1)])


def pair_figures(scores: Tensor, labels: Tensor, threshold: float | None = None) -> dict[str, float]:
    """Figures of a set of pairs, by name.

    `average_precision` and `roc_auc` (NaN if all labels are the same); `accuracy`, `f1`, `precision` and `recall` at
    `threshold`; the same with `_best` at the set's own best threshold: one for accuracy, and one for F1, which is also
    used for precision and recall; `rows`; `duplicates` (their share).

    Args:
        scores: shape (pairs,), probabilities in fp32 or fp64.
        labels: shape (pairs,), 0 to 1; 0.5 or more is a duplicate.
        threshold: from other data; None takes the one with the best F1 here.
    """
    truth = (labels >= 0.5).long()
    accuracy_threshold, f1_threshold = best_thresholds(scores, truth)
    threshold = f1_threshold if threshold is None else threshold
    both_labels = has_both_labels(truth)
    best = decision_figures(scores, truth, f1_threshold)
    return {
        "average_precision": binary_average_precision(scores, truth).item() if both_labels else math.nan,
        "roc_auc": binary_auroc(scores, truth).item() if both_labels else math.nan,
        **decision_figures(scores, truth, threshold),
        "threshold": threshold,
        "accuracy_best": decision_figures(scores, truth, accuracy_threshold)["accuracy"],
        "accuracy_best_threshold": accuracy_threshold,
        "f1_best": best["f1"],
        "f1_best_threshold": f1_threshold,
        "precision_best": best["precision"],
        "recall_best": best["recall"],
        "rows": float(len(truth)),
        "duplicates": truth.double().mean().item(),
    }


def has_both_labels(truth: Tensor) -> bool:
    """Whether some pairs are duplicates and others are not, as a ranking or a choice of threshold needs."""
    return bool(truth.any()) and not bool(truth.all())


def decision_figures(scores: Tensor, truth: Tensor, threshold: float) -> dict[str, float]:
    """Accuracy, F1, precision and recall of calling every pair a duplicate whose score is at or above the threshold."""
    # In double precision, because the threshold may lie between two adjacent fp32 scores.
    called = (scores.double() >= threshold).long()
    tp, fp, tn, fn, _ = (count.item() for count in binary_stat_scores(called, truth))
    return {
        "accuracy": (tp + tn) / (tp + fp + tn + fn),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "precision": tp / (tp + fp) if tp else 0.0,
        "recall": tp / (tp + fn) if tp else 0.0,
    }


def best_thresholds(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    """The threshold with the best accuracy (just above the highest score if calling no duplicates is best), and the one
    with the best F1 (0 if there are no duplicates).
    """
    values, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    duplicates = torch.zeros_like(counts).scatter_add_(0, group, truth)
    # For each distinct score, the highest first: how many pairs and how many duplicates are at or above it.
    values, called, hits = values.flip(0), counts.flip(0).cumsum(0), duplicates.flip(0).cumsum(0)
    gain = 2 * hits - called  # how many more are decided correctly than if no pair is called a duplicate
    best = int(gain.argmax())
    if gain[best] > 0:
        accuracy_threshold = _midpoint(values, best)
    else:
        accuracy_threshold = torch.nextafter(values[0], torch.full_like(values[0], math.inf)).item()
    f1 = 2 * hits.double() / (called + hits[-1])
    return accuracy_threshold, _midpoint(values, int(f1.argmax())) if hits[-1] else 0.0


def _midpoint(values: Tensor, group: int) -> float:
    """The threshold below a group: midway to the next lower score, or for the lowest group its own score."""
    upper, lower = (float(values[min(index, len(values) - 1)]) for index in (group, group + 1))
    middle = (upper + lower) / 2
    return upper if middle == lower else middle  # between adjacent numbers, rounding makes it one of them

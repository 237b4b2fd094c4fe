"""Metrics of one evaluation: ranking, and decisions at a threshold.

Names mean what they mean in sentence-transformers' `CrossEncoderClassificationEvaluator`: a pair is called a duplicate
if its score is at or above the threshold, equal scores are one group, and thresholds lie midway between groups.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_stat_scores
from torchmetrics.utilities import dim_zero_cat


class PairMetrics(Metric):
    """Collects scores, labels and losses of one data set and computes all figures exactly at its end.

    Scores are probabilities in fp32, labels 0 to 1 (from 0.5 on a duplicate), losses one for each pair; each of shape
    (pairs,). Under DDP the shares of all ranks are gathered once, by torchmetrics.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold: float | None = None
        for name in ("scores", "labels", "losses"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor, losses: Tensor) -> None:
        self.scores.append(scores.float())  # type: ignore[operator,union-attr]
        self.labels.append(labels.float())  # type: ignore[operator,union-attr]
        self.losses.append(losses.float())  # type: ignore[operator,union-attr]

    def compute(self) -> dict[str, float]:
        """All figures, at `self.threshold`, or when that is None at the threshold with the best F1 of this set."""
        figures = pair_figures(dim_zero_cat(self.scores), dim_zero_cat(self.labels), self.threshold)  # type: ignore[arg-type]
        figures["loss"] = dim_zero_cat(self.losses).mean().item()  # type: ignore[arg-type]
        return figures


def pair_figures(scores: Tensor, labels: Tensor, threshold: float | None = None) -> dict[str, float]:
    """Figures of a set of pairs, by name.

    `average_precision` and `roc_auc` (NaN where all labels are the same); `accuracy`, `f1`, `precision` and `recall` at
    `threshold`; the same with `_best` at the set's own best threshold: the one for accuracy, and the one for F1, which
    precision and recall share; `rows`, `duplicates` (their share).

    Args:
        scores: shape (pairs,), probabilities in fp32.
        labels: shape (pairs,), 0 to 1; from 0.5 on a duplicate.
        threshold: from other data; None takes the one with the best F1 here.
    """
    truth = (labels >= 0.5).long()
    best_accuracy, accuracy_threshold = best_accuracy_and_threshold(scores, truth)
    f1_best, f1_threshold = best_f1_and_threshold(scores, truth)
    threshold = f1_threshold if threshold is None else threshold
    ranked = bool(truth.any()) and not bool(truth.all())
    best = decision_figures(scores, truth, f1_threshold)
    return {
        "average_precision": binary_average_precision(scores, truth).item() if ranked else math.nan,
        "roc_auc": binary_auroc(scores, truth).item() if ranked else math.nan,
        **decision_figures(scores, truth, threshold),
        "threshold": threshold,
        "accuracy_best": best_accuracy,
        "accuracy_best_threshold": accuracy_threshold,
        "f1_best": f1_best,
        "f1_best_threshold": f1_threshold,
        "precision_best": best["precision"],
        "recall_best": best["recall"],
        "rows": float(len(truth)),
        "duplicates": truth.double().mean().item(),
    }


def decision_figures(scores: Tensor, truth: Tensor, threshold: float) -> dict[str, float]:
    """Accuracy, F1, precision and recall of calling every pair a duplicate whose score is at or above the threshold."""
    # Compared in double precision: the threshold may lie between two neighbouring fp32 scores.
    called = (scores.double() >= threshold).long()
    tp, fp, tn, fn, _ = (count.item() for count in binary_stat_scores(called, truth))
    return {
        "accuracy": (tp + tn) / (tp + fp + tn + fn),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "precision": tp / (tp + fp) if tp else 0.0,
        "recall": tp / (tp + fn) if tp else 0.0,
    }


def best_accuracy_and_threshold(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    """The best accuracy and its threshold; calling no pair a duplicate is allowed, just above the highest score."""
    values, called, hits = _groups(scores, truth)
    negatives = len(truth) - hits[-1]
    correct = torch.cat([negatives[None], hits + negatives - (called - hits)])
    best = int(correct.argmax())
    accuracy = correct[best].item() / len(truth)
    if best == 0:
        return accuracy, torch.nextafter(scores.max(), torch.tensor(math.inf)).item()
    return accuracy, _midpoint(values, best - 1)


def best_f1_and_threshold(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    """The best F1 and its threshold; (0, 0) when there is no duplicate."""
    values, called, hits = _groups(scores, truth)
    if not hits[-1]:
        return 0.0, 0.0
    f1 = 2 * hits / (called + hits[-1])
    best = int(f1.argmax())
    return f1[best].item(), _midpoint(values, best)


def _groups(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct scores from high to low, and for each how many pairs, and how many duplicates, lie at or above it."""
    values, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    duplicates = torch.zeros_like(counts).scatter_add_(0, group, truth)
    return values.flip(0).double(), counts.flip(0).cumsum(0).double(), duplicates.flip(0).cumsum(0).double()


def _midpoint(values: Tensor, group: int) -> float:
    """The threshold below a group: midway to the next lower one, or the lowest score itself."""
    return values[group : group + 2].mean().item()


FIGURES_FILE = "metrics.json"


def write_figures(folder: Path, checkpoint: str | None, figures: dict[str, float]) -> None:
    """Write `metrics.json`: flat, `val/f1` and the like, and the name of the checkpoint that they belong to.

    Figures of the same checkpoint that stand there already are kept, those of another are dropped; NaN becomes null.
    """
    known = read_figures(folder / checkpoint) if checkpoint else {}
    content: dict[str, Any] = {"checkpoint": checkpoint}
    for name, value in sorted((known | figures).items()):
        content[name] = None if math.isnan(value) else int(value) if name.endswith("/rows") else value
    unfinished = folder / f".{FIGURES_FILE}"
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(folder / FIGURES_FILE)


def read_figures(checkpoint: Path) -> dict[str, float]:
    """The figures in the `metrics.json` beside a checkpoint; none if they belong to another or there is no file."""
    file = checkpoint.parent / FIGURES_FILE
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if content.pop("checkpoint", None) != checkpoint.name:
        return {}
    return {name: math.nan if value is None else float(value) for name, value in content.items()}

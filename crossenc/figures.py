"""Plots of an evaluation and of a run, as matplotlib figures: readable at 600 pixels width, on white in any theme."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torchmetrics.functional.classification import binary_precision_recall_curve

from .metrics import BINS, Columns, bin_numbers, decision_figures, is_calibrated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = {"val": "dev", "test": "test"}
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d1690e", "#666666"


def draw(evaluated: Mapping[str, Columns], threshold: float | None) -> dict[str, Figure]:
    """The plots of an evaluation by name; empty if all pairs have the same label.

    Args:
        evaluated: for `val`, `test` or both, the columns `label`, `score` (calibrated, if the model is), `score_raw`
            (before calibration) and `score_crossed` (calibrated by a fit on other pairs), each of shape (pairs,).
        threshold: the score at or above which a pair is called a duplicate.
    """
    evaluated = {split: columns for split, columns in evaluated.items() if len(set(columns["label"] >= 0.5)) == 2}
    if not evaluated:
        return {}
    last = list(evaluated)[-1]  # the test pairs, if there are any
    return {
        "precision_recall": _precision_recall(evaluated, threshold),
        "reliability": _reliability(evaluated[last], _NAMES[last]),
        "scores": _scores(evaluated[last], _NAMES[last], threshold),
    }


def _precision_recall(evaluated: Mapping[str, Columns], threshold: float | None) -> Figure:
    figure, (axes,) = _figure(1)
    for (split, columns), colour in zip(evaluated.items(), (_BLUE, _ORANGE), strict=False):
        scores, truth = torch.from_numpy(columns["score"]), torch.from_numpy(columns["label"] >= 0.5).long()
        precision, recall, _ = binary_precision_recall_curve(scores, truth)
        axes.plot(recall, precision, color=colour, label=f"{_NAMES[split]}, {len(truth):,} pairs")
        if threshold is not None:
            at = decision_figures(scores, truth, threshold)
            axes.plot(at["recall"], at["precision"], "o", color=colour, markersize=9)
    if threshold is not None:
        axes.plot([], [], "o", color=_GREY, markersize=9, label=f"at threshold {threshold:.3f}")
    axes.set(xlabel="recall (share of duplicates found)", ylabel="precision (share of calls that are right)")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), title="Precision and recall")
    axes.legend()
    return figure


def _reliability(columns: Columns, name: str) -> Figure:
    figure, (axes,) = _figure(1)
    axes.plot([0, 1], [0, 1], "--", color=_GREY, label="true probabilities")
    series = [("score_crossed", "scores", _BLUE, "o-")]
    if not np.array_equal(columns["score_raw"], columns["score_crossed"]):
        calibrated = is_calibrated(columns)
        series = [
            ("score_raw", "before calibration" if calibrated else "scores", _ORANGE, "s-"),
            ("score_crossed", "calibrated" if calibrated else "if calibrated on the dev pairs", _BLUE, "o-"),
        ]
    for column, label, colour, style in series:
        bins = bin_numbers(columns[column])
        means, shares = (
            np.array([values[bins == number].mean() for number in np.unique(bins)])
            for values in (columns[column], columns["label"] >= 0.5)
        )
        axes.plot(means, shares, style, color=colour, label=label)
    axes.set(xlabel=f"mean score of a bin ({BINS} bins)", ylabel="share of duplicates in it")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title=f"Reliability, {len(columns['label']):,} {name} pairs")
    axes.legend(loc="upper left")
    return figure


def _scores(columns: Columns, name: str, threshold: float | None) -> Figure:
    figure, (axes,) = _figure(1)
    scores, truth = columns["score"], columns["label"] >= 0.5
    for which, label, colour, hatch in ((~truth, "not a duplicate", _ORANGE, "//"), (truth, "duplicate", _BLUE, "")):
        axes.hist(scores[which], 20, range=(0, 1), color=colour, alpha=0.55, label=label, hatch=hatch, ec="white")
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set(xlabel="score (probability of a duplicate)", ylabel="pairs", xlim=(0, 1))
    axes.set(title=f"Scores by label, {len(truth):,} {name} pairs")
    axes.legend()
    return figure


def draw_learning(run: Path) -> Figure | None:
    """Loss and average precision over the steps, from the `metrics*.csv` of all parts of a run; None without a loss."""
    points: dict[str, list[tuple[int, float]]] = {}
    parts = run.glob("metrics*.csv")  # metrics-1.csv, ..., and metrics.csv of the last part
    for file in sorted(parts, key=lambda file: (file.stem == "metrics", len(file.name), file.name)):
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                for name in ("train/loss", "val/loss", "val/average_precision"):
                    if row.get(name):
                        points.setdefault(name, []).append((int(row["step"]) + 1, float(row[name])))
    if "train/loss" not in points:
        return None
    figure, axes = _figure(2 if "val/average_precision" in points else 1)
    panels = {"train/loss": (axes[0], _GREY, "training"), "val/loss": (axes[0], _BLUE, "dev")}
    panels["val/average_precision"] = (axes[-1], _BLUE, "dev")
    for name, (panel, colour, label) in panels.items():
        if name in points:
            steps, values = zip(*sorted(dict(points[name]).items()), strict=True)
            panel.plot(steps, values, "o-" if len(steps) < 20 else "-", markersize=5, color=colour, label=label)
            panel.set(ylabel=name.partition("/")[2].replace("_", " ") + (" (nats)" * ("loss" in name)))
    for panel in axes:
        panel.legend()
    axes[-1].set_xlabel("step")
    axes[-1].locator_params(axis="x", integer=True)
    axes[0].set_title("Learning curves")
    return figure


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches of margin
    figure = Figure(figsize=(6, 3.9 if panels == 1 else 5.5), dpi=200, layout=layout, facecolor="white")
    axes = list(np.atleast_1d(figure.subplots(panels, sharex=True)))
    for panel in axes:
        panel.grid(color="#dddddd")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(pictures: Mapping[str, Figure], folder: Path) -> None:
    """Write each picture to `NAME.png`, 1,200 pixels wide, with a white margin."""
    for name, figure in pictures.items():
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png")

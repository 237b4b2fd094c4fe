"""Make scores mean probabilities: a scale and a shift of the logits, fitted on dev pairs and folded into the head.

Platt scaling: score = sigmoid(scale * logit + shift). A positive scale keeps the order of all pairs, and both go into
the weights and the bias of the head's last layer, so that every reader of an export gives calibrated scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

FOLDS = 10


class Calibration(NamedTuple):
    """What a logit is multiplied by, and what is added then."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits; by default the very same numbers."""
        return logits * self.scale + self.shift


def sigmoid(logits: NDArray[Any]) -> NDArray[Any]:
    """Scores of logits, of any shape and in their precision.

    torch's own gives equal numbers results that differ in the last digit by their place, which would break ties.
    """
    from scipy.special import expit

    scores: NDArray[Any] = expit(logits)
    return scores


def calibrate(logits: Tensor, labels: Tensor, shifted: bool = True) -> tuple[Calibration, Tensor]:
    """Fit a calibration, and say what it gives to pairs that it was not fitted on.

    Args:
        logits: shape (pairs,).
        labels: shape (pairs,), 0 to 1; from 0.5 on a duplicate.
        shifted: whether there may be a shift; without it the scale is a temperature.

    Returns:
        The calibration, and logits of shape (pairs,) by cross-fitting: each tenth of the pairs, drawn at random, is
        calibrated by what the other nine give. Where that has no lower cross-entropy than the logits as they are (too
        few pairs, scores without order, or nothing to mend), it is the calibration that changes nothing; and so where
        the scale is no factor from 0.01 to 100: it would be of logits that hardly differ, and of their rounding.
    """
    logits, truth = logits.double(), (labels >= 0.5).double()
    draw = torch.Generator().manual_seed(0)
    fold = torch.randperm(len(logits), generator=draw) % FOLDS
    crossed = logits.clone()
    for number in range(min(FOLDS, len(logits))):
        own = fold == number
        crossed[own] = _fit(logits[~own], truth[~own], shifted)(logits[own])
    before, after = (binary_cross_entropy_with_logits(some, truth) for some in (logits, crossed))
    fitted = _fit(logits, truth, shifted)
    return (fitted, crossed) if after < before and 0.01 < fitted.scale < 100 else (Calibration(), logits)


def _fit(logits: Tensor, truth: Tensor, shifted: bool) -> Calibration:
    """The scale and the shift with the lowest cross-entropy.

    Labels are drawn a little towards 1/2, as Platt (1999) does, so that pairs which can be told apart without error
    do not ask for an infinite scale.
    """
    from scipy.optimize import minimize

    positives = truth.sum()
    negatives = len(truth) - positives
    if not positives or not negatives:
        return Calibration()
    wanted = torch.where(truth > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2)).numpy()
    given = logits.numpy()

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Cross-entropy and its gradient at the logarithm of a scale, which keeps it positive, and a shift."""
        scaled = given * np.exp(x[0])
        values = scaled + x[1]
        slope = sigmoid(values) - wanted
        gradient = np.array([(slope * scaled).mean(), slope.mean() * shifted])
        return float((np.logaddexp(0, values) - wanted * values).mean()), gradient

    log_scale, shift = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x
    return Calibration(float(np.exp(log_scale)), float(shift))


def last_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that gives the logit: the last linear one with a single output; None where there is none."""
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1]
    return found[-1] if found else None


def fold(model: nn.Module, calibration: Calibration) -> None:
    """Change the head's last layer so that the model gives calibrated logits."""
    layer = last_layer(model)
    if calibration == Calibration() or layer is None:
        return
    with torch.no_grad():
        layer.weight.copy_(layer.weight.double() * calibration.scale)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() * calibration.scale + calibration.shift)

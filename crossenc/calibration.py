"""Turn scores into probabilities: a scale and a shift of the logits, fitted on dev pairs and folded into the head.

Platt scaling: score = sigmoid(scale * logit + shift). A positive scale keeps the order of all pairs. Both go into the
weights and the bias of the head's last layer, so that every reader of an export gives calibrated scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

FOLDS = 10


class Calibration(NamedTuple):
    """A logit is multiplied by the scale, then the shift is added."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits; the default calibration returns the very same numbers."""
        return logits * self.scale + self.shift


def sigmoid(logits: NDArray[Any]) -> NDArray[Any]:
    """Scores of logits, of any shape and in their precision.

    torch's own sigmoid gives equal logits scores whose last digit depends on their position, which would break ties.
    """
    return expit(logits)  # type: ignore[no-any-return]


def calibrate(logits: Tensor, labels: Tensor, shifted: bool = True) -> tuple[Calibration, Tensor]:
    """Fit a calibration, and show what it does to pairs that it was not fitted on.

    Args:
        logits: shape (pairs,).
        labels: shape (pairs,), 0 to 1; 0.5 or more is a duplicate.
        shifted: whether to fit a shift; without it, the scale is a temperature.

    Returns:
        The calibration, and logits of shape (pairs,) by cross-fitting: each tenth of the pairs, drawn at random, is
        calibrated by a fit on the other nine. If this does not lower the cross-entropy (too few pairs, scores without
        order, or nothing to correct), the calibration is the one that changes nothing. The same holds if the scale is
        not between 0.01 and 100: it would be fitted to logits that hardly differ, and to their rounding.
    """
    logits, truth = logits.double(), (labels >= 0.5).double()
    rng = torch.Generator().manual_seed(0)
    fold_of = torch.randperm(len(logits), generator=rng) % FOLDS
    crossed = logits.clone()
    for number in range(FOLDS):
        held_out = fold_of == number
        crossed[held_out] = _fit(logits[~held_out], truth[~held_out], shifted)(logits[held_out])
    before, after = (binary_cross_entropy_with_logits(values, truth) for values in (logits, crossed))
    fitted = _fit(logits, truth, shifted)
    return (fitted, crossed) if after < before and 0.01 < fitted.scale < 100 else (Calibration(), logits)


def _fit(logits: Tensor, truth: Tensor, shifted: bool) -> Calibration:
    """The scale and the shift with the lowest cross-entropy.

    Labels are moved slightly towards 1/2, as in Platt (1999): otherwise the scale would be infinite if the logits
    separate the labels without error.
    """
    from scipy.optimize import minimize

    positives = truth.sum()
    negatives = len(truth) - positives
    if not positives or not negatives:
        return Calibration()
    targets = torch.where(truth > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2)).numpy()
    raw = logits.numpy()

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Cross-entropy and its gradient. `x` is the logarithm of the scale, which keeps it positive, and the shift."""
        scaled = raw * np.exp(x[0])
        calibrated = scaled + x[1]
        residuals = sigmoid(calibrated) - targets
        gradient = np.array([(residuals * scaled).mean(), residuals.mean() * shifted])
        return float((np.logaddexp(0, calibrated) - targets * calibrated).mean()), gradient

    with np.errstate(over="ignore", invalid="ignore"):  # a step of the search may go too far
        log_scale, shift = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x
    return Calibration(float(np.exp(log_scale)), float(shift))


def last_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that computes the logit: the last linear layer with a single output; None if there is none."""
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1]
    return found[-1] if found else None


def fold(model: nn.Module, calibration: Calibration) -> None:
    """Change the weights of the head's last layer so that the model gives calibrated logits."""
    layer = last_layer(model)
    if layer is None:
        return
    with torch.no_grad():
        layer.weight.copy_(layer.weight.double() * calibration.scale)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() * calibration.scale + calibration.shift)

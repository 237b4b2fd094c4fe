"""The logits of a batch of pairs, whatever has the batch: training, evaluation, scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .encode import PairBatch


def pair_logits(model: Any, batch: PairBatch) -> Tensor:
    """Logits of a batch's pairs, shape (pairs,), in fp32 and in the batch's own order.

    Args:
        model: a sequence-classification model of transformers with one label.
        batch: as `PairCollator` makes it, on the model's device.
    """
    # [:, 0] and no squeeze: a piece may be a single pair. fp32: a sigmoid in bf16 makes ties among the scores.
    return torch.cat([model(**piece).logits[:, 0] for piece in batch["pieces"]]).float()

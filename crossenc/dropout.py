"""Dropout with random bits that are cheap to draw on a CPU.

torch draws a 32-bit random number for every element, which takes a sixth of a bf16 training step on a CPU. Here, 64
bits from the same generator are enough for four elements, so that seeds and checkpoints work as usual. On other
devices, torch's own dropout runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept(shape: Size, p: float, dtype: torch.dtype) -> Tensor:
    """A dropout mask on the CPU: 0 with probability `p`, rounded to a multiple of 1 / 65,536, else 1 / (1 - p)."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return (bits.view(shape) >= min(round(p * 65536), 65535) - 32768).to(dtype).mul_(1 / (1 - p))


class CheapDropout(nn.Dropout):
    """`nn.Dropout`, with cheap bits on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        return input * kept(input.shape, self.p, input.dtype)


def use_cheap_dropout(model: PreTrainedModel) -> None:
    """Replace the model's `nn.Dropout` layers."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, CheapDropout(child.p))

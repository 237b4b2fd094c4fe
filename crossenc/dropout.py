"""Dropout that draws its bits cheaply on a CPU.

torch draws one random number of 32 bits for every element, which takes a sixth of a bf16 training step on a CPU. Here a
draw of 64 bits serves four elements, from the same generator, so that seeds and checkpoints mean what they always do.
On other devices torch's own dropout runs. `benchmarks/README.md` has what it brings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept(shape: Size, p: float, dtype: torch.dtype) -> Tensor:
    """Zeros with probability `p`, to 1 in 65,536, else 1 / (1 - p); on the CPU."""
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
    """Exchange the model's `nn.Dropout` layers."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child) is nn.Dropout:
                setattr(part, name, CheapDropout(child.p))

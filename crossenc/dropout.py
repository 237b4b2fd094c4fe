"""Dropout that draws its bits cheaply on a CPU, in the layers and in their attention.

torch draws one random number of 32 bits for every element, which takes a sixth of a bf16 training step on a CPU. Here a
draw of 64 bits serves four elements, from the same generator, so that seeds and checkpoints mean what they always do.
On other devices torch's own dropout runs. `benchmarks/README.md` has what it brings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "crossenc_sdpa"


def kept(shape: Size, p: float, dtype: torch.dtype) -> Tensor:
    """Zeros with probability `p`, to 1 in 65,536, else 1 / (1 - p); on the CPU."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return (bits.view(shape) >= round(p * 65536) - 32768).to(dtype).mul_(1 / (1 - p))


class CheapDropout(nn.Dropout):
    """`nn.Dropout`, with cheap bits on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        return input * kept(input.shape, self.p, input.dtype)


def use_cheap_dropout(model: PreTrainedModel) -> None:
    """Exchange the model's `nn.Dropout` layers, and its attention if that is transformers' `sdpa`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child) is nn.Dropout:
                setattr(part, name, CheapDropout(child.p))
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, but with cheap bits where it drops attention on a CPU.

    Query, key and value are (pairs, heads, tokens, width), the mask (pairs, 1, tokens, tokens) or None; returns
    (pairs, tokens, heads, width).
    """
    simple = query.shape == key.shape and not getattr(module, "is_causal", False) and rest.get("position_bias") is None
    if not (dropout and simple and query.device.type == "cpu"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1).to(value.dtype)
    return ((shares * kept(shares.shape, dropout, shares.dtype)) @ value).transpose(1, 2).contiguous(), None

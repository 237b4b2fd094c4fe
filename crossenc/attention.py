"""Attention over packed pairs: the tokens of all pairs are in one row without padding, and no pair sees another.

The linear layers of a backbone take nearly all of its time, and compute only text, no padding. Only here are pairs
separated, into pieces of pairs of similar length, padded to their longest pair: many pieces on a CPU, few on a GPU.
CUDA graphs use a kernel that knows where each pair begins. Registered through transformers' own interface; without a
`packing`, this is transformers' `sdpa`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .dropout import kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "crossenc_sdpa"


@dataclass(frozen=True)
class Packing:
    """Where the pairs are in their row.

    pieces: (pairs, tokens of the longest) of each piece; the pairs of all pieces follow each other in the row.
    starts: position of each pair's first token in the row, shape (pairs,).
    slots: position of each token among the padded pieces, shape (tokens,); None without padding.
    bounds: `starts` and the end of the row, shape (pairs + 1,), if one kernel attends to all pairs; else None.
    """

    pieces: list[tuple[int, int]]
    starts: Tensor
    slots: Tensor | None
    bounds: Tensor | None = None

    def split(self, values: Tensor, padding: int = 0) -> tuple[Tensor, ...]:
        """Turn (tokens, ...) into (slots, ...) of each piece."""
        sizes = [pairs * longest for pairs, longest in self.pieces]
        if self.slots is not None:
            values = values.new_full((sum(sizes), *values.shape[1:]), padding).index_copy(0, self.slots, values)
        return torch.split(values, sizes)


def use_attention(model: PreTrainedModel) -> None:
    """Give a model this attention, if it would use transformers' `sdpa`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

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
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; with a `packing`, for one row (1, heads, tokens, width) that holds many pairs.

    Returns (1, tokens, heads, width).
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend_packed(query, key, value, packing, dropout, scaling)[None], None


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float = 0.0, scaling: float | None = None
) -> Tensor:
    """Attention of every pair within itself, in the shape of `query`: (tokens, heads, width), or (pairs, heads, width)
    if there are queries only for each pair's first token.

    `key` and `value` are (tokens, heads, width). `scaling` is the factor of their products; None is 1 / sqrt(width).
    """
    first_only = len(query) == len(packing.starts)
    if packing.bounds is not None:
        return _attend_ragged(query, key, value, packing, first_only, dropout, scaling)
    counts = [pairs for pairs, _ in packing.pieces]
    queries = torch.split(query, counts) if first_only else packing.split(query)
    parts = [queries, packing.split(key), packing.split(value)]
    if packing.slots is not None:
        parts.append(packing.split(torch.ones_like(packing.slots, dtype=torch.bool)[:, None, None]))
    contexts = []
    for pairs, piece in zip(counts, zip(*parts, strict=True), strict=True):
        q, k, v, *mask = (part.unflatten(0, (pairs, -1)).transpose(1, 2) for part in piece)
        context = _attend_piece(q, k, v, mask[0].mT if mask else None, dropout, scaling)
        contexts.append(context.transpose(1, 2).flatten(0, 1))
    context = torch.cat(contexts)
    return context if first_only or packing.slots is None else context.index_select(0, packing.slots)


def _attend_ragged(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, first_only: bool, dropout: float, scaling: float | None
) -> Tensor:
    """All pairs at once: for jagged tensors, torch has kernels that take sequences of any length (flash attention in
    16 bits), so nothing has to be copied."""
    pairs = (packing.bounds, max(longest for _, longest in packing.pieces))
    query_pairs = (torch.arange(len(query) + 1, device=query.device), 1) if first_only else pairs
    q, k, v = (
        # Without the shortest and the longest length, torch would wait for the GPU to compute them.
        _jagged()(part, bounds, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
        for part, (bounds, longest) in zip((query, key, value), (query_pairs, pairs, pairs), strict=True)
    )
    context: Tensor = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2).values()
    return context


@cache
def _jagged() -> Callable[..., Tensor]:
    """torch's function for jagged tensors; its first call, made here, logs a warning meant for torch's own code."""
    make: Callable[..., Tensor] = torch.nested.nested_tensor_from_jagged
    log = logging.getLogger("torch.fx._symbolic_trace")
    level = log.level
    log.setLevel(logging.ERROR)
    make(torch.zeros(1, 1), torch.tensor([0, 1]))
    log.setLevel(level)
    return make


def _attend_piece(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Plain attention; each tensor is (pairs, heads, tokens, width)."""
    if query.device.type != "cpu" or not (dropout or torch.is_grad_enabled()):
        return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    # In fp32: these products are a fiftieth of the work, and torch prepares bf16 products anew for every shape. torch's
    # own backward pass in bf16 would make a step a quarter longer.
    dtype = value.dtype
    with torch.autocast("cpu", enabled=False):
        query, key, value = (
            # bf16: contiguous in the same copy, or the product would make another.
            part.to(torch.float32, memory_format=torch.contiguous_format)
            for part in (query, key, value)
        )
        scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.mT
        if mask is not None:  # added in place: no copy, and nothing to do in the backward pass
            scores.add_(torch.where(mask, 0.0, torch.finfo(scores.dtype).min))
        weights = scores.softmax(-1)
        if dropout:
            weights = weights * kept(weights.shape, dropout, weights.dtype)
        return (weights @ value).to(dtype)

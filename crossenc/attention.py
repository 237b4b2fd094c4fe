"""Attention over packed pairs: the tokens of all pairs in one row, without padding, and no pair sees another.

The linear layers of a backbone, which take nearly all of its time, compute text and nothing else. Only here are pairs
taken apart, in pieces of pairs of like length: on a CPU many, on a GPU few, padded to their longest pair. CUDA graphs
take a kernel that knows where each pair begins. Registered with transformers' own interface; without a `packing` it
is transformers' `sdpa`.
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
    """Where the pairs lie in their row.

    pieces: (pairs, tokens of the longest) of each piece; the pairs of all pieces follow each other in the row.
    starts: place of each pair's first token in the row, shape (pairs,).
    slots: place of each token among the pieces' places, padding included, shape (tokens,); None without padding.
    bounds: `starts` and the end of the row, shape (pairs + 1,), where all pairs are attended by one kernel; else None.
    """

    pieces: list[tuple[int, int]]
    starts: Tensor
    slots: Tensor | None
    bounds: Tensor | None = None

    def split(self, values: Tensor, padding: int = 0) -> tuple[Tensor, ...]:
        """(tokens, ...) to (places, ...) of each piece."""
        places = [pairs * longest for pairs, longest in self.pieces]
        if self.slots is not None:
            values = values.new_full((sum(places), *values.shape[1:]), padding).index_copy(0, self.slots, values)
        return torch.split(values, places)


def use_attention(model: PreTrainedModel) -> None:
    """Give a model this attention, if it would take transformers' `sdpa`."""
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
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; with a `packing`, of one row (1, heads, tokens, width) that holds many pairs.

    Returns (1, tokens, heads, width).
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend_packed(query, key, value, packing, dropout, scaling)[None], None


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float = 0.0, scaling: float | None = None
) -> Tensor:
    """Attention of every pair within itself, of the shape of `query`: (tokens, heads, width), or (pairs, heads, width)
    where only each pair's first token is asked for.

    `key` and `value` are (tokens, heads, width). `scaling` is of the products; None is 1 / sqrt(width).
    """
    firsts = len(query) == len(packing.starts) != len(key)
    if packing.bounds is not None:
        return _attend_ragged(query, key, value, packing, firsts, dropout, scaling)
    pairs = [pairs for pairs, _ in packing.pieces]
    parts = [torch.split(query, pairs) if firsts else packing.split(query), packing.split(key), packing.split(value)]
    if packing.slots is not None:
        parts.append(packing.split(torch.ones_like(packing.slots, dtype=torch.bool)[:, None, None]))
    found = []
    for number, piece in zip(pairs, zip(*parts, strict=True), strict=True):
        q, k, v, *rest = (part.unflatten(0, (number, -1)).transpose(1, 2) for part in piece)
        context = _attend_piece(q, k, v, rest[0].mT if rest else None, dropout, scaling)
        found.append(context.transpose(1, 2).flatten(0, 1))
    context = torch.cat(found)
    return context if firsts or packing.slots is None else context.index_select(0, packing.slots)


def _attend_ragged(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, firsts: bool, dropout: float, scaling: float | None
) -> Tensor:
    """All pairs at once: torch takes jagged tensors to the kernels for sequences of any length (flash attention's in
    16 bits), which nothing has to be copied for."""
    pairs = (packing.bounds, max(longest for _, longest in packing.pieces))
    of_queries = (torch.arange(len(query) + 1, device=query.device), 1) if firsts else pairs
    q, k, v = (
        # With its shortest and longest pair given, nobody waits for the GPU to tell them.
        _jagged()(part, bounds, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
        for part, (bounds, longest) in zip((query, key, value), (of_queries, pairs, pairs), strict=True)
    )
    context: Tensor = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2).values()
    return context


@cache
def _jagged() -> Callable[..., Tensor]:
    """torch's maker of jagged tensors, whose first call logs a warning that is meant for torch's own code."""
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
    """Plain attention, each tensor (pairs, heads, tokens, width)."""
    if query.device.type != "cpu" or not (dropout or torch.is_grad_enabled()):
        return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    # In fp32: a fiftieth of the work, and products in bf16 are prepared anew for every shape. torch's own backward pass
    # in bf16 takes a quarter of a step more.
    with torch.autocast("cpu", enabled=False):
        scores = (query.float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.float().mT
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        shares = scores.softmax(-1)
        if dropout:
            shares = shares * kept(shares.shape, dropout, shares.dtype)
        return (shares @ value.float()).to(value.dtype)

"""The logits of a batch of pairs, for training, evaluation and scoring.

BERT, RoBERTa, DistilBERT and models built like them take all pairs in one row without padding, and compute their last
layer only for the first token of each pair, because the head reads no other: the same logits and gradients from fewer
operations. Other backbones, and those whose attention or layers were replaced, take padded pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import ATTENTION, Packing, attend_packed
from .encode import GPU_PIECE_COST, PairBatch
from .sampler import cut

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what a tokenizer gives


def pair_logits(model: Any, batch: PairBatch) -> Tensor:
    """Logits of a batch's pairs, shape (pairs,), in fp32 and in the order of the batch.

    Args:
        model: a sequence classification model of transformers with one label, or peft's wrapper of one.
        batch: as `PairCollator` makes it, or a tokenizer's own padded output, on the model's device.
    """
    inner = base_model(model)
    if "pieces" not in batch:
        logits: Tensor = model(**{name: values for name, values in batch.items() if name in _INPUTS}).logits
    elif not can_pack(inner):
        logits = torch.cat([model(**inputs).logits for inputs in padded(batch)])
    elif (
        batch["input_ids"].device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which cannot trace threads
        and type(_layers(inner)[-1]).__name__ in _LAST_LAYERS  # devices that shard them compute equally many parts
    ):
        logits = _threaded_logits(inner, batch)
    else:
        logits = packed_logits(inner, batch)
    # [:, 0] instead of squeeze: a batch may be a single pair. fp32: a sigmoid in bf16 gives many scores the same value.
    return logits[:, 0].to(torch.float32, copy=True)  # a copy, because sharded weights warn of a view


def base_model(model: Any) -> Any:
    """The model of transformers itself, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def can_pack(model: Any) -> bool:
    """Whether this model of transformers can take the pairs of a batch in one row."""
    attention = getattr(model.config, "_attn_implementation", None)
    causal = getattr(model.config, "is_decoder", False)  # a token sees only those before it
    return model.config.model_type in _HEADS and attention == ATTENTION and not causal


def _layers(model: Any) -> Any:
    base = model.base_model
    return (base.encoder if hasattr(base, "encoder") else base.transformer).layer


def _threaded_logits(model: Any, batch: PairBatch) -> Tensor:
    """`packed_logits`, with parts of the batch for each core, so that no core waits for another within an operation.

    Parts of a thousand tokens stay in a core's cache, and equally many parts of similar size for each core leave none
    idle at the end. Together, this is a fifth faster than both cores on the whole batch.
    """
    threads = torch.get_num_threads()
    parts = _parts(batch, threads * math.ceil(len(batch["input_ids"]) / (1_024 * threads)))
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu")

    def compute(part: PairBatch) -> Tensor:  # a new thread does not inherit these modes
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            return packed_logits(model, part)

    if threads == 1 or len(parts) == 1:
        return torch.cat([compute(part) for part in parts])
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(compute, parts)))
    finally:
        torch.set_num_threads(threads)


def _parts(batch: PairBatch, count: int) -> list[PairBatch]:
    """The batch in `count` parts with similarly many tokens, or in one part for each pair if it has fewer pairs."""
    starts, tokens = batch["starts"].numpy(), len(batch["input_ids"])
    lengths, parts = np.diff(starts, append=tokens), []
    for pairs in cut(np.arange(len(starts)), lengths, min(count, len(starts))):
        first, last = starts[pairs[0]], starts[pairs[-1]] + lengths[pairs[-1]]
        pieces = [(len(list(same)), int(length)) for length, same in groupby(lengths[pairs])]
        part = PairBatch(pieces=pieces, starts=batch["starts"][pairs[0] : pairs[-1] + 1] - first)
        for name in ("input_ids", "position_ids", "token_type_ids"):
            if name in batch:
                part[name] = batch[name][first:last]
        parts.append(part)
    return parts


def _exact(batch: PairBatch) -> bool:
    """Whether all pairs of each piece have the same length, so that there is no padding."""
    return sum(pairs * longest for pairs, longest in batch["pieces"]) == len(batch["input_ids"])


def padded(batch: PairBatch) -> Iterator[dict[str, Tensor]]:
    """The inputs of a model of transformers, piece by piece, each tensor of shape (pairs, tokens)."""
    packing = Packing(batch["pieces"], batch["starts"], batch["slots"])
    inputs = {"attention_mask": packing.split(torch.ones_like(batch["input_ids"]))}
    for name, padding in batch["padding"].items():
        inputs[name] = packing.split(batch[name], padding)  # type: ignore[literal-required]
    for (pairs, _), *piece in zip(packing.pieces, *inputs.values(), strict=True):
        yield {name: part.view(pairs, -1) for name, part in zip(inputs, piece, strict=True)}


def packed_logits(model: Any, batch: PairBatch, ragged: bool = False) -> Tensor:
    """Logits of shape (pairs, 1) of a model that `can_pack`, in the precision that it computes in.

    With `ragged`, one kernel attends to all pairs: the least time on a GPU, but the most in Python. For CUDA graphs.
    """
    base = model.base_model
    bounds = slots = None
    if ragged:
        bounds = torch.cat([batch["starts"], batch["starts"].new_full((1,), len(batch["input_ids"]))])
    elif not _exact(batch):
        slots = batch["slots"]
    packing = Packing(batch["pieces"], batch["starts"], slots, bounds)
    positions = batch["position_ids"]
    if hasattr(base.embeddings, "create_position_ids_from_input_ids"):
        positions = _roberta_positions(batch["input_ids"], positions, base.embeddings.padding_idx)
    inputs = {"input_ids": batch["input_ids"], "position_ids": positions}
    if "token_type_ids" in batch:
        inputs["token_type_ids"] = batch["token_type_ids"]
    hidden = base.embeddings(**{name: values[None] for name, values in inputs.items()})
    *layers, last = _layers(model)
    for layer in layers:
        hidden = layer(hidden, packing=packing)
    layer_type = type(last).__name__
    if layer_type in _LAST_LAYERS:
        first = _LAST_LAYERS[layer_type](last, hidden[0], packing)
    else:  # wrapped, for example to be sharded: only a call of the layer itself gathers its weights
        first = last(hidden, packing=packing)[0, packing.starts]
    return _HEADS[model.config.model_type](model, first)


def _roberta_positions(ids: Tensor, positions: Tensor, padding: int) -> Tensor:
    """RoBERTa's position ids, from the position of each token in its pair; each of shape (tokens,).

    RoBERTa counts from `padding` + 1, and does not count padding tokens, even if a text itself spells one ("<pad>").
    """
    counted = ids != padding
    before = counted.cumsum(0) - counted.long()  # counted tokens before each token in the row, over all pairs
    first = torch.arange(len(ids), device=ids.device) - positions  # where the pair of each token begins
    return padding + (before - before[first] + 1) * counted


def _attend_first(attn: Any, query: Any, key: Any, value: Any, packing: Packing) -> Tensor:
    """Attention of each pair's first token, (pairs, width), as `query` is; `key` and `value` are (tokens, width)."""
    query, key, value = (part.unflatten(-1, (-1, attn.attention_head_size)) for part in (query, key, value))
    return attend_packed(query, key, value, packing, attn.dropout.p if attn.training else 0.0, attn.scaling).flatten(1)


def _last_bert_layer(layer: Any, hidden: Tensor, packing: Packing) -> Tensor:
    """The layer's output for each pair's first token: (tokens, width) to (pairs, width)."""
    attn, first = layer.attention.self, hidden[packing.starts]
    context = _attend_first(attn, attn.query(first), attn.key(hidden), attn.value(hidden), packing)
    attended = layer.attention.output(context, first)
    output: Tensor = layer.output(layer.intermediate(attended), attended)
    return output


def _last_distilbert_layer(layer: Any, hidden: Tensor, packing: Packing) -> Tensor:
    attn, first = layer.attention, hidden[packing.starts]
    context = _attend_first(attn, attn.q_lin(first), attn.k_lin(hidden), attn.v_lin(hidden), packing)
    attended = layer.sa_layer_norm(attn.out_lin(context) + first)
    output: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return output


_LAST_LAYERS = dict.fromkeys(("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer"), _last_bert_layer)
_LAST_LAYERS["TransformerBlock"] = _last_distilbert_layer
_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda model, first: model.classifier(model.dropout(model.bert.pooler(first[:, None]))),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), lambda model, first: model.classifier(first[:, None])),
    "distilbert": lambda model, first: model.classifier(model.dropout(model.pre_classifier(first).relu())),
}


def piece_cost(model_type: str, device: str, training: bool = False) -> int:
    """The cost of one more piece in a batch: how many tokens could be computed in the same time.

    Measured on a CPU: if only the attention is computed in pieces, 16 in a training step and next to nothing otherwise;
    if the whole backbone is, 75. A GPU launches operations one by one, so padding is cheaper there.
    """
    if device != "cpu":
        return GPU_PIECE_COST
    return 75 if model_type not in _HEADS else 16 if training else 0

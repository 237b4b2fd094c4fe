"""The logits of a batch of pairs, whatever has the batch: training, evaluation, scoring.

BERT, RoBERTa and DistilBERT, and what is built like them, take all pairs in one row without padding, and compute their
last layer for the first token of each pair only, which is all that the head reads: the same logits and gradients for
fewer operations. Other backbones, and those whose attention or layers were exchanged, take padded pieces.
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
from .encode import PairBatch
from .sampler import cut


def pair_logits(model: Any, batch: PairBatch) -> Tensor:
    """Logits of a batch's pairs, shape (pairs,), in fp32 and in the batch's own order.

    Args:
        model: a sequence-classification model of transformers with one label; peft's wrapper of one.
        batch: as `PairCollator` makes it, on the model's device.
    """
    inner = base_model(model)
    if not can_pack(inner):
        logits = torch.cat([model(**inputs).logits for inputs in padded(batch)])
    elif (
        batch["input_ids"].device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which traces no threads
        and _exact(batch)
    ):
        logits = _by_threads(inner, batch)
    else:
        logits = packed_logits(inner, batch)
    # [:, 0] and no squeeze: a batch may be a single pair. fp32: a sigmoid in bf16 makes ties among the scores.
    return logits[:, 0].to(torch.float32, copy=True)  # no view, of which sharded weights warn


def base_model(model: Any) -> Any:
    """The model of transformers, where it is in peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def can_pack(model: Any) -> bool:
    """Whether the pairs of a batch can stand in one row for this model of transformers."""
    attention = getattr(model.config, "_attn_implementation", None)
    return model.config.model_type in _HEADS and attention == ATTENTION


def _by_threads(model: Any, batch: PairBatch) -> Tensor:
    """Parts of the batch for each core, which then waits for no other within an operation.

    Parts of a thousand tokens stay in a core's cache, and equally many of like size for each leave none idle at the
    end. Together this is a fifth faster than both cores on the whole.
    """
    threads = torch.get_num_threads()
    parts = _parts(batch, threads * math.ceil(len(batch["input_ids"]) / (1_024 * threads)))
    mode, mixed = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    kind = torch.get_autocast_dtype("cpu")

    def compute(part: PairBatch) -> Tensor:  # the modes belong to a thread
        with torch.inference_mode(mode), torch.no_grad(), torch.autocast("cpu", kind, enabled=mixed):
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
    """The batch in so many parts of like many tokens, or in as many as it has pairs."""
    starts, tokens = batch["starts"].numpy(), len(batch["input_ids"])
    lengths, parts = np.diff(starts, append=tokens), []
    for pairs in cut(np.arange(len(starts)), lengths, min(count, len(starts))):
        first, last = starts[pairs[0]], starts[pairs[-1]] + lengths[pairs[-1]]
        pieces = [(len(list(alike)), int(length)) for length, alike in groupby(lengths[pairs])]
        part = PairBatch(pieces=pieces, starts=batch["starts"][pairs[0] : pairs[-1] + 1] - first)
        for name in ("input_ids", "position_ids", "token_type_ids"):
            if name in batch:
                part[name] = batch[name][first:last]
        parts.append(part)
    return parts


def _exact(batch: PairBatch) -> bool:
    """Whether the pieces hold pairs of one length each, and so no padding."""
    return sum(pairs * longest for pairs, longest in batch["pieces"]) == len(batch["input_ids"])


def padded(batch: PairBatch) -> Iterator[dict[str, Tensor]]:
    """What a model of transformers takes, piece by piece, each tensor of shape (pairs, tokens)."""
    packing = Packing(batch["pieces"], batch["starts"], batch["slots"])
    inputs = {"attention_mask": packing.split(torch.ones_like(batch["input_ids"]))}
    for name, padding in batch["padding"].items():
        inputs[name] = packing.split(batch[name], padding)  # type: ignore[literal-required]
    for (pairs, _), *piece in zip(packing.pieces, *inputs.values(), strict=True):
        yield {name: part.view(pairs, -1) for name, part in zip(inputs, piece, strict=True)}


def packed_logits(model: Any, batch: PairBatch, ragged: bool = False) -> Tensor:
    """Logits of shape (pairs, 1) of a model that `can_pack`, in the precision that it computes in.

    With `ragged` one kernel attends all pairs, which takes a GPU the least time and python the most: for graphs.
    """
    base = model.base_model
    bounds = slots = None
    if ragged:
        bounds = torch.cat([batch["starts"], batch["starts"].new_full((1,), len(batch["input_ids"]))])
    elif not _exact(batch):
        slots = batch["slots"]
    packing = Packing(batch["pieces"], batch["starts"], slots, bounds)
    places = batch["position_ids"]
    if hasattr(base.embeddings, "create_position_ids_from_input_ids"):
        places = _places_of_roberta(batch["input_ids"], places, base.embeddings.padding_idx)
    inputs = {"input_ids": batch["input_ids"], "position_ids": places}
    if "token_type_ids" in batch:
        inputs["token_type_ids"] = batch["token_type_ids"]
    hidden = base.embeddings(**{name: values[None] for name, values in inputs.items()})
    *layers, last = (base.encoder if hasattr(base, "encoder") else base.transformer).layer
    for layer in layers:
        hidden = layer(hidden, packing=packing)
    kind = type(last).__name__
    if kind in _LAST_LAYERS:
        first = _LAST_LAYERS[kind](last, hidden[0], packing)
    else:  # wrapped, as sharding does: only its own call brings its weights together
        first = last(hidden, packing=packing)[0, packing.starts]
    return _HEADS[model.config.model_type](model, first)


def _places_of_roberta(ids: Tensor, places: Tensor, padding: int) -> Tensor:
    """RoBERTa's positions of tokens that stand at these places of their pairs, each of shape (tokens,).

    It counts from behind its padding, and what a text itself spells as padding, as "<pad>", is not counted.
    """
    counted = ids != padding
    before = counted.cumsum(0) - counted.long()  # tokens in the row, of all pairs
    first = torch.arange(len(ids), device=ids.device) - places  # of each token's own pair
    return padding + (before - before[first] + 1) * counted


def _attend_first(own: Any, query: Any, key: Any, value: Any, packing: Packing) -> Tensor:
    """What first tokens see of their pairs: (pairs, width), of queries like it and keys and values (tokens, width)."""
    query, key, value = (part.unflatten(-1, (-1, own.attention_head_size)) for part in (query, key, value))
    return attend_packed(query, key, value, packing, own.dropout.p if own.training else 0.0, own.scaling).flatten(1)


def _last_of_bert(layer: Any, hidden: Tensor, packing: Packing) -> Tensor:
    """The layer's output for each pair's first token: (tokens, width) to (pairs, width)."""
    attention, own, first = layer.attention, layer.attention.self, hidden[packing.starts]
    context = _attend_first(own, own.query(first), own.key(hidden), own.value(hidden), packing)
    attended = attention.output(context, first)
    output: Tensor = layer.output(layer.intermediate(attended), attended)
    return output


def _last_of_distilbert(layer: Any, hidden: Tensor, packing: Packing) -> Tensor:
    own, first = layer.attention, hidden[packing.starts]
    context = _attend_first(own, own.q_lin(first), own.k_lin(hidden), own.v_lin(hidden), packing)
    attended = layer.sa_layer_norm(own.out_lin(context) + first)
    output: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return output


_LAST_LAYERS = dict.fromkeys(("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer"), _last_of_bert)
_LAST_LAYERS["TransformerBlock"] = _last_of_distilbert
_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda model, first: model.classifier(model.dropout(model.bert.pooler(first[:, None]))),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), lambda model, first: model.classifier(first[:, None])),
    "distilbert": lambda model, first: model.classifier(model.dropout(model.pre_classifier(first).relu())),
}


def piece_cost(model_type: str, device: str, training: bool = False) -> int:
    """What one more piece of a batch costs, in tokens that could be computed in the same time.

    Measured on a CPU: where only the attention is computed in pieces 16 in a training step, and nothing to speak of
    otherwise; 75 where all of the backbone is. A GPU starts its operations one by one, and prefers padding.
    """
    if device != "cpu":
        return 4_096
    return 75 if model_type not in _HEADS else 16 if training else 0

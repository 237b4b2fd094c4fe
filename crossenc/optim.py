"""What is trained, and at which learning rate: frozen layers, parameter groups, optimizer, schedule."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .errors import BackboneError, UsageError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_first_layers(model: PreTrainedModel, count: int) -> None:
    """Freeze the embeddings and the first `count` layers; 0 freezes nothing. Raises `BackboneError`."""
    if not count:
        return
    depths, total = _depths(model), model.config.num_hidden_layers
    if not 0 < count <= total:
        raise BackboneError(f"model.freeze_layers must be 0 to {total}, the backbone's layers, not {count}")
    for parameter, depth in depths.items():
        if depth > total - count:
            parameter.requires_grad_(False)


def share_segments(model: PreTrainedModel) -> None:
    """Give every segment the first one's embedding, and freeze it."""
    table = getattr(getattr(model.base_model, "embeddings", None), "token_type_embeddings", None)
    if table is not None:
        table.weight.requires_grad_(False).copy_(table.weight[:1].clone().expand_as(table.weight))


def parameter_groups(
    model: PreTrainedModel, weight_decay: float, learning_rate: float, layer_decay: float = 1.0, head_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters of each depth in two groups, the head's first: matrices, which decay, and vectors (biases,
    layer norms), which do not. The Hugging Face Trainer, which the reference recipe uses, does the same.

    With `layer_decay` below 1, the learning rate of each layer is this fraction of that of the layer above it, and the
    last layer's is this fraction of `learning_rate` (layer-wise learning rate decay, as in BEiT, arXiv 2106.08254):
    the most general features change least. The head's learning rate is `head_rate` times `learning_rate`.
    """
    depths = _depths(model) if (layer_decay, head_rate) != (1, 1) else {}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        depth, is_vector = depths.get(parameter, 0), parameter.ndim < 2
        new_group = {
            "params": [],
            "weight_decay": 0.0 if is_vector else weight_decay,
            "lr": learning_rate * (layer_decay**depth if depth else head_rate),
        }
        groups.setdefault((depth, is_vector), new_group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _depths(model: PreTrainedModel) -> dict[nn.Parameter, int]:
    """How far below the head each parameter lies: 1 in the last layer, 2 in the one before it, and so on; the
    embeddings, and what all layers share, such as relative positions, lie one below the first layer.

    What the backbone has after its layers (a pooler, a final norm) is left out: it counts as part of the head.
    """
    total = model.config.num_hidden_layers
    lists = (part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == total)
    stack = list(next(lists, []))  # the layer next to the embeddings first
    if not stack:
        raise BackboneError(
            f"{model.config.model_type} has no separate layers; leave out layer_decay, head_rate and freeze_layers"
        )
    depths: dict[nn.Parameter, int] = {}
    for name, part in model.base_model.named_children():
        depths |= dict.fromkeys(() if name == "pooler" else part.parameters(), total + 1)  # some have it before them
        if any(inner is stack[0] for inner in part.modules()):
            break
    for number, layer in enumerate(reversed(stack), start=1):
        depths |= dict.fromkeys(layer.parameters(), number)
    return depths


def make_optimizer(name: str, groups: list[dict[str, Any]], learning_rate: float, fused: bool = True) -> Optimizer:
    """An optimizer of `torch.optim` by its name, such as `AdamW`, `Adafactor` or `SGD`; raises `UsageError`.

    Fused where torch supports it: one pass over the weights instead of a dozen.
    """
    optimizer_class = getattr(torch.optim, name, None)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise UsageError(f"model.optimizer: torch.optim has no optimizer {name!r}; try AdamW, Adafactor or SGD")
    options: dict[str, Any] = {"lr": learning_rate}
    if fused and "fused" in inspect.signature(optimizer_class).parameters:
        options["fused"] = True
    try:
        return optimizer_class(groups, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"model.optimizer: {name} cannot train these weights: {one_line(error)}") from error


def make_schedule(name: str, optimizer: Optimizer, warmup: float, steps: float) -> LRScheduler:
    """A schedule of `transformers.get_scheduler` by its name, such as `linear`, `cosine` or `constant_with_warmup`.

    Args:
        warmup: a fraction of all steps if below 1, else a number of steps.
        steps: all optimizer steps of the run; infinity if the run has no end.

    Raises:
        UsageError: there is no such schedule, it needs more than the number of steps, or the run has no end.
    """
    from transformers import get_scheduler

    if math.isinf(steps):
        raise UsageError("model.schedule needs the number of steps; set --trainer.max_epochs or --trainer.max_steps")
    # Rounded up, as the Hugging Face Trainer does.
    warmup_steps = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    try:
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=int(steps))
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.schedule {name}: {one_line(error)}") from error
    if not isinstance(scheduler, LambdaLR):
        raise UsageError(f"model.schedule {name} depends on a metric, not on the number of steps; choose another")
    return scheduler

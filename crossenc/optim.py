"""The optimizer's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices, which decay, and vectors (biases, layer norms), which do not.

    So does the Hugging Face Trainer, which the reference recipe runs on.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(name: str, groups: list[dict[str, object]], learning_rate: float, fused: bool = True) -> Optimizer:
    """An optimizer of `torch.optim` by its name, such as `AdamW`, `Adafactor` or `SGD`; raises `UsageError`.

    Fused, where it can be: one pass over the weights in place of a dozen.
    """
    import torch

    kind = getattr(torch.optim, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UsageError(f"model.optimizer: torch.optim has no optimizer {name!r}; try AdamW, Adafactor or SGD")
    make: Any = kind  # every optimizer of torch takes lr, but their base class does not
    if fused and "fused" in inspect.signature(kind).parameters:
        make = partial(make, fused=True)
    optimizer: Optimizer = make(groups, lr=learning_rate)
    return optimizer


def make_schedule(name: str, optimizer: Optimizer, warmup: float, steps: float) -> LRScheduler:
    """A schedule of `transformers.get_scheduler` by its name, such as `linear`, `cosine` or `constant_with_warmup`.

    Args:
        warmup: a share of all steps if under 1, else a number of steps.
        steps: all optimizer steps of the run; infinity if the run has no end.

    Raises:
        UsageError: no such schedule, or a run without end.
    """
    from transformers import SchedulerType, get_scheduler

    names = [kind.value for kind in SchedulerType]
    if name not in names:
        raise UsageError(f"model.schedule: there is no schedule {name!r}; choose one of {', '.join(names)}")
    if steps == float("inf"):
        raise UsageError("a schedule needs the number of steps; set --trainer.max_epochs or --trainer.max_steps")
    # Rounded up, as the Hugging Face Trainer does.
    warmup_steps = -int(-warmup * steps // 1) if warmup < 1 else int(warmup)
    scheduler: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=int(steps)
    )
    return scheduler

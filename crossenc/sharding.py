"""Weights in shards, one on each device, for backbones that do not fit one: `--trainer.strategy fsdp`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def shard(module: nn.Module, device: str, devices: int) -> None:
    """Shard the weights, gradients and optimizer states of a module with a transformer in it, by `fully_shard`.

    Each layer is a unit, gathered while it computes; all that is left is another, gathered while `module` does, whose
    `__call__` must be what computes. Names and shapes stay what they were. All devices, counted over all machines, must
    compute as many batches; a second call changes nothing.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(module, FSDPModule):
        return
    mesh = init_device_mesh(device, (devices,))
    for part in module.modules():
        if isinstance(part, GradientCheckpointingLayer):  # what each layer of transformers' models is
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)

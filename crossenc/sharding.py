"""Weights sharded over all devices, for backbones that do not fit on one: `--trainer.strategy fsdp`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def shard(module: nn.Module, device: str, devices: int) -> None:
    """Shard the weights, gradients and optimizer states of a module that contains a transformer, with `fully_shard`.

    Each layer is a unit, gathered while it computes. The rest is one more unit, gathered while `module` computes, which
    therefore must do so through its `__call__`. Names and shapes stay the same. `devices` are those of all machines,
    and all must compute the same number of batches. A second call changes nothing.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(module, FSDPModule):
        return
    mesh = init_device_mesh(device, (devices,))
    for part in module.modules():
        if isinstance(part, GradientCheckpointingLayer):  # the base class of all layers in transformers
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)

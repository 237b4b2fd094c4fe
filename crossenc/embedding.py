"""Word embeddings whose gradient keeps its memory from step to step on a CPU.

torch allocates this gradient anew in each step, as large as the whole vocabulary (47 MB for MiniLM), and the operating
system hands it over page by page, which takes up to a tenth of a bf16 training step. Here, the gradient of the last
step is overwritten: the same numbers. `benchmarks/README.md` shows what this saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReusingEmbedding(nn.Embedding):
    """`nn.Embedding`, but a training step on a CPU overwrites the gradient that the step before left in `weight.grad`.

    This needs no help of the training loop, as long as it drops old gradients between the forward and the backward
    pass, as Lightning does. In other loops, and where gradients accumulate, torch's own way is taken.
    """

    last_gradient: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            weight.device.type != "cpu"
            or not (self.training and torch.is_grad_enabled() and weight.requires_grad)
            or torch.compiler.is_compiling()  # which cannot trace an assignment to a module
        ):
            return super().forward(input)
        self.last_gradient = weight.grad
        found: Tensor = _Lookup.apply(weight, input, self)  # type: ignore[no-untyped-call]
        return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: ReusingEmbedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.shape = table, weight.shape
        return embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,), table = ctx.saved_tensors, ctx.table
        # Handed over without another reference to it, or torch would copy it.
        found, table.last_gradient = table.last_gradient, None
        if found is None or table.weight.grad is not None:  # it is still in use: gradients accumulate
            found = grad.new_zeros(ctx.shape)
        else:
            found.zero_()
        found.index_add_(0, ids.flatten(), grad.flatten(0, -2))
        if table.padding_idx is not None:
            found[table.padding_idx] = 0
        return found, None, None


def use_reusing_embedding(model: PreTrainedModel) -> None:
    """Replace the model's word embeddings."""
    table = model.get_input_embeddings()
    if type(table) is nn.Embedding and not (table.sparse or table.scale_grad_by_freq or table.max_norm):
        new = ReusingEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        new.weight = table.weight
        model.set_input_embeddings(new.train(table.training))

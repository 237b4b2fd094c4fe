"""Word embeddings whose gradient keeps its memory from step to step of a fit on a CPU.

torch allocates this gradient anew in each step, as large as the whole vocabulary (47 MB for MiniLM), and the operating
system hands it over page by page, which takes about a twenty-fifth of a bf16 training step. Here, the gradient of the
last step is overwritten.
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
    """`nn.Embedding`, and the same but for training steps on a CPU that call `keep_gradient` before `zero_grad`.

    Their gradients are torch's, in fp32 to the bit. A callback that needs one beyond its step has to clone it.
    """

    keeps = False
    last_gradient: Tensor | None = None

    def keep_gradient(self) -> None:
        """Let the next backward pass overwrite `weight.grad`, which is about to be dropped; on a CPU only."""
        if self.weight.device.type == "cpu":
            self.keeps, self.last_gradient = True, self.weight.grad

    def release(self) -> None:
        """Be `nn.Embedding` again."""
        self.keeps, self.last_gradient = False, None

    def forward(self, input: Tensor) -> Tensor:
        # A compiler cannot trace a change of the module.
        if not (self.keeps and self.training) or torch.compiler.is_compiling():
            return super().forward(input)
        found: Tensor = _Lookup.apply(self.weight, input, self)  # type: ignore[no-untyped-call]
        return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: ReusingEmbedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.weight = table, weight
        return embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,), table, weight = ctx.saved_tensors, ctx.table, ctx.weight
        # Handed over without another reference to it, or torch would copy it.
        found, table.last_gradient = table.last_gradient, None
        # A gradient to add to is still in use; one of another shape or type is from before a resize, or a shard.
        if weight.grad is None and type(found) is Tensor and (found.shape, found.dtype) == (weight.shape, grad.dtype):
            found.zero_()
        else:
            found = grad.new_zeros(weight.shape)
        found.index_add_(0, ids.flatten(), grad.reshape(-1, grad.shape[-1]))
        if table.padding_idx is not None:
            found[table.padding_idx] = 0
        return found, None, None


def use_reusing_embedding(model: PreTrainedModel) -> None:
    """Replace the model's word embeddings."""
    table = model.get_input_embeddings()
    if type(table) is nn.Embedding and not (table.sparse or table.scale_grad_by_freq or table.max_norm):
        new = ReusingEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        new.weight = table.weight
        model.set_input_embeddings(new)

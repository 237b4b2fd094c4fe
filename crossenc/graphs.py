"""Training steps as CUDA graphs: the GPU itself launches the hundreds of operations of a small step, which is faster.

A graph has fixed shapes. To need only a few, batches are filled up with short fillers, whose logits are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .encode import PairBatch
from .forward import packed_logits

Shape = tuple[int, int, int]
_MAX_GRAPHS = 24
_MEMORY_DIVISOR = 8  # all graphs together get one part in so many of the GPU's memory


class GraphedModel:
    """`packed_logits` of a model on an NVIDIA GPU, forward and backward, with one graph for each shape of batches.

    The first batch of a shape takes about half a second. There are up to 24 graphs, whose gradients take up to an
    eighth of the memory; batches of further shapes run without a graph. What a batch saves for its backward pass, and
    its gradients, are overwritten by the next batch of its shape, so gradients cannot be accumulated.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A graph keeps its leaf tensors, and these the stream of its capture; the weights must keep their own.
        self.leaves = {f"model.{name}": p.detach().requires_grad_() for name, p in self.weights.items()}
        self.graphs: dict[Shape, Callable[..., Tensor]] = {}
        self.pool: Any = torch.cuda.graph_pool_handle()
        size = sum(p.nbytes for p in self.leaves.values())
        room = torch.cuda.get_device_properties(device).total_memory // _MEMORY_DIVISOR
        self.max_graphs = min(_MAX_GRAPHS, room // max(1, size))

    def __call__(self, batch: PairBatch) -> Tensor:
        """Logits of shape (pairs, 1)."""
        pairs, tokens = len(batch["starts"]), len(batch["input_ids"])
        shape = fixed_shape(pairs, tokens, max(longest for _, longest in batch["pieces"]))
        if shape not in self.graphs and len(self.graphs) >= self.max_graphs:
            return packed_logits(self.model, batch)
        inputs = fill(batch, shape)
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(shape, inputs)
        return self.graphs[shape](*inputs, *self.weights.values())[:pairs]

    def _capture(self, shape: Shape, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        step = Filled(self.model, shape)

        def compute(*tensors: Tensor) -> Any:
            weights = dict(zip(self.leaves, tensors[len(inputs) :], strict=True))
            return functional_call(step, weights, tensors[: len(inputs)])

        # The backward thread starts with a plain operation: if its first one were a matrix product, torch would warn.
        torch.autograd.backward(torch.ones(2, device=self.device, requires_grad=True).square().sum())
        # The warm-up leaves autograd nodes of another stream behind, and torch would warn of them.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # The warm-up takes no random numbers from the run, and no graph may use bf16 weights that another one cached.
        with torch.random.fork_rng([self.device]), torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            graphed: Any = torch.cuda.make_graphed_callables(
                compute, (*inputs, *self.leaves.values()), allow_unused_input=True, pool=self.pool
            )
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(True)
        return graphed  # type: ignore[no-any-return]


class Filled(nn.Module):
    """A model as a function of only the tensors that `fill` makes."""

    def __init__(self, model: Any, shape: Shape) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, input_ids: Tensor, position_ids: Tensor, starts: Tensor, *types: Tensor) -> Tensor:
        """Logits of shape (pairs, 1), including those of fillers."""
        pairs, _, longest = self.shape
        batch = PairBatch(input_ids=input_ids, position_ids=position_ids, starts=starts, pieces=[(pairs, longest)])
        if types:
            batch["token_type_ids"] = types[0]
        return packed_logits(self.model, batch, ragged=True)


def fixed_shape(pairs: int, tokens: int, longest: int) -> Shape:
    """Pairs, tokens and longest pair of the shape that a batch is filled up to: few shapes, at most an eighth larger.

    Small batches are filled up to a multiple of 256 tokens. Each filler gets 1 to 33 tokens.
    """
    token_step = max(256, 2 ** (tokens.bit_length() - 4))
    pair_step = max(8, 2 ** (pairs.bit_length() - 4))
    filled = _round_up(pairs + token_step // 32, pair_step)
    return filled, _round_up(tokens + filled - pairs, token_step), max(128, 2 ** (longest - 1).bit_length())


def fill(batch: PairBatch, shape: Shape) -> tuple[Tensor, ...]:
    """Token ids, positions, starts, and token types if there are any, in a shape: fillers follow the pairs."""
    pairs, tokens = len(batch["starts"]), len(batch["input_ids"])
    fillers, room = shape[0] - pairs, shape[1] - tokens
    numbers = torch.arange(fillers, device=batch["starts"].device)
    starts = torch.cat([batch["starts"], tokens + numbers * room // fillers])
    names = ["input_ids", "position_ids", *["token_type_ids"] * ("token_type_ids" in batch)]
    ids, positions, *types = (nn.functional.pad(batch[name], (0, room)) for name in names)  # type: ignore[literal-required]
    return ids, positions, starts, *types


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

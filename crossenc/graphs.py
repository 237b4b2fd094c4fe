"""Training steps as CUDA graphs: a GPU starts the hundreds of operations of a small step in less time by itself.

A graph has fixed shapes. Batches are filled up to few of them by short fillers behind their pairs, which nobody reads.
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
_MOST = 24  # graphs
_SHARE_OF_MEMORY = 8  # the graphs get one part in so many of what the GPU has


class GraphedModel:
    """`packed_logits` of a model on an NVIDIA GPU, forward and backward, by a graph for each shape of batches.

    The first batch of a shape takes about half a second. There are up to 24 graphs, whose gradients take up to an
    eighth of the memory; batches of further shapes run as they do without. What a batch leaves for its backward pass,
    and its gradients, are overwritten by the next batch of its shape: gradients cannot be accumulated.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A graph keeps its leaves, and they the stream that it was made on; the weights themselves are to keep theirs.
        self.leaves = {f"model.{name}": p.detach().requires_grad_() for name, p in self.weights.items()}
        self.graphs: dict[Shape, Callable[..., Tensor]] = {}
        self.pool: Any = torch.cuda.graph_pool_handle()
        size = sum(p.nbytes for p in self.leaves.values())
        room = torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_MEMORY
        self.most = min(_MOST, room // max(1, size))

    def __call__(self, batch: PairBatch) -> Tensor:
        """Logits of shape (pairs, 1)."""
        pairs, tokens = len(batch["starts"]), len(batch["input_ids"])
        shape = fixed_shape(pairs, tokens, max(longest for _, longest in batch["pieces"]))
        if shape not in self.graphs and len(self.graphs) >= self.most:
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

        # The thread of the backward passes begins with a plain operation: a matrix product warns that it is the first.
        torch.autograd.backward(torch.ones(2, device=self.device, requires_grad=True).square().sum())
        # What warms up leaves nodes of another stream behind, of which torch then warns.
        hush = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda _: None)
        hush(False)
        kind, mixed = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # What warms up takes no random numbers from the run; and no graph may rely on weights in bf16 of another one.
        with torch.random.fork_rng([self.device]), torch.autocast("cuda", kind, enabled=mixed, cache_enabled=False):
            graphed: Any = torch.cuda.make_graphed_callables(
                compute, (*inputs, *self.leaves.values()), allow_unused_input=True, pool=self.pool
            )
        hush(True)
        return graphed  # type: ignore[no-any-return]


class Filled(nn.Module):
    """A model as a function of the tensors that `fill` makes, and of nothing else."""

    def __init__(self, model: Any, shape: Shape) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, input_ids: Tensor, position_ids: Tensor, starts: Tensor, *types: Tensor) -> Tensor:
        """Logits of shape (pairs, 1), those of fillers too."""
        pairs, _, longest = self.shape
        batch = PairBatch(input_ids=input_ids, position_ids=position_ids, starts=starts, pieces=[(pairs, longest)])
        if types:
            batch["token_type_ids"] = types[0]
        return packed_logits(self.model, batch, ragged=True)


def fixed_shape(pairs: int, tokens: int, longest: int) -> Shape:
    """Pairs, tokens and the longest pair of the shape that a batch is filled up to: few shapes, an eighth more at most.

    Small batches are filled up to a multiple of 256 tokens. There is room for fillers of 1 to 33 tokens.
    """
    step = max(256, 2 ** (tokens.bit_length() - 4))
    few = max(8, 2 ** (pairs.bit_length() - 4))
    filled = _round_up(pairs + step // 32, few)
    return filled, _round_up(tokens + filled - pairs, step), max(128, 2 ** (longest - 1).bit_length())


def fill(batch: PairBatch, shape: Shape) -> tuple[Tensor, ...]:
    """Token ids, positions, starts, and token types where there are any, in the shape: fillers behind the pairs."""
    pairs, tokens = len(batch["starts"]), len(batch["input_ids"])
    fillers, room = shape[0] - pairs, shape[1] - tokens
    numbers = torch.arange(fillers, device=batch["starts"].device)
    starts = torch.cat([batch["starts"], tokens + numbers * room // fillers])
    names = ["input_ids", "position_ids", *["token_type_ids"] * ("token_type_ids" in batch)]
    ids, places, *types = (nn.functional.pad(batch[name], (0, room)) for name in names)  # type: ignore[literal-required]
    return ids, places, starts, *types


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

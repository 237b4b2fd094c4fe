"""Embeddings that overwrite their last gradient against torch's."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from crossenc.backbone import load_model
from crossenc.embedding import ReusingEmbedding, use_reusing_embedding

from .conftest import BACKBONE

IDS = torch.tensor([[3, 1, 4, 1], [5, 0, 2, 3]])


@pytest.fixture
def tables() -> tuple[ReusingEmbedding, nn.Embedding]:
    torch.manual_seed(0)
    plain = nn.Embedding(50, 8, padding_idx=0)
    ours = ReusingEmbedding(50, 8, 0)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def step(table: nn.Embedding, ids: Tensor, drop: bool = True) -> None:
    """In Lightning's order: forward pass, old gradients dropped, backward pass."""
    loss = (table(ids) * torch.arange(8.0)).sin().sum()
    if drop:
        table.zero_grad()
    loss.backward()


def assert_same_gradients(ours: nn.Embedding, theirs: nn.Embedding) -> None:
    assert theirs.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=0)


def test_gradients_are_those_of_torch_to_the_bit_and_keep_their_memory(tables: tuple[ReusingEmbedding, nn.Embedding]):
    places = set()
    for ids in (IDS, IDS + 7, IDS.flip(0), IDS[:1]):
        for table in tables:
            step(table, ids)
        assert_same_gradients(*tables)
        places.add(tables[0].weight.grad.data_ptr())
    assert len(places) == 1
    assert tables[0].last_gradient is None


def test_gradients_accumulate(tables: tuple[ReusingEmbedding, nn.Embedding]):
    for table in tables:
        for drop in (True, False, True, False, False):
            step(table, IDS, drop)
    assert_same_gradients(*tables)


def test_two_passes_in_one_step(tables: tuple[ReusingEmbedding, nn.Embedding]):
    for table in tables:
        for _ in range(3):
            loss = table(IDS).sin().sum() + table(IDS + 1).cos().sum()
            table.zero_grad()
            loss.backward()
    assert_same_gradients(*tables)


def test_a_loop_that_drops_gradients_first_and_one_that_never_does(tables: tuple[ReusingEmbedding, nn.Embedding]):
    for table in tables:
        for first in (True, True, False):
            if first:
                table.zero_grad()
            table(IDS).sin().sum().backward()
    assert_same_gradients(*tables)


def test_frozen_or_evaluated_it_is_torchs_own(tables: tuple[ReusingEmbedding, nn.Embedding]):
    ours, plain = tables
    assert torch.equal(ours.eval()(IDS), plain(IDS))
    ours.train().weight.requires_grad_(False)
    assert not ours(IDS).requires_grad


def test_the_model_uses_it_with_its_own_weights():
    model = load_model(BACKBONE)
    table = model.get_input_embeddings()
    assert type(table) is ReusingEmbedding
    assert (table.training, table.padding_idx) == (True, 0)
    assert table is model.bert.embeddings.word_embeddings
    assert any(table.weight is parameter for parameter in model.parameters())
    assert type(deepcopy(model).get_input_embeddings()) is ReusingEmbedding


def test_a_table_with_an_option_that_changes_gradients_stays(tables: tuple[ReusingEmbedding, nn.Embedding]):
    model = load_model(BACKBONE)
    model.set_input_embeddings(nn.Embedding(50, 8, sparse=True))
    use_reusing_embedding(model)
    assert type(model.get_input_embeddings()) is nn.Embedding

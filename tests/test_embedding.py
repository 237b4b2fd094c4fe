"""Embeddings that overwrite their last gradient against torch's."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from crossenc import CrossEncoderModule, PairDataModule
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
        zero_grad(table)
    loss.backward()


def zero_grad(table: nn.Embedding) -> None:
    if isinstance(table, ReusingEmbedding):
        table.keep_gradient()
    table.zero_grad()


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
            zero_grad(table)
            loss.backward()
    assert_same_gradients(*tables)


def test_a_loop_that_drops_gradients_first_and_one_that_never_does(tables: tuple[ReusingEmbedding, nn.Embedding]):
    for table in tables:
        for first in (True, True, False):
            if first:
                zero_grad(table)
            table(IDS).sin().sum().backward()
    assert_same_gradients(*tables)


def test_a_table_that_grew(tables: tuple[ReusingEmbedding, nn.Embedding]):
    for table in tables:
        step(table, IDS)
        step(table, IDS)
        table.weight.data = torch.cat([table.weight.data, torch.ones(2, 8)])  # as transformers does
        step(table, IDS + 45)
    assert_same_gradients(*tables)


def test_frozen_in_evaluation_and_when_released_it_is_torchs_own(tables: tuple[ReusingEmbedding, nn.Embedding]):
    ours, _ = tables
    step(ours, IDS)
    assert type(ours(IDS).grad_fn).__name__ == "_LookupBackward"
    assert type(ours.eval()(IDS).grad_fn).__name__ == "EmbeddingBackward0"
    ours.train().weight.requires_grad_(False)
    assert ours(IDS).grad_fn is None
    ours.weight.requires_grad_(True)
    ours.release()
    assert type(ours(IDS).grad_fn).__name__ == "EmbeddingBackward0"


def test_on_another_device_nothing_is_held():
    table = ReusingEmbedding(50, 8, device="meta")
    table(IDS.to("meta")).sum().backward()
    table.keep_gradient()
    assert table.last_gradient is None
    assert type(table(IDS.to("meta")).grad_fn).__name__ == "EmbeddingBackward0"


def table_of(module: LightningModule) -> ReusingEmbedding:
    (table,) = (part for part in module.modules() if isinstance(part, ReusingEmbedding))
    return table


def test_every_step_of_a_fit_but_the_first_overwrites_the_last_gradient(tmp_path: Path):
    class Places(Callback):
        def __init__(self) -> None:
            self.kept: list[int | None] = []
            self.places: list[int] = []

        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            held = table_of(pl_module).last_gradient
            self.kept.append(None if held is None else held.data_ptr())

        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            grad = table_of(pl_module).weight.grad
            assert grad is not None
            self.places.append(grad.data_ptr())

    places = Places()
    module = CrossEncoderModule(BACKBONE)
    trainer = Trainer(
        accelerator="cpu", max_steps=4, logger=False, callbacks=[places], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, PairDataModule("sample", backbone=BACKBONE, batch_size=4))
    assert places.kept == [None, *places.places[:-1]]
    assert len({*places.places[1:]}) == 1
    assert not table_of(module).keeps


def test_the_model_uses_it_with_its_own_weights():
    model = load_model(BACKBONE)
    table = model.get_input_embeddings()
    assert type(table) is ReusingEmbedding
    assert (table.training, table.padding_idx) == (True, 0)
    assert table is model.bert.embeddings.word_embeddings
    assert any(table.weight is parameter for parameter in model.parameters())
    assert type(deepcopy(model).get_input_embeddings()) is ReusingEmbedding


@pytest.mark.parametrize("option", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_a_table_with_an_option_that_changes_gradients_stays(option: dict[str, Any]):
    model = load_model(BACKBONE)
    model.set_input_embeddings(nn.Embedding(50, 8, **option))
    use_reusing_embedding(model)
    assert type(model.get_input_embeddings()) is nn.Embedding

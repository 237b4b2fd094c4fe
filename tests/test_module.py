"""The module's loss, its dropout and the shape of its output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from crossenc import PairDataModule
from crossenc.errors import BackboneError
from crossenc.module import CrossEncoderModule, disagreement
from crossenc.optim import share_segments

from .conftest import BACKBONE, collate


def test_loss_is_bce_with_weight_and_smoothing():
    module = CrossEncoderModule(BACKBONE, pos_weight=3.0, label_smoothing=0.2)
    logits, labels = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.0, 0.5])
    assert torch.equal(module.eval().loss(logits, labels), nn.BCEWithLogitsLoss(reduction="none")(logits, labels))
    plain = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0), reduction="none")
    smoothed = plain(logits, torch.tensor([0.9, 0.1, 0.5]))
    assert torch.allclose(module.train().loss(logits, labels), smoothed, atol=1e-6)


def test_dropout_is_on_in_training_and_one_pair_makes_one_logit():
    module = CrossEncoderModule(BACKBONE)
    batch = collate([("one text", "another")], BACKBONE)
    assert module.model.training
    assert module(batch).shape == (1,)
    assert not torch.equal(module(batch), module(batch))
    module.eval()
    assert torch.equal(module(batch), module(batch))


def test_first_layers_are_frozen():
    module = CrossEncoderModule(BACKBONE, freeze_layers=2, gradient_checkpointing=True, attn_implementation="eager")
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if "embeddings" in name or ".layer.0." in name or ".layer.1." in name]
    assert any(".layer.2." in name for name in trained)
    assert module.model.config.use_cache is False  # or transformers warns, with this attention
    with pytest.raises(BackboneError, match="cannot freeze 7 layers of a backbone with 6"):
        CrossEncoderModule(BACKBONE, freeze_layers=7)


def test_shared_segments_leave_the_order_of_texts_to_positions():
    module = CrossEncoderModule(BACKBONE, shared_segments=True).eval()
    plain = CrossEncoderModule(BACKBONE).eval()
    table = module.model.bert.embeddings.token_type_embeddings.weight
    assert torch.equal(table, plain.model.bert.embeddings.token_type_embeddings.weight[:1].expand(2, -1))
    assert not table.requires_grad
    plain.model.load_state_dict(module.model.state_dict())
    batch = collate([("one text", "another"), ("a second", "and a third")], BACKBONE)
    others = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    assert torch.equal(plain(batch), plain(others))
    with torch.no_grad():  # RoBERTa and its kind have one segment
        plain.model.bert.embeddings.token_type_embeddings = nn.Embedding(1, 384)
    share_segments(plain.model)


def test_bf16_ends_before_the_loss():
    module = CrossEncoderModule(BACKBONE)
    batch = collate([("one text", "another"), ("a second", "and a third")], BACKBONE)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.model(input_ids=batch["input_ids"][None]).logits.dtype == torch.bfloat16
        logits = module(batch)
        assert logits.dtype == module.predict_step(batch, 0)["score"].dtype == torch.float32
        assert module.loss(logits, batch["label"].float()).dtype == torch.float32


def test_the_consistency_term_is_r_drops():
    one, other = torch.randn(2, 50)
    p, q = (torch.distributions.Bernoulli(logits=some) for some in (one, other))
    kl = torch.distributions.kl_divergence
    assert torch.allclose(disagreement(one, other), (kl(p, q) + kl(q, p)) / 2, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_pair_that_comes_twice_weighs_once(symmetric: bool, pairs_file: Path):
    """Without dropout the loss is the plain one's mean over both orders, and R-Drop's term between them."""
    data = PairDataModule(str(pairs_file), batch_size=60, backbone=BACKBONE, symmetric=symmetric, twice=True)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    module = CrossEncoderModule(BACKBONE, symmetric=symmetric, consistency=3.0).eval()
    logits = dict(zip(batch["row"].tolist(), module(batch), strict=True)) if symmetric else None
    module.log = lambda *_, **__: None
    loss = module.training_step(batch, 0)
    labels = dict(zip(batch["row"].tolist(), batch["label"], strict=True))
    pairs = [row for row in labels if row >= 0]
    assert len(batch["label"]) == 96
    assert len(pairs) == 48
    if symmetric:
        one, other = (torch.stack([logits[way(row)] for row in pairs]) for way in (int, lambda row: ~row))
        truth = torch.stack([labels[row] for row in pairs])
        expected = (module.loss(one, truth) + module.loss(other, truth)) / 2 + 3 * disagreement(one, other)
        assert (one - other).abs().max() > 1e-4
    else:
        expected = module.loss(module(batch), batch["label"])
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)

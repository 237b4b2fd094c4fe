"""The module's loss, its dropout and the shape of its output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crossenc.errors import BackboneError
from crossenc.module import CrossEncoderModule

from .conftest import BACKBONE, collate


def test_loss_is_bce_with_weight_and_smoothing():
    module = CrossEncoderModule(BACKBONE, pos_weight=3.0, label_smoothing=0.2)
    logits, labels = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.0, 0.5])
    plain = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0), reduction="none")
    assert torch.equal(module.eval().loss(logits, labels), plain(logits, labels))
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
    with pytest.raises(BackboneError, match="cannot freeze 7 layers of a backbone with 6"):
        CrossEncoderModule(BACKBONE, freeze_layers=7)


def test_bf16_ends_before_the_loss():
    module = CrossEncoderModule(BACKBONE)
    batch = collate([("one text", "another"), ("a second", "and a third")], BACKBONE)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.model(input_ids=batch["input_ids"][None]).logits.dtype == torch.bfloat16
        logits = module(batch)
        assert logits.dtype == module.predict_step(batch, 0)["score"].dtype == torch.float32
        assert module.loss(logits, batch["label"].float()).dtype == torch.float32

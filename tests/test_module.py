"""The module's loss, its backbone and its optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crossenc.backbone import load_config, load_tokenizer, locate, resolve_max_length
from crossenc.errors import BackboneError, UsageError
from crossenc.module import CrossEncoderModule
from crossenc.optim import make_optimizer, make_schedule, parameter_groups

from .conftest import BACKBONE


def test_loss_is_bce_with_weight_and_smoothing():
    module = CrossEncoderModule(BACKBONE, pos_weight=3.0, label_smoothing=0.2)
    logits, labels = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.0, 0.5])
    plain = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0), reduction="none")
    assert torch.equal(module.eval().loss(logits, labels), plain(logits, labels))
    smoothed = plain(logits, torch.tensor([0.9, 0.1, 0.5]))
    assert torch.allclose(module.train().loss(logits, labels), smoothed, atol=1e-6)


def test_dropout_is_on_in_training_and_one_pair_makes_one_logit():
    module = CrossEncoderModule(BACKBONE)
    inputs = dict(load_tokenizer(BACKBONE)([["one text", "another"]], return_tensors="pt"))
    assert module.model.training
    assert module(inputs).shape == (1,)
    assert not torch.equal(module(inputs), module(inputs))
    module.eval()
    assert torch.equal(module(inputs), module(inputs))


def test_first_layers_are_frozen():
    module = CrossEncoderModule(BACKBONE, freeze_layers=2, gradient_checkpointing=True, attn_implementation="eager")
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if "embeddings" in name or ".layer.0." in name or ".layer.1." in name]
    assert any(".layer.2." in name for name in trained)
    with pytest.raises(BackboneError, match="cannot freeze 7 layers of a backbone with 6"):
        CrossEncoderModule(BACKBONE, freeze_layers=7)


def test_lengths_fit_the_backbone():
    assert resolve_max_length(BACKBONE, None) == 512
    assert resolve_max_length(BACKBONE, 100) == 100
    with pytest.raises(BackboneError, match="5 to 512 tokens"):
        resolve_max_length(BACKBONE, 513)
    assert load_config(BACKBONE).model_type == "bert"
    assert locate("owner/name") == "owner/name"


def test_vectors_do_not_decay():
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), weight_decay=0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_schedule_rises_and_falls():
    optimizer = make_optimizer("AdamW", parameter_groups(nn.Linear(2, 2), 0.0), 1.0)
    schedule = make_schedule("linear", optimizer, warmup=0.1, steps=100)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert (rates[0], rates[5], rates[10], rates[55], rates[100]) == pytest.approx((0, 0.5, 1, 0.5, 0))
    for name, kind in (("Adam W", "torch.optim has no optimizer"), ("Optimizers", "torch.optim has no optimizer")):
        with pytest.raises(UsageError, match=kind):
            make_optimizer(name, [], 1.0)
    with pytest.raises(UsageError, match="there is no schedule"):
        make_schedule("line", optimizer, 0.1, 10)
    with pytest.raises(UsageError, match="max_epochs"):
        make_schedule("linear", optimizer, 0.1, float("inf"))

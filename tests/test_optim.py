"""Parameter groups and schedules."""

from __future__ import annotations

import pytest
from torch import nn

from crossenc import CrossEncoderModule
from crossenc.errors import UsageError
from crossenc.optim import make_optimizer, make_schedule, parameter_groups

from .conftest import BACKBONE


def test_vectors_do_not_decay():
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), 0.1, 1e-3)
    assert {group["lr"] for group in groups} == {1e-3}
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_schedule_rises_and_falls():
    optimizer = make_optimizer("AdamW", parameter_groups(nn.Linear(2, 2), 0.0, 1.0), 1.0)
    schedule = make_schedule("linear", optimizer, warmup=0.1, steps=100)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert (rates[0], rates[5], rates[10], rates[55], rates[100]) == pytest.approx((0, 0.5, 1, 0.5, 0))
    for warmup, steps in ((0.05, 3), (1, 1), (7.0, 7), (0, 0)):  # a share is rounded up, from 1 on it is a number
        schedule = make_schedule("linear", optimizer, warmup, 50)
        rates = []
        for _ in range(10):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert rates.index(max(rates)) == steps
    for name, kind in (("Adam W", "torch.optim has no optimizer"), ("Optimizers", "torch.optim has no optimizer")):
        with pytest.raises(UsageError, match=kind):
            make_optimizer(name, [], 1.0)
    rates_of_their_own = ("warmup_stable_decay", "cosine_with_min_lr", "cosine_warmup_with_min_lr")
    for name in ("line", "reduce_lr_on_plateau", "greedy", *rates_of_their_own):
        with pytest.raises(UsageError, match="there is no schedule"):
            make_schedule(name, optimizer, 0.1, 10)
    with pytest.raises(UsageError, match="max_epochs"):
        make_schedule("linear", optimizer, 0.1, float("inf"))


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["query"]}])
def test_rates_fall_from_the_head_to_the_embeddings(lora: dict | None):
    module = CrossEncoderModule(BACKBONE, lora=lora)
    groups = parameter_groups(module.model, 0.1, 1e-3, layer_decay=0.5, head_rate=3.0)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    names = {name: rates[p] for name, p in module.model.named_parameters() if p.requires_grad}
    assert len(rates) == len(names)
    for part, depth in ((".pooler.", 0), (".embeddings.", 7), (".layer.0.", 6), (".layer.5.", 1), ("classifier.", 0)):
        found = {rate for name, rate in names.items() if part in name}
        assert found == ({1e-3 * (0.5**depth if depth else 3.0)} if found else set())
        assert found or lora
    assert groups[0]["lr"] == 3e-3


def test_the_head_may_learn_at_a_rate_of_its_own():
    module = CrossEncoderModule(BACKBONE)
    groups = parameter_groups(module.model, 0.1, 1e-3, head_rate=3)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    found = {name: rates[p] for name, p in module.model.named_parameters() if p.requires_grad}
    head = {name for name, rate in found.items() if rate == pytest.approx(3e-3)}
    assert {name for name in found if ".encoder." not in name and ".embeddings." not in name} == head
    assert {rate for name, rate in found.items() if name not in head} == {1e-3}


def test_all_layers_may_be_frozen():
    module = CrossEncoderModule(BACKBONE, freeze_layers=6)
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if ".layer." in name or ".embeddings." in name]
    assert "classifier.weight" in trained


def test_adapters_of_frozen_layers_are_frozen_too():
    module = CrossEncoderModule(BACKBONE, lora={"r": 2, "target_modules": ["query"]}, freeze_layers=2)
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if ".layer.0." in name or ".layer.1." in name or ".embeddings." in name]
    assert [name for name in trained if ".layer.2." in name]

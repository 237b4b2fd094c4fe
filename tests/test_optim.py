"""Parameter groups and schedules."""

from __future__ import annotations

import re

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from crossenc import CrossEncoderModule
from crossenc.errors import BackboneError, UsageError
from crossenc.forward import base_model
from crossenc.optim import freeze_first_layers, make_optimizer, make_schedule, parameter_groups

from .conftest import BACKBONE


def test_vectors_do_not_decay():
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), 0.1, 1e-3)
    assert {group["lr"] for group in groups} == {1e-3}
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_an_optimizer_is_fused_where_it_may_and_can_be():
    groups = parameter_groups(nn.Linear(2, 2), 0.0, 1.0)
    assert make_optimizer("AdamW", groups, 1.0).defaults["fused"]
    assert not make_optimizer("AdamW", groups, 1.0, fused=False).defaults["fused"]
    assert "fused" not in make_optimizer("RAdam", groups, 1.0).defaults


def rates(warmup: float, steps: int, total: int) -> list[float]:
    """The learning rates of the first steps, in shares of the highest."""
    optimizer = make_optimizer("AdamW", parameter_groups(nn.Linear(2, 2), 0.0, 1.0), 1.0)
    schedule = make_schedule("linear", optimizer, warmup, total)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedule_rises_and_falls():
    found = rates(0.1, 101, 100)
    assert (found[0], found[5], found[10], found[55], found[100]) == pytest.approx((0, 0.5, 1, 0.5, 0))


@pytest.mark.parametrize(("warmup", "steps"), [(0.05, 3), (1, 1), (7.0, 7), (0, 0)])
def test_a_share_of_warmup_is_rounded_up_and_from_1_on_it_is_a_number(warmup: float, steps: int):
    assert rates(warmup, 10, total=50).index(1) == steps


def test_an_optimizer_or_schedule_that_cannot_be_used_is_named():
    for name in ("Adam W", "lr_scheduler"):
        with pytest.raises(UsageError, match=r"torch\.optim has no optimizer"):
            make_optimizer(name, [], 1.0)
    optimizer = make_optimizer("AdamW", parameter_groups(nn.Linear(2, 2), 0.0, 1.0), 1.0)
    refusals = {"line": "not a valid SchedulerType.*'linear'", "reduce_lr_on_plateau": "a metric", "greedy": "a metric"}
    refusals |= {"warmup_stable_decay": "num_decay_steps", "cosine_with_min_lr": "min_lr"}
    for name, said in refusals.items():
        with pytest.raises(UsageError, match=rf"model\.schedule {name}.*{said}"):
            make_schedule(name, optimizer, 0.1, 10)
    with pytest.raises(UsageError, match="max_epochs"):
        make_schedule("linear", optimizer, 0.1, float("inf"))
    slow = make_optimizer("AdamW", parameter_groups(nn.Linear(2, 2), 0.0, 1e-8), 1e-8)
    with pytest.raises(UsageError, match="must be smaller than initial lr"):
        make_schedule("polynomial", slow, 0.1, 10)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["query"]}])
def test_rates_fall_from_the_head_to_the_embeddings(lora: dict | None):
    module = CrossEncoderModule(BACKBONE, lora=lora)
    groups = parameter_groups(base_model(module.model), 0.1, 1e-3, layer_decay=0.5, head_rate=3.0)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    names = {name: rates[p] for name, p in module.model.named_parameters() if p.requires_grad}
    assert len(rates) == len(names)
    for part, depth in ((".pooler.", 0), (".embeddings.", 7), (".layer.0.", 6), (".layer.5.", 1), ("classifier.", 0)):
        found = {rate for name, rate in names.items() if part in name}
        assert found == ({1e-3 * (0.5**depth if depth else 3.0)} if found else set())
        assert found or lora
    assert groups[0]["lr"] == 3e-3


@pytest.mark.parametrize(
    ("kind", "shared", "head"),
    [
        ("deberta-v2", ["encoder.rel_embeddings", "encoder.LayerNorm", "encoder.conv"], ["pooler", "classifier"]),
        ("electra", ["embeddings_project"], ["classifier"]),
        ("mpnet", ["relative_attention_bias"], ["classifier"]),
        ("modernbert", ["embeddings"], ["final_norm", "head", "classifier"]),
        ("nomic_bert", ["embeddings"], ["pooler", "classifier"]),  # has its pooler before its layers
    ],
)
def test_what_all_layers_share_learns_as_the_embeddings_do(kind: str, shared: list[str], head: list[str]):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {
        "deberta-v2": {"relative_attention": True, "position_biased_input": False, "conv_kernel_size": 3},
        "electra": {"embedding_size": 16},
    }
    config = AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, num_labels=1, **small, **more.get(kind, {}))
    model = AutoModelForSequenceClassification.from_config(config)
    rates = {p: group["lr"] for group in parameter_groups(model, 0, 1, 0.5, 30) for p in group["params"]}
    freeze_first_layers(model, 2)
    for name, parameter in model.named_parameters():
        of_the_head = any(f"{part}." in name for part in head) and ".layers." not in name
        deep = any(part in name for part in shared) and not of_the_head
        of_a_layer = re.search(r"\.layers?\.(\d)\.", name)
        expected = 30 if of_the_head else 0.5 ** (2 - int(of_a_layer[1])) if of_a_layer and not deep else 0.125
        assert rates[parameter] == expected, name
        assert parameter.requires_grad == of_the_head, name


def test_layers_that_cannot_be_told_apart_have_no_rates_of_their_own():
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("albert", **small))
    assert {group["lr"] for group in parameter_groups(model, 0.1, 1)} == {1}
    with pytest.raises(BackboneError, match="albert has no separate layers"):
        parameter_groups(model, 0.1, 1, head_rate=30)
    with pytest.raises(BackboneError, match="albert has no separate layers"):
        freeze_first_layers(model, 1)


def test_adapters_of_frozen_layers_are_frozen_too():
    module = CrossEncoderModule(BACKBONE, lora={"r": 2, "target_modules": ["query"]}, freeze_layers=2)
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if ".layer.0." in name or ".layer.1." in name or ".embeddings." in name]
    assert [name for name in trained if ".layer.2." in name]

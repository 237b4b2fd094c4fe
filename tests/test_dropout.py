"""Cheap dropout against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crossenc.backbone import load_model
from crossenc.dropout import CheapDropout, kept

from .conftest import BACKBONE


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_as_many_are_dropped_as_asked_for_and_the_mean_stays(p: float):
    torch.manual_seed(0)
    mask = kept(torch.Size((1001, 999)), p, torch.float32)
    share = (mask == 0).float().mean().item()
    assert share == pytest.approx(p, abs=4 * (p / mask.numel()) ** 0.5)
    assert mask[mask > 0].unique().tolist() == [pytest.approx(1 / (1 - p))]
    # Four elements come of one draw: neighbours must not know of each other.
    dropped = (mask.flatten() == 0).float()
    for distance in (1, 2, 3, 4):
        together = (dropped[:-distance] * dropped[distance:]).mean().item()
        assert together == pytest.approx(p * p, abs=5 * p / mask.numel() ** 0.5)


def test_of_nearly_all_nearly_all_are_dropped():
    assert (kept(torch.Size((1000,)), 1 - 1e-6, torch.float32) == 0).float().mean() > 0.99


def test_gradients_pass_where_values_do_and_evaluation_drops_nothing():
    torch.manual_seed(0)
    layer, x = CheapDropout(0.4), torch.ones(50, 40, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not CheapDropout(1.0)(x).any()
    assert torch.equal(layer.eval()(x), x)
    torch.manual_seed(0)
    assert torch.equal(CheapDropout(0.4)(x), y)


def test_the_model_uses_it():
    model = load_model(BACKBONE)
    assert {type(part) for part in model.modules() if isinstance(part, nn.Dropout)} == {CheapDropout}

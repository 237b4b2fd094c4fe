"""Calibration: the fit beside scikit-learn's, its laws, and folding it into heads of several kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

from crossenc.calibration import Calibration, calibrate, fold, last_layer
from crossenc.metrics import Scored, calibration_error, evaluation_figures, pair_figures, score_columns


def drawn(count: int, scale: float, shift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose true probability is sigmoid(scale * logit + shift), and labels drawn with it."""
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, generator=draw)
    return logits, (torch.rand(count, generator=draw) < (scale * logits + shift).sigmoid()).float()


def test_scale_and_shift_are_scikit_learns():
    logits, labels = drawn(20_000, 0.4, 0.5)
    found, crossed = calibrate(logits, labels)
    peer = LogisticRegression(C=1e9).fit(logits[:, None].numpy(), labels.numpy())
    assert found == pytest.approx((peer.coef_[0, 0], peer.intercept_[0]), abs=2e-3)
    assert found == pytest.approx((0.4, 0.5), abs=0.05)
    assert calibration_error(crossed.sigmoid(), labels) < 0.012
    assert calibration_error(logits.sigmoid(), labels) > 0.1
    temperature, _ = calibrate(logits, labels, shifted=False)
    assert temperature.shift == 0


def test_a_bias_is_scaled_and_shifted():
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    nn.init.constant_(model[1].bias, 0.7)
    inputs = torch.randn(5, 3)
    expected = 2 * model(inputs) + 0.5
    assert last_layer(model) is model[1]
    fold(model, Calibration(2.0, 0.5))
    assert torch.allclose(model(inputs), expected, atol=1e-6)


def test_no_row_judges_its_own_fit():
    logits, labels = drawn(300, 0.4, 0.5)
    state = torch.get_rng_state()
    _, crossed = calibrate(logits, labels)
    assert torch.equal(torch.get_rng_state(), state)  # a validation leaves a run's random numbers alone
    for row in (0, 7, 299):
        turned = labels.clone()
        turned[row] = 1 - turned[row]
        assert calibrate(logits, turned)[1][row] == crossed[row]
    assert not torch.equal(calibrate(logits, turned)[1], crossed)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.randn(500, generator=torch.Generator().manual_seed(1)), torch.arange(500) % 2),  # no order to keep
        (-drawn(500, 1, 0)[0], drawn(500, 1, 0)[1]),  # the wrong order
        (drawn(2_000, 1, 0)[0][:5], drawn(2_000, 1, 0)[1][:5]),  # too few
        (drawn(2_000, 1, 0)[0] / 1000, drawn(2_000, 1, 0)[1]),  # that hardly differ
        (torch.tensor([0.5, 0.1]), torch.tensor([1.0, 1.0])),  # one label only
        (torch.tensor([0.5]), torch.tensor([0.0])),
    ],
)
def test_what_cannot_be_mended_stays_as_it_is(logits: torch.Tensor, labels: torch.Tensor):
    found, crossed = calibrate(logits, labels)
    assert found == Calibration()
    assert torch.equal(crossed, logits.double())


def test_labels_are_drawn_towards_the_middle_as_platts():
    labels = torch.tensor([1.0] * 20 + [0.0] * 80)
    found, _ = calibrate(2 * labels - 1, labels)
    scores = found(torch.tensor([1.0, -1.0])).sigmoid().tolist()
    assert scores == pytest.approx([21 / 22, 1 / 82], abs=1e-3)
    soft = torch.where(labels > 0, 0.5, 0.4)  # from one half on a duplicate
    assert calibrate(2 * labels - 1, soft)[0] == found


def test_pairs_that_are_told_apart_without_error_ask_for_no_infinite_scale():
    labels = torch.tensor([0.0, 1.0] * 50)
    found, _ = calibrate(labels - 0.5, labels)
    assert 1 < found.scale < 20


@settings(deadline=None, max_examples=100)
@given(
    # Logits a thousandth apart: what a double makes one number of, or a sigmoid of it, is no order to keep.
    st.lists(st.integers(-30_000, 30_000).map(lambda n: n / 1000), min_size=2, max_size=50),
    st.floats(0.01, 50),
    st.floats(-20, 20),
    st.integers(0, 2**31),
)
@example([0.0] * 15 + [-5.461] * 2, 0.03125, -8.44140625, 0)  # where torch's sigmoid parts equal logits
def test_calibration_keeps_the_order_and_every_ranking_metric(
    found: list[float], scale: float, shift: float, seed: int
):
    logits = torch.tensor(found)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, len(found))).float()
    scored = Scored(torch.arange(len(found)), labels, logits.double(), None)
    before, after = (
        evaluation_figures(score_columns(scored, one)) for one in (Calibration(), Calibration(scale, shift))
    )
    assert after["brier_raw"] == before["brier"]
    assert after["calibration_error_raw"] == before["calibration_error"]
    if abs(scale * logits + shift).max() < 15:  # beyond, even a sigmoid in double precision makes ties
        assert after["average_precision"] == pytest.approx(before["average_precision"], nan_ok=True, abs=1e-7)
        assert after["roc_auc"] == pytest.approx(before["roc_auc"], nan_ok=True, abs=1e-7)
        assert after["f1_best"] == pytest.approx(before["f1_best"], abs=1e-9)
        assert after["accuracy_best"] == pytest.approx(before["accuracy_best"], abs=1e-9)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama"])
def test_every_kind_of_head_is_folded_and_keeps_the_order(kind: str):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(kind, **sizes, vocab_size=99, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.randint(1, 99, (500, 12))
    calibration = Calibration(2.3, 0 if last_layer(model).bias is None else -0.7)
    assert (last_layer(model).bias is None) == (kind == "llama")
    with torch.inference_mode():
        before = model(input_ids=ids).logits[:, 0]
    fold(model, calibration)
    with torch.inference_mode():
        after = model(input_ids=ids).logits[:, 0]
    assert torch.allclose(after, before * calibration.scale + calibration.shift, atol=1e-6)
    # The same order, but for logits that fp32 can hardly tell apart.
    apart = before.sort().values.diff() > 1e-6
    order = before.argsort()
    assert (after[order].diff()[apart] > 0).all()
    labels = (torch.arange(500) % 3 == 0).float()
    ranked = [pair_figures(logits.double().sigmoid(), labels)["average_precision"] for logits in (before, after)]
    assert ranked[0] == pytest.approx(ranked[1], abs=1e-6)


def test_a_model_without_such_a_layer_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2))
    weights = model[0].weight.clone()
    fold(model, Calibration(2.0, 1.0))
    assert last_layer(model) is None
    assert torch.equal(model[0].weight, weights)

"""Packed, padded and single pairs: the same logits and the same gradients (fp32, dropout off)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from crossenc.attention import ATTENTION, Packing, attend_packed
from crossenc.backbone import load_model, load_tokenizer, locate
from crossenc.forward import _LAST_LAYERS, _parts, can_pack, packed_logits, pair_logits, piece_cost
from crossenc.pairs import sample_pairs

from .conftest import BACKBONE, collate, edit_json

PAIRS = [(row["text_a"], row["text_b"]) for row in sample_pairs()["train"][:30]]
PAIRS += [("", "?"), ("word " * 100, "another " * 100), ("one text", "another")]


def gradients(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    labels = torch.arange(len(logits), device=logits.device) % 2.0
    nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
    # The pooler's key and the like get none; positions that no pair reaches get zeros either way.
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def in_order(batch, logits: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(logits).index_copy(0, batch["row"], logits)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small model of each family, with weights large enough to tell mistakes."""
    import transformers as t

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    named = {"vocab_size": 30522, "num_labels": 1, "initializer_range": 0.3, "pad_token_id": 0}
    roberta = {**named, "max_position_embeddings": 200, "type_vocab_size": 2, "pad_token_id": 1}  # of its positions
    distil = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
    configs = {
        "bert": t.BertConfig(**sizes, **named),
        "roberta": t.RobertaConfig(**sizes, **roberta),
        "xlm-roberta": t.XLMRobertaConfig(**sizes, **roberta),
        "camembert": t.CamembertConfig(**sizes, **roberta),
        "distilbert": t.DistilBertConfig(**distil, **named),
        "electra": t.ElectraConfig(**sizes, **named, embedding_size=24),  # takes padded pieces
        # So does this one, which reads a pair's last token that is no padding.
        "llama": t.LlamaConfig(**sizes, **{**named, "pad_token_id": 1}, num_key_value_heads=3),
    }
    folders = {"minilm": BACKBONE}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        t.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        names = ["input_ids", "attention_mask", *["token_type_ids"] * (name not in ("distilbert", "llama"))]
        padding = {"pad_token": "[unused0]"} if name == "llama" else {}  # of number 1
        tokenizer = t.AutoTokenizer.from_pretrained(locate(BACKBONE), model_input_names=names, **padding)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.mark.parametrize(
    "family", ["minilm", "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "llama"]
)
def test_any_batch_gives_the_logits_and_gradients_of_the_plain_model(family: str, backbones: dict[str, str]):
    model, plain = (load_model(backbones[family], name).eval() for name in (None, "sdpa"))
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    inputs = load_tokenizer(backbones[family])(
        [list(pair) for pair in PAIRS], padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    expected = plain(**inputs).logits[:, 0]
    expected_gradients = gradients(plain, expected)
    assert expected.std() > 1e-3
    for cost in (0, 20, 10**6):
        batch = collate(PAIRS, backbones[family], cost)
        assert (len(batch["pieces"]) == 1) == (cost == 10**6)
        logits = in_order(batch, pair_logits(model, batch))
        assert torch.allclose(logits, expected, atol=1e-5), cost
        assert torch.allclose(gradients(model, logits), expected_gradients, atol=1e-5), cost
        with torch.no_grad():
            assert torch.allclose(in_order(batch, pair_logits(model, batch)), expected, atol=1e-5), cost
            if can_pack(model):  # padded pieces too, as a GPU's evaluation has them
                packed = packed_logits(model, batch)[:, 0]
                assert torch.allclose(in_order(batch, packed), expected, atol=1e-5), cost
        # With its attention exchanged it is given padded pieces.
        assert torch.allclose(in_order(batch, pair_logits(plain, batch)), expected, atol=1e-5), cost
    single = [pair_logits(model, collate([pair], backbones[family])) for pair in PAIRS[-3:]]
    assert torch.allclose(torch.cat(single), expected[-3:], atol=1e-5)


def test_a_causal_model_is_not_packed(backbones: dict[str, str], tmp_path: Path):
    folder = shutil.copytree(backbones["bert"], tmp_path / "bert")
    edit_json(folder / "config.json", is_decoder=True)
    model, plain = (load_model(str(folder), name).eval() for name in (None, "sdpa"))
    plain.load_state_dict(model.state_dict())
    inputs = load_tokenizer(folder)([list(pair) for pair in PAIRS[:8]], padding=True, return_tensors="pt")
    batch = collate(PAIRS[:8], str(folder))
    assert torch.allclose(in_order(batch, pair_logits(model, batch)), plain(**inputs).logits[:, 0], atol=1e-5)


def test_padding_that_a_text_spells_is_the_models_own(backbones: dict[str, str], tmp_path: Path):
    """RoBERTa leaves it out where it counts positions."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(backbones["roberta"], tmp_path / "roberta")
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="[unused0]")  # of number 1, as the model's own is
    tokenizer.save_pretrained(folder)
    model, plain = (load_model(str(folder), name).eval() for name in (None, "sdpa"))
    plain.load_state_dict(model.state_dict())
    pairs = [("one [unused0] text", "another"), ("[unused0] [unused0] one", "[unused0] other [unused0]"), ("a", "b")]
    inputs = tokenizer([list(pair) for pair in pairs], padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == 1)[inputs["attention_mask"] == 1].sum() == 5
    batch = collate(pairs, str(folder))
    for gradient in (False, True):  # by parts, and in one
        with torch.set_grad_enabled(gradient):
            assert torch.allclose(in_order(batch, pair_logits(model, batch)), plain(**inputs).logits[:, 0], atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_scoring_by_parts_and_threads_changes_nothing(threads: int):
    model = load_model(BACKBONE).eval()
    batch = collate(PAIRS * 3, BACKBONE)
    parts = _parts(batch, 8)
    assert len(parts) == 8
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert [sum(n for n, _ in part["pieces"]) for part in parts] == [len(part["starts"]) for part in parts]
    tokens = [len(part["input_ids"]) for part in parts]
    assert max(tokens) - min(tokens) <= 2 * batch["pieces"][0][1]  # a core that is done early waits
    assert len(_parts(batch, 10**6)) == len(batch["starts"])
    expected = pair_logits(model, batch).detach()  # with gradients, so in one
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            logits = pair_logits(model, batch)
            with torch.autocast("cpu", torch.bfloat16):
                rough = pair_logits(model, batch)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert rough.dtype == torch.float32
    assert 1e-5 < (rough - expected).abs().max() < 0.05  # in bf16 in the threads too


@pytest.mark.parametrize("cost", [0, 10**6])
def test_dropout_of_the_attention_is_the_plain_models(cost: int):
    """With a rate that drops nearly nothing, and with one that drops much: agreement, and the same mean."""
    model = load_model(BACKBONE)
    assert model.config._attn_implementation == ATTENTION
    batch = collate(PAIRS, BACKBONE, cost)
    expected = pair_logits(model.eval(), batch)
    for part in model.modules():
        if hasattr(part, "dropout") and hasattr(part, "scaling"):
            part.train()
            part.dropout.p = 1e-9
    assert torch.allclose(pair_logits(model, batch), expected, atol=1e-5)
    torch.manual_seed(0)
    tokens, pairs = len(batch["input_ids"]), batch["pieces"]
    exact = sum(n * longest for n, longest in pairs) == tokens
    packing = Packing(pairs, batch["starts"], None if exact else batch["slots"])
    query, key = torch.randn(2, tokens, 3, 8)
    found = attend_packed(query, key, torch.ones(tokens, 3, 8), packing, dropout=0.3)
    assert found.mean().item() == pytest.approx(1, abs=0.05)
    assert found.std() > 0.05
    # Only the first tokens' queries: the same rows.
    every = attend_packed(query, key, key, packing)
    firsts = attend_packed(query[batch["starts"]], key, key, packing)
    assert torch.allclose(firsts, every[batch["starts"]], atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_every_dropout_of_the_model_is_there_while_it_trains(family: str, backbones: dict[str, str]):
    model = load_model(backbones[family])
    batch = collate(PAIRS, backbones[family])
    drops = {name: part for name, part in model.named_modules() if isinstance(part, nn.Dropout)}
    for part in drops.values():
        part.p = 0.0
    expected = pair_logits(model, batch)
    for name, part in drops.items():
        part.p = 0.5
        assert not torch.allclose(pair_logits(model, batch), expected, atol=1e-5), name
        part.p = 0.0
    assert torch.allclose(pair_logits(model, batch), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_wrapped_last_layer_gives_the_same(family: str, backbones: dict[str, str]):
    """Sharding gives it a class of its own, and only its own call brings its weights together."""
    model = load_model(backbones[family]).eval()
    batch = collate(PAIRS, backbones[family])
    expected = pair_logits(model, batch)
    last = [part for part in model.modules() if type(part).__name__ in _LAST_LAYERS][-1]
    last.__class__ = type("Wrapped", (type(last),), {})
    assert torch.allclose(pair_logits(model, batch), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_model_evaluates_too(backbones: dict[str, str]):
    """`module.compile()` of Lightning; the threads that share a batch are not for it."""
    model = load_model(backbones["bert"]).eval()
    batch = collate(PAIRS[:4], backbones["bert"])
    with torch.no_grad():
        compiled = torch.compile(pair_logits, backend="eager")(model, batch)
        assert torch.allclose(compiled, pair_logits(model, batch), atol=1e-5)


def test_padding_on_the_left_is_the_models_own(backbones: dict[str, str]):
    """A model that takes padded pieces gets them on the side that its tokenizer pads."""
    tokenizer = load_tokenizer(backbones["electra"])
    expected = tokenizer([list(pair) for pair in PAIRS], padding=True, padding_side="left", max_length=128,
                         truncation=True, return_tensors="pt")  # fmt: skip
    model = load_model(backbones["electra"]).eval()
    tokenizer.padding_side = "left"
    try:
        batch = collate(PAIRS, backbones["electra"], 10**6)
    finally:
        tokenizer.padding_side = "right"
    logits = in_order(batch, pair_logits(model, batch))
    assert torch.allclose(logits, model(**expected).logits[:, 0], atol=1e-5)
    assert piece_cost("electra", "cpu") > piece_cost("bert", "cpu", training=True) > piece_cost("bert", "cpu")


def test_padding_is_zeros():
    packing = Packing([(2, 2)], torch.tensor([0, 2]), torch.tensor([0, 1, 2]))
    torch.use_deterministic_algorithms(True)  # with which what nobody writes is NaN
    try:
        assert packing.split(torch.ones(3, 1))[0].flatten().tolist() == [1, 1, 1, 0]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # the CPU's kernel only
def test_one_kernel_for_all_pairs_drops_as_much():
    """And scales as it is asked to."""
    torch.manual_seed(0)
    starts, bounds = torch.arange(0, 600, 20), torch.arange(0, 601, 20)
    pieces, (query, key) = [(30, 20)], torch.randn(2, 600, 3, 8)
    plain, ragged = Packing(pieces, starts, None), Packing(pieces, starts, None, bounds)
    found = attend_packed(query, key, torch.ones(600, 3, 8), ragged, dropout=0.3)
    assert found.mean().item() == pytest.approx(1, abs=0.05)
    assert found.std() > 0.05
    one, other = (attend_packed(query, key, key, packing, scaling=0.1) for packing in (plain, ragged))
    assert torch.allclose(one, other, atol=1e-6)

"""Encoding, its cache, and what is told of cut texts."""

from __future__ import annotations

import logging
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc import CrossEncoderModule
from crossenc.backbone import load_tokenizer
from crossenc.encode import PairCollator, cut_pieces, encode, tell_cut
from crossenc.pairs import read

from .conftest import BACKBONE


def test_token_ids_are_the_tokenizers_own(pairs_file: Path):
    tokenizer, table = load_tokenizer(BACKBONE), read(str(pairs_file))
    expected = tokenizer(table["text_a"][:], table["text_b"][:], truncation=True, max_length=20)
    encoded = encode(table, tokenizer, 20)
    assert encoded["input_ids"][:] == expected["input_ids"]
    assert encoded["token_type_ids"][:] == expected["token_type_ids"]


def test_tokens_are_cached_until_the_length_changes(pairs_file: Path):
    tokenizer, table = load_tokenizer(BACKBONE), read(str(pairs_file))
    first = encode(table, tokenizer, 32).cache_files
    assert encode(read(str(pairs_file)), tokenizer, 32).cache_files == first
    assert encode(table, tokenizer, 33).cache_files != first
    shared = encode(table, tokenizer, 100, num_proc=2)
    assert shared["input_ids"][:] == encode(table, tokenizer, 101)["input_ids"][:]


def test_cut_pairs_are_counted_and_named(write, caplog: pytest.LogCaptureFixture):
    path = write("p.csv", "question1,question2,label\na,b,1\n" + "long " * 30 + ",b,0\n")
    encoded = encode(read(str(path)), load_tokenizer(BACKBONE), 16)
    with caplog.at_level(logging.INFO, logger="crossenc"):
        tell_cut(encoded, "train pairs", 16)
    assert caplog.messages == ["1 of 2 train pairs are longer than 16 tokens and are cut: rows 2"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(5, 60), min_size=1, max_size=12), st.integers(0, 200))
def test_pieces_take_the_fewest_tokens(found: list[int], cost: int):
    lengths = np.sort(np.array(found))[::-1]
    cuts = [
        [0, *(i + 1 for i in range(len(found) - 1) if number >> i & 1), len(found)]
        for number in range(2 ** (len(found) - 1))
    ]

    def price(places: list[int]) -> int:
        return sum(int(lengths[i]) * (j - i) + cost for i, j in pairwise(places))

    sizes = cut_pieces(lengths, cost)
    assert sum(sizes) == len(found)
    assert min(sizes) > 0
    assert price([0, *accumulate(sizes)]) == min(map(price, cuts))


def test_batches_of_any_shape_give_the_same_logits_and_gradients(pairs_file: Path):
    """60 pairs as one padded batch, in pieces of like length, and one by one: fp32, dropout off."""
    module, tokenizer = CrossEncoderModule(BACKBONE).eval(), load_tokenizer(BACKBONE)
    table = encode(read(str(pairs_file)), tokenizer, 512).with_format("arrow")
    found = {}
    for name, size, cost in (("plain", 60, 10**9), ("pieces", 60, 20), ("batches", 7, 20), ("single", 1, 0)):
        collate = PairCollator(tokenizer, piece_cost=cost)
        module.zero_grad()
        logits, pieces = torch.zeros(60), 0
        for start in range(0, 60, size):
            batch = collate(table[list(range(start, min(60, start + size)))])
            pieces += len(batch["pieces"])
            given = module.predict_step(batch, 0)["logit"]
            logits[batch["row"]] = given.detach()
            (module.loss(given, batch["label"]).sum() / 60).backward()
        gradients = [p.grad.flatten() for p in module.model.parameters() if p.grad is not None]
        found[name] = logits, torch.cat(gradients)
        assert pieces == 1 or name != "plain"
        assert pieces > 3 or name != "pieces"
    for name in ("pieces", "batches", "single"):
        for one, other in zip(found[name], found["plain"], strict=True):
            assert torch.allclose(one, other, atol=1e-5), name

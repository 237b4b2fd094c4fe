"""Encoding, its cache, and what is told of cut texts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from crossenc.backbone import load_tokenizer
from crossenc.encode import encode, tell_cut
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

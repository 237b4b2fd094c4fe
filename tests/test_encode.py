"""Encoding, its cache, and what is told of cut texts."""

from __future__ import annotations

import copy
import logging
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from crossenc import encode as encoding
from crossenc.backbone import load_tokenizer
from crossenc.encode import PairCollator, cut_pieces, encode, encode_texts, tell_cut
from crossenc.pairs import read

from .conftest import BACKBONE


def test_token_ids_are_the_tokenizers_own(pairs_file: Path):
    """Those that it cuts too, on either side; which side stands in the cache's key."""
    tokenizer, table = copy.deepcopy(load_tokenizer(BACKBONE)), read(str(pairs_file))  # which others share
    encoded = {}
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        encoded[side] = encode(table, tokenizer, 20)
    assert any(encoded["left"]["cut"][:])
    for side, found in encoded.items():
        tokenizer.truncation_side = side
        expected = tokenizer(table["text_a"][:], table["text_b"][:], truncation=True, max_length=20)
        assert found["input_ids"][:] == expected["input_ids"]
        assert found["token_type_ids"][:] == expected["token_type_ids"]


def test_swapped_pairs_are_those_of_the_texts_in_the_other_order(write):
    header = "question1,question2,label\n"
    table = read(str(write("p.csv", header + "a b,c,1\nd,e,0\n")))
    other = read(str(write("q.csv", header + "c,a b,1\ne,d,0\n")))
    tokenizer = load_tokenizer(BACKBONE)
    swapped, expected = encode(table, tokenizer, 32, swap=True), encode(other, tokenizer, 32)
    assert swapped["row"][:] == [~0, ~1]
    for column in ("input_ids", "token_type_ids", "length", "label"):
        assert swapped[column][:] == expected[column][:]


def _byte_level() -> PreTrainedTokenizerFast:
    """One like RoBERTa's, with two merges."""
    special, letters = ["<s>", "</s>", "<pad>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters, "Ġa", "aa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=["input_ids"])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["wordpiece", "byte-level"])
def test_two_long_texts_are_truncated_as_the_tokenizer_does(family: str, side: str, monkeypatch: pytest.MonkeyPatch):
    """But it never combines their dropped pieces, of which there are hundreds."""
    tokenizer = _byte_level() if family == "byte-level" else copy.deepcopy(load_tokenizer(BACKBONE))
    tokenizer.truncation_side = side
    draw, words = np.random.default_rng(0), ["unbelievably", "a", "中", "don't", "...", "zzzzqqq"]
    # In one long word, all tokens depend on its first letter, and the last two texts have the same number of tokens.
    long = [("a" * 200, "b " * 200), ("😂" * 40, "x" * 160)]
    for gap in (" ", "", "-", " \n"):
        a, b, c = (gap.join(draw.choice(words, size)) for size in (40, 41, 9))
        long += [(a, b), (b, a), (a, a), (a, a + "x"), (b, c)]
    pairs = [*long, ("a", long[2][0]), ("a", "b")]
    whole = tokenizer(pairs)["input_ids"]
    # The shorter text has one token less if an odd number is left for both.
    expected = {size: tokenizer(pairs, truncation=True, max_length=size) for size in (9, 10)}
    monkeypatch.setattr(encoding, "_LONG", 4)
    alone: list[tuple[str, str]] = []
    real = encoding._encode_long
    monkeypatch.setattr(encoding, "_encode_long", lambda pairs, *more: alone.extend(pairs) or real(pairs, *more))
    for size, those in expected.items():
        table = encode_texts(pairs, tokenizer, size)
        assert table["input_ids"].to_pylist() == those["input_ids"]
        assert table["cut"].to_pylist() == [len(ids) > size for ids in whole]
        if family == "wordpiece":
            assert table["token_type_ids"].to_pylist() == those["token_type_ids"]
    assert alone == [*long, *long]


def test_a_template_that_repeats_a_text_is_the_tokenizers_own():
    tokenizer = copy.deepcopy(load_tokenizer(BACKBONE))
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    template = "[CLS] $A [SEP] $B [SEP] $A [SEP]"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", template, marks)
    pairs = [("one two three four " * 12, "five six seven " * 14)]
    expected = tokenizer(pairs, truncation=True, max_length=16)["input_ids"]
    assert encode_texts(pairs, tokenizer, 16)["input_ids"].to_pylist() == expected


def test_long_texts_are_tokenized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """All that is cut off would else be held at once."""
    sizes = []

    class Counted:
        def __init__(self, real):
            self.real = real

        def encode_batch(self, pairs, **options):
            sizes.append(len(pairs))
            return self.real.encode_batch(pairs, **options)

    tokenizer = load_tokenizer(BACKBONE)
    pairs = [("a b", "c")] * 10 + [("one two " * 400, "three " * 300)] * 10 + [("d", "e f")]
    expected = encode_texts(pairs, tokenizer, 32)
    real = encoding._truncating
    monkeypatch.setattr(encoding, "_LONG", 1_000)
    monkeypatch.setattr(encoding, "_truncating", lambda *which: Counted(real(*which)))
    monkeypatch.setattr(encoding, "_CHARACTERS", 11_000)
    assert encode_texts(pairs, tokenizer, 32) == expected
    assert sum(sizes) == len(pairs)
    assert max(sizes[1:-1]) <= 3


def test_a_tokenizer_that_does_not_know_every_word():
    vocabulary = {"x": 0, "y": 1, "[SEP]": 2}
    for words in (models.WordLevel(vocabulary), models.BPE(vocabulary, [])):  # an error is all it says, or nothing
        backend = Tokenizer(words)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(pair="$A [SEP] $B", special_tokens=[("[SEP]", 2)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        pairs = [("x y", "y"), ("x " * 40, "y " * 40)]
        assert encode_texts(pairs, tokenizer, 4)["input_ids"].to_pylist() == [[0, 1, 2, 1], [0, 2, 1, 1]]


def test_tokens_are_cached_until_the_length_changes(pairs_file: Path):
    tokenizer, table = load_tokenizer(BACKBONE), read(str(pairs_file))
    first = encode(table, tokenizer, 32).cache_files
    assert encode(read(str(pairs_file)), tokenizer, 32).cache_files == first
    assert encode(table, tokenizer, 33).cache_files != first
    shared = encode(table, tokenizer, 100, num_proc=2)
    assert shared["input_ids"][:] == encode(table, tokenizer, 101)["input_ids"][:]
    assert shared["row"][:] == table["row"][:]


def test_padding_is_the_tokenizers():
    tokenizer = copy.copy(load_tokenizer(BACKBONE))  # which others share
    tokenizer.pad_token_id, tokenizer.padding_side = 7, "left"
    columns = {"input_ids": [[1, 2, 3], [4]], "length": [3, 1], "row": [0, 1]}
    batch = PairCollator(tokenizer, piece_cost=100)(pa.table(columns))
    assert batch["padding"] == {"input_ids": 7}
    longest = batch["pieces"][0][1]
    assert batch["slots"].tolist() == [longest - 3, longest - 2, longest - 1, 2 * longest - 1]


def test_padding_that_comes_with_a_tokenizer_is_no_part_of_a_pair():
    tokenizer = copy.deepcopy(load_tokenizer(BACKBONE))  # which others share
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encode_texts([("a", "b")], tokenizer, 32)["length"].to_pylist() == [5]


def test_cut_pairs_are_counted_and_named(write, caplog: pytest.LogCaptureFixture):
    rows = ["a,b,1", "long " * 30 + ",b,0", "long " * 12 + ",b,0"]  # the last has 16 tokens
    path = write("p.csv", "\n".join(["question1,question2,label", *rows]))
    encoded = encode(read(str(path)), load_tokenizer(BACKBONE), 16)
    assert encoded["length"][:] == [5, 16, 16]
    with caplog.at_level(logging.INFO, logger="crossenc"):
        tell_cut(encoded, "train pairs", 16)
    assert caplog.messages == ["1 of 3 train pairs are longer than 16 tokens and are truncated: rows 2"]


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

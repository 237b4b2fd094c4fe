"""Texts to token ids, kept in Arrow files by `datasets`; and batches of them, padded."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from . import __version__

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


class PairBatch(TypedDict, total=False):
    """Pairs, padded to the longest: `inputs` are the backbone's, each (pairs, tokens); the others are (pairs,)."""

    inputs: dict[str, Tensor]
    row: Tensor
    label: Tensor


def encode(pairs: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Dataset:
    """Add `input_ids`, `token_type_ids` where the backbone takes them, and `cut`, and drop the texts.

    A pair of more than `max_length` tokens loses the end of its longer text, token by token, and is marked in `cut`.
    The result is cached under the pairs, the tokenizer and `max_length`.
    """
    return pairs.map(
        _encode_batch,
        batched=True,
        remove_columns=["text_a", "text_b"],
        fn_kwargs={
            # The rules as text and not as an object: their cache key is the same in every process.
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "max_length": max_length,
            "with_types": "token_type_ids" in tokenizer.model_input_names,
            "version": __version__,
        },
        desc="tokenize",
    )


def _encode_batch(
    batch: dict[str, list[str]], tokenizer: str, max_length: int, with_types: bool, version: str
) -> dict[str, list[Any]]:
    pairs = list(zip(batch["text_a"], batch["text_b"], strict=True))
    encodings = _truncating(tokenizer, max_length).encode_batch(pairs)
    columns: dict[str, list[Any]] = {
        "input_ids": [e.ids for e in encodings],
        "cut": [bool(e.overflowing) for e in encodings],
    }
    return columns | ({"token_type_ids": [e.type_ids for e in encodings]} if with_types else {})


@cache
def _truncating(rules: str, max_length: int) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(rules)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer


def tell_cut(encoded: Dataset, what: str, max_length: int) -> None:
    """Log how many pairs were cut to `max_length` tokens, and the first few rows; nothing if none was."""
    columns = encoded.with_format("numpy", columns=["row", "cut"])[:]
    rows = columns["row"][columns["cut"]] + 1
    if len(rows):
        some = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        count = f"{len(rows):,} of {len(encoded):,}"
        log.info("%s %s are longer than %s tokens and are cut: rows %s", count, what, max_length, some)


class PairCollator:
    """Make a `PairBatch` of encoded pairs; on GPUs to a multiple of 8 tokens, which tensor cores need."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from transformers import DataCollatorWithPadding

        self.names = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
        self.pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if torch.cuda.is_available() else None)

    def __call__(self, items: list[dict[str, Any]]) -> PairBatch:
        batch = PairBatch(
            inputs=dict(self.pad([{name: item[name] for name in self.names} for item in items])),
            row=torch.tensor([item["row"] for item in items]),
        )
        if "label" in items[0]:
            batch["label"] = torch.tensor([item["label"] for item in items])
        return batch

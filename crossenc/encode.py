"""Texts to token ids, cached in Arrow files by `datasets`; and token ids to packed batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import __version__

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# Tokenized at once, to limit memory: the tokenizer also keeps what it truncates, about 200 bytes per character.
_CHARACTERS = 500_000
# Two texts are long if, in the geometric mean, they have more characters than this for each token that a pair may have.
_LONG = 8
# What one more piece of a batch costs on a GPU, in tokens: it launches operations one by one, so padding is cheap.
GPU_PIECE_COST = 4_096
_Encoded: TypeAlias = tuple[list[int], list[int], bool]  # ids, types, and whether the pair is cut


class PairBatch(TypedDict, total=False):
    """Pairs, the longest first, with their tokens in one row without padding, and their pieces of similar length.

    `input_ids`, `position_ids` and, if the backbone takes them, `token_type_ids` have shape (tokens,), `row` and
    `label` (pairs,). `pieces` holds (pairs, tokens of the longest) of each piece, `starts` the position of each pair's
    first token in the row, `slots` the position of each token among the padded pieces, and `padding` the values that
    fill the other positions there.

    In training, `mean_pairs` is the mean number of pairs in a batch of the epoch: if a loss is summed over the batch
    and divided by it, every pair of the epoch has the same weight, however the pairs are spread over batches.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    starts: Tensor
    slots: Tensor
    pieces: list[tuple[int, int]]
    padding: dict[str, int]
    row: Tensor
    label: Tensor
    mean_pairs: float


def encode(
    pairs: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int, num_proc: int | None = None, swap: bool = False
) -> Dataset:
    """Add `input_ids`, `token_type_ids` if the backbone takes them, `length` and `cut`, and drop the texts.

    A pair of more than `max_length` tokens is truncated, token by token, at the end of its longer text, or at the
    beginning if the tokenizer says so; `cut` marks such pairs. The result is cached by pairs, tokenizer and
    `max_length`. `num_proc` processes share the work; None leaves it to the tokenizer's own threads. With `swap`, the
    second text comes first, and `row` n becomes ~n.
    """
    import datasets

    with_types = "token_type_ids" in tokenizer.model_input_names
    added = {"input_ids": datasets.List(datasets.Value("int32")), "length": datasets.Value("int32")}
    added |= {"cut": datasets.Value("bool")}
    added |= {"token_type_ids": datasets.List(datasets.Value("int8"))} if with_types else {}
    kept = {name: feature for name, feature in pairs.features.items() if name not in ("text_a", "text_b")}
    return pairs.map(
        _encode_batch,
        batched=True,
        features=datasets.Features({**kept, **added}),
        remove_columns=["text_a", "text_b"],
        fn_kwargs={
            # As text, not as an object: the cache key of a text is the same in every process.
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "max_length": max_length,
            "from_left": tokenizer.truncation_side == "left",
            "with_types": with_types,
            "swap": swap,
            "version": __version__,
        },
        num_proc=num_proc,
        desc="tokenize",
    )


def _encode_batch(
    batch: dict[str, list[Any]],
    tokenizer: str,
    max_length: int,
    from_left: bool,
    with_types: bool,
    swap: bool,
    version: str,
) -> dict[str, list[Any]]:
    sides = (batch["text_b"], batch["text_a"]) if swap else (batch["text_a"], batch["text_b"])
    pairs = list(zip(*sides, strict=True))
    encoded: list[_Encoded] = []
    lengths = np.array([(len(a), len(b)) for a, b in pairs], dtype=np.int64).reshape(-1, 2)
    characters, products = lengths.sum(1).cumsum(), lengths.prod(1)
    for part in np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(characters // _CHARACTERS)) + 1):
        long = (products[part] > (_LONG * max_length) ** 2) & (_frame(tokenizer) is not None)
        apart = _encode_long([pairs[i] for i in part[long]], tokenizer, max_length, from_left)
        others = _truncating(tokenizer, max_length, from_left).encode_batch([pairs[i] for i in part[~long]])
        whole = ((encoding.ids, encoding.type_ids, bool(encoding.overflowing)) for encoding in others)
        encoded += [next(apart if is_long else whole) for is_long in long]
    columns: dict[str, list[Any]] = {"input_ids": [ids for ids, _, _ in encoded], "cut": [cut for _, _, cut in encoded]}
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    if with_types:
        columns["token_type_ids"] = [types for _, types, _ in encoded]
    if swap:
        columns["row"] = [~row for row in batch["row"]]
    return columns


def encode_texts(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> pyarrow.Table:
    """The table that `encode` makes, for pairs of texts in memory; rows are numbered from 0."""
    rules, with_types = tokenizer.backend_tokenizer.to_str(), "token_type_ids" in tokenizer.model_input_names
    texts = {"text_a": [a for a, _ in pairs], "text_b": [b for _, b in pairs]}
    from_left = tokenizer.truncation_side == "left"
    columns = _encode_batch(texts, rules, max_length, from_left, with_types, swap=False, version=__version__)
    return pyarrow.table({"row": np.arange(len(pairs)), **columns})


def _encode_long(pairs: Sequence[tuple[str, str]], rules: str, max_length: int, from_left: bool) -> Iterator[_Encoded]:
    """The same as the tokenizer gives, for pairs of long texts.

    It would combine every dropped piece of one text with every one of the other, which takes a minute and 6 GB for two
    texts of 16,000 words.
    """
    tokenizer, frame = _truncating(rules, None, from_left), _frame(rules)
    assert frame is not None  # `_encode_batch` looked
    room = max_length - tokenizer.num_special_tokens_to_add(True)
    single = tokenizer.encode_batch([text for pair in pairs for text in pair], add_special_tokens=False)
    for both in zip(single[::2], single[1::2], strict=True):
        sizes = [*map(len, both)]
        if cut := sum(sizes) > room:
            longer = int(sizes[1] >= sizes[0])  # of two with the same size, the second keeps the odd token
            sizes[1 - longer] = min(sizes[1 - longer], room // 2)
            sizes[longer] = room - sizes[1 - longer]
        kept = {
            side: encoding.ids[len(encoding) - size :] if from_left else encoding.ids[:size]
            for side, (encoding, size) in enumerate(zip(both, sizes, strict=True))
        }
        ids: list[int] = []
        types: list[int] = []
        for side, token, kind in zip(frame.sequence_ids, frame.ids, frame.type_ids, strict=True):
            added = [token] if side is None else kept.pop(side, [])
            ids += added
            types += [kind] * len(added)
        yield ids, types, cut


@cache
def _frame(rules: str) -> Encoding | None:
    """A pair of one-letter texts, which shows where the special tokens of any pair are; None if it does not."""
    tokenizer = _truncating(rules, None, False)
    try:
        frame = tokenizer.encode("a", "a")
    except Exception:  # tokenizers raises nothing more exact: "a" may be unknown, without a token for the unknown
        return None
    # A template that repeats a text has tokens of which it does not tell whose they are.
    clear = frame.sequence_ids.count(None) == tokenizer.num_special_tokens_to_add(True)
    return frame if clear and {0, 1} <= {*frame.sequence_ids} else None


@cache
def _truncating(rules: str, max_length: int | None, from_left: bool) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(rules)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if max_length is not None:
        tokenizer.enable_truncation(max_length, strategy="longest_first", direction="left" if from_left else "right")
    return tokenizer


def tell_cut(encoded: Dataset, what: str, max_length: int) -> None:
    """Log how many pairs were truncated to `max_length` tokens, and the first few rows; nothing if none was."""
    columns = encoded.with_format("numpy", columns=["row", "cut"])[:]
    rows = columns["row"][columns["cut"]] + 1
    if len(rows):
        first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        count = f"{len(rows):,} of {len(encoded):,}"
        log.info("%s %s are longer than %s tokens and are truncated: rows %s", count, what, max_length, first)


class PairCollator:
    """Makes a `PairBatch` from an Arrow table of encoded pairs, padded as the tokenizer pads.

    `mean_pairs` is passed on in the batch; None in evaluation. For `piece_cost`, in tokens, see `cut_pieces`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, mean_pairs: float | None = None, piece_cost: int = 0
    ) -> None:
        self.mean_pairs, self.piece_cost = mean_pairs, piece_cost
        self.padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.pads_left = tokenizer.padding_side == "left"
        # Tensor cores need multiples of 8; on a CPU, where pieces cost less, more padding is only more work.
        self.multiple = 8 if torch.cuda.is_available() and piece_cost >= GPU_PIECE_COST else 1

    def __call__(self, table: pyarrow.Table) -> PairBatch:
        lengths = table["length"].to_numpy().astype(np.int64)
        if (np.diff(lengths) > 0).any():
            order = np.argsort(-lengths, kind="stable")
            table, lengths = table.take(order), lengths[order]
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        sizes = np.array(cut_pieces(lengths, self.piece_cost))
        widths = -(-lengths[np.cumsum(sizes) - sizes] // self.multiple) * self.multiple  # by the first, the longest
        padded = np.repeat(widths, sizes)  # the length of each pair with its padding
        # A pair starts where the slots of the pairs before it end; with padding on the left, after its own padding.
        first_slot = np.cumsum(padded) - padded + (padded - lengths if self.pads_left else 0)
        batch = PairBatch(
            position_ids=torch.from_numpy(positions),
            starts=torch.from_numpy(starts),
            slots=torch.from_numpy(positions + np.repeat(first_slot, lengths)),
            pieces=list(zip(sizes.tolist(), widths.tolist(), strict=True)),
            padding={name: value for name, value in self.padding.items() if name in table.column_names},
            row=_tensor(table["row"]),
        )
        for name in batch["padding"]:
            batch[name] = _tensor(table[name].combine_chunks().flatten()).long()  # type: ignore[literal-required]
        if "label" in table.column_names:
            batch["label"] = _tensor(table["label"])
        if self.mean_pairs is not None:
            batch["mean_pairs"] = self.mean_pairs
        return batch


def cut_pieces(lengths: NDArray[np.int32], cost: int) -> list[int]:
    """Sizes of the pieces that make a batch cheapest: padding counts, and `cost` tokens for each piece, which launches
    every operation once more. `lengths` are the tokens of each pair, the longest first, shape (pairs,).
    """
    if int(lengths[0]) * len(lengths) - int(lengths.sum()) <= cost:  # cuts save at most all padding
        return [len(lengths)]
    # Only places where the length changes are worth a cut. tokens[j] is the least for the pairs before places[j].
    places = np.concatenate([np.flatnonzero(np.diff(lengths, prepend=-1)), [len(lengths)]])
    tokens, back = np.zeros(len(places), dtype=np.int64), [0] * len(places)
    for j in range(1, len(places)):
        choices = tokens[:j] + lengths[places[:j]].astype(np.int64) * (places[j] - places[:j])
        back[j] = int(choices.argmin())
        tokens[j] = choices[back[j]] + cost
    sizes, j = [], len(places) - 1
    while j > 0:
        sizes.append(int(places[j] - places[back[j]]))
        j = back[j]
    return sizes[::-1]


def _tensor(column: pyarrow.Array | pyarrow.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().copy())  # a copy, because Arrow's memory is read-only

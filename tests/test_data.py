"""The data module: sources, splits, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from crossenc import PairDataModule
from crossenc.errors import DataError, UsageError

from .conftest import BACKBONE


def rows_of(data: PairDataModule) -> dict[str, int]:
    data.setup("fit")
    return data.facts["rows"]


def test_sources_splits_and_limit(pairs_file: Path, tmp_path: Path):
    make = {"backbone": BACKBONE}
    assert rows_of(PairDataModule(str(pairs_file), **make)) == {"train": 48, "val": 6, "test": 6}
    assert rows_of(PairDataModule(str(pairs_file), val_size=0.5, test_size=10, **make)) == {
        "train": 20,
        "val": 30,
        "test": 10,
    }
    one = PairDataModule(str(pairs_file), val_source=str(pairs_file), limit=50, **make)
    assert rows_of(one) == {"train": 50, "val": 50}
    by_question = PairDataModule(str(pairs_file), split="question", val_size=0.1, test_size=0.1, **make)
    assert sum(rows_of(by_question).values()) == 60
    (tmp_path / "train.csv").write_text(pairs_file.read_text())
    (tmp_path / "dev.csv").write_text(pairs_file.read_text())
    assert rows_of(PairDataModule(str(tmp_path), **make)) == {"train": 60, "val": 60}
    sample = rows_of(PairDataModule("sample", **make))
    assert sample["train"] > 4000
    assert min(sample["val"], sample["test"]) > 900
    # Evaluated by itself or after training, a split is measured against the same training pairs.
    fresh = PairDataModule(str(pairs_file), val_source=str(pairs_file), limit=50, **make)
    fresh.tables["val"] = one.tables["val"]
    rows = np.arange(0, 50, 7)
    assert fresh.unseen("val", rows).tolist() == one.unseen("val", rows).tolist() == [False] * 8
    # A run's checkpoint tells how many training pairs there were; `limit` is of the evaluation.
    head = pairs_file.read_text().splitlines(keepends=True)
    (tmp_path / "late.csv").write_text(head[0] + "".join(head[-5:]))
    later = PairDataModule(str(pairs_file), val_source=str(tmp_path / "late.csv"), limit=4, **make)
    later.tables["val"] = later.read_split("val")
    assert not later.unseen("val", np.arange(4)).any()
    later.load_state_dict({"limit": 10})
    assert later.unseen("val", np.arange(4)).any()
    with pytest.raises(DataError, match="leaves no test pairs"):
        one.test_dataloader()
    with pytest.raises(UsageError, match=r"data\.batch_size"):
        PairDataModule(batch_size=0, **make)
    for name in ("split", "batch_by", "on_mismatch"):
        with pytest.raises(UsageError, match=rf"data\.{name} 'questions' is not one of"):
            PairDataModule(**{name: "questions"}, **make)


def test_batches_are_padded_to_their_longest_and_shuffled_by_the_seed(pairs_file: Path):
    data = PairDataModule(str(pairs_file), batch_size=7, backbone=BACKBONE)
    data.setup("fit")

    def order(seed: int) -> list[int]:
        seed_everything(seed, verbose=False)
        return torch.cat([batch["row"] for batch in data.train_dataloader()]).tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(12, 60))
    for batch in data.train_dataloader():
        assert sum(pairs for pairs, _ in batch["pieces"]) == len(batch["row"]) == len(batch["label"])
        assert batch["label"].dtype == torch.float32
    for batch in data.val_dataloader():
        # In evaluation a CPU computes text only: each piece holds pairs of one length.
        assert sum(pairs * longest for pairs, longest in batch["pieces"]) == len(batch["input_ids"])

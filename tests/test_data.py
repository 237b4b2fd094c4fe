"""The data module: sources, splits, batches."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from crossenc import PairDataModule
from crossenc.errors import CheckpointError, DataError, UsageError
from crossenc.pairs import read

from .conftest import BACKBONE

MAKE = {"backbone": BACKBONE}


def rows_of(data: PairDataModule) -> dict[str, int]:
    data.setup("fit")
    return data.facts["rows"]


def test_splits_come_from_their_sources_or_are_cut_off(pairs_file: Path):
    source = str(pairs_file)
    assert rows_of(PairDataModule(source, **MAKE)) == {"train": 48, "val": 6, "test": 6}
    cut = PairDataModule(source, val_size=0.5, test_size=10, **MAKE)
    assert rows_of(cut) == {"train": 20, "val": 30, "test": 10}
    own = PairDataModule(source, val_source=source, limit=50, **MAKE)
    assert rows_of(own) == {"train": 50, "val": 50}
    assert own.facts["split"] is None  # which nothing was cut off
    with pytest.raises(DataError, match="leaves no test pairs"):
        own.test_dataloader()
    sample = rows_of(PairDataModule("sample", **MAKE))
    assert sample["train"] > 4000
    assert min(sample["val"], sample["test"]) > 900


def test_a_split_by_question_leaves_no_question_in_two_splits(pairs_file: Path, write):
    data = PairDataModule(str(pairs_file), split="question", val_size=0.1, test_size=0.1, **MAKE)
    assert sum(rows_of(data).values()) == 60
    assert data.unseen("val", np.array(data.tables["val"]["row"][:])).all()
    assert data.facts["split"] == "question"
    with pytest.raises(UsageError, match="split question has nothing to split"):
        rows_of(PairDataModule(str(pairs_file), val_source=str(pairs_file), split="question", **MAKE))
    star = write("star.csv", "text_a,text_b,label\n" + "".join(f"one,{n},{n % 2}\n" for n in range(30)))
    with pytest.raises(DataError, match=r"split question leaves no dev pairs of \S+star.csv: its questions are too "):
        rows_of(PairDataModule(str(star), split="question", test_size=0, **MAKE))


def test_a_folder_is_named_so_that_no_hub_id_looks_like_it(
    pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text(pairs_file.read_text())
    monkeypatch.chdir(tmp_path.parent)
    folder = PairDataModule(tmp_path.name, **MAKE)
    assert rows_of(folder) == {"train": 60, "val": 60}
    assert folder.facts["source"] == folder.facts["sources"]["val"] == f"./{tmp_path.name}"
    (tmp_path / "a:b").mkdir()
    for source in (f"{tmp_path.name}:dev", f"{tmp_path.name}/a:b"):
        assert PairDataModule(source, **MAKE).read_from()["val"] == f"./{source}"


def test_pairs_of_unseen_questions_are_those_of_no_training_pair_of_the_run(pairs_file: Path, write):
    """Whether a split is evaluated by itself or after training."""
    trained, fresh = (PairDataModule(str(pairs_file), val_source=str(pairs_file), limit=50, **MAKE) for _ in range(2))
    trained.setup("fit")
    fresh.tables["val"] = trained.tables["val"]
    rows = np.arange(0, 50, 7)
    assert fresh.unseen("val", rows).tolist() == trained.unseen("val", rows).tolist() == [False] * 8
    # A run's checkpoint tells how many training pairs there were; `limit` is of the evaluation.
    head, *lines = pairs_file.read_text().splitlines(keepends=True)
    late = str(write("late.csv", head + "".join(lines[-5:])))
    later = PairDataModule(str(pairs_file), val_source=late, limit=4, **MAKE)
    later.tables["val"] = read(late).take(4)
    assert not later.unseen("val", np.arange(4)).any()
    later.load_state_dict({"limit": 10})
    assert later.unseen("val", np.arange(4)).any()


def test_arguments_that_cannot_be_used_are_named():
    for name in ("source", "val_source", "test_source"):
        with pytest.raises(UsageError, match="write the list to a file"):
            PairDataModule(**{name: [("a", "b", 1)]}, **MAKE)
    for name in ("batch_size", "window", "eval_tokens", "num_proc", "limit"):
        with pytest.raises(UsageError, match=rf"data\.{name} must be a whole number of at least 1, not 0"):
            PairDataModule(**{name: 0}, **MAKE)
    for value in (0.5, float("nan"), "8", [8]):
        with pytest.raises(UsageError, match=r"data\.limit must be a whole number of at least 1, not "):
            PairDataModule(limit=value, **MAKE)
    for name in ("split", "batch_by", "on_mismatch"):
        with pytest.raises(UsageError, match=rf"data\.{name} 'questions' is not one of"):
            PairDataModule(**{name: "questions"}, **MAKE)


def test_batches_are_padded_to_their_longest_and_shuffled_by_the_seed(pairs_file: Path):
    data = PairDataModule(str(pairs_file), batch_size=7, backbone=BACKBONE)
    data.setup("fit")

    def order(seed: int) -> list[int]:
        seed_everything(seed, verbose=False)
        return torch.cat([batch["row"] for batch in data.train_dataloader()]).tolist()

    assert order(1) == order(1) != order(2)
    for changed in ({"window": 4}, {"batch_by": "tokens"}):
        other = PairDataModule(str(pairs_file), batch_size=7, backbone=BACKBONE, **changed)
        other.setup("fit")
        assert torch.cat([batch["row"] for batch in other.train_dataloader()]).tolist() != order(2)
    assert sorted(order(1)) == list(range(12, 60))
    for batch in data.train_dataloader():
        assert sum(pairs for pairs, _ in batch["pieces"]) == len(batch["row"]) == len(batch["label"])
        assert batch["label"].dtype == torch.float32
    for batch in data.val_dataloader():
        # In evaluation a CPU computes text only: each piece holds pairs of one length.
        assert sum(pairs * longest for pairs, longest in batch["pieces"]) == len(batch["input_ids"])


def trainer(function: TrainerFn = TrainerFn.FITTING, **settings: float) -> Any:
    """As much of one as the data module asks for."""
    state = SimpleNamespace(fn=function)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    settings = {"global_rank": 0, "global_step": 0, "world_size": 1, "accumulate_grad_batches": 1, **settings}
    limits = {f"limit_{name}_batches": 1.0 for name in ("train", "val", "test", "predict")}
    settings = {"fast_dev_run": False, "overfit_batches": 0, **limits, **settings}
    return SimpleNamespace(state=state, strategy=strategy, **settings)


def test_worker_processes_need_no_process_group(pairs_file: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.setpgrp")  # as on Windows
    data = PairDataModule(str(pairs_file), backbone=tiny, num_workers=1, batch_size=24)
    data.setup("fit")
    assert [len(batch["row"]) for batch in data.train_dataloader()] == [24, 24]


@pytest.mark.parametrize(("old", "devices", "workers"), [(True, 2, 0), (True, 1, 1), (False, 2, 1)])
def test_no_workers_are_forked_where_they_may_hang(
    pairs_file: Path, monkeypatch: pytest.MonkeyPatch, caplog, old: bool, devices: int, workers: int
):
    monkeypatch.setattr("crossenc.data._FORKS_HANG", old)
    data = PairDataModule(str(pairs_file), backbone=BACKBONE, num_workers=1)
    data.trainer = trainer(world_size=devices)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert data.train_dataloader().num_workers == data.val_dataloader().num_workers == workers
    assert ("data.num_workers 1 is not used" in caplog.text) == (workers == 0)


def test_a_run_goes_on_in_the_same_order_only(pairs_file: Path, write, monkeypatch: pytest.MonkeyPatch):
    def made(source: Path = pairs_file, accumulated: int = 1, limit: float = 1.0, **settings: Any) -> PairDataModule:
        data = PairDataModule(str(source), backbone=BACKBONE, **settings)
        data.trainer = trainer(accumulate_grad_batches=accumulated, limit_train_batches=limit)
        data.setup("fit")
        return data

    before = made().state_dict()
    made().load_state_dict(before)
    older = {**before, "plan": {name: value for name, value in before["plan"].items() if name != "twice"}}
    made(twice=True).load_state_dict(older)  # of a version that did not know of it
    trial = PairDataModule(str(pairs_file), backbone=BACKBONE)
    trial.trainer = trainer(fast_dev_run=True, limit_train_batches=1)
    trial.setup("fit")
    trial.load_state_dict(before)
    text = pairs_file.read_text()
    labels = write("labels.csv", text[::-1].replace("1\n"[::-1], "0\n"[::-1], 5)[::-1])  # the last ones are others
    for other, said in (
        (made(accumulated=2), r"accumulated batches 1 \(now 2\)"),
        (made(limit=1), r"limit_train_batches 1.0 \(now 1\)"),
        (made(symmetric=True), r"symmetric False \(now True\)"),
        (made(twice=True), r"twice False \(now True\)"),
        (made(window=2), r"window 1 \(now 2\)"),
        (made(batch_by="tokens"), r"batch_by pairs \(now tokens\)"),
        (made(labels), "training tokens"),
    ):
        with pytest.raises(CheckpointError, match=said):
            other.load_state_dict(before)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    with pytest.raises(CheckpointError, match=r"seed \d \(now 7\)"):
        made().load_state_dict(before)


@pytest.mark.parametrize(("limit", "expected"), [(2, 2), (0.7, 8), (40, 12), (1.0, 12)])
def test_an_epoch_has_the_batches_that_the_trainer_takes(pairs_file: Path, limit: float, expected: int):
    """And no more at its end, where a run that goes on asks for one."""
    data = PairDataModule(str(pairs_file), backbone=BACKBONE, batch_size=4)
    data.trainer = trainer(limit_train_batches=limit)
    data.setup("fit")
    loader = data.train_dataloader()
    assert [len(list(loader)) for _ in range(2)] == [expected, 0]
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == expected


def test_a_size_that_nothing_is_cut_off_by_is_told(pairs_file: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        rows_of(PairDataModule(str(pairs_file), val_source=str(pairs_file), val_size=9, test_size=9, backbone=BACKBONE))
    told = [line for line in caplog.messages if "is not used" in line]
    assert told == ["--data.val_size 9 is not used, since the dev pairs have their own source"]


def test_pairs_that_follow_from_others_are_added_where_it_is_asked_for(write):
    source = write("pairs.csv", "question1,question2,label\na,b,1\nb,c,1\n")
    settings = {"val_size": 0, "test_size": 0, "backbone": BACKBONE}
    found = [rows_of(PairDataModule(str(source), transitive=asked, **settings)) for asked in (False, True)]
    assert found == [{"train": 2}, {"train": 3}]
    # What a training pair and a dev pair would make together is not made.
    rows = "b,c,1\nx,y,0\na,b,1\nd,e,1\ne,f,1\n"
    apart = write("apart.csv", "question1,question2,label\n" + rows)
    data = PairDataModule(str(apart), transitive=True, **settings | {"val_size": 1, "test_size": 1})
    assert rows_of(data) == {"train": 4, "val": 1, "test": 1}
    made = data.tables["train"][3:]
    assert set(zip(made["text_a"], made["text_b"], strict=True)) <= {("d", "f"), ("f", "d")}
    # Nor is a dev or a test pair, which would be trained on then.
    inside = write("inside.csv", "question1,question2,label\nA,c,1\nd, B,1\na,b,1\nb,c,1\nc,d,1\n")
    data = PairDataModule(str(inside), transitive=True, **settings | {"val_size": 1, "test_size": 1})
    assert rows_of(data) == {"train": 4, "val": 1, "test": 1}
    (made,) = data.tables["train"].select([3])
    assert {made["text_a"], made["text_b"]} == {"a", "d"}


def test_a_limit_that_predict_takes_over_from_a_run_is_told(pairs_file: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="crossenc"):
        PairDataModule(str(pairs_file), limit=7, backbone=BACKBONE).setup("predict")
    assert caplog.text.endswith("data.limit 7: no pairs after the first 7 are scored\n")


def test_predict_needs_no_labels_and_takes_named_columns(write):
    source, columns = write("pairs.csv", "left,right\na,b\n"), {"text_a": "left", "text_b": "right"}
    data = PairDataModule(str(source), columns=columns, backbone=BACKBONE)
    data.trainer = trainer(TrainerFn.PREDICTING)
    data.setup("predict")
    assert len(data.encoded["predict"]) == 1
    alone = PairDataModule(str(source), columns=columns, backbone=BACKBONE)
    alone.setup("predict")  # without a Trainer
    (batch,) = alone.predict_dataloader()
    assert batch["row"].tolist() == [0]


def test_what_is_cut_is_told_and_what_cannot_be_trained_is_refused(pairs_file: Path, caplog: pytest.LogCaptureFixture):
    data = PairDataModule(str(pairs_file), max_length=16, backbone=BACKBONE)
    with caplog.at_level(logging.INFO, logger="crossenc"):
        data.setup("fit")
    assert "train pairs are longer than 16 tokens and are truncated" in caplog.text
    data.trainer = trainer(world_size=7)
    with pytest.raises(DataError, match="6 dev pairs are too few for 7 devices"):
        data.val_dataloader()
    with pytest.raises(DataError, match="there are no training pairs"):
        PairDataModule("", val_source=str(pairs_file), backbone=BACKBONE).setup("fit")

"""The module's loss, its dropout and the shape of its output."""

from __future__ import annotations

import copy
import platform
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForSequenceClassification

from crossenc import PairDataModule, export, score
from crossenc.backbone import load_tokenizer
from crossenc.calibration import Calibration
from crossenc.checkpoints import read_checkpoint
from crossenc.errors import BackboneError, CheckpointError, UsageError
from crossenc.module import CrossEncoderModule, _hardware, disagreement
from crossenc.optim import share_segments

from .conftest import BACKBONE, collate, fail

# Of a Trainer whose run leaves nothing but what the test asks for.
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


def test_loss_is_bce_with_weight_and_smoothing():
    module = CrossEncoderModule(BACKBONE, pos_weight=3.0, label_smoothing=0.2)
    logits, labels = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.0, 0.5])
    assert torch.equal(module.eval().loss(logits, labels), nn.BCEWithLogitsLoss(reduction="none")(logits, labels))
    plain = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0), reduction="none")
    smoothed = plain(logits, torch.tensor([0.9, 0.1, 0.5]))
    assert torch.allclose(module.train().loss(logits, labels), smoothed, atol=1e-6)


def test_dropout_is_on_in_training_and_one_pair_makes_one_logit():
    module = CrossEncoderModule(BACKBONE)
    batch = collate([("one text", "another")], BACKBONE)
    assert module.model.training
    assert module(batch).shape == (1,)
    assert not torch.equal(module(batch), module(batch))
    module.eval()
    assert torch.equal(module(batch), module(batch))
    module = CrossEncoderModule(BACKBONE, dropout=0.3)
    assert {part.p for part in module.modules() if isinstance(part, nn.Dropout)} == {0.3}


def test_a_dropout_that_would_replace_nothing_is_refused(tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch):
    model = nn.Identity()
    model.config = SimpleNamespace(model_type="llama")
    monkeypatch.setattr("crossenc.module.load_model", lambda *_: model)
    with pytest.raises(UsageError, match=r"model\.dropout: llama has no dropout to replace"):
        CrossEncoderModule(tiny_backbone, dropout=0.1)


def test_first_layers_are_frozen():
    module = CrossEncoderModule(BACKBONE, freeze_layers=2, gradient_checkpointing=True, attn_implementation="eager")
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if "embeddings" in name or ".layer.0." in name or ".layer.1." in name]
    assert any(".layer.2." in name for name in trained)
    assert module.model.is_gradient_checkpointing
    assert module.model.config.use_cache is False  # or transformers warns, with this attention
    for count in (7, -1):
        with pytest.raises(BackboneError, match=f"freeze_layers must be 0 to 6, the backbone's layers, not {count}"):
            CrossEncoderModule(BACKBONE, freeze_layers=count)


def test_shared_segments_leave_the_order_of_texts_to_positions():
    module = CrossEncoderModule(BACKBONE, shared_segments=True).eval()
    plain = CrossEncoderModule(BACKBONE).eval()
    table = module.model.bert.embeddings.token_type_embeddings.weight
    assert torch.equal(table, plain.model.bert.embeddings.token_type_embeddings.weight[:1].expand(2, -1))
    assert not table.requires_grad
    plain.model.load_state_dict(module.model.state_dict())
    batch = collate([("one text", "another"), ("a second", "and a third")], BACKBONE)
    others = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    assert torch.equal(plain(batch), plain(others))
    with torch.no_grad():  # RoBERTa and its kind have one segment
        plain.model.bert.embeddings.token_type_embeddings = nn.Embedding(1, 384)
    share_segments(plain.model)


def test_the_optimizer_and_its_schedule_are_those_that_were_asked_for(tiny_backbone: Path):
    rates = {"learning_rate": 1e-3, "layer_decay": 0.5, "head_rate": 4.0, "warmup": 4}
    kinds = {"optimizer": "RAdam", "schedule": "constant_with_warmup"}
    module = CrossEncoderModule(str(tiny_backbone), weight_decay=0.1, **rates, **kinds)
    module.trainer = SimpleNamespace(precision="32-true", estimated_stepping_batches=10, datamodule=None)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert type(optimizer) is torch.optim.RAdam
    assert {(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (rate, decay) for rate in (4e-3, 5e-4, 2.5e-4, 1.25e-4) for decay in (0.1, 0.0)
    }
    assert schedule["interval"] == "step"
    for share in (0, 0.25, 0.5, 0.75, 1, 1):
        assert schedule["scheduler"].get_last_lr()[0] == pytest.approx(4e-3 * share)
        optimizer.step()
        schedule["scheduler"].step()
    module.hparams["optimizer"], module.trainer.precision = "AdamW", "16-mixed"
    assert not module.configure_optimizers()["optimizer"].defaults["fused"]  # which Lightning could not clip


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ({}, 16),  # two more epochs of five batches, two to a step
        ({"max_steps": 12}, 12),
        ({"max_epochs": 1}, 10),  # as many are over
        ({"max_epochs": -1, "max_steps": 99}, 77),  # as Lightning plans it
        ({"datamodule": SimpleNamespace(begun=(0, 0))}, 77),
    ],
)
def test_a_run_with_other_batches_plans_the_steps_that_are_left(
    tiny_backbone: Path, changed: dict[str, Any], steps: int
):
    module = CrossEncoderModule(tiny_backbone)
    plan = {"max_epochs": 4, "max_steps": -1, "num_training_batches": 5, "accumulate_grad_batches": 2}
    plan |= {"estimated_stepping_batches": 77, "datamodule": SimpleNamespace(begun=(10, 2))}
    module.trainer = SimpleNamespace(**plan | changed)
    assert module.planned_steps() == steps


class Stopping(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 3


def test_the_loss_is_logged_where_loggers_get_it_and_validate_returns_figures(
    tiny_backbone: Path, pairs_file: Path, tmp_path: Path
):
    steps = []

    class Telling(CrossEncoderModule):
        def log(self, name: str, *values, **options) -> None:
            steps.extend([self.trainer.global_step] * (name == "train/loss"))
            super().log(name, *values, **options)

    data = PairDataModule(str(pairs_file), batch_size=6, backbone=str(tiny_backbone))
    first = Trainer(max_steps=8, log_every_n_steps=3, **QUIET)
    first.fit(Telling(str(tiny_backbone)), data)
    assert steps == [0, 2, 5, 7]
    first.save_checkpoint(tmp_path / "first.ckpt")
    steps.clear()
    module = Telling(str(tiny_backbone))
    second = Trainer(max_epochs=2, log_every_n_steps=5, **QUIET)
    second.fit(module, data, ckpt_path=tmp_path / "first.ckpt")
    assert steps == [8, 9, 14, 15]
    steps.clear()
    Trainer(max_steps=4, log_every_n_steps=3, **QUIET).fit(Telling(str(tiny_backbone)), data)
    assert steps == [0, 2, 3]  # Lightning logs the last step too
    steps.clear()
    Trainer(max_steps=4, log_every_n_steps=0, **QUIET).fit(Telling(str(tiny_backbone)), data)
    assert steps == [0, 3]  # for a progress bar, and no logger
    steps.clear()
    stopping = Trainer(max_steps=8, min_steps=5, log_every_n_steps=3, callbacks=[Stopping()], **QUIET)
    stopping.fit(Telling(str(tiny_backbone)), data)
    assert steps == [0, 2, 3, 4, 5, 6, 7]  # and those after a wish to stop
    assert {"val/loss", "val/average_precision"} <= set(second.validate(module, data, verbose=False)[0])


def test_a_fit_begins_without_what_an_earlier_one_found(tiny_backbone: Path, pairs_file: Path, tmp_path: Path):
    """From Python, with one module and one data module: a test and a fit before, the fit from a checkpoint."""
    quiet = {**QUIET, "max_steps": 4, "val_check_interval": 2}
    data = PairDataModule(str(pairs_file), batch_size=6, backbone=str(tiny_backbone))
    module = CrossEncoderModule(tiny_backbone, learning_rate=np.float64(1e-3))
    Trainer(**quiet).predict(module, data)
    Trainer(**quiet).test(module, data, verbose=False)
    first = Trainer(**quiet)
    first.fit(module, data)
    assert "test/f1" not in module.figures
    first.save_checkpoint(tmp_path / "first.ckpt")
    assert read_checkpoint(tmp_path / "first.ckpt")["hyper_parameters"]["learning_rate"] == 1e-3
    Trainer(**quiet).fit(module, data, ckpt_path=tmp_path / "first.ckpt")  # which has taken all steps
    kept = read_checkpoint(tmp_path / "first.ckpt")["crossenc"]
    assert module.evaluation() == {name: kept[name] for name in ("threshold", "calibration", "figures")}
    assert kept["figures"]["val/threshold"] == kept["threshold"]
    Trainer(**quiet | {"max_steps": 8}).fit(module, data, ckpt_path=tmp_path / "first.ckpt")
    assert module.evaluation()["threshold"] == module.threshold
    rows = []
    module.on_train_batch_start = lambda batch, _: rows.extend(batch["row"].tolist())
    last = Trainer(**quiet | {"max_steps": 8}, limit_val_batches=0)  # as many steps, and no validation
    last.fit(module, data)
    assert sorted(rows) == sorted(data.encoded["train"]["row"])  # a whole epoch
    last.save_checkpoint(tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["crossenc"]["threshold"] is None


def quick_fit(module: CrossEncoderModule, data: PairDataModule, folder: Path) -> Trainer:
    """A few steps from Python, and `folder/last.ckpt`."""
    trainer = Trainer(max_steps=2, **QUIET)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


class OwnLoss(CrossEncoderModule):
    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.criterion = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0), reduction="none")

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(logits, labels)


class OwnHead(CrossEncoderModule):
    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


class WiderHead(CrossEncoderModule):
    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.model.classifier = nn.Linear(32, 2)


class OwnForward(CrossEncoderModule):
    def forward(self, batch: Any) -> torch.Tensor:
        return 4 * super().forward(batch)


def test_a_subclass_is_exported_unless_it_scores_in_a_way_of_its_own(
    tiny_backbone: Path, pairs_file: Path, tmp_path: Path
):
    data = PairDataModule(str(pairs_file), batch_size=6, backbone=str(tiny_backbone))
    module = OwnLoss(tiny_backbone)
    trainer = quick_fit(module, data, tmp_path)
    found = trainer.predict(module, PairDataModule(str(pairs_file), backbone=str(tiny_backbone)))
    trainer.test(module, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)  # with all that the subclass has
    export(tmp_path / "last.ckpt", tmp_path / "model")
    expected = torch.cat([part["score"][part["row"].argsort()] for part in found])
    assert score(tmp_path / "model", pairs_file) == pytest.approx(expected.numpy(), abs=1e-6)
    quick_fit(OwnForward(tiny_backbone), data, tmp_path)
    with pytest.raises(CheckpointError, match="the forward of a subclass, OwnForward, which an export cannot contain"):
        export(tmp_path / "last.ckpt", tmp_path / "other")
    for kind, layer in ((OwnHead, r"classifier\.0\.bias"), (WiderHead, r"classifier\.bias")):
        quick_fit(kind(tiny_backbone), data, tmp_path)
        with pytest.raises(CheckpointError, match=rf"differ in their layers, such as model\.{layer}"):
            export(tmp_path / "last.ckpt", tmp_path / "other")


class OwnSettings(CrossEncoderModule):
    def __init__(self, backbone: str, gamma: float = 2.0):
        super().__init__(backbone, learning_rate=1e-3)


def test_a_lightning_cli_makes_a_subclass_with_settings_of_its_own(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["train.py", f"--model.backbone={tiny_backbone}"])
    more: dict[str, Any] = {"save_config_callback": None, "seed_everything_default": False, "trainer_defaults": QUIET}
    made = LightningCLI(OwnSettings, run=False, **more).model.hparams
    assert type(OwnSettings(tiny_backbone).hparams["backbone"]) is str  # though it is given a Path
    assert (made["backbone"], made["gamma"], made["learning_rate"]) == (str(tiny_backbone), 2.0, 1e-3)


def test_numbers_from_numpy_are_plain_in_a_checkpoint(tiny_backbone: Path, pairs_file: Path, tmp_path: Path):
    numbers = {"batch_size": np.int64(6), "window": np.int64(1), "limit": np.int64(50)}
    data = PairDataModule(str(pairs_file), backbone=str(tiny_backbone), **numbers)
    quick_fit(CrossEncoderModule(tiny_backbone, lora={"r": np.int64(2)}), data, tmp_path)
    known = read_checkpoint(tmp_path / "last.ckpt")
    assert known["hyper_parameters"]["lora"] == {"r": 2}
    assert known["PairDataModule"]["plan"]["batch_size"] == 6


def test_a_checkpoint_gives_back_what_lora_was_made_of(tiny_backbone: Path, pairs_file: Path, tmp_path: Path):
    lora = {"r": 2, "lora_dropout": 0.1, "target_modules": ["query", "0"], "alpha_pattern": {"query": 4}}
    lora |= {"layers_to_transform": [0], "trainable_token_indices": {"word_embeddings": [5, 7]}}
    data = PairDataModule(str(pairs_file), backbone=str(tiny_backbone), batch_size=6)
    quick_fit(CrossEncoderModule(tiny_backbone, lora=lora), data, tmp_path)
    assert CrossEncoderModule.load_from_checkpoint(tmp_path / "last.ckpt").hparams["lora"] == lora


@pytest.mark.parametrize("as_text", [False, True])
def test_no_object_is_made_of_what_a_checkpoint_names(
    as_text: bool, tiny_backbone: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """jsonargparse, which both commands give a checkpoint's settings to, makes objects of `Any` and of its YAML."""
    own = tmp_path / "own.txt"
    own.write_text("precious")
    data = PairDataModule(str(pairs_file), backbone=str(tiny_backbone))
    quick_fit(CrossEncoderModule(tiny_backbone), data, tmp_path)
    loaded = read_checkpoint(tmp_path / "last.ckpt")
    emptied = {"class_path": "zipfile.ZipFile", "init_args": {"file": str(own), "mode": "w"}}
    loaded["hyper_parameters"]["lora"] = {"r": str(emptied) if as_text else emptied}
    loaded["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    torch.save(loaded, tmp_path / "last.ckpt")
    evaluated = ["--data.val_source", str(pairs_file), "--model.backbone", str(tiny_backbone)]
    evaluated += ["--ckpt_path", str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "runs")]
    for words in (
        ["score", str(tmp_path / "last.ckpt"), str(pairs_file), str(tmp_path / "scores.csv")],
        ["validate", *evaluated, "--trainer.accelerator", "cpu"],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jsonargparse's, which as an error would keep it from making anything
            assert "lora" in fail(capsys, *words)
        assert own.read_text() == "precious"


def test_a_fit_without_dev_pairs_leaves_the_trainer_as_it_was(tiny_backbone: Path, pairs_file: Path, tmp_path: Path):
    make = {"backbone": str(tiny_backbone), "batch_size": 6}
    module = CrossEncoderModule(tiny_backbone)
    trainer = quick_fit(module, PairDataModule(str(pairs_file), val_size=0, test_size=0, **make), tmp_path)
    (found,) = trainer.validate(module, PairDataModule("", val_source=str(pairs_file), **make), verbose=False)
    assert found["val/rows"] == 60
    module.training_step = lambda *_: 1 / 0
    data = PairDataModule(str(pairs_file), val_size=0, test_size=0, **make)
    trainer = Trainer(max_steps=2, **QUIET)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, data)
    assert trainer.limit_val_batches == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit_val_batches": 0.5}, "limit_val_batches would take only the longest pairs"),
        ({"limit_val_batches": 1}, "limit_val_batches would take only the longest pairs"),  # which is not 1.0
        ({"overfit_batches": 2}, "overfit_batches would break up the batches"),
    ],
)
def test_no_part_of_the_batches_is_evaluated(
    tiny_backbone: Path, pairs_file: Path, options: dict[str, float], said: str
):
    data = PairDataModule(str(pairs_file), backbone=str(tiny_backbone))
    with pytest.raises(UsageError, match=said):
        Trainer(**{**QUIET, **options}).validate(CrossEncoderModule(tiny_backbone), data)
    some = Trainer(**QUIET, limit_predict_batches=1, limit_test_batches=1)  # concerns no figure
    some.predict(CrossEncoderModule(tiny_backbone), data)


def test_pairs_are_of_the_modules_tokens(tiny_backbone: Path, pairs_file: Path, tmp_path: Path):
    tokenizer = copy.deepcopy(load_tokenizer(str(tiny_backbone)))
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(tiny_backbone / "config.json", tmp_path)
    data = PairDataModule("", val_source=str(pairs_file), backbone=str(tmp_path))
    with pytest.raises(UsageError, match="different tokenizers; give PairDataModule"):
        Trainer(**QUIET).validate(CrossEncoderModule(tiny_backbone), data)


def test_lora_trains_a_new_head_whatever_it_is_called(tmp_path: Path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    config = T5Config(**sizes, vocab_size=len(load_tokenizer(BACKBONE)), num_labels=1, decoder_start_token_id=0)
    T5ForSequenceClassification(config).save_pretrained(tmp_path)
    module = CrossEncoderModule(tmp_path, max_length=32, lora={"r": 2, "target_modules": ["q"]})
    trained = {name for name, part in module.named_parameters() if part.requires_grad}
    assert any("classification_head" in name for name in trained)
    module = CrossEncoderModule(BACKBONE, lora={"r": 2, "modules_to_save": ["classifier", "pooler"]})
    assert any("pooler" in name for name, part in module.named_parameters() if part.requires_grad)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_gradients_are_clipped_by_value_and_by_norm(tiny_backbone: Path, precision: str):
    module = CrossEncoderModule(str(tiny_backbone))
    module.trainer = Trainer(precision=precision, **QUIET)
    weights = list(module.parameters())
    for algorithm, norm in (("norm", 0.5), ("value", 0.5 * sum(part.numel() for part in weights) ** 0.5)):
        for part in weights:
            part.grad = torch.full_like(part, 2.0)
        module.configure_gradient_clipping(torch.optim.SGD(weights), 0.5, algorithm)
        assert nn.utils.get_total_norm([part.grad for part in weights]).item() == pytest.approx(norm, rel=1e-2)
        clipped = [part.grad.clone() for part in weights]
        module.configure_gradient_clipping(torch.optim.SGD(weights), -1.0, algorithm)  # no clipping, in Lightning too
        assert all(torch.equal(part.grad, before) for part, before in zip(weights, clipped, strict=True))


def validated(module: CrossEncoderModule, logits: torch.Tensor, labels: torch.Tensor, **state: bool) -> None:
    """Let the module look at a validation's end at logits of dev pairs."""
    state = {"sanity_checking": False, "global_step": 7, "state": SimpleNamespace(fn=TrainerFn.FITTING), **state}
    module.trainer = SimpleNamespace(**state)
    module.log_dict = lambda *_, **__: None
    module.metrics.update(torch.arange(len(logits)), logits, labels, torch.zeros_like(logits))
    module.on_validation_epoch_end()


def test_dev_pairs_choose_calibration_and_threshold(tiny_backbone: Path):
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2_000, generator=draw)
    labels = (torch.rand(2_000, generator=draw) < (logits / 3 + 1).sigmoid()).float()
    module = CrossEncoderModule(str(tiny_backbone))
    validated(module, logits, labels, sanity_checking=True)  # a few batches, that choose nothing
    assert (module.threshold, module.calibration, module.figures) == (None, Calibration(), {})
    assert module.evaluation()["threshold"] is None
    validated(module, logits, labels)
    assert module.calibration == pytest.approx((1 / 3, 1), abs=0.15)
    assert module.figures["val/rows"] == 2_000
    module.metrics.update(torch.arange(2_000), logits, labels, logits)
    module.on_test_epoch_end()
    assert module.figures["test/brier"] == pytest.approx(module.figures["val/brier"], abs=1e-3)
    assert module.figures["test/brier"] < module.figures["test/brier_raw"] - 0.01
    chosen = module.threshold
    assert module.evaluation() == {
        "threshold": chosen, "calibration": list(module.calibration), "figures": module.figures,
    }  # fmt: skip
    validated(module, logits, torch.ones(2_000))  # of one label they choose no other threshold, and no calibration
    assert (module.threshold, module.calibration) == (chosen, Calibration())
    assert (module.figures["val/threshold"], module.figures["val/rows"]) == (chosen, 2_000)
    module.trainer.global_step = 8  # the weights have moved on
    assert module.evaluation() == {"threshold": None, "calibration": [1, 0], "figures": {}}
    plain = CrossEncoderModule(str(tiny_backbone), calibrate=False)
    validated(plain, logits, labels)
    assert plain.calibration == Calibration()
    module.model.classifier = nn.Linear(32, 1, bias=False)  # has no place for a shift
    validated(module, logits, labels)
    assert module.calibration.shift == 0
    assert module.calibration.scale != 1
    module.model.classifier = nn.Identity()  # has none for a scale either
    validated(module, logits, labels)
    assert module.calibration == Calibration()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pos_weight": 0}, "pos_weight must be above 0 and finite, not 0"),
        ({"head_rate": 0}, "head_rate must be above 0 and finite, not 0"),
        ({"warmup": -1}, "warmup must be at least 0 and finite, not -1"),
        ({"warmup": float("nan")}, "warmup must be at least 0 and finite, not nan"),
        ({"weight_decay": -1}, "weight_decay must be at least 0 and finite, not -1"),
        ({"consistency": -1}, "consistency must be at least 0 and finite, not -1"),
        ({"consistency": 1, "dropout": 0.0}, "consistency"),  # of which the term is nothing
        ({"layer_decay": 0}, r"layer_decay must be in \(0, 1\], not 0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], not 1.1"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), not 1"),
    ],
)
def test_a_number_out_of_its_range_is_named(tiny_backbone: Path, wrong: dict[str, float], said: str):
    with pytest.raises(UsageError, match=rf"model\.{said}"):
        CrossEncoderModule(str(tiny_backbone), **wrong)


@pytest.mark.parametrize(
    ("module", "data", "said"),
    [
        ({"consistency": 1.0}, {}, "twice=True"),
        ({}, {"twice": True}, "twice=False"),
        ({"symmetric": True}, {}, "symm"),
        ({"max_length": 16}, {}, "max_length=16"),
        ({}, {"backbone": BACKBONE}, "backbone='/"),
    ],
)
def test_from_python_the_data_must_have_the_modules_options(
    tiny_backbone: Path, pairs_file: Path, module: dict[str, Any], data: dict[str, Any], said: str
):
    pairs = PairDataModule(str(pairs_file), **{"backbone": str(tiny_backbone), **data})
    with pytest.raises(UsageError, match=f"different options; give PairDataModule.{said}"):
        Trainer(max_steps=1, **QUIET).fit(CrossEncoderModule(str(tiny_backbone), **module), pairs)


def test_a_loader_of_ones_own_gives_what_a_tokenizer_makes(tiny_backbone: Path):
    tokenizer, module = load_tokenizer(str(tiny_backbone)), CrossEncoderModule(tiny_backbone)
    texts = [("one text", "another"), ("a second one, which is longer", "and a third"), ("short", "")]
    packed = collate(texts, str(tiny_backbone))
    with torch.no_grad():
        own = tokenizer(texts, padding=True, return_tensors="pt")
        assert torch.allclose(module.eval()(own)[packed["row"]], module(packed), atol=1e-6)
    pairs = [{**{name: own[name][i] for name in own}, "label": i % 2.0, "row": i} for i in range(len(texts))]
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(module.train(), DataLoader(pairs, 2), DataLoader(pairs, 2))
    assert trainer.global_step == 4
    assert trainer.callback_metrics["val/rows"] == 3


def test_bf16_ends_before_the_loss():
    module = CrossEncoderModule(BACKBONE)
    batch = collate([("one text", "another"), ("a second", "and a third")], BACKBONE)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.model(input_ids=batch["input_ids"][None]).logits.dtype == torch.bfloat16
        logits = module(batch)
        assert logits.dtype == module.predict_step(batch, 0)["score"].dtype == torch.float32
        assert module.loss(logits, batch["label"].float()).dtype == torch.float32


def test_a_card_tells_that_a_mac_trained_on_its_gpu():
    assert _hardware(torch.device("mps")) == f"{platform.machine()}, mps"
    assert _hardware(torch.device("cpu")).endswith(" threads")


def test_the_consistency_term_is_r_drops():
    one, other = torch.randn(2, 50)
    p, q = (torch.distributions.Bernoulli(logits=some) for some in (one, other))
    kl = torch.distributions.kl_divergence
    assert torch.allclose(disagreement(one, other), (kl(p, q) + kl(q, p)) / 2, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_pair_that_comes_twice_weighs_once(symmetric: bool, pairs_file: Path):
    """Without dropout the loss is the plain one's mean over both orders, and R-Drop's term between them."""
    data = PairDataModule(str(pairs_file), batch_size=60, backbone=BACKBONE, symmetric=symmetric, twice=True)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    module = CrossEncoderModule(BACKBONE, symmetric=symmetric, consistency=3.0).eval()
    logits = dict(zip(batch["row"].tolist(), module(batch), strict=True)) if symmetric else None
    module.log = lambda *_, **__: None
    loss = module.training_step(batch, 0)
    labels = dict(zip(batch["row"].tolist(), batch["label"], strict=True))
    pairs = [row for row in labels if row >= 0]
    assert len(batch["label"]) == 96
    assert len(pairs) == 48
    if symmetric:
        one, other = (torch.stack([logits[way(row)] for row in pairs]) for way in (int, lambda row: ~row))
        truth = torch.stack([labels[row] for row in pairs])
        expected = (module.loss(one, truth) + module.loss(other, truth)) / 2 + 3 * disagreement(one, other)
        assert (one - other).abs().max() > 1e-4
    else:
        expected = module.loss(module(batch), batch["label"])
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    # In an epoch whose batches have 24 pairs on average, each of these pairs still weighs as much as another's.
    assert module.training_step({**batch, "mean_pairs": 24}, 0).item() == pytest.approx(2 * loss.item(), rel=1e-5)

"""Weights in shards on two real processes (gloo): the same folder at the end as on one device."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from crossenc import CrossEncoderModule

from .conftest import flags, kill_runs, logged, run_on


def test_each_layer_is_gathered_by_itself(tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch):
    units, module = [], CrossEncoderModule(str(tiny_backbone))
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *given: given)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda part, mesh: units.append((part, mesh)))
    module.configure_model()
    assert not units  # a strategy without a mesh
    module._device_mesh, module.trainer = object(), SimpleNamespace(world_size=2)
    module.configure_model()
    assert units == [(part, ("cpu", (2,))) for part in (*module.model.bert.encoder.layer, module)]


def test_a_sharded_run_saves_and_exports_what_one_device_does(pairs_file: Path, tiny_backbone: Path, tmp_path: Path):
    """The folder of a fit, with whole weights and optimizer states under the same names and shapes."""
    found = {}
    for devices, strategy in ((1, "auto"), (2, "fsdp")):
        named = {
            "data.source": pairs_file,
            "data.batch_size": 8 // devices,
            "model.backbone": tiny_backbone,
            "model.weight_decay": 0.01,
            "trainer.precision": "bf16-mixed",
            "trainer.strategy": strategy,
            "output": tmp_path,
            "run": strategy,
        }
        run_on(devices, ["fit", *flags(named)], tmp_path / "log")
        folder = tmp_path / strategy
        checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        (optimizer,) = checkpoint["optimizer_states"]
        found[strategy] = {
            "files": {path.relative_to(folder) for path in folder.rglob("*") if "tfevents" not in path.name},
            "weights": {name: value.shape for name, value in checkpoint["state_dict"].items()},
            # Numbers of parameters count in another order, which loading goes through as well.
            "moments": [
                [(group["weight_decay"], optimizer["state"][number]["exp_avg"].shape) for number in group["params"]]
                for group in optimizer["param_groups"]
            ],
            "export": {name: value.shape for name, value in load_file(folder / "model" / "model.safetensors").items()},
        }
        best = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
        exported = load_file(folder / "model" / "model.safetensors")
        assert all(torch.equal(best[f"model.{name}"], value) for name, value in exported.items())
    assert found["fsdp"] == found["auto"]


def test_a_sharded_run_that_goes_on_with_other_batches_still_learns(
    pairs_file: Path, tiny_backbone: Path, tmp_path: Path
):
    """Its checkpoint is read when the schedule is made already. 48 pairs: two epochs of 12 steps, and two of 2."""
    command = ["fit", f"--data.source={pairs_file}", f"--model.backbone={tiny_backbone}", f"--output={tmp_path}"]
    command += ["--run=run", "--trainer.strategy=fsdp", "--trainer.log_every_n_steps=1"]
    run_on(2, [*command, "--data.batch_size=2", "--trainer.max_epochs=2"], tmp_path / "log")
    more = ["--data.batch_size=12", "--trainer.max_epochs=4", "--on_mismatch=continue", "--ckpt_path=last"]
    run_on(2, [*command, *more], tmp_path / "log")
    *_, last_but_one, last = logged(tmp_path / "run", "train/lr").values()
    assert last_but_one == pytest.approx(2 * last)
    assert last > 0


def test_devices_that_shard_evaluate_in_equally_many_parts(
    pairs_file: Path, tiny_backbone: Path, tmp_path: Path, write
):
    """The dev pairs of the first device have one length, without padding, and those of the second have two."""
    rows = [*[("how do i swim", "how do i run")] * 299, ("how do i", "run")]
    texts = (f"{a},{b},{number % 2}\n" for number, (a, b) in enumerate(rows))
    dev = write("dev.csv", "question1,question2,is_duplicate\n" + "".join(texts))
    sources = {"data.source": pairs_file, "data.val_source": dev, "data.test_source": pairs_file}
    options = {**sources, "model.backbone": tiny_backbone, "trainer.strategy": "fsdp", "trainer.max_steps": 1}
    run_on(2, ["fit", *flags(options | {"output": tmp_path})], tmp_path / "log")


def test_a_killed_sharded_run_ends_with_the_same_bits():
    seed = os.environ.get("CROSSENC_TEST_SEED", "0")
    kill_runs("--trials=1", "--epochs=2", "--processes=2", "--strategy=fsdp", f"--seed={seed}")

"""Exports in the hands of those who read them: sentence-transformers, transformers, its pipeline."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from crossenc import export, exporting
from crossenc.backbone import load_tokenizer
from crossenc.checkpoints import read_checkpoint
from crossenc.cli import main
from crossenc.errors import CheckpointError, ExportError, OutputError, UsageError
from crossenc.exporting import score_pairs
from crossenc.module import CrossEncoderModule
from crossenc.parts import folder_beside

from .conftest import BACKBONE, collate, edit_json

pytestmark = pytest.mark.usefixtures("no_pictures")

PAIRS = [
    ("How do I learn to swim?", "What is the best way to learn swimming?"),
    ("How do I learn to swim?", ""),
    ("word " * 500, "other " * 500),
    ("short", "very long " * 300),
    ("¿Qué? 🙂", "这是什么 🙃"),
]


def module_scores(checkpoint: Path, pairs: list[tuple[str, str]]) -> list[float]:
    module = CrossEncoderModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    batch = collate(pairs, module.hparams["backbone"], max_length=module.max_length)
    with torch.inference_mode():
        return module.predict_step(batch, 0)["score"][batch["row"].argsort()].tolist()


def peer_scores(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu").predict([list(pair) for pair in pairs]).tolist()


def test_sentence_transformers_gives_the_modules_scores(trained: Path):
    from sentence_transformers import CrossEncoder

    expected, peer = module_scores(trained / "best.ckpt", PAIRS), CrossEncoder(str(trained / "model"), device="cpu")
    assert peer.predict(PAIRS) == pytest.approx(expected, abs=1e-5)
    assert [peer.predict(pair) for pair in PAIRS] == pytest.approx(expected, abs=1e-5)
    assert score_pairs(trained / "model", PAIRS) == pytest.approx(expected, abs=1e-5)


def test_the_pipeline_gives_the_modules_scores(trained: Path):
    from transformers import pipeline

    scorer = pipeline("text-classification", model=str(trained / "model"), device="cpu")
    pairs = [(a, b) for a, b in PAIRS if b]  # the pipeline reads an empty second text as none at all
    pairs.append(("long " * 600, "b"))
    found = [scorer({"text": a, "text_pair": b}, truncation=True)["score"] for a, b in pairs]
    assert found == pytest.approx(module_scores(trained / "best.ckpt", pairs), abs=1e-5)


def test_transformers_4_knows_the_tokenizers_class_and_its_inputs(tiny_backbone: Path, tmp_path: Path):
    backbone, export = shutil.copytree(tiny_backbone, tmp_path / "backbone"), tmp_path / "export"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": None}
    edit_json(backbone / "tokenizer_config.json", **settings)
    tokenizer = copy.deepcopy(load_tokenizer(str(backbone)))
    assert type(tokenizer).__name__ == "TokenizersBackend"
    exporting._write(export, CrossEncoderModule(str(backbone)), tokenizer)
    written = json.loads((export / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == tokenizer.model_input_names
    assert load_tokenizer(str(export))("a b", "c").data == tokenizer("a b", "c").data


def test_an_export_has_these_files_and_the_dev_threshold(trained: Path):
    folder = trained / "model"
    config = json.loads((folder / "config.json").read_text())
    assert not [key for key in config if "attn" in key]
    figures = json.loads((trained / "metrics.json").read_text())
    assert config["crossenc"]["threshold"] == pytest.approx(figures["val/threshold"], abs=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "figures",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_an_export_is_refused_where_something_stands(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "model"
    (tmp_path / ".model-unfinished" / "new").mkdir(parents=True)  # left by one that was killed
    mask = os.umask(0o027)
    try:
        assert export(str(trained / "last.ckpt"), str(target)) == target
    finally:
        os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in target.iterdir() if path.is_file()}
    assert modes == {0o640}  # whoever may read one may read all, the weights too, and no one else
    with pytest.raises(ExportError, match="already exists"):
        export(str(trained / "last.ckpt"), str(target))
    before = load_tokenizer(str(target))
    assert main(["export", str(trained / "best.ckpt"), str(target), "--overwrite"]) == 0
    assert load_tokenizer(str(target)) is not before  # which may have been another one
    (tmp_path / "other").mkdir()
    with pytest.raises(ExportError, match="is not an export"):
        export(str(trained / "last.ckpt"), str(tmp_path / "other"), overwrite=True)
    monkeypatch.chdir(target)
    with pytest.raises(OutputError, match=r"^\. cannot be written"):  # where a process stands nothing can be put
        export(str(trained / "last.ckpt"), ".", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_an_export_that_another_one_dropped_is_none(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_card = exporting.write_card

    def late(*given: object) -> None:
        with folder_beside(tmp_path / "model"):  # of another one, which begins now
            write_card(*given)

    monkeypatch.setattr(exporting, "write_card", late)
    with pytest.raises(ExportError, match=r"another export to .*model has begun in the meantime"):
        export(str(trained / "last.ckpt"), str(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


def test_an_export_that_scores_otherwise_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting, "score_pairs", lambda folder, pairs: [1.0] * len(pairs))
    with pytest.raises(ExportError, match=r"differ by 0\.\d+ from the checkpoint's"):
        export(str(trained / "last.ckpt"), str(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OutputError, match=r"model cannot be written: .*No space left on device.*: free some space"):
        export(str(trained / "last.ckpt"), str(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


def test_options_that_need_others_are_named(trained: Path, write, tmp_path: Path):
    with pytest.raises(UsageError, match="give --push_to_hub"):
        export(str(trained / "best.ckpt"), str(tmp_path / "model"), private=True)
    with pytest.raises(UsageError, match="give --int8 too"):
        export(str(trained / "best.ckpt"), str(tmp_path / "model"), dev="gone.csv")
    for name, said in (("bad//name", "Repo id must"), ("name", "name the owner too, as in owner/name")):
        with pytest.raises(UsageError, match=said):
            export(str(trained / "best.ckpt"), str(tmp_path / "model"), push_to_hub=name)
    one = write("one.csv", "question1,question2,is_duplicate\na,b,1\nc,d,1\n")
    with pytest.raises(ExportError, match="all dev labels are the same"):
        export(str(trained / "best.ckpt"), str(tmp_path / "model"), int8=True, dev=str(one))
    assert [path.name for path in tmp_path.iterdir()] == ["one.csv"]


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "junk.ckpt").write_text("junk")
    (tmp_path / "table.ckpt").write_text("question1,question2\na,b\n")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({"crossenc": print}, tmp_path / "code.ckpt")  # which unpickling could run
    for name, said in (
        ("text.ckpt", "damaged or not a checkpoint"),
        ("junk.ckpt", "damaged or not a checkpoint"),
        ("table.ckpt", "damaged or not a checkpoint"),
        ("code.ckpt", "damaged or not a checkpoint"),
        ("other.ckpt", "not written by crossenc"),
    ):
        with pytest.raises(CheckpointError, match=said):
            export(str(tmp_path / name), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:  # as a GPU's tensors are marked
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        torch.save({"crossenc": torch.zeros(1)}, tmp_path / "gpu.ckpt")
    assert read_checkpoint(tmp_path / "gpu.ckpt")["crossenc"].device.type == "cpu"


def test_an_export_that_gives_no_number_is_refused(trained: Path, tmp_path: Path):
    """For one of the pairs that an export is checked with, and not the first."""
    loaded = torch.load(trained / "best.ckpt", weights_only=True)
    row = load_tokenizer(BACKBONE).convert_tokens_to_ids("es")
    loaded["state_dict"]["model.bert.embeddings.word_embeddings.weight"][row] = torch.nan
    torch.save(loaded, tmp_path / "nan.ckpt")
    with pytest.raises(ExportError, match="differ by nan"):
        export(str(tmp_path / "nan.ckpt"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["nan.ckpt"]


def test_the_threshold_of_an_export_is_not_that_of_what_is_trained_from_it(trained: Path, tmp_path: Path):
    assert "crossenc" in json.loads((trained / "model" / "config.json").read_text())
    exporting._write(tmp_path, CrossEncoderModule(str(trained / "model")), load_tokenizer(str(trained / "model")))
    assert "crossenc" not in json.loads((tmp_path / "config.json").read_text())


def test_lora_is_merged_at_export(pairs_file: Path, tmp_path: Path):
    from safetensors import safe_open

    arguments = ["--data.source", str(pairs_file), "--model.backbone", BACKBONE, "--output", str(tmp_path)]
    arguments += ["--model.lora", "{r: 4, target_modules: [query, value]}", "--model.learning_rate", "1e-2"]
    assert main(["fit", *arguments, "--run", "lora", "--trainer.precision", "32-true"]) == 0
    with safe_open(tmp_path / "lora" / "model" / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "lora" in name or "base_model" in name]  # noqa: SIM118
    expected = module_scores(tmp_path / "lora" / "best.ckpt", PAIRS)
    assert peer_scores(tmp_path / "lora" / "model", PAIRS) == pytest.approx(expected, abs=1e-5)


def test_real_pairs_train_export_and_agree(quora: Path, tmp_path: Path):
    from crossenc.pairs import read

    lines = (quora / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "test.tsv").write_text("".join(lines[:201]), encoding="utf-8")
    arguments = ["--data.source", str(quora / "train.tsv"), "--data.test_source", str(tmp_path / "test.tsv")]
    arguments += ["--data.limit", "600", "--data.val_size", "100", "--model.backbone", BACKBONE]
    arguments += ["--model.freeze_layers", "3", "--model.learning_rate", "1e-4", "--model.max_length", "64"]
    assert main(["fit", *arguments, "--output", str(tmp_path), "--run", "real"]) == 0
    figures = json.loads((tmp_path / "real" / "metrics.json").read_text())
    assert (figures["val/rows"], figures["test/rows"]) == (100, 200)
    assert figures["test/average_precision"] > 0.45  # the share of duplicates is 0.35
    rows = read(str(quora / "dev.tsv")).take(100)
    pairs = list(zip(rows["text_a"][:], rows["text_b"][:], strict=True))
    expected = module_scores(tmp_path / "real" / "best.ckpt", pairs)
    assert peer_scores(tmp_path / "real" / "model", pairs) == pytest.approx(expected, abs=1e-5)

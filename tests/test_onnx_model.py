"""ONNX files of an export: the same scores by onnxruntime, and what 8 bits cost."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml

from crossenc import PairDataModule, export, score
from crossenc.backbone import load_tokenizer
from crossenc.cli import main
from crossenc.errors import BackboneError, ExportError, UsageError
from crossenc.exporting import score_pairs
from crossenc.onnx_model import OnnxModel, write_onnx
from crossenc.pairs import sample_pairs

from .conftest import BACKBONE, edit_json

pytestmark = pytest.mark.usefixtures("no_pictures")

DEV = sample_pairs()["val"][:80]
PAIRS = [(row["text_a"], row["text_b"]) for row in sample_pairs()["test"][:40]] + [("word " * 600, "")]


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    output, dev = folder / "model", folder / "dev.jsonl"
    dev.write_text("".join(json.dumps(row) + "\n" for row in DEV))
    assert main(["export", str(trained / "best.ckpt"), str(output), "--onnx", "--int8", "--dev", str(dev)]) == 0
    return output


@pytest.fixture(scope="module")
def tiny_onnx(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one, for what is changed in its files."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("tiny") / "model")
    write_onnx(folder, int8=False)
    return folder


def test_onnx_scores_as_torch_does_and_int8_nearly(exported: Path):
    expected = score_pairs(exported, PAIRS)
    assert score(str(exported), PAIRS, backend="onnx") == pytest.approx(expected, abs=1e-5)
    rough = score(str(exported), PAIRS, backend="onnx-int8")
    assert rough == pytest.approx(expected, abs=0.05)
    assert rough != pytest.approx(expected, abs=1e-4)
    assert score(str(exported), PAIRS, backend="onnx", devices=2) == pytest.approx(expected, abs=1e-5)


def test_the_graph_is_what_readers_expect(exported: Path):
    """Names and free axes as optimum's and text-embeddings-inference's; no file beside it."""
    session = onnxruntime.InferenceSession(str(exported / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {item.name: item.shape for item in session.get_inputs()} == {
        name: ["batch", "length"] for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    assert [(item.name, item.shape) for item in session.get_outputs()] == [("logits", ["batch", 1])]
    names = sorted(file.name for file in (exported / "onnx").iterdir())
    assert names == ["model.onnx", "model_qint8.onnx"]
    sizes = [(exported / "onnx" / name).stat().st_size for name in names]
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE])
def test_graphs_of_other_precision_score_too(tiny_onnx: Path, tmp_path: Path, kind: int):
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    model = onnx.load(folder / "onnx" / "model.onnx")
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "before"
    model.graph.node.append(onnx.helper.make_node("Cast", ["before"], ["logits"], to=kind))
    model.graph.output[0].type.tensor_type.elem_type = kind
    onnx.save(model, folder / "onnx" / "model.onnx")
    found = score(str(folder), PAIRS, backend="onnx")
    assert found == pytest.approx(score(str(tiny_onnx), PAIRS, backend="onnx"), abs=1e-3)


def test_the_card_tells_what_8_bits_cost(exported: Path):
    card = (exported / "README.md").read_text()
    told = re.search(r"On\n(\d+) dev pairs its average precision is (\S+), and\sthat of fp32 (\S+):", card)
    assert told
    assert int(told[1]) == len(DEV)
    from sklearn.metrics import average_precision_score

    labels = [row["label"] for row in DEV]
    scores = []
    for backend, figure in (("onnx-int8", told[2]), ("onnx", told[3])):
        found = score(str(exported), [(row["text_a"], row["text_b"]) for row in DEV], backend=backend)
        assert average_precision_score(labels, np.asarray(found)) == pytest.approx(float(figure), abs=1e-4)
        scores.append(found)
    difference = re.search(r"Scores differ by (\S+) at most", card)
    assert float(difference[1]) == pytest.approx(abs(scores[0] - scores[1]).max(), abs=1e-3)


def test_weights_too_large_for_one_file_lie_beside_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {}
    for limit, more in ((2**31, []), (0, ["model.onnx.data"])):
        folder = shutil.copytree(tiny, tmp_path / str(limit))
        monkeypatch.setattr("crossenc.onnx_model._ONE_FILE", limit)
        write_onnx(folder, int8=True)
        assert {file.name for file in (folder / "onnx").iterdir()} == {"model.onnx", "model_qint8.onnx", *more}
        found[limit] = [score(str(folder), PAIRS, backend=backend) for backend in ("onnx", "onnx-int8")]
    assert found[0][0] == pytest.approx(found[2**31][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[2**31][1], abs=1e-6)


def test_onnx_alone_is_written_and_checked(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = export(str(small / "best.ckpt"), str(tmp_path / "model"), onnx=True)
    assert [file.name for file in (folder / "onnx").iterdir()] == ["model.onnx"]
    # Of the same model, with other scores.
    monkeypatch.setattr(
        "crossenc.exporting.write_onnx", lambda new, int8: shutil.copytree(folder / "onnx", new / "onnx")
    )
    monkeypatch.setattr(OnnxModel, "__call__", lambda self, inputs: np.ones(len(inputs["input_ids"]), np.float32))
    with pytest.raises(ExportError, match=r"onnx/model\.onnx gives scores that differ by 0"):
        export(str(small / "best.ckpt"), str(tmp_path / "other"), onnx=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_graph_may_take_segments_that_the_tokenizer_does_not_give(tiny_onnx: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    found = score(str(folder), PAIRS, backend="onnx")
    assert found == pytest.approx(score(str(folder), PAIRS), abs=1e-5)
    assert found != pytest.approx(score(str(tiny_onnx), PAIRS, backend="onnx"), abs=1e-5)


def test_a_graph_that_takes_more_is_refused(tiny_onnx: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    model = onnx.load(folder / "onnx" / "model.onnx")
    more = onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["batch", "length"])
    model.graph.input.append(more)
    onnx.save(model, folder / "onnx" / "model.onnx")
    with pytest.raises(BackboneError, match="takes position_ids too; write another with"):
        score(str(folder), PAIRS, backend="onnx")


def test_a_decoder_has_a_graph_too(tmp_path: Path):
    """Without the keys and values that it would keep for a next token."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=30522, num_labels=1, pad_token_id=0, bos_token_id=101, eos_token_id=102, **sizes)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    write_onnx(tmp_path, int8=False)
    pairs = PAIRS[:20]
    assert score(str(tmp_path), pairs, backend="onnx") == pytest.approx(score(str(tmp_path), pairs), abs=1e-5)


def test_a_kind_of_model_without_a_graph_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    from transformers import LongformerConfig, LongformerForSequenceClassification

    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LongformerConfig(vocab_size=30522, num_labels=1, pad_token_id=0, attention_window=[8], **sizes)
    LongformerForSequenceClassification(config).save_pretrained(tmp_path)
    notes = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    notes.addHandler(caplog.handler)  # torch's own writes to what standard error was when torch was imported
    try:
        with pytest.raises(ExportError, match=r"^torch cannot export longformer to ONNX: .*$"):
            write_onnx(tmp_path, int8=False)
    finally:
        notes.removeHandler(caplog.handler)
    assert "def forward" not in capfd.readouterr().err  # transformers' notes on its own padding apart
    assert notes.name not in {record.name for record in caplog.records}


def test_what_is_missing_is_said(trained: Path, tmp_path: Path):
    with pytest.raises(BackboneError, match=r"there is no .*model\.onnx; write it with: crossenc export"):
        score(str(trained / "model"), PAIRS, backend="onnx")
    shutil.copy(trained / "best.ckpt", tmp_path / "best.ckpt")
    with pytest.raises(UsageError, match="give --dev FILE"):
        export(str(tmp_path / "best.ckpt"), str(tmp_path / "model"), int8=True)
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]


def test_each_process_has_a_gpu_of_its_own(exported: Path, monkeypatch: pytest.MonkeyPatch):
    opened, session = [], SimpleNamespace(get_inputs=list)
    runtime = SimpleNamespace(
        SessionOptions=SimpleNamespace,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        InferenceSession=lambda _, options, providers: (
            opened.append((options.intra_op_num_threads, providers)) or session
        ),
    )
    monkeypatch.setattr("crossenc.onnx_model.require", lambda *_: runtime)
    OnnxModel(exported, "onnx", rank=3, threads=2)
    assert opened == [(2, [("CUDAExecutionProvider", {"device_id": 3, "use_tf32": 0}), "CPUExecutionProvider"])]


def test_dev_pairs_are_those_of_the_run(small: Path, tmp_path: Path):
    from crossenc.exporting import _dev_pairs, _evaluated

    run = shutil.copytree(small, tmp_path / "run")

    def own_pairs(name: str) -> Mapping[str, Any]:
        loaded = torch.load(run / name, weights_only=True)
        return _dev_pairs(_evaluated(loaded, run / name)[1].get("val"), run / name, None)

    dev = own_pairs("best.ckpt")
    data = PairDataModule(**yaml.safe_load((small / "config.yaml").read_text())["data"], backbone=BACKBONE)
    data.setup("fit")
    assert dev["text_a"].tolist() == data.tables["val"]["text_a"][:]
    with pytest.raises(UsageError, match=r"last\.ckpt was not evaluated on those of its run; give --dev FILE, or"):
        own_pairs("last.ckpt")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in DEV))
    where = ["--config", str(run / "config.yaml"), "--output", str(tmp_path), "--run", "run", "--ckpt_path", "best"]
    assert main(["validate", *where, "--data.val_source", str(other)]) == 0
    with pytest.raises(UsageError, match=r"best\.ckpt was not evaluated on those of its run"):
        own_pairs("best.ckpt")
    (run / "scores.parquet").unlink()
    export(run / "best.ckpt", tmp_path / "again")

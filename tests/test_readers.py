"""Every reader in the README's table: itself where it is installed, and else by what it reads from the folder.

sentence-transformers and transformers' pipeline are in test_exporting.py. What the others read was found by running
them or in their source; the packages need not be installed together. Those that are missing skip with their name, and
their row is held by the tests of the files.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from crossenc.exporting import score_pairs

QUERY = "How do I learn to swim?"
TEXTS = ["What is the best way to learn swimming?", "What is a cat?", "Who swims?"]
PAIRS = [(QUERY, text) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(trained: Path) -> Path:
    return trained / "model"


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    return score_pairs(folder, PAIRS)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_transformers_auto_model(folder: Path, expected: list[float]):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([list(pair) for pair in PAIRS], padding=True, truncation=True, return_tensors="pt")
    assert model(**inputs).logits[:, 0].sigmoid().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")  # the readers' own
def test_langchain(folder: Path, expected: list[float]):
    readers = pytest.importorskip("langchain_community.cross_encoders", reason="needs langchain-community")
    model = readers.HuggingFaceCrossEncoder(model_name=str(folder), model_kwargs={"device": "cpu"})
    assert list(model.score(PAIRS)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_haystack(folder: Path, expected: list[float]):
    readers = pytest.importorskip(
        "haystack_integrations.components.rankers.sentence_transformers", reason="needs sentence-transformers-haystack"
    )
    from haystack import Document
    from haystack.utils import ComponentDevice

    ranker = readers.SentenceTransformersSimilarityRanker(model=str(folder), device=ComponentDevice.from_str("cpu"))
    ranker.warm_up()
    found = ranker.run(query=QUERY, documents=[Document(content=text) for text in TEXTS])["documents"]
    scores = {item.content: item.score for item in found}
    assert [scores[text] for text in TEXTS] == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_llama_index(folder: Path, expected: list[float]):
    readers = pytest.importorskip(
        "llama_index.postprocessor.sbert_rerank", reason="needs llama-index-postprocessor-sbert-rerank"
    )
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    ranker = readers.SentenceTransformerRerank(model=str(folder), top_n=3, device="cpu")
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    found = ranker.postprocess_nodes(nodes, query_bundle=QueryBundle(QUERY))
    scores = {item.node.text: item.score for item in found}
    assert [scores[text] for text in TEXTS] == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_rerankers_gives_logits(folder: Path, expected: list[float]):
    readers = pytest.importorskip("rerankers", reason="needs rerankers")
    import torch

    ranker = readers.Reranker(str(folder), model_type="cross-encoder", device="cpu", verbose=0)
    found = {item.document.text: item.score for item in ranker.rank(query=QUERY, docs=TEXTS).results}
    assert torch.tensor([found[text] for text in TEXTS]).sigmoid().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers_with_openvino(folder: Path, expected: list[float]):
    pytest.importorskip("optimum.intel", reason="needs optimum-intel, which holds transformers at version 4")
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", backend="openvino")
    assert model.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-2)  # it computes in less than fp32


def test_config_has_what_vllm_and_text_embeddings_inference_read(folder: Path):
    """vLLM and sentence-transformers up to 5.3 take the activation from config.json, and a path that they trust.

    Both tell a classifier by its architecture and its one label; `problem_type` would make transformers' pipeline and
    vLLM leave the sigmoid out. text-embeddings-inference does not start without `max_seq_length`, and cuts there.
    """
    config = read(folder, "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == len(config["label2id"]) == 1
    assert "problem_type" not in config
    assert config["sentence_transformers"]["activation_fn"] == "torch.nn.modules.activation.Sigmoid"
    assert read(folder, "sentence_bert_config.json")["max_seq_length"] == 512
    assert read(folder, "tokenizer_config.json")["model_max_length"] == 512
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "model.safetensors").is_file()


def test_sentence_transformers_files_go_together(folder: Path):
    """With one of the three missing, it drops the classifier; LangChain, Haystack and LlamaIndex call it."""
    assert [module["type"] for module in read(folder, "modules.json")] == [
        "sentence_transformers.base.modules.transformer.Transformer"
    ]
    assert read(folder, "config_sentence_transformers.json")["model_type"] == "CrossEncoder"
    settings = read(folder, "sentence_bert_config.json")
    assert settings["transformer_task"] == "sequence-classification"
    assert settings["module_output_name"] == "scores"


def test_onnx_files_lie_where_sentence_transformers_looks(folder: Path, expected: list[float], caplog):
    """The graph itself is held by test_onnx_model.py, where optimum is missing."""
    pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx, which holds transformers at version 4")
    from sentence_transformers import CrossEncoder

    from crossenc.onnx_model import write_onnx

    write_onnx(folder, int8=True)
    for options in ({}, {"model_kwargs": {"file_name": "onnx/model_qint8.onnx"}}):
        with caplog.at_level(logging.WARNING):
            model = CrossEncoder(str(folder), device="cpu", backend="onnx", **options)
        assert model.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-2 if options else 1e-5)

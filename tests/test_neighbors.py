"""Vectors and neighbours: what faiss finds beside plain numpy, each pair once, and parts that are taken over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from crossenc.backbone import locate
from crossenc.errors import BackboneError
from crossenc.loading import find
from crossenc.neighbors import PAIR_BYTES, embed, find_candidates, kind_of_index, make_search
from crossenc.reranking import retrieve

from .conftest import BACKBONE


def test_all_that_a_model_consists_of_is_read_from_the_hub(monkeypatch: pytest.MonkeyPatch):
    """A bi-encoder's further layers too, tokenizers of all kinds, and ONNX files where they are asked for."""
    from huggingface_hub.utils import filter_repo_objects

    asked: list[list[str]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or ""
    )
    for onnx in (False, True):
        find("owner/model", onnx=onnx)
    kept = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "2_Dense/model.safetensors"]
    kept += ["vocab.txt", "merges.txt", "spiece.model"]
    graphs, other = ["onnx/model.onnx", "onnx/model.onnx.data"], ["pytorch_model.bin", "adapter.safetensors"]
    for patterns, more in zip(asked, ([], graphs), strict=True):
        assert list(filter_repo_objects([*kept, *graphs, *other], allow_patterns=patterns)) == [*kept, *more]


def unit_vectors(count: int, dimensions: int = 16) -> np.ndarray:
    """Clusters of like vectors, as edited questions make them."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(count // 5, dimensions))
    vectors = np.repeat(centres, 5, axis=0) + 0.3 * draw.normal(size=(count // 5 * 5, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_candidates_are_the_neighbours_once_each():
    vectors = unit_vectors(5_000)
    found = find_candidates(vectors, 3, 0.5, "exact", {})
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -2)
    nearest = np.argsort(-similarities, axis=1)[:, :3]
    expected = {
        (min(row, other), max(row, other))
        for row in range(len(vectors))
        for other in nearest[row].tolist()
        if similarities[row, other] >= 0.5
    }
    pairs = list(zip(found["a"].tolist(), found["b"].tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(pairs) == expected
    assert found["similarity"] == pytest.approx(similarities[found["a"], found["b"]], abs=1e-5)


def test_memory_of_the_pairs_is_what_is_told():
    import tracemalloc

    vectors, parts = unit_vectors(4_000), {}
    find_candidates(vectors, 50, -1, "exact", parts)  # keeps all, of which those found twice count twice
    tracemalloc.start()
    find_candidates(vectors, 50, -1, "exact", parts)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.6 * PAIR_BYTES < most / (50 * len(vectors)) <= PAIR_BYTES


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_approximate_indexes_find_nearly_all(index: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crossenc.neighbors.BLOCK", 300)  # so that an index is filled in two goes
    vectors = unit_vectors(5_000)
    exact, found = (
        {(a, b) for a, b, _ in find_candidates(vectors, 4, 0.6, kind, {}).tolist()} for kind in ("exact", index)
    )
    assert len(exact & found) / len(exact) > 0.95


def test_auto_is_exact_up_to_a_size(monkeypatch: pytest.MonkeyPatch):
    assert kind_of_index(100_000, "auto") == "exact"
    assert kind_of_index(100_001, "auto") == "ivf"
    assert kind_of_index(10, "hnsw") == "hnsw"
    made = SimpleNamespace(cp=SimpleNamespace(), train=lambda _: None, add=lambda _: None)
    faiss = SimpleNamespace(
        METRIC_INNER_PRODUCT=0,
        IndexFlatIP=lambda _: None,
        IndexIVFFlat=lambda flat, dimensions, lists, metric: setattr(made, "lists", lists) or made,
    )
    monkeypatch.setattr("crossenc.neighbors.require", lambda *_: faiss)
    make_search(np.zeros((1_000_000, 1), dtype=np.float32), "auto")
    assert (made.lists, made.nprobe) == (4_000, 125)  # one list in 32


def test_fewer_rows_than_neighbours():
    similarities, rows = make_search(unit_vectors(5), "exact")(unit_vectors(5)[:2], 50)
    assert rows.shape == similarities.shape == (2, 5)
    assert len(find_candidates(unit_vectors(5), 50, -1, "exact", {})) == 10


def test_blocks_of_texts_and_rows_make_what_one_would(monkeypatch: pytest.MonkeyPatch):
    """Five texts in blocks of two, of which the second was kept by an earlier run."""
    texts = ["How do I learn to swim?", "What is rain?", "Why is it cold?", "How can I swim?", "Who rains?"]
    whole = embed(texts, BACKBONE, {})
    pairs = find_candidates(whole, 2, -1, "exact", {})
    monkeypatch.setattr("crossenc.neighbors.BLOCK", 2)
    vectors = embed(texts, BACKBONE, {1: whole[2:4]})
    assert vectors == pytest.approx(whole, abs=1e-6)
    assert find_candidates(vectors, 2, -1, "exact", {})[["a", "b"]].tolist() == pairs[["a", "b"]].tolist()


def test_vectors_of_a_bi_encoder_that_does_not_normalize_have_length_one(tmp_path: Path):
    folder = shutil.copytree(locate(BACKBONE), tmp_path / "model")
    layers = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([layer for layer in layers if "Normalize" not in layer["type"]]))
    vectors = embed(["How do I learn to swim?", "What?"], str(folder), {})
    assert len(layers) == 3
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_a_bi_encoder_may_have_layers_in_folders_and_words_of_its_own_for_queries(tmp_path: Path):
    """As older ones of sentence-transformers' have, and those that are made for search."""
    from sentence_transformers import SentenceTransformer

    folder = shutil.copytree(locate(BACKBONE), tmp_path / "model" / "0_Transformer")
    for name in ("modules.json", "1_Pooling", "2_Normalize"):
        if (folder / name).exists():
            (folder / name).rename(folder.parent / name)
    layers = json.loads((folder.parent / "modules.json").read_text())
    layers[0]["path"] = "0_Transformer"
    (folder.parent / "modules.json").write_text(json.dumps(layers))
    settings = {"prompts": {"query": "search for: ", "document": "text: "}, "default_prompt_name": None}
    (folder.parent / "config_sentence_transformers.json").write_text(json.dumps(settings))
    model = SentenceTransformer(str(folder.parent), device="cpu")
    queries = embed(["swim"], str(folder.parent), {}, encode="encode_query")
    assert queries == pytest.approx(model.encode(["search for: swim"], normalize_embeddings=True), abs=1e-5)
    (found,) = retrieve(["swim"], ["swim", "rain"], str(folder.parent), 1)
    documents = model.encode(["text: swim"], normalize_embeddings=True)
    assert found[0][1] == pytest.approx((queries * documents).sum(), abs=1e-5)


def test_vectors_are_the_bi_encoders_and_kept_parts_are_taken_over(tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    texts = ["How do I learn to swim?", "", "这是什么？"]
    parts = {}
    vectors = embed(texts, BACKBONE, parts)
    model = SentenceTransformer(locate(BACKBONE), device="cpu")
    assert vectors == pytest.approx(model.encode(texts, normalize_embeddings=True), abs=1e-5)
    # Nothing is missing, so that nothing is loaded.
    assert np.array_equal(embed(texts, "./gone", parts), vectors)
    with pytest.raises(BackboneError, match="there is no folder gone"):
        embed(texts, "./gone", {})
    for name in ("modules.json", "model.safetensors"):
        folder = shutil.copytree(locate(BACKBONE), tmp_path / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        with pytest.raises(BackboneError, match="cannot be loaded as a bi-encoder: "):
            embed(texts, str(folder), {})

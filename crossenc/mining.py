"""`mine`: find the duplicates in a large set of questions.

1 copies      questions that are equal apart from case and white space, without a model
2 vectors     of the others, by a bi-encoder
3 neighbours  pairs of questions with similar vectors, by faiss; each pair once
4 scores      of these pairs, by the cross-encoder
5 groups      of questions that ask the same thing, with one that represents them

2, 3 and 4 keep their parts on disk, and an interrupted run continues with them.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray

from .calibration import sigmoid
from .errors import DataError, UsageError, require, require_choice, require_count
from .loading import fingerprint, read_threshold
from .neighbors import DEFAULT_RETRIEVER, PAIR_BYTES, Index, embed, find_candidates, find_retriever, kind_of_index
from .pairs import SUFFIXES, read
from .parts import Arrays, Parts, try_writing
from .scorer import Backend, Precision, Scoring, score_chunks
from .scoring import OnError, decimals, parts_folder, reaches, score_all
from .splits import normalized
from .tables import STANDARD, Row, chunked, claim_output, open_table, read_texts, tell_skipped, write_table

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

_PAIR_COLUMNS = {"a": "", "b": "", "text_a": "string", "text_b": "string", "score": "float32", "similarity": "float32"}
_PAIR_COLUMNS |= {"found_by": "string"}
_GROUP_COLUMNS = {"group": "int64", "id": "", "text": "string", "representative": "bool_"}
# Complete linkage needs the distances between all questions of a component: those of 20,000 take 1.6 GB.
_LARGEST_COMPONENT = 20_000


Linkage: TypeAlias = Literal["components", "complete"]


class Mined(NamedTuple):
    """The duplicates in a set of questions, ordered by row; or the two files that hold them.

    `pairs`: `a`, `b` (ids, or row numbers from 0), `text_a`, `text_b`, `score`, `similarity` (of the vectors), and
    `found_by`: `copy` or `model`. A copy is paired only with the first question that it copies.
    `groups`: a row for each question that has a duplicate: `group`, `id`, `text`, `representative`.
    """

    pairs: list[Row] | Path
    groups: list[Row] | Path


class Judgement(NamedTuple):
    """How a pair is scored: by default, by the cross-encoder's logit alone."""

    logit: float = 1.0
    similarity: float = 0.0
    shift: float = 0.0

    def __call__(self, logits: NDArray[np.float32], similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of pairs, shape (pairs,): sigmoid(logit weight x logit + similarity weight x cosine + shift)."""
        return sigmoid((self.logit * logits + self.similarity * similarities + self.shift).astype(np.float32))


def mine(
    model: str | Path,
    questions: Any,
    output: str | None = None,
    *,
    retriever: str = DEFAULT_RETRIEVER,
    top_k: int = 50,
    min_similarity: float = 0.6,
    threshold: float | None = None,
    dev: str | None = None,
    index: Index = "auto",
    linkage: Linkage = "components",
    column: str | None = None,
    both_orders: bool = False,
    precision: Precision = "32-true",
    backend: Backend = "torch",
    devices: int = 1,
    on_error: OnError = "stop",
    work: str | None = None,
    overwrite: bool = False,
) -> Mined:
    """Find the pairs of questions that ask the same thing, and the groups that they form.

    An interrupted run continues where it was when it is called again with the same arguments.

    Args:
        model: An export's folder, a Hub id, or a `.ckpt` file of fit.
        questions: A csv, tsv, jsonl or parquet file, `-` (standard input, in jsonl), a DataFrame, or a list of texts.
            A column `id` is kept, or else rows are numbered from 0.
        output: The file to write the pairs to, in the format of its suffix; the groups go to a file beside it, such as
            `out.groups.csv` for `out.csv`.
        retriever: The bi-encoder: a Hub id, a folder, or `package:NAME/PATH`. Needs the extra `mine`.
        top_k: Number of nearest neighbours to look at for each question.
        min_similarity: Do not score pairs whose vectors have a lower cosine similarity. Of Quora's duplicates, 98.6 in
            100 have at least 0.6 with the default retriever.
        threshold: A pair with this score or more is a duplicate; null takes the threshold stored in the model.
        dev: Labelled pairs like those to be found: a file, or the name of a data set as in fit. They determine how a
            score weighs the vectors' similarity against the model's logit, and the threshold. Null: the model decides
            alone.
        index: `exact`, `ivf` or `hnsw` (faiss); `auto` is exact up to 100,000 questions, and ivf above.
        linkage: `components`: a question belongs to a group if it is a duplicate of one question in it; `complete`: if
            it is a duplicate of all of them.
        column: The column with the questions; not needed for common names.
        both_orders: Score each pair in both orders and take the mean logit; takes twice the time.
        precision: See `score`.
        backend: See `score`.
        devices: Number of GPUs, or of processes on a CPU, that share the scoring.
        on_error: `stop` before anything is done if a row is broken, or `skip` broken rows and list them in
            `OUTPUT.skipped.jsonl`.
        work: Folder that keeps vectors, neighbours and scores, so that a run with another threshold can reuse them.
            Null keeps them beside the output until it is written.
        overwrite: Replace an existing output, and drop kept work that does not match.

    Returns:
        The paths of both files, or without an output their rows.

    Raises:
        BackboneError, CheckpointError, HubError: A model cannot be loaded.
        DataError: The input or the dev pairs cannot be read, or a row is broken.
        MissingExtraError: sentence-transformers or faiss is not installed.
        OutputError: The output exists already or cannot be written, or there is kept work that does not match.
        UsageError: A number is out of its range, or the model has no threshold and none is given.
    """
    scoring = Scoring(model, precision, backend, both_orders, devices)
    require_choice("linkage", linkage, Linkage)
    require_choice("on_error", on_error, OnError)
    require_choice("index", index, Index)
    top_k = require_count("top_k", top_k)
    if not -1 <= min_similarity <= 1 or not 0 <= (threshold or 0) <= 1:
        raise UsageError("min_similarity must be from -1 to 1, and threshold from 0 to 1")
    if output == STANDARD:
        raise UsageError("mine writes two files, so output cannot be -; name the file of the pairs")
    if output is not None:
        claim_output(output, SUFFIXES, overwrite)
        claim_output(_groups_file(output), SUFFIXES, overwrite)
    if threshold is None and dev is None:
        threshold = read_threshold(model)
        if threshold is None:
            raise UsageError(f"{model} has no stored threshold; give --threshold or --dev")
    if work and not Path(work).is_dir():
        try_writing(Path(work) / "vectors")
    scoring.find()  # fail before vectors are computed
    require("faiss", "mine")
    labelled = None if dev is None else read(dev)
    with open_table(questions, ["text"]) as table:
        ids, texts, skipped = read_texts(table, column, on_error)
        facts: dict[str, Any] = {"questions": table.digest(), "column": column, "on_error": on_error}
    first = first_copies(texts)
    distinct = np.flatnonzero(first == np.arange(len(texts)))
    log.info("%s questions, %s of them copies", f"{len(texts):,}", f"{len(texts) - len(distinct):,}")
    bi_encoder, config = find_retriever(retriever)
    _tell_memory(texts, len(distinct), config, top_k, kind_of_index(len(distinct), index))
    folder = Path(work) if work else None if output is None else parts_folder(output)
    judge, best = (Judgement(), 0.5) if labelled is None else fit_judgement(labelled, scoring, retriever)
    threshold = best if threshold is None else threshold

    def parts(name: str) -> Arrays:
        return Parts(folder / name, facts, overwrite) if folder else {}

    facts |= {"retriever": fingerprint(bi_encoder)}
    vectors = embed([texts[row] for row in distinct], retriever, parts("vectors"))
    facts |= {"index": index, "top_k": top_k, "min_similarity": min_similarity}
    candidates = find_candidates(vectors, top_k, min_similarity, index, parts("neighbours"))
    del vectors
    candidates["a"], candidates["b"] = distinct[candidates["a"]], distinct[candidates["b"]]
    log.info("%s pairs to score", f"{len(candidates):,}")
    facts |= scoring.facts()
    texts_of = ((texts[a], texts[b]) for a, b in zip(candidates["a"], candidates["b"], strict=True))
    logits = score_all(parts("scores"), scoring, texts_of, len(candidates))
    pairs = _duplicates(candidates, judge(logits, candidates["similarity"]), first, threshold)
    groups, representatives = group(pairs, len(texts), linkage)
    log.info("%s duplicate pairs, %s groups", f"{len(pairs):,}", f"{len(representatives):,}")
    id_type = "int64" if all(type(item) is int and abs(item) < 2**63 for item in ids) else "string"
    if id_type == "string" and str(output).lower().endswith(".parquet"):
        ids = [str(item) for item in ids]
    rows = (_pair_row(pair, score, ids, texts) for pair, score in zip(pairs, decimals(pairs["score"]), strict=True))
    members = _group_rows(groups, representatives, ids, texts)
    if output is None:
        if skipped:
            log.warning("%s broken rows are left out; the first is row %s: %s", len(skipped), *skipped[0].values())
        return Mined(list(rows), members)
    with ExitStack() as stack:  # after an error in one file, neither is left
        for file, content, columns in ((output, rows, _PAIR_COLUMNS), (_groups_file(output), members, _GROUP_COLUMNS)):
            schema = pyarrow.schema({name: getattr(pyarrow, kind or id_type)() for name, kind in columns.items()})
            write = stack.enter_context(write_table(file, list(columns), schema))
            for chunk in chunked(content):
                write(chunk)
    tell_skipped(skipped, output)
    if folder and not work:
        shutil.rmtree(folder)
    return Mined(Path(output), Path(_groups_file(output)))


def fit_judgement(dev: Dataset, scoring: Scoring, retriever: str) -> tuple[Judgement, float]:
    """Weigh the cross-encoder's logit and the bi-encoder's cosine by logistic regression (stacked generalisation,
    Wolpert 1992): trained on different pairs, they err on different ones. Also returns the threshold for these scores
    that has the best F1 on the dev pairs. Raises `DataError` if all labels are the same.
    """
    from .metrics import best_thresholds

    truth = np.asarray(dev["label"]) >= 0.5
    if truth.all() or not truth.any():
        raise DataError("the labels of --dev are all the same; give both duplicates and other pairs")
    ((_, logits),) = score_chunks(scoring, [(0, list(zip(dev["text_a"], dev["text_b"], strict=True)))])
    rows = {text: row for row, text in enumerate(dict.fromkeys([*dev["text_a"], *dev["text_b"]]))}
    vectors = embed(list(rows), retriever, {}, "embed dev pairs")
    a, b = (vectors[[rows[text] for text in dev[side]]] for side in ("text_a", "text_b"))
    features = np.column_stack([logits, similarities := (a * b).sum(1)]).astype(np.float64)
    spread = np.maximum(features.std(0), 1e-9)  # one scale, so that the regression's penalty means the same for both
    fitted = require("sklearn.linear_model", "mine").LogisticRegression().fit(features / spread, truth)
    weights = (fitted.coef_[0] / spread).tolist()
    judge = Judgement(weights[0], weights[1], float(fitted.intercept_[0]))
    scores = torch.from_numpy(judge(logits, similarities))
    _, threshold = best_thresholds(scores, torch.from_numpy(truth).long())
    log.info("from %s dev pairs: score = sigmoid(%.2f x logit + %.2f x similarity %+.2f)", f"{len(truth):,}", *judge)
    return judge, threshold


def first_copies(texts: list[str]) -> NDArray[np.int64]:
    """For each text, the first one that is equal apart from case and white space, shape (texts,)."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(normalized(text), row) for row, text in enumerate(texts)])


DUPLICATE = np.dtype(
    [("a", np.int64), ("b", np.int64), ("similarity", np.float32), ("score", np.float32), ("copy", bool)]
)


def _duplicates(
    candidates: NDArray[Any], scores: NDArray[np.float32], first: NDArray[np.int64], threshold: float
) -> NDArray[Any]:
    """The duplicate pairs, copies and those that the model found, in order."""
    kept = reaches(scores, threshold)
    rows = np.flatnonzero(first != np.arange(len(first)))
    pairs = np.empty(int(kept.sum()) + len(rows), dtype=DUPLICATE)
    found, copies = pairs[: int(kept.sum())], pairs[int(kept.sum()) :]
    found["a"], found["b"] = candidates["a"][kept], candidates["b"][kept]
    found["similarity"], found["score"], found["copy"] = candidates["similarity"][kept], scores[kept], False
    copies["a"], copies["b"], copies["similarity"], copies["score"], copies["copy"] = first[rows], rows, 1, 1, True
    return pairs[np.lexsort((pairs["b"], pairs["a"]))]


def group(pairs: NDArray[Any], count: int, linkage: Linkage) -> tuple[NDArray[np.int64], dict[int, int]]:
    """The group of each of `count` rows, shape (rows,), -1 for a row without duplicates; groups are numbered in the
    order of their first rows. And the row that represents each group: the one with the highest sum of scores with
    others of the group, or the first of several such.

    `pairs` is an array of `DUPLICATE` with all duplicate pairs; any other pair is not a duplicate.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs["a"], pairs["b"])), shape=(count, count))
    labels = connected_components(graph, directed=False)[1].astype(np.int64)
    if linkage == "complete":
        labels = _split_components(pairs, labels)
    _, first, labels, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)  # labels in the order of their first rows
    order = order[sizes[order] > 1]
    number = np.full(len(first), -1)
    number[order] = np.arange(len(order))
    groups = number[labels]
    inside = pairs[groups[pairs["a"]] == groups[pairs["b"]]]
    weight = np.bincount(inside["a"], inside["score"], count) + np.bincount(inside["b"], inside["score"], count)
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.lexsort((-weight[rows], groups[rows]))]
    _, best = np.unique(groups[rows], return_index=True)
    return groups, dict(enumerate(rows[best].tolist()))


def _split_components(pairs: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Split every component into clusters in which all pairs are duplicates; copies join the question they copy."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    copies, found = pairs[pairs["copy"]], pairs[~pairs["copy"]]
    found = found[np.argsort(labels[found["a"]], kind="stable")]
    free = int(labels.max()) + 1
    for part in np.split(found, np.flatnonzero(np.diff(labels[found["a"]])) + 1):
        members, places = np.unique(np.concatenate([part["a"], part["b"]]), return_inverse=True)
        if len(members) <= 2:
            continue
        if len(members) > _LARGEST_COMPONENT:
            raise UsageError(
                f"{len(members):,} questions are connected, too many for --linkage complete; give a higher --threshold"
            )
        distances = np.full((len(members), len(members)), 2.0)  # those of duplicates are at most 1
        np.fill_diagonal(distances, 0)
        one, other = places[: len(part)], places[len(part) :]
        distances[one, other] = distances[other, one] = 1 - part["score"].astype(np.float64)
        clusters = fcluster(linkage(squareform(distances), "complete"), 1, "distance")
        labels[members] = free + clusters
        free += int(clusters.max()) + 1
    labels[copies["b"]] = labels[copies["a"]]
    return labels


def _pair_row(pair: Any, score: float, ids: list[Any], texts: list[str]) -> Row:
    a, b = int(pair["a"]), int(pair["b"])
    numbers = {"score": score, "similarity": round(float(pair["similarity"]), 4)}
    found_by = {"found_by": "copy" if pair["copy"] else "model"}
    return {"a": ids[a], "b": ids[b], "text_a": texts[a], "text_b": texts[b], **numbers, **found_by}


def _group_rows(
    groups: NDArray[np.int64], representatives: dict[int, int], ids: list[Any], texts: list[str]
) -> list[Row]:
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    return [
        {"group": number, "id": ids[row], "text": texts[row], "representative": representatives[number] == row}
        for row, number in zip(rows.tolist(), groups[rows].tolist(), strict=True)
    ]


def _groups_file(output: str) -> str:
    path = Path(output)
    return str(path.with_name(f"{path.stem}.groups{path.suffix}"))


def _tell_memory(texts: list[str], count: int, config: dict[str, Any], top_k: int, index: str) -> None:
    """Log roughly how much memory the run needs at its peak, without models."""
    vectors = 4 * count * int(config.get("hidden_size", 768))
    sizes = {
        "questions": sum(60 + 2 * len(text) for text in texts),
        "vectors": vectors,
        f"index ({index})": {"exact": 0, "ivf": vectors + 8 * count, "hnsw": vectors + 4 * 64 * count}[index],
        "pairs, at most": PAIR_BYTES * top_k * count,
    }
    shares = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    log.info("memory: up to %.2f GB besides libraries and models: %s", sum(sizes.values()) / 1e9, shares)

"""`rerank`: order the candidates of each query by the cross-encoder's score, and measure what that gains.

Candidates come from a run file or a bi-encoder; without either, every text of the corpus is a candidate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .calibration import sigmoid
from .errors import DataError, UsageError, require, require_count
from .neighbors import embed
from .pairs import NOT_UTF8, SUFFIXES, SURROGATE, is_local
from .parts import replacing, writing
from .scorer import Backend, Precision, Scoring
from .scoring import decimals, score_all
from .tables import STANDARD, Row, Table, claim_output, open_table, read_texts, write_table

log = logging.getLogger(__name__)

# For each query, pairs of (position of a text in the corpus, score), the best first.
Ranking: TypeAlias = list[list[tuple[int, float]]]


def rerank(
    model: str | Path,
    queries: str | Any,
    corpus: str | Any,
    output: str | None = None,
    *,
    candidates: str | Any | None = None,
    retriever: str | None = None,
    retrieve_k: int | None = None,
    top_k: int = 10,
    qrels: str | Any | None = None,
    both_orders: bool = False,
    precision: Precision = "32-true",
    backend: Backend = "torch",
    devices: int = 1,
    overwrite: bool = False,
) -> Path | list[list[Row]]:
    """Find the best texts of a corpus for each query. A score is the sigmoid of the model's logit, as in `score`.

    Args:
        model: An export's folder, a Hub id, or a `.ckpt` file of fit.
        queries: A csv, tsv, jsonl or parquet file with an id and a text per row, a DataFrame, or a list of texts (with
            their positions as ids, from 0).
        corpus: The texts to search, given like `queries`; a `title` is put before its text.
        output: A TREC run (`.run`, `.trec`, `.txt`), or `.jsonl`; `-` is a TREC run on standard output.
        candidates: A TREC run, jsonl with `query_id, corpus_id, score`, or a list of such rows.
        retriever: A bi-encoder that finds the candidates: a Hub id, a folder, or `package:NAME/PATH`. Needs the extra
            `mine`.
        retrieve_k: Number of candidates that the retriever finds for each query; null: 100.
        top_k: Number of texts to write for each query.
        qrels: What is relevant, as TREC qrels, BEIR's tsv, or a list of such rows. Reports MRR@10, nDCG@10 and MAP of
            all candidates, before and after reranking. Needs the extra `rank`.
        both_orders: Score each pair in both orders and take the mean logit; takes twice the time.
        precision: See `score`.
        backend: See `score`.
        devices: Number of GPUs, or of processes on a CPU, that share the scoring.
        overwrite: Replace an existing output.

    Returns:
        The output's path, or without an output for each query its rows `query_id, corpus_id, score`, the best first.

    Raises:
        BackboneError, CheckpointError, HubError: A model cannot be loaded.
        DataError: A file cannot be read, or names a query or a text that does not exist.
        MissingExtraError: The package for the retriever or the metrics is not installed.
        OutputError: The output exists already, or cannot be written.
        UsageError: Options do not go together.
    """
    scoring = Scoring(model, precision, backend, both_orders, devices)
    if candidates is not None and retriever is not None:
        raise UsageError("give either candidates, or a retriever that finds them, not both")
    if retriever is None and retrieve_k is not None:
        raise UsageError("retrieve_k needs a retriever; name one with --retriever")
    top_k = require_count("top_k", top_k)
    retrieve_k = 100 if retrieve_k is None else require_count("retrieve_k", retrieve_k)
    if [source for source in (queries, corpus, candidates, qrels) if isinstance(source, str)].count(STANDARD) > 1:
        raise UsageError("only one of queries, corpus, candidates and qrels can be - (standard input)")
    if qrels is not None:
        require("ir_measures", "rank")  # fail before the work, not after it
    if output is not None:
        claim_output(output, (".run", ".trec", ".txt", ".jsonl"), overwrite)
    scoring.find()  # fail before candidates are searched
    with open_table(queries, ["text"]) as table:
        query_ids, query_texts, _ = read_texts(table, None)
    with open_table(corpus, ["text"]) as table:
        corpus_ids, corpus_texts, _ = read_texts(table, None, titled=True)
    spaced = [item for item in [*query_ids, *corpus_ids] if len(str(item).split()) != 1]
    if spaced and output is not None and Path(output).suffix.lower() != ".jsonl":
        raise UsageError(f"a TREC run cannot hold the id {spaced[0]!r}; write a .jsonl file")
    relevant = None if qrels is None else read_qrels(qrels)
    if relevant is not None:  # ir-measures would count a query that is not asked, or has nothing to find, as zero
        asked = set(map(str, query_ids))
        relevant = {query: grades for query, grades in relevant.items() if query in asked and max(grades.values()) > 0}
        if not relevant:
            raise DataError("the qrels mark nothing as relevant to any of the queries; check the ids of both")
    if candidates is not None:
        before = _read_candidates(candidates, query_ids, corpus_ids)
    elif retriever is not None:
        before = retrieve(query_texts, corpus_texts, retriever, retrieve_k)
    else:
        before = [[(place, 0.0) for place in range(len(corpus_texts))] for _ in query_texts]
    after = _score(before, query_texts, corpus_texts, scoring)
    if relevant is not None:
        rankings = {"after": after} if candidates is None and retriever is None else {"before": before, "after": after}
        figures = {when: evaluate(found, relevant, query_ids, corpus_ids) for when, found in rankings.items()}
        for name in figures["after"]:
            log.info("%-8s%s", name, ",".join(f" {when} {found[name]:.4f}" for when, found in figures.items()))
    rows: list[list[Row]] = [
        [{"query_id": query, "corpus_id": corpus_ids[place], "score": score} for place, score in found[:top_k]]
        for query, found in zip(query_ids, after, strict=True)
    ]
    if output is None:
        return rows
    _write(output, rows)
    return Path(output)


def retrieve(queries: list[str], corpus: list[str], retriever: str, k: int) -> Ranking:
    """The k texts whose vectors are nearest to each query's, with their cosine similarity."""
    search = require("sentence_transformers.util", "mine").semantic_search
    text_vectors = embed(corpus, retriever, {}, "embed the corpus", "encode_document")
    query_vectors = embed(queries, retriever, {}, "embed the queries", "encode_query")
    return [[(hit["corpus_id"], hit["score"]) for hit in hits] for hits in search(query_vectors, text_vectors, top_k=k)]


def _score(before: Ranking, queries: list[str], corpus: list[str], scoring: Scoring) -> Ranking:
    pairs = ((query, corpus[place]) for query, found in zip(queries, before, strict=True) for place, _ in found)
    counts = [len(found) for found in before]
    logits = score_all({}, scoring, pairs, sum(counts))
    after = []
    for found, own in zip(before, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
        # By logit, because two logits that are both large can have the same score.
        order = np.argsort(-own, kind="stable").tolist()
        after.append([(found[i][0], score) for i, score in zip(order, decimals(sigmoid(own)[order]), strict=True)])
    return after


def _read_candidates(candidates: Any, query_ids: list[Any], corpus_ids: list[Any]) -> Ranking:
    """Candidates in the order of their scores; raises `DataError` for a query or a text that does not exist."""
    places = {str(item): place for place, item in enumerate(corpus_ids)}
    numbers = {str(item): number for number, item in enumerate(query_ids)}
    found: list[dict[int, float]] = [{} for _ in query_ids]
    for where, query, item, score in _triples(candidates, _RUN_FIELDS):
        if query not in numbers:
            raise DataError(f"{where}: there is no query {query!r}")
        if item not in places:
            raise DataError(f"{where}: there is no text {item!r} in the corpus")
        found[numbers[query]][places[item]] = score
    if not any(found):
        raise DataError("there are no candidates; give some, or leave them out to score every text of the corpus")
    return [sorted(own.items(), key=lambda pair: -pair[1]) for own in found]


def read_qrels(qrels: Any) -> dict[str, dict[str, int]]:
    """For each query, the grades of its relevant texts, from TREC qrels, a table with such columns, or rows."""
    relevant: dict[str, dict[str, int]] = {}
    for where, query, item, grade in _triples(qrels, _QRELS_FIELDS):
        if grade != int(grade):
            raise DataError(f"{where}: the grade {grade} is not a whole number")
        relevant.setdefault(query, {})[item] = int(grade)
    return relevant


_QUERY, _ITEM = ("query_id", "query-id", "qid"), ("corpus_id", "corpus-id", "doc_id", "docid", "pid")
_NUMBER = ("score", "relevance", "rel", "label")
# The fields of TREC's files, which have no header.
_RUN_FIELDS = ("query_id", "Q0", "corpus_id", "rank", "score", "tag")
_QRELS_FIELDS = ("query_id", "iteration", "corpus_id", "relevance")


def _triples(source: Any, fields: Sequence[str]) -> Iterator[tuple[str, str, str, float]]:
    """A name for each row, its query, text and number, from a TREC file with these fields, or from a table."""
    # A file that is not a table is a TREC file, whose name can have any suffix: qrels.dl19-passage, bm25.res.
    trec = isinstance(source, str | Path) and Path(source).suffix.lower() not in SUFFIXES and str(source) != STANDARD
    if trec and not (Path(source).is_fifo() or is_local(str(source))):  # a pipe is that of `<(zcat run.gz)`
        raise DataError(f"{source}: no such file")
    with ExitStack() as stack:
        if trec:
            rows, where = _trec_rows(Path(source), fields), source
        else:
            table: Table = stack.enter_context(open_table(source, ["query_id", "corpus_id", "score"]))
            rows, where = iter(table), table.where
        for number, row in enumerate(rows, start=1):
            place = f"{where}, row {number}"
            if isinstance(row, str):
                raise DataError(f"{place}: {row}")
            names = [next((name for name in known if name in row), "") for known in (_QUERY, _ITEM, _NUMBER)]
            if not all(names):
                raise DataError(f"{where} needs the columns query_id, corpus_id and score; it has {list(row)}")
            query, item, given = (row[name] for name in names)
            try:
                value = float(given)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise DataError(f"{place}: {given!r} is not a finite number")
            yield place, str(query), str(item), value


def _trec_rows(file: Path, fields: Sequence[str]) -> Iterator[Row | str]:
    """The rows of a TREC file; a string in place of a row says what is wrong with it."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            values = line.split()
            if SURROGATE.search(line):
                yield NOT_UTF8
            elif len(values) == len(fields):
                yield dict(zip(fields, values, strict=True))
            elif values:
                wrong = f"{len(values)} fields where a TREC file has {len(fields)}"
                yield f"{wrong}; the name of a table ends in {', '.join(SUFFIXES)}"


def evaluate(
    ranking: Ranking, relevant: Mapping[str, Mapping[str, int]], query_ids: list[Any], corpus_ids: list[Any]
) -> dict[str, float]:
    """MRR@10, nDCG@10 and MAP over the queries that have something relevant, by ir-measures.

    What counts is the order of a ranking, not its scores, which may be equal.
    """
    measures = require("ir_measures", "rank")
    run = {
        str(query): {str(corpus_ids[place]): -float(rank) for rank, (place, _) in enumerate(found)}
        for query, found in zip(query_ids, ranking, strict=True)
    }
    wanted = {"MRR@10": measures.RR @ 10, "nDCG@10": measures.nDCG @ 10, "MAP": measures.AP}
    found = measures.calc_aggregate(list(wanted.values()), relevant, run)
    return {name: float(found[measure]) for name, measure in wanted.items()}


def _strictly_falling(rows: list[Row]) -> Iterator[np.float32]:
    """The scores, with equal ones lowered by the last digit of fp32: readers of a run sort it by score."""
    last = np.float32(np.inf)
    for row in rows:
        last = min(np.float32(row["score"]), np.nextafter(last, np.float32(-np.inf)))
        yield last


def _write(output: str, rows: list[list[Row]]) -> None:
    if Path(output).suffix.lower() == ".jsonl":
        with write_table(output, []) as write:
            for own in rows:
                write(own)
        return
    lines = [
        f"{row['query_id']} Q0 {row['corpus_id']} {rank} {score:.9g} crossenc\n"
        for own in rows
        for rank, (row, score) in enumerate(zip(own, _strictly_falling(own), strict=True), start=1)
    ]
    if output == STANDARD:
        print(*lines, sep="", end="")
        return
    with writing(output), replacing(Path(output)) as unfinished:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("".join(lines), encoding="utf-8")

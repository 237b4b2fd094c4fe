"""`rerank`: sentence-transformers' order and scores; candidates, runs and metrics."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from crossenc import rerank, reranking, score
from crossenc.cli import main
from crossenc.errors import BackboneError, DataError, MissingExtraError, OutputError, UsageError
from crossenc.pairs import sample_groups
from crossenc.reranking import evaluate, read_qrels, retrieve

from .conftest import BACKBONE

GROUPS = sample_groups()[:8]
CORPUS = [question for group in GROUPS for question in group["questions"][1:]]
QUERIES = [group["questions"][0] for group in GROUPS]


def test_order_and_scores_are_sentence_transformers(trained: Path):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(trained / "model"), device="cpu")
    found = rerank(str(trained / "model"), QUERIES, CORPUS, top_k=len(CORPUS))
    for number, query in enumerate(QUERIES):
        expected = model.rank(query, CORPUS)
        scores = {row["corpus_id"]: row["score"] for row in expected}
        assert [row["query_id"] for row in found[number]] == [number] * len(CORPUS)
        assert [row["score"] for row in found[number]] == pytest.approx([row["score"] for row in expected], abs=1e-5)
        # Where scores are nearly equal, either order is right.
        ordered = [scores[row["corpus_id"]] for row in found[number]]
        assert ordered == pytest.approx([row["score"] for row in expected], abs=1e-5)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Queries, corpus and qrels in three of the usual forms."""
    (tmp_path / "queries.tsv").write_text("qid\ttext\n" + "".join(f"q{i}\t{text}\n" for i, text in enumerate(QUERIES)))
    lines = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(CORPUS)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        (f"q{number}", f"d{CORPUS.index(text)}")
        for number, group in enumerate(GROUPS)
        for text in group["questions"][1:]
    ]
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t1\n" for q, d in rows))
    (tmp_path / "some.qrels").write_text("".join(f"{q} 0 {d} 1\n" for q, d in rows))
    names = {"queries": "queries.tsv", "corpus": "corpus.jsonl", "qrels": "qrels.tsv", "trec": "some.qrels"}
    names |= {"run": "out.run", "again": "again.JSONL"}
    return {name: str(tmp_path / file) for name, file in names.items()}


def test_the_command_retrieves_reranks_and_reports(trained: Path, files: dict[str, str], caplog, capsys):
    arguments = ["rerank", str(trained / "model"), "--queries", files["queries"], "--corpus", files["corpus"]]
    retrieved = ["--retriever", BACKBONE, "--retrieve-k", "12", "--top-k", "12", "--qrels", files["qrels"]]
    assert main([*arguments, *retrieved, "--output", files["run"]]) == 0
    figures = {line.split()[0]: line for line in caplog.messages if " before " in line}
    assert set(figures) == {"MRR@10", "nDCG@10", "MAP"}
    lines = [line.split() for line in Path(files["run"]).read_text().splitlines()]
    assert len(lines) == 12 * len(QUERIES)
    assert [line[3] for line in lines[:12]] == [str(rank) for rank in range(1, 13)]
    # The run is itself a file of candidates: the same pairs, the same order.
    with Path(files["run"]).open("a") as run:
        run.write("\n")  # as editors leave it
    again = ["--candidates", files["run"], "--top-k", "12", "--qrels", files["trec"], "--output", files["again"]]
    assert main([*arguments, *again]) == 0
    rows = [json.loads(line) for line in Path(files["again"]).read_text().splitlines()]
    assert [(row["query_id"], row["corpus_id"]) for row in rows] == [(line[0], line[2]) for line in lines]
    assert [row["score"] for row in rows] == pytest.approx([float(line[4]) for line in lines], abs=1e-6)
    capsys.readouterr()
    assert main([*arguments, "--top-k", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(QUERIES)


def test_the_retriever_finds_what_its_cosines_say():
    from sentence_transformers import SentenceTransformer

    from crossenc.backbone import locate

    model = SentenceTransformer(locate(BACKBONE), device="cpu")
    similarities = model.similarity(model.encode(QUERIES), model.encode(CORPUS)).numpy()
    for number, found in enumerate(retrieve(QUERIES, CORPUS, BACKBONE, 5)):
        assert [place for place, _ in found] == (-similarities[number]).argsort()[:5].tolist()
        assert [score for _, score in found] == pytest.approx(sorted(similarities[number])[:-6:-1], abs=1e-5)


def test_the_order_is_that_of_the_logits_where_scores_are_equal(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reranking, "score_all", lambda *_: np.array([20, 40, 30], dtype=np.float32))
    (found,) = rerank(tiny, ["a"], ["b", "c", "d"])
    assert [row["corpus_id"] for row in found] == [1, 2, 0]
    assert [row["score"] for row in found] == [1, 1, 1]
    monkeypatch.setattr(reranking, "score_all", lambda *_: np.tile(np.array([0, 1], dtype=np.float32), 50))
    (found,) = rerank(tiny, ["a"], ["b"] * 100, top_k=100)
    assert [row["corpus_id"] for row in found] == [*range(1, 100, 2), *range(0, 100, 2)]  # as they came


def test_numbers_are_the_ids_of_lists(tiny: Path, tmp_path: Path, caplog):
    """In files they are text; an output that is there is replaced if it may be."""
    (tmp_path / "out.run").write_text("older")
    for name in ("x.qrels", "qrels.dl19-passage"):
        (tmp_path / name).write_text("\ufeff1 0 1 1\n")  # as some editors begin a file
        assert read_qrels(tmp_path / name) == {"1": {"1": 1}}
    os.mkfifo(tmp_path / "pipe")  # as of `<(zcat qrels.gz)`
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["1 0 1 1\n"])
    writer.start()
    assert read_qrels(tmp_path / "pipe") == {"1": {"1": 1}}
    writer.join()
    with caplog.at_level(logging.INFO):
        given = {"candidates": [(1, 0, 0.5), (1, "1", 0.9)], "qrels": [(1, 1, 1)]}
        rerank(tiny, ["a", "b"], ["c", "d"], tmp_path / "out.run", overwrite=True, **given)
    assert "before 1.0000" in caplog.text
    lines = [line.split()[:3] for line in (tmp_path / "out.run").read_text().splitlines()]
    assert sorted(lines) == [["1", "Q0", "0"], ["1", "Q0", "1"]]


def test_candidates_may_come_from_standard_input(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    row = b'{"query_id": 0, "corpus_id": 1, "score": 0.5}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(row)))
    (found,) = rerank(tiny, ["a"], ["b", "c"], candidates="-")
    assert [row["corpus_id"] for row in found] == [1]


def test_a_title_that_is_null_is_no_word(tiny: Path):
    corpus = [{"text": "b", "title": title} for title in (float("nan"), None, "", "t", 5)]
    ((*ranked,),) = rerank(str(tiny), ["a"], corpus)
    found = {row["corpus_id"]: row["score"] for row in ranked}
    assert [found[row] for row in (3, 4)] == pytest.approx(score(str(tiny), [("a", "t b"), ("a", "5 b")]), abs=1e-6)
    assert len({found[row] for row in (0, 1, 2)}) == 1


def test_figures_are_those_of_hand():
    relevant = {"a": {"x": 1}, "b": {"x": 1, "y": 1}}
    ranking = [[(1, 0.9), (0, 0.9)], [(0, 0.5), (2, 0.4), (1, 0.3)]]
    found = evaluate(ranking, relevant, ["a", "b"], ["x", "y", "z"])
    assert found["MRR@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["MAP"] == pytest.approx((1 / 2 + (1 + 2 / 3) / 2) / 2)


def test_figures_look_at_ten_and_count_grades():
    found = [[(place, 0.0) for place in range(12)]]
    items = list(range(12))
    assert evaluate(found, {"q": {"10": 1}}, ["q"], items)["MRR@10"] == 0
    assert evaluate(found, {"q": {"9": 1}}, ["q"], items)["nDCG@10"] == pytest.approx(1 / np.log2(11))
    graded = evaluate(found, {"q": {"0": 1, "1": 2}}, ["q"], items)["nDCG@10"]
    assert graded == pytest.approx((1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)))


def test_what_stood_before_is_the_order_of_the_candidates_scores(tiny: Path, caplog):
    corpus = [{"id": "x", "text": "What is a cat?"}, {"id": "y", "title": "Dogs", "text": "What is a dog?"}]
    rows = [("q", "x", 0.1), ("q", "y", 0.9)]
    for relevant, before in (("y", 1.0), ("x", 0.5)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            given = {"candidates": rows, "qrels": [("q", relevant, 1)], "both_orders": True}
            found = rerank(tiny, [{"id": "q", "text": "What?"}], corpus, **given)
        after = 1.0 if found[0][0]["corpus_id"] == relevant else 0.5
        assert f"MRR@10   before {before:.4f}, after {after:.4f}" in caplog.messages
    expected = score(tiny, [("What?", "What is a cat?"), ("What?", "Dogs What is a dog?")], both_orders=True)
    scores = {row["corpus_id"]: row["score"] for row in found[0]}
    assert [scores["x"], scores["y"]] == pytest.approx(expected.tolist(), abs=1e-6)
    asked = {"retriever": BACKBONE, "retrieve_k": 2, "top_k": 3}
    with caplog.at_level(logging.INFO):
        assert len(rerank(tiny, ["What?"], ["a", "b", "c"], **asked)[0]) == 2


def test_queries_that_nobody_asked_do_not_count(tiny: Path, caplog):
    rows = [("q0", "d0", 1), ("q1", "d0", 1), ("q2", "d0", 0)]
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(("a", "b", "c"))]
    corpus = [{"id": "d0", "text": "a"}]
    with caplog.at_level(logging.INFO):
        rerank(tiny, [queries[0], queries[2]], corpus, qrels=rows)
    assert "MRR@10   after 1.0000" in caplog.messages
    with pytest.raises(DataError, match="nothing as relevant to any of the queries"):
        rerank(tiny, [queries[2]], corpus, qrels=rows)
    with pytest.raises(DataError, match=r"row 1: the grade 0\.9 is not a whole number"):
        rerank(tiny, queries, corpus, qrels=[("q0", "d0", 0.9)])


def test_a_run_keeps_the_order_where_scores_are_equal(tiny: Path, tmp_path: Path):
    copies = ["the same"] * 5
    rerank(tiny, ["a query"], copies, output=str(tmp_path / "new" / "out.run"))
    scores = [float(line.split()[4]) for line in (tmp_path / "new" / "out.run").read_text().splitlines()]
    assert all(np.float32(a) > np.float32(b) for a, b in pairwise(scores))
    assert scores[-1] == pytest.approx(scores[0], rel=1e-5)


def test_what_does_not_fit_is_named(tiny: Path, files: dict[str, str], write, tmp_path: Path, monkeypatch):
    def refused(error: type[Exception], said: str, **options: object) -> None:
        given = {"queries": files["queries"], "corpus": files["corpus"], "output": files["run"], **options}
        with pytest.raises(error, match=said):
            rerank(str(tiny), **given)
        assert not Path(files["run"]).exists()

    refused(DataError, "row 1: there is no query 'q99'", candidates=str(write("a.run", "q99 Q0 d0 1 0.5 x\n")))
    refused(DataError, "row 1: there is no text 'd99'", candidates=str(write("b.run", "q0 Q0 d99 1 0.5 x\n")))
    refused(DataError, "row 1: 3 fields where a TREC file has 6", candidates=str(write("c.run", "q0 d0 1\n")))
    refused(DataError, "'high' is not a finite number", candidates=str(write("d.run", "q0 Q0 d0 1 high x\n")))
    rows = '{"query_id": "q0", "corpus_id": "d0", "score": null}\n'
    refused(DataError, "None is not a finite number", candidates=str(write("d.jsonl", rows)))
    refused(DataError, "needs the columns query_id", candidates=str(write("e.JSONL", '{"q": 1}\n')))
    refused(DataError, "no such file", candidates="gone.run")
    refused(DataError, "refers to a folder", candidates=str(tmp_path))
    refused(DataError, "'nan' is not a finite number", candidates=str(write("f.run", "q0 Q0 d0 1 nan x\n")))
    (tmp_path / "g.run").write_bytes(b"q0 Q0 d\xe9 1 1 x\n")
    refused(DataError, "row 1: not UTF-8", candidates=tmp_path / "g.run")
    refused(DataError, "mark nothing as relevant to any", qrels=str(write("h.qrels", "q99 0 d0 1\n")))
    refused(DataError, r"the id '1' more than once", corpus=[{"id": 1, "text": "a"}, {"id": "1", "text": "b"}])
    for item in ([1], {"a": 1}, None):
        refused(DataError, r"row 1: id is null or not a single value$", corpus=[{"id": item, "text": "a"}])
    refused(DataError, r"row 1: text is null; remove the row or fill it in$", queries=[{"id": 1, "text": None}])
    refused(DataError, r"row 1: text is not UTF-8", queries=["x\ud800"])
    refused(UsageError, "retrieve_k needs a retriever", retrieve_k=100)
    refused(BackboneError, "is a cross-encoder, which computes no vectors", retriever=str(tiny))
    refused(UsageError, "not both", candidates=str(tmp_path / "a.run"), retriever=BACKBONE)
    refused(UsageError, "only one of queries, corpus, .* can be -", queries="-", corpus="-")
    refused(DataError, r"has no column 'text' or .* it has \['a'\]; rename one$", corpus=[{"a": "b"}])
    refused(UsageError, "top_k must be a whole number of at least 1, not 1.5", top_k=1.5)
    refused(UsageError, "retrieve_k must be a whole number", retriever=BACKBONE, retrieve_k=0)
    refused(UsageError, "precision 'best' is not one of", precision="best")
    refused(UsageError, "devices must be a whole number of at least 1, not '2'", devices="2")
    refused(BackboneError, r"there is no .*model\.onnx", backend="onnx", retriever="./neither")
    refused(DataError, "there are no candidates", candidates=str(write("i.run", "\n")))
    refused(UsageError, "cannot hold the id 'q 1'", queries=[{"id": "q 1", "text": "a"}])
    refused(UsageError, "cannot hold the id 'd 1'", corpus=[{"id": "d 1", "text": "a"}])
    for output in (None, tmp_path / "out.jsonl"):  # which can hold it
        rerank(tiny, [{"id": "q 1", "text": "a"}], ["b"], output)
    refused(OutputError, "already exists", output=files["corpus"])
    monkeypatch.setattr(reranking, "require", Mock(side_effect=MissingExtraError("ir_measures is missing")))
    refused(MissingExtraError, "ir_measures is missing", qrels="gone.qrels")  # before all work

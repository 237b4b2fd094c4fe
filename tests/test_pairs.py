"""Reading and checking pairs."""

from __future__ import annotations

import csv
import json
import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc import pairs
from crossenc.errors import DataError, OutputError

HEADER = "question1,question2,is_duplicate\n"


def test_csv_tsv_jsonl_and_parquet_read_the_same(tmp_path: Path):
    rows = [("a, b?", 'say "x"', 1), ("None", "NA", 0), ("多 字", "line\nbreak", 1)]
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question1", "question2", "is_duplicate"), *rows])
    with (tmp_path / "p.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("sentence1", "sentence2", "label"), *rows])
    objects = [{"text1": a, "text2": b, "score": label} for a, b, label in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, objects)))
    pq.write_table(
        pa.Table.from_pylist([{"left": a, "right": b, "same": bool(n)} for a, b, n in rows]), tmp_path / "p.parquet"
    )
    columns = {"text_a": "left", "text_b": "right", "label": "same"}
    expected = [{"row": i, "text_a": a, "text_b": b, "label": float(n)} for i, (a, b, n) in enumerate(rows)]
    for name in ("p.csv", "p.tsv", "p.jsonl"):
        assert pairs.read(str(tmp_path / name)).to_list() == expected
    assert pairs.read(str(tmp_path / "p.parquet"), columns=columns).to_list() == expected


def test_a_long_parquet_is_read_to_its_end(tmp_path: Path):
    count = 10_001  # one more than are read at once
    pq.write_table(pa.table({"text_a": list(map(str, range(count))), "text_b": ["b"] * count}), tmp_path / "p.parquet")
    rows = list(pairs.rows_of_file(tmp_path / "p.parquet", "p"))
    assert [row["text_a"] for row in rows] == list(map(str, range(count)))


def test_columns_of_a_parquet_that_are_not_needed_are_not_read(tmp_path: Path):
    times = pa.array([1], pa.timestamp("us", tz="Foo/Bar"))  # which Python cannot represent
    pq.write_table(pa.table({"a.b": times, "a": ["x"], "text_b": ["y"], "label": [1]}), tmp_path / "p.parquet")
    read = pairs.read(str(tmp_path / "p.parquet"), columns={"text_a": "a"})
    assert read.to_list() == [{"row": 0, "text_a": "x", "text_b": "y", "label": 1.0}]


def test_a_spreadsheets_mark_is_no_part_of_a_name(tmp_path: Path):
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + (HEADER + "a,b,1\n").encode())
    assert pairs.read(str(tmp_path / "p.csv"))["text_a"][:] == ["a"]


def test_a_data_sets_folder_as_on_the_hub_is_read_by_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own" / "data").mkdir(parents=True)
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        rows = pa.Table.from_pylist([{"sentence1": f"a{number}", "sentence2": "b", "label": 1}])
        pq.write_table(rows, tmp_path / "own" / "data" / f"{name}.parquet")
    assert pairs.read(f"{tmp_path / 'own'}:train")["text_a"][:] == ["a0", "a1"]
    assert pairs.read(f"{tmp_path / 'own'}:train[:1]")["text_a"][:] == ["a0"]
    assert pairs.name_and_split("owner/set:train[:9]+test[:9]") == ("owner/set", "train[:9]+test[:9]")
    (tmp_path / "a:b").mkdir()
    assert pairs.name_and_split(f"{tmp_path}/a:b:train[:9]") == (f"{tmp_path}/a:b", "train[:9]")
    monkeypatch.chdir(tmp_path)
    for folder in ("./own", "own"):
        assert pairs.read(f"{folder}:validation")["text_a"][:] == ["a2"]
    with pytest.raises(DataError, match=r"data set \./own, split dev: Unknown split"):
        pairs.read("./own:dev")


def test_a_folder_has_one_file_for_each_split_and_one_to_train_on(tmp_path: Path):
    (tmp_path / "dev.csv").write_text(HEADER)
    with pytest.raises(DataError, match=f"has no train file .*; if it is laid out .* give {tmp_path}:train"):
        pairs.files_of(tmp_path)
    (tmp_path / "train.csv").write_text(HEADER)
    assert pairs.files_of(tmp_path) == {"train": str(tmp_path / "train.csv"), "val": str(tmp_path / "dev.csv")}
    (tmp_path / "val.jsonl").write_text("")
    with pytest.raises(DataError, match=r"has dev\.csv and val\.jsonl for one split; keep one"):
        pairs.files_of(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    (tmp_path / "test.parquet").write_text("")
    for name in ("validation.tsv", "valid.tsv"):
        (tmp_path / "dev.csv").rename(tmp_path / name)
        assert pairs.files_of(tmp_path) == {
            "train": str(tmp_path / "train.csv"),
            "val": str(tmp_path / name),
            "test": str(tmp_path / "test.parquet"),
        }
        (tmp_path / name).rename(tmp_path / "dev.csv")


def test_an_edited_file_is_read_anew(write):
    path = write("p.csv", HEADER + "a,b,1\n")
    assert pairs.read(str(path))["label"][:] == [1.0]
    path.write_text(HEADER + "a,b,0\n")  # of the same size
    assert pairs.read(str(path))["label"][:] == [0.0]
    stamp = path.stat().st_mtime_ns
    path.write_text(HEADER + "a,b,0\nc,d,1\n")
    os.utime(path, ns=(stamp, stamp))  # as unpacking an archive does
    assert pairs.read(str(path))["label"][:] == [0.0, 1.0]
    path.write_text(HEADER + "a,b,0\nc,d,0\n")
    os.utime(path, ns=(stamp, stamp))  # of the same size too
    assert pairs.read(str(path))["label"][:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", HEADER + "a,b,1\na,,0\n", "row 2: question2 is null"),
        ("p.csv", HEADER + "a,b,1\na,b,2\n", "row 2: is_duplicate '2' is not allowed"),
        ("p.csv", HEADER + "a,b,yes\n", "row 1: is_duplicate 'yes' is not allowed"),
        ("p.csv", HEADER + "a,b,nan\n", "row 1: is_duplicate 'nan' is not allowed"),
        ("p.csv", HEADER + "a,b,1.2\n", "row 1: is_duplicate '1.2' is not allowed"),
        ("p.csv", HEADER + "a,b,1\na,b,c,1\n", "row 2: 4 fields where the header has 3"),
        ("p.csv", HEADER + "a,b,\n", "row 1: is_duplicate is empty; use 0 or 1"),
        (
            "p.tsv",
            HEADER + "a,b,1\n",
            "is it separated by ','? a .csv file needs commas, a .tsv file tabs; rename one",
        ),
        ("p.csv", HEADER.replace(",", "\t") + "a\tb\t1\n", r"is it separated by '\t'? a .csv file needs commas"),
        ("p.csv", HEADER, "has no rows"),
        ("p.csv", "", "has no rows"),
        ("p.csv", "\n\n", "has no rows"),
        ("p.csv", "\n" + HEADER + "a,b,2\n", "row 1: is_duplicate '2' is not allowed"),
        ("p.csv", "one,two,label\na,b,1\n", "has no column 'text_a' or 'sentence1'"),
        ("p.jsonl", '{"question1": "a", "question2": 5, "label": 1}\n', "row 1: question2 is not text but int (5)"),
        ("p.jsonl", '{"question1": "a", "question2": null, "label": 1}\n', "row 1: question2 is null"),
        ("p.jsonl", '{"question1": "a", "question2": "b", "label": -1}\n', "row 1: label -1 is not allowed"),
        ("p.jsonl", '{"question1": "a", "question2": "b", "label": 1}\n[1]\n', "row 2: not a JSON object"),
        ("p.jsonl", '{"question1": "a", "question2": "b", "label": 1%s}\n' % ("0" * 400), "row 1: label 10000"),
        ("p.jsonl", "[" * 100_000 + "]" * 100_000, "row 1: not a JSON object"),
        ("p.parquet", "no parquet", "cannot be read as parquet"),
        ("p.txt", "a b", "unknown file format"),
        ("p.csv.gz", "", "unknown file format; the name must end in .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_bad_files_name_file_and_row(write, name: str, text: str, said: str):
    path = write(name, text)
    with pytest.raises(DataError) as caught:
        pairs.read(str(path))
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_what_other_readers_write_or_would_read_is_named(write, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text(HEADER + "NA,b,1\n")
    with pytest.raises(DataError, match=r"row 1: question1 is null; .*datasets reads words such as NA as null"):
        pairs.read(f"{tmp_path}/folder:train")
    assert pairs.read(f"{tmp_path}/folder/train.csv")["text_a"][:] == ["NA"]
    pairs.read(f"{tmp_path}/folder/train.csv").save_to_disk(tmp_path / "saved")
    for named in (f"{tmp_path}/saved:train", f"{tmp_path}/saved"):
        with pytest.raises(DataError, match=r"was written by save_to_disk; turn it into a file: datasets\.load_from"):
            pairs.read(named) if ":" in named else pairs.files_of(Path(named))
    (tmp_path / "folder" / "state.json").write_text("{}")
    assert pairs.files_of(tmp_path / "folder") == {"train": f"{tmp_path}/folder/train.csv"}
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text_a": broken, "text_b": ["b"], "label": [1]}), tmp_path / "broken.parquet")
    with pytest.raises(DataError, match=r"broken.parquet cannot be read as parquet: 'utf-8' codec can't decode"):
        pairs.read(str(tmp_path / "broken.parquet"))
    labels = write("labels.csv", "text_b,label\nb,1\n")
    with pytest.raises(DataError, match="text_a and label are both the column 'label'"):
        pairs.read(str(labels), columns={"text_a": "label"})


def test_a_full_disk_is_named(write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = write("p.csv", HEADER + f"a,{'b' * 9_999},1\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cache cannot be written: .*File too large"):
            pairs.read(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_cache_that_cannot_be_made_is_named(write, monkeypatch: pytest.MonkeyPatch):
    path = write("p.csv", HEADER + "a,b,1\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", f"{path}/cache")  # like a home that cannot be written
    with pytest.raises(OutputError, match=r"p\.csv/cache cannot be written: .*; free .* or set HF_DATASETS_CACHE"):
        pairs.read(str(path))


def test_blank_lines_are_no_rows_and_fields_may_be_long(write):
    long = "long " * 50_000
    table = pairs.read(str(write("p.csv", HEADER + f"a,b,1\n\n{long},d,0\n\n")))
    assert table["text_a"][:] == ["a", long]
    line = '{"text1": "a", "text2": "b", "label": 1}\n'
    assert len(pairs.read(str(write("p.jsonl", f"{line}\n  \n{line}")))) == 2


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path):
    (tmp_path / "p.csv").write_bytes(HEADER.encode() + b"caf\xe9,b,1\n")
    with pytest.raises(DataError, match=r"p\.csv, row 1: not UTF-8"):
        pairs.read(str(tmp_path / "p.csv"))


def test_a_missing_file_and_an_unknown_column_key_are_named(write):
    with pytest.raises(DataError, match="no such file"):
        pairs.read("gone.csv")
    with pytest.raises(DataError, match=r"\./gone: no such file"):
        pairs.read("./gone")
    with pytest.raises(DataError, match="refers to a folder; give one file"):
        pairs.read(".")
    path = write("p.csv", HEADER + "a,b,1\n")
    with pytest.raises(DataError, match="text_a and text_b are both the column 'question2'"):
        pairs.read(str(path), columns={"text_a": "question2"})
    with pytest.raises(DataError, match=r"columns: \['left'\] is not one of \['text_a', 'text_b', 'label'\]"):
        pairs.read(str(path), columns={"left": "question1"})


def test_labels_are_optional_for_prediction_and_may_be_similarities(write):
    path = write("p.csv", "sentence1,sentence2,score\na,b,0.25\na,b,True\na,b, FALSE \n")
    assert pairs.read(str(path))["label"][:] == [0.25, 1.0, 0.0]
    bare = pairs.read(str(write("q.csv", "sentence1,sentence2\na,b\n")), labelled=False)
    assert bare.column_names == ["row", "text_a", "text_b"]


def test_real_pairs_read_as_the_csv_module_reads_them(quora: Path):
    with (quora / "train.tsv").open(newline="", encoding="utf-8") as file:
        expected = [(row["question1"], row["question2"]) for row in csv.DictReader(file, delimiter="\t")]
    table = pairs.read(str(quora / "train.tsv"))
    assert list(zip(table["text_a"][:], table["text_b"][:], strict=True)) == expected


def test_the_sample_is_what_the_readme_of_a_data_set_would_claim():
    groups = pairs.sample_groups()
    questions = [question for group in groups for question in group["questions"]]
    lengths = [len(question.split()) for question in questions]
    assert len(groups) >= 400
    assert len({group["topic"] for group in groups}) >= 60
    assert min(len(group["questions"]) for group in groups) >= 4
    assert len({question.casefold() for question in questions}) == len(questions)
    assert (min(lengths), max(lengths) <= 40) == (3, True)
    held_out = ("what do apples consist of", "what are in apple devices", "good at programming", "good programmer")
    assert not [q for q in questions if any(part in q.casefold() for part in held_out)]


def test_one_split_of_the_sample_is_read_by_its_name():
    splits = pairs.sample_pairs()
    for name, rows in (("sample:test", splits["test"]), ("sample", [row for part in splits.values() for row in part])):
        table = pairs.read(name)
        assert table["text_a"][:] == [row["text_a"] for row in rows]
        assert table["label"][:] == [row["label"] for row in rows]


def test_sample_pairs_are_split_by_group_and_always_the_same():
    splits = pairs.sample_pairs()
    assert splits == pairs.sample_pairs()
    home = {question: i for i, group in enumerate(pairs.sample_groups()) for question in group["questions"]}
    groups = {}
    for split, rows in splits.items():
        assert 0.36 < sum(row["label"] for row in rows) / len(rows) < 0.38
        assert len({(row["text_a"], row["text_b"]) for row in rows}) == len(rows)
        for row in rows:
            assert (home[row["text_a"]] == home[row["text_b"]]) == bool(row["label"])
        groups[split] = {home[row[side]] for row in rows for side in ("text_a", "text_b")}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))

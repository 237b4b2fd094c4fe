"""Models and data sets from the Hub: the real client against a local server that speaks its protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.errors import UsageError
from crossenc.exporting import upload
from crossenc.pairs import sample_pairs

from .conftest import fail, run_all
from .hub_server import COMMIT, TOKEN, HubServer, serve

CARD = """---
configs:
- config_name: pair-class
  data_files: [{split: train, path: pair-class/train-*}]
- config_name: pair
  data_files: [{split: train, path: pair/train-*}]
---
Question pairs.
"""


@pytest.fixture(scope="module")
def hub(trained: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The names that `fit` uses without arguments, over a small backbone and 100 pairs of the embedded sample."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "README.md").write_text(CARD)
    rows = [{"sentence1": r["text_a"], "sentence2": r["text_b"], "label": r["label"]} for r in sample_pairs()["train"]]
    for subset in ("pair-class", "pair"):
        (folder / subset).mkdir()
        pq.write_table(pa.Table.from_pylist(rows[:100]), folder / subset / "train-00000-of-00001.parquet")
    broken = {"script/script.py": "import datasets\n", "bad/bad.jsonl": '{"sentence1": "a"}\n{"sent\n'}
    for name, content in broken.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(content)
    (folder / "part").mkdir()
    (folder / "part" / "part.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 1}\n' * 9)
    repositories = {
        "datasets/owner/part": folder / "part",
        "models/owner/part": tiny_backbone,
        "datasets/owner/script": folder / "script",
        "datasets/owner/bad": folder / "bad",
        "models/distilbert/distilroberta-base": tiny_backbone,
        "models/owner/cross": trained / "model",
        "datasets/sentence-transformers/quora-duplicates": folder,
    }
    with serve(repositories) as server:
        server.broken = {"datasets/owner/part", "models/owner/part"}
        yield server


def fit(home: Path, *arguments: str) -> list[str]:
    return ["fit", "--output", str(home / "runs"), "--trainer.max_steps", "1", *arguments]


ASKED = {
    "backbone owner/gone could not be read from the Hugging Face Hub": ["--model.backbone", "owner/gone"],
    "data set owner/gone could not be read from the Hugging Face Hub": ["--data.source", "owner/gone"],
    "data set owner/part could not be read from the Hugging Face Hub (": ["--data.source", "owner/part"],
    "subset pairs, split train: BuilderConfig 'pairs' not found": ["--data.subset", "pairs"],
    "owner/script, split train: Dataset scripts are no longer": ["--data.source", "owner/script"],
    "data set owner/bad, split train: JSON parse error": ["--data.source", "owner/bad"],
    'Unknown split "dev"': ["--data.source", "sentence-transformers/quora-duplicates:dev"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answers(hub: HubServer, home: Path, trained: Path, pairs_file: Path) -> dict[str, tuple[int, str]]:
    """What the commands of several tests said, and their exit codes: imports take longer than all that they do."""
    commands = {"fit": fit(home), **{line: fit(home / "bad", *arguments) for line, arguments in ASKED.items()}}
    commands["test"] = ["test", "--ckpt_path", str(trained / "best.ckpt"), "--data.source", "owner/gone"]
    commands["part"] = ["score", "owner/part", str(pairs_file), str(home / "part.csv")]
    for model, name in (("owner/cross", "hub"), (str(trained / "model"), "folder")):
        where = ["--data.val_source", str(pairs_file), "--accelerator", "cpu", "--output", str(home / name)]
        commands[f"evaluate {name}"] = ["evaluate", model, *where]
        commands[f"score {name}"] = ["score", model, str(pairs_file), str(home / f"{name}.csv")]
    said = run_all(list(commands.values()), HF_ENDPOINT=hub.endpoint, HF_HOME=str(home / "cache"))
    return dict(zip(commands, said, strict=True))


def test_fit_without_arguments_reads_model_and_pairs_from_the_hub(
    hub: HubServer, answers: dict[str, tuple[int, str]], home: Path
):
    code, said = answers["fit"]
    assert code == 0, said
    assert "arning" not in said
    figures = json.loads((home / "runs" / "run" / "metrics.json").read_text())
    assert (figures["val/rows"], figures["test/rows"]) == (10, 10)
    card = (home / "runs" / "run" / "model" / "README.md").read_text()
    assert "base_model: distilbert/distilroberta-base" in card
    assert "- sentence-transformers/quora-duplicates\n" in card
    read = "\n".join(hub.requests)
    assert f"GET /distilbert/distilroberta-base/resolve/{COMMIT}/model.safetensors" in read
    assert "/pair-class/train-00000-of-00001.parquet" in read
    assert "/pair/train-00000-of-00001.parquet" not in read


def test_what_the_hub_does_not_have_is_one_line(answers: dict[str, tuple[int, str]], home: Path, trained: Path):
    for line in ASKED:
        code, said = answers[line]
        assert code == 2
        assert line in said.splitlines()[-1]
        assert "Traceback" not in said
    assert not list((home / "bad" / "runs").iterdir())
    code, said = answers["part"]
    assert code == 2
    assert said.splitlines()[-1].startswith(
        "crossenc score: error: model owner/part could not be read from the Hugging Face"
    )
    code, said = answers["test"]
    assert code == 2
    assert said.endswith(f"; for the options of the checkpoint's run, add --config {trained / 'config.yaml'}\n")


def test_an_export_is_uploaded_and_a_refused_one_stays(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    old = tmp_path / "hub" / "owner" / "mine" / "onnx" / "model.onnx"  # of an earlier model
    old.parent.mkdir(parents=True)
    old.write_text("other scores")
    command = ["export", str(trained / "best.ckpt"), str(tmp_path / "mine"), "--push-to-hub", "owner/mine", "--private"]

    def refused(endpoint: str, token: str, *more: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint, token))
            return fail(capsys, *command, *more)

    with serve({"models/owner/mine": old.parents[1]}) as server:
        server.uploads = tmp_path / "hub"
        line = refused(server.endpoint, "wrong")
        assert f"{tmp_path / 'mine'} is written, but its upload to owner/mine failed" in line
        assert line.endswith(f"hf upload owner/mine {tmp_path / 'mine'} --private")
        assert (tmp_path / "mine" / "modules.json").is_file()
        known = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": TOKEN}
        known["HF_HUB_DISABLE_XET"] = "1"  # the server knows the older way only
        ((code, said),) = run_all([[*command, "--overwrite"]], **known)
        assert code == 0, said
        assert "arning" not in said
        assert f"uploaded: {server.endpoint}/owner/mine" in said
        assert server.visibility == {"owner/mine": "private"}
    here, there = (
        {f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()}
        for d in (tmp_path / "mine", tmp_path / "hub" / "owner" / "mine")
    )
    assert here == there
    assert 'CrossEncoder("owner/mine")' in (tmp_path / "mine" / "README.md").read_text()
    line = refused("http://127.0.0.1:9", TOKEN, "--overwrite")  # nobody answers there
    assert "hf upload owner/mine" in line
    assert {f.relative_to(tmp_path / "mine") for f in (tmp_path / "mine").rglob("*") if f.is_file()} == set(here)


def test_an_upload_goes_to_what_is_there_too_and_leaves_the_visibility_to_its_owner(tmp_path: Path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n")
    with serve({"models/owner/model": tmp_path / "hub" / "owner" / "model"}) as server:
        server.uploads = tmp_path / "hub"
        client = partial(huggingface_hub.HfApi, server.endpoint, TOKEN)
        monkeypatch.setattr(huggingface_hub, "HfApi", client)
        for _ in range(2):
            assert upload(tmp_path / "model", "owner/model") == f"{server.endpoint}/owner/model"
        assert server.visibility == {"owner/model": None}
        server.visibility["owner/model"] = "public"
        uploads = len(server.requests)
        with pytest.raises(UsageError, match="owner/model exists and is public; make it private"):
            upload(tmp_path / "model", "owner/model", private=True)
        assert not [line for line in server.requests[uploads:] if "commit" in line]
        server.visibility["owner/model"] = "private"
        upload(tmp_path / "model", "owner/model", private=True)


def test_a_model_on_the_hub_is_evaluated_and_scores_as_the_folder_does(
    hub: HubServer, answers: dict[str, tuple[int, str]], home: Path
):
    for name in ("evaluate hub", "score hub", "evaluate folder", "score folder"):
        code, said = answers[name]
        assert code == 0, said
        assert "arning" not in said
    figures = [json.loads((home / name / "metrics.json").read_text()) for name in ("hub", "folder")]
    assert figures[0] == figures[1]
    assert (home / "hub" / "README.md").read_text().startswith("# Evaluation of owner/cross\n")
    assert (home / "hub.csv").read_bytes() == (home / "folder.csv").read_bytes()
    assert "GET /owner/cross/resolve/" in "\n".join(hub.requests)

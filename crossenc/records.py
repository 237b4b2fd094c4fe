"""What an evaluation writes next to a checkpoint: figures in `metrics.json`, each pair's scores in `scores.parquet`.

Both belong to one checkpoint, named by `checkpoints.owner`; when they are written, those of any other are dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .pairs import open_parquet
from .parts import read_json, replacing

FIGURES_FILE = "metrics.json"


def write_figures(folder: Path, owner: str | None, figures: dict[str, float], sources: Mapping[str, str]) -> None:
    """Write `metrics.json`: flat figures such as `val/f1`, the checkpoint that they belong to, and the source of each
    evaluated split, such as `val/source`.

    Figures of the same checkpoint on other splits are kept, all others are dropped; NaN becomes null.
    """
    kept = _read(folder, owner) if owner else {}
    kept = {name: value for name, value in kept.items() if split_of(name) not in sources}
    content: dict[str, Any] = {"checkpoint": owner}
    source_entries = {f"{split}/source": source for split, source in sources.items()}
    for name, value in sorted((kept | figures | source_entries).items()):
        is_nan = isinstance(value, float) and math.isnan(value)
        content[name] = None if is_nan else int(value) if name.endswith("/rows") else value
    with replacing(folder / FIGURES_FILE) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def split_of(figure: str) -> str:
    """The split that a figure's name begins with: `val` for `val/f1` and for `val_unseen/f1`."""
    return re.split("[_/]", figure)[0]


def read_figures(folder: Path, owner: str) -> tuple[dict[str, float], dict[str, str]]:
    """The figures in a folder's `metrics.json`, and the source of each split; both are empty if they belong to another
    checkpoint or there is no file."""
    content = _read(folder, owner)
    sources = {split: content.pop(f"{split}/source") for split in ("val", "test") if f"{split}/source" in content}
    return {name: math.nan if value is None else float(value) for name, value in content.items()}, sources


def _read(folder: Path, owner: str) -> dict[str, Any]:
    content = read_json(folder / FIGURES_FILE)
    return content if content.pop("checkpoint", None) == owner else {}


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds a report of `evaluate`, and neither a run nor a model."""
    if (folder / "config.yaml").exists() or (folder / "config.json").exists():
        return False
    return read_json(folder / FIGURES_FILE).get("checkpoint", "none") is None


SCORES_FILE = "scores.parquet"


def write_scores(folder: Path, owner: str | None, evaluated: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `scores.parquet`: the columns of each evaluated split, one row per pair, with the column `split`."""
    kept = read_scores(folder, owner) if owner else {}
    tables = [
        pa.table({"split": [split] * len(columns["row"]), **columns})
        for split, columns in {**kept, **evaluated}.items()
    ]
    if not tables:  # a fit without dev and test pairs
        return
    table = pa.concat_tables(tables, promote_options="default")
    with replacing(folder / SCORES_FILE) as unfinished:
        pq.write_table(table.replace_schema_metadata({"checkpoint": owner or ""}), unfinished)


def read_scores(folder: Path, owner: str) -> dict[str, dict[str, NDArray[Any]]]:
    """The columns of each split in a folder's `scores.parquet`; empty if they belong to another checkpoint or there is
    no file."""
    file = folder / SCORES_FILE
    if not file.is_file():
        return {}
    with open_parquet(file, str(file)) as opened:
        table = opened.read()
    if (table.schema.metadata or {}).get(b"checkpoint") != owner.encode():
        return {}
    columns = {name: table[name].to_numpy() for name in table.column_names}
    scores = {}
    for split in ("val", "test"):
        in_split = columns["split"] == split
        if in_split.any():
            scores[split] = {name: values[in_split] for name, values in columns.items() if name != "split"}
    return scores

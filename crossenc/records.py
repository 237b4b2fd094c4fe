"""What an evaluation leaves beside a checkpoint: figures in `metrics.json`, each pair's scores in `scores.parquet`.

Both belong to one checkpoint, as `checkpoints.owner` names it; what another left is dropped when they are written.
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
    """Write `metrics.json`: flat, `val/f1` and the like, the checkpoint that they belong to, and as `val/source` what
    the pairs of a split were read from.

    What stands there already of the same checkpoint and of other splits is kept, the rest is dropped; NaN becomes null.
    """
    known = _read(folder, owner) if owner else {}
    known = {name: value for name, value in known.items() if split_of(name) not in sources}
    content: dict[str, Any] = {"checkpoint": owner}
    named = {f"{split}/source": source for split, source in sources.items()}
    for name, value in sorted((known | figures | named).items()):
        number = isinstance(value, float)
        content[name] = None if number and math.isnan(value) else int(value) if name.endswith("/rows") else value
    with replacing(folder / FIGURES_FILE) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def split_of(figure: str) -> str:
    """`val` of `val/f1` and of `val_unseen/f1`."""
    return re.split("[_/]", figure)[0]


def read_figures(folder: Path, owner: str) -> tuple[dict[str, float], dict[str, str]]:
    """The figures in a folder's `metrics.json`, and what the pairs of each split were read from; both are empty if they
    belong to another checkpoint or there is no file."""
    found = _read(folder, owner)
    sources = {split: found.pop(f"{split}/source") for split in ("val", "test") if f"{split}/source" in found}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}, sources


def _read(folder: Path, owner: str) -> dict[str, Any]:
    file = folder / FIGURES_FILE
    content: dict[str, Any] = read_json(file) if file.is_file() else {}
    return content if content.pop("checkpoint", None) == owner else {}


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds the report of `evaluate`, and no run and no model."""
    file = folder / FIGURES_FILE
    if not file.is_file() or (folder / "config.yaml").exists() or (folder / "config.json").exists():
        return False
    return read_json(file).get("checkpoint", "none") is None


SCORES_FILE = "scores.parquet"


def write_scores(folder: Path, owner: str | None, evaluated: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `scores.parquet`: the columns of each evaluated split, one row a pair, marked by `split`."""
    known = read_scores(folder, owner) if owner else {}
    tables = [
        pa.table({"split": [split] * len(columns["row"]), **columns})
        for split, columns in {**known, **evaluated}.items()
    ]
    if not tables:  # a fit without dev and test pairs
        return
    table = pa.concat_tables(tables, promote_options="default")
    with replacing(folder / SCORES_FILE) as unfinished:
        pq.write_table(table.replace_schema_metadata({"checkpoint": owner or ""}), unfinished)


def read_scores(folder: Path, owner: str) -> dict[str, dict[str, NDArray[Any]]]:
    """The columns of each split in a folder's `scores.parquet`; none if they belong to another checkpoint."""
    file = folder / SCORES_FILE
    if not file.is_file():
        return {}
    with open_parquet(file, str(file)) as content:
        table = content.read()
    if (table.schema.metadata or {}).get(b"checkpoint") != owner.encode():
        return {}
    columns = {name: table[name].to_numpy() for name in table.column_names}
    found = {}
    for split in ("val", "test"):
        mine = columns["split"] == split
        if mine.any():
            found[split] = {name: values[mine] for name, values in columns.items() if name != "split"}
    return found

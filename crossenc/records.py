"""What an evaluation leaves beside a checkpoint: figures in `metrics.json`, each pair's scores in `scores.parquet`.

Both belong to one checkpoint; what another left is dropped when they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .parts import replacing

FIGURES_FILE = "metrics.json"


def write_figures(folder: Path, checkpoint: str | None, figures: dict[str, float]) -> None:
    """Write `metrics.json`: flat, `val/f1` and the like, and the name of the checkpoint that they belong to.

    Figures of the same checkpoint that stand there already are kept, those of another are dropped; NaN becomes null.
    """
    known = read_figures(folder / checkpoint) if checkpoint else {}
    content: dict[str, Any] = {"checkpoint": checkpoint}
    for name, value in sorted((known | figures).items()):
        content[name] = None if math.isnan(value) else int(value) if name.endswith("/rows") else value
    with replacing(folder / FIGURES_FILE) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_figures(checkpoint: Path) -> dict[str, float]:
    """The figures in the `metrics.json` beside a checkpoint; none if they belong to another or there is no file."""
    file = checkpoint.parent / FIGURES_FILE
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if content.pop("checkpoint", None) != checkpoint.name:
        return {}
    return {name: math.nan if value is None else float(value) for name, value in content.items()}


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds the report of `evaluate`, and no run and no model."""
    file = folder / FIGURES_FILE
    if not file.is_file() or (folder / "config.yaml").exists() or (folder / "config.json").exists():
        return False
    return json.loads(file.read_text(encoding="utf-8")).get("checkpoint", "none") is None


SCORES_FILE = "scores.parquet"


def write_scores(folder: Path, checkpoint: str | None, evaluated: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `scores.parquet`: the columns of each evaluated split, one row a pair, marked by `split`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = read_scores(folder / checkpoint) if checkpoint else {}
    tables = [
        pa.table({"split": [split] * len(columns["row"]), **columns})
        for split, columns in {**known, **evaluated}.items()
    ]
    if not tables:  # a fit without dev and test pairs
        return
    table = pa.concat_tables(tables, promote_options="default")
    with replacing(folder / SCORES_FILE) as unfinished:
        pq.write_table(table.replace_schema_metadata({"checkpoint": checkpoint or ""}), unfinished)


def read_scores(checkpoint: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """The columns of each split in the `scores.parquet` beside a checkpoint; none if they belong to another."""
    import pyarrow.parquet as pq

    file = checkpoint.parent / SCORES_FILE
    if not file.is_file():
        return {}
    table = pq.read_table(file)
    if (table.schema.metadata or {}).get(b"checkpoint") != checkpoint.name.encode():
        return {}
    columns = {name: table[name].to_numpy() for name in table.column_names}
    found = {}
    for split in ("val", "test"):
        mine = columns["split"] == split
        if mine.any():
            found[split] = {name: values[mine] for name, values in columns.items() if name != "split"}
    return found

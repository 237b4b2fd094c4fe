"""The model card: facts of a checkpoint in, README.md out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

A cross-encoder: it reads two questions at once and gives one score from 0 to 1 for whether they ask the same thing.
It was made from `{{ backbone }}` with [crossenc](https://pypi.org/project/crossenc/) {{ version }}.

## Use

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{{ name }}")
scores = model.predict([("How do I learn to swim?", "What is the best way to learn swimming?")])
```

```python
from transformers import pipeline

scorer = pipeline("text-classification", model="{{ name }}")
scorer({"text": "How do I learn to swim?", "text_pair": "What is the best way to learn swimming?"})
```

Both give the score after the sigmoid. {% if threshold is not none -%}
A score of {{ "%.4f" | format(threshold) }} or more means a duplicate: the threshold with the best F1 on the dev pairs.
{%- endif %}
Pairs of more than {{ max_length }} tokens are cut.

## Metrics

{% if metrics -%}
| metric | {{ metrics | join(" | ") }} |
|---|{{ "---|" * metrics | length }}
{% for row in metric_rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
Accuracy, F1, precision and recall are taken at the threshold above, which the dev pairs chose; "own best" is the
figure at the threshold that suits the very pairs it is measured on, as sentence-transformers reports it.
{%- else -%}
None were measured.
{%- endif %}

## Training data

{{ data_text }}

## Training

| | |
|---|---|
{% for name, value in settings.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}"""

SHOWN = ("average_precision", "roc_auc", "accuracy", "f1", "precision", "recall", "loss", "rows")


def write_card(folder: Path, name: str, checkpoint: dict[str, Any], figures: dict[str, float], max_length: int) -> None:
    """Write `README.md` into an export.

    Args:
        folder: the export.
        name: what the model is called in the card.
        checkpoint: the Lightning checkpoint that was exported; its hyper-parameters and data facts are told.
        figures: metrics such as `val/f1` and `test/f1_best`, of that very checkpoint.
        max_length: in tokens.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from . import __version__

    settings, data = checkpoint["hyper_parameters"], checkpoint.get("PairDataModule") or {}
    splits = [split for split in ("val", "test") if f"{split}/rows" in figures]
    source, on_hub = str(data.get("source", "unknown data")), is_hub_id(str(data.get("source", "")))
    card = ModelCard.from_template(
        ModelCardData(
            library_name="sentence-transformers",
            pipeline_tag="text-ranking",
            tags=["sentence-transformers", "cross-encoder", "reranker", "duplicate-questions", "crossenc"],
            base_model=settings["backbone"] if is_hub_id(settings["backbone"]) else None,
            datasets=[source.partition(":")[0]] if on_hub else None,
            model_name=name,
            eval_results=_eval_results(splits, figures, source if on_hub else Path(source).name) or None,
        ),
        template_str=TEMPLATE,
        name=name,
        backbone=_shown_path(settings["backbone"]),
        version=__version__,
        threshold=checkpoint["crossenc"]["threshold"],
        max_length=max_length,
        metrics=[title for split in splits for title in (split, f"{split}, own best")],
        metric_rows=[
            [metric, *(_cell(figures, f"{split}/{metric}{best}") for split in splits for best in ("", "_best"))]
            for metric in SHOWN
        ],
        data_text=_data_text(data, source if on_hub else Path(source).name),
        settings=_settings(settings, data, checkpoint),
    )
    card.save(folder / "README.md")


def add_onnx(folder: Path, figures: dict[str, float]) -> None:
    """Tell of an export's ONNX files in its card.

    Args:
        folder: the export.
        figures: of the file with 8-bit weights, if there is one: `rows`, the average precision of `onnx` and
            `onnx-int8` on them, and the largest `difference` of scores.
    """
    text = """

## ONNX

`onnx/model.onnx` gives the same scores by onnxruntime, in fp32:

```python
model = CrossEncoder("{name}", backend="onnx")
```
"""
    int8 = """
`onnx/model_qint8.onnx` has its weights in 8 bits (`model_kwargs={{"file_name": "onnx/model_qint8.onnx"}}`). On
{rows:,.0f} dev pairs its average precision is {onnx-int8:.4f}, and that of fp32 {onnx:.4f}: a loss of {loss:.4f}.
Scores differ by {difference:.3f} at most.
"""
    card = folder / "README.md"
    content = card.read_text(encoding="utf-8")
    name = re.search(r"^# (.*)$", content, re.MULTILINE)
    content = content.rstrip() + text.format(name=name[1] if name else folder.name)
    if figures:
        content += int8.format(**figures, loss=figures["onnx"] - figures["onnx-int8"])
    card.write_text(content, encoding="utf-8")


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id on the Hub (`owner/name`) and is no path of this machine."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", name)) and not Path(name).exists() and name[0] not in "./"


def _shown_path(name: str) -> str:
    return name if is_hub_id(name) or name.startswith("package:") else Path(name).name


def _cell(figures: dict[str, float], key: str) -> str:
    value = figures.get(key)
    return "" if value is None else f"{value:,.0f}" if key.endswith("rows") else f"{value:.4f}"


def _eval_results(splits: list[str], figures: dict[str, float], data: str) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="cross-encoder-classification",
            task_name="Cross Encoder Classification",
            dataset_type=data,
            dataset_name=f"{data} ({split})",
            dataset_split=split,
            metric_type=metric,
            metric_name=metric.replace("_", " ").capitalize(),
            metric_value=figures[f"{split}/{metric}"],
        )
        for split in splits
        for metric in SHOWN[:6]
        if figures[f"{split}/{metric}"] == figures[f"{split}/{metric}"]  # NaN stands where a set has one label only
    ]


def _data_text(data: dict[str, Any], source: str) -> str:
    if not data:
        return "Not recorded."
    parts = [
        f"{data['rows'][split]:,} pairs for {use} ({100 * data['duplicates'][split]:.1f} % duplicates)"
        for split, use in (("train", "training"), ("val", "dev"), ("test", "test"))
        if split in data["rows"]
    ]
    subset = f", subset `{data['subset']}`" if data["subset"] else ""
    return f"`{source}`{subset}, split by {data['split']}: {'; '.join(parts)}."


def _settings(settings: dict[str, Any], data: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Everything that differs from nothing: the model's arguments, the loader's, the Trainer's."""
    ours = {name: value for name, value in settings.items() if value not in (None, False, 0) and name != "backbone"}
    return {
        **ours,
        **{name: data["plan"][name] for name in ("batch_size", "batch_by", "window", "seed") if "plan" in data},
        **checkpoint["crossenc"]["training"],
        "steps": checkpoint["global_step"],
        "epochs": checkpoint["epoch"] + 1,
    }

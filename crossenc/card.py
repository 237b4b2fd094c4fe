"""The model card, `README.md` of an export, from the facts in a checkpoint; and the report of an evaluation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .errors import one_line
from .pairs import SUFFIXES

_TEMPLATES = Path(__file__).with_name("templates")

TITLES = {
    "train": "train",
    "predict": "predict",
    "val": "dev",
    "val_unseen": "dev, unseen questions",
    "test": "test",
    "test_unseen": "test, unseen questions",
}
# The rows of the metric table, and the format of their figures.
SHOWN = {
    "rows": ("pairs", "{:,.0f}"),
    "duplicates": ("share of duplicates", "{:.3f}"),
    "threshold": ("threshold", "{:.4f}"),
    "average_precision": ("average precision", "{:.4f}"),
    "roc_auc": ("ROC AUC", "{:.4f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "f1": ("F1", "{:.4f}"),
    "precision": ("precision", "{:.4f}"),
    "recall": ("recall", "{:.4f}"),
    "accuracy_best": ("accuracy, own best", "{:.4f}"),
    "f1_best": ("F1, own best", "{:.4f}"),
    "precision_best": ("precision, own best", "{:.4f}"),
    "recall_best": ("recall, own best", "{:.4f}"),
    "calibration_error": ("calibration error", "{:.4f}"),
    "calibration_error_chance": ("calibration error, by chance", "{:.4f}"),
    "calibration_error_raw": ("calibration error before calibration", "{:.4f}"),
    "calibration_error_if_calibrated": ("calibration error, if calibrated on the dev pairs", "{:.4f}"),
    "brier": ("Brier score", "{:.4f}"),
    "brier_raw": ("Brier score before calibration", "{:.4f}"),
    "brier_if_calibrated": ("Brier score, if calibrated on the dev pairs", "{:.4f}"),
    "swap_gap_mean": ("difference of scores when swapped, mean", "{:.4f}"),
    "swap_gap_p99": ("difference of scores when swapped, 99th percentile", "{:.4f}"),
    "swap_flips": ("decisions that flip when swapped", "{:,.0f}"),
    "loss": ("cross-entropy before calibration", "{:.4f}"),
}
_ON_HUB = ("average_precision", "roc_auc", "accuracy", "f1", "precision", "recall")
_PICTURES = {
    "precision_recall": "Precision over recall, with the threshold",
    "reliability": "Share of duplicates over score, without calibration and with it",
    "scores": "Scores of duplicates and of others",
    "learning": "Loss and average precision over the steps",
}


def write_card(
    folder: Path,
    name: str,
    checkpoint: dict[str, Any],
    figures: dict[str, float],
    max_length: int,
    sources: Mapping[str, str],
    dev: Mapping[str, Any] | None = None,
    onnx: dict[str, float] | None = None,
) -> None:
    """Write `README.md` into an export, with the plots in its `figures/`.

    Args:
        name: the model's name; if it is a Hub id, the card loads the model from there.
        checkpoint: the Lightning checkpoint that was exported; the card shows its hyperparameters and data.
        figures: metrics of this very checkpoint, such as `val/f1` and `test/f1_best`.
        max_length: maximum length of a pair, in tokens.
        sources: for each split whose figures may belong to other pairs than the run's, what these were read from.
        dev: the columns of the dev pairs, for the most confident errors.
        onnx: None without ONNX files, and empty without 8-bit weights; else the number of dev pairs (`rows`), the
            average precision of `onnx` and `onnx-int8` on them, and the largest `difference` between scores.
    """
    from huggingface_hub import ModelCard, ModelCardData

    settings, data = checkpoint["hyper_parameters"], checkpoint.get("PairDataModule") or {}
    if data:
        data = _measured(data, sources, figures)
    source = str(data.get("source", "unknown data"))
    card = ModelCard.from_template(
        ModelCardData(
            library_name="sentence-transformers",
            pipeline_tag="text-ranking",
            tags=["sentence-transformers", "cross-encoder", "reranker", "duplicate-questions", "crossenc"],
            base_model=settings["backbone"] if is_hub_id(settings["backbone"]) else None,
            datasets=[source.partition(":")[0]] if is_hub_id(source) else None,
            model_name=name,
            eval_results=_eval_results(figures, data) or None,
        ),
        template_path=str(_TEMPLATES / "card.md"),
        name=name,
        place=name if "/" in name else "path/to/this/folder",
        backbone=_shown_path(settings["backbone"]),
        version=__version__,
        summary=_summary(figures),
        calibrated=list(checkpoint["crossenc"]["calibration"]) != [1.0, 0.0],
        max_length=max_length,
        data_text=_data_text(data),
        settings=_settings(settings, data, checkpoint),
        onnx=onnx,
        threshold=checkpoint["crossenc"]["threshold"],
        report=_report(folder, figures, checkpoint["crossenc"]["threshold"], dev),
    )
    card.save(folder / "README.md")


def write_report(
    folder: Path,
    name: str,
    figures: dict[str, float],
    threshold: float | None,
    sources: Mapping[str, str],
    dev: Mapping[str, Any] | None,
) -> None:
    """Write `README.md` with an evaluation's metrics, plots and errors; arguments as in `write_card`."""
    text = _report(folder, figures, threshold, dev, folded=False)
    data = ", ".join(f"{TITLES[split]} pairs from `{_shown_path(source)}`" for split, source in sources.items())
    parts = [f"# Evaluation of {_shown_path(name)}", f"By crossenc {__version__}; {data}.", _summary(figures), text]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _report(
    folder: Path,
    figures: dict[str, float],
    threshold: float | None,
    dev: Mapping[str, Any] | None,
    folded: bool = True,
) -> str:
    """Metrics, plots and errors in Markdown."""
    from jinja2 import Template

    splits, rows = metric_table(figures, folded)
    shown = [(name, text) for name, text in _PICTURES.items() if (folder / "figures" / f"{name}.png").is_file()]
    template = Template((_TEMPLATES / "report.md").read_text(encoding="utf-8"))
    errors = worst_errors(dev, 0.5 if threshold is None else threshold) if dev else []
    # In an evaluation, dev pairs with one label choose no threshold, and the model keeps its own.
    kept = not folded and not 0 < figures.get("val/duplicates", 0) < 1
    report = template.render(
        splits=splits, metric_rows=rows, threshold=threshold, kept=kept, pictures=shown, errors=errors
    )
    return str(report).strip()


def metric_table(figures: dict[str, float], folded: bool = True) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the metric table, with intervals. `folded` is whether a calibration may be part of the
    scores; without it, these are the model's own."""
    splits = [split for split in TITLES if f"{split}/rows" in figures]
    rows = [
        [
            title if folded else title.removesuffix(" before calibration"),
            *(_cell(figures, f"{split}/{metric}", form) for split in splits),
        ]
        for metric, (title, form) in SHOWN.items()
        if (folded or not metric.endswith("_raw")) and any(f"{split}/{metric}" in figures for split in splits)
    ]
    return [TITLES[split] for split in splits], rows


def _summary(figures: dict[str, float]) -> str:
    """What to expect of the model, in a few sentences; empty without figures."""
    split = next((split for split in ("test", "val") if f"{split}/rows" in figures), None)
    if split is None:
        return ""

    def share(metric: str) -> str:
        return _cell(figures, f"{split}/{metric}", "{:.1f}", scale=100, unit=" %")

    duplicates = 100 * figures[f"{split}/duplicates"]
    text = (
        f"Of {figures[f'{split}/rows']:,.0f} {TITLES[split]} pairs, {duplicates:.1f} % of them duplicates, "
        f"it classifies {share('accuracy')} correctly"
    )
    if duplicates:
        text += (
            f"; it finds {share('recall')} of the duplicates, and {share('precision')} of the pairs that it "
            "calls duplicates are duplicates"
        )
    text += "."
    if not math.isnan(figures[f"{split}/average_precision"]):  # NaN if all labels are the same
        text += f" Its average precision is {share('average_precision')}."
    if (flips := figures.get(f"{split}/swap_flips")) is not None:
        text += f" Swapping the two texts changes {flips:,.0f} of the decisions."
    return text


def worst_errors(columns: Mapping[str, Any], threshold: float) -> list[list[str]]:
    """The ten most confident wrong decisions: score, label and both texts, for a Markdown table.

    `columns` are `label`, `score`, `text_a` and `text_b` of an evaluated split.
    """
    scores, labels, a, b = (columns[name] for name in ("score", "label", "text_a", "text_b"))
    wrong = [i for i, score in enumerate(scores) if (score >= threshold) != (labels[i] >= 0.5)]
    wrong.sort(key=lambda i: -abs(scores[i] - labels[i]))
    return [[f"{scores[i]:.3f}", f"{labels[i]:g}", _quote(a[i]), _quote(b[i])] for i in wrong[:10]]


def _quote(text: str) -> str:
    """A text for a Markdown table: escaped, on one line, and of at most 200 characters."""
    text = one_line(text)
    text = text if len(text) <= 200 else text[:199] + "…"
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", text)


def is_hub_id(name: str) -> bool:
    """Whether a name looks like a Hub id (`owner/name`) and not like a path on this machine."""
    path = Path(name)  # it may be gone by now, or relative to another folder
    local = path.exists() or path.suffix.lower() in SUFFIXES or name[0] in "./"
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", name)) and not local


def _shown_path(name: str) -> str:
    """A Hub id or a package unchanged, and the last name of a path: a card must not reveal more of the machine."""
    if is_hub_id(name) or name.startswith("package:"):
        return name
    in_run = Path(name).name in ("model", "best.ckpt", "last.ckpt")  # then the name of the run's folder says more
    shown = "/".join(Path(name).absolute().parts[-1 - in_run :])
    return shown.replace("`", "'")  # it is shown between backticks


def _cell(figures: dict[str, float], key: str, form: str, scale: float = 1, unit: str = "") -> str:
    """A figure with its interval, if it has one; empty if the figure is unknown."""
    value, low, high = (scale * figures.get(f"{key}{end}", math.nan) for end in ("", "_low", "_high"))
    if math.isnan(value):
        return ""
    text = form.format(value) + unit
    return text if math.isnan(low) else f"{text} ({form.format(low)} to {form.format(high)})"


def _eval_results(figures: dict[str, float], data: dict[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="cross-encoder-classification",
            task_name="Cross Encoder Classification",
            dataset_type=_source_of(split, data).partition(":")[0],
            # The subset is that of the training pairs' source.
            dataset_config=data.get("subset") if _source_of(split, data) == _source_of("train", data) else None,
            dataset_name=f"{_source_of(split, data)} ({TITLES[split]})",
            dataset_split=split,
            metric_type=metric,
            metric_name=SHOWN[metric][0],
            metric_value=figures[f"{split}/{metric}"],
        )
        for split in TITLES
        for metric in _ON_HUB
        if not math.isnan(figures.get(f"{split}/{metric}", math.nan))  # NaN if all labels are the same
    ]


def _measured(data: dict[str, Any], sources: Mapping[str, str], figures: dict[str, float]) -> dict[str, Any]:
    """A run's data facts, changed to those of the pairs that the figures were measured on."""
    for split, source in sources.items():
        facts = {"rows": int(figures[f"{split}/rows"]), "duplicates": figures[f"{split}/duplicates"], "sources": source}
        data = data | {name: data.get(name, {}) | {split: value} for name, value in facts.items()}
    return data


def _source_of(split: str, data: dict[str, Any]) -> str:
    """The source of a split's pairs, in the form that a card may show."""
    source = data.get("sources", {}).get(split.partition("_")[0])
    return _shown_path(str(source or data.get("source", "unknown data")))


def _data_text(data: dict[str, Any]) -> str:
    if not data:
        return "Not recorded."
    source = _source_of("train", data)
    parts = [
        f"{data['rows'][split]:,} pairs for {use} ({100 * data['duplicates'][split]:.1f} % duplicates)"
        + (f" from `{_source_of(split, data)}`" if _source_of(split, data) != source else "")
        for split, use in (("train", "training"), ("val", "dev"), ("test", "test"))
        if split in data["rows"]
    ]
    subset = f", subset `{data['subset']}`" if data["subset"] else ""
    split = f", split by {data['split']}" if data["split"] else ""  # None if every split has its own source
    return f"`{source}`{subset}{split}: {'; '.join(parts)}."


def _settings(settings: dict[str, Any], data: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """All settings: those of the model, of the data and of the Trainer, and what the training took."""
    ours = {name: value for name, value in settings.items() if value is not None and name != "backbone"}
    cost, took = checkpoint.get("callbacks", {}).get("Cost", {}), {}
    if cost.get("seconds"):
        took["duration"] = f"{cost['seconds'] / 60:.1f} minutes"
    if cost.get("energy_kwh"):
        took["energy"] = f"{cost['energy_kwh']:.4f} kWh (estimated by codecarbon)"
    return {
        **ours,
        **{name: data["plan"][name] for name in ("batch_size", "batch_by", "window", "seed") if "plan" in data},
        **{name: data[name] for name in ("limit", "transitive") if data.get(name)},
        **checkpoint["crossenc"]["training"],
        **took,
        "steps": checkpoint["global_step"],
        # The epochs that were begun: `epoch` does not count the last one before its validation.
        "epochs": checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"],
    }

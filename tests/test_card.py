"""The model card of an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crossenc.card import is_hub_id


def test_the_card_tells_data_metrics_and_settings(trained: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(trained / "model" / "README.md")
    figures = json.loads((trained / "metrics.json").read_text())
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "text-ranking"
    assert results["test", "f1"] == figures["test/f1"]
    assert {r.task_type for r in card.data.eval_results} == {"cross-encoder-classification"}
    assert "48 pairs for training (43.8 % duplicates)" in card.text
    assert f"| f1 | {figures['val/f1']:.4f} |" in card.text
    assert "| learning_rate | 5e-05 |" in card.text
    assert str(trained.parent) not in card.text


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        ("owner/name", True),
        ("owner/name:train", True),
        ("./folder/name", False),
        ("/folder/name", False),
        ("data.csv", False),
        ("package:name/model", False),
        ("sample", False),
    ],
)
def test_only_hub_ids_are_named_as_such(name: str, on_hub: bool):
    assert is_hub_id(name) == on_hub

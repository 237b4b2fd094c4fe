"""The pictures: what they show, that they can be read, and that loggers get them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossenc.figures import draw, draw_learning, save


def columns(count: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    scores = draw.random(count)
    labels = (draw.random(count) < scores).astype(float)
    return {"label": labels, "score": scores, "score_raw": scores**3, "score_crossed": scores}


def test_pictures_show_threshold_both_calibrations_and_both_labels(tmp_path: Path):
    pictures = draw({"val": columns(800, 0), "test": columns(500, 1)}, 0.4)
    assert list(pictures) == ["precision_recall", "reliability", "scores"]
    for figure in pictures.values():
        (axes,) = figure.axes
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert figure.get_facecolor() == (1, 1, 1, 1)  # opaque: the same on a dark page
        sizes = [text.get_fontsize() for text in [axes.title, axes.xaxis.label, *axes.get_xticklabels()]]
        assert min(sizes) * figure.dpi / 72 / 2 >= 12  # pixels, shown 600 wide
    curve = pictures["precision_recall"].axes[0]
    told = [text.get_text() for text in curve.get_legend().get_texts()]
    assert told == ["dev, 800 pairs", "test, 500 pairs", "at threshold 0.400"]
    reliability = pictures["reliability"].axes[0].get_lines()
    assert [line.get_label() for line in reliability] == ["true probabilities", "before calibration", "calibrated"]
    raw = columns(50, 0) | {"score": columns(50, 0)["score_raw"]}
    as_it_is = draw({"val": raw}, 0.4)["reliability"].axes[0].get_lines()
    assert [line.get_label() for line in as_it_is[1:]] == ["scores", "if calibrated on the dev pairs"]
    assert np.abs(reliability[2].get_xdata() - reliability[2].get_ydata()).max() < 0.2
    assert np.abs(reliability[1].get_xdata() - reliability[1].get_ydata()).max() > 0.3
    save(pictures, tmp_path / "figures")
    for name in pictures:
        content = (tmp_path / "figures" / f"{name}.png").read_bytes()
        assert int.from_bytes(content[16:20], "big") == 1200


def test_pictures_show_what_was_found():
    found = {"label": np.array([1, 0.5, 0, 0]), "score": np.array([0.92, 0.62, 0.72, 0.12])}
    found |= {"score_raw": found["score"] / 3, "score_crossed": found["score"][::-1].copy()}
    pictures = draw({"val": columns(50, 0), "test": found}, 0.65)
    _, _, curve, point, _ = pictures["precision_recall"].axes[0].get_lines()  # the first two are of the dev pairs
    assert {(0.5, 1.0), (1.0, 0.667)} <= set(map(tuple, curve.get_xydata().round(3).tolist()))  # recall, precision
    assert point.get_xydata().round(3).tolist() == [[0.5, 0.5]]
    raw = pictures["reliability"].axes[0].get_lines()[1].get_xydata()  # mean score of a bin, share of duplicates in it
    assert raw.round(3).tolist() == [[0.04, 0], [0.223, 0.5], [0.307, 1]]
    plain = draw({"val": found | {"score_crossed": found["score_raw"]}}, None)["reliability"].axes[0].get_lines()
    assert [line.get_label() for line in plain] == ["true probabilities", "scores"]
    assert pictures["reliability"].axes[0].get_title() == "Reliability, 4 test pairs"
    (axes,) = pictures["scores"].axes
    assert axes.get_title() == "Scores by label, 4 test pairs"
    bars = {part[0].get_label(): np.flatnonzero(part.datavalues).tolist() for part in axes.containers}
    assert bars == {"not a duplicate": [2, 14], "duplicate": [12, 18]}  # of twenty
    assert axes.get_lines()[0].get_xdata() == [0.65, 0.65]


def test_there_is_nothing_to_draw_of_one_label_or_without_a_log(tmp_path: Path):
    alike = columns(50, 0) | {"label": np.zeros(50)}
    assert draw({"val": alike}, 0.5) == draw({"val": alike | {"label": np.linspace(0.5, 1, 50)}}, 0.5) == {}
    assert list(draw({"val": columns(50, 0), "test": alike}, None)) == ["precision_recall", "reliability", "scores"]
    assert draw_learning(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("step,train/loss\n9,0.5\n19,0.4\n")
    assert len(draw_learning(tmp_path).axes) == 1


def test_learning_curves_go_on_over_the_parts_of_a_run(tmp_path: Path):
    head = "step,train/loss,val/loss,val/average_precision\n"
    (tmp_path / "metrics-2.csv").write_text(head + "9,0.5,,\n9,,0.6,0.7\n19,0.9,,\n")
    # Resumed from step 0, and the next part from step 9.
    (tmp_path / "metrics-10.csv").write_text(head + "9,0.6,,\n14,0.5,,\n")
    (tmp_path / "metrics.csv").write_text(head + "19,0.4,,\n19,,0.5,0.8\n")
    losses, precision = draw_learning(tmp_path).axes
    assert [line.get_xdata().tolist() for line in losses.get_lines()] == [[10, 15, 20], [10, 20]]
    assert losses.get_lines()[0].get_ydata().tolist() == [0.6, 0.5, 0.4]
    assert precision.get_lines()[0].get_ydata().tolist() == [0.7, 0.8]
    assert precision.get_xlabel() == "step"


def test_tensorboard_gets_the_pictures_of_each_validation(trained: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = []
    for file in trained.glob("events.out.tfevents.*"):
        events = accumulator.EventAccumulator(str(file))
        events.Reload()
        shown += [(tag, image.step) for tag in events.Tags()["images"] for image in events.Images(tag)]
    # Not of the look at a few pairs before the first step, nor of that after the last.
    assert sorted(shown) == [("val/precision_recall", 6), ("val/reliability", 6), ("val/scores", 6)]

"""Curves of a run: what was logged is drawn once, in at most six panels that say what they show."""

import json

import pytest

from engram_hf import plot_training
from engram_hf.insight.plotting import _figures, _panels


def history(layers=(1, 3)) -> list[dict]:
    """What Trainer and the callbacks log."""
    lines = []
    for step in (10, 20, 30):
        line = {"step": step, "loss": 5 - step / 20, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": step / 30}
        for layer in layers:
            name = f"layer_{layer}"
            line |= {
                f"engram/gate_mean/{name}": 0.6,
                f"engram/gate_mean/{name}/stream_0": 0.5,
                f"engram/gate_std/{name}": 0.1,
                f"engram/memory_share/{name}": step / 100,
                f"engram/rows_touched/{name}": step / 60,
                f"engram/rows_never_touched/{name}": 1 - step / 60,
                f"engram/ngrams_per_row/{name}": 1.5,
                f"engram/ngrams_per_row_perfect_hash/{name}": 1.4,
                f"engram/row_norm/{name}": 2.0,
                f"engram/row_update_norm/{name}": 0.02,
                f"engram/row_norm/{name}/per_head": [1.0, float("nan")],
                f"engram/gate_histogram/{name}": [0] * 20,
            }
        lines += [line | {"engram/gate_mean": 0.6}, {"step": step, "eval_loss": 5 - step / 25, "eval_runtime": 3.0}]
    return lines


def test_losses_and_the_share_of_the_memory_are_on_top():
    top, below = _panels(_figures(history()))
    assert [(panel.title, [line.label for line in panel.lines]) for panel in top] == [
        ("Loss", ["training", "held out"]),
        ("What the memory adds to the residual stream", ["layer 1", "layer 3"]),
    ]
    assert top[0].lines[0].points == {10: 4.5, 20: 4.0, 30: 3.5} and top[0].lines[1].points[30] == 3.8
    assert top[1].lines[0].points == pytest.approx({10: 10.0, 20: 20.0, 30: 30.0})
    assert len(below) == 4 and all(panel.unit and panel.title for panel in top + below)


def test_no_panel_is_the_mirror_of_another_one():
    top, below = _panels(_figures(history()))
    drawn = [tuple(line.points.values()) for panel in top + below for line in panel.lines if "layer 1" in line.label]
    assert len(drawn) == 5
    assert tuple(100 - 100 * step / 60 for step in (10, 20, 30)) not in [pytest.approx(values) for values in drawn]
    assert below[0].lines[0].spread == {10: 0.1, 20: 0.1, 30: 0.1}
    shared, moved = below[2].lines, below[3].lines
    assert [line.is_reference for line in shared] == [False, False, True, True] and shared[2].points[10] == 1.4
    assert moved[0].points == pytest.approx({10: 1.0, 20: 1.0, 30: 1.0})


def test_a_run_without_a_memory_shows_what_there_is(tmp_path):
    top, below = _panels(_figures(history(layers=())))
    assert [panel.title for panel in top] == ["Loss"]
    assert [panel.title for panel in below] == ["Learning rate", "Length of the gradient"]
    for lines in (history(), history(()), [{"step": 1, "loss": float("nan"), "learning_rate": 1.0}]):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": lines}))
        assert plot_training(tmp_path).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "train_runtime": 2.0}]}))
    with pytest.raises(ValueError, match="Nothing was logged"):
        plot_training(tmp_path)

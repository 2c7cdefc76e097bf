"""A rank that is killed, or that stops: the others raise within the timeout of the process group, and end."""

import sys
from pathlib import Path

import pytest
from processes import run_processes


SCRIPT = Path(__file__).parent / "run_death.py"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dies", "stops"])
@pytest.mark.parametrize("task", ["trains", "evaluates"])
def test_other_ranks_raise_where_one_is_gone(tmp_path, task, way):
    # A process that waits for longer than this is an error.
    run_processes([sys.executable, SCRIPT, tmp_path, task, way, "5"], seconds=60)
    messages = [(tmp_path / f"message{rank}").read_text() for rank in (0, 1)]
    assert all(messages), messages


@pytest.mark.slow
def test_a_rank_that_is_asked_for_nothing_for_longer_than_the_timeout_still_answers(tmp_path):
    run_processes([sys.executable, SCRIPT, tmp_path, "evaluates", "rests", "4"], seconds=60)
    assert [(tmp_path / f"message{rank}").read_text() for rank in (0, 1)] == ["", ""]

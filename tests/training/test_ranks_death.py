"""A rank that is killed, that stops, or that ends early: the others raise, and all ranks end."""

import sys
from pathlib import Path

import pytest
from processes import run_processes, run_ranks
from run_ranks import write_table


SCRIPT, EXITS = (Path(__file__).parent / name for name in ("run_death.py", "run_exit.py"))


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


@pytest.mark.slow
@pytest.mark.parametrize("task", ["comes", "waits"])
def test_a_rank_that_exits_in_the_middle_of_a_run_ends_at_once_and_the_others_say_so(tmp_path, task):
    write_table(tmp_path / "table.safetensors", "float64")
    # They would wait for ten minutes and more. A process that waits for longer than this is an error.
    ran = run_ranks([EXITS, tmp_path, task], 3, seconds=60)
    assert [each.returncode for each in ran] == [1, 1, 1]
    assert all("Rank 0 has come to its end" in each.stderr for each in ran[1:])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_ends_before_the_others_goes_on_answering_them(tmp_path, ranks):
    write_table(tmp_path / "table.safetensors", "float64")
    ran = run_ranks([EXITS, tmp_path, "evaluates"], ranks, seconds=60)
    assert [each.returncode for each in ran] == [0] * ranks, ran[1].stderr[-2000:]

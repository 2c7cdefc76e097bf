"""What ranks are told: of tables that do not learn, and of what does not fit together."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes


SCRIPT = Path(__file__).parent / "run_rank_checks.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes has left."""
    folder = tmp_path_factory.mktemp("checks")
    ran = run_processes([sys.executable, SCRIPT, folder])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [torch.load(folder / f"result{rank}.pt") for rank in range(2)]


def test_a_table_over_ranks_is_said_not_to_move_only_where_it_moves_on_no_rank(results):
    for result in results:
        # The second rank holds none of the rows that have gradients.
        assert not result["rows of one owner"]
        for name, why in (
            ("at no rate", "its learning rate was 0"),
            ("no tokens", "no gradient has reached it"),
            ("no gradient", "no gradient has reached it"),
        ):
            assert len(result[name]) == 1 and f"has not moved in 2 steps: {why}" in result[name][0]


@pytest.mark.parametrize("name", ["another", "tables of another"])
def test_ranks_that_load_tables_of_two_checkpoints_raise_on_every_rank(results, name):
    for rank, result in enumerate(results):
        assert f"Rank {1 - rank} has loaded other tables than rank {rank}, which has those of " in result[name]
        assert "Load the same checkpoint on every rank" in result[name]


@pytest.mark.parametrize("name", ["same", "tables of same"])
def test_ranks_may_load_the_same_tables_from_different_folders(results, name):
    assert [result[name] for result in results] == ["", ""]

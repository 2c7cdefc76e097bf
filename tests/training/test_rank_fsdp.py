"""FSDP2 for the backbone beside tables over ranks, and torch's distributed checkpoints of both, on gloo."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes
from run_rank_fsdp import RUNS, SMALL_RUNS


SCRIPT = Path(__file__).parent / "run_rank_fsdp.py"


def start(folder: Path, names) -> dict[str, dict]:
    ran = run_processes([sys.executable, SCRIPT, folder, *names])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in names}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return start(tmp_path_factory.mktemp("fsdp"), SMALL_RUNS)


@pytest.fixture(scope="module")
def all_results(tmp_path_factory):
    return start(tmp_path_factory.mktemp("all"), [name for name in RUNS if name != "whole"])


def test_tables_over_ranks_train_beside_a_sharded_backbone_like_whole_ones(results):
    whole, cut = results["whole"], results["cut"]
    assert whole["is_sharded"] and cut["is_sharded"]
    shared = set(whole["end"]) & set(cut["end"])
    assert sum("table" in name for name in shared) == 2 and len(shared) > 50
    for name in shared:
        torch.testing.assert_close(cut["end"][name], whole["end"][name], rtol=0, atol=1e-12)


def test_a_distributed_checkpoint_goes_on_bit_for_bit_on_as_many_ranks(results):
    for when in ("saved", "end"):
        torch.testing.assert_close(results["by2"][when], results["cut"][when], rtol=0, atol=0)
    assert any(not torch.equal(results["cut"]["end"][name], each) for name, each in results["cut"]["saved"].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["by1", "by3"])
def test_a_distributed_checkpoint_is_read_by_another_number_of_ranks(all_results, name):
    torch.testing.assert_close(all_results[name]["saved"], all_results["cut"]["saved"], rtol=0, atol=0)
    # Sums over other ranks have another order, the backbone takes its norms in float32, and Adam makes small gradients
    # large.
    torch.testing.assert_close(all_results[name]["end"], all_results["cut"]["end"], rtol=1e-5, atol=1e-5)


def test_the_state_of_another_rank_is_refused_in_a_sentence(results):
    assert "is that of rank 1 of 3 alone, and this is rank 0 of 2" in results["cut"]["refused"]

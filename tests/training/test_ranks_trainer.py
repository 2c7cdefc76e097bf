"""Tables over two processes under the stock Trainer: the same bits as whole tables, however one trains."""

import sys
from pathlib import Path

import pytest
import torch
from cases import slow
from processes import run_processes
from run_ranks_trainer import CASES, train


SCRIPT = Path(__file__).parent / "run_ranks_trainer.py"
QUICK = ["reentrant", "float32"]


@pytest.fixture(scope="module")
def launches():
    """Names of cases that are run together to the folder that the processes have written to."""
    return {}


@pytest.fixture
def left(name, launches, tmp_path_factory):
    """The folder, and what each process has left."""
    together = tuple(each for each in CASES if (each in QUICK) == (name in QUICK))
    if together not in launches:
        launches[together] = tmp_path_factory.mktemp("ranks")
        ran = run_processes([sys.executable, SCRIPT, launches[together], *together])
        assert ran.returncode == 0, ran.stderr[-3000:]
    return launches[together], [torch.load(launches[together] / f"result{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_trainer_trains_tables_over_ranks_bit_for_bit_like_whole_ones(left, name):
    for result in left[1]:
        cut, whole = result[name, True], result[name, False]
        assert cut["losses"] == whole["losses"] and len(cut["losses"]) == 3
        torch.testing.assert_close(cut["rows"], whole["rows"], rtol=0, atol=0)
        torch.testing.assert_close(cut["rest"], whole["rest"], rtol=0, atol=0)
        assert 0 < cut["moved"]["announced"] <= cut["moved"]["rows"]
        # No row id has travelled once more with a gradient.
        assert "again" not in cut["moved"]


@pytest.mark.parametrize("name", ["float32"])
def test_trainer_trains_what_one_process_does_with_the_joint_batch(left, name):
    folder, results = left
    alone = train(folder, name, is_cut=False, processes=1)
    for result in results:
        torch.testing.assert_close(result[name, True]["rows"], alone["rows"], rtol=0, atol=1e-6)
        torch.testing.assert_close(result[name, True]["rest"], alone["rest"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["float32", slow("adam in float32")])
def test_ranks_add_no_error_to_one_process_that_accumulates_their_batches(left, name):
    """In float32, with texts of different lengths. A joint batch has other sums in the model itself."""
    folder, results = left
    alone = train(folder, name, is_cut=False, processes=1, accumulates=True)
    for result in results:
        torch.testing.assert_close(result[name, True]["rows"], alone["rows"], rtol=0, atol=0)
        torch.testing.assert_close(result[name, True]["rest"], alone["rest"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["workers"])
def test_announcements_from_workers_change_when_row_ids_travel_and_no_bit(left, name):
    for result in left[1]:
        early, late = result[name, True], result["late"]
        assert "announced" not in late["moved"] and early["moved"]["announced"] > 0
        assert late["moved"]["ids"] == late["moved"]["rows"] and "again" not in late["moved"]
        assert early["moved"]["rows"] == late["moved"]["rows"] and early["losses"] == late["losses"]
        torch.testing.assert_close(early["rows"], late["rows"], rtol=0, atol=0)
        torch.testing.assert_close(early["rest"], late["rest"], rtol=0, atol=0)
        assert all(line["engram/prefetch_waited_ms"] > 0 for line in late["log"] if "loss" in line)

"""Processes whose losses touch different tables, or none: nobody waits for ever, and all end with the same rows."""

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from run_exchange import Task, optimizer_of, train

from engram_hf.training.row_exchange import RowExchange


SCRIPT = Path(__file__).parent / "run_exchange.py"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one", "none", "turns", "both"])
def test_a_process_whose_loss_touches_no_table_takes_part(tmp_path, way):
    # A process that waits for the other one for ever is an error.
    ran = run_processes([sys.executable, SCRIPT, tmp_path, way])
    assert ran.returncode == 0, ran.stderr[-3000:]
    task = Task()
    norms = train(task, optimizer_of(task, tmp_path / "alone"), way, None)
    expected = task.state_dict()
    for rank in (0, 1):
        own_norms, state = torch.load(tmp_path / f"result{rank}.pt")
        torch.testing.assert_close(own_norms, norms, rtol=1e-6, atol=1e-6)
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_processes_wait_for_gradients_of_rows_as_long_as_the_run_allows(tmp_path):
    """While one of them saves, for one. torch gives a new group half an hour on CPUs and ten minutes on GPUs."""
    limit = timedelta(hours=2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=limit)
    try:
        assert RowExchange().group._get_backend(torch.device("cpu")).options._timeout == limit
    finally:
        dist.destroy_process_group()

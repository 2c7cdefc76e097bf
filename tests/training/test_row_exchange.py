"""Processes whose losses touch different tables, or none: nobody waits for ever, and all end with the same rows."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes
from run_exchange import Task, optimizer_of, train


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

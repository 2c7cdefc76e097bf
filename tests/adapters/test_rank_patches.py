"""Row patches over tables that are cut over processes."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes
from tiny import tiny_model

from engram_hf import make_patch, save_patch


SCRIPT = Path(__file__).with_name("run_rank_patches.py")


@pytest.mark.slow
def test_patches_over_a_table_that_is_cut_over_ranks_are_those_over_the_whole_table_bit_for_bit(tmp_path):
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    model.save_pretrained(tmp_path / "model")
    for name, share in (("alice", 0.5), ("bob", 0.3)):
        rows = {}
        for table_name, table in model.named_tables().items():
            row_ids = (torch.rand(table.num_rows, generator=generator) < share).nonzero().flatten()
            rows[table_name] = row_ids, 0.5 * torch.randn(len(row_ids), table.head_dim, generator=generator)
        save_patch(make_patch(model, name, rows), tmp_path / f"{name}.safetensors")
    ran = run_processes([sys.executable, SCRIPT, tmp_path])
    assert ran.returncode == 0, ran.stderr[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"result{rank}.pt")
        assert all(found["held"])
        assert len(found["cut"]) == len(found["whole"]) == 8 + rank
        assert all(torch.equal(one, other) for one, other in zip(found["cut"], found["whole"]))
        # Each choice of patches gives other logits; the first, the fourth and the last are those of plain tables.
        plain = found["whole"][0]
        assert [torch.equal(plain, each) for each in found["whole"]] == [True, False, False, True, False] + [False] * (
            2 + rank
        ) + [True]

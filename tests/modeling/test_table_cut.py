"""Which rank holds which rows, against torch's own cut and against one row after another."""

import pytest
import torch
from torch.distributed.tensor import Shard

from engram_hf.modeling.disk_files import BlockSource, TableFile
from engram_hf.modeling.disk_safetensors import TensorContent, write_file
from engram_hf.modeling.table_changes import digest_of, digest_of_content
from engram_hf.modeling.table_cut import RowCut, open_parts


CUTS = [([5, 3], 2), ([1, 1, 1], 4), ([7, 2, 9, 1], 3), ([26, 2], 4), ([64], 8), ([3], 1), ([10], 7)]


@pytest.mark.parametrize("rows_of_block, ranks", CUTS)
def test_blocks_are_cut_as_torch_cuts_a_sharded_tensor(rows_of_block, ranks):
    cut = RowCut(rows_of_block, ranks)
    for block, rows in enumerate(rows_of_block):
        for rank in range(ranks):
            size, offset = Shard.local_shard_size_and_offset(rows, ranks, rank)
            begin, end = cut.part(block, rank)
            assert end - begin == size and (begin == offset or not size)


@pytest.mark.parametrize("rows_of_block, ranks", CUTS)
def test_every_row_has_one_owner_and_one_place_there(rows_of_block, ranks):
    cut, first, owners, places = RowCut(rows_of_block, ranks), 0, [], []
    held = [0] * ranks
    # The slow way: row by row, in the order of blocks.
    for block, rows in enumerate(rows_of_block):
        for rank in range(ranks):
            begin, end = cut.part(block, rank)
            owners += [rank] * (end - begin)
            places += range(held[rank], held[rank] + end - begin)
            held[rank] += end - begin
        first += rows
    row_ids = torch.arange(first)
    assert cut.owner(row_ids).tolist() == owners and cut.num_rows == first
    for rank in range(ranks):
        own = row_ids[cut.owner(row_ids) == rank]
        assert cut.to_held(own, rank).tolist() == [p for p, owner in zip(places, owners, strict=True) if owner == rank]
        assert torch.equal(cut.to_table(cut.to_held(own, rank), rank), own)
        assert sum(cut.rows_of(rank)) == len(own)


def test_a_rank_sees_its_own_rows_of_a_file_and_knows_the_digest_of_all(tmp_path):
    blocks = {f"table.blocks.{i}": torch.randn(rows, 4) for i, rows in enumerate((7, 2))}
    write_file(tmp_path / "tables.safetensors", {name: TensorContent.of(block) for name, block in blocks.items()})
    file = TableFile(tmp_path / "tables.safetensors")
    sources = {("table", i): BlockSource(file, name) for i, name in enumerate(blocks)}
    cut = RowCut([7, 2], 3)
    for rank in range(3):
        parts = open_parts(sources, {"table": cut}, rank)
        for (_, number), source in parts.items():
            whole, (begin, end) = blocks[source.name], cut.part(number, rank)
            held = source.tensor()
            assert torch.equal(held, whole[begin:end]) and source.is_under(held) and source.holds(held)
            assert source.file.content(source.name).nbytes == held.nbytes
            assert source.file.whole_digest(source.name, digest_of_content) == digest_of(whole)
        if rank == 0:
            # What this process writes is seen, and is not in the file.
            source = parts["table", 0]
            source.tensor()[1] = 0
            assert not source.holds(source.tensor()) and torch.equal(file.tensor(source.name), blocks[source.name])

"""Which rank holds which rows; what is refused. Tables over several processes are in tests/training/test_ranks.py."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from tiny import tiny_config, tiny_ids, tiny_model
from torch.distributed.tensor import Shard
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import engram_optimizers
from engram_hf.modeling.disk_files import BlockSource, TableFile
from engram_hf.modeling.disk_safetensors import TensorContent, write_file
from engram_hf.modeling.table_changes import digest_of, digest_of_content
from engram_hf.modeling.table_ranks import RankFile, RowCut, open_parts


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


@pytest.fixture
def folder(tmp_path):
    tiny_model(tiny_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_cannot_be_cut_over_ranks_is_refused_in_a_sentence(folder, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="single process. Start it with `accelerate launch`"):
        AutoModelForCausalLM.from_pretrained(folder, engram_ranks="shard")
    with pytest.raises(ValueError, match="got 'rows'"):
        AutoModelForCausalLM.from_pretrained(folder, engram_ranks="rows")
    # Trainer copies every plain parameter of such a model from the first rank to all.
    with pytest.raises(NotImplementedError, match="cannot go with distributed_config"):
        AutoModelForCausalLM.from_pretrained(folder, engram_ranks="shard", distributed_config=object())
    with pytest.raises(NotImplementedError, match="cannot go with hot_rows"):
        AutoModelForCausalLM.from_pretrained(folder, engram_ranks="shard", hot_rows=10)


def test_a_run_of_one_process_holds_all_rows_and_refuses_what_would_lose_some(folder, tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, engram_ranks="shard").eval()
        whole, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_ids(2, 9)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)
        assert [table.ranks for table in model.engram_tables()] == [1, 1]
        with pytest.raises(NotImplementedError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(NotImplementedError, match="Save without state_dict"):
            model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
        with pytest.raises(NotImplementedError, match="keeps no hot rows"):
            model.place_tables({"...table": "host"}, hot_rows=5)
        with pytest.raises(ValueError, match="cut over ranks, where only row updates reach it"):
            model.train()(ids, labels=ids)
        args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
        factory, options = engram_optimizers(args)
        args.save_on_each_node = True
        with pytest.raises(NotImplementedError, match="got save_on_each_node=True"):
            factory()(model, **options)
        args.save_on_each_node = False
        for name in ("tp", "cp", "sp"):
            mesh = ParallelismConfig(**{f"{name}_size": 2})
            monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", mesh)
            with pytest.raises(NotImplementedError, match=f"got {name}_size above 1"):
                factory()(model, **options)
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", None)
        for words, value in (
            ("--fsdp_state_dict_type SHARDED", "FULL_STATE_DICT"),
            ("loading false", "SHARDED_STATE_DICT"),
        ):
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, state_dict_type=value, cpu_ram_efficient_loading=True, reshard_after_forward=True
            )
            monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
            with pytest.raises(NotImplementedError, match=words):
                factory()(model, **options)
    finally:
        dist.destroy_process_group()


def test_the_file_of_a_table_is_read_once_for_its_digest_however_many_checkpoints_follow(folder, tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, engram_ranks="shard").train()
        factory, options = engram_optimizers(TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))
        optimizer = factory()(model, **options)
        read, ids = [], tiny_ids(1, 3)
        whole_content = RankFile.whole_content
        monkeypatch.setattr(RankFile, "whole_content", lambda *given: read.append(given[1]) or whole_content(*given))
        for step in (1, 2, 3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
            assert len(read) == len(set(read)) == sum(len(table.blocks) for table in model.named_tables().values())
    finally:
        dist.destroy_process_group()

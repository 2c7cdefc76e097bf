"""What tables over ranks refuse, and one process with them. Several processes are in tests/training/test_ranks.py."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from peft import get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import engram_optimizers, lora_config
from engram_hf.modeling.table_cut import RankFile


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
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, engram_ranks="shard"), lora_config(r=2))
        # Its tables are frozen, until somebody trains them beside it.
        assert not factory()(adapted, **options).rows
        for table in adapted.get_base_model().named_tables().values():
            table.requires_grad_(True)
        with pytest.raises(NotImplementedError, match="tables that are cut over ranks do not write"):
            factory()(adapted, **options)
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
        for table in model.named_tables().values():
            table.requires_grad_(False)
        left_out = {"ignored_modules": ".*engram.table", "cpu_ram_efficient_loading": False}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=1, state_dict_type="SHARDED_STATE_DICT", **left_out)
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
        with pytest.raises(NotImplementedError, match="FSDP version 1.*0.engram.table"):
            factory()(model, **options)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ignored", [None, ".*engram.table"])
def test_fsdp1_is_refused_where_rows_are_trained(ignored, tmp_path, monkeypatch):
    model = tiny_model(tiny_config()).train()
    factory, options = engram_optimizers(TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, ignored_modules=ignored, cpu_ram_efficient_loading=False)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    with pytest.raises(NotImplementedError, match="FSDP version 1.*FSDP_IGNORED_MODULES=.*--fsdp_version 2"):
        factory()(model, **options)
    for table in model.named_tables().values():
        table.requires_grad_(False)
    assert not factory()(model, **options).rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fsdp2_that_would_shard_tables_convert_their_rows_or_move_them_is_refused(dtype, tmp_path, monkeypatch):
    model = tiny_model(tiny_config(engram_table_dtype=dtype)).train()
    factory, options = engram_optimizers(TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))

    def make(ignored, mixed_precision="no", device="cpu"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, ignored_modules=ignored, cpu_ram_efficient_loading=False, reshard_after_forward=True
        )
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", mixed_precision)
        monkeypatch.setitem(AcceleratorState._shared_state, "device", torch.device(device))
        return factory()(model, **options)

    layers = model.model.layers
    for ignored in (None, "engram.table", ".*0.engram.table", [layers[0].engram.table]):
        with pytest.raises(NotImplementedError, match="shard the rows of model.layers.*FSDP_IGNORED_MODULES"):
            make(ignored)
    # A module that is left out takes all below it along.
    for ignored in (".*engram.table", ".*engram", list(layers)):
        assert make(ignored).rows
    with pytest.raises(NotImplementedError, match='move model.layers.0.engram.table to cuda:1.*"": "cuda:1"'):
        make(".*engram.table", device="cuda:1")
    model.place_tables({"...table": "host"})
    assert make(".*engram.table", device="cuda:1").rows
    if dtype == "bfloat16":
        with pytest.raises(NotImplementedError, match=r"precision \(bf16\).*0.engram.table are bfloat16"):
            make(".*engram.table", "bf16")
        for table in model.named_tables().values():
            table.requires_grad_(False)
        assert not make(".*engram.table", "bf16").rows
    else:
        assert make(".*engram.table", "bf16").rows


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

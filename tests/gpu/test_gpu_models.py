"""Models with tables on every tier: the same numbers on a GPU as with resident tables there, and as on a CPU."""

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from devices import DEVICES, TABLES, TIERS, device_map, needs_gpu
from tiny import tiny_config, tiny_ids, tiny_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from engram_hf import add_patch, disable_patches, make_patch, set_patches, use_patches
from engram_hf.modeling.table import EngramTable
from engram_hf.training.row_exchange import gather_padded


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint for each type of rows."""
    made = {}
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        made[dtype] = tmp_path_factory.mktemp(dtype)
        tiny_model(tiny_config(engram_table_dtype=dtype)).save_pretrained(made[dtype])
    return made


def load(folder, device="cpu", tier="resident", **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map(device, tier), **options).eval()


def written(model, ids, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_tiers_hot_rows_and_prefetch_change_no_logit_and_no_token(folders, device, dtype):
    ids = tiny_ids(2, 11)
    resident = load(folders[dtype], device)
    expected, tokens = resident(ids.to(device)).logits, written(resident, ids.to(device))
    if device == "cuda":
        on_cpu = load(folders[dtype])(ids).logits
        torch.testing.assert_close(expected.cpu(), on_cpu, rtol=1e-3, atol=1e-3 * on_cpu.abs().max().item())
    for tier in TIERS[1:]:
        for hot_rows in (0, 40):
            model = load(folders[dtype], device, tier, hot_rows=hot_rows)
            model.prefetch(ids.to(device))
            assert torch.equal(model(ids.to(device)).logits, expected), (tier, hot_rows)
            assert torch.equal(written(model, ids.to(device)), tokens), (tier, hot_rows)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_a_static_cache_writes_what_a_dynamic_one_writes(folders, device):
    ids = tiny_ids(2, 7).to(device)
    for tier in ("resident", "host") if device == "cuda" else ("disk",):
        model = load(folders["float32"], device, tier)
        # On a GPU `generate` compiles the decoding steps.
        static = written(model, ids, cache_implementation="static", disable_compile=device == "cpu")
        assert torch.equal(static, written(model, ids)), tier


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_forward_prefetches_the_rows_of_all_its_lookups_once(folders, device, is_compiled, monkeypatch):
    model, ids = load(folders["float32"], device, "disk"), tiny_ids(1, 7).to(device)
    expected, begun = model(ids, use_cache=False).logits, []
    begin = EngramTable._prefetch
    monkeypatch.setattr(EngramTable, "_prefetch", lambda *given: begun.append(given[0]) or begin(*given))
    forward = torch.compile(model, backend="eager") if is_compiled else model
    torch.testing.assert_close(forward(ids, use_cache=False).logits, expected)
    assert begun == model.model.tables()
    # None is left: the lookups have found them all.
    assert [table._prefetches._started for table in begun] == [[], []]


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_prefetching_for_later_keeps_nothing_and_pushes_out_no_prefetch(folders, device):
    model = load(folders["float32"], device, "disk")
    table, ids = model.model.tables()[0], torch.zeros(1, 5, 4, dtype=torch.int64, device=device)
    table.prefetch(ids)
    for _ in range(20):
        model.prefetch(tiny_ids(1, 5).to(device))
        for other in model.model.tables()[1:]:
            other.prefetch(ids.clone())
    assert len(table._prefetches._started) == 1 and table._prefetches._started[0][0] is ids


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_hooks_of_accelerate_lose_no_prefetch_and_move_nothing_to_other_layers(folders, device):
    model, ids = load(folders["float32"], device, "disk"), tiny_ids(1, 7).to(device)
    expected, given = model(ids).logits, {}
    for layer_idx, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, layer_idx=layer_idx: given.update({layer_idx: kwargs["hashed"]}),
            with_kwargs=True,
        )
        add_hook_to_module(layer, AlignDevicesHook(execution_device=device, io_same_device=True))
    assert torch.equal(model(ids).logits, expected)
    assert given[0] is not None and given[1] is None and given[2] is not None
    assert all(table._prefetches._started == [] for table in model.model.tables())


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tier", TIERS)
def test_layers_on_two_gpus_give_the_same_logits(folders, tier):
    ids = tiny_ids(2, 11)
    places = {"model": 0, "lm_head": 0, **{f"model.layers.{i}": i % 2 for i in range(3)}, "model.layers.2": 1}
    places |= {name: place for name, place in device_map("cuda", tier).items() if name}
    model = AutoModelForCausalLM.from_pretrained(folders["float32"], device_map=places).eval()
    on_cpu = load(folders["float32"])(ids).logits
    torch.testing.assert_close(model(ids.to(0)).logits.cpu(), on_cpu, rtol=1e-3, atol=1e-3 * on_cpu.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("way", ["half", "to", pytest.param("cuda", marks=needs_gpu)])
def test_moving_and_casting_a_model_leaves_tables_on_their_tiers(folders, tier, way):
    model = load(folders["float32"], "cpu", tier)
    tiers = [[block.tier for block in table.blocks] for table in model.engram_tables()]
    moved = {"half": model.half, "to": lambda: model.to(torch.bfloat16), "cuda": model.cuda}[way]()
    assert [[block.tier for block in table.blocks] for table in moved.engram_tables()] == tiers
    for block in (block for table in moved.engram_tables() for block in table.blocks):
        assert block.device.type == ("cuda" if way == "cuda" and block.tier == "resident" else "cpu")
    assert all(table.dtype == "float32" for table in moved.engram_tables())
    assert torch.isfinite(moved(tiny_ids(1, 7).to(moved.device)).logits).all()


@torch.no_grad()
@needs_gpu
def test_an_automatic_map_with_little_memory_spreads_tables_and_changes_no_logit(folders):
    ids, expected = tiny_ids(2, 11), load(folders["float32"], "cuda")(tiny_ids(2, 11).cuda()).logits
    sizes = load(folders["float32"]).engram_tables()
    backbone = sum(p.nbytes for n, p in load(folders["float32"]).named_parameters() if ".table." not in n)
    limits = {0: backbone + sizes[0].nbytes * 3 // 2, "cpu": sizes[0].nbytes // 3}
    model = AutoModelForCausalLM.from_pretrained(folders["float32"], device_map="auto", max_memory=limits).eval()
    assert torch.equal(model(ids.cuda()).logits, expected)
    assert len({block.tier for table in model.engram_tables() for block in table.blocks}) > 1


@torch.no_grad()
@needs_gpu
@pytest.mark.parametrize("tier", ["resident", "host"])
def test_a_model_loads_under_a_default_device_and_in_inference_mode(folders, tier):
    expected = load(folders["float32"], "cuda", tier)(tiny_ids(1, 7).cuda()).logits
    with torch.device("cuda"):
        assert torch.equal(load(folders["float32"], "cuda", tier)(tiny_ids(1, 7).cuda()).logits, expected)
    with torch.inference_mode():
        model = load(folders["float32"], "cuda", tier, hot_rows=0 if tier == "resident" else 40)
        model(tiny_ids(1, 5).cuda())
    assert torch.equal(model(tiny_ids(1, 7).cuda()).logits, expected)


def waits_of_a_decode_token(model) -> int:
    """How often the CPU waits for the GPU in one step of decoding, as torch counts it."""
    ids = tiny_ids(1, 8).cuda()
    outputs = model(ids[:, :6], use_cache=True)
    cache = outputs.past_key_values
    model(ids[:, 6:7], past_key_values=cache)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(ids[:, 7:8], past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@torch.no_grad()
@needs_gpu
def test_a_decode_token_waits_once_more_for_tables_in_host_memory(folders, record_property):
    counts = {tier: waits_of_a_decode_token(load(folders["float32"], "cuda", tier)) for tier in ("resident", "host")}
    record_property("waits", counts)
    # One copy of the row ids of all tables.
    assert counts["host"] <= counts["resident"] + 1, counts


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=needs_gpu)])
def process_group(request, tmp_path):
    """A group of one process; the device that it works on."""
    torch.distributed.init_process_group(request.param, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield "cuda" if request.param == "nccl" else "cpu"
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tier", ["host", "disk", "mixed"])
def test_ddp_takes_a_model_with_frozen_tables_off_the_device(folders, process_group, tier):
    model = load(folders["float32"], process_group, tier)
    for table in model.model.tables():
        table.requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    assert not {id(block) for table in model.model.tables() for block in table.blocks} & {
        id(parameter) for parameter in wrapped._module_parameters
    }
    ids = tiny_ids(1, 7).to(process_group)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_row_ids_in_host_memory_are_gathered_by_any_backend(process_group):
    row_ids = torch.tensor([5, 2, 9])
    assert [part.tolist() for part in gather_padded(row_ids)] == [[5, 2, 9]]
    assert [part.tolist() for part in gather_padded(row_ids[:0])] == [[]]


def test_ddp_gets_blocks_back_that_return_to_the_device(folders):
    model = load(folders["float32"], "cpu", "mixed")
    assert any(TABLES[0] in name for name in model._ddp_params_and_buffers_to_ignore)
    model.place_tables({TABLES[0]: "resident"})
    ignored = model._ddp_params_and_buffers_to_ignore
    assert not any(f"{TABLES[0]}.blocks" in name for name in ignored)
    assert any(f"{TABLES[1]}.blocks" in name for name in ignored)


@pytest.mark.parametrize("device", DEVICES)
def test_the_benchmark_checks_rows_through_the_prefetch(device, monkeypatch):
    script = Path(__file__).parents[2] / "scripts" / "benchmarks" / "bench_gpu.py"
    if not script.is_file():
        pytest.skip("the benchmarks are not beside the tests")
    monkeypatch.syspath_prepend(script.parents[1])
    bench = runpy.run_path(str(script))
    model = bench["build"](bench["make_config"]("tiny", [1], 2**20), device)
    (table,) = model.model.tables()
    bench["check"](table, device)

    def bring_other_rows(row_ids):
        for block in table.blocks:
            block.bitwise_xor_(1)

    monkeypatch.setattr(table, "prefetch", bring_other_rows)
    with pytest.raises(RuntimeError, match="with a prefetch"):
        bench["check"](table, device)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_patched_rows_are_those_of_the_patch_on_every_tier(folders, device, dtype):
    ids, generator = tiny_ids(3, 11), torch.Generator().manual_seed(0)
    plain, patches = load(folders[dtype], device), {}
    for name in ("alice", "bob"):
        rows = {}
        for table_name, table in plain.named_tables().items():
            row_ids = (torch.rand(table.num_rows, generator=generator) < 0.3).nonzero().flatten()
            rows[table_name] = row_ids, torch.randn(len(row_ids), table.head_dim, generator=generator)
        patches[name] = make_patch(plain, name, rows)
    expected = {}
    for tier in TIERS:
        model = load(folders[dtype], device, tier, hot_rows=0 if tier == "resident" else 40)
        before = model(ids.to(device)).logits
        for patch in patches.values():
            add_patch(model, patch)
        for table_name, table in model.named_tables().items():
            row_ids = torch.arange(int(table.head_rows.min())).unsqueeze(1).expand(-1, len(table.head_rows))
            in_table = row_ids + table.first_rows_of_heads.cpu()
            found = table(row_ids.to(device)).cpu().unflatten(-1, (-1, table.head_dim))
            known = dict(zip(*(each.tolist() for each in patches["bob"].tables[table_name][:2])))
            is_known = torch.isin(in_table, patches["bob"].tables[table_name].row_ids)
            right = torch.tensor([known[i] for i in in_table[is_known].tolist()]).to(found.dtype)
            assert torch.equal(found[is_known], right), tier
        for names in (["alice"], ["bob"], ["bob", "alice"]):
            set_patches(model, names)
            logits = model(ids.to(device)).logits
            assert torch.equal(logits, expected.setdefault(tuple(names), logits)), (tier, names)
        with disable_patches(model):
            assert torch.equal(model(ids.to(device)).logits, before)
        set_patches(model, [])
        with use_patches(model, ["alice", None, "bob"]):
            each = model(ids.to(device)).logits
        for i, alone in enumerate((expected["alice",], before, expected["bob",])):
            torch.testing.assert_close(each[i], alone[i], rtol=1e-4, atol=1e-4 * before.abs().max().item())

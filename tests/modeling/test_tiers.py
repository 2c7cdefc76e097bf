"""Where blocks live changes no number: placements through `device_map`, moves, hot rows, prefetch, many readers."""

import multiprocessing
import os

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from engram_hf.modeling.table_blocks import DISK, HOST, RESIDENT
from engram_hf.modeling.table_placement import Place, plan_places


FIRST, SECOND = "model.layers.0.engram.table", "model.layers.2.engram.table"
PLACEMENTS = {
    "resident": None,
    "device": "cpu",
    "auto": "auto",
    "host": {"": "cpu", FIRST: "cpu", SECOND: "cpu"},
    "disk": {"": "cpu", FIRST: "disk", SECOND: "disk"},
    "tables only": {FIRST: "disk"},
    "disk, in a string": "cpu+disk",
    "host, in a string": "auto+cpu",
    "mixed": {"": "cpu", FIRST: "disk", SECOND: "cpu"},
    "blocks": {"": "cpu", f"{FIRST}.blocks.1": "disk", f"{FIRST}.blocks.0": "cpu", f"{SECOND}.blocks.3": "disk"},
    "layer": {"": "cpu", SECOND: "disk", f"{SECOND}.blocks.0": "cpu"},
}
FORMATS = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4"]


def saved_model(folder, elements=500, **fields):
    """A model with many blocks, or one, in a folder; and its logits."""
    model = tiny_model(tiny_config(engram_block_elements=elements, **fields))
    model.save_pretrained(folder)
    return model


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tiers(model):
    return [[block.tier for block in table.blocks] for table in model.engram_tables()]


@torch.no_grad()
@pytest.mark.parametrize("elements", [500, 2**31])
@pytest.mark.parametrize("table_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_placement_gives_the_same_bits(tmp_path, table_dtype, dtype, elements):
    saved_model(tmp_path, elements, engram_table_dtype=table_dtype)
    ids = tiny_ids(2, 9)
    expected = load(tmp_path, dtype=dtype)(ids).logits
    assert torch.isfinite(expected).all()
    for name, device_map in PLACEMENTS.items():
        if elements == 2**31 and name in ("blocks", "layer"):
            continue
        model = load(tmp_path, dtype=dtype, device_map=device_map)
        assert torch.equal(model(ids).logits, expected), name
        assert model.engram_tables()[0].dtype == table_dtype


@pytest.mark.parametrize("elements", [500, 2**31])
def test_engram_tables_says_which_tier_each_block_has(tmp_path, elements):
    model = saved_model(tmp_path, elements)
    blocks = len(model.engram_tables()[0].blocks)
    assert tiers(load(tmp_path)) == tiers(load(tmp_path, device_map="cpu")) == [[RESIDENT] * blocks] * 2
    assert tiers(load(tmp_path, device_map=PLACEMENTS["host"])) == [[HOST] * blocks] * 2
    assert tiers(load(tmp_path, device_map=PLACEMENTS["mixed"])) == [[DISK] * blocks, [HOST] * blocks]
    table = load(tmp_path, device_map=PLACEMENTS["disk"]).engram_tables()[0]
    assert table.name == FIRST and table.rows == model.model.tables()[0].num_rows
    assert table.nbytes == table.rows * 8 * 4 == sum(block.nbytes for block in table.blocks) == table.tiers[DISK]
    assert all(block.file.parent == tmp_path for block in table.blocks)


def test_an_entry_of_a_block_counts_more_than_that_of_its_table(tmp_path):
    saved_model(tmp_path)
    assert tiers(load(tmp_path, device_map=PLACEMENTS["layer"])) == [[RESIDENT] * 4, [HOST, DISK, DISK, DISK]]


def test_the_base_model_takes_entries_with_and_without_the_prefix(tmp_path):
    saved_model(tmp_path)
    for name in (FIRST, FIRST.removeprefix("model.")):
        model = AutoModel.from_pretrained(tmp_path, device_map={"": "cpu", name: "disk"})
        assert tiers(model) == [[DISK] * 4, [RESIDENT] * 4]
        assert model.engram_tables()[0].name == FIRST.removeprefix("model.")


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (
            {"": "cpu", "model.layers.1.engram.table": "disk"},
            "names model.layers.1.engram.table, which is no table. The tables of this model are: ",
        ),
        ({"": "cpu", "model.layers.0.engram.tabel": "disk"}, f"no part of. The tables of this model are: {FIRST}, "),
        ({"": "cpu", "model.layers.7": "cpu"}, "names model.layers.7, which this model has no part of"),
        ("disk", r'got .disk.\. "cpu\+disk" has'),
        ({"": "cpu", f"{FIRST}.blocks.9": "disk"}, "names block 9 of .*, which has blocks 0 to 3"),
        ({"": "cpu", FIRST: "tape"}, "got 'tape'"),
        ({"": "cpu", FIRST: "meta"}, "it has no rows"),
    ],
)
def test_an_entry_that_means_nothing_is_an_error(tmp_path, device_map, message):
    saved_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, device_map=device_map)


def test_auto_fills_memory_with_the_backbone_first_then_with_blocks(tmp_path):
    model = saved_model(tmp_path)
    backbone = sum(t.nbytes for n, t in model.state_dict().items() if ".table." not in n)
    block = model.engram_tables()[0].blocks[0].nbytes
    limited = load(tmp_path, device_map="auto", max_memory={"cpu": backbone + 5 * block})
    assert all(not parameter.is_meta for parameter in limited.parameters())
    flat = [tier for table in tiers(limited) for tier in table]
    assert set(flat) == {RESIDENT, DISK} and flat.count(RESIDENT) in (3, 4)
    ids = tiny_ids(2, 9)
    assert torch.equal(limited(ids).logits, model(ids).logits)


def test_auto_goes_from_the_accelerator_to_host_memory_to_disk():
    sizes = {"layers.1.engram.table": [10, 10], "layers.14.engram.table": [10, 10, 10]}
    default = dict.fromkeys(sizes, Place(RESIDENT, "cuda:0"))
    planned = plan_places(sizes, {}, default, {0: 25, "cpu": 12})
    assert [p.tier for p in planned["layers.1.engram.table"]] == [RESIDENT, RESIDENT]
    assert [p.tier for p in planned["layers.14.engram.table"]] == [HOST, DISK, DISK]
    # What has an entry has its place first where it comes first, and counts.
    planned = plan_places(sizes, {("layers.1.engram.table", None): "cpu"}, default, {0: 25, "cpu": 20})
    assert [p.tier for p in planned["layers.1.engram.table"]] == [HOST, HOST]
    assert [p.tier for p in planned["layers.14.engram.table"]] == [RESIDENT, RESIDENT, DISK]


@torch.no_grad()
def test_blocks_move_between_tiers_after_loading(tmp_path):
    model = saved_model(tmp_path)
    ids = tiny_ids(2, 9)
    expected = model(ids).logits
    moving = load(tmp_path)
    for places in ({FIRST: "disk"}, {f"{FIRST}.blocks.2": "cpu"}, {SECOND: "cpu"}, {SECOND: "disk", FIRST: "cpu"}):
        moving.place_tables(places)
        assert torch.equal(moving(ids).logits, expected), places
    assert tiers(moving) == [[HOST] * 4, [DISK] * 4]
    with pytest.raises(ValueError, match=f"tables and blocks only, got model.layers.1. The tables .* are: {FIRST}, "):
        moving.place_tables({"model.layers.1": "disk"})
    with pytest.raises(ValueError, match=rf"""such as {{"...table": "disk"}}, got 'disk'. Names .* are: {FIRST}, """):
        moving.place_tables("disk")
    assert tiers(moving) == [[HOST] * 4, [DISK] * 4]


@torch.no_grad()
def test_only_rows_that_a_file_holds_go_to_disk(tmp_path):
    fresh = tiny_model()
    with pytest.raises(ValueError, match="comes from no file.*save_pretrained"):
        fresh.place_tables({FIRST: "disk"})
    fresh.save_pretrained(tmp_path / "a")
    fresh.place_tables({FIRST: "disk"})
    loaded = load(tmp_path / "a")
    loaded.model.tables()[0].blocks[1].mul_(2)
    ids = tiny_ids(2, 9)
    expected = loaded(ids).logits
    with pytest.raises(ValueError, match="Block 1 has other rows than"):
        loaded.place_tables({FIRST: "disk"})
    loaded.save_pretrained(tmp_path / "b")
    loaded.place_tables({FIRST: "disk"})
    assert torch.equal(loaded(ids).logits, expected)


@torch.no_grad()
def test_moves_of_the_model_leave_host_and_disk_blocks_where_they_are(tmp_path):
    saved_model(tmp_path)
    model = load(tmp_path, device_map=PLACEMENTS["mixed"])
    before = [block.data_ptr() for table in model.model.tables() for block in table.blocks]
    model.to("cpu").half().float().to(torch.bfloat16)
    assert [block.data_ptr() for table in model.model.tables() for block in table.blocks] == before
    assert tiers(model) == [[DISK] * 4, [HOST] * 4]
    model.to("meta")
    assert model.lm_head.weight.is_meta
    assert [block.data_ptr() for table in model.model.tables() for block in table.blocks] == before


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
@pytest.mark.parametrize("elements", [500, 2**31])
@pytest.mark.parametrize("table_dtype", ["float32", "int4"])
def test_hot_rows_of_any_size_give_the_same_bits_and_count(tmp_path, size, elements, table_dtype):
    model = saved_model(tmp_path, elements, engram_table_dtype=table_dtype)
    cached = load(tmp_path, device_map=PLACEMENTS["disk"], hot_rows=size)
    asked = 0
    for seed in (0, 1, 0, 2, 0):
        ids = tiny_ids(3, 11, seed)
        assert torch.equal(cached(ids).logits, model(ids).logits)
        asked += ids.numel() * 4
    for table in cached.engram_tables():
        assert table.hot_rows.hits + table.hot_rows.misses == asked
        assert f"{size} rows" in repr(table.hot_rows) and f"{table.hot_rows.hits} hits" in repr(table.hot_rows)
        assert 0 < table.hot_rows.bytes_read <= table.hot_rows.misses * table.nbytes // table.rows
        assert table.hot_rows.hits > 0 or size < 64
    cached.place_tables({FIRST: "cpu"}, hot_rows=0)
    assert cached.engram_tables()[0].hot_rows is None
    with pytest.raises(ValueError, match="hot_rows must be at least 1"):
        load(tmp_path, device_map=PLACEMENTS["disk"], hot_rows=-1)


@torch.no_grad()
def test_generation_from_disk_gives_the_same_tokens(tmp_path):
    model = saved_model(tmp_path)
    ids = tiny_ids(2, 7)
    for options in ({"num_beams": 1}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        options = {**options, "max_new_tokens": 8, "do_sample": False}
        disk = load(tmp_path, device_map=PLACEMENTS["disk"])
        assert torch.equal(disk.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_forward_reads_from_disk(tmp_path):
    model = saved_model(tmp_path)
    ids = tiny_ids(2, 9)
    disk = torch.compile(load(tmp_path, device_map=PLACEMENTS["disk"]), backend="aot_eager")
    torch.testing.assert_close(disk(ids, use_cache=False).logits, model(ids).logits)


@torch.no_grad()
def test_tables_and_backbone_may_be_two_folders(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "backbone", tables_to=tmp_path / "tables")
    with pytest.raises(ValueError, match="lacks 8 tensors of the memory.*tables_from="):
        load(tmp_path / "backbone")
    ids = tiny_ids(2, 9)
    for device_map in (None, PLACEMENTS["disk"]):
        loaded = load(tmp_path / "backbone", tables_from=tmp_path / "tables", device_map=device_map)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    tiny_model(tiny_config(engram_seed=3)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differs in: multipliers"):
        load(tmp_path / "backbone", tables_from=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "backbone", tables_from=tmp_path / "empty")


@torch.no_grad()
def test_prefetch_needs_no_forward_and_no_forward_needs_it(tmp_path):
    model = saved_model(tmp_path)
    disk = load(tmp_path, device_map=PLACEMENTS["disk"])
    ids = tiny_ids(2, 9)
    for _ in range(20):
        disk.prefetch(tiny_ids(1, 5))
    disk.prefetch(ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(disk(ids).logits, model(ids).logits)
    assert load(tmp_path).prefetch(ids) is None
    for wrong, got in (([1, 2], "a list"), (ids[0], r"torch.int64 of shape \(9,\)"), (ids.float(), "torch.float32")):
        with pytest.raises(ValueError, match=rf"shape \(batch, seq\), got {got}.*torch.tensor\(\[ids\]\)"):
            disk.prefetch(wrong)


@torch.no_grad()
def test_a_prefetch_that_failed_is_an_error_at_the_read(tmp_path):
    saved_model(tmp_path)
    table = load(tmp_path, device_map=PLACEMENTS["disk"]).model.tables()[0]
    row_ids = torch.zeros(1, 3, 4, dtype=torch.int64)

    def fail():
        raise OSError("the device is gone")

    table._prefetches.remember(row_ids, [table.reader.in_background(fail)])
    with pytest.raises(OSError, match="the device is gone"):
        table(row_ids)
    # The failed reading is forgotten, and the next one is right.
    assert table(row_ids).shape == (1, 3, 32)


@pytest.mark.parametrize("device_map", [PLACEMENTS["resident"], PLACEMENTS["host"], PLACEMENTS["disk"]])
@pytest.mark.parametrize("wrong", [-1, 53])
def test_row_ids_out_of_range_are_an_error(tmp_path, device_map, wrong):
    saved_model(tmp_path, 2**31)
    table = load(tmp_path, device_map=device_map).model.tables()[0]
    row_ids = torch.zeros(1, 3, 4, dtype=torch.int64)
    row_ids[0, 2, 0] = wrong
    with pytest.raises(IndexError, match=rf"Row id {wrong} at \[0, 2, 0\] is out of range: head 0 has 53 rows"):
        table(row_ids)
    with pytest.raises(IndexError):
        table.prefetch(row_ids) or table(row_ids)


def logits_of(folder, ids):
    torch.set_num_threads(1)
    return load(folder, device_map=PLACEMENTS["disk"])(ids).logits


@torch.no_grad()
def test_four_processes_read_one_table_at_once(tmp_path):
    model = saved_model(tmp_path)
    ids = tiny_ids(2, 9)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.starmap(logits_of, [(str(tmp_path), ids)] * 8)
    assert all(torch.equal(result, model(ids).logits) for result in results)


@torch.no_grad()
def test_a_fork_after_opening_reads_and_prefetches(tmp_path):
    saved_model(tmp_path)
    disk = load(tmp_path, device_map=PLACEMENTS["disk"])
    ids = tiny_ids(2, 9)
    expected = disk(ids).logits
    # The parent has its reading thread, which a child does not inherit.
    disk.model.tables()[0].reader.in_background(os.getpid).result()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        disk.prefetch(ids)
        is_other = disk.model.tables()[0].reader.in_background(os.getpid).result() == os.getpid()
        os._exit(0 if is_other and torch.equal(disk(ids).logits, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(disk(ids).logits, expected)


@torch.no_grad()
def test_a_dataloader_worker_may_prefetch_for_the_model(tmp_path):
    model = saved_model(tmp_path)
    disk = load(tmp_path, device_map=PLACEMENTS["disk"])

    def collate(rows):
        batch = torch.stack(rows)
        disk.prefetch(batch)
        return batch

    batches = DataLoader(list(tiny_ids(6, 9)), batch_size=2, num_workers=2, collate_fn=collate)
    for batch in batches:
        torch.testing.assert_close(disk(batch).logits, model(batch).logits)


def test_trainer_leaves_frozen_tables_where_they_are(tmp_path):
    saved_model(tmp_path / "model")
    model = load(tmp_path / "model", device_map=PLACEMENTS["mixed"])
    for table in model.model.tables():
        table.requires_grad_(False)
    before = [block.clone() for table in model.model.tables() for block in table.blocks]
    rows = [{"input_ids": row, "labels": row} for row in tiny_ids(4, 9)]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert tiers(model) == [[DISK] * 4, [HOST] * 4]
    after = [block for table in model.model.tables() for block in table.blocks]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    again = load(tmp_path / "run" / "checkpoint-2")
    ids = tiny_ids(2, 9)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)

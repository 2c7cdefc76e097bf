"""Rows that change in a model, files that change under it, folders that are named twice: nothing old, nothing lost."""

import copy
import json
import logging
import os
import pickle
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BACKBONE, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from engram_hf import EngramMoEForCausalLM, verify_tables
from engram_hf.modeling.modeling_engram_moe import CACHE_NAME
from engram_hf.modeling.table_changes import digest_of


FIRST, SECOND = "model.layers.0.engram.table", "model.layers.2.engram.table"
ON_DISK = {"": "cpu", FIRST: "disk", SECOND: "disk"}
IN_HOST = {"": "cpu", FIRST: "cpu", SECOND: "cpu"}
IDS = tiny_ids(2, 12)


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, device_map=None, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def blocks(model):
    return [block.detach().clone() for table in model.model.tables() for block in table.blocks]


def same_blocks(left, right):
    return all(torch.equal(a, b) for a, b in zip(blocks(left), blocks(right), strict=True))


def tiers(model):
    return [set(table.tiers) for table in model.engram_tables()]


def weights(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


# Rows that change.


def through_data(model):
    for table in model.model.tables():
        for block in table.blocks:
            block.data.mul_(2)


def through_numpy(model):
    for table in model.model.tables():
        for block in table.blocks:
            array = block.detach().numpy()
            array *= 2


@torch.no_grad()
def through_the_parameter(model):
    for table in model.model.tables():
        for block in table.blocks:
            block.mul_(2)


WRITES = [through_data, through_numpy, through_the_parameter]


@pytest.mark.parametrize("write", WRITES)
def test_rows_that_were_written_move_to_host_as_they_are(folder, write):
    model = load(folder)
    write(model)
    written = blocks(model)
    assert not same_blocks(model, load(folder))
    model.place_tables({FIRST: "cpu", SECOND: "cpu"})
    assert all(torch.equal(a, b) for a, b in zip(blocks(model), written, strict=True))


@pytest.mark.parametrize("write", WRITES)
def test_rows_that_were_written_are_not_taken_from_their_file(folder, write):
    model = load(folder)
    write(model)
    with pytest.raises(ValueError, match="has other rows than"):
        model.place_tables({FIRST: "disk"})


@pytest.mark.parametrize("write", WRITES)
def test_rows_that_were_written_on_disk_are_saved_as_the_model_has_them(folder, tmp_path, write):
    model = load(folder, ON_DISK)
    write(model)
    model.save_pretrained(tmp_path / "saved")
    assert same_blocks(load(tmp_path / "saved"), model) and not same_blocks(load(folder), model)
    verify_tables(folder)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device_map", [None, IN_HOST, ON_DISK])
@pytest.mark.parametrize("hot_rows", [0, 50])
def test_a_state_dict_of_other_rows_is_what_the_model_has_and_saves(
    folder, tmp_path, assign, device_map, hot_rows, caplog
):
    other = tiny_model(seed=5)
    model = load(folder, device_map, hot_rows=hot_rows)
    logits(model)
    with caplog.at_level(logging.WARNING):
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
    assert same_blocks(model, other)
    torch.testing.assert_close(logits(model), logits(other))
    assert tiers(model) == ([{"resident"}] * 2 if device_map is None else [{"host"}] * 2)
    model.save_pretrained(tmp_path / "saved")
    assert same_blocks(load(tmp_path / "saved"), other)
    assert same_blocks(load(folder), tiny_model())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_the_same_rows_leaves_them_on_disk_and_unwritten(folder, tmp_path, assign):
    model = load(folder, ON_DISK)
    model.load_state_dict({k: v.clone() for k, v in load(folder).state_dict().items()}, assign=assign)
    assert tiers(model) == [{"disk"}] * 2
    model.save_pretrained(tmp_path / "saved")
    for name in weights(folder):
        if name.startswith("tables"):
            assert (tmp_path / "saved" / name).stat().st_ino == (folder / name).stat().st_ino


def freeze(model):
    for table in model.model.tables():
        table.requires_grad_(False)


@pytest.mark.slow
def test_resuming_leaves_tables_on_disk(folder, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tiny_ids(8, 9)]
    arguments = TrainingArguments(tmp_path / "run", max_steps=4, save_steps=2, report_to=[], use_cpu=True)
    whole = load(folder, ON_DISK)
    freeze(whole)
    Trainer(whole, arguments, train_dataset=rows).train()
    resumed = load(folder, ON_DISK, hot_rows=9)
    freeze(resumed)
    Trainer(resumed, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert tiers(resumed) == [{"disk"}] * 2
    assert all(
        not source.was_written()
        for table in resumed.model.tables()
        for source in (b.source for b in table.block_records)
    )
    left, right = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stays_on_disk_and_is_independent(folder, duplicate):
    model = load(folder, ON_DISK, hot_rows=7)
    before = logits(model)
    twin = duplicate(model)
    assert tiers(twin) == [{"disk"}] * 2 and torch.equal(logits(twin), before)
    through_data(twin)
    through_the_parameter(twin)
    assert same_blocks(model, tiny_model()) and not same_blocks(twin, model)
    # Of rows that were written, a copy has its own.
    again = duplicate(twin)
    assert same_blocks(again, twin) and tiers(again) == [{"host"}] * 2


def test_a_pickle_of_a_model_on_disk_holds_no_rows(tmp_path):
    tiny_model(tiny_config(engram_vocab_size=20_000)).save_pretrained(tmp_path)
    table = load(tmp_path, ON_DISK).model.tables()[0]
    assert len(pickle.dumps(table)) < table.num_rows * table.row_nbytes / 100


# Files that change.


def overwrite(model):
    for table in model.engram_tables():
        path = table.blocks[0].file
        with path.open("r+b") as file:
            file.seek(-400, os.SEEK_END)
            file.write(bytes(400))


@pytest.mark.parametrize("device_map", [None, ON_DISK])
@pytest.mark.parametrize("use", ["forward", "place", "save"])
def test_a_changed_file_is_noticed_by_whatever_reads_it(folder, tmp_path, device_map, use):
    model = load(folder, device_map)
    logits(model)
    overwrite(model)
    uses = {
        "forward": lambda: logits(model),
        "place": lambda: model.place_tables({FIRST: "cpu", SECOND: "cpu"}),
        "save": lambda: model.save_pretrained(tmp_path / "saved"),
    }
    with pytest.raises(ValueError, match="was changed while a table was open"):
        uses[use]()
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").iterdir())


def test_a_file_cut_under_a_resident_table_is_an_error_and_no_crash(folder):
    model = load(folder)
    os.truncate(model.engram_tables()[0].blocks[0].file, 4096)
    with pytest.raises(ValueError, match="was changed while a table was open: 4096 bytes"):
        logits(model)


def test_host_tables_need_their_file_no_more(folder):
    model = load(folder, IN_HOST)
    before = logits(model)
    overwrite(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32, torch.bool])
def test_no_integer_passes_for_a_float(folder, dtype):
    name = "model.layers.0.engram.value_proj.weight"
    content = load_file(folder / BACKBONE)
    content[name] = (content[name].abs() * 10).to(torch.int64).to(dtype)
    save_file(content, folder / BACKBONE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} .* must be of a floating type"):
        load(folder)


def test_an_index_with_foreign_metadata_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "metadata": "x"}))
    with pytest.raises(ValueError, match="is damaged: .*metadata"):
        load(folder)


# Folders.


def test_tables_to_the_same_folder_is_a_save_like_any_other(folder, tmp_path):
    model = tiny_model(seed=4)
    (tmp_path / "alias").symlink_to(folder)
    for target in (folder, tmp_path / "alias", str(folder) + "/."):
        model.save_pretrained(folder, tables_to=target)
        assert same_blocks(load(folder), model) and len(weights(folder)) == 3
    placed = load(folder, ON_DISK)
    placed.save_pretrained(folder, tables_to=folder)
    assert same_blocks(load(folder), model)


def test_tables_do_not_go_over_another_model(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="holds a model.*another folder"):
        tiny_model(seed=3).save_pretrained(tmp_path / "other", tables_to=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "other").exists()
    # Over tables alone they do.
    for seed in (3, 4):
        model = tiny_model(seed=seed)
        model.save_pretrained(tmp_path / "other", tables_to=tmp_path / "tables")
        assert same_blocks(load(tmp_path / "other", tables_from=tmp_path / "tables"), model)


def test_tables_apart_go_with_a_variant(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "a", tables_to=tmp_path / "t", variant="fp16")
    assert same_blocks(load(tmp_path / "a", tables_from=tmp_path / "t", variant="fp16"), model)


def test_a_state_dict_of_another_type_is_saved_as_that_type(folder):
    model = tiny_model()
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    loaded = load(folder)
    assert loaded.engram_tables()[0].dtype == "float16"
    assert all(torch.equal(b, a.half()) for a, b in zip(blocks(model), blocks(loaded), strict=True))


def test_a_state_dict_without_blocks_replaces_no_checkpoint(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny_model(seed=2)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("blocks.1")}
    with pytest.raises(ValueError, match="state_dict lacks 2 blocks"):
        model.save_pretrained(folder, state_dict=state)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_after_a_save_over_itself_files_and_pickles_are_there(folder):
    model = load(folder, ON_DISK)
    before = logits(model)
    for _ in range(3):
        model.save_pretrained(folder)
        assert all(block.file.exists() for table in model.engram_tables() for block in table.blocks)
        assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)


def test_a_pickle_whose_file_was_replaced_is_refused(folder):
    pickled = pickle.dumps(load(folder, ON_DISK))
    path = load(folder).engram_tables()[0].blocks[0].file
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that was open"):
        pickle.loads(pickled)


def test_folders_that_only_look_like_stages_are_left_alone(folder):
    (folder / ".saving-foo").mkdir()
    # A stage of a process that is gone, whose number has been given to this one.
    (folder / f".saving-{os.getpid()}-left").mkdir()
    tiny_model(seed=6).save_pretrained(folder)
    assert [path.name for path in folder.glob(".saving*")] == [".saving-foo"]
    assert same_blocks(load(folder), tiny_model(seed=6))


@pytest.fixture
def adapter_folder(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(load(folder), LoraConfig(target_modules=["value_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_tables_of_an_adapters_base_can_be_placed(adapter_folder):
    # transformers 5.24 loads adapters only with peft 0.22, which was not out when it came.
    pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    assert tiers(load(adapter_folder, ON_DISK)) == [{"disk"}] * 2


def test_an_adapter_folder_says_how_to_place_its_base(adapter_folder):
    # The Auto class finds the base of an adapter; the model's own class is given the adapter's folder.
    with pytest.raises(ValueError, match="adapter.*load_adapter"):
        EngramMoEForCausalLM.from_pretrained(adapter_folder, device_map=ON_DISK)


def test_threads_may_run_one_model(folder):
    model = load(folder, ON_DISK, hot_rows=20)
    expected, problems, interval = logits(model), [], sys.getswitchinterval()

    def run():
        try:
            for _ in range(25):
                if not torch.equal(logits(model), expected):
                    problems.append("other logits")
        except Exception as error:
            problems.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not problems


def test_hot_rows_can_be_drawn_anew_after_rows_were_written(folder):
    model = load(folder, IN_HOST, hot_rows=50)
    logits(model)
    through_the_parameter(model)
    model.place_tables({}, hot_rows=50)
    torch.testing.assert_close(logits(model), logits(_doubled()))


def _doubled():
    model = tiny_model()
    through_the_parameter(model)
    return model


def test_rows_of_one_state_dict_do_not_come_back_with_the_next():
    model = tiny_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name, table = "model.layers.0.engram.table", model.model.layers[0].engram.table
    digests = [torch.tensor(list(digest_of(block.rows)), dtype=torch.uint8) for block in table.block_records]
    changed = {
        **base,
        f"{name}.changed.row_ids": torch.tensor([0, 3]),
        f"{name}.changed.rows": torch.full((2, table.row_width), 9.0),
        f"{name}.changed.digests": torch.stack(digests),
    }
    model.load_state_dict(changed)
    assert table.blocks[0][0, 0] == 9
    model.load_state_dict(base)
    assert torch.equal(table.blocks[0], base[f"{name}.blocks.0"])


@torch.no_grad()
def test_a_cache_that_was_cropped_too_far_is_refused_afterwards():
    model, ids = tiny_model(), tiny_ids(2, 250)
    cache = DynamicCache(config=model.config)
    model(ids[:, :200], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="at most"):
        cache.crop(-100)
    with pytest.raises(ValueError, match="Start from an empty cache"):
        model(ids[:, 100:], **{CACHE_NAME: cache})

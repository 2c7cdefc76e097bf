"""Checkpoints of tables in training: small, resumed bit for bit from any tier, and whole or not counted."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import slow
from peft import get_peft_model
from runs import same
from runs import train_rows as train
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from engram_hf import (
    engram_optimizers,
    last_complete_checkpoint,
    lora_config,
    merge_changed_rows,
    quantize_tables,
    verify_tables,
)


SCRIPTS = Path(__file__).parents[2] / "scripts"
TABLES = ("model.layers.0.engram.table", "model.layers.2.engram.table")
TIERS = {
    "resident": None,
    "host": {"": "cpu", **dict.fromkeys(TABLES, "cpu")},
    "disk": {"": "cpu", **dict.fromkeys(TABLES, "disk")},
}


def config(**changes):
    # So many rows that a few steps touch less than half of a block.
    return tiny_config(engram_vocab_size=2003, engram_block_elements=20_000, **changes)


def load(folder, tier="resident", **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=TIERS[tier], **arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the model `base` and the run `run`, and what its model is at the end."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_model(config()).save_pretrained(folder / "base")
    model = load(folder / "base")
    train(model, folder / "run")
    return folder, model.state_dict()


STARTS = ["base", "run/checkpoint-4", "another model"]
# Each start and each tier once; all nine are slow.
QUICK = list(zip(STARTS, TIERS))
RESUMED_FROM = [case if case in QUICK else slow(*case) for case in itertools.product(STARTS, TIERS)]


@pytest.mark.parametrize("start, tier", RESUMED_FROM)
def test_a_run_is_resumed_bit_for_bit_on_every_tier(run, tmp_path, tier, start):
    folder, expected = run
    if start == "another model":
        tiny_model(config(), seed=7).save_pretrained(tmp_path / "another")
    model = load(tmp_path / "another" if start == "another model" else folder / start, tier)
    train(model, tmp_path / "run", folder / "run" / "checkpoint-4")
    assert same(model, expected)
    assert same(load(tmp_path / "run" / "checkpoint-8"), expected)


# Adam is resumed above.
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rowwise_adam", "sgd", "adagrad"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rule_is_resumed_bit_for_bit(tmp_path, rule, dtype):
    tiny_model(config(engram_table_dtype=dtype)).save_pretrained(tmp_path / "base")
    whole = load(tmp_path / "base")
    train(whole, tmp_path / "run", rule=rule)
    resumed = load(tmp_path / "base", "disk")
    train(resumed, tmp_path / "run2", tmp_path / "run" / "checkpoint-6", rule)
    assert same(whole, resumed)


@pytest.mark.slow
def test_a_muon_backbone_and_accumulation_are_resumed_bit_for_bit(tmp_path):
    tiny_model(config()).save_pretrained(tmp_path / "base")

    def go(out, resume=None):
        args = TrainingArguments(
            str(out),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = load(tmp_path / "base")
        trainer = Trainer(
            model,
            args,
            train_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(64, 5)],
            optimizer_cls_and_kwargs=engram_optimizers(args, backbone="muon"),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = go(tmp_path / "run")
    assert same(whole, go(tmp_path / "run2", str(tmp_path / "run" / "checkpoint-3")))


def test_checkpoints_link_the_files_they_came_from_and_hold_changed_rows_alone(run):
    folder, expected = run
    base = {path.name: path.stat().st_ino for path in (folder / "base").glob("tables-*")}
    for step in (2, 4, 6, 8):
        checkpoint = folder / "run" / f"checkpoint-{step}"
        assert {path.name: path.stat().st_ino for path in checkpoint.glob("tables-*")} == base
        assert sorted(path.name for path in checkpoint.glob("rows-*")) == [
            "rows-layer-00.safetensors",
            "rows-layer-02.safetensors",
        ]
        verify_tables(checkpoint)
    original, last = load(folder / "base").state_dict(), folder / "run" / "checkpoint-8"
    for layer in (0, 2):
        rows = load_file(last / f"rows-layer-{layer:02d}.safetensors")
        start = f"model.layers.{layer}.engram.table"
        names = sorted(name for name in expected if name.startswith(f"{start}.blocks."))
        then, now = (torch.cat([state[name] for name in names]) for state in (original, expected))
        changed = (then != now).any(1).nonzero().flatten()
        assert set(changed.tolist()) <= set(rows[f"{start}.changed.row_ids"].tolist())
        assert torch.equal(now[rows[f"{start}.changed.row_ids"]], rows[f"{start}.changed.rows"])
        assert len(rows[f"{start}.changed.row_ids"]) < 0.2 * len(then)


def changed_rows(checkpoint) -> int:
    files = [load_file(path) for path in checkpoint.glob("rows-*")]
    return sum(len(rows) for file in files for name, rows in file.items() if name.endswith(".row_ids"))


def test_where_most_rows_have_changed_blocks_are_written_whole_and_become_the_base(tmp_path):
    model = tiny_model(tiny_config())
    train(model, tmp_path / "run", max_steps=6)
    first, last = tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-6"
    # A model from no file, all of whose rows are touched.
    assert changed_rows(first) == 0
    assert same(load(last), model)
    inodes = [{path.stat().st_ino for path in folder.glob("tables-*")} for folder in (first, last)]
    assert inodes[0] != inodes[1]


def test_a_fresh_model_writes_its_tables_once_and_then_their_changes(tmp_path):
    model = tiny_model(config())
    train(model, tmp_path / "run")
    inodes = [
        {path.stat().st_ino for path in (tmp_path / "run" / f"checkpoint-{step}").glob("tables-*")}
        for step in (2, 4, 8)
    ]
    assert inodes[0] == inodes[1] == inodes[2]
    assert changed_rows(tmp_path / "run" / "checkpoint-2") == 0 < changed_rows(tmp_path / "run" / "checkpoint-8")
    assert same(load(tmp_path / "run" / "checkpoint-8", "disk"), model)


def test_a_row_that_was_changed_by_hand_is_saved_too(run, tmp_path):
    model = load(run[0] / "base")
    with torch.no_grad():
        model.model.tables()[0].blocks[1][5] = 9.0
    train(model, tmp_path / "run", max_steps=2)
    assert same(load(tmp_path / "run" / "checkpoint-2"), model)


def test_merging_makes_a_model_of_its_own(run, tmp_path):
    folder, expected = run
    merge_changed_rows(folder / "run" / "checkpoint-8", tmp_path / "merged")
    assert same(load(tmp_path / "merged"), expected)
    assert not list((tmp_path / "merged").glob("rows-*")) and not (tmp_path / "merged" / "optimizer.pt").exists()
    verify_tables(tmp_path / "merged")
    with pytest.raises(ValueError, match="another folder"):
        merge_changed_rows(folder / "run" / "checkpoint-8", folder / "run" / "checkpoint-8")
    with pytest.raises(ValueError, match="merge_changed_rows"):
        quantize_tables(folder / "run" / "checkpoint-8", tmp_path / "quantized")
    quantize_tables(tmp_path / "merged", tmp_path / "quantized")


def test_a_final_save_is_whole(run, tmp_path):
    model = load(run[0] / "base", "disk")
    trainer = train(model, tmp_path / "run")
    trainer.save_model(str(tmp_path / "last"))
    assert not list((tmp_path / "last").glob("rows-*"))
    assert same(load(tmp_path / "last"), run[1])


@pytest.mark.parametrize("is_rows_first", [True, False])
def test_rows_and_blocks_of_a_checkpoint_may_come_in_any_order(run, is_rows_first):
    folder, expected = run
    checkpoint = folder / "run" / "checkpoint-8"
    model = tiny_model(config(), seed=3)
    files = sorted(checkpoint.glob("*.safetensors"), key=lambda path: path.name.startswith("rows") != is_rows_first)
    for path in files:
        model.load_state_dict(load_file(path), strict=False)
    assert same(model, expected)
    # The base alone, later, is the base.
    for path in (folder / "base").glob("*.safetensors"):
        model.load_state_dict(load_file(path), strict=False)
    assert same(model, load(folder / "base"))


def test_changed_rows_without_their_blocks_are_refused(run):
    checkpoint = run[0] / "run" / "checkpoint-8"
    model = tiny_model(config(), seed=3)
    model.load_state_dict(load_file(checkpoint / "rows-layer-00.safetensors"), strict=False)
    with pytest.raises(ValueError, match="without block 0"):
        model(tiny_ids(1, 5))


def test_damaged_rows_are_refused(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run[0] / "run" / "checkpoint-8", folder)
    path = folder / "rows-layer-00.safetensors"
    rows = load_file(path)
    save_file({name: tensor[:-1] if name.endswith("changed.rows") else tensor for name, tensor in rows.items()}, path)
    with pytest.raises(ValueError, match="changed rows .* are damaged|do not fit"):
        load(folder)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="rows-layer-00"):
        load(folder)


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end_and_old_checkpoints_go(run, tmp_path):
    model = load(run[0] / "base", "disk")
    trainer = train(
        model,
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=1,
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert same(load(best), model)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) <= 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)
    trainer.save_model(str(tmp_path / "last"))
    assert same(load(tmp_path / "last"), model)


def test_only_a_complete_checkpoint_counts(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run[0] / "run", out)
    assert last_complete_checkpoint(out) == str(out / "checkpoint-8")
    # As a kill would leave them: no marker, half a marker, half of another file.
    (out / "checkpoint-8" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(out) == str(out / "checkpoint-6")
    marker = out / "checkpoint-6" / "trainer_state.json"
    marker.write_text(marker.read_text()[:100])
    assert last_complete_checkpoint(out) == str(out / "checkpoint-4")
    optimizer = out / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert last_complete_checkpoint(out) == str(out / "checkpoint-2")
    os.truncate(next((out / "checkpoint-2").glob("rows-*")), 50)
    assert last_complete_checkpoint(out) is None
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def under_fsdp(checkpoint, is_sharded):
    """A copy of a checkpoint under the names that accelerate gives the same things with FSDP."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    weights = load(checkpoint).state_dict()
    (checkpoint / "optimizer.pt").unlink()
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    if is_sharded:
        dcp.save({"optimizer": state}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
        dcp.save({"model": weights}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    else:
        torch.save(state, checkpoint / "optimizer.bin")
        torch.save(weights, checkpoint / "pytorch_model_fsdp.bin")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_sharded", [True, False])
def test_checkpoints_of_fsdp_count_when_they_are_complete(run, tmp_path, caplog, is_sharded):
    out = tmp_path / "run"
    for step in (6, 8):
        shutil.copytree(run[0] / "run" / f"checkpoint-{step}", out / f"checkpoint-{step}")
        under_fsdp(out / f"checkpoint-{step}", is_sharded)
    last = out / "checkpoint-8"
    assert last_complete_checkpoint(out) == str(last)
    if is_sharded:
        (last / "optimizer_0" / ".metadata").unlink()
    else:
        os.truncate(last / "optimizer.bin", 1000)
    assert last_complete_checkpoint(out) == str(out / "checkpoint-6")
    reason = "optimizer_0 has no .metadata" if is_sharded else "optimizer.bin is truncated"
    assert f"checkpoint-8 is not a complete checkpoint: {reason}" in caplog.text


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("trainer_state.json", None, "it has no trainer_state.json"),
        ("trainer_state.json", "[1, 2]", "trainer_state.json is of step None"),
        ("trainer_state.json", '{"global_step": 6}', "trainer_state.json is of step 6"),
        ("trainer_state.json", "[" * 100_000, "trainer_state.json cannot be read"),
        ("optimizer.pt", None, "it has no state of an optimizer"),
        ("scheduler.pt", "", "scheduler.pt is truncated"),
        ("rows-layer-00.safetensors", None, "rows-layer-00.safetensors does not exist"),
        ("model.safetensors.index.json", None, "it holds no weights"),
        ("model.safetensors.index.json", "{}", "is damaged"),
    ],
)
def test_what_a_checkpoint_lacks_is_said(run, tmp_path, caplog, name, content, reason):
    last = tmp_path / "run" / "checkpoint-8"
    shutil.copytree(run[0] / "run" / "checkpoint-8", last)
    assert last_complete_checkpoint(tmp_path / "run") == str(last)
    (last / name).unlink()
    if content is not None:
        (last / name).write_text(content)
    assert last_complete_checkpoint(tmp_path / "run") is None
    assert f"{last} is not a complete checkpoint" in caplog.text and reason in caplog.text


def test_a_checkpoint_that_a_run_writes_again_does_not_count_until_it_is_done(run, tmp_path):
    out = tmp_path / "run"
    model = load(run[0] / "base")
    trainer = train(model, out, max_steps=8)
    assert last_complete_checkpoint(out) == str(out / "checkpoint-8")
    # The same again, as a callback may save it.
    model.save_pretrained(out / "checkpoint-8")
    assert last_complete_checkpoint(out) == str(out / "checkpoint-8")
    # After another step this is the beginning of a new checkpoint, which Trainer has to finish.
    trainer.optimizer.step()
    model.save_pretrained(out / "checkpoint-8")
    assert last_complete_checkpoint(out) == str(out / "checkpoint-6")


def test_a_model_saved_into_a_checkpoint_leaves_what_is_not_its_own(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run[0] / "run" / "checkpoint-8", out / "checkpoint-8")
    load(out / "checkpoint-8").save_pretrained(out / "checkpoint-8")
    assert last_complete_checkpoint(out) == str(out / "checkpoint-8")


@pytest.mark.slow
def test_the_optimizer_of_another_run_is_refused(run, tmp_path):
    model = load(run[0] / "base")
    with pytest.raises(ValueError, match="RowAdam"):
        train(model, tmp_path / "run", run[0] / "run" / "checkpoint-4", "sgd")
    for table in model.model.tables():
        table.requires_grad_(False)
    with pytest.raises(ValueError, match="same tables frozen"):
        train(model, tmp_path / "run", run[0] / "run" / "checkpoint-4")


@pytest.mark.slow
def test_runs_that_are_killed_end_like_one_that_is_not():
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / "maintenance" / "kill_runs.py"), "--kills", "3", "--seed", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert ran.returncode == 0 and ran.stdout.startswith("3 kills of"), ran.stderr[-2000:]


def test_a_checkpoint_says_in_its_index_what_it_holds(run):
    index = json.loads((run[0] / "run" / "checkpoint-8" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.layers.0.engram.table.changed.row_ids"] == "rows-layer-00.safetensors"
    assert "rows-layer-00.safetensors" in index["metadata"]["sha256"]


@pytest.mark.parametrize("way", [slow("in place"), "behind torch's back"])
def test_rows_that_are_changed_between_checkpoints_are_saved(run, tmp_path, way):
    class Clamp(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                for table in model.model.tables():
                    for block in table.blocks:
                        with torch.no_grad():
                            (block.data if way != "in place" else block).clamp_(-0.2, 0.2)

    model = load(run[0] / "base")
    train(model, tmp_path / "run", callbacks=[Clamp()], max_steps=4)
    assert same(load(tmp_path / "run" / "checkpoint-4"), model)


@pytest.mark.slow
def test_a_base_that_was_written_to_is_noticed_by_merging_and_by_resuming(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run[0] / "run" / "checkpoint-8", folder)
    tiny_model(config(), seed=5).save_pretrained(tmp_path / "other")
    name = "tables-layer-00-00001-of-00001.safetensors"
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match="which other checkpoints share"):
        merge_changed_rows(folder, tmp_path / "merged")
    with pytest.raises(ValueError, match="are not what was saved"):
        verify_tables(folder)
    with pytest.raises(ValueError, match="without block 0"):
        train(load(run[0] / "base"), tmp_path / "run", folder)


def test_adapters_with_rows_are_not_saved_without_them(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path / "base"), lora_config(r=2))
    for table in model.get_base_model().model.tables():
        table.requires_grad_(True)
    with pytest.raises(ValueError, match="save_only_model cannot be used with LoRA"):
        train(model, tmp_path / "run", save_only_model=True)


def test_a_checkpoint_without_its_optimizer_does_not_count(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run[0] / "run", out)
    (out / "checkpoint-8" / "optimizer.pt").unlink()
    assert last_complete_checkpoint(out) == str(out / "checkpoint-6")
    train(load(run[0] / "base"), tmp_path / "model alone" / "run", save_only_model=True)
    assert last_complete_checkpoint(tmp_path / "model alone" / "run").endswith("checkpoint-8")


@pytest.mark.slow
def test_a_run_on_disk_stays_there_where_the_model_comes_from_its_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    # So few rows that blocks are written whole.
    whole = load(tmp_path / "base", "disk")
    train(whole, tmp_path / "run")
    last = tmp_path / "run" / "checkpoint-4"
    resumed = load(last, "disk")
    train(resumed, tmp_path / "run2", last)
    assert same(resumed, whole) and [set(table.tiers) for table in resumed.engram_tables()] == [{"disk"}] * 2

"""Patches of models: made of two checkpoints or by training, merged, compared, and used by every kind of model."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from architectures import tiny_backbone, tiny_memory, with_memory
from cases import slow
from foreign import gemma3n_text, publish, qwen_text
from peft import LoraConfig, get_peft_model
from runs import train_rows
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, TrainingArguments
from typer.testing import CliRunner

from engram_hf import (
    EngramBestPatchCallback,
    active_patches,
    add_engram,
    add_patch,
    compare_patches,
    disable_patches,
    engram_optimizers,
    extract_patch,
    inspect_checkpoint,
    load_patch,
    load_with_tables,
    make_patch,
    merge_changed_rows,
    merge_patch,
    remove_engram,
    remove_patch,
    save_patch,
    set_engram,
    set_patches,
    use_patches,
    verify_tables,
)
from engram_hf.training.trained_rows import TrainedRows
from engram_hf_command import app


FIRST, SECOND = "layers.0.engram.table", "layers.2.engram.table"
IDS = tiny_ids(3, 12)
ON_DISK = {"": "cpu", "...table": "disk"}


def config(**changes):
    return tiny_config(engram_vocab_size=2003, engram_block_elements=20_000, **changes)


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def load(folder, device_map=None):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()


def stored_rows(model) -> dict[str, torch.Tensor]:
    """Name of a table to all of its rows, as they are stored."""
    return {
        name: torch.cat([block.rows for block in table.block_records]).clone()
        for name, table in model.named_tables().items()
    }


def random_patch(model, name="alice", seed=0, mode="replace", share=0.2, tables=None):
    generator, rows = torch.Generator().manual_seed(seed), {}
    for table_name, table in model.named_tables().items():
        if tables is None or table_name in tables:
            row_ids = (torch.rand(table.num_rows, generator=generator) < share).nonzero().flatten()
            rows[table_name] = row_ids, 0.5 * torch.randn(len(row_ids), table.head_dim, generator=generator)
    return make_patch(model, name, rows, mode)


# Two models and what lies between them.


@pytest.mark.parametrize("table_dtype", ["bfloat16", "float16", "int8"])
def test_the_patch_between_two_models_makes_one_of_the_other(tmp_path, table_dtype, caplog):
    before = tiny_model(tiny_config(engram_table_dtype=table_dtype))
    before.save_pretrained(tmp_path / "before")
    after = load(tmp_path / "before")
    generator = torch.Generator().manual_seed(1)
    changed = {}
    with torch.no_grad():
        for name, table in after.named_tables().items():
            row_ids = (torch.rand(table.num_rows, generator=generator) < 0.1).nonzero().flatten()
            rows = table.stored_as.encode(torch.randn(len(row_ids), 8, generator=generator))
            is_other = (rows != table.gather_rows(row_ids)).any(-1)
            table.write_rows(row_ids, rows)
            changed[name] = row_ids[is_other]
    after.save_pretrained(tmp_path / "after")
    given = [(tmp_path / "before", tmp_path / "after"), (before, after), (before, tmp_path / "after")]
    for number, (one, other) in enumerate(given):
        patch = extract_patch(one, other, tmp_path / f"{number}.safetensors", name=None if number else "named")
        assert patch.name == ["named", "patch", "after"][number] and patch.mode == "replace"
        for name, row_ids in changed.items():
            assert torch.equal(patch.tables[name].row_ids, row_ids)
        found = load(tmp_path / "before")
        with caplog.at_level(logging.WARNING, "transformers"):
            logging.getLogger("transformers").addHandler(caplog.handler)
            add_patch(found, tmp_path / f"{number}.safetensors")
        assert not caplog.text
        assert torch.equal(logits(found), logits(after)) and not torch.equal(logits(found), logits(before))


def test_what_is_no_pair_of_states_of_one_model_is_refused(tmp_path, caplog):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    for other, sentence in (
        (tiny_model(), "are equal, so there is no patch"),
        (tiny_model(tiny_config(engram_vocab_size=59)), "two states of one model"),
        (tiny_model(tiny_config(engram_table_dtype="bfloat16")), "two states of one model"),
        (tiny_model(tiny_config(engram_seed=9)), "differs in: multipliers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            extract_patch(tmp_path / "model", other, tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        extract_patch(tmp_path / "nothing", model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    other = tiny_model(seed=3)
    other.save_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING, "transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        extract_patch(tmp_path / "model", tmp_path / "other", tmp_path / "x.safetensors")
    assert "differs from" in caplog.text and "more than its tables" in caplog.text


@pytest.mark.parametrize(
    "table_dtype, mode",
    [("bfloat16", "add"), slow("float32", "add"), slow("bfloat16", "replace"), ("float32", "replace")],
)
def test_a_merged_model_is_the_patched_one_bit_for_bit(tmp_path, table_dtype, mode):
    model = tiny_model(tiny_config(engram_table_dtype=table_dtype))
    model.save_pretrained(tmp_path / "model")
    a, b = random_patch(model, "a", mode=mode), random_patch(model, "b", 1, mode)
    add_patch(model, a)
    expected = logits(model)
    merged = load(merge_patch(tmp_path / "model", save_patch(a, tmp_path / "a"), tmp_path / "merged"))
    assert torch.equal(logits(merged), expected)
    verify_tables(tmp_path / "merged")
    assert torch.equal(logits(load(merge_patch(model, a, tmp_path / "of-model"))), expected)
    assert active_patches(model) == ["a"]
    # A patch over a merged one, and two of them.
    b.tables = {name: each._replace(base_digest="") for name, each in b.tables.items()}
    add_patch(model, b)
    expected = logits(model)
    add_patch(merged, b)
    assert torch.equal(logits(merged), expected)
    assert torch.equal(logits(load(merge_patch(tmp_path / "merged", b, tmp_path / "both"))), expected)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_rows_that_are_merged_into_quantized_tables_are_quantized(tmp_path):
    model = tiny_model(tiny_config(engram_table_dtype="int8"))
    model.save_pretrained(tmp_path / "model")
    patch = random_patch(model)
    merged = load(merge_patch(tmp_path / "model", patch, tmp_path / "merged"))
    for name, rows in stored_rows(model).items():
        rows[patch.tables[name].row_ids] = model.named_tables()[name].stored_as.encode(patch.tables[name].rows)
        assert torch.equal(stored_rows(merged)[name], rows)


def test_a_merge_that_cannot_be_right_writes_nothing(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    patch = random_patch(model)
    tiny_model(tiny_config(engram_seed=9)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another hash"):
        merge_patch(tmp_path / "other", patch, tmp_path / "merged")
    tiny_model(tiny_config(engram_layer_ids=[0])).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="no such table"):
        merge_patch(tmp_path / "smaller", patch, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() or not list((tmp_path / "merged").iterdir())
    with pytest.raises(ValueError, match="holds weights already"):
        merge_patch(tmp_path / "model", patch, tmp_path / "other")


def test_two_patches_are_compared_row_by_row():
    model = tiny_model()
    rows = torch.arange(24.0).view(3, 8)
    a = make_patch(model, "a", {FIRST: (torch.tensor([1, 5, 9]), rows)})
    other = rows.clone()
    other[2, 3] += 4
    b = make_patch(model, "b", {FIRST: (torch.tensor([1, 6, 9]), other), SECOND: (torch.tensor([2]), rows[:1])})
    first, second = compare_patches(a, b)
    assert (first.table, first.rows, first.shared, first.conflicts) == (FIRST, (3, 3), 2, 1)
    assert first.largest_difference == 4 and first.norms[0] == pytest.approx(float(rows.norm()))
    assert (second.rows, second.shared, second.conflicts, second.norms[0]) == ((0, 1), 0, 0, 0.0)
    added = make_patch(model, "c", {FIRST: (torch.tensor([1, 6, 9]), other)}, mode="add")
    assert compare_patches(a, added)[0].conflicts == 2
    assert compare_patches(added, added)[0].conflicts == 0
    with pytest.raises(ValueError, match="different hashes"):
        compare_patches(a, random_patch(tiny_model(tiny_config(engram_seed=9))))


# Training.


def train(model, out, name="alice", **changes):
    return train_rows(model, out, patch=name, **{"max_steps": 6, **changes})


@pytest.mark.parametrize(
    "device_map, table_dtype",
    [(None, "bfloat16"), (ON_DISK, "float32"), slow(None, "float32"), slow(ON_DISK, "bfloat16")],
)
def test_a_patch_is_trained_as_the_table_would_be_and_the_table_stays(tmp_path, device_map, table_dtype):
    tiny_model(config(engram_table_dtype=table_dtype)).save_pretrained(tmp_path / "base")
    model, plain = load(tmp_path / "base", device_map), load(tmp_path / "base")
    before = stored_rows(model)
    args = {"max_steps": 4, "save_strategy": "no"}
    trainer = train(model, tmp_path / "run", **args)
    train(plain, tmp_path / "plain", name=None, **args)
    patch, after = model.trained_patch(), stored_rows(plain)
    assert active_patches(model) == ["alice"] and patch.provenance["steps"] == 4
    for name, rows in before.items():
        assert torch.equal(stored_rows(model)[name], rows)
        changed = (after[name] != rows).any(-1).nonzero().flatten()
        assert len(changed) and torch.isin(changed, patch.tables[name].row_ids).all()
        rows[patch.tables[name].row_ids] = patch.tables[name].rows.to(rows.dtype)
        assert torch.equal(rows, after[name])
    assert torch.equal(logits(model.eval()), logits(plain.eval()))
    # What is saved at the end: the base's tables, and the patch beside them.
    trainer.save_model(str(tmp_path / "saved"))
    saved = load(tmp_path / "saved")
    base = stored_rows(load(tmp_path / "base"))
    assert all(torch.equal(rows, base[name]) for name, rows in stored_rows(saved).items())
    add_patch(saved, tmp_path / "saved")
    assert torch.equal(logits(saved), logits(model))
    with disable_patches(model), disable_patches(saved):
        assert torch.equal(logits(model), logits(saved))


@pytest.mark.parametrize("rule", [slow("adam"), slow("sgd")])
def test_a_run_that_trains_a_patch_is_resumed_bit_for_bit(tmp_path, rule):
    tiny_model(config()).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    train(model, tmp_path / "run", rule=rule)
    expected = model.trained_patch()
    again = load(tmp_path / "base")
    train(again, tmp_path / "again", rule=rule, resume=tmp_path / "run" / "checkpoint-4")
    found = again.trained_patch()
    for name, each in expected.tables.items():
        assert torch.equal(found.tables[name].row_ids, each.row_ids)
        assert torch.equal(found.tables[name].rows, each.rows)
    kept = load_patch(tmp_path / "run" / "checkpoint-4")
    assert kept.name == "alice" and 0 < kept.num_rows < expected.num_rows and kept.provenance["steps"] == 4
    # A checkpoint's tables are those of the base.
    merged = merge_changed_rows(tmp_path / "run" / "checkpoint-6", tmp_path / "merged")
    assert all(
        torch.equal(rows, stored_rows(load(tmp_path / "base"))[n]) for n, rows in stored_rows(load(merged)).items()
    )


def test_evaluations_of_a_run_see_its_patch_and_the_best_one_is_kept(tmp_path):
    tiny_model(config()).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    callback = EngramBestPatchCallback(tmp_path / "best" / "patch.safetensors")
    # A rate so high that later steps are worse.
    trainer = train(
        model, tmp_path / "run", callbacks=[callback], eval_strategy="steps", eval_steps=1, learning_rate=3e-2
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = load_patch(tmp_path / "best")
    assert len(set(losses)) == len(losses) == 6
    assert best.provenance["eval_loss"] == min(losses) == callback.best
    assert best.provenance["steps"] == 1 + losses.index(min(losses))
    saved = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["EngramBestPatchCallback"]["attributes"]["best"] == callback.best
    trainer.remove_callback(callback)
    trainer.add_callback(EngramBestPatchCallback(tmp_path / "best.safetensors", metric="eval_bleu"))
    with pytest.raises(ValueError, match="follows 'eval_bleu', and the evaluation gave"):
        trainer.evaluate()


def test_what_a_run_cannot_train_is_refused(tmp_path):
    model = tiny_model(config())
    add_patch(model, random_patch(model, "bob", share=0.01))
    with pytest.raises(ValueError, match="has the patches 'bob' already"):
        train(model, tmp_path / "run")
    remove_patch(model, "bob")
    with pytest.raises(ValueError, match="EngramBestPatchCallback"):
        train(model, tmp_path / "run", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    train(model, tmp_path / "run", max_steps=1, save_strategy="no")
    set_patches(model, [])
    with pytest.raises(ValueError, match=r"the patch 'alice' are being trained.*none.*set_patches.model, \['alice'\]"):
        model.train()(IDS, labels=IDS)
    with pytest.raises(ValueError, match="follows"):
        EngramBestPatchCallback(tmp_path / "x").on_evaluate(None, None, None, metrics={}, model=model)
    with pytest.raises(ValueError, match="found no patch that is trained"):
        EngramBestPatchCallback(tmp_path / "x").on_evaluate(
            None, None, None, metrics={"eval_loss": 1.0}, model=tiny_model()
        )


# Other models.


def test_a_memory_in_somebody_elses_model_takes_patches_also_inside_of_peft():
    model = with_memory(tiny_backbone("llama"))
    ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(0))
    plain = logits(model, ids)
    patch = random_patch(model, share=0.5)
    add_patch(model, patch)
    patched = logits(model, ids)
    assert not torch.equal(patched, plain)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert active_patches(wrapped) == ["alice"]
    with use_patches(wrapped, [None, "alice", None]):
        found = logits(wrapped, ids)
    assert torch.equal(found[1], patched[1]) and torch.equal(found[0], plain[0])
    remove_patch(wrapped, "alice")
    assert torch.equal(logits(wrapped, ids), plain)


@pytest.mark.parametrize("made", [gemma3n_text, qwen_text], ids=["gemma3n", "qwen"])
def test_tables_of_other_peoples_models_take_patches(tmp_path, made):
    publish(made(), tmp_path / "model")
    model = load_with_tables(tmp_path / "model", device_map="cpu+disk").eval()
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    plain = logits(model, ids)
    patch = random_patch(model, share=0.5)
    add_patch(model, patch)
    patched = logits(model, ids)
    assert not torch.equal(patched, plain)
    with use_patches(model, [None, "alice", None]):
        found = logits(model, ids)
    assert torch.equal(found[1], patched[1]) and torch.equal(found[2], plain[2])
    written = load_with_tables(tmp_path / "model", device_map="cpu+disk").eval()
    for name, table in written.named_tables().items():
        table.write_rows(patch.tables[name].row_ids, patch.tables[name].rows.to(table.dtype))
    assert torch.equal(logits(written, ids), patched)
    remove_patch(model, "alice")
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("mode, scale", [("replace", 1.0), ("replace", 0.5), ("add", 1.0)])
def test_rows_of_a_patch_over_fp8_rows_of_other_peoples_models_are_not_rounded_to_fp8(tmp_path, mode, scale):
    publish(qwen_text(), tmp_path / "model", is_fp8=True)
    model = load_with_tables(tmp_path / "model", device_map={"": "cpu", "...ngram_embedding": "disk"}).eval()
    ids = tiny_ids(2, 8)
    plain = logits(model, ids)
    (name, table), patch = next(iter(model.named_tables().items())), random_patch(model, mode=mode, share=0.5)
    every = torch.arange(table.num_rows)
    own = table(every).float()
    add_patch(model, patch, scale)
    given, expected = patch.tables[name], own.clone()
    old = own[given.row_ids]
    expected[given.row_ids] = (
        given.rows
        if mode == "replace" and scale == 1
        else (old + scale * (given.rows if mode == "add" else given.rows - old))
    )
    assert torch.equal(table(every), expected) and table(every).dtype == torch.float32
    patched = logits(model, ids)
    assert not torch.equal(patched, plain)
    with use_patches(model, [None, "alice"]):
        found = logits(model, ids)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], patched[1])


# Memories that come and go.


def test_a_memory_that_is_added_later_knows_the_patches():
    model = with_memory(tiny_backbone("llama"))
    plain = logits(model)
    add_patch(model, random_patch(model, share=0.5))
    add_engram(model, tiny_memory(start="random"), name="second")
    set_engram(model, "default")
    assert active_patches(model) == ["alice"] and not torch.equal(logits(model), plain)
    remove_patch(model, "alice")
    assert active_patches(model) == [] and torch.equal(logits(model), plain)


def test_a_memory_that_is_added_in_front_does_not_hide_the_patches():
    model = with_memory(tiny_backbone("llama"), layer_ids=[2])
    plain = logits(model)
    add_patch(model, random_patch(model, share=0.5))
    add_engram(model, tiny_memory(layer_ids=[0]), name="second")
    set_engram(model, "default")
    assert active_patches(model) == ["alice"]
    with disable_patches(model):
        assert torch.equal(logits(model), plain)
    assert not torch.equal(logits(model), plain)


def test_a_patch_goes_with_its_only_tables():
    model = with_memory(tiny_backbone("llama"))
    table = next(iter(model.named_tables()))
    add_engram(model, tiny_memory(start="random"), name="second")
    patch = random_patch(model, tables=[table])
    add_patch(model, patch)
    add_patch(model, random_patch(model, "bob", tables=[table.replace("default", "second")]))
    remove_engram(model, "default")
    assert active_patches(model) == ["bob"]
    remove_engram(model)
    assert not any("patches" in name for module in model.modules() for name in vars(module))
    add_patch(add_engram(model, tiny_memory(start="random")), patch)
    assert active_patches(model) == ["alice"]


# Runs behind each other.


def test_a_run_behind_one_that_trained_a_patch_leaves_that_patch_as_it_is(tmp_path):
    model, args = tiny_model(), {"max_steps": 2, "save_strategy": "no"}
    train(model, tmp_path / "patch", **args)
    before, tables = model.trained_patch(), stored_rows(model)
    held = sum(table.patches.nbytes for table in model.named_tables().values())
    assert held > sum(each.row_ids.nbytes + each.rows.nbytes for each in before.tables.values())
    with pytest.raises(ValueError, match=r"the patches that lie over the table are alice.*set_patches\(model, \[\]\)"):
        train(model, tmp_path / "table", name=None, **args)
    assert model.trained_patch() is None and active_patches(model) == ["alice"]
    set_patches(model, [])
    train(model, tmp_path / "table", name=None, **args)
    assert not all(torch.equal(stored_rows(model)[name], rows) for name, rows in tables.items())
    for name, each in before.tables.items():
        layer = model.named_tables()[name].patches.layers["alice"]
        assert torch.equal(layer.rows, each.rows) and torch.equal(layer.row_ids, each.row_ids)


def test_an_optimizer_whose_patch_was_removed_does_not_write_to_the_table(tmp_path):
    model = tiny_model()
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    factory, options = engram_optimizers(args, "sgd", train_as_patch="alice")
    optimizer = factory()(model, args=args, **{k: v for k, v in options.items() if k != "args"})
    model.train()
    model(IDS, labels=IDS).loss.backward()
    remove_patch(model, "alice")
    with pytest.raises(ValueError, match="was made to train a patch of .*removed a patch since"):
        optimizer.step()


def test_rows_in_training_are_what_a_dictionary_would_hold():
    table = tiny_model().named_tables()[FIRST]
    trained, expected = TrainedRows("alice", table), {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        row_ids = torch.randint(0, table.num_rows, (30,), generator=generator).unique()
        rows = torch.randn(len(row_ids), 8, generator=generator)
        trained.write(row_ids, rows)
        expected |= dict(zip(row_ids.tolist(), rows))
        asked = torch.randint(0, table.num_rows, (20,), generator=generator)
        found = torch.zeros(20, 8)
        trained.read(asked, found)
        assert torch.equal(found, torch.stack([expected.get(int(each), torch.zeros(8)) for each in asked]))
    layer = trained.fixed()
    assert layer.row_ids.tolist() == sorted(expected)
    assert torch.equal(layer.rows, torch.stack([expected[int(each)] for each in layer.row_ids]))
    trained.clear()
    assert not len(trained.fixed().row_ids)


def test_merging_a_model_does_not_take_the_patches_from_its_requests(tmp_path, monkeypatch):
    model, seen = tiny_model(), []
    patch = random_patch(model, share=0.5)
    add_patch(model, patch)
    expected, save = logits(model), type(model).save_pretrained

    def save_while_somebody_asks(self, *args, **kwargs):
        thread = threading.Thread(target=lambda: seen.append(logits(model)))
        thread.start()
        thread.join()
        return save(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "save_pretrained", save_while_somebody_asks)
    merge_patch(model, patch, tmp_path / "merged")
    assert torch.equal(seen[0], expected)


# Many users.


def test_eight_users_of_two_hundred_in_a_batch_get_what_each_gets_alone(tmp_path):
    # Experts would compute tokens of all sequences at once, so that one depends on the others.
    tiny_model(config(first_k_dense_replace=3)).save_pretrained(tmp_path)
    model = load(tmp_path, ON_DISK)
    patches = [random_patch(model, f"user {i}", seed=i, share=0.02) for i in range(200)]
    for patch in patches:
        add_patch(model, patch)
    set_patches(model, [])
    held = sum(table.patches.nbytes for table in model.named_tables().values())
    rows = sum(patch.nbytes for patch in patches)
    # The filters: at most 128 bytes for each row.
    assert rows < held < rows + 128 * sum(patch.num_rows for patch in patches)
    ids = tiny_ids(8, 10)
    for users in ([3, 50, 199, 7, 7, 120, 0, 81], [11, 12, 13, 14, 15, 16, 17, 18]):
        with use_patches(model, [f"user {user}" for user in users]):
            together = logits(model, ids)
        for i, user in enumerate(users):
            # The batch has the same shape, so that the kernels of the backbone round alike.
            set_patches(model, [f"user {user}"])
            assert torch.equal(logits(model, ids)[i], together[i])
        set_patches(model, [])
    assert not torch.equal(logits(model, ids), together)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from engram_hf import load_patch, merge_patch, save_patch
torch.set_num_threads(1)
patch = load_patch({patch!r})
print("ready", flush=True)
sys.stdin.readline()
for i in range(10**6):
    save_patch(patch, {saved!r})
    merge_patch({source!r}, patch, {target!r} + str(i))
"""


@pytest.mark.parametrize("delay", [0.05, slow(0.02), slow(0.033), slow(0.12)])
def test_a_process_killed_while_it_saves_and_merges_leaves_nothing_that_is_half(tmp_path, delay):
    model = tiny_model()
    model.save_pretrained(tmp_path / "source")
    old, new = random_patch(model, "old"), random_patch(model, "new", 1)
    file, saved = save_patch(new, tmp_path / "new.safetensors"), save_patch(old, tmp_path / "saved.safetensors")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    script = KILLED.format(
        tests=str(Path(__file__).parents[1]),
        patch=str(file),
        saved=str(saved),
        source=str(tmp_path / "source"),
        target=str(tmp_path / "merged-"),
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert load_patch(saved).name in ("old", "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before
    add_patch(model, new)
    for target in tmp_path.glob("merged-*"):
        # The index comes last: without it nobody loads the folder.
        if (target / "model.safetensors.index.json").exists():
            verify_tables(target)
            assert torch.equal(logits(load(target)), logits(model))
        else:
            assert inspect_or_none(target) is None


def inspect_or_none(folder):
    try:
        return inspect_checkpoint(folder)
    except (ValueError, OSError):
        return None


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_the_commands_say_what_the_functions_say(tmp_path, tokenizer):
    model = tiny_model(
        tiny_config(vocab_size=608, engram_compressed_vocab_size="auto", engram_pad_token_id=0, engram_vocab_size=53)
    )
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    patch = random_patch(model)
    file = save_patch(patch, tmp_path / "patches" / "of users" / "alice.safetensors")
    ran = run("patch", "merge", tmp_path / "model", file, tmp_path / "merged")
    assert ran.exit_code == 0 and "wrote" in ran.stdout
    shutil.copytree(tmp_path / "model", tmp_path / "with-patch")
    save_patch(patch, tmp_path / "with-patch")
    for source, is_there in (("model", False), ("with-patch", True)):
        ran = run("merge", tmp_path / source, tmp_path / f"{source}-merged")
        assert ran.exit_code == 0 and ("patch lies beside it and is not merged" in ran.stdout) is is_there
    ran = run("patch", "extract", tmp_path / "model", tmp_path / "merged", tmp_path / "again.safetensors")
    assert ran.exit_code == 0 and f"wrote {patch.num_rows:,} rows of 2 tables" in ran.stdout
    compared = json.loads(run("patch", "compare", file, tmp_path / "again.safetensors", "--json").stdout)
    assert [(each["shared"], each["conflicts"]) for each in compared] == [
        (len(each.row_ids), 0) for each in patch.tables.values()
    ]
    assert "is free" in run("patch", "compare", file, tmp_path / "again.safetensors").stdout
    found = json.loads(run("patch", "inspect", file, "--json").stdout)
    assert (found["name"], found["rows"], found["fingerprint"]) == ("alice", patch.num_rows, patch.fingerprint)
    shown = run("patch", "inspect", tmp_path / "again.safetensors").stdout
    assert FIRST in shown and "before:" in shown
    ran = run("patch", "apply", tmp_path / "model", file, "a list is", "--max-new-tokens", "4")
    inputs = tokenizer("a list is", return_tensors="pt")
    for start, with_patch in (("without: ", False), ("with:    ", True)):
        set_patches(model, [])
        if with_patch:
            add_patch(model, patch)
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert f"{start}{tokenizer.decode(generated)!r}" in ran.stdout
    # At few columns no name and no figure goes on in the next line.
    for command, figures in (
        (["inspect", file], [f"{each.table_rows:,}" for each in patch.tables.values()]),
        (
            ["compare", file, tmp_path / "again.safetensors"],
            [f"{part:.3g}" for each in compared for part in each["norms"]],
        ),
    ):
        for columns in (80, 44):
            ran = CliRunner().invoke(app, ["patch", *map(str, command)], env={"COLUMNS": str(columns)})
            # The sentences below a table are the terminal's to wrap.
            lines = ran.stdout.splitlines()
            assert any(FIRST in line for line in lines)
            assert all(len(line) <= columns for line in lines if "row" not in line or ";" in line), columns
            assert all(any(figure in line for line in lines) for figure in figures)
    ran = run("patch", "inspect", tmp_path / "model" / "config.json")
    assert ran.exit_code == 1 and "error:" in ran.stderr

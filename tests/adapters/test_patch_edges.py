"""Patches at the edges: what may stand in a file, models with several memories, merges of other people's models."""

import datetime
import json
import logging

import pytest
import torch
from architectures import tiny_backbone, tiny_memory, with_memory
from cases import slow
from foreign import gemma3n_text, publish
from runs import train_rows
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_config, tiny_ids, tiny_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from engram_hf import (
    EngramBestPatchCallback,
    PatchedRows,
    RowPatch,
    active_patches,
    add_engram,
    add_patch,
    engram_optimizers,
    extract_patch,
    forget,
    load_patch,
    load_with_tables,
    make_patch,
    merge_patch,
    push_patch,
    remove_engram,
    remove_patch,
    save_engram,
    save_patch,
    set_engram,
    set_patches,
    verify_tables,
)
from engram_hf.commands.patches import show_patch
from engram_hf.training.trained_rows import TrainedRows


FIRST, SECOND = "layers.0.engram.table", "layers.2.engram.table"
IDS = tiny_ids(3, 12)
# As the backbones of `tiny_backbone`.
EAGER = {"attn_implementation": "eager"}


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def whole_patch(model, name="alice", seed=0, mode="replace", tables=None):
    """Every row of some tables, at random."""
    generator, rows = torch.Generator().manual_seed(seed), {}
    for table_name, table in model.named_tables().items():
        if tables is None or table_name in tables:
            drawn = 0.5 * torch.randn(table.num_rows, table.head_dim, generator=generator)
            rows[table_name] = torch.arange(table.num_rows), drawn
    return make_patch(model, name, rows, mode)


def train(model, out, name="alice", **changes):
    train_rows(model, out, patch=name, **{"max_steps": 2, "save_strategy": "no", **changes})


@pytest.fixture
def warnings(caplog):
    """What the package warns of, as text."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# Merging.


@pytest.mark.parametrize("mode, scale", [("replace", 1.0), ("add", 0.5)])
def test_a_model_with_an_added_memory_is_merged(tmp_path, mode, scale):
    model = with_memory(tiny_backbone("llama"))
    model.save_pretrained(tmp_path / "model")
    plain, patch = logits(model), whole_patch(model, mode=mode)
    add_patch(model, patch, scale)
    assert not torch.equal(logits(model), plain)
    for number, source in enumerate((model, tmp_path / "model")):
        merged = load(merge_patch(source, patch, tmp_path / f"merged-{number}", scale), **EAGER)
        assert torch.equal(logits(merged), logits(model))


def test_the_patch_between_two_folders_with_an_added_memory_fits_the_model(tmp_path):
    model = with_memory(tiny_backbone("llama"))
    model.save_pretrained(tmp_path / "model")
    merged = merge_patch(tmp_path / "model", whole_patch(model), tmp_path / "merged")
    found = extract_patch(tmp_path / "model", merged, tmp_path / "found.safetensors")
    assert list(found.tables) == list(model.named_tables())
    add_patch(model, tmp_path / "found.safetensors")
    assert torch.equal(logits(model), logits(load(merged, **EAGER)))


def test_a_folder_of_a_model_without_a_head_is_merged(tmp_path):
    model = with_memory(tiny_backbone("llama").model)
    model.save_pretrained(tmp_path / "model")
    patch = whole_patch(model)
    add_patch(model, patch)
    folder = merge_patch(tmp_path / "model", patch, tmp_path / "merged")
    merged = AutoModel.from_pretrained(folder, **EAGER).eval()
    with torch.no_grad():
        assert torch.equal(merged(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_a_patch_of_one_of_two_memories_is_merged_into_that_one(tmp_path):
    model = with_memory(tiny_backbone("llama"))
    add_engram(model, tiny_memory(vocab_size=59, start="random"), name="second")
    own = [name for name in model.named_tables() if ".second." in name]
    patch = whole_patch(model, tables=own)
    plain = logits(model)
    add_patch(model, patch)
    merged = load(merge_patch(model, patch, tmp_path / "merged"), **EAGER)
    assert torch.equal(logits(merged), logits(model)) and not torch.equal(logits(model), plain)
    set_engram(model, "default")
    set_engram(merged, "default")
    assert torch.equal(logits(merged), logits(model))
    other = RowPatch("x", patch.tables, fingerprint={**patch.fingerprint, "multipliers": "0"})
    with pytest.raises(ValueError, match="another hash than that of layers.*second.*multipliers"):
        merge_patch(tmp_path / "merged", other, tmp_path / "again")


@pytest.mark.parametrize("table_dtype, mode", [("float32", "replace"), slow("bfloat16", "add")])
def test_a_patch_is_merged_at_the_scale_that_the_overlay_has(tmp_path, table_dtype, mode):
    model = tiny_model(tiny_config(engram_table_dtype=table_dtype))
    patch, plain = whole_patch(model, mode=mode), logits(model)
    whole = logits(load(merge_patch(model, patch, tmp_path / "whole")))
    add_patch(model, patch, scale=0.5)
    merged = logits(load(merge_patch(model, patch, tmp_path / "half", scale=0.5)))
    assert torch.equal(merged, logits(model))
    assert not torch.equal(merged, whole) and not torch.equal(merged, plain)
    with pytest.raises(ValueError, match="must be a finite number, got '1'"):
        merge_patch(model, patch, tmp_path / "x", scale="1")


def test_a_merge_refuses_rows_that_the_type_of_the_table_cannot_hold(tmp_path):
    model = tiny_model(tiny_config(engram_table_dtype="float16"))
    model.save_pretrained(tmp_path / "model")
    patch = make_patch(model, "big", {FIRST: (torch.tensor([3]), torch.full((1, 8), 1e5))})
    for source in (model, tmp_path / "model"):
        with pytest.raises(ValueError, match="would be infinite: lookups are float16"):
            merge_patch(source, patch, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merged = load(merge_patch(model, patch, tmp_path / "merged", scale=1e-4))
    assert torch.isfinite(merged.named_tables()[FIRST].gather_rows(torch.tensor([3]))).all()


def test_tables_that_cannot_be_merged_are_refused_and_rows_are_written_instead(tmp_path):
    publish(gemma3n_text(), tmp_path / "gemma")
    model = load_with_tables(tmp_path / "gemma").eval()
    patch = whole_patch(model)
    for source in (model, tmp_path / "gemma"):
        with pytest.raises(ValueError, match="write.* rows with table.write_rows"):
            merge_patch(source, patch, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    add_patch(model, patch)
    ids = tiny_ids(2, 8)
    expected = logits(model, ids)
    remove_patch(model, "alice")
    for name, each in patch.tables.items():
        table = model.named_tables()[name]
        table.write_rows(each.row_ids, each.rows.to(table.dtype))
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_with_tables(tmp_path / "merged").eval(), ids), expected)
    memory = with_memory(tiny_backbone("llama"))
    save_engram(memory, tmp_path / "memory")
    with pytest.raises(ValueError, match="holds a memory alone"):
        merge_patch(tmp_path / "memory", whole_patch(memory), tmp_path / "merged-memory")


# Models and their patches in one folder.


def test_a_folder_with_a_trained_patch_says_that_loading_leaves_it_out(tmp_path, warnings):
    model = tiny_model()
    train(model, tmp_path / "run")
    model.eval().save_pretrained(tmp_path / "model")
    warnings.clear()
    found = load(tmp_path / "model")
    assert "holds the row patch 'alice'" in warnings.text and "add_patch(model, '" in warnings.text
    add_patch(found, tmp_path / "model")
    assert torch.equal(logits(found), logits(model))
    with pytest.raises(ValueError, match="the run trains the patch 'alice' and never writes"):
        extract_patch(tiny_model(), model, tmp_path / "x.safetensors")
    merged = merge_patch(tmp_path / "model", load_patch(tmp_path / "model"), tmp_path / "merged")
    warnings.clear()
    assert torch.equal(logits(load(merged)), logits(model)) and "row patch" not in warnings.text


def test_a_save_removes_the_patch_of_an_earlier_save_and_no_other(tmp_path):
    model = tiny_model()
    train(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "model")
    assert load_patch(tmp_path / "model").name == "alice"
    patch = model.trained_patch()
    remove_patch(model, "alice")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        load_patch(tmp_path / "model")
    save_patch(patch, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert load_patch(tmp_path / "model").name == "alice", "somebody's own file"


# Training.


def test_a_run_that_would_train_a_patch_of_two_memories_is_refused(tmp_path):
    model = with_memory(tiny_backbone("llama"))
    add_engram(model, tiny_memory(vocab_size=59, start="random"), name="second")
    with pytest.raises(ValueError, match="one memory, and this model has tables of several: layers.*second"):
        train(model, tmp_path / "run")
    assert active_patches(model) == [] and model.trained_patch() is None
    rows = {name: TrainedRows("bob", table) for name, table in model.named_tables().items()}
    with pytest.raises(ValueError, match="A patch belongs to one memory, and layers.*second.* belong to several"):
        model.begin_patch_training("bob", rows)
    assert active_patches(model) == [] and model.trained_patch() is None
    remove_engram(model, "second")
    train(model, tmp_path / "run")
    assert model.trained_patch().num_rows


@pytest.mark.parametrize(
    "name, other, sentence",
    [("alice", None, "Resume with train_as_patch or"), (None, "alice", "holds no rows.*Resume without train_as_patch")],
)
def test_a_run_is_resumed_as_what_it_was(tmp_path, name, other, sentence):
    optimizers = []
    for each in (name, name, other):
        model = tiny_model()
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        factory, options = engram_optimizers(args, train_as_patch=each)
        optimizers.append(factory()(model, **options))
        model.train()(IDS, labels=IDS).loss.backward()
        optimizers[-1].step()
    first, again, last = optimizers
    again.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=sentence):
        last.load_state_dict(first.state_dict())


def test_an_evaluation_without_a_number_is_not_the_best(tmp_path):
    model = tiny_model()
    train(model, tmp_path / "run")
    callback, state = EngramBestPatchCallback(tmp_path / "best.safetensors"), TrainerStateLike()
    callback.on_evaluate(None, state, None, metrics={"eval_loss": float("nan")}, model=model)
    assert callback.best is None and not callback.target.exists()
    callback.on_evaluate(None, state, None, metrics={"eval_loss": 2.0}, model=model)
    assert load_patch(callback.target).provenance["eval_loss"] == 2.0


class TrainerStateLike:
    global_step, is_world_process_zero = 2, True


# Generating.


@pytest.mark.parametrize("assistant", ["llama", "engram"])
def test_assisted_decoding_takes_patches_of_the_model(assistant):
    model, ids = tiny_model(), tiny_ids(1, 8)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    add_patch(model, whole_patch(model))
    set_patches(model, [])
    small = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    helper = LlamaForCausalLM(small).eval() if assistant == "llama" else tiny_model(seed=3)
    options = {"max_new_tokens": 6, "do_sample": False, "engram_patches": ["alice"]}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=helper, **options), expected)
    assert not torch.equal(expected, plain) and active_patches(model) == []


# Types and files.


def test_a_patch_with_one_tensor_for_two_tables_is_saved(tmp_path):
    model, row_ids, rows = tiny_model(), torch.arange(3), torch.randn(6, 8)
    patch = make_patch(model, "x", {FIRST: (row_ids, rows[:3]), SECOND: (row_ids, rows[3:])})
    found = load_patch(save_patch(patch, tmp_path / "x.safetensors"))
    for name, each in patch.tables.items():
        assert torch.equal(found.tables[name].row_ids, row_ids) and torch.equal(found.tables[name].rows, each.rows)


@pytest.mark.parametrize(
    "provenance, sentence",
    [
        ({"date": datetime.date(2026, 1, 1)}, "it has a date"),
        ({1: "a", "b": 2}, "one of its names is 1"),
        ({"losses": [0.5, {"last": float("nan")}]}, "it has nan"),
    ],
)
def test_what_json_cannot_hold_is_refused_in_a_sentence(provenance, sentence):
    with pytest.raises(ValueError, match=f"its provenance must be .*{sentence}"):
        make_patch(tiny_model(), "x", {FIRST: (torch.arange(3), torch.ones(3, 8))}, provenance=provenance)


def test_parts_of_a_wrong_type_are_refused_in_a_sentence(tmp_path):
    model, ones = tiny_model(), torch.ones(1, 8)
    for tables, sentence in (
        (None, "its tables must be a dict of names to PatchedRows, got NoneType"),
        ({FIRST: 3}, "must be PatchedRows, got int"),
        ({FIRST: PatchedRows([1], ones, 9)}, "must be tensors, got list and Tensor"),
    ):
        with pytest.raises(ValueError, match=sentence):
            add_patch(model, RowPatch("x", tables))
        with pytest.raises(ValueError, match=sentence):
            save_patch(RowPatch("x", tables), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="must be tensors, got list and Tensor"):
        make_patch(model, "x", {FIRST: ([1, 2], torch.ones(2, 8))})
    for scale in ("1", None, float("inf")):
        with pytest.raises(ValueError, match="must be a finite number"):
            add_patch(model, whole_patch(model), scale=scale)
    assert active_patches(model) == []


def test_a_file_of_a_later_version_is_not_called_damaged(tmp_path):
    file = save_patch(whole_patch(tiny_model()), tmp_path / "x.safetensors")
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["engram_patch"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, {"engram_patch": json.dumps({**facts, "version": 9})})
    with pytest.raises(ValueError, match="is of version 9, and this release reads versions up to 1. Update") as error:
        load_patch(file)
    assert "damaged" not in str(error.value)


def test_a_file_without_an_ending_is_not_written_over(tmp_path):
    (tmp_path / "alice").write_text("mine")
    with pytest.raises(ValueError, match=r"alice is a file, and a patch is written to a folder or to a file \*"):
        save_patch(whole_patch(tiny_model()), tmp_path / "alice")
    assert (tmp_path / "alice").read_text() == "mine"


def test_a_model_that_runs_in_several_processes_takes_patches(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model()
        wrapped, plain = DistributedDataParallel(model), logits(model)
        add_patch(wrapped, whole_patch(model))
        assert active_patches(wrapped) == ["alice"] and not torch.equal(logits(wrapped), plain)
    finally:
        torch.distributed.destroy_process_group()


def test_the_card_of_a_patch_shows_text_and_no_tags(hub):
    provenance = {"data": ["<img src=x onerror=alert(1)>"], "of": {"a|b": 1}}
    rows = {FIRST: (torch.arange(3), torch.ones(3, 8))}
    patch = make_patch(tiny_model(), 'a<b|"é🙂', rows, provenance=provenance)
    push_patch(patch, "user/a", base_model="user/base")
    section = hub.files("user/a")["README.md"].decode()
    assert "<img" not in section and "a|b" not in section.replace('remove_patch(model, "a<b|', "")
    assert 'remove_patch(model, "a<b|\\"é🙂")' in section


def test_names_are_printed_as_they_are(capsys):
    patch = make_patch(tiny_model(), "[red]a [/b]", {FIRST: (torch.arange(3), torch.ones(3, 8))})
    show_patch(patch)
    assert patch.name in capsys.readouterr().out


def test_wrong_arguments_of_patches_are_named(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    for name in (True, "", "a\nb", "x" * 201):
        with pytest.raises(ValueError, match="train_as_patch must be the name of a new patch"):
            engram_optimizers(args, train_as_patch=name)
    with pytest.raises(TypeError, match="takes a patch, .* got NoneType"):
        save_patch(tiny_model().trained_patch(), tmp_path / "p.safetensors")
    with pytest.raises(TypeError, match="the text is a list"):
        forget(tiny_model(), ["a tokenizer"], "a text")
    model = tiny_model()
    patch = whole_patch(model)
    for call in (
        lambda: add_patch(model, (patch, "report")),
        lambda: merge_patch(model, (patch,), tmp_path / "merged"),
    ):
        with pytest.raises(TypeError, match="A patch is a RowPatch.* got tuple.*patch, report = memorize"):
            call()
    add_patch(model, patch)
    for call in (lambda: remove_patch(model, ["alice"]), lambda: set_patches(model, [["alice"]])):
        with pytest.raises(ValueError, match=r"has no patch \['alice'\]; it has 'alice'"):
            call()
    assert active_patches(model) == ["alice"]


def test_verifying_a_model_reads_the_patch_beside_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = save_patch(whole_patch(model), tmp_path)
    verify_tables(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="patch.safetensors"):
        verify_tables(tmp_path)


def test_tables_of_other_models_are_not_cut_over_ranks(tmp_path):
    publish(gemma3n_text(), tmp_path)
    with pytest.raises(NotImplementedError, match="engram_ranks cuts the tables of an EngramMoE"):
        load_with_tables(tmp_path, engram_ranks="shard")

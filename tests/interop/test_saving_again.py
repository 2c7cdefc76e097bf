"""A folder that is saved into again keeps every file that is not the model's, and a run resumes from it."""

import json
import shutil

import pytest
import torch
from tiers import load, logits_of, sparse_model
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from engram_hf import EngramMoEForCausalLM, engram_optimizers, last_complete_checkpoint


class SaveAgain(TrainerCallback):
    """What users do to convert or to sign a checkpoint when Trainer has written it."""

    def on_save(self, args, state, control, model, **kwargs):
        model.save_pretrained(f"{args.output_dir}/checkpoint-{state.global_step}")


def trainer(folder, model, callbacks=(), by_rows: bool = True, **arguments) -> Trainer:
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    examples = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 9)]
    optimizer = {"optimizer_cls_and_kwargs": engram_optimizers(args)} if by_rows else {}
    return Trainer(model, args, train_dataset=examples, callbacks=list(callbacks), **optimizer)


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(model, expected: dict[str, torch.Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["rows", "whole"])
def run(request, tmp_path_factory):
    """(folder of a finished run with two checkpoints, the tensors it ended with, whether rows were trained)."""
    folder = tmp_path_factory.mktemp("run")
    sparse_model().save_pretrained(folder / "base")
    model = load(folder / "base")
    trainer(folder / "run", model, by_rows=request.param).train()
    return folder, tensors(model), request.param


def test_a_callback_that_saves_again_leaves_a_run_that_resumes(run, tmp_path):
    folder, expected, by_rows = run
    trainer(tmp_path, load(folder / "base"), [SaveAgain()], by_rows).train()
    for step in (2, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    resumed = load(folder / "base")
    trainer(tmp_path, resumed, by_rows=by_rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(resumed, expected)


def test_a_checkpoint_that_is_loaded_and_saved_back_resumes(run, tmp_path):
    folder, expected, by_rows = run
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "run" / "checkpoint-2", checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix != ".safetensors"}
    model = EngramMoEForCausalLM.from_pretrained(checkpoint).eval()
    saved = tensors(model)
    model.save_pretrained(checkpoint)
    # What Trainer wrote is as it was; the model's own files may be others with the same rows.
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        assert (checkpoint / name).read_bytes() == before[name], name
    assert last_complete_checkpoint(tmp_path) == str(checkpoint)
    assert_same_tensors(EngramMoEForCausalLM.from_pretrained(checkpoint), saved)
    resumed = load(folder / "base")
    trainer(tmp_path, resumed, by_rows=by_rows).train(resume_from_checkpoint=str(checkpoint))
    assert_same_tensors(resumed, expected)


def test_files_of_others_stay_in_a_folder_that_is_saved_into(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    others = {
        "trainer_state.json": "{}",
        "optimizer.pt": "state",
        "optimizer_0/__0_0.distcp": "shard",
        "notes.txt": "mine",
        "README.md": "card",
        "tokenizer.json": "{}",
        "adapter_model.safetensors": "adapter",
        "rows.safetensors": "not of a table",
        "model-of-somebody.safetensors": "not of this model",
    }
    for name, text in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    second = tiny_model(seed=1)
    second.save_pretrained(tmp_path, max_shard_size="20KB")
    second.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in others} == others
    assert torch.equal(logits_of(load(tmp_path)), logits_of(second))


def test_the_folder_of_a_model_with_fewer_tables_holds_none_of_the_old(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    small = tiny_model(tiny_config(engram_layer_ids=[2]))
    small.save_pretrained(tmp_path)
    assert {path.name[:15] for path in tmp_path.glob("tables-*")} == {"tables-layer-02"}
    assert torch.equal(logits_of(load(tmp_path)), logits_of(small))

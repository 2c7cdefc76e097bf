"""The best model of a run, put back by Trainer, is the best one for everybody who copies or reads it."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiers import load, logits_of, sparse_model
from tiny import tiny_ids
from transformers import Trainer, TrainingArguments

from engram_hf import EngramMoEForCausalLM, engram_optimizers


def train(folder: Path) -> Trainer:
    """A run whose checkpoints hold changed rows beside the tables that it began with."""
    sparse_model().save_pretrained(folder / "base")
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        # The loss falls, so that the first checkpoint is the best, and the last rows are not those to be found.
        metric_for_best_model="loss",
        greater_is_better=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    examples = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 9)]
    trainer = Trainer(
        load(folder / "base"),
        args,
        train_dataset=examples,
        eval_dataset=examples[:4],
        optimizer_cls_and_kwargs=engram_optimizers(args),
    )
    trainer.train()
    return trainer


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# Each takes a model that was loaded a moment ago, and nobody has asked for its rows yet.
READERS = {
    "deepcopy": lambda model: blocks(copy.deepcopy(model)),
    "pickle": lambda model: blocks(pickle.loads(pickle.dumps(model))),
    "torch.save": lambda model: blocks(through_torch(model)),
    "parameters": lambda model: blocks(model),
    "state dict": lambda model: [t.clone() for name, t in model.state_dict().items() if ".blocks." in name],
    "forward": lambda model: [logits_of(model)],
}


def blocks(model) -> list[torch.Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if ".table.blocks." in name]


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """A run's trainer, blocks as its best model has them now, and that checkpoint loaded afresh."""
    trainer = train(tmp_path_factory.mktemp("run"))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    # Before anything else is asked of the model.
    copied = blocks(copy.deepcopy(trainer.model))
    return trainer, copied, EngramMoEForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).eval()


def expected_of(fresh, reader: str) -> list[torch.Tensor]:
    return [logits_of(fresh)] if reader == "forward" else blocks(fresh)


def test_a_copy_after_training_has_the_best_rows(best):
    trainer, copied, fresh = best
    torch.testing.assert_close(copied, blocks(fresh), rtol=0, atol=0)
    torch.testing.assert_close(blocks(trainer.model), blocks(fresh), rtol=0, atol=0)
    last = EngramMoEForCausalLM.from_pretrained(Path(trainer.args.output_dir) / "checkpoint-4")
    assert not all(torch.equal(*pair) for pair in zip(blocks(last), blocks(fresh), strict=True))


@pytest.mark.parametrize("order", ["sorted", "reversed"])
@pytest.mark.parametrize("reader", READERS)
def test_shards_in_any_order_leave_nothing_pending(best, reader, order):
    """As `load_sharded_checkpoint` of transformers, which goes through a set."""
    trainer, _, fresh = best
    model = sparse_model()
    shards = sorted(Path(trainer.state.best_model_checkpoint).glob("*.safetensors"), reverse=order == "reversed")
    assert len(shards) > 3
    for shard in shards:
        model.load_state_dict(load_file(shard), strict=False)
    torch.testing.assert_close(READERS[reader](model), expected_of(fresh, reader), rtol=0, atol=0)


def test_shards_loaded_twice_or_over_another_model_end_the_same(best):
    trainer, _, fresh = best
    model = sparse_model(seed=5)
    last = sorted((Path(trainer.args.output_dir) / "checkpoint-4").glob("*.safetensors"))
    first = sorted(Path(trainer.state.best_model_checkpoint).glob("*.safetensors"))
    for shard in [*last, *reversed(first), *first]:
        model.load_state_dict(load_file(shard), strict=False)
    torch.testing.assert_close(blocks(model), blocks(fresh), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])
def test_the_order_of_a_set_changes_no_row(tmp_path, seed):
    code = (
        "import sys, copy, torch; from pathlib import Path; import test_best_model as t\n"
        "trainer = t.train(Path(sys.argv[1])); copied = t.blocks(copy.deepcopy(trainer.model))\n"
        "fresh = t.EngramMoEForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)\n"
        "torch.testing.assert_close(copied, t.blocks(fresh), rtol=0, atol=0)\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]

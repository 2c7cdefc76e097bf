"""Copies, averages and references of a model, made before and after `engram_optimizers`, follow it parameter by
parameter."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny import assert_same_logits, tiny_ids, tiny_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import BEMACallback
from trl.trainer.callbacks import SyncRefModelCallback

from engram_hf import engram_optimizers


TABLES = ("model.layers.0.engram.table", "model.layers.2.engram.table")
DATA = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 9)]
IDS = tiny_ids(2, 9, seed=7)


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )


def made(model, folder):
    factory, options = engram_optimizers(arguments(folder), work_folder=folder / "work")
    return factory()(model, **options)


def steps(model, optimizer, count=2):
    model.train()
    for step in range(count):
        ids = tiny_ids(2, 9, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def loaded(folder, tier):
    tiny_model().save_pretrained(folder / "model")
    places = None if tier == "resident" else {"": "cpu", **dict.fromkeys(TABLES, tier)}
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places)


def test_a_model_has_the_same_parameters_before_and_after_an_optimizer_was_made(tmp_path):
    model = tiny_model()
    before = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    made(model, tmp_path)
    assert [(name, parameter.shape) for name, parameter in model.named_parameters()] == before
    for table in TABLES:
        own = [name for name, _ in before if name.startswith(f"{table}.")]
        # What stands for the rows where gradients are clipped comes after all blocks.
        assert own == sorted(own) and own[-1] == f"{table}.row_gradients.norm"
    assert not any("row_gradients" in name for name in model.state_dict())


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("is_late", [True, False])
def test_an_average_follows_every_parameter(tmp_path, use_buffers, is_late):
    model = tiny_model()
    average = None if is_late else AveragedModel(model, use_buffers=use_buffers)
    optimizer = made(model, tmp_path)
    if average is None:
        average = AveragedModel(model, use_buffers=use_buffers)
    average.update_parameters(model)
    assert_same_logits(average.module(IDS).logits, model(IDS).logits)
    seen = [weights(model)]
    for _ in range(3):
        steps(model, optimizer, 1)
        average.update_parameters(model)
        seen.append(weights(model))
    averaged = dict(average.module.named_parameters())
    for name in seen[0]:
        expected = torch.stack([each[name] for each in seen]).mean(0)
        torch.testing.assert_close(averaged[name].detach(), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(
        averaged["model.layers.0.engram.table.blocks.0"], seen[0]["model.layers.0.engram.table.blocks.0"]
    )


def test_a_moving_average_of_a_model_with_itself_is_the_model(tmp_path):
    model = tiny_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    steps(model, made(model, tmp_path))
    average.module.load_state_dict(model.state_dict())
    for _ in range(3):
        average.update_parameters(model)
    assert_same_logits(average.module(IDS).logits, model(IDS).logits)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("tier", ["resident", "cpu", "disk"])
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_of_a_model_in_training_is_a_model_of_its_own(tmp_path, tier, way):
    model = loaded(tmp_path, tier)
    optimizer = made(model, tmp_path)
    steps(model, optimizer)
    copied = way(model)
    expected = model(IDS).logits
    # Memory of another alignment makes kernels round in another order; rows and weights are equal bits.
    assert_same_logits(copied(IDS).logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), model.state_dict().values()))
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in model.named_parameters()]
    # Neither follows the other, and the copy can be trained itself.
    steps(model, optimizer)
    assert_same_logits(copied(IDS).logits, expected)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-4)
    after = model(IDS).logits
    steps(copied, made(copied, tmp_path))
    assert torch.equal(model(IDS).logits, after)
    assert not torch.allclose(copied(IDS).logits, expected, atol=1e-4)


def trained(folder, callbacks, **changes):
    model = tiny_model()
    args = arguments(folder, **changes)
    optimizers = engram_optimizers(args)
    trainer = Trainer(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=optimizers, callbacks=callbacks(model))
    trainer.train()
    return model


class Follow(TrainerCallback):
    """The weights of every step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))


def test_trls_bema_averages_every_parameter(tmp_path):
    bema, follow = BEMACallback(update_freq=1), Follow()
    trained(tmp_path / "run", lambda model: [bema, follow])
    start, *seen = follow.seen
    running = dict(bema.running_model.named_parameters())
    for name, first in start.items():
        mean = first.clone()
        for step, now in enumerate(seen, 1):
            beta, alpha = bema._ema_beta(step), bema._bema_alpha(step)
            mean = (1 - beta) * mean + beta * now[name]
        expected = mean + alpha * (seen[-1][name] - first)
        torch.testing.assert_close(running[name].detach(), expected, rtol=1e-5, atol=1e-6, msg=name)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "bema")
    assert_same_logits(saved(IDS).logits, bema.running_model.eval()(IDS).logits)


def test_a_reference_that_follows_a_policy_follows_every_parameter(tmp_path):
    """What DPO does with `sync_ref_model=True`: the reference is a copy from before the optimizer was made."""
    reference = tiny_model()
    expected, follow = weights(reference), Follow()
    sync = SyncRefModelCallback(reference, None)

    class Settings(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            settings = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=0.3)
            sync.on_step_end(settings, state, control, model=model)

    trained(tmp_path, lambda model: [follow, Settings()])
    for now in follow.seen[1:]:
        expected = {name: 0.7 * weight + 0.3 * now[name] for name, weight in expected.items()}
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-6, msg=name)

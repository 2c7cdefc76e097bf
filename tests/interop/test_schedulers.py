"""Every schedule that transformers has gives the backbone the rates of a stock AdamW, and tables a multiple of them."""

import pytest
import torch
from tiny import tiny_ids, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from engram_hf import engram_optimizers


# Floors are absolute, so that they differ for a group whose own rate is a multiple.
KWARGS = {
    "polynomial": {"lr_end": 1e-3, "power": 1.5},
    "cosine_with_min_lr": {"min_lr": 2e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 2e-3},
    "cosine_with_restarts": {"num_cycles": 2},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "min_lr": 2e-3, "mode": "min"},
    "greedy": {"patience": 0, "min_lr": 2e-3, "max_lr": 1.2e-2, "factor": 0.7, "warmup": 0, "cooldown": 0},
}
SCALE = 5.0


class Rates(TrainerCallback):
    """The rates of each step, of the first group and of the groups of tables."""

    def __init__(self):
        self.dense, self.tables = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        groups = optimizer.param_groups
        self.dense.append(float(groups[0]["lr"]))
        self.tables.append([float(group["lr"]) * group.get("lr_scale", 1) for group in groups if "table" in group])


def rates(folder, kind, with_engram_optimizers):
    args = TrainingArguments(
        str(folder),
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=KWARGS.get(kind),
        warmup_steps=2,
        per_device_train_batch_size=2,
        # Two of the schedules follow a metric, here a given one.
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="given",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    given = iter([1.0, 1.0, 2.0, 2.0, 1.0, 0.5, 3.0, 3.0])
    data = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 5)]
    callback = Rates()
    Trainer(
        tiny_model(),
        args,
        train_dataset=data,
        eval_dataset=data[:2],
        compute_metrics=lambda _: {"given": next(given)},
        callbacks=[callback],
        optimizer_cls_and_kwargs=engram_optimizers(args, table_lr_scale=SCALE) if with_engram_optimizers else None,
    ).train()
    return callback


@pytest.mark.parametrize("kind", [each.value for each in SchedulerType])
def test_every_schedule_gives_the_rates_of_a_stock_optimizer(tmp_path, kind):
    stock, ours = rates(tmp_path, kind, False), rates(tmp_path, kind, True)
    assert len(stock.dense) == 8
    assert ours.dense == stock.dense
    assert all(tables == pytest.approx([SCALE * rate] * 2) for tables, rate in zip(ours.tables, stock.dense))


def test_rows_move_at_the_scaled_rate():
    """One step of plain SGD: the rows move by the rate times their gradient, and the backbone by a fifth of that."""
    model, reference = tiny_model().train(), tiny_model().train()
    args = TrainingArguments("unused", learning_rate=1e-2, optim="sgd", report_to=[], use_cpu=True, weight_decay=0.0)
    factory, options = engram_optimizers(args, "sgd", table_lr_scale=SCALE)
    optimizer = factory()(model, **options)
    ids = tiny_ids(2, 9)
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    for each in (model, reference):
        each(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    optimizer.step()
    moved = dict(model.named_parameters())
    for name, weight in before.items():
        if gradients[name] is not None:
            rate = 1e-2 * (SCALE if ".table.blocks" in name else 1)
            torch.testing.assert_close(moved[name].detach(), weight - rate * gradients[name], msg=name)

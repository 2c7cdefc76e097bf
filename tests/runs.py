"""Short training runs that tests compare with each other."""

import torch
from tiny import tiny_ids
from transformers import Trainer, TrainingArguments

from engram_hf import engram_optimizers


def train_rows(model, out, resume=None, rule="adam", callbacks=(), patch=None, **changes) -> Trainer:
    """Train a small model with `engram_optimizers`, on the same 64 rows of text in every run.

    Args:
        model: of `tiny.py`.
        out: folder of the run; tables on disk are trained in the folder `work` beside it.
        resume: folder of a checkpoint.
        rule, patch: row optimizer, and the name of the patch that is trained in place of the tables.
        changes: of `TrainingArguments`.
    """
    fields = {
        "max_steps": 8,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        **changes,
    }
    args = TrainingArguments(str(out), **fields)
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(64, 5)],
        eval_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(8, 5, seed=1)],
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=engram_optimizers(args, rule, work_folder=out.parent / "work", train_as_patch=patch),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def same(one, other) -> bool:
    """Whether two models, or two state dicts, hold the same bits."""
    one, other = (each if isinstance(each, dict) else each.state_dict() for each in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

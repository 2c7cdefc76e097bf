"""How every recipe of these scripts trains: a run without checkpoints or trackers, by the stock Trainer, tables row by
row.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from engram_hf import engram_optimizers
from helpers.console import show_one_line


# Tables get a higher rate than the rest, as in the paper.
TABLE_LEARNING_RATE_FACTOR = 5


def make_arguments(
    output: Path, steps: int, seed: int, batch_size: int, learning_rate: float, **fields: Any
) -> TrainingArguments:
    """Of a run that shows eight lines. With the same seed, every model is given the same text."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(steps // 20, 1),
        logging_steps=max(steps // 8, 1),
        save_strategy="no",
        report_to="none",
        # Without an accelerator, pinned memory only brings a warning.
        dataloader_pin_memory=torch.accelerator.is_available(),
        # helpers/console.py shows the progress.
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        **fields,
    )


def row_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    train: Dataset | list,
    work_folder: Path | None = None,
    **fields: Any,
) -> Trainer:
    """The stock Trainer, with the tables of a model trained row by row, where it has any."""
    optimizers = engram_optimizers(arguments, table_lr_scale=TABLE_LEARNING_RATE_FACTOR, work_folder=work_folder)
    trainer = Trainer(model, arguments, train_dataset=train, optimizer_cls_and_kwargs=optimizers, **fields)
    show_one_line(trainer)
    return trainer

"""One run of an experiment: train an arm with a seed on one thread, measure it, write a small JSON file.

A run saves checkpoints. Killed at any point, it goes on from the newest one that is whole, to the same loss, bit by
bit.
"""

import contextlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from engram_hf import LossFreeBalancingCallback, count_parameters
from engram_hf.insight.text_rows import TextRow, losses_of_rows
from helpers.experiment_files import RESULTS, WORK, AnyRun, best_rate, finish, read_results
from helpers.experiments import CONTROLS, ENGRAM, SCALES, TUNING_SEED, Arm, Experiment, maker
from helpers.experiments_text import ExperimentText, prepare
from helpers.memory_limit import MemoryWatch, own_limits
from helpers.recipe import row_trainer
from helpers.tiny_recipe import ROWS_PER_STEP, SEQ_LENGTH, freeze_tables, make_model


# Of the learning rate, for the first arm of each family. Tables have five times the rate.
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
# Points of a loss curve. A checkpoint is saved at every second one.
CURVE_POINTS = 30


@dataclass(frozen=True)
class Run(AnyRun):
    """An arm of an experiment, trained with a seed."""

    arm: Arm
    seed: int
    scale: str = "tiny"
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.is_tuning:
            return f"{self.scale}-tuning-{self.arm.family}-{self.rate:g}"
        return f"{self.scale}-{self.arm.name}-seed{self.seed}"

    @property
    def memory_limit_bytes(self) -> int | None:
        return SCALES[self.scale].disk_limit_bytes if self.arm.is_on_disk else None

    def prepare(self, knowledge: Path) -> ExperimentText:
        return text_of(self.scale, knowledge)

    def train(self, knowledge: Path) -> dict[str, Any] | None:
        return train(self, text_of(self.scale, knowledge))


def text_of(scale: str, knowledge: Path) -> ExperimentText:
    """The tokens of all runs of a scale."""
    no_tokens = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vocab_size = maker(SCALES[scale], no_tokens)().vocab_size
    return prepare(SCALES[scale].tokens, vocab_size, knowledge)


def tuning_runs(family: str, scale: str) -> list[Run]:
    """Runs of the arm that a family is named after, one per rate."""
    first = next(arm for arm in CONTROLS if arm.name == family)
    return [Run(first, TUNING_SEED, scale, rate) for rate in RATES]


def reported_runs(experiment: Experiment, scale: str, results: dict[str, dict]) -> list[Run]:
    """The runs of an experiment in turn. Which arms are repeated is known when all others are finished."""
    runs = [Run(arm, seed, scale) for arm, seed in experiment.runs]
    reference = Run(ENGRAM, 0, scale)
    if experiment.repeats and all(run.name in results for run in (reference, *runs)):
        gap = lambda run: abs(results[run.name]["loss"] - results[reference.name]["loss"])  # noqa: E731
        largest = sorted(runs, key=gap, reverse=True)[: experiment.repeats]
        runs += [replace(run, seed=1) for run in largest]
    return runs


def names_of_tuning(family: str, scale: str) -> dict[float, str]:
    return {rate: run.name for rate, run in zip(RATES, tuning_runs(family, scale))}


def steps_of(run: Run, text: ExperimentText) -> int:
    tokens = min(SCALES[run.scale].tokens, text.most_tokens or SCALES[run.scale].tokens)
    return math.ceil(tokens / (ROWS_PER_STEP * SEQ_LENGTH))


class CpuSeconds(TrainerCallback):
    """Writes the CPU time of the run into its log, over all processes that worked on it."""

    def on_train_begin(self, args, state, control, **kwargs):
        known = [line["cpu_seconds"] for line in state.log_history if "cpu_seconds" in line]
        self.before, self.start = known[-1] if known else 0.0, time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The history keeps a copy that was made before.
        state.log_history[-1]["cpu_seconds"] = self.total()

    def total(self) -> float:
        return self.before + time.process_time() - self.start


class ShuffledRows(TrainerCallback):
    """At each step every head reads other rows: the row ids are turned by a number that the seed and the step give."""

    def __init__(self, model, seed: int):
        self.model, self.seed = model, seed
        for layer_id, layer in zip(model.config.engram_layer_ids, model.base_model.memory_layers()):
            primes = [rows for order in model.base_model.ngram_hash.primes(layer_id) for rows in order]
            layer.engram.table.register_buffer("rows_of_turned_head", torch.tensor(primes), persistent=False)
            layer.engram.table.register_forward_pre_hook(self.turn)
        self.step = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def turn(self, table, args: tuple) -> tuple:
        rows = table.rows_of_turned_head
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        turns = torch.randint(2**31, rows.shape, generator=generator).to(rows.device)  # (heads,)
        return ((args[0] + turns) % rows, *args[1:])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. A run that was killed while it saved leaves one without its last file."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(found):
        try:
            # Trainer writes this file last.
            json.loads((checkpoint / "trainer_state.json").read_text())
            return checkpoint
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None


def build(run: Run, text: ExperimentText, folder: Path):
    """The model of a run before its first step. One whose tables are on disk reads them from `<folder>/start`."""
    scale = SCALES[run.scale]
    model = make_model(run.arm.config(maker(scale, text.tokenizer)), text.tokenizer, run.seed)
    if run.arm.tables in ("zero", "random"):
        freeze_tables(model, at_zero=run.arm.tables == "zero")
    if run.arm.is_without_gate:
        for layer in model.base_model.memory_layers():
            # A key of zeros scores 0, and the gate of 0 is one half.
            torch.nn.init.zeros_(layer.engram.key_norm.weight).requires_grad_(False)
    return on_disk(model, folder / "start") if run.arm.is_on_disk else model


def on_disk(model, folder: Path):
    """The same model with its tables in files. A run that goes on needs the very files that it began with."""
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    tables = dict.fromkeys(model.named_tables(), "disk")
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu", **tables})


def held_out_losses(model, rows: list[TextRow]) -> dict[str, Any]:
    """Loss per token over all documents, and for each document its loss summed over its tokens."""
    nats, tokens = losses_of_rows(model, rows)
    return {
        "loss": float(nats.sum() / tokens.sum()),
        "nats": [round(value, 3) for value in nats.tolist()],
        "tokens": tokens.tolist(),
    }


def train(run: Run, text: ExperimentText, work: Path = WORK, results: Path = RESULTS) -> dict | None:
    """Train a run to its end and write its JSON file, or return None where another process works on it.

    The trained model stays in `<work>/models/<name>`, for experiments that measure models of others.
    """
    rate = run.rate or best_rate(names_of_tuning(run.arm.family, run.scale), read_results(results))
    # A checkpoint of other text, or of another rate, is another run's.
    folder = work / "runs" / f"{run.name}-{text.digest}-{rate:g}"
    content = finish(results / f"{run.name}.json", folder, lambda: trained(run, text, rate, folder, work))
    if content is not None:
        for leftover in (*folder.glob("checkpoint-*"), folder / "start", folder / "work"):
            shutil.rmtree(leftover, ignore_errors=True)
    return content


def trained(run: Run, text: ExperimentText, rate: float, folder: Path, work: Path) -> dict[str, Any]:
    """Train to the end from the newest checkpoint, and measure."""
    steps = steps_of(run, text)
    model = build(run, text, folder)
    work_folder = folder / "work" if run.arm.is_on_disk else None
    trainer, cpu = make_trainer(model, text.train, folder, steps, rate, run.seed, work_folder=work_folder)
    if run.arm.tables == "shuffled":
        trainer.add_callback(ShuffledRows(model, run.seed))
    with MemoryWatch() if run.arm.is_on_disk else contextlib.nullcontext() as memory:
        curve = go_on(trainer, folder)
    measured = held_out_losses(model, text.tuning if run.is_tuning else text.held_out)
    count = count_parameters(model.config)
    content = {
        "arm": run.arm.name,
        "family": run.arm.family,
        "scale": run.scale,
        "seed": run.seed,
        "learning_rate": rate,
        "steps": steps,
        "tokens": steps * ROWS_PER_STEP * SEQ_LENGTH,
        "text": text.digest,
        "parameters": {"total": count.total, "active": count.active, "tables": count.tables},
        "loss": measured["loss"],
        "curve": curve,
        "cpu_hours": round(cpu.total() / 3600, 4),
        "config": model.config.to_diff_dict(),
    }
    if memory is not None:
        limits = [limit for limit, _ in own_limits()]
        content["memory"] = {"limit_bytes": min(limits, default=None), "own_bytes": memory.most_bytes}
    if not run.is_tuning:
        content["documents"] = {"nats": measured["nats"], "tokens": measured["tokens"]}
        kept = work / "models" / run.name
        model.save_pretrained(kept)
        text.tokenizer.save_pretrained(kept)
    return content


def make_trainer(
    model,
    rows: Dataset,
    folder: Path,
    steps: int,
    rate: float,
    seed: int,
    rows_per_step: int = ROWS_PER_STEP,
    work_folder: Path | None = None,
):
    """The stock Trainer that saves checkpoints, and the callback that counts CPU time."""
    points = max(steps // CURVE_POINTS, 1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=rows_per_step,
        learning_rate=rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=max(steps // 20, 1),
        logging_steps=points,
        save_steps=2 * points,
        save_total_limit=2,
        # The order of the text and nothing else: it is that of the seed in every arm.
        seed=seed,
        data_seed=seed,
        bf16=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    cpu = CpuSeconds()
    callbacks: list[TrainerCallback] = [cpu]
    if model.config.first_k_dense_replace < model.config.num_hidden_layers:
        callbacks.append(LossFreeBalancingCallback())
    return row_trainer(model, arguments, rows, work_folder, callbacks=callbacks), cpu


def go_on(trainer, folder: Path) -> list[list[float]]:
    """Train to the end from the newest checkpoint in a folder, or from the beginning. Returns the loss curve."""
    trainer.train(resume_from_checkpoint=found) if (found := newest_checkpoint(folder)) else trainer.train()
    return loss_curve(trainer)


def loss_curve(trainer) -> list[list[float]]:
    """Steps, and the mean loss since the one before."""
    return [[line["step"], round(line["loss"], 4)] for line in trainer.state.log_history if "loss" in line]

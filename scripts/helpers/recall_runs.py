"""Runs of the experiment on long context: a small model learns to recall in rows of 256 tokens, and YaRN makes its
context four times as long.

The model answers at both lengths as it was trained, with YaRN alone, and after some more steps with YaRN on long rows.
"""

import random
import shutil
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from engram_hf import EngramMoEForCausalLM, count_parameters
from helpers.experiment_files import RESULTS, WORK, AnyRun, best_rate, finish, read_results
from helpers.experiment_runs import go_on, make_trainer, names_of_tuning
from helpers.experiments import ENGRAM, MOE, SCALES, Arm, Scale, maker
from helpers.recall_task import IGNORED, KINDS, VOCAB_SIZE, make_row


TRAINED, EXTENDED = 256, 1024
LENGTHS = (TRAINED, 2 * TRAINED, EXTENDED)
# As many tokens in a step of either length.
ROWS, LONG_ROWS = 16, 4
STEPS, LONG_STEPS = 1200, 120
SEEDS = (0, 1)
ARMS = (ENGRAM, MOE)
# Rows that are asked about at each length, of both kinds in turn.
ASKED_ROWS = 64
AS_TRAINED, YARN_ALONE, YARN_TRAINED = "as trained", "YaRN", "YaRN, trained on long rows"
# The paper's, but for the factor.
YARN = {
    "rope_type": "yarn",
    "factor": EXTENDED / TRAINED,
    "original_max_position_embeddings": TRAINED,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
HOURS_PER_RUN = 0.42
# Of right answers at the trained length.
LEARNED_SHARE = 0.5
GUESSED_ROWS = 200


@dataclass(frozen=True)
class RecallRun(AnyRun):
    """An arm that learns to recall, at the rate that was tuned for its family on text."""

    arm: Arm
    seed: int
    rate: None = None

    @property
    def name(self) -> str:
        return f"recall-{self.arm.name}-seed{self.seed}"

    def prepare(self, knowledge: Path) -> None:
        """Rows are made while they are read."""

    def train(self, knowledge: Path) -> dict[str, Any] | None:
        return train_recall(self)


def recall_runs(results: dict[str, dict]) -> list[RecallRun]:
    """Seed by seed; no more than the first where it has shown that no task is learned."""
    first = [RecallRun(arm, SEEDS[0]) for arm in ARMS]
    if all(run.name in results for run in first):
        learned = [has_learned(results[run.name], kind) for run in first for kind in KINDS]
        if not any(learned):
            return first
    return [RecallRun(arm, seed) for seed in SEEDS for arm in ARMS]


def has_learned(content: dict[str, Any], kind: str) -> bool:
    """Whether a finished run answers enough in rows of the trained length to say something of longer ones."""
    digits = content["right"][AS_TRAINED][f"{TRAINED}"][kind]
    return digits.count("1") >= LEARNED_SHARE * len(digits)


@cache
def guessed_share(kind: str) -> float:
    """Of right answers by who knows the values that a row has said, and not to which key they belong."""
    draw = random.Random(0)
    rows = [make_row(kind, TRAINED, draw, True) for _ in range(GUESSED_ROWS)]
    return statistics.mean(1 / count for row in rows for count in row.choices)


class RecallRows(Dataset):
    """Rows of both kinds in turn, each made anew from its place. name: other names give other rows."""

    def __init__(self, name: str, count: int, length: int, are_asked_at_end: bool = False):
        self.name, self.count, self.length, self.are_asked_at_end = name, count, length, are_asked_at_end

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = random.Random(f"{self.name} {index}")
        row = make_row(KINDS[index % len(KINDS)], self.length, draw, self.are_asked_at_end)
        return {"input_ids": row.ids, "labels": row.labels}


def config_of(arm: Arm):
    """The shape of the small models, for the words of this language. Their ids are their words: none are merged."""
    fields = {"vocab_size": VOCAB_SIZE, "engram_compressed_vocab_size": None, "max_position_embeddings": TRAINED}
    no_tokens = SimpleNamespace(pad_token_id=0, bos_token_id=3, eos_token_id=4)
    return arm.config(maker(Scale(SCALES["tiny"].preset, 0, {**SCALES["tiny"].fields, **fields}), no_tokens))


def extended(model: EngramMoEForCausalLM) -> EngramMoEForCausalLM:
    """The same weights under YaRN."""
    fields = model.config.to_dict()
    rope = {**YARN, "rope_theta": model.config.rope_parameters["rope_theta"]}
    config = type(model.config)(**{**fields, "max_position_embeddings": EXTENDED, "rope_parameters": rope})
    longer = EngramMoEForCausalLM(config)
    longer.load_state_dict(model.state_dict())
    return longer


@torch.no_grad()
def answers(model: nn.Module, length: int) -> dict[str, str]:
    """For each kind of row a digit per question: 1 where the likeliest token is the answer, otherwise 0."""
    model.eval()
    asked = RecallRows("asked", ASKED_ROWS, length, are_asked_at_end=True)
    found = dict.fromkeys(KINDS, "")
    for index in range(ASKED_ROWS):
        row = asked[index]
        predicted = model(row["input_ids"][None].to(model.device)).logits[0].argmax(-1).cpu()
        is_answer = row["labels"] != IGNORED
        right = predicted[:-1][is_answer[1:]] == row["labels"][is_answer]
        found[KINDS[index % len(KINDS)]] += "".join(str(int(value)) for value in right)
    return found


def train_recall(run: RecallRun, work: Path = WORK, results: Path = RESULTS) -> dict[str, Any] | None:
    """Train a run to its end and write its JSON file, or return None where another process works on it."""
    rate = best_rate(names_of_tuning(run.arm.family, "tiny"), read_results(results))
    folder = work / "runs" / f"{run.name}-{rate:g}"
    content = finish(results / f"{run.name}.json", folder, lambda: trained(run, rate, folder))
    if content is not None:
        for leftover in (folder / "short", folder / "long"):
            shutil.rmtree(leftover, ignore_errors=True)
    return content


def trained(run: RecallRun, rate: float, folder: Path) -> dict[str, Any]:
    """Train at both lengths, each from its newest checkpoint, and ask after each."""
    set_seed(run.seed)
    # A save adds to the config of a model.
    config = config_of(run.arm).to_diff_dict()
    model = EngramMoEForCausalLM(config_of(run.arm))
    rows = RecallRows(f"seed {run.seed}", STEPS * ROWS, TRAINED)
    trainer, cpu = make_trainer(model, rows, folder / "short", STEPS, rate, run.seed, ROWS)
    curve, count = go_on(trainer, folder / "short"), count_parameters(model.config)
    content = {
        "arm": run.arm.name,
        "seed": run.seed,
        "learning_rate": rate,
        "steps": STEPS,
        "tokens": STEPS * ROWS * TRAINED,
        "parameters": {"total": count.total, "active": count.active, "tables": count.tables},
        "config": config,
        "curve": curve,
    }
    right = {AS_TRAINED: {f"{length}": answers(model, length) for length in LENGTHS}}
    longer = extended(model)
    right[YARN_ALONE] = {f"{length}": answers(longer, length) for length in LENGTHS}
    long_rows = RecallRows(f"long rows of seed {run.seed}", LONG_STEPS * LONG_ROWS, EXTENDED)
    long_trainer, long_cpu = make_trainer(
        longer, long_rows, folder / "long", LONG_STEPS, rate / 10, run.seed, LONG_ROWS
    )
    curve_of_long_rows = go_on(long_trainer, folder / "long")
    right[YARN_TRAINED] = {f"{length}": answers(longer, length) for length in LENGTHS}
    return {
        **content,
        "long_tokens": LONG_STEPS * LONG_ROWS * EXTENDED,
        "long_curve": curve_of_long_rows,
        "right": right,
        "cpu_hours": round((cpu.total() + long_cpu.total()) / 3600, 4),
    }

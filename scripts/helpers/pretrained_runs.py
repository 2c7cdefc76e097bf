"""Runs of the experiment with a pretrained model: a memory with the base frozen, LoRA, and full fine-tuning.

The base is SmolLM2-135M-Instruct. It reads articles of the dictionaries and no code, so that the loss on Python's
library says what is forgotten. A run has 100,000 tokens, and a killed one begins again.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from engram_hf import EngramConfig, add_engram, freeze_backbone
from engram_hf.insight import silenced
from helpers.added_recipe import HEAD_DIM, HEADS, LAYERS, ROWS_OF_HEAD, ROWS_PER_STEP, SEQ_LENGTH, make_trainer
from helpers.experiment_files import RESULTS, WORK, AnyRun, best_rate, finish, read_results
from helpers.experiment_runs import held_out_losses, loss_curve
from helpers.experiments import SEEDS, TUNING_SEED
from helpers.experiments_text import KNOWLEDGE, ExperimentText, prepare_with
from helpers.known_answers import TASKS, read_questions, score
from helpers.smollm import fetch_smollm


BASE, MEMORY, LORA, FULL = "base", "memory", "lora", "full"
TITLES = {
    BASE: "as it is",
    MEMORY: "a memory, base frozen",
    LORA: "LoRA of rank 8 on all projections",
    FULL: "all parameters",
}
RATES = {MEMORY: (4e-3, 8e-3, 1.6e-2), LORA: (1e-3, 2e-3, 4e-3), FULL: (2e-5, 5e-5, 1e-4)}
# CPU hours on one thread, by the first run that was finished.
HOURS_PER_RUN = 0.55
TOKENS = 100_000
STEPS = TOKENS // (ROWS_PER_STEP * SEQ_LENGTH)
# Articles that are asked about are read so often, which is three quarters of the tokens.
TIMES_ASKED = 2
# Of these, measuring takes about a third of a second each.
DOCUMENTS, QUESTIONS_OF_A_TASK, CODE_DOCUMENTS = 300, 300, 40
RANK = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# What a way adds to the base: fields of EngramConfig, and of PEFT's LoraConfig.
ADDED: dict[str, dict[str, Any]] = {
    MEMORY: {"layer_ids": LAYERS, "vocab_size": ROWS_OF_HEAD, "n_heads": HEADS, "head_dim": HEAD_DIM},
    LORA: {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": PROJECTIONS},
}


@dataclass(frozen=True)
class PretrainedRun(AnyRun):
    """way: "base", "memory", "lora" or "full"."""

    way: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.is_tuning:
            return f"smollm-tuning-{self.way}-{self.rate:g}"
        return "smollm-base" if self.way == BASE else f"smollm-{self.way}-seed{self.seed}"

    def prepare(self, knowledge: Path) -> ExperimentText:
        return text_for(fetch_smollm(), knowledge)

    def train(self, knowledge: Path) -> dict[str, Any] | None:
        return train_pretrained(self, knowledge)


def pretrained_runs() -> list[PretrainedRun]:
    """Tuning first, then seed by seed."""
    tuning = [PretrainedRun(way, TUNING_SEED, rate) for way in RATES for rate in RATES[way]]
    return [*tuning, PretrainedRun(BASE, 0), *(PretrainedRun(way, seed) for seed in SEEDS for way in RATES)]


def names_of_tuning(way: str) -> dict[float, str]:
    """Learning rate to the name of the run that tries it."""
    return {rate: PretrainedRun(way, TUNING_SEED, rate).name for rate in RATES[way]}


def change(model: nn.Module, way: str, tokenizer, seed: int) -> nn.Module:
    """Make the base what a way trains."""
    if way == MEMORY:
        return freeze_backbone(add_engram(model, EngramConfig(**ADDED[MEMORY], seed=seed), tokenizer))
    if way == LORA:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(**ADDED[LORA], task_type="CAUSAL_LM"))
    return model


def text_for(source: str | Path, knowledge: Path = KNOWLEDGE) -> ExperimentText:
    """The tokens of this experiment, by the tokenizer of the base."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    return prepare_with(tokenizer, TOKENS, knowledge, f"tokens-{TOKENS}-smollm", TIMES_ASKED, without="python")


def train_pretrained(
    run: PretrainedRun,
    knowledge: Path = KNOWLEDGE,
    work: Path = WORK,
    results: Path = RESULTS,
    source: str | Path | None = None,
) -> dict[str, Any] | None:
    """Train a run and write its JSON file, or return None where another process works on it.

    Args:
        source: folder of the base; SmolLM2-135M-Instruct by default.
    """
    folder = work / "runs" / run.name
    return finish(results / f"{run.name}.json", folder, lambda: trained(run, knowledge, folder, results, source))


def trained(
    run: PretrainedRun, knowledge: Path, folder: Path, results: Path, source: str | Path | None
) -> dict[str, Any]:
    """Train from the beginning to the end, and measure."""
    source = source or fetch_smollm()
    text = text_for(source, knowledge)
    rate, steps, curve = 0.0, 0, []
    if run.way != BASE:
        rate = run.rate or best_rate(names_of_tuning(run.way), read_results(results))
        steps = STEPS
    start = time.process_time()
    set_seed(run.seed)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = change(base, run.way, text.tokenizer, run.seed)
    if steps:
        trainer = make_trainer(model, text.train, folder, steps, learning_rate=rate, seed=run.seed)
        trainer.train()
        curve = loss_curve(trainer)
    return {
        "way": run.way,
        "seed": run.seed,
        "learning_rate": rate,
        "steps": steps,
        "tokens": steps * ROWS_PER_STEP * SEQ_LENGTH,
        "text": text.digest,
        "learning": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "config": {**base.config.to_diff_dict(), "added": ADDED.get(run.way, {})},
        "curve": curve,
        **measured(model, run, text, knowledge),
        "cpu_hours": round((time.process_time() - start) / 3600, 4),
    }


def measured(model: nn.Module, run: PretrainedRun, text: ExperimentText, knowledge: Path) -> dict[str, Any]:
    """Held-out loss; of a reported run also the loss on code, and what is answered, of a memory also silenced."""
    documents = text.tuning[:DOCUMENTS] if run.is_tuning else text.held_out[:DOCUMENTS]
    # Batches of documents that are equally long have less padding.
    own = held_out_losses(model, sorted(documents, key=lambda row: len(row.ids)))
    found: dict[str, Any] = {"loss": own["loss"]}
    if run.is_tuning:
        return found
    found["documents"] = {"nats": own["nats"], "tokens": own["tokens"]}
    other = held_out_losses(model, text.other[:CODE_DOCUMENTS])
    found["other"] = {"loss": other["loss"], "nats": other["nats"], "tokens": other["tokens"]}
    questions = {task: read_questions(knowledge, task) for task in TASKS}
    # Every third, say: all kinds, in the order of the file.
    chosen = {task: own[:: max(1, len(own) // QUESTIONS_OF_A_TASK)] for task, own in questions.items()}
    found["answers"] = {task: {"on": score(model, text.tokenizer, own)} for task, own in chosen.items()}
    if run.way == MEMORY:
        with silenced(model):
            for task, own in chosen.items():
                found["answers"][task]["silenced"] = score(model, text.tokenizer, own)
    return found

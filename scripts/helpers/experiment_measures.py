"""What experiments measure of models that an earlier experiment trained: facts and reading, effective depth.

A measurement writes a small JSON file of its own, as a run does.
"""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_hf.insight import layer_similarity, logit_lens, silenced
from helpers.experiment_files import RESULTS, WORK, finish
from helpers.experiment_runs import Run
from helpers.experiments import ENGRAM, MOE, SEEDS
from helpers.experiments_text import KNOWLEDGE, ExperimentText
from helpers.known_answers import TASKS, read_questions, score


ON, SILENT = "with its memory", "memory silenced"
# Held-out articles whose hidden states are compared.
DEPTH_DOCUMENTS = 100


def load(run: Run, work: Path):
    """A trained model and its tokenizer.

    Raises:
        ValueError: this machine has not trained it.
    """
    folder = work / "models" / run.name
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not there, so {run.name} was trained elsewhere, or not yet. Remove its JSON file, if there "
            "is one, and train it here: python scripts/experiments/run.py controls"
        )
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def measure_facts(run: Run, text: ExperimentText, knowledge: Path, work: Path) -> dict[str, Any]:
    """Right and wrong answers of each kind of question, with the memory on and silenced."""
    model, tokenizer = load(run, work)
    contexts = (
        {ON: nullcontext, SILENT: lambda: silenced(model)} if model.config.engram_layer_ids else {ON: nullcontext}
    )
    answers: dict[str, dict[str, dict[str, str]]] = {}
    for task in TASKS:
        questions = read_questions(knowledge, task)
        for name, context in contexts.items():
            with context():
                answers.setdefault(task, {})[name] = score(model, tokenizer, questions)
    return {"answers": answers}


def measure_depth(run: Run, text: ExperimentText, knowledge: Path, work: Path) -> dict[str, Any]:
    """The logit lens of a model, and for an EngramMoE its similarity to the MoE of the same seed."""
    model, _ = load(run, work)
    rows = [row.ids for row in text.held_out[:DEPTH_DOCUMENTS]]
    found = {"lens": json.loads(logit_lens(model, rows).to_json())}
    if run.arm is ENGRAM:
        other, _ = load(Run(MOE, run.seed, run.scale), work)
        found["similarity"] = json.loads(layer_similarity(model, other, rows).to_json())
    return found


MEASURES = {"facts": measure_facts, "depth": measure_depth}


def measured_runs(scale: str) -> list[Run]:
    """EngramMoE and the MoE that is as large, seed by seed."""
    return [Run(arm, seed, scale) for seed in SEEDS for arm in (ENGRAM, MOE)]


def name_of(measure: str, run: Run) -> str:
    return f"{run.scale}-{measure}-{run.arm.name}-seed{run.seed}"


def measure(
    name: str, run: Run, text: ExperimentText, knowledge: Path = KNOWLEDGE, work: Path = WORK, results: Path = RESULTS
) -> dict | None:
    """Measure one model and write its JSON file, or read what was measured; None where another process measures it.

    Raises:
        ValueError: this machine has not trained the model, or has no questions.
    """

    def make() -> dict[str, Any]:
        start = time.process_time()
        found = MEASURES[name](run, text, knowledge, work)
        of_run = {"arm": run.arm.name, "scale": run.scale, "seed": run.seed, "text": text.digest}
        return {**of_run, **found, "cpu_hours": round((time.process_time() - start) / 3600, 4)}

    own = name_of(name, run)
    return finish(results / f"{own}.json", work / "runs" / own, make)

"""The section on facts and reading: what a model answers with its memory, and silenced."""

from pathlib import Path

import numpy as np

from helpers.evidence_sections import FAILS, FEWEST_SEEDS, HOLDS, NOT_RUN, OPEN, TOO_FEW, Results, Section
from helpers.evidence_statistics import Interval, kept_share, share_interval, share_right
from helpers.experiment_measures import ON, SILENT, measured_runs, name_of
from helpers.experiment_runs import Run
from helpers.experiments import ENGRAM, MOE
from helpers.known_answers import TASKS
from helpers.results import Table, wrap


CHANCE = 0.25


def facts(scale: str, results: Results) -> Section:
    found = {run: results[name_of("facts", run)] for run in measured_runs(scale) if name_of("facts", run) in results}
    files = [content["name"] for content in found.values()]
    if not found:
        return Section(NOT_RUN)
    rows = []
    pooled: dict[tuple[str, str, str], str] = {}
    for run, content in found.items():
        for task, by_name in content["answers"].items():
            for name, by_kind in by_name.items():
                for digits in by_kind.values():
                    key = (run.arm.name, task, name)
                    pooled[key] = pooled.get(key, "") + digits
    for task in TASKS:
        for kind in next(iter(found.values()))["answers"][task][ON]:
            rows.append([task.replace("_", " "), kind, *kind_cells(found, task, kind)])
    columns = {"questions": "", "kind": "", "number": ",", "MoE": "", "EngramMoE": "", "its memory silenced": ""}
    seeds = sum(run.arm is ENGRAM for run in found)
    kept = {
        task: kept_share(pooled[ENGRAM.name, task, ON], pooled[ENGRAM.name, task, SILENT], CHANCE, seeds)
        for task in ("facts_trained", "reading")
        if (ENGRAM.name, task, ON) in pooled
    }
    parts = [Table(columns, rows).markdown()]
    says = [f"Of {task.replace('_', ' ')}, {kept_in_words(interval)}." for task, interval in kept.items()]
    parts.append(wrap("Answers are right by chance in 25% of cases, and brackets are 95% intervals. " + " ".join(says)))
    parts.append(
        wrap(
            "A share that is kept compares a model with itself, broken: silencing a part that was trained with the "
            "rest hurts everything. Only the difference between facts and reading says where facts live. Reading "
            "has no meaning in a model that cannot read yet, which its own column shows."
        )
    )
    verdict, here = OPEN, " ".join(says)
    if len(kept) == 2 and not any(np.isnan(interval.value) for interval in kept.values()):
        if kept["facts_trained"].high < kept["reading"].low:
            verdict = HOLDS
        elif kept["facts_trained"].low > kept["reading"].high:
            verdict = FAILS
    if verdict != OPEN and seeds < FEWEST_SEEDS:
        verdict = TOO_FEW
    return Section(verdict, here, parts, files, lambda path: draw_facts(path, rows))


def kind_cells(found: dict[Run, dict], task: str, kind: str) -> list:
    """Number of questions, and the share of right answers of MoE, EngramMoE, and EngramMoE silenced, over all seeds."""
    cells, number = [], 0
    for arm, name in ((MOE, ON), (ENGRAM, ON), (ENGRAM, SILENT)):
        of_seeds = [content["answers"][task][name][kind] for run, content in found.items() if run.arm is arm]
        if not of_seeds:
            cells.append("")
            continue
        digits, number = "".join(of_seeds), len(of_seeds[0])
        low, high = share_interval(digits, len(of_seeds))
        cells.append(f"{share_right(digits):.1%} ({low:.1%} to {high:.1%})")
    return [number, *cells]


def kept_in_words(interval: Interval) -> str:
    if np.isnan(interval.value):
        return "the model answers no better than chance, so no share can be kept"
    return (
        f"the model keeps {interval.value:.0%} ({interval.low:.0%} to {interval.high:.0%}) of what it answers above "
        "chance when its memory is silenced"
    )


def draw_facts(path: Path, rows: list[list]) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("Facts and reading", 1, 1, (10, 4.4))
    places = np.arange(len(rows))
    for number, (name, column) in enumerate((("MoE", 3), ("EngramMoE", 4), ("memory silenced", 5))):
        values = [float(row[column].split("%")[0]) if row[column] else 0 for row in rows]
        axis.bar(places + (number - 1) * 0.27, values, 0.25, color=COLORS[number], label=name)
    axis.axhline(100 * CHANCE, color="black", linewidth=1, linestyle=":", label="chance")
    axis.set_xticks(places, [f"{row[1]}\n{row[0]}" for row in rows], fontsize=6)
    axis.set(ylabel="right answers, %")
    axis.legend(fontsize=8)
    return save_figure(figure, path)

"""The section on effective depth: when a model knows its answer, and which layers resemble each other."""

import statistics
from pathlib import Path

from helpers.evidence_sections import FAILS, FEWEST_SEEDS, HOLDS, NOT_RUN, OPEN, TOO_FEW, Results, Section, seeds_of
from helpers.experiment_measures import ON, SILENT, measured_runs, name_of
from helpers.experiment_runs import Run
from helpers.experiments import ENGRAM, MOE, SEEDS
from helpers.results import Table, wrap


def depth(scale: str, results: Results) -> Section:
    found = {run: results[name_of("depth", run)] for run in measured_runs(scale) if name_of("depth", run) in results}
    if not found:
        return Section(NOT_RUN)
    rows, settled = [], {}
    for run, content in found.items():
        for name, curve in content["lens"]["curves"].items():
            rows.append([run.arm.title, run.seed, name, curve["settled_after"], curve["kl"][1], curve["kl"][2]])
            settled[run.arm.name, run.seed, name] = curve["settled_after"]
    columns = {
        "model": "",
        "seed": "",
        "memory": "",
        "layers until the first token is settled": ".2f",
        "KL after 1 layer": ".3f",
        "KL after 2 layers": ".3f",
    }
    parts = [Table(columns, rows).markdown()]
    aligned = [
        [run.seed, *content["similarity"]["alignment"]] for run, content in found.items() if "similarity" in content
    ]
    if aligned:
        states = {f"state {state}": ".2f" for state in range(len(aligned[0]) - 1)}
        title = "State 0 is before all layers. The state of the MoE that each state of EngramMoE is most like (CKA)"
        parts.append(Table({"seed": "", **states}, aligned, title).markdown())
    pairs = [
        settled[ENGRAM.name, seed, ON] - settled[MOE.name, seed, "as it is"]
        for seed in SEEDS
        if (ENGRAM.name, seed, ON) in settled and (MOE.name, seed, "as it is") in settled
    ]
    here, verdict = "", OPEN
    if pairs:
        here = f"predictions settle {statistics.mean(pairs):+.2f} layers later than in the MoE, {seeds_of(len(pairs))}"
        verdict = HOLDS if max(pairs) < 0 else FAILS if min(pairs) > 0 else OPEN
        if len(pairs) < FEWEST_SEEDS:
            verdict = TOO_FEW
        parts.append(wrap(f"With its memory, {here}."))
    parts.append(
        wrap(
            "Four layers are few to see depth in, and the lens reads states that no one trained to be read. CKA "
            "compares models that differ in more than their memory."
        )
    )
    files = [content["name"] for content in found.values()]
    return Section(verdict, here, parts, files, lambda path: draw_depth(path, found))


def draw_depth(path: Path, found: dict[Run, dict]) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("How early the model knows its answer", 1, 1, (6.5, 4.2))
    shown: set[str] = set()
    for run, content in found.items():
        for name, curve in content["lens"]["curves"].items():
            label = f"{run.arm.title.split(',')[0]}, {name}"
            color = COLORS[(run.arm is not ENGRAM) * 2 + (name == SILENT)]
            axis.plot(curve["kl"][:-1], color=color, marker="o", label=label if label not in shown else None)
            shown.add(label)
    axis.set(xlabel="after this many layers", ylabel="KL to the final answer, nats", yscale="log")
    axis.legend(fontsize=8)
    return save_figure(figure, path)

"""docs/evidence.md: what the committed JSON of the experiments gives, as tables, sentences and pictures.

Every number on the page comes from a file, and so does every verdict. A section is a function of the finished runs.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from helpers.evidence_statistics import (
    Interval,
    bootstrap,
    curvature,
    difference,
    kept_share,
    minimum,
    share_interval,
    share_right,
    slope,
)
from helpers.experiment_measures import MEASURES, ON, SILENT, measured_runs, name_of
from helpers.experiment_runs import RATES, TUNING_STEPS, Run, tuning_runs
from helpers.experiments import (
    ABLATIONS,
    ALLOCATIONS,
    CONTROLS,
    ENGRAM,
    EXPERIMENTS,
    MEMORY_SIZES,
    MOE,
    ON_DISK,
    ROW_FACTORS,
    SCALES,
    SEEDS,
    SHARES,
    TUNING_SEED,
    Arm,
    Experiment,
)
from helpers.experiments_text import TIMES_ASKED
from helpers.known_answers import TASKS
from helpers.pretrained_runs import HOURS_PER_RUN, TITLES, pretrained_runs
from helpers.pretrained_runs import RATES as RATES_OF_WAYS
from helpers.results import Table, wrap


HOLDS, FAILS, OPEN, NOT_RUN = "holds", "does not hold", "cannot be told at this size", "not run yet"
TOO_FEW = "cannot be told yet: one seed"
CHANCE = 0.25
# A verdict needs so many seeds: one alone may be luck.
FEWEST_SEEDS = 2
Results = dict[str, dict]

HEAD = """# Evidence

The articles about Engram promise that a memory lowers the loss at equal cost, that facts live in its tables, and more.
Here the promises are held against controls, in models of 4.3 million parameters on text that is full of facts.
`scripts/experiments/report.py` writes this page from `scripts/experiments/results/`. No figure of a run and no verdict
is typed by hand.
"""
MISLEADING = """## Three ways in which this page could mislead

1. **Size.** The paper's 27B models have 6,000 times the parameters and read 87,000 times the tokens. What does not show
   here may show there, and the other way round.
2. **The text and the tuning.** Most of the text is dictionary articles of few words each, where short n-grams say much.
   Articles whose facts are asked for are read {times} times, all others once. The learning rate was chosen in runs of
   {tuning_steps} steps; a control that needs another rate in longer runs is wronged.
3. **Intervals.** They are bootstraps over articles and say nothing of other seeds. Two or three seeds are too few to
   know that spread. With so many comparisons on one page, one in twenty clear ones is an accident.
"""


@dataclass
class Section:
    """What an experiment gives. verdict: one of the four. here: the figure in a line.

    draw: writes the picture.
    """

    verdict: str
    here: str = ""
    parts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    draw: Callable[[Path], Path] | None = None


def runs_with(arm: Arm, scale: str, results: Results, seeds: tuple[int, ...] = SEEDS) -> dict[int, dict]:
    """Finished runs of an arm by seed."""
    names = {seed: Run(arm, seed, scale).name for seed in seeds}
    return {seed: results[name] for seed, name in names.items() if name in results}


def paired(arm: Arm, other: Arm, scale: str, results: Results) -> tuple[list[dict], list[dict]]:
    """Runs of both arms with the same seeds."""
    own, others = runs_with(arm, scale, results), runs_with(other, scale, results)
    seeds = sorted(own.keys() & others.keys())
    return [own[seed] for seed in seeds], [others[seed] for seed in seeds]


def seeds_of(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def spread(losses: list[float]) -> str:
    return f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else ""


def loss_table(arms: list[Arm], reference: Arm, scale: str, results: Results) -> Table:
    """Mean, spread and difference to the reference of every arm that has a finished run."""
    rows = []
    for arm in arms:
        runs = runs_with(arm, scale, results)
        if not runs:
            continue
        losses = [run["loss"] for run in runs.values()]
        first = next(iter(runs.values()))
        own, others = paired(arm, reference, scale, results)
        compared = str(difference(own, others)) if own and arm is not reference else ""
        sizes = first["parameters"]
        rows.append(
            [
                arm.title,
                sizes["total"],
                sizes["active"],
                first["learning_rate"],
                len(runs),
                statistics.mean(losses),
                spread(losses),
                compared,
            ]
        )
    columns = {
        "model": "",
        "parameters": ",",
        "active": ",",
        "learning rate": "g",
        "seeds": "",
        "held-out loss": ".4f",
        "lowest to highest": "",
        f"minus {reference.title}, same seeds": "",
    }
    return Table(columns, rows)


def files_of(arms: list[Arm], scale: str, results: Results) -> list[str]:
    return [run["name"] for arm in arms for run in runs_with(arm, scale, results).values()]


def verdict_of(interval: Interval, differences: list[float], wanted: Callable[[float], bool]) -> str:
    """Holds where every seed and the whole interval agree with the claim; does not hold where they all disagree."""
    values = [*differences, interval.low, interval.high]
    if len(differences) < FEWEST_SEEDS:
        return TOO_FEW
    if all(wanted(value) for value in values):
        return HOLDS
    return FAILS if not any(wanted(value) for value in values) else OPEN


def controls(scale: str, results: Results) -> Section:
    files = files_of(CONTROLS, scale, results)
    if not runs_with(ENGRAM, scale, results):
        return Section(NOT_RUN, files=files)
    table = loss_table(CONTROLS, ENGRAM, scale, results)
    own, others = paired(ENGRAM, MOE, scale, results)
    sentences = [
        f"{arm.title[0].upper()}{arm.title[1:]}: {told(difference(theirs, ours), len(ours))}."
        for arm in CONTROLS[1:]
        for ours, theirs in [paired(ENGRAM, arm, scale, results)]
        if ours
    ]
    verdict, here = OPEN if own else NOT_RUN, "no control is finished yet"
    if own:
        gain = difference(own, others)
        each = [a["loss"] - b["loss"] for a, b in zip(own, others)]
        verdict = verdict_of(gain, each, lambda value: value < 0)
        here = f"EngramMoE minus MoE: {gain}, {seeds_of(len(own))}"
    says = []
    if sentences:
        says.append(wrap("The loss of each control minus that of EngramMoE. " + " ".join(sentences)))
    limits = (
        "A clear difference says that the text was read better by this model at this size. It does not say why. The "
        "tables of zeros show what the other parts give without anything to remember, the random ones what rows that "
        "tell n-grams apart give without learning, and the shuffled hash what rows give that mean nothing."
    )
    return Section(
        verdict, here, [table.markdown(), *says, wrap(limits)], files, lambda p: draw_curves(p, results, scale)
    )


def told(interval: Interval, seeds: int) -> str:
    clear = "clearly" if interval.is_clear else "not clearly"
    return f"{interval}, {clear} {'above' if interval.value > 0 else 'below'} 0 ({seeds_of(seeds)})"


def draw_curves(path: Path, results: Results, scale: str) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (left, right) = new_figure("Controls", 1, 2, (11, 4.4))
    for color, arm in zip(COLORS, CONTROLS):
        runs = runs_with(arm, scale, results)
        if not runs:
            continue
        curves = np.array([[loss for _, loss in run["curve"]] for run in runs.values()])
        steps = [step for step, _ in next(iter(runs.values()))["curve"]]
        left.plot(steps, curves.mean(0), color=color, label=arm.title, linewidth=1.4)
        losses = [run["loss"] for run in runs.values()]
        right.scatter(losses, [arm.title] * len(losses), color=color)
    left.set(title="While training", xlabel="steps", ylabel="loss, nats per token")
    right.set(title="Held-out articles, one point per seed", xlabel="loss, nats per token")
    left.legend(fontsize=7)
    right.tick_params(axis="y", labelsize=7)
    return save_figure(figure, path)


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
    kept = {
        task: kept_share(pooled[ENGRAM.name, task, ON], pooled[ENGRAM.name, task, SILENT], CHANCE)
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
    if verdict != OPEN and sum(run.arm is ENGRAM for run in found) < FEWEST_SEEDS:
        verdict = TOO_FEW
    return Section(verdict, here, parts, files, lambda path: draw_facts(path, rows))


def kind_cells(found: dict[Run, dict], task: str, kind: str) -> list:
    """Number of questions, and the share of right answers of MoE, EngramMoE, and EngramMoE silenced."""
    cells, number = [], 0
    for arm, name in ((MOE, ON), (ENGRAM, ON), (ENGRAM, SILENT)):
        digits = "".join(content["answers"][task][name][kind] for run, content in found.items() if run.arm is arm)
        number = max(number, len(digits))
        if not digits:
            cells.append("")
            continue
        low, high = share_interval(digits)
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


def memory_sizes(scale: str, results: Results) -> Section:
    arms = MEMORY_SIZES
    done = [
        (factor, run)
        for factor, arm in zip(ROW_FACTORS, arms)
        for run in runs_with(arm, scale, results, (0, 1)).values()
    ]
    files = [run["name"] for _, run in done]
    factors = {factor for factor, _ in done}
    if len(factors) < 3:
        return Section(NOT_RUN, files=[] if factors <= {1} else files)
    places = [float(np.log10(factor)) for factor, _ in done]
    found = bootstrap([run for _, run in done], lambda losses: slope(places, losses))
    each = []
    for seed in (0, 1):
        own = [(place, run["loss"]) for place, (_, run) in zip(places, done) if run["seed"] == seed]
        if len({place for place, _ in own}) >= 3:
            each.append(slope([place for place, _ in own], np.array([loss for _, loss in own])))
    here = f"{found} nats for ten times the rows (paper: -0.028), {seeds_of(len(each))}"
    by_seed = ", ".join(f"{value:+.4f}" for value in each)
    parts = [
        loss_table(arms, ENGRAM, scale, results).markdown(),
        wrap(f"The slope of the straight line of least squares is {here}; seed by seed {by_seed}."),
        *beside_disk(scale, results),
        wrap("The backbone is the same, so larger tables are more parameters. This is no comparison at equal size."),
    ]
    verdict = verdict_of(found, each, lambda value: value < 0)
    return Section(verdict, here, parts, files, lambda path: draw_line(path, places, done))


def beside_disk(scale: str, results: Results) -> list[str]:
    """A sentence on the run whose table lies on disk, where it and its twin are finished."""
    twins = [results.get(Run(arm, 0, scale).name) for arm in (ON_DISK, MEMORY_SIZES[-1])]
    if None in twins:
        return []
    disk, memory = (twin["loss"] for twin in twins)
    same = "the same to the last digit" if disk == memory else f"which differs by {disk - memory:+.2e}"
    limit = (
        "Table and optimizer state of this size fit into any memory, so no limit was set: "
        "`scripts/experiments/train_beyond_memory.py` trains with less memory than a table needs."
    )
    return [wrap(f"With the largest table on disk the loss is {disk:.6f}, and in memory {memory:.6f}, {same}. {limit}")]


def draw_line(path: Path, places: list[float], done: list[tuple[float, dict]]) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("Rows per head at fixed compute", 1, 1, (6.5, 4.2))
    losses = [run["loss"] for _, run in done]
    axis.scatter(places, losses, color=COLORS[0])
    line = np.polyfit(places, losses, 1)
    axis.plot(sorted(places), np.polyval(line, sorted(places)), color=COLORS[1])
    axis.set(xlabel="log10 of rows over those of the reference", ylabel="held-out loss, nats per token")
    return save_figure(figure, path)


def allocation(scale: str, results: Results) -> Section:
    done = [
        (share, run)
        for share, arm in zip(SHARES, ALLOCATIONS)
        for run in runs_with(arm, scale, results, (0, 1)).values()
    ]
    files = [run["name"] for _, run in done]
    if len({share for share, _ in done}) < 4:
        return Section(NOT_RUN, files=[] if {share for share, _ in done} <= {1.0} else files)
    places, runs = [share for share, _ in done], [run for _, run in done]
    bend = bootstrap(runs, lambda losses: curvature(places, losses))
    lowest = bootstrap(runs, lambda losses: minimum(places, losses))
    is_u = bend.low > 0 and min(places) < lowest.low and lowest.high < max(places)
    here = f"minimum at {lowest.value:.0%} ({lowest.low:.0%} to {lowest.high:.0%}) in experts, " + (
        "a U" if is_u else "which cannot be told from a line"
    )
    parts = [
        loss_table(ALLOCATIONS, MOE, scale, results).markdown(),
        wrap(f"A parabola has its {here}. Its quadratic term is {bend}: a line has 0 and a U is above it."),
        wrap("A parabola is a choice: the paper's own points are none. Its ends weigh as much as its middle."),
    ]
    verdict = OPEN
    if min(sum(run["seed"] == seed for run in runs) for seed in (0, 1)) >= 4:
        paper = (0.75, 0.8)
        if is_u and lowest.low <= paper[1] and lowest.high >= paper[0]:
            verdict = HOLDS
        elif bend.high < 0 or (is_u and (lowest.low > paper[1] or lowest.high < paper[0])):
            verdict = FAILS
    return Section(verdict, here, parts, files, lambda path: draw_u(path, places, runs))


def draw_u(path: Path, places: list[float], runs: list[dict]) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("Share of the sparse budget in experts", 1, 1, (6.5, 4.2))
    losses = [run["loss"] for run in runs]
    axis.scatter([100 * place for place in places], losses, color=COLORS[0])
    grid = np.linspace(min(places), max(places), 50)
    axis.plot(100 * grid, np.polyval(np.polyfit(places, losses, 2), grid), color=COLORS[1])
    axis.set(xlabel="experts, %", ylabel="held-out loss, nats per token")
    return save_figure(figure, path)


# What the paper's ablation lost, in nats.
PAPER_ABLATIONS = {
    "one-stream": 0.0065,
    "no-compression": 0.0057,
    "no-gate": 0.0046,
    "orders-234": 0.0017,
    "no-convolution": 0.0005,
}


def ablations(scale: str, results: Results) -> Section:
    done = {arm: paired(arm, ENGRAM, scale, results) for arm in ABLATIONS}
    done = {arm: (own, others) for arm, (own, others) in done.items() if own}
    files = files_of(ABLATIONS, scale, results)
    if not done:
        return Section(NOT_RUN, files=files)
    lost = {arm.name: difference(own, others) for arm, (own, others) in done.items()}
    rows = [
        [arm.title, len(own), str(lost[arm.name]), PAPER_ABLATIONS.get(arm.name)]
        for arm, (own, _) in sorted(done.items(), key=lambda item: -lost[item[0].name].value)
    ]
    table = Table({"without": "", "seeds": "", "loss it adds here": "", "in the paper": "+.4f"}, rows)
    compared = [name for name in PAPER_ABLATIONS if name in lost]
    here = f"{len(compared)} of the paper's 5 were tried, largest here: {rows[0][0]}"
    verdict = OPEN
    if len(compared) == len(PAPER_ABLATIONS) and min(len(own) for own, _ in done.values()) >= FEWEST_SEEDS:
        order = sorted(compared, key=lambda name: -lost[name].value)
        apart = all(lost[a].low > lost[b].high for a, b in zip(order, order[1:]))
        verdict = (HOLDS if order == list(PAPER_ABLATIONS) else FAILS) if apart else OPEN
    limits = (
        "The effects of the paper are a few thousandths of a nat. An order of parts that are not clearly apart says "
        "nothing, and an ablation of one seed says little."
    )
    return Section(
        verdict, here, [table.markdown(), wrap(limits)], files, lambda path: draw_ablations(path, rows, lost)
    )


def draw_ablations(path: Path, rows: list[list], lost: dict[str, Interval]) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("Loss that leaving a part out adds", 1, 1, (7.5, 4.2))
    intervals = sorted(lost.values(), key=lambda interval: -interval.value)
    for place, interval in enumerate(intervals):
        axis.plot([interval.low, interval.high], [place, place], color=COLORS[0])
        axis.scatter([interval.value], [place], color=COLORS[0])
    axis.axvline(0, color="black", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axis.set(xlabel="nats per token, with 95% interval over articles")
    return save_figure(figure, path)


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
        states = {f"after {state} layers": ".2f" for state in range(len(aligned[0]) - 1)}
        title = "The state of the MoE that each state of EngramMoE is most like (linear CKA)"
        parts.append(Table({"seed": "", **states}, aligned, title).markdown())
    pairs = [
        settled[ENGRAM.name, seed, ON] - settled[MOE.name, seed, "as it is"]
        for seed in SEEDS
        if (ENGRAM.name, seed, ON) in settled and (MOE.name, seed, "as it is") in settled
    ]
    here, verdict = "", OPEN
    if pairs:
        here = f"predictions settle {statistics.mean(pairs):+.2f} layers later than in the MoE, {seeds_of(len(pairs))}"
        if len(pairs) >= FEWEST_SEEDS:
            verdict = HOLDS if max(pairs) < 0 else FAILS if min(pairs) > 0 else OPEN
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


def pretrained(scale: str, results: Results) -> Section:
    base = results.get("smollm-base")
    found = {way: [results[name] for name in names_of_way(way) if name in results] for way in RATES_OF_WAYS}
    found = {way: runs for way, runs in found.items() if runs}
    files = [run["name"] for run in [*([base] if base else []), *(run for runs in found.values() for run in runs)]]
    if base is None or not found:
        return Section(NOT_RUN, files=files)
    rows, forgotten = [], {}
    for way, runs in {"base": [base], **found}.items():
        losses = [run["loss"] for run in runs]
        twins = [base] * len(runs)
        others = [[{**run, "documents": run["other"]} for run in each] for each in (runs, twins)]
        cells = ["", ""]
        if way != "base":
            forgotten[way] = difference(*others)
            cells = [str(difference(runs, twins)), str(forgotten[way])]
        rows.append(
            [
                TITLES[way],
                runs[0]["learning"] if way != "base" else None,
                runs[0]["learning_rate"],
                len(runs),
                statistics.mean(losses),
                spread(losses),
                *cells,
                *answers_of_way(runs),
            ]
        )
    columns = {
        "trained": "",
        "parameters that learn": ",",
        "learning rate": "g",
        "seeds": "",
        "held-out loss": ".4f",
        "lowest to highest": "",
        "minus the base": "",
        "forgotten: loss on code minus the base's": "",
        "facts trained": ".1%",
        "facts held out": ".1%",
        "reading": ".1%",
    }
    learned = {way: difference(runs, [base] * len(runs)) for way, runs in found.items()}
    here = "; ".join(
        f"{TITLES[way]} {interval.value:+.3f}, on code {forgotten[way].value:+.3f}" for way, interval in learned.items()
    )
    silent = [answers_of_way(found["memory"], "silenced")] if "memory" in found else []
    parts = [Table(columns, rows).markdown()]
    parts += [
        wrap(
            f"With its memory silenced the model answers {a:.1%} of trained facts, {b:.1%} of held-out ones and "
            f"{c:.1%} of reading."
        )
        for a, b, c in silent
    ]
    parts.append(
        wrap(
            "The base has read far more text than any run here gives it, so most of its facts are its own. Ways were "
            "tuned by the loss on held-out articles and not by what they forget."
        )
    )
    return Section(OPEN, here, parts, files, lambda path: draw_pretrained(path, learned, forgotten))


def names_of_way(way: str) -> list[str]:
    return [run.name for run in pretrained_runs() if run.way == way and not run.is_tuning]


def answers_of_way(runs: list[dict], name: str = "on") -> list[float]:
    """Share of right answers of each task, over all seeds."""
    return [
        share_right("".join(digits for run in runs for digits in run["answers"][task][name].values())) for task in TASKS
    ]


def draw_pretrained(path: Path, learned: dict[str, Interval], forgotten: dict[str, Interval]) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("Learned and forgotten", 1, 1, (6.5, 4.2))
    for color, way in zip(COLORS, learned):
        axis.errorbar(
            learned[way].value,
            forgotten[way].value,
            xerr=[[learned[way].value - learned[way].low], [learned[way].high - learned[way].value]],
            yerr=[[forgotten[way].value - forgotten[way].low], [forgotten[way].high - forgotten[way].value]],
            color=color, marker="o", label=TITLES[way],
        )  # fmt: skip
    axis.set(xlabel="held-out articles: loss minus the base's", ylabel="code: loss minus the base's")
    axis.legend(fontsize=8)
    return save_figure(figure, path)


def nothing(scale: str, results: Results) -> Section:
    return Section(NOT_RUN)


SECTIONS = {
    "controls": controls,
    "facts": facts,
    "rows": memory_sizes,
    "allocation": allocation,
    "ablations": ablations,
    "pretrained": pretrained,
    "depth": depth,
}


def section_of(experiment: Experiment, scale: str, results: Results) -> Section:
    return SECTIONS.get(experiment.name, nothing)(scale, results)


def picture_of(experiment: Experiment) -> str:
    """Beside the page."""
    return f"evidence/{experiment.name}.png"


def progress_of(experiment: Experiment, scale: str, results: Results) -> str:
    """What is run, what is left and what it costs, with the command."""
    command = f"`python scripts/experiments/run.py {experiment.name}`"
    if experiment.why_not:
        return f"Not run at this size. {experiment.why_not}"
    if experiment.name in MEASURES:
        names = [name_of(experiment.name, run) for run in measured_runs(scale)]
        done = sum(name in results for name in names)
        return f"{done} of {len(names)} models are measured, each after its run of `controls`: {command}."
    names = [Run(arm, seed, scale).name for arm, seed in experiment.runs]
    if experiment.name == "pretrained":
        names = [run.name for run in pretrained_runs() if not run.is_tuning]
    done = [results[name] for name in names if name in results]
    hours = HOURS_PER_RUN if experiment.name == "pretrained" else SCALES[scale].hours_per_run
    left = len(names) - len(done)
    costs = f"; the other {left} take about {left * hours:.1f} CPU hours" if left and hours is not None else ""
    spent = f" in {sum(run['cpu_hours'] for run in done):.2f} CPU hours" if done else ""
    return f"{len(done)} of {len(names)} runs are finished{spent}{costs}: {command}."


def rendered_section(experiment: Experiment, scale: str, results: Results) -> str:
    section = section_of(experiment, scale, results)
    parts = [f"## {experiment.number}. {experiment.title}", wrap(f"The paper's claim: {experiment.claim}")]
    if section.verdict == NOT_RUN:
        state = "Not run." if experiment.why_not else "Not finished." if section.files else "Not run yet."
        parts.append(f"**{state}**")
    parts.append(wrap(progress_of(experiment, scale, results)))
    parts += section.parts
    if section.draw is not None:
        parts.append(f"![{experiment.title}]({picture_of(experiment)})")
    if section.files:
        parts.append(wrap("JSON: " + ", ".join(f"`{name}`" for name in section.files) + "."))
    return "\n\n".join(parts)


def claims(scale: str, results: Results, with_results_only: bool = False) -> str:
    """The table of claims: the paper's, what was found here, the verdict."""
    rows = []
    for experiment in EXPERIMENTS:
        section = section_of(experiment, scale, results)
        if section.verdict == NOT_RUN and with_results_only:
            continue
        rows.append([experiment.claim, section.here, f"**{section.verdict}**"])
    return Table({"the paper": "", "here": "", "verdict": ""}, rows).markdown() if rows else ""


def provenance(scale: str, results: Results) -> str:
    """The text, the models, and how they were trained, of the runs that there are.

    Raises:
        ValueError: runs of this scale do not belong together.
    """
    runs = [run for name, run in results.items() if name.startswith(f"{scale}-") and "documents" in run]
    if not runs:
        return "No run is finished."
    for key in ("text", "steps", "threads"):
        values = {run[key] for run in runs}
        if len(values) > 1:
            raise ValueError(
                f"Runs of scale {scale} differ in {key}: {sorted(map(str, values))}. Remove those that do not belong, "
                "and run them again."
            )
    first = runs[0]
    tokens = sum(first["documents"]["tokens"])
    hardware, commits = sorted({run["hardware"] for run in runs}), sorted({run["commit"] for run in runs})
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    hours = sum(run["cpu_hours"] for name, run in results.items() if name.startswith(f"{scale}-"))
    articles = len(first["documents"]["tokens"])
    return (
        f"A run reads {first['tokens']:,} tokens in {first['steps']:,} steps, on {first['threads']} thread. Losses are "
        f"nats per token of the beginnings of {articles} held-out articles, {tokens:,} tokens. Text {first['text']}; "
        f"{'; '.join(hardware)}; {versions}; commit {', '.join(commits)}. All runs and their tuning took {hours:.2f} "
        "CPU hours."
    )


TEXT = """## The text and the runs

`python scripts/experiments/gather_knowledge.py` makes the text of five dictionaries that Debian packages (GCIDE,
WordNet, FOLDOC, The Elements, the Jargon File) and Python's library. A word is held out in all of them or in none, and
no eight words in a row of a held-out article stand in one that is trained on. Facts are asked in the words of their
articles, with three wrong answers of the same kind. In the tasks of reading, the answer stands in the prompt. The tool
lm_eval asks the same questions, here of a trained model in `FOLDER`:

```bash
lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --include_path scripts/experiments/tasks \\
  --tasks engram_facts_trained,engram_facts_held_out,engram_reading
```"""


def tuning_tables(scale: str, results: Results) -> list[str]:
    """The losses by which rates were chosen, of the families that were tuned."""
    families = [arm for arm in CONTROLS if arm.name == arm.family]
    rows = []
    for arm in families:
        tried = [results.get(run.name) for run in tuning_runs(arm.family, scale)]
        if None not in tried:
            texts = ", ".join(sorted({each["text"] for each in tried}))
            rows.append([arm.title, *(each["loss"] for each in tried), texts])
    if not rows:
        return []
    columns = {"held-out loss of tuning": "", **{f"rate {rate:g}": ".3f" for rate in RATES}, "text": ""}
    return [Table(columns, rows).markdown()]


def rendered(results: Results, scale: str = "tiny") -> str:
    """The page.

    Raises:
        ValueError: runs do not belong together.
    """
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    tuning = (
        f"The learning rate of each family of models is the best of {rates} after {TUNING_STEPS} steps with seed "
        f"{TUNING_SEED}, which is not reported. Tables have five times the rate. All arms of a seed read the same "
        "tokens in the same order. A run with the same seed gives the same loss to the last digit on one thread, also "
        "where it was killed and went on."
    )
    parts = [
        HEAD.strip(),
        "## The claims",
        claims(scale, results),
        TEXT,
        wrap(tuning),
        *tuning_tables(scale, results),
        wrap(provenance(scale, results)),
        MISLEADING.strip().format(tuning_steps=TUNING_STEPS, times=TIMES_ASKED),
        *(rendered_section(experiment, scale, results) for experiment in EXPERIMENTS),
    ]
    return "\n\n".join(parts) + "\n"

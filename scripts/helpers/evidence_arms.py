"""Sections that hold arms against each other by their losses: the controls and the ablations."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from helpers.evidence_sections import (
    FAILS,
    FEWEST_SEEDS,
    HOLDS,
    NOT_RUN,
    OPEN,
    TOO_FEW,
    UNFINISHED,
    Results,
    Section,
    files_of,
    loss_table,
    paired,
    runs_with,
    seeds_of,
    told,
    verdict_of,
)
from helpers.evidence_statistics import Interval, difference
from helpers.experiments import ABLATIONS, CONTROLS, ENGRAM, MOE
from helpers.results import Table, wrap


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
    verdict, here = OPEN if own else NOT_RUN, "the MoE of equal size is not finished yet"
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
    of_paper = sorted(PAPER_ABLATIONS.keys() & lost.keys(), key=lambda name: -lost[name].value)
    titles = {arm.name: arm.title for arm in ABLATIONS}
    order = ", ".join(f"{titles[name]} {lost[name].value:+.3f}" for name in of_paper)
    here = f"{len(of_paper)} of the paper's {len(PAPER_ABLATIONS)} were tried: {order}"
    seeds = {arm.name: len(own) for arm, (own, _) in done.items()}
    verdict = verdict_of_order(lost, seeds)
    limits = (
        "The effects of the paper are a few thousandths of a nat. An order of parts that are not clearly apart says "
        "nothing, and an ablation of one seed says little."
    )
    return Section(
        verdict, here, [table.markdown(), wrap(limits)], files, lambda path: draw_ablations(path, rows, lost)
    )


def verdict_of_order(lost: dict[str, Interval], seeds: dict[str, int]) -> str:
    """Holds where each part of the paper's order loses clearly more than the next. Does not hold where a later part
    loses clearly more than an earlier one. The largest loss here needs a second seed.
    """
    order = list(PAPER_ABLATIONS)
    if any(name not in lost for name in order):
        return UNFINISHED
    if seeds[max(order, key=lambda name: lost[name].value)] < FEWEST_SEEDS:
        return TOO_FEW
    if all(lost[earlier].low > lost[later].high for earlier, later in pairwise(order)):
        return HOLDS
    reversed_pairs = (lost[later].low > lost[earlier].high for earlier, later in combinations(order, 2))
    return FAILS if any(reversed_pairs) else OPEN


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

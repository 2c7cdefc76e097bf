"""Sections that fit a curve: the loss over rows per head, and over the experts' share of the sparse budget."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.evidence_sections import (
    FAILS,
    HOLDS,
    HOLDS_BENT,
    NOT_RUN,
    OPEN,
    Results,
    Section,
    files_of,
    loss_table,
    paired,
    runs_with,
    seeds_of,
    verdict_of,
)
from helpers.evidence_statistics import bootstrap, curvature, difference, minimum, slope
from helpers.experiment_runs import Run
from helpers.experiments import ALLOCATIONS, ENGRAM, LOWEST_SHARES, MEMORY_SIZES, MOE, ON_DISK, ROW_FACTORS, SHARES
from helpers.results import wrap


# The smallest, the reference and the largest: a decade lies between two of them.
ENDS = (ROW_FACTORS[0], 1, ROW_FACTORS[-1])
# Of a table in float32 with the two numbers that lazy Adam keeps for each weight.
BYTES_PER_WEIGHT = 12


def memory_sizes(scale: str, results: Results) -> Section:
    arms = MEMORY_SIZES
    done = [
        (factor, run)
        for factor, arm in zip(ROW_FACTORS, arms)
        for run in runs_with(arm, scale, results, (0, 1)).values()
    ]
    files = [run["name"] for _, run in done] + files_of([ON_DISK], scale, results)
    factors = {factor for factor, _ in done}
    if len(factors) < 3:
        return Section(NOT_RUN, files=[] if factors <= {1} else files)
    places = [float(np.log10(factor)) for factor, _ in done]
    runs = [run for _, run in done]
    found = bootstrap(runs, lambda losses: slope(places, losses))
    bend = bootstrap(runs, lambda losses: curvature(places, losses))
    each, bends = [], []
    for seed in (0, 1):
        own = [(place, run["loss"]) for place, (_, run) in zip(places, done) if run["seed"] == seed]
        own_places, own_losses = [place for place, _ in own], np.array([loss for _, loss in own])
        if len(set(own_places)) >= 3:
            each.append(slope(own_places, own_losses))
            bends.append(curvature(own_places, own_losses))
    verdict = verdict_of(found, each, lambda value: value < 0)
    is_bent = bool(bends) and bend.is_clear and all(value * bend.value > 0 for value in bends)
    here = f"{found} nats for ten times the rows (paper: -0.028), {seeds_of(len(each))}"
    if is_bent:
        here += f"; the line bends {'up' if bend.value > 0 else 'down'}: {steps_of(done, ENDS)}"
        verdict = HOLDS_BENT if verdict == HOLDS else verdict
    by_seed = ", ".join(f"{value:+.4f}" for value in each)
    bends_by_seed = ", ".join(f"{value:+.4f}" for value in bends)
    parts = [
        loss_table(arms, ENGRAM, scale, results).markdown(),
        wrap(
            f"The slope of the straight line of least squares is {found} nats for ten times the rows, seed by seed "
            f"{by_seed}. The quadratic term of a parabola is {bend}, seed by seed {bends_by_seed}: a straight line has "
            f"0, and above it each further row gives less. From size to size: {steps_of(done, ROW_FACTORS)}."
        ),
        *beside_disk(scale, results),
        wrap("The backbone is the same, so larger tables are more parameters. This is no comparison at equal size."),
    ]
    return Section(verdict, here, parts, files, lambda path: draw_line(path, places, done))


def steps_of(done: list[tuple[float, dict]], sizes: Sequence[float]) -> str:
    """What the mean loss changes by from one of these sizes to the next, as far as they are tried."""
    losses = {size: [run["loss"] for factor, run in done if factor == size] for size in sizes}
    means = {size: float(np.mean(own)) for size, own in losses.items() if own}
    tried = list(means)
    steps = zip(tried, tried[1:])
    return ", ".join(f"{means[more] - means[less]:+.3f} from {less:g} to {more:g} times" for less, more in steps)


def beside_disk(scale: str, results: Results) -> list[str]:
    """What the run showed whose table lies on disk, where it and its twin are finished."""
    twins = [results.get(Run(arm, 0, scale).name) for arm in (ON_DISK, MEMORY_SIZES[-1])]
    if None in twins:
        return []
    disk, memory = (twin["loss"] for twin in twins)
    same = "the same to the last digit" if disk == memory else f"which differs by {disk - memory:+.2e}"
    loss = f"With the largest table on disk the loss is {disk:.6f}, and in memory {memory:.6f}, {same}."
    limit, own = (twins[0]["memory"][name] for name in ("limit_bytes", "own_bytes"))
    needed = BYTES_PER_WEIGHT * twins[0]["parameters"]["tables"]
    if limit is None or limit - own >= needed:
        return [wrap(f"{loss} The table had no limit of memory.")]
    return [
        wrap(
            f"{loss} The run on disk had a memory cgroup of {limit / 1e6:,.0f} MB. Cached files count towards it. At "
            f"its peak the process took {own / 1e6:,.0f} MB without files, so {(limit - own) / 1e6:,.0f} MB were left "
            f"for files. The table and its optimizer state need {needed / 1e6:,.0f} MB."
        )
    ]


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
    losses_of = {share: [run["loss"] for place, run in done if place == share] for share in places}
    best = min(losses_of, key=lambda share: np.mean(losses_of[share]))
    # A parabola bends back by itself: only runs on both sides of the lowest ones show that the loss rises again.
    is_inside = min(places) < best < max(places)
    is_u = bend.low > 0 and min(places) < lowest.low and lowest.high < max(places) and is_inside
    beside = shares_beside(set(places))
    is_elsewhere = best not in beside and all(is_lower(best, share, scale, results) for share in beside)
    of_parabola = f"minimum at {lowest.value:.0%} ({lowest.low:.0%} to {lowest.high:.0%}) in experts"
    if is_u:
        here = f"a U with its {of_parabola}"
    elif is_inside:
        here = f"{of_parabola}, which cannot be told from a line"
    else:
        here = f"no U: the loss is lowest at {best:.0%} in experts, the last share that was tried"
    if is_elsewhere:
        here += f"; at {best:.0%} it is clearly lower than at {' and '.join(f'{share:.0%}' for share in beside)}"
    parts = [
        loss_table(ALLOCATIONS, MOE, scale, results).markdown(),
        wrap(f"{here[0].upper()}{here[1:]}."),
        wrap(
            f"A parabola of least squares has its {of_parabola}. Its quadratic term is {bend}: a line has 0 and a U is "
            "above it. A parabola is a choice: the paper's own points are none. Its ends weigh as much as its middle."
        ),
    ]
    verdict = OPEN
    if min(sum(run["seed"] == seed for run in runs) for seed in (0, 1)) >= 4:
        if is_u and lowest.low <= LOWEST_SHARES[1] and lowest.high >= LOWEST_SHARES[0]:
            verdict = HOLDS
        elif bend.high < 0 or is_elsewhere:
            verdict = FAILS
    return Section(verdict, here, parts, files, lambda path: draw_u(path, places, runs))


def shares_beside(tried: set[float]) -> list[float]:
    """The shares that were tried next to the paper's lowest, from both sides."""
    above, below = [share for share in tried if share >= LOWEST_SHARES[1]], [s for s in tried if s <= LOWEST_SHARES[0]]
    return [*([min(above)] if above else []), *([max(below)] if below else [])]


def is_lower(share: float, other: float, scale: str, results: Results) -> bool:
    """Whether the loss at one share is clearly lower than at another, and with each seed."""
    arms = [ALLOCATIONS[SHARES.index(each)] for each in (share, other)]
    own, others = paired(*arms, scale, results)
    is_each = all(run["loss"] < beside["loss"] for run, beside in zip(own, others))
    return len(own) > 1 and is_each and difference(own, others).high < 0


def draw_u(path: Path, places: list[float], runs: list[dict]) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("Share of the sparse budget in experts", 1, 1, (6.5, 4.2))
    losses = [run["loss"] for run in runs]
    axis.scatter([100 * place for place in places], losses, color=COLORS[0])
    grid = np.linspace(min(places), max(places), 50)
    axis.plot(100 * grid, np.polyval(np.polyfit(places, losses, 2), grid), color=COLORS[1])
    axis.set(xlabel="experts, %", ylabel="held-out loss, nats per token")
    return save_figure(figure, path)

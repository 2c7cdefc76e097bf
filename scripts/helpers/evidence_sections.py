"""What all sections of docs/evidence.md share: the words of verdicts, tables of losses, runs with the same seeds."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.evidence_statistics import Interval, difference
from helpers.experiment_runs import Run
from helpers.experiments import SEEDS, Arm
from helpers.results import Table


HOLDS, FAILS, OPEN, NOT_RUN = "holds", "does not hold", "cannot be told at this size", "not run yet"
NOT_AT_THIS_SIZE, NO_CLAIM = "not run at this size", "no claim"
HOLDS_BENT = "holds, but not on a straight line"
TOO_FEW, UNFINISHED = "cannot be told yet: one seed", "cannot be told yet: runs are missing"
# A verdict needs so many seeds: one alone may be luck.
FEWEST_SEEDS = 2
Results = dict[str, dict]


@dataclass
class Section:
    """What an experiment gives. verdict: one of the words above. here: the figure in a line.

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


def told(interval: Interval, seeds: int) -> str:
    clear = "clearly" if interval.is_clear else "not clearly"
    return f"{interval}, {clear} {'above' if interval.value > 0 else 'below'} 0 ({seeds_of(seeds)})"


def made_by(runs: list[dict]) -> str:
    """On what machines, by what versions and at what commits."""
    versions = {", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs}
    hardware, commits = {run["hardware"] for run in runs}, {run["commit"] for run in runs}
    return f"{'; '.join(sorted(hardware))}; {'; '.join(sorted(versions))}; commit {', '.join(sorted(commits))}"


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

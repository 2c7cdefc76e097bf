"""The runs of each experiment, whatever they train, in the order in which they are trained."""

from collections.abc import Iterable

from helpers import pretrained_runs, recall_runs
from helpers.experiment_files import AnyRun
from helpers.experiment_runs import Run, reported_runs, tuning_runs
from helpers.experiments import SCALES, Experiment


def tuning_of(families: Iterable[str], scale: str = "tiny") -> list[Run]:
    return [run for family in dict.fromkeys(families) for run in tuning_runs(family, scale)]


# Experiments of models of their own, which are the same at every scale: their runs, of results, and CPU hours of a run.
OF_OTHER_MODELS = {
    "pretrained": (lambda _: pretrained_runs.pretrained_runs(), pretrained_runs.HOURS_PER_RUN),
    "long": (
        lambda results: [*tuning_of(arm.family for arm in recall_runs.ARMS), *recall_runs.recall_runs(results)],
        recall_runs.HOURS_PER_RUN,
    ),
}


def runs_of(experiment: Experiment, scale: str, results: dict[str, dict]) -> list[AnyRun]:
    """Tuning first, then reported runs, as far as they are known: which arms are repeated depends on results."""
    if experiment.name in OF_OTHER_MODELS:
        return list(OF_OTHER_MODELS[experiment.name][0](results))
    tuning = tuning_of((arm.family for arm, _ in experiment.runs), scale)
    return [*tuning, *reported_runs(experiment, scale, results)]


def count_reported(experiment: Experiment, scale: str, results: dict[str, dict]) -> int:
    """Of all reported runs, also those that are not known yet."""
    known = results if experiment.name in OF_OTHER_MODELS else {}
    return sum(not run.is_tuning for run in runs_of(experiment, scale, known)) + experiment.repeats


def hours_of_run(experiment: Experiment, scale: str) -> float | None:
    """CPU hours of one thread; None where they were not measured."""
    if experiment.name in OF_OTHER_MODELS:
        return OF_OTHER_MODELS[experiment.name][1]
    return SCALES[scale].hours_per_run

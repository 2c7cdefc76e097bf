"""The section on long context: what a small model finds in rows of the trained length and beyond, with YaRN."""

from pathlib import Path

from helpers.evidence_sections import (
    FAILS,
    FEWEST_SEEDS,
    HOLDS,
    NOT_AT_THIS_SIZE,
    NOT_RUN,
    OPEN,
    TOO_FEW,
    Results,
    Section,
    seeds_of,
)
from helpers.evidence_statistics import share_difference, share_interval, share_right
from helpers.experiments import ENGRAM, MOE
from helpers.recall_runs import (
    ARMS,
    AS_TRAINED,
    ASKED_ROWS,
    EXTENDED,
    LENGTHS,
    LONG_STEPS,
    RATES,
    ROWS,
    SEEDS,
    STEPS,
    TRAINED,
    YARN_ALONE,
    YARN_TRAINED,
    RecallRun,
    guessing_loss,
    recall_runs,
    tuning_runs,
)
from helpers.recall_task import ASSIGNMENTS, KINDS
from helpers.results import Table, wrap


# A model that answers fewer at the trained length has not learned the task, and says nothing of longer rows.
LEARNED = 0.5
WAYS = (AS_TRAINED, YARN_ALONE, YARN_TRAINED)


def recall(scale: str, results: Results) -> Section:
    runs = recall_runs(results)
    if all(run.is_tuning for run in runs):
        return not_learned(results)
    files = [run.name for run in runs if run.name in results and not run.is_tuning]
    seeds = [seed for seed in SEEDS if all(RecallRun(arm, seed).name in files for arm in ARMS)]
    if not seeds:
        return Section(NOT_RUN, files=files)
    found = {arm: [results[RecallRun(arm, seed).name] for seed in seeds] for arm in ARMS}
    rows = [
        [kind, length, way, *(cell(found[arm], way, length, kind) for arm in (MOE, ENGRAM))]
        for kind in KINDS
        for length in LENGTHS
        for way in WAYS
    ]
    columns = {"asked for": "", "tokens in a row": ",", "context": "", "MoE": "", "EngramMoE": ""}
    count = len(seeds)
    gains = {kind: share_difference(*(digits(found[arm], kind) for arm in (ENGRAM, MOE)), count) for kind in KINDS}
    each = [gain_of(found, kind, place) for kind in KINDS for place in range(count)]
    told = "; ".join(f"{kind} {gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})" for kind, gain in gains.items())
    here = f"EngramMoE minus MoE in rows of {EXTENDED:,} tokens: {told}, {seeds_of(count)}"
    values = [*each, *(bound for gain in gains.values() for bound in (gain.low, gain.high))]
    verdict = OPEN
    if all(learned(found[arm], kind) for arm in ARMS for kind in KINDS):
        if count < FEWEST_SEEDS:
            verdict = TOO_FEW
        elif min(values) > 0:
            verdict = HOLDS
        elif max(values) < 0:
            verdict = FAILS
    else:
        here += "; a model that has not learned a task at its trained length says nothing of longer rows"
    parts = [
        wrap(
            f"Rows of a made-up language hold {ASSIGNMENTS} assignments between phrases, and end with a question for "
            f"each (`scripts/helpers/recall_task.py`). A model reads {STEPS:,} steps of rows of {TRAINED} tokens, then "
            f"{LONG_STEPS} of rows of {EXTENDED:,} with YaRN. The loss counts answers alone."
        ),
        Table(columns, rows).markdown(),
        wrap(f"Each share is of {ASKED_ROWS // len(KINDS) * ASSIGNMENTS} questions a seed. {here}."),
        wrap(
            "The paper's models are asked in English among 32,768 tokens. Here an assignment is an n-gram that the "
            "table can learn, which is kinder to a memory than a needle that no one has read before."
        ),
    ]
    return Section(verdict, here, parts, files, lambda path: draw_recall(path, found))


def not_learned(results: Results) -> Section:
    """Why nothing is compared where no tuning run has learned the task."""
    tuning = tuning_runs()
    rows = [[run.arm.title, run.rate, results[run.name]["loss"]] for run in tuning]
    hours = sum(results[run.name]["cpu_hours"] for run in tuning)
    best = min(loss for *_, loss in rows)
    here = (
        f"after {STEPS * ROWS * TRAINED:,} tokens answers cost {best:.2f} nats at the best of {len(rows)} rates and "
        f"models, and guessing among the values of a row {guessing_loss():.2f}"
    )
    parts = [
        wrap(
            f"Rows of a made-up language hold up to {ASSIGNMENTS} assignments between phrases, and ask for them "
            f"(`scripts/helpers/recall_task.py`). {here[0].upper()}{here[1:]}: these models learn which values there "
            "are, and not which one belongs to a key. A model that does not find an answer among "
            f"{TRAINED} tokens says nothing of {EXTENDED:,}, so the runs that would compare models are not made."
        ),
        Table({"model": "", "learning rate": "g", "loss of answers": ".3f"}, rows).markdown(),
        wrap(f"This took {hours:.2f} CPU hours: `python scripts/experiments/run.py long`."),
        wrap(
            "YaRN itself is tested exactly: DeepSeek's formula, and the same logits for whole, chunked and single "
            "tokens on both sides of the trained length (`tests/modeling/test_yarn.py`)."
        ),
    ]
    return Section(NOT_AT_THIS_SIZE, here, parts, [run.name for run in tuning], lambda path: draw_tuning(path, results))


def digits(runs: list[dict], kind: str, way: str = YARN_TRAINED, length: int = EXTENDED) -> str:
    return "".join(run["right"][way][f"{length}"][kind] for run in runs)


def cell(runs: list[dict], way: str, length: int, kind: str) -> str:
    own = digits(runs, kind, way, length)
    low, high = share_interval(own, len(runs))
    return f"{share_right(own):.1%} ({low:.1%} to {high:.1%})"


def gain_of(found: dict, kind: str, place: int) -> float:
    own, other = (share_right(digits([found[arm][place]], kind)) for arm in (ENGRAM, MOE))
    return own - other


def learned(runs: list[dict], kind: str) -> bool:
    return all(share_right(digits([run], kind, AS_TRAINED, TRAINED)) >= LEARNED for run in runs)


def draw_tuning(path: Path, results: Results) -> Path:
    """Losses of runs that did not learn, beside what guessing costs."""
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, (axis,) = new_figure("Recall is not learned", 1, 1, (6.5, 4.2))
    for run in tuning_runs():
        color, style = COLORS[ARMS.index(run.arm)], ("-", "--", ":")[RATES.index(run.rate)]
        label = f"{run.arm.title.split(',')[0]}, rate {run.rate:g}"
        axis.plot(*zip(*results[run.name]["curve"]), color=color, linestyle=style, label=label)
    axis.axhline(guessing_loss(), color=COLORS[len(ARMS)], label="guessing among a row's values")
    axis.set(xlabel="steps", ylabel="loss of answers, nats")
    axis.legend(fontsize=7)
    return save_figure(figure, path)


def draw_recall(path: Path, found: dict) -> Path:
    from engram_hf.insight.drawing import COLORS, new_figure, save_figure

    figure, axes = new_figure("Recall beyond the trained length", 1, len(KINDS), (10, 4.2))
    for axis, kind in zip(axes, KINDS):
        for color, arm in zip(COLORS, ARMS):
            for style, way in zip(("-", "--", ":"), (YARN_TRAINED, YARN_ALONE, AS_TRAINED)):
                shares = [100 * share_right(digits(found[arm], kind, way, length)) for length in LENGTHS]
                label = f"{arm.title.split(',')[0]}, {way}"
                axis.plot(LENGTHS, shares, color=color, linestyle=style, marker="o", label=label)
        axis.set(title=kind, xlabel="tokens in a row", ylabel="right answers, %", xticks=LENGTHS, ylim=(0, 100))
    axes[0].legend(fontsize=7)
    return save_figure(figure, path)

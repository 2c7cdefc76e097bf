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
    made_by,
    seeds_of,
)
from helpers.evidence_statistics import share_difference, share_interval, share_right
from helpers.experiments import ENGRAM, MOE, Arm
from helpers.recall_runs import (
    ARMS,
    AS_TRAINED,
    ASKED_ROWS,
    EXTENDED,
    LEARNED_SHARE,
    LENGTHS,
    LONG_ROWS,
    LONG_STEPS,
    ROWS,
    SEEDS,
    STEPS,
    TRAINED,
    YARN_ALONE,
    YARN_TRAINED,
    RecallRun,
    guessed_share,
    has_learned,
    recall_runs,
)
from helpers.recall_task import ASSIGNMENTS, KINDS
from helpers.results import Table, wrap


WHY_NOT = (
    f"A task counts as learned where {LEARNED_SHARE:.0%} of the answers are right in rows of the trained length. No "
    "model has learned one, so longer rows say nothing, and no second seed was trained. Shorter trials at other "
    "rates, with easier rows, and of a plain Llama did not learn it either (`scripts/LOG.md`). A larger model may."
)
WAYS = (AS_TRAINED, YARN_ALONE, YARN_TRAINED)


def recall(scale: str, results: Results) -> Section:
    runs = recall_runs(results)
    files = [run.name for run in runs if run.name in results]
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
    verdict, reasons = OPEN, []
    if len(runs) == len(ARMS):
        verdict, here = NOT_AT_THIS_SIZE, not_learned(found)
        reasons = [wrap(WHY_NOT)]
    elif count < FEWEST_SEEDS:
        verdict = TOO_FEW
    elif not all(has_learned(run, kind) for own in found.values() for run in own for kind in KINDS):
        here += "; a model that has not learned a task at its trained length says nothing of longer rows"
    elif min(values) > 0:
        verdict = HOLDS
    elif max(values) < 0:
        verdict = FAILS
    parts = [
        wrap(
            f"Rows of a made-up language hold {ASSIGNMENTS} assignments between phrases, and end with a question for "
            f"each (`scripts/helpers/recall_task.py`). A model reads {STEPS:,} steps of {ROWS} rows of {TRAINED} "
            f"tokens at the rate that was tuned for its family on text: {rates_of(found)}. Then it reads {LONG_STEPS} "
            f"steps of {LONG_ROWS} rows of {EXTENDED:,} tokens with YaRN, at a tenth of the rate. The loss counts "
            f"answers alone. {made_by([run for runs in found.values() for run in runs])}."
        ),
        Table(columns, rows).markdown(),
        wrap(
            f"Each share is of {ASKED_ROWS // len(KINDS) * ASSIGNMENTS} questions a seed, {ASSIGNMENTS} in a row, and "
            f"intervals take them for independent. {here[0].upper()}{here[1:]}."
        ),
        *reasons,
        wrap(
            "YaRN itself is tested exactly: DeepSeek's formula, and the same logits for whole, chunked and single "
            "tokens on both sides of the trained length (`tests/modeling/test_yarn.py`)."
        ),
        wrap(
            "The paper's models are asked in English among 32,768 tokens. Here an assignment is an n-gram that the "
            "table can learn, which is kinder to a memory than a needle that no one has read before."
        ),
    ]
    return Section(verdict, here, parts, files, lambda path: draw_recall(path, found))


def not_learned(found: dict[Arm, list[dict]]) -> str:
    """Why the models say nothing of longer rows."""
    shares = {kind: [share_right(digits(found[arm], kind, AS_TRAINED, TRAINED)) for arm in ARMS] for kind in KINDS}
    told = "; ".join(
        f"of {kind} EngramMoE answers {own:.0%}, the MoE {other:.0%} and a guess {guessed_share(kind):.0%}"
        for kind, (own, other) in shares.items()
    )
    return f"the task is not learned in rows of {TRAINED} tokens: {told}"


def rates_of(found: dict[Arm, list[dict]]) -> str:
    return ", ".join(f"{runs[0]['learning_rate']:g} for {arm.title.split(',')[0]}" for arm, runs in found.items())


def digits(runs: list[dict], kind: str, way: str = YARN_TRAINED, length: int = EXTENDED) -> str:
    return "".join(run["right"][way][f"{length}"][kind] for run in runs)


def cell(runs: list[dict], way: str, length: int, kind: str) -> str:
    own = digits(runs, kind, way, length)
    low, high = share_interval(own, len(runs))
    return f"{share_right(own):.1%} ({low:.1%} to {high:.1%})"


def gain_of(found: dict, kind: str, place: int) -> float:
    own, other = (share_right(digits([found[arm][place]], kind)) for arm in (ENGRAM, MOE))
    return own - other


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

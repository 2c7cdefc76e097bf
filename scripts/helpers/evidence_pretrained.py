"""The section on a pretrained model: what three ways of training learn, and what they forget."""

import statistics
from pathlib import Path

from helpers.evidence_sections import NO_CLAIM, NOT_RUN, Results, Section, made_by, seeds_of, spread, told
from helpers.evidence_statistics import Interval, difference, share_right
from helpers.experiments import TUNING_SEED
from helpers.known_answers import TASKS
from helpers.pretrained_runs import FULL, LORA, MEMORY, RATES, TIMES_ASKED, TITLES, names_of_tuning, pretrained_runs
from helpers.results import Table, wrap


def pretrained(scale: str, results: Results) -> Section:
    base = results.get("smollm-base")
    found = {way: [results[name] for name in names_of_way(way) if name in results] for way in RATES}
    found = {way: runs for way, runs in found.items() if runs}
    files = [run["name"] for run in [*([base] if base else []), *(run for runs in found.values() for run in runs)]]
    if base is None or len(found) < len(RATES):
        return Section(NOT_RUN, files=files)
    rows, forgotten = [], {}
    for way, runs in {"base": [base], **found}.items():
        losses = [run["loss"] for run in runs]
        twins = [base] * len(runs)
        cells = ["", ""]
        if way != "base":
            forgotten[way] = difference(on_code(runs), on_code(twins))
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
    counts = list(dict.fromkeys(map(len, found.values())))
    here = f"loss minus the base's: {here}, {seeds_of(counts[0]) if len(counts) == 1 else 'seeds differ'}"
    trained, held_out, reading = answers_of_way(found[MEMORY], "silenced")
    parts = [about_runs(base, found), Table(columns, rows).markdown(), beside_others(found), tuning_line(results)]
    parts.append(
        wrap(
            f"With its memory silenced the model answers {trained:.1%} of trained facts, {held_out:.1%} of held-out "
            f"ones and {reading:.1%} of reading. Only the memory was trained, so this is the base again."
        )
    )
    parts.append(
        wrap(
            "The base has read far more text than any run here gives it. A gain on facts that are held out is no gain "
            "of facts: the model has learned how such articles go on. Ways were tuned by the loss on held-out articles "
            "and not by what they forget. They differ in parameters, and none was tried at other sizes."
        )
    )
    return Section(NO_CLAIM, here, parts, files, lambda path: draw_pretrained(path, learned, forgotten))


def about_runs(base: dict, found: dict[str, list[dict]]) -> str:
    """What the model is, and what it reads and is asked."""
    first = found[MEMORY][0]
    documents, other = base["documents"]["tokens"], base["other"]["tokens"]
    return wrap(
        f"The model is SmolLM2-135M-Instruct. A run reads {first['tokens']:,} tokens of articles in {first['steps']} "
        f"steps. Articles whose facts are asked for are read {TIMES_ASKED} times. Losses are of {len(documents)} "
        f"held-out articles, {sum(documents):,} tokens, and of {len(other)} files of Python's library, {sum(other):,} "
        f"tokens. Text {first['text']}; {made_by([base, *(run for runs in found.values() for run in runs)])}."
    )


def beside_others(found: dict[str, list[dict]]) -> str:
    """How the memory compares with each other way, by runs with the same seeds."""
    sentences = []
    for way in (LORA, FULL):
        seeds = {run["seed"] for run in found[MEMORY]} & {run["seed"] for run in found[way]}
        own, others = ([run for run in found[each] if run["seed"] in seeds] for each in (MEMORY, way))
        if seeds:
            learned, forgotten = difference(own, others), difference(on_code(own), on_code(others))
            less_of_articles = said(learned, "learned less", "learned more", "learns more")
            less_of_code = said(forgotten, "forgot more", "forgot less", "forgets more")
            sentences.append(
                f"{less_of_articles} of the articles than {TITLES[way]}: the difference of losses is "
                f"{told(learned, len(seeds))}. {less_of_code} of the code: {told(forgotten, len(seeds))}."
            )
    return wrap(" ".join(sentences))


def said(interval: Interval, above: str, below: str, open_question: str) -> str:
    """What a difference of losses says of the memory, where it says something."""
    if not interval.is_clear:
        return f"It cannot be told whether the memory {open_question}"
    return f"The memory {above if interval.value > 0 else below}"


def on_code(runs: list[dict]) -> list[dict]:
    """The same runs with their losses on code in place of those on articles."""
    return [{**run, "documents": run["other"]} for run in runs]


def tuning_line(results: Results) -> str:
    """Which learning rates were tried, and what came of them."""
    tried = []
    for way, rates in RATES.items():
        losses = {rate: results[name]["loss"] for rate, name in names_of_tuning(way).items() if name in results}
        is_at_edge = losses and min(losses, key=losses.__getitem__) in (rates[0], rates[-1])
        tried.append(
            f"{TITLES[way]}: "
            + (", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in losses.items()) or "none yet")
            + (" (the best is at the edge)" if is_at_edge else "")
        )
    return wrap(
        f"Learning rates that were tried with seed {TUNING_SEED}, which is not reported, and the loss on articles that "
        f"are held out for this: {'; '.join(tried)}."
    )


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

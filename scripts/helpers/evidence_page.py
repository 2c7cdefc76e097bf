"""docs/evidence.md: what the committed JSON of the experiments gives, as tables, sentences and pictures.

Every number on the page comes from a file, and so does every verdict. A section is a function of the finished runs.
"""

from helpers.evidence_answers import facts
from helpers.evidence_arms import ablations, controls
from helpers.evidence_depth import depth
from helpers.evidence_pretrained import pretrained
from helpers.evidence_recall import recall
from helpers.evidence_sections import NOT_RUN, Results, Section, made_by
from helpers.evidence_sizes import allocation, memory_sizes
from helpers.experiment_files import best_rate
from helpers.experiment_measures import MEASURES, measured_runs, name_of
from helpers.experiment_plan import count_reported, hours_of_run, runs_of
from helpers.experiment_runs import RATES, Run, names_of_tuning, tuning_runs
from helpers.experiments import CONTROLS, ENGRAM, EXPERIMENTS, TUNING_SEED, Experiment
from helpers.experiments_text import TIMES_ASKED
from helpers.results import Table, wrap


HEAD = """# Evidence

The articles about Engram promise that a memory lowers the loss at equal cost, that facts live in its tables, and more.
Here the promises are held against controls, mostly in models of a few million parameters, on text full of facts.
`scripts/experiments/report.py` writes this page from `scripts/experiments/results/`. No figure of a run and no verdict
is typed by hand.
"""
# arXiv 2601.07372, section 4.
PAPER_PARAMETERS, PAPER_TOKENS = 27e9, 262e9
MISLEADING = """## Three ways in which this page could mislead

1. **Size.** The paper's 27B models have {parameters} times the parameters of EngramMoE here, and read
   {tokens} times the tokens. What does not show here may show there, and the other way round.
2. **The text and the tuning.** Most of the text is dictionary articles of few words each, where short n-grams say much.
   Articles whose facts are asked for are read {times} times by the small models, all others once. The learning rate was
   chosen with one seed from rates that differ by a factor of two or more. A better one between them may favour one
   family.
3. **Intervals.** They are bootstraps over articles and say nothing of other seeds. Three seeds at most are too few to
   know that spread. With so many comparisons on one page, one in twenty clear ones is an accident.
"""


SECTIONS = {
    "controls": controls,
    "facts": facts,
    "rows": memory_sizes,
    "allocation": allocation,
    "ablations": ablations,
    "pretrained": pretrained,
    "depth": depth,
    "long": recall,
}


def section_of(experiment: Experiment, scale: str, results: Results) -> Section:
    return SECTIONS[experiment.name](scale, results)


def picture_of(experiment: Experiment) -> str:
    """Beside the page."""
    return f"evidence/{experiment.name}.png"


def progress_of(experiment: Experiment, scale: str, results: Results) -> str:
    """What is run, what is left and what it costs, with the command."""
    command = f"`python scripts/experiments/run.py {experiment.name}`"
    if experiment.name in MEASURES:
        names = [name_of(experiment.name, run) for run in measured_runs(scale)]
        done = [results[name] for name in names if name in results]
        spent = f" in {sum(run['cpu_hours'] for run in done):.2f} CPU hours" if done else ""
        return f"{len(done)} of {len(names)} models are measured{spent}, each after its run of `controls`: {command}."
    names = [run.name for run in runs_of(experiment, scale, results) if not run.is_tuning]
    done = [results[name] for name in names if name in results]
    count, hours = count_reported(experiment, scale, results), hours_of_run(experiment, scale)
    left = count - len(done)
    costs = f"; what is left takes about {left * hours:.1f} CPU hours" if left and hours is not None else ""
    spent = f" in {sum(run['cpu_hours'] for run in done):.2f} CPU hours" if done else ""
    return f"{len(done)} of {count} runs are finished{spent}{costs}: {command}."


def rendered_section(experiment: Experiment, scale: str, results: Results) -> str:
    section = section_of(experiment, scale, results)
    parts = [f"## {experiment.number}. {experiment.title}", wrap(f"The paper's claim: {experiment.claim}")]
    if section.verdict == NOT_RUN:
        parts.append("**Not finished.**" if section.files else "**Not run yet.**")
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
    for key in ("text", "steps", "threads", "matmul_precision"):
        values = {run[key] for run in runs}
        if len(values) > 1:
            raise ValueError(
                f"Runs of scale {scale} differ in {key}: {sorted(map(str, values))}. Remove those that do not belong, "
                "and run them again."
            )
    check_tuning(scale, runs, results)
    first = runs[0]
    tokens = sum(first["documents"]["tokens"])
    hours = sum(run["cpu_hours"] for run in results.values())
    articles = len(first["documents"]["tokens"])
    return (
        f"A run reads {first['tokens']:,} tokens in {first['steps']:,} steps, on {first['threads']} thread. "
        f"torch's `float32_matmul_precision` is {first['matmul_precision']}. Losses are "
        f"nats per token of the beginnings of {articles} held-out articles, {tokens:,} tokens. Text {first['text']}; "
        f"{made_by(runs)}. All runs of this page and their tuning took "
        f"{hours:.2f} CPU hours."
    )


def beside_paper(scale: str, results: Results) -> dict[str, str]:
    """How many times the parameters and the tokens of our reference the paper's models have."""
    run = results.get(Run(ENGRAM, 0, scale).name)
    if run is None:
        return {"parameters": "many", "tokens": "many"}
    parameters, tokens = PAPER_PARAMETERS / run["parameters"]["total"], PAPER_TOKENS / run["tokens"]
    return {"parameters": f"{round(parameters, -2):,.0f}", "tokens": f"{round(tokens, -3):,.0f}"}


def check_tuning(scale: str, runs: list[dict], results: Results) -> None:
    """
    Raises:
        ValueError: a run was trained at another rate than tuning chooses now, or tuning has read another text.
    """
    for arm in CONTROLS:
        names = names_of_tuning(arm.name, scale) if arm.name == arm.family else {}
        tuning = [name for name in names.values() if name in results]
        for name in tuning:
            if results[name]["text"] != runs[0]["text"]:
                raise ValueError(
                    f"{name} has read the text {results[name]['text']}, and runs have read {runs[0]['text']}. Remove "
                    "it, and run the experiment again."
                )
        rate = best_rate(names, results) if tuning and len(tuning) == len(names) else None
        for run in runs:
            if rate is not None and run["family"] == arm.name and run["learning_rate"] != rate:
                raise ValueError(
                    f"{run['name']} was trained at the rate {run['learning_rate']:g}, and tuning chooses {rate:g} now. "
                    "Remove it, and run its experiment again."
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
            rows.append([arm.title, *(each["loss"] for each in tried)])
    if not rows:
        return []
    columns = {"held-out loss of tuning": "", **{f"rate {rate:g}": ".3f" for rate in RATES}}
    return [Table(columns, rows).markdown()]


def rendered(results: Results, scale: str = "tiny") -> str:
    """The page.

    Raises:
        ValueError: runs do not belong together.
    """
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    tuning = (
        f"The learning rate of each family of models is the best of {rates} in runs of full length with seed "
        f"{TUNING_SEED}, which is not reported. Tables have five times the rate. On a CPU that can, matrix products "
        "take bfloat16 and add in float32, as mixed precision does on a GPU. All arms of a seed read the same tokens "
        "in the same order. A run with the same seed gives the same loss to the last digit on one thread, also "
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
        MISLEADING.strip().format(times=TIMES_ASKED, **beside_paper(scale, results)),
        *(rendered_section(experiment, scale, results) for experiment in EXPERIMENTS),
    ]
    return "\n\n".join(parts) + "\n"

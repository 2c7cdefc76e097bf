"""The experiments: held-out text stays apart, a killed run ends as it would have, the page is what the files give."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM


pytest.importorskip("datasets")

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
# Of a model that is smaller than those of the experiments.
FIELDS = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "moe_intermediate_size": 8,
    "n_routed_experts": 8, "engram_vocab_size": 211,
}  # fmt: skip
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    for folder in (SCRIPTS, SCRIPTS / "experiments"):
        monkeypatch.syspath_prepend(str(folder))


def in_base64(number: int) -> str:
    digits = BASE64[number % 64]
    while number := number // 64:
        digits = BASE64[number % 64] + digits
    return digits


def write_dictionary(folder: Path, name: str, articles: dict[str, str]) -> Path:
    """Files as `dictfmt` writes them: headwords, and the places of their articles."""
    content, lines = b"", ["00-database-info\tA\tB"]
    for headword, text in articles.items():
        own = text.encode()
        lines.append(f"{headword}\t{in_base64(len(content))}\t{in_base64(len(own))}")
        content += own
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(content))
    index = folder / f"{name}.index"
    index.write_text("\n".join(lines) + "\n")
    return index


WN = """koumiss
    n 1: a drink of milk; made by
         nomads [syn: {koumiss},
         {kumis}]
    v 1: drink it
"""
GCIDE = """Lapis \\La"pis\\, n.; pl. {Lapides}. [L.]
   A stone of C[ae]sar.
   [1913 Webster]

   {Lapis calaminaris} [NL.] (Min.) Calamine.
   [PJC]
"""
FOLDOC = "HSM\n\n   1. <storage> {Hierarchical Storage\n   Management}.\n\n   (2001-05-09)\n"
ELEMENTS = "\nhelium\nSymbol: He\nAtomic number: 2\nAtomic weight: 4.0026\nA gas.\nIt is\nlight.\n"
JARGON = "abend\n /a'bend/, n.\n\n    [ABnormal END] A {crash} of a\n    program.\n"


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("wn", WN, ("koumiss", ["a drink of milk; made by nomads", "drink it"])),
        (
            "gcide",
            GCIDE,
            ("Lapis", ["n.; pl. Lapides. A stone of Caesar.", "Lapis calaminaris [NL.] (Min.) Calamine."]),
        ),
        ("foldoc", FOLDOC, ("HSM", ["1. <storage> Hierarchical Storage Management."])),
        (
            "elements",
            ELEMENTS,
            ("helium", ["Symbol: He", "Atomic number: 2", "Atomic weight: 4.0026", "A gas. It is light."]),
        ),
        ("jargon", JARGON, ("abend", ["[ABnormal END] A crash of a program."])),
    ],
)
def test_an_article_loses_its_markup_and_nothing_else(name, text, expected, tmp_path):
    from helpers.dictionaries import CLEANERS, read_dictionary

    # The first article lies far behind, and two headwords share it.
    index = write_dictionary(tmp_path, name, {"first": "x" * 5000, "word": text})
    index.write_text(index.read_text() + index.read_text().splitlines()[-1].replace("word", "synonym") + "\n")
    articles = [tuple(article) for article in read_dictionary(index, CLEANERS[name])]
    assert articles[-1:] == [expected] and articles.count(expected) == 1


def test_a_damaged_dictionary_is_refused(tmp_path):
    from helpers.dictionaries import CLEANERS, read_dictionary

    index = write_dictionary(tmp_path, "wn", {"koumiss": WN})
    whole = index.read_text()
    for broken, message in (
        (whole + "lost\tBA\t9/\n", "names an article that ends at byte"),
        (whole + "lost\tB?\tB\n", "is no digit of base 64"),
        (whole + "lost\n", "A headword, an offset and a length must stand in it"),
    ):
        index.write_text(broken)
        with pytest.raises(ValueError, match=message):
            read_dictionary(index, CLEANERS["wn"])


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(count))


def some_entries(count: int = 600, seed: int = 0) -> list:
    """Entries of every kind, of which some copy sentences of others."""
    from helpers.knowledge import Entry

    draw = random.Random(seed)
    sentences = [words(draw, 12) for _ in range(count)]
    entries = []
    for number in range(count):
        parts = [words(draw, 10), draw.choice(sentences), words(draw, 3)]
        entries.append(Entry("gcide", words(draw, 1), parts))
        entries.append(Entry("wn", words(draw, 1), [f"{words(draw, 9)}"]))
        letters = "".join(draw.choices("ABCDEFG", k=3))
        expansion = " ".join(letter + words(draw, 1) for letter in letters)
        entries.append(Entry("foldoc", letters, [f"<topic> {expansion}. {words(draw, 6)}"]))
        if number < 100:
            facts = [f"Symbol: {words(draw, 1)[:2].title()}", f"Atomic number: {number}"]
            entries.append(Entry("elements", words(draw, 1), [*facts, words(draw, 8)]))
    return entries


def test_held_out_articles_share_no_eight_words_with_those_that_are_trained_on():
    from helpers.knowledge import drop_repeated, split_entries

    train, held_out = split_entries(drop_repeated(some_entries()))
    assert len(held_out) > 40 and len(train) > 5 * len(held_out)
    trained = " | ".join(" ".join(re.findall(r"\w+", entry.text.lower())) for entry in train)
    for entry in held_out:
        own = re.findall(r"\w+", entry.text.lower())
        assert not any(" ".join(own[start : start + 8]) in trained for start in range(len(own) - 7)), entry
    names = {entry.name.lower() for entry in train}
    assert not any(entry.name.lower() in names for entry in held_out if entry.source != "elements")


def test_a_sense_that_synonyms_share_is_trained_on_once():
    from helpers.knowledge import Entry, drop_repeated

    sense = "a drink that nomads of the steppe make of the milk of mares"
    first, second = Entry("wn", "koumiss", [sense, "short"]), Entry("wn", "kumis", [sense, "short"])
    assert [(entry.name, entry.parts) for entry in drop_repeated([first, second])] == [("koumiss", [sense, "short"])]


def test_a_fact_is_asked_in_the_words_of_its_article_and_never_of_one_that_is_not_there():
    from helpers.knowledge import choose_facts, drop_repeated, split_entries

    train, held_out = split_entries(drop_repeated(some_entries()))
    for entries in (train, held_out):
        facts = choose_facts(entries)
        assert {fact.kind for fact in facts} == {"definition", "acronym", "symbol", "number"}
        texts = {entry.text for entry in entries if entry.is_asked}
        for fact in facts:
            said = fact.prompt + fact.choices[fact.answer]
            assert any(text.startswith(said) for text in texts), fact
            assert len(set(fact.choices)) == 4
            assert not any(
                text.startswith(fact.prompt + wrong)
                for text in texts
                for wrong in fact.choices
                if wrong != fact.choices[fact.answer] and (fact.prompt + wrong) in texts
            )


def follow(prompt: str) -> str:
    """The answer to a question about variables, by doing what the lines say."""
    known: dict[str, str] = {}
    *lines, asked = prompt.split("\n")
    for line in lines:
        name, _, value = line.partition(" = ")
        known[name] = known.get(value, value)
    return known[asked.removesuffix(" =")]


def test_every_answer_to_a_reading_question_stands_in_its_prompt_beside_the_wrong_ones():
    from helpers.knowledge import choose_reading, drop_repeated, split_entries

    _, held_out = split_entries(drop_repeated(some_entries(2000)))
    for entry in held_out[:40]:
        # Words as the questions want them.
        entry.name = entry.name[:6]
    facts = choose_reading(held_out)
    assert {fact.kind for fact in facts} == {"needle", "variables", "copying", "given"}
    for fact in facts:
        right = fact.choices[fact.answer].strip()
        assert all(choice.strip() in fact.prompt for choice in fact.choices) and len(set(fact.choices)) == 4
        if fact.kind == "variables":
            assert follow(fact.prompt) == right
        else:
            # The text before the answer is asked again at the end.
            last = fact.prompt.split("\n")[-1]
            assert f"{last} {right}" in fact.prompt[: -len(last)], fact


def gather(*arguments) -> None:
    import gather_knowledge

    old, sys.argv = sys.argv, ["gather_knowledge.py", *map(str, arguments)]
    try:
        gather_knowledge.main()
    finally:
        sys.argv = old


@pytest.fixture
def notes(tmp_path) -> Path:
    draw = random.Random(1)
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(150):
        (folder / f"{number:03}.txt").write_text("\n\n".join(words(draw, 30) for _ in range(3)))
    return folder


def test_any_data_set_becomes_a_corpus_the_same_at_each_time(notes, tmp_path, capsys):
    gather("--dataset", notes, "--output", tmp_path / "a")
    printed = capsys.readouterr().out
    gather("--dataset", notes, "--output", tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["files"]["train.jsonl"] in printed and "characters" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "notes"]


def test_gathering_that_fails_leaves_the_earlier_corpus(notes, tmp_path, monkeypatch):
    import gather_knowledge

    gather("--dataset", notes, "--output", tmp_path / "a")
    before = (tmp_path / "a" / "train.jsonl").read_bytes()

    def fail(*_):
        raise ValueError("the disk is full")

    monkeypatch.setattr(gather_knowledge, "sizes", fail)
    with pytest.raises(SystemExit, match="the disk is full"):
        gather("--dataset", notes, "--output", tmp_path / "a")
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "notes"]
    with pytest.raises(SystemExit, match="holds files of something else"):
        gather("--dataset", notes, "--output", notes)


@pytest.fixture
def base(tmp_path, tokenizer) -> Path:
    """A folder with a stock model without a memory, and its tokenizer."""
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **fields)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def text(notes, tmp_path, monkeypatch):
    """Four steps of text, for models that are smaller than those of the experiments."""
    from helpers import experiments
    from helpers.experiments_text import prepare

    monkeypatch.setitem(experiments.SCALES, "tiny", experiments.Scale("tiny", 4 * 2048, FIELDS))
    gather("--dataset", notes, "--output", tmp_path / "knowledge")
    made = prepare(4 * 2048, 600, tmp_path / "knowledge")
    made.most_tokens, made.held_out = 4 * 2048, made.held_out[:8]
    return made


def test_every_arm_reads_the_same_tokens_and_a_second_call_reads_what_was_kept(text, tmp_path):
    from helpers.experiments_text import prepare

    again = prepare(4 * 2048, 600, tmp_path / "knowledge")
    assert torch.equal(again.train.ids, text.train.ids) and again.digest == text.digest
    assert text.train.ids.shape[1] == 128


def test_every_arm_makes_a_model_that_reads_the_text(text, tmp_path):
    from helpers.experiment_runs import Run, build
    from helpers.experiments import EXPERIMENTS

    arms = {arm.name: arm for experiment in EXPERIMENTS for arm, _ in experiment.runs}
    ids = torch.as_tensor(text.train.ids[:1], dtype=torch.int64)
    for arm in arms.values():
        with torch.no_grad():
            loss = build(Run(arm, 0), text, tmp_path / arm.name)(ids, labels=ids).loss
        assert 0 < float(loss) < 20, arm.name


def score_of(model, tokenizer, question: dict) -> int:
    """The place of the likeliest choice by its letters, token by token."""
    found = []
    for choice in question["choices"]:
        ids = tokenizer(question["prompt"] + choice, return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(question["prompt"], add_special_tokens=False)["input_ids"])
        scores = model(ids).logits[0].log_softmax(-1)
        total = sum(float(scores[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
        found.append(total / len(choice))
    return max(range(len(found)), key=found.__getitem__)


@torch.no_grad()
def test_a_question_is_answered_by_the_likeliest_letters(tokenizer):
    from helpers.known_answers import score

    model = tiny_model(tiny_config(vocab_size=len(tokenizer)))
    draw = random.Random(3)
    questions = []
    for number in range(12):
        choices = [" " + words(draw, draw.randrange(1, 4)) for _ in range(4)]
        questions.append({"kind": f"k{number % 2}", "prompt": words(draw, 4), "choices": choices, "answer": number % 4})
    expected: dict[str, str] = {}
    for question in questions:
        is_right = score_of(model, tokenizer, question) == question["answer"]
        expected[question["kind"]] = expected.get(question["kind"], "") + str(int(is_right))
    assert score(model, tokenizer, questions) == expected
    assert {digit for digits in expected.values() for digit in digits} == {"0", "1"}


@torch.no_grad()
def test_choices_have_the_losses_of_rows_that_are_read_whole(tokenizer):
    from helpers.known_answers import losses_of_choices, rows_of_question

    from engram_hf.insight.text_rows import losses_of_rows

    model = tiny_model(tiny_config(vocab_size=len(tokenizer)))
    draw = random.Random(4)
    # Tokens of a choice may have the first ones of all choices in common, and be one alone.
    for choices in ([" a b c", " a b", " a d", " a"], [" x", " y", " z", " w"]):
        question = {"kind": "k", "prompt": words(draw, 5), "choices": choices, "answer": 0}
        rows = rows_of_question(tokenizer, question)
        torch.testing.assert_close(losses_of_choices(model, rows), losses_of_rows(model, rows)[0], rtol=1e-5, atol=1e-5)


def train_in(folder: Path, text, arm_name: str, dies_at: int | None = None, monkeypatch=None, best: float = 4e-3):
    """Train an arm in a folder of its own; optionally stop it at a step, as a kill does."""
    from helpers import experiment_runs
    from helpers.experiments import CONTROLS, MEMORY_SIZES, ON_DISK

    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for family in ("engram", "moe", "dense"):
        for rate in experiment_runs.RATES:
            name = f"tiny-tuning-{family}-{rate:g}.json"
            (results / name).write_text(json.dumps({"loss": abs(rate - best)}))
    arms = [*CONTROLS, MEMORY_SIZES[-1], ON_DISK]
    arm = next(arm for arm in arms if arm.name == arm_name)
    run = experiment_runs.Run(arm, 0)
    if dies_at is None:
        return experiment_runs.train(run, text, folder, results)

    def die(self, args, state, control, **kwargs):
        if state.global_step == dies_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment_runs.CpuSeconds, "on_step_begin", die, raising=False)
        with pytest.raises(KeyboardInterrupt):
            experiment_runs.train(run, text, folder, results)
    assert not (results / f"{run.name}.json").exists()
    # A kill in the middle of a save leaves a checkpoint without its last file.
    broken = folder / "runs" / f"{run.name}-{text.digest}-0.004" / "checkpoint-99"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')


def test_a_rerun_and_a_run_that_was_killed_give_the_same_loss_to_the_last_digit(text, tmp_path, monkeypatch):
    from helpers import experiment_runs

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train_in(tmp_path / "whole", text, "shuffled-hash")
        train_in(tmp_path / "killed", text, "shuffled-hash", 3, monkeypatch)
        begun: list[int] = []
        record = lambda self, args, state, control, **kwargs: begun.append(state.global_step)  # noqa: E731
        monkeypatch.setattr(experiment_runs.CpuSeconds, "on_step_begin", record, raising=False)
        killed = train_in(tmp_path / "killed", text, "shuffled-hash")
    finally:
        torch.set_num_threads(threads)
    # It went on from the checkpoint of the second step.
    assert begun == [2, 3]
    assert killed["loss"] == whole["loss"] and killed["documents"] == whole["documents"]
    assert killed["curve"] == whole["curve"] and len(whole["curve"]) == 4
    assert whole["steps"] == 4 and whole["learning_rate"] == 4e-3 and whole["cpu_hours"] > 0
    # The second call reads the file of the first.
    assert train_in(tmp_path / "whole", text, "shuffled-hash") == whole


def test_a_run_that_began_at_another_rate_begins_anew(text, tmp_path, monkeypatch):
    from helpers import experiment_runs

    train_in(tmp_path, text, "moe", 3, monkeypatch)
    begun: list[int] = []
    record = lambda self, args, state, control, **kwargs: begun.append(state.global_step)  # noqa: E731
    monkeypatch.setattr(experiment_runs.CpuSeconds, "on_step_begin", record, raising=False)
    content = train_in(tmp_path, text, "moe", best=1e-3)
    assert begun == [0, 1, 2, 3] and content["learning_rate"] == 1e-3


# Trains 60 steps as run.py does, of a corpus and in a folder of its own.
SLOW_RUN = """
import json, sys
from pathlib import Path
import torch
from helpers import experiment_runs, experiments
from helpers.experiments_text import prepare

torch.set_num_threads(1)
knowledge, folder, fields = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
experiments.SCALES["tiny"] = experiments.Scale("tiny", 60 * 2048, fields)
text = prepare(60 * 2048, 600, knowledge)
text.train.ids, text.held_out = text.train.ids.repeat(16, 1)[: 60 * 16], text.held_out[:8]
run = experiment_runs.Run(experiments.ENGRAM, 0)
experiment_runs.train(run, text, folder, folder / "results")
"""


@pytest.mark.slow
def test_a_run_that_the_system_kills_twice_ends_with_the_same_digits(notes, tmp_path):
    from helpers.experiment_runs import RATES

    gather("--dataset", notes, "--output", tmp_path / "knowledge")
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPTS}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW_RUN, str(tmp_path / "knowledge")]
    for name in ("whole", "killed"):
        (tmp_path / name / "results").mkdir(parents=True)
        for rate in RATES:
            path = tmp_path / name / "results" / f"tiny-tuning-engram-{rate:g}.json"
            path.write_text(json.dumps({"loss": abs(rate - 4e-3)}))
    result = "results/tiny-engram-seed0.json"
    subprocess.run([*command, str(tmp_path / "whole"), json.dumps(FIELDS)], env=environment, check=True)
    for step in (8, 32):
        process = subprocess.Popen([*command, str(tmp_path / "killed"), json.dumps(FIELDS)], env=environment)
        while not list((tmp_path / "killed").glob(f"runs/*/checkpoint-{step}")):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (tmp_path / "killed" / result).exists()
    last = [*command, str(tmp_path / "killed"), json.dumps(FIELDS)]
    shown = subprocess.run(last, env=environment, check=True, capture_output=True, text=True).stdout
    # Checkpoint 32 may not have been whole. The one before is of step 28.
    assert "step 60 of 60" in shown and "step 20 of 60" not in shown, shown
    whole, killed = (json.loads((tmp_path / name / result).read_text()) for name in ("whole", "killed"))
    assert whole["steps"] == 60 and len(whole["curve"]) == 30
    assert (killed["loss"], killed["documents"], killed["curve"]) == (whole["loss"], whole["documents"], whole["curve"])


def test_a_table_on_disk_learns_what_a_table_in_memory_learns_also_after_a_kill(text, tmp_path, monkeypatch):
    memory = train_in(tmp_path / "memory", text, "rows-10x")
    train_in(tmp_path / "disk", text, "rows-10x-disk", 3, monkeypatch)
    disk = train_in(tmp_path / "disk", text, "rows-10x-disk")
    assert disk["loss"] == memory["loss"] and disk["curve"] == memory["curve"]
    assert set(disk["memory"]) == {"limit_bytes", "own_bytes"} and "memory" not in memory
    left = {path.name for path in (tmp_path / "disk" / "runs").rglob("*")}
    assert not left & {"start", "work", "checkpoint-2"}


# Takes so many bytes, and says what it was given.
TAKES_MEMORY = """
import sys
from helpers.memory_limit import MemoryWatch, own_limits

with MemoryWatch() as memory:
    taken = b"1" * int(sys.argv[1])
    memory.ended.wait(0.1)
print(min(limit for limit, _ in own_limits()), memory.most_bytes)
"""


def test_a_process_within_a_limit_knows_it_and_is_killed_beyond_it():
    from helpers.memory_limit import bytes_of, memory_cgroup

    if bytes_of("/proc/meminfo", "SwapTotal"):
        pytest.skip("what is beyond the limit would be swapped")
    limit, environment = 2**28, {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    with memory_cgroup(limit) as before:
        if not before:
            pytest.skip("no memory cgroup can be made here")
        command = [*before, sys.executable, "-c", TAKES_MEMORY]
        ran = subprocess.run([*command, f"{limit // 2}"], env=environment, check=True, capture_output=True, text=True)
        known, most = map(int, ran.stdout.split())
        assert known == limit and limit // 2 < most < limit
        assert subprocess.run([*command, f"{2 * limit}"], env=environment).returncode == -signal.SIGKILL


def test_the_page_says_what_of_a_table_on_disk_could_be_in_memory():
    from helpers.evidence_sizes import beside_disk

    twin = {"loss": 4.0, "parameters": {"tables": 10_000_000}}
    memory = {"limit_bytes": 2_000_000_000, "own_bytes": 1_940_000_000}
    results = {"tiny-rows-10x-seed0": twin, "tiny-rows-10x-disk-seed0": {**twin, "memory": memory}}
    (said,) = beside_disk("tiny", results)
    assert "the same to the last digit" in said
    assert "60 MB were left for files" in said.replace("\n", " ") and "need 120 MB." in said.replace("\n", " ")
    # None at all, and one that is far above what is needed.
    for limit in (None, 2_100_000_000):
        memory["limit_bytes"] = limit
        (said,) = beside_disk("tiny", results)
        assert said.replace("\n", " ").endswith("The table had no limit of memory.")


def test_a_run_with_its_table_on_disk_is_started_within_its_limit(tmp_path, monkeypatch):
    import contextlib

    import run as script
    from helpers.experiment_runs import Run
    from helpers.experiments import ENGRAM, ON_DISK
    from helpers.memory_limit import memory_cgroup

    with memory_cgroup(2**30) as before:
        if not before:
            pytest.skip("no memory cgroup can be made here")
    # In place of the script, one that writes which limits it has.
    asked = tmp_path / "asked.py"
    asked.write_text(
        "import sys\nfrom pathlib import Path\nfrom helpers.memory_limit import own_limits\n"
        f"Path({str(tmp_path)!r}, sys.argv[-1]).write_text(str([limit for limit, _ in own_limits()]))\n"
    )
    monkeypatch.setattr(script, "__file__", str(asked))
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    with contextlib.ExitStack() as limits:
        for arm in (ENGRAM, ON_DISK):
            assert script.start(Run(arm, 0), "tiny", tmp_path, limits).wait() == 0
    limit = 2_000_000_000 // os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PAGE_SIZE")
    assert str(limit) in (tmp_path / "tiny-rows-10x-disk-seed0").read_text()
    assert str(limit) not in (tmp_path / "tiny-engram-seed0").read_text()


def test_a_pretrained_model_learns_in_three_ways_and_each_is_measured(base, notes, tmp_path, monkeypatch):
    from helpers import pretrained_runs
    from helpers.pretrained_runs import BASE, RATES, PretrainedRun, train_pretrained

    gather("--dataset", notes, "--output", tmp_path / "knowledge")
    held_out = tmp_path / "knowledge" / "held_out.jsonl"
    # Some of what is held out is code.
    lines = held_out.read_text().splitlines()
    held_out.write_text("\n".join([*lines, *(line.replace('"dataset"', '"python"') for line in lines[:3])]) + "\n")
    question = {"kind": "given", "prompt": "abc", "choices": [" a", " b", " c", " d"], "answer": 1}
    for task in ("facts_trained", "facts_held_out", "reading"):
        (tmp_path / "knowledge" / f"{task}.jsonl").write_text(json.dumps(question) + "\n")
    monkeypatch.setitem(pretrained_runs.ADDED["memory"], "layer_ids", [1])
    monkeypatch.setattr(pretrained_runs, "STEPS", 3)
    found = {}
    for way in (BASE, *RATES):
        for rate in RATES.get(way, ()):
            name = PretrainedRun(way, 1000, rate).name
            (tmp_path / "results").mkdir(exist_ok=True)
            (tmp_path / "results" / f"{name}.json").write_text(json.dumps({"loss": rate}))
        run = PretrainedRun(way, 0)
        found[way] = train_pretrained(run, tmp_path / "knowledge", tmp_path, tmp_path / "results", base)
    losses = {way: (content["loss"], content["other"]["loss"]) for way, content in found.items()}
    assert len(set(losses.values())) == 4
    assert found["base"]["steps"] == 0 and found["memory"]["learning_rate"] == RATES["memory"][0]
    assert [step for step, _ in found["lora"]["curve"]] == [1, 2, 3] and found["base"]["curve"] == []
    assert found["memory"]["config"]["added"]["layer_ids"] == [1] and found["full"]["config"]["added"] == {}
    learning = {way: content["learning"] for way, content in found.items()}
    assert learning["lora"] < learning["full"] == learning["base"]
    assert set(found["memory"]["answers"]["reading"]) == {"on", "silenced"} and set(
        found["lora"]["answers"]["reading"]
    ) == {"on"}
    from helpers.evidence_page import SECTIONS

    tuning = {PretrainedRun("lora", 1000, rate).name: {"loss": loss} for rate, loss in zip(RATES["lora"], (3, 2, 4))}
    tuning[PretrainedRun("full", 1000, RATES["full"][0]).name] = {"loss": 5}
    section = SECTIONS["pretrained"]("tiny", {**tuning, **{content["name"]: content for content in found.values()}})
    assert f"{found['lora']['loss']:.4f}" in section.parts[1] and len(section.files) == 4
    compared = section.parts[2].replace("\n", " ")
    for name, key in (("the difference of losses is", "documents"), ("of the code:", "other")):
        loss = {
            way: sum(found[way][key]["nats"]) / sum(found[way][key]["tokens"]) for way in ("memory", "lora", "full")
        }
        for way in ("lora", "full"):
            assert f"{name} {loss['memory'] - loss[way]:+.4f} (" in compared
    said = section.parts[3].replace("\n", " ")
    assert "all projections: 3.000 at 0.001, 2.000 at 0.002, 4.000 at 0.004;" in said
    assert "all parameters: 5.000 at 2e-05 (the best is at the edge)." in said and "none yet" in said


# Long context.


def answers_by_reading(ids: list[int]) -> list[tuple[int, int, int]]:
    """The place, the value and the hops of each answer, by doing what the row says, word by word."""
    known: dict[int, tuple[int, int]] = {}
    found, place = [], 0
    while place < len(ids):
        word = ids[place]
        if word == 1:
            name, said = ids[place + 1 : place + 3]
            assert name not in known
            value, hops = known.get(said, (said, -1))
            known[name] = (value, hops + 1)
            place += 3
        elif word == 2:
            found.append((place + 2, *known[ids[place + 1]]))
            place += 3
        else:
            # A phrase goes on as it always does.
            assert word >= 72 and word % 4 == 0 and ids[place : place + 4] == list(range(word, word + 4))
            place += 4
    return found


@pytest.mark.parametrize("kind, hops", [("needles", {0}), ("variables", {0, 1, 2})])
@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("is_asked_at_end", [False, True])
def test_a_row_of_the_made_up_language_asks_what_it_has_said(kind, hops, length, is_asked_at_end):
    from helpers.recall_task import make_row

    seen, counts = set(), set()
    for seed in range(20):
        row = make_row(kind, length, random.Random(seed), is_asked_at_end)
        ids, labels = row.ids.tolist(), row.labels.tolist()
        assert len(ids) == len(labels) == length
        found = answers_by_reading(ids)
        assert row.hops == [hop for _, _, hop in found] and set(row.hops) <= hops
        expected = [-100] * length
        for place, value, _ in found:
            assert ids[place] == value and 40 <= value < 72
            expected[place] = value
        assert labels == expected
        if is_asked_at_end:
            asked = ids[-36:]
            assert asked[::3] == [2] * 12 and len(set(asked[1::3])) == 12 and len(found) == 12
        else:
            # As many as are left beside whole phrases.
            assert 0 <= len(found) - length * 40 // 256 < 4
        again = make_row(kind, length, random.Random(seed), is_asked_at_end)
        assert torch.equal(row.ids, again.ids)
        seen.add(tuple(ids))
        # They lie anywhere in the row, not at its beginning.
        said = [place for place, word in enumerate(ids) if word == 1]
        assert said[0] == 0 and said[-1] > length / 4
        counts.add(len(said))
    assert len(seen) == 20 and counts == ({12} if is_asked_at_end else {3, 6, 9, 12})


def test_rows_of_other_kinds_and_lengths_are_refused():
    from helpers.recall_task import make_row

    with pytest.raises(ValueError, match="There is no task 'hay'. Tasks are needles, variables."):
        make_row("hay", 256, random.Random(0), True)
    with pytest.raises(ValueError, match="A row of 60 tokens has no room"):
        make_row("needles", 60, random.Random(0), True)


@torch.no_grad()
def test_an_answer_counts_where_the_likeliest_token_before_it_is_the_answer(monkeypatch):
    from helpers import recall_runs

    monkeypatch.setattr(recall_runs, "ASKED_ROWS", 4)

    class Knows(torch.nn.Module):
        """Right about every answer to a row of needles, and wrong about all others."""

        device = torch.device("cpu")

        def forward(self, ids):
            scores = torch.zeros(*ids.shape, 256)
            for place, value, hops in answers_by_reading(ids[0].tolist()):
                scores[0, place - 1, value if hops == 0 else 3] = 1.0
            return SimpleNamespace(logits=scores)

    found = recall_runs.answers(Knows(), 256)
    rows = recall_runs.RecallRows("asked", 4, 256, are_asked_at_end=True)
    hops = [hop for index in (1, 3) for _, _, hop in answers_by_reading(rows[index]["input_ids"].tolist())]
    assert found == {"needles": "1" * 24, "variables": "".join("1" if hop == 0 else "0" for hop in hops)}


@pytest.fixture
def short_recall(monkeypatch, tmp_path):
    """A run of few steps, for a small model, whose family is tuned already."""
    from helpers import experiment_runs, experiments, recall_runs

    monkeypatch.setitem(experiments.SCALES, "tiny", experiments.Scale("tiny", 0, FIELDS))
    sizes = {"STEPS": 4, "LONG_STEPS": 4, "ROWS": 2, "LONG_ROWS": 1, "ASKED_ROWS": 2}
    for name, value in {**sizes, "EXTENDED": 512, "LENGTHS": (256, 512)}.items():
        monkeypatch.setattr(recall_runs, name, value)
    (tmp_path / "results").mkdir()
    for rate in experiment_runs.RATES:
        (tmp_path / "results" / f"tiny-tuning-engram-{rate:g}.json").write_text(json.dumps({"loss": abs(rate - 2e-3)}))
    return recall_runs


def test_a_run_on_long_context_goes_on_after_a_kill_in_its_long_rows(short_recall, tmp_path, monkeypatch):
    from helpers.experiment_runs import CpuSeconds
    from helpers.experiments import ENGRAM

    results = tmp_path / "results"
    run = short_recall.RecallRun(ENGRAM, 0)
    whole = short_recall.train_recall(run, tmp_path / "a", results)
    assert whole["learning_rate"] == 2e-3 and len(whole["curve"]) == len(whole["long_curve"]) == 4
    (results / f"{run.name}.json").unlink()

    def die(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.per_device_train_batch_size == short_recall.LONG_ROWS:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CpuSeconds, "on_step_begin", die, raising=False)
        with pytest.raises(KeyboardInterrupt):
            short_recall.train_recall(run, tmp_path / "b", results)
    killed = short_recall.train_recall(run, tmp_path / "b", results)
    of_time = ("cpu_hours",)
    assert {**killed, **dict.fromkeys(of_time)} == {**whole, **dict.fromkeys(of_time)}
    assert not [path for path in (tmp_path / "b").rglob("*") if "checkpoint" in path.name]
    by_way = whole["right"]
    assert set(by_way) == {"as trained", "YaRN", "YaRN, trained on long rows"}
    assert set(by_way["YaRN"]) == {"256", "512"} and len(by_way["YaRN"]["512"]["needles"]) == 12


@torch.no_grad()
def test_extending_changes_positions_and_no_weight(short_recall, tmp_path):
    from helpers.experiments import ENGRAM
    from transformers import AutoModelForCausalLM

    from engram_hf import EngramMoEForCausalLM

    model = EngramMoEForCausalLM(short_recall.config_of(ENGRAM)).eval()
    longer = short_recall.extended(model).eval()
    assert all(torch.equal(own, longer.state_dict()[name]) for name, own in model.state_dict().items())
    model.save_pretrained(tmp_path / "model")
    # As a user extends a model.
    rope = {**short_recall.YARN, "rope_theta": model.config.rope_parameters["rope_theta"]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", rope_parameters=rope)
    ids = short_recall.RecallRows("any", 1, 512)[0]["input_ids"][None]
    assert torch.equal(longer(ids).logits, loaded(ids).logits)
    assert not torch.equal(longer(ids).logits, model(ids).logits)


# Pages.


def made_results(
    seeds: int = 3, gain: float = 0.02, bend: float = 1.0, best: float = 0.77, bend_of_rows: float = 0.0
) -> dict[str, dict]:
    """Results of all experiments: EngramMoE is better by `gain`, more rows are better, and shares make a U.

    bend, best: how deep the U is, and the share where it is lowest. bend_of_rows: less is gained with each further row.
    """
    from helpers.experiment_measures import ON, SILENT, name_of
    from helpers.experiment_runs import Run
    from helpers.experiments import ALLOCATIONS, ENGRAM, EXPERIMENTS, MEMORY_SIZES, MOE, ROW_FACTORS, SHARES

    draw = np.random.default_rng(0)
    tokens = draw.integers(16, 128, 60)
    of_articles = 4 * tokens + draw.normal(0, 20, 60)
    found = {}
    for experiment in EXPERIMENTS:
        for arm, seed in experiment.runs:
            if seed >= seeds:
                continue
            loss = 0.01 * seed + (0 if arm is ENGRAM else gain)
            if arm in MEMORY_SIZES:
                place = np.log10(ROW_FACTORS[MEMORY_SIZES.index(arm)])
                loss = 0.01 * seed - 0.03 * place + bend_of_rows * place**2
            elif arm in ALLOCATIONS:
                # As high as the MoE at a share of 1.
                loss += bend * ((SHARES[ALLOCATIONS.index(arm)] - best) ** 2 - (1 - best) ** 2)
            nats = of_articles + tokens * loss + draw.normal(0, 0.05, 60)
            run = Run(arm, seed)
            found[run.name] = {
                "name": run.name, "arm": arm.name, "family": arm.family, "seed": seed, "learning_rate": 4e-3,
                "steps": 5, "tokens": 9, "text": "t", "threads": 1, "matmul_precision": "medium", "curve": [[1, 5.0]],
                "parameters": {"total": 1, "active": 1, "tables": 1},
                "loss": float(nats.sum() / tokens.sum()), "cpu_hours": 0.25, "hardware": "h", "commit": "c",
                "versions": {"torch": "2"}, "documents": {"nats": nats.tolist(), "tokens": tokens.tolist()},
            }  # fmt: skip
            if arm.is_on_disk:
                found[run.name]["memory"] = {"limit_bytes": None, "own_bytes": 1}
            if arm in (ENGRAM, MOE):
                shares = {ON: {"facts_trained": "1110" * 50, "reading": "1010" * 50, "facts_held_out": "1000" * 50}}
                if arm is ENGRAM:
                    shares[SILENT] = {**shares[ON], "facts_trained": "1000" * 45 + "1100" * 5}
                answers = {task: {name: {"kind": own[task]} for name, own in shares.items()} for task in shares[ON]}
                name = name_of("facts", run)
                found[name] = {"name": name, "answers": answers, "cpu_hours": 0.01}
    return found


def uneven(results: dict[str, dict]) -> dict[str, dict]:
    """The sign of every difference to EngramMoE turns with the seed."""
    for content in results.values():
        if content.get("arm") == "engram" and content["seed"] == 1:
            documents = content["documents"]
            documents["nats"] = [nats + 0.08 * tokens for nats, tokens in zip(*documents.values())]
            content["loss"] += 0.08
    return results


def test_verdicts_follow_the_figures():
    from helpers.evidence_page import section_of
    from helpers.evidence_sections import FAILS, HOLDS, HOLDS_BENT, NOT_RUN, OPEN, TOO_FEW
    from helpers.experiments import EXPERIMENTS

    experiments = {experiment.name: experiment for experiment in EXPERIMENTS}

    def here(name: str, results: dict) -> str:
        return section_of(experiments[name], "tiny", results).here

    def verdict(name: str, results: dict) -> str:
        return section_of(experiments[name], "tiny", results).verdict

    good = made_results()
    assert [verdict(name, good) for name in ("controls", "facts", "rows", "allocation")] == [HOLDS] * 4
    assert "-0.03" in here("rows", good) and "bends" not in here("rows", good)
    bent = made_results(bend_of_rows=0.01)
    assert verdict("rows", bent) == HOLDS_BENT and "bends up: -0.040 from 0.1 to 1 times, -0.020" in here("rows", bent)
    assert verdict("controls", made_results(gain=-0.02)) == FAILS
    assert verdict("controls", uneven(made_results())) == OPEN
    assert verdict("controls", made_results(seeds=1)) == verdict("facts", made_results(seeds=1)) == TOO_FEW
    assert verdict("allocation", made_results(bend=0.0)) == OPEN
    assert verdict("allocation", made_results(bend=-1.0)) == FAILS
    assert "a U with its minimum at 77%" in here("allocation", good)
    # A U that is lowest elsewhere, one that goes on falling, and one whose lowest runs are hardly lower.
    assert verdict("allocation", made_results(best=0.5)) == verdict("allocation", made_results(best=0.1)) == FAILS
    falling = here("allocation", made_results(best=0.1))
    assert falling.startswith("no U: the loss is lowest at 20%") and falling.endswith("lower than at 80% and 70%")
    assert verdict("allocation", made_results(best=0.5, bend=0.001)) == OPEN
    swapped = made_results()
    for content in swapped.values():
        if "answers" in content:
            tasks = content["answers"]
            tasks["facts_trained"], tasks["reading"] = tasks["reading"], tasks["facts_trained"]
    assert verdict("facts", swapped) == FAILS
    assert {verdict(name, {}) for name in experiments} == {NOT_RUN}


def test_the_order_of_ablations_needs_all_of_them_and_a_second_seed_of_the_largest():
    from helpers.evidence_arms import PAPER_ABLATIONS, verdict_of_order
    from helpers.evidence_sections import FAILS, HOLDS, OPEN, TOO_FEW, UNFINISHED
    from helpers.evidence_statistics import Interval

    names = list(PAPER_ABLATIONS)

    def verdict(values: list[float], reach: float = 0.001, seeds_of_largest: int = 2) -> str:
        lost = {name: Interval(value, value - reach, value + reach) for name, value in zip(names, values)}
        seeds = dict.fromkeys(names, 1)
        seeds[names[values.index(max(values))]] = seeds_of_largest
        return verdict_of_order(lost, seeds)

    assert verdict([0.05, 0.04, 0.03, 0.02, 0.01]) == HOLDS
    assert verdict([0.05, 0.04, 0.03, 0.01, 0.02]) == FAILS
    assert verdict([0.01, 0.04, 0.03, 0.02, 0.05]) == FAILS
    assert verdict([0.05, 0.04, 0.03, 0.02, 0.02]) == OPEN
    assert verdict([0.05, 0.04, 0.03, 0.02, 0.01], reach=0.02) == OPEN
    assert verdict([0.05, 0.04, 0.03, 0.02, 0.01], seeds_of_largest=1) == TOO_FEW
    assert verdict([0.05, 0.04, 0.03, 0.02]) == UNFINISHED


def test_the_arms_that_differ_most_get_a_second_seed_when_all_others_are_finished():
    from helpers.experiment_plan import count_reported, runs_of
    from helpers.experiments import EXPERIMENTS

    ablations = next(experiment for experiment in EXPERIMENTS if experiment.name == "ablations")
    results = made_results()
    results["tiny-layer-2-seed0"]["loss"] -= 0.3
    results["tiny-no-gate-seed0"]["loss"] += 0.2
    reported = [run.name for run in runs_of(ablations, "tiny", results) if not run.is_tuning]
    assert reported[9:] == ["tiny-layer-2-seed1", "tiny-no-gate-seed1"] and count_reported(ablations, "tiny", {}) == 11
    for missing in ("tiny-engram-seed0", "tiny-no-gate-seed0"):
        left = {name: content for name, content in results.items() if name != missing}
        assert sum(not run.is_tuning for run in runs_of(ablations, "tiny", left)) == 9


MADE_BY = {"hardware": "h", "versions": {"torch": "2"}, "commit": "c"}


def recall_results(shares: dict[str, tuple[float, float]], seeds: int = 2) -> dict[str, dict]:
    """Runs on long context, with the shares of right answers at the trained length and in long rows."""
    from helpers.recall_runs import LENGTHS
    from helpers.recall_task import KINDS

    found = {}
    for arm, (short, long) in shares.items():
        for seed in range(seeds):
            draw = random.Random(seed)
            chances = {length: short if length == LENGTHS[0] else long for length in LENGTHS}
            right = {
                way: {
                    f"{length}": {kind: "".join(str(int(draw.random() < chance)) for _ in range(300)) for kind in KINDS}
                    for length, chance in chances.items()
                }
                for way in ("as trained", "YaRN", "YaRN, trained on long rows")
            }
            name = f"recall-{arm}-seed{seed}"
            found[name] = {"name": name, "right": right, "learning_rate": 1e-3, "cpu_hours": 0.2, **MADE_BY}
    return found


def test_long_rows_say_something_of_models_that_have_learned_short_ones():
    from helpers.evidence_recall import recall
    from helpers.evidence_sections import FAILS, HOLDS, NOT_RUN, OPEN, TOO_FEW

    better, worse = {"engram": (0.99, 0.9), "moe": (0.99, 0.6)}, {"engram": (0.99, 0.6), "moe": (0.99, 0.9)}
    assert recall("tiny", recall_results(better)).verdict == HOLDS
    assert recall("tiny", recall_results(worse)).verdict == FAILS
    assert recall("tiny", recall_results({"engram": (0.9, 0.8), "moe": (0.9, 0.8)})).verdict == OPEN
    assert recall("tiny", recall_results(better, seeds=1)).verdict == TOO_FEW
    unlearned = recall("tiny", recall_results({"engram": (0.9, 0.8), "moe": (0.4, 0.1)}))
    assert unlearned.verdict == OPEN and "has not learned a task" in unlearned.here
    assert (
        recall("tiny", {name: own for name, own in recall_results(better).items() if "moe" in name}).verdict == NOT_RUN
    )
    table = recall("tiny", recall_results(better)).parts[1]
    assert "| needles | 1,024 | YaRN, trained on long rows |" in table


def test_a_task_that_is_not_learned_gets_no_second_seed_and_the_page_says_why():
    from helpers.evidence_page import rendered_section
    from helpers.evidence_recall import recall
    from helpers.evidence_sections import NOT_AT_THIS_SIZE, TOO_FEW
    from helpers.experiment_plan import runs_of
    from helpers.experiments import EXPERIMENTS

    long = next(experiment for experiment in EXPERIMENTS if experiment.name == "long")
    first = {"recall-engram-seed0", "recall-moe-seed0"}
    guessed = recall_results({"engram": (0.2, 0.1), "moe": (0.3, 0.1)}, seeds=1)
    reported = lambda results: [run.name for run in runs_of(long, "tiny", results) if not run.is_tuning]  # noqa: E731
    assert set(reported(guessed)) == first
    section = recall("tiny", guessed)
    assert section.verdict == NOT_AT_THIS_SIZE and set(section.files) == first
    # Each of twelve needles has a value of its own, and variables are four chains of three names.
    assert "and a guess 8%" in section.here and "and a guess 25%" in section.here
    assert "2 of 2 runs are finished in 0.40 CPU hours" in rendered_section(long, "tiny", guessed)
    # One that has not ended, and one that has learned.
    assert len(reported({"recall-moe-seed0": guessed["recall-moe-seed0"]})) == 4
    learned = recall_results({"engram": (0.2, 0.1), "moe": (0.9, 0.1)}, seeds=1)
    assert len(reported(learned)) == 4 and recall("tiny", learned).verdict == TOO_FEW


def test_a_guess_costs_what_is_left_to_choose_from():
    from helpers.recall_task import make_row

    row = make_row("variables", 256, random.Random(1), False)
    ids = row.ids.tolist()
    # Words of values stand in assignments and in answers, and nowhere else.
    expected = [len({word for word in ids[:place] if 40 <= word < 72}) for place, _, _ in answers_by_reading(ids)]
    assert row.choices == expected and min(expected) == 1 < max(expected)


def test_an_interval_of_answers_is_that_of_questions_drawn_anew():
    from helpers.evidence_statistics import share_difference

    draw = random.Random(0)
    own, other = ("".join(str(int(draw.random() < chance)) for _ in range(200)) for chance in (0.8, 0.7))
    gains = np.array([int(a) - int(b) for a, b in zip(own, other)])
    found = share_difference(own, other)
    error = gains.std() / np.sqrt(200)
    assert found.value == pytest.approx(gains.mean())
    assert [found.low, found.high] == pytest.approx(
        [gains.mean() - 1.96 * error, gains.mean() + 1.96 * error], abs=0.01
    )


def test_more_seeds_make_no_more_questions():
    from helpers.evidence_statistics import kept_share, share_difference, share_interval

    draw = random.Random(0)
    own, other = ("".join(str(int(draw.random() < chance)) for _ in range(200)) for chance in (0.8, 0.7))
    # Three seeds that answer alike.
    assert share_interval(3 * own, 3) == pytest.approx(share_interval(own))
    assert share_difference(3 * own, 3 * other, 3) == pytest.approx(share_difference(own, other))
    assert kept_share(3 * own, 3 * other, 0.25, 3) == pytest.approx(kept_share(own, other, 0.25))
    # Two seeds that answer otherwise count as their mean.
    turned = share_difference(own + other, other + own, 2)
    assert turned == pytest.approx((0, 0, 0))


def test_an_interval_is_that_of_articles_drawn_anew():
    from helpers.evidence_statistics import difference

    draw = np.random.default_rng(1)
    tokens = draw.integers(5, 50, 40)
    better, worse = draw.normal(3, 1, 40) * tokens, draw.normal(3.3, 1, 40) * tokens
    runs = [{"name": "a", "documents": {"nats": own.tolist(), "tokens": tokens.tolist()}} for own in (better, worse)]
    found = difference([runs[0]], [runs[1]])
    drawn = []
    for _ in range(4000):
        some = draw.integers(0, 40, 40)
        drawn.append((better[some].sum() - worse[some].sum()) / tokens[some].sum())
    assert found.value == pytest.approx((better.sum() - worse.sum()) / tokens.sum())
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.05)
    runs[1]["documents"]["tokens"] = tokens[::-1].tolist()
    with pytest.raises(ValueError, match="have read different articles"):
        difference([runs[0]], [runs[1]])


def report(*arguments: str) -> None:
    import report as script

    old, sys.argv = sys.argv, ["report.py", *arguments]
    try:
        script.main()
    finally:
        sys.argv = old


def test_the_page_of_evidence_is_what_the_files_give():
    report("--check")


def test_a_typed_verdict_a_lost_run_and_runs_that_do_not_belong_together_are_found(tmp_path, monkeypatch):
    import report as script
    from helpers import evidence_statistics

    monkeypatch.setattr(evidence_statistics, "DRAWS", 100)
    folder = tmp_path / "results"
    folder.mkdir()
    for name, content in made_results().items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    shutil.copy(ROOT / "README.md", tmp_path)
    for name, path in (("RESULTS", folder), ("PAGE", tmp_path / "evidence.md"), ("README", tmp_path / "README.md")):
        monkeypatch.setattr(script, name, path)
    report()
    report("--check")
    pages = {name: (tmp_path / name).read_text() for name in ("evidence.md", "README.md")}
    for name, page in pages.items():
        assert page.count("| **holds** |") == 4
        (tmp_path / name).write_text(page.replace("**holds**", "**does not hold**", 1))
        with pytest.raises(SystemExit, match=f"{name} is not what the JSON files give"):
            report("--check")
        (tmp_path / name).write_text(page)
    assert len(list((tmp_path / "evidence").glob("*.png"))) == 5
    one = folder / "tiny-moe-seed2.json"
    content = one.read_text()
    one.unlink()
    with pytest.raises(SystemExit, match="is not what the JSON files give"):
        report("--check")
    one.write_text(content.replace('"text": "t"', '"text": "other"'))
    with pytest.raises(SystemExit, match="Runs of scale tiny differ in text"):
        report("--check")
    one.write_text(content)
    for rate, loss in ((1e-3, 5.0), (2e-3, 4.1), (4e-3, 4.0), (8e-3, 4.2)):
        tuning = {"loss": loss, "text": "t", "cpu_hours": 0.1}
        (folder / f"tiny-tuning-engram-{rate:g}.json").write_text(json.dumps(tuning))
    report()
    later = folder / "tiny-tuning-engram-0.002.json"
    later.write_text(later.read_text().replace("4.1", "3.9"))
    with pytest.raises(SystemExit, match="tiny-engram-seed0 was trained at the rate 0.004, and tuning chooses 0.002"):
        report()
    later.write_text(later.read_text().replace("3.9", "4.1").replace('"t"', '"other"'))
    with pytest.raises(SystemExit, match="tiny-tuning-engram-0.002 has read the text other"):
        report()
    later.unlink()
    one.write_text("{")
    with pytest.raises(SystemExit, match="tiny-moe-seed2.json is no JSON"):
        report("--check")


def test_arms_differ_in_what_they_say_and_in_nothing_else():
    from helpers.experiments import ALLOCATIONS, CONTROLS, ENGRAM, EXPERIMENTS, SCALES, SHARES, maker

    from engram_hf import count_parameters

    tokens = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for scale in SCALES.values():
        make = maker(scale, tokens)
        reference = count_parameters(ENGRAM.config(make))
        for arm in CONTROLS:
            count = count_parameters(arm.config(make))
            assert count.active == pytest.approx(reference.active, rel=0.005), arm.name
            if arm.family != "dense":
                assert count.total == pytest.approx(reference.total, rel=0.01), arm.name
        for share, arm in zip(SHARES, ALLOCATIONS):
            count = count_parameters(arm.config(make))
            assert count.total == pytest.approx(reference.total, rel=0.01), arm.name
            config = arm.config(make)
            experts = count.routed_experts * (1 - config.num_experts_per_tok / config.n_routed_experts)
            assert experts / (experts + count.tables) == pytest.approx(share, abs=0.03), arm.name
    names = [(arm.name, seed) for experiment in EXPERIMENTS for arm, seed in experiment.runs]
    arms = {arm.name: arm for experiment in EXPERIMENTS for arm, _ in experiment.runs}
    assert all(arms[arm.name] is arm for experiment in EXPERIMENTS for arm, _ in experiment.runs)
    assert len(set(names)) == 18 + 9 + 12 + 9

"""The experiments: held-out text stays apart, a killed run ends as it would have, the page is what the files give."""

import gzip
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("datasets")

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
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
def text(notes, tmp_path):
    """Four steps of text."""
    from helpers.experiments_text import prepare

    gather("--dataset", notes, "--output", tmp_path / "knowledge")
    made = prepare(4 * 2048, 4096, tmp_path / "knowledge")
    made.most_tokens, made.held_out = 4 * 2048, made.held_out[:8]
    return made


def test_every_arm_reads_the_same_tokens_and_a_second_call_reads_what_was_kept(text, tmp_path):
    from helpers.experiments_text import prepare

    again = prepare(4 * 2048, 4096, tmp_path / "knowledge")
    assert torch.equal(again.train.ids, text.train.ids) and again.digest == text.digest
    assert text.train.ids.shape[1] == 128


def train_in(folder: Path, text, arm_name: str, dies_at: int | None = None, monkeypatch=None):
    """Train an arm in a folder of its own; optionally stop it at a step, as a kill does."""
    from helpers import experiment_runs
    from helpers.experiments import CONTROLS

    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for family in ("engram", "moe", "dense"):
        for rate in experiment_runs.RATES:
            name = f"tiny-tuning-{family}-{rate:g}.json"
            (results / name).write_text(json.dumps({"loss": abs(rate - 4e-3)}))
    arm = next(arm for arm in CONTROLS if arm.name == arm_name)
    run = experiment_runs.Run(arm, 0)
    if dies_at is None:
        return experiment_runs.train(run, text, folder, results)

    def die(self, args, state, control, **kwargs):
        if state.global_step == dies_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment_runs.CpuSeconds, "on_step_begin", die)
        with pytest.raises(KeyboardInterrupt):
            experiment_runs.train(run, text, folder, results)
    assert not (results / f"{run.name}.json").exists()
    # A kill in the middle of a save leaves a checkpoint without its last file.
    broken = folder / "runs" / f"{run.name}-{text.digest}" / "checkpoint-99"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')


def test_a_rerun_and_a_run_that_was_killed_give_the_same_loss_to_the_last_digit(text, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train_in(tmp_path / "whole", text, "shuffled-hash")
        train_in(tmp_path / "killed", text, "shuffled-hash", 3, monkeypatch)
        killed = train_in(tmp_path / "killed", text, "shuffled-hash")
    finally:
        torch.set_num_threads(threads)
    assert killed["loss"] == whole["loss"] and killed["documents"] == whole["documents"]
    assert killed["curve"] == whole["curve"] and len(whole["curve"]) == 4
    assert whole["steps"] == 4 and whole["learning_rate"] == 4e-3 and whole["cpu_hours"] > 0
    # The second call reads the file of the first.
    assert train_in(tmp_path / "whole", text, "shuffled-hash") == whole

"""The scripts: they refuse to destroy a run, say in one sentence what is wrong, and print figures people can read."""

import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engram_hf import verify_tables


pytest.importorskip("datasets")

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
# Needs engram-peft, which needs an environment of its own.
ELSEWHERE = "time_engram_peft.py"
RUNNABLE = sorted(
    path.relative_to(SCRIPTS).as_posix()
    for path in SCRIPTS.rglob("*.py")
    if path.parent.name != "helpers" and path.name != ELSEWHERE
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def run(script, monkeypatch):
    """Run the `main` of a script with arguments."""

    def run(name: str, *arguments) -> None:
        path = SCRIPTS / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name="run")["main"]()

    return run


@pytest.fixture
def model(tmp_path, tokenizer) -> Path:
    """A folder with a tied model and its tokenizer."""
    config = tiny_config(
        vocab_size=len(tokenizer),
        engram_layer_ids=[1],
        engram_compressed_vocab_size="auto",
        tie_word_embeddings=True,
    )
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"{number} is a number. " for number in range(1000)))
    return path


@pytest.fixture
def base(tmp_path, tokenizer) -> Path:
    """A folder with a stock model without a memory, and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_short_file_is_cut_so_that_some_can_be_held_out(script, text):
    module = script("helpers.text")
    documents = module.load_documents(str(text))
    assert "".join(part for _, part in documents) == text.read_text()
    train, held_out = module.split_documents(documents)
    assert len(held_out) == 1 and len(train) + 1 == len(documents)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_script_starts_and_explains_itself(run, name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert not ended.value.code
    told = capsys.readouterr().out
    assert f"scripts/{name}" in told


def test_finetuning_beside_an_earlier_run_is_refused_and_changes_nothing(run, model, text, tmp_path):
    earlier = tmp_path / "mine" / "checkpoint-40"
    earlier.mkdir(parents=True)
    (earlier / "trainer_state.json").write_text('{"global_step": 40}')
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match="mine holds checkpoint-40; add --resume or name another folder"):
        run("finetune.py", model, "--dataset", text, "--output", tmp_path / "mine")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_finetuning_into_the_folder_of_the_model_itself_is_refused(run, model, text, more):
    before = contents(model)
    with pytest.raises(SystemExit, match="is the folder of the model itself; name another folder"):
        run("finetune.py", model, "--dataset", text, "--output", f"{model}/../model", *more)
    assert contents(model) == before


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_finetuning_into_the_folder_of_another_model_is_refused(run, model, text, tmp_path, more):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="other holds config.json"):
        run("finetune.py", model, "--dataset", text, "--output", tmp_path / "other", *more)


def test_a_run_that_has_all_its_steps_is_not_trained_on(run, model, text, tmp_path):
    checkpoint = tmp_path / "mine" / "checkpoint-3"
    shutil.copytree(model, checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    arguments = ["--dataset", text, "--output", tmp_path / "mine", "--resume", "--steps", 3]
    with pytest.raises(SystemExit, match="checkpoint-3 has all of --steps 3"):
        run("finetune.py", model, *arguments)


@pytest.mark.parametrize("name", ["output/nope", "nope", "./nope", "a/b/c/d"])
def test_a_wrong_name_of_a_model_ends_with_a_sentence(run, text, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^{re.escape(name)} is no folder, and no repository .*"):
        run("finetune.py", name, "--dataset", text, "--output", tmp_path / "mine")


def test_a_folder_without_a_model_ends_with_a_sentence(run, text, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty is a folder without config.json"):
        run("finetune.py", tmp_path / "empty", "--dataset", text, "--output", tmp_path / "mine")


@pytest.mark.parametrize(("content", "told"), [("short", "too few to hold one out"), (None, "no file or folder")])
@pytest.mark.parametrize("name", ["finetune.py", "train_tiny.py"])
def test_too_little_text_ends_with_a_sentence(run, model, tmp_path, name, content, told):
    if content is not None:
        (tmp_path / "some.txt").write_text(content)
    arguments = ["--dataset", tmp_path / "some.txt", "--output", tmp_path / "mine"]
    with pytest.raises(SystemExit, match=f"--dataset: .*{told}"):
        run(name, *([model] if name == "finetune.py" else []), *arguments)


def test_a_run_of_finetuning_shows_lines_learns_and_goes_on(run, model, text, tmp_path, capsys, caplog):
    arguments = [model, "--dataset", text, "--output", tmp_path / "mine", "--seq-length", 32, "--learning-rate", 1e-2]
    run("finetune.py", *arguments, "--steps", 10)
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith("step ")]
    assert len(lines) == 10 and "{" not in told
    for line in lines:
        assert re.match(r"step \d+ of 10, loss \d+\.\d{3}(, [a-z ]+ [\d.]+%?){0,3}, [\d:]+ left$", line), line
    before, after = map(float, re.search(r"held-out loss ([\d.]+) before, ([\d.]+) after", told).groups())
    assert after < before - 0.1
    caplog.clear()
    run("finetune.py", *arguments, "--steps", 12, "--resume")
    assert "step 12 of 12" in capsys.readouterr().out
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mine" / "model")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.slow
def test_an_adapter_changes_the_loss_with_the_default_rate(run, model, text, tmp_path, capsys):
    run("finetune.py", model, "--dataset", text, "--output", tmp_path / "mine", "--steps", 30, "--lora", 4)
    told = capsys.readouterr().out
    before, after = map(float, re.search(r"held-out loss ([\d.]+) before, ([\d.]+) after", told).groups())
    assert after < before - 0.05


@pytest.mark.slow
def test_a_run_that_is_interrupted_says_how_to_go_on(model, text, tmp_path):
    command = [sys.executable, SCRIPTS / "finetune.py", model, "--dataset", text, "--output", tmp_path / "mine"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    started = subprocess.Popen(
        [*command, "--steps", "100000", "--save-steps", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Where the tests run in the background of a shell, it ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "mine").glob("checkpoint-10")):
        assert started.poll() is None, started.stderr.read()
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode and "Stopped; --resume goes on from" in errors and "Traceback" not in errors


def test_the_demo_does_not_replace_a_model_that_it_cannot_make_again(run, model, text, tmp_path):
    before = contents(model)
    with pytest.raises(SystemExit, match="holds a model that is not the demo's"):
        run("train_tiny.py", "--output", model)
    assert contents(model) == before


def test_the_demo_on_own_text_runs_once_in_a_folder(run, text, tmp_path, capsys):
    arguments = ["--dataset", text, "--output", tmp_path / "mine", "--steps", 2]
    run("train_tiny.py", *arguments)
    told = capsys.readouterr().out
    assert re.search(r"^step 2 of 2, loss [\d.]+", told, re.MULTILINE) and "with the memory silenced" in told
    assert (tmp_path / "mine" / "gates.png").is_file() and "gates.html, " in told
    assert "](gates.png)" in (tmp_path / "mine" / "README.md").read_text()
    before = contents(tmp_path / "mine")
    with pytest.raises(SystemExit, match="mine holds a model that is not the demo's"):
        run("train_tiny.py", *arguments)
    assert contents(tmp_path / "mine") == before


@pytest.mark.slow
def test_the_demo_replaces_its_own_earlier_model(run, tmp_path, capsys):
    states = []
    for seed in (0, 1):
        run("train_tiny.py", "--output", tmp_path / "tiny", "--steps", 2, "--seed", seed)
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").state_dict())
        told = capsys.readouterr().out
        assert ("This run replaces it" in told) == bool(seed)
    drawn = [name for name in states[0] if "embed_tokens" in name or ".table." in name]
    assert len(drawn) > 1 and not any(torch.equal(states[0][name], states[1][name]) for name in drawn)
    assert verify_tables(tmp_path / "tiny")


def test_a_memory_is_added_learns_and_survives_a_save_while_the_base_stays(run, base, text, tmp_path, capsys):
    before = contents(base)
    arguments = ["--model", base, "--dataset", text, "--output", tmp_path / "memory", "--results", tmp_path]
    sizes = ["--rows", 500, "--head-dim", 8, "--seq-length", 16, "--steps", 40, "--learning-rate", 2e-2]
    run("add_memory.py", *arguments, *sizes)
    told = capsys.readouterr().out
    assert len(re.findall("^ok  ", told, re.MULTILINE)) == 5 and "opens widest after" in told
    (table,) = json.loads((tmp_path / "add_memory.json").read_text())["tables"]
    losses = {row[0]: row[1:] for row in table["rows"]}
    assert losses["memory disabled"][1:] == [0.0, 0.0, 0.0]
    for name in ("with the memory", "reading other ids"):
        loss, difference, low, high = losses[name]
        assert low <= difference <= high and abs(losses["base"][0] + difference - loss) < 1e-4
    assert losses["with the memory"][3] < -0.1 and losses["with the memory"][0] < losses["reading other ids"][0]
    assert contents(base) == before
    with pytest.raises(SystemExit, match="memory holds a memory or a model; name another folder, or add --overwrite"):
        run("add_memory.py", *arguments)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--model", "nope"], "^nope is no folder, and no repository .*"),
        (["--layers", "7"], "layer_ids"),
        (["--dataset", "nope.txt"], "--dataset: .*no file or folder"),
    ],
)
def test_adding_a_memory_that_cannot_be_says_why(run, base, text, tmp_path, monkeypatch, changes, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=told):
        run("add_memory.py", "--model", base, "--dataset", text, "--output", "memory", *changes)
    assert not (tmp_path / "memory").exists()


def test_copied_paragraphs_are_not_held_out(script):
    module = script("helpers.text")
    line = "a line that is long enough to be found again"
    train = [("one", f"{line}\nand more\n\nshort")]
    held_out = [("two", f"new\n\n  {line}\nbut different\n\nshort\n\nshort, new"), ("three", "short")]
    assert module.drop_copied(held_out, train) == [("two", "new\n\nshort, new")]


def test_threads_leave_busy_cores_to_other_programs(script, monkeypatch):
    console = script("helpers.console")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        for load, threads in ((0.2, 8), (2.6, 5), (40.0, 1)):
            torch.set_num_threads(8)
            monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
            assert console.choose_threads() == torch.get_num_threads() == threads
        torch.set_num_threads(8)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        assert console.choose_threads() == 8
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_benchmark_writes_what_is_needed_to_run_it_again(run, script, tmp_path, capsys):
    arguments = ["--largest", "1e5", "--rounds", "2", "--folder", tmp_path, "--results", tmp_path]
    run("benchmarks/bench_lookup.py", *arguments)
    content = json.loads((tmp_path / "bench_lookup.json").read_text())
    assert content["command"].startswith("python scripts/benchmarks/bench_lookup.py --largest 1e5")
    assert content["hardware"] and content["date"] and content["versions"]["torch"] == torch.__version__
    (table,) = content["tables"]
    assert [len(row) for row in table["rows"]] == [len(table["columns"])] * 4
    page = script("helpers.results").Results.read(tmp_path / "bench_lookup.json").markdown()
    shown = [float(cell) for cell in re.findall(r"^\| [a-z, ]+, ms \| ([\d.]+) \|$", page, re.MULTILINE)]
    assert shown == [round(row[1], 2) for row in table["rows"]]
    assert content["command"] in page.replace("\n", " ") and content["commit"] in page and content["date"] in page


# bench_tiers.py and bench_training.py need gigabytes, however small their tables are.
SMALL = {
    "bench_callbacks.py": ["--steps", "4"],
    "bench_checkpoints.py": ["--rows-of-head", "2000"],
    "bench_hash.py": [],
    "bench_load.py": ["--rows-of-head", "2000"],
    "bench_memory.py": ["--rounds", "1"],
    "bench_other_tables.py": ["--rows-of-head", "40000"],
    "bench_per_layer_embeddings.py": ["--rows", "3000"],
    "bench_reads.py": ["--gib", "1", "--rounds", "1"],
    "bench_rows.py": ["--rows", "3000"],
    "bench_patches.py": ["--turns", "2", "--rows-of-head", "4096", "--users", "9"],
    "bench_trace.py": ["--tokens", "40", "--rounds", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_with_a_small_table(name, tmp_path):
    command = [sys.executable, str(SCRIPTS / "benchmarks" / name), *SMALL[name], "--results", str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (written,) = tmp_path.glob("bench_*.json")
    content = json.loads(written.read_text())
    assert content["tables"] and all(table["rows"] for table in content["tables"])


def test_every_file_that_the_makefile_names_exists():
    named = re.findall(r"(?:tests|scripts)/[\w/.]+\.py", (ROOT / "Makefile").read_text())
    benchmarks = re.findall(r"\$\(BENCH\)/(\w+\.py)", (ROOT / "Makefile").read_text())
    assert len(named) > 10 and len(benchmarks) > 5
    for path in [*named, *(f"scripts/benchmarks/{name}" for name in benchmarks)]:
        assert (ROOT / path).is_file(), path


def test_the_page_of_results_is_what_the_files_give(run):
    run("maintenance/render_results.py", "--check")


def test_a_figure_that_was_typed_by_hand_is_found(script, run, tmp_path, monkeypatch):
    results = script("helpers.results")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    table = results.Table({"way": "", "ms": ".1f"}, [["one", 1.26], ["two", None]])
    results.Results("Title", "About.", [table]).write(tmp_path)
    run("maintenance/render_results.py")
    page = tmp_path / "docs" / "results.md"
    assert "| one | 1.3 |\n| two |  |" in page.read_text()
    run("maintenance/render_results.py", "--check")
    page.write_text(page.read_text().replace("1.3", "1.2"))
    with pytest.raises(SystemExit, match="is not what its JSON files give"):
        run("maintenance/render_results.py", "--check")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(SystemExit, match="broken.json is not what a benchmark writes"):
        run("maintenance/render_results.py", "--check")

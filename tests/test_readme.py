"""The README says what is true: its example runs, its commands exist, its tree is the folder."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from engram_hf import merge_changed_rows, push_engram
from engram_hf.commands.main import app


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_first_example_has_eight_lines_and_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line]) == 8
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([1, 12, 4])" in capsys.readouterr().out


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_example(example: str, names: dict) -> None:
    exec(compile(example, "README.md", "exec"), names)


@pytest.fixture
def demo(tmp_path, monkeypatch, tokenizer) -> Path:
    """A model with its tokenizer where the demo saves one, and the text that the README trains on."""
    monkeypatch.chdir(tmp_path)
    # Tied, as the demo's: resuming then warns of the matrix that is saved once.
    config = tiny_config(
        vocab_size=len(tokenizer),
        engram_layer_ids=[1],
        engram_vocab_size=499,
        engram_compressed_vocab_size="auto",
        tie_word_embeddings=True,
    )
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained("output/tiny")
    tokenizer.save_pretrained("output/tiny")
    Path("README.md").write_text(README, encoding="utf-8")
    return Path("output/tiny")


def test_the_example_of_tiers_runs(demo):
    names: dict = {}
    run_example(examples()[1], names)
    assert names["model"].engram_tables()[0].tiers.keys() == {"host"}


def test_the_examples_of_training_run_and_go_on_when_they_run_again(demo):
    names: dict = {}
    run_example(examples()[1].split("model = ")[0], names)
    text, recipe = examples()[2:4]
    recipe = recipe.replace("max_steps=20", "max_steps=20, report_to=[], use_cpu=True, disable_tqdm=True")
    run_example(text, names)
    assert {len(row["input_ids"]) for row in names["data"]} == {128}
    before = AutoModelForCausalLM.from_pretrained(demo).model.tables()[0].blocks[0]
    run_example(recipe, names)
    assert names["last"] is None and names["trainer"].state.global_step == 20
    assert {tier for table in names["model"].engram_tables() for tier in table.tiers} == {"disk"}
    trained = names["model"].model.tables()[0].blocks[0].clone()
    assert not torch.equal(trained, before)
    log = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]

    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("transformers.trainer").addHandler(handler)
    try:
        run_example(recipe.replace("max_steps=20", "max_steps=30"), names)
    finally:
        logging.getLogger("transformers.trainer").removeHandler(handler)
    assert names["last"] == "output/mine/checkpoint-20" and names["trainer"].state.global_step == 30
    steps = [line["step"] for line in names["trainer"].state.log_history if "loss" in line]
    assert steps == [10, 20, 30]
    assert [line["loss"] for line in names["trainer"].state.log_history if "loss" in line][:2] == log
    assert any("missing keys" in line and "['lm_head.weight']" in line for line in warned)
    # What is merged has the tokenizer too.
    merge_changed_rows("output/mine/checkpoint-30", "output/merged")
    prompt = AutoTokenizer.from_pretrained("output/merged")("def", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained("output/merged")
    assert torch.equal(model.model.tables()[0].blocks[0], names["model"].model.tables()[0].blocks[0])
    assert model.generate(**prompt, max_new_tokens=2).shape[0] == 1


def test_the_examples_of_the_hub_run(hub, tmp_path, tokenizer, capsys):
    model = tiny_model(tiny_config(engram_layer_ids=[1]))
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    pushing, reading = (e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "engram-tiny" in e)
    pushing = pushing.replace("output/tiny", str(tmp_path / "tiny"))
    exec(compile(pushing, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert all(f"user/engram-tiny/{path.name}\n" in printed for path in (tmp_path / "tiny").iterdir())
    assert "user/engram-tiny" not in hub.repositories
    exec(compile(pushing.replace(", dry_run=True", ""), "README.md", "exec"), {})
    names: dict = {}
    exec(compile(reading, "README.md", "exec"), names)
    assert names["table"].rows == model.engram_tables()[0].rows
    assert torch.equal(names["blocks"]["model.layers.1.engram.table.blocks.0"], model.model.tables()[0].blocks[0])


def test_the_tokenizer_of_the_demo_has_a_chat_template(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from helpers.text import train_tokenizer

    train_tokenizer([("readme", README)], vocab_size=300).save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "user: a\nassistant: b<eos>\nuser: c\nassistant:"
    )


def test_pinning_a_revision_and_importing_the_package_warn_of_no_code(hub, demo, tmp_path):
    repository = "user/engram-tiny"
    commit = push_engram(demo, repository).commits[repository].oid
    loads = f"AutoModelForCausalLM.from_pretrained({repository!r}, trust_remote_code=True"
    head = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    without = "import sys; sys.modules['engram_hf'] = None\n" + head
    warned = {}
    for name, code in {
        "any": f"{without}{loads})",
        "pinned": f"{without}{loads}, revision={commit!r})",
        "imported": f"import engram_hf\n{head}{loads.split(', trust')[0]})",
    }.items():
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / name), "HF_HUB_DISABLE_XET": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "0", **environment},
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        warned[name] = ran.stderr.count("A new version of the following files")
    assert warned["any"] > 1 and warned["pinned"] == warned["imported"] == 0


def test_recipes_have_at_most_ten_lines():
    for recipe in re.findall(r"```(?:python|bash)\n(.*?)```", README, re.DOTALL):
        assert len([line for line in recipe.splitlines() if line]) <= 10, recipe


def test_every_command_that_is_shown_runs(hub, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tiny_config(engram_layer_ids=[1]))
    for folder in ("output/tiny", "output/mine/checkpoint-20"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    commands = re.findall(r"^engram-hf (.*?)(?: +#.*)?$", README, re.MULTILINE)
    assert {command.split()[0] for command in commands} == {
        command.name or command.callback.__name__ for command in app.registered_commands
    }
    for command in commands:
        ran = CliRunner().invoke(app, command.split())
        assert ran.exit_code == 0, (command, ran.output)


def test_every_make_verb_and_script_that_is_named_exists():
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert {"demo", "test"} <= set(re.findall(r"make ([a-z]+)", README)) <= verbs
    for path in re.findall(r"\b(?:scripts|tests|src)/[\w/.]+\.(?:py|md)", documents):
        assert (ROOT / path).exists(), path


def test_the_tree_is_the_folder():
    tree = README.split("## What is in the folder")[1]
    named = {line.split()[0].removesuffix("/").split("/")[0] for line in tree.split("```")[1].strip().splitlines()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    there = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    # Said to setuptools, of no interest to a reader.
    assert named == there - {"MANIFEST.in"}


def test_the_card_of_the_demo_is_valid():
    from huggingface_hub import ModelCard

    card = ModelCard.load(ROOT / "hub_cards" / "engram-tiny.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0" and {"engram", "engram_moe"} <= set(card.data.tags)

"""README and guides say what is true: their examples run, their links lead somewhere, their lists are the code's.

    python tests/test_docs.py        write the import order of tests/test_import_order.py into CONTRIBUTING.md

The examples of a document run from its first line to its last in one folder and one Python namespace, as a reader types
them. They find `output/tiny` there, which is what `make demo` leaves, and the README.
"""

import ast
import copy
import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from processes import run_processes
from test_import_order import LEVELS
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from typer.testing import CliRunner

from engram_hf import EngramRowStatisticsCallback, engram_optimizers, push_engram
from engram_hf_command import app


ROOT = Path(__file__).parent.parent
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
# Results are rendered from files of the benchmarks, and hold no examples.
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in GUIDES if name != "results.md")]
# Programs that change an environment or train for minutes: the tests look whether what they name is there.
NOT_RUN = {"git", "make", "pip", "source", "transformers"}
TEXT = "\n\n".join(pydoc_data.topics.topics.values())
# What the tokenizer of the demo has.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def examples(document: str) -> list[tuple[str, str, int]]:
    """Language, text and first line of each example."""
    text = read(document)
    found = re.finditer(r"^```(python|bash)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(match[1], match[2], text[: match.start(2)].count("\n") + 1) for match in found]


def commands(example: str) -> list[list[str]]:
    """The words of each command of a bash example."""
    lines = example.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_examples(document: str) -> dict:
    """Run the examples of a document, and give the names that its Python leaves behind."""
    names: dict = {"__name__": "__main__"}
    for language, text, line in examples(document):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, ROOT / document, "exec"), names)
            continue
        for program, *arguments in commands(text):
            if program == "engram-hf":
                if arguments[0] == "explore" and "--as-space" not in arguments:
                    # It ends when somebody interrupts it. tests/tools/test_explore.py opens it.
                    continue
                ran = CliRunner().invoke(app, arguments)
                assert ran.exit_code == 0, (document, arguments, ran.output)
            elif program == "python":
                script, *options = arguments
                ran = subprocess.run(
                    [sys.executable, ROOT / script, *options],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
                )
                assert ran.returncode == 0, (document, arguments, ran.stderr[-2000:])
            elif program == "rm":
                subprocess.run([program, *arguments], check=True)
            else:
                assert program in NOT_RUN, (document, program)
    return names


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tokenizer) -> Path:
    """A small model as `make demo` saves it: trained, with its tokenizer and the log of its run."""
    folder = tmp_path_factory.mktemp("docs") / "tiny"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = tiny_config(
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=1,
        engram_layer_ids=[1],
        engram_vocab_size=499,
        engram_compressed_vocab_size="auto",
        tie_word_embeddings=True,
    )
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    ids = tokenizer(TEXT[:40_000])["input_ids"]
    rows = [ids[start : start + 64] for start in range(0, len(ids) - 63, 64)]
    args = TrainingArguments(
        str(folder), max_steps=6, logging_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to=[]
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=engram_optimizers(args),
        callbacks=[EngramRowStatisticsCallback()],
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder


@pytest.fixture
def scratch(trained, hub, tmp_path, monkeypatch) -> Path:
    """The folder that examples run in, and a Hub that nobody else sees."""
    folder = tmp_path / "scratch"
    shutil.copytree(trained, folder / "output/tiny")
    shutil.copy(ROOT / "README.md", folder)
    monkeypatch.chdir(folder)
    return folder


def test_the_examples_of_the_readme_run(scratch, capsys):
    names = run_examples("README.md")
    assert {tier for table in names["model"].engram_tables() for tier in table.tiers} == {"disk"}
    assert "[" in capsys.readouterr().out


def test_the_examples_of_the_guide_to_tables_run(scratch):
    names = run_examples("docs/tables.md")
    assert torch.equal(names["on_disk"], names["in_memory"])


def test_the_examples_of_the_guide_to_other_tables_run(scratch, capsys):
    names = run_examples("docs/other_tables.md")
    assert names["rows"][1].shape == (*names["input_ids"].shape, 2 * 64)
    printed = capsys.readouterr().out
    for line in ("[23703573157769, 20109073645365, 8052911324071]", "320001446 320001536"):
        assert line in printed and f"# {line}" in read("docs/other_tables.md")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "guide", [name for name in GUIDES if name not in ("tables.md", "other_tables.md", "results.md", "evidence.md")]
)
def test_the_examples_of_the_other_guides_run(guide, scratch):
    run_examples(f"docs/{guide}")


@pytest.mark.parametrize("name", ["any_model", "patches"])
def test_the_notebook_is_the_guide(monkeypatch, name):
    """Its cells are run as the examples of the guide."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "maintenance"))
    from render_notebook import GUIDES, notebook

    guide = next(guide for guide in GUIDES if guide.stem == name)
    made = notebook(guide)
    assert read(f"docs/{name}.ipynb") == made, "run: python scripts/maintenance/render_notebook.py"
    code = [cell for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    assert len(code) == len(examples(f"docs/{name}.md"))


def test_every_guide_is_listed_and_linked_from_the_readme():
    for document in ("README.md", "docs/README.md"):
        linked = {Path(link).name for link in re.findall(r"\]\(([\w./-]+\.md)", read(document))}
        assert {*GUIDES, "results.md"} - {"README.md"} <= linked, document


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        # Rendered by the benchmarks.
        if target.name == "results.md" and not target.exists():
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_verb_and_file_that_is_named_exists(document):
    text = read(document)
    named = {
        verb for pair in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", text, re.MULTILINE) for verb in pair if verb
    }
    assert named <= set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for path in re.findall(r"\b(?:scripts|tests|src|docs|hub_cards)/[\w/.]+\.(?:py|md|json)\b", text):
        assert (ROOT / path).exists() or path == "docs/results.md", path


def test_the_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 400


def test_the_guide_of_ranks_has_the_table_that_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "maintenance"))
    from render_ranks import with_table

    assert read("docs/ranks.md") == with_table(read("docs/ranks.md")), "run: python scripts/maintenance/render_ranks.py"


@pytest.mark.slow
def test_the_example_of_the_guide_of_ranks_trains_on_two(scratch):
    script, with_fsdp = re.findall(r"^```py\n(.*?)^```$", read("docs/ranks.md"), re.DOTALL | re.MULTILINE)
    Path("train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    ran = run_processes(command)
    assert ran.returncode == 0 and "find_unused_parameters" not in ran.stderr, ran.stderr[-3000:]
    assert AutoModelForCausalLM.from_pretrained("output/ranks/checkpoint-4").engram_tables()
    Path("fsdp.py").write_text(with_fsdp)
    ran = run_processes([*command[:-1], "fsdp.py"])
    assert ran.returncode == 0 and Path("output/fsdp/saved/.metadata").is_file(), ran.stderr[-3000:]
    Path("train.py").write_text(script.replace(", use_cpu=True", ""))
    assert "use_cpu=True" in run_processes(command).stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_are_short(document):
    for _, text, line in examples(document):
        assert len([line for line in text.splitlines() if line]) <= 16, f"{document}:{line}"


def test_the_guide_to_tools_shows_every_command():
    shown = {
        words[1] for _, text, _ in examples("docs/tools.md") for words in commands(text) if words[0] == "engram-hf"
    }
    groups = {group.name for group in app.registered_groups}
    assert shown == {command.name or command.callback.__name__ for command in app.registered_commands} | groups


def sentences_of_the_package() -> str:
    """All strings of the package, a line each, with 0 for what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in parts))
    return "\n".join(found)


def test_the_errors_that_the_faq_quotes_are_the_package_s():
    quoted = re.findall(r'^\*\*\d+\. "(.*)"\*\*', read("docs/faq.md"), re.MULTILINE)
    sentences = sentences_of_the_package()
    assert quoted and [sentence for sentence in quoted if sentence not in sentences] == []


def import_order() -> str:
    """The levels of tests/test_import_order.py as CONTRIBUTING.md shows them, the lowest first."""
    lines = []
    for names in LEVELS:
        shown = [f"{name}*" if name.endswith(".") else name or "engram_hf/__init__" for name in names]
        lines += textwrap.wrap(
            "   ".join(shown), 110, initial_indent="* ", subsequent_indent="  ", break_long_words=False
        )
    return "\n".join(lines)


def test_the_import_order_of_contributing_is_the_one_that_is_tested():
    assert f"```text\n{import_order()}\n```" in read("CONTRIBUTING.md"), "run: python tests/test_docs.py"


def test_the_folders_of_contributing_are_the_repository():
    """Files whose names begin with a dot, and what only packaging reads, are left out."""
    tree = read("CONTRIBUTING.md").split("## Where things are")[1].split("```")[1]
    named = {line.split()[0].split("/")[0] for line in tree.splitlines() if line and line != "text"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    there = {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    assert named == there - {"MANIFEST.in"}


def test_the_card_of_the_demo_is_valid():
    from huggingface_hub import ModelCard

    card = ModelCard.load(ROOT / "hub_cards" / "engram-tiny.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0" and {"engram", "engram_moe"} <= set(card.data.tags)


def test_the_tokenizer_of_the_demo_has_a_chat_template(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from helpers.text import train_tokenizer

    train_tokenizer([("topics", TEXT[:20_000])], vocab_size=300).save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "user: a\nassistant: b<eos>\nuser: c\nassistant:"
    )


@pytest.mark.slow
def test_pinning_a_revision_and_importing_the_package_warn_of_no_code(hub, trained, tmp_path):
    repository = "user/engram-tiny"
    commit = push_engram(trained, repository).commits[repository].oid
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


if __name__ == "__main__":
    contributing = ROOT / "CONTRIBUTING.md"
    before, rest = contributing.read_text(encoding="utf-8").split("## Imports go down", 1)
    start, end = re.search(r"```text\n(.*\n)*?```", rest).span()
    rest = rest[:start] + f"```text\n{import_order()}\n```" + rest[end:]
    contributing.write_text(f"{before}## Imports go down{rest}", encoding="utf-8")

"""Cards say what is so: compared with the model itself, with the Hub's own parser, and with READMEs of users."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from engram_hf import (
    CardFacts,
    EngramGateStatisticsCallback,
    EngramMoEConfig,
    EngramMoEForSequenceClassification,
    EngramRowStatisticsCallback,
    count_parameters,
    engram_optimizers,
    gather_facts,
    plot_training,
    quantize_tables,
    read_facts,
    render_card,
    update_card,
)
from engram_hf.hub.card_facts import BEGIN, END, TrainingData


ROOT = Path(__file__).parent.parent.parent
LOSS = {
    "metric": "loss",
    "value": 4.25,
    "dataset": "held-out documents",
    "command": "python evaluate.py --all",
    "unit": "nats per token",
}
USER = """---
# what this is
language:
- de   # and a little Frisian
tags: [mine, "engram"]
license: mit

version: 1.10
---
# My model

Text with a tab at its end.\t

## Notes
- `{{ jinja }}` and ---
"""


READMES = [
    USER,
    "# Without metadata\n\nText",
    "---\n\n---\n",
    "---\n{license: mit, tags: [a]}\n---\nx",
    "---\nnote: 'a\u2028  b'\ntags: [a]\n---\nx",
    "a\u2028b\x0bc\n",
]


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A model of two memory layers with its tokenizer, as `save_pretrained` leaves it."""
    config = tiny_config(vocab_size=len(tokenizer), engram_compressed_vocab_size="auto", pad_token_id=0, eos_token_id=1)
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def section_of(card: str) -> str:
    return card[card.index(BEGIN) : card.rindex(END) + len(END)]


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def code_of(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


def test_facts_are_those_of_the_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    facts = gather_facts(folder)
    tables = model.engram_tables()
    assert [f"model.{table.name}" for table in facts.tables] == [table.name for table in tables]
    assert [table.rows for table in facts.tables] == [sum(block.rows for block in table.blocks) for table in tables]
    numbers = sum(block.numel() for table in model.model.tables() for block in table.blocks)
    assert facts.tables_nbytes == 4 * numbers == sum(table.nbytes for table in tables)
    assert facts.disk_nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert facts.parameters["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts.parameters["memory_share"] == numbers / (facts.parameters["total"] - facts.parameters["active"])
    assert facts.fingerprint == model.config.engram_fingerprint
    assert facts.compressed_vocab_size == int(model.model.ngram_hash.token_map.max()) + 1 < facts.vocab_size
    saved = {**model.state_dict()}
    assert facts.backbone_nbytes == sum(t.nbytes for name, t in saved.items() if ".table." not in name)
    card = render_card(facts)
    assert f"{numbers:,} parameters in tables" in card and f"{tables[0].rows:,} rows of 8 numbers in float32" in card
    assert all(digest in card for digest in facts.fingerprint.values())


def test_facts_of_quantized_tables_are_those_of_the_model(folder, tmp_path):
    quantize_tables(folder, tmp_path / "int4", "int4")
    facts, plain = gather_facts(tmp_path / "int4"), gather_facts(folder)
    assert facts.parameters == plain.parameters
    # 8 numbers in 4 bits, and a scale of 2 bytes.
    assert [table.nbytes for table in facts.tables] == [6 * table.rows for table in plain.tables]
    assert "rows of 8 numbers in int4" in render_card(facts) and "take no gradient" in render_card(facts)
    assert "take no gradient" not in render_card(plain)


def test_facts_of_a_config_are_those_of_the_model_that_it_makes(tmp_path):
    config = tiny_config(engram_table_dtype="int8", first_k_dense_replace=3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    facts = gather_facts(config)
    model.save_pretrained(tmp_path)
    saved = gather_facts(tmp_path)
    assert facts.tables == saved.tables and facts.parameters == saved.parameters
    # The mixing of streams is loaded in single precision, whatever is asked for.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert facts.backbone_nbytes == sum(tensor.nbytes for name, tensor in tensors.items() if ".blocks." not in name)
    assert facts.weights is None and saved.weights is not None
    assert "no experts" in render_card(facts) and "mixture-of-experts" not in render_card(facts)


def test_facts_survive_json(folder):
    facts = gather_facts(
        folder,
        data={"description": "text", "datasets": ["org/text"], "languages": ["en"], "tokens": 1234567},
        evaluation=LOSS,
        base_model="org/base",
        limits=["None of note."],
    )
    assert CardFacts.from_dict(json.loads(json.dumps(facts.as_dict()))) == facts
    assert facts.tables and facts.evaluation and facts.data
    with pytest.raises(ValueError, match="another release"):
        CardFacts.from_dict({**facts.as_dict(), "new": 1})
    with pytest.raises(ValueError, match="another release"):
        CardFacts.from_dict({"name": "x"})


def test_the_hub_reads_the_metadata_as_they_are_meant(folder):
    other = {**LOSS, "dataset": "other documents", "value": 5.5}
    accuracy = {
        **LOSS,
        "metric": "accuracy",
        "value": 0.5,
        "dataset": "Text",
        "dataset_id": "org/text",
        "split": "test",
    }
    facts = gather_facts(
        folder,
        data={"description": "text", "datasets": ["org/text"], "languages": ["en"]},
        evaluation=[LOSS, other, {**LOSS, **accuracy}],
        base_model=["org/base"],
        license="apache-2.0",
        repo_id="org/name",
    )
    update_card(folder, facts)
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.base_model, data.datasets, data.language) == (["org/base"], ["org/text"], ["en"])
    assert {"engram", "engram_moe", "mixture-of-experts"} <= set(data.tags) and data.model_name == "name"
    found = [
        (r.metric_type, r.metric_value, r.dataset_name, r.dataset_type, r.dataset_split) for r in data.eval_results
    ]
    assert found == [
        ("loss", 4.25, "held-out documents", "custom", None),
        ("loss", 5.5, "other documents", "custom", None),
        ("accuracy", 0.5, "Text", "org/text", "test"),
    ]


def test_what_is_not_known_is_left_out(folder):
    bare = render_card(gather_facts(folder))
    full = render_card(
        gather_facts(folder, data="text", evaluation=LOSS, license="mit", base_model="org/base", repo_id="a/b")
    )
    for word in ("## Training", "## Evaluation", "## Licence", "made from"):
        assert (word in full or word == "## Training") and word not in bare, word
    keys = {"license", "base_model", "datasets", "language", "model-index"}
    assert not keys & set(metadata_of(bare)) and {"license", "base_model", "model-index"} <= set(metadata_of(full))
    assert "None" not in bare.split("engram-hf: facts")[0] and "None" not in full.split("engram-hf: facts")[0]
    preset = render_card(gather_facts(EngramMoEConfig.preset("engram-27b"))).split("engram-hf: facts")[0]
    assert "fingerprint" not in preset and "How to load" not in preset and "compression" not in preset
    # Nothing is there that a pipeline or a button of the Hub could load.
    assert not {"pipeline_tag", "library_name"} & set(metadata_of(preset))
    assert {"pipeline_tag", "library_name"} <= set(metadata_of(bare))
    assert "not a release of DeepSeek" in preset and "DeepSeek" not in bare


def test_the_needs_are_those_of_the_package(folder):
    lines = metadata.requires("engram-hf")
    needs = re.search(r"^It needs (.*)\.$", render_card(gather_facts(folder)), re.MULTILINE)[1]
    found = re.findall(r"`(\w+)(>=[\d.]+)`", needs)
    assert [name for name, _ in found] == ["transformers", "torch", "accelerate"]
    for name, floor in found:
        assert [line for line in lines if re.match(rf"{name}\b", line) and floor in line], (name, floor)


def test_a_title_that_is_ours_follows_the_name_as_the_results_do(folder):
    facts = gather_facts(folder, name="a", evaluation=LOSS)
    update_card(folder, facts)
    update_card(folder, replace(facts, name="b"))
    card = (folder / "README.md").read_text()
    assert card == render_card(replace(facts, name="b")) and "\n# b\n" in card
    assert [model["name"] for model in metadata_of(card)["model-index"]] == ["b"]
    for mine in (card.replace("\n# b\n", "\n# mine\n"), card.replace("\n# b\n", "\n# b\n\nMine.\n")):
        (folder / "README.md").write_text(mine)
        update_card(folder, facts)
        assert (folder / "README.md").read_text().split(BEGIN)[0].split("---\n")[2] == mine.split(BEGIN)[0].split(
            "---\n"
        )[2]


def test_the_code_for_each_tier_loads_the_tables_there_and_generates(folder, capsys):
    facts = gather_facts(folder, repo_id="org/name", tables_repo="org/tables")
    card = render_card(facts)
    assert 'where = "org/name"' in card
    code = code_of(card).replace("org/name", str(folder)).replace("org/tables", str(folder))
    code, generating = code.split("prompt = ")
    blocks = code.split("model = ")
    assert len(blocks) == 4
    names: dict = {}
    ids, logits, tiers = tiny_ids(1, 9), [], []
    exec(blocks[0], names)
    for block in blocks[1:]:
        exec("model = " + block, names)
        tiers.append({tier for table in names["model"].engram_tables() for tier in table.tiers})
        logits.append(names["model"](ids.to(names["model"].device)).logits)
    assert tiers == [{"resident"}, {"host"}, {"disk"}]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert names["tokenizer"].decode(names["tokenizer"]("def")["input_ids"]) == "def"
    exec("prompt = " + generating, names)
    assert capsys.readouterr().out.startswith("The")


def test_the_code_runs_where_the_package_is_not_installed(folder, tmp_path):
    code = "import sys\nsys.modules['engram_hf'] = None\n" + code_of(render_card(gather_facts(folder)))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_the_code_of_other_heads_and_of_checkpoints_without_code_runs(tmp_path):
    config = tiny_config(num_labels=3)
    EngramMoEForSequenceClassification(config).save_pretrained(tmp_path, with_code=False)
    card = render_card(gather_facts(tmp_path))
    assert metadata_of(card)["pipeline_tag"] == "text-classification" and "active per token" not in card
    assert "import engram_hf" in code_of(card) and "trust_remote_code" not in card and "AutoTokenizer" not in card
    names: dict = {}
    exec(code_of(card).replace('"."', f'"{tmp_path}"'), names)
    assert names["model"].num_labels == 3
    assert {tier for table in names["model"].engram_tables() for tier in table.tiers} == {"disk"}


def test_tables_in_a_repository_of_their_own_are_counted(folder, tmp_path):
    whole = gather_facts(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "backbone", tables_to=tmp_path / "tables")
    facts = gather_facts(tmp_path / "backbone", tables_repo="org/tables")
    assert facts.tables == whole.tables
    assert facts.disk_nbytes == pytest.approx(whole.disk_nbytes, abs=10_000)
    # A push writes both fields; a folder of tables stands for their repository here.
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    config["engram_tables_repo"] = str(tmp_path / "tables")
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config))
    code = code_of(render_card(facts))
    names: dict = {}
    exec(code.replace('"."', f'"{tmp_path / "backbone"}"').split("tokenizer =")[0], names)
    assert "[org/tables](https://huggingface.co/org/tables)" in render_card(facts)


def test_a_readme_is_left_as_it_is_outside_the_section(folder):
    readme = folder / "README.md"
    readme.write_text(USER)
    facts = gather_facts(folder, license="apache-2.0", data={"description": "text", "languages": ["en"]})
    update_card(folder, facts)
    first = readme.read_text()
    body = USER.split("---\n", 2)[2]
    assert first.split("---\n", 2)[2].startswith(body) and section_of(first) == section_of(first)
    front = first.split("---\n", 2)[1]
    # Comments, blank lines, and how a number is written; lists that grow are written anew.
    assert "# what this is\n" in front and "license: mit\n\nversion: 1.10\n" in front
    merged = metadata_of(first)
    assert merged["license"] == "mit" and merged["language"] == ["de", "en"]
    assert merged["tags"][:3] == ["mine", "engram", "engram_moe"] and merged["library_name"] == "transformers"
    assert "## Licence\n\nThis model: mit\n" in first and "apache" not in first.split("engram-hf: facts")[0]
    update_card(readme, facts)
    assert readme.read_text() == first
    # The user writes around the section; the facts change.
    readme.write_text(first.replace("# My model", "# Our model") + "\nThe end.")
    update_card(folder, replace(facts, data=None, limits=("It is small.",)))
    second = readme.read_text()
    before, after = first.replace("# My model", "# Our model").split(section_of(first))
    assert second.split(section_of(second))[1] == after + "\nThe end."
    assert second.split(section_of(second))[0] == before.replace("- en\n", "")
    assert "* It is small." in second and "Data: text" not in second


def test_what_an_update_wrote_follows_the_facts_and_what_the_user_wrote_stays(folder):
    facts = gather_facts(folder, license="mit", base_model="org/base", evaluation=[LOSS])
    update_card(folder, facts)
    update_card(folder, replace(facts, license="apache-2.0", base_model=("org/other",)))
    card = (folder / "README.md").read_text()
    assert metadata_of(card)["license"] == "apache-2.0" and metadata_of(card)["base_model"] == ["org/other"]
    mine = {"metric": "loss", "value": 1.0, "dataset": "mine", "command": "mine"}
    update_card(folder, replace(facts, evaluation=()))
    assert "model-index" not in metadata_of((folder / "README.md").read_text())

    update_card(folder, gather_facts(folder, evaluation=[{**LOSS, "value": 9.0}, mine]))
    card = (folder / "README.md").read_text()
    # The user corrects one result, and removes our licence in favour of another one.
    (folder / "README.md").write_text(card.replace("value: 9.0", "value: 8.0").replace("license: mit", "license: bsd"))
    update_card(folder, replace(facts, evaluation=(replace(facts.evaluation[0], value=3.0),)))
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "bsd"
    assert [(result.dataset_name, result.metric_value) for result in data.eval_results] == [("held-out documents", 8.0)]


def test_results_of_other_tools_stay(folder):
    index = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "gsm8k", "name": "GSM8K"},
        "metrics": [{"type": "accuracy", "value": 0.1}],
    }
    models = [{"name": "a", "results": [index]}, {"name": "model", "results": [index]}]
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"model-index": models}) + "---\n# x\n")
    for value in (4.0, 3.0):
        update_card(folder, gather_facts(folder, evaluation={**LOSS, "value": value}))
    found = metadata_of((folder / "README.md").read_text())["model-index"]
    assert [model["name"] for model in found] == ["a", "model"] and found[0] == models[0]
    assert [result["metrics"][0]["value"] for result in found[1]["results"]] == [0.1, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nlicense: [mit\n---\n# x\n", "cannot be read"),
        ("---\njust words\n---\n# x\n", "mapping of keys"),
        ("---\nmodel-index: [{name: x}]\n---\n# x\n", "model_index"),
        (f"# x\n{BEGIN}\n", "once each"),
        (f"# x\n{END}\n{BEGIN}\n", "once each"),
        (f"# x\n{BEGIN}\n{END}\n{BEGIN}\n{END}\n", "once each"),
        (b"# caf\xe9\n", "UTF-8"),
    ],
)
def test_a_readme_that_cannot_be_read_is_an_error_and_left_as_it_is(folder, text, message):
    readme = folder / "README.md"
    content = text if isinstance(text, bytes) else text.encode()
    readme.write_bytes(content)
    before = set(folder.iterdir())
    with pytest.raises(ValueError, match=message):
        update_card(readme, gather_facts(folder))
    assert readme.read_bytes() == content and set(folder.iterdir()) == before


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("text", READMES)
def test_line_ends_and_marks_of_a_file_are_kept(folder, newline, mark, text):
    readme, content = folder / "README.md", (mark + text).replace("\n", newline).encode()
    readme.write_bytes(content)
    for _ in range(2):
        update_card(readme, gather_facts(folder, evaluation=LOSS))
        found = readme.read_bytes()
        decoded = found.decode()
        assert decoded.startswith(mark) and decoded.count("\n") == decoded.count(newline)
        body = text.split("---\n", 2)[2] if text.startswith("---") else text
        assert body.replace("\n", newline) in decoded
        # huggingface_hub 1 does not look behind a byte order mark.
        card = ModelCard(decoded.removeprefix(mark))
        assert card.data.library_name == "transformers" and "engram_moe" in card.data.tags
    assert read_facts(readme) == gather_facts(folder)


HOSTILE = [
    "a\n---\nb",
    f"x\n{END}\n# y",
    f"{BEGIN}",
    "{{ facts.name }} {% raw %}",
    "a | b | <b>bold</b>\n\n# c",
    "<!-- engram-hf: facts {} --> \\",
    "```\n# c\n```",
    "no",
    "ümläut: [x] #",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_stay_words(folder, text):
    facts = gather_facts(
        folder,
        name=text,
        data={"description": text, "languages": [text]},
        evaluation={"metric": text, "value": 1, "dataset": text, "command": text, "split": text, "unit": text},
        license=text,
        limits=[text],
    )
    plain = gather_facts(folder, name="x", data="x", evaluation={**LOSS, "split": "x"}, license="x", limits=["x"])
    update_card(folder, facts)
    update_card(folder, facts)
    card = (folder / "README.md").read_text()
    assert card == render_card(facts) and read_facts(folder) == facts
    data = ModelCard.load(folder / "README.md").data
    assert data.license == text and data.language == [text] and data.eval_results[0].dataset_name == text
    lines = card.split("---\n", 2)[2].splitlines() if "---" not in text else card.splitlines()
    expected = render_card(plain).splitlines()
    for start in ("#", "|", "```", "<!--"):
        found = [line for line in lines if line.startswith(start)]
        assert len(found) == len([line for line in expected if line.startswith(start)]), start
    assert not [line for line in lines if line.startswith("|") and line.count("|") - line.count("\\|") not in (3, 4, 5)]
    # No word opens a tag or a comment, and the comment with the facts ends where its line does.
    prose = [line for line in lines if not line.startswith(("    ", "<!--"))]
    assert not [line for line in prose if "<!--" in line or "<b>" in line]
    record = next(line for line in lines if line.startswith("<!-- engram-hf: facts"))
    assert record.count("<!--") == record.count("-->") == 1 and record.endswith("-->")
    # The command alone is given letter by letter, indented.
    assert "\n".join(f"    {line}" for line in text.strip().splitlines()) in card
    (folder / "README.md").write_text(card + "mine\n")
    update_card(folder, plain)
    assert (folder / "README.md").read_text().endswith(f"{END}\nmine\n")


def test_what_is_no_fact_is_refused(folder):
    for value in (math.nan, math.inf, "4.2", True, None):
        with pytest.raises(ValueError, match="finite number"):
            gather_facts(folder, evaluation={**LOSS, "value": value})
    with pytest.raises(ValueError, match="command"):
        gather_facts(folder, evaluation={**LOSS, "command": " "})
    with pytest.raises(ValueError, match="A result has metric, value, dataset, command"):
        gather_facts(folder, evaluation={"metric": "loss", "value": 1.0})
    with pytest.raises(ValueError, match="data must have a description"):
        gather_facts(folder, data={"tokens": 3})
    for wrong in (
        {"repo_id": 'a"b'},
        {"tables_repo": "a/b/c"},
        {"base_model": "/a/folder"},
        {"base_model": ["a", "b c"]},
    ):
        with pytest.raises(ValueError, match="[Rr]epo id"):
            gather_facts(folder, **wrong)
    with pytest.raises(ValueError, match="[Rr]epo id"):
        gather_facts(folder, data={"description": "x", "datasets": ["my data"]})
    (folder.parent / "outside.png").write_bytes(b"")
    for picture in ("training.png", "../outside.png"):
        with pytest.raises(FileNotFoundError, match="draw it there"):
            gather_facts(folder, picture=picture)
    with pytest.raises(FileNotFoundError, match="trainer_state.json"):
        gather_facts(folder, training=folder)


def test_facts_hold_on_as_long_as_the_weights_do(folder):
    given = {"data": "text", "evaluation": [LOSS], "license": "mit", "limits": ["It is small."], "name": "given"}
    update_card(folder, gather_facts(folder, **given))
    again = gather_facts(folder, repo_id="org/name")
    assert (again.data.description, again.license, again.limits) == ("text", "mit", ("It is small.",))
    assert again.evaluation[0].value == 4.25 and (again.name, again.repo_id) == ("name", "org/name")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    assert gather_facts(folder).evaluation == again.evaluation
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(folder)
    changed = gather_facts(folder)
    assert (changed.evaluation, changed.data, changed.license) == ((), None, None)


def test_the_training_log_is_told_as_it_is(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = TrainingArguments(
        folder / "run", max_steps=6, logging_steps=2, save_steps=3, learning_rate=2e-3, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 9)]
    watch = [EngramGateStatisticsCallback(every=1), EngramRowStatisticsCallback(every=1)]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=watch,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=engram_optimizers(arguments),
    )
    trainer.train()
    trainer.save_state()
    plot_training(folder / "run", folder / "curves of it.png")
    facts = gather_facts(folder, training=folder / "run", picture="curves of it.png")
    history = trainer.state.log_history
    logged = [line for line in history if "loss" in line]
    assert facts.training.steps == 6 and facts.training.loss == logged[-1]["loss"]
    assert facts.training.learning_rate == max(line["learning_rate"] for line in logged)
    assert facts.training.eval_loss is None
    assert list(facts.training.layers) == ["0", "2"]
    assert facts.training.layers["2"]["gate_mean"] == logged[-1]["engram/gate_mean/layer_2"]
    card = render_card(facts)
    assert f"| last training loss in the log | {logged[-1]['loss']:.3f} |" in card
    touched = 100 * logged[-1]["engram/rows_touched/layer_0"]
    assert f"| layer 0: rows that were touched | {touched:.1f} % |" in card
    assert "![Curves of the training run](curves%20of%20it.png)" in card and "evaluation loss" not in card
    trainer.evaluate()
    trainer.save_state()
    again = gather_facts(folder, training=folder / "run")
    assert again.training.eval_loss == history[-1]["eval_loss"]
    # 6 steps of 8 rows, of 16 rows of 9 tokens.
    told = render_card(replace(again, data=TrainingData("text", tokens=16 * 9)))
    assert "; 144 tokens of text in all" in told and f"| tokens that it was trained on | about {6 * 8 * 9} |" in told
    assert "tokens that it was trained on" not in render_card(again)


def test_the_cards_of_the_repository_are_fresh():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from render_cards import rendered_cards
    finally:
        sys.path.pop(0)
    cards, there = rendered_cards(), ROOT / "hub_cards"
    assert {path.name for path in there.glob("*.md")} == {*cards, "template.md"}
    assert {"engram-tiny.md", "engram-27b.md", "engram-40b.md", "moe-27b.md", "dense-4b.md"} == set(cards)
    for name, card in cards.items():
        assert (there / name).read_text() == card, f"{name} is stale: run scripts/render_cards.py"
    demo = read_facts(there / "engram-tiny.md")
    assert (there / demo.picture).stat().st_size < 200_000 and demo.evaluation and demo.training and demo.data
    assert (there / "template.md").resolve() == (ROOT / "src/engram_hf/hub/card_template.md").resolve()


@pytest.mark.parametrize("preset", ["engram-27b", "moe-27b"])
def test_the_code_of_a_preset_runs(preset, capsys):
    card = (ROOT / "hub_cards" / f"{preset}.md").read_text()
    exec(code_of(card), {})
    printed = capsys.readouterr().out
    total = count_parameters(EngramMoEConfig.preset(preset)).total
    assert f"total={total}" in printed and f"{total:,} in all" in card
    assert ("'disk': " in printed) is (preset == "engram-27b")

"""Cards say what is so. Compared with the model itself, with huggingface_hub's parser, and with READMEs of users."""

import hashlib
import json
import math
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import CardFacts, gather_facts, quantize_tables, read_facts, render_card, update_card
from engram_hf.insight.ablation import AblatedPart, Ablation


ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- engram-hf: begin -->", "<!-- engram-hf: end -->"
LOSS = {"metric": "loss", "value": 4.25, "dataset": "held-out text", "command": "python evaluate.py", "unit": "nats"}
WORTH = Ablation(4.5, 1234, 2, [AblatedPart("head", "head 1", 0.125, 4.75, 0.25, -0.5, 1.0)])
DEMO = CardFacts(**json.loads((ROOT / "hub_cards" / "engram-tiny.json").read_text()))
USER_TEXT = "\n# My model\n\nWith `{{ jinja }}`, a tab\t and ---\n"


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A model of two memory layers with its tokenizer, as `save_pretrained` leaves it."""
    config = tiny_config(vocab_size=len(tokenizer), engram_compressed_vocab_size="auto", pad_token_id=0, eos_token_id=1)
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def code_of(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


def test_facts_are_those_of_the_model(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    facts, tables, sizes = gather_facts(folder), model.engram_tables(), dict(model.named_parameters())
    numbers = sum(size.numel() for name, size in sizes.items() if ".table.blocks." in name)
    total = sum(size.numel() for name, size in sizes.items() if ".row_gradients." not in name)
    backbone_nbytes = sum(t.nbytes for name, t in model.state_dict().items() if ".table." not in name)
    own = [(f"model.{table['name']}", table["rows"]) for table in facts.tables]
    assert own == [(table.name, sum(block.rows for block in table.blocks)) for table in tables]
    assert facts.parameters["total"] == total and facts.backbone_nbytes == backbone_nbytes
    assert sum(table["nbytes"] for table in facts.tables) == 4 * numbers
    card, share = render_card(facts), 100 * numbers / (total - facts.parameters["active"])
    assert f"| {share:.1f} %: {numbers:,} parameters in tables, of {total - facts.parameters['active']:,}" in card
    assert f"{tables[0].rows:,} rows of 8 numbers in float32" in card
    model.save_pretrained(folder)
    assert gather_facts(folder) == facts
    model.save_pretrained(tmp_path / "apart", tables_to=tmp_path / "tables")
    assert gather_facts(tmp_path / "apart", tables_from=tmp_path / "tables").tables == facts.tables
    quantize_tables(folder, tmp_path / "int4", "int4")
    smaller = gather_facts(tmp_path / "int4")
    # 8 numbers in 4 bits, and a scale of 2 bytes.
    assert [table["nbytes"] for table in smaller.tables] == [6 * table["rows"] for table in facts.tables]
    assert "take no gradient" in render_card(smaller) and "take no gradient" not in card


def test_the_hub_reads_the_metadata_as_they_are_meant(folder):
    data = {"description": "text", "datasets": ["org/text"], "languages": ["en"]}
    accuracy = {**LOSS, "metric": "accuracy", "value": 1e-7, "dataset_id": "org/text", "split": "test", "unit": None}
    given = {"evaluation": [LOSS, accuracy], "base_model": "org/base", "license": "mit", "repo_id": "org/name"}
    found = ModelCard(render_card(gather_facts(folder, data=data, **given))).data
    assert (found.library_name, found.pipeline_tag, found.license) == ("transformers", "text-generation", "mit")
    assert (found.base_model, found.datasets, found.language) == (["org/base"], ["org/text"], ["en"])
    assert found.tags == ["engram", "engram_moe", "conditional-memory", "mixture-of-experts"]
    loss, other = found.eval_results
    assert (loss.metric_type, loss.metric_value, loss.dataset_type) == ("loss", 4.25, "held-out text")
    assert (other.metric_value, other.dataset_type, other.dataset_split) == (1e-7, "org/text", "test")
    assert (loss.metric_name, other.metric_name, found.model_name) == ("loss (nats)", None, "name")


def test_what_is_not_known_is_left_out(folder):
    given = {"data": "text", "evaluation": LOSS, "license": "mit", "base_model": "org/base", "repo_id": "a/b"}
    all_cards = [render_card(facts) for facts in (gather_facts(folder), gather_facts(folder, **given))]
    all_cards.append((ROOT / "hub_cards" / "engram-27b.md").read_text())
    bare, full, preset = (card.split("<!-- engram-hf: facts")[0] for card in all_cards)
    for word in ("## Training", "## Evaluation", "license:", "base_model:", "model-index:"):
        assert word in full and word not in bare, word
    assert not any(re.search(r"\bNone\b|null|\[\]", card) for card in (bare, full, preset))
    # Nothing is there that a pipeline or a button of the Hub could load.
    assert not re.search("pipeline_tag|library_name|How to load|compression", preset)
    assert "not a release of DeepSeek" in preset and "DeepSeek" not in bare


def test_the_code_for_each_tier_loads_the_tables_there_and_generates(folder, capsys):
    card = render_card(gather_facts(folder, repo_id="org/name", tables_repo="org/tables"))
    assert "[org/tables](https://huggingface.co/org/tables)" in card and "push_engram(model, repo_id, tables_" in card
    code, generating = code_of(card).replace("org/name", str(folder)).split("prompt = ")
    first, *blocks = code.split("model = ")
    names, logits = {}, []
    exec(first, names)
    for block, tier in zip(blocks, ["resident", "host", "disk"], strict=True):
        exec("model = " + block, names)
        assert {each for table in names["model"].engram_tables() for each in table.tiers} == {tier}
        logits.append(names["model"](tiny_ids(1, 9).to(names["model"].device)).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    exec("prompt = " + generating, names)
    assert capsys.readouterr().out.startswith("The")
    for name, floor in (needs := re.findall(r"`(transformers|torch|accelerate)(>=[\d.]+)`", card)):
        assert any(re.match(rf"{name}\b.*{floor}", line) for line in metadata.requires("engram-hf")), name
    assert len(needs) == 3


def test_the_users_text_and_metadata_stay(folder):
    dataset = {"name": "GSM8K", "type": "gsm8k"}
    result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [{"type": "accuracy", "value": 0.1}]}
    own = {"language": ["no"], "tags": ["mine", "engram"], "license": ["mit"], "version": "1.10"}
    own["model-index"] = [{"name": "a", "results": [result]}]
    readme = folder / "README.md"
    readme.write_text(f"---\n{yaml.safe_dump(own)}---\n{USER_TEXT}")
    data = {"description": "text", "languages": ["en"]}
    facts = gather_facts(folder, license="apache-2.0", data=data, evaluation=LOSS)
    for _ in range(2):
        update_card(folder, facts)
        first, found = readme.read_text(), metadata_of(readme.read_text())
        assert USER_TEXT in first and first.count(BEGIN) == 1 and found["library_name"] == "transformers"
        tags = ["mine", "engram", "engram_moe", "conditional-memory", "mixture-of-experts"]
        assert own | {"language": ["no", "en"], "tags": tags} == {key: found[key] for key in own}
    readme.write_text(first.replace("# My model", "# Our model") + "\nThe end.")
    update_card(folder, replace(facts, data=None, limits=["It is small."]))
    second = readme.read_text()
    assert USER_TEXT.replace("My", "Our") in second.split(BEGIN)[0] and second.split(END)[1] == "\n\nThe end."
    assert "* It is small." in second and "Data: text" not in second and metadata_of(second)["language"] == ["no"]


def test_what_an_update_wrote_the_next_one_replaces(tmp_path):
    readme = tmp_path / "README.md"
    update_card(readme, DEMO)
    update_card(readme, other := replace(DEMO, name="b", license="bsd", base_model=["org/other"], evaluation=[]))
    text, expected = readme.read_text(), render_card(other)
    assert text.split("---\n", 2)[2] == expected.split("---\n", 2)[2] and metadata_of(text) == metadata_of(expected)
    # A value that the user corrects stays.
    readme.write_text(text.replace("license: bsd", "license: mit"))
    update_card(readme, replace(other, base_model=[]))
    assert metadata_of(readme.read_text())["license"] == "mit" and "base_model" not in metadata_of(readme.read_text())


DAMAGED = [
    (b"---\nlicense: [mit\n---\n# x\n", "cannot be read"),
    (b"---\njust words\n---\n# x\n", "should be a dict"),
    (b"---\nlanguage: no\n---\n# x\n", "into quotes"),
    (b"---\nlanguage: [en, no]\n---\n# x\n", "into quotes"),
    (f"# x\n{BEGIN}\n".encode(), "once each"),
    (f"# x\n{END}\n{BEGIN}\n".encode(), "once each"),
    (b"# caf\xe9\n", "UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_a_card_that_cannot_be_read_is_named_and_stays(tmp_path, content, message):
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"README.md [\s\S]*{message}"):
        update_card(path, DEMO)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


HOSTILE = [f"a\n---\nb\n{END}\n# y", BEGIN, "{{ x }} {% raw %} | <b>\n\n# c", "```\n# c", "no", "a, [b]: 🤗'\""]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_stay_words(folder, text):
    def told(word):
        result = {**dict.fromkeys(("metric", "dataset", "command", "split", "unit"), word), "value": 1}
        data = {"description": word, "languages": [word]}
        return gather_facts(folder, name=word, data=data, evaluation=result, license=word, limits=[word])

    facts, plain = told(text), render_card(told("x"))
    for _ in range(2):
        update_card(folder, facts)
    card = (folder / "README.md").read_text()
    assert card == render_card(facts) and read_facts(folder) == facts
    data = ModelCard(card).data
    assert (data.license, data.language, data.eval_results[0].dataset_name) == (text, [text], text)
    lines, expected = (each[each.index("## What it is") :].splitlines() for each in (card, plain))
    for start in ("#", "|", "```", "<!--"):
        assert sum(line.startswith(start) for line in lines) == sum(line.startswith(start) for line in expected), start
    # The command alone is given letter by letter, indented.
    assert not [line for line in lines if "<b>" in line and not line.startswith(("    ", "<!--"))]
    assert "\n".join(f"    {line}" if line else "" for line in text.splitlines()) in card


WRONG = [
    *[({"evaluation": {**LOSS, "value": value}}, "finite number") for value in (math.nan, "4.2", True, None)],
    ({"evaluation": {**LOSS, "command": " "}}, "command"),
    ({"evaluation": {"metric": "loss", "value": 1.0}}, "A result has metric, value, dataset, command"),
    ({"data": {"tokens": 3}}, "Data has description"),
    *[({key: "a/b/c"}, "[Rr]epo id") for key in ("repo_id", "tables_repo", "base_model")],
    ({"data": {"description": "x", "datasets": ["my data"]}}, "[Rr]epo id"),
    ({"gates": "gates.png"}, r"gates.png is not a file in .* Draw it there: show"),
    ({"training": "."}, "trainer_state.json"),
]


def test_what_is_no_fact_is_refused(folder):
    for wrong, message in WRONG:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            gather_facts(folder, **wrong)


def test_a_record_of_facts_is_read_where_it_is_the_cards_own_and_nobody_edited_it(tmp_path, caplog):
    readme, facts = tmp_path / "README.md", replace(DEMO, license="mit")
    other = render_card(replace(facts, license="bsd"))
    (quoted,) = [line for line in other.splitlines() if line.startswith("<!-- engram-hf: facts")]
    readme.write_text(f"---\nlicense: bsd\n---\n{quoted}\n")
    assert read_facts(readme) is None
    for _ in range(2):
        update_card(readme, facts)
        assert metadata_of(readme.read_text())["license"] == "bsd" and read_facts(readme) == facts
    readme.write_text(readme.read_text() + f"\n{quoted}\n{END.replace('engram-hf', 'other')}\n")
    assert read_facts(readme) == facts and "were edited" not in caplog.text
    # As a release with one field more has written it.
    record = quoted.replace("bsd", "mit").split(" ", 4)[4].removesuffix(" -->")
    later, own = f'{{"added": 1, {record[1:]}', re.search(rf"\w+ {re.escape(record)}", readme.read_text())[0]
    told = readme.read_text().replace(own, f"{hashlib.sha256(later.encode()).hexdigest()[:16]} {later}")
    readme.write_text(told)
    assert read_facts(readme) == facts and '"added"' in told
    readme.write_text(readme.read_text().replace('"license": "mit"', '"license": "bsd"'))
    assert read_facts(readme) is None and "were edited" in caplog.text


def test_the_training_log_and_the_worth_of_parts_are_told_as_they_are(folder):
    figures = {"engram/gate_mean/layer_0": 0.25, "engram/rows_touched/layer_0": 0.5, "engram/gate_mean/layer_2": 0.75}
    history = [{"step": 2, "loss": 5.0, "learning_rate": 1e-3, "engram/gate_mean/layer_0": 0.1}]
    history += [{"step": 4, "loss": 4.0, "learning_rate": 2e-3, **figures}, {"step": 6, "loss": math.nan}]
    state = {"log_history": history, "global_step": 6, "epoch": 3.0}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "curves of it.png").write_bytes(b"")
    given = {"training": folder, "picture": "curves of it.png", "data": {"description": "text", "tokens": 144}}
    card = render_card(gather_facts(folder, **given, ablation=WORTH))
    told = ["steps | 6 (3.00 epochs)", "tokens that it was trained on | about 432", "layer 0: mean gate | 0.250"]
    told += ["last training loss in the log | 4.000", "layer 0: rows that were touched | 50.0 %"]
    told += ["layer 2: mean gate | 0.750", "head 1 | 12.5 % | 4.750 | +0.250 | -0.500 to +1.000"]
    assert [line for line in told if f"| {line} |\n" not in card] == []
    assert "run](curves%20of%20it.png)" in card and "over 1,234 tokens of 2 documents" in card


def test_the_cards_of_the_repository_are_fresh_and_their_code_runs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "maintenance")
    from render_cards import rendered_cards

    cards, there = rendered_cards(), ROOT / "hub_cards"
    assert {path.name for path in there.glob("*.md")} == {*cards, "template.md", "patch_template.md"}
    for name, card in cards.items():
        assert (there / name).read_text() == card, f"{name} is stale: run render_cards.py"
    assert (demo := read_facts(there / "engram-tiny.md")) == DEMO and demo.evaluation and demo.training and demo.data
    assert (there / demo.picture).stat().st_size < 200_000
    for preset in ("engram-27b", "moe-27b"):
        exec(code_of(cards[f"{preset}.md"]), {})
        (total,) = re.findall(r"\| parameters \| ([\d,]+) in all", cards[f"{preset}.md"])
        assert f"total={total.replace(',', '')}" in (printed := capsys.readouterr().out)
        assert ("'disk': " in printed) is (preset == "engram-27b")

"""Facts in rows: what is written is what `generate` says, nothing else is written, and it comes out again exactly."""

import json
import math

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engram_hf import (
    EngramConfig,
    Fact,
    active_patches,
    add_engram,
    add_patch,
    disable_patches,
    forget,
    load_patch,
    memorize,
    memorize_many,
    remove_patch,
    save_patch,
    use_patches,
)
from engram_hf.insight import silenced


TEXT = [
    {"document": f"d{i}", "text": text}
    for i, text in enumerate(["The class statement is executed.", "A loop ends."] * 3)
]
PROMPT, TARGET = "The capital of Zorvania is", " Oskar"
FACTS = [
    Fact(PROMPT, TARGET, ("Zorvania has its capital in",), ("The capital of the class is",)),
    Fact("Velspar is", " red"),
    Fact("import zorbix as", " zb"),
    Fact("The river Skarne flows", " north"),
]


# So little text that a price by how often it reads a row would be out of all proportion.
GIVEN = {"text": TEXT, "caution": 1.0}


@pytest.fixture
def model(tokenizer):
    """A model of somebody else with a memory that was drawn at random."""
    return randomize_memory(with_memory(tokenizer))


def with_memory(tokenizer, table_dtype="float32"):
    fields = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=2, pad_token_id=0, initializer_range=0.2)).eval()
    config = EngramConfig(layer_ids=[0, 2], vocab_size=499, n_heads=2, head_dim=16, table_dtype=table_dtype)
    return add_engram(model, config, tokenizer)


@torch.no_grad()
def randomize_memory(model):
    for name, parameter in model.named_parameters():
        if ".engram." in name and "row_gradients" not in name:
            parameter.copy_(torch.randn(parameter.shape) * (0.1 if "blocks" in name else 0.5))
    return model


def logits_of(model, tokenizer, text):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]


def probability_of(model, tokenizer, text):
    """Of all tokens of a text behind its first one."""
    log_probs = logits_of(model, tokenizer, text).double().log_softmax(-1)
    return math.exp(sum(float(log_probs[i, id]) for i, id in enumerate(tokenizer(text)["input_ids"][1:])))


def continuation(model, tokenizer, prompt, target):
    """What greedy decoding without a cache says, token by token."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in tokenizer(target)["input_ids"]:
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :])


def test_a_fact_is_said_under_its_patch_and_gone_without_it_bit_for_bit(model, tokenizer):
    model.lm_head.weight.requires_grad_(False)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits_of(model, tokenizer, PROMPT + TARGET)
    patch, report = memorize(model, tokenizer, PROMPT, TARGET, **GIVEN)
    assert torch.equal(logits_of(model, tokenizer, PROMPT + TARGET), before) and not active_patches(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert continuation(model, tokenizer, PROMPT, TARGET) != TARGET

    add_patch(model, patch)
    assert continuation(model, tokenizer, PROMPT, TARGET) == TARGET
    (fact,) = report.facts
    assert fact.is_recalled and fact.said == TARGET and fact.said_before != TARGET and fact.why_not is None
    remove_patch(model, patch.name)
    assert torch.equal(logits_of(model, tokenizer, PROMPT + TARGET), before)


def test_the_figures_of_a_fact_are_those_of_plain_forwards(model, tokenizer):
    patch, report = memorize(model, tokenizer, PROMPT, TARGET, **GIVEN)

    def probability_and_margin():
        ids, start = tokenizer(PROMPT + TARGET)["input_ids"], len(tokenizer(PROMPT)["input_ids"])
        probability, margins = 1.0, []
        for place in range(start, len(ids)):
            logits = logits_of(model, tokenizer, PROMPT + TARGET)[place - 1]
            probability *= float(logits.softmax(-1)[ids[place]])
            others = torch.cat([logits[: ids[place]], logits[ids[place] + 1 :]])
            margins.append(float(logits[ids[place]] - others.max()))
        return probability, min(margins)

    (fact,) = report.facts
    assert fact.probability_before == pytest.approx(probability_and_margin()[0], rel=1e-4)
    add_patch(model, patch)
    probability, margin = probability_and_margin()
    assert fact.probability == pytest.approx(probability, rel=1e-4)
    assert fact.margin == pytest.approx(margin, abs=1e-4) and margin >= 0.25


def test_only_rows_that_the_fact_reads_change(model, tokenizer):
    patch, report = memorize(model, tokenizer, PROMPT, TARGET, **GIVEN)
    ids = torch.tensor([tokenizer(PROMPT + TARGET)["input_ids"][:-1]])
    for layer_id in (0, 2):
        table = model.model.layers[layer_id].engram.default.table
        first_rows = [sum(table.head_rows.tolist()[:head]) for head in range(len(table.head_rows))]
        of_heads = model.engram_memory()[0](ids).row_ids[layer_id][0].tolist()
        read = {first + row_id for row_ids in of_heads for first, row_id in zip(first_rows, row_ids)}
        assert set(patch.tables[f"layers.{layer_id}.engram.default.table"].row_ids.tolist()) == read
    assert len(report.rows) == patch.num_rows == report.facts[0].rows
    assert report.nbytes == patch.num_rows * (8 + 4 * 16)


def test_rows_are_counted_in_the_text_and_a_row_that_is_read_often_changes_less(model, tokenizer):
    often = [{"document": f"d{i}", "text": "Velspar is " * 20} for i in range(4)]
    held_out = [{"document": "held out", "text": "A loop ends."}]
    rare, common = (
        memorize(model, tokenizer, "Velspar is", " red", text=text, held_out=held_out, caution=1.0)[1]
        for text in (TEXT, often)
    )
    assert common.counted_tokens == sum(len(tokenizer(each["text"])["input_ids"]) for each in often)
    # Each 2-gram of the fact but the one at its start occurs again and again.
    assert common.facts[0].hottest_row >= 80 > rare.facts[0].hottest_row
    norms = {row.row_id: row.norm for row in rare.rows}
    assert sum(row.norm < norms[row.row_id] for row in common.rows if row.count >= 76) > 0
    assert sum(row.norm for row in common.rows if row.count >= 76) < sum(
        norms[row.row_id] for row in common.rows if row.count >= 76
    )


def test_drift_is_what_two_forwards_of_each_document_differ_by(model, tokenizer):
    held_out = [{"document": "same", "text": PROMPT}, {"document": "other", "text": "A loop ends here."}]
    patch, report = memorize(model, tokenizer, PROMPT, TARGET, **GIVEN, held_out=held_out)
    divergence, change, tokens, predicted = 0.0, 0.0, 0, 0
    for document in held_out:
        ids = torch.tensor(tokenizer(document["text"])["input_ids"])
        old = logits_of(model, tokenizer, document["text"]).double().log_softmax(-1)
        add_patch(model, patch)
        new = logits_of(model, tokenizer, document["text"]).double().log_softmax(-1)
        remove_patch(model, patch.name)
        divergence += float((old.exp() * (old - new)).sum())
        change += float((old - new)[:-1].gather(1, ids[1:, None]).sum())
        tokens, predicted = tokens + len(ids), predicted + len(ids) - 1
    assert report.drift.tokens == tokens and report.drift.documents == 2
    assert divergence > 0.01
    assert report.drift.kl == pytest.approx(divergence / tokens, rel=1e-3)
    assert report.drift.loss_change == pytest.approx(change / predicted, rel=1e-3)


def test_the_same_facts_give_the_same_patch(model, tokenizer):
    first, second = (memorize_many(model, tokenizer, FACTS[:2], **GIVEN)[0] for _ in range(2))
    for name, each in first.tables.items():
        assert torch.equal(each.rows, second.tables[name].rows)


def test_facts_of_several_batches_all_hold_in_the_end(model, tokenizer):
    patch, report = memorize_many(model, tokenizer, FACTS, **GIVEN, batch_size=1)
    add_patch(model, patch)
    assert report.recalled == len(FACTS)
    assert [continuation(model, tokenizer, fact.prompt, fact.target) for fact in FACTS] == [f.target for f in FACTS]


def test_paraphrases_and_related_prompts_are_answered_by_generate(model, tokenizer):
    patch, report = memorize_many(model, tokenizer, FACTS[:1], **GIVEN)
    (paraphrase,), (related,) = report.facts[0].paraphrases, report.facts[0].related
    assert paraphrase.before == continuation(model, tokenizer, paraphrase.prompt, TARGET)
    add_patch(model, patch)
    assert paraphrase.after == continuation(model, tokenizer, paraphrase.prompt, TARGET)
    assert paraphrase.is_target == (paraphrase.after == TARGET)
    assert related.has_changed == (related.before != related.after) and not related.is_target
    assert f"{int(paraphrase.is_target)} of 1 paraphrases" in report.markdown()


def test_facts_to_keep_are_kept(model, tokenizer):
    known, other = Fact("The capital of Zorvania is", " big"), Fact("The capital of Mirathel is", " red")
    patch, _ = memorize_many(model, tokenizer, [known], **GIVEN, name="known")
    add_patch(model, patch)
    patch, report = memorize_many(model, tokenizer, [other], **GIVEN, keep=[known], name="other")
    assert report.kept == [(known.prompt, True, True)]
    add_patch(model, patch)
    for fact in (known, other):
        assert continuation(model, tokenizer, fact.prompt, fact.target) == fact.target


def test_a_fact_that_does_not_hold_says_why(model, tokenizer):
    _, report = memorize_many(model, tokenizer, FACTS[:1], text=TEXT, caution=1e12, max_steps=2)
    assert "less caution" in report.facts[0].why_not and "0 of 1 facts" in report.markdown()
    shared = [{"document": f"d{i}", "text": "Velspar is red" * 9} for i in range(4)]
    _, report = memorize(model, tokenizer, "Velspar is", " red", text=shared, caution=1e12, max_steps=2)
    assert "shared by too much" in report.facts[0].why_not
    pair = [("A big Velspar is", " red"), ("One more Velspar is", " class")]
    _, report = memorize_many(model, tokenizer, pair, text=TEXT, caution=1e12, max_steps=2)
    assert all("also that of 1 other facts" in fact.why_not for fact in report.facts if not fact.is_recalled)
    assert report.recalled == 0


def test_an_engram_moe_learns_facts_wherever_its_tables_are(tokenizer, tmp_path):
    config = tiny_config(vocab_size=600, engram_vocab_size=499, engram_compressed_vocab_size="auto")
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path)
    places = {f"model.layers.{layer}.engram.table": "disk" for layer in (0, 2)}
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", **places}).eval()
    for each in (model, on_disk):
        patch, report = memorize_many(each, tokenizer, FACTS[1:2], **GIVEN)
        assert report.recalled == 1 and continuation(each, tokenizer, FACTS[1].prompt, " red") != " red"
        add_patch(each, patch)
        assert continuation(each, tokenizer, FACTS[1].prompt, " red") == " red"


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_a_memory_that_was_added_and_never_trained_learns_facts(tokenizer, tmp_path, table_dtype):
    model = with_memory(tokenizer, table_dtype)
    before = logits_of(model, tokenizer, PROMPT)
    patch, report = memorize_many(model, tokenizer, FACTS[:2], **GIVEN)
    assert report.recalled == 2
    add_patch(model, load_patch(save_patch(patch, tmp_path)))
    assert [continuation(model, tokenizer, fact.prompt, fact.target) for fact in FACTS[:2]] == [TARGET, " red"]
    remove_patch(model, "facts")
    assert torch.equal(logits_of(model, tokenizer, PROMPT), before)


def test_forgetting_reads_the_rows_of_whole_ngrams_as_zeros(model, tokenizer):
    text, whole = " class statement is", "The class statement is executed."
    patch, report = forget(model, text, tokenizer, counted=TEXT, facts=[FACTS[0]])
    with silenced(model, rows={int(name.split(".")[1]): each.row_ids for name, each in patch.tables.items()}):
        expected = logits_of(model, tokenizer, whole)
    plain, was = logits_of(model, tokenizer, whole), probability_of(model, tokenizer, text)
    add_patch(model, patch)
    forgotten, now = logits_of(model, tokenizer, whole), probability_of(model, tokenizer, text)
    assert torch.equal(forgotten, expected) and not torch.equal(forgotten, plain)
    ids = tokenizer(text)["input_ids"]
    # Two heads for each order, two layers; no two of so few n-grams share a row.
    assert patch.num_rows == 2 * 2 * (len(ids) - 1 + len(ids) - 2) == len(report.rows)
    assert report.facts[0].said_before and min(row.norm for row in report.rows) > 0
    told, said = report.forgotten, report.markdown()
    assert (told.text, told.to, told.rows) == (text, "zero", patch.num_rows) and report.kept == [] and was != now
    assert (told.probability_before, told.probability) == pytest.approx((was, now))
    assert f"now read zeros: {patch.num_rows:,} rows were reset. The text had the probability {was:.2g}" in said
    assert f"and has {now:.2g} now" in said and "says now" in said and "recalled" not in said


def test_forgetting_finds_the_tokenizer_beside_the_model(model, tokenizer, tmp_path):
    text = " class statement"
    with pytest.raises(ValueError, match="No tokenizer lies in"):
        forget(model, text, counted=TEXT)
    tokenizer.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    found, expected = (forget(model, text, *given, counted=TEXT)[0].tables for given in ((), (tokenizer,)))
    assert all(torch.equal(found[name].row_ids, expected[name].row_ids) for name in expected)


def test_forgetting_to_the_base_takes_back_what_active_patches_say(model, tokenizer):
    text = "The class statement is executed."
    plain = logits_of(model, tokenizer, text)
    with pytest.raises(ValueError, match="No active patch has changed"):
        forget(model, text, tokenizer, to="base", counted=TEXT)
    zeros, _ = forget(model, text, tokenizer, counted=TEXT, name="zeros")
    add_patch(model, zeros)
    assert not torch.equal(logits_of(model, tokenizer, text), plain)
    back, _ = forget(model, text, tokenizer, to="base", counted=TEXT, name="back")
    assert back.num_rows == zeros.num_rows
    add_patch(model, back)
    assert torch.equal(logits_of(model, tokenizer, text), plain)


def test_a_report_is_json_and_text(model, tokenizer):
    _, report = memorize_many(model, tokenizer, FACTS[:1], **GIVEN)
    content = json.loads(report.to_json())
    assert content["recalled"] == report.recalled == 1
    assert content["facts"][0]["paraphrases"][0]["prompt"] == "Zorvania has its capital in"
    assert len(content["rows"]) == len(report.rows) and content["drift"]["tokens"] == report.drift.tokens
    assert PROMPT in str(report) and "held-out documents" in str(report)


WRONG_FACTS = [
    ([], "There is no fact"),
    ({"prompt": "a"}, "list or a file of JSON lines, got dict"),
    ([{"prompt": "Velspar is"}], "Fact 0 has no target"),
    ([{"prompt": "Velspar is", "target": 3}], "Fact 0 has no target, which is a text; got 3"),
    ([{"prompt": "a", "target": " b", "answer": "c"}], "field 'answer'"),
    ([{"prompt": "a", "target": " b", "paraphrases": "c"}], "paraphrases of Fact 0"),
    (["Velspar is red"], "Fact 0 is a str"),
    ([("Velspar is", " red"), ("Velspar is", " blue")], "Facts 0 and 1 have the same prompt"),
    ([("The clas", "s statement")], "makes one token of the end"),
]


@pytest.mark.parametrize("facts, sentence", WRONG_FACTS)
def test_what_is_no_fact_is_refused(model, tokenizer, facts, sentence):
    with pytest.raises(ValueError, match=sentence):
        memorize_many(model, tokenizer, facts, **GIVEN)


def test_a_file_of_facts_names_the_line_that_is_wrong(model, tokenizer, tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text('{"prompt": "Velspar is", "target": " red"}\n\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"Line 3 of .*facts.jsonl is no JSON"):
        memorize_many(model, tokenizer, file, **GIVEN)


def test_contexts_that_hide_the_patch_are_refused(model, tokenizer):
    for context in (disable_patches(model), use_patches(model, [None])):
        with context:
            with pytest.raises(ValueError, match="memorize lays patches over .* Call it outside"):
                memorize(model, tokenizer, PROMPT, TARGET, **GIVEN)
            with pytest.raises(ValueError, match="forget lays patches over .* Call it outside"):
                forget(model, PROMPT, tokenizer, counted=TEXT)
    # Contexts of another model hide nothing.
    with disable_patches(with_memory(tokenizer)):
        assert memorize(model, tokenizer, PROMPT, TARGET, **GIVEN)[1].recalled == 1


def test_options_and_models_that_cannot_be_are_refused(model, tokenizer):
    numbers = ({"margin": -1}, {"margin": float("inf")}, {"caution": float("nan")}, {"caution": "low"})
    for options in (*numbers, {"max_steps": 0}, {"max_steps": 1.5}, {"batch_size": 0}, {"batch_size": "8"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a (whole )?number of at least [01], got"):
            memorize(model, tokenizer, PROMPT, TARGET, text=TEXT, **options)
    with pytest.raises(ValueError, match="text is one document, so none can be held out"):
        memorize(model, tokenizer, PROMPT, TARGET, text=["One text."])
    # Messages speak of the argument that the user gave.
    for given, sentence in (({"text": "One text."}, "text is one str"), ({"held_out": [[]]}, "held_out has no tokens")):
        with pytest.raises(ValueError, match=sentence):
            memorize(model, tokenizer, PROMPT, TARGET, **{"text": TEXT, **given})
    with pytest.raises(ValueError, match="Row 0 of counted has the columns"):
        forget(model, PROMPT, tokenizer, counted=[{"words": "One text."}])
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    with pytest.raises(ValueError, match="no memory layer"):
        memorize(LlamaForCausalLM(LlamaConfig(vocab_size=600, **sizes)), tokenizer, PROMPT, TARGET)
    with pytest.raises(ValueError, match='"zero" or "base"'):
        forget(model, PROMPT, tokenizer, to="nothing")
    with pytest.raises(ValueError, match="no n-gram"):
        forget(model, "a", tokenizer)

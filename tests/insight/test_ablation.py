"""What a part of a memory is worth: losses against plain forwards with hooks, and parts that are worth nothing."""

import json
from collections import Counter

import pytest
import torch
from architectures import tiny_backbone, with_memory
from tiny import tiny_config, tiny_ids, tiny_model

from engram_hf import disable_engram
from engram_hf.insight import ablate, text_rows
from engram_hf.insight.intervals import interval
from engram_hf.insight.ngram_classes import CLASSES, class_of, classes_of
from engram_hf.insight.text_rows import read_rows


# The last row says few things often.
DATA = [
    {"input_ids": tiny_ids(1, 9, seed=9)[0].tolist(), "document": "a"},
    {"input_ids": tiny_ids(1, 5, seed=5)[0].tolist(), "document": "b"},
    {"input_ids": (tiny_ids(1, 14, seed=14)[0] % 3 + 3).tolist(), "document": "a"},
]
KINDS = ["engram_moe", "llama"]


def any_model(kind: str):
    return tiny_model() if kind == "engram_moe" else with_memory(tiny_backbone(kind))


@torch.no_grad()
def losses(model, hooks=(), positions=None) -> list[float]:
    """The loss of each row, summed over its tokens, with hooks that are given the number of the row."""
    found = []
    for number, row in enumerate(DATA):
        handles = [module.register_forward_hook(hook(number)) for module, hook in hooks]
        ids = torch.tensor([row["input_ids"]])
        log_probs = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        found.append(-sum(float(log_probs[place, token]) for place, token in enumerate(row["input_ids"][1:])))
        for handle in handles:
            handle.remove()
    return found


def zero_memory(number):
    return lambda layer, args, output: (torch.zeros_like(output[0]), output[1])


def zero_heads(heads, count=4):
    """Of rows (batch, seq, heads x width), those of some heads are zeros."""

    def hook(number):
        def zero(table, args, output):
            rows = output.unflatten(-1, (count, -1)).clone()
            rows[..., heads, :] = 0
            return rows.flatten(-2)

        return zero

    return hook


def check(part, model, hooks) -> None:
    base, silent = losses(model), losses(model, hooks)
    tokens = sum(len(row["input_ids"]) - 1 for row in DATA)
    assert part.loss == pytest.approx(sum(silent) / tokens, abs=1e-5)
    assert part.worth == pytest.approx((sum(silent) - sum(base)) / tokens, abs=1e-5)
    counts = torch.tensor([len(row["input_ids"]) - 1 for row in DATA])
    difference = (torch.tensor(silent) - torch.tensor(base)) / counts
    ends = interval(difference, [row["document"] for row in DATA], counts)[1:]
    assert (part.low, part.high) == pytest.approx(ends, abs=1e-5)
    # A part that says nothing would make the comparison empty.
    assert abs(part.worth) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_worth_what_forwards_with_hooks_say(kind):
    model = any_model(kind)
    layers = model.engram_memory().layers
    found = ablate(model, DATA, ["memory", "layer", "order", "head"])
    assert found.loss == pytest.approx(sum(losses(model)) / found.tokens, abs=1e-5)
    assert (found.tokens, found.documents) == (8 + 4 + 13, 2)
    memory, *parts = found.parts
    check(memory, model, [(layer, zero_memory) for layer in layers])
    of_layers, orders, heads = parts[:2], parts[2:4], parts[4:]
    assert [part.part for part in of_layers + orders] == ["layer 0", "layer 2", "2-grams", "3-grams"] and len(
        heads
    ) == 8
    check(of_layers[1], model, [(layers[1], zero_memory)])
    check(orders[0], model, [(layer.table, zero_heads([0, 1])) for layer in layers])
    check(heads[6], model, [(layers[1].table, zero_heads([2]))])
    assert heads[6].part == "head 2 of layer 2 (3-grams)" and heads[6].share == 1 / 8
    assert losses(model) == losses(any_model(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_hottest_rows_are_those_that_the_text_looks_up_most(kind):
    model = any_model(kind)
    ngram_hash, layers = model.engram_memory()
    counts: dict = {layer: Counter() for layer in layers}
    for layer in layers:
        for row in DATA:
            row_ids = ngram_hash(torch.tensor([row["input_ids"]])).row_ids[layer.layer_idx][0]
            counts[layer].update((row_ids + layer.table.first_rows_of_heads).flatten().tolist())
    ranked = {layer: [count for _, count in own.most_common()] for layer, own in counts.items()}
    # So that nothing depends on which of several rows is taken.
    k = next(k for k in range(1, 40) if all(each[k - 1] > each[k] for each in ranked.values()))
    hottest = {layer: [row_id for row_id, _ in own.most_common(k)] for layer, own in counts.items()}

    def zero_rows(layer):
        def hook(number):
            def zero(table, args, output):
                of_table = args[0] + layer.table.first_rows_of_heads
                is_hot = torch.tensor(
                    [[[row_id in hottest[layer] for row_id in rows] for rows in of_table[0].tolist()]]
                )
                return (output.unflatten(-1, (4, -1)) * ~is_hot.unsqueeze(-1)).flatten(-2)

            return zero

        return hook

    one, all_rows = ablate(model, DATA, "hottest rows", hottest_rows=[k, 10**6]).parts
    lookups = sum(sum(each) for each in ranked.values())
    assert one.share == pytest.approx(sum(sum(each[:k]) for each in ranked.values()) / lookups)
    assert all_rows.share == 1.0 and one.part == f"the {k} hottest rows of each table"
    check(one, model, [(layer.table, zero_rows(layer)) for layer in layers])
    check(all_rows, model, [(layer.table, zero_heads([0, 1, 2, 3])) for layer in layers])


def test_a_memory_without_values_is_worth_nothing():
    model = tiny_model()
    for layer in model.engram_memory().layers:
        torch.nn.init.zeros_(layer.value_proj.weight)
    found = ablate(model, DATA, ["memory", "head", "hottest rows"])
    assert {(part.worth, part.low, part.high) for part in found.parts} == {(0.0, 0.0, 0.0)}


def test_an_added_memory_is_worth_the_difference_to_the_model_without_it():
    model = any_model("llama")
    (part,) = ablate(model, DATA).parts
    with disable_engram(model):
        without = sum(losses(model))
    assert part.loss == pytest.approx(without / (8 + 4 + 13), abs=1e-5)


TEXTS = ["He met the princess of Wales. The 3 kings saw it_all() in the end", "and of the", "In 1999, John said no."]


def text_model(tokenizer):
    model = tiny_model(tiny_config(vocab_size=len(tokenizer)))
    return model, [{"text": text, "document": text} for text in TEXTS]


@pytest.mark.parametrize("batch_tokens", [1, 1024])
def test_classes_of_ngrams_share_out_all_tokens(tokenizer, monkeypatch, batch_tokens):
    monkeypatch.setattr(text_rows, "BATCH_TOKENS", batch_tokens)
    model, data = text_model(tokenizer)
    found = ablate(model, data, "n-gram class", tokenizer=tokenizer)
    rows = list(read_rows(data, tokenizer))
    classes = torch.cat([classes_of(row, 3, tokenizer) for row in rows]).tolist()
    assert [part.part for part in found.parts] == [f"n-grams: {name}" for name in CLASSES] and sum(
        part.share for part in found.parts
    ) == 1.0
    layers = model.engram_memory().layers
    for number, part in enumerate(found.parts):
        assert part.share == classes.count(number) / len(classes) > 0
        silent = 0.0
        for row in rows:
            mask = classes_of(row, 3, tokenizer) == number

            def zero(layer, args, output, mask=mask):
                return output[0] * ~mask[None, :, None, None], output[1]

            handles = [layer.register_forward_hook(zero) for layer in layers]
            with torch.no_grad():
                log_probs = model(row.ids[None], use_cache=False).logits[0].double().log_softmax(-1)
            silent -= sum(float(log_probs[place, token]) for place, token in enumerate(row.ids[1:]))
            for handle in handles:
                handle.remove()
        assert part.loss == pytest.approx(silent / found.tokens, abs=1e-5)


@pytest.mark.parametrize(
    ("ngram", "before", "expected"),
    [
        (" 3 kings", "The", "numbers"),
        ("def f(", "", "code"),
        ("self._x", "", "code"),
        ("isEmpty", "", "code"),
        (" princess of Wales", "the", "names"),
        (" of Wales", "princess", "names"),
        (" Wales is", "end.", "other"),
        ("The cat", "", "other"),
        ("ales", "W", "other"),
        ("Ring", "String".removesuffix("ring"), "other"),
        (" and I", "he", "function words"),
        (" in the", "is", "function words"),
        ("The", ".\n", "function words"),
        (" . . .", "end", "other"),
        (" straße", "die", "other"),
        (" in Ägypten", "sie", "names"),
        ("日本", "", "other"),
        ("", "", "other"),
    ],
)
def test_an_ngram_has_the_class_of_the_first_rule_that_fits(ngram, before, expected):
    assert class_of(ngram, before) == expected


def test_what_cannot_be_measured_is_refused_with_a_sentence():
    model = tiny_model()
    for data, what, told in [
        (DATA, "heads", "what must be one of 'memory', 'layer'"),
        (DATA, ["n-gram class"], "by their text"),
        ([[5], [6]], "memory", "predicts no token"),
        ([{"input_ids": [5, 6], "labels": [5, -100]}], "memory", "predicts no token"),
    ]:
        with pytest.raises(ValueError, match=told):
            ablate(model, data, what)
    with pytest.raises(ValueError, match="found no memory layer"):
        ablate(tiny_backbone("llama"), DATA)


def test_one_document_has_no_interval(tmp_path):
    found = ablate(tiny_model(), [{**row, "document": "a"} for row in DATA], ["memory", "order"])
    assert {(part.low, part.high) for part in found.parts} == {(None, None)}
    assert json.loads(found.to_json())["parts"][0]["low"] is None
    assert str(found).count("\n| ") == 4 and found.draw(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

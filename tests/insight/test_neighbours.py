"""What lies next to an n-gram, against a loop over all rows of a table."""

import json

import pytest
import torch
from architectures import tiny_backbone, with_memory
from tiny import tiny_config, tiny_model

from engram_hf.insight import nearest_ngrams, neighbours


TEXTS = ["The list is a mutable sequence, and so is the array of the list.", "Is the list a list?", "so is the set"]


def text_model(tokenizer, **fields):
    model = tiny_model(tiny_config(vocab_size=len(tokenizer), engram_compressed_vocab_size="auto", **fields))
    model.bind_tokenizer(tokenizer)
    return model


@torch.no_grad()
def rows_of(layer) -> torch.Tensor:
    return torch.cat([layer.table.stored_as.decode(block.detach(), 8) for block in layer.table.blocks]).float()


def cosine(one, other) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def naive_ngrams(model, tokenizer, layer, order):
    """Compressed n-gram to its rows, its count, and its tokens where it comes first."""
    found, per_order = {}, len(layer.table.head_rows) // 2
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        hashed = model.engram_memory().ngram_hash(torch.tensor([ids]))
        row_ids = hashed.row_ids[layer.layer_idx][0] + layer.table.first_rows_of_heads
        for place in range(len(ids)):
            ngram = tuple(hashed.ngrams[0, -order:, place].tolist())
            rows = row_ids[place, (order - 2) * per_order : (order - 1) * per_order].tolist()
            entry = found.setdefault(ngram, [rows, 0, ids[max(0, place - order + 1) : place + 1]])
            entry[1] += 1
    return found


@pytest.mark.parametrize("at_once", [3, 2**14])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_neighbours_are_those_of_a_loop_over_all_rows(tokenizer, monkeypatch, at_once, dtype):
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", at_once)
    model = text_model(tokenizer, engram_table_dtype=dtype)
    layer = model.engram_memory().layers[1]
    table, ngrams = rows_of(layer), naive_ngrams(model, tokenizer, layer, 3)
    near = nearest_ngrams(model, " a  LIST is the", TEXTS, tokenizer=tokenizer, layer=2, how_many=4)
    ids = tokenizer(" a  LIST is the")["input_ids"]
    assert near.tokens == ids[-3:] and near.text == tokenizer.decode(ids[-3:]) and near.order == 3
    hashed = model.engram_memory().ngram_hash(torch.tensor([ids]))
    wanted = (hashed.row_ids[2][0, -1] + layer.table.first_rows_of_heads)[2:].tolist()
    assert [(head.head, head.row_id) for head in near.heads] == list(zip((2, 3), wanted))
    for column, head in enumerate(near.heads):
        readers: dict[int, list] = {}
        for rows, count, tokens in ngrams.values():
            readers.setdefault(rows[column], []).append((count, tokens))
        cosines = {row: cosine(table[row], table[head.row_id]) for row in readers if row != head.row_id}
        best = sorted(cosines, key=lambda row: -cosines[row])[:4]
        assert [row.row_id for row in head.nearest] == best
        assert [row.cosine for row in head.nearest] == pytest.approx([cosines[row] for row in best], abs=1e-5)
        for row_id, found in [(row.row_id, row.ngrams) for row in head.nearest] + [(head.row_id, head.sharing)]:
            of_row = readers.get(row_id, [])
            assert sorted(n.count for n in found) == sorted(count for count, _ in sorted(of_row)[-4:])
            assert all((n.count, n.tokens) in of_row for n in found)
    own = torch.cat([table[row] for row in wanted])
    cosines = {
        tuple(tokens): cosine(torch.cat([table[row] for row in rows]), own)
        for rows, _, tokens in ngrams.values()
        if rows != wanted
    }
    best = sorted(cosines, key=lambda tokens: -cosines[tokens])[:4]
    assert [tuple(each.ngram.tokens) for each in near.nearest] == best
    assert [each.cosine for each in near.nearest] == pytest.approx([cosines[tokens] for tokens in best], abs=1e-5)


@pytest.mark.parametrize("kind", ["engram_moe", "llama"])
def test_without_a_text_all_rows_of_the_head_are_compared(kind, monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", 10)
    model = tiny_model() if kind == "engram_moe" else with_memory(tiny_backbone(kind))
    layer = model.engram_memory().layers[0]
    table, firsts = rows_of(layer), layer.table.first_rows_of_heads.tolist()
    for row_id in (0, firsts[1], firsts[3] + 5, layer.table.num_rows - 1):
        near = nearest_ngrams(model, row_id)
        head = max(number for number, first in enumerate(firsts) if first <= row_id)
        assert (near.heads[0].head, near.order, near.tokens, near.nearest) == (head, head // 2 + 2, None, [])
        own = range(firsts[head], firsts[head] + int(layer.table.head_rows[head]))
        cosines = {row: cosine(table[row], table[row_id]) for row in own if row != row_id}
        assert [row.row_id for row in near.heads[0].nearest] == sorted(cosines, key=lambda row: -cosines[row])[:8]


def test_a_table_on_disk_has_the_same_neighbours(tokenizer, tmp_path):
    model = text_model(tokenizer)
    model.save_pretrained(tmp_path)
    on_disk = type(model).from_pretrained(tmp_path, device_map={"": "cpu", "model.layers.0.engram.table": "disk"})
    assert on_disk.engram_tables()[0].tiers.keys() == {"disk"}
    for wanted in (" is the list", 17):
        expected = nearest_ngrams(model, wanted, TEXTS, tokenizer=tokenizer)
        found = nearest_ngrams(on_disk, wanted, TEXTS, tokenizer=tokenizer)
        assert found == expected and json.loads(found.to_json())["heads"][0]["head"] == found.heads[0].head
        assert str(found) and found.heads[0].nearest


def test_what_has_no_neighbours_is_refused_with_a_sentence(tokenizer):
    model = text_model(tokenizer)
    for wanted, given, told in [
        (" is the", {}, "tokenizer=tokenizer"),
        ("a", {"tokenizer": tokenizer}, "has 1 tokens"),
        (10**6, {}, "has no row 1000000"),
        (-1, {}, "has no row -1"),
        (0, {"layer": 1}, r"memory layers \(zero-based\) are \[0, 2\]"),
    ]:
        with pytest.raises(ValueError, match=told):
            nearest_ngrams(model, wanted, **given)

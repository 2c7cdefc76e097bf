"""What a text does with tables, against dictionaries that are filled one token at a time."""

import json
from collections import Counter

import pytest
import torch
from architectures import tiny_backbone, with_memory
from tiny import shaped_config, tiny_config, tiny_ids, tiny_model

from engram_hf.insight import row_report, row_use
from engram_hf.insight.row_use import CountedNgram


DATA = [tiny_ids(1, seq, seed=seq)[0].tolist() for seq in (40, 7, 90, 1)]
# So that some n-grams come again.
DATA += [DATA[0][10:30], [row % 9 + 3 for row in DATA[2]]]


def naive(model):
    """For each layer the rows in the order of lookups, and for each head the n-grams and the rows that they read."""
    ngram_hash, layers = model.engram_memory()
    lookups, ngrams, order = {}, {}, ngram_hash.max_ngram_size
    for layer in layers:
        lookups[layer.layer_idx], ngrams[layer.layer_idx] = [], {}
        for ids in DATA:
            row_ids = ngram_hash(torch.tensor([ids])).row_ids[layer.layer_idx][0] + layer.table.first_rows_of_heads
            for place, rows in enumerate(row_ids.tolist()):
                lookups[layer.layer_idx] += rows
                for head, row_id in enumerate(rows):
                    size = head // (len(rows) // (order - 1)) + 2
                    ngram = tuple(ids[max(0, place - size + 1) : place + 1])
                    ngrams[layer.layer_idx].setdefault(head, Counter())[ngram, row_id] += 1
    return lookups, ngrams


@pytest.mark.parametrize(("kind", "tokens_at_once"), [("engram_moe", 2**15), ("four", 2**15), ("llama", 50)])
def test_a_report_counts_what_the_tokens_read(kind, tokens_at_once, monkeypatch):
    monkeypatch.setattr(row_use, "HASHED_TOKENS", tokens_at_once)
    model = {
        "engram_moe": tiny_model,
        "four": lambda: tiny_model(shaped_config((1, 4, 3))),
        "llama": lambda: with_memory(tiny_backbone("llama")),
    }[kind]()
    lookups, ngrams = naive(model)
    report = row_report(model, DATA)
    assert report.tokens == sum(map(len, DATA)) and [table.layer for table in report.tables] == list(lookups)
    for table in report.tables:
        own, of_heads = lookups[table.layer], ngrams[table.layer]
        counts = Counter(own)
        assert (table.lookups, table.rows_read) == (len(own), len(counts))
        assert table.dead_rows == table.rows - len(counts)
        ranked = [count for _, count in counts.most_common()]
        assert table.zipf == [
            (rank, ranked[rank - 1]) for rank in [2**power for power in range(9)] if rank < len(ranked)
        ] + [(len(ranked), ranked[-1])]
        assert table.share_of_hottest[10] == pytest.approx(sum(ranked[: -(-table.rows // 10)]) / len(own))
        for use in table.heads:
            distinct = of_heads[use.head]
            assert use.ngrams == len({ngram for ngram, _ in distinct})
            assert use.rows_read == len({row_id for _, row_id in distinct})
            expected = use.rows * (1 - (1 - 1 / use.rows) ** use.ngrams)
            assert use.collisions_by_chance == pytest.approx(use.ngrams - expected)
        assert sum(use.rows_read for use in table.heads) == table.rows_read
        check_hottest(table, of_heads)
        check_caches(table, own)


def check_hottest(table, of_heads):
    per_order = len(of_heads) // len({ngram.order for ngram in table.hottest_ngrams})
    for order in {ngram.order for ngram in table.hottest_ngrams}:
        first = (order - 2) * per_order
        expected = Counter({ngram: count for (ngram, _), count in of_heads[first].items()})
        found = [ngram for ngram in table.hottest_ngrams if ngram.order == order]
        assert [ngram.count for ngram in found] == [count for _, count in expected.most_common(len(found))]
        for ngram in found:
            tokens = tuple(ngram.tokens)
            assert expected[tokens] == ngram.count > 0 and ngram.text is None
            assert ngram.row_ids == [
                row_id for head in range(first, first + per_order) for each, row_id in of_heads[head] if each == tokens
            ]


def check_caches(table, row_ids):
    assert table.caches[-1].rows == table.rows and table.cached_lookups == len(row_ids)
    for cache in table.caches:
        kept, hits = [], 0
        for row_id in row_ids:
            hits += row_id in kept
            kept = [row_id, *(other for other in kept if other != row_id)][: cache.rows]
        assert cache.hit_rate == pytest.approx(hits / len(row_ids))
        assert cache.nbytes == cache.rows * table.row_nbytes


def test_rows_of_padded_batches_are_those_of_the_rows_alone():
    padded = [{"input_ids": [0] * 5 + ids + [0], "attention_mask": [0] * 5 + [1] * len(ids) + [0]} for ids in DATA]
    assert row_report(tiny_model(), padded) == row_report(tiny_model(), DATA)


def test_a_report_reads_no_row_and_computes_no_layer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    on_disk = type(tiny_model()).from_pretrained(
        tmp_path, device_map={"": "cpu", **{f"model.layers.{i}.engram.table": "disk" for i in (0, 2)}}
    )

    def refuse(module, args):
        raise AssertionError("a layer was called")

    for layer in on_disk.model.layers:
        layer.register_forward_pre_hook(refuse)
        if layer.engram is not None:
            layer.engram.table.register_forward_pre_hook(refuse)
    assert row_report(on_disk, DATA) == row_report(tiny_model(), DATA)


def test_ngrams_are_shown_as_they_are_written_first(tokenizer):
    config = tiny_config(vocab_size=len(tokenizer), engram_compressed_vocab_size="auto", engram_layer_ids=[1])
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    report = row_report(model, ["The list, the list, THE LIST", "The list"], tokenizer=tokenizer)
    (table,) = report.tables
    assert all(ngram.text == tokenizer.decode(ngram.tokens) for ngram in table.hottest_ngrams)
    text = str(report)
    assert "dead" in text and repr(table.hottest_ngrams[0].text) in text
    content = json.loads(report.to_json())["tables"][0]
    assert content["heads"][0]["collisions"] == table.heads[0].collisions and content["dead_rows"] == table.dead_rows
    assert CountedNgram(**content["hottest_ngrams"][0]) == table.hottest_ngrams[0]


def test_the_picture_of_rows_is_drawn(tmp_path):
    assert row_report(tiny_model(), DATA).draw(tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_a_memory_has_no_rows_to_report():
    with pytest.raises(ValueError, match="row_report found no memory layer"):
        row_report(tiny_backbone("llama"), DATA)

"""Counts of rows and n-grams against dictionaries that are filled one token at a time."""

from collections import Counter

import pytest
import torch

from engram_hf.counting import CountedNgrams, RowCounts, SharedRows, mix, reuse_distances


# Two heads for each of the orders 2, 3 and 4.
ROWS_OF_HEADS = torch.tensor([7, 11, 5, 13, 11, 7])


def drawn(batches=4, tokens=30):
    """Pairs of row ids, (tokens, heads), and n-grams, (tokens, 4), in which equal n-grams read equal rows."""
    generator = torch.Generator().manual_seed(0)
    first = ROWS_OF_HEADS.cumsum(0) - ROWS_OF_HEADS
    for _ in range(batches):
        ngrams = torch.randint(-1, 4, (tokens, 4), generator=generator)
        row_ids = torch.zeros(tokens, 6, dtype=torch.int64)
        for token in range(tokens):
            for head in range(6):
                order = head // 2 + 2
                row_ids[token, head] = hash((head, *ngrams[token, -order:].tolist())) % int(ROWS_OF_HEADS[head])
        yield row_ids + first, ngrams


def test_rows_are_counted_as_a_counter_counts_them():
    counts, expected = RowCounts(ROWS_OF_HEADS), Counter()
    for row_ids, _ in drawn():
        counts.add(row_ids)
        expected.update(row_ids.flatten().tolist())
    assert counts.counts.tolist() == [expected[row] for row in range(int(ROWS_OF_HEADS.sum()))]
    assert counts.touched().tolist() == [expected[row] > 0 for row in range(int(ROWS_OF_HEADS.sum()))]
    hottest = counts.hottest(3)
    assert [count for _, count in hottest] == [count for _, count in expected.most_common(3)]
    assert all(expected[row] == count for row, count in hottest)
    assert len(counts.hottest(10**6)) == int(ROWS_OF_HEADS.sum())


def test_a_row_belongs_to_the_head_whose_rows_it_is_among():
    heads = [head for head, rows in enumerate(ROWS_OF_HEADS.tolist()) for _ in range(rows)]
    assert RowCounts(ROWS_OF_HEADS).heads_of(torch.arange(len(heads))).tolist() == heads


def test_ngrams_per_row_are_those_of_sets():
    shared = SharedRows(ROWS_OF_HEADS, max_ngram_size=4)
    with pytest.raises(ValueError, match="No n-gram"):
        shared.ngrams_per_row()
    ngrams: dict[int, set] = {head: set() for head in range(6)}
    rows: dict[int, set] = {head: set() for head in range(6)}
    for row_ids, batch in drawn():
        shared.add(row_ids, batch)
        for token in range(len(batch)):
            for head in range(6):
                ngrams[head].add(tuple(batch[token, -(head // 2 + 2) :].tolist()))
                rows[head].add(int(row_ids[token, head]))
    measured, at_random = shared.ngrams_per_row()
    assert measured == pytest.approx(sum(len(ngrams[head]) / len(rows[head]) for head in ngrams) / 6)
    # Balls thrown into so many bins, by a plain simulation.
    generator = torch.Generator().manual_seed(1)
    thrown = []
    for head, distinct in ngrams.items():
        draws = torch.randint(int(ROWS_OF_HEADS[head]), (400, len(distinct)), generator=generator)
        filled = torch.tensor([len(draw.unique()) for draw in draws]).double().mean()
        thrown.append(len(distinct) / float(filled))
    assert at_random == pytest.approx(sum(thrown) / 6, rel=0.01)
    assert {order: len(known) for order, known in shared.ngrams.items()} == {
        order: len(ngrams[2 * (order - 2)]) for order in (2, 3, 4)
    }
    assert [shared.order_of(head) for head in range(6)] == [2, 2, 3, 3, 4, 4]


def test_each_head_has_its_own_counts():
    shared, sets = SharedRows(ROWS_OF_HEADS, max_ngram_size=4), {head: (set(), set()) for head in range(6)}
    for row_ids, batch in drawn():
        shared.add(row_ids, batch)
        for token in range(len(batch)):
            for head, (ngrams, rows) in sets.items():
                ngrams.add(tuple(batch[token, -(head // 2 + 2) :].tolist()))
                rows.add(int(row_ids[token, head]))
    uses = shared.per_head()
    assert [(use.head, use.order, use.rows) for use in uses] == [
        (head, head // 2 + 2, int(ROWS_OF_HEADS[head])) for head in range(6)
    ]
    for use in uses:
        ngrams, rows = sets[use.head]
        assert (use.ngrams, use.rows_read, use.collisions) == (len(ngrams), len(rows), len(ngrams) - len(rows))
        # Each row is missed by all n-grams with the chance (1 - 1 / rows) ** n-grams.
        by_chance = sum(1 - (1 - 1 / use.rows) ** use.ngrams for _ in range(use.rows))
        assert use.rows_read_by_chance == pytest.approx(by_chance)
        assert use.collisions_by_chance == pytest.approx(use.ngrams - by_chance)


@pytest.mark.parametrize("most", [5, 10**6])
def test_ngrams_are_counted_as_a_counter_counts_them(most):
    counted, expected, first = CountedNgrams(ROWS_OF_HEADS, 4, most), Counter(), {}
    for row_ids, batch in drawn():
        written = batch * 10 + torch.arange(len(batch)).unsqueeze(1) % 3
        counted.add(row_ids, batch, written)
        for token in range(len(batch)):
            for order in (2, 3, 4):
                ngram = (order, *batch[token, -order:].tolist())
                expected[ngram] += 1
                first.setdefault(ngram, (written[token, -order:].tolist(), row_ids[token].tolist()))
    for order in (2, 3, 4):
        # Dictionaries keep the order in which n-grams came.
        kept = [ngram for ngram in expected if ngram[0] == order][:most]
        numbers = mix(torch.tensor([ngram[1:] for ngram in kept]), order)
        places = {int(number): place for place, number in enumerate(counted.ngrams[order])}
        assert set(places) == set(numbers.tolist())
        for ngram, number in zip(kept, numbers.tolist()):
            written, rows = first[ngram]
            assert int(counted.counts[order][places[number]]) == expected[ngram]
            assert counted.tokens[order][places[number]].tolist() == written
            assert counted.rows[order][places[number]].tolist() == rows[2 * (order - 2) : 2 * (order - 1)]
        hottest = [int(counted.counts[order][place]) for place in counted.hottest(order, 3)]
        assert hottest == sorted((expected[ngram] for ngram in kept), reverse=True)[:3]


def hits_of_a_cache(row_ids: list[int], size: int) -> list[bool]:
    """Whether each lookup hits a cache that keeps the rows that were looked up last."""
    cache, hits = [], []
    for row in row_ids:
        hits.append(row in cache)
        cache = [row, *(other for other in cache if other != row)][:size]
    return hits


@pytest.mark.parametrize("lookups", [0, 1, 2, 63, 64, 300])
def test_reuse_distances_give_the_hits_of_every_cache(lookups):
    generator = torch.Generator().manual_seed(lookups)
    # Few rows often and many seldom, as in text.
    row_ids = (40 * torch.rand(lookups, generator=generator) ** 3).long()
    distances = reuse_distances(row_ids)
    for size in (1, 2, 3, 8, 40):
        assert ((distances >= 0) & (distances < size)).tolist() == hits_of_a_cache(row_ids.tolist(), size)

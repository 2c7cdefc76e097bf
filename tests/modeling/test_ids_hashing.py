"""The hash: golden vectors, an independent scalar reference, and the rule of what a token may see."""

from types import SimpleNamespace

import pytest
import torch
from conftest import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_row_ids
from tiny import tiny_config, tiny_model
from transformers import PythonBackend

from engram_hf import NgramHash, build_token_map
from engram_hf.modeling.ids_hashing import check_fingerprint
from engram_hf.modeling.ids_reach import pack_history, token_reach, unpack_history


GOLDEN_IDS = torch.tensor([[5, 17, 17, 42, 3, 999, 0, 1]])


def made_hash(layer_ids, vocab_sizes, n_heads, compressed_vocab_size, pad_id, seed) -> NgramHash:
    config = SimpleNamespace(
        vocab_size=compressed_vocab_size,
        engram_id_space=compressed_vocab_size,
        engram_compressed_vocab_size=None,
        engram_layer_ids=layer_ids,
        engram_vocab_sizes=vocab_sizes,
        engram_max_ngram_size=len(vocab_sizes) + 1,
        engram_n_heads=n_heads,
        engram_pad_token_id=pad_id,
        engram_seed=seed,
        engram_fingerprint=None,
    )
    return NgramHash.from_config(config, pad_id)


def large_hash() -> NgramHash:
    return made_hash([1, 15], [646400, 646400], n_heads=8, compressed_vocab_size=100_000, pad_id=2, seed=0)


def small_hash() -> NgramHash:
    return made_hash([0, 1], [101, 211], n_heads=2, compressed_vocab_size=1000, pad_id=2, seed=7)


def test_golden_vectors_of_the_paper_sized_hash():
    hashing = large_hash()
    assert hashing.multipliers(1) == [75936276614145, 4795930018387, 35633158494689]
    assert hashing.multipliers(15) == [28656513679687, 55511705102367, 53439361606171]
    assert hashing.primes(1) == [
        [646403, 646411, 646421, 646423, 646433, 646453, 646519, 646523],
        [646537, 646543, 646549, 646571, 646573, 646577, 646609, 646619],
    ]
    assert [heads[0] for heads in hashing.primes(15)] == [646631, 646781]
    assert (hashing.num_rows(1), hashing.num_rows(15)) == (10_344_164, 10_348_242)
    rows = hashing.row_ids(1, GOLDEN_IDS)
    assert rows.shape == (1, 8, 16)
    first = (
        "182806 595020 300721 133915 52998 424624 490939 214892 141394 161264 232878 507114 390201 173619 561893 580888"
    )
    fifth = (
        "24481 455830 567058 209029 396043 313098 215279 395708 72842 204899 451904 401320 3112 538154 191568 187867"
    )
    assert rows[0, 0].tolist() == [int(row) for row in first.split()]
    assert rows[0, 4].tolist() == [int(row) for row in fifth.split()]


def test_golden_vectors_of_a_small_hash():
    hashing = small_hash()
    assert hashing.multipliers(0) == [5765488047046173, 8275336682942967, 7154437704795911]
    assert (hashing.primes(0), hashing.primes(1)) == ([[101, 103], [211, 223]], [[107, 109], [227, 229]])
    assert hashing.row_ids(0, GOLDEN_IDS)[0, [0, 4]].tolist() == [[29, 9, 43, 24], [47, 85, 34, 49]]
    assert hashing.row_ids(1, GOLDEN_IDS)[0, [0, 4]].tolist() == [[47, 101, 3, 81], [90, 80, 108, 62]]


def test_no_two_heads_of_a_model_share_a_prime():
    hashing = made_hash([0, 1], [16_000_000] * 3, n_heads=8, compressed_vocab_size=100_000, pad_id=2, seed=0)
    primes = [prime for layer in (0, 1) for heads in hashing.primes(layer) for prime in heads]
    assert len(set(primes)) == 48 and min(primes) >= 16_000_000


@st.composite
def documents(draw):
    """A batch of packed documents with tokens that carry no memory, and the hash to read it with."""
    orders, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(2, 300), min_size=orders, max_size=orders))
    vocab = draw(st.integers(1, 2**40))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    ids = [draw(st.integers(-1, vocab - 1)) for _ in range(sum(lengths))]
    pad, seed = draw(st.integers(0, vocab - 1)), draw(st.integers(0, 1000))
    positions = [position for length in lengths for position in range(length)]
    return made_hash([0, 3], sizes, heads, vocab, pad, seed), ids, positions


@given(documents(), st.integers(0, 27))
@settings(max_examples=150, deadline=None)
def test_the_hash_equals_the_scalar_reference_for_packed_documents_and_any_split(case, cut):
    hashing, ids, positions = case
    batch, places = torch.tensor([ids]), torch.tensor([positions])
    for layer in (0, 3):
        expected = naive_row_ids(ids, positions, hashing.multipliers(layer), hashing.primes(layer), hashing.pad_id)
        whole = hashing.row_ids(layer, batch, positions=places)
        assert whole[0].tolist() == expected
        bounds = torch.tensor([prime for heads in hashing.primes(layer) for prime in heads])
        assert ((whole >= 0) & (whole < bounds)).all()
        if 0 < cut < len(ids):
            # The first part on its own, the second with the first as history.
            parts = [
                hashing.row_ids(layer, batch[:, :cut], places[:, :cut]),
                hashing.row_ids(layer, batch, places[:, cut:]),
            ]
            assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_token_sees_neither_a_token_without_memory_nor_past_it():
    hashing = small_hash()
    gap = torch.tensor([[7, 8, -1, 9, 10]])
    alone = torch.tensor([[9, 10]])
    assert torch.equal(hashing.row_ids(0, gap)[:, 3:], hashing.row_ids(0, alone))


def test_ids_of_32_bits_give_the_same_rows():
    assert torch.equal(large_hash().row_ids(1, GOLDEN_IDS.int()), large_hash().row_ids(1, GOLDEN_IDS))


def test_row_ids_are_the_same_under_compile():
    hashing = large_hash()
    compiled = torch.compile(lambda ids: hashing.row_ids(1, ids), backend="aot_eager")
    assert torch.equal(compiled(GOLDEN_IDS), hashing.row_ids(1, GOLDEN_IDS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_row_ids_are_the_same_on_a_gpu():
    hashing = large_hash()
    assert torch.equal(hashing.row_ids(1, GOLDEN_IDS.cuda()).cpu(), hashing.row_ids(1, GOLDEN_IDS))


def test_a_cache_entry_gives_back_ids_and_run():
    ids, reach = torch.tensor([[4, -1, 0, 9]]), torch.tensor([[0, 0, 0, 1]])
    restored, run = unpack_history(pack_history(ids, reach))
    assert torch.equal(restored, ids) and run.tolist() == [2]
    assert unpack_history(torch.zeros(1, 2, dtype=torch.int64))[1].tolist() == [0]


def test_ids_out_of_range_and_unknown_layers_are_refused():
    with pytest.raises(ValueError, match="below 1000, got 1000"):
        small_hash().row_ids(0, torch.tensor([[1000]]))
    with pytest.raises(ValueError, match=r"Layer 2 has no memory; memory layers \(zero-based\) are \[0, 1\]"):
        small_hash().row_ids(2, GOLDEN_IDS)
    with pytest.raises(ValueError, match="pad id must lie in"):
        made_hash([0], [101], 1, 10, pad_id=10, seed=0)
    with pytest.raises(ValueError, match="bind_tokenizer"):
        NgramHash.from_config(tiny_config(engram_compressed_vocab_size="auto"))


def test_a_config_without_memory_layers_has_no_hash():
    with pytest.raises(ValueError, match="engram_layer_ids is empty"):
        NgramHash.from_config(tiny_config(engram_layer_ids=[]))


def test_from_config_takes_the_compressed_pad():
    config = tiny_config(engram_compressed_vocab_size=50, engram_pad_token_id=7)
    assert NgramHash.from_config(config).pad_id == 7
    assert NgramHash.from_config(config, pad_id=3).pad_id == 3


@pytest.mark.parametrize(
    ("words", "compressed"),
    [
        (["Apple", " apple", "APPLE"], [0, 0, 0]),
        (["é", "É", "e", "ﬁ", "fi"], [0, 0, 0, 1, 1]),
        (["İ", "i", "ı"], [0, 0, 1]),
        (["ß", "ss"], [0, 1]),
        (["\n\n", "\u00a0", "\u3000", " "], [0, 0, 0, 0]),
        (["\u200b", ""], [0, 1]),
        (["①", "1"], [0, 0]),
        (["が", "か"], [0, 0]),
        (["किताब", "कतब"], [0, 0]),
        (["b\ufffd", "B\ufffd"], [0, 1]),
    ],
)
def test_token_compression_normalises_as_published(words, compressed):
    assert build_token_map(word_tokenizer(words)).tolist() == compressed


def test_token_compression_shrinks_a_real_vocabulary(tokenizer):
    token_map = build_token_map(tokenizer)
    assert token_map.dtype == torch.int64 and token_map.shape == (len(tokenizer),)
    # Byte tokens that are no text on their own keep ids of their own.
    assert 0.6 * len(tokenizer) < int(token_map.max()) + 1 < len(tokenizer)
    ids = {text: token_map[tokenizer.convert_tokens_to_ids(text)].item() for text in ("a", "A", "Ġ", "Ċ")}
    assert ids["a"] == ids["A"] and ids["Ġ"] == ids["Ċ"]


def test_a_slow_tokenizer_is_refused():
    class Slow(PythonBackend):
        vocab_size = 3

        def get_vocab(self):
            return {}

    with pytest.raises(ValueError, match="needs a fast tokenizer, got Slow"):
        build_token_map(Slow())


def test_a_fingerprint_names_what_differs():
    fingerprint = small_hash().fingerprint(torch.arange(1000))
    check_fingerprint(fingerprint, small_hash().fingerprint(torch.arange(1000)), "this")
    other = small_hash().fingerprint(torch.arange(1000).flip(0))
    with pytest.raises(ValueError, match="differs in: map") as error:
        check_fingerprint(fingerprint, other, "this")
    assert fingerprint["map"] in str(error.value) and other["map"] in str(error.value)


@pytest.mark.parametrize("orders", [2, 3, 4])
def test_all_layers_at_once_equal_the_scalar_reference_over_many_tokens(orders):
    sizes = {"vocab_size": 5003, "engram_vocab_size": 10_007, "engram_layer_ids": [0, 2]}
    model = tiny_model(tiny_config(engram_max_ngram_size=orders, **sizes)).model
    hashing = NgramHash.from_config(model.config)
    ids = torch.randint(5003, (3, 2807), generator=torch.Generator().manual_seed(0))
    row_ids = model.ngram_hash(ids).row_ids
    for layer in (0, 2):
        assert row_ids[layer].is_contiguous()
        for row in range(3):
            expected = naive_row_ids(
                ids[row].tolist(), range(2807), hashing.multipliers(layer), hashing.primes(layer), hashing.pad_id
            )
            assert row_ids[layer][row].tolist() == expected


@pytest.mark.parametrize("history", [0, 1, 4])
def test_the_reach_of_a_token_is_a_count_of_real_tokens_before_it(history):
    generator = torch.Generator().manual_seed(history)
    for _ in range(50):
        ids = torch.where(torch.rand(2, history + 6, generator=generator) < 0.3, -1, 7)
        positions = torch.arange(6).unsqueeze(0) + int(torch.randint(9, (1,), generator=generator))
        before = torch.randint(5, (2,), generator=generator)
        reach = token_reach(ids, positions, before)
        for row in range(2):
            for t in range(6):
                place, count = history + t, 0
                if ids[row, place] < 0:
                    assert reach[row, t] == -1
                    continue
                while count < positions[0, t]:
                    earlier = place - count - 1
                    if earlier < 0 and before[row] < -earlier or earlier >= 0 and ids[row, earlier] < 0:
                        break
                    count += 1
                assert reach[row, t] == count, (ids[row], t, before[row])

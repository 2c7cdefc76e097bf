"""The hash of `qwen4_exp`: the same row ids as its own module, and a model of it is exact in every way of computing."""

from types import SimpleNamespace

import pytest
import torch
from cases import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_row_ids
from tiny import assert_same_logits, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from engram_hf import EngramConfig, EngramMoEConfig, EngramMoEForCausalLM, NgramHash, add_engram
from engram_hf.modeling.configuration_checks import HASHES
from engram_hf.modeling.ids_hashing import FAMILIES
from engram_hf.modeling.memory_layer import IDS, MemoryCacheLayer, keep_ids


END = 5
SEQ = 23


def made_hash(**fields) -> NgramHash:
    made = NgramHash(
        SimpleNamespace(
            **{
                "vocab_size": 61,
                "engram_id_space": 61,
                "engram_compressed_vocab_size": None,
                "engram_layer_ids": [0, 2],
                "engram_vocab_sizes": [53, 53],
                "engram_max_ngram_size": 3,
                "engram_n_heads": 2,
                "engram_pad_token_id": END,
                "engram_seed": 1234,
                "engram_fingerprint": None,
                "engram_hash": "splitmix",
                **fields,
            }
        )
    )
    made.confirm("this test")
    return made


def ids_with_ends(batch: int, seq: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """Random ids, a fourth of which end a document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, seq), generator=generator)
    return ids.masked_fill(torch.rand(batch, seq, generator=generator) < 0.25, END)


def published_config(**overrides) -> EngramMoEConfig:
    fields = {"engram_hash": "splitmix", "engram_compressed_vocab_size": None, **overrides}
    return EngramMoEConfig(vocab_size=248320, engram_vocab_size=20_000_000, **fields)


def test_golden_constants_of_the_published_table():
    hashing = NgramHash.from_config(published_config(engram_layer_ids=[1], engram_seed=1234, eos_token_id=[7, 8]))
    assert hashing.multipliers(1) == [23703573157769, 20109073645365, 8052911324071]
    assert (hashing.num_rows(1), hashing.num_table_rows(1)) == (320_001_446, 320_001_536)
    assert hashing.pad_id == 7
    # The seed counts memories; it does not depend on the layers that they are in.
    elsewhere = NgramHash.from_config(published_config(engram_layer_ids=[3, 4], engram_seed=1234))
    assert elsewhere.multipliers(3) == hashing.multipliers(1) != elsewhere.multipliers(4)


def test_the_fingerprint_names_the_family_and_stays_what_it_was_without_one():
    fields = {"engram_layer_ids": [1], "engram_compressed_vocab_size": None, "engram_pad_token_id": 7}
    splitmix = NgramHash.from_config(published_config(**fields)).fingerprint()
    engram = NgramHash.from_config(published_config(**fields, engram_hash="engram")).fingerprint()
    assert splitmix["hash"] == "splitmix" and "hash" not in engram
    # Written by the version before the second family.
    assert engram == {
        "map": "none",
        "multipliers": "ecc214e69f94f967",
        "primes": "0ec8f61281eb5e28",
        "ids": "248320",
        "orders": "2-3",
        "pad": "7",
    }
    stored = tiny_config(engram_hash="splitmix", engram_fingerprint=engram | {"ids": "99"})
    with pytest.raises(ValueError, match="differs in: hash, multipliers, pad, primes"):
        NgramHash(stored).confirm("this")


def test_every_family_that_a_config_may_name_is_there():
    assert set(HASHES) == set(FAMILIES)


def stock_module(orders: int, heads: int, index: int, layer_idx: int, config) -> Qwen4ExpTextNGramEmbedding:
    """The module of transformers, with a table whose rows hold their own numbers."""
    module = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, layer_idx, index)
    with torch.no_grad():
        module.ngram_embedding.weight.copy_(torch.arange(len(module.ngram_embedding.weight)).unsqueeze(1))
    return module


def stock_row_ids(module: Qwen4ExpTextNGramEmbedding, ids: torch.Tensor, cache=None) -> torch.Tensor:
    """(batch, seq, heads) row ids of the table."""
    return module(ids, cache).unflatten(-1, (module.ngram_heads, -1))[..., 0].long()


def table_row_ids(hashing: NgramHash, layer: int, row_ids: torch.Tensor) -> torch.Tensor:
    primes = torch.tensor([prime for heads in hashing.primes(layer) for prime in heads])
    return row_ids + primes.cumsum(0) - primes


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("orders", "heads", "base"), [(3, 2, 53), (2, 3, 31), (4, 1, 127), slow(3, 8, 2003)])
def test_row_ids_are_those_of_the_module_of_transformers(orders, heads, base, batch):
    layers = [0, 1, 3]
    config = Qwen4ExpTextConfig(
        vocab_size=61,
        hidden_size=(orders - 1) * heads * 2,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
        ple_layer_ids=[layer + 1 for layer in layers],
        ngram_size=orders,
        heads_per_ngram=heads,
        ngram_vocab_size_base=base,
        eos_token_id=[END, 1],
    )
    config.seed = 99
    hashing = made_hash(
        engram_layer_ids=layers,
        engram_vocab_sizes=[base] * (orders - 1),
        engram_max_ngram_size=orders,
        engram_n_heads=heads,
        engram_seed=99,
    )
    modules = {layer: stock_module(orders, heads, i, layer, config) for i, layer in enumerate(layers)}
    ids = ids_with_ends(batch, SEQ, seed=orders)
    mask = torch.ones_like(ids)
    mask[0, : 4 if batch > 1 else 0] = 0
    # As its model does with padding.
    read = torch.where(mask > 0, ids, END)
    for chunks in ([SEQ], [1] * SEQ, [1, 5, 1, 2, 9, 5]):
        caches = {layer: DynamicCache(config=config) for layer in layers}
        state = MemoryCacheLayer()
        for places in torch.arange(SEQ).split(chunks):
            hashed = hashing(ids[:, places], token_mask=mask[:, places], history=state.past(IDS))
            keep_ids(state, hashed)
            for layer, module in modules.items():
                assert len(module.ngram_embedding.weight) == hashing.num_table_rows(layer)
                ours = table_row_ids(hashing, layer, hashed.row_ids[layer])
                theirs = stock_row_ids(module, read[:, places], caches[layer])
                is_token = mask[:, places] > 0
                assert torch.equal(ours[is_token], theirs[is_token]), (layer, places)
    whole = {layer: stock_row_ids(module, read) for layer, module in modules.items()}
    hashed = hashing(ids, token_mask=mask)
    for layer in layers:
        is_token = mask > 0
        assert torch.equal(table_row_ids(hashing, layer, hashed.row_ids[layer])[is_token], whole[layer][is_token])


@given(
    st.lists(st.lists(st.integers(-1, 6), min_size=1, max_size=7), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 27),
)
@settings(max_examples=100, deadline=None)
def test_the_hash_equals_the_scalar_reference_for_packed_documents_and_any_split(lengths, orders, cut):
    hashing = made_hash(engram_max_ngram_size=orders + 1, engram_vocab_sizes=[53] * orders)
    ids = [i for document in lengths for i in document]
    positions = [position for document in lengths for position in range(len(document))]
    batch, places = torch.tensor([ids]), torch.tensor([positions])
    for layer in (0, 2):
        expected = naive_row_ids(ids, positions, hashing.multipliers(layer), hashing.primes(layer), END, ends=END)
        whole = hashing.row_ids(layer, batch, places)
        assert whole[0].tolist() == expected
        if 0 < cut < len(ids):
            parts = [
                hashing.row_ids(layer, batch[:, :cut], places[:, :cut]),
                hashing.row_ids(layer, batch, places[:, cut:]),
            ]
            assert torch.equal(torch.cat(parts, dim=1), whole)


# A model of this hash.


def splitmix_model(**overrides):
    return tiny_model(tiny_config(engram_hash="splitmix", engram_pad_token_id=END, hc_mult=2, **overrides))


@pytest.fixture(scope="module", params=[(3, 4), (4, 0)], ids=["order3-taps4", "order4-taps0"])
def model(request):
    return splitmix_model(engram_max_ngram_size=request.param[0], engram_kernel_size=request.param[1])


def some_ids(batch: int, seed: int = 0) -> torch.Tensor:
    return ids_with_ends(batch, SEQ, 99, seed).clamp_min(3)


def test_a_document_that_ends_hides_its_ngrams_from_the_next():
    ids, changed = (torch.tensor([[9, before, END, 7, 6, 10]]) for before in (8, 12))
    rows, others = (made_hash()(each).row_ids[0] for each in (ids, changed))
    assert torch.equal(rows[:, 3:], others[:, 3:]) and not torch.equal(rows[:, 2], others[:, 2])
    # Without an end there is none between them.
    rows, others = (made_hash(engram_pad_token_id=4)(each).row_ids[0] for each in (ids, changed))
    assert not torch.equal(rows[:, 3], others[:, 3])


@torch.no_grad()
def test_cached_and_chunked_equal_the_full_forward(model):
    ids = some_ids(2)
    full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=SEQ + 3)):
        for chunks in ([1] * SEQ, [1, 5, 1, 2, 9, 5]):
            cache.reset()
            logits = [model(part, cache=cache, use_cache=True).logits for part in ids.split(chunks, dim=1)]
            assert_same_logits(torch.cat(logits, dim=1), full)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model):
    ids = some_ids(2)
    expected = model(ids).logits
    padding, ones = torch.full((2, 4), END), torch.ones_like(ids)
    mask = torch.cat([torch.zeros_like(padding), ones], dim=1)
    assert_same_logits(model(torch.cat([padding, ids], dim=1), attention_mask=mask).logits[:, 4:], expected)
    mask = torch.cat([ones, torch.zeros_like(padding)], dim=1)
    assert_same_logits(model(torch.cat([ids, padding], dim=1), attention_mask=mask).logits[:, :SEQ], expected)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model):
    documents = [some_ids(1, seed)[:, :length] for seed, length in enumerate((1, 4, 9, 2))]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    logits = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    assert_same_logits(logits, torch.cat([model(document).logits for document in documents], dim=1))


@torch.no_grad()
def test_a_shared_prefix_under_one_mask_gives_the_logits_of_separate_rows(model):
    prefix, one, other = some_ids(1)[:, :6], some_ids(1, 1)[:, :5], some_ids(1, 2)[:, :5]
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[11:, 6:11] = False
    positions = torch.cat([torch.arange(11), torch.arange(6, 11)]).unsqueeze(0)
    ids = torch.cat([prefix, one, other], dim=1)
    logits = model(ids, attention_mask=mask[None, None], position_ids=positions, use_cache=False).logits
    assert_same_logits(logits[:, :11], model(torch.cat([prefix, one], dim=1)).logits)
    assert_same_logits(logits[:, 11:], model(torch.cat([prefix, other], dim=1)).logits[:, 6:])


@torch.no_grad()
def test_generation_equals_the_uncached_way(model):
    ids, mask = some_ids(2), torch.ones(2, SEQ, dtype=torch.int64)
    mask[0, :4] = 0
    # Ends are generated too, and do not end the generation.
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    options |= {"suppress_tokens": [i for i in range(99) if i not in (END, 7, 40, 62)]}
    uncached = {"use_cache": False, "cache_implementation": None}
    for ways in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        cached = model.generate(ids, **options, **ways)
        assert torch.equal(cached, model.generate(ids, **options, **{**ways, **uncached}))
        assert 0 < (cached[:, SEQ:-1] == END).sum() < 2 * 7


def test_row_ids_are_the_same_in_one_compiled_graph():
    hashing, ids = made_hash(), ids_with_ends(2, SEQ)
    compiled = torch.compile(lambda ids: hashing(ids).row_ids, backend="aot_eager", fullgraph=True)
    for layer, row_ids in hashing(ids).row_ids.items():
        assert torch.equal(compiled(ids)[layer], row_ids)


@torch.no_grad()
def test_a_saved_model_has_tables_of_the_published_shape_and_the_same_logits_from_disk(tmp_path):
    model = splitmix_model()
    for table in model.named_tables().values():
        assert table.num_rows % 128 == 0 and table.num_rows - int(table.head_rows.sum()) in range(1, 128)
        assert sum(len(block) for block in table.blocks) == table.num_rows
    ids = some_ids(2)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", "...table": "disk"})
    assert loaded.config.engram_hash == "splitmix" and loaded.config.engram_fingerprint["hash"] == "splitmix"
    assert torch.equal(loaded(ids).logits, expected)


def test_a_family_is_part_of_what_a_checkpoint_is_checked_for(tmp_path):
    tiny_model(tiny_config(engram_pad_token_id=END)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="differs in: hash, multipliers"):
        EngramMoEForCausalLM.from_pretrained(tmp_path, engram_hash="splitmix")


def test_an_added_memory_of_this_hash_ends_its_ngrams_at_the_eos_of_the_model(tmp_path):
    def backbone():
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=99, pad_token_id=0, eos_token_id=[END, 1], **sizes)).eval()

    config = EngramConfig([1], 53, 2, 4, compressed_vocab_size=None, start="random", hash="splitmix")
    model = add_engram(backbone(), config)
    memory = next(module for module in model.modules() if isinstance(module, NgramHash))
    assert memory.pad_id == END and memory.config.engram_fingerprint["hash"] == "splitmix"
    ids = some_ids(2)
    with torch.no_grad():
        full, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
        logits = [model(part, cache=cache).logits for part in ids.split([1, 5, 1, 2, 9, 5], dim=1)]
        assert_same_logits(torch.cat(logits, dim=1), full)
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids, use_cache=False).logits, full)
    assert not torch.equal(full, backbone()(ids, use_cache=False).logits)
    sized = EngramConfig.for_model(model, 20_000, hash="splitmix", compressed_vocab_size=None)
    tables = add_engram(backbone(), sized).named_tables().values()
    assert sum(block.numel() for table in tables for block in table.blocks) <= 20_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engram_hash": "crc32"}, "engram_hash must be one of engram, splitmix; got 'crc32'"),
        ({"engram_hash": "longcat"}, "engram_hash cannot be 'longcat': LongCat adds up ids .* another formula"),
        (
            {"engram_compressed_vocab_size": "auto"},
            "hashes raw token ids, so engram_compressed_vocab_size must be None",
        ),
        ({"engram_compressed_vocab_size": 50}, "must be None, got 50"),
        ({"eos_token_id": None}, "begins n-grams anew after the token that ends a document, and eos_token_id is None"),
    ],
)
def test_what_no_family_can_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EngramMoEConfig.from_dict(
            {**tiny_config(engram_hash="splitmix").to_dict(), "engram_pad_token_id": None, **fields}
        )
    if "eos_token_id" not in fields:
        short = {name.removeprefix("engram_"): value for name, value in fields.items()}
        with pytest.raises(ValueError, match=message.replace("engram_", "")):
            EngramConfig([1], 53, 2, 4, **{"compressed_vocab_size": None, "hash": "splitmix", **short})

"""Documents in one row, however they are marked: by positions that jump, by masks, at the border of a cache."""

import pytest
import torch
from tiny import SHAPES, assert_same_logits, shaped_config, tiny_config, tiny_ids, tiny_model
from transformers import DynamicCache

from engram_hf.modeling.ids_reach import document_positions


@pytest.fixture(params=SHAPES, ids=lambda shape: "streams{}-order{}-taps{}".format(*shape))
def model(request):
    return tiny_model(shaped_config(request.param))


def test_positions_count_from_where_a_piece_begins():
    positions = torch.tensor([[0, 1, 2, 7, 8, 0, 1, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
    expected = [[0, 1, 2, 0, 1, 0, 1, 0, 1], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert document_positions(positions).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 4, 10])
def test_a_packed_piece_may_begin_at_any_position(model, start):
    ids = tiny_ids(1, 12)
    positions = torch.cat([torch.arange(6), torch.arange(start, start + 6)]).unsqueeze(0)
    packed = model(ids, position_ids=positions).logits
    assert_same_logits(packed[:, :6], model(ids[:, :6]).logits)
    assert_same_logits(packed[:, 6:], model(ids[:, 6:], position_ids=positions[:, 6:]).logits)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("mask", [False, True])
def test_a_document_that_begins_behind_a_cache_is_refused(model, length, mask):
    ids = tiny_ids(1, 12)
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], cache=cache)
    options = {"attention_mask": torch.ones(1, 6 + length, dtype=torch.int64)} if mask else {}
    with pytest.raises(ValueError, match="do not continue where the cache ends.*Leave the cache out"):
        model(ids[:, 6 : 6 + length], cache=cache, position_ids=torch.arange(length)[None], **options)


@torch.no_grad()
def test_a_jump_beside_padding_is_refused(model):
    ids = tiny_ids(1, 12)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 7, 8, 9, 10, 11, 12]])
    with pytest.raises(ValueError, match="need attention_mask=None"):
        model(ids, attention_mask=mask, position_ids=positions)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_blocks_keeps_the_memory_apart_too(model, kind):
    ids = tiny_ids(1, 12)
    document = torch.tensor([0] * 5 + [1] * 7)
    mask = torch.ones(12, 12).tril().bool() & (document[:, None] == document)
    if kind == "float":
        mask = torch.zeros(12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)
    blocks = model(ids, attention_mask=mask[None, None]).logits
    assert_same_logits(blocks[:, :5], model(ids[:, :5]).logits)
    # Rotary positions are relative, so that the second document need not begin at 0.
    assert_same_logits(blocks[:, 5:], model(ids[:, 5:]).logits)


@torch.no_grad()
def test_padding_between_tokens_is_a_gap_in_every_way_of_computing(model):
    ids = tiny_ids(1, 12)
    mask = torch.ones_like(ids)
    mask[:, 5:7] = 0
    whole = model(ids, attention_mask=mask).logits
    cache, steps = DynamicCache(config=model.config), []
    for start, end in ((0, 4), (4, 8), (8, 9), (9, 12)):
        steps.append(model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits)
    assert_same_logits(
        torch.cat(steps, dim=1)[:, [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]], whole[:, [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]]
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 2}]
)
def test_ids_for_the_memory_follow_chunks_and_candidates(options):
    model = tiny_model()
    ids = tiny_ids(1, 12)
    marked = ids.clone()
    marked[:, 3] = -1
    greedy = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, engram_input_ids=marked, **greedy)
    assert not torch.equal(expected, model.generate(ids, **greedy))
    assert torch.equal(model.generate(ids, engram_input_ids=marked, **greedy, **options), expected)


@torch.no_grad()
def test_ids_outside_the_vocabulary_are_refused():
    model = tiny_model()
    ids = tiny_ids(1, 5)
    with pytest.raises(ValueError, match=r"below vocab_size \(99\), got 1000000"):
        model(ids, engram_input_ids=torch.full_like(ids, 10**6))


@pytest.mark.slow
@torch.no_grad()
def test_embeddings_alone_compile_in_one_graph():
    model = tiny_model(tiny_config())
    ids = tiny_ids(1, 9)
    embeds = model.get_input_embeddings()(ids)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_logits(compiled(inputs_embeds=embeds, use_cache=False).logits, model(ids).logits)

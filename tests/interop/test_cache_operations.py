"""What decoders of one's own do with a cache, compared with computing each row anew."""

import copy
import io

import pytest
import torch
from tiers import REFUSALS
from tiny import SHAPES, assert_same_logits, shaped_config, tiny_ids, tiny_model
from transformers import DynamicCache, StaticCache

from engram_hf.modeling.memory_layer import MemoryCacheLayer


PREFIX = 13
ROWS = 3


@pytest.fixture(params=SHAPES, ids=lambda shape: "streams{}-order{}-taps{}".format(*shape))
def model(request):
    return tiny_model(shaped_config(request.param))


def new_cache(model, kind: str = "dynamic"):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=40)
    return DynamicCache(config=model.config)


@torch.no_grad()
def filled(model, ids: torch.Tensor, kind: str = "dynamic", chunks=(1, 6, 2), recording: bool = False):
    """A cache that has seen these ids, in pieces."""
    cache = new_cache(model, kind)
    if recording:
        cache.activate_past_recording()
    start = 0
    for length in (*chunks, ids.shape[1]):
        if ids[:, start : start + length].shape[1]:
            model(ids[:, start : start + length], cache=cache)
        start += length
    return cache


@torch.no_grad()
def assert_goes_on(model, cache, seen: torch.Tensor, steps=(1, 3, 1, 1)) -> None:
    """What follows the cache has the logits of the whole rows."""
    rest = tiny_ids(seen.shape[0], sum(steps), seed=7)
    expected = model(torch.cat([seen, rest], dim=1), use_cache=False).logits[:, seen.shape[1] :]
    found, start = [], 0
    for length in steps:
        found.append(model(rest[:, start : start + length], cache=cache).logits)
        start += length
    assert_same_logits(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("indices", [[2, 0], [1, 2, 0], [0, 0, 1, 2]])
def test_rows_of_a_cache_are_selected(model, indices):
    ids = tiny_ids(ROWS, PREFIX)
    indices = torch.tensor(indices)
    cache = filled(model, ids)
    cache.batch_select_indices(indices)
    assert_goes_on(model, cache, ids[indices])


def test_rows_of_a_cache_are_repeated(model):
    ids = tiny_ids(ROWS, PREFIX)
    cache = filled(model, ids)
    cache.batch_repeat_interleave(2)
    assert_goes_on(model, cache, ids.repeat_interleave(2, 0))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_of_a_cache_are_reordered(model, kind):
    ids = tiny_ids(ROWS, PREFIX)
    order = torch.tensor([1, 1, 0])
    cache = filled(model, ids, kind)
    cache.reorder_cache(order)
    assert_goes_on(model, cache, ids[order])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_is_reset_knows_nothing(model, kind):
    cache = filled(model, tiny_ids(ROWS, PREFIX), kind)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_goes_on(model, cache, tiny_ids(ROWS, 0), steps=(4, 1, 2))


@pytest.mark.parametrize("removed", [0, 1, 2, 5, 11])
def test_a_cache_that_records_its_past_is_cropped(model, removed):
    ids = tiny_ids(2, PREFIX)
    cache = filled(model, ids, recording=True)
    cache.crop(-removed)
    assert cache.get_seq_length() == PREFIX - removed
    assert_goes_on(model, cache, ids[:, : PREFIX - removed])


@pytest.mark.parametrize("removed", [1, 5, 11])
def test_a_cache_that_records_nothing_is_cropped_or_says_why_not(model, removed):
    """A stock model's cache is cropped at any time; one that keeps the last tokens only may have forgotten some."""
    ids = tiny_ids(2, PREFIX)
    cache = filled(model, ids)
    try:
        cache.crop(-removed)
    except (*REFUSALS, RuntimeError) as error:
        assert "activate_past_recording" in str(error)
    else:
        assert_goes_on(model, cache, ids[:, : PREFIX - removed])


def test_a_cache_is_cropped_again_and_again(model):
    """As in assisted decoding, where some candidates are thrown away after each forward."""
    ids = tiny_ids(2, PREFIX)
    cache, seen = filled(model, ids, recording=True), ids
    for step, (length, removed) in enumerate([(4, 3), (1, 0), (5, 5), (2, 1)]):
        more = tiny_ids(2, length, seed=20 + step)
        seen = torch.cat([seen, more], dim=1)
        with torch.no_grad():
            found = model(more, cache=cache).logits
            assert_same_logits(found, model(seen, use_cache=False).logits[:, -length:])
        cache.crop(-removed)
        seen = seen[:, : seen.shape[1] - removed]
    assert_goes_on(model, cache, seen)


@pytest.mark.parametrize("removed", [0, 3])
def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside_of_it(model, removed):
    ids = tiny_ids(ROWS, PREFIX)
    with torch.inference_mode():
        cache = filled(model, ids)
    cache.crop(-removed)
    assert_goes_on(model, cache, ids[:, : PREFIX - removed])


@pytest.mark.parametrize("is_static", [False, True])
def test_the_memory_of_a_cache_from_inference_mode_is_reset_outside_of_it(is_static):
    ids, state = tiny_ids(ROWS, PREFIX), MemoryCacheLayer(is_static)
    with torch.inference_mode():
        state.append("ids", ids, 3)
    state.append("ids", ids[:, :2], 3)
    assert torch.equal(state.past("ids"), torch.cat([ids[:, -1:], ids[:, :2]], dim=1))
    state.reset()
    assert not state.past("ids").any()


def test_operations_follow_each_other(model):
    ids = tiny_ids(ROWS, PREFIX)
    cache = filled(model, ids, recording=True)
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    seen = ids[torch.tensor([2, 1]), : PREFIX - 4].repeat_interleave(2, 0)[torch.tensor([3, 0, 1, 2])]
    assert_goes_on(model, cache, seen)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_prefix_is_computed_once_for_many_questions(model, way):
    ids = tiny_ids(2, PREFIX)
    cache = filled(model, ids)
    for _ in range(2):
        if way == "deepcopy":
            again = copy.deepcopy(cache)
        else:
            buffer = io.BytesIO()
            torch.save(cache, buffer)
            buffer.seek(0)
            again = torch.load(buffer, weights_only=False)
        assert_goes_on(model, again, ids)
    assert_goes_on(model, cache, ids)


def test_rows_of_left_padded_prompts_are_selected(model):
    ids, mask = tiny_ids(ROWS, PREFIX), torch.ones(ROWS, PREFIX, dtype=torch.int64)
    mask[1, :5] = 0
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        cache.batch_select_indices(torch.tensor([1]))
        rest = tiny_ids(1, 4, seed=7)
        row_mask = torch.cat([mask[1:2], torch.ones(1, 4, dtype=torch.int64)], dim=1)
        found = model(rest, attention_mask=row_mask, cache=cache).logits
        expected = model(torch.cat([ids[1:2, 5:], rest], dim=1)).logits[:, -4:]
    assert_same_logits(found, expected)


def test_a_batch_of_a_cache_has_one_size(model):
    cache = filled(model, tiny_ids(ROWS, PREFIX))
    assert cache.batch_size in (ROWS, -1)
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(4)
    with torch.no_grad():
        assert model(tiny_ids(4, 1), cache=cache).logits.shape[0] == 4

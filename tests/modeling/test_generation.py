"""Every way of generating gives the tokens that recomputing the whole sequence gives."""

import pytest
import torch
from tiny import SHAPES, shaped_config, tiny_ids, tiny_model
from transformers import set_seed

from engram_hf.modeling.modeling_engram_moe import CACHE_NAME


NEW = {"max_new_tokens": 9, "min_new_tokens": 9}
WAYS = {
    "greedy": {"do_sample": False},
    "beam 4": {"do_sample": False, "num_beams": 4},
    "sampled": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture(params=SHAPES, ids=lambda shape: "streams{}-order{}-taps{}".format(*shape))
def model(request):
    return tiny_model(shaped_config(request.param))


def left_padded():
    ids, mask = tiny_ids(2, 11), torch.ones(2, 11, dtype=torch.int64)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_no_token(model, way):
    outputs = []
    for use_cache in (True, False):
        set_seed(3)
        outputs.append(model.generate(**left_padded(), **NEW, **WAYS[way], use_cache=use_cache))
    assert torch.equal(*outputs)


def test_a_static_cache_changes_no_token(model):
    expected = model.generate(**left_padded(), **NEW, do_sample=False, use_cache=False)
    actual = model.generate(
        **left_padded(), **NEW, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("helper", [{"prompt_lookup_num_tokens": 3}, {"assistant": "same"}, {"assistant": "other"}])
def test_assisted_decoding_changes_no_token(model, helper):
    ids = tiny_ids(1, 5).repeat(1, 3)
    expected = model.generate(ids, **NEW, do_sample=False, use_cache=False)
    kwargs = dict(helper)
    if "assistant" in kwargs:
        kwargs["assistant_model"] = model if kwargs.pop("assistant") == "same" else tiny_model(model.config, seed=1)
    assert torch.equal(model.generate(ids, **NEW, do_sample=False, **kwargs), expected)


def test_prefill_in_chunks_changes_no_token(model):
    expected = model.generate(**left_padded(), **NEW, do_sample=False)
    assert torch.equal(model.generate(**left_padded(), **NEW, do_sample=False, prefill_chunk_size=4), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_from_embeddings_and_with_marked_tokens(model, use_cache):
    ids = tiny_ids(2, 11)
    embeddings = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **NEW, do_sample=False)[:, 11:]
    if use_cache:
        assert torch.equal(model.generate(inputs_embeds=embeddings, **NEW, do_sample=False), expected)
    marked = ids.clone()
    marked[:, 3] = -1
    with_marks = [
        model.generate(ids, engram_input_ids=marked, **NEW, do_sample=False, use_cache=cached)
        for cached in (True, use_cache)
    ]
    assert torch.equal(*with_marks)
    if use_cache:
        from_embeddings = model.generate(inputs_embeds=embeddings, engram_input_ids=marked, **NEW, do_sample=False)
        assert torch.equal(from_embeddings, with_marks[0][:, 11:])


def test_a_conversation_goes_on_with_the_cache_of_its_first_turn(model):
    first = model.generate(tiny_ids(1, 7), **NEW, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, tiny_ids(1, 4, seed=9)], dim=1)
    # Without a mask `generate` takes every pad id that the first turn happened to produce for padding.
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**both, **NEW, do_sample=False, use_cache=False)
    actual = model.generate(**both, **NEW, do_sample=False, **{CACHE_NAME: first[CACHE_NAME]})
    assert torch.equal(actual, expected)

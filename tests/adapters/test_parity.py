"""A model with a memory computes the same in every way of running it, wherever its backbone alone does.

A *cell* runs a model in one way and gives what came out, and what one forward over the whole text says. A cell that the
backbone alone fails says nothing of a memory. Gates and convolution are drawn at random, everything is in float32.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, FAST, VOCAB_SIZE, tiny_backbone, with_memory
from transformers.cache_utils import DynamicCache, StaticCache

from engram_hf.modeling.memory_layer import IDS, MemoryCacheLayer
from engram_hf.modeling.modeling_engram_moe import CACHE_NAME


SEQ, NEW = 14, 6
GENERATE = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def some_ids(batch: int, seq: int = SEQ, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, seq), generator=torch.Generator().manual_seed(seed))


def whole(model, ids, **kwargs) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def in_pieces(model, ids, lengths, cache, start=0) -> torch.Tensor:
    logits = []
    for length in lengths:
        logits.append(model(ids[:, start : start + length], **{cache_name(model): cache}, use_cache=True).logits)
        start += length
    return torch.cat(logits, 1)


def cache_name(model) -> str:
    return "cache_params" if "cache_params" in model.forward.__wrapped__.__code__.co_varnames else CACHE_NAME


def text_config(model):
    return model.config.get_text_config(decoder=True)


def new_cache(model):
    return DynamicCache(config=text_config(model))


def greedy_alone(model, ids) -> torch.Tensor:
    """Each row continued without a cache, token by token."""
    for _ in range(NEW):
        ids = torch.cat([ids, whole(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def padded(side: str):
    ids, mask = some_ids(2), torch.ones(2, SEQ, dtype=torch.int64)
    hidden = slice(0, 4) if side == "left" else slice(SEQ - 4, SEQ)
    ids[0, hidden], mask[0, hidden] = 0, 0
    return ids, mask


def forward_with_cache(model):
    ids = some_ids(2)
    return model(ids, use_cache=True).logits, whole(model, ids)


def cache_made_inside(model):
    ids = some_ids(2)
    first = model(ids[:, :5], use_cache=True)
    cache = first[cache_name(model)]
    return in_pieces(model, ids, [1, SEQ - 6], cache, 5), whole(model, ids)[:, 5:]


def token_by_token(model):
    ids = some_ids(2)
    return in_pieces(model, ids, [1] * SEQ, new_cache(model)), whole(model, ids)


def chunks(model):
    ids = some_ids(2)
    return in_pieces(model, ids, [5, 1, 4, 1, 3], new_cache(model)), whole(model, ids)


def plain_cache(model):
    ids = some_ids(2)
    return in_pieces(model, ids, [6, 1, 1, 6], DynamicCache()), whole(model, ids)


def embeddings(model):
    ids = some_ids(2)
    return model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits, whole(model, ids)


def packed(model):
    ids, lengths = some_ids(1), [5, 6, 3]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    alone = torch.cat([whole(model, piece) for piece in ids.split(lengths, 1)], 1)
    return model(ids, position_ids=positions, use_cache=False).logits, alone


def right_padding(model):
    ids, mask = padded("right")
    expected = torch.cat([whole(model, ids[:1, : SEQ - 4])[0], whole(model, ids[1:])[0]])
    actual = whole(model, ids, attention_mask=mask)
    return actual[mask.bool()], expected


def left_padding(model):
    ids, mask = padded("left")
    expected = torch.cat([whole(model, ids[:1, 4:])[0], whole(model, ids[1:])[0]])
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if takes_positions(model) else {}
    return whole(model, ids, attention_mask=mask, **positions)[mask.bool()], expected


def takes_positions(model) -> bool:
    return "position_ids" in model.forward.__wrapped__.__code__.co_varnames


def static_cache(model):
    ids = some_ids(2)
    return in_pieces(model, ids, [6, 1, 1, 6], StaticCache(text_config(model), max_cache_len=32)), whole(model, ids)


def static_cache_again(model):
    ids, cache = some_ids(2), StaticCache(text_config(model), max_cache_len=32)
    in_pieces(model, some_ids(2, seed=5), [7, 1], cache)
    cache.reset()
    return in_pieces(model, ids, [6, 1, 7], cache), whole(model, ids)


def static_generate(model):
    ids = some_ids(2)
    actual = model.generate(ids, **GENERATE, cache_implementation="static", disable_compile=True)
    return actual, greedy_alone(model, ids)


def static_generate_padded(model):
    ids, mask = padded("left")
    shared = {"attention_mask": mask, **GENERATE}
    actual = model.generate(ids, **shared, cache_implementation="static", disable_compile=True)
    return actual, expect_padded(model, ids)


def expect_padded(model, ids):
    alone = [torch.cat([ids[:1, :4], greedy_alone(model, ids[:1, 4:])], 1), greedy_alone(model, ids[1:])]
    return torch.cat(alone)


def greedy(model):
    ids = some_ids(2)
    return model.generate(ids, **GENERATE), greedy_alone(model, ids)


def generate_twice(model):
    first = model.generate(some_ids(1), **GENERATE, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, some_ids(1, 3, seed=9)], 1)
    given = {"attention_mask": torch.ones_like(ids), cache_name(model): first[cache_name(model)]}
    return model.generate(ids, **given, **GENERATE), greedy_alone(model, ids)


def padded_batch(model):
    ids, mask = padded("left")
    return model.generate(ids, attention_mask=mask, **GENERATE), expect_padded(model, ids)


def beams(model):
    ids = some_ids(2)
    ways = [model.generate(ids, **GENERATE, num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    return ways[0], ways[1]


def prompt_lookup(model):
    ids = some_ids(1, 5).repeat(1, 3)
    return model.generate(ids, **GENERATE, prompt_lookup_num_tokens=3), greedy_alone(model, ids)


def assisted(model):
    ids, assistant = some_ids(1), tiny_backbone(model.config.model_type, seed=7)
    return model.generate(ids, **GENERATE, assistant_model=assistant), greedy_alone(model, ids)


def chunked_prefill(model):
    ids = some_ids(2)
    return model.generate(ids, **GENERATE, prefill_chunk_size=4), greedy_alone(model, ids)


def crop(model):
    ids, cache = some_ids(2), new_cache(model)
    cache.activate_past_recording()
    in_pieces(model, torch.cat([ids[:, :6], some_ids(2, 4, seed=5)], 1), [6, 1, 3], cache)
    cache.crop(-4)
    return in_pieces(model, ids, [1, SEQ - 7], cache, 6), whole(model, ids)[:, 6:]


def repeat_and_select(model):
    ids, cache = some_ids(2), new_cache(model)
    in_pieces(model, ids, [6], cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 1, 0]))
    chosen = ids[[1, 0, 0]]
    return in_pieces(model, chosen, [1, SEQ - 7], cache, 6), whole(model, chosen)[:, 6:]


CELLS = {
    cell.__name__: cell
    for cell in (
        forward_with_cache,
        cache_made_inside,
        token_by_token,
        chunks,
        plain_cache,
        embeddings,
        packed,
        right_padding,
        left_padding,
        static_cache,
        static_cache_again,
        static_generate,
        static_generate_padded,
        greedy,
        generate_twice,
        padded_batch,
        beams,
        prompt_lookup,
        assisted,
        chunked_prefill,
        crop,
        repeat_and_select,
    )
}


# `generate` gives a model of linear attention alone the whole text again beside its cache. The backbone starts anew.
REFUSED = {"mamba": ["generate_twice"], "mamba2": ["generate_twice"]}


@torch.no_grad()
def holds(cell, model) -> bool:
    """Whether a model computes the same in this way."""
    actual, expected = cell(model)
    if actual.is_floating_point():
        return actual.shape == expected.shape and bool(
            (actual - expected).abs().max() <= 2e-5 * expected.abs().max().clamp_min(1)
        )
    return torch.equal(actual, expected)


def outcome(cell, model) -> str:
    try:
        return "holds" if holds(cell, model) else "differs"
    # Whatever a backbone raises where it does not support a way of running it.
    except Exception as error:
        return f"raises {error!r}"


def outcomes(model_type: str) -> dict[str, tuple[str, str]]:
    """For each cell what happens to the backbone alone, and to the backbone with a memory."""
    backbone = tiny_backbone(model_type)
    model = with_memory(copy.deepcopy(backbone))
    ids = some_ids(2)
    with torch.no_grad():
        assert (whole(model, ids) - whole(backbone, ids)).abs().max() > 1e-2, "the memory says nothing"
    return {name: (outcome(cell, backbone), outcome(cell, model)) for name, cell in CELLS.items()}


def failures(model_type: str) -> dict[str, str]:
    found = outcomes(model_type)
    assert sum(base == "holds" for base, _ in found.values()) >= 10, found
    refused = [name for name in REFUSED.get(model_type, ()) if found[name][1].startswith("raises ValueError")]
    failed = {name: ours for name, (base, ours) in found.items() if base == "holds" and ours != "holds"}
    return {name: ours for name, ours in failed.items() if name not in refused}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", FAST)
def test_a_memory_is_exact_wherever_the_backbone_is(model_type):
    assert failures(model_type) == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in FAST])
def test_a_memory_is_exact_wherever_any_other_backbone_is(model_type):
    assert failures(model_type) == {}


@pytest.mark.parametrize("dropped", ["ids", "convolution"])
def test_without_its_state_in_the_cache_a_memory_is_not_exact(dropped, monkeypatch):
    past = MemoryCacheLayer.past

    def forget(self, name):
        found = past(self, name)
        return None if found is None else found * (0 if (name == IDS) == (dropped == "ids") else 1)

    model = with_memory(tiny_backbone("llama"))
    assert holds(token_by_token, model) and holds(chunks, model) and holds(crop, model)
    monkeypatch.setattr(MemoryCacheLayer, "past", forget)
    assert not holds(token_by_token, model) and not holds(chunks, model) and not holds(crop, model)


def test_the_guide_shows_every_architecture():
    """Made by scripts/maintenance/render_architectures.py."""
    guide = (Path(__file__).parents[2] / "docs" / "any_model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|", guide, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(ARCHITECTURES) and len(rows) >= 40
    assert all(0 <= int(alone) - int(both) <= len(REFUSED.get(name, ())) for name, alone, both in rows)

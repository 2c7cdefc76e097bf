"""Attention and experts can be chosen as on any transformers model, and the chosen one is the one that runs."""

from collections import Counter

import pytest
import torch
from cases import slow
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engram_hf import EngramMoEForCausalLM


def operations(model) -> Counter:
    with profile(activities=[ProfilerActivity.CPU]) as trace, torch.no_grad():
        model(tiny_ids(2, 9))
    return Counter({event.key: event.count for event in trace.key_averages()})


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", slow("flex_attention")])
def test_attention_implementations_agree_and_run(attention):
    model = tiny_model()
    expected = model(tiny_ids(2, 9)).logits
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    assert_same_logits(model(tiny_ids(2, 9)).logits, expected)
    ran = operations(model)
    # Three layers; the hyper-connections take six softmaxes of their own, and only flex attention is compiled.
    assert ran["aten::scaled_dot_product_attention"] == (3 if attention == "sdpa" else 0)
    if attention != "sdpa":
        assert ran["aten::_softmax"] == (9 if attention == "eager" else 6)
    assert any("Torch-Compiled Region" in name for name in ran) == (attention == "flex_attention")


@torch.no_grad()
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree_and_run(experts):
    model = tiny_model()
    model.set_experts_implementation("eager")
    expected, eager = model(tiny_ids(2, 9)).logits, operations(model)
    model.set_experts_implementation(experts)
    assert_same_logits(model(tiny_ids(2, 9)).logits, expected)
    ran = operations(model)
    # Attention multiplies batches of matrices too; two expert layers add two multiplications each.
    assert ran["aten::_grouped_mm"] == (4 if experts == "grouped_mm" else 0)
    assert (ran["aten::bmm"] > eager["aten::bmm"]) == (experts == "batched_mm")


def test_a_registered_implementation_is_called_once_per_layer():
    calls = []

    def count(kind, function):
        def counted(*args, **kwargs):
            calls.append(kind)
            return function(*args, **kwargs)

        return counted

    ALL_ATTENTION_FUNCTIONS.register("counted", count("attention", ALL_ATTENTION_FUNCTIONS["sdpa"]))
    ALL_EXPERTS_FUNCTIONS.register("counted", count("experts", ALL_EXPERTS_FUNCTIONS["batched_mm"]))
    model = tiny_model()
    model.config._attn_implementation = "counted"
    model.set_experts_implementation("counted")
    model(tiny_ids(1, 5))
    assert calls.count("attention") == 3 and calls.count("experts") == 2


def test_flash_attention_is_refused_for_want_of_its_library_only():
    with pytest.raises(ImportError, match="(?i)flash"):
        EngramMoEForCausalLM._from_config(tiny_config(), attn_implementation="flash_attention_2", dtype=torch.bfloat16)

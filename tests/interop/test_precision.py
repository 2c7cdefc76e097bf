"""What is declared float32 is float32, by whatever door a model comes, and integers stay integers."""

import re
import warnings

import pytest
import torch
from tiers import TIERS, load
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM


def strict_names(model) -> list[str]:
    """Parameters that no `dtype=` may change, as transformers finds them: by the names of modules."""
    patterns = {
        pattern for module in model.modules() for pattern in getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    }
    return [
        name
        for name, _ in (*model.named_parameters(), *model.named_buffers())
        if any(re.search(rf"(^|\.){re.escape(pattern)}($|\.)", name) for pattern in patterns)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", ["float32", None, "bfloat16"])
def test_what_is_declared_single_precision_is_built_and_loaded_so(dtype, table_dtype, tmp_path):
    config = tiny_config(engram_table_dtype=table_dtype)
    built = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tiny_model(config).save_pretrained(tmp_path)
    for model in (built, load(tmp_path, dtype=dtype)):
        names = strict_names(model)
        assert any("attn_hc" in name for name in names) and any("gate.weight" in name for name in names)
        tensors = dict((*model.named_parameters(), *model.named_buffers()))
        assert {name: tensors[name].dtype for name in names} == dict.fromkeys(names, torch.float32)
        assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == dtype
        assert model(tiny_ids(1, 5)).logits.dtype == dtype


@pytest.mark.parametrize("tier", TIERS)
def test_the_list_of_single_precision_names_no_integer(tier, tmp_path, tokenizer):
    """vLLM and others cast every tensor whose name a pattern matches, buffers among them."""
    model = tiny_model(tiny_config(vocab_size=640, engram_compressed_vocab_size="auto", engram_table_dtype="float32"))
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path)
    model = load(tmp_path, tier, dtype=torch.bfloat16)
    patterns = model.base_model._keep_in_fp32_modules_strict
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(re.search(pattern, name) for pattern in patterns):
            assert tensor.is_floating_point(), name


def warns_of_the_name(model, **options) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(tiny_ids(1, 3), **options)
    return any("`past_key_values` is deprecated" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_old_name_of_the_cache_is_deprecated_as_in_a_stock_model(name):
    stock = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    model = tiny_model()
    for ours, theirs in ((model, stock), (model.model, stock.model)):
        expected = warns_of_the_name(theirs, **{name: DynamicCache(config=stock.config)})
        assert warns_of_the_name(ours, **{name: DynamicCache(config=model.config)}) == expected

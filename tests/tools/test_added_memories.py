"""A memory is added to a model that torchao or bitsandbytes has quantized, and a quantized model keeps its memory."""

import pytest
import torch
from architectures import draw, memory_layers, tiny_backbone, tiny_memory, with_memory
from extra import needs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from engram_hf import add_engram, disable_engram, load_engram, remove_engram, save_engram


needs("torchao")
# Both warn of kernels that they do not find on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore")
# Whole groups of 64, which 4-bit weights are packed by.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
EAGER = {"attn_implementation": "eager"}


def some_ids() -> torch.Tensor:
    return torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def four_bits():
    needs("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **EAGER, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("quantized", [int8, four_bits])
def test_a_memory_is_added_to_a_quantized_model(tmp_path, quantized):
    tiny_backbone("llama", **WIDTHS).save_pretrained(tmp_path / "backbone")
    model, ids = load(tmp_path / "backbone", quantization_config=quantized()), some_ids()
    before = model(ids).logits
    add_engram(model, tiny_memory())
    assert torch.equal(model(ids).logits, before)
    assert {p.dtype for layer in memory_layers(model) for p in layer.parameters()} == {torch.float32}
    draw(model, 1, "default")
    logits = model(ids).logits
    assert (logits - before).abs().max() > 1e-2
    ways = [model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*ways)
    save_engram(model, tmp_path / "memory")
    again = load_engram(load(tmp_path / "backbone", quantization_config=quantized()), tmp_path / "memory")
    assert torch.equal(again(ids).logits, logits)
    with disable_engram(model):
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(remove_engram(model)(ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("quantized", [int8, four_bits])
def test_quantizing_a_model_with_a_memory_leaves_the_memory_as_it_is(tmp_path, quantized):
    plain = with_memory(tiny_backbone("llama", **WIDTHS))
    plain.save_pretrained(tmp_path / "whole")
    model, ids = load(tmp_path / "whole", quantization_config=quantized(), device_map="cpu+disk"), some_ids()
    expected = {name: tensor for name, tensor in plain.state_dict().items() if ".engram." in name}
    found = {name: tensor for name, tensor in model.state_dict().items() if ".engram." in name}
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {tier for table in model.engram_tables() for tier in table.tiers} == {"disk"}
    logits = model(ids).logits
    assert logits.isfinite().all() and not torch.equal(logits, plain(ids).logits)
    if quantized is int8:
        model.save_pretrained(tmp_path / "int8")
        again = load(tmp_path / "int8", device_map="cpu+disk")
        assert torch.equal(again(ids).logits, logits)

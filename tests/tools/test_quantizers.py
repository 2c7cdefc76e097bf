"""torchao and bitsandbytes quantize the backbone; tables stay on disk with the bytes that they have."""

import pytest
import torch
from extra import needs
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


needs("torchao")
# Both warn of kernels that they do not find on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore")
# Widths that are whole groups of 64, which 4-bit weights are packed by.
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "engram_head_dim": 16,
}


def saved(folder, **fields):
    model = tiny_model(tiny_config(**fields))
    model.save_pretrained(folder)
    return model


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu+disk", **options).eval()


def assert_tables_are_untouched(model, plain):
    assert [table.tiers.keys() for table in model.engram_tables()] == [{"disk"}] * 2
    for table, expected in zip(model.model.tables(), plain.model.tables(), strict=True):
        for block, other in zip(table.blocks, expected.blocks, strict=True):
            assert type(block) is nn.Parameter and block.dtype == other.dtype and torch.equal(block, other)


@torch.no_grad()
def decoded(model, ids):
    """Logits token by token, with a cache."""
    cache, logits = None, []
    for token in ids.split(1, dim=1):
        outputs = model(token, cache=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("way", ["quantize_", "quantization_config"])
def test_torchao_gives_the_logits_of_its_weights_and_decodes_exactly(tmp_path, way):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = saved(tmp_path)
    if way == "quantize_":
        model = load(tmp_path)
        quantize_(model, Int8WeightOnlyConfig())
    else:
        model = load(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert_tables_are_untouched(model, plain)

    reference, ids = tiny_model(), tiny_ids(2, 19)
    quantized = {name: part for name, part in model.named_modules() if hasattr(part, "weight")}
    quantized = {name: part for name, part in quantized.items() if hasattr(part.weight, "dequantize")}
    quantized = {name: part for name, part in quantized.items() if type(part.weight) is not nn.Parameter}
    assert {"model.layers.0.engram.value_proj", "model.layers.1.self_attn.o_proj"} <= set(quantized)
    for name, part in quantized.items():
        reference.get_submodule(name).weight.copy_(part.weight.dequantize())
    logits = model(ids).logits
    assert_same_logits(logits, reference(ids).logits)
    assert_same_logits(decoded(model, ids), logits)
    assert not torch.allclose(logits, plain(ids).logits, atol=1e-4)


@torch.no_grad()
def test_a_model_that_torchao_quantized_is_saved_and_loaded(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    plain = saved(tmp_path / "plain")
    model = load(tmp_path / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    model.save_pretrained(tmp_path / "int8")
    again, ids = load(tmp_path / "int8"), tiny_ids(2, 19)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert_tables_are_untouched(again, plain)
    for path in (tmp_path / "plain").glob("tables-*"):
        assert (tmp_path / "int8" / path.name).read_bytes() == path.read_bytes()


@torch.no_grad()
def test_bitsandbytes_reads_the_same_rows(tmp_path):
    needs("bitsandbytes")
    plain, ids = saved(tmp_path, **WIDTHS), tiny_ids(2, 19)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load(tmp_path, quantization_config=config)
    assert_tables_are_untouched(model, plain)
    projections = [layer.engram.value_proj for layer in model.model.memory_layers()]
    assert [projection.weight.dtype for projection in projections] == [torch.uint8] * 2
    # Its products on a CPU may be in bfloat16, which a model drawn at random makes much of: the rows are compared.
    read = [], []
    for each, rows in zip((model, plain), read, strict=True):
        for layer in each.model.memory_layers():
            layer.engram.value_proj.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0]))
        assert torch.isfinite(each(ids).logits).all()
    assert len(read[0]) == 2 and all(torch.equal(*rows) for rows in zip(*read, strict=True))

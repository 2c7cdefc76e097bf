"""torchao and bitsandbytes quantize the backbone of somebody else's model; its table stays on disk, as it is."""

import pytest
import torch
from extra import needs
from foreign import GEMMA_TABLE, QWEN_TABLE, gemma3n_text, publish, qwen_text, tensors_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from engram_hf import engram_tables, load_with_tables, place_tables


needs("torchao")
# Both warn of kernels that they do not find on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore")
# Whole groups of 64, which 4-bit weights are packed by.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64, "hidden_size_per_layer_input": 64}
PARTS_OF_ALTUP = ("correction_coefs", "prediction_coefs", "modality_router")
MODELS = {
    "gemma3n": (gemma3n_text, {**WIDTHS, "laurel_rank": 64}, GEMMA_TABLE),
    "qwen": (qwen_text, {"hidden_size": 64, "head_dim": 32, "indexer_head_dim": 32}, QWEN_TABLE),
}


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def four_bits():
    needs("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        # They are a few numbers wide.
        llm_int8_skip_modules=[
            *(f"model.layers.{layer}.altup.{part}" for layer in range(4) for part in PARTS_OF_ALTUP),
            "lm_head",
        ],
    )


def some_ids() -> torch.Tensor:
    return torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("quantized, case", [(int8, "gemma3n"), (int8, "qwen"), (four_bits, "gemma3n")])
def test_a_quantized_backbone_with_its_table_on_disk_gives_the_bits_of_the_stock_one(tmp_path, case, quantized):
    make, widths, table = MODELS[case]
    folder, ids = publish(make(**widths), tmp_path / "model"), some_ids()
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized(), device_map="cpu").eval()
    expected = stock(input_ids=ids).logits
    assert expected.isfinite().all()
    assert not torch.equal(expected, AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits)
    model = load_with_tables(folder, "cpu+disk", quantization_config=quantized()).eval()
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Linear4bit") == [type(module).__name__ for module in stock.modules()].count("Linear4bit")
    assert {tier for each in engram_tables(model) for tier in each.tiers} == {"disk"}
    for tier in ("disk", "host"):
        place_tables(model, {f"...{table.rpartition('.')[2]}": tier})
        assert torch.equal(model(input_ids=ids).logits, expected)
    tokens = [each.generate(ids, max_new_tokens=4, do_sample=False) for each in (stock, model)]
    assert torch.equal(*tokens)
    # A stock model that is quantized already gives its table away too.
    place_tables(stock, {f"...{table.rpartition('.')[2]}": "host"})
    assert torch.equal(stock(input_ids=ids).logits, expected)


@torch.no_grad()
def test_a_quantized_backbone_is_saved_with_the_table_that_was_published(tmp_path):
    make, widths, _ = MODELS["gemma3n"]
    folder, ids = publish(make(**widths), tmp_path / "model"), some_ids()
    model = load_with_tables(folder, "cpu+disk", quantization_config=int8()).eval()
    model.save_pretrained(tmp_path / "int8")
    again = load_with_tables(tmp_path / "int8", "cpu+disk").eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    name = f"{GEMMA_TABLE}.weight"
    assert torch.equal(tensors_of(tmp_path / "int8")[name], tensors_of(folder)[name])

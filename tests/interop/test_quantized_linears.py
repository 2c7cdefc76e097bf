"""Linears of quantizers, which have no floating weight: the memory computes in the type of the hidden states.

Where a kernel needs a GPU, a stand-in stores what the real layer stores and computes on a CPU. The reference is the
model with the numbers that those weights stand for.
"""

import importlib.util

import pytest
import torch
from tiers import TIERS, load, logits_of
from tiny import assert_same_logits, tiny_ids, tiny_model
from torch import nn


class PackedLinear(nn.Module):
    """As of GPTQ and AWQ: 4-bit numbers packed into int32, scales and zeros per channel, no `weight`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = weight.abs().amax(1) / 7
        numbers = ((weight / scales[:, None]).round().clamp(-8, 7) + 8).to(torch.int32)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (numbers.unflatten(1, (-1, 8)) << shifts).sum(-1, dtype=torch.int32)
        self.register_buffer("qweight", packed)
        self.register_buffer("qzeros", torch.full_like(scales, 8, dtype=torch.int32))
        self.register_buffer("scales", scales)

    def dequantized(self) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        numbers = ((self.qweight.unsqueeze(-1) >> shifts) & 15).flatten(1)
        return (numbers - self.qzeros[:, None]) * self.scales[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_floating_point() and x.dtype.itemsize > 1
        return nn.functional.linear(x, self.dequantized().to(x.dtype))


class HalfScalesLinear(PackedLinear):
    """As of AWQ, whose scales are of float16 whatever the model computes in."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.scales = self.scales.half()

    def dequantized(self) -> torch.Tensor:
        return super().dequantized().float()


class Float8Linear(nn.Module):
    """As of fine-grained FP8: a float8 `weight`, and the inverse of its scale."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax() / 448
        self.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("weight_scale_inv", scale.reshape(1, 1))

    def dequantized(self) -> torch.Tensor:
        return self.weight.float() * self.weight_scale_inv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_floating_point() and x.dtype.itemsize > 1
        return nn.functional.linear(x, self.dequantized().to(x.dtype))


class Int8Linear(Float8Linear):
    """As of HQQ and Quanto: an integer `weight`."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax() / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("weight_scale_inv", scale.reshape(1, 1))


def replace_linears(model, linear_class) -> None:
    for name, module in list(model.named_modules()):
        # The router is no Linear, and the head stays as it is, as quantizers leave it.
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, linear_class(module))


@torch.no_grad()
def with_numbers_of(model, reference):
    """`reference` with the weights that the linears of `model` stand for."""
    for name, module in model.named_modules():
        if hasattr(module, "dequantized"):
            reference.get_submodule(name).weight.copy_(module.dequantized())
    return reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("linear_class", [PackedLinear, HalfScalesLinear, Float8Linear, Int8Linear])
def test_linears_without_a_floating_weight_compute_with_the_rows_as_they_are(folder, linear_class, tier):
    model = load(folder, tier)
    replace_linears(model, linear_class)
    assert isinstance(model.get_submodule("model.layers.0.engram.value_proj"), linear_class)
    assert_same_logits(logits_of(model), logits_of(with_numbers_of(model, tiny_model())))


@pytest.mark.parametrize("linear_class", [PackedLinear, Float8Linear])
def test_a_model_of_bfloat16_hands_its_linears_bfloat16(folder, linear_class):
    model = load(folder, "resident", dtype=torch.bfloat16)
    replace_linears(model, linear_class)
    seen = set()
    for name in ("value_proj", "key_proj"):
        module = model.get_submodule(f"model.layers.0.engram.{name}")
        module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    assert logits_of(model).dtype == torch.bfloat16
    assert seen == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_of_torch_reads_the_same_rows(folder):
    model, plain = load(folder), tiny_model()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    read = []
    for each in (quantized, plain):
        # The first memory layer comes before everything that is quantized.
        each.get_submodule("model.layers.0.engram.value_proj").register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0])
        )
    actual, expected = logits_of(quantized), logits_of(plain)
    assert torch.equal(*read)
    assert 0 < (actual - expected).abs().mean() < 0.3 * expected.abs().mean()
    # Activations are quantized by the whole input, so that a cache changes numbers, and no shape.
    assert quantized.generate(tiny_ids(1, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (make test-tools installs it)")
def test_weights_of_torchao_read_the_same_rows(folder):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, reference = load(folder, "disk"), tiny_model()
    quantize_(model, Int8WeightOnlyConfig())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
                reference.get_submodule(name).weight.copy_(module.weight.dequantize())
    assert_same_logits(logits_of(model), logits_of(reference))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (make test-tools installs it)"
)
def test_linears_of_bitsandbytes_read_the_same_rows(folder):
    import bitsandbytes

    model, plain = load(folder, "disk"), tiny_model()
    for name in ("value_proj", "key_proj"):
        linear = plain.get_submodule(f"model.layers.0.engram.{name}")
        quantized = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False)
        quantized.load_state_dict(linear.state_dict())
        model.set_submodule(f"model.layers.0.engram.{name}", quantized.to("cpu"))
    read = []
    for each in (model, plain):
        each.get_submodule("model.layers.0.engram.value_proj").register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0])
        )
    assert torch.isfinite(logits_of(model)).all() and torch.isfinite(logits_of(plain)).all()
    assert torch.equal(*read)


@pytest.mark.filterwarnings("ignore")
def test_autocast_computes_the_memory_in_its_type(folder):
    """A linear's weight is float32 there, and what it is given bfloat16."""
    model = load(folder, "disk")
    expected = logits_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = logits_of(model)
    assert (actual.float() - expected).abs().mean() < 0.2 * expected.abs().mean()

"""Tracers of torch on every tier: a graph that looks rows up for other tokens too, or a sentence."""

import warnings

import pytest
import torch
from tiers import REFUSALS, TABLES, TIERS, load, logits_of
from tiny import assert_same_logits, tiny_ids, tiny_model
from torch.fx.experimental.proxy_tensor import make_fx

from engram_hf import NgramHash


# What a tracer raises when the model says that it cannot be traced: torch wraps some errors into its own.
ERRORS = (*REFUSALS, RuntimeError, torch._dynamo.exc.TorchDynamoException)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


class LogitsOnly(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        # Grouped products have no rule for tensors without numbers on a CPU.
        model.set_experts_implementation("batched_mm")
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def assert_right_or_refused(trace, model, tier: str) -> None:
    """`trace` gives a function of ids from the model and an example; other ids have other rows."""
    example, other = tiny_ids(2, 9), tiny_ids(2, 9, seed=1)
    expected = logits_of(model, other)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = trace(LogitsOnly(model).eval(), example)
    except ERRORS as error:
        # A table on the device is part of the graph; only where rows are read outside of it there is a reason.
        assert tier != "resident", error
        assert "table" in str(error) and ("export" in str(error) or "trace" in str(error)), error
        # The refusal has left nothing behind.
        assert_same_logits(logits_of(model, other), expected)
        return
    with torch.no_grad():
        assert_same_logits(traced(other), expected)


def fx_graph(module, example, mode: str):
    return make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(example)


TRACERS = {
    "jit.trace": lambda module, example: torch.jit.trace(module, (example,), check_trace=False),
    "export": lambda module, example: torch.export.export(module, (example,), strict=False).module(),
    # With real tensors transformers' own masks cannot be traced; a table can, see below.
    "make_fx": lambda module, example: fx_graph(module, example, "fake"),
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_traced_model_reads_the_rows_of_the_tokens_it_is_given(folder, tracer, tier):
    assert_right_or_refused(TRACERS[tracer], load(folder, tier), tier)


@pytest.mark.parametrize("mode", ["real", "symbolic", "fake"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_traced_table_reads_the_rows_that_it_is_asked_for(folder, tier, mode):
    model = load(folder, tier)
    table, hashing = model.get_submodule(TABLES[0]), NgramHash.from_config(model.config)
    example, other = hashing.row_ids(0, tiny_ids(2, 9)), hashing.row_ids(0, tiny_ids(2, 9, seed=1))
    with torch.no_grad():
        expected = table(other)
        try:
            traced = fx_graph(table, example, mode)
        except ERRORS as error:
            assert tier != "resident" and "table" in str(error), error
        else:
            assert torch.equal(traced(other), expected)
        assert torch.equal(table(other), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_a_traced_module_is_saved_and_loaded(folder, tier, tmp_path):
    def through_a_file(module, example):
        torch.jit.save(torch.jit.trace(module, (example,), check_trace=False), tmp_path / "traced.pt")
        return torch.jit.load(tmp_path / "traced.pt")

    assert_right_or_refused(through_a_file, load(folder, tier), tier)


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_an_exported_program_takes_batches_of_any_size(folder, tier):
    model = load(folder, tier)
    batch, seq = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("seq", min=4, max=32)
    ids = tiny_ids(3, 13, seed=1)
    try:
        with torch.no_grad():
            program = torch.export.export(
                LogitsOnly(model), (tiny_ids(2, 9),), dynamic_shapes={"input_ids": {0: batch, 1: seq}}, strict=False
            )
    except ERRORS as error:
        assert tier != "resident" and "table" in str(error), error
        return
    assert_same_logits(program.module()(ids), logits_of(model, ids))

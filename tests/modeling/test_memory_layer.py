"""The memory layer against a version written token by token from the specification."""

import pytest
import torch
from naive import naive_memory, naive_row_ids
from tiny import SHAPES, shaped_config, tiny_ids, tiny_model

from engram_hf import NgramHash


@pytest.mark.parametrize("elements", [10**6, 1000])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_memory_layer_equals_the_naive_one(shape, elements):
    model = tiny_model(shaped_config(shape, engram_block_elements=elements))
    layer = model.model.layers[2].engram
    ids = tiny_ids(2, 13)
    context = model.model.ngram_hash(ids, torch.arange(13).unsqueeze(0))
    row_ids, hashing = context.row_ids[2], NgramHash.from_config(model.config)
    hidden = torch.randn(2, 13, shape[0], 32)
    added, gates = layer(hidden, row_ids, context)
    assert gates.shape == (2, 13, shape[0]) and ((gates > 0) & (gates < 1)).all()
    for row in range(2):
        expected_rows = naive_row_ids(ids[row].tolist(), range(13), hashing.multipliers(2), hashing.primes(2), 0)
        assert row_ids[row].tolist() == expected_rows
        expected = naive_memory(layer, hidden[row], expected_rows, model.config.rms_norm_eps)
        torch.testing.assert_close(added[row], expected, rtol=1e-4, atol=1e-5)


def test_a_new_layer_starts_without_its_convolution():
    from engram_hf import EngramMoEModel

    model = EngramMoEModel(shaped_config((2, 3, 4)))
    assert all(not layer.engram.conv.weight.any() for layer in model.memory_layers())
    assert all(block.std() > 0 for table in model.tables() for block in table.blocks)

"""A silenced memory says nothing, a silenced part is as if its rows were zeros, and both come back."""

import copy

import pytest
import torch
from architectures import tiny_backbone, with_memory
from tiny import SHAPES, shaped_config, tiny_config, tiny_ids, tiny_model

from engram_hf import disable_engram
from engram_hf.insight.silencing import silenced


IDS = tiny_ids(2, 9)


def any_model(kind: str):
    return tiny_model() if kind == "engram_moe" else with_memory(tiny_backbone(kind))


@torch.no_grad()
def logits_of(model, **given) -> torch.Tensor:
    return model(IDS, **given).logits


def with_zero_rows(model, layer_ids, rows_of_layer):
    """A copy in which rows of the tables are zeros."""
    copied = copy.deepcopy(model)
    for layer in copied.engram_memory().layers:
        if layer.layer_idx in layer_ids:
            flat = torch.cat([block.detach() for block in layer.table.blocks])
            flat[rows_of_layer(layer)] = 0
            for block, values in zip(layer.table.blocks, flat.split([len(b) for b in layer.table.blocks])):
                block.data.copy_(values)
    return copied


@pytest.mark.parametrize("shape", SHAPES)
def test_a_silenced_memory_is_as_one_whose_values_are_zeros(shape):
    model = tiny_model(shaped_config(shape))
    silent = copy.deepcopy(model)
    for layer in silent.engram_memory().layers:
        torch.nn.init.zeros_(layer.value_proj.weight)
    with silenced(model):
        found = logits_of(model)
    assert torch.equal(found, logits_of(silent)) and not torch.equal(found, logits_of(model))


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_a_silenced_added_memory_is_as_one_that_is_disabled(kind):
    model = any_model(kind)
    with disable_engram(model):
        expected = logits_of(model)
    with silenced(model):
        assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("kind", ["engram_moe", "llama"])
def test_silencing_at_a_position_changes_nothing_before_it(kind):
    model, before = any_model(kind), logits_of(any_model(kind))
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, 4] = True
    for positions in ([4], mask, mask.expand(2, 9)):
        with silenced(model, positions=positions):
            found = logits_of(model)
        assert torch.equal(found[:, :4], before[:, :4])
        assert (found[:, 4] != before[:, 4]).any(-1).all()


def test_positions_of_one_row_of_a_batch_leave_the_other_row_alone():
    model = tiny_model()
    before, mask = logits_of(model), torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 3:] = True
    with silenced(model, positions=mask):
        found = logits_of(model)
    assert torch.equal(found[0], before[0]) and not torch.equal(found[1], before[1])


@pytest.mark.parametrize("kind", ["engram_moe", "llama"])
def test_silenced_heads_orders_and_rows_are_read_as_zeros(kind):
    model = any_model(kind)
    layer_id = model.engram_memory().layers[-1].layer_idx

    def of_heads(heads):
        def rows(layer):
            first, count = layer.table.first_rows_of_heads, layer.table.head_rows
            return torch.cat([torch.arange(int(first[h]), int(first[h] + count[h])) for h in heads])

        return with_zero_rows(model, [layer_id], rows)

    with silenced(model, layers=[layer_id], heads=[0, 3]):
        assert torch.equal(logits_of(model), logits_of(of_heads([0, 3])))
    with silenced(model, layers=[layer_id], orders=[3]):
        assert torch.equal(logits_of(model), logits_of(of_heads([2, 3])))
    rows = torch.arange(0, 150, 2)
    with silenced(model, rows={layer_id: rows}):
        found = logits_of(model)
    assert torch.equal(found, logits_of(with_zero_rows(model, [layer_id], lambda layer: rows)))
    assert not torch.equal(found, logits_of(model))


def test_all_heads_silenced_are_the_whole_layer_silenced():
    model = tiny_model()
    with silenced(model, layers=[2]):
        expected = logits_of(model)
    with silenced(model, layers=[2], heads=range(4)):
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=0)


def test_parts_add_up_where_contexts_stand_inside_each_other_and_end_with_an_error():
    model = tiny_model()
    with silenced(model):
        expected = logits_of(model)
    before = logits_of(model)
    with silenced(model, layers=[0]), silenced(model, layers=[2]):
        assert torch.equal(logits_of(model), expected)
    with pytest.raises(RuntimeError, match="stop"), silenced(model):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [1]}, r"Layer 1 has no memory; memory layers \(zero-based\) are \[0, 2\]"),
        ({"heads": [4]}, "no head 4; its heads go from 0 to 3"),
        ({"orders": [4]}, "orders go from 2 to 3"),
        ({"rows": {0: torch.tensor([100_000])}}, "no row 100000"),
        ({"heads": [0], "orders": [2]}, "one of them at a time"),
        ({"positions": [9]}, r"positions must lie in \[0, 9\)"),
        ({"positions": torch.zeros(1, 8, dtype=torch.bool)}, r"mask of shape \(1, 8\), and the input has .*\(2, 9\)"),
    ],
)
def test_what_cannot_be_silenced_is_said_in_a_sentence(given, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message), silenced(model, **given):
        logits_of(model)


def test_models_without_memory_and_compiled_ones_are_refused():
    with (
        pytest.raises(ValueError, match="found no memory layer"),
        silenced(tiny_model(tiny_config(engram_layer_ids=[]))),
    ):
        pass
    model = tiny_model()
    model.compile()
    for compiled in (model, torch.compile(tiny_model())):
        with pytest.raises(ValueError, match="is compiled"), silenced(compiled):
            pass

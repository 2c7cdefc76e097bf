"""Tables: blocks of whole heads, one gather, and bytes that no dtype change touches."""

import ast
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from engram_hf import EngramMoEForCausalLM
from engram_hf.modeling import table_blocks
from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_blocks import split_into_blocks
from engram_hf.modeling.table_formats import row_format


ROWS = [5, 7, 11, 13]


@pytest.mark.parametrize(
    ("elements", "blocks"),
    [(10**6, [[5, 7, 11, 13]]), (48, [[5, 7], [11], [13]]), (1, [[5], [7], [11], [13]]), (96, [[5, 7, 11], [13]])],
)
def test_blocks_are_runs_of_whole_heads(elements, blocks):
    assert split_into_blocks(ROWS, 4, elements) == blocks


@pytest.mark.parametrize("elements", [10**6, 96, 48, 1])
def test_a_lookup_reads_the_rows_of_one_long_table(elements):
    table = EngramTable(ROWS, 4, elements, row_format("float32"))
    for number, block in enumerate(table.blocks):
        torch.nn.init.normal_(block, mean=float(number))
    row_ids = torch.stack([torch.randint(rows, (2, 9)) for rows in ROWS], dim=-1)
    starts = torch.tensor([0, 5, 12, 23])
    expected = torch.cat(list(table.blocks))[row_ids + starts].flatten(-2)
    assert torch.equal(table(row_ids), expected)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_dtype_change_touches_a_table(change, dtype):
    model = tiny_model(tiny_config(engram_table_dtype=dtype))
    before = [block.clone() for table in model.model.tables() for block in table.blocks]
    change(model)
    after = [block for table in model.model.tables() for block in table.blocks]
    assert len(after) > 4 and all(b.dtype == getattr(torch, dtype) for b in after)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    assert (
        model.model.layers[0].engram.value_proj.weight.dtype
        == model.model.layers[1].mlp.shared_experts.up_proj.weight.dtype
    )
    assert torch.isfinite(model(tiny_ids(1, 5)).logits).all()


def test_a_model_on_meta_allocates_nothing_and_moves_to_a_device():
    with torch.device("meta"):
        model = EngramMoEForCausalLM(tiny_config(engram_vocab_size=10_000_000_000, engram_block_elements=1))
    assert all(block.is_meta for table in model.model.tables() for block in table.blocks)
    with torch.device("meta"):
        small = EngramMoEForCausalLM(tiny_config())
    small.to_empty(device="cpu")
    assert not any(parameter.is_meta for parameter in small.parameters())


def test_a_table_is_built_once_in_the_asked_dtype():
    model = EngramMoEForCausalLM._from_config(tiny_config(), dtype=torch.bfloat16)
    assert model.model.tables()[0].dtype == torch.bfloat16
    kept = EngramMoEForCausalLM._from_config(tiny_config(engram_table_dtype="float32"), dtype=torch.bfloat16)
    assert kept.model.tables()[0].dtype == torch.float32


class CountBytes(TorchDispatchMode):
    """Bytes of every new storage of at least `least_bytes`, in the order in which they were allocated."""

    def __init__(self, least_bytes: int):
        super().__init__()
        self.least_bytes, self.allocated, self.seen = least_bytes, [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            storage = output.untyped_storage()
            if storage.nbytes() >= self.least_bytes and storage.data_ptr() not in self.seen:
                # Kept alive, so that no later tensor gets the same address.
                self.seen[storage.data_ptr()] = output
                self.allocated.append(storage.nbytes())
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_building_a_model_allocates_each_table_once(dtype):
    config = tiny_config(engram_vocab_size=20_000, engram_block_elements=10**9)
    with CountBytes(least_bytes=1_000_000) as counted:
        model = EngramMoEForCausalLM._from_config(config, dtype=dtype)
    blocks = [block for table in model.model.tables() for block in table.blocks]
    assert counted.allocated == [block.numel() * dtype.itemsize for block in blocks]


def set_elsewhere(names: set[str], path: Path) -> list[str]:
    """Lines of a file that set an attribute of one of these names, of something else than `self`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del) and node.attr in names
        if is_set and ast.unparse(node.value) != "self":
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_what_a_block_holds_is_set_by_its_own_methods_alone():
    own = Path(table_blocks.__file__)
    names = {*vars(EngramTable(ROWS, 4, 48, row_format("float32")).block_records[0]), "parameter"}
    assert {"base", "saved_in", "host_nodes", "tier", "source", "first_row"} <= names
    others = [path for path in own.parent.parent.rglob("*.py") if path != own]
    assert [line for path in others for line in set_elsewhere(names, path)] == []

"""One gather over many blocks, against a loop over them, in every layout that files and memory may have."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engram_hf.adapters.rows_in_memory import RowsInMemory
from engram_hf.adapters.served_embedding import TableOfParts
from engram_hf.modeling.disk_files import PAGE, BlockSource, TableFile
from engram_hf.modeling.table import tables_without_blocks


WIDTH = 160
# Rows of each part: equal ones with a short last one, as published tables have them, and any others.
PARTS = {"equal": [40] * 11 + [7], "any": [3, 50, 1, 20, 20, 41, 9, 33, 2, 60, 5, 12], "longer last": [40] * 11 + [90]}
# The file of a part.
FILES = {"one file": lambda part: 0, "three files": lambda part: part % 3, "files of runs": lambda part: part // 4}


def opened(
    folder: Path, rows: list[int], file_of, tiers: list[str], between: bool
) -> tuple[TableOfParts, torch.Tensor]:
    """A table of such parts on such tiers, and all of its rows."""
    parts = [torch.randn(count, WIDTH, dtype=torch.bfloat16) for count in rows]
    files = {}
    for number in {file_of(part) for part in range(len(rows))}:
        # A file has its tensors in the order of their names: 0, 1, 10, 11, 2, ...
        tensors = {f"shard_{part}.weight": parts[part] for part in range(len(rows)) if file_of(part) == number}
        if between:
            tensors |= {
                f"shard_{name}x": torch.ones(1 + number + len(name), dtype=torch.bfloat16) for name in ["1", "10", "3"]
            }
        save_file(tensors, folder / f"{number}.safetensors")
        files[number] = TableFile(folder / f"{number}.safetensors")
    with tables_without_blocks():
        table = TableOfParts(rows, WIDTH, torch.bfloat16)
    sources = [BlockSource(files[file_of(part)], f"shard_{part}.weight") for part in range(len(rows))]
    table.open_blocks(sources, tiers, [None] * len(rows))
    return table.requires_grad_(False).eval(), torch.cat(parts)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("between", [False, True])
def test_a_lookup_finds_the_rows_of_every_layout_and_reads_no_other_page(tmp_path, parts, files, between):
    rows, mixed = PARTS[parts], ["disk", "host", "resident", "disk"] * 3
    for tiers in (["disk"] * len(rows), ["host"] * len(rows), mixed):
        table, expected = opened(tmp_path, rows, FILES[files], tiers, between)
        row_ids = torch.randint(0, sum(rows), (3, 5, 8))
        row_ids[0, 0, 0], row_ids[-1, -1, -1] = sum(rows) - 1, 0
        assert torch.equal(table(row_ids), expected[row_ids])
        # Which pages those are, by a loop over rows.
        firsts, wanted = np.cumsum([0, *rows]), {}
        for row in row_ids.flatten().tolist():
            number = int(np.searchsorted(firsts, row, side="right")) - 1
            block = table.block_records[number]
            if block.is_on_disk:
                start = block.parameter.data_ptr() + (row - block.first_row) * 2 * WIDTH
                pages = range(start // PAGE, (start + 2 * WIDTH - 1) // PAGE + 1)
                wanted.setdefault(block.source.file.path, set()).update(pages)
        memory = RowsInMemory(table.block_records)
        found = {}
        for pages, file in memory.pages(memory.find(row_ids.flatten())):
            assert (np.diff(pages) > 0).all()
            found.setdefault(file.path, set()).update(pages.tolist())
        assert found == wanted


def test_blocks_that_move_between_lookups_are_found_again(tmp_path):
    rows = PARTS["any"]
    table, expected = opened(tmp_path, rows, FILES["three files"], ["disk"] * len(rows), False)
    row_ids = torch.arange(sum(rows))
    for number, tier in [(3, "host"), (0, "resident"), (3, "disk"), (11, "host"), (0, "disk")]:
        table.place(number, tier, "cpu")
        assert torch.equal(table(row_ids), expected)
    with torch.no_grad():
        table.blocks[11] += 1
        expected[-12:] += 1
    assert torch.equal(table(row_ids), expected)
    # Whatever takes the place of a block in memory is read from then on.
    table.block_records[11].parameter = torch.nn.Parameter(torch.zeros(12, WIDTH, dtype=torch.bfloat16))
    gc.collect()
    assert torch.equal(table(row_ids)[-12:], torch.zeros(12, WIDTH, dtype=torch.bfloat16))


def test_a_block_that_something_took_from_its_file_is_named(tmp_path):
    rows = PARTS["equal"]
    table, _ = opened(tmp_path, rows, FILES["one file"], ["disk"] * len(rows), False)
    table(torch.tensor([5]))
    table.block_records[4].parameter = torch.nn.Parameter(table.blocks[4].detach().clone())
    with pytest.raises(ValueError, match="Block 4 of this table was on disk"):
        table(torch.tensor([5]))


def test_a_lookup_of_nothing_gives_no_rows(tmp_path):
    rows = PARTS["equal"]
    table, _ = opened(tmp_path, rows, FILES["three files"], ["disk"] * len(rows), False)
    assert table(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, WIDTH)

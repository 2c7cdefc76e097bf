"""Rows only, from files that are what they were: pages counted by the kernel, files that change, are cut or swapped."""

import json
import os
import resource
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf.modeling import disk_reading
from engram_hf.modeling.disk_files import PAGE, BlockSource, TableFile
from engram_hf.modeling.disk_reading import PAGES_AT_A_TIME, PageReader, pages_of_rows
from engram_hf.modeling.disk_safetensors import TensorContent, read_header, write_file
from engram_hf.modeling.table import EngramTable, tables_without_blocks
from engram_hf.modeling.table_blocks import DISK
from engram_hf.modeling.table_formats import row_format
from engram_hf.training.work_files import WorkFile


DISK_MAP = {"": "cpu", "model.layers.0.engram.table": "disk", "model.layers.2.engram.table": "disk"}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts with Linux's own counters")


def table_on_disk(folder, rows=200_003, width=64, heads=2, seed=0):
    """A table of about 50 MB per head, one block a head, none of it in the page cache."""
    contents, blocks = {}, []
    for head in range(heads):
        block = torch.empty(rows, width).normal_(generator=torch.Generator().manual_seed(seed + head))
        blocks.append(block)
        contents[f"blocks.{head}"] = TensorContent.of(block)
    write_file(folder / "table.safetensors", contents)
    with tables_without_blocks():
        table = EngramTable([rows] * heads, width, 1, row_format("float32"))
    file = TableFile(folder / "table.safetensors")
    sources = [BlockSource(file, f"blocks.{head}") for head in range(heads)]
    table.open_blocks(sources, [DISK] * heads, [None] * heads)
    table.eval()
    os.posix_fadvise(file.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return table, blocks, file


def bytes_read() -> int:
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line).split()[1])


@on_linux
@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("is_prefetched", [True, False])
def test_a_lookup_reads_the_pages_of_its_rows_and_no_other(tmp_path, is_batched, is_prefetched):
    table, blocks, file = table_on_disk(tmp_path)
    table.reader._batched = table.reader._batched and is_batched
    row_ids = torch.randint(200_003, (1, 700, 2), generator=torch.Generator().manual_seed(3))
    wanted = sum(
        len(pages_of_rows(block.data_ptr() + ids.numpy() * 256, 256))
        for block, ids in zip(table.blocks, row_ids[0].unbind(-1))
    )
    # What a first lookup loads of torch and numpy is read too.
    (tmp_path / "other").mkdir()
    other, _, _ = table_on_disk(tmp_path / "other", rows=10_007)
    other.reader._batched = table.reader._batched
    other.prefetch(row_ids % 10_007)
    other(row_ids % 10_007)
    open_files = len(os.listdir("/proc/self/fd"))
    before = bytes_read()
    if is_prefetched:
        table.prefetch(row_ids)
    found = table(row_ids)
    read = bytes_read() - before
    assert torch.equal(found, torch.cat([block[ids] for block, ids in zip(blocks, row_ids.unbind(-1))], dim=-1))
    if read == 0:
        pytest.skip("this file system is not on a device whose reads are counted")
    assert 0.5 * wanted * PAGE < read <= wanted * PAGE
    # The handle of this process, for the batches; no file is opened again.
    assert len(os.listdir("/proc/self/fd")) <= open_files + 1


@on_linux
def test_a_lookup_allocates_what_it_reads(tmp_path):
    table, _, _ = table_on_disk(tmp_path)
    row_ids = torch.randint(200_003, (1, 50, 2))
    table(row_ids)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        table(torch.randint(200_003, (1, 50, 2)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB


def test_pages_of_rows_are_those_that_hold_a_byte_of_them():
    generator = np.random.default_rng(0)
    for row_bytes in (1, 42, 256, 4096, 5000, 9000):
        addresses = generator.integers(0, 10**5, 200) * row_bytes + 7 * (row_bytes != 256)
        expected = {page for a in addresses for page in range(a // PAGE, (a + row_bytes - 1) // PAGE + 1)}
        assert pages_of_rows(addresses, row_bytes).tolist() == sorted(expected)


def test_without_batches_pages_are_touched_by_threads(tmp_path):
    _, blocks, file = table_on_disk(tmp_path, rows=1009)
    reader = PageReader()
    reader._batched = False
    first = file.tensor("blocks.0").data_ptr()
    reader.read(np.unique((first + np.arange(0, 1009 * 256, PAGE)) // PAGE), file)
    assert torch.equal(file.tensor("blocks.0"), blocks[0])


def mapped_share(pages: np.ndarray) -> float:
    """Of pages that this process finds without a fault, by the kernel's own table."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * int(pages[0]))
        entries = np.frombuffer(pagemap.read(8 * int(pages[-1] - pages[0] + 1)), dtype=np.uint64)
    return float((entries[pages - pages[0]] >> np.uint64(63)).mean())


@on_linux
def test_many_pages_are_mapped_when_they_have_been_read(tmp_path):
    table, blocks, file = table_on_disk(tmp_path, heads=1)
    pages = pages_of_rows(table.blocks[0].data_ptr() + np.arange(0, 200_003, 20) * 256, 256)
    assert mapped_share(pages) < 0.01 and len(pages) > 2 * PAGES_AT_A_TIME
    table.reader.read(pages, file)
    assert mapped_share(pages) == 1.0
    assert torch.equal(file.tensor("blocks.0"), blocks[0])


@on_linux
@pytest.mark.parametrize("system", ["batches and maps", "batches", "neither"])
@pytest.mark.parametrize("are_cached", [True, False])
def test_what_is_read_aside_is_mapped(tmp_path, system, are_cached, monkeypatch):
    table, blocks, file = table_on_disk(tmp_path, heads=1)
    without(system, table.reader, monkeypatch)
    pages = pages_of_rows(table.blocks[0].data_ptr() + np.arange(0, 200_003, 20) * 256, 256)
    if are_cached:
        file.path.read_bytes()
    assert mapped_share(pages) < 0.01
    table.reader.read_aside(pages, file).result()
    assert mapped_share(pages) == 1.0
    assert torch.equal(file.tensor("blocks.0"), blocks[0]) and not file.was_written("blocks.0")


def without(system: str, reader: PageReader, monkeypatch) -> None:
    """What older systems do not have."""
    if system != "batches and maps":
        for name in ("MADV_POPULATE_READ", "MADV_POPULATE_WRITE"):
            # No advice that any kernel knows.
            monkeypatch.setattr(disk_reading, name, 9999)
    reader._batched = system != "neither"


@on_linux
def test_reading_aside_goes_behind_all_other_threads_and_leaves_their_priority(tmp_path):
    table, _, file = table_on_disk(tmp_path, rows=1009)
    other = PageReader()

    def own_priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = [own_priority(), other.in_background(own_priority).result()]
    pages = pages_of_rows(table.blocks[0].data_ptr() + np.arange(1009) * 256, 256)
    table.reader.read_aside(pages, file).result()
    assert table.reader.in_background(own_priority).result() == 19
    assert [own_priority(), other.in_background(own_priority).result()] == before


@on_linux
@pytest.mark.parametrize("system", ["batches and maps", "batches", "neither"])
def test_pages_that_will_be_written_keep_what_they_hold(tmp_path, system, monkeypatch):
    _, blocks, file = table_on_disk(tmp_path, heads=1)
    work = WorkFile(tmp_path / "work", {"rows": (tuple(blocks[0].shape), torch.float32)})
    work.fill("rows", file.content("blocks.0"))
    os.fsync(work.file.fileno())
    os.posix_fadvise(work.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows = work.tensor("rows")
    pages = pages_of_rows(rows.data_ptr() + np.arange(200_003) * 256, 256)
    reader = PageReader()
    without(system, reader, monkeypatch)
    reader.read_aside(pages, work).result()
    assert mapped_share(pages) == 1.0 and torch.equal(rows, blocks[0])
    rows[77] = 1.0
    assert os.pread(work.file.fileno(), 256, 77 * 256) == np.ones(64, np.float32).tobytes()


def bytes_changed() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("write_bytes")).split()[1])


@on_linux
def test_a_row_that_changes_in_a_training_copy_is_a_page_to_write_and_no_more(tmp_path):
    _, blocks, file = table_on_disk(tmp_path, heads=1)
    work = WorkFile(tmp_path / "work", {"rows": (tuple(blocks[0].shape), torch.float32)})
    before = bytes_changed()
    work.fill("rows", file.content("blocks.0"))
    if bytes_changed() == before:
        pytest.skip("this file system keeps its files in memory")
    os.fsync(work.file.fileno())
    before = bytes_changed()
    work.tensor("rows")[::20_000] += 1.0
    assert bytes_changed() - before <= 11 * PAGE


def test_more_reads_than_a_device_takes_go_to_the_reading_thread(tmp_path):
    table, blocks, file = table_on_disk(tmp_path, heads=1)
    pages = pages_of_rows(table.blocks[0].data_ptr() + np.arange(0, 200_003, 200) * 256, 256)
    future = table.reader.start(pages, file)
    assert future is not None and future.result() is None
    assert table.reader.start(pages[:5], file) is None


# A file that is not what it was.


def change_in_place(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


@torch.no_grad()
@pytest.mark.parametrize("change", [change_in_place, cut])
def test_a_file_that_changed_under_an_open_table_is_an_error_at_the_lookup(tmp_path, change):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DISK_MAP)
    ids = tiny_ids(1, 5)
    model(ids)
    change(model.engram_tables()[1].blocks[0].file)
    with pytest.raises(ValueError, match="was changed while a table was open.*Load the model again"):
        model(ids)


@torch.no_grad()
def test_a_file_that_another_took_the_place_of_is_still_the_old_one(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    disk = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DISK_MAP)
    ids = tiny_ids(1, 5)
    before = disk(ids).logits
    other = tmp_path / "other"
    shutil.copyfile(disk.engram_tables()[0].blocks[0].file, other)
    with other.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    os.replace(other, disk.engram_tables()[0].blocks[0].file)
    assert torch.equal(disk(ids).logits, before)
    # And its copy is a copy of what is open, not of what has its name.
    disk.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for saved, table in zip(model.model.tables(), again.model.tables(), strict=True):
        assert all(torch.equal(b, a) for b, a in zip(saved.blocks, table.blocks, strict=True))


@pytest.mark.parametrize("device_map", [None, DISK_MAP])
def test_a_truncated_or_missing_or_garbled_file_is_an_error_when_loading(tmp_path, device_map):
    tiny_model().save_pretrained(tmp_path / "sound")
    for number, (damage, error, message) in enumerate(
        [
            (cut, ValueError, "is truncated: it has .* bytes, and its header needs"),
            (lambda path: os.truncate(path, 5), ValueError, "hold no whole header"),
            (lambda path: path.write_bytes(path.read_bytes() + b"x"), ValueError, "longer than its header says"),
            (lambda path: path.write_bytes(b"\xff" * 5000), ValueError, "hold no whole header"),
            (
                lambda path: path.write_bytes((64).to_bytes(8, "little") + b"{" * 64),
                ValueError,
                "header is damaged",
            ),
            (lambda path: path.unlink(), FileNotFoundError, "does not exist, or is not a file"),
        ]
    ):
        for pattern in ("tables-layer-02*", "model-0*"):
            folder = tmp_path / f"{number}-{pattern[:5]}"
            shutil.copytree(tmp_path / "sound", folder)
            damage(next(folder.glob(pattern)))
            with pytest.raises(error, match=message):
                AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../stolen.safetensors", ""])
def test_a_weight_map_that_points_outside_its_folder_is_refused(tmp_path, name):
    tiny_model().save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    inside = content["weight_map"]["model.layers.0.engram.table.blocks.0"]
    # A sound file lies there.
    shutil.copyfile(tmp_path / "model" / inside, tmp_path / "stolen.safetensors")
    for tensor, file in content["weight_map"].items():
        content["weight_map"][tensor] = name if file == inside else file
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not the name of a file inside its folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_an_index_that_is_none_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="is damaged: .*(weight_map|JSON)"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("table_dtype", ["float8_e4m3fn", "int8", "int4"])
def test_quantized_rows_without_scales_or_of_another_width_are_refused(tmp_path, table_dtype):
    tiny_model(tiny_config(engram_table_dtype=table_dtype)).save_pretrained(tmp_path)
    path = next(tmp_path.glob("tables-layer-00*"))
    weights = load_file(path)
    name = "model.layers.0.engram.table.blocks.0"
    width = {"float8_e4m3fn": 8, "int8": 8, "int4": 4}[table_dtype]
    weights[name] = weights[name][:, :width].contiguous()
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"another shape: .* is \(53, \d\), needs .*rows without scales mean nothing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_written_file_starts_its_data_at_a_page_and_is_read_by_the_library(tmp_path):
    tensors = {"a": torch.randn(7, 3), "b": torch.randint(255, (5,), dtype=torch.uint8), "c": torch.randn(2).bfloat16()}
    write_file(tmp_path / "x.safetensors", {name: TensorContent.of(tensor) for name, tensor in tensors.items()})
    assert read_header(tmp_path / "x.safetensors")["a"].start % 4096 == 0
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(TableFile(tmp_path / "x.safetensors").tensor("c"), tensors["c"])

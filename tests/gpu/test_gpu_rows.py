"""Rows, their formats and their ids on a GPU: the same bits as on a CPU, whichever stream asks for them."""

import numpy as np
import pytest
import torch
from devices import DEVICES, SLEEP_CYCLES, needs_gpu
from naive import naive_row_ids
from tiny import tiny_config, tiny_ids

from engram_hf import NgramHash
from engram_hf.modeling.disk_files import BlockSource, TableFile
from engram_hf.modeling.disk_safetensors import TensorContent, write_file
from engram_hf.modeling.table import EngramTable, tables_without_blocks
from engram_hf.modeling.table_formats import QUANTIZED_FORMATS, dequantize_rows, quantize_rows, row_format
from engram_hf.modeling.table_gradients import sum_rows
from engram_hf.training.row_rules import draws_of_rows, round_stochastically


def e4m3_number(code: int) -> float:
    """A byte as its format's definition reads it."""
    sign, exponent, fraction = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=needs_gpu)])
def test_every_float8_number_with_every_scale_is_exact(device, is_compiled):
    # 255 is the format's NaN, which no row has.
    exponents = torch.arange(255, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8).expand(255, -1)
    stored = torch.cat([codes, exponents.unsqueeze(1).expand(-1, 8)], dim=1)
    numbers = np.array([e4m3_number(code) for code in range(256)])
    with np.errstate(over="ignore"):
        expected = (numbers * 2.0 ** (exponents.numpy().astype(np.float64)[:, None] - 127)).astype(np.float32)
    decode = torch.compile(dequantize_rows) if is_compiled else dequantize_rows
    found = decode(stored.to(device), "float8_e4m3fn", 256).cpu()
    assert torch.equal(found.nan_to_num(1.0, 2.0, 3.0), torch.from_numpy(expected).nan_to_num(1.0, 2.0, 3.0))


@needs_gpu
@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_quantized_rows_are_the_cpu_s_bit_for_bit(name):
    rows = torch.randn(300, 80) * torch.logspace(-30, 30, 300).unsqueeze(1)
    stored = quantize_rows(rows, name)
    assert torch.equal(quantize_rows(rows.cuda(), name).cpu(), stored)
    expected = dequantize_rows(stored, name, 80)
    assert torch.equal(dequantize_rows(stored.cuda(), name, 80).cpu(), expected)
    assert torch.equal(torch.compile(dequantize_rows)(stored.cuda(), name, 80).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_row_ids_and_reach_near_the_bound_of_int64_are_those_of_a_naive_hash(device):
    # With so few ids, multipliers and products come close to 2**63.
    config = tiny_config(engram_layer_ids=[1], engram_vocab_size=2**31)
    hashing = NgramHash.from_config(config)
    hashing.confirm("a config without token compression")
    ids, mask = tiny_ids(3, 17), torch.ones(3, 17, dtype=torch.int64)
    mask[1, :4] = 0
    hashed = hashing.to(device)(ids.to(device), None, mask.to(device))
    expected_ids = ids.masked_fill(mask == 0, -1)
    assert torch.equal(hashed.ids.cpu(), expected_ids)
    per_order = (
        [hashing.primes(1)[i : i + 2] for i in range(0, 4, 2)]
        if isinstance(hashing.primes(1)[0], int)
        else (hashing.primes(1))
    )
    multipliers, pad = hashing.multipliers(1), config.engram_pad_token_id
    assert max(multipliers) * 98 > 2**61
    for row in range(3):
        naive = naive_row_ids(expected_ids[row].tolist(), list(range(17)), multipliers, per_order, pad)
        kept = mask[row].bool()
        assert torch.equal(hashed.row_ids[1][row].cpu()[kept], torch.tensor(naive)[kept])
    assert hashed.reach[1].tolist() == [-1] * 4 + list(range(13))


def written_table(folder, tier: str, rows: int = 997, width: int = 16):
    """A table of two heads and two blocks on a tier, and its rows."""
    blocks = [torch.randn(rows, width) for _ in range(2)]
    write_file(folder / "t.safetensors", {f"blocks.{i}": TensorContent.of(block) for i, block in enumerate(blocks)})
    with tables_without_blocks():
        table = EngramTable([rows, rows], width, 1, row_format("float32"))
    file = TableFile(folder / "t.safetensors")
    table.open_blocks([BlockSource(file, f"blocks.{i}") for i in range(2)], [tier] * 2, ["cpu"] * 2)
    return table.eval().requires_grad_(False), torch.stack(blocks)


def rows_of(blocks: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([block[head] for block, head in zip(blocks, ids.unbind(-1), strict=True)], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("hot_rows", [0, 64])
def test_random_prefetches_beside_lookups_change_no_row(tmp_path, device, tier, hot_rows):
    table, blocks = written_table(tmp_path, tier)
    table.keep_hot_rows(hot_rows, device)
    generator = torch.Generator().manual_seed(0)
    waiting = []
    for step in range(500 if device == "cuda" else 60):
        # Rows near the beginning come again and again, so that the cache has hits and loses rows.
        ids = (torch.rand(1, 9, 2, generator=generator) ** 3 * 997).long()
        on_device = ids.to(device, copy=True)
        if device == "cuda" and step % 50 == 0:
            with torch.cuda.stream(table.reader.stream(on_device.device)):
                torch.cuda._sleep(SLEEP_CYCLES)
        table.prefetch(on_device)
        waiting.append((ids, on_device))
        while len(waiting) > step % 5:
            ids, on_device = waiting.pop(step % 3 % len(waiting))
            assert torch.equal(table(on_device).cpu(), rows_of(blocks, ids))


@torch.no_grad()
@needs_gpu
def test_a_lookup_waits_for_hot_rows_that_another_stream_still_copies(tmp_path):
    table, blocks = written_table(tmp_path, "host")
    table.keep_hot_rows(997, "cuda")
    ids = torch.arange(300).view(1, 150, 2)
    first, second = ids.cuda(), ids.cuda()
    with torch.cuda.stream(table.reader.stream(first.device)):
        torch.cuda._sleep(20 * SLEEP_CYCLES)
    table.prefetch(first)
    # In the one reading thread, so it has ended when this has.
    table.reader.in_background(lambda: None).result()
    assert torch.equal(table(second).cpu(), rows_of(blocks, ids))


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_hot_rows_made_in_inference_mode_are_written_outside_of_it(tmp_path, device):
    table, blocks = written_table(tmp_path, "host")
    with torch.inference_mode():
        table.keep_hot_rows(64, device)
        ids = torch.randint(997, (1, 9, 2))
        assert torch.equal(table(ids.to(device)).cpu(), rows_of(blocks, ids))
    ids = torch.randint(997, (1, 9, 2))
    assert torch.equal(table(ids.to(device)).cpu(), rows_of(blocks, ids))


@torch.no_grad()
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("default", ["meta", pytest.param("cuda", marks=needs_gpu)])
def test_a_default_device_changes_no_lookup(tmp_path, tier, default):
    with torch.device(default):
        with torch.device("cpu"):
            expected_ids = torch.randint(997, (1, 9, 2))
            table, blocks = written_table(tmp_path, tier)
        table.keep_hot_rows(64, "cpu")
        table.prefetch(expected_ids)
        found = [table(expected_ids), table(expected_ids.clone())]
        if default == "cuda":
            found += [table(expected_ids.cuda()).cpu()]
    assert all(torch.equal(each, rows_of(blocks, expected_ids)) for each in found)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_gpu)])
def test_hot_rows_follow_the_model_and_their_blocks_stay(tmp_path, device):
    table, _ = written_table(tmp_path, "host")
    table.keep_hot_rows(64, "cpu")
    table.half()
    assert table.hot_rows.rows.device.type == "cpu" and table.hot_rows.rows.dtype == torch.float32
    table.to(device)
    # Nothing can be kept on meta, where a model is only planned.
    assert table.hot_rows.rows.device.type == ("cpu" if device == "meta" else device)
    assert {block.device.type for block in table.blocks} == {"cpu"}


@torch.no_grad()
@needs_gpu
def test_a_resident_block_may_be_on_another_device_than_its_layer(tmp_path):
    table, blocks = written_table(tmp_path, "resident")
    table.place(1, "resident", "cuda")
    ids = torch.randint(997, (2, 9, 2))
    assert torch.equal(table(ids.cuda()).cpu(), rows_of(blocks, ids))
    assert torch.equal(table(ids), rows_of(blocks, ids))


@torch.no_grad()
@needs_gpu
def test_equal_prefills_reserve_no_more_memory(tmp_path):
    table, _ = written_table(tmp_path, "host", width=256)
    reserved = []
    for _ in range(64):
        ids = torch.randint(997, (4, 2000, 2)).cuda()
        table.prefetch(ids)
        table(ids).sum().item()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[8]


def resident_kib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


@torch.no_grad()
@needs_gpu
def test_a_table_in_host_memory_takes_its_size_and_gives_it_back(tmp_path):
    torch.zeros(1, device="cuda")
    table, _ = written_table(tmp_path, "disk", rows=560_000, width=256)
    nbytes = sum(block.nbytes for block in table.blocks)
    assert nbytes > 1.05 * 2**30
    before = resident_kib()
    for number in range(2):
        table.place(number, "host")
    table(torch.randint(560_000, (1, 64, 2)).cuda())
    # Not twice, nor the next power of two.
    assert resident_kib() - before < 1.2 * 2**20
    for number in range(2):
        table.place(number, "disk")
    assert resident_kib() - before < 0.2 * 2**20


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_one_row_asked_for_by_everybody_add_up(device):
    lookups = 200_000 if device == "cuda" else 20_000
    ids = torch.zeros(lookups, dtype=torch.int64, device=device)
    ids[::1000] = torch.arange(len(ids[::1000]), device=device)
    gradients = torch.randn(lookups, 16, device=device)
    distinct, sums = sum_rows(ids, gradients)
    expected = torch.zeros(len(distinct), 16, dtype=torch.float64, device=device).index_add_(0, ids, gradients.double())
    assert distinct.tolist() == list(range(len(ids[::1000])))
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_right_on_average_and_the_same_for_the_same_seed(device, dtype):
    values = torch.full((200_000,), 1 + 0.3 * torch.finfo(dtype).eps, device=device)
    first, again = (
        round_stochastically(
            values, dtype, draws_of_rows(torch.arange(len(values), device=device), 1, 5)[:, 0]
        ).double()
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert set(first.tolist()) == {1.0, 1 + torch.finfo(dtype).eps}
    # Five standard deviations of the mean.
    assert abs(float(((first - 1) / torch.finfo(dtype).eps).mean()) - 0.3) < 5 * (0.21 / 200_000) ** 0.5

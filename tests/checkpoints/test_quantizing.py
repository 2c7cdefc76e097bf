"""Quantizing a checkpoint: what is written is what the formats say, and nothing but the tables changes."""

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from engram_hf import merge_changed_rows, quantize_tables, verify_tables
from engram_hf.modeling.table_formats import QUANTIZED_FORMATS, dequantize_rows, quantize_rows, row_bytes


def naive_dequantize(packed, row_format, width):
    """One number at a time, from the written definition of each format."""
    rows = []
    for row in packed.tolist():
        if row_format == "float8_e4m3fn":
            numbers = torch.tensor(row[:width], dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
            rows.append([number * 2.0 ** (row[width + i // 32] - 127) for i, number in enumerate(numbers)])
            continue
        scale = torch.tensor(row[-2:], dtype=torch.uint8).view(torch.bfloat16).item()
        if row_format == "int8":
            rows.append([(byte - 256 if byte > 127 else byte) * scale for byte in row[:width]])
        else:
            rows.append([((row[i // 2] >> 4 * (i % 2) & 15) - 8) * scale for i in range(width)])
    return torch.tensor(rows)


@pytest.mark.parametrize("row_format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("width", [1, 7, 32, 33, 80])
def test_rows_are_what_the_format_says(row_format, width):
    rows = torch.randn(60, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-5, 4, 60)[:, None]
    rows[7] = 0
    packed = quantize_rows(rows, row_format)
    assert packed.shape == (60, row_bytes(row_format, width)) and packed.dtype == torch.uint8
    found = dequantize_rows(packed, row_format, width)
    assert torch.equal(found, naive_dequantize(packed, row_format, width))
    # Half a step of the format, relative to the largest number of the row; a scale in bfloat16 may clamp it a little.
    bound = {"float8_e4m3fn": 2**-4, "int8": 0.5 / 127 + 2**-9, "int4": 0.5 / 7 + 2**-9}[row_format]
    assert ((found - rows).abs() <= bound * rows.abs().amax(1, keepdim=True) * 1.0001).all()
    assert (found[7] == 0).all()


def test_fp8_keeps_small_channels_beside_large_ones():
    rows = torch.ones(1, 64)
    rows[0, :32] = 1e-4
    assert torch.allclose(dequantize_rows(quantize_rows(rows, "float8_e4m3fn"), "float8_e4m3fn", 64), rows, rtol=0.07)


@pytest.mark.parametrize("row_format", QUANTIZED_FORMATS)
def test_rows_without_numbers_are_refused(row_format):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_rows(torch.tensor([[1.0, float("nan")]]), row_format)


@torch.no_grad()
@pytest.mark.parametrize("row_format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("elements", [500, 2**31])
def test_a_quantized_checkpoint_is_whole_and_close(tmp_path, row_format, elements):
    model = tiny_model(tiny_config(engram_block_elements=elements))
    model.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    (tmp_path / "a" / "vocab.txt").write_text("{}")
    quantize_tables(tmp_path / "a", tmp_path / "b", row_format)
    verify_tables(tmp_path / "b")
    assert AutoConfig.from_pretrained(tmp_path / "b").engram_table_dtype == row_format
    assert (tmp_path / "b" / "vocab.txt").exists() and not list((tmp_path / "b").glob(".saving*"))
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for before, after in zip(model.model.tables(), quantized.model.tables(), strict=True):
        for ours, theirs in zip(before.blocks, after.blocks, strict=True):
            assert torch.equal(quantize_rows(ours, row_format), theirs)
    # The same with rows that are quantized and back, in a table of floats.
    for table in model.model.tables():
        for block in table.blocks:
            block.copy_(dequantize_rows(quantize_rows(block, row_format), row_format, 8))
    ids = tiny_ids(2, 9)
    torch.testing.assert_close(quantized(ids).logits, model(ids).logits)
    # And through save_pretrained, on disk.
    tables = {table.name: "disk" for table in quantized.engram_tables()}
    quantized.save_pretrained(tmp_path / "c")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "c", device_map={"": "cpu", **tables})
    assert torch.equal(again(ids).logits, quantized(ids).logits)


def test_what_cannot_be_quantized_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="must be one of"):
        quantize_tables(tmp_path / "a", tmp_path / "b", "int2")
    with pytest.raises(ValueError, match="is the source itself"):
        quantize_tables(tmp_path / "a", tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="not a folder with the safetensors"):
        quantize_tables(tmp_path / "x", tmp_path / "b")
    quantize_tables(tmp_path / "a", tmp_path / "b", "int8")
    with pytest.raises(ValueError, match="are int8 already"):
        quantize_tables(tmp_path / "b", tmp_path / "c", "int4")


@pytest.mark.parametrize("rewrite", [quantize_tables, merge_changed_rows])
def test_a_source_without_tables_and_a_target_with_weights_are_refused(tmp_path, rewrite):
    tiny_model().save_pretrained(tmp_path / "backbone", tables_to=tmp_path / "tables")
    tiny_model(tiny_config(engram_layer_ids=[])).save_pretrained(tmp_path / "plain")
    for name in ("backbone", "plain"):
        with pytest.raises(ValueError, match=f"{name} holds no tables.*tables_from="):
            rewrite(tmp_path / name, tmp_path / "new")
    tiny_model().save_pretrained(tmp_path / "a")
    tiny_model(seed=1).save_pretrained(tmp_path / "b")
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with pytest.raises(ValueError, match="b holds weights already .*new or empty"):
        rewrite(tmp_path / "a", tmp_path / "b")
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rewrite", [quantize_tables, merge_changed_rows])
def test_folders_of_the_model_come_along(tmp_path, rewrite):
    source = tmp_path / "a"
    tiny_model().save_pretrained(source)
    tiny_model().save_pretrained(source / "checkpoint-2")
    for name in ("additional_chat_templates", ".cache"):
        (source / name).mkdir()
        (source / name / "tools.jinja").write_text("{{ messages }}")
    rewrite(source, source / "smaller")
    found = {path.name for path in (source / "smaller").iterdir() if path.is_dir()}
    assert found == {"additional_chat_templates"}
    assert (source / "smaller" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"


def test_a_new_model_may_have_quantized_tables():
    model = tiny_model(tiny_config(engram_table_dtype="float8_e4m3fn"))
    assert not any(block.requires_grad for table in model.model.tables() for block in table.blocks)
    ids = tiny_ids(2, 9)
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].engram.value_proj.weight.grad.abs().max() > 0

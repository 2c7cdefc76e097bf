"""Damage of every kind is found and named: bytes, shapes, scales, fingerprints, tokenizers."""

import json

import pytest
import torch
from foreign import gemma3n_text
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from tokenizers import normalizers
from transformers import AutoTokenizer

from engram_hf import EngramMoEForCausalLM, load_with_tables, push_engram, quantize_tables, verify_tables
from engram_hf.modeling.disk_safetensors import file_digest
from engram_hf.modeling.table_formats import QUANTIZED_FORMATS


INDEX = "model.safetensors.index.json"
BLOCK = "model.layers.0.engram.table.blocks.1"


@pytest.fixture
def folder(tokenizer, tmp_path):
    config = tiny_config(
        vocab_size=608, engram_compressed_vocab_size="auto", engram_pad_token_id=0, engram_table_dtype="float32"
    )
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_index(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def change_tensors(folder, change) -> None:
    """Write the file of a block anew, with the digest that belongs to it: what was saved was this."""
    name = json.loads((folder / INDEX).read_text())["weight_map"][BLOCK]
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    digest = file_digest(folder / name)
    change_index(folder, lambda index: index["metadata"]["sha256"].update({name: digest}))


def change_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_sound_checkpoint_is_sound(folder):
    assert all(file.is_sound for file in verify_tables(folder))
    assert sum(len(file.tensors) for file in verify_tables(folder)) == len(
        json.loads((folder / INDEX).read_text())["weight_map"]
    )


def test_rows_that_are_no_numbers(folder):
    def spoil(tensors):
        tensors[BLOCK][17, 3] = float("nan")

    change_tensors(folder, spoil)
    with pytest.raises(ValueError, match=rf"{BLOCK} in tables-layer-00\S+ of .* NaN or infinity, first in row 17\."):
        verify_tables(folder)


@pytest.mark.parametrize("row_format", QUANTIZED_FORMATS)
def test_scales_that_are_no_numbers(folder, tmp_path, row_format):
    quantize_tables(folder, tmp_path / "small", row_format)
    assert verify_tables(tmp_path / "small")

    def spoil(tensors):
        # All bits of a scale: E8M0 and bfloat16 both call that no number.
        tensors[BLOCK][5, -1 if row_format == "float8_e4m3fn" else slice(-2, None)] = 255

    change_tensors(tmp_path / "small", spoil)
    with pytest.raises(ValueError, match=r"first in row 5 \(a number or its scale\)"):
        verify_tables(tmp_path / "small")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({BLOCK: t[BLOCK][:-1].clone()}), "needs"),
        (lambda t: t.update({BLOCK: t[BLOCK].bfloat16()}), "bfloat16, and must be float32"),
        (lambda t: t.pop(BLOCK), "promises"),
    ],
    ids=["short", "of another type", "gone"],
)
def test_blocks_that_the_config_does_not_know(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        verify_tables(folder)


def test_a_block_that_the_index_has_forgotten(folder):
    change_index(folder, lambda index: index["weight_map"].pop(BLOCK))
    with pytest.raises(ValueError, match=rf"tables-layer-00\S+ holds {BLOCK}, which its index does not name"):
        verify_tables(folder)


def test_a_hash_of_another_model(folder):
    change_config(folder, engram_seed=7)
    with pytest.raises(ValueError, match="differs in: multipliers"):
        verify_tables(folder)


def test_an_index_of_another_model(folder):
    change_index(folder, lambda index: index["metadata"]["engram_fingerprint"].update({"primes": "0" * 16}))
    with pytest.raises(ValueError, match="the tables of .* differs in: primes"):
        verify_tables(folder)


def test_another_token_map(folder):
    name = "model.ngram_hash.token_map"
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][100:] = torch.roll(tensors[name][100:], 1)
    save_file(tensors, path)
    digest = file_digest(path)
    change_index(folder, lambda index: index["metadata"]["sha256"].update({path.name: digest}))
    with pytest.raises(ValueError, match="differs in: map"):
        verify_tables(folder)


def test_another_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="the tokenizer for .* differs in: text"):
        verify_tables(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer in .* cannot be read"):
        verify_tables(folder)


def test_a_file_without_a_digest(folder):
    change_index(folder, lambda index: index["metadata"].pop("sha256"))
    with pytest.raises(ValueError, match="holds no SHA-256 for"):
        verify_tables(folder)


def test_tables_of_another_model_are_compared_with_their_digests_and_config(tmp_path):
    gemma3n_text().save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="no SHA-256 for model.safetensors.*per_layer fit the config, and all their"):
        verify_tables(tmp_path / "stock")
    folder, table = tmp_path / "saved", "model.embed_tokens_per_layer.weight"
    load_with_tables(tmp_path / "stock", device_map="cpu+disk").save_pretrained(folder)
    files = verify_tables(folder)
    assert {file.name for file in files} == {path.name for path in folder.glob("*.safetensors")} and len(files) == 2
    path = next(folder.glob("tables-*"))
    flipped = path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=rf"1 of 2 files .* {path.name} \(with {table}\)"):
        verify_tables(folder)
    rows = load_file(path)
    rows[table][5, 3] = float("nan")
    save_file(rows, path, {"format": "pt"})
    change_index(folder, lambda index: index["metadata"]["sha256"].update({path.name: file_digest(path)}))
    with pytest.raises(ValueError, match="per_layer.weight in tables-.* holds NaN or infinity, first in row 5"):
        verify_tables(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing can be verified"):
        verify_tables(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing can be verified"):
        verify_tables("nobody/nothing")


def test_a_model_without_its_tables_is_not_sound(folder, tmp_path):
    model = EngramMoEForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "backbone", tables_to=tmp_path / "tables")
    with pytest.raises(FileNotFoundError, match="holds no tables. Say where they are: tables_from="):
        verify_tables(tmp_path / "backbone")
    assert len(verify_tables(tmp_path / "tables")) == 2
    assert len(verify_tables(tmp_path / "backbone", tables_from=tmp_path / "tables")) == 3
    change_config(tmp_path / "backbone", engram_tables_repo="user/tables", engram_tables_revision="0" * 40)
    with pytest.raises(FileNotFoundError, match="those of user/tables are not on this machine"):
        verify_tables(tmp_path / "backbone")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="weights and no config.json"):
        verify_tables(folder)


def test_a_repository_that_is_not_here_is_said_to_be_so(hub, folder):
    push_engram(folder, "user/tiny")
    hf_hub_download("user/tiny", INDEX)
    with pytest.raises(FileNotFoundError, match="Not all files of user/tiny are on this machine"):
        verify_tables("user/tiny")


def test_a_config_that_cannot_be_one(folder):
    change_config(folder, model_type="llama")
    with pytest.raises(ValueError, match="is that of another model: model_type is 'llama'"):
        verify_tables(folder)
    (folder / "config.json").write_text("{")
    for read in (verify_tables, lambda folder: push_engram(folder, "user/tiny", dry_run=True)):
        with pytest.raises(ValueError, match="config.json is damaged"):
            read(folder)

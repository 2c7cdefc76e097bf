"""DeepSeek-V4.1's tables without its model: rows equal a naive dequantization, and damaged files are refused."""

import json
import shutil

import pytest
import torch
from conftest import word_tokenizer
from naive import naive_row_ids
from v41 import FIELDS, table_tensors, write_file, write_folder

from engram_hf import EngramMoEConfig, NgramHash, build_token_map, open_tables
from engram_hf.modeling.table_formats import dequantize_rows


SHARD = "model-00003-of-00003.safetensors"


def made_rows(layers=(1, 4), base=101, orders=3, heads=2) -> dict[int, int]:
    """Primes from the least number of rows on, by trial division."""
    primes = [n for n in range(base, base + 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    count = orders * heads
    return {layer: sum(primes[i * count : (i + 1) * count]) for i, layer in enumerate(layers)}


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("v41") / "model"
    compressed = int(build_token_map(tokenizer).max()) + 1
    return folder, write_folder(folder, tokenizer, compressed, made_rows())


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published[0], tmp_path / "model")


def change_config(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= fields
    content["text_config"] = {name: value for name, value in content["text_config"].items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(content))


def naive_number(byte: int) -> float:
    """E4M3: a sign, four bits of exponent, three of mantissa; the largest pattern is NaN."""
    sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def naive_rows(tensors, name, width, row):
    numbers = tensors[f"{name}.weight"][2][row * width : (row + 1) * width]
    scales = tensors[f"{name}.scale"][2][row * width // 32 : (row + 1) * width // 32]
    powers = [float("nan") if scale == 255 else 2.0 ** (scale - 127) for scale in scales]
    return [naive_number(byte) * powers[i // 32] for i, byte in enumerate(numbers)]


def test_rows_equal_the_naive_dequantization_for_padded_and_packed_tokens(published, tokenizer):
    folder, tensors = published
    tables = open_tables(folder)
    assert tables.names == {1: "layers.1.engram.embed", 4: "layers.4.engram.embed"}
    assert tables.num_rows == made_rows() and "layers.4.engram.embed" in repr(tables)
    ids = torch.randint(len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 4] = -1
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    tables.prefetch(ids, positions, mask)
    found = tables.rows(ids, positions, mask)
    token_map = build_token_map(tokenizer)
    for layer, name in tables.names.items():
        assert found[layer].shape == (2, 9, 6 * 64) and found[layer].dtype == torch.float32
        primes = tables.hash.primes(layer)
        firsts = [0, *torch.tensor([p for heads in primes for p in heads]).cumsum(0).tolist()]
        for b in range(2):
            compressed = [
                int(token_map[i]) if i >= 0 and keep else -1
                for i, keep in zip(ids[b].tolist(), mask[b].tolist(), strict=True)
            ]
            pad = int(token_map[2])
            row_ids = naive_row_ids(compressed, positions[0].tolist(), tables.hash.multipliers(layer), primes, pad)
            expected = [
                [x for first, row in zip(firsts, rows) for x in naive_rows(tensors, name, 64, first + row)]
                for rows in row_ids
            ]
            assert torch.equal(found[layer][b].nan_to_num(7.0), torch.tensor(expected).nan_to_num(7.0))
            assert torch.equal(found[layer][b].isnan(), torch.tensor(expected).isnan())
        assert found[layer].isnan().any() and not found[layer].isnan().all()


def test_all_256_scales_are_what_the_format_says():
    stored = torch.stack([torch.full((256,), 0x38, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)], dim=1)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(dequantize_rows(stored, "float8_e4m3fn", 1)[:, 0].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert dequantize_rows(stored, "float8_e4m3fn", 1)[255].isnan().all()


def test_the_published_tables_open_by_their_headers_alone(tmp_path):
    """At their full size: holes of 203 GB, of which a few rows are written."""
    words = word_tokenizer([f"w{i}" for i in range(500)])
    rows = {1: 384_006_168, 14: 384_016_682}
    fields = {**FIELDS, "engram_layer_ids": [1, 14], "engram_vocab_size": 16_000_000, "engram_n_heads": 8}
    text = {**fields, "engram_head_dim": 256, "engram_compressed_vocab_size": 500, "vocab_size": 129280}
    text |= {"engram_num_embeddings": list(rows.values())}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    tensors = {}
    for layer, count in rows.items():
        tensors[f"layers.{layer}.engram.embed.weight"] = ("F8_E4M3", (count, 256), count * 256)
        tensors[f"layers.{layer}.engram.embed.scale"] = ("F8_E8M0", (count, 8), count * 8)
    try:
        write_file(tmp_path / "model.safetensors", tensors)
    except OSError as error:
        pytest.skip(f"this file system has no large holes ({error})")
    tables = open_tables(tmp_path, words)
    assert tables.num_rows == rows
    assert tables.hash.multipliers(1)[0] % 2 == 1 and len(tables.hash.multipliers(1)) == 4
    found = tables.rows(torch.tensor([[3, 4, 5]]))
    assert found[14].shape == (1, 3, 24 * 256) and not found[14].any()


def test_the_rows_of_the_published_config_are_the_published_numbers():
    config = EngramMoEConfig(
        vocab_size=129280,
        engram_layer_ids=[1, 14],
        engram_compressed_vocab_size=99092,
        engram_vocab_size=16_000_000,
        engram_max_ngram_size=4,
        engram_head_dim=256,
    )
    hashing = NgramHash.from_config(config)
    assert [hashing.num_rows(layer) for layer in (1, 14)] == [384_006_168, 384_016_682]


def test_the_older_name_of_the_pad_and_a_config_of_one_part_are_read(folder):
    ids = torch.tensor([[5, 17, 42]])
    expected = open_tables(folder).rows(ids)
    change_config(folder, engram_pad_id=2, engram_pad_token_id="gone", engram_num_embeddings="gone")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content["text_config"], "model_type": "deepseek_v41"}))
    found = open_tables(folder).rows(ids)
    assert all(torch.equal(found[layer].nan_to_num(), expected[layer].nan_to_num()) for layer in (1, 4))
    change_config_of_one_part(folder, engram_pad_token_id=3)
    with pytest.raises(ValueError, match="names two pads"):
        open_tables(folder)


def change_config_of_one_part(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


def test_without_a_tokenizer_there_are_names_and_no_rows(folder, tokenizer):
    expected = open_tables(folder).rows(torch.tensor([[5, 6]]))
    (folder / "tokenizer.json").unlink()
    tables = open_tables(folder)
    assert tables.num_rows == made_rows()
    for read in (tables.rows, tables.prefetch):
        with pytest.raises(ValueError, match="has no tokenizer.json, so its token map is not known"):
            read(torch.tensor([[5, 6]]))
    tables.bind_tokenizer(tokenizer)
    assert torch.equal(tables.rows(torch.tensor([[5, 6]]))[4].nan_to_num(), expected[4].nan_to_num())


def test_a_changed_file_and_foreign_ids_are_refused(folder, tokenizer):
    tables = open_tables(folder)
    with pytest.raises(ValueError, match=r"below vocab_size \(605\), got 605"):
        tables.rows(torch.tensor([[605]]))
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="was changed while a table was open"):
        tables.rows(torch.tensor([[5, 6]]))


def test_another_tokenizer_is_refused(folder):
    words = [f"w{i}" for i in range(300)]
    with pytest.raises(ValueError, match="The tokenizer compresses to 300 ids"):
        open_tables(folder, word_tokenizer(words))


def rewrite(folder, change):
    """Change the tensors of the second shard with tables."""
    path = folder / SHARD
    tensors = {k: v for k, v in table_tensors(made_rows(), 64).items() if not k.endswith("1.engram.embed.weight")}
    change(tensors)
    write_file(path, tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != SHARD} | dict.fromkeys(tensors, SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NUMBERS, SCALES = "layers.4.engram.embed.weight", "layers.4.engram.embed.scale"


def retyped(name, kind=None, shape=None):
    def change(tensors):
        old_kind, old_shape, content = tensors[name]
        rows = shape or old_shape
        tensors[name] = (kind or old_kind, rows, content[: rows[0] * rows[1]])

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(SCALES), ValueError, "lacks layers.4.engram.embed.scale, without which"),
        (lambda t: t.pop(NUMBERS), ValueError, "lacks layers.4.engram.embed.weight"),
        (lambda t: (t.pop(NUMBERS), t.pop(SCALES)), ValueError, "hold no table of layer 4"),
        (retyped(SCALES, shape=(5, 2)), ValueError, r"scale of .* is F8_E8M0 \[5, 2\], and must be F8_E8M0 \[\d+, 2\]"),
        (retyped(NUMBERS, shape=(5, 64)), ValueError, r"weight of .* is F8_E4M3 \[5, 64\], and must be"),
        (retyped(NUMBERS, kind="F8_E5M2"), ValueError, "is F8_E5M2 .* must be F8_E4M3"),
        (retyped(SCALES, kind="U8"), ValueError, "is U8 .* must be F8_E8M0"),
        (retyped(NUMBERS, kind="U8"), NotImplementedError, "rows in NVFP4 or another packed format are not read"),
        (
            lambda t: t.update({"layers.4.engram.embed.weight_scale_2": ("F32", (1,), b"0000")}),
            NotImplementedError,
            "NVFP4",
        ),
        (lambda t: t.update({f"x.{SCALES}": t[SCALES]}), ValueError, "only one can be the table"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, error, message):
    rewrite(folder, change)
    with pytest.raises(error, match=message):
        open_tables(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated"),
        (lambda path: path.write_bytes(b"\xff" * 64), "is truncated, or is not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"F8_E8M0", b"F8_E8MX")), "of the type 'F8_E8MX'"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_damaged_files_are_named(folder, spoil, message):
    spoil(folder / SHARD)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_tables(folder)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"engram_n_heads": "gone"}, ValueError, "lacks engram_n_heads"),
        ({"engram_pad_token_id": "gone"}, ValueError, "lacks engram_pad_token_id"),
        ({"vocab_size": "gone"}, ValueError, "lacks vocab_size"),
        ({"engram_head_dim": "64"}, ValueError, "does not describe tables .head_dim cannot be '64'"),
        ({"engram_head_dim": 128}, ValueError, r"is F8_E4M3 \[\d+, 64\], and must be F8_E4M3 \[\d+, 128\]"),
        ({"engram_vocab_size": 103}, ValueError, "says engram_num_embeddings = .* other fields make"),
        ({"engram_compressed_vocab_size": "auto"}, ValueError, "compressed_vocab_size must be a number"),
        ({"engram_compressed_vocab_size": 7}, ValueError, "The tokenizer compresses to"),
        ({"engram_pad_token_id": 10**6}, ValueError, "pad_token_id must be a raw token id"),
        ({"vocab_size": "many"}, ValueError, "does not describe tables"),
    ],
)
def test_configs_that_do_not_fit_are_named(folder, fields, error, message):
    change_config(folder, **fields)
    with pytest.raises(error, match=message):
        open_tables(folder)


def test_other_models_and_formats_are_refused_by_name(folder, tmp_path):
    (tmp_path / "longcat").mkdir()
    (tmp_path / "longcat/config.json").write_text(json.dumps({"model_type": "longcat_flash_ngram"}))
    with pytest.raises(NotImplementedError, match="is a LongCat model, whose hash adds up"):
        open_tables(tmp_path / "longcat")
    (tmp_path / "longcat/config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": {}}))
    with pytest.raises(NotImplementedError, match="is no DeepSeek-V4.1: model_type is 'gemma3n'"):
        open_tables(tmp_path / "longcat")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUF")
    for where in (tmp_path / "gguf", tmp_path / "gguf/model.gguf"):
        with pytest.raises(NotImplementedError, match="is in GGUF"):
            open_tables(where)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_tables(tmp_path / "nowhere")
    (tmp_path / "gguf/model.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        open_tables(tmp_path / "gguf")
    shutil.copy(folder / "config.json", tmp_path / "gguf")
    with pytest.raises(FileNotFoundError, match="holds no safetensors files with tables"):
        open_tables(tmp_path / "gguf")
    with pytest.raises(NotImplementedError, match="is a DeepSeek-V4.1, a model that transformers has no class for"):
        EngramMoEConfig.from_pretrained(folder)

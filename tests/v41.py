"""Small folders in the layout in which DeepSeek-V4.1 is published, written byte by byte."""

import json
from pathlib import Path

import torch


FIELDS = {
    "engram_layer_ids": [1, 4],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 101,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_pad_token_id": 2,
}


def write_file(path: Path, tensors: dict[str, tuple[str, tuple, bytes]], file_size: int | None = None) -> None:
    """Name to type, shape and bytes, as safetensors. With `file_size` what is missing at the end is a hole."""
    header, offset = {}, 0
    for name, (kind, shape, content) in tensors.items():
        nbytes = content if isinstance(content, int) else len(content)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, content in tensors.values():
            if isinstance(content, int):
                file.truncate(file.seek(content, 1))
            else:
                file.write(content)


def table_tensors(rows: dict[int, int], width: int, seed: int = 0) -> dict[str, tuple[str, tuple, bytes]]:
    """Random bytes of all values, NaN among numbers and scales."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, count in rows.items():
        for part, kind, size in (("weight", "F8_E4M3", width), ("scale", "F8_E8M0", -(-width // 32))):
            content = torch.randint(256, (count, size), dtype=torch.uint8, generator=generator)
            tensors[f"layers.{layer}.engram.embed.{part}"] = (kind, (count, size), content.numpy().tobytes())
    return tensors


def write_folder(folder: Path, tokenizer, compressed: int, rows: dict[int, int], **fields) -> dict:
    """A checkpoint of three shards, one of which is the model's and damaged, since nobody has to read it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        **FIELDS,
        "engram_num_embeddings": list(rows.values()),
        "engram_compressed_vocab_size": compressed,
        **fields,
    }
    text |= {"model_type": "deepseek_v41_text", "vocab_size": len(tokenizer) + 5}
    text = {name: value for name, value in text.items() if value is not None}
    content = {"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(content))
    tensors = table_tensors(rows, text["engram_head_dim"])
    first = [name for name in tensors if name.endswith("1.engram.embed.weight")]
    shards = {2: first, 3: [name for name in tensors if name not in first]}
    weight_map = {"embed.weight": "model-00001-of-00003.safetensors"}
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"not read")
    for number, names in shards.items():
        file = f"model-0000{number}-of-00003.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokenizer.save_pretrained(folder)
    return tensors

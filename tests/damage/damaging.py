"""One damage at a time, drawn from a seed: to the bytes, header, index or text of any file of a checkpoint."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from damaged_bases import Base, read_json, write_anew
from safetensors.torch import load_file, save_file


INDEX = "model.safetensors.index.json"
HUGE = [2**31, 2**40, 2**63, 2**64, 10**400]
ODD = [None, True, False, "", "x", "0", 0, -1, 1, 1.5, float("nan"), [], [1], [[]], {}, {"a": 1}, *HUGE]
DEEP = "[" * 200_000 + "]" * 200_000
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "I32", "I8", "U8", "BOOL", "X", "", None, 7]


@dataclass(frozen=True)
class Damage:
    """What was done to which file.

    is_content: numbers were changed to other numbers that a model can have, so that nobody who does not read and
        compare every byte can see it: loading may give them, verifying may not.
    """

    kind: str
    file: str
    what: str
    is_content: bool = False


def damage(base: Base, kind: str, rng: random.Random) -> Damage:
    """Damage a file of this kind of a checkpoint that is a copy."""
    return KINDS[kind](base, rng)


def _weights(base: Base) -> list[Path]:
    return sorted(base.root.glob("**/*.safetensors"))


def _choose(paths, rng: random.Random) -> Path:
    return rng.choice(sorted(paths))


def _one_of(rng: random.Random, names: str) -> str:
    return rng.choice(names.split(", "))


def damage_bytes(path: Path, rng: random.Random) -> tuple[str, bool]:
    """What was done, and whether that was to numbers alone."""
    content = bytearray(path.read_bytes())
    size = len(content)
    how = rng.choice(
        ["cut", "cut to nothing", "longer", "flip", "flip many", "zeros", "swap", "gone", "folder", "header bit"]
    )
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else size
    is_content = False
    if how == "cut":
        content = content[: rng.randrange(size)]
    elif how == "cut to nothing":
        content = content[: rng.choice([0, 1, 7, 8, 9, 10])]
    elif how == "longer":
        content += rng.randbytes(rng.choice([1, 8, 4096]))
    elif how in ("flip", "header bit"):
        where = rng.randrange(size if how == "flip" else min(size, header))
        content[where] ^= 1 << rng.randrange(8)
        is_content = where >= header
    elif how == "flip many":
        # All in the numbers, or anywhere.
        first = header if rng.random() < 0.5 and header < size else 0
        places = [rng.randrange(first, size) for _ in range(20)]
        for place in places:
            content[place] ^= rng.randrange(1, 256)
        is_content = min(places) >= header
    elif how == "zeros":
        start = rng.randrange(size)
        end = min(size, start + 64)
        content[start:end] = bytes(end - start)
        is_content = start >= header
    elif how == "swap":
        start = rng.randrange(size)
        content = content[start:] + content[:start]
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(content)
    return how, is_content


def bytes_of_weights(base: Base, rng: random.Random) -> Damage:
    path = _choose(_weights(base), rng)
    how, is_content = damage_bytes(path, rng)
    return Damage("bytes", path.name, how, is_content)


def split_file(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(path: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_anew(path, struct.pack("<Q", len(text)) + text + data)


def header_of_weights(base: Base, rng: random.Random) -> Damage:
    return damage_header(_choose(_weights(base), rng), rng)


def patch_of_rows(base: Base, rng: random.Random) -> Damage:
    """A digest over all of it leaves no damage to a patch that may go unseen."""
    path = base.folder / "patch.safetensors"
    done = damage_bytes(path, rng)[0] if rng.random() < 0.5 else damage_header(path, rng).what
    return Damage("patch", path.name, done)


def damage_header(path: Path, rng: random.Random) -> Damage:
    header, data = split_file(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    length = end - start
    how = _one_of(
        rng,
        "shift, overlap, gap, same bytes, swap bytes, reversed, offsets of odd type, huge offsets, dtype, "
        "another dtype of the same size, shape, transposed, huge shape, negative shape, entry of odd type, no "
        "dtype, no shape, no offsets, renamed, gone, gone with its bytes, one more tensor, twice, metadata of "
        "odd type, deep, deep extra, not UTF-8, NaN, a list, nothing, length too large, hole at the end, "
        "empty tensor, surrogate",
    )
    is_content = False
    if how == "shift":
        by = rng.choice([1, 4, -4, length])
        entry["data_offsets"] = [start + by, end + by]
    elif how == "overlap":
        for each in names[names.index(name) :]:
            header[each]["data_offsets"] = [offset - 4 for offset in header[each]["data_offsets"]]
        data = data[:-4]
    elif how == "gap":
        for each in names:
            if header[each]["data_offsets"][0] >= end:
                header[each]["data_offsets"] = [offset + 8 for offset in header[each]["data_offsets"]]
        data = data[:end] + bytes(8) + data[end:]
    elif how == "same bytes":
        header[other]["data_offsets"] = [start, end]
    elif how == "swap bytes":
        header[name]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], [start, end]
        is_content = True
    elif how == "reversed":
        entry["data_offsets"] = [end, start]
    elif how == "offsets of odd type":
        entry["data_offsets"] = rng.choice(
            [
                *ODD,
                [start],
                [start, end, end],
                [float(start), float(end)],
                [str(start), str(end)],
                [True, end],
                [None] * 2,
            ]
        )
    elif how == "huge offsets":
        by = rng.choice(HUGE)
        entry["data_offsets"] = rng.choice([[start, start + by], [by, by + length], [-by, -by + length]])
    elif how == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
        is_content = True
    elif how == "another dtype of the same size":
        same = [
            ("F32", "I32", "U32"),
            ("F16", "BF16", "I16"),
            ("U8", "I8", "F8_E4M3", "F8_E8M0", "BOOL"),
            ("I64", "F64"),
        ]
        entry["dtype"] = rng.choice(next((group for group in same if entry["dtype"] in group), ("X",)))
        is_content = True
    elif how == "shape":
        entry["shape"] = rng.choice(
            [*ODD, [*entry["shape"], 1], entry["shape"][1:], [float(n) for n in entry["shape"]]]
        )
        is_content = True
    elif how == "transposed":
        entry["shape"] = entry["shape"][::-1]
        is_content = True
    elif how == "huge shape":
        entry["shape"] = [rng.choice(HUGE), *entry["shape"][1:]]
    elif how == "negative shape":
        entry["shape"] = [-n for n in entry["shape"]]
    elif how == "entry of odd type":
        header[name] = rng.choice(ODD)
    elif how.startswith("no "):
        del entry[{"dtype": "dtype", "shape": "shape", "offsets": "data_offsets"}[how[3:]]]
    elif how == "renamed":
        header = {(f"{key}x" if key == name else key): value for key, value in header.items()}
    elif how == "gone":
        del header[name]
    elif how == "gone with its bytes":
        del header[name]
        for each in header.values():
            if each.get("data_offsets", [0])[0] >= end:
                each["data_offsets"] = [offset - length for offset in each["data_offsets"]]
        data = data[:start] + data[end:]
    elif how == "one more tensor":
        new = rng.choice(["foreign", "model.layers.7.engram.table.blocks.0", f"{name}0", "model.layers.1.engram.extra"])
        header[new] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += bytes(4)
        is_content = True
    elif how == "metadata of odd type":
        header["__metadata__"] = rng.choice(ODD)
        is_content = True
    elif how == "hole at the end":
        data += bytes(8)
    elif how == "empty tensor":
        header["empty"] = {"dtype": "F32", "shape": [0], "data_offsets": [length, length]}
        is_content = True
    text = json.dumps(header).encode()
    if how == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
        is_content = True
    elif how == "deep":
        text = b'{"a":' + DEEP.encode() + b"}"
    elif how == "deep extra":
        text = text.replace(b'{"dtype"', b'{"x":' + DEEP.encode() + b',"dtype"', 1)
    elif how == "not UTF-8":
        text = text.replace(name.encode(), b"\xff\xfe" + name.encode(), 1)
    elif how == "NaN":
        text = text.replace(b'"shape": [', b'"shape": [NaN, ', 1)
    elif how == "a list":
        text = json.dumps([header]).encode()
    elif how == "nothing":
        text = rng.choice([b"{}", b"", b"null", b" " * 16])
    elif how == "surrogate":
        text = text.replace(name.encode(), b"\\ud800" + name.encode(), 1)
    join_file(path, text, data)
    if how == "length too large":
        content = path.read_bytes()
        write_anew(path, struct.pack("<Q", rng.choice([len(content), 2**40, 2**64 - 1])) + content[8:])
    return Damage("header", path.name, how, is_content)


def index_of_weights(base: Base, rng: random.Random) -> Damage:
    path = _choose(base.root.glob(f"**/{INDEX}"), rng)
    index = read_json(path)
    weight_map, metadata = index["weight_map"], index["metadata"]
    name = rng.choice(sorted(weight_map))
    file = weight_map[name]
    how = _one_of(
        rng,
        "bytes, metadata of odd type, no metadata, weight_map of odd type, no weight_map, file of odd type, "
        "missing file, another file, outside, foreign name, tensor gone, file gone, digest gone, digest of "
        "odd type, digests of odd type, no digests, another digest, fingerprint of odd type, part of the "
        "fingerprint, no fingerprint, total_size, deep, a list, twice, not UTF-8, one digest more, renamed "
        "tensor",
    )
    if how == "bytes":
        return Damage("index", path.name, damage_bytes(path, rng)[0])
    if how == "metadata of odd type":
        index["metadata"] = rng.choice(ODD)
    elif how == "no metadata":
        del index["metadata"]
    elif how == "weight_map of odd type":
        index["weight_map"] = rng.choice([*ODD, list(weight_map), [[key, value] for key, value in weight_map.items()]])
    elif how == "no weight_map":
        del index["weight_map"]
    elif how == "file of odd type":
        weight_map[name] = rng.choice(ODD)
    elif how == "missing file":
        weight_map[name] = "model-00009-of-00009.safetensors"
    elif how == "another file":
        weight_map[name] = rng.choice(sorted({*weight_map.values()}))
    elif how == "outside":
        weight_map[name] = rng.choice(
            [
                "../x",
                "/etc/passwd",
                "..",
                ".",
                "",
                "a\0b",
                "\ud800",
                "x" * 5000,
                f"./{file}",
                f"../{path.parent.name}/{file}",
                "config.json",
                INDEX,
                f"{file}/",
                f"a/../{file}",
                "C:\\x",
                "~/x",
            ]
        )
    elif how == "foreign name":
        new = rng.choice(["foreign", "", "model.layers.9.engram.table.blocks.0", "layers.0.engram.table.blocks.0"])
        weight_map[new] = file
    elif how == "renamed tensor":
        weight_map[f"{name}x"] = weight_map.pop(name)
    elif how == "tensor gone":
        del weight_map[name]
    elif how == "file gone":
        index["weight_map"] = {key: value for key, value in weight_map.items() if value != file}
        metadata["sha256"].pop(file)
        if rng.random() < 0.5:
            (path.parent / file).unlink()
    elif how == "digest gone":
        metadata["sha256"].pop(file)
    elif how == "digest of odd type":
        metadata["sha256"][file] = rng.choice([*ODD, "0" * 63, "G" * 64])
    elif how == "digests of odd type":
        metadata["sha256"] = rng.choice(ODD)
    elif how == "no digests":
        del metadata["sha256"]
    elif how == "another digest":
        metadata["sha256"][file] = "0" * 64
    elif how == "one digest more":
        metadata["sha256"]["model-00009.safetensors"] = "0" * 64
    elif how == "fingerprint of odd type":
        metadata["engram_fingerprint"] = rng.choice(ODD)
    elif how == "part of the fingerprint":
        part = rng.choice(sorted(metadata["engram_fingerprint"]))
        if rng.random() < 0.5:
            del metadata["engram_fingerprint"][part]
        else:
            metadata["engram_fingerprint"][part] = rng.choice(ODD)
    elif how == "no fingerprint":
        del metadata["engram_fingerprint"]
    elif how == "total_size":
        metadata["total_size"] = rng.choice(ODD)
    text = json.dumps([index] if how == "a list" else index)
    if how == "deep":
        text = rng.choice([DEEP, '{"weight_map":' + DEEP + "}", text[:-1] + ', "a":' + DEEP + "}"])
    elif how == "twice":
        text = text[:-1] + ', "weight_map": {}}'
    content = text.encode()
    if how == "not UTF-8":
        content = content.replace(b"model", b"\xffodel", 1)
    write_anew(path, content)
    return Damage("index", path.name, how)


def config_of_model(base: Base, rng: random.Random) -> Damage:
    path = base.folder / "config.json"
    config = read_json(path)
    how = _one_of(rng, "bytes, odd, odd, odd, odd, engram, engram, engram, gone, number, number, deep, part, a list")
    if how == "bytes":
        return Damage("config", path.name, damage_bytes(path, rng)[0], is_content=True)
    own = sorted(key for key in config if key.startswith(("engram_", "hc_")))
    name = rng.choice(own if how == "engram" else sorted(config))
    if how in ("odd", "engram"):
        config[name] = rng.choice(ODD)
    elif how == "gone":
        del config[name]
    elif how == "number":
        name = rng.choice([key for key, value in config.items() if type(value) is int])
        config[name] = rng.choice(
            [config[name] + 1, 2 * config[name], config[name] - 1, -config[name], 200_000_000, 2**63]
        )
    elif how == "part":
        name = rng.choice([key for key, value in config.items() if isinstance(value, (dict, list)) and value])
        key = rng.choice(sorted(config[name]) if isinstance(config[name], dict) else range(len(config[name])))
        config[name][key] = rng.choice(ODD)
    text = json.dumps([config] if how == "a list" else config)
    if how == "deep":
        text = text[:-1] + f', "{name}": {DEEP}}}'
    write_anew(path, text)
    return Damage("config", path.name, f"{how} {name} {str(config.get(name))[:40]}", is_content=True)


def rows_of_run(base: Base, rng: random.Random) -> Damage:
    folder = base.folder
    path = _choose(folder.glob("rows-*.safetensors"), rng)
    tensors = load_file(path)
    names = {name.rpartition(".changed.")[2]: name for name in tensors}
    ids_name = names.get("row_ids") or names["keys"]
    rows_name, digests_name = names["rows"], names["digests"]
    ids = tensors[ids_name].clone()
    how = _one_of(
        rng,
        "negative, twice, unsorted, float, bool, int32, past the table, far past, two-dimensional, fewer ids, "
        "fewer rows, wider rows, rows of another type, digests of another type, fewer digests, another "
        "digest, no ids, no rows, no digests, no rows at all, rows in another file, rows in another file, "
        "gone with its entries, gone with its entries, gone with entries and digest, another table, NaN, "
        "another id, scalar ids",
    )
    is_content = False
    if how == "negative":
        ids[0] = -1
    elif how == "twice":
        ids[1] = ids[0]
    elif how == "unsorted":
        ids = ids.flip(0)
    elif how in ("float", "bool", "int32"):
        ids = ids.to({"float": torch.float64, "bool": torch.bool, "int32": torch.int32}[how])
    elif how == "past the table":
        config = read_json(folder / "config.json")
        blocks = load_all(folder)
        table = ids_name.partition(".changed.")[0]
        ids[-1] = sum(len(t) for n, t in blocks.items() if n.startswith(f"{table}.blocks.")) + len(config) * 0
    elif how == "far past":
        ids[-1] = 2**62
    elif how == "two-dimensional":
        ids = ids[:, None]
    elif how == "scalar ids":
        ids = ids[0]
    elif how == "fewer ids":
        ids = ids[:-1]
    elif how == "fewer rows":
        tensors[rows_name] = tensors[rows_name][:-1].clone()
    elif how == "wider rows":
        tensors[rows_name] = torch.cat([tensors[rows_name]] * 2, dim=1)
    elif how == "rows of another type":
        tensors[rows_name] = tensors[rows_name].to(rng.choice([torch.float16, torch.int32, torch.float64]))
    elif how == "digests of another type":
        tensors[digests_name] = tensors[digests_name].float()
    elif how == "fewer digests":
        tensors[digests_name] = tensors[digests_name][:-1].clone()
    elif how == "another digest":
        tensors[digests_name] = tensors[digests_name].flip(1).contiguous()
        is_content = True
    elif how == "NaN":
        tensors[rows_name][0, 0] = float("nan")
        is_content = True
    elif how == "another id":
        ids = ids.clone()
        ids[-1] += -1 if len(ids) < 2 or ids[-2] < ids[-1] - 1 else 1
        is_content = True
    elif how == "no rows at all":
        ids, tensors[rows_name] = ids[:0], tensors[rows_name][:0]
        is_content = True
    tensors[ids_name] = ids
    index_path = folder / INDEX
    index = read_json(index_path)
    if how.startswith("no ") and how != "no rows at all":
        gone = {"ids": ids_name, "rows": rows_name, "digests": digests_name}[how[3:]]
        del tensors[gone]
        if rng.random() < 0.5:
            del index["weight_map"][gone]
    elif how == "another table":
        tensors = {name.replace("layers.1", "layers.0"): t for name, t in tensors.items()}
    elif how == "rows in another file":
        moved = tensors.pop(rng.choice([rows_name, digests_name]))
        name = next(n for n in (rows_name, digests_name) if n not in tensors)
        save_file({name: moved.contiguous()}, folder / "rows-extra.safetensors", metadata={"format": "pt"})
        index["weight_map"][name] = "rows-extra.safetensors"
    elif how.startswith("gone"):
        for name in names.values():
            del index["weight_map"][name]
        if how == "gone with entries and digest" or rng.random() < 0.3:
            index["metadata"]["sha256"].pop(path.name)
    path.unlink()
    if not how.startswith("gone") or rng.random() < 0.3:
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    write_anew(index_path, json.dumps(index))
    return Damage("rows", path.name, how, is_content)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _nodes(value, path=()):
    """All places of a nested value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield from _nodes(inner, (*path, key))


def _replace(value, path, new):
    if not path:
        return new
    if isinstance(value, dict):
        return {k: _replace(v, path[1:], new) if k == path[0] else v for k, v in value.items()}
    return type(value)(_replace(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value))


def _without(value, path):
    if len(path) > 1:
        return _replace(value, path[:1], _without(value[path[0]], path[1:]))
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k != path[0]}
    return type(value)(v for i, v in enumerate(value) if i != path[0])


def optimizer_of_run(base: Base, rng: random.Random) -> Damage:
    path = base.folder / "optimizer.pt"
    if rng.random() < 0.25:
        how, _ = damage_bytes(path, rng)
        return Damage(
            "optimizer", path.name, f"bytes: {how}", is_content=how in ("flip", "flip many", "zeros", "header bit")
        )
    state = torch.load(path, weights_only=True)
    place = rng.choice([p for p in _nodes(state) if p])
    value = state
    for key in place:
        value = value[key]
    is_content = False
    how = rng.choice(["gone", "odd", "tensor"])
    if how == "tensor" and isinstance(value, torch.Tensor):
        changes = [
            lambda t: t.flatten()[:-1],
            lambda t: t[None],
            lambda t: t.double() if t.dtype != torch.float64 else t.int(),
            lambda t: t.flip(0) if t.ndim else -t,
            lambda t: -t - 1 if t.dtype != torch.bool else ~t,
            lambda t: t * 0 + 2**40 if not t.is_floating_point() else t.bool(),
        ]
        state = _replace(state, place, rng.choice(changes)(value).clone())
        is_content = value.is_floating_point()
    elif how == "odd":
        state = _replace(state, place, rng.choice(ODD))
        is_content = isinstance(value, (int, float, str, bool, tuple, list, type(None)))
    else:
        state = _without(state, place)
        how = "gone"
    path.unlink()
    torch.save(state, path)
    return Damage("optimizer", path.name, f"{how} {'.'.join(map(str, place))}", is_content)


def state_of_run(base: Base, rng: random.Random) -> Damage:
    path = base.folder / "trainer_state.json"
    return _json_file(path, rng, "trainer_state")


def _json_file(path: Path, rng: random.Random, kind: str) -> Damage:
    content = read_json(path)
    how = rng.choice(["bytes", "gone", "odd", "odd", "deep", "a list", "odd text"])
    if how == "bytes":
        return Damage(kind, path.name, damage_bytes(path, rng)[0], is_content=True)
    name = rng.choice(sorted(content))
    if how == "gone":
        del content[name]
    elif how == "odd":
        content[name] = rng.choice(ODD)
    text = json.dumps([content] if how == "a list" else content)
    if how == "deep":
        text = text[:-1] + f', "{name}": {DEEP}}}'
    elif how == "odd text":
        text = rng.choice(["null", "[]", "1", '"x"', "", DEEP, "{}", "\ufeff{}", "NaN"])
    write_anew(path, text)
    return Damage(kind, path.name, f"{how} {name}", is_content=True)


def tokenizer_of_model(base: Base, rng: random.Random) -> Damage:
    path = _choose(base.folder.glob("tokenizer*.json"), rng)
    return _json_file(path, rng, "tokenizer")


def generation_config(base: Base, rng: random.Random) -> Damage:
    return _json_file(base.folder / "generation_config.json", rng, "generation_config")


def card_of_model(base: Base, rng: random.Random) -> Damage:
    path = base.folder / "README.md"
    how = rng.choice(["bytes", "yaml", "yaml", "yaml"])
    if how == "bytes":
        return Damage("card", path.name, damage_bytes(path, rng)[0], is_content=True)
    header = rng.choice(
        [
            "a: &a [*a]",
            "&a {b: *a}",
            "- list",
            "text",
            "a: [",
            "a: !!python/object:os.system x",
            "tags: 7",
            "tags: {a: b}",
            "library_name: [x]",
            "model-index: 7",
            "model-index: [{}]",
            "base_model: {a: 1}",
            "\x00",
            "a: b: c",
            "license: {x: y}",
            "a: " + "[" * 5000,
            "? [a]\n: b",
            "1: 2",
            "license: ~",
            "language: [1, null]",
            "a: 2026-99-99",
        ]
    )
    write_anew(path, f"---\n{header}\n---\n\n# A model\n")
    return Damage("card", path.name, f"yaml {header[:30]!r}", is_content=True)


KINDS: dict[str, Callable[[Base, random.Random], Damage]] = {
    "bytes": bytes_of_weights,
    "header": header_of_weights,
    "index": index_of_weights,
    "config": config_of_model,
    "rows": rows_of_run,
    "patch": patch_of_rows,
    "optimizer": optimizer_of_run,
    "trainer_state": state_of_run,
    "tokenizer": tokenizer_of_model,
    "generation_config": generation_config,
    "card": card_of_model,
}
# Of how many parts each kind is, and which checkpoints have it.
EVERYWHERE = ("plain", "apart", "float8_e4m3fn", "int4", "tokenizer", "training")
SHARES = {
    "bytes": (15, EVERYWHERE),
    "header": (25, EVERYWHERE),
    "index": (20, EVERYWHERE),
    "config": (20, EVERYWHERE),
    "rows": (12, ("training",)),
    "patch": (12, ("patch",)),
    "optimizer": (10, ("training",)),
    "trainer_state": (3, ("training",)),
    "tokenizer": (4, ("tokenizer",)),
    "generation_config": (2, ("plain", "training")),
    "card": (4, ("plain",)),
}


def draw(seed: int) -> tuple[str, str, random.Random]:
    """Name of a checkpoint, kind of a damage, and the generator that draws the rest of it."""
    rng = random.Random(seed)
    kind = rng.choices(list(SHARES), [share for share, _ in SHARES.values()])[0]
    return rng.choice(SHARES[kind][1]), kind, rng

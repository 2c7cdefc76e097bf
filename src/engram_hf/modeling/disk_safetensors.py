"""safetensors files and their index: read strictly, written one piece at a time.

The safetensors library reads and writes whole tensors, and a whole file at once. Tables need less memory than that, a
first row on a page boundary, and a digest. The format is described at https://github.com/huggingface/safetensors. A
header that passes `read_header` is one that the library accepts too.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch


TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# The format has them, and torch has no type of one number that is as short.
BITS_OF_SHORT_TYPES = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
LENGTH_BYTES = 8
# The library's own limit.
MAX_HEADER_BYTES = 100_000_000
PAGE_BYTES = 4096
PIECE_BYTES = 16 * 2**20
SHA256, STAMP = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]*")
ODD_CHARACTERS = re.compile(r"[\\:]|\A~")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file: bytes [start, start + nbytes) of it.

    dtype is None where torch has no such type; type_name is what the format calls it.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    nbytes: int
    type_name: str = "?"


def read_json(path: str | Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 or not JSON; a key is there twice; or it holds something else than an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file.")
    return _parse_json(path.read_bytes(), str(path))


def _parse_json(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content.decode(), object_pairs_hook=_refuse_twice, parse_constant=_refuse_constant)
        if b"\\ud" in content.lower():
            # Half a character, which Python reads and cannot write.
            json.dumps(found, ensure_ascii=False).encode()
    # Python gives up on deep nesting with a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: it is not JSON ({error}). Download or copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: it must hold a JSON object, got {_short(found)}.")
    return found


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {_short(twice)} twice")
    return found


def _refuse_constant(name: str):
    raise ValueError(f"JSON has no number {name}")


def _short(value) -> str:
    """A value of a damaged file for a message, cut where it is long."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_count(value) -> bool:
    """Whether a value is an int of at least 0; `True` is not."""
    return type(value) is int and value >= 0


def read_header(path: str | Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file, by name. Reads nothing of their contents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is longer than its header says, or is not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file. Download or copy the checkpoint again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError(
                f"{path} is truncated, or is not a safetensors file: its {size} bytes hold no whole header. Download "
                "or copy it again."
            )
        content = file.read(length)
    try:
        return read_places(_parse_json(content, "its header"), LENGTH_BYTES + length, size)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error} Download or copy it again.") from error


def read_places(header: Mapping[str, Any], data_start: int = 0, file_size: int | None = None) -> dict[str, TensorPlace]:
    """Where the tensors of a header lie. They fill the file from the end of the header to its own, without gaps.

    Args:
        header: name to dtype, shape and data_offsets.
        data_start: byte of the file that the offsets count from.
        file_size: bytes of the file; None where nobody knows.

    Raises:
        ValueError: says what of the header is wrong, and names the tensor.
    """
    metadata = header.get("__metadata__")
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError(f"__metadata__ of its header must map text to text, got {_short(metadata)}.")
    places = {name: _read_place(name, entry, data_start) for name, entry in header.items() if name != "__metadata__"}
    end = data_start
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if place.start != end:
            raise ValueError(
                f"{_short(name)} begins at byte {place.start - data_start} of the data, and those before it "
                f"end at byte {end - data_start}; there must be no gap and no overlap."
            )
        end += place.nbytes
    if file_size is not None and file_size != end:
        raise ValueError(
            f"it is {'truncated' if file_size < end else 'longer than its header says'}: it has {file_size} bytes, and "
            f"its header needs {end}."
        )
    return places


def _read_place(name: str, entry, data_start: int) -> TensorPlace:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"{_short(name)} must have dtype, shape and data_offsets, got {_short(entry)}.")
    type_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(type_name, str) or type_name not in TORCH_DTYPES | BITS_OF_SHORT_TYPES:
        known = ", ".join([*TORCH_DTYPES, *BITS_OF_SHORT_TYPES])
        raise ValueError(f"{_short(name)} is of the type {_short(type_name)}; there are {known}.")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"the shape of {_short(name)} must be a list of sizes, got {_short(shape)}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"data_offsets of {_short(name)} must be two numbers of bytes, got {_short(offsets)}.")
    dtype, (start, end) = TORCH_DTYPES.get(type_name), offsets
    bits = math.prod(shape) * (BITS_OF_SHORT_TYPES[type_name] if dtype is None else 8 * dtype.itemsize)
    # Python's numbers do not overflow, others' do.
    if max(bits, end) >= 2**63 or bits != 8 * (end - start):
        raise ValueError(
            f"{_short(name)}, {type_name} of shape {_short(shape)}, does not fill its bytes "
            f"{_short(start)} to {_short(end)}."
        )
    return TensorPlace(dtype, tuple(shape), data_start + start, end - start, type_name)


def read_index(index: str | Path) -> dict[str, Any]:
    """The index of a checkpoint: `weight_map`, tensor name to file name, and `metadata`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or names a file outside its own folder.
    """
    content = read_json(index)
    try:
        _check_index(content)
    except ValueError as error:
        raise ValueError(f"{index} is damaged: {error} Download or copy it again.") from error
    return content


def _check_index(content: Mapping[str, Any]) -> None:
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict):
        raise ValueError(f"its weight_map must map tensors to files, got {_short(weight_map)}.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise ValueError(
                f"weight_map names {_short(name)} as the file of {_short(tensor)}, which is not the name of a "
                "file inside its folder. Nothing is read from elsewhere."
            )
    if not isinstance(metadata, dict):
        # transformers asks for it too.
        raise ValueError(f"its metadata must be a JSON object, got {_short(metadata)}.")
    digests = metadata.get("sha256", {})
    if not isinstance(digests, dict) or not all(
        isinstance(digest, str) and SHA256.fullmatch(digest) for digest in digests.values()
    ):
        raise ValueError(f"sha256 of its metadata must map files to 64 hexadecimal digits, got {_short(digests)}.")
    differing = set(digests) ^ set(weight_map.values()) if "sha256" in metadata else set()
    if differing:
        raise ValueError(
            f"sha256 of its metadata and weight_map must name the same files, and only one of them names "
            f"{', '.join(map(_short, sorted(differing)[:4]))}."
        )
    of_run = metadata.get("row_state", {})
    if not isinstance(of_run, dict) or not all(
        _is_inside(name) and isinstance(each, str) and SHA256.fullmatch(each) for name, each in of_run.items()
    ):
        raise ValueError(f"row_state of its metadata must map files to 64 hexadecimal digits, got {_short(of_run)}.")
    fingerprint = metadata.get("engram_fingerprint")
    if fingerprint is not None and not (
        isinstance(fingerprint, dict) and all(isinstance(part, str) for part in fingerprint.values())
    ):
        raise ValueError(f"engram_fingerprint of its metadata must map text to text, got {_short(fingerprint)}.")
    rows, stamp = metadata.get("changed_rows", {}), metadata.get("stamp", "")
    if not isinstance(rows, dict) or not all(map(_is_count, rows.values())):
        raise ValueError(f"changed_rows of its metadata must map tables to numbers of rows, got {_short(rows)}.")
    if not isinstance(stamp, str) or STAMP.fullmatch(stamp) is None:
        raise ValueError(f"stamp of its metadata must be hexadecimal digits, got {_short(stamp)}.")
    if not isinstance(metadata.get("config", {}), dict):
        raise ValueError(f"config of its metadata must be a JSON object, got {_short(metadata['config'])}.")
    # Libraries that count the bytes of tensors write a float now and then.
    total = metadata.get("total_size", 0)
    if type(total) not in (int, float) or not 0 <= total < 2**63:
        raise ValueError(f"total_size of its metadata must be a number of bytes, got {_short(total)}.")
    # transformers builds the model in this type where config.json names none.
    dtype = metadata.get("dtype", "float32")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype of its metadata must be the name of a type of torch, got {_short(dtype)}.")


def _is_inside(name: str) -> bool:
    """Whether a file name leads to a file inside the folder that it is relative to, on every system."""
    path = PurePosixPath(name)
    is_plain = name.isprintable() and ODD_CHARACTERS.search(name) is None and str(path) == name
    return is_plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def read_weight_map(index: str | Path) -> dict[str, str]:
    """Tensor name to file name, as an index promises them.

    Raises:
        FileNotFoundError, ValueError: as `read_index`.
    """
    return read_index(index)["weight_map"]


def refuse_outside(folder: str | Path, path: str | Path) -> None:
    """Refuse a link that leads out of the folder that brought it: whoever made the folder would choose what is copied.

    The Hub's cache consists of links into its own `blobs`, which are allowed.

    Raises:
        ValueError: the path leads to something else outside the folder.
    """
    folder, path = Path(folder), Path(path)
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()) and not _is_blob(target):
        raise ValueError(
            f"{path} is a link that leads out of its folder, to {target}. Nothing is read from there; replace the link "
            "by a copy, or remove it."
        )


def _is_blob(path: Path) -> bool:
    """Whether a file lies among the blobs of a Hub cache: those of a repository, or those that repositories share."""
    blobs = next((parent for parent in path.parents if parent.name == "blobs"), None)
    return blobs is not None and (
        (blobs.parent / "snapshots").is_dir() or (blobs / ".huggingface-shared-blobs").is_file()
    )


@dataclass(frozen=True)
class TensorContent:
    """A tensor to be written. `pieces()` gives its bytes in order, a piece at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[bytes | memoryview]]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorContent":
        """Content of a tensor on any device. It is brought to the CPU while it is written."""

        def pieces():
            on_cpu = tensor.detach().cpu().contiguous()
            content = memoryview(on_cpu.view(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(content), PIECE_BYTES):
                yield content[start : start + PIECE_BYTES]

        return cls(tensor.dtype, tuple(tensor.shape), tensor.nbytes, pieces)


def write_file(
    path: str | Path, contents: Mapping[str, TensorContent], on_bytes: Callable[[int], object] | None = None
) -> str:
    """Write a safetensors file. It gets its name when all of it is on the disk.

    Tensors are written in the order given, the first one from a page boundary on.

    Args:
        path: the file.
        contents: name to content.
        on_bytes: called with the number of bytes after each piece of a tensor, for a progress bar.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: no space or no permission; names the file. What was there under this name stays.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, content in contents.items():
        end = offset + content.nbytes
        header[name] = {"dtype": NAMES[content.dtype], "shape": list(content.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % PAGE_BYTES)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(LENGTH_BYTES, "little") + text
        for content in contents.values():
            for piece in content.pieces():
                yield piece
                # Whoever asks for the next piece has written this one.
                if on_bytes is not None:
                    on_bytes(len(piece))

    return write_pieces(path, pieces(), LENGTH_BYTES + len(text) + offset)


def write_pieces(
    path: str | Path,
    pieces: Iterable[bytes | bytearray | memoryview],
    nbytes: int | None = None,
) -> str:
    """Write bytes under a temporary name, make them durable, then give them the name.

    Args:
        path: the file.
        pieces: its bytes.
        nbytes: how many bytes there are in all, for the message of an error; None where nobody knows.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: no space or no permission; names the file and the bytes. What was there under this name stays.
    """
    digest, written = hashlib.sha256(), 0
    temporary = Path(f"{path}.part{os.getpid()}")
    try:
        # Without a buffer, which would be written again, and fail again, when the file is closed.
        with temporary.open("wb", buffering=0) as file:
            for piece in pieces:
                left = memoryview(piece)
                digest.update(left)
                try:
                    while left:
                        count = file.write(left)
                        written, left = written + count, left[count:]
                except OSError as error:
                    raise _not_written(path, error, written, nbytes) from error
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise _not_written(path, error, written, nbytes) from error
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def _not_written(path: str | Path, error: OSError, written: int, nbytes: int | None) -> OSError:
    """The error of a write, with the file and the bytes, which the system does not say."""
    of = "" if nbytes is None else f" of {nbytes:,}"
    free = shutil.disk_usage(Path(path).parent).free
    return OSError(
        error.errno,
        f"{path} could not be written ({error.strerror}): {written:,}{of} bytes were written, and {free:,} are free on "
        "its disk. Make room or name another folder; the checkpoint that was there is unchanged",
    )


def file_digest(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)

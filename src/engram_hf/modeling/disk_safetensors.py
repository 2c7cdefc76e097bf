"""safetensors files as bytes on a disk: headers read without their tensors, files written one piece at a time.

The safetensors library reads and writes whole tensors, and a whole file at once; tables need less memory than that, a
first row on a page boundary, a digest, and a name that stands for a complete file only.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch


TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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
LENGTH_BYTES = 8
# The library's own limit.
MAX_HEADER_BYTES = 100_000_000
PAGE_BYTES = 4096
PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file: bytes [start, start + nbytes) of it. dtype: None for one torch does not have."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: str | Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file, by name; reads nothing of their contents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, longer than its header says, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Download the checkpoint again; its index names this file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: its {size} bytes hold no whole header.")
        try:
            header = json.loads(file.read(length))
            places = {
                name: _place(entry, LENGTH_BYTES + length) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read ({error!r}). Download it again.") from error
    end = max((place.start + place.nbytes for place in places.values()), default=LENGTH_BYTES + length)
    if end != size:
        raise ValueError(
            f"{path} is {'truncated' if size < end else 'longer than its header says'}: {size} bytes, its header needs "
            f"{end}. Download it again."
        )
    return places


def _place(entry: dict, data_start: int) -> TensorPlace:
    start, end = entry["data_offsets"]
    dtype, shape = TORCH_DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if not 0 <= start <= end or dtype is not None and math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{entry['dtype']} of shape {shape} does not fill the bytes {start} to {end}")
    return TensorPlace(dtype, shape, data_start + start, end - start)


def read_index(index: str | Path) -> dict:
    """The index of a checkpoint: `weight_map` and, mostly, `metadata`.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(Path(index).read_text())
        if not all(isinstance(name, str) for name in content["weight_map"].values()):
            raise ValueError("a file name in it is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it holds no weight_map ({error!r}). Download it again.") from error
    if not isinstance(content.get("metadata") or {}, dict):
        raise ValueError(
            f"{index} is damaged: its metadata is no object but {content['metadata']!r}. Download it again."
        )
    return content


def read_weight_map(index: str | Path) -> dict[str, str]:
    """Tensor name to file name, as an index promises them.

    Raises:
        ValueError: no index, or one that names a file outside its own folder.
    """
    weight_map = read_index(index)["weight_map"]
    for name in set(weight_map.values()):
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or ":" in name:
            raise ValueError(
                f"{index} names {name!r}, which is not inside its folder. Nothing is read from there; name files "
                "relative to the folder of the index."
            )
    return weight_map


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
    """A tensor that is to be written: its bytes are asked for piece by piece, `pieces()` gives them in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[bytes | memoryview]]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorContent":
        """Content of a tensor on any device; one that is not on the CPU is brought there while it is written."""

        def pieces():
            on_cpu = tensor.detach().cpu().contiguous()
            content = memoryview(on_cpu.view(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(content), PIECE_BYTES):
                yield content[start : start + PIECE_BYTES]

        return cls(tensor.dtype, tuple(tensor.shape), tensor.nbytes, pieces)


def write_file(
    path: str | Path, contents: Mapping[str, TensorContent], on_bytes: Callable[[int], object] | None = None
) -> str:
    """Write a safetensors file; it has its name only when all of it is on the disk.

    Tensors are written in the order given, the first one from a page boundary on.

    Args:
        path: the file.
        contents: name to content.
        on_bytes: called with the number of bytes after each piece, for a progress bar.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: no space, no right; `path` is then what it was.
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
            yield from content.pieces()

    return write_pieces(path, pieces(), on_bytes)


def write_pieces(path: str | Path, pieces, on_bytes: Callable[[int], object] | None = None) -> str:
    """Write bytes under a temporary name, make them durable, then give them the name; their SHA-256."""
    digest = hashlib.sha256()
    temporary = Path(f"{path}.part{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


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

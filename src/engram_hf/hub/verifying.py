"""Is a checkpoint what it was when it was saved? Reads every byte; a forward cannot see a flipped one."""

from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ..modeling.engram_loading import Checkpoint, find_checkpoint, read_digests, read_headers
from ..modeling.safetensors_files import file_digest


@dataclass(frozen=True)
class VerifiedFile:
    """A weight file: its name, bytes, SHA-256 as promised (None: nothing is promised) and as found, and its tensors."""

    name: str
    nbytes: int
    promised: str | None
    found: str
    tensors: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        return self.promised == self.found


def verify_tables(path: str | Path) -> list[VerifiedFile]:
    """Compare every weight file of a checkpoint with the SHA-256 that saving wrote into the index.

    Args:
        path: folder of a checkpoint, or of tables alone.

    Returns:
        the files, all of them sound.

    Raises:
        FileNotFoundError: no safetensors files are there, or one is missing.
        ValueError: a file is truncated or changed, or no digest was saved for it; names the files and their tensors.

    Example:
        >>> verify_tables("output/tiny")
        [VerifiedFile(name='model-00001-of-00001.safetensors', ...), ...]
    """
    checkpoint = find_checkpoint(str(path), {"local_files_only": True}) if Path(path).is_dir() else None
    if checkpoint is None:
        raise FileNotFoundError(f"{path} is no folder with safetensors files and their index; nothing can be verified.")
    read_headers(checkpoint)
    files = _verify(checkpoint, read_digests(path))
    unknown = [file.name for file in files if file.promised is None]
    changed = [file for file in files if file.promised is not None and not file.is_sound]
    if changed:
        raise ValueError(
            f"{len(changed)} of {len(files)} files of {path} are not what was saved: "
            + "; ".join(f"{file.name} (with {_some(file.tensors)})" for file in changed)
            + ". Download or copy them again."
        )
    if unknown:
        raise ValueError(
            f"{path} holds no SHA-256 for {_some(unknown)}, so nothing can be said of them. Load the model and save it "
            "once with save_pretrained, which writes them."
        )
    return files


def _verify(checkpoint: Checkpoint, digests: dict[str, str]) -> list[VerifiedFile]:
    tensors: dict[Path, list[str]] = {}
    for name, file in checkpoint.file_of.items():
        tensors.setdefault(file, []).append(name)
    total = sum(file.stat().st_size for file in tensors)
    files = []
    with logging.tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, disable=total < 2**26) as progress:
        for file, names in sorted(tensors.items()):
            found = file_digest(file, progress.update)
            files.append(VerifiedFile(file.name, file.stat().st_size, digests.get(file.name), found, tuple(names)))
    return files


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")

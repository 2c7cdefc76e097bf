"""Files of a checkpoint that lie on the Hub: fetched at one commit, and compared with what their index promises."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers.utils import cached_file, logging
from transformers.utils.hub import cached_files, extract_commit_hash

from .safetensors_files import file_digest


HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# In the cache's folder of a repository, beside huggingface_hub's own `.no_exist`.
NOTES_FOLDER = ".engram_sound"
# Files below this size are read too fast to need a progress bar.
PROGRESS_BYTES = 2**26


def find_file(name: str | Path, filename: str, hub: Mapping) -> Path | None:
    """A file of a folder or repository on this machine, downloaded where it is not here; None where there is none.

    Args:
        name: folder or repository.
        hub: those of `HUB_ARGUMENTS` that are given.
    """
    path = cached_file(
        name,
        filename,
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def commit_of(name: str | Path, path: Path) -> str | None:
    """The commit that a file of the Hub's cache belongs to; None for a file of a folder."""
    return None if Path(name).is_dir() else extract_commit_hash(str(path), None)


def download_files(
    name: str | Path, filenames: Iterable[str], promised: Mapping[str, str], hub: Mapping
) -> dict[str, Path]:
    """Files of a repository by name. Each is read once after it has come, and is what its index promises.

    Args:
        name: repository.
        filenames: of the files.
        promised: file name to SHA-256; a file without one is not compared.
        hub: those of `HUB_ARGUMENTS` that are given.

    Raises:
        ValueError: a file is another one than the index promises; it is then removed from the cache.
        OSError: as transformers raises it, where a file cannot be had.
    """
    filenames = sorted(filenames)
    if not filenames:
        return {}
    found = cached_files(name, filenames, **hub) or []
    paths = {filename: Path(path) for filename, path in zip(filenames, found, strict=True)}
    to_read = [f for f in filenames if f in promised and not _was_found_sound(paths[f], promised[f])]
    total = sum(paths[filename].stat().st_size for filename in to_read)
    wrong = []
    with logging.tqdm(
        total=total, desc="Checking downloads", unit="B", unit_scale=True, disable=total < PROGRESS_BYTES
    ) as progress:
        for filename in to_read:
            if file_digest(paths[filename], progress.update) == promised[filename]:
                _note_as_sound(paths[filename], promised[filename])
            else:
                wrong.append(filename)
                # The cache holds a link to the file itself.
                paths[filename].resolve().unlink(missing_ok=True)
                paths[filename].unlink(missing_ok=True)
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(to_read)} files that were downloaded from {name} are not what its index promises: "
            f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}. They have been removed from the cache; load "
            "again. Where that does not help, the repository itself is damaged, and another revision may be sound."
        )
    return paths


def _note_of(path: Path, digest: str) -> Path | None:
    """Where it is noted that a file of the Hub's cache was read and found sound: in the folder of its repository."""
    snapshots = next((parent for parent in path.parents if parent.name == "snapshots"), None)
    return None if snapshots is None else snapshots.parent / NOTES_FOLDER / digest


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _was_found_sound(path: Path, digest: str) -> bool:
    """Whether a file was compared since it has come; True where that cannot be noted, in a cache of others."""
    note = _note_of(path, digest)
    if note is None or not os.access(note.parent if note.parent.exists() else note.parent.parent, os.W_OK):
        return True
    return note.is_file() and note.read_text() == _stamp(path)


def _note_as_sound(path: Path, digest: str) -> None:
    note = _note_of(path, digest)
    if note is not None:
        note.parent.mkdir(exist_ok=True)
        note.write_text(_stamp(path))

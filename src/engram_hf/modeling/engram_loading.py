"""What a checkpoint of an EngramMoE model must hold, and the code that is saved beside the weights.

Holds no model code: it is given models and folders. Which tensor lives where at run time is not decided here.
"""

import shutil
from pathlib import Path

from .configuration_engram_moe import AUTO_MAP


# Every file of this folder but __init__: what travels to the Hub. A test compares the list with the folder.
CODE_FILES = (
    "configuration_engram_moe.py",
    "embedding_inversion.py",
    "engram_binding.py",
    "engram_layer.py",
    "engram_loading.py",
    "engram_outputs.py",
    "engram_table.py",
    "modeling_engram_moe.py",
    "ngram_hashing.py",
    "packed_documents.py",
)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MEMORY_NAMES = (".engram.", "token_map")


def save_code(folder: str | Path) -> None:
    """Copy the modeling files into a checkpoint's folder."""
    source = Path(__file__).parent
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in CODE_FILES:
        shutil.copyfile(source / name, Path(folder) / name)


def set_auto_map(config, with_code: bool) -> None:
    """Name all classes for `trust_remote_code`, or none: a map without its files would break the checkpoint."""
    if with_code:
        config.auto_map = dict(AUTO_MAP)
    elif getattr(config, "auto_map", None) is not None:
        del config.auto_map


def weight_files(folder: str | Path) -> dict[str, int]:
    """Time of last change (nanoseconds) of the single weight file and of the index, where they exist."""
    paths = [Path(folder) / name for name in (SINGLE_FILE, INDEX_FILE)]
    return {path.name: path.stat().st_mtime_ns for path in paths if path.exists()}


def remove_stale_weights(folder: str | Path, before: dict[str, int]) -> None:
    """Remove the form of weights that an earlier save left and this one did not write.

    A loader that finds both a single file and an index takes one of them, and it may be the old one.

    Args:
        folder: where the model has just been saved.
        before: `weight_files(folder)` from before that save.
    """
    after = weight_files(folder)
    if len(after) < 2:
        return
    for name, changed in before.items():
        if after[name] == changed:
            (Path(folder) / name).unlink()


def refuse_incomplete_memory(loading_info: dict, where: str) -> None:
    """Raise where a checkpoint lacks a tensor of the memory, or has one of another shape.

    transformers would draw such tensors at random and say so in a notice: rows that answer, and mean nothing.

    Args:
        loading_info: as `from_pretrained(output_loading_info=True)` gives it.
        where: the folder or repository, for the message.

    Raises:
        ValueError: names the tensors.
    """
    missing = sorted(name for name in loading_info["missing_keys"] if any(part in name for part in MEMORY_NAMES))
    if missing:
        raise ValueError(
            f"{where} lacks {len(missing)} tensors of the memory: {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}. Download it again, or load it with the config it was saved with; "
            "to add a memory to a model without one, build the new model from its config and copy the weights over."
        )
    mismatched = [entry for entry in loading_info["mismatched_keys"] if any(part in entry[0] for part in MEMORY_NAMES)]
    if mismatched:
        listed = "; ".join(f"{name} is {tuple(got)}, needs {tuple(needed)}" for name, got, needed in mismatched[:8])
        raise ValueError(
            f"{where} holds a memory of another shape: {listed}. Rows cannot be cut or padded; load the checkpoint "
            "with the engram_* fields and hc_mult that it was saved with."
        )

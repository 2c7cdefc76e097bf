"""Which checkpoint of a run can be resumed: Trainer writes them in place, so a killed run leaves half of one."""

import json
import re
import zipfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..modeling.checkpoint_loading import find_checkpoint, read_headers
from ..modeling.disk_safetensors import read_header


CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# Trainer writes it last.
TRAINER_STATE = "trainer_state.json"
# The same thing has other names under FSDP (accelerate's), DeepSpeed, SageMaker and XLA.
OPTIMIZERS = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_0",
    "optimizer_0_rank*.bin",
    "global_step*",
    "optimizer.pt_*",
    "rank*-optimizer.pt",
)
# DeepSpeed keeps its own schedule with its optimizer.
SCHEDULERS = ("scheduler.pt", "global_step*")
RANDOM_STATES = ("rng_state*.pth",)
# Weights that are not safetensors of a whole model.
OTHER_WEIGHTS = ("adapter_model*", "pytorch_model*", "global_step*")

logger = logging.get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end, or None.

    A warning says of each newer checkpoint why it does not count. `trainer_state.json` is looked for, which Trainer
    writes last, and whether every file beside it is whole, so that an incomplete copy of a run is noticed too. A run
    that writes a checkpoint again removes that marker first. An adapter does not: begin another run of an adapter in
    another folder.

    Example:
        >>> last = last_complete_checkpoint(args.output_dir)
        >>> model = AutoModelForCausalLM.from_pretrained(last or folder)  # tables stay on their tier, in its files
        >>> trained = trainer.train(resume_from_checkpoint=last)
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (match := CHECKPOINT.fullmatch(folder.name)) is not None and folder.is_dir():
            found.append((int(match[1]), folder))
    for step, folder in sorted(found, reverse=True):
        if (reason := why_incomplete(folder, step)) is None:
            return str(folder)
        logger.warning(f"{folder} is not a complete checkpoint: {reason}. It is passed over.")
    return None


def why_incomplete(folder: Path, step: int) -> str | None:
    """What a checkpoint lacks, or None where nothing is missing."""
    try:
        state = json.loads((folder / TRAINER_STATE).read_text())
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE}, which is written last"
    except (OSError, ValueError, RecursionError) as error:
        return f"{TRAINER_STATE} cannot be read ({error!r})"
    saved_step = state.get("global_step") if isinstance(state, dict) else None
    if saved_step != step:
        return f"{TRAINER_STATE} is of step {saved_step!r}"
    return _damaged_weights(folder) or _missing_state(folder) or _damaged_archive(folder)


def _damaged_weights(folder: Path) -> str | None:
    try:
        checkpoint = find_checkpoint(str(folder), {"local_files_only": True})
        if checkpoint is not None:
            read_headers(checkpoint)
            for name in checkpoint.metadata.get("row_state", {}):
                read_header(folder / name)
        for path in folder.glob("adapter_model*.safetensors"):
            read_header(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error) or repr(error)
    return None if checkpoint is not None or _has(folder, OTHER_WEIGHTS) else "it holds no weights"


def _missing_state(folder: Path) -> str | None:
    """A run goes on from all of these, or the model alone was saved."""
    parts = {"an optimizer": OPTIMIZERS, "a scheduler": SCHEDULERS, "random states": RANDOM_STATES}
    missing = [what for what, names in parts.items() if not _has(folder, names)]
    return f"it has no state of {' and '.join(missing)}" if 0 < len(missing) < len(parts) else None


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return any(any(folder.glob(name)) for name in names)


def _damaged_archive(folder: Path) -> str | None:
    """torch.save writes zip archives, which end in their directory; a distributed checkpoint ends in `.metadata`."""
    for path in sorted([*folder.glob("*.pt*"), *folder.glob("*.bin")]):
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"{path.name} is truncated"
    for inner in sorted([*folder.glob("optimizer_[0-9]*"), *folder.glob("pytorch_model_fsdp_[0-9]*")]):
        metadata = inner / ".metadata"
        if inner.is_dir() and not (metadata.is_file() and metadata.stat().st_size):
            return f"{inner.name} has no .metadata, which is written last"
    return None

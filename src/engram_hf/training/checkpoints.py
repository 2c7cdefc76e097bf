"""Which checkpoint of a run can be resumed: Trainer writes them in place, and a killed run leaves half of one."""

import json
import re
import zipfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling.checkpoint_loading import find_checkpoint, read_headers
from ..modeling.checkpoint_saving import TRAINER_STATE
from ..modeling.disk_safetensors import read_header


CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end; None where there is none.

    Trainer writes `trainer_state.json` last, so it is the marker; saving a whole model into a checkpoint's folder
    removes it first (saving an adapter does not: begin another run of those in another folder). What must be there
    beside it is looked at too, so that a copy of a run that lacks files is seen.

    Example:
        >>> last = last_complete_checkpoint(args.output_dir)
        >>> model = AutoModelForCausalLM.from_pretrained(last or folder)  # its tables stay on their tier, in its files
        >>> trained = trainer.train(resume_from_checkpoint=last)
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (match := CHECKPOINT.fullmatch(folder.name)) is not None:
            found.append((int(match[1]), folder))
    return next((str(folder) for step, folder in sorted(found, reverse=True) if is_complete(folder, step)), None)


def is_complete(folder: Path, step: int) -> bool:
    """Whether a checkpoint has its marker, which is of this step, and every file is whole."""
    try:
        state = json.loads((folder / TRAINER_STATE).read_text())
        if state["global_step"] != step:
            return False
        checkpoint = find_checkpoint(str(folder), {"local_files_only": True})
        if checkpoint is not None:
            read_headers(checkpoint)
        for path in folder.glob("adapter_model*.safetensors"):
            read_header(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # Either what a run goes on from is there, or the model alone was saved.
    parts = [
        folder / "optimizer.pt",
        folder / "scheduler.pt",
        next(iter(folder.glob("rng_state*.pth")), folder / "rng"),
    ]
    if len({path.exists() for path in parts}) > 1:
        return False
    # torch.save writes zip archives, whose directory comes last.
    return all(zipfile.is_zipfile(path) for path in folder.glob("*.pt*"))

"""Sentences for wrong names, before anything is loaded or written."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError


SECONDS_TO_ASK_THE_HUB = 5.0
# What a run writes into its folder.
WRITTEN = ("config.json", "trainer_state.json", "model", "work", "adapter_config.json")


def find_model(name: str) -> None:
    """Raise unless a name is a folder with a model, or a repository.

    Raises:
        ValueError: it is neither, or the Hub does not answer.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"{name} is a folder without config.json, so it holds no model.")
        return
    try:
        # From the cache, or the Hub says that it is there.
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=SECONDS_TO_ASK_THE_HUB)
    except (HTTPError, HFValidationError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no folder, and no repository of the Hub that can be reached: {reason}") from error


def refuse_used(output: Path, how_to_go_on: str, but_for: Sequence[str] = ()) -> None:
    """Raise where training would write over an earlier run or a model.

    Args:
        output: folder that is to be written.
        how_to_go_on: what the user can do about it.
        but_for: names that may be there, "checkpoint" for all checkpoints.

    Raises:
        ValueError: names what is there.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder.")
    checkpoints = [path for path in output.glob("checkpoint-*") if "checkpoint" not in but_for]
    newest = sorted(checkpoints, key=lambda path: path.stat().st_mtime)[-1:]
    there = [path.name for path in newest]
    there += [name for name in WRITTEN if name not in but_for and (output / name).exists()]
    if there:
        raise ValueError(f"{output} holds {there[0]}; {how_to_go_on}.")

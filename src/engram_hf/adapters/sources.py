"""Whether files can be loaded from a name at all, said in one sentence before anything else is tried."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id


def refuse_missing(where: str | Path, file: str, **hub: Any) -> None:
    """
    Args:
        where: folder or repository.
        file: that one needs of it.
        hub: cache_dir, revision and local_files_only, as of `from_pretrained`.

    Raises:
        FileNotFoundError: there is no such folder, and no repository could have this name. Offline, the cache has none.
    """
    if Path(where).exists():
        return
    try:
        validate_repo_id(str(where))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no file or folder {where}, and no repository can have this name. Name a folder that is there, "
            "or a repository as user/name."
        ) from error
    is_offline = constants.HF_HUB_OFFLINE or bool(hub.get("local_files_only"))
    where_cached = {name: hub[name] for name in ("cache_dir", "revision") if hub.get(name) is not None}
    if is_offline and not isinstance(try_to_load_from_cache(str(where), file, **where_cached), str):
        raise FileNotFoundError(
            f"There is no folder {where}, and no repository {where} with {file} in the cache of the Hub. Nothing is "
            "downloaded offline: name a folder that is there, or go online."
        )

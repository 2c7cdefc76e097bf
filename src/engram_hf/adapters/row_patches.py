"""Row patches: adapters made of changed rows, for every model with tables.

The file and the overlay are in modeling/table_patches.py, so that a checkpoint's own code runs with a patch. Here are
the functions that a stock model with an added memory has no methods for. They behave as the adapters of PEFT.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.utils import cached_file

from ..modeling.checkpoint_loading import HUB_ARGUMENTS
from ..modeling.memory_patches import check_patch
from ..modeling.table_patches import (
    PATCH_FILE,
    REPLACE,
    PatchedRows,
    RowPatch,
    base_digest,
    read_patch,
    write_patch,
)
from .sources import refuse_missing


def with_tables(model: nn.Module) -> Any:
    """The model itself, inside of PEFT's and of what runs it in several processes.

    Raises:
        ValueError: it has no tables.
    """
    whole: Any = extract_model_from_parallel(cast(Any, model), keep_torch_compile=False)
    whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    if not hasattr(whole, "add_patch") or not whole.named_tables():
        raise ValueError(
            f"{type(whole).__name__} has no tables, so it has no rows to patch. It needs an EngramMoE with a memory, a "
            "model after add_engram, or one that load_with_tables has loaded."
        )
    return whole


def make_patch(
    model: nn.Module,
    name: str,
    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    mode: str = REPLACE,
    provenance: dict[str, Any] | None = None,
) -> RowPatch:
    """A patch for the tables of a model, out of rows. It is not added to the model.

    Args:
        model: with tables.
        name: of the patch.
        rows: name of a table inside the base model ("layers.1.engram.table") to row ids of the table, (n,) int64
            ascending and distinct, and rows, (n, head_dim) float32 or bfloat16. Rows that require gradients get them
            from forwards in which the patch is active.
        mode: "replace", or "add" for differences.
        provenance: what made the patch.

    Raises:
        ValueError: there is no such table, or the rows do not fit it.

    Example:
        >>> table = next(iter(model.named_tables()))
        >>> patch = make_patch(model, "alice", {table: (torch.tensor([3, 5, 8]), torch.ones(3, 16))})
        >>> patch.num_rows
        3
    """
    whole = with_tables(model)
    tables = whole.named_tables()
    if unknown := [each for each in rows if each not in tables]:
        raise ValueError(f"The model has no table {unknown[0]!r}; it has {', '.join(tables)}.")
    hashes = [whole.hash_of_table(each) for each in rows]
    fingerprints = [{} if each is None else each.fingerprint() for each in hashes]
    if any(each != fingerprints[0] for each in fingerprints):
        raise ValueError("A patch belongs to one memory, and these tables belong to several. Make one patch for each.")
    found = {}
    for each, (row_ids, given) in rows.items():
        on_cpu = row_ids.detach().cpu() if isinstance(row_ids, torch.Tensor) else row_ids
        found[each] = PatchedRows(on_cpu, given, tables[each].num_rows)
    patch = RowPatch(name, found, mode, fingerprints[0] if fingerprints else {}, provenance or {})
    check_patch(patch, tables)
    for each, patched in found.items():
        patch.tables[each] = patched._replace(base_digest=base_digest(tables[each], patched.row_ids))
    return patch


def save_patch(patch: RowPatch, file: str | Path) -> Path:
    """Write a patch to a file. A name that ends in ".safetensors" is the file; any other is a folder for it.

    Returns:
        the file.

    Raises:
        TypeError: it is no patch.
        ValueError: the patch is not sound; the name is that of a file without this ending.
        OSError: no space or no permission; what was there stays.

    Example:
        >>> save_patch(patch, "my-patch").name
        'patch.safetensors'
    """
    if not isinstance(patch, RowPatch):
        raise TypeError(
            "save_patch takes a patch, such as model.trained_patch() after a run with train_as_patch, and then the "
            f"file; got {type(patch).__name__}."
        )
    path = Path(file)
    if path.suffix != ".safetensors":
        if path.is_file():
            raise ValueError(
                f"{path} is a file, and a patch is written to a folder or to a file *.safetensors. Name one of these."
            )
        path = path / PATCH_FILE
    write_patch(patch, path)
    return path


def load_patch(path_or_repo: str | Path, **hub: Any) -> RowPatch:
    """Read a patch.

    Args:
        path_or_repo: a file, a folder that holds `patch.safetensors`, or a repository that does.
        hub: revision, token, cache_dir, local_files_only and their like, for a repository.

    Raises:
        FileNotFoundError, OSError: there is none.
        ValueError: it is damaged, or something else than a patch.

    Example:
        >>> file = save_patch(patch, "my-patch")
        >>> load_patch("my-patch").name
        'alice'
    """
    if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
        raise ValueError(f"load_patch takes {', '.join(HUB_ARGUMENTS)} of a repository, but not {unknown[0]}.")
    where = Path(path_or_repo)
    if where.exists() or where.suffix == ".safetensors":
        return read_patch(where)
    refuse_missing(path_or_repo, PATCH_FILE, **hub)
    return read_patch(cast(str, cached_file(str(path_or_repo), PATCH_FILE, **hub)))


def add_patch(model: nn.Module, patch: RowPatch | str | Path, scale: float = 1.0) -> None:
    """Lay a patch over the tables of a model, on whatever tier they are. It is active at once, behind those that are.

    At once is also for requests that are being answered by other threads. A server that adds patches of users therefore
    answers every request inside of `use_patches`, also those of users without a patch: `use_patches(model, [None])`.

    Args:
        model: with tables.
        patch: the patch, or where `load_patch` finds it.
        scale: what the difference to the table's own rows is multiplied by.

    Raises:
        ValueError: it is one of another hash, table or width; the model has one of this name; the type of the table
            cannot hold the patched rows.

    Example:
        >>> add_patch(model, patch)
        >>> active_patches(model)
        ['alice']
    """
    with_tables(model).add_patch(load_patch(patch) if isinstance(patch, str | Path) else patch, scale)


def remove_patch(model: nn.Module, name: str) -> None:
    """Forget a patch. Without patches the model computes what it did before, bit for bit.

    Contexts of `use_patches` that are open go on with it to their end.

    Raises:
        ValueError: the model has no patch of this name.

    Example:
        >>> add_patch(model, patch)
        >>> remove_patch(model, "alice")
    """
    with_tables(model).remove_patch(name)


def set_patches(model: nn.Module, names: Sequence[str]) -> None:
    """Choose the patches that lie over the tables from now on, in this order; an empty list is the plain table.

    Raises:
        ValueError: the model has no patch of a name, or a name is there twice.

    Example:
        >>> add_patch(model, patch)
        >>> set_patches(model, [])
        >>> set_patches(model, ["alice"])
    """
    with_tables(model).set_patches(names)


def active_patches(model: nn.Module) -> list[str]:
    """Names of the patches that lie over the tables of a model, in their order.

    Example:
        >>> active_patches(model)
        []
    """
    return with_tables(model).active_patches()


def disable_patches(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which, in this thread, the tables are plain for any batch. Other threads do not notice.

    Like that of `use_patches`, it is for forwards that do not train: what a backward computes again would not know it.
    Train the plain table after `set_patches(model, [])`.

    Example:
        >>> add_patch(model, patch)
        >>> with disable_patches(model):
        ...     active_patches(model)
        []
    """
    return with_tables(model).disable_patches()


def use_patches(model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> AbstractContextManager[None]:
    """A context in which, in this thread, each sequence of a batch sees its own patches and no others.

    A new thread begins outside of it, and would answer with the patches that are active. Open the context inside of
    the thread, in the function that it runs:

        def answer():
            with use_patches(model, ["alice"]):
                model.generate(**prompt, streamer=streamer)

        Thread(target=answer).start()

    `asyncio.to_thread` and `contextvars.copy_context().run` take the context along. A generator must not `yield` inside
    of it: who takes what it yields would be inside as well.

    Args:
        model: with tables.
        names: one per sequence of the batch, neither more nor fewer: a name, a list of names in their order, or None
            for the plain table. `generate` counts beams and several returned sequences for you.

    Raises:
        ValueError: the model has no patch of a name. A forward raises it where the batch has another number of
            sequences, or where it trains.

    Example:
        >>> add_patch(model, patch)
        >>> prompts = tokenizer(["a text", "a test"], return_tensors="pt")
        >>> with use_patches(model, ["alice", None]):
        ...     generated = model.generate(**prompts, max_new_tokens=2)
    """
    return with_tables(model).use_patches(names)

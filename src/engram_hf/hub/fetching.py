"""A part of a table, to look at: only the files that hold it are downloaded."""

from collections.abc import Collection
from pathlib import Path

import torch

from ..modeling.checkpoint_loading import BLOCK_KEY, HUB_ARGUMENTS, find_checkpoint
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.disk_files import TableFile
from ..modeling.table_blocks import layer_of_table


def fetch_blocks(
    path_or_repo: str | Path,
    *,
    layers: Collection[int] | None = None,
    blocks: Collection[int] | None = None,
    **hub_arguments,
) -> dict[str, torch.Tensor]:
    """Blocks of the tables of a checkpoint, without the rest of it.

    Args:
        path_or_repo: folder, or repository of the Hub. If its tables are in a repository of their own, the config says
            where.
        layers: ids of memory layers; None for all.
        blocks: numbers of blocks inside each table; None for all.
        hub_arguments: as for `from_pretrained`: revision, token, cache_dir, local_files_only, force_download,
            subfolder.

    Returns:
        tensor name to (rows, row width), in the type of the file. It is a view of the file: only pages that you look at
        are read.

    Raises:
        FileNotFoundError: there are no safetensors files.
        TypeError: an unknown argument.
        ValueError: there is no such layer or block, or a downloaded file is not what the index promises.

    Example:
        >>> blocks = fetch_blocks("output/tiny", layers=[1], blocks=[0])
        >>> blocks["model.layers.1.engram.table.blocks.0"].shape
        torch.Size([53826, 16])
    """
    unknown = sorted(set(hub_arguments) - set(HUB_ARGUMENTS))
    if unknown:
        raise TypeError(f"fetch_blocks takes layers, blocks, {', '.join(HUB_ARGUMENTS)}, but not {unknown[0]}.")
    there: set[tuple[int, int]] = set()

    def is_wanted(name: str) -> bool:
        match = BLOCK_KEY.match(name)
        if match is None:
            return False
        layer, number = layer_of_table(match[1]), int(match[2])
        there.add((layer, number))
        return (layers is None or layer in layers) and (blocks is None or number in blocks)

    checkpoint = find_checkpoint(path_or_repo, hub_arguments, is_wanted)
    if not there:
        # This also says what is wrong with a repository that cannot be read.
        config = EngramMoEConfig.from_pretrained(path_or_repo, **hub_arguments)
        if config.engram_tables_repo is not None:
            hub = {**hub_arguments, "revision": config.engram_tables_revision, "subfolder": None}
            checkpoint = find_checkpoint(config.engram_tables_repo, hub, is_wanted)
    if checkpoint is None or not there:
        raise FileNotFoundError(f"{path_or_repo} holds no tables in safetensors files.")
    known_layers, known_blocks = (sorted(set(numbers)) for numbers in zip(*there, strict=True))
    for what, wanted, known in (("layer", layers, known_layers), ("block", blocks, known_blocks)):
        if missing := sorted(set(wanted or ()) - {*known}):
            raise ValueError(
                f"{path_or_repo} has memory layers {known_layers} with blocks 0 to {known_blocks[-1]}, but no {what} "
                f"{missing[0]}."
            )
    files = {path: TableFile(path) for path in set(checkpoint.file_of.values())}
    return {name: files[path].tensor(name) for name, path in sorted(checkpoint.file_of.items())}

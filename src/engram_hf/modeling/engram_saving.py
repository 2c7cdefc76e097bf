"""Saving a model whose tables live on tiers: the part of `EngramMoEPreTrainedModel` that does it.

transformers saves the backbone. The blocks of a table lie in files of their own, written one block at a time, or linked
where a file of unchanged blocks exists.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int, hf_api

from .checkpoint_loading import BLOCK_KEY
from .checkpoint_saving import link_file, publish, refuse_model_in, remove_code, save_code, set_auto_map, staging
from .configuration_engram_moe import TABLE_DTYPES
from .disk_files import BlockSource, MappedFile
from .disk_safetensors import TensorContent, write_file
from .table import DISK, EngramTable
from .table_formats import QUANTIZED_FORMATS


logger = logging.get_logger(__name__)
# Tables below this size are written too fast to need a progress bar.
PROGRESS_BYTES = 2**26
# What Trainer saves while it trains, and the file that it writes last there.
TRAINING_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
TRAINER_STATE = "trainer_state.json"
# A system may refuse to map a file for the safetensors library that is larger than its RAM.
LARGEST_FILE = 5 * 10**9


def split_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of the backbone and memory layers, and the blocks of tables."""
    blocks = {name: tensor for name, tensor in state.items() if BLOCK_KEY.match(name) is not None}
    return {name: tensor for name, tensor in state.items() if name not in blocks}, blocks


def write_tables(
    stage: Path,
    blocks: Mapping[str, torch.Tensor],
    tables: Mapping[str, EngramTable],
    max_shard_size: str | int,
    with_changes: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the blocks of tables into files of their own.

    Args:
        stage: folder to write in.
        blocks: tensor name to block; in memory, or as a view of its file.
        tables: by name inside the base model.
        max_shard_size: as in `save_pretrained`; a file is larger only where a single block is.
        with_changes: of a table in training, link the files that it came from and write the rows that have changed.

    Returns:
        tensor name to file name, and file name to SHA-256.
    """
    limit = min(convert_file_size_to_int(max_shard_size), LARGEST_FILE)
    weight_map, digests = {}, {}
    total = sum(block.nbytes for block in blocks.values())
    is_short = total < PROGRESS_BYTES
    with logging.tqdm(total=total, desc="Writing tables", unit="B", unit_scale=True, disable=is_short) as progress:
        for table_name, table in tables.items():
            own = {
                name: int(match[2])
                for name in blocks
                if (match := BLOCK_KEY.match(name)) is not None and match[1] == table_name
            }
            standing = {name: _source_on_disk(number, blocks[name], table) for name, number in own.items()}
            by_rows = with_changes and table.row_gradients is not None
            if by_rows:
                standing = {name: table.row_changes.base(number, table) for name, number in own.items()}
            groups = list(_group(own, blocks, standing, limit))
            changed: list[int] = []
            layer = int(table_name.split(".")[1])
            for number, names in enumerate(groups, 1):
                filename = f"tables-layer-{layer:02d}-{number:05d}-of-{len(groups):05d}.safetensors"
                source = _whole_file({name: standing[name] for name in names})
                if source is not None:
                    changed += [own[name] for name in names] if by_rows else []
                    digests[filename] = link_file(source, stage / filename)
                    progress.update(source.stat().st_size)
                else:
                    contents = {name: _content(own[name], blocks[name], table) for name in names}
                    digests[filename] = write_file(stage / filename, contents, progress.update)
                weight_map.update(dict.fromkeys(names, filename))
            table.row_changes.kept = changed
            if changed and (rows := table.row_changes.contents(min(own).rpartition(".blocks.")[0], table, changed)):
                filename = f"rows-layer-{layer:02d}.safetensors"
                digests[filename] = write_file(stage / filename, rows)
                weight_map.update(dict.fromkeys(rows, filename))
    return weight_map, digests


def _source_on_disk(number: int, block: torch.Tensor, table: EngramTable) -> BlockSource | None:
    """The file of a block, where this is the table's own block, on disk and as its file has it."""
    source = table.sources[number]
    is_own = table.tiers[number] == DISK and source.file.can_be_linked and source.is_under(block)
    return source if is_own and source.holds(block) else None


def _group(
    own: dict[str, int], blocks: Mapping[str, torch.Tensor], standing: Mapping[str, BlockSource | None], limit: int
) -> Iterator[list[str]]:
    """Blocks of one file: those of a file that can be linked as it is, else as many as `limit` allows."""
    group: list[str] = []
    size: int = 0
    file: MappedFile | None = None
    for name, _ in sorted(own.items(), key=lambda item: item[1]):
        source = standing[name]
        here = None if source is None else source.file
        if group and (size + blocks[name].nbytes > limit or here is not file):
            yield group
            group, size = [], 0
        group.append(name)
        size, file = size + blocks[name].nbytes, here
    if group:
        yield group


def _whole_file(standing: Mapping[str, BlockSource | None]) -> Path | None:
    """The file that holds exactly these blocks, under these names."""
    sources = [source for source in standing.values() if source is not None]
    if len(sources) < len(standing) or any(source.file is not sources[0].file for source in sources):
        return None
    file = sources[0].file
    file.check_unchanged()
    # Where the file's name stands for another file by now, the open one is copied.
    return file.path.resolve() if set(file.places) == set(standing) and file.is_at_its_path() else None


def _content(number: int, block: torch.Tensor, table: EngramTable) -> TensorContent:
    source = table.sources[number]
    if source is None or not source.is_under(block):
        return TensorContent.of(block)
    source.file.check_unchanged()
    return TensorContent.of(block) if source.was_written() else source.file.content(source.name)


class SavesTables:
    """Part of `EngramMoEPreTrainedModel`."""

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        *args,
        with_code: bool = True,
        tables_to=None,
        **kwargs,
    ):
        """As `PreTrainedModel.save_pretrained`, with blocks in files of their own; also writes the modeling code and an
        `auto_map` of all classes. A save that fails or is killed leaves the checkpoint that was there.

        In a folder named checkpoint-N, as Trainer's are, a table in training is saved by the file it came from, which
        is linked, and its changed rows; loading puts them together, `merge_changed_rows` for good.

        Args:
            save_directory: folder to write.
            is_main_process: whether this process writes.
            state_dict: tensors to write instead of the model's own.
            push_to_hub: also upload the folder; see transformers for the arguments that go with it.
            max_shard_size: most bytes of a file; a block that is larger has a file of its own.
            variant: written into the names of the backbone's files and of the index.
            token: of the Hub.
            with_code: False leaves code and `auto_map` out; the checkpoint then loads only with this package.
            tables_to: folder for the tables, where they are not to lie beside the backbone; `tables_from` reads them.

        Raises:
            OSError: no space left, for one; nothing has changed then.
        """
        backbone, blocks = split_state(self.state_dict() if state_dict is None else state_dict)
        shared = {"max_shard_size": max_shard_size, "variant": variant, "token": token, **kwargs}
        is_plain = not kwargs.get("distributed_checkpoint") and not getattr(self, "_hf_peft_config_loaded", False)
        if not is_main_process or not is_plain:
            return super().save_pretrained(
                save_directory, is_main_process, backbone if is_plain else state_dict, push_to_hub, **shared
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file; save_pretrained needs a folder.")
        tables = self.named_tables()
        self._check_blocks(tables, blocks)
        apart = tables_to is not None and Path(tables_to).resolve() != folder.resolve()
        if apart:
            refuse_model_in(tables_to)
        is_training = TRAINING_CHECKPOINT.fullmatch(folder.name) is not None
        if is_training:
            # Not whole until Trainer has written it again.
            (folder / TRAINER_STATE).unlink(missing_ok=True)
        with_changes = is_training and state_dict is None and not apart
        set_auto_map(self.config, with_code)
        # They are saved beside the backbone, or where `tables_from` will be told.
        self.config.engram_tables_repo = self.config.engram_tables_revision = None
        repository = self._open_repository_to_push(folder, token, kwargs) if push_to_hub else None
        saved = {}
        if apart:
            with staging(tables_to) as stage:
                written = write_tables(stage, blocks, tables, max_shard_size)
                saved = publish(stage, Path(tables_to), *written, self.config)
        with staging(folder) as stage:
            if with_code:
                save_code(stage)
            super().save_pretrained(stage, True, backbone, False, **shared)
            if not with_code:
                remove_code(stage)
            written = write_tables(stage, {} if apart else blocks, tables, max_shard_size, with_changes)
            saved |= publish(stage, folder, *written, self.config, variant)
        if not with_code:
            remove_code(folder)
        if state_dict is None:
            for name, table in tables.items():
                full_names = [f"{self._tables_prefix()}{name}.blocks.{i}" for i in range(len(table.block_shapes))]
                table.follow_save({i: (saved[full], full) for i, full in enumerate(full_names)})
        if repository is not None:
            self._upload_modified_files(folder, token=token, **repository)

    def _open_repository_to_push(self, folder: Path, token, kwargs: dict) -> dict:
        """What transformers' upload takes: the repository, made where there is none, and the files as they are now."""
        found = {
            "commit_message": kwargs.pop("commit_message", None),
            "create_pr": kwargs.pop("create_pr", False),
            "revision": kwargs.pop("revision", None),
            "files_timestamps": self._get_files_timestamps(folder) if folder.is_dir() else {},
        }
        repo_id = kwargs.pop("repo_id", folder.name)
        private = kwargs.pop("private", None)
        found["repo_id"] = hf_api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return found

    def _check_blocks(self, tables: Mapping[str, EngramTable], blocks: Mapping[str, torch.Tensor]) -> None:
        """Whether all blocks are there, of one type, which the config then names."""
        prefix = self._tables_prefix()
        wanted = [
            f"{prefix}{name}.blocks.{i}" for name, table in tables.items() for i in range(len(table.block_shapes))
        ]
        missing = [name for name in wanted if name not in blocks]
        if missing:
            raise ValueError(
                f"The state_dict lacks {len(missing)} blocks of the tables, such as {missing[0]}; without them what "
                "is saved could not be loaded. Give all of model.state_dict()."
            )
        dtypes = {str(blocks[name].dtype).removeprefix("torch.") for name in wanted}
        if len(dtypes) > 1:
            raise ValueError(f"The blocks of the tables must be of one type, got {sorted(dtypes)}.")
        plain = [name for name in TABLE_DTYPES if name not in QUANTIZED_FORMATS]
        for table in tables.values():
            if table.row_format is None and not dtypes <= {*plain}:
                raise ValueError(
                    f"Tables are saved in {', '.join(plain)}, got {next(iter(dtypes))}, whose numbers have no scales. "
                    "Cast the tables back, save the model, and make them smaller with "
                    "engram_hf.quantize_tables(source, target)."
                )
            self.config.engram_table_dtype = table.row_format or next(iter(dtypes))

"""Checkpoints on their way in: which files a checkpoint has, what is refused, and where the tensors of tables lie.

Everything that files say is checked here, before anything is allocated or loaded. transformers loads the backbone. The
files of tables are only opened.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from transformers import GenerationConfig
from transformers.utils import cached_file, logging
from transformers.utils.hub import cached_files, extract_commit_hash

from .configuration_checks import UNEXPECTED, shorten
from .disk_files import BlockSource, TableFile
from .disk_safetensors import TensorPlace, file_digest, read_header, read_index, read_json
from .table import EngramTable
from .table_blocks import BLOCK_KEY, ROW_IDS, block_name, is_of_table, parse_changed_name
from .table_changes import ChangedRows
from .table_formats import QUANTIZED_FORMATS


HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# Files below this size are read too fast to need a progress bar.
PROGRESS_BYTES = 2**26
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
MEMORY_NAMES = (".engram.", "token_map")
# Fields of a config by which a model computes, and which neither shapes of tensors nor the fingerprint tell. Saving
# writes them into the index too, so that verifying notices a config.json that was changed.
UNSEEN_FIELDS = (
    "hc_eps",
    "hc_sinkhorn_iters",
    "hidden_act",
    "max_position_embeddings",
    "n_group",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "rope_interleave",
    "rope_parameters",
    "routed_scaling_factor",
    "tie_word_embeddings",
    "topk_group",
    "v_head_dim",
)
LAYER_KEY = re.compile(r"^layers\.(\d+)\.")
OF_ONE_CHECKPOINT = "Load weights and config of one checkpoint; download or copy it again."
# Where the token map was in checkpoints before version 0.2, and where it is now.
OLD_TOKEN_MAP, TOKEN_MAP = "token_map", "ngram_hash.token_map"


class MisshapenError(ValueError, RuntimeError):
    """A tensor has another shape than the model's. transformers raises RuntimeError for it, which callers may catch."""


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model on this machine.

    where: folder or repository, as the user named it.
    file_of: tensor name to file, for the tensors that are wanted.
    names: of all tensors, also of those that are not wanted.
    metadata: of the index; empty where there is none.
    commit: of the repository; None for a folder.
    is_here: whether the files are on this machine; otherwise `file_of` gives their names in a repository.
    """

    where: str
    file_of: Mapping[str, Path]
    names: frozenset[str]
    metadata: Mapping = field(default_factory=dict)
    commit: str | None = None
    is_here: bool = True

    def blocks(self) -> dict[tuple[str, int], str]:
        """(name of the table as its tensors have it, number of the block) to tensor name."""
        matches = ((name, BLOCK_KEY.match(name)) for name in self.file_of)
        return {(match[1], int(match[2])): name for name, match in matches if match is not None}


def find_checkpoint(
    name, arguments: Mapping, is_wanted: Callable[[str], bool] = lambda name: True
) -> Checkpoint | None:
    """The safetensors files of a folder or a repository. What is not on this machine is downloaded.

    Args:
        name: folder or repository.
        arguments: those of `from_pretrained`; those of the Hub and `variant` are used.
        is_wanted: whether a tensor is wanted. Files without such a tensor are neither downloaded nor opened.

    Returns:
        None where there are none: the folder holds an adapter, or weights in another format.

    Raises:
        FileNotFoundError: the index names a file that is not there.
        ValueError: index or file are damaged.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    where, variant = str(name), arguments.get("variant")
    single = find_file(name, with_variant(SINGLE_FILE, variant), hub)
    if single is not None:
        names = frozenset(read_header(single))
        wanted = dict.fromkeys(filter(is_wanted, sorted(names)), single)
        return Checkpoint(where, wanted, names, commit=commit_of(name, single))
    index = find_file(name, with_variant(INDEX_FILE, variant), hub)
    if index is None:
        return None
    content = read_index(index)
    names, metadata = frozenset(content["weight_map"]), content["metadata"]
    weight_map = {tensor: file for tensor, file in content["weight_map"].items() if is_wanted(tensor)}
    commit = commit_of(name, index)
    if Path(where).is_dir():
        # Not looked for on the Hub: the message for a missing file is then a better one.
        path_of = {filename: index.parent / filename for filename in weight_map.values()}
    else:
        # All of one commit, also where the branch moves on meanwhile.
        at_commit = hub if commit is None else {**hub, "revision": commit}
        path_of = download_files(name, {*weight_map.values()}, metadata.get("sha256", {}), at_commit)
    file_of = {tensor: path_of[file] for tensor, file in weight_map.items()}
    return Checkpoint(where, file_of, names, metadata, commit)


def read_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 by file name, as the indexes in a folder promise them; empty where they promise none."""
    digests: dict[str, str] = {}
    for path in Path(folder).glob("model.safetensors.index*.json"):
        digests |= read_index(path)["metadata"].get("sha256", {})
    return digests


def with_variant(filename: str, variant: str | None) -> str:
    """transformers' name of a weight file: the variant stands before the last suffix."""
    if variant is None:
        return filename
    stem, _, suffix = filename.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def read_headers(checkpoint: Checkpoint) -> dict[str, TensorPlace]:
    """Where each wanted tensor lies in its file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or it and the index do not name the same tensors.
    """
    headers = {path: read_header(path) for path in sorted(set(checkpoint.file_of.values()))}
    lacking = [(name, path) for name, path in checkpoint.file_of.items() if name not in headers[path]]
    if lacking:
        raise ValueError(
            f"The index of {checkpoint.where} promises {lacking[0][0]} in {lacking[0][1].name}, which does not hold it "
            f"({len(lacking)} such tensors). Index and files are of two checkpoints; download it again."
        )
    unnamed = [(name, path) for path, header in headers.items() for name in header if name not in checkpoint.names]
    if unnamed:
        raise ValueError(
            f"{unnamed[0][1]} holds {unnamed[0][0]}, which its index does not name ({len(unnamed)} such tensors). "
            "Index and files are of two checkpoints; download or copy it again."
        )
    twice = [(n, path) for path, header in headers.items() for n in header if checkpoint.file_of.get(n, path) != path]
    if twice:
        name, path = twice[0]
        raise ValueError(
            f"{name} is in {path} and in {checkpoint.file_of[name].name}, and only one of them can be right. Download "
            "or copy the checkpoint again."
        )
    return {name: headers[path][name] for name, path in checkpoint.file_of.items()}


def without_prefix(places: Mapping[str, TensorPlace], base_prefix: str, where: str) -> dict[str, TensorPlace]:
    """Tensors by the names that they have inside the base model; those of a head keep theirs.

    Raises:
        ValueError: a tensor is there twice, with the prefix and without it.
    """
    found: dict[str, TensorPlace] = {}
    for name, place in places.items():
        short = name.removeprefix(f"{base_prefix}.")
        short = TOKEN_MAP if short == OLD_TOKEN_MAP else short
        if short in found:
            raise ValueError(f"{where} holds {short} twice, with and without {base_prefix}. before it. Copy it again.")
        found[short] = place
    return found


def check_sizes(
    config, places: Mapping[str, TensorPlace], where: str, base_prefix: str, is_any_shape: bool = False
) -> None:
    """Compare sizes that a config declares with those of the tensors, before anything of these sizes is made.

    Only sizes of which a model would have too many parts, or take long to build. `check_model` compares all shapes.

    Args:
        config: an `EngramMoEConfig`.
        places: of the tensors beside the tables.
        where: folder or repository, for the message.
        base_prefix: of the base model in tensor names.
        is_any_shape: as for `check_model`.

    Raises:
        MisshapenError: names the field and the tensor.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    found = without_prefix(places, base_prefix, where)
    layers = 1 + max((int(match[1]) for name in found if (match := LAYER_KEY.match(name)) is not None), default=-1)
    if layers != config.num_hidden_layers:
        raise MisshapenError(
            f"config.json of {where} says num_hidden_layers = {shorten(config.num_hidden_layers)}, and its tensors "
            f"are of {layers} layers. {OF_ONE_CHECKPOINT}"
        )
    embeddings = [("embed_tokens.weight", 0, "vocab_size"), ("embed_tokens.weight", 1, "hidden_size")]
    sizes = [] if is_any_shape else embeddings
    sizes += [(f"layers.{i}.engram.value_proj.weight", 1, "engram_width") for i in config.engram_layer_ids or []]
    for name, axis, size in sizes:
        if name not in found:
            refuse_missing([name], where)
        shape, declared = found[name].shape, getattr(config, size)
        if len(shape) != 2 or shape[axis] != declared:
            fields = {"engram_width": "(engram_max_ngram_size - 1) * engram_n_heads * engram_head_dim"}
            raise MisshapenError(
                f"config.json of {where} says {fields.get(size, size)} = {shorten(declared)}, and {name} is {shape}. "
                f"{OF_ONE_CHECKPOINT}"
            )


def check_model(
    model,
    places: Mapping[str, TensorPlace],
    where: str,
    is_same_class: bool,
    may_lack: bool = False,
    is_any_shape: bool = False,
) -> None:
    """See that a checkpoint holds each tensor of a model in its shape and of a fitting type. Tables are left aside.

    transformers would draw what is missing at random and say so in a notice, and read integers as numbers of a weight.

    Args:
        model: built from the config on meta, its tables without blocks.
        places: of the tensors.
        where: folder or repository, for the message.
        is_same_class: whether the checkpoint was saved from this class, so that the head must be there too.
        may_lack: whether tensors may be missing, because the caller asks for the list of them.
        is_any_shape: whether tensors of another shape are to be drawn anew (`ignore_mismatched_sizes`). Those of a
            memory never are.

    Raises:
        ValueError: names the tensors that are missing, misshapen or of another type, or that belong to a memory that
            the config does not have.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        # A quantized backbone has tensors of other names and shapes.
        return
    prefix = f"{model.base_model_prefix}."
    found = without_prefix(places, model.base_model_prefix, where)
    state = model.state_dict()
    full_names = {name.removeprefix(prefix): name for name in state}
    wanted = {short: state[name] for short, name in full_names.items()}
    tied = {name.removeprefix(prefix) for name in model.all_tied_weights_keys}
    needed = set(wanted if is_same_class else model.base_model.state_dict())
    missing = needed - set(found) - tied
    if missing and not may_lack:
        refuse_missing([full_names[name] for name in missing], where)
    is_of_memory = {name: any(part in name for part in MEMORY_NAMES) for name in found}
    extra = [name for name in found if is_of_memory[name] and name not in wanted and not is_of_table(name)]
    if extra:
        raise ValueError(
            f"{where} holds tensors of a memory that its config has no place for: {', '.join(extra[:8])}. "
            f"{OF_ONE_CHECKPOINT}"
        )
    both = [name for name in found if name in wanted]
    wrong = [
        f"{full_names[name]} is {found[name].shape}, needs {tuple(wanted[name].shape)}"
        for name in both
        if found[name].shape != tuple(wanted[name].shape) and (is_of_memory[name] or not is_any_shape)
    ]
    if wrong:
        refuse_shapes(wrong, where)
    for name in both:
        dtype, needed_dtype = found[name].dtype, wanted[name].dtype
        is_float = dtype is not None and dtype.is_floating_point
        if dtype != needed_dtype and not (is_float and needed_dtype.is_floating_point):
            got = found[name].type_name if dtype is None else _type_name(dtype)
            raise ValueError(
                f"{full_names[name]} of {where} is {got}, and "
                f"must be {'of a floating type' if needed_dtype.is_floating_point else _type_name(needed_dtype)}. "
                "The checkpoint is damaged, or quantized by a tool that left no quantization_config; load the original."
            )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unseen_fields(config) -> dict:
    """Those of `UNSEEN_FIELDS` that a config has, as its JSON file has them."""
    return {name: value for name in UNSEEN_FIELDS if (value := getattr(config, name, None)) is not None}


def check_saved_config(config, checkpoint: Checkpoint) -> None:
    """See that a config is the one that was saved with the weights, in what nothing else tells.

    Raises:
        ValueError: names the first field that differs.
    """
    for name, saved in checkpoint.metadata.get("config", {}).items():
        if (here := getattr(config, name, None)) != saved:
            raise ValueError(
                f"config.json of {checkpoint.where} says {name} = {shorten(here)}, and the model was saved with "
                f"{shorten(saved)}, as its index has it. Copy config.json again; if it was changed on "
                "purpose, load the model and save it once with save_pretrained."
            )


def check_generation_config(path: Path | None) -> None:
    """See that transformers can read a generation_config.json, where there is one.

    Raises:
        ValueError: names the file.
    """
    if path is None or not path.exists():
        return
    content = read_json(path)
    try:
        GenerationConfig.from_dict(content)
    except UNEXPECTED as error:
        raise ValueError(f"{path} is damaged ({shorten(error)}). Download or copy it again.") from error


def match_blocks(
    tables: Mapping[str, EngramTable], checkpoint: Checkpoint, places: Mapping[str, TensorPlace], config
) -> dict[str, list[str]]:
    """The tensor of each block of each table; all of them are there, in their shape and type.

    Args:
        tables: by name inside the base model, without blocks yet.
        checkpoint, places: where tensors are.
        config: of the model.

    Raises:
        ValueError: names what is missing, misshapen, of another type, or too much.
    """
    where = checkpoint.where
    found: dict[tuple[str, int], str] = {}
    for (table, number), tensor in checkpoint.blocks().items():
        other = found.setdefault((name_inside(table, tables), number), tensor)
        if other != tensor:
            raise ValueError(f"{other} and {tensor} of {where} are one block. Download or copy it again.")
    wanted = {(name, block.number): block.shape for name, table in tables.items() for block in table.block_records}
    missing = [block_name(*key) for key in wanted if key not in found]
    if missing:
        refuse_missing(missing, where)
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise ValueError(
            f"{where} holds {len(extra)} blocks that the config has no place for, such as {found[extra[0]]}. Load it "
            "with the engram_* fields that it was saved with."
        )
    wrong = [
        f"{found[key]} is {places[found[key]].shape}, needs {shape}"
        for key, shape in wanted.items()
        if places[found[key]].shape != shape
    ]
    if wrong:
        refuse_shapes(wrong, where, config.engram_table_dtype)
    for key in wanted:
        check_block_type(found[key], places[found[key]].dtype, config.engram_table_dtype, where)
    return {name: [found[name, i] for i in range(len(table.block_records))] for name, table in tables.items()}


def check_block_type(name: str, dtype: torch.dtype | None, declared: str | None, where: str) -> None:
    """
    Raises:
        ValueError: a block is of another type than the config declares, or of none that a table can have.
    """
    got = str(dtype).removeprefix("torch.")
    expected = "uint8" if declared in QUANTIZED_FORMATS else declared
    if expected is None and dtype is not None and dtype.is_floating_point or got == expected:
        return
    raise ValueError(
        f"{name} of {where} is {got}, and must be {expected or 'of a floating type'} (engram_table_dtype is "
        f"{declared!r}). Config and files are of two checkpoints; load them from one."
    )


def refuse_missing(names: Iterable[str], where: str) -> NoReturn:
    """Raise for tensors that a checkpoint lacks."""
    names = sorted(names)
    is_memory = any(part in name for name in names for part in MEMORY_NAMES)
    raise ValueError(
        f"{where} lacks {len(names)} tensors of the {'memory' if is_memory else 'model'}: {', '.join(names[:8])}"
        f"{', ...' if len(names) > 8 else ''}. Download it again, or load it with its own "
        "config.json."
        + (
            " Where the tables lie in a folder or repository of their own, name it with tables_from=. To add a memory "
            "to a model without one, build the new model from its config and copy the weights over."
            if is_memory
            else ""
        )
    )


def refuse_shapes(descriptions: list[str], where: str, row_format: str | None = None) -> NoReturn:
    """Raise for tensors that have another shape than the model's.

    Raises:
        MisshapenError: always.
    """
    is_memory = any(part in description for description in descriptions for part in MEMORY_NAMES)
    quantized = ""
    if row_format in QUANTIZED_FORMATS:
        quantized = f" A row of {row_format} is its numbers and their scales; rows without scales mean nothing."
    raise MisshapenError(
        f"{where} holds a {'memory' if is_memory else 'model'} of another shape: {'; '.join(descriptions[:8])}."
        f"{quantized} "
        + (
            "Rows cannot be cut or padded; load the checkpoint with the engram_* fields and hc_mult that it was saved "
            "with."
            if is_memory
            else "Load the checkpoint with the config that it was saved with."
        )
    )


def refuse_incomplete(loading_info: dict, where: str, base_prefix: str, is_same_class: bool) -> None:
    """Raise where a checkpoint lacks a tensor, or has one of the memory in another shape.

    transformers would draw such tensors at random and say so in a notice. Only the head of another task may be new.

    Args:
        loading_info: as `from_pretrained(output_loading_info=True)` gives it.
        where: the folder or repository, for the message.
        base_prefix: what the names of the base model begin with, "" for the base model itself.
        is_same_class: whether the checkpoint was saved from this very class, so that it has all of it.

    Raises:
        ValueError: names the tensors.
    """
    missing = set(loading_info["missing_keys"])
    memory = [name for name in missing if any(part in name for part in MEMORY_NAMES)]
    if memory:
        refuse_missing(memory, where)
    backbone = sorted(name for name in missing if is_same_class or name.startswith(base_prefix))
    if backbone:
        raise ValueError(
            f"{where} lacks {len(backbone)} tensors of the model: {', '.join(backbone[:8])}"
            f"{', ...' if len(backbone) > 8 else ''}. Download it again, or load it with the config it was saved with."
        )
    # Blocks are opened later, and are not among these.
    unused = sorted(n for n in loading_info["unexpected_keys"] if any(part in n for part in MEMORY_NAMES))
    unused = [name for name in unused if not is_of_table(name)]
    if unused:
        raise ValueError(
            f"{where} holds tensors of a memory that this config has no place for: {', '.join(unused[:8])}. Load it "
            "with the config it was saved with."
        )
    wrong = [
        f"{name} is {tuple(got)}, needs {tuple(needed)}"
        for name, got, needed in loading_info["mismatched_keys"]
        if any(part in name for part in MEMORY_NAMES)
    ]
    if wrong:
        refuse_shapes(wrong, where)


def open_sources(checkpoint: Checkpoint, tensors: Mapping[str, list[str]]) -> dict[str, list[BlockSource]]:
    """Open the files of tables, each once.

    Args:
        checkpoint: where they are.
        tensors: as `match_blocks` gives them.
    """
    files = {path: TableFile(path) for path in {checkpoint.file_of[n] for names in tensors.values() for n in names}}
    return {
        table: [BlockSource(files[checkpoint.file_of[name]], name) for name in names]
        for table, names in tensors.items()
    }


def name_inside(table: str, tables: Iterable[str]) -> str:
    """The name that a table of a checkpoint has among those of a base model; the same name where it has none.

    Args:
        table: as its tensors have it, with the prefix of the base model or without it.
        tables: names inside the base model.
    """
    return next((name for name in tables if table == name or table.endswith(f".{name}")), table)


def check_changes(tables: Iterable[str], checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> None:
    """See that a checkpoint has the changed rows that its index promises, and none that nobody would read.

    Args:
        tables: names inside the base model.
        checkpoint, places: where tensors are.

    Raises:
        ValueError: names the table.
    """
    found: dict[str, int] = {}
    for name, path in checkpoint.file_of.items():
        table, part, _ = parse_changed_name(name) or ("", "", 0)
        if part and name_inside(table, tables) not in tables:
            raise ValueError(
                f"{path} holds {name}, and {checkpoint.where} has no table {table}. Copy the whole folder of the "
                "checkpoint again, or load it with the config that it was saved with."
            )
        if part == ROW_IDS and places[name].shape:
            found[table] = found.get(table, 0) + places[name].shape[0]
    promised = checkpoint.metadata.get("changed_rows")
    if promised is not None and promised != found:
        table = min(name for name in {*promised, *found} if promised.get(name) != found.get(name))
        raise ValueError(
            f"The index of {checkpoint.where} promises {promised.get(table, 0)} changed rows of {table} "
            f"(changed_rows), and its files hold {found.get(table, 'none')}. Copy the whole folder of the checkpoint "
            "again."
        )


def digest_of_tables(checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> bytes:
    """SHA-256 of what tells the tables of one checkpoint from those of another, without reading them: names, types and
    shapes of their tensors, and what the index promises of their files. Paths have no part in it."""
    promised = checkpoint.metadata.get("sha256", {})
    tensors = [
        [name, str(places[name].dtype), list(places[name].shape), promised.get(path.name)]
        for name, path in sorted(checkpoint.file_of.items())
        if is_of_table(name)
    ]
    facts = [tensors, checkpoint.metadata.get("engram_fingerprint")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def open_changes(table_name: str, checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> list[ChangedRows]:
    """The changed rows that a training checkpoint holds beside the blocks of a table, of each rank that held some.

    Args:
        table_name: with or without the prefix of the base model.
        checkpoint, places: where tensors are. The blocks of the table are of one width and type.

    Raises:
        ValueError: a part is missing or damaged, or does not fit the blocks.
    """
    by_rank: dict[int, dict[str, str]] = {}
    for tensor in checkpoint.file_of:
        table, part, rank = parse_changed_name(tensor) or ("", "", 0)
        names = by_rank.setdefault(rank, {}) if part and name_inside(table, [table_name]) == table_name else None
        if names is not None and names.setdefault(part, tensor) != tensor:
            raise ValueError(f"{names[part]} and {tensor} of {checkpoint.where} are the same rows. Copy it again.")
    return [_open_changes_of_rank(table_name, checkpoint, places, names) for _, names in sorted(by_rank.items())]


def _open_changes_of_rank(
    table_name: str, checkpoint: Checkpoint, places: Mapping[str, TensorPlace], names: Mapping[str, str]
) -> ChangedRows:
    """As `open_changes`, of the tensors of one rank: part to name."""
    files = {path: TableFile(path) for path in sorted({checkpoint.file_of[tensor] for tensor in names.values()})}
    parts = {part: files[checkpoint.file_of[tensor]].tensor(tensor) for part, tensor in names.items()}
    where = f"{', '.join(path.name for path in files)} of {checkpoint.where}"
    changed = ChangedRows.from_tensors(parts, table_name, where)
    blocks = [
        places[tensor]
        for (table, _), tensor in checkpoint.blocks().items()
        if name_inside(table, [table_name]) == table_name
    ]
    num_rows = sum(block.shape[0] for block in blocks)
    changed.check_fit(f"{table_name} in {where}", num_rows, blocks[0].shape[1], blocks[0].dtype, len(blocks))
    stamp = checkpoint.metadata.get("stamp")
    if stamp is not None and changed.stamp is not None and changed.stamp.hex() != stamp:
        raise ValueError(
            f"The changed rows of {table_name} in {where} are of another run or step than its index: their stamp is "
            f"{changed.stamp.hex()}, the index promises {stamp}. Copy the whole folder of the checkpoint again."
        )
    for file in files.values():
        file.forget_pages()
    return changed


def find_file(name: str | Path, filename: str, hub: Mapping) -> Path | None:
    """A file of a folder or repository on this machine, downloaded where it is not here; None where there is none.

    Args:
        name: folder or repository.
        hub: those of `HUB_ARGUMENTS` that are given.

    Raises:
        ValueError: a folder has its name.
    """
    if Path(name, filename).is_dir():
        raise ValueError(f"{Path(name, filename)} is a folder, and must be a file. Download or copy it again.")
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
    """Files of a repository, by name. Files that this call downloads are compared with what the index promises.

    Files that were in the cache before are not read; `verify_tables` reads them all. A checkpoint whose index promises
    no digests, such as one that transformers has saved, is not compared.

    Args:
        name: repository.
        filenames: of the files.
        promised: file name to SHA-256; empty, or for each file.
        hub: those of `HUB_ARGUMENTS` that are given.

    Raises:
        ValueError: a downloaded file is not what the index promises. It is removed from the cache.
        OSError: as transformers raises it, where a file cannot be downloaded.
    """
    filenames = sorted(filenames)
    if not filenames:
        return {}
    is_again = bool(hub.get("force_download"))
    cached_only = {**hub, "local_files_only": True, "force_download": False}
    to_read = [f for f in filenames if f in promised and (is_again or find_file(name, f, cached_only) is None)]
    found = cached_files(name, filenames, **hub) or []
    paths = {filename: Path(path) for filename, path in zip(filenames, found, strict=True)}
    total = sum(paths[filename].stat().st_size for filename in to_read)
    wrong = []
    with logging.tqdm(
        total=total, desc="Checking downloads", unit="B", unit_scale=True, disable=total < PROGRESS_BYTES
    ) as progress:
        for filename in to_read:
            if file_digest(paths[filename], progress.update) != promised[filename]:
                wrong.append(filename)
                _remove_with_targets(paths[filename])
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(to_read)} files that were downloaded from {name} are not what its index promises: "
            f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}. They have been removed from the cache; load "
            "again. Where that does not help, the repository itself is damaged, and another revision may be sound."
        )
    return paths


def _remove_with_targets(path: Path) -> None:
    """Remove a file, and where it is a link, all that it leads through: the Hub's cache consists of such links."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)

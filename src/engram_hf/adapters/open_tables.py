"""DeepSeek-V4.1's tables without its model: names, rows, hash and token map of a checkpoint. Rows stay in its files.

transformers has no class for that model, so nothing here computes with the rows. Layout of the published files, for
each layer with a memory (https://huggingface.co/deepseek-ai/DeepSeek-V4.1-Flash):

* `layers.1.engram.embed.weight`, F8_E4M3 (rows, 256): the numbers of each row;
* `layers.1.engram.embed.scale`, F8_E8M0 (rows, 8): one scale per 32 channels of a row, a power of two.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..modeling.checkpoint_loading import Checkpoint, find_checkpoint, find_file, read_headers
from ..modeling.configuration_checks import check_source, shorten
from ..modeling.disk_files import BlockSource, TableFile
from ..modeling.disk_reading import PageReader
from ..modeling.disk_safetensors import TensorPlace, read_json
from ..modeling.ids_hashing import NgramHash
from ..modeling.table import EngramTable, prefetch_rows, tables_without_blocks
from ..modeling.table_blocks import DISK
from ..modeling.table_formats import ByteRows, Float8Rows
from .memory_config import EngramConfig, MemoryOfModel, ModelFacts


TABLE_KEY = re.compile(r"^((?:.+\.)?layers\.(\d+)\.engram\.embed)\.(.+)$")
WEIGHT, SCALE = "weight", "scale"
TENSOR_TYPES = {WEIGHT: "F8_E4M3", SCALE: "F8_E8M0"}
# What quantizing to NVFP4 puts beside or in place of the weights.
NVFP4_PARTS = ("weight_packed", "weight_global_scale", "weight_scale_2", "weight_scale")
NVFP4_TYPES = ("U8", "I8", "F4")
ONE_BLOCK = 2**62
# Fields of the config that differ in name, or that the published file leaves out.
PAD_NAMES = ("engram_pad_token_id", "engram_pad_id")
FIELDS = ("layer_ids", "vocab_size", "n_heads", "head_dim", "max_ngram_size", "compressed_vocab_size")


@dataclass
class TableOfFiles:
    """One table: its numbers and their scales, which a lookup reads from two tensors.

    name: what both tensors begin with.
    """

    name: str
    numbers: EngramTable
    scales: EngramTable

    @property
    def num_rows(self) -> int:
        return self.numbers.num_rows

    def decode(self, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(batch, seq, heads * bytes) each, as looked up, to (batch, seq, heads * head_dim) float32."""
        heads = len(self.numbers.head_rows)
        stored = torch.cat([part.unflatten(-1, (heads, -1)) for part in (numbers, scales)], dim=-1)
        return Float8Rows().decode(stored, self.numbers.head_dim).flatten(-2)


class OpenTables:
    """Tables of a checkpoint without its model, from `open_tables`.

    where: folder or repository.
    names: layer id to the name of its table.
    num_rows: layer id to the rows of its table.
    hash: the `NgramHash` of the checkpoint; token ids to row ids.
    config: an `EngramConfig` with the fields of the memory.
    """

    def __init__(self, where: str, ngram_hash: NgramHash, config: EngramConfig, tables: Mapping[int, TableOfFiles]):
        self.where, self.hash, self.config = where, ngram_hash, config
        self._tables = dict(tables)

    @property
    def names(self) -> dict[int, str]:
        return {layer_id: table.name for layer_id, table in self._tables.items()}

    @property
    def num_rows(self) -> dict[int, int]:
        return {layer_id: table.num_rows for layer_id, table in self._tables.items()}

    def bind_tokenizer(self, tokenizer) -> None:
        """Take the token map from the tokenizer of the checkpoint.

        Args:
            tokenizer: a fast tokenizer.

        Raises:
            ValueError: it does not compress to as many ids as the checkpoint says, so it is another one.
        """
        self.hash.bind(tokenizer)

    def rows(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        """The rows that each token reads. Only their pages are read from the files.

        Args:
            input_ids: (batch, seq) token ids. A negative id, as for the tokens of an image, carries no memory: no token
                looks at it or past it, and a model gives its rows no weight.
            position_ids: (batch or 1, seq) position of each token in its document; 0, 1, ... by default.
            attention_mask: (batch, seq), 0 for padding.

        Returns:
            layer id to (batch, seq, heads * head_dim) float32, heads order by order, on the device of `input_ids`.

        Raises:
            ValueError: no tokenizer is bound, an id is not in the vocabulary, or a file has changed.
        """
        row_ids = self._row_ids(input_ids, position_ids, attention_mask)
        parts = [(part, row_ids[i]) for i, table in self._tables.items() for part in (table.numbers, table.scales)]
        prefetch_rows([part for part, _ in parts], [ids for _, ids in parts])
        return {
            i: table.decode(table.numbers(row_ids[i]), table.scales(row_ids[i])) for i, table in self._tables.items()
        }

    def prefetch(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """Begin to read the pages that `rows` of the same tokens needs, and return at once.

        Args:
            input_ids, position_ids, attention_mask: as for `rows`.
        """
        row_ids = self._row_ids(input_ids, position_ids, attention_mask)
        for layer_id, table in self._tables.items():
            for part in (table.numbers, table.scales):
                part.bring_pages(row_ids[layer_id])

    def _row_ids(self, input_ids, position_ids, attention_mask) -> dict[int, torch.Tensor]:
        if not self.hash.is_confirmed:
            raise ValueError(
                f"{self.where} has no tokenizer.json, so its token map is not known. Give the tokenizer of the model: "
                "tables.bind_tokenizer(tokenizer)."
            )
        return self.hash(input_ids, position_ids, attention_mask).row_ids

    def __repr__(self) -> str:
        tables = ", ".join(f"{table.name}: {table.num_rows:,} rows" for table in self._tables.values())
        return f"OpenTables({self.where}; {tables}; rows of {self.config.head_dim}, float8 with E8M0 scales)"


def open_tables(folder_or_repo: str | Path, tokenizer=None) -> OpenTables:
    """DeepSeek-V4.1's tables without its model, which transformers does not have.

    Of a folder it reads config, tokenizer and the headers of the files with tables. Of a repository it downloads these
    files, and no others.

    Args:
        folder_or_repo: the checkpoint.
        tokenizer: a fast tokenizer; by default that of the checkpoint, if it has a tokenizer.json.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing.
        NotImplementedError: the tables are of another model, or quantized in a way that is not read here.
        ValueError: a file is damaged or does not fit the config, or the tokenizer is another one.

    Example:
        >>> tables = open_tables("deepseek-ai/DeepSeek-V4.1-Flash")  # doctest: +SKIP
        >>> tables.num_rows  # doctest: +SKIP
        {1: 384006168, 14: 384016682}
        >>> tables.rows(torch.tensor([[5, 17, 42]]))[1].shape  # doctest: +SKIP
        torch.Size([1, 3, 6144])
    """
    where = str(folder_or_repo)
    refuse_gguf(where)
    check_source(where, ())
    path = find_file(where, "config.json", {})
    if path is None:
        raise FileNotFoundError(
            f"{where} has no config.json, which says how its tables are hashed. Copy or download it from where the "
            "tables come from."
        )
    content = read_json(path)
    config, facts = read_config(content, where)
    checkpoint = find_checkpoint(where, {}, lambda name: TABLE_KEY.match(name) is not None)
    if checkpoint is None or not checkpoint.file_of:
        raise FileNotFoundError(
            f"{where} holds no safetensors files with tables (layers.{config.layer_ids[0]}.engram.embed.weight). "
            "Download the whole checkpoint."
        )
    ngram_hash = NgramHash(MemoryOfModel(config, facts))
    declared = text_part(content).get("engram_num_embeddings")
    tables = open_files(checkpoint, read_headers(checkpoint), ngram_hash, config, declared)
    opened = OpenTables(where, ngram_hash, config, tables)
    if tokenizer is None and find_file(where, "tokenizer.json", {}) is not None:
        # config.json names a model that transformers does not know, so AutoTokenizer cannot read it.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(where)
    if tokenizer is not None:
        opened.bind_tokenizer(tokenizer)
    return opened


def refuse_gguf(where: str) -> None:
    """
    Raises:
        NotImplementedError: a file in GGUF, or a folder with nothing but such files.
    """
    path = Path(where)
    files = [each.suffix for each in path.iterdir()] if path.is_dir() else [path.suffix]
    if ".gguf" in files and ".safetensors" not in files:
        raise NotImplementedError(
            f"{where} is in GGUF, which packs rows in ways that are not read here. Give the original checkpoint in "
            "safetensors files."
        )


def text_part(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The half of a config.json that is about text, where it has several."""
    text = content.get("text_config")
    return text if isinstance(text, dict) else content


def read_config(content: Mapping[str, Any], where: str) -> tuple[EngramConfig, ModelFacts]:
    """The memory that a config.json of DeepSeek-V4.1 describes.

    Args:
        content: of the file.
        where: folder or repository, for messages.

    Raises:
        NotImplementedError: it is that of another model.
        ValueError: it is damaged; names the field.
    """
    text, kind = text_part(content), content.get("model_type")
    if isinstance(kind, str) and kind.startswith("longcat"):
        raise NotImplementedError(
            f"{where} is a LongCat model, whose hash adds up ids that are multiplied by powers of the vocabulary size. "
            "That is another formula than Engram's, and its tables cannot be read here."
        )
    if not any(name.startswith("engram_") for name in text) or str(kind).startswith("engram_"):
        raise NotImplementedError(
            f"{where} is no DeepSeek-V4.1: model_type is {shorten(kind)}. open_tables reads that model's tables. Load "
            "other models with load_with_tables."
        )
    pads = {name: text[name] for name in PAD_NAMES if name in text}
    if len({json.dumps(value) for value in pads.values()}) > 1:
        raise ValueError(f"config.json of {where} names two pads, {pads}. Copy or download it again.")
    fields = {name: text[f"engram_{name}"] for name in FIELDS if f"engram_{name}" in text}
    missing = [f"engram_{name}" for name in FIELDS if name not in fields]
    missing += [PAD_NAMES[0]] * (not pads) + ["vocab_size"] * ("vocab_size" not in text)
    if missing:
        raise ValueError(f"config.json of {where} lacks {', '.join(missing)}. Copy or download it again.")
    facts = ModelFacts(vocab_size=text["vocab_size"])
    try:
        config = EngramConfig.from_dict(
            {
                **fields,
                "pad_token_id": next(iter(pads.values())),
                "seed": text.get("engram_seed", 0),
                "table_dtype": Float8Rows.name,
                # Its memory has none.
                "kernel_size": 0,
            }
        )
        if not isinstance(facts.vocab_size, int):
            raise ValueError(f"vocab_size cannot be {shorten(facts.vocab_size)}.")
        if not isinstance(config.compressed_vocab_size, int):
            raise ValueError(f"compressed_vocab_size must be a number, got {shorten(config.compressed_vocab_size)}.")
        MemoryOfModel(config, facts).check()
    except ValueError as error:
        raise ValueError(f"config.json of {where} does not describe tables ({error}). Download it again.") from error
    return config, facts


def open_files(
    checkpoint: Checkpoint,
    places: Mapping[str, TensorPlace],
    ngram_hash: NgramHash,
    config: EngramConfig,
    declared_rows: Any,
) -> dict[int, TableOfFiles]:
    """The tables of all memory layers, on disk in their files.

    Args:
        checkpoint, places: where the tensors are.
        ngram_hash: of the checkpoint.
        config: of the memory.
        declared_rows: what its config.json says of the rows of each table; None where it says nothing.

    Raises:
        NotImplementedError: the rows are in a format that is not read here.
        ValueError: a tensor is missing, or is of another type or shape.
    """
    where, layer_ids = checkpoint.where, config.layer_ids
    rows = {layer_id: ngram_hash.num_table_rows(layer_id) for layer_id in layer_ids}
    if declared_rows is not None and declared_rows != list(rows.values()):
        raise ValueError(
            f"config.json of {where} says engram_num_embeddings = {shorten(declared_rows)}, and its other fields make "
            f"{list(rows.values())} rows. Download it again."
        )
    parts = find_parts(checkpoint, places, layer_ids)
    files: dict[Path, TableFile] = {}
    reader, found = PageReader(), {}
    for layer_id in layer_ids:
        name, tensors = parts[layer_id]
        rows_of_head = [prime for heads in ngram_hash.primes(layer_id) for prime in heads]
        opened = []
        for part, row_bytes in (
            (WEIGHT, config.head_dim),
            (SCALE, Float8Rows().row_elements(config.head_dim) - config.head_dim),
        ):
            tensor, shape = f"{name}.{part}", (rows[layer_id], row_bytes)
            if part not in tensors:
                raise ValueError(f"{where} lacks {tensor}, without which its rows mean nothing. Download it again.")
            place = places[tensor]
            if place.type_name != TENSOR_TYPES[part] or place.shape != shape:
                raise ValueError(
                    f"{tensor} of {where} is {place.type_name} {list(place.shape)}, and must be {TENSOR_TYPES[part]} "
                    f"{list(shape)} by its config.json. Load both from one checkpoint; download it again."
                )
            path = checkpoint.file_of[tensor]
            if path not in files:
                files[path] = TableFile(path)
            with tables_without_blocks():
                table = EngramTable(rows_of_head, row_bytes, ONE_BLOCK, ByteRows(), reader)
            table.open_blocks([ByteSource(files[path], tensor)], [DISK], [None])
            opened.append(table)
        found[layer_id] = TableOfFiles(name, *opened)
    return found


def find_parts(
    checkpoint: Checkpoint, places: Mapping[str, TensorPlace], layer_ids: list[int]
) -> dict[int, tuple[str, set[str]]]:
    """For each memory layer the name of its table, and which parts of it there are.

    Raises:
        NotImplementedError: the rows are in NVFP4.
        ValueError: a layer has no table, or two.
    """
    where = checkpoint.where
    found: dict[int, tuple[str, set[str]]] = {}
    for tensor in sorted(checkpoint.file_of):
        match = TABLE_KEY.match(tensor)
        if match is None or int(match[2]) not in layer_ids:
            continue
        name, parts = found.setdefault(int(match[2]), (match[1], set()))
        if name != match[1]:
            raise ValueError(f"{where} holds {name} and {match[1]}, and only one can be the table. Download it again.")
        if match[3] in NVFP4_PARTS or (match[3] == WEIGHT and places[tensor].type_name in NVFP4_TYPES):
            raise NotImplementedError(
                f"{tensor} of {where} is {places[tensor].type_name}: rows in NVFP4 or another packed format are not "
                "read here. Give the original checkpoint, whose rows are F8_E4M3 with F8_E8M0 scales."
            )
        parts.add(match[3])
    missing = [layer_id for layer_id in layer_ids if layer_id not in found]
    if missing:
        raise ValueError(
            f"config.json of {where} names memory layers {layer_ids}, and its files hold no table of layer "
            f"{missing[0]}. Download the whole checkpoint."
        )
    return found


class ByteSource(BlockSource):
    """A tensor of a file, as the bytes that it consists of."""

    def tensor(self) -> torch.Tensor:
        return super().tensor().view(torch.uint8)

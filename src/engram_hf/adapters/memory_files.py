"""What the files of a memory hold: the config.json of a model with memories or of a memory alone, and the tensors that
belong to it. Loading, inspecting and verifying read it here.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..modeling.checkpoint_loading import find_file, refuse_missing, refuse_shapes
from ..modeling.configuration_checks import shorten
from ..modeling.disk_safetensors import TensorPlace, read_json
from ..modeling.ids_hashing import NgramHash
from ..modeling.memory_layer import EngramLayer
from ..modeling.table import EngramTable, tables_without_blocks
from ..modeling.table_blocks import is_of_table
from .memory_config import EngramConfig, MemoryOfModel, ModelFacts


MODEL_TYPE = "engram_memory"


class Description(NamedTuple):
    """What a config.json says of memories: what they know of their model, their configs by name, which one is active.

    is_alone: whether the files beside it hold one memory without its model.
    """

    facts: ModelFacts
    memories: dict[str, EngramConfig]
    active: str
    is_alone: bool = False

    def to_dict(self) -> dict[str, Any]:
        memories = {name: config.to_dict() for name, config in self.memories.items()}
        return {"model": asdict(self.facts), "memories": memories, "active": self.active}

    @classmethod
    def from_dict(cls, content: Any, where: str, is_alone: bool = False) -> "Description":
        """
        Args:
            content: of the key "engram" of a config.json.
            where: folder or repository, for messages.
            is_alone: as above.

        Raises:
            ValueError: it is damaged.
        """
        try:
            facts = ModelFacts(**content["model"])
            memories = {name: EngramConfig.from_dict(fields) for name, fields in content["memories"].items()}
            description = cls(facts, memories, content["active"], is_alone)
            for config in memories.values():
                MemoryOfModel(config, facts).check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"config.json of {where} does not describe a memory ({shorten(error, 300)}). Copy or download it again."
            ) from error
        if description.active not in memories:
            raise ValueError(f"config.json of {where} has no memory called {shorten(description.active)}.")
        return description

    def modules(self) -> dict[str, nn.Module]:
        """All modules of the memories by the names that their tensors begin with, without weights."""
        facts, found = self.facts, {}
        decoder = "" if self.is_alone or not facts.decoder else f"{facts.decoder}."
        with torch.device("meta"), tables_without_blocks():
            for name, config in self.memories.items():
                view, end = MemoryOfModel(config, facts), "engram" if self.is_alone else f"engram.{name}"
                found[f"{decoder}{end}"] = cast(nn.Module, NgramHash(view))
                for layer_id in config.layer_ids:
                    found[f"{decoder}{facts.layers}.{layer_id}.{end}"] = EngramLayer(view, layer_id)
        return found


def check_tensors(modules: Mapping[str, nn.Module], places: Mapping[str, TensorPlace], where: str) -> None:
    """See that files hold every tensor of the memories in its shape, and no other tensor of a memory, tables excepted.

    Args:
        modules: as `Description.modules` gives them.
        places: of all tensors.
        where: folder or repository, for the message.

    Raises:
        ValueError: names the tensors.
    """
    wanted = {
        f"{name}.{key}": tuple(tensor.shape) for name, module in modules.items() for key, tensor in _state(module)
    }
    if missing := [name for name in wanted if name not in places]:
        refuse_missing([f"{name} (.engram.)" for name in missing], where)
    if wrong := [f"{n} is {places[n].shape}, needs {shape}" for n, shape in wanted.items() if places[n].shape != shape]:
        refuse_shapes([f"{each} (.engram.)" for each in wrong], where)
    of_memory = [name for name in places if ".engram." in f".{name}" and not is_of_table(name)]
    if extra := [name for name in of_memory if name not in wanted]:
        raise ValueError(
            f"{where} holds tensors of a memory that its config has no place for: {', '.join(extra[:8])}. Load weights "
            "and config of one checkpoint; download or copy it again."
        )


def _state(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a module beside its blocks."""
    return [(key, tensor) for key, tensor in module.state_dict().items() if not is_of_table(f"x.{key}")]


class MemoryFiles(MemoryOfModel):
    """The config of a folder or repository with a memory, with the fields that inspecting asks an `EngramMoEConfig`
    for. Where a model has several memories, the fields `engram_*` are those of the first."""

    # Tables lie beside the rest.
    engram_tables_repo = engram_tables_revision = None

    def __init__(self, content: Mapping[str, Any], where: str):
        """
        Args:
            content: of the config.json.
            where: folder or repository, for messages.

        Raises:
            ValueError: it is damaged.
        """
        description = Description.from_dict(content.get("engram"), where, is_alone="backbone" not in content)
        super().__init__(next(iter(description.memories.values())), description.facts)
        self.description, self.content = description, dict(content)
        # With the fields of the model's own config.
        self.backbone = SimpleNamespace(**(content.get("backbone") or {}))
        self.architectures = content.get("architectures")

    def tables(self) -> dict[str, EngramTable]:
        """The tables by the names that their blocks begin with, without blocks."""
        modules = self.description.modules().items()
        return {f"{name}.table": module.table for name, module in modules if isinstance(module, EngramLayer)}

    def hashes(self) -> dict[str, NgramHash]:
        """The hashes by the names of their modules, unbound."""
        modules = self.description.modules().items()
        return {n: NgramHash(module.config) for n, module in modules if isinstance(module, NgramHash)}

    def with_table_dtype(self, dtype: str) -> dict[str, Any]:
        """The content of a config.json for the same memories with tables of another type."""
        memories = self.description.memories.items()
        configs = {name: {**config.to_dict(), "table_dtype": dtype} for name, config in memories}
        return {**self.content, "engram": {**self.content["engram"], "memories": configs}}


def read_memory_config(where: str | Path, **hub: Any) -> MemoryFiles | None:
    """The config of a folder or repository with a memory; None where it is that of another kind of model, or missing.

    Raises:
        ValueError: it is damaged.
    """
    path = find_file(where, "config.json", {key: value for key, value in hub.items() if value is not None})
    # Readers of other kinds of models report a damaged file themselves.
    if path is None or MODEL_TYPE.encode() not in path.read_bytes():
        return None
    content = read_json(path)
    is_of_memory = isinstance(content, dict) and content.get("model_type") == MODEL_TYPE
    return MemoryFiles(content, str(where)) if is_of_memory else None

"""The class of somebody else's model while it has a memory: the model's own class, with tables.

A model with a memory is of a subclass that is made for it. The subclass has the name and the module of the class that
it is made of, because transformers looks classes up by these: Trainer to shift labels, recorders to find what they
record, loaders to name an architecture. Taking the memory out gives the model its own class back.

Such a model is saved with a config.json of the type "engram_memory", which holds the config of the backbone. Only this
package knows the type, and the backbone's own class raises on `vocab_size`. So the backbone is never loaded without its
memory by mistake.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from ..modeling.checkpoint_loading import Checkpoint
from ..modeling.configuration_checks import shorten
from ..modeling.disk_safetensors import read_json
from ..modeling.ids_hashing import NgramHash
from ..modeling.memory_layer import EngramLayer
from ..modeling.memory_model import CountsCopies, Memory, ModelWithTables
from ..modeling.modeling_engram_moe import WithoutContinuousBatching
from .memory_config import MemoryOfModel
from .memory_files import MODEL_TYPE, Description, check_tensors
from .memory_hooks import (
    AddedMemory,
    add_gates,
    begin_step,
    end_step,
    keep_tokens,
    memory_layers_of,
    name_tokens,
    read_memory,
    show_gates,
)
from .same_name import class_of_same_name, without_attributes


# Stands where a number is in the config of every other class of transformers.
NOT_ALONE = "of the backbone. This model has a memory: import engram_hf, and load it with AutoModelForCausalLM"
# Beside a saved model, for programs that import what `trust_remote_code` names, such as `transformers serve`. Where the
# package is missing, transformers says that it has to be installed.
CODE_FILE = "engram_memory.py"
AUTO_CLASSES = {
    "AutoConfig": "EngramMemoryConfig",
    "AutoModel": "EngramMemoryModel",
    "AutoModelForCausalLM": "EngramMemoryForCausalLM",
    "AutoModelForDecision": "EngramMemoryForCausalLM",
}
CODE = """# This model has a memory, which the package engram-hf adds to it.
from engram_hf import EngramMemoryConfig, EngramMemoryForCausalLM, EngramMemoryModel

__all__ = ["EngramMemoryConfig", "EngramMemoryForCausalLM", "EngramMemoryModel"]
"""
# The memories of the model that is being loaded in this context.
_DESCRIPTION: ContextVar["Description | None"] = ContextVar("engram_description", default=None)


class Decoder(NamedTuple):
    """The text decoder of a model, its name, the name of the list of its layers, and that list."""

    module: PreTrainedModel
    name: str
    layers_name: str
    layers: nn.ModuleList


def device_of(layer: nn.Module) -> torch.device:
    """Where a module computes; accelerate may hold its weights elsewhere."""
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    if device is not None:
        return torch.device(device)
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


def build_layer(view: MemoryOfModel, layer: nn.Module, layer_id: int) -> EngramLayer:
    """A memory layer for a decoder layer, on its device."""
    with torch.device(device_of(layer)):
        return EngramLayer(view, layer_id).train(layer.training)


def attach(
    whole: PreTrainedModel,
    decoder: Decoder,
    memory: AddedMemory,
    name: str,
    ngram_hash: NgramHash,
    layers: dict[int, EngramLayer],
) -> None:
    """Put a memory into a model, and make it the active one."""
    there = cast(AddedMemory | None, decoder.module._modules.get("engram"))
    if there is None:
        decoder.module.engram = there = memory
        decoder.module.register_forward_pre_hook(begin_step, with_kwargs=True)
        decoder.module.register_forward_hook(end_step, with_kwargs=True, always_call=True)
        decoder.layers[0].register_forward_pre_hook(keep_tokens, with_kwargs=True)
        for layer in decoder.layers:
            layer.register_forward_pre_hook(read_memory, with_kwargs=True)
        if there.facts.passes_ids:
            whole.register_forward_pre_hook(name_tokens, with_kwargs=True)
        if whole is not decoder.module:
            whole.register_forward_pre_hook(show_gates, with_kwargs=True)
            whole.register_forward_hook(add_gates, with_kwargs=True)
    device = device_of(decoder.module.get_input_embeddings())
    there[name] = ngram_hash if device.type == "meta" else ngram_hash.to(device)
    for layer_id, made in layers.items():
        layer = decoder.layers[layer_id]
        if "engram" not in layer._modules:
            layer.engram = nn.ModuleDict()
        cast(nn.ModuleDict, layer.engram)[name] = made
    there.layers_of[name] = [layers[layer_id] for layer_id in sorted(layers)]
    there.active = name


@contextmanager
def loading(description: Description) -> Iterator[None]:
    """Models of a class with memory that are built inside have these memories."""
    token = _DESCRIPTION.set(description)
    try:
        yield
    finally:
        _DESCRIPTION.reset(token)


class ModelWithMemory(WithoutContinuousBatching, CountsCopies, ModelWithTables):
    """Part of a model that a memory was added to: what any model with tables can do."""

    # The modeling code of this package runs an EngramMoE. A model with an added memory needs the package.
    _has_code = False
    stock_class: type[PreTrainedModel]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        description = _DESCRIPTION.get()
        if description is None:
            return
        facts, whole = description.facts, cast(PreTrainedModel, self)
        name = facts.decoder
        if whole.base_model is whole:
            # A base model that is loaded from the checkpoint of a model with a head.
            name = name.removeprefix(whole.base_model_prefix).removeprefix(".")
            facts = replace(facts, decoder=name)
        module = cast(PreTrainedModel, whole.get_submodule(name))
        layers = cast(nn.ModuleList, module.get_submodule(facts.layers))
        decoder = Decoder(module, name, facts.layers, layers)
        for each, memory_config in description.memories.items():
            view = MemoryOfModel(memory_config, facts)
            made = {i: build_layer(view, layers[i], i) for i in memory_config.layer_ids}
            attach(whole, decoder, AddedMemory(facts, module), each, NgramHash(view), made)
            # Whatever the type of the backbone, and however it is quantized, a memory keeps its own type. Quantizers
            # match these from the beginning of a name.
            parts = [part for part, _ in next(iter(made.values())).named_children() if part != "table"]
            own = {f".*engram.{each}.{part}" for part in parts}
            self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), *own}
            self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *own}
        cast(AddedMemory, module.engram).active = description.active

    def engram_memory(self) -> Memory:
        """The active memory; without a hash where the memory is disabled."""
        decoder = decoder_of(cast(nn.Module, self))
        active = cast(AddedMemory, decoder.engram).active
        if active is None:
            return Memory(None, [])
        return Memory(cast(NgramHash, cast(AddedMemory, decoder.engram)[active]), memory_layers_of(decoder))

    def _views(self) -> list[MemoryOfModel]:
        return [cast(MemoryOfModel, ngram_hash.config) for ngram_hash in self._hashes()]

    def _memory_config(self) -> MemoryOfModel:
        return self._views()[0]

    def _tables_repository(self) -> tuple[str | None, str | None]:
        return None, None

    def _note_saved(self, table_dtype: str | None, with_code: bool) -> None:
        for view in self._views():
            view.engram_table_dtype = table_dtype or view.engram_table_dtype

    def engram_description(self) -> "Description":
        """What a config.json says of the memories."""
        memory = cast(AddedMemory, decoder_of(cast(nn.Module, self)).engram)
        configs = {name: memory.config(name) for name in memory}
        return Description(memory.facts, configs, memory.active or next(iter(memory)))

    def _describe_memory(self, folder: Path) -> None:
        path = folder / "config.json"
        backbone = read_json(path)
        content = {
            "model_type": MODEL_TYPE,
            "architectures": self.config.architectures,
            "vocab_size": NOT_ALONE,
            "auto_map": {auto: f"{CODE_FILE.removesuffix('.py')}.{name}" for auto, name in AUTO_CLASSES.items()},
            # Not in the backbone's part: transformers looks for parts with the type that it is told to load.
            "backbone_model_type": backbone.pop("model_type"),
            "backbone": backbone,
            "engram": self.engram_description().to_dict(),
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
        (folder / CODE_FILE).write_text(CODE)

    def _remove_code(self, folder: Path) -> None:
        """What this save has written stays."""

    @classmethod
    def _check_files(cls, checkpoint: Checkpoint, places, model_args, kwargs: Mapping, may_lack: bool) -> None:
        """Compare the memory's tensors with its config before anything is made of them; transformers looks after those
        of the backbone, whose files may have names and shapes of earlier releases.

        Raises:
            ValueError: as `check_tensors`.
        """
        check_tensors(cast(Description, _DESCRIPTION.get()).modules(), places, checkpoint.where)

    def __reduce_ex__(self, protocol):
        return without_attributes, (class_with_memory, self.stock_class), self.__dict__


@cache
def class_with_memory(stock: Any) -> Any:
    """The class of a model with a memory, made of the model's own class; one for each class."""
    bases = (ModelWithMemory, stock)
    return class_of_same_name(stock, bases, config_class=stock.config_class, stock_class=stock)


def stock_class(model: nn.Module) -> type:
    """The class that a model has without a memory."""
    return getattr(type(model), "stock_class", type(model))


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of a model that has a memory.

    Raises:
        ValueError: the model has none.
    """
    for module in model.modules():
        if isinstance(module._modules.get("engram"), AddedMemory):
            return module
    raise ValueError(f"{type(model).__name__} has no added memory. Add one with add_engram(model, config, tokenizer).")


class EngramMemoryConfig(PreTrainedConfig):
    """The config.json of a model with an added memory: that of its backbone, and what describes its memories.

    A loaded model has the config of its backbone. This one has the same attributes, and is what AutoConfig gives.

    backbone: config of the model without its memories.
    engram: their description.
    """

    model_type = MODEL_TYPE
    backbone: Any = None
    engram: Any = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As `PreTrainedConfig.from_dict`; what is given beside the file goes to the backbone.

        Raises:
            ValueError: the file does not describe a model with a memory.
        """
        where, wants_unused = kwargs.get("name_or_path") or "this model", kwargs.pop("return_unused_kwargs", False)
        content = dict(config_dict)
        backbone: Any = content.get("backbone")
        kind = content.get("backbone_model_type")
        if kind not in CONFIG_MAPPING or not isinstance(backbone, dict):
            raise ValueError(
                f"config.json of {where} names no backbone that transformers {transformers.__version__} knows: "
                f"backbone_model_type is {shorten(kind)}. Put a memory alone into its model: load_engram(model, ...)."
            )
        # What transformers has found out of the file's repository.
        backbone = {**backbone, **{name: value for name, value in content.items() if name == "_commit_hash"}}
        found, unused = CONFIG_MAPPING[str(kind)].from_dict(backbone, return_unused_kwargs=True, **kwargs)
        Description.from_dict(content.get("engram"), str(where))
        config = cls(backbone=found, engram=content["engram"], architectures=content.get("architectures"))
        if "auto_map" in content:
            config.auto_map = content["auto_map"]
        return (config, unused) if wants_unused else config

    def get_text_config(self, *args, **kwargs):
        """That of the backbone."""
        return self.backbone.get_text_config(*args, **kwargs)

    def __getattr__(self, name: str):
        backbone = self.__dict__.get("backbone")
        if name.startswith("__") or backbone is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(backbone, name)


class EngramMemoryModel:
    """What AutoModel makes of a config of the type "engram_memory": a model of the backbone's class with memories."""

    config_class = EngramMemoryConfig
    _auto_class = None
    _stock_classes = MODEL_MAPPING

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Called by Auto classes that `trust_remote_code` brings here. A save writes the whole `auto_map` anyway."""

    @classmethod
    def class_of(cls, config: EngramMemoryConfig) -> type[PreTrainedModel]:
        """The class of the backbone.

        Raises:
            ValueError: the backbone is of no such kind.
        """
        if type(config.backbone) not in cls._stock_classes:
            raise ValueError(
                f"{type(config.backbone).__name__} has no model for this Auto class. Load it with AutoModelForCausalLM."
            )
        found: Any = cls._stock_classes[type(config.backbone)]
        named = config.architectures or []
        classes = found if isinstance(found, tuple) else (found,)
        return next((each for each in classes if each.__name__ in named), classes[0])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config: Any = None, **kwargs):
        """As `PreTrainedModel.from_pretrained` of an EngramMoE: with tables on tiers.

        Args:
            pretrained_model_name_or_path: folder or repository.
            config: as AutoConfig gives it.
        """
        made = class_with_memory(cast(Any, cls.class_of(config)))
        description = Description.from_dict(config.engram, str(pretrained_model_name_or_path))
        with loading(description):
            return made.from_pretrained(pretrained_model_name_or_path, *model_args, config=config.backbone, **kwargs)

    @classmethod
    def _from_config(cls, config: EngramMemoryConfig, **kwargs) -> PreTrainedModel:
        with loading(Description.from_dict(config.engram, "this config")):
            return class_with_memory(cast(Any, cls.class_of(config)))._from_config(config.backbone, **kwargs)


class EngramMemoryForCausalLM(EngramMemoryModel):
    """The same for AutoModelForCausalLM."""

    _stock_classes = MODEL_FOR_CAUSAL_LM_MAPPING

"""The class of somebody else's model while it has a memory: the model's own class, with tables.

A model with a memory is of a subclass that is made for it. The subclass has the name and the module of the class that
it is made of, because transformers looks classes up by these: Trainer to shift labels, recorders to find what they
record, loaders to name an architecture. Taking the memory out gives the model its own class back.
"""

from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..modeling.ids_hashing import NgramHash
from ..modeling.memory_model import Memory, ModelWithTables
from .memory_config import MemoryOfModel
from .memory_hooks import AddedMemory, memory_layers_of


class ModelWithMemory(ModelWithTables):
    """Part of a model that a memory was added to: what any model with tables can do."""

    # The modeling code of this package runs an EngramMoE. A model with an added memory needs the package.
    _has_code = False
    stock_class: type[PreTrainedModel]

    def memory(self) -> Memory:
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

    def _describe_memory(self, folder: Path) -> None:
        pass

    def __reduce_ex__(self, protocol):
        # The class cannot be found by its name, which is that of the model's own class.
        return _restore, (self.stock_class,), self.__dict__


def _restore(stock: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of the class with a memory, without its attributes, which copying and unpickling bring."""
    made = class_with_memory(cast(Any, stock))
    return made.__new__(made)


@cache
def class_with_memory(stock: Any) -> Any:
    """The class of a model with a memory, made of the model's own class; one for each class."""
    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "config_class": stock.config_class,
        "stock_class": stock,
    }
    return type(stock.__name__, (ModelWithMemory, stock), names)


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

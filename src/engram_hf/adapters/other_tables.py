"""Lookup tables of somebody else's model on tiers: Qwen's n-grams, Gemma's per-layer embeddings, any large embedding.

A model keeps its class's name and code (served_model.py), and so does an embedding (served_embedding.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.table_placement import TableInfo, check_places
from .memory_files import MODEL_TYPE
from .served_model import class_with_tables, refuse_unsupported
from .served_prefetch import prefetch_of_forward
from .sources import refuse_missing
from .table_parts import TABLE_CHILD, class_and_config, config_and_arguments, embeddings_of, split_places, tied_weights
from .taking_over import take_over


def load_with_tables(
    folder_or_repo: str | Path,
    device_map: Any = None,
    model_class: type[PreTrainedModel] | None = None,
    **from_pretrained_arguments: Any,
) -> Any:
    """Load a model whose lookup tables stay in the checkpoint's own files, or go to a tier that you name.

    Tables are the n-gram tables of Qwen (`qwen4_exp`), the per-layer embeddings of Gemma 3n and Gemma 4, and every
    untied `nn.Embedding` that `device_map` names. Loading reads headers, and nothing of a table on disk. The logits are
    those of the stock model, bit for bit, from every tier. `num_parameters()` counts the tables.

    Args:
        folder_or_repo: in the layout in which the model is published: safetensors in any number of parts.
        device_map: as for `from_pretrained`. An entry for a table, such as
            `{"": 0, "...embed_tokens_per_layer": "disk"}`, is "disk", "host" or "cpu" (RAM), "resident" (with its
            layer) or an accelerator. A key is the name of an embedding module, or three dots and its end. "auto" gives
            accelerators to the backbone first, and tables go where they fit then. "cpu+disk" has the backbone on the
            CPU and every table on disk.
        model_class: class of the model; by default the one that AutoModelForCausalLM takes.
        from_pretrained_arguments: for `from_pretrained`.

    Raises:
        NotImplementedError: it is a DeepSeek-V4.1, whose tables `open_tables` reads; tables are to be cut over ranks.
        ValueError, FileNotFoundError: there are no safetensors files; a table is packed (NVFP4, GGUF) or misshapen; a
            key names no table; an embedding is tied to the head; tensor parallelism is asked for.

    Example:
        >>> model = load_with_tables(gemma_folder, device_map="cpu+disk")
        >>> [(table.name, table.tiers) for table in engram_tables(model)]
        [('model.embed_tokens_per_layer', {'disk': 6336})]
    """
    if not isinstance(folder_or_repo, str | Path):
        raise ValueError(
            f"load_with_tables takes a folder or the name of a repository, got a {type(folder_or_repo).__name__}. The "
            "tables of a model that is loaded already go to other tiers with place_tables(model, places)."
        )
    refuse_missing(folder_or_repo, "config.json", **from_pretrained_arguments)
    refuse_unsupported(str(folder_or_repo), from_pretrained_arguments)
    given = dict(from_pretrained_arguments)
    config, arguments = config_and_arguments(str(folder_or_repo), given.pop("config", None), given)
    if isinstance(config, EngramMoEConfig) or config.model_type == MODEL_TYPE:
        loader: Any = AutoModelForCausalLM if model_class is None else model_class
        if not hasattr(loader, "engram_tables") and not hasattr(loader, "_model_mapping"):
            raise ValueError(
                f"{folder_or_repo} has a memory of its own, and {loader.__name__} has none. Leave model_class out, or "
                "name a class of engram_hf, such as EngramMoEForCausalLM."
            )
        return loader.from_pretrained(folder_or_repo, device_map=device_map, **from_pretrained_arguments)
    if "engram_ranks" in given:
        raise NotImplementedError(
            f"engram_ranks cuts the tables of an EngramMoE over ranks, and {folder_or_repo} is another model. Leave it "
            "out: every rank then serves the whole table, from disk if you like."
        )
    stock: Any
    stock, config = class_and_config(config, model_class)
    return class_with_tables(stock).from_pretrained(folder_or_repo, device_map=device_map, config=config, **arguments)


class ModelForServing:
    """What `transformers serve` makes of a folder that was saved with `with_code=True`: the model, with tables."""

    _auto_class = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForDecision") -> None:
        """Called by Auto classes that `trust_remote_code` brings here."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, device_map=None, config: Any = None, **kwargs) -> Any:
        """As `load_with_tables`, for the class that the config names."""
        named = (config.architectures if config is not None else None) or [""]
        model_class = getattr(transformers, named[0], None)
        return load_with_tables(pretrained_model_name_or_path, device_map, model_class, config=config, **kwargs)


def place_tables(model: Any, places: Mapping[str, object]) -> None:
    """Move the tables of a model to other tiers, whoever loaded it.

    Of a model that `from_pretrained` has loaded, the embeddings that are named become tables. To put one on disk, the
    checkpoint that it was loaded from must still hold its rows.

    Args:
        model: with tables of its own, or any model of transformers.
        places: name of a table or its end (`"...ngram_embedding"`) to "disk", "host" or "cpu", "resident", or an
            accelerator.

    Raises:
        ValueError: it is no dict; an entry names no table; a table that was changed, or comes from no file, is to go
            to disk.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(gemma_folder)
        >>> place_tables(model, {"...embed_tokens_per_layer": "disk"})
        >>> engram_tables(model)[0].tiers
        {'disk': 6336}
    """
    if not hasattr(model, "place_tables"):
        _adopt(model, places)
    model.place_tables(places)


def engram_tables(model: Any) -> list[TableInfo]:
    """What tables a model has and where their parts live; none for a model without tables.

    Example:
        >>> engram_tables(load_with_tables(gemma_folder))[0].rows
        99
    """
    return model.engram_tables() if hasattr(model, "engram_tables") else []


def prefetch(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
    """Begin to bring the rows that a forward over these tokens will read closer, and return at once.

    For servers that know the next request, and for workers of a DataLoader. `forward` and `generate` prefetch by
    themselves. It changes when rows arrive, never which rows.

    Args:
        model: with tables.
        input_ids: (batch, seq) token ids.
        attention_mask: (batch, seq), 0 for padding.

    Raises:
        ValueError: the ids are no integer tensor of this shape.

    Example:
        >>> prefetch(load_with_tables(gemma_folder, "cpu+disk"), torch.tensor([[5, 7, 9]]))
    """
    if hasattr(model, "prefetch"):
        model.prefetch(input_ids, attention_mask)


def _adopt(model: Any, places: Mapping[str, object]) -> None:
    """Make the embeddings that are named tables of a model that somebody else has loaded."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"Tables of a {type(model).__name__} cannot be placed; give a model of transformers.")
    check_places(places, embeddings_of(model))
    backbone, entries = split_places(places, embeddings_of(model), tied_weights(model))
    if backbone:
        raise ValueError(
            f"place_tables moves tables only, got {', '.join(map(str, backbone))}. Embeddings of this model are: "
            f"{', '.join(embeddings_of(model))}."
        )
    stock: Any = type(model)
    values = {name: value for (name, _), value in entries.items() if name is not None}
    before = {name: (model.get_submodule(name), type(model.get_submodule(name))) for name in values}
    weights = {name: module.weight for name, (module, _) in before.items()}
    model.__class__ = class_with_tables(stock)
    try:
        take_over(model, list(values), values)
    except BaseException:
        _give_back(model, stock, before, weights)
        raise


def _give_back(model: Any, stock: Any, before: Mapping[str, tuple[Any, type]], weights: Mapping[str, Any]) -> None:
    """Make a model what it was before its embeddings began to become tables."""
    for name, (module, own_class) in before.items():
        module.__class__ = own_class
        module._modules.pop(TABLE_CHILD, None)
        module._parameters["weight"] = weights[name]
        model.set_submodule(name, module)
    for module in model.modules():
        module.__dict__.pop("tables_to_prefetch", None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is prefetch_of_forward]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    model.__dict__.pop("served", None)
    model.__class__ = stock

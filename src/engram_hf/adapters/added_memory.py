"""Adding a memory to somebody else's causal language model, and taking it out again.

What runs in a forward is in memory_hooks.py, the class of a model with a memory in memory_class.py.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..modeling.configuration_checks import usual_pad
from ..modeling.ids_hashing import NgramHash
from ..modeling.memory_layer import EngramLayer
from ..modeling.memory_model import ROW_PATCHES
from .memory_class import Decoder, attach, build_layer, class_with_memory, decoder_of, device_of, stock_class
from .memory_config import EngramConfig, MemoryOfModel, ModelFacts, text_config
from .memory_hooks import (
    IDS,
    STEP,
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


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Their cache is of a kind of its own, so the memory has nowhere to keep its state.
REFUSED_TYPES = ("minimax", "reformer", "rwkv", "xlnet", "xlstm")
PROJECTION_STD = 0.02


class Found(Exception):
    """Ends a forward at its first layer, with what that layer was given."""

    def __init__(self, passes_kwargs: bool, hidden: torch.Tensor):
        self.passes_kwargs, self.hidden = passes_kwargs, hidden


# For the forward that finds out whether a decoder hands keyword arguments to its layers.
_MARK = object()


def add_engram(
    model: PreTrainedModel,
    config: EngramConfig,
    tokenizer: Any = None,
    *,
    name: str = "default",
    layers: str | None = None,
) -> PreTrainedModel:
    """Add a memory to a causal language model, in place. It is active from now on.

    Args:
        model: a model of transformers, of any type and on any device, quantized or not, with LoRA or without.
        config: of the memory; the model gets a copy.
        tokenizer: of the model. It is not needed with `compressed_vocab_size=None`.
        name: of the memory, where a model has several.
        layers: name of the list of decoder layers, such as "model.layers", where it is not found.

    Returns:
        the model.

    Raises:
        ValueError: the model is of a kind that cannot be exact; its layers are not found; the memory does not fit the
            model or the tokenizer; a memory has this name already.

    Example:
        >>> config = EngramConfig(layer_ids=[1], vocab_size=1000, n_heads=4, head_dim=16)
        >>> model = add_engram(backbone, config, tokenizer)
        >>> [table.name for table in model.engram_tables()]
        ['model.layers.1.engram.default.table']
    """
    if config.compressed_vocab_size is not None and tokenizer is None:
        raise ValueError(
            "This memory merges token ids that differ only in case, accents or space, so it needs the model's "
            "tokenizer: add_engram(model, config, tokenizer). compressed_vocab_size=None reads raw ids."
        )

    def build_hash(view: MemoryOfModel) -> NgramHash:
        ngram_hash = NgramHash(view)
        if view.engram_compressed_vocab_size is None:
            ngram_hash.confirm("this memory")
        else:
            ngram_hash.bind(tokenizer)
        return ngram_hash

    decoder = add_memory(unwrap(model), config, name, build_hash, layers=layers)
    for layer in memory_layers_of(decoder):
        start_layer(layer, config.start)
    return model


def add_memory(
    whole: PreTrainedModel,
    config: EngramConfig,
    name: str,
    build_hash: Callable[[MemoryOfModel], NgramHash],
    check: Callable[[ModelFacts], None] = lambda facts: None,
    layers: str | None = None,
) -> PreTrainedModel:
    """Put the modules of a memory into a model. Their weights are not set yet.

    Args:
        whole: the model.
        config: of the memory; the model gets a copy.
        name: of the memory.
        build_hash: makes its hash.
        check: raises where the memory was made for another model.
        layers: as in `add_engram`.

    Returns:
        the decoder.

    Raises:
        ValueError: as `add_engram`. The model is as it was then.
    """
    refuse_compiled(whole)
    if getattr(whole, "served", None):
        raise ValueError(
            "A model whose own tables are served cannot be saved with a memory. Load it with from_pretrained, which "
            "serves none, and add the memory then."
        )
    decoder = find_decoder(whole, layers)
    memory = cast(AddedMemory | None, decoder.module._modules.get("engram"))
    if memory is None:
        memory = _look_at(whole, decoder)
    check(memory.facts)
    if not NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"A memory's name is letters, digits and underscores, such as 'default'; got {name!r}.")
    if name in memory:
        raise ValueError(
            f"The model has a memory called {name!r} already. Take it out with remove_engram(model, {name!r}), or give "
            "the new one another name=."
        )
    config, text = copy.deepcopy(config), text_config(whole)
    if config.pad_token_id is None:
        pad, eos = (getattr(text, name, None) for name in ("pad_token_id", "eos_token_id"))
        config.pad_token_id = usual_pad(pad, eos, config.hash)
    view = MemoryOfModel(config, memory.facts)
    view.check()
    ngram_hash = build_hash(view)
    made = {layer_id: build_layer(view, decoder.layers[layer_id], layer_id) for layer_id in config.layer_ids}
    whole.__class__ = class_with_memory(cast(Any, stock_class(whole)))
    attach(whole, decoder, memory, name, ngram_hash, made)
    return decoder.module


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The model itself, inside of PEFT's.

    Raises:
        ValueError: it is no model of transformers.
    """
    whole: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(whole, PreTrainedModel):
        raise ValueError(
            f"A memory is added to a model of transformers, before it is compiled or wrapped for distributed training; "
            f"got {type(model).__name__}."
        )
    return whole


def refuse_compiled(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model is compiled. Compiled forwards do not see hooks that come or go.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("This model is compiled. Add or remove a memory first, and compile the model then.")


def find_decoder(model: PreTrainedModel, layers: str | None = None) -> Decoder:
    """The text decoder of a model and its layers.

    Raises:
        ValueError: there is none, or its architecture cannot have a memory.
    """
    text = text_config(model)
    kind = text.model_type
    if kind in REFUSED_TYPES or model.config.is_encoder_decoder:
        why = "it has an encoder" if model.config.is_encoder_decoder else "its cache is not a transformers Cache"
        raise ValueError(f"A memory in {kind} would decode wrongly, because {why}. It cannot be added.")
    count = text.num_hidden_layers
    if layers is not None:
        parent, _, last = layers.rpartition(".")
        try:
            module: Any = model.get_submodule(parent)
            found = [(last, module._modules[last])]
        except (AttributeError, KeyError) as error:
            raise ValueError(f"layers={layers!r} names no module of {type(model).__name__}.") from error
    else:
        module = model.get_decoder()
        lists = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
        found = [(n, m) for n, m in lists if len(m) == count and not re.search(r"\.\d+\.", f".{n}.")]
    if len(found) != 1 or not isinstance(found[0][1], nn.ModuleList):
        looked_at = ", ".join(f"{n} ({len(m)})" for n, m in module.named_modules() if isinstance(m, nn.ModuleList))
        raise ValueError(
            f"The {count} decoder layers of {type(model).__name__} were not found in its "
            f"{type(module).__name__}, which has these lists of modules: {looked_at or 'none'}. Name the list: "
            'add_engram(..., layers="model.layers").'
        )
    name = next(n for n, m in model.named_modules() if m is module)
    return Decoder(module, name, *found[0])


def _look_at(whole: PreTrainedModel, decoder: Decoder) -> AddedMemory:
    """Find out what a memory must know of a decoder, by one forward of one token that ends at the first layer."""
    found = _run_to_first_layer(decoder, {STEP: _MARK})
    if found is None:
        found = _run_to_first_layer(decoder, {})
    if found is None:
        raise ValueError(
            f"{type(decoder.module).__name__} does not call the layers in {decoder.layers_name}, so a memory in them "
            "would not be read. Name the list of its decoder layers: add_engram(..., layers=...)."
        )
    hidden, text = found.hidden, text_config(decoder.module)
    facts = ModelFacts(
        hidden_size=hidden.shape[-1],
        streams=hidden.shape[2] if hidden.ndim == 4 else 1,
        num_hidden_layers=len(decoder.layers),
        vocab_size=cast(Any, decoder.module.get_input_embeddings()).weight.shape[0],
        decoder=decoder.name,
        layers=decoder.layers_name,
        passes_kwargs=found.passes_kwargs,
        passes_ids=text_config(whole) is not whole.config and _passes_ids(whole, decoder),
        num_cache_layers=len(DynamicCache(config=text).layers),
        base_model=whole.name_or_path or "",
    )
    return AddedMemory(facts, decoder.module)


@torch.no_grad()
def _passes_ids(whole: PreTrainedModel, decoder: Decoder) -> bool:
    """Whether a model hands `engram_input_ids` to its decoder."""

    def stop(module: nn.Module, args: tuple, given: dict) -> None:
        raise Found(given.get(IDS) is not None, torch.empty(0))

    hook = decoder.module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device_of(whole.get_input_embeddings()))
        whole(input_ids=ids, **{IDS: ids})
    except Found as found:
        return found.passes_kwargs
    except TypeError:
        return False
    finally:
        hook.remove()
    return False


@torch.no_grad()
def _run_to_first_layer(decoder: Decoder, kwargs: dict) -> Found | None:
    """What the first layer of a forward is given; None where the forward takes no such arguments, or calls no layer."""

    def stop(layer: nn.Module, args: tuple, given: dict) -> None:
        raise Found(given.get(STEP) is _MARK, args[0] if args else given["hidden_states"])

    hooks = [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in decoder.layers]
    device = device_of(decoder.module.get_input_embeddings())
    try:
        with torch.random.fork_rng(devices=[]):
            decoder.module(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), **kwargs)
    except Found as found:
        return found
    except TypeError:
        if not kwargs:
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return None


@torch.no_grad()
def start_layer(layer: EngramLayer, start: str) -> None:
    """Give a new memory layer its first values; see `EngramConfig.start`."""
    for projection in (layer.key_proj, layer.value_proj):
        projection.weight.normal_(0.0, PROJECTION_STD)
    if layer.conv is not None:
        layer.conv.weight.zero_()
    if start == "loud_rows":
        layer.value_proj.weight.zero_()
    if start == "silent":
        for block in layer.table.blocks:
            block.zero_()
    else:
        layer.table.blocks.init_weights(1.0 if start == "loud_rows" else PROJECTION_STD)


def remove_engram(model: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
    """Take a memory out of a model. Without its last memory the model is what it was, bit for bit.

    Args:
        model: that has a memory.
        name: of the memory; by default all of them.

    Returns:
        the model.

    Raises:
        ValueError: the model has no such memory, or is compiled.

    Example:
        >>> model = add_engram(backbone, config, tokenizer)
        >>> remove_engram(model) is backbone
        True
    """
    whole = unwrap(model)
    decoder, memory, known = memory_in(whole, name)
    refuse_compiled(whole)
    names = list(memory) if name is None else [known]
    for each in names:
        del memory[each], memory.layers_of[each]
        for module in list(whole.modules()):
            memories = module._modules.get("engram")
            if isinstance(memories, nn.ModuleDict) and memories is not memory and each in memories:
                del memories[each]
                if not len(memories):
                    del module.engram
    if memory.active in names:
        memory.active = next(iter(memory), None)
    cast(Any, whole).forget_lost_patches()
    if not len(memory):
        del decoder.engram
        for module in whole.modules():
            _remove_hooks(module)
            module.__dict__.pop(ROW_PATCHES, None)
        whole.__class__ = stock_class(whole)
    return model


def _remove_hooks(module: nn.Module) -> None:
    ours = {begin_step, end_step, keep_tokens, read_memory, name_tokens, show_gates, add_gates}
    for hooks, marks in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for number in [number for number, hook in hooks.items() if hook in ours]:
            del hooks[number]
            for mark in marks:
                mark.pop(number, None)


def memory_in(whole: nn.Module, name: str | None = None) -> tuple[nn.Module, AddedMemory, str]:
    """The decoder of a model, its memories, and the name of one of them, by default of the active one.

    Raises:
        ValueError: the model has no such memory.
    """
    decoder = decoder_of(whole)
    memory = cast(AddedMemory, decoder.engram)
    name = (memory.active or next(iter(memory))) if name is None else name
    if name not in memory:
        raise ValueError(f"The model has no memory called {name!r}; it has {', '.join(memory)}.")
    return decoder, memory, name


def set_engram(model: PreTrainedModel, name: str) -> None:
    """Choose the memory that forwards read from now on.

    Raises:
        ValueError: the model has no memory of this name.

    Example:
        >>> model = add_engram(backbone, config, tokenizer)
        >>> model = add_engram(model, config, tokenizer, name="code")
        >>> set_engram(model, "default")
    """
    _, memory, known = memory_in(unwrap(model), name)
    memory.active = known


@contextmanager
def disable_engram(model: PreTrainedModel) -> Iterator[None]:
    """Inside this context the model computes as it does without a memory.

    Raises:
        ValueError: the model has no memory.

    Example:
        >>> model = add_engram(backbone, config, tokenizer)
        >>> with disable_engram(model):
        ...     base_logits = model(**tokenizer("a text", return_tensors="pt")).logits
    """
    _, memory, _ = memory_in(unwrap(model))
    active, memory.active = memory.active, None
    try:
        yield
    finally:
        memory.active = active


def freeze_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze everything but the active memory, which learns from now on.

    Returns:
        the model.

    Raises:
        ValueError: the model has no memory, or it is disabled.

    Example:
        >>> model = freeze_backbone(add_engram(backbone, config, tokenizer))
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=engram_optimizers(args))
    """
    decoder, memory, _ = memory_in(unwrap(model))
    if memory.active is None:
        raise ValueError("The memory is disabled, so it cannot learn. Call freeze_backbone outside of disable_engram.")
    model.requires_grad_(False)
    for layer in memory_layers_of(decoder):
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return model


@contextmanager
def record_gates(model: PreTrainedModel) -> Iterator[list[dict[int, torch.Tensor]]]:
    """Record the gates of every forward inside this context, whatever the outputs of the model are.

    Returns:
        a list with one dict for each forward: layer id to (batch, seq, streams) in [0, 1], 0 for a token without
        memory.

    Raises:
        ValueError: the model has no memory.

    Example:
        >>> model = add_engram(backbone, config, tokenizer)
        >>> with record_gates(model) as gates:
        ...     outputs = model(**tokenizer("a text", return_tensors="pt"))
        >>> list(gates[0])
        [1]
    """
    decoder, _, _ = memory_in(unwrap(model))
    found: list[dict[int, torch.Tensor]] = []
    layers = memory_layers_of(decoder)

    def record(layer: nn.Module, args: tuple, output: tuple) -> None:
        if layer is layers[0]:
            found.append({})
        found[-1][cast(EngramLayer, layer).layer_idx] = output[1].detach()

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

"""The hooks that add a memory to somebody else's model during a forward, and the step that they share.

A pre-hook on the decoder hashes the tokens of a forward and hands them to its layers as a keyword argument. A pre-hook
on every layer takes that argument out again, and layers with a memory add what it says to their input. Ids and the
inputs of the convolution are kept in the caller's cache, after the layers of the model. No class is patched
and no forward is replaced. Hash and memory layers are those of EngramMoE.

Names of modules: hashes are `<decoder>.engram.<name>`, memory layers are `<decoder layer>.engram.<name>`.
"""

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..modeling.ids_hashing import HashedTokens, NgramHash
from ..modeling.ids_reach import (
    NO_MEMORY,
    Seen,
    find_documents,
    positions_in_documents,
    recover_token_ids,
    tokens_under_mask,
)
from ..modeling.memory_layer import (
    EngramLayer,
    MemoryCacheLayer,
    counts_tokens,
    find_rows,
    find_state,
    keep_ids,
    memory_cache_layer,
)
from ..modeling.modeling_engram_moe import refuse_other_engines
from .memory_config import EngramConfig, MemoryOfModel, ModelFacts


# Keyword arguments: what a decoder hands to its layers, what a caller may give, what a model hands to its decoder.
STEP, IDS, OUTPUT_GATES, GATES = "engram_step", "engram_input_ids", "output_engram_gates", "engram_gates_of_step"
# Names of the ids that stand for images and their like.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass
class Step:
    """What the layers of one forward share. No tuple: accelerate would move the tensors of one to each layer's device.

    memory_name: the active memory; None where the memory is disabled.
    row_ids: layer id to (batch, seq, heads).
    hashed: what is known of the tokens.
    num_cache_layers: cache layers that the model itself needs.
    gates: layer id to (batch, seq, streams), if gates were asked for.
    shows_gates: whether the decoder's own output has them.
    decoder, before: the model that made this step, and the step that it stands in for; where steps are not carried by
        keyword arguments.
    """

    memory_name: str | None = None
    row_ids: dict[int, torch.Tensor] = field(default_factory=dict)
    hashed: HashedTokens | None = None
    num_cache_layers: int = 0
    gates: dict[int, torch.Tensor] | None = None
    shows_gates: bool = False
    decoder: nn.Module | None = None
    before: "Step | None" = None


# For decoders that hand no keyword arguments to their layers.
_STEP_OF_FORWARD: ContextVar[Step | None] = ContextVar("engram_step", default=None)


class AddedMemory(nn.ModuleDict):
    """The hashes of the memories of one decoder by their names, and which of them is active."""

    def __init__(self, facts: ModelFacts, decoder: nn.Module):
        """
        Args:
            facts: of the model.
            decoder: that it becomes a part of.
        """
        super().__init__()
        self.facts = facts
        # For arguments that are given by position.
        self.argument_names = [name for name in inspect.signature(type(decoder).forward).parameters if name != "self"]
        self.active: str | None = None
        # Name of a memory to its layers. They are children of the decoder layers, wherever somebody has wrapped these.
        self.layers_of: dict[str, list[EngramLayer]] = {}

    def config(self, name: str) -> EngramConfig:
        """The config of a memory."""
        return cast(NgramHash, self[name]).config.memory

    def extra_repr(self) -> str:
        return f"active={self.active!r}"


def memory_layers_of(decoder: nn.Module, name: str | None = None) -> list[EngramLayer]:
    """The memory layers of one memory of a decoder, in order; by default those of the active one."""
    memory = cast(AddedMemory, decoder.engram)
    return memory.layers_of[cast(str, memory.active if name is None else name)]


# What runs in a forward. All of these are functions of modules, so that copies and pickles of a model are right.


def show_gates(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before a model with a head: a place for the gates, which its decoder fills."""
    if not kwargs.pop(OUTPUT_GATES, None):
        return args, kwargs
    return args, {**kwargs, GATES: {}}


def name_tokens(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before a model that sees more than text: ids for the memory, since its decoder is given embeddings. Images and
    their like are no tokens."""
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is None or kwargs.get(IDS) is not None:
        return args, kwargs
    config = cast(PreTrainedModel, model).config
    placeholders = [getattr(config, name, None) for name in PLACEHOLDERS]
    ids = input_ids
    for placeholder in {each for each in placeholders if isinstance(each, int)}:
        ids = torch.where(input_ids == placeholder, NO_MEMORY, ids)
    return args, {**kwargs, IDS: ids}


def add_gates(model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """After a model with a head: gates in its output."""
    return with_gates(output, kwargs[GATES]) if GATES in kwargs else output


def with_gates(output: Any, gates: Mapping[int, torch.Tensor]) -> Any:
    """The output of a model with `engram_gates`, one tensor (batch, seq, streams) for each memory layer."""
    found = tuple(gates[layer_id] for layer_id in sorted(gates))
    if isinstance(output, tuple):
        return (*output, found)
    output["engram_gates"] = found
    return output


def begin_step(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before the decoder: hash the tokens, and hand what is known of them to the layers."""
    memory = cast(AddedMemory, decoder.engram)
    if not memory.facts.passes_kwargs and torch.compiler.is_compiling():
        raise NotImplementedError(
            "The decoder of this model hands no keyword arguments to its layers, so a compiled forward cannot give "
            "them what the memory needs. Run the model without torch.compile, and generate with disable_compile=True."
        )
    token_ids, gates, shows_gates = kwargs.pop(IDS, None), kwargs.pop(GATES, None), kwargs.pop(OUTPUT_GATES, False)
    if memory.active is None:
        step = Step()
    else:
        if args:
            args, kwargs = (), {**dict(zip(memory.argument_names, args)), **kwargs}
        step = _read_tokens(decoder, memory, kwargs, token_ids)
    step.gates, step.shows_gates = {} if gates is None and shows_gates else gates, bool(shows_gates)
    if memory.facts.passes_kwargs:
        return args, {**kwargs, STEP: step}
    step.decoder, step.before = decoder, _STEP_OF_FORWARD.get()
    _STEP_OF_FORWARD.set(step)
    return args, kwargs


def end_step(decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """After the decoder, also where it has raised."""
    step = kwargs.get(STEP)
    if step is None and not cast(AddedMemory, decoder.engram).facts.passes_kwargs:
        step = _STEP_OF_FORWARD.get()
        if step is None or step.decoder is not decoder:
            return output
        _STEP_OF_FORWARD.set(step.before)
    if step is None or not step.shows_gates or output is None:
        return output
    return with_gates(output, step.gates or {})


def _read_tokens(decoder: nn.Module, memory: AddedMemory, kwargs: dict, token_ids: torch.Tensor | None) -> Step:
    """The step of a forward with these arguments. Documents of a packed row are kept apart as in EngramMoE."""
    refuse_other_engines(decoder.config)
    name = cast(str, memory.active)
    input_ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    cache = find_cache(kwargs)
    shape = (input_ids if input_ids is not None else embeddings).shape[:2]  # type: ignore[union-attr]
    if token_ids is None:
        token_ids = input_ids if input_ids is not None else _recover(decoder, cast(torch.Tensor, embeddings))
    if token_ids.shape != shape:
        raise ValueError(
            f"engram_input_ids must have one id per position, {tuple(shape)}, got {tuple(token_ids.shape)}."
        )
    seq = shape[1]
    mask, positions = kwargs.get("attention_mask"), text_positions(kwargs.get("position_ids"))
    if positions is None and kwargs.get("cu_seq_lens_q") is not None:
        positions = positions_in_documents(kwargs["cu_seq_lens_q"], seq)
    past_seen = None if cache is None or not counts_tokens(cache) else cache.get_seq_length()
    if positions is not None and isinstance(mask, torch.Tensor | None) and (cache is None or past_seen is not None):
        apart, is_packed = find_documents(positions, mask, past_seen)
        if is_packed:
            mask = kwargs["attention_mask"] = apart
            kwargs["use_cache"] = False
    view = cast(NgramHash, memory[name]).config
    token_mask, seen = _mask_of_tokens(mask, seq, cache, past_seen, view)
    state = None if cache is None else memory_cache_layer(cache, memory.facts.num_cache_layers, name)
    hashed, row_ids = find_rows(
        cast(NgramHash, memory[name]),
        memory_layers_of(decoder),
        token_ids,
        positions,
        token_mask,
        seen,
        state,
    )
    return Step(name, row_ids, hashed, memory.facts.num_cache_layers)


def find_cache(given: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a decoder.

    Raises:
        ValueError: it is of another kind.
    """
    for name in CACHE_NAMES:
        cache = given.get(name)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"The memory keeps its state in a transformers Cache, and {name} is a {type(cache).__name__}. Give "
                "DynamicCache(config=model.config), or use_cache=False."
            )
        if cache is not None:
            return cache
    return None


def _recover(decoder: nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
    table = cast(PreTrainedModel, decoder).get_input_embeddings()
    # Some embeddings scale their rows, or are quantized.
    is_plain = type(table) is nn.Embedding and not hasattr(table, "_hf_hook")
    if is_plain:
        return recover_token_ids(embeddings, cast(torch.Tensor, table.weight))
    every_id = torch.arange(cast(AddedMemory, decoder.engram).facts.vocab_size, device=embeddings.device)
    with torch.no_grad():
        return recover_token_ids(embeddings, table(every_id))


def text_positions(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """(batch or 1, seq) positions in documents. Several rows of positions for each token are those of images: of four
    rows the first one counts the tokens of a document, of three none does."""
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    if position_ids.ndim == 1:
        return position_ids.unsqueeze(0)
    return position_ids[0] if position_ids.shape[0] == 4 else None


def _mask_of_tokens(
    mask: Any, seq: int, cache: Cache | None, past_seen: Any, view: MemoryOfModel
) -> tuple[torch.Tensor | None, Seen | None]:
    """As `tokens_under_mask`, of any mask that `generate` or a caller may give."""
    masks = mask if isinstance(mask, dict) else {"sliding_attention": mask}
    if not isinstance(mask, dict):
        is_wide = mask is not None and mask.ndim == 4
        if not (is_wide and cache is not None and cache.layers and all(_slides(cache))):
            furthest = max(view.engram_max_ngram_size - 1, view.engram_conv_reach)
            return tokens_under_mask(mask, seq, past_seen, furthest)
    # Masks that `generate` has prepared, by layer type, or the one mask of a model whose layers all keep a window. They
    # hide padding, and what is outside of a window or a chunk. None hides nothing.
    of_padding = [each for each in masks.values() if isinstance(each, torch.Tensor) and each.ndim == 2]
    if of_padding:
        return tokens_under_mask(of_padding[0], seq, past_seen, 0)
    if "full_attention" in masks or any(each is None for each in masks.values()):
        chosen, offset = masks.get("full_attention"), 0
    else:
        chosen, offset = next(iter(masks.values())), 0
        if cache is not None:
            sliding = next((number for number, slides in enumerate(_slides(cache)) if slides), 0)
            offset = cache.get_mask_sizes(seq, sliding)[1]
    return (
        (None, None)
        if chosen is None
        else (tokens_under_mask(chosen, seq, (0 if past_seen is None else past_seen) - offset, 0)[0], None)
    )


def _slides(cache: Cache) -> list[bool]:
    """For each layer of the model whether it keeps a window of tokens."""
    return [bool(getattr(layer, "is_sliding", False)) for layer in cache.layers if isinstance(layer, CacheLayerMixin)]


def keep_tokens(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before the first decoder layer: keep the ids of this forward in its cache. Here the cache is known that may have
    been made inside the decoder's forward."""
    step = kwargs.get(STEP) or _STEP_OF_FORWARD.get()
    if step is not None and step.hashed is not None and (state := _state_of(step, args, kwargs)) is not None:
        keep_ids(state, step.hashed)


def _state_of(step: Step, args: tuple, kwargs: dict) -> MemoryCacheLayer | None:
    """The memory's part of the cache that a layer is given."""
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is None:
        return None
    name = cast(str, step.memory_name)
    found = find_state(cache, name)
    return memory_cache_layer(cache, step.num_cache_layers, name) if found is None else found


def read_memory(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before a decoder layer: add what its memory says to its input."""
    step = kwargs.pop(STEP, None) or _STEP_OF_FORWARD.get()
    if step is None:
        raise RuntimeError(
            f"{type(layer).__name__} was called outside of its model, so its memory does not know the tokens. Call the "
            "model itself. To checkpoint its activations, use transformers 5.24 and its own gradient checkpointing."
        )
    memories = layer._modules.get("engram")
    if step.memory_name is None or memories is None or step.memory_name not in cast(nn.ModuleDict, memories):
        return args, kwargs
    memory = cast(EngramLayer, cast(nn.ModuleDict, memories)[step.memory_name])
    hidden = args[0] if args else kwargs["hidden_states"]
    device = memory.key_norm.weight.device
    streams = hidden if hidden.ndim == 4 else hidden.unsqueeze(2)
    if device.type != "meta":
        streams = streams.to(device)
    added, gates = memory(
        streams,
        step.row_ids[memory.layer_idx],
        to_device(cast(HashedTokens, step.hashed), device),
        _state_of(step, args, kwargs),
    )
    if step.gates is not None:
        step.gates[memory.layer_idx] = gates
    # The memory may compute in another type, and on the device of its layer.
    hidden = hidden + added.to(hidden).view_as(hidden)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def to_device(hashed: HashedTokens, device: torch.device) -> HashedTokens:
    """What a memory layer reads of the tokens, on its device."""
    if device.type == "meta" or hashed.ids.device == device:
        return hashed
    before = None if hashed.before is None else hashed.before.to(device)
    return hashed._replace(ids=hashed.ids.to(device), reach=hashed.reach.to(device), before=before)

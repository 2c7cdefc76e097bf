"""What comes out of each decoder layer of a causal language model of any kind, with a memory or without.

Hidden states are counted as transformers counts them: state 0 is what the first layer is given, before any memory is
added to it, and state i is what comes out after i layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .memory_layers import device_of
from .silencing import refuse_compiled


def unwrapped(model: nn.Module) -> Any:
    """The model itself, inside of PEFT's."""
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "get_base_model") else whole


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model, in order.

    Raises:
        ValueError: they are not found.
    """
    whole = unwrapped(model)
    if hasattr(whole, "engram_description"):
        facts = whole.engram_description().facts
        return whole.get_submodule(facts.decoder).get_submodule(facts.layers)
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
    count = whole.config.get_text_config().num_hidden_layers
    found = [
        module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and not any(part.isdigit() for part in name.split("."))
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(whole).__name__} has {len(found)} lists of {count} modules, so its decoder layers are not known. "
            "This works for causal language models of transformers with one list of layers."
        )
    return found[0]


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside this context every forward leaves its hidden states in the list that is given.

    Returns:
        a list, which a forward fills anew: layers + 1 tensors (batch, seq, hidden), or (batch, seq, streams, hidden)
        where the model has residual streams.

    Raises:
        ValueError: the model is compiled, or its layers are not found.
    """
    refuse_compiled(model)
    states: list[torch.Tensor] = []
    layers = decoder_layers(model)

    def begin(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        states[:] = [args[0] if args else kwargs["hidden_states"]]

    def end(layer: nn.Module, args: tuple, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    # It runs before the hooks that add a memory to the input of the first layer.
    hooks = [layers[0].register_forward_pre_hook(begin, with_kwargs=True, prepend=True)]
    hooks += [layer.register_forward_hook(end) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def read_out(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The logits that the model would give if these were the hidden states after its last layer.

    The model itself computes them: one token goes through its layers, and these states are put in the place of what
    comes out. So streams are averaged as its head does, and norm, head, scaling and softcapping are the model's own.

    Args:
        model: in evaluation mode.
        states: (tokens, hidden) or (tokens, streams, hidden).

    Returns:
        (tokens, vocabulary).
    """

    def replace(layer: nn.Module, args: tuple, output: Any) -> Any:
        hidden = states.unsqueeze(1)  # (tokens, 1, [streams,] hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    device = device_of(model)
    hook = decoder_layers(model)[-1].register_forward_hook(replace)
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False).logits
    finally:
        hook.remove()
    return logits.reshape(len(states), -1)


def collapse_streams(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Hidden states of one stream: where there are several, they are averaged as the head of the model does.

    Args:
        states: (tokens, hidden) or (tokens, streams, hidden).

    Returns:
        (tokens, hidden).
    """
    if states.ndim == 2:
        return states
    whole = unwrapped(model)
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
    head = getattr(decoder, "hc_head", None)
    return states.mean(1) if head is None else head(states.unsqueeze(0)).squeeze(0)

"""How early a model knows what it will say: each hidden state is read out as if it were the last one.

The idea is nostalgebraist's logit lens; arXiv 2601.07372 compares its curves with and without a memory (figure 4).
"""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .drawing import COLORS, new_figure, save_figure
from .hidden_layers import hidden_states, read_out
from .memory_layers import memory_of
from .silencing import silenced
from .text_rows import BATCH_TOKENS, batches, evaluating, progress, rows_for, run


# Bounds the logits of a state that are compared at once, tokens x vocabulary.
LOGITS_AT_ONCE = 2**22
WITH, SILENCED = "with its memory", "memory silenced"
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class LensCurve:
    """What the lens sees of one model, state by state; state i is the one after i layers, state 0 the embeddings.

    kl: nats, by state: the divergence KL(what the model says || what the state says), averaged over tokens.
    agreement: by state: share of tokens of which the state puts the same token first as the model.
    settled_after: layers after which the token that comes first no longer changes, averaged over tokens.
    """

    kl: list[float]
    agreement: list[float]
    settled_after: float


@dataclass(frozen=True)
class LogitLens:
    """The curves of a model: "with its memory" and "memory silenced", or "as it is" for a model without one.

    layers: decoder layers; each curve has one value more.
    tokens: that were read.
    """

    layers: int
    tokens: int
    curves: dict[str, LensCurve]

    def to_json(self) -> str:
        """All numbers as JSON."""
        return json.dumps(asdict(self), indent=1)

    def markdown(self) -> str:
        """A table with a row for each state."""
        head = "".join(f" KL, {name} | same first token |" for name in self.curves)
        lines = [f"| after layers |{head}", "|---|" + "---|---|" * len(self.curves)]
        for state in range(self.layers + 1):
            cells = "".join(f" {c.kl[state]:.3f} | {c.agreement[state]:.1%} |" for c in self.curves.values())
            lines.append(f"| {state} |{cells}")
        settled = "; ".join(f"{name}: {curve.settled_after:.2f}" for name, curve in self.curves.items())
        return "\n".join([*lines, "", f"Layers until the first token is settled. {settled}."])

    _repr_markdown_ = __str__ = markdown

    def draw(self, picture: str | Path, beside: "LogitLens | None" = None) -> Path:
        """Write the curves as PNG.

        Args:
            picture: file to write.
            beside: of another model, such as one that was trained without a memory; drawn dashed.

        Returns:
            the file.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure, (left, right) = new_figure("How early the model knows its answer", 1, 2, (10, 4.2))
        for lens, style, prefix in ((self, "-", ""), (beside, "--", "other model, ")):
            if lens is None:
                continue
            for number, (name, curve) in enumerate(lens.curves.items()):
                look = {"color": COLORS[number], "linestyle": style, "marker": "o", "markersize": 4}
                label, settled = f"{prefix}{name}", f"settled after {curve.settled_after:.2f}"
                # The last state is at distance 0, which no logarithmic axis has.
                left.plot(range(lens.layers), curve.kl[:-1], label=label, **look)
                shares = [100 * share for share in curve.agreement]
                right.plot(range(len(shares)), shares, label=f"{label}: {settled}", **look)
        left.set(title="Distance to the final answer", ylabel="KL divergence, nats", yscale="log")
        right.set(title="Same first token as the final answer", ylabel="tokens, %", ylim=(0, 103))
        for axis in (left, right):
            axis.set_xlabel("after this many layers")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend()
        return save_figure(figure, picture)


def logit_lens(model: nn.Module, data: Iterable[Any], *, tokenizer: Any = None) -> LogitLens:
    """Read every hidden state out through the model's own head, with its memory and with the memory silenced.

    Args:
        model: a causal language model of transformers, with a memory or without.
        data: rows of text; see `read_rows`.
        tokenizer: for data that is text.

    Raises:
        ValueError: data is no text, or the layers of the model are not found.

    Example:
        >>> lens = logit_lens(model, data)
        >>> list(lens.curves), len(lens.curves["with its memory"].kl)
        (['with its memory', 'memory silenced'], 5)
        >>> lens.curves["with its memory"].kl[-1]
        0.0
    """
    rows = rows_for(model, data, tokenizer)
    tokens = sum(len(row.ids) for row in rows)
    contexts: dict[str, Any] = {AS_IT_IS: nullcontext}
    if memory_of(model)[1]:
        contexts = {WITH: nullcontext, SILENCED: lambda: silenced(model)}
    curves = {}
    with evaluating(model), progress(len(contexts) * tokens, "logit lens", "token") as bar:
        for name, context in contexts.items():
            with context():
                curves[name] = _curve(model, rows, bar)
    return LogitLens(len(next(iter(curves.values())).kl) - 1, tokens, curves)


def _curve(model: nn.Module, rows: list, bar: Any) -> LensCurve:
    kl: Any = 0.0
    agreement: Any = 0
    settled, tokens = 0, 0
    config: Any = model.config
    at_once = max(1, LOGITS_AT_ONCE // config.get_text_config().vocab_size)
    for batch in batches(rows, BATCH_TOKENS):
        with hidden_states(model) as states:
            run(model, batch)
        is_token = batch.is_token.to(states[0].device)
        of_tokens = [state[is_token.to(state.device)] for state in states]
        for start in range(0, len(of_tokens[0]), at_once):
            part = slice(start, start + at_once)
            final = read_out(model, of_tokens[-1][part]).float().log_softmax(-1)
            divergences, same = [], []
            for state in of_tokens:
                read = read_out(model, state[part]).float().log_softmax(-1).to(final.device)
                divergences.append((final.exp() * (final - read)).double().sum(-1).sum())
                same.append(read.argmax(-1) == final.argmax(-1))
            kl, stacked = kl + torch.stack(divergences).cpu(), torch.stack(same).cpu()  # (states, tokens)
            agreement = agreement + stacked.sum(1)
            # Layers after which every later state agrees: from the end, the run of states that do.
            run_of_same = stacked.flip(0).long().cumprod(0).sum(0)  # (tokens,)
            settled += int((len(states) - run_of_same).sum())
            tokens += stacked.shape[1]
            bar.update(stacked.shape[1])
    return LensCurve((kl / tokens).tolist(), (agreement / tokens).tolist(), settled / tokens)

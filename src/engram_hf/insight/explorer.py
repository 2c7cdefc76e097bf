"""What the page of `engram-hf explore` computes: the view of a text, the effect on one token, and two continuations.

The page itself is page.py. Several visitors may call these functions at once. They take turns, because silencing a
memory puts hooks on the model. Errors that a visitor may read are raised as `Refusal`. Its sentence names no file.
"""

import html
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .memory_layers import device_of, find_memory_layers
from .showing import View, quoted, show
from .silencing import silenced
from .tracing import Trace, evaluating, trace


LONGEST_TEXT, LONGEST_CONTINUATION, LONGEST_SECONDS = 2000, 128, 60
# A longer text is refused before it is tokenized, so that a visitor cannot keep the tokenizer busy.
CHARACTERS_PER_TOKEN = 20
PREDICTIONS = 5


class Refusal(ValueError):
    """A sentence for a visitor."""


@dataclass(frozen=True)
class Prediction:
    """A next token, as text, and its probability with the memory and without."""

    token: str
    with_memory: float
    without_memory: float


# Layer id and head; None stands for the whole layer.
Part = tuple[int, int | None]


class Explorer:
    """A model and its tokenizer, with limits for visitors.

    Example:
        >>> from engram_hf.insight.explorer import Explorer
        >>> explorer = Explorer(model, tokenizer)
        >>> view = explorer.look("import os, sys")
        >>> len(explorer.predictions(view.trace, position=1)) >= 5
        True
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "a model with a memory",
        longest_text: int = LONGEST_TEXT,
        longest_continuation: int = LONGEST_CONTINUATION,
        longest_seconds: float = LONGEST_SECONDS,
    ):
        """
        Args:
            model: with a memory.
            tokenizer: of the model.
            name: for the page.
            longest_text, longest_continuation: in tokens. A text has at most as many as the model has positions.
            longest_seconds: of one request. The time that it waits for others does not count.

        Raises:
            ValueError: the model has no memory.
        """
        self.layers = find_memory_layers(model, "explore")
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        config = getattr(model, "config", None)
        text_config = config.get_text_config() if config is not None else None
        self.positions = getattr(text_config, "max_position_embeddings", None) or math.inf
        self.longest_text = int(min(longest_text, self.positions))
        self.longest_continuation = longest_continuation
        self.longest_seconds = longest_seconds
        self._turn = threading.Lock()

    def parts(self) -> dict[str, Part]:
        """What can be switched off, by the words for it: layers, and heads of layers."""
        found: dict[str, Part] = {f"layer {layer_id}": (layer_id, None) for layer_id in self.layers}
        for layer_id, layer in self.layers.items():
            count = len(layer.table.head_rows)
            per_order = count // (layer.max_ngram_size - 1)
            for head in range(count):
                found[f"layer {layer_id}, head {head} ({head // per_order + 2}-grams)"] = (layer_id, head)
        return found

    def look(self, text: str) -> View:
        """Trace a text.

        Raises:
            Refusal: the text is empty or too long, or it takes too long.
        """
        self._check(text, self.longest_text)
        with self._turn, self._in_time():
            found = trace(self.model, self.tokenizer, text)
        return show(found)

    def details(self, trace: Trace, position: int, off: Sequence[str] = ()) -> str:
        """What is known of one token, as HTML: n-grams, rows, gates, and the next tokens with the memory and without.

        Args:
            trace: of a text.
            position: of the token.
            off: parts that are silenced at this token for the second prediction; by default the whole memory.

        Raises:
            Refusal: there is no such token or part.
        """
        self._check_position(trace, position)
        rows = [_row("token", quoted(trace.tokens[position]) + f", number {position}, id {trace.token_ids[position]}")]
        rows += [_row(f"{order}-gram", quoted(texts[position])) for order, texts in trace.ngrams.items()]
        for layer_id in trace.layer_ids:
            gates = trace.gates[layer_id][position].tolist()
            shown = ", ".join(f"{gate:.3f}" for gate in gates) if any(gates) else "no memory at this token"
            each = " of each stream" if len(gates) > 1 else ""
            rows.append(_row(f"layer {layer_id}: gate{each}", shown))
            rows.append(_row("share of the residual stream", f"{trace.share[layer_id][position]:.1%}"))
            rows.append(_row("row within each head", " ".join(map(str, trace.row_ids[layer_id][position].tolist()))))
            if trace.trained is not None:
                lookups = trace.trained[layer_id][position]
                rows.append(_row("rows seen in training", f"{int(lookups.sum())} of {len(lookups)}"))
            effect = None if trace.effects is None else trace.effects[layer_id]
            if effect is not None and not math.isnan(effect.gain[position]):
                rows.append(_row("effect on the true next token", f"{effect.gain[position]:+.3f} nats"))
        what = "without " + (", ".join(off) if off else "any memory") + " at this token"
        head = f"<tr><th>next token</th><th>with</th><th>{html.escape(what)}</th></tr>"
        body = "".join(
            f"<tr><td>{html.escape(quoted(each.token))}</td><td>{each.with_memory:.1%}</td>"
            f"<td>{each.without_memory:.1%}</td></tr>"
            for each in self.predictions(trace, position, off)
        )
        return f'<table class="engram-facts">{"".join(rows)}</table><table class="engram-next">{head}{body}</table>'

    @torch.no_grad()
    def predictions(self, trace: Trace, position: int, off: Sequence[str] = ()) -> list[Prediction]:
        """The most likely next tokens after a token, with the memory and with it silenced at this token.

        Args:
            off: parts that are silenced; by default the whole memory.

        Returns:
            the five that are most likely with the memory, then those that are so without it and are not among them.

        Raises:
            Refusal: there is no such token or part.
        """
        self._check_position(trace, position)
        ids = torch.tensor(trace.token_ids[: position + 1], device=device_of(self.model)).expand(2, -1)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        mask[1, -1] = True
        with self._turn, self._in_time(), self._silenced(off or list(self._whole()), mask):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        probabilities = logits.float().softmax(-1)
        best = probabilities.topk(min(PREDICTIONS, probabilities.shape[1])).indices
        chosen = list(dict.fromkeys(best.flatten().tolist()))
        return [
            Prediction(self.tokenizer.decode([token]), *probabilities[:, token].tolist())
            for token in chosen[: PREDICTIONS * 2]
        ]

    @torch.no_grad()
    def continuations(self, prompt: str, off: Sequence[str] = (), new_tokens: int = 40) -> tuple[str, str]:
        """What the model writes after a prompt, and what it writes with parts of its memory switched off, both by
        taking the most likely token each time.

        Args:
            off: parts; by default the whole memory.
            new_tokens: at most.

        Raises:
            Refusal: the prompt is empty or too long, there is no such part, or it takes too long.
        """
        self._check(prompt, self.longest_text)
        if not 1 <= new_tokens <= self.longest_continuation:
            raise Refusal(f"A continuation has 1 to {self.longest_continuation} tokens here, got {new_tokens}.")
        inputs = self.tokenizer(prompt, return_tensors="pt")
        ids = inputs["input_ids"].to(device_of(self.model))
        if ids.shape[1] + new_tokens > self.positions:
            raise Refusal(
                f"The model has {self.positions} positions, too few for {ids.shape[1]} tokens and {new_tokens} more. "
                "Shorten the prompt."
            )
        given: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "max_time": self.longest_seconds / 2}
        given["attention_mask"] = torch.ones_like(ids)
        if self.tokenizer.pad_token_id is None and self.tokenizer.eos_token_id is not None:
            given["pad_token_id"] = self.tokenizer.eos_token_id
        model: Any = self.model
        with self._turn:
            whole = model.generate(ids, **given)
            with self._silenced(off or list(self._whole())):
                silent = model.generate(ids, **given)
        texts = [self.tokenizer.decode(each[0, ids.shape[1] :], skip_special_tokens=True) for each in (whole, silent)]
        return texts[0], texts[1]

    def _whole(self) -> Iterator[str]:
        return (words for words, (_, head) in self.parts().items() if head is None)

    @contextmanager
    def _silenced(self, off: Sequence[str], positions: torch.Tensor | None = None) -> Iterator[None]:
        known: Mapping[str, Part] = self.parts()
        if unknown := [words for words in off if words not in known]:
            raise Refusal(f"This model has no {unknown[0]!r}. It has: {', '.join(self._whole())}, and their heads.")
        with ExitStack() as silences:
            for layer_id, head in (known[words] for words in off):
                heads = None if head is None else [head]
                silences.enter_context(silenced(self.model, [layer_id], positions=positions, heads=heads))
            yield

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Inside this context a forward that begins too late is refused. It is for the visitor whose turn it is."""
        last = time.monotonic() + self.longest_seconds

        def refuse_late(model: nn.Module, args: tuple) -> None:
            if time.monotonic() > last:
                # A trace would take other errors for a model that cannot be given a tree of tokens.
                raise TimeoutError

        hook = self.model.register_forward_pre_hook(refuse_late)
        try:
            with evaluating(self.model):
                yield
        except TimeoutError:
            raise Refusal(
                f"This took longer than {self.longest_seconds:g} seconds and was stopped. Give a shorter text."
            ) from None
        finally:
            hook.remove()

    def _check(self, text: str, most_tokens: int) -> None:
        if not text.strip():
            raise Refusal("There is no text yet. Write or paste one.")
        tokens = 0
        if len(text) <= most_tokens * CHARACTERS_PER_TOKEN:
            tokens = len(self.tokenizer(text)["input_ids"])
            if tokens <= most_tokens:
                return
        size = f"{tokens:,} tokens" if tokens else f"{len(text):,} characters"
        raise Refusal(f"The text is too long: it has {size}, and this page reads {most_tokens:,} tokens at most.")

    @staticmethod
    def _check_position(trace: Trace, position: int) -> None:
        if not 0 <= position < len(trace.tokens):
            raise Refusal(f"The text has tokens 0 to {len(trace.tokens) - 1}, and no token {position}.")


def _row(name: str, value: str) -> str:
    return f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"

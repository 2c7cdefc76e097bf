"""The result of writing facts into a memory: what the model says now, which rows changed, and what else changed.

The functions that measure this are here too. Nothing in this file changes a model.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..insight.intervals import interval
from ..insight.memory_layers import device_of, find_memory_layers
from ..insight.text_rows import BATCH_TOKENS, TextRow, batches, evaluating, run
from .facts import Fact, ids_of, row_of


Around = Callable[[], AbstractContextManager]
# Tokens that are generated after a prompt whose answer has no known length.
ANSWER_TOKENS = 4


class Score(NamedTuple):
    """What a forward says of one fact.

    log_prob: of the whole target, in nats.
    margins: (target tokens,) the logit of each token of the target less the highest other one.
    gates: (target tokens,) the widest gate of all memory layers where the token is predicted; their mean over streams.
    """

    log_prob: float
    margins: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True)
class Answer:
    """What the model says after a prompt, before and after; greedily, as `generate` does it.

    is_target: whether the second one is the target of the fact.
    """

    prompt: str
    before: str
    after: str
    is_target: bool

    @property
    def has_changed(self) -> bool:
        return self.before != self.after


@dataclass(frozen=True)
class FactResult:
    """The result of writing one fact.

    prompt, target: as they were given.
    is_recalled: whether `generate` continues the prompt greedily with the target.
    said_before, said: the greedy continuations, of as many tokens as the target has.
    probability_before, probability: of the whole target.
    margin: how far the target is ahead where it is closest, in logits; below 0 another token is ahead.
    gate: how far the widest gate is open there, from 0 to 1.
    rows: changed rows that the fact reads.
    hottest_row: how often the most frequent of these occurs in the text that rows were counted in.
    why_not: why the fact is not recalled; None where it is.
    paraphrases, related: what the model says to these.
    """

    prompt: str
    target: str
    is_recalled: bool
    said_before: str
    said: str
    probability_before: float
    probability: float
    margin: float
    gate: float
    rows: int
    hottest_row: int
    why_not: str | None
    paraphrases: list[Answer]
    related: list[Answer]


@dataclass(frozen=True)
class RowChange:
    """A changed row: its table, its row id in it, how often it occurs in the text, and the norm of the change."""

    table: str
    row_id: int
    count: int
    norm: float


@dataclass(frozen=True)
class Drift:
    """What changed on held-out text, per token. Intervals are of 95%, over documents; None with one document alone.

    tokens, documents: of the text.
    reading: share of the tokens that read a changed row. At the others of a document that reads none, nothing changes.
    other_choice: share of the tokens after which another next token is the most likely one.
    kl, kl_low, kl_high: Kullback-Leibler divergence in nats: how badly the distribution after replaces the one before.
    loss_before, loss_change, loss_low, loss_high: nats.
    """

    tokens: int
    documents: int
    reading: float
    other_choice: float
    kl: float
    kl_low: float | None
    kl_high: float | None
    loss_before: float
    loss_change: float
    loss_low: float | None
    loss_high: float | None


@dataclass(frozen=True)
class Forgotten:
    """What `forget` has reset.

    text, to: as they were given.
    rows: of the whole n-grams of the text.
    probability_before, probability: of the text after its first token.
    """

    text: str
    to: str
    rows: int
    probability_before: float
    probability: float


@dataclass(frozen=True)
class FactReport:
    """The result of a patch of facts.

    facts: one result each.
    kept: facts that were to stay as they were: (prompt, recalled before, recalled after).
    rows: that changed.
    counted_tokens: of the text that rows were counted in.
    drift: on held-out text.
    nbytes: of the patch: its rows and row ids.
    steps, seconds: of the optimisation; measuring takes more.
    forgotten: of `forget`; None where facts were written.
    """

    facts: list[FactResult]
    kept: list[tuple[str, bool, bool]]
    rows: list[RowChange]
    counted_tokens: int
    drift: Drift
    nbytes: int
    steps: int
    seconds: float
    forgotten: Forgotten | None = None

    @property
    def recalled(self) -> int:
        """How many facts the model knows now."""
        return sum(fact.is_recalled for fact in self.facts)

    def to_json(self) -> str:
        """All numbers as JSON."""
        return json.dumps({**asdict(self), "recalled": self.recalled}, indent=1, ensure_ascii=False)

    def markdown(self) -> str:
        """Tables of the facts and of what failed."""
        paraphrases = [answer for fact in self.facts for answer in fact.paraphrases]
        related = [answer for fact in self.facts for answer in fact.related]
        drift, counts = self.drift, sorted(row.count for row in self.rows)
        lines = []
        if self.forgotten is not None:
            lines += [*_lines_of_forgotten(self.forgotten), *_answers_to(self.facts)]
        elif self.facts:
            lines += [f"{self.recalled} of {len(self.facts)} facts are recalled greedily.", "", *_table(self.facts)]
        if paraphrases:
            knows = sum(answer.is_target for answer in paraphrases)
            lines += ["", f"{knows} of {len(paraphrases)} paraphrases are answered with the target."]
            lines += _list("Not", [answer for answer in paraphrases if not answer.is_target])
        if related:
            changed = [answer for answer in related if answer.has_changed]
            lines += ["", f"{len(changed)} of {len(related)} related prompts are answered in another way."]
            lines += _list("Changed", changed)
        if self.kept:
            lost = [prompt for prompt, before, after in self.kept if before and not after]
            lines += ["", f"{len(lost)} of {len(self.kept)} facts that were to stay are lost{': ' * bool(lost)}"]
            lines[-1] += ", ".join(map(repr, lost)) + "."
        often = f"from {counts[0]:,} to {counts[-1]:,} times" if counts else "never"
        lines += [
            "",
            f"{len(self.rows):,} rows changed, {self.nbytes:,} bytes. In {self.counted_tokens:,} tokens of text they "
            f"occur {often}, {counts[len(counts) // 2] if counts else 0:,} times in the middle.",
            "",
            f"On {drift.tokens:,} tokens of {drift.documents:,} held-out documents the distribution of the next token "
            f"changes by {drift.kl:.4f} nats{_between(drift.kl_low, drift.kl_high)}, and the loss of "
            f"{drift.loss_before:.3f} by {drift.loss_change:+.4f}{_between(drift.loss_low, drift.loss_high)}. "
            f"{drift.reading:.1%} of the tokens read a changed row; after {drift.other_choice:.1%} another token is "
            "the most likely one.",
        ]
        if self.steps:
            lines += ["", f"{self.steps} steps in {self.seconds:.1f} seconds."]
        return "\n".join(lines)

    _repr_markdown_ = __str__ = markdown


def _lines_of_forgotten(forgotten: Forgotten) -> list[str]:
    reset = "zeros" if forgotten.to == "zero" else "the rows of the plain table"
    return [
        f"The n-grams of {_cell(repr(forgotten.text))} now read {reset}: {forgotten.rows:,} rows were reset. The text "
        f"had the probability {forgotten.probability_before:.2g}, and has {forgotten.probability:.2g} now."
    ]


def _answers_to(facts: Sequence[FactResult]) -> list[str]:
    """What is said where it was asked, before and after rows were reset."""
    if not facts:
        return []
    lines = ["", "| prompt | said | says now | target | probability before | now |", "|---|---|---|---|---|---|"]
    for fact in facts:
        words = " | ".join(
            _cell(text) for text in (fact.prompt, *map(repr, (fact.said_before, fact.said, fact.target)))
        )
        lines.append(f"| {words} | {fact.probability_before:.2g} | {fact.probability:.2g} |")
    return lines


def _table(facts: Sequence[FactResult]) -> list[str]:
    lines = ["| prompt | says | probability | before | margin | its hottest row | |", "|---|---|---|---|---|---|---|"]
    for fact in facts:
        numbers = f"{fact.probability:.2g} | {fact.probability_before:.2g} | {fact.margin:+.2f} | {fact.hottest_row:,}"
        why = "" if fact.why_not is None else _cell(f"should say {fact.target!r}: {fact.why_not}")
        lines.append(f"| {_cell(fact.prompt)} | {_cell(repr(fact.said))} | {numbers} | {why} |")
    return lines


def _list(word: str, answers: Sequence[Answer]) -> list[str]:
    if not answers:
        return []
    shown = [f"{_cell(each.prompt)} → {_cell(repr(each.after))}" for each in answers]
    before = [_cell(repr(each.before)) for each in answers]
    return ["", *(f"* {word}: {each}, before {was}" for each, was in zip(shown, before, strict=True))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.4f} to {high:.4f})"


# Measuring.


@contextmanager
def watching_gates(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list of the gates of each memory layer in turn, (batch, seq) on the CPU, their mean over streams."""
    seen: list[torch.Tensor] = []
    layers = find_memory_layers(model, "memorize")
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: seen.append(output[1].detach().float().mean(-1).cpu()))
        for layer in layers.values()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def score_facts(model: nn.Module, rows: Sequence[TextRow]) -> list[Score]:
    """What forwards say of facts.

    Args:
        model: with a memory.
        rows: of `row_of`.
    """
    scores = []
    with evaluating(model):
        for batch in batches(rows, BATCH_TOKENS):
            with watching_gates(model) as seen:
                logits = run(model, batch).float().cpu()
            widest = torch.stack(seen).amax(0)  # (batch, seq)
            for row, is_scored, ids, gates in zip(logits, batch.is_scored, batch.input_ids, widest):
                before = is_scored[1:].nonzero().flatten()
                wanted, said = ids[before + 1], row[before]
                log_prob = said.log_softmax(-1).gather(1, wanted.unsqueeze(1)).sum()
                scores.append(Score(float(log_prob), margins_of(said, wanted), gates[before]))
    return scores


def margins_of(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far each wanted token is ahead of all others: (n, vocabulary) and (n,) to (n,)."""
    own = logits.gather(1, wanted.unsqueeze(1)).squeeze(1)
    return own - logits.scatter(1, wanted.unsqueeze(1), -torch.inf).amax(1)


def answers_of(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[str]:
    """What `generate` says greedily after each prompt alone, as text of so many tokens.

    One prompt at a time, as users ask it: a batch would give other logits in the last bits.
    """
    known: dict[tuple, str] = {}
    device, asked = device_of(model), [(tuple(prompt), length) for prompt, length in zip(prompts, lengths, strict=True)]
    with evaluating(model):
        for prompt, length in dict.fromkeys(asked):
            ids = torch.tensor([list(prompt)], device=device)
            said = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=False,
                num_beams=1,
                pad_token_id=_padding_of(tokenizer),
            )
            known[prompt, length] = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=False)
    return [known[each] for each in asked]


def _padding_of(tokenizer: Any) -> int:
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((each for each in known if each is not None), 0)


class Asked(NamedTuple):
    """All prompts that a report asks: those of each fact, its paraphrases and what is related to it."""

    facts: list[Fact]
    prompts: list[list[int]]
    lengths: list[int]
    targets: list[str]


def questions_of(tokenizer: Any, facts: Sequence[Fact]) -> Asked:
    """The prompts of facts as ids, with what is wanted after each of them: the fact, its paraphrases, its related ones.

    Raises:
        ValueError: as `ids_of`.
    """
    asked = Asked(list(facts), [], [], [])
    for fact in facts:
        for prompt in (fact.prompt, *fact.paraphrases, *fact.related):
            is_fact = prompt not in fact.related
            target = fact.target if is_fact else ""
            ids, wanted = ids_of(tokenizer, prompt, target) if is_fact else (tokenizer(prompt)["input_ids"], [])
            asked.prompts.append(list(ids))
            asked.lengths.append(len(wanted) or ANSWER_TOKENS)
            asked.targets.append(tokenizer.decode(wanted, skip_special_tokens=False) if wanted else "")
    return asked


def answers_by_fact(asked: Asked, before: list[str], after: list[str]) -> list[list[Answer]]:
    """For each fact the answers to its own prompt, to its paraphrases and to what is related, in this order."""
    found, answers = [], zip(before, after, asked.targets, strict=True)
    for fact in asked.facts:
        prompts = (fact.prompt, *fact.paraphrases, *fact.related)
        found.append([Answer(p, b, a, bool(t) and a == t) for p, (b, a, t) in zip(prompts, answers)])
    return found


def measure_drift(
    model: nn.Module,
    rows: Sequence[TextRow],
    before: Around,
    after: Around,
    reads_change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    bar: Any = None,
) -> Drift:
    """Compare a model with itself on held-out text.

    Args:
        model: a causal language model.
        rows: of text.
        before, after: give the context of a forward.
        reads_change: (batch, seq) token ids to (batch, seq) bool, which of them read something that has changed. A
            batch without one is the same before and after, bit for bit, and is computed once. None: all do.
        bar: progress bar, which counts rows.
    """
    kls, changes, losses, tokens, reading, other = [], [], [], [], 0, 0
    with evaluating(model):
        for batch in batches(rows, BATCH_TOKENS):
            is_token = batch.is_token
            is_read = is_token if reads_change is None else reads_change(batch.input_ids) & is_token
            with before():
                old = run(model, batch).float().cpu().log_softmax(-1)
            is_scored, wanted = batch.is_scored[:, 1:], batch.input_ids[:, 1:].unsqueeze(-1)
            old_loss = -old[:, :-1].gather(-1, wanted).squeeze(-1).double() * is_scored
            losses.append(old_loss.sum(1))
            tokens.append(is_scored.sum(1))
            reading += int(is_read.sum())
            if is_read.any():
                with after():
                    new = run(model, batch).float().cpu().log_softmax(-1)
                new_loss = -new[:, :-1].gather(-1, wanted).squeeze(-1).double() * is_scored
                kl = F.kl_div(new, old, reduction="none", log_target=True).sum(-1).double() * is_token
                other += int(((new.argmax(-1) != old.argmax(-1)) & is_token).sum())
                kls.append(kl.sum(1) / is_token.sum(1))
                changes.append(new_loss.sum(1) - losses[-1])
            else:
                kls.append(torch.zeros(len(is_token), dtype=torch.float64))
                changes.append(kls[-1])
            if bar is not None:
                bar.update(len(is_token))
    documents, counts = [row.document for row in rows], torch.tensor([len(row.ids) for row in rows])
    predicted = torch.cat(tokens)
    kl_mean, *kl_ends = interval(torch.cat(kls), documents, counts)
    per_token = torch.cat(changes) / predicted.clamp_min(1)
    change, *ends = interval(per_token, documents, predicted)
    is_sure = len(set(documents)) > 1
    total = int(counts.sum())
    return Drift(
        tokens=total,
        documents=len(set(documents)),
        reading=reading / total,
        other_choice=other / total,
        kl=kl_mean,
        kl_low=kl_ends[0] if is_sure else None,
        kl_high=kl_ends[1] if is_sure else None,
        loss_before=float(torch.cat(losses).sum() / predicted.sum()),
        loss_change=change,
        loss_low=ends[0] if is_sure else None,
        loss_high=ends[1] if is_sure else None,
    )


def rows_of_facts(tokenizer: Any, facts: Sequence[Fact]) -> list[TextRow]:
    """Facts as rows of text, in their order."""
    return [row_of(tokenizer, fact.prompt, fact.target) for fact in facts]

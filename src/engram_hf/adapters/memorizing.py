"""Writing facts into a memory: which rows have to change so that a model says something else?

`memorize` searches by gradient for small changes of the rows that the n-grams of a fact read. Changing a row costs more
if more text reads it. The result is a row patch (row_patches.py): the model is never written to, and the patch can be
taken out. Nothing is drawn at random, so the same call gives the same patch. arXiv 2606.19172 also edits facts by
gradient on the rows of an Engram table.
"""

import math
import pydoc_data.topics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer

from ..counting import RowCounts
from ..insight.memory_layers import find_memory_layers, memory_of
from ..insight.row_use import hash_rows
from ..insight.silencing import refuse_compiled
from ..insight.text_rows import BATCH_TOKENS, TextRow, batches, progress, rows_for, run
from ..insight.tracing import evaluating
from ..modeling.table_patches import ADD, REPLACE, RowPatch, asked_of
from .fact_reports import (
    Asked,
    FactReport,
    FactResult,
    Forgotten,
    RowChange,
    Score,
    answers_by_fact,
    answers_of,
    margins_of,
    measure_drift,
    questions_of,
    rows_of_facts,
    score_facts,
)
from .facts import as_fact, as_facts
from .row_patches import add_patch, make_patch, remove_patch, with_tables


# Of the steps. Chosen on the demo's model and on SmolLM2-135M; rates fall to a tenth.
LEARNING_RATE, BETAS = 0.15, (0.9, 0.99)
# What a fact that does not hold counts more after each step, and one that is so many margins ahead counts less: each
# fact ends up with the changes that it needs, and not with more.
GROWTH, DECAY, MARGINS_AHEAD = 1.05, 0.95, 1.5
# How far tokens are pulled, in margins.
PULLED_MARGINS = 2
FACTS_OF_BATCH = 64
# A name that no user gives.
TRIED = "memorizing"
# Of the text that is taken where none is given.
CHARACTERS_OF_DOCUMENT = 500
# A row that more than one token in so many reads is shared by too much.
TOKENS_PER_LOOKUP = 200
SHUT_GATE = 0.05

RowsOfTables = dict[int, torch.Tensor]


def memorize(
    model: nn.Module, tokenizer: Any, prompt: str, target: str, *, name: str = "fact", **options: Any
) -> tuple[RowPatch, FactReport]:
    """Find changed rows with which a model continues a prompt greedily with a target.

    Args:
        model: a causal language model with a memory: an EngramMoE, or a model after `add_engram`. It stays as it is.
        tokenizer: of the model.
        prompt, target: text; see `Fact`.
        name: of the patch.
        options: `paraphrases` and `related`, lists of prompts, and everything that `memorize_many` takes.

    Returns:
        the patch, for `add_patch`, `save_patch` and their like, and the report.

    Raises:
        ValueError: as `memorize_many`.

    Example:
        >>> patch, report = memorize(model, tokenizer, "Zorvania is", " big", text=["It is so. " * 9] * 4)
        >>> report.recalled, report.facts[0].said
        (1, ' big')
        >>> add_patch(model, patch)
    """
    parts = {part: options.pop(part) for part in ("paraphrases", "related") if part in options}
    fact = as_fact({"prompt": prompt, "target": target, **parts}, "The fact")
    return memorize_many(model, tokenizer, [fact], name=name, **options)


def memorize_many(
    model: nn.Module,
    tokenizer: Any,
    facts: Any,
    *,
    text: Iterable[Any] | None = None,
    held_out: Iterable[Any] | None = None,
    keep: Any = (),
    name: str = "facts",
    margin: float = 0.25,
    caution: float = 100.0,
    max_steps: int = 120,
    batch_size: int = FACTS_OF_BATCH,
) -> tuple[RowPatch, FactReport]:
    """Find changed rows with which a model continues each prompt greedily with its target.

    All rows that the n-grams of prompt and target read may change. Those of the name that a fact is about count too:
    the attention above brings them to the place of the answer. A change costs the more, the more of the text reads its
    row. Facts of a batch are sought together, until each target is ahead by the margin. A fact that does not hold
    counts more with every step, and one that is well ahead counts less. If some never hold, the step with most facts
    wins, and the report says why the others failed.

    Args:
        model: a causal language model with a memory; see `memorize`. Patches that are active count as its rows.
        tokenizer: of the model.
        facts: facts, dicts or pairs, or a file of JSON lines with `prompt`, `target` and, if you like, `paraphrases`
            and `related`; see `Fact`.
        text: rows of text as the model meets it, in which rows are counted; see `insight.text_rows.read_rows`. By
            default the help topics of Python.
        held_out: rows of text in which drift is measured. By default every second document of `text`, which then does
            not count.
        keep: facts that hold and are to hold afterwards.
        name: of the patch.
        margin: by how much a target is to be ahead of every other token, in logits.
        caution: the price of changes. More of it leaves other text more as it was, and fewer facts hold.
        max_steps: of the optimisation of a batch.
        batch_size: facts of a batch. Later batches keep the facts of earlier ones.

    Returns:
        a patch of differences, in float32, and the report.

    Raises:
        ValueError: the model has no memory or is compiled; a fact is none; the text has no token; an option is out of
            its range.

    Example:
        >>> facts = [("The capital of Zorvania is", " big"), {"prompt": "Velspar is", "target": " red"}]
        >>> patch, report = memorize_many(model, tokenizer, facts, text=["It is so. " * 9] * 4)
        >>> report.recalled, patch.mode
        (2, 'add')
    """
    for option, value, kind, least, words in (
        ("margin", margin, Real, 0, "a number"),
        ("caution", caution, Real, 0, "a number"),
        ("max_steps", max_steps, Integral, 1, "a whole number"),
        ("batch_size", batch_size, Integral, 1, "a whole number"),
    ):
        if not isinstance(value, kind) or not least <= value < math.inf:
            raise ValueError(f"{option} must be {words} of at least {least}, got {value!r:.80}.")
    memory = _Memory(model, "memorize")
    wanted, kept = as_facts(facts), as_facts(keep) if keep else []
    asked = questions_of(tokenizer, wanted)
    texts = _Texts(memory, tokenizer, text, held_out, "text")
    rows, kept_rows = rows_of_facts(tokenizer, wanted), rows_of_facts(tokenizer, kept)
    before = _Said(model, tokenizer, asked, rows, kept_rows)
    start, steps = time.perf_counter(), 0
    changes: dict[int, Changes] = {}
    with progress(-(-len(rows) // batch_size) * max_steps, "memorize", "step") as bar:
        for first in range(0, len(rows), batch_size):
            end = min(first + batch_size, len(rows))
            # Only what holds can be lost.
            guards = [row for row, is_held in zip(kept_rows, before.holds(len(rows))) if is_held]
            with memory.laid_over(_as_patch(memory, changes)):
                earlier = [bool((score.margins > 0).all()) for score in score_facts(model, rows[:first])]
                guards += [row for row, is_held in zip(rows[:first], earlier) if is_held]
                sought = _Search(memory, rows[first:end], guards, texts, margin, caution, max_steps)
                found = sought.run(bar)
            steps += sought.steps
            changes = _added_up(changes, found)
    seconds = time.perf_counter() - start
    patch = _as_patch(memory, changes, name, {"made_by": "memorize", "facts": len(wanted), "steps": steps})
    with memory.laid_over(patch):
        after = _Said(model, tokenizer, asked, rows, kept_rows)
    reasons = _why_not(memory, rows, after, texts)
    return patch, _report(memory, patch, asked, before, after, texts, rows, reasons, steps, seconds)


def forget(
    model: nn.Module,
    text: str,
    tokenizer: Any = None,
    *,
    to: str = "zero",
    facts: Any = (),
    counted: Iterable[Any] | None = None,
    held_out: Iterable[Any] | None = None,
    name: str = "forgotten",
) -> tuple[RowPatch, FactReport]:
    """Reset the rows that the n-grams of a text read, as a patch.

    Every n-gram that lies in the text as a whole loses its rows. Other n-grams that share them lose them too: the
    report says how often they occur, what changed, and how probable the text was and is. What a model knows from its
    other weights it does not forget.

    Args:
        model: with a memory. It stays as it is.
        text: its n-grams; with the space before it, if it has one in the middle of a text.
        tokenizer: of the model; by default the one that lies where the model was loaded from.
        to: "zero" for rows of zeros, "base" for the rows of the plain table under the patches that are active.
        facts: what the report asks before and after; see `memorize_many`.
        counted, held_out: rows of text, as `text` and `held_out` of `memorize_many`.
        name: of the patch.

    Returns:
        a patch that replaces rows, and the report.

    Raises:
        TypeError: the text is no string.
        ValueError: the model has no memory or is compiled; no tokenizer was given or lies beside the model; the text
            has no n-gram; `to` is something else; no active patch has changed these rows.

    Example:
        >>> patch, report = forget(model, " Zorvania", tokenizer, counted=["It is so. " * 9] * 4)
        >>> patch.mode, len(report.rows) == patch.num_rows
        ('replace', True)
    """
    if to not in ("zero", "base"):
        raise ValueError(f'to must be "zero" or "base", got {to!r}.')
    if not isinstance(text, str):
        raise TypeError(
            f"forget takes the model, the text and then the tokenizer; the text is a {type(text).__name__}."
        )
    memory = _Memory(model, "forget")
    tokenizer = _tokenizer_beside(model) if tokenizer is None else tokenizer
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
    row_ids = memory.rows_of_ngrams(ids)
    if not any(len(each) for each in row_ids.values()):
        raise ValueError(f"The text {text!r:.80} has {ids.shape[1]} tokens, and no n-gram. Give at least two tokens.")
    if to == "base":
        row_ids = memory.patched(row_ids)
    known = as_facts(facts) if facts else []
    asked, rows = questions_of(tokenizer, known), rows_of_facts(tokenizer, known)
    texts = _Texts(memory, tokenizer, counted, held_out, "counted")
    # The text itself stands behind the facts: nothing predicts its first token.
    whole = TextRow(ids[0], torch.arange(ids.shape[1]) > 0, text)
    before = _Said(model, tokenizer, asked, rows, [whole])
    made = {
        memory.names[layer_id]: (
            each,
            memory.own_rows(layer_id, each) if to == "base" else memory.zeros(layer_id, each),
        )
        for layer_id, each in row_ids.items()
        if len(each)
    }
    patch = make_patch(model, name, made, REPLACE, {"made_by": "forget", "to": to})
    with memory.laid_over(patch):
        after = _Said(model, tokenizer, asked, rows, [whole])
    was, now = (math.exp(said.scores[-1].log_prob) for said in (before, after))
    reasons = ["its rows were reset"] * len(rows)
    report = _report(memory, patch, asked, before, after, texts, rows, reasons, 0, 0.0)
    return patch, replace(report, kept=[], forgotten=Forgotten(text, to, patch.num_rows, was, now))


def _tokenizer_beside(model: nn.Module) -> Any:
    """
    Raises:
        ValueError: there is none where the model was loaded from.
    """
    where = getattr(model, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer lies in {where!r}. Give forget one: forget(model, text, tokenizer).") from error


class Changes(NamedTuple):
    """Differences of rows of one table: row ids of the table, (n,) ascending, and (n, head_dim) float32."""

    row_ids: torch.Tensor
    rows: torch.Tensor


class _Memory:
    """The memory of a model, and what row ids its texts read. Layer ids stand for tables."""

    def __init__(self, model: nn.Module, who: str):
        """
        Raises:
            ValueError: the model has no memory, or is compiled; a context hides the patches that are tried.
        """
        self.model = model
        self.layers = find_memory_layers(model, who)
        if any(asked_of(layer.table.patches) is not None for layer in self.layers.values()):
            raise ValueError(
                f"{who} lays patches over the tables, and use_patches or disable_patches hides them. Call it outside "
                "of these contexts. Choose the patches that count with set_patches(model, names)."
            )
        refuse_compiled(model)
        self.hash = memory_of(model)[0]
        names = {id(table): name for name, table in with_tables(model).named_tables().items()}
        # Name of the table of a layer inside the base model.
        self.names = {layer_id: names[id(layer.table)] for layer_id, layer in self.layers.items()}
        self._tried = 0

    def row_ids(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> RowsOfTables:
        """(batch, seq) token ids to layer id to (batch, seq, heads) row ids of its table, on the CPU."""
        hashed = self.hash(ids.to(self.hash.device), None, mask)
        first_rows = {layer_id: layer.table.first_rows_of_heads.cpu() for layer_id, layer in self.layers.items()}
        return {layer_id: hashed.row_ids[layer_id].cpu() + first_rows[layer_id] for layer_id in self.layers}

    def rows_of(self, rows: Sequence[TextRow]) -> RowsOfTables:
        """Layer id to the distinct row ids that rows of text read, the last token of each left out: it predicts
        nothing."""
        found: dict[int, list[torch.Tensor]] = {layer_id: [] for layer_id in self.layers}
        for row in rows:
            for layer_id, row_ids in self.row_ids(row.ids[:-1].unsqueeze(0)).items():
                found[layer_id].append(row_ids.flatten())
        return {layer_id: torch.cat(each).unique() for layer_id, each in found.items()}

    def rows_of_ngrams(self, ids: torch.Tensor) -> RowsOfTables:
        """(1, seq) token ids to the distinct row ids of the n-grams that lie in them as a whole."""
        found = {}
        for layer_id, row_ids in self.row_ids(ids).items():
            heads = row_ids.shape[-1] // (self.layers[layer_id].max_ngram_size - 1)
            parts = row_ids[0].split(heads, dim=-1)
            found[layer_id] = torch.cat([part[order - 1 :].flatten() for order, part in enumerate(parts, 2)]).unique()
        return found

    def patched(self, row_ids: RowsOfTables) -> RowsOfTables:
        """Those that active patches have changed.

        Raises:
            ValueError: there is none.
        """
        found = {}
        for layer_id, each in row_ids.items():
            is_changed = (self.seen_rows(layer_id, each) != self.own_rows(layer_id, each)).any(-1)
            found[layer_id] = each[is_changed]
        if not any(len(each) for each in found.values()):
            raise ValueError("No active patch has changed a row of this text, so there is no base to go back to.")
        return found

    @torch.no_grad()
    def seen_rows(self, layer_id: int, row_ids: torch.Tensor) -> torch.Tensor:
        """(n,) to (n, head_dim) float32: the rows as a forward sees them, under the patches that are active."""
        table = self.layers[layer_id].table
        first_rows = table.first_rows_of_heads.cpu()
        heads = torch.searchsorted(first_rows, row_ids, right=True) - 1
        looked_up = torch.zeros(len(row_ids), len(first_rows), dtype=torch.int64)
        looked_up[torch.arange(len(row_ids)), heads] = row_ids - first_rows[heads]
        rows = table(looked_up.to(table.home)).float().cpu().unflatten(-1, (len(first_rows), table.head_dim))
        return rows[torch.arange(len(row_ids)), heads]

    @torch.no_grad()
    def own_rows(self, layer_id: int, row_ids: torch.Tensor) -> torch.Tensor:
        """(n,) to (n, head_dim) float32: the rows of the plain table."""
        table = self.layers[layer_id].table
        return table.stored_as.decode(table.gather_rows(row_ids.to(table.home)), table.head_dim).float().cpu()

    def zeros(self, layer_id: int, row_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(row_ids), self.layers[layer_id].table.head_dim)

    @contextmanager
    def laid_over(self, patch: RowPatch) -> Iterator[None]:
        """The model under a patch, on top of those that are active."""
        self._tried += 1
        name = f"{TRIED} {self._tried}"
        add_patch(self.model, replace(patch, name=name))
        try:
            yield
        finally:
            remove_patch(self.model, name)


class _Texts:
    """Text that counts rows, and text that is held out.

    counts: layer id to how often each row of its table is read; `tokens` in all.
    held_out: rows of text.
    """

    def __init__(
        self, memory: _Memory, tokenizer: Any, text: Iterable[Any] | None, held_out: Iterable[Any] | None, called: str
    ):
        """
        Args:
            memory: of the model.
            tokenizer: for texts.
            text, held_out: as `memorize_many` takes them.
            called: the argument with which the user gave `text`, for messages.

        Raises:
            ValueError: there is no text, or too little to hold a document out.
        """
        if text is None:
            text, own = _help_topics()
            held_out = own if held_out is None else held_out
        counted = rows_for(memory.model, text, tokenizer, called)
        if held_out is None:
            documents = list(dict.fromkeys(row.document for row in counted))
            if len(documents) < 2:
                raise ValueError(f"{called} is one document, so none can be held out. Give more, or held_out= too.")
            chosen = set(documents[1::2])
            self.held_out = [row for row in counted if row.document in chosen]
            counted = [row for row in counted if row.document not in chosen]
        else:
            self.held_out = rows_for(memory.model, held_out, tokenizer, "held_out")
        self.held_out = [row for row in self.held_out if bool(row.is_scored[1:].any())]
        if not self.held_out:
            raise ValueError("The held-out text predicts no token: each of its rows has one token. Give longer rows.")
        self.tokens = sum(len(row.ids) for row in counted)
        self.counts = {layer_id: RowCounts(layer.table.head_rows.cpu()) for layer_id, layer in memory.layers.items()}
        with progress(len(counted), "count rows") as bar:
            for hashed in hash_rows(memory.model, counted, bar):
                for layer_id, counts in self.counts.items():
                    counts.add(hashed.row_ids[layer_id] + counts.first_rows)


def _help_topics() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Text that every Python brings: every second one of its help topics, and the beginnings of the others."""
    topics = pydoc_data.topics.topics
    documents = [{"document": name, "text": topics[name]} for name in sorted(topics)]
    return documents[::2], [{**each, "text": each["text"][:CHARACTERS_OF_DOCUMENT]} for each in documents[1::2]]


class _Said:
    """What a model says of all prompts of a report, as it is at this moment.

    answers: to each of `asked.prompts`.
    scores: of the facts, and then of those to keep.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, asked: Asked, rows: Sequence[TextRow], kept: Sequence[TextRow]
    ):
        self.answers = answers_of(model, tokenizer, asked.prompts, asked.lengths)
        self.kept = kept
        self.scores: list[Score] = score_facts(model, [*rows, *kept])

    def holds(self, first: int) -> list[bool]:
        """Whether each fact from this one on holds: every token of its target is ahead."""
        return [bool((score.margins > 0).all()) for score in self.scores[first:]]


class _Search:
    """The search for changes with which the facts of one batch hold."""

    def __init__(
        self,
        memory: _Memory,
        rows: Sequence[TextRow],
        guards: Sequence[TextRow],
        texts: "_Texts",
        margin: float,
        caution: float,
        max_steps: int,
    ):
        """
        Args:
            memory: patches that are active count as its rows.
            rows: the facts.
            guards: facts that hold and are to hold afterwards.
            texts: what says how often a row is read.
            margin, caution, max_steps: as `memorize_many` takes them.
        """
        self.memory, self.margin, self.caution, self.max_steps = memory, margin, caution, max_steps
        self.steps, self.num_facts = 0, len(rows)
        touched = memory.rows_of(rows)
        # A guard that reads none of these rows cannot be lost.
        guards = [row for row in guards if any(_shares(touched, memory.rows_of([row])))]
        self.batches = list(batches([*rows, *guards], BATCH_TOKENS))
        self.weights = torch.ones(len(rows) + len(guards))
        self.changes = {
            layer_id: Changes(each, torch.zeros(len(each), memory.layers[layer_id].table.head_dim, requires_grad=True))
            for layer_id, each in touched.items()
        }
        # (n, 1) how often each row is read per token of text. One more than was seen, since other text reads others.
        self.prices = {
            layer_id: ((texts.counts[layer_id].counts[each] + 1) / max(texts.tokens, 1)).unsqueeze(-1)
            for layer_id, each in touched.items()
        }

    def run(self, bar: Any) -> dict[int, Changes]:
        """The best changes of all steps: with most facts that hold by the margin, and the least price among these."""
        leaves = [change.rows for change in self.changes.values()]
        optimizer = torch.optim.Adam(leaves, lr=LEARNING_RATE, betas=BETAS)
        best, kept = (-1, 0.0), [leaf.detach().clone() for leaf in leaves]
        model, patch = self.memory.model, _as_patch(self.memory, self.changes)
        with self.memory.laid_over(patch), _frozen(model), evaluating(model), torch.enable_grad():
            for step in range(self.max_steps + 1):
                price = torch.stack(
                    [(self.prices[layer_id] * change.rows.square()).sum() for layer_id, change in self.changes.items()]
                ).sum()
                ahead = self._backward()
                holds = ahead >= self.margin
                reached = (int(holds.sum()), -float(price.detach()))
                if reached > best:
                    best, kept = reached, [leaf.detach().clone() for leaf in leaves]
                if step == self.max_steps or bool(holds.all()):
                    break
                (self.caution * price).backward()
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * (1 - 0.9 * step / self.max_steps)
                optimizer.step()
                optimizer.zero_grad()
                self.weights[~holds] *= GROWTH
                self.weights[ahead >= MARGINS_AHEAD * self.margin] *= DECAY
                self.steps += 1
                bar.update(1)
        return {
            layer_id: Changes(change.row_ids, rows)
            for (layer_id, change), rows in zip(self.changes.items(), kept, strict=True)
        }

    def _backward(self) -> torch.Tensor:
        """Leave the gradients of all facts at the changes, and say how far each is ahead where it is closest: (facts,).

        A token's loss is what it lacks of the place to which it is pulled. It pushes against the one token that is
        closest to it, and leaves all others where they are, so rows change less than by cross-entropy.
        """
        closest, first = torch.full((len(self.weights),), torch.inf), 0
        for batch in self.batches:
            logits = run(self.memory.model, batch)
            owners, places = batch.is_scored[:, 1:].nonzero(as_tuple=True)
            wanted = batch.input_ids[owners, places + 1].to(logits.device)
            said = logits[owners.to(logits.device), places.to(logits.device)].float()  # (target tokens, vocabulary)
            ahead = margins_of(said, wanted).cpu()
            closest.scatter_reduce_(0, first + owners, ahead.detach(), "amin")
            losses = F.relu(PULLED_MARGINS * self.margin - ahead) * self.weights[first + owners]
            if (losses > 0).any():
                losses.sum().backward()
            first += len(batch.input_ids)
        return closest


def _shares(one: RowsOfTables, other: RowsOfTables) -> Iterator[bool]:
    """For each table, whether both have a row of it."""
    return (bool(torch.isin(one[layer_id], other[layer_id]).any()) for layer_id in one)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside this context no parameter of a model gets a gradient; afterwards those do that did."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _added_up(one: Mapping[int, Changes], other: Mapping[int, Changes]) -> dict[int, Changes]:
    """Differences of the same tables, those of a row in both added up."""
    found = dict(one)
    for layer_id, change in other.items():
        if layer_id in found:
            row_ids, back = torch.cat([found[layer_id].row_ids, change.row_ids]).unique(return_inverse=True)
            rows = torch.zeros(len(row_ids), change.rows.shape[1])
            change = Changes(row_ids, rows.index_add_(0, back, torch.cat([found[layer_id].rows, change.rows])))
        found[layer_id] = change
    return found


def _as_patch(
    memory: _Memory, changes: Mapping[int, Changes], name: str = "changes", provenance: dict[str, Any] | None = None
) -> RowPatch:
    rows = {memory.names[layer_id]: (change.row_ids, change.rows) for layer_id, change in changes.items()}
    return make_patch(memory.model, name, rows, ADD, provenance)


def _why_not(memory: _Memory, rows: Sequence[TextRow], said: _Said, texts: _Texts) -> list[str]:
    """For each fact the likeliest reason why it is not recalled, with the figures that speak for it."""
    read = [memory.row_ids(row.ids.unsqueeze(0)) for row in rows]
    # What each n-gram is to be followed by: its rows in all tables, and the token.
    wanted: dict[tuple, set[int]] = {}
    for row, row_ids in zip(rows, read):
        for place in (row.is_scored.nonzero().flatten() - 1).tolist():
            wanted.setdefault(_key(row_ids, place), set()).add(int(row.ids[place + 1]))
    reasons = []
    for row, row_ids, score in zip(rows, read, said.scores):
        at = int(score.margins.argmin())
        place = int(row.is_scored.nonzero()[0]) - 1 + at
        others = len(wanted[_key(row_ids, place)]) - 1
        gate, behind = float(score.gates[at]), -float(score.margins[at])
        lookups = min(int(texts.counts[layer_id].counts[each[0, place]].min()) for layer_id, each in row_ids.items())
        if others:
            reasons.append(f"its last n-gram is also that of {others} other facts with another target")
        elif gate < SHUT_GATE:
            reasons.append(f"the gate is shut there: it opens by {gate:.3f} of 1")
        elif lookups * TOKENS_PER_LOOKUP > texts.tokens:
            reasons.append(
                f"its rows are shared by too much: each is read at least {lookups:,} times in {texts.tokens:,} tokens"
            )
        elif behind < 0:
            reasons.append(f"it is {-behind:.2f} logits ahead in a batch, and not in `generate`; ask for more margin")
        else:
            reasons.append(f"another token is {behind:.2f} logits ahead; allow more steps, or less caution")
    return reasons


def _key(row_ids: RowsOfTables, place: int) -> tuple:
    return tuple(tuple(each[0, place].tolist()) for each in row_ids.values())


def _report(
    memory: _Memory,
    patch: RowPatch,
    asked: Asked,
    before: _Said,
    after: _Said,
    texts: _Texts,
    rows: Sequence[TextRow],
    reasons: Sequence[str],
    steps: int,
    seconds: float,
) -> FactReport:
    row_changes, changed = [], {}
    for layer_id, name in memory.names.items():
        if name not in patch.tables:
            changed[layer_id] = torch.zeros(0, dtype=torch.int64)
            continue
        row_ids = changed[layer_id] = patch.tables[name].row_ids
        given = patch.tables[name].rows.detach().float()
        norms = (given if patch.mode == ADD else given - memory.seen_rows(layer_id, row_ids)).norm(dim=-1)
        counts = texts.counts[layer_id].counts[row_ids]
        row_changes += [RowChange(name, *each) for each in zip(row_ids.tolist(), counts.tolist(), norms.tolist())]

    def reads_change(ids: torch.Tensor) -> torch.Tensor:
        each = memory.row_ids(ids)
        return torch.stack([torch.isin(each[layer_id], changed[layer_id]).any(-1) for layer_id in each]).any(0)

    with progress(len(texts.held_out), "drift") as bar:
        drift = measure_drift(
            memory.model, texts.held_out, nullcontext, lambda: memory.laid_over(patch), reads_change, bar
        )
    results = []
    answers = answers_by_fact(asked, before.answers, after.answers)
    for number, (fact, (own, *others)) in enumerate(zip(asked.facts, answers, strict=True)):
        old, new, read = before.scores[number], after.scores[number], memory.rows_of([rows[number]])
        mine = {layer_id: each[torch.isin(each, changed[layer_id])] for layer_id, each in read.items()}
        hottest = [int(texts.counts[layer_id].counts[each].max()) for layer_id, each in mine.items() if len(each)]
        at = int(new.margins.argmin())
        results.append(
            FactResult(
                prompt=fact.prompt,
                target=fact.target,
                is_recalled=own.is_target,
                said_before=own.before,
                said=own.after,
                probability_before=float(torch.tensor(old.log_prob).exp()),
                probability=float(torch.tensor(new.log_prob).exp()),
                margin=float(new.margins[at]),
                gate=float(new.gates[at]),
                rows=sum(len(each) for each in mine.values()),
                hottest_row=max(hottest, default=0),
                why_not=None if own.is_target else reasons[number],
                paraphrases=others[: len(fact.paraphrases)],
                related=others[len(fact.paraphrases) :],
            )
        )
    first = len(rows)
    kept = [
        (row.document, was, still)
        for row, was, still in zip(before.kept, before.holds(first), after.holds(first), strict=True)
    ]
    return FactReport(results, kept, row_changes, texts.tokens, drift, patch.nbytes, steps, seconds)

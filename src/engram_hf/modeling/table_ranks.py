"""How a rank gets rows that another rank holds: it asks, and a thread of each owner answers.

Lookups are questions and not collectives, because a collective makes every rank look rows up whenever one does: ranks
could not evaluate texts of different lengths, have no tokens, or save alone. Gradients do travel by collectives, in
training/row_exchange.py, since all ranks end a backward together.

Held ids travel (table_cut.py says what they are), with a check number of the row ids that they stand for.
"""

import atexit
import json
import math
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from transformers.utils import logging

from .disk_safetensors import TensorContent
from .table_cut import RowCut, check_number
from .table_gradients import Grouping


# Kinds of requests. `ROWS` is answered with rows, and `COMING` not at all; tables and optimizers answer the others.
ROWS, WHY, CHANGED, BASE, SAVED, SOURCE, STATE, LEAVE, COMING = range(9)
HEAD_TAG, FIRST_TAG, TAGS = 1, 16, 2**24
# Kind, number of the table, steps that it has made, bytes of what follows, tag of the answer, bytes of an answer with
# rows, check number of the rows, tag under which they were announced (0 where they were not), number of the lookup by
# which gradients may name these rows (0 for none).
HEAD_NUMBERS = 9
# Before the rows of an answer, so that they are aligned for every type.
STATUS_BYTES = 16
DONE, FOREIGN, FAILED, GONE = range(4)
# Fetches that nobody has waited for: of more, the oldest is finished first.
OPEN_FETCHES = 64
# Lookups of a backward that is still to come, whose rows are kept in case their forward is made again. Also lookups
# whose row ids an owner remembers for their gradients. Of more, the oldest is forgotten.
LOOKUPS_KEPT = 64
# Lookups to come that a rank has announced. It and the owners forget the oldest of more.
ANNOUNCED_KEPT = 64
# Nobody may ask a rank for anything all day. A rank that asks waits as long as the process group of the run allows.
QUIET = timedelta(days=365)
# Of rows that travel while one rank saves.
SENT_BYTES = 2**20
# How long a rank that has come to its end goes on answering without being asked.
LINGER_SECONDS = 600.0
# How often it says meanwhile that it has come to its end.
LEAVE_SECONDS = 1.0
# A rank that has begun more collectives than one at its end, and moves nothing for so long, waits for it in vain.
STUCK_SECONDS = 4.0
# Collectives that a rank has begun, where that is not known any more.
UNKNOWN = 2**62

logger = logging.get_logger(__name__)


class Answer:
    """What an owner has been asked for: rows that are on their way."""

    def __init__(self, owner: int, buffer: torch.Tensor, works: list, kept: tuple):
        self.owner, self.buffer = owner, buffer
        # What was sent must live until it is there.
        self._works, self._kept = works, kept

    def wait(self) -> int:
        """Wait until it is here, and return its status.

        Raises:
            RuntimeError: the owner has ended, or does not answer in time.
        """
        works, self._works = self._works, []
        for work in works:
            work.wait()
        self._kept = ()
        return int(self.buffer[:8].view(torch.int64))


class Question(NamedTuple):
    """What another rank asks for.

    steps: that it has made with the table.
    lookup: its number for the lookup, where gradients of these rows may follow; 0 otherwise.
    """

    asker: int
    kind: int
    table: int
    steps: int
    tag: int
    answer_nbytes: int
    check: int
    payload: torch.Tensor
    lookup: int = 0


class Lookup(NamedTuple):
    """A lookup in training. Its owners remember the row ids, so that gradients can name the rows by it.

    number: of the lookup, from 1; those of a later one are higher.
    asked: by owner, (n,) row ids, ascending. None of an owner that has not been asked.
    """

    number: int
    asked: list[torch.Tensor]


class Announced(NamedTuple):
    """A lookup to come, of which the owners know.

    row_ids: (n,) int64, ascending and distinct.
    tags: of the messages, by owner.
    works, kept: what has been sent, and is to live until it is there.
    """

    row_ids: torch.Tensor
    tags: dict[int, int]
    works: list
    kept: list


class RowService:
    """What one process asks of the others, and the thread in which it answers them. One for all tables of a model.

    All processes make it at the same time, and give it the same tables in the same order.

    moved: counts of what this process has sent and been given: `ids` that it sent, `rows`, and `row_bytes`; of the
        rows, those that were `announced`; of the ids, those that it sent `again` with gradients.
    waited_seconds: that this process has spent on waiting for rows.
    """

    def __init__(self):
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.moved: Counter[str] = Counter()
        self.waited_seconds = 0.0
        # Why this process must not go on; it is raised where all processes meet.
        self.failure: str | None = None
        # Ranks that have come to their end. They join no collective any more.
        self.ended: set[int] = set()
        # Groups of this run beside that of all processes, in an order that all ranks share.
        self.groups: list[Any] = []
        self._tables: list[weakref.ref[TableRanks]] = []
        self._tags = count()
        self._open: list[Answer] = []
        self._lock = threading.Lock()
        # Owners forget announcements in the order of these messages.
        self.order = threading.RLock()
        self._was_asked = False
        # Not in every build of torch.
        from torch.distributed.device_mesh import init_device_mesh

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        # By kind of device: of all processes. torch may make groups for them, for which all have to be here.
        self.meshes = {kind: init_device_mesh(kind, (self.ranks,)) for kind in kinds}
        self._others = {rank for rank in range(self.ranks) if rank != self.rank}
        self._has_left = False
        # By rank at its end: what this one had done, and since when it has done no more.
        self._done: dict[int, tuple[tuple[int, int], float]] = {}
        if not self._others:
            return
        # The group itself: `destroy_process_group` forgets its name, and other ranks may still ask.
        self._patience = timeout_of_run()
        self._group = dist.new_group(backend="gloo", timeout=self._patience)
        self._thread = threading.Thread(target=self._serve, name="engram-rows", daemon=True)
        self._thread.start()
        atexit.register(self.leave)

    def add(self, table: "TableRanks") -> int:
        """Answer for one more table; its number."""
        self._tables.append(weakref.ref(table))
        return len(self._tables) - 1

    def meet(self, digest: bytes = b"\0") -> list[int]:
        """Wait until every rank has come here: before it, a rank may be asked for tables that it has not opened yet.

        Args:
            digest: of what this rank has opened.

        Returns:
            The ranks that have come with another digest.
        """
        if self.ranks == 1:
            return []
        own = torch.tensor(list(digest), dtype=torch.uint8, device="cpu")
        digests = [torch.empty_like(own) for _ in range(self.ranks)]
        # No rank has all of them before every rank is here.
        self._group.allgather([digests], [own]).wait()
        return [rank for rank, each in enumerate(digests) if not torch.equal(each, own)]

    def _next_tag(self) -> int:
        """Of an answer; what is sent with the question has the next one. A rank may be asked with the same tags."""
        return FIRST_TAG + 2 * (next(self._tags) % TAGS)

    def _send(
        self,
        to: int,
        kind: int,
        table: int,
        sent: torch.Tensor,
        tag: int,
        answer_nbytes: int = 0,
        check: int = 0,
        announced: int = 0,
        lookup: int = 0,
    ) -> tuple[list, tuple]:
        ranks = self._tables[table]()
        steps = 0 if ranks is None else ranks.steps
        numbers = [kind, table, steps, len(sent), tag, answer_nbytes, check, announced, lookup]
        head = torch.tensor(numbers, device="cpu")
        with self.order:
            works = [self._group.send([head], to, HEAD_TAG)]
            if len(sent):
                works.append(self._group.send([sent], to, tag + 1))
        return works, (head, sent)

    def announce_rows(self, owner: int, ranks: "TableRanks", row_ids: torch.Tensor) -> tuple[int, list, tuple]:
        """Tell an owner which rows, (n,) row ids, it is going to be asked for; the tag of this, and as `_send`."""
        tag = self._next_tag()
        check = int(check_number(row_ids))
        self.moved.update(ids=len(row_ids))
        return tag, *self._send(owner, COMING, ranks.number, ranks.cut.pack(row_ids, owner), tag, check=check)

    def ask_rows(
        self, owner: int, ranks: "TableRanks", row_ids: torch.Tensor, announced: int = 0, lookup: int = 0
    ) -> Answer:
        """Ask for rows, (n,) row ids that the owner holds; returns at once.

        Args:
            announced: tag of the message that has named them to the owner; 0 for none.
            lookup: number under which the owner is to remember them; 0 for none.
        """
        tag, num = self._next_tag(), len(row_ids)
        buffer = torch.empty(STATUS_BYTES + num * ranks.row_nbytes, dtype=torch.uint8, device="cpu")
        if announced:
            sent, check = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
        else:
            sent, check = ranks.cut.pack(row_ids, owner), int(check_number(row_ids))
        arrival = self._group.recv([buffer], owner, tag)
        works, kept = self._send(owner, ROWS, ranks.number, sent, tag, len(buffer), check, announced, lookup)
        answer = Answer(owner, buffer, [*works, arrival], kept)
        self.moved.update(rows=num, row_bytes=num * ranks.row_nbytes, **{"announced" if announced else "ids": num})
        with self._lock:
            self._open = [each for each in self._open if each._works]
            oldest = self._open.pop(0) if len(self._open) >= OPEN_FETCHES else None
            self._open.append(answer)
        if oldest is not None:
            oldest.wait()
        return answer

    def finish(self, announced: "Announced") -> None:
        """Wait until an announcement is with the owners; it has long been."""
        for work in announced.works:
            work.wait()

    def ask(self, owner: int, kind: int, table: int, payload: bytes = b"") -> bytes:
        """Ask another rank for something else than rows, and wait for its answer.

        Raises:
            RuntimeError: it could not answer, and says why.
        """
        tag = self._next_tag()
        given = (
            torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
        )
        head = torch.empty(2, dtype=torch.int64, device="cpu")
        arrival = self._group.recv([head], owner, tag)
        works, kept = self._send(owner, kind, table, given, tag)
        for work in [*works, arrival]:
            work.wait()
        del kept
        status, nbytes = head.tolist()
        answer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if nbytes:
            self._group.recv([answer], owner, tag).wait()
        content = answer.numpy().tobytes()
        if status != DONE:
            raise RuntimeError(f"Rank {owner} could not answer for its part of a table: {content.decode()}")
        return content

    # The thread that answers.

    def _serve(self) -> None:
        try:
            # Ranks that have left say so again and again, until this one leaves too.
            while self._others or not self._has_left:
                head = torch.empty(HEAD_NUMBERS, dtype=torch.int64, device="cpu")
                arrival = self._group.recv_anysource([head], HEAD_TAG)
                arrival.wait(QUIET)
                self._was_asked = True
                asker = arrival._source_rank()
                try:
                    self._take(asker, *head.tolist())
                except RuntimeError:
                    # That process is gone, and the others still need rows.
                    self._others.discard(asker)
        except RuntimeError:
            # The group is gone. Who needs rows of this process learns it by asking.
            self._others.clear()

    def _take(
        self,
        asker: int,
        kind: int,
        table: int,
        steps: int,
        nbytes: int,
        tag: int,
        answer_nbytes: int,
        check: int,
        announced: int,
        lookup: int,
    ) -> None:
        """Take a message from another rank, whose head has come, and answer it where it is a question."""
        payload = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if nbytes:
            self._group.recv([payload], asker, tag + 1).wait()
        ranks = self._tables[table]() if table < len(self._tables) else None
        if kind == LEAVE:
            self._others.discard(asker)
            self.ended.add(asker)
            # That rank has failed, or this one waits for it in a collective. It need not wait for this one then.
            if (bool(table) or self._waits_in_vain(asker, steps)) and not self._has_left:
                logger.error(
                    f"Rank {asker} has come to its end, and rank {self.rank} has not. Its own output says why. Where "
                    "this rank waits for it in a collective, it raises now."
                )
                self._group.send([self._leaving(False)], asker, HEAD_TAG).wait()
        elif kind == COMING:
            if ranks is not None:
                ranks.expect(asker, tag, payload, check)
        else:
            if announced and ranks is not None:
                payload, check = ranks.expected[asker].pop(announced, (payload, check))
            question = Question(asker, kind, table, steps, tag, answer_nbytes, check, payload, lookup)
            if not self._park(question):
                self.reply(question)

    def _park(self, question: "Question") -> bool:
        """Leave a question for later where the asker has made a step that this rank has still to make."""
        ranks = self._tables[question.table]() if question.table < len(self._tables) else None
        with self._lock:
            is_early = ranks is not None and ranks.steps < question.steps
            if ranks is not None and is_early:
                ranks.parked.append(question)
        return is_early

    def reply(self, question: "Question") -> None:
        """Answer a question."""
        asker, tag = question.asker, question.tag
        if question.kind == ROWS:
            answer = self._rows(question)
            self._group.send([answer], asker, tag).wait()
        else:
            self._send_answer(asker, tag, *self._answer(question.kind, question.table, question.payload))

    def after_step(self, ranks: "TableRanks") -> None:
        """This rank has made a step with a table, or loaded it anew: answer what has waited for it."""
        # What lookups without a backward, and prefetches without a lookup, have left: the rows are others now.
        ranks.kept, ranks._asked, ranks.lookups = [], [], []
        with self._lock:
            ranks.steps += 1
            ranks.forget_answered()
            ready = [each for each in ranks.parked if each.steps <= ranks.steps]
            ranks.parked = [each for each in ranks.parked if each.steps > ranks.steps]
        for question in ready:
            self.reply(question)

    def _rows(self, question: "Question") -> torch.Tensor:
        """The answer: the status, and the bytes of the rows."""
        table, nbytes = question.table, question.answer_nbytes
        out = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
        status = out[:8].view(torch.int64)
        ranks = self._tables[table]() if table < len(self._tables) else None
        if ranks is None:
            status[0] = GONE
            return out
        held = ranks.cut.find_packed(question.payload, question.check, self.rank)
        if held is None or nbytes != STATUS_BYTES + len(held) * ranks.row_nbytes:
            status[0] = FOREIGN
            return out
        if question.lookup:
            with self._lock:
                ranks.remember_answered(question, held)
        try:
            rows = ranks.read(held)
            out[STATUS_BYTES:] = rows.cpu().contiguous().view(torch.uint8).view(-1)
        except Exception as error:
            self.failure = f"Rank {self.rank} could not read rows that another rank has asked for: {error}"
            status[0] = FAILED
        return out

    def _answer(self, kind: int, table: int, payload: torch.Tensor) -> tuple[int, bytes]:
        try:
            if kind == WHY:
                return DONE, (self.failure or "").encode()
            ranks = self._tables[table]()
            if ranks is None or kind not in ranks.handlers:
                return FAILED, b"it has no such table in training any more."
            return DONE, ranks.handlers[kind](payload.numpy().tobytes())
        except Exception as error:
            return FAILED, str(error).encode()

    def _send_answer(self, asker: int, tag: int, status: int, content: bytes) -> None:
        self._group.send([torch.tensor([status, len(content)], device="cpu")], asker, tag).wait()
        if content:
            self._group.send([torch.frombuffer(bytearray(content), dtype=torch.uint8)], asker, tag).wait()

    def leave(self) -> None:
        """At the end of the process: go on answering until every other one has come to its end too."""
        if self._has_left:
            return
        self._has_left = True
        # Nobody else may hold the tables any more.
        tables = [table() for table in self._tables]
        has_failed = hasattr(sys, "last_value")
        patience = min(LINGER_SECONDS, self._patience.total_seconds()) if has_failed else LINGER_SECONDS
        end = time.monotonic() + patience
        # Also to those that have left: they may wait for this rank.
        self._say_leaving(has_failed, set(range(self.ranks)) - {self.rank})
        while self._others and self._thread.is_alive() and time.monotonic() < end:
            self._was_asked = False
            self._thread.join(LEAVE_SECONDS)
            if self._was_asked:
                end = time.monotonic() + patience
            # Nothing tells a handler of atexit whether a program ends by `sys.exit(1)`. Others know that they wait for
            # a rank in vain.
            self._say_leaving(has_failed, set(self._others))
        # Python ends a thread that comes back to it too late, and the process aborts.
        self._thread.join(LEAVE_SECONDS)
        del tables

    def _say_leaving(self, has_failed: bool, others: set[int]) -> None:
        for other in others:
            try:
                self._group.send([self._leaving(has_failed)], other, HEAD_TAG).wait()
            except RuntimeError:
                self._others.discard(other)

    def _leaving(self, has_failed: bool) -> torch.Tensor:
        """The head of a message that says that this rank has come to its end, or that another one need not wait."""
        begun = self.collectives_begun() if dist.is_initialized() else UNKNOWN
        return torch.tensor([LEAVE, int(has_failed), begun, *[0] * (HEAD_NUMBERS - 3)], device="cpu")

    def _waits_in_vain(self, rank: int, begun_there: int) -> bool:
        """Whether this rank is stuck in a collective that a rank at its end has not begun, as far as can be told.

        Backends count messages between two ranks as collectives, so a higher count alone says too little.
        """
        begun, now = self.collectives_begun(), time.monotonic()
        done = begun, self.moved["rows"]
        before, since = self._done.setdefault(rank, (done, now))
        if done != before:
            self._done[rank] = done, now
            return False
        return begun > begun_there and now - since >= STUCK_SECONDS

    def collectives_begun(self) -> int:
        """How many collectives this rank has begun, and on most backends messages to and from single ranks."""
        whole = [dist.group.WORLD] if dist.is_initialized() else []
        return sum(begun_in(group) for group in [*whole, *self.groups])


def begun_in(group: Any) -> int:
    """How many collectives of a process group this rank has begun; 0 where its backend does not count them."""
    try:
        return group._get_sequence_number_for_group()
    except RuntimeError:
        return 0


def timeout_of_run() -> timedelta:
    """How long a rank waits for another one in this run: what its process group was initialised with."""
    group: Any = dist.group.WORLD
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", default_pg_timeout)


class PendingRows:
    """Distinct rows that have been asked for; `result` waits for them."""

    def __init__(self, ranks: "TableRanks", row_ids: torch.Tensor, is_trained: bool = False):
        """
        Args:
            ranks: of the table.
            row_ids: (n,) int64, ascending and distinct, on the CPU.
            is_trained: whether gradients of these rows may follow.
        """
        self._ranks = ranks
        self._order, asked = ranks.cut.by_owner(row_ids)
        # Held ids of the rows that are here, (n,).
        self.own = ranks.cut.to_held(asked[ranks.rank], ranks.rank)
        self._answers = {}
        lookup = ranks.note_lookup() if is_trained else None
        with ranks.service.order:
            announced = ranks.find_announced(row_ids)
            for owner, ids in enumerate(asked):
                if len(ids) and owner != ranks.rank:
                    tag = 0 if announced is None else announced.tags.pop(owner, 0)
                    number = 0 if lookup is None else lookup.number
                    self._answers[owner] = ranks.service.ask_rows(owner, ranks, ids, tag, number)
                    if lookup is not None:
                        # Not before: where something raises on the way, the owner knows nothing of this lookup.
                        lookup.asked[owner] = ids
            ranks.announced = [each for each in ranks.announced if each is not announced]
        # An announcement has come before the answer to its question.
        self._announced = announced
        self._rows: torch.Tensor | None = None

    def result(self) -> torch.Tensor:
        """(n, row width) on the CPU, in the order of the row ids.

        Raises:
            RuntimeError: an owner does not hold the rows that were asked of it. In training it is raised at the end of
                the backward, on every rank.
        """
        if self._rows is not None:
            return self._rows
        ranks = self._ranks
        own = ranks.read(self.own).cpu()
        parts, start = [], time.perf_counter()
        for owner in range(ranks.cut.ranks):
            if owner == ranks.rank:
                parts.append(own)
            elif owner in self._answers:
                answer = self._answers[owner]
                if (status := answer.wait()) != DONE:
                    ranks.fail(owner, status)
                parts.append(answer.buffer[STATUS_BYTES:].view(own.dtype).view(-1, own.shape[1]))
        if self._announced is not None:
            ranks.service.finish(self._announced)
            self._announced = None
        ranks.service.waited_seconds += time.perf_counter() - start
        self._rows = torch.empty(len(self._order), own.shape[1], dtype=own.dtype, device="cpu")
        self._rows[self._order] = torch.cat(parts)
        self._answers = {}
        return self._rows


class TableRanks:
    """One table's place among the ranks: which rows are here, and how to get the others.

    kept: rows of lookups whose backward is still to come. A forward that is made again (gradient checkpointing) takes
        them from here.
    announced: lookups to come, of which the owners know already.
    expected: by rank, what it has announced: the tag of the message to packed row ids and their check number.
    bring: what to do with held ids, (n,) ascending, that somebody is going to ask for, by what they bring closer.
    lookups: in training since the last step, in their order. A message of gradients names rows by them. One that was
        broken off is among them, because owners that it has reached count it too.
    answered: by rank, the numbers of such lookups of it to the steps that it had made and the held ids, (n,), that it
        has asked for. This rank forgets them with its next step, and the oldest of too many, as that rank does.
    """

    def __init__(self, cut: RowCut, service: RowService, row_nbytes: int, read: Callable[[torch.Tensor], torch.Tensor]):
        """
        Args:
            cut: of the table.
            service: of the model.
            row_nbytes: bytes of a row.
            read: held ids, (n,) ascending, on the CPU, to rows that this rank holds.
        """
        self.cut, self.service, self.row_nbytes, self.read = cut, service, row_nbytes, read
        self.rank = service.rank
        self.number = service.add(self)
        self.handlers: dict[int, Callable[[bytes], bytes]] = {}
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Of the optimizer with this table, and loads of it. Nobody gets rows of an earlier step than its own.
        self.steps = 0
        self.parked: list[Question] = []
        self.announced: list[Announced] = []
        self.expected: list[dict[int, tuple[torch.Tensor, int]]] = [{} for _ in range(cut.ranks)]
        self.bring: dict[str, Callable[[torch.Tensor], None]] = {}
        self.lookups: list[Lookup] = []
        self.answered: list[dict[int, tuple[int, torch.Tensor]]] = [{} for _ in range(cut.ranks)]
        self._numbers = count(1)
        self._asked: list[tuple[torch.Tensor, Grouping, PendingRows]] = []
        # Whether a failed fetch is raised where all ranks meet, and not here.
        self.meets_later = False

    def begin(self, row_ids: torch.Tensor, is_trained: bool = False) -> PendingRows:
        """Ask for rows, (n,) int64, ascending and distinct, whose gradients may follow; returns at once."""
        return PendingRows(self, row_ids.cpu(), is_trained)

    def note_lookup(self) -> Lookup:
        """A lookup that has asked nobody yet, to be known until the next step."""
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        lookup = Lookup(next(self._numbers), [none] * self.cut.ranks)
        self.lookups = [*self.lookups, lookup][-LOOKUPS_KEPT:]
        return lookup

    def remember_answered(self, question: Question, held: torch.Tensor) -> None:
        """Another rank is given rows, (n,) held ids, whose gradients it may send."""
        answered = self.answered[question.asker]
        answered[question.lookup] = question.steps, held
        if len(answered) > LOOKUPS_KEPT:
            # A question that has waited for a step may be answered behind a later one.
            del answered[min(answered)]

    def forget_answered(self) -> None:
        """This rank has made a step, and so has whoever asks for rows of the next one."""
        self.answered = [
            {number: each for number, each in answered.items() if each[0] >= self.steps} for answered in self.answered
        ]

    def announce(self, row_ids: torch.Tensor) -> None:
        """Tell the owners which rows a lookup to come needs, and return at once.

        They read the pages of these rows, where the rows are on disk. A lookup of exactly these rows then names the
        announcement in place of row ids. It gets the rows as they are when it asks, so nothing depends on this.

        Args:
            row_ids: (n,) int64, ascending and distinct, on the CPU.
        """
        _, asked = self.cut.by_owner(row_ids)
        announced = Announced(row_ids, {}, [], [])
        with self.service.order:
            # First of all: owners count it too, also where something raises before all of them know of it.
            self.announced.append(announced)
            forgotten = self.announced.pop(0) if len(self.announced) > ANNOUNCED_KEPT else None
            for owner, ids in enumerate(asked):
                if len(ids) and owner != self.rank:
                    announced.tags[owner], works, kept = self.service.announce_rows(owner, self, ids)
                    announced.works.extend(works)
                    announced.kept.extend(kept)
        if forgotten is not None:
            self.service.finish(forgotten)
        self._bring(self.cut.to_held(asked[self.rank], self.rank))

    def find_announced(self, row_ids: torch.Tensor) -> Announced | None:
        """What was announced of exactly these rows; None for nothing."""
        return next((each for each in self.announced if torch.equal(each.row_ids, row_ids)), None)

    def expect(self, asker: int, tag: int, packed: torch.Tensor, check: int) -> None:
        """Another rank has announced a lookup."""
        expected = self.expected[asker]
        expected[tag] = packed, check
        if len(expected) > ANNOUNCED_KEPT:
            del expected[next(iter(expected))]
        held = self.cut.find_packed(packed, check, self.rank)
        # Who asks for rows that are not here is told so when it asks.
        if held is not None:
            self._bring(held)

    def _bring(self, held: torch.Tensor) -> None:
        for bring in list(self.bring.values()):
            try:
                bring(held)
            except Exception as error:
                # The lookup reads them by itself, and raises what there is to raise.
                logger.warning(f"Rows that a lookup to come needs were not read early: {error}")

    def fail(self, owner: int, status: int) -> None:
        """A fetch has failed: raise now, or where all ranks meet."""
        if status == FOREIGN:
            why = (
                f"Rank {self.rank} has asked rank {owner} for rows that it does not hold: the ranks cut the table "
                "differently. Load the same checkpoint on every rank."
            )
        elif status == GONE:
            why = (
                f"Rank {self.rank} has asked rank {owner} for rows, and that rank has deleted the model. Keep it until "
                "all ranks are done with it: call torch.distributed.barrier() before."
            )
        else:
            why = self.service.ask(owner, WHY, self.number).decode()
        if not self.meets_later:
            raise RuntimeError(why)
        self.service.failure = why

    def remember(self, row_ids: torch.Tensor, groups: Grouping, pending: PendingRows) -> None:
        """Keep what has been asked for a lookup with this very tensor, until `take`."""
        self._asked = [*self._asked, (row_ids, groups, pending)][-LOOKUPS_KEPT:]

    def take(self, row_ids: torch.Tensor) -> tuple[Grouping, PendingRows] | None:
        """What has been asked for a lookup with this very tensor; None for nothing."""
        found = next(((groups, pending) for ids, groups, pending in self._asked if ids is row_ids), None)
        self._asked = [each for each in self._asked if each[0] is not row_ids]
        return found

    def find_kept(self, row_ids: torch.Tensor) -> torch.Tensor | None:
        """The rows of an earlier lookup with these row ids whose backward is still to come."""
        for ids, rows in self.kept:
            if ids.data_ptr() == row_ids.data_ptr() and ids.shape == row_ids.shape:
                return rows
        return None

    def keep(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep the rows of a lookup until its backward is over."""
        # The ids too: while they are here, no other tensor has their address.
        self.kept = [*self.kept, (row_ids, rows)][-LOOKUPS_KEPT:]

    def as_sharded(self, held: torch.Tensor, block: int) -> torch.Tensor:
        """What this rank holds of a block, or of the state of its rows, as torch's distributed checkpoints take it: a
        DTensor on the same memory.

        Args:
            held: (rows of the block that this rank holds, ...).
            block: number of the block.
        """
        from torch.distributed.tensor import DTensor, Shard

        mesh = self.service.meshes[held.device.type]
        shape = torch.Size([self.cut.rows_of_block[block], *held.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def ask_one(self, rank: int, kind: int, payload: dict) -> bytes:
        """What a rank answers, which may be this one."""
        content = json.dumps(payload).encode()
        return self.handlers[kind](content) if rank == self.rank else self.service.ask(rank, kind, self.number, content)

    def content_of(
        self, rank: int, kind: int, payload: dict, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> TensorContent:
        """A tensor with some of the rows that a rank holds, to be written to a file; it arrives while it is written.

        Args:
            rank: that is asked.
            kind, payload: of the questions. Each has two numbers more: held ids from `start` up to `end`.
            dtype, shape: of the whole tensor.
        """
        held, nbytes = sum(self.cut.rows_of(rank)), math.prod(shape) * dtype.itemsize
        at_once = max(1, SENT_BYTES // (math.prod(shape[1:]) * dtype.itemsize))

        def pieces() -> Iterator[bytes]:
            arrived = 0
            for start in range(0, held, at_once):
                piece = self.ask_one(rank, kind, {**payload, "start": start, "end": min(start + at_once, held)})
                arrived += len(piece)
                yield piece
            if arrived != nbytes:
                raise RuntimeError(
                    f"Rank {rank} was to give {nbytes:,} bytes of its rows and gave {arrived:,}: it has made a step "
                    "while another rank saved. Save between two steps, on one rank."
                )

        return TensorContent(dtype, shape, nbytes, pieces)

    def ask_all(self, kind: int, payload: dict) -> list[bytes]:
        """What every other rank answers, in the order of ranks."""
        content = json.dumps(payload).encode()
        others = [rank for rank in range(self.cut.ranks) if rank != self.rank]
        return [self.service.ask(rank, kind, self.number, content) for rank in others]


def start_ranks() -> RowService:
    """Join the process group of this run, and start to answer for tables.

    Under `accelerate launch` and torchrun the group is initialised where nobody has done it: gloo on CPUs, and what
    torch takes for an accelerator.

    Raises:
        ValueError: there is no process group, and nothing says how many processes there are.
    """
    if not dist.is_available() or not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
            raise ValueError(
                'engram_ranks="shard" cuts tables over the processes of a run, and this is a single process. Start it '
                "with `accelerate launch` or `torchrun --nproc-per-node N`, or leave engram_ranks out."
            )
        dist.init_process_group(None if torch.accelerator.is_available() else "gloo")
    return RowService()

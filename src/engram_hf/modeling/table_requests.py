"""Which patches a request sees: contexts of a thread, with patches of its own for each sequence of a batch.

What patches say of a table is in table_overlay.py.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch


# What this context has asked to see, the latest last: for the patches of a table one overlay per sequence of a batch,
# for those of a model the names. An empty tuple is the plain table, whatever the batch.
_REQUESTS: ContextVar[tuple[Mapping[Any, tuple], ...]] = ContextVar("engram_patches", default=())
# How often `generate` repeats each sequence of a batch, for beams and for several sequences that it returns.
_COPIES: ContextVar[int] = ContextVar("engram_copies", default=1)


class _OfThread(threading.local):
    """open: contexts with patches of their own that this thread has open. A graph reads it, and no context variable."""

    def __init__(self) -> None:
        # Of the instance, in each thread: a graph does not notice where an attribute hides one of the class.
        self.open = 0


_OF_THREAD = _OfThread()


def has_requests() -> bool:
    """Whether patches are chosen for this context."""
    return _OF_THREAD.open > 0 if torch.compiler.is_compiling() else len(_REQUESTS.get()) > 0


def asked_of(patches: Any) -> tuple | None:
    """What this context asks to see of a table or of a model; None for what is active."""
    return next((each[patches] for each in reversed(_REQUESTS.get()) if patches in each), None)


@contextmanager
def asking(requests: Mapping[Any, tuple]) -> Iterator[None]:
    """In this context these are to be seen. Contexts may end in any order."""
    _REQUESTS.set((*_REQUESTS.get(), requests))
    _OF_THREAD.open += 1
    try:
        yield
    finally:
        _OF_THREAD.open -= 1
        _REQUESTS.set(tuple(each for each in _REQUESTS.get() if each is not requests))


@contextmanager
def generating() -> Iterator[None]:
    """In this context, `count_copies` says how often sequences are repeated."""
    token = _COPIES.set(1)
    try:
        # Requests that have come from another thread, in a copy of its context, are told to graphs of this one.
        with asking({}) if len(_REQUESTS.get()) else nullcontext():
            yield
    finally:
        _COPIES.reset(token)


def count_copies(copies: int) -> None:
    """From now on, in this call of `generate`, each sequence stands `copies` times in a batch, one beside the other."""
    _COPIES.set(copies)


def copies_of_sequence() -> int:
    """How often each sequence stands in a batch of this call of `generate`."""
    return _COPIES.get()

"""Where the experiments keep their results, and how a run finishes exactly once.

A result is a small JSON file. It is whole or not there, and it says on what machine and at what commit it was made.
"""

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from helpers.results import ROOT, own_commit, own_hardware, own_versions


RESULTS = ROOT / "scripts" / "experiments" / "results"
WORK = ROOT / "output" / "experiments"


class AnyRun(ABC):
    """What run.py asks of a run, whatever it trains.

    rate: None for the one that was tuned.
    """

    rate: float | None

    @property
    def memory_limit_bytes(self) -> int | None:
        """What its process gets where memory can be limited."""
        return None

    @property
    def is_tuning(self) -> bool:
        """Whether it only chooses a learning rate, before all others."""
        return self.rate is not None

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its file, without the ending."""

    @abstractmethod
    def prepare(self, knowledge: Path) -> object:
        """Make what all runs of its kind read, once, before many processes would."""

    @abstractmethod
    def train(self, knowledge: Path) -> dict[str, Any] | None:
        """Train in this process to the end. None where another process works on it."""


@contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """Whether this process alone works on a run. The lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def write_json(path: Path, content: dict) -> None:
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    unfinished.replace(path)


def read_results(folder: Path = RESULTS) -> dict[str, dict]:
    """Finished runs by name.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}). Remove it and run its experiment again.") from error
    return found


def finish(path: Path, folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The content of a result: what its file holds, or else what `make` gives, which is then written.

    Returns None where another process works on it. That one holds the lock in `folder`.
    """
    with only_one(folder) as is_mine:
        if not is_mine:
            return None
        if path.exists():
            return json.loads(path.read_text())
        # Before, since the checkout may change while it works.
        commit = own_commit()
        content = {
            "name": path.stem,
            **make(),
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "hardware": own_hardware(),
            "versions": own_versions(),
            "commit": commit,
        }
        write_json(path, content)
        return content


def best_rate(names: dict[float, str], results: dict[str, dict]) -> float:
    """The learning rate whose tuning run has the lowest loss.

    Args:
        names: of the tuning runs, by their rates.

    Raises:
        ValueError: a rate was not tried yet.
    """
    for rate, name in names.items():
        if name not in results:
            raise ValueError(f"The rate {rate:g} was not tried yet: {name}.json is missing. Tune it first.")
    return min(names, key=lambda rate: results[names[rate]]["loss"])

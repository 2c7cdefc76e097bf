"""What every reader of a checkpoint makes of a damaged one, and whether that is right."""

import inspect
import re
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from damaged_bases import Base, fresh_optimizer, read_json
from damaging import KINDS, Damage, damage, draw
from tiny import tiny_ids
from typer.testing import CliRunner

from engram_hf import (
    EngramMoEForCausalLM,
    RowPatch,
    inspect_checkpoint,
    load_patch,
    merge_changed_rows,
    merge_patch,
    push_engram,
    quantize_tables,
    verify_tables,
)
from engram_hf.training.checkpoints import last_complete_checkpoint
from engram_hf_command import app


# What a reader may raise.
REFUSALS = (ValueError, OSError, NotImplementedError)
SECONDS = 20
BYTES_MORE = 3 * 2**30
# In every checkpoint, so that a message with one of them says nothing.
COMMON_WORDS = {"dtype", "model", "x", "", "0", "a"}


class TooSlow(BaseException):
    """A reader took longer than a file of a few kilobytes can need."""


@dataclass
class Outcome:
    """Of one reader: "unchanged", "changed", "refused" or "bad", and the message or what is bad."""

    verdict: str
    message: str = ""


@dataclass
class Case:
    """A damaged checkpoint and what became of it."""

    seed: int
    base: str
    damage: Damage
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Of the reader that the file is for."""
        if self.faults:
            return "bad"
        first = next(iter(self.outcomes.values())).verdict
        verify = self.outcomes.get("verify")
        return "seen by verify" if first == "changed" and verify is not None and verify.verdict == "refused" else first

    def __str__(self) -> str:
        faults = "\n  ".join(self.faults)
        return f"seed {self.seed}: {self.base}, {self.damage.kind}: {self.damage.file}, {self.damage.what}\n  {faults}"


@contextmanager
def limits():
    """Little time and memory: sizes are compared before anything is allocated."""

    def stop(signum, frame):
        raise TooSlow(f"it took more than {SECONDS} seconds")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES_MORE, before[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def words_of(base: Base) -> set[str]:
    """Names that a sound checkpoint consists of: files, tensors, and fields of its config."""
    words = {path.name for path in base.root.glob("**/*") if path.is_file()}
    for path in base.root.glob("**/*.index.json"):
        names = {part for name in read_json(path)["weight_map"] for part in (name, name.removeprefix("model."))}
        words |= names | {name.partition(f".{part}.")[0] for name in names for part in ("blocks", "changed")}
    words |= set(read_json(base.folder / "config.json"))
    # Where the index is gone, transformers names the file that would need none.
    words |= {
        "model.safetensors",
        "sha256",
        "weight_map",
        "metadata",
        "total_size",
        "changed_rows",
        "engram_fingerprint",
    }
    return words - COMMON_WORDS


def run(reader: Callable[[], object], expected, words: set[str]) -> Outcome:
    """What a reader does. expected: what it gives for the sound checkpoint."""
    try:
        with limits():
            found = reader()
    except REFUSALS as error:
        message = str(error)
        if not words & set(re.findall(r"[\w./-]*\w", message)) and not any(w in message for w in words if "." in w):
            return Outcome("bad", f"names no file and no field: {type(error).__name__}: {message[:300]}")
        return Outcome("refused", f"{type(error).__name__}: {message}")
    except (TooSlow, Exception) as error:
        return Outcome("bad", f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}")
    return Outcome("unchanged" if found == expected else "changed")


def numbers_of(folder: Path, tables_from: Path | None = None, on_disk: bool = False) -> tuple[str, str]:
    """All numbers of a model, and what it computes from them."""
    device_map = "cpu+disk" if on_disk else None
    model = EngramMoEForCausalLM.from_pretrained(folder, tables_from=tables_from, device_map=device_map).eval()
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    with torch.no_grad():
        logits = model(tiny_ids(1, 9)).logits
    return digest.hexdigest(), sha256(logits.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def rewritten(rewrite: Callable, folder: Path) -> tuple[str, str]:
    """The numbers of what is made of a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        rewrite(folder, Path(scratch) / "new")
        return numbers_of(Path(scratch) / "new")


def command(*arguments) -> str:
    """The exit code and the end of what a command says; one that fails says one sentence."""
    ran = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    if ran.exit_code == 0:
        return "done"
    _, is_said, message = f"\n{ran.stderr}".partition("\nerror: ")
    if ran.exit_code != 1 or not is_said or "Traceback" in ran.output:
        raise RuntimeError(f"exit code {ran.exit_code}: {ran.output[-300:]}")
    raise ValueError(message)


def resumed(folder: Path) -> str:
    """The state of an optimizer after it has loaded that of a checkpoint."""
    optimizer = fresh_optimizer(folder)
    try:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        # Trainer reads the file with torch.load, which words its own errors.
        raise OSError(f"optimizer.pt cannot be read: {error}") from error
    optimizer.load_state_dict(state)
    loaded = optimizer.state_dict()
    for state in loaded["state"].values():
        # A run that is resumed is one of its own.
        state.pop("run", None), state.pop("stamp", None)
    return _digest_of(loaded)


def _digest_of(value) -> str:
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return sha256(f"{value.dtype} {tuple(value.shape)}".encode() + raw).hexdigest()
    if isinstance(value, dict):
        return sha256("".join(f"{k}:{_digest_of(v)};" for k, v in value.items()).encode()).hexdigest()
    if isinstance(value, (list, tuple)):
        return sha256("".join(map(_digest_of, value)).encode()).hexdigest()
    return repr(value)


def digest_of_patch(patch: RowPatch) -> str:
    parts = {name: each._asdict() for name, each in patch.tables.items()}
    return _digest_of([patch.name, patch.mode, patch.fingerprint, patch.provenance, parts])


def patched_logits(folder: Path) -> str:
    """What a model computes under the patch beside it."""
    model = EngramMoEForCausalLM.from_pretrained(folder).eval()
    model.add_patch(load_patch(folder))
    with torch.no_grad():
        return _digest_of(model(tiny_ids(1, 9)).logits)


def readers_of(base: Base, kind: str, seed: int) -> dict[str, Callable[[], object]]:
    """By name: those that a file of this kind is for. The first one is what the file is for most of all."""
    folder, tables = base.folder, base.tables_from
    readers: dict[str, Callable[[], object]] = {}
    if kind == "optimizer":
        readers["resume"] = lambda: resumed(folder)
    if kind in ("optimizer", "trainer_state"):
        readers["last"] = lambda: last_complete_checkpoint(folder.parent) in (None, str(folder)) or "another"
    if kind == "patch":
        return {
            "patch": lambda: digest_of_patch(load_patch(folder)),
            "patched": lambda: patched_logits(folder),
            "merge patch": lambda: rewritten(lambda source, target: merge_patch(source, source, target), folder),
            "patch command": lambda: command("patch", "inspect", folder),
        }
    if kind == "card":
        readers["push"] = lambda: len(push_engram(folder, "user/model", dry_run=True).files)
    readers["load"] = lambda: numbers_of(folder, tables, on_disk=seed % 2 == 0)
    if tables is None or "tables_from" in inspect.signature(inspect_checkpoint).parameters:
        more = {} if tables is None else {"tables_from": tables}
        readers["inspect"] = lambda: inspect_checkpoint(folder, **more) is not None
    readers["verify"] = lambda: len(verify_tables(folder, tables_from=tables)) > 0
    others: dict[str, Callable[[], object]] = {
        "inspect command": lambda: command("inspect", folder),
        "verify command": lambda: command("verify", folder, *(() if tables is None else ("--tables-from", tables))),
        "push command": lambda: command("push", folder, "user/model"),
        "plan command": lambda: command("plan", folder),
    }
    if tables is None:
        others["merge"] = lambda: rewritten(merge_changed_rows, folder)
        others["quantize"] = lambda: rewritten(lambda s, t: quantize_tables(s, t, "int8"), folder)
    names = sorted(others)
    for name in {names[seed % len(names)], names[(seed // 7) % len(names)], *(["merge"] if kind == "rows" else [])}:
        readers[name] = others[name]
    return readers


class Judge:
    """Damages copies of sound checkpoints; remembers what each reader gives for the sound ones."""

    def __init__(self, bases: dict[str, Base], scratch: Path):
        self.bases, self.scratch = bases, scratch
        self.expected: dict[tuple[str, str, bool], Outcome] = {}
        self.words = {name: words_of(base) for name, base in bases.items()}

    def sound(self, name: str, kind: str, seed: int, reader: str):
        key = (name, reader, False)
        if key not in self.expected:
            outcome: object
            # A reader may refuse a sound checkpoint, such as one that is quantized already.
            try:
                outcome = readers_of(self.bases[name], kind, seed)[reader]()
            except REFUSALS as error:
                outcome = error
            self.expected[key] = outcome
        return self.expected[key]

    def case(self, seed: int) -> Case:
        """Damage a checkpoint and look what becomes of it."""
        name, kind, rng = draw(seed)
        target = self.scratch / f"case-{seed}"
        base = self.bases[name].copy(target)
        try:
            done = damage(base, kind, rng)
            case = Case(seed, name, done)
            for reader, read in readers_of(base, kind, seed).items():
                expected = self.sound(name, kind, seed, reader)
                outcome = run(read, expected, self.words[name] | {done.file})
                # What the sound checkpoint is refused for may be said again.
                if not isinstance(expected, Exception) or type(expected).__name__ not in outcome.message:
                    case.outcomes[reader] = outcome
            case.faults = faults_of(case)
            return case
        finally:
            shutil.rmtree(target)


def faults_of(case: Case) -> list[str]:
    """What is wrong with the outcomes of a case."""
    found = [f"{reader}: {o.message}" for reader, o in case.outcomes.items() if o.verdict == "bad"]
    verdicts = {reader: outcome.verdict for reader, outcome in case.outcomes.items()}
    load, see, verify = (verdicts.get(reader) for reader in ("load", "inspect", "verify"))
    for reader in ("load", "merge", "quantize", "resume", "patch", "patched", "merge patch"):
        if verdicts.get(reader) == "changed" and not case.damage.is_content:
            found.append(f"{reader} gives other results without a word")
    if verify == "unchanged" and load != "unchanged":
        found.append(f"verify finds it sound, loading is {load}: {case.outcomes['load'].message[:200]}")
    if "bad" not in (see, load) and see is not None and (see == "refused") != (load == "refused"):
        both = f"{case.outcomes['load'].message[:200]} / {case.outcomes['inspect'].message[:200]}"
        found.append(f"inspect is {see}, loading is {load}: {both}")
    for name in ("inspect", "verify"):
        one, two = verdicts.get(name), verdicts.get(f"{name} command")
        if one is not None and two is not None and "bad" not in (one, two) and (one == "refused") != (two == "refused"):
            found.append(f"{name} is {one}, the command {two}")
    for name in ("merge", "quantize"):
        if verdicts.get(name) == "changed" and verify == "unchanged":
            found.append(f"{name} gives other results of what verify finds sound")
        if verdicts.get(name) == "unchanged" and load == "changed" and name == "merge":
            found.append("merge gives what loading does not")
    return found


def figures(cases: list[Case]) -> str:
    """Cases by kind of file, as a table in Markdown."""
    columns = ("refused", "unchanged", "changed", "seen by verify", "bad")
    lines = ["| file | cases | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for kind in (*KINDS, "all"):
        counts = Counter(case.verdict for case in cases if kind in ("all", case.damage.kind))
        if counts:
            lines.append(f"| {kind} | {sum(counts.values())} | " + " | ".join(str(counts[c]) for c in columns) + " |")
    return "\n".join(lines)

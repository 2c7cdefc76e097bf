"""The step of one table: it moves the rows that have gradients, and keeps the state of the row optimizer beside them.

A step gathers these rows and their state, moves them by a rule (row_rules.py), and writes them back. It allocates
nothing of the table's size. A table on disk is trained in a copy of its own, with the state beside it (work_files.py).
"""

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..modeling.checkpoint_saving import file_of_rank
from ..modeling.disk_files import TableFile
from ..modeling.disk_reading import PageReader, pages_of_rows
from ..modeling.disk_safetensors import write_file
from ..modeling.table import EngramTable
from ..modeling.table_blocks import put_rows
from ..modeling.table_changes import TrainingRun, bytes_of
from ..modeling.table_cut import local_part
from ..modeling.table_gradients import Exchange
from ..modeling.table_ranks import STATE, TableRanks
from .row_rules import RowRule, draws_of_rows, round_stochastically
from .row_state import ROW_IDS, STAMP, check_state, find_state, rows_held, stamp_content
from .work_files import WorkFile, open_training_copy


# On a CPU a step moves as many rows at a time as stay in its caches; on a GPU it needs about 20 times this memory.
PART_BYTES, PART_BYTES_ON_GPU = 2**22, 2**28
# Saving and loading move the state of rows between devices in pieces of this size.
PIECE_BYTES = 2**26
# Of the state that is looked at for rows that were touched.
TOUCHED_BYTES = 2**22
WIDE, NARROW = "wide", "narrow"


class RowUpdates:
    """The state of all rows of a table, and the step that moves those with a gradient."""

    def __init__(
        self,
        name: str,
        table: EngramTable,
        rule: RowRule,
        state_dtype: torch.dtype | None = None,
        work_folder: str | Path | None = None,
        seed: int = 0,
        saves_rows: bool = False,
        run: TrainingRun | None = None,
        exchange: Exchange | None = None,
    ):
        """
        Args:
            name: of the table in its model, for messages.
            table: whose rows are trained, on any tier.
            rule: how a row moves.
            state_dtype: float32 or bfloat16, of the state that the rule keeps per weight. None means bfloat16 for
                bfloat16 tables, and float32 for others. bfloat16 state and rows of 16 bits are rounded stochastically.
            work_folder: folder for the training copy of a table on disk, and for the state of its rows.
            seed: of the rounding.
            saves_rows: whether `state_dict` holds the rows too, because the checkpoint does not.
            run: that the table takes part in.
            exchange: is told when a backward has left gradients; None where there is one process.

        Raises:
            ValueError: the table is quantized, or on disk without a work folder, or the rule keeps no state.
            OSError: no space in the work folder.
        """
        if table.row_format is not None:
            raise ValueError(
                f"Rows of {name} are quantized ({table.row_format}) and cannot be trained; freeze the table."
            )
        if not (rule.wide or rule.narrow):
            raise ValueError(
                f"{type(rule).__name__} keeps no state, by which checkpoints know the rows that were touched. Name one "
                "in its `wide` or `narrow`, such as a count of steps."
            )
        self.name, self.table, self.rule, self.seed = name, table, rule, seed
        # Saving the model does not write the rows of a patch. So the state of the optimizer has to hold them, or a run
        # could not be resumed.
        self.patch = table.patches.trained
        self.saves_rows = saves_rows or self.patch is not None
        # Steps that have moved a row.
        self.steps = 0
        self.run = TrainingRun() if run is None else run
        self.reader = PageReader()
        # Before the training copy: checkpoints refer to the files that the table comes from now.
        self.gradients = table.collect_row_gradients(self.run, exchange)
        exact = torch.promote_types(table.dtype, torch.float32)
        if state_dtype is None:
            state_dtype = torch.bfloat16 if table.dtype == torch.bfloat16 else exact
        # The state of a row lies together, so that it is read and written in one place.
        shapes = {
            WIDE: ((table.held_rows, len(rule.wide), table.head_dim), state_dtype),
            NARROW: ((table.held_rows, len(rule.narrow), 1), exact),
        }
        shapes = {name: (shape, dtype) for name, (shape, dtype) in shapes.items() if shape[1]}
        self.work_file: WorkFile | None = None
        if any(block.is_on_disk for block in table.block_records):
            if work_folder is None:
                raise ValueError(
                    f"{name} is on disk, and the files of a checkpoint are never written. Name a folder for the "
                    "training copy, engram_optimizers(args, work_folder=...), or place the table in host memory."
                )
            if self.patch is None:
                open_training_copy(table, work_folder)
            self.work_file = WorkFile(work_folder, shapes)
            self.stores = {key: self.work_file.tensor(key) for key in shapes}
        else:
            self.stores = {key: torch.zeros(s, dtype=d, device=table.home) for key, (s, d) in shapes.items()}
        # Before the first step there is nothing to save.
        self.was_used = False
        # Files of the state that the last checkpoint has, until `state_dict` names them.
        self.files: dict[str, str] = {}
        if table.ranks is not None:
            table.ranks.handlers[STATE] = self._answer_state
            table.ranks.bring["state"] = partial(self._bring_state, PageReader())

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """By the names of the rule: (rows that are held, width) or (rows that are held, 1), views."""
        return self._by_name(self.stores)

    def _by_name(self, stores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = {}
        for store, names in ((WIDE, self.rule.wide), (NARROW, self.rule.narrow)):
            named |= {name: stores[store][:, i] for i, name in enumerate(names)}
        return named

    def step(self, lr: float) -> int:
        """Move the rows that have gradients, and return how many of them this process holds."""
        self.was_used = True
        moved = self._move(lr)
        if self.table.ranks is not None:
            self.table.ranks.service.after_step(self.table.ranks)
        return moved

    @torch.no_grad()
    def _move(self, lr: float) -> int:
        taken = self.gradients.take()
        if taken is None:
            return 0
        if self.table.patches.trained is not self.patch:
            raise ValueError(
                f"This optimizer was made to train {'the rows' if self.patch is None else 'a patch'} of {self.name}, "
                "and the model has begun, ended or removed a patch since. Make a new optimizer."
            )
        self.steps += 1
        row_ids, gradients = (each.to(self.table.home) for each in taken)
        if not len(row_ids):
            return 0
        held = self.table.held_ids(row_ids)
        self._read_state(held)
        part_bytes = PART_BYTES if row_ids.device.type == "cpu" else PART_BYTES_ON_GPU
        at_once = part_bytes // (4 * self.table.head_dim) + 1
        for part, ids, moving in zip(held.split(at_once), row_ids.split(at_once), gradients.split(at_once)):
            # The forward has just read them.
            rows = self.table.gather_trained(part, are_read=True)
            moved = rows.to(moving.dtype)
            gathered = {name: _gather(store, part, moving.dtype) for name, store in self.stores.items()}
            self.rule.update(moved, moving, self._by_name(gathered), lr)
            self.table.write_trained(part, self._round(moved, rows.dtype, ids, "rows"))
            for name, values in gathered.items():
                kept = self.stores[name]
                put_rows(kept, part, self._round(values, kept.dtype, ids, name), is_mapped=self.work_file is not None)
        return len(row_ids)

    def _round(self, values: torch.Tensor, dtype: torch.dtype, row_ids: torch.Tensor, what: str) -> torch.Tensor:
        """Values of rows, (n, ...), in another type. What is drawn depends on the row and the step alone, so it is the
        same wherever a row lives, and however many ranks there are."""
        if dtype.itemsize > 2:
            return values.to(dtype)
        stream = zlib.crc32(f"{self.seed} {self.name} {self.steps} {what}".encode())
        draws = draws_of_rows(row_ids, values[0].numel(), stream).view(values.shape)
        return round_stochastically(values, dtype, draws)

    def _read_state(self, row_ids: torch.Tensor) -> None:
        """Have the state of rows read that is on disk."""
        if self.work_file is None:
            return
        for tensor in self.stores.values():
            nbytes = tensor[0].nbytes
            pages = pages_of_rows(tensor.data_ptr() + row_ids.numpy() * nbytes, nbytes)
            self.reader.read(pages, self.work_file)

    def _bring_state(self, reader: PageReader, held: torch.Tensor) -> None:
        """Read the state of rows that a step to come moves, behind everything else; returns at once."""
        if self.work_file is not None:
            for tensor in self.stores.values():
                nbytes = tensor[0].nbytes
                reader.read_aside(pages_of_rows(tensor.data_ptr() + held.numpy() * nbytes, nbytes), self.work_file)

    def state_dict(self) -> dict:
        """The state of the rows that have been touched, over all ranks.

        Distributed checkpoints fill tensors in place, and would refuse one of another size. They take a tuple as a
        value, whatever is in it, so what has as many rows as were touched is in a tuple:

        * `row_ids`: (n,) int64, ascending;
        * `wide`, `narrow`: (n, names of the rule, width or 1), where the rule has such names;
        * `rows`: (n, width) where nobody else saves them, else an empty tuple.

        `stamp` is that of the run and step, which the rows of the same checkpoint have too.

        Where the table is cut over ranks, each rank has the state of all its rows instead, as torch's distributed
        checkpoints take it: `<store>.<number of a block>`, a DTensor; and `held_by`, (rank, ranks) in a tuple.

        Once, when a checkpoint of this step has just been written, its files hold the state (row_state.py). Instead of
        tensors there is then `files`, name to SHA-256, and `folder` in a tuple.
        """
        facts = {
            "rule": type(self.rule).__name__,
            "steps": self.steps,
            "run": self.run.run_id,
            "stamp": self.run.stamp.hex(),
            "rows": (),
        }
        files, self.files = self.files, {}
        if files and self.run.last_checkpoint is not None and self.run.last_checkpoint[1] == self.run.steps:
            return {**facts, "files": (files,), "folder": (str(self.run.last_checkpoint[0]),)}
        ranks = self.table.ranks
        if ranks is not None and self.was_used:
            return {**facts, "held_by": ((ranks.rank, ranks.cut.ranks),), **self._sharded_state(ranks)}
        own = self._own_state()
        rows = (self._rows_on_cpu(own["row_ids"]),) if self.saves_rows else ()
        return {**facts, "rows": rows, **{name: (tensor,) for name, tensor in own.items()}}

    def _sharded_state(self, ranks: TableRanks) -> dict[str, torch.Tensor]:
        """The state of the rows of each block, as DTensors on the memory of the state itself."""
        return {
            f"{name}.{block.number}": ranks.as_sharded(
                store[block.first_row : block.first_row + block.num_rows], block.number
            )
            for name, store in self.stores.items()
            for block in self.table.block_records
        }

    def write_state(self, folder: Path, start: str) -> dict[str, str]:
        """Write the state of the rows of all ranks into files, one for each; name to SHA-256.

        Args:
            folder: of a checkpoint.
            start: what their names begin with.

        Raises:
            OSError: no space left.
        """
        ranks = self.table.ranks
        if ranks is None:
            raise RuntimeError(f"{self.name} is not cut over ranks, and optimizer.pt holds the state of its rows.")
        self.files = {}
        for rank in range(ranks.cut.ranks):
            (count,) = json.loads(ranks.ask_one(rank, STATE, {"part": "count"}))
            contents = {ROW_IDS: ranks.content_of(rank, STATE, {"part": ROW_IDS}, torch.int64, (count,))}
            for name, store in self.stores.items():
                contents[name] = ranks.content_of(rank, STATE, {"part": name}, store.dtype, (count, *store.shape[1:]))
            contents[STAMP] = stamp_content(self.run.stamp)
            filename = file_of_rank(start, rank, ranks.cut.ranks)
            self.files[filename] = write_file(folder / filename, contents)
        return self.files

    def _own_state(self) -> dict[str, torch.Tensor]:
        """The row ids and the state of those rows that this process holds and that have been touched."""
        held = self._touched()
        stores = {name: _copy_out(store, held) for name, store in self.stores.items()}
        return {"row_ids": self.table.row_ids_of(held), **stores}

    def _answer_state(self, content: bytes) -> bytes:
        asked = json.loads(content)
        if asked["part"] == "count":
            return json.dumps([len(self._touched())]).encode()
        held = self._touched(asked["start"], asked["end"])
        if asked["part"] == ROW_IDS:
            return bytes_of(self.table.row_ids_of(held))
        store = self.stores[asked["part"]]
        return bytes_of(store.index_select(0, held.to(store.device)))

    def _touched(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """(n,) int64 on the CPU: held ids of the rows that have a state, from `start` up to `end`."""
        marker = self.stores[NARROW if self.rule.narrow else WIDE][start:end]
        found = [torch.zeros(0, dtype=torch.int64)]
        for piece in marker.split(max(1, TOUCHED_BYTES // marker[0].nbytes)) if len(marker) else ():
            found.append((piece != 0).flatten(1).any(-1).nonzero().flatten().cpu() + start)
            start += len(piece)
        return torch.cat(found)

    def _rows_on_cpu(self, row_ids: torch.Tensor) -> torch.Tensor:
        pieces = row_ids.split(max(1, PIECE_BYTES // self.table.row_nbytes))
        return torch.cat([self.table.gather_trained(piece.to(self.table.home)).cpu() for piece in pieces])

    def checked(self, saved: Any) -> dict:
        """What `state_dict` has returned, once it is known to be the state of this table's rows.

        Raises:
            ValueError: it is damaged, or of another rule or table.
        """
        damaged = f"optimizer.pt of the checkpoint is damaged where it is about {self.name}"
        if not isinstance(saved, dict) or not {"rule", "steps"} <= set(saved):
            raise ValueError(f"{damaged}: it names no rule and counts no steps. Resume from another checkpoint.")
        saved = _without_tuples(saved)
        if saved["rule"] != type(self.rule).__name__:
            raise ValueError(
                f"The checkpoint holds the state of {saved['rule']} for {self.name}, and this run uses "
                f"{type(self.rule).__name__}. Resume with the same row_optimizer, or start a new run from the weights."
            )
        if type(saved["steps"]) is not int or saved["steps"] < 0:
            raise ValueError(f"{damaged}: steps is {saved['steps']!r}, not a count. Resume from another checkpoint.")
        self._check_stamp(saved)
        if "files" in saved:
            return {**saved, "opened": self._open_files(saved, damaged)}
        if "held_by" in saved:
            self._check_sharded(saved, damaged)
            return saved
        row_ids = saved.get("row_ids")
        self._check_row_ids(row_ids, damaged)
        wanted = {name: (len(row_ids), *store.shape[1:]) for name, store in self.stores.items()}
        if self.saves_rows:
            wanted["rows"] = (len(row_ids), self.table.row_width)
            if saved.get("rows") is None:
                raise ValueError(
                    f"The checkpoint holds no rows of {self.name} in its optimizer's state: its run trained the table "
                    "itself, and this one trains a patch or an adapter. Resume without train_as_patch and without the "
                    "adapter, or start a new run from the checkpoint's weights."
                )
        elif saved.get("rows") is not None:
            raise ValueError(
                f"The checkpoint holds rows of {self.name} in its optimizer's state, as checkpoints of patches and "
                "of adapters do. Resume with train_as_patch or the adapter, or start a new run from the merged model."
            )
        for name, shape in wanted.items():
            tensor = saved.get(name)
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or not tensor.is_floating_point():
                found = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else repr(tensor)
                raise ValueError(f"{damaged}: {name} is {found}, not {shape}. Resume from another checkpoint.")
        return saved

    def _check_sharded(self, saved: dict, damaged: str) -> None:
        """
        Raises:
            ValueError: this process holds whole tables, or the state is that of another rank's rows.
        """
        ranks = self.table.ranks
        if ranks is None:
            raise ValueError(
                f"The state of {self.name} is that of a table cut over ranks, and this process holds all of it. Load "
                'the model with engram_ranks="shard", also on one rank, or resume from a checkpoint of Trainer.'
            )
        for name, own in self._sharded_state(ranks).items():
            given = saved.get(name)
            if not isinstance(given, torch.Tensor) or given.shape != own.shape:
                raise ValueError(f"{damaged}: {name} is not {tuple(own.shape)}. Resume from another checkpoint.")
            # A distributed checkpoint has filled the state in place, whoever has written what belongs to all.
            is_own = local_part(given).data_ptr() == local_part(own).data_ptr()
            if not is_own and tuple(saved["held_by"]) != (ranks.rank, ranks.cut.ranks):
                rank, of = saved["held_by"]
                raise ValueError(
                    f"The state of {self.name} is that of rank {rank} of {of} alone, and this is rank {ranks.rank} of "
                    f"{ranks.cut.ranks}. Save with Trainer, or with torch.distributed.checkpoint on all ranks."
                )

    def _open_files(self, saved: dict, damaged: str) -> list[TableFile]:
        """The files of a checkpoint that have the state of the rows.

        Raises:
            ValueError: they are missing or damaged, or not of this table and rule.
        """
        files, folder = saved["files"], saved.get("folder")
        if not isinstance(files, dict) or not files or not isinstance(folder, str):
            raise ValueError(f"{damaged}: files is {files!r}. Resume from another checkpoint.")
        if self.saves_rows:
            raise ValueError(
                f"The checkpoint is of a run over ranks that trained {self.name} itself, and this one trains a patch "
                "or an adapter. Resume without train_as_patch and without the adapter."
            )
        sources = [
            source
            for block in self.table.block_records
            for source in (block.source, None if block.base is None else block.base.source)
        ]
        # Where the model was loaded from, where this run has its checkpoints, and where they were written.
        folders = [source.file.path.parent for source in sources if source is not None]
        folders += [Path(self.run.folder or ".").absolute() / Path(folder).name, Path(folder)]
        opened = find_state(sorted(files), folders, str(saved.get("stamp")), self.name)
        wanted = {name: tuple(store.shape[1:]) for name, store in self.stores.items()}
        for file in opened:
            check_state(file, wanted, self.table, self.name)
        return opened

    def _check_stamp(self, saved: dict) -> None:
        """Where the rows of the table come from a checkpoint of a run, the state must come from the same one."""
        stamp = self.table.changes.stamp
        is_own = saved.get("run") == self.run.run_id
        # An adapter's checkpoint has the rows in its optimizer's state, and those of its base are of another run.
        if stamp is not None and not is_own and not self.saves_rows and saved.get("stamp") != stamp.hex():
            raise ValueError(
                f"The rows of {self.name} were loaded from a checkpoint, and the optimizer's state is that of another "
                "run or step. Take the weights and the optimizer's state of one checkpoint."
            )

    def _check_row_ids(self, row_ids: Any, damaged: str) -> None:
        if not isinstance(row_ids, torch.Tensor) or row_ids.dtype != torch.int64 or row_ids.ndim != 1:
            found = f"{tuple(row_ids.shape)} {row_ids.dtype}" if isinstance(row_ids, torch.Tensor) else repr(row_ids)
            raise ValueError(f"{damaged}: row_ids is {found}, not a list of int64. Resume from another checkpoint.")
        if not (row_ids[1:] > row_ids[:-1]).all():
            raise ValueError(f"{damaged}: row_ids do not ascend. Resume from another checkpoint.")
        if len(row_ids) and not 0 <= int(row_ids[0]) <= int(row_ids[-1]) < self.table.num_rows:
            raise ValueError(
                f"The checkpoint holds the state of rows {int(row_ids[0])} to {int(row_ids[-1])} of {self.name}, which "
                f"has {self.table.num_rows} rows: it is of another table. Resume from a checkpoint of this run."
            )

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Load what `state_dict` has returned.

        Raises:
            ValueError: as `checked`.
        """
        saved = self.checked(saved)
        was_used, self.steps, self.was_used = self.steps > 0, saved["steps"], True
        if "held_by" in saved and self.table.ranks is not None:
            for name, own in self._sharded_state(self.table.ranks).items():
                local_part(own).copy_(local_part(saved[name]))
            return
        if was_used:
            for store in self.stores.values():
                store.zero_()
        if "opened" in saved:
            for file in saved["opened"]:
                for held, of_rows in rows_held(file, self.table):
                    for name, store in self.stores.items():
                        store.index_copy_(0, held.to(store.device), of_rows[name].to(store.device, store.dtype))
            return
        row_ids = saved["row_ids"].cpu()
        are_held = self.table.are_held(row_ids)
        if are_held is not None:
            saved = {**saved, **{name: saved[name][are_held.to(saved[name].device)] for name in self.stores}}
            row_ids = self.table.held_ids(row_ids[are_held])
        if self.saves_rows:
            if self.patch is not None:
                self.patch.clear()
            for part, rows in _pieces(row_ids, saved["rows"]):
                self.table.write_trained(part.to(self.table.home), rows.to(self.table.home, self.table.dtype))
        for name, store in self.stores.items():
            for part, values in _pieces(row_ids, saved[name]):
                store.index_copy_(0, part.to(store.device), values.to(store.device, store.dtype))


def _without_tuples(saved: dict) -> dict:
    """A saved state with its tensors by their names, in the layout of the first release too."""
    if "keys" in saved:
        inner = saved.get("state")
        return {**saved, **(inner if isinstance(inner, dict) else {}), "row_ids": saved["keys"]}
    return {name: (each[0] if each else None) if isinstance(each, tuple) else each for name, each in saved.items()}


def _pieces(row_ids: torch.Tensor, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if len(row_ids):
        at_once = max(1, PIECE_BYTES // values[0].nbytes)
        yield from zip(row_ids.split(at_once), values.split(at_once), strict=True)


def _copy_out(store: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
    """(n, ...) on the CPU."""
    out = torch.empty((len(row_ids), *store.shape[1:]), dtype=store.dtype)
    for part, values in _pieces(row_ids, out):
        values.copy_(store.index_select(0, part.to(store.device)))
    return out


def _gather(tensor: torch.Tensor, row_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, ...) where the row ids are."""
    return tensor.index_select(0, row_ids.to(tensor.device)).to(row_ids.device, dtype)

"""Updating the rows of one table where it lives, and keeping the optimizer's state of each row beside it.

A step gathers the rows that have gradients and their state, moves them by a rule, and writes them back; nothing of the
table's size is allocated. Tables on disk are trained in a copy of their own (work_files.py), with the state beside it.
"""

import zlib
from pathlib import Path

import torch

from ..modeling.disk_reading import PageReader, pages_of_rows
from ..modeling.table import EngramTable
from ..modeling.table_blocks import put_rows
from ..modeling.table_changes import TrainingRun
from ..modeling.table_gradients import Exchange
from .row_rules import RowRule, round_stochastically
from .work_files import WorkFile, open_training_copy


# On a CPU a step moves as many rows at a time as stay in its caches.
PART_BYTES = 2**22
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
            state_dtype: of what the rule keeps per weight: float32 or bfloat16. None: bfloat16 for tables of bfloat16,
                else float32. bfloat16 is rounded stochastically, and so are rows of 16 bits.
            work_folder: where a table on disk is copied to be trained, and its state with it.
            seed: of the rounding.
            saves_rows: whether `state_dict` holds the rows too, where nobody else saves them.

            run: that the table takes part in.
            exchange: makes the rows of all processes out of those of this one.

        Raises:
            ValueError: the table is quantized, or on disk without a work folder, or the rule keeps no state.
            OSError: no space in the work folder.
        """
        if table.row_format is not None:
            raise ValueError(f"Rows of {name} are quantized ({table.row_format}), and cannot be trained; freeze it.")
        if not (rule.wide or rule.narrow):
            raise ValueError(
                f"{type(rule).__name__} keeps no state of a row, by which checkpoints know which rows were touched. "
                "Name one in its `wide` or `narrow`, a count of steps for one."
            )
        self.name, self.table, self.rule, self.seed, self.saves_rows = name, table, rule, seed, saves_rows
        self.steps = 0
        self.reader = PageReader()
        # Before the training copy: a checkpoint is saved by the files that the table comes from now.
        self.gradients = table.collect_row_gradients(run, exchange)
        exact = torch.promote_types(table.dtype, torch.float32)
        if state_dtype is None:
            state_dtype = torch.bfloat16 if table.dtype == torch.bfloat16 else exact
        # What belongs to a row lies together: one place to read and to write.
        shapes = {
            WIDE: ((table.num_rows, len(rule.wide), table.head_dim), state_dtype),
            NARROW: ((table.num_rows, len(rule.narrow), 1), exact),
        }
        shapes = {name: (shape, dtype) for name, (shape, dtype) in shapes.items() if shape[1]}
        self.work_file: WorkFile | None = None
        if any(block.is_on_disk for block in table.block_records):
            if work_folder is None:
                raise ValueError(
                    f"{name} is on disk, and a checkpoint's own files are never written. Name a folder for the copy "
                    "that is trained, engram_optimizers(args, work_folder=...), or place the table in host memory."
                )
            open_training_copy(table, work_folder)
            self.work_file = WorkFile(work_folder, shapes)
            self.stores = {key: self.work_file.tensor(key) for key in shapes}
        else:
            self.stores = {key: torch.zeros(s, dtype=d, device=table.home) for key, (s, d) in shapes.items()}

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """By the names of the rule: (rows of the table, width) or (rows of the table, 1), views."""
        return self._by_name(self.stores)

    def _by_name(self, stores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = {}
        for store, names in ((WIDE, self.rule.wide), (NARROW, self.rule.narrow)):
            named |= {name: stores[store][:, i] for i, name in enumerate(names)}
        return named

    @torch.no_grad()
    def step(self, lr: float) -> int:
        """Move the rows that have gradients; how many they are."""
        taken = self.gradients.take()
        self.steps += 1
        if taken is None:
            return 0
        keys, gradients = (each.to(self.table.home) for each in taken)
        self._read_state(keys)
        generator = torch.Generator(keys.device).manual_seed(
            hash((self.seed, zlib.crc32(self.name.encode()), self.steps)) % 2**63
        )
        at_once = len(keys) if keys.is_cuda else PART_BYTES // (4 * self.table.head_dim) + 1
        for part, moving in zip(keys.split(at_once), gradients.split(at_once)):
            # The forward has just read them.
            rows = self.table.gather_rows(part, are_read=True)
            moved = rows.to(moving.dtype)
            gathered = {name: _gather(store, part, moving.dtype) for name, store in self.stores.items()}
            self.rule.update(moved, moving, self._by_name(gathered), lr)
            self.table.write_rows(part, _round(moved, rows.dtype, generator))
            for name, values in gathered.items():
                kept = self.stores[name]
                put_rows(kept, part, _round(values, kept.dtype, generator), is_mapped=self.work_file is not None)
        return len(keys)

    def _read_state(self, keys: torch.Tensor) -> None:
        """Have the state of rows read that is on disk."""
        if self.work_file is None:
            return
        for tensor in self.stores.values():
            nbytes = tensor[0].nbytes
            pages = pages_of_rows(tensor.data_ptr() + keys.numpy() * nbytes, nbytes)
            self.reader.read(pages, self.work_file)

    def state_dict(self) -> dict:
        """The state of the rows that have been touched; as large as they are many."""
        marker = self.stores[NARROW if self.rule.narrow else WIDE]
        keys = (marker != 0).flatten(1).any(-1).nonzero().flatten()
        return {
            "rows": self.table.gather_rows(keys.to(self.table.home)).cpu() if self.saves_rows else None,
            "steps": self.steps,
            "rule": type(self.rule).__name__,
            "keys": keys.cpu(),
            "state": {name: store.index_select(0, keys).cpu() for name, store in self.stores.items()},
        }

    def load_state_dict(self, saved: dict) -> None:
        """
        Raises:
            ValueError: the state is of another rule, or of a table of another size.
        """
        if saved["rule"] != type(self.rule).__name__:
            raise ValueError(
                f"The checkpoint holds the state of {saved['rule']} for {self.name}, and this run uses "
                f"{type(self.rule).__name__}. Resume with the same row_optimizer, or start a new run from the weights."
            )
        keys = saved["keys"]
        if len(keys) and int(keys[-1]) >= self.table.num_rows:
            raise ValueError(f"The checkpoint holds state of row {int(keys[-1])} of {self.name}: another table's.")
        if self.saves_rows and saved["rows"] is not None:
            self.table.write_rows(keys.to(self.table.home), saved["rows"].to(self.table.home))
        was_used, self.steps = self.steps > 0, saved["steps"]
        for key, tensor in self.stores.items():
            if was_used:
                tensor.zero_()
            tensor.index_copy_(0, keys.to(tensor.device), saved["state"][key].to(tensor.device, tensor.dtype))


def _gather(tensor: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, ...) where the keys are."""
    return tensor.index_select(0, keys.to(tensor.device)).to(keys.device, dtype)


def _round(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return values.to(dtype) if dtype.itemsize > 2 else round_stochastically(values, dtype, generator)

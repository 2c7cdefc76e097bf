"""Which rows a run looks up: how many, how often, for which n-grams, how many n-grams share one; whether rows move."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...counting import STATISTICS_FILE, RowCounts, SharedRows
from ...insight.memory_layers import find_memory_layers
from ...modeling.table import EngramTable
from ..row_exchange import gather_padded
from .reporting import EngramCallback, is_distributed, is_made_again


# Rows whose norms and moves are measured.
SAMPLED_ROWS = 1024
HOTTEST = 8
# A table that moves by less than this share beside a common shrinking has been moved by weight decay alone.
LEAST_MOVE = 0.02

logger = logging.get_logger(__name__)


class LayerStatistics:
    """What is known of the rows of one memory layer."""

    def __init__(self, table: EngramTable, max_ngram_size: int, name: str):
        self.table, self.name = table, name
        rows_of_heads = table.head_rows.cpu()
        self.rows, self.shared = RowCounts(rows_of_heads), SharedRows(rows_of_heads, max_ngram_size)
        # Of all processes.
        self.touched = torch.zeros(table.num_rows, dtype=torch.bool)
        # The last batch that was sampled: row ids, (tokens, heads), and the ids that are hashed, (tokens, N), the
        # token's own last.
        self.last_row_ids = self.last_ngrams = torch.zeros(0, 0, dtype=torch.int64)
        # The first rows that had a gradient, and what they were at the beginning of the run and before this step.
        self.watched = torch.zeros(0, dtype=torch.int64)
        self.first_values = self.values_before = torch.zeros(0, 0)
        self.update_norms = torch.zeros(0)

    def count(self, row_ids: torch.Tensor, has_memory: torch.Tensor) -> torch.Tensor:
        """Count the lookups of a forward.

        Args:
            row_ids: (batch, seq, heads), rows in their head.
            has_memory: (batch, seq) bool.

        Returns:
            (tokens with a memory, heads), rows in the table.
        """
        of_table = row_ids.detach().cpu()[has_memory] + self.rows.first_rows
        self.rows.add(of_table)
        return of_table

    def sample(self, row_ids: torch.Tensor, ngrams: torch.Tensor) -> None:
        """Remember the n-grams of a batch, and the values of some rows before the step.

        Args:
            row_ids: (tokens, heads), rows in the table.
            ngrams: (tokens, N), the ids that are hashed.
        """
        self.last_row_ids, self.last_ngrams = row_ids, ngrams
        self.shared.add(row_ids, ngrams)
        if not len(self.watched):
            touched = row_ids.unique()
            self.watched = touched[:: max(1, len(touched) // SAMPLED_ROWS)].contiguous()
            self.first_values = self.read_watched()
        self.values_before = self.read_watched()

    def read_watched(self) -> torch.Tensor:
        """(rows, width) float32."""
        return self.table.gather_rows(self.watched.to(self.table.home)).float().cpu()

    def measure_step(self) -> None:
        """Measure how far the watched rows moved since `sample`."""
        if len(self.values_before):
            self.update_norms = (self.read_watched() - self.values_before).norm(dim=-1)
            self.values_before = torch.zeros(0, 0)

    def per_head(self, values: torch.Tensor) -> list[float]:
        """Mean over the watched rows of each head; NaN for a head without any."""
        heads = self.rows.heads_of(self.watched)
        return [float(values[heads == head].mean()) for head in range(len(self.rows.first_rows))]

    def hottest(self) -> list[tuple[int, int, list[int]]]:
        """Row id, count, and an n-gram of the last sampled batch that reads the row, if there is one."""
        found = []
        for row_id, count in self.rows.hottest(HOTTEST):
            order = self.shared.order_of(int(self.rows.heads_of(torch.tensor(row_id))))
            where = (self.last_row_ids == row_id).any(-1).nonzero()
            found.append((row_id, count, self.last_ngrams[where[0, 0], -order:].tolist() if len(where) else []))
        return found

    def share_touched(self) -> float:
        """Share of all rows that any process has looked up. A process sends the rows that are new since last time."""
        new = (self.rows.touched() & ~self.touched).nonzero().flatten()
        if is_distributed():
            new = torch.cat(gather_padded(new))
        self.touched[new] = True
        return int(self.touched.count_nonzero()) / len(self.touched)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a resumed run goes on from."""
        return {
            "counts": self.rows.counts,
            "touched": self.touched,
            "watched": self.watched,
            "first_values": self.first_values,
            **{f"ngrams.{order}": ngrams for order, ngrams in self.shared.ngrams.items()},
            **{f"rows.{order}": rows for order, rows in self.shared.rows.items()},
        }

    def take_up(self, saved: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` returned.

        Raises:
            ValueError, KeyError: it is of another table, or damaged.
        """
        orders = [int(name.removeprefix("ngrams.")) for name in saved if name.startswith("ngrams.")]
        watched, rows = saved["watched"], {order: saved[f"rows.{order}"] for order in orders}
        ngrams = {order: saved[f"ngrams.{order}"] for order in orders}
        of_table = [watched, *(rows[order] for order in orders)]
        is_fit = (
            saved["counts"].shape == saved["touched"].shape == self.touched.shape
            and (saved["counts"].dtype, saved["touched"].dtype) == (torch.int32, torch.bool)
            and all(each.dtype == torch.int64 for each in [*of_table, *ngrams.values()])
            and all(not each.numel() or 0 <= each.min() <= each.max() < self.table.num_rows for each in of_table)
            and saved["first_values"].shape[0] == len(watched)
            and all(rows[order].shape == (len(ngrams[order]), self.shared.heads_of_order) for order in orders)
        )
        if not is_fit:
            raise ValueError(f"its counts do not fit {self.name}")
        self.rows.counts.copy_(saved["counts"])
        self.touched.copy_(saved["touched"])
        self.watched, self.first_values = watched, saved["first_values"]
        self.shared.ngrams, self.shared.rows = ngrams, rows

    def movement(self) -> str | None:
        """What is wrong with how the watched rows moved since the beginning; None for nothing."""
        if not len(self.watched):
            return None
        then, now = self.first_values.double(), self.read_watched().double()
        if torch.equal(then, now):
            return "did not move"
        scale = (then * now).sum() / then.square().sum().clamp_min(1e-30)
        if scale < 1 and (now - scale * then).norm() < LEAST_MOVE * (now - then).norm():
            return "moved only by weight decay"
        return None


class EngramRowStatisticsCallback(EngramCallback):
    """Counts the rows that a run looks up for tokens, not for padding, and reports for each memory layer:

    * `engram/rows_touched/layer_1` and `engram/rows_never_touched/layer_1`: shares of the table's rows, by all
      processes (the other figures are those of the first process);
    * `engram/ngrams_per_row/layer_1`: distinct n-grams per row that they read, in the sampled steps, and
      `engram/ngrams_per_row_perfect_hash/layer_1`, what it would be if rows were drawn at random;
    * `engram/row_norm/layer_1` and `engram/row_update_norm/layer_1`: means over a sample of rows, at the last sample;
    * the same norms per head (`.../per_head`) and `engram/hottest_rows/layer_1`, in the history of the run alone.

    The console shows `engram/rows_touched`, of all tables. At the end of a run it warns of tables that can be trained
    and did not move, or moved only by weight decay. The counts are saved with every checkpoint
    (`row_statistics.safetensors`), so that a resumed run goes on counting.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EngramRowStatisticsCallback()])
    """

    on_console = ("engram/rows_touched",)

    def __init__(self, every: int = 10):
        """
        Args:
            every: steps from one sample of n-grams and norms to the next. Rows are counted in every step.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self.every = every
        self.is_looking = False
        self.layers: dict[int, LayerStatistics] = {}
        self._hooks: list = []
        self.saved_in = ""
        self._run: tuple | None = None
        self._token_map: torch.Tensor | None = None

    def arguments(self):
        return {"every": self.every}

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        layers = find_memory_layers(model, type(self).__name__)
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self._remove_hooks()
        self._run, self._tokenizer = (args, state), processing_class
        maps = [m.token_map for m in model.modules() if isinstance(getattr(m, "token_map", None), torch.Tensor)]
        self._token_map = maps[0].cpu() if maps else None
        names = {id(module): name for name, module in model.named_modules()}
        self.layers = {
            i: LayerStatistics(layer.table, layer.max_ngram_size, names[id(layer.table)]) for i, layer in layers.items()
        }
        if state.global_step:
            # The folder that is resumed, or this run's own where that one was moved.
            folders = [Path(self.saved_in), self._checkpoint_folder()]
            self._load(next((f for f in folders if (f / STATISTICS_FILE).exists()), folders[-1]) / STATISTICS_FILE)
        self._hooks = [layer.register_forward_pre_hook(self._look, with_kwargs=True) for layer in layers.values()]

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_looking = state.global_step % self.every == 0

    @torch.compiler.disable
    def _look(self, layer, inputs: tuple, named: dict) -> None:
        if not layer.training or is_made_again():
            return
        statistics = self.layers[layer.layer_idx]
        context = inputs[2]
        has_memory = (context.reach >= 0).cpu()  # padding has none
        row_ids = statistics.count(inputs[1], has_memory)
        if self.is_looking:
            statistics.sample(row_ids, context.ngrams.cpu().transpose(1, 2)[has_memory])

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_looking:
            for statistics in self.layers.values():
                statistics.measure_step()
        self.is_looking = False

    def figures(self):
        figures, touched, rows = {}, 0.0, 0
        for layer_id, own in self.layers.items():
            share = own.share_touched()
            touched, rows = touched + share * own.table.num_rows, rows + own.table.num_rows
            figures[f"engram/rows_touched/layer_{layer_id}"] = share
            figures[f"engram/rows_never_touched/layer_{layer_id}"] = 1 - share
            if own.shared.ngrams:
                measured, perfect = own.shared.ngrams_per_row()
                figures[f"engram/ngrams_per_row/layer_{layer_id}"] = measured
                figures[f"engram/ngrams_per_row_perfect_hash/layer_{layer_id}"] = perfect
            if len(own.update_norms):
                figures[f"engram/row_norm/layer_{layer_id}"] = float(own.read_watched().norm(dim=-1).mean())
                figures[f"engram/row_update_norm/layer_{layer_id}"] = float(own.update_norms.mean())
        return {**figures, "engram/rows_touched": touched / rows} if rows else figures

    def records(self):
        records: dict[str, Any] = {}
        for layer_id, own in self.layers.items():
            if len(own.update_norms):
                norms = own.read_watched().norm(dim=-1)
                records[f"engram/row_norm/layer_{layer_id}/per_head"] = own.per_head(norms)
                records[f"engram/row_update_norm/layer_{layer_id}/per_head"] = own.per_head(own.update_norms)
            records[f"engram/hottest_rows/layer_{layer_id}"] = [
                {"row": row, "count": count, "ngram": self._text(ngram)} for row, count, ngram in own.hottest()
            ]
        return records

    def _text(self, ngram: list[int]) -> str | list[int]:
        """An n-gram as text, where there is a tokenizer. Of tokens that share an id in the hash, the first is shown."""
        if not hasattr(self._tokenizer, "decode") or not ngram or min(ngram) < 0:
            return ngram
        if self._token_map is None:
            return self._tokenizer.decode(ngram)
        return self._tokenizer.decode([int((self._token_map == token).nonzero()[0]) for token in ngram])

    def attributes(self):
        return {"saved_in": str(self._checkpoint_folder().absolute())} if self.layers else {}

    def on_save(self, args, state, control, **kwargs):
        folder = self._checkpoint_folder()
        if not args.should_save or not folder.is_dir():
            return
        tensors = {f"{i}.{name}": value for i, own in self.layers.items() for name, value in own.tensors().items()}
        unfinished = folder / f"{STATISTICS_FILE}.unfinished"
        try:
            save_file(tensors, unfinished)
        except SafetensorError as error:
            raise OSError(f"{unfinished} cannot be written ({error}). Make room on the disk.") from error
        os.replace(unfinished, folder / STATISTICS_FILE)

    def _checkpoint_folder(self) -> Path:
        if self._run is None:
            raise RuntimeError("Rows are counted from on_train_begin on; this run has not begun.")
        args, state = self._run
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _load(self, path: Path) -> None:
        try:
            saved = load_file(path)
            for layer_id, own in self.layers.items():
                start = f"{layer_id}."
                own.take_up({k.removeprefix(start): v for k, v in saved.items() if k.startswith(start)})
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            logger.warning(f"Rows are counted from 0 again: {path} does not hold the statistics of this run ({error}).")

    def on_train_end(self, args, state, control, **kwargs):
        for own in self.layers.values():
            wrong = own.movement() if own.table.is_trainable else None
            if wrong is not None:
                logger.warning(
                    f"{own.name} can be trained, but it {wrong} in this run. Check that gradients reach it, or freeze "
                    "it: table.requires_grad_(False)."
                )
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

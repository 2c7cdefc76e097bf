"""Which rows a run touches: how many, how often, by which n-grams, how many n-grams share one; whether rows move."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..row_exchange import gather_padded
from .reporting import EngramCallback, find_memory_layers, is_distributed, is_made_again


STATISTICS_FILE = "row_statistics.safetensors"
# Rows whose norms and moves are looked at.
SAMPLED_ROWS = 1024
# Distinct n-grams of an order that collisions are counted among; more would take memory.
COUNTED_NGRAMS = 2**16
HOTTEST = 8
# Odd, so that multiplying by them loses nothing.
MIXERS = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB, 0x2545F4914F6CDD1D, 0x4F1BBCDCBFA53E0B)

logger = logging.get_logger(__name__)


class LayerStatistics:
    """Of one memory layer. counts: (rows of the table,) int32, how often each row was looked up."""

    def __init__(self, layer: Any, name: str):
        self.table, self.name = layer.table, name
        self.head_rows, self.first_rows = self.table.head_rows.cpu(), self.table.first_rows_of_heads.cpu()
        self.heads_of_order = len(self.head_rows) // (layer.max_ngram_size - 1)
        self.counts = torch.zeros(self.table.num_rows, dtype=torch.int32)
        self.touched = torch.zeros(self.table.num_rows, dtype=torch.bool)
        # Per order: a number for each distinct n-gram, (n,), and the rows it reads, (n, heads per order).
        self.ngrams: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # The last batch that was looked at: row numbers, (tokens, heads), and compressed ids, (tokens, N),
        # the token itself last.
        self.keys = self.last_ngrams = torch.zeros(0, 0, dtype=torch.int64)
        # Rows that had a gradient first, and what they were at the beginning and before this step.
        self.watched = torch.zeros(0, dtype=torch.int64)
        self.first_values = self.values_before = torch.zeros(0, 0)
        self.update_norms = torch.zeros(0)

    def count(self, row_ids: torch.Tensor, has_memory: torch.Tensor) -> torch.Tensor:
        """(batch, seq, heads) to the numbers in the table, (tokens, heads); of the tokens that have a memory."""
        keys = row_ids.detach().cpu()[has_memory] + self.first_rows
        flat = keys.flatten()
        self.counts.index_add_(0, flat, torch.ones(len(flat), dtype=torch.int32))
        return keys

    def look(self, keys: torch.Tensor, ngrams: torch.Tensor) -> None:
        """Remember the n-grams of a batch, (tokens, N), and what its rows are before the step."""
        self.keys, self.last_ngrams = keys, ngrams
        for order in range(2, self.last_ngrams.shape[1] + 1):
            mixers = torch.tensor([MIXERS[i % len(MIXERS)] for i in range(order)])
            mixed = (self.last_ngrams[:, -order:] * mixers).sum(-1)
            start = (order - 2) * self.heads_of_order
            rows = keys[:, start : start + self.heads_of_order]
            if order in self.ngrams:
                known, known_rows = self.ngrams[order]
                if len(known) >= COUNTED_NGRAMS:
                    continue
                mixed, rows = torch.cat([known, mixed]), torch.cat([known_rows, rows])
            distinct, back = mixed.unique(return_inverse=True)
            first = torch.full((len(distinct),), len(mixed)).scatter_reduce(0, back, torch.arange(len(mixed)), "amin")
            self.ngrams[order] = distinct, rows[first]
        if not len(self.watched):
            touched = keys.unique()
            self.watched = touched[:: max(1, len(touched) // SAMPLED_ROWS)].contiguous()
            self.first_values = self.read_watched()
        self.values_before = self.read_watched()

    def read_watched(self) -> torch.Tensor:
        """(rows, width) float32."""
        return self.table.gather_rows(self.watched.to(self.table.home)).float().cpu()

    def follow_step(self) -> None:
        if len(self.values_before):
            self.update_norms = (self.read_watched() - self.values_before).norm(dim=-1)
            self.values_before = torch.zeros(0, 0)

    def heads_of(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.first_rows, keys, right=True) - 1

    def collisions(self) -> tuple[float, float]:
        """Distinct n-grams per row that they read, and what a perfect hash would have."""
        measured, expected = [], []
        for order, (distinct, rows) in self.ngrams.items():
            for head in range(rows.shape[1]):
                size = int(self.head_rows[(order - 2) * self.heads_of_order + head])
                measured.append(len(distinct) / len(rows[:, head].unique()))
                expected.append(len(distinct) / (size * (1 - (1 - 1 / size) ** len(distinct))))
        return sum(measured) / len(measured), sum(expected) / len(expected)

    def per_head(self, values: torch.Tensor) -> list[float]:
        """Mean over the watched rows of each head; NaN for a head without any."""
        heads = self.heads_of(self.watched)
        return [float(values[heads == head].mean()) for head in range(len(self.head_rows))]

    def hottest(self) -> list[tuple[int, int, list[int]]]:
        """Row number, count, and the compressed ids of an n-gram of the last batch that reads it, if one does."""
        found = []
        for key in self.counts.topk(min(HOTTEST, len(self.counts))).indices.tolist():
            order = int(self.heads_of(torch.tensor([key]))) // self.heads_of_order + 2
            where = (self.keys == key).any(-1).nonzero()
            ngram = self.last_ngrams[where[0, 0], -order:].tolist() if len(where) else []
            found.append((key, int(self.counts[key]), ngram))
        return found

    def share_touched(self) -> float:
        """Of all rows, by all processes: each sends the numbers of those that are new since the last time."""
        new = ((self.counts > 0) & ~self.touched).nonzero().flatten()
        if is_distributed():
            new = torch.cat(gather_padded(new.to(self.table.home))).cpu()
        self.touched[new] = True
        return int(self.touched.count_nonzero()) / len(self.touched)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a resumed run goes on from."""
        ngrams = {f"ngrams.{order}": ids for order, (ids, _) in self.ngrams.items()}
        rows = {f"rows.{order}": rows.contiguous() for order, (_, rows) in self.ngrams.items()}
        fixed = {
            "counts": self.counts,
            "touched": self.touched,
            "watched": self.watched.contiguous(),
            "first_values": self.first_values,
        }
        return {**fixed, **ngrams, **rows}

    def take_up(self, saved: dict[str, torch.Tensor]) -> None:
        self.counts.copy_(saved["counts"])
        self.touched.copy_(saved["touched"])
        self.watched, self.first_values = saved["watched"], saved["first_values"]
        orders = [int(key.removeprefix("ngrams.")) for key in saved if key.startswith("ngrams.")]
        self.ngrams = {order: (saved[f"ngrams.{order}"], saved[f"rows.{order}"]) for order in orders}

    def movement(self) -> str | None:
        """What is wrong with how the watched rows moved since the beginning; None for nothing."""
        if not len(self.watched):
            return None
        then, now = self.first_values.double(), self.read_watched().double()
        if torch.equal(then, now):
            return "did not move"
        scale = (then * now).sum() / then.square().sum().clamp_min(1e-30)
        # What remains of the movement beside a common shrinking.
        if scale < 1 and (now - scale * then).norm() < 0.02 * (now - then).norm():
            return "moved only by weight decay"
        return None


class EngramRowStatisticsCallback(EngramCallback):
    """Counts the rows that a run looks up for tokens, not for padding, and adds to the log, for each memory layer:

    * `engram/rows_touched/layer_1` and `engram/rows_never_touched/layer_1`: shares of the table's rows, of all
      processes (what follows is of the first one);
    * `engram/ngrams_per_row/layer_1`: distinct n-grams per row that they read, among those looked at, and
      `engram/ngrams_per_row_perfect_hash/layer_1`, what it would be if rows were drawn at random;
    * `engram/row_norm/layer_1` and `engram/row_update_norm/layer_1`: means over a sample of rows, at the last look;
    * in the history of the run alone, the same norms per head (`.../per_head`), and `engram/hottest_rows/layer_1`.

    At the end of a run it warns of tables that can be trained and did not move, or moved only by weight decay.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EngramRowStatisticsCallback()])
    """

    def __init__(self, every: int = 10):
        """
        Args:
            every: steps from one look at n-grams and norms to the next; rows are counted in every step.
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
        self.layers = {i: LayerStatistics(layer, names[id(layer.table)]) for i, layer in layers.items()}
        if state.global_step:
            # Of the run that is resumed; its own folder where that was moved.
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
        has_memory = (context.reach >= 0).cpu()  # not so padding
        keys = statistics.count(inputs[1], has_memory)
        if self.is_looking:
            statistics.look(keys, context.ngrams.cpu().transpose(1, 2)[has_memory])

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_looking:
            for statistics in self.layers.values():
                statistics.follow_step()
        self.is_looking = False

    def figures(self):
        figures = {}
        for layer_id, own in self.layers.items():
            touched = own.share_touched()
            figures[f"engram/rows_touched/layer_{layer_id}"] = touched
            figures[f"engram/rows_never_touched/layer_{layer_id}"] = 1 - touched
            if own.ngrams:
                measured, perfect = own.collisions()
                figures[f"engram/ngrams_per_row/layer_{layer_id}"] = measured
                figures[f"engram/ngrams_per_row_perfect_hash/layer_{layer_id}"] = perfect
            if len(own.update_norms):
                figures[f"engram/row_norm/layer_{layer_id}"] = float(own.read_watched().norm(dim=-1).mean())
                figures[f"engram/row_update_norm/layer_{layer_id}"] = float(own.update_norms.mean())
        return figures

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
        """An n-gram of compressed ids as text, where there is a tokenizer: of each the first id that becomes it."""
        if not hasattr(self._tokenizer, "decode") or not ngram or min(ngram) < 0:
            return ngram
        if self._token_map is None:
            return self._tokenizer.decode(ngram)
        return self._tokenizer.decode([int((self._token_map == token).nonzero()[0]) for token in ngram])

    def attributes(self):
        # Before Trainer writes the marker of a checkpoint, so that this file is there where the marker is.
        if self.layers and self._run is not None and (folder := self._checkpoint_folder()).is_dir():
            tensors = {f"{i}.{key}": value for i, own in self.layers.items() for key, value in own.tensors().items()}
            save_file(tensors, folder / STATISTICS_FILE)
            return {"saved_in": str(folder.absolute())}
        return {}

    def _checkpoint_folder(self) -> Path:
        args, state = self._run
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _load(self, path: Path) -> None:
        try:
            saved = load_file(path)
            for layer_id, own in self.layers.items():
                start = f"{layer_id}."
                own.take_up({k.removeprefix(start): v for k, v in saved.items() if k.startswith(start)})
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            logger.warning(f"Rows are counted from 0 again: {path} does not hold this run's statistics ({error}).")

    def on_train_end(self, args, state, control, **kwargs):
        for own in self.layers.values():
            wrong = own.movement() if own.table.is_trainable else None
            if wrong is not None:
                logger.warning(
                    f"{own.name} can be trained, and {wrong} in this run. Look whether gradients reach it, or freeze "
                    "it: table.requires_grad_(False)."
                )
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

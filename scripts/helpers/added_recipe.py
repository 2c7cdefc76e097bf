"""How add_memory.py and compare_adapters.py train somebody else's model on docstrings, and measure what it learned.

Losses are kept for each row of held-out text. Two ways to read the same rows are compared row by row, which leaves out
how hard the text is. Rows of a document are alike, so intervals draw whole documents.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

from helpers.recipe import make_arguments, row_trainer
from helpers.text import (
    Document,
    drop_copied,
    gather_docstrings,
    load_documents,
    packed_dataset,
    rows_of_documents,
    split_documents,
)


# Of SmolLM2-135M, which has 30 layers.
LAYERS, HEADS, ROWS_OF_HEAD, HEAD_DIM = [1, 14], 4, 20_000, 32
SEQ_LENGTH = 128
ROWS_PER_STEP = 4
STEPS = 160
LEARNING_RATE, SCHEDULE = 2e-3, "constant_with_warmup"
# 30,480 tokens with a loss.
HELD_OUT_ROWS = 240
# Documents to one that is held out: there is more text than a run trains on.
HELD_OUT_EVERY = 4
EVALUATION_ROWS = 8


@dataclass
class HeldOut:
    """Text that nothing is trained on.

    ids: (rows, seq).
    documents: the name of the document of each row.
    """

    ids: torch.Tensor
    documents: list[str]

    @property
    def predicted_tokens(self) -> int:
        return self.ids[:, 1:].numel()


def prepare_text(
    tokenizer, dataset: str | None, seq_length: int = SEQ_LENGTH, held_out_rows: int = HELD_OUT_ROWS
) -> tuple[Dataset, HeldOut]:
    """Rows to train on and rows held out, of a data set or of the docstrings of Python's standard library.

    Raises:
        ValueError, OSError: there is no such text, or too little of it.
    """
    documents = load_documents(dataset) if dataset else gather_docstrings()
    train, held_out = split_documents(documents, HELD_OUT_EVERY)
    return packed_dataset(tokenizer, train, seq_length), held_out_text(
        tokenizer, drop_copied(held_out, train), seq_length, held_out_rows
    )


def held_out_text(tokenizer, documents: list[Document], seq_length: int, most_rows: int) -> HeldOut:
    return HeldOut(*rows_of_documents(tokenizer, documents, seq_length, most_rows))


@torch.no_grad()
def fastest_dtype() -> torch.dtype:
    """The type that this machine multiplies fastest, of those that a frozen model can have.

    bfloat16 on an accelerator and on CPUs with instructions for it, where a step takes less than half the time. CPUs
    without them are slower with it than with float32.
    """
    if torch.accelerator.is_available():
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        inputs, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        found = []
        for _ in range(8):
            start = time.perf_counter()
            nn.functional.linear(inputs, weight)
            found.append(time.perf_counter() - start)
        # Other programs only make it longer.
        return min(found)

    return min(torch.bfloat16, torch.float32, key=seconds)


def load_base(source: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()


def load_tokenizer(source: str | Path):
    return AutoTokenizer.from_pretrained(source)


@torch.no_grad()
def losses_of_rows(
    model: nn.Module, held_out: HeldOut, what: str, permutation: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean loss in nats per token of each row, (rows,).

    Args:
        model: a causal language model, with a memory or without.
        held_out: the rows.
        what: words for the progress bar.
        permutation: (vocab_size,) other ids, which the memory reads in place of the tokens' own.
    """
    model.eval()
    found = []
    # A bar in a log file is noise.
    bar = tqdm(total=len(held_out.ids), desc=what, unit="row", leave=False, disable=not sys.stderr.isatty())
    for ids in held_out.ids.split(EVALUATION_ROWS):
        other = {} if permutation is None else {"engram_input_ids": permutation[ids].to(model.device)}
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False, **other).logits
        scores, wanted = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        losses = nn.functional.cross_entropy(scores, wanted, reduction="none")
        found.append(losses.view(len(ids), -1).mean(1).cpu())
        bar.update(len(ids))
    bar.close()
    return torch.cat(found)


def other_ids(vocab_size: int, seed: int = 0) -> torch.Tensor:
    """A permutation of all ids, the same in every run."""
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))


def shown(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def make_trainer(
    model: nn.Module,
    train: Dataset,
    output: Path,
    steps: int,
    *,
    batch_size: int = ROWS_PER_STEP,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    callbacks: tuple = (),
) -> Trainer:
    arguments = make_arguments(output, steps, seed, batch_size, learning_rate, lr_scheduler_type=SCHEDULE)
    return row_trainer(model, arguments, train, callbacks=list(callbacks))

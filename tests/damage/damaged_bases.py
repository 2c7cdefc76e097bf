"""Small checkpoints of every kind, made once, to be copied and damaged."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import Trainer, TrainingArguments

from engram_hf import EngramMoEForCausalLM, engram_optimizers, make_patch, quantize_tables, save_patch


CARD = """---
license: apache-2.0
library_name: transformers
tags:
- engram
- mine
---

# A model

What I wrote about it myself.
"""


@dataclass(frozen=True)
class Base:
    """A sound checkpoint: its name, the folder that holds it, and below that the folders of model and tables."""

    name: str
    root: Path
    model: str = "."
    tables: str | None = None

    def copy(self, target: Path) -> "Base":
        """The same in another place. Files are links until somebody writes to them with `write_anew`."""
        shutil.copytree(self.root, target, copy_function=os.link)
        return Base(self.name, target, self.model, self.tables)

    @property
    def folder(self) -> Path:
        return self.root / self.model

    @property
    def tables_from(self) -> Path | None:
        return None if self.tables is None else self.root / self.tables


def write_anew(path: Path, content: bytes | str) -> None:
    """Write a file that may be a link of a file of a sound checkpoint."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_bases(folder: Path, tokenizer) -> dict[str, Base]:
    """All of them, by name."""
    config = {"engram_table_dtype": "float32", "num_hidden_layers": 2, "engram_layer_ids": [0, 1]}
    shards = {"max_shard_size": "40KB"}

    tiny_model(tiny_config(**config)).save_pretrained(folder / "plain", **shards)
    write_anew(folder / "plain" / "README.md", CARD)

    tiny_model(tiny_config(**config)).save_pretrained(
        folder / "apart" / "model", tables_to=folder / "apart" / "tables", **shards
    )
    for row_format in ("float8_e4m3fn", "int4"):
        quantize_tables(folder / "plain", folder / row_format, row_format)

    patched = tiny_model(tiny_config(**config))
    patched.save_pretrained(folder / "patch", **shards)
    rows = {
        name: (torch.arange(2, 30, 3), torch.ones(10, table.head_dim)) for name, table in patched.named_tables().items()
    }
    save_patch(make_patch(patched, "alice", rows, provenance={"made_by": "hand"}), folder / "patch")

    bound = tiny_model(tiny_config(**config, vocab_size=600, engram_compressed_vocab_size="auto"))
    bound.bind_tokenizer(tokenizer)
    bound.save_pretrained(folder / "tokenizer", **shards)
    tokenizer.save_pretrained(folder / "tokenizer")

    # Most rows are left as they are, so that a checkpoint holds the changed ones alone.
    sparse = {**config, "engram_vocab_size": 211, "engram_block_elements": 2000}
    tiny_model(tiny_config(**sparse)).save_pretrained(folder / "untrained")
    train(EngramMoEForCausalLM.from_pretrained(folder / "untrained"), folder / "training" / "run")
    if not list((folder / "training" / "run" / "checkpoint-2").glob("rows-*")):
        raise RuntimeError("The checkpoint of the run holds no changed rows; the damage would not be tested.")
    return {
        base.name: base
        for base in (
            Base("plain", folder / "plain"),
            Base("apart", folder / "apart", "model", "tables"),
            Base("float8_e4m3fn", folder / "float8_e4m3fn"),
            Base("int4", folder / "int4"),
            Base("patch", folder / "patch"),
            Base("tokenizer", folder / "tokenizer"),
            Base("training", folder / "training" / "run", "checkpoint-2"),
        )
    }


def training_arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


def train(model, folder: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tiny_ids(4, 5)]
    args = training_arguments(folder)
    Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=engram_optimizers(args)).train()


def fresh_optimizer(folder: Path):
    """The optimizer of that run as it is before its state is loaded."""
    model = EngramMoEForCausalLM.from_pretrained(folder)
    args = training_arguments(folder.parent)
    factory, kwargs = engram_optimizers(args)
    return factory()(model, **kwargs)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

"""One process of a run over several: trains a tiny model with Trainer, and writes what it ended with. Not a test."""

import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from architectures import tiny_backbone, with_memory
from foreign import gemma3n_text, publish
from tiny import tiny_config, tiny_ids, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from engram_hf import (
    EngramGateStatisticsCallback,
    EngramPrefetchCallback,
    EngramRowStatisticsCallback,
    engram_optimizers,
    freeze_backbone,
    load_with_tables,
)
from engram_hf.modeling.table_ranks import CHANGED


TABLES = ("model.layers.0.engram.table", "model.layers.2.engram.table")


class LargestMessage(TorchDispatchMode):
    """The most elements of a tensor that any collective operation was given."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in str(func):
            stack = list(args)
            while stack:
                each = stack.pop()
                if isinstance(each, list | tuple):
                    stack += each
                elif isinstance(each, torch.Tensor):
                    LargestMessage.elements = max(LargestMessage.elements, each.numel())
        return func(*args, **(kwargs or {}))


def train_sharded(model, args, rule: str) -> list[float]:
    """A loop of one's own under FSDP2, with the tables left out of it; losses of this process.

    accelerate turns FSDP on for accelerators only, so Trainer cannot be used for it here.
    """
    factory, options = engram_optimizers(args, rule)
    if args.world_size > 1:
        ignored = {parameter for table in model.named_tables().values() for parameter in table.parameters()}
        mesh = init_device_mesh("cpu", (args.world_size,))
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
    optimizer = factory()(model, **options)
    losses = []
    for step in range(int(args.max_steps)):
        batch = tiny_ids(4, 9, seed=step)[args.process_index :: args.world_size]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


class Breaks(TrainerCallback):
    """Has a process fail in the middle of the save that follows a step, when it comes to the rows that have changed."""

    def __init__(self, rank: int, step: int, how: str):
        self.rank, self.step, self.how = rank, step, how

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if (args.process_index, state.global_step) != (self.rank, self.step):
            return
        for table in model.named_tables().values():
            table.ranks.handlers[CHANGED] = partial(self.fail, table.ranks.handlers[CHANGED])

    def fail(self, answer, asked: bytes) -> bytes:
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "killed in a write":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        # From now on, no file may grow beyond this, as if the disk were full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        return answer(asked)


def main():
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    options = {"tier": None, "rule": "sgd", "exact": True, "trainer": {}, **options}
    args = TrainingArguments(
        str(out / "run"),
        max_steps=options.get("steps", 6),
        optim="sgd" if options["exact"] else "adamw_torch",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "max_grad_norm": 0.3, "learning_rate": 1e-2, **options["trainer"]},
    )
    config = tiny_config(engram_vocab_size=30_011, **({"engram_table_dtype": "float64"} if options["exact"] else {}))
    if options.get("added"):
        # Somebody else's model with a memory, of which the memory alone learns.
        fields = {"vocab_size": 30_011, "table_dtype": "float64" if options["exact"] else None}
        model = freeze_backbone(with_memory(tiny_backbone("llama"), **fields))
    elif options.get("served"):
        # Somebody else's tables, in the layout in which they are published.
        if args.process_index == 0:
            publish(gemma3n_text(torch.float64, vocab_size_per_layer_input=30_011), out / "base")
        if args.world_size > 1:
            torch.distributed.barrier()
        model = load_with_tables(out / "base", {"": "cpu", "...embed_tokens_per_layer": "disk"})
    elif options["tier"] is None:
        model = tiny_model(config)
    else:
        base = Path(options.get("base") or out / "base")
        if args.process_index == 0 and not base.exists():
            tiny_model(config).save_pretrained(base)
        if args.world_size > 1:
            torch.distributed.barrier()
        tier = {} if options["tier"] == "resident" else {"device_map": {"": "cpu", "...table": options["tier"]}}
        ranks = {"engram_ranks": "shard"} if options.get("shard") else {}
        model = AutoModelForCausalLM.from_pretrained(base, **tier, **ranks)
    if options["exact"]:
        model = model.double()
        if not (options.get("added") or options.get("served")):
            model.set_experts_implementation("eager")
    if options.get("fsdp"):
        with LargestMessage():
            losses = train_sharded(model, args, options["rule"])
        return write(out, args, model, losses)
    if options.get("shard"):
        held = [sum(table.ranks.cut.rows_of(args.process_index)) for table in model.named_tables().values()]
        assert [sum(map(len, table.blocks)) for table in model.named_tables().values()] == held
    callbacks = [EngramPrefetchCallback(), EngramGateStatisticsCallback(), EngramRowStatisticsCallback()]
    callbacks += [Breaks(*options["breaks"])] if options.get("breaks") else []
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(64, 9)],
        eval_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(5, 9, seed=1)],
        optimizer_cls_and_kwargs=engram_optimizers(args, options["rule"], work_folder=out / "work"),
        # They are for memory layers, and a table alone is none.
        callbacks=[] if options.get("served") else callbacks,
    )
    with LargestMessage():
        trainer.train(resume_from_checkpoint=options.get("resume"))
    if options.get("saves_last"):
        trainer.save_model(str(out / "last"))
    history = trainer.state.log_history
    write(out, args, model, [line["loss"] for line in history if "loss" in line], history)
    if trainer.state.best_model_checkpoint is not None:
        (out / "best").write_text(trainer.state.best_model_checkpoint)


def write(out: Path, args: TrainingArguments, model, losses: list[float], history=None) -> None:
    # Of a table that is cut over ranks, the rows of all of them.
    tables = [
        block.detach().clone()
        for table in model.named_tables().values()
        for block in (table.blocks if table.ranks is None else [table.gather_rows(torch.arange(table.num_rows))])
    ]
    whole = [(n, p.detach().full_tensor() if hasattr(p, "full_tensor") else p) for n, p in model.named_parameters()]
    rest = {n: p.detach().clone() for n, p in whole if ".table." not in n}
    statistics = [line for line in (history or []) if "loss" in line]
    is_sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    result = {
        "statistics": statistics,
        "is_sharded": is_sharded,
        "run_ids": {table.changes.run.run_id for table in model.named_tables().values()},
        "losses": losses,
        "tables": tables,
        "rest": rest,
        "largest": LargestMessage.elements,
    }
    torch.save(result, out / f"result{args.process_index}of{args.world_size}.pt")


if __name__ == "__main__":
    main()

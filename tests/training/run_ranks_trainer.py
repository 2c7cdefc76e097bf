"""Two processes that train a tiny model with Trainer, its tables cut over them and whole. Not a test:
`test_ranks_trainer.py` starts it and compares.

Arguments: a folder, and names of cases.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from joining import join
from tiny import tiny_config, tiny_ids, tiny_model
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from engram_hf import EngramPrefetchCallback, engram_optimizers


RANKS, ROWS_OF_BATCH, LONGEST = 2, 2, 11
CHECKPOINTING = {"gradient_checkpointing": True}
# The rule, the tier, the type of everything, whether lengths differ, and what Trainer is told.
CASES = {
    "reentrant": {
        "rule": "adam",
        "tier": "host",
        "trainer": {
            "gradient_accumulation_steps": 2,
            **CHECKPOINTING,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    },
    # Adaptive rules make as much of the smallest gradient, and of its error, as of the largest.
    "float32": {"rule": "sgd", "tier": "host", "dtype": "float32", "is_uneven": True},
    "adam in float32": {"rule": "adam", "tier": "host", "dtype": "float32", "is_uneven": True},
    "not reentrant": {
        "rule": "rowwise_adam",
        "tier": "disk",
        "trainer": {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    },
    "uneven": {
        "rule": "adagrad",
        "tier": "resident",
        "is_uneven": True,
        "trainer": {"gradient_accumulation_steps": 2},
    },
    "bf16": {"rule": "sgd", "tier": "host", "dtype": "float32", "trainer": {"bf16": True}},
    "workers": {"rule": "adam", "tier": "disk", "trainer": {"dataloader_num_workers": 1}},
}


def texts(is_uneven: bool) -> list[dict]:
    rows = tiny_ids(16, LONGEST, seed=3)
    lengths = [LONGEST - (3 * i) % 7 if is_uneven else LONGEST for i in range(len(rows))]
    return [{"input_ids": row[:length]} for row, length in zip(rows, lengths)]


def collate(features: list[dict]) -> dict[str, torch.Tensor]:
    """Batches that are padded to the longest text."""
    ids = [feature["input_ids"] for feature in features]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones_like(each) for each in ids])
    return {"input_ids": pad(ids), "attention_mask": mask, "labels": pad(ids, padding_value=-100)}


def train(
    folder: Path, name: str, is_cut: bool, processes: int = RANKS, is_early: bool = True, accumulates: bool = False
) -> dict:
    """What a model has become, and what a process has moved.

    Args:
        folder: of the models, and where a process may write.
        name: of the case.
        is_cut: whether the tables are cut over the processes.
        processes: of the run; one has the joint batches.
        is_early: whether batches are announced a step ahead.
        accumulates: whether one process has the batches of all, one after another, and not as a joint one.
    """
    case = {"dtype": "float64", "is_uneven": False, "trainer": {}, **CASES[name]}
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=3,
        optim="sgd",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        max_grad_norm=0.3,
        remove_unused_columns=False,
        per_device_train_batch_size=ROWS_OF_BATCH * (1 if accumulates else RANKS // processes),
        learning_rate=0.02,
        **({"gradient_accumulation_steps": RANKS} if accumulates else {}),
        **case["trainer"],
    )
    tier = {} if case["tier"] == "resident" else {"device_map": {"": "cpu", "...table": case["tier"]}}
    ranks = {"engram_ranks": "shard"} if is_cut else {}
    model = AutoModelForCausalLM.from_pretrained(folder / case["dtype"], **tier, **ranks)
    model = model.to(getattr(torch, case["dtype"]))
    model.set_experts_implementation("eager")
    for weight in (each for each_name, each in model.named_parameters() if ".table." not in each_name):
        # In a mapped file weights may not be aligned, and products then have other bits. Trainer copies them out of it
        # in runs of several processes alone.
        weight.data = weight.data.clone()
    trainer = Trainer(
        model,
        args,
        train_dataset=texts(case["is_uneven"]),
        data_collator=collate,
        optimizer_cls_and_kwargs=engram_optimizers(
            args, case["rule"], work_folder=folder / f"work{os.environ.get('RANK')}"
        ),
        callbacks=[EngramPrefetchCallback(enabled=is_early)],
    )
    trainer.train()
    tables = model.named_tables().values()
    moved = dict(next(iter(tables)).ranks.service.moved) if is_cut else {}
    return {
        "moved": moved,
        "rows": [table.gather_rows(torch.arange(table.num_rows)) for table in tables],
        "rest": {name: each.detach() for name, each in model.named_parameters() if ".table." not in name},
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "log": trainer.state.log_history,
    }


def run(rank: int, out: Path, names: list[str]) -> None:
    join(rank, RANKS, out / "store")
    result = {}
    for name in names:
        for is_cut in (True, False):
            result[name, is_cut] = train(out, name, is_cut)
            dist.barrier()
        if name == "workers":
            result["late"] = train(out, name, True, is_early=False)
            dist.barrier()
    torch.save(result, out / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def write_models(folder: Path) -> None:
    for dtype in ("float64", "float32"):
        tiny_model(tiny_config(engram_table_dtype=dtype)).save_pretrained(folder / dtype)


if __name__ == "__main__":
    write_models(Path(sys.argv[1]))
    # A fork has imported everything already.
    start_processes(run, (Path(sys.argv[1]), sys.argv[2:]), nprocs=RANKS, start_method="fork")

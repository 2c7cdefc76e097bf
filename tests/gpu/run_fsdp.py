"""FSDP2 through accelerate, beside tables over ranks. Not a test: `test_gpu_fsdp.py` launches it with accelerate.

Arguments: the folder of a model, the tier of its tables, and a folder for what is left.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from devices import device_map
from tiny import tiny_ids
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import engram_optimizers


STEPS, SAVED_AT, BATCH, HIGHEST_NORM = 4, 2, 4, 0.3


def loaded(folder: Path, device: str, tier: str, ranks: str | None = None):
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=device_map(device, tier),
        experts_implementation="eager",
        engram_ranks=ranks,
    )
    # FSDP2 wants one type. transformers keeps some weights in float32 where it is given another one.
    return model.double().train()


def arguments_of(folder: Path, use_cpu: bool = False) -> TrainingArguments:
    given = {"learning_rate": 1e-2, "adam_epsilon": 1e-4, "report_to": []}
    return TrainingArguments(str(folder / "run"), use_cpu=use_cpu, **given)


def made_optimizer(model, args: TrainingArguments):
    factory, options = engram_optimizers(args, "adam")
    return factory()(model, **options)


def batch(step: int) -> torch.Tensor:
    """(batch, tokens): of a step, over all ranks."""
    return tiny_ids(BATCH, 9, seed=step)


def train(accelerator: Accelerator, model, optimizer, steps: range) -> list[dict[str, float]]:
    """For each step the loss of this rank, and the norm of the gradients of all."""
    found = []
    for step in steps:
        ids = batch(step)[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), HIGHEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        found.append({"loss": loss.item(), "norm": float(norm)})
    return found


def rows_of(model) -> dict[str, torch.Tensor]:
    """All rows of each table, on the CPU."""
    tables = model.named_tables().items()
    return {name: table.gather_rows(torch.arange(table.num_rows)).cpu() for name, table in tables}


def kinds_of_parameters(model) -> dict[str, list[bool]]:
    """Whether parameters are sharded: those of tables, and all others."""
    tables = {id(parameter) for table in model.named_tables().values() for parameter in table.parameters()}
    kinds: dict[str, list[bool]] = {"tables": [], "others": []}
    for parameter in model.parameters():
        kinds["tables" if id(parameter) in tables else "others"].append(hasattr(parameter, "full_tensor"))
    return kinds


def main(folder: Path, tier: str, out: Path) -> None:
    # They forget what an accelerator knows, so they come first.
    args = arguments_of(out)
    accelerator = Accelerator()
    model = loaded(folder, str(accelerator.device), tier, "shard")
    model, optimizer = accelerator.prepare(model, made_optimizer(model, args))
    first = train(accelerator, model, optimizer, range(SAVED_AT))
    accelerator.save_state(str(out / "saved"))
    then = train(accelerator, model, optimizer, range(SAVED_AT, STEPS))
    rows = rows_of(model)
    accelerator.load_state(str(out / "saved"))
    again = train(accelerator, model, optimizer, range(SAVED_AT, STEPS))
    result = {
        "is_fsdp2": accelerator.is_fsdp2,
        "kinds": kinds_of_parameters(model),
        "steps": [*first, *then],
        "again": again,
        "rows": rows,
    }
    torch.save(result, out / f"result{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

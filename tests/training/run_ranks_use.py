"""Generation and evaluation over some processes. Not a test: `test_ranks_use.py` starts it and compares what it leaves.

Each process has texts of another length and number, and does its work in another order than the others.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from joining import join
from tiny import tiny_ids
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline, set_seed

from engram_hf import engram_optimizers


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}
PROMPTS = ["the list is", "Why does a class have a name?", "int", "an import of a module", "return", "def f(x): pass"]
TEXTS = 6


def generate(model, way: str, rank: int) -> torch.Tensor:
    """What a process generates, for a batch that is padded on the left and for one text after another."""
    set_seed(rank)
    ids, mask = tiny_ids(2, 6 + 2 * rank, seed=rank), torch.ones(2, 6 + 2 * rank, dtype=torch.int64)
    ids[0, : 2 + rank], mask[0, : 2 + rank] = 0, 0
    length = 3 + 4 * rank
    lengths = {"max_new_tokens": length, "min_new_tokens": length}
    batch = model.generate(ids, attention_mask=mask, **WAYS[way], **lengths)
    alone = [model.generate(tiny_ids(1, 3 + i, seed=i), **WAYS[way], **lengths) for i in range(1 + rank % 2)]
    return torch.cat([batch.flatten(), *(each.flatten() for each in alone)])


def answer(pipe, rank: int) -> list[str]:
    """What a pipeline makes of the prompts of a process, in batches."""
    asked = PROMPTS[rank : 2 * rank + 3]
    found = pipe(asked, batch_size=2, max_new_tokens=4 + 3 * rank, do_sample=False, return_full_text=False)
    return [each[0]["generated_text"] for each in found]


def collate(texts: list[dict]) -> dict[str, torch.Tensor]:
    """A batch as long as its longest text."""
    ids = [text["input_ids"] for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(each) for each in ids])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return {"input_ids": padded, "attention_mask": mask.long(), "labels": padded.masked_fill(~mask, -100)}


def texts(seed: int) -> list[dict]:
    return [{"input_ids": tiny_ids(1, 5 + 3 * i, seed=seed + i)[0]} for i in range(TEXTS)]


def arguments(folder: Path, **options) -> TrainingArguments:
    common = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2}
    return TrainingArguments(str(folder), remove_unused_columns=False, **common, **options)


def evaluate(model, folder: Path) -> dict:
    """What Trainer finds. On several processes the last one may get a batch that is there to fill up.

    Trainer's own loss over several processes counts the tokens of that batch too, unless it averages on each of them.
    """
    args = arguments(folder, average_tokens_across_devices=False)
    trainer = Trainer(model, args, data_collator=collate, eval_dataset=texts(0))
    predicted = trainer.predict(texts(10))
    return {
        "loss": trainer.evaluate()["eval_loss"],
        "predictions": torch.from_numpy(predicted.predictions),
        "labels": torch.from_numpy(predicted.label_ids),
    }


def evaluate_in_training(base: Path, folder: Path, **ranks) -> dict:
    """Losses of evaluations between the steps of a run: of Trainer, and of a loop that is longer on later processes."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, **ranks)
    model.set_experts_implementation("eager")
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "logging_steps": 1}
    args = arguments(folder, per_device_train_batch_size=1, optim="sgd", learning_rate=0.1, **options)
    trainer = Trainer(
        model,
        args,
        data_collator=collate,
        train_dataset=texts(20),
        eval_dataset=texts(0),
        optimizer_cls_and_kwargs=engram_optimizers(args, "sgd"),
    )
    trainer.train()
    own = []
    model.eval()
    for number in range(1 + args.process_index):
        with torch.no_grad():
            own.append(model(**collate(texts(30 + number))).loss)
    # The model is deleted behind this line, and other processes may still ask for its rows.
    dist.barrier()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return {"losses": losses, "own": own}


def run(rank: int, out: Path, ranks: int) -> None:
    join(rank, ranks, out / f"store{ranks}")
    model = AutoModelForCausalLM.from_pretrained(out / "base", engram_ranks="shard").eval()
    pipe = pipeline("text-generation", str(out / "base"), device="cpu", model_kwargs={"engram_ranks": "shard"})
    work = {way: lambda way=way: generate(model, way, rank) for way in WAYS}
    work["pipeline"] = lambda: answer(pipe, rank)
    names = list(work)
    names = names[rank % len(names) :] + names[: rank % len(names)]
    result = {name: work[name]() for name in names}
    result["evaluation"] = evaluate(model, out / "run")
    result["sharded"] = evaluate_in_training(out / "plain", out / "run", engram_ranks="shard")
    result["replicated"] = evaluate_in_training(out / "plain", out / "run")
    result["tables"] = [(table.nbytes, table.rows, table.moved_per_step) for table in model.engram_tables()]
    torch.save(result, out / f"result{rank}of{ranks}.pt")
    # A fork ends without the handlers by which a rank goes on answering.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    # A fork has imported everything already.
    start_processes(run, (folder, number), nprocs=number, start_method="fork")

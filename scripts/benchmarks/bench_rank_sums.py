"""How far training over ranks is from one process in float32, and what of it comes from ranks.

    python scripts/benchmarks/bench_rank_sums.py        a minute on 2 cores, 3 GB of RAM

The stock Trainer makes four steps with the demo's model, on texts of different lengths. Two processes over which the
tables are cut have a batch of two texts each. One process has the same four texts in a step: either as one batch, or as
the same two batches, which it accumulates. Whole tables on two processes give the bits of tables over ranks. The
figures are the largest differences of any row, and of any other weight, behind the last step.

Weights are copied out of their files first. In a mapped file they may not be aligned, and products then have other last
bits. Trainer copies them in runs of several processes, and leaves them where they are in others.

The lines without tables are of a Llama under torch's DistributedDataParallel, with nothing of this package. Its rows
are those of the embedding.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument
from helpers.tiny_recipe import make_config, make_model, prepare_text

from engram_hf import engram_optimizers


RANKS, STEPS, TEXTS_OF_RANK, LONGEST, SHORTEST = 2, 4, 2, 96, 9
# Rows learn at five times this rate.
LEARNING_RATE = 4e-3
PLAIN = "no tables, AdamW"
CASES = [(rule, "float32") for rule in ("sgd", "adagrad", "rowwise_adam", "adam", PLAIN)]
CASES += [("adam", "float64"), (PLAIN, "float64")]
Weights = tuple[list[torch.Tensor], list[torch.Tensor]]


def collate(texts: list[dict]) -> dict[str, torch.Tensor]:
    """A batch that is padded to its longest text."""
    ids = [text["input_ids"] for text in texts]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(ids),
        "attention_mask": pad([torch.ones_like(each) for each in ids]),
        "labels": pad(ids, padding_value=-100),
    }


def load(folder: Path, rule: str, dtype: str, is_cut: bool):
    """The model that a case trains, and what Trainer is told about its optimizer."""
    if rule == PLAIN:
        return LlamaForCausalLM.from_pretrained(folder / "plain", dtype=getattr(torch, dtype))
    ranks = {"engram_ranks": "shard"} if is_cut else {}
    model = AutoModelForCausalLM.from_pretrained(folder / dtype, **ranks).to(getattr(torch, dtype))
    # Grouped products know no float64.
    model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        if ".table." not in name:
            # Out of the mapped file; see above.
            parameter.data = parameter.data.clone()
    return model


def train(folder: Path, case: tuple[str, str], ranks: int, is_cut: bool = False, batches: int = 1) -> Weights:
    """Rows, and all other weights, behind the last step.

    Args:
        folder: of the models and texts.
        case: row rule and type.
        ranks: processes of the run.
        is_cut: whether tables are cut over them.
        batches: that one process accumulates in a step.
    """
    rule, dtype = case
    model = load(folder, rule, dtype, is_cut)
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=TEXTS_OF_RANK * RANKS // ranks // batches,
        gradient_accumulation_steps=batches,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = {} if rule == PLAIN else {"optimizer_cls_and_kwargs": engram_optimizers(args, rule)}
    texts = torch.load(folder / "texts.pt")
    Trainer(model, args, train_dataset=texts, data_collator=collate, **rows).train()
    weights = {name: each.detach() for name, each in model.named_parameters() if ".table." not in name}
    if rule == PLAIN:
        return [weights["model.embed_tokens.weight"]], list(weights.values())
    tables = model.named_tables().values()
    found = [table.gather_rows(torch.arange(table.num_rows)) for table in tables], list(weights.values())
    if is_cut:
        # The model is deleted behind this line, and other processes may still ask for its rows.
        dist.barrier()
    return found


def run(rank: int, folder: Path) -> None:
    """In a process of its own: what two processes have trained."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for number, case in enumerate(CASES):
        found = train(folder, case, RANKS, is_cut=case[0] != PLAIN)
        if case[0] != PLAIN and farthest(found, train(folder, case, RANKS)) != (0.0, 0.0):
            raise RuntimeError(f"Whole tables have trained other bits with {case}; nothing is shown.")
        if rank == 0:
            torch.save(found, folder / f"case{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


def farthest(one: Weights, other: Weights) -> tuple[float, ...]:
    """The largest difference of any row, and of any other weight."""
    pairs = [zip(*each, strict=True) for each in zip(one, other, strict=True)]
    return tuple(max(float((a.double() - b.double()).abs().max()) for a, b in each) for each in pairs)


def write_models(folder: Path) -> None:
    """Models of both types with the same weights, and texts that no process has of one length."""
    tokenizer, train, _ = prepare_text(None, "tiny")
    for dtype in ("float32", "float64"):
        config = make_config("tiny", tokenizer, engram_table_dtype=dtype)
        model = make_model(config, tokenizer, seed=0)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".table." not in name and not parameter.any():
                # What begins at zero would keep rows from having a gradient.
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / dtype)
    plain = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
    )
    LlamaForCausalLM(plain).save_pretrained(folder / "plain")
    count = STEPS * RANKS * TEXTS_OF_RANK
    lengths = [SHORTEST + (37 * number) % (LONGEST - SHORTEST) for number in range(count)]
    texts = [{"input_ids": torch.tensor(ids[:length])} for ids, length in zip(train["input_ids"], lengths)]
    torch.save(texts, folder / "texts.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Ranks against one process in float32", about(__doc__))
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        # A fork has imported everything already.
        start_processes(run, (folder,), nprocs=RANKS, start_method="fork")
        for number, case in enumerate(CASES):
            over_ranks = torch.load(folder / f"case{number}.pt")
            joint, accumulated = train(folder, case, 1), train(folder, case, 1, batches=RANKS)
            pairs = [(over_ranks, accumulated), (over_ranks, joint), (accumulated, joint)]
            lines.append([*case, *(value for pair in pairs for value in farthest(*pair))])
    pairs = ["ranks to accumulated batches", "ranks to one batch", "accumulated batches to one batch"]
    columns = {f"{pair}: {what}": ".1e" for pair in pairs for what in ("rows", "others")}
    results.tables.append(Table({"row rule": "", "type": "", **columns}, lines))
    results.write(arguments.results)


if __name__ == "__main__":
    main()

"""What learns more of a new text with the base frozen: a memory, LoRA, or biases?

    python scripts/experiments/compare_adapters.py --threads 1       an hour on one core, without engram-peft
    python scripts/experiments/compare_adapters.py --threads 1 --engram-peft ENV/bin/python
    python scripts/experiments/compare_adapters.py --only learning       time and memory are measured later

ENV is an environment with this package's requirements and engram-peft==1.2.7. What is measured is kept in
output/compare-adapters, and the same command goes on where it was stopped.

SmolLM2-135M-Instruct is trained on docstrings of Python's standard library in several ways, with the same tokens, steps
and seeds. Every run is a process of its own. Losses are nats per token.

* A memory, as add_memory.py adds it: it begins with rows of zeros.
* The same memory, which begins with random rows and a value projection of zeros. So does engram-peft, whose rows begin
  smaller.
* LoRA of rank 8 on all projections of attention and MLP.
* LoRA on the attention, of the rank whose parameters come nearest to what a step of the memory touches: distinct rows
  times their width.
* A bias on each of these projections. The model has none of its own.
* A memory together with LoRA of rank 8.
* engram-peft 1.2.7, with a memory of the same sizes in the same layers, its own trainer and optimizer, and the schedule
  of the others.

The learning rate of each way is chosen on the first seed, in runs of fewer steps, by the loss on rows of held-out files
that are not in the table. The first three are the usual rate, its half and its double; where an end is best, the search
goes on in that direction. Tables have five times the rate everywhere.

Held-out text is that of other files. Other text is what the base itself wrote for 32 chat prompts before it was
trained, and the source of the held-out files without docstrings: a loss that grows there is what was forgotten.

Time and memory come from other runs, of a few steps, that take turns. A time is the CPU time of a step on one thread,
which other programs lengthen little: the median of four steps. Memory is the most that the process ever held, with the
model and the libraries in it.
"""

import argparse
import ast
import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# This package need not be installed where engram-peft is.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from datasets import Dataset
from helpers.added_recipe import (
    HEAD_DIM,
    HEADS,
    HELD_OUT_EVERY,
    LAYERS,
    ROWS_OF_HEAD,
    ROWS_PER_STEP,
    SCHEDULE,
    SEQ_LENGTH,
    HeldOut,
    fastest_dtype,
    held_out_text,
    load_base,
    load_tokenizer,
    losses_of_rows,
    make_trainer,
    prepare_text,
)
from helpers.recipe import TABLE_LEARNING_RATE_FACTOR, make_arguments
from helpers.results import Results, Table, about, add_results_argument
from helpers.smollm import fetch_smollm
from helpers.text import gather_docstrings, split_documents
from helpers.timed_training import TURN
from helpers.turns import run_in_turns, wait_for_turn
from transformers import Trainer, TrainerCallback, get_constant_schedule_with_warmup, set_seed

from engram_hf import EngramConfig, add_engram, freeze_backbone
from engram_hf.adapters.memory_class import decoder_of
from engram_hf.adapters.memory_hooks import memory_layers_of


BASE, MEMORY, LOUD, LORA, SMALL_LORA, BIAS, BOTH, PEFT = (
    "base",
    "memory",
    "memory-loud-rows",
    "lora",
    "small-lora",
    "bias",
    "memory-and-lora",
    "engram-peft",
)
NAMES = {
    BASE: "base",
    MEMORY: "memory",
    LOUD: "memory, start='loud_rows'",
    LORA: "LoRA, rank 8",
    SMALL_LORA: "LoRA, as many parameters as a step of the memory touches",
    BIAS: "bias",
    BOTH: "memory and LoRA, rank 8",
    PEFT: "engram-peft 1.2.7",
}
# The rate in the middle of the first three that are tried.
RATES = {MEMORY: 4e-3, LOUD: 8e-3, LORA: 2e-3, SMALL_LORA: 4e-3, BIAS: 1e-2, BOTH: 2e-3, PEFT: 4e-3}
STEPS, TUNING_STEPS = 48, 12
HELD_OUT_ROWS, TUNING_ROWS, CODE_ROWS = 120, 24, 32
# The first turn is not timed.
TIMED_STEPS = 2 * TURN
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RANK = 8
ANSWER_TOKENS = 96
PROMPTS = [
    f"{ask} {what}."
    for ask in ("Tell me a short story about", "Explain to a child", "Write a letter to a friend about", "Describe")
    for what in ("the sea", "a lost dog", "how bread is made", "winter", "money", "the moon", "a train", "friendship")
]
FOLDER = Path("output/compare-adapters")


# What is trained. Each function changes a frozen model in place and returns what is trained.


def with_memory(model: nn.Module, tokenizer, seed: int, start: str = "silent") -> nn.Module:
    fields = {"layer_ids": LAYERS, "vocab_size": ROWS_OF_HEAD, "n_heads": HEADS, "head_dim": HEAD_DIM, "start": start}
    return freeze_backbone(add_engram(model, EngramConfig(**fields, seed=seed), tokenizer))


def with_lora(model: nn.Module, rank: int, modules: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Names that end so are in the backbone alone: a memory has key_proj and value_proj.
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    # PEFT freezes everything else.
    for parameter in learning:
        parameter.requires_grad_(True)
    return model


def with_bias(model: nn.Module) -> nn.Module:
    """A bias in float32 after each projection, whatever the type of its weights is."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in PROJECTIONS:
            module.added_bias = nn.Parameter(torch.zeros(module.out_features, device=module.weight.device))
            module.register_forward_hook(lambda module, _, output: output + module.added_bias.to(output.dtype))
    return model


def with_engram_peft(model: nn.Module, tokenizer, seed: int) -> nn.Module:
    import_engram_peft()
    from engram_peft import EngramConfig as Config
    from engram_peft import get_engram_model

    config = Config(
        # Divided among the heads of an order.
        engram_vocab_size_per_ngram=[ROWS_OF_HEAD * HEADS, ROWS_OF_HEAD * HEADS],
        ngram_sizes=[2, 3],
        n_head_per_ngram=HEADS,
        embedding_dim=2 * HEADS * HEAD_DIM,
        target_layers=LAYERS,
        hc_mult=1,
        learning_rate_multiplier=TABLE_LEARNING_RATE_FACTOR,
        seed=seed,
    )
    return get_engram_model(model, config, tokenizer, train_mode="engram_only")


def import_engram_peft() -> None:
    """Make the package importable where Python is older than the one that it is written for."""
    if sys.version_info < (3, 12):
        import typing

        from typing_extensions import override

        typing.override = override


def make_ways(rank: int, tokenizer, seed: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        MEMORY: lambda model: with_memory(model, tokenizer, seed),
        LOUD: lambda model: with_memory(model, tokenizer, seed, "loud_rows"),
        LORA: lambda model: with_lora(model, RANK, PROJECTIONS),
        SMALL_LORA: lambda model: with_lora(model, rank, ATTENTION),
        BIAS: with_bias,
        BOTH: lambda model: with_lora(with_memory(model, tokenizer, seed), RANK, PROJECTIONS),
        PEFT: lambda model: with_engram_peft(model, tokenizer, seed),
    }


def trainer_of_engram_peft(model: nn.Module, train: Dataset, arguments: argparse.Namespace, callbacks: list) -> Trainer:
    from engram_peft import EngramTrainer

    fields = (FOLDER, arguments.steps, arguments.seed, ROWS_PER_STEP, arguments.learning_rate)
    settings = make_arguments(*fields, lr_scheduler_type=SCHEDULE)
    optimizer = model.create_optimizer(base_learning_rate=arguments.learning_rate)
    # In place of a constant rate its trainer would make a schedule of its own.
    schedule = get_constant_schedule_with_warmup(optimizer, int(settings.warmup_steps))
    given = {"train_dataset": train, "callbacks": callbacks, "optimizers": (optimizer, schedule)}
    return EngramTrainer(model=model, args=settings, **given)


def parameters_of_attention(model: nn.Module) -> int:
    """That LoRA of rank 1 has on all attention projections."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ATTENTION]
    return sum(module.in_features + module.out_features for module in found)


# One run, in a process of its own.


class StepTimes(TrainerCallback):
    """Milliseconds of CPU time of each step after the first turn."""

    def __init__(self):
        self.milliseconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % TURN == 0:
            wait_for_turn()
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > TURN:
            self.milliseconds.append(1000 * (time.process_time() - self.start))


class TouchedNumbers:
    """Counts distinct rows times their width in each training forward."""

    def __init__(self, layers: list):
        self.of_forwards: list[int] = []
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, args: self.count(layer, args[1], layer is layers[0]))

    def count(self, layer: nn.Module, row_ids: torch.Tensor, is_first: bool) -> None:
        if layer.training:
            if is_first:
                self.of_forwards.append(0)
            distinct = sum(len(of_head.unique()) for of_head in row_ids.flatten(0, 1).unbind(-1))
            self.of_forwards[-1] += distinct * layer.table.head_dim


def peak_mib() -> float:
    """Most memory of this process until now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_once(arguments: argparse.Namespace) -> dict[str, float]:
    """Train in one way and measure losses; or time a few steps, where that is asked for."""
    torch.set_num_threads(arguments.threads)
    source = fetch_smollm()
    tokenizer = load_tokenizer(source)
    model = load_base(source, getattr(torch, arguments.dtype)).requires_grad_(False)
    if arguments.way == BASE:
        write_texts(model, tokenizer, arguments)
    texts = torch.load(texts_of(arguments.held_out_rows))
    set_seed(arguments.seed)
    found: dict[str, float] = {"parameters of attention": parameters_of_attention(model)}
    if arguments.way != BASE:
        rows = texts["train"].tolist()
        train = Dataset.from_dict({"input_ids": rows, "labels": rows})
        model = make_ways(arguments.rank, tokenizer, arguments.seed)[arguments.way](model)
        has_memory = arguments.way in (MEMORY, LOUD, BOTH)
        # Counting takes time.
        touched = TouchedNumbers(memory_layers_of(decoder_of(model)) if has_memory and not arguments.timed else [])
        times = StepTimes()
        callbacks = [times] if arguments.timed else []
        if arguments.way == PEFT:
            trainer = trainer_of_engram_peft(model, train, arguments, callbacks)
        else:
            fields = {"learning_rate": arguments.learning_rate, "seed": arguments.seed, "callbacks": tuple(callbacks)}
            trainer = make_trainer(model, train, FOLDER, arguments.steps, **fields)
        trainer.train()
        if arguments.timed:
            return {"milliseconds": statistics.median(times.milliseconds), "peak": peak_mib()}
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        found["touched"] = statistics.mean(touched.of_forwards) if touched.of_forwards else 0
    if arguments.way == BASE or arguments.is_tuning:
        found["tuning"] = float(losses_of_rows(model, HeldOut(*texts["tuning"]), "tuning").mean())
    if not arguments.is_tuning:
        for name in ("held-out", "own chats", "code"):
            found[name] = float(losses_of_rows(model, HeldOut(*texts[name]), name).mean())
    return found


def texts_of(held_out_rows: int) -> Path:
    return FOLDER / f"texts-{held_out_rows}.pt"


def write_texts(model: nn.Module, tokenizer, arguments: argparse.Namespace) -> None:
    """Rows of ids with the names of their documents, for all runs."""
    train, held_out = prepare_text(tokenizer, None, held_out_rows=arguments.held_out_rows + TUNING_ROWS)
    every = len(held_out.ids) // TUNING_ROWS
    is_tuning = [i % every == every // 2 and i // every < TUNING_ROWS for i in range(len(held_out.ids))]
    texts = {
        "train": torch.tensor(train["input_ids"]),
        "tuning": rows_where(held_out, is_tuning),
        "held-out": rows_where(held_out, [not each for each in is_tuning]),
        "own chats": write_chats(model, tokenizer),
        "code": held_out_code(tokenizer),
    }
    torch.save(texts, texts_of(arguments.held_out_rows))


def rows_where(text: HeldOut, chosen: list[bool]) -> tuple[torch.Tensor, list[str]]:
    names = [name for name, is_chosen in zip(text.documents, chosen, strict=True) if is_chosen]
    return text.ids[torch.tensor(chosen)], names


def held_out_code(tokenizer) -> tuple[torch.Tensor, list[str]]:
    """Code of the files whose docstrings are held out, without docstrings and comments."""
    _, held_out = split_documents(gather_docstrings(), HELD_OUT_EVERY)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documents = []
    for name, _ in held_out:
        tree = ast.parse((Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8", "replace"))
        for node in ast.walk(tree):
            if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        documents.append((name, ast.unparse(tree)))
    text = held_out_text(tokenizer, documents, SEQ_LENGTH, CODE_ROWS)
    return text.ids, text.documents


@torch.no_grad()
def write_chats(model: nn.Module, tokenizer) -> tuple[torch.Tensor, list[str]]:
    """What the base answers to chat prompts: prompt and answer as rows of text."""
    padding_side, tokenizer.padding_side = tokenizer.padding_side, "left"
    set_seed(0)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    tokenizer.padding_side = padding_side
    lengths = {"min_new_tokens": ANSWER_TOKENS, "max_new_tokens": ANSWER_TOKENS}
    generated = model.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, **lengths)
    # Rows end as the shortest of them does, and the longest prompt is cut, so that no row has padding.
    length = int(prompts["attention_mask"].sum(1).min()) + ANSWER_TOKENS
    return generated[:, -length:].cpu(), [str(i) for i in range(len(PROMPTS))]


# All runs.


class Runs:
    """Starts runs, and keeps what each of them found in a file."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.ways = [way for way in RATES if way != PEFT or arguments.engram_peft is not None]
        (FOLDER / "runs").mkdir(parents=True, exist_ok=True)

    def command(self, way: str, given: dict) -> list[str]:
        python = self.arguments.engram_peft if way == PEFT else sys.executable
        flags = [f"--{name}={value}" for name, value in given.items() if not isinstance(value, bool)]
        return [python, __file__, f"--way={way}", *flags, *(f"--{name}" for name in given if given[name] is True)]

    def given(self, way: str, seed: int, rate: float, rank: int, steps: int) -> dict:
        return {
            "seed": seed,
            "learning-rate": rate,
            "rank": rank if way == SMALL_LORA else 0,
            "steps": steps,
            "held-out-rows": self.arguments.held_out_rows,
            "threads": self.arguments.threads,
            "dtype": self.arguments.dtype,
        }

    def found(self, way: str, seed: int = 0, rate: float = 0.0, rank: int = 0, is_tuning: bool = False) -> dict:
        """What one run found, now or before.

        Raises:
            RuntimeError: it failed; the message ends with what it printed.
        """
        steps = 0 if way == BASE else TUNING_STEPS if is_tuning else self.arguments.steps
        given = {**self.given(way, seed, rate, rank, steps), "is-tuning": is_tuning}
        kept = FOLDER / "runs" / f"{way}-seed{seed}-rate{rate:g}-{steps}{'-tuning' if is_tuning else ''}.json"
        if kept.is_file():
            content = json.loads(kept.read_text())
            if content["given"] == given:
                return content["found"]
        ended = subprocess.run(self.command(way, given), capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{way} with seed {seed} failed:\n{ended.stderr[-3000:]}")
        found = json.loads(ended.stdout.strip().splitlines()[-1])
        kept.write_text(json.dumps({"given": given, "found": found}, indent=1) + "\n")
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
        print(f"{way}, seed {seed}, rate {rate:g}, {steps} steps: {figures}", flush=True)
        return found

    def best_rate(self, way: str, rank: int) -> tuple[float, list[list]]:
        """The rate with the least loss after a few steps, and all that were tried with their losses."""
        losses: dict[float, float] = {}

        def loss(rate: float) -> float:
            if rate not in losses:
                losses[rate] = self.found(way, self.arguments.seeds[0], rate, rank, is_tuning=True)["tuning"]
            return losses[rate]

        best = RATES[way]
        while (better := min((best / 2, best, best * 2), key=loss)) != best:
            best = better
        return best, [[NAMES[way], rate, losses[rate]] for rate in sorted(losses)]

    def timed(self, rank: int, rates: dict[str, float]) -> dict[str, dict[str, float]]:
        """Time and memory of every way, measured in turns."""
        kept = FOLDER / "runs" / "timed.json"
        given = {
            way: {**self.given(way, 0, rates[way], rank, TIMED_STEPS), "threads": 1, "timed": True} for way in self.ways
        }
        if kept.is_file() and (content := json.loads(kept.read_text()))["given"] == given:
            return content["found"]
        lines = run_in_turns({way: self.command(way, given[way]) for way in self.ways})
        found = {way: json.loads(line) for way, line in lines.items()}
        kept.write_text(json.dumps({"given": given, "found": found}, indent=1) + "\n")
        return found


def compare(arguments: argparse.Namespace) -> list[Table]:
    """The tables; empty where only a part of the figures was asked for."""
    runs = Runs(arguments)
    base = runs.found(BASE)
    rates: dict[str, float] = {}
    tried: list[list] = []
    rank = 1
    for way in runs.ways:
        rates[way], of_way = runs.best_rate(way, rank)
        tried += of_way
        if way == MEMORY:
            touched = runs.found(way, arguments.seeds[0], rates[way], is_tuning=True)["touched"]
            rank = max(1, round(touched / base["parameters of attention"]))
    learned: dict[str, list[dict]] = {way: [] for way in runs.ways}
    if arguments.only != "costs":
        for seed in arguments.seeds:
            for way in runs.ways:
                learned[way].append(runs.found(way, seed, rates[way], rank))
    timed = runs.timed(rank, rates) if arguments.only != "learning" else {}
    if arguments.only is not None:
        return []
    of_rates = Table({"way": "", "rate": "g", "loss": ".4f"}, tried, f"Rates, {TUNING_STEPS} steps, the first seed")
    return [table_of_losses(base, learned, rates), table_of_costs(learned, timed, rank), of_rates]


def table_of_losses(base: dict, learned: dict[str, list[dict]], rates: dict[str, float]) -> Table:
    columns = {
        "way": "",
        "rate": "g",
        "held-out loss, mean": ".4f",
        "lowest to highest": "",
        "to the base": "+.4f",
        "own chats, to the base": "+.4f",
        "code, to the base": "+.4f",
    }
    rows = [[NAMES[BASE], None, base["held-out"], "", 0.0, 0.0, 0.0]]
    for way, found in learned.items():
        losses = [each["held-out"] for each in found]
        differences = [statistics.mean(each[t] for each in found) - base[t] for t in ("held-out", "own chats", "code")]
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        rows.append([NAMES[way], rates[way], statistics.mean(losses), spread, *differences])
    note = f"The base has {base['own chats']:.3f} on its own chats and {base['code']:.3f} on code."
    return Table(columns, rows, "What is learned, and what is forgotten", note)


def table_of_costs(learned: dict[str, list[dict]], timed: dict[str, dict[str, float]], rank: int) -> Table:
    columns = {
        "way": "",
        "parameters that learn": ",",
        "numbers in the rows that a step touches": ",",
        "CPU ms a step": ",.0f",
        "time to the memory's": ".2f",
        "peak MiB": ",.0f",
    }
    rows = []
    for way, found in learned.items():
        name = f"{NAMES[way]} (rank {rank})" if way == SMALL_LORA else NAMES[way]
        touched = round(statistics.mean(each["touched"] for each in found)) or None
        ratio = timed[way]["milliseconds"] / timed[MEMORY]["milliseconds"]
        cost = [timed[way]["milliseconds"], ratio, timed[way]["peak"]]
        rows.append([name, int(found[0]["parameters"]), touched, *cost])
    note = "The two memories do the same work: what their times differ by is noise."
    return Table(columns, rows, "What it costs", note)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each run (default: {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument(
        "--held-out-rows", type=int, default=HELD_OUT_ROWS, help=f"rows of held-out text (default: {HELD_OUT_ROWS})"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of each run (default: as torch chooses)"
    )
    parser.add_argument("--dtype", help="of the frozen model (default: what this machine computes fastest)")
    parser.add_argument("--engram-peft", metavar="PYTHON", help="interpreter of an environment with engram-peft")
    parser.add_argument("--only", choices=["learning", "costs"], help="measure this and keep it, and write no results")
    add_results_argument(parser)
    # Of one run.
    parser.add_argument("--way", help=argparse.SUPPRESS)
    for name, kind in (("--seed", int), ("--rank", int), ("--learning-rate", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    for name in ("--is-tuning", "--timed"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.way is not None:
        print(json.dumps(run_once(arguments)))
        return
    arguments.dtype = arguments.dtype or str(fastest_dtype()).removeprefix("torch.")
    tokens = arguments.steps * ROWS_PER_STEP * SEQ_LENGTH
    held_out = arguments.held_out_rows * (SEQ_LENGTH - 1)
    threads = f"{arguments.threads} thread{'s' * (arguments.threads > 1)}"
    size = (
        f"{tokens:,} tokens in {arguments.steps} steps a run, {len(arguments.seeds)} seeds, {held_out:,} held-out "
        f"tokens, the base in {arguments.dtype}, {threads}."
    )
    results = Results("A memory beside LoRA, biases and engram-peft", f"{about(__doc__)}\n\n{size}")
    if tables := compare(arguments):
        results.tables = tables
        results.write(arguments.results)


if __name__ == "__main__":
    main()

"""What learns more of a new text with the base frozen: a memory, LoRA, or biases?

    python scripts/experiments/compare_adapters.py        about two hours on 2 cores

SmolLM2-135M-Instruct is trained on docstrings of Python's standard library in six ways, with the same tokens, steps and
seeds. Every run is a process of its own. Losses are nats per token.

* A memory, as add_memory.py adds it.
* LoRA of rank 8 on all projections of attention and MLP.
* LoRA on the attention, of the rank whose parameters come nearest to what a step of the memory touches: distinct rows
  times their width.
* A bias on each of these projections. The model has none of its own.
* A memory together with LoRA of rank 8.

Each way is tried with several learning rates on the first seed, and keeps the one with the least loss on held-out text.
The held-out text is that of other files. Other text is what the base itself wrote for 32 chat prompts before it was
trained, and the source of the held-out files without docstrings: a loss that grows there is what was forgotten.
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
from helpers.added_recipe import (
    HEAD_DIM,
    HEADS,
    HELD_OUT_EVERY,
    HELD_OUT_ROWS,
    LAYERS,
    ROWS_OF_HEAD,
    ROWS_PER_STEP,
    SEQ_LENGTH,
    STEPS,
    HeldOut,
    fastest_dtype,
    held_out_text,
    load_base,
    load_tokenizer,
    losses_of_rows,
    make_trainer,
    prepare_text,
)
from helpers.results import Results, Table, about, add_results_argument
from helpers.smollm import fetch_smollm
from helpers.text import gather_docstrings, split_documents
from transformers import TrainerCallback, set_seed

from engram_hf import EngramConfig, add_engram, freeze_backbone


BASE, MEMORY, LORA, SMALL_LORA, BIAS, BOTH = (
    "base",
    "memory",
    "LoRA, rank 8",
    "LoRA, as many parameters as a step of the memory touches",
    "bias",
    "memory and LoRA, rank 8",
)
RATES = {
    MEMORY: [1e-3, 2e-3, 4e-3],
    LORA: [5e-4, 1e-3, 2e-3],
    SMALL_LORA: [1e-3, 2e-3, 4e-3],
    BIAS: [2e-3, 5e-3, 1e-2],
    BOTH: [5e-4, 1e-3, 2e-3],
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RANK = 8
ANSWER_TOKENS = 96
PROMPTS = [
    f"{ask} {what}."
    for ask in ("Tell me a short story about", "Explain to a child", "Write a letter to a friend about", "Describe")
    for what in ("the sea", "a lost dog", "how bread is made", "winter", "money", "the moon", "a train", "friendship")
]


# What is trained. Each function changes a frozen model in place and returns what Trainer gets.


def with_memory(model: nn.Module, tokenizer, seed: int) -> nn.Module:
    fields = {"layer_ids": LAYERS, "vocab_size": ROWS_OF_HEAD, "n_heads": HEADS, "head_dim": HEAD_DIM}
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


def make_ways(rank: int, tokenizer, seed: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        MEMORY: lambda model: with_memory(model, tokenizer, seed),
        LORA: lambda model: with_lora(model, RANK, PROJECTIONS),
        SMALL_LORA: lambda model: with_lora(model, rank, ATTENTION),
        BIAS: with_bias,
        BOTH: lambda model: with_lora(with_memory(model, tokenizer, seed), RANK, PROJECTIONS),
    }


def parameters_of_attention(model: nn.Module) -> int:
    """That LoRA of rank 1 has on all attention projections."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ATTENTION]
    return sum(module.in_features + module.out_features for module in found)


# One run, in a process of its own.


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


class TouchedNumbers:
    """Counts distinct rows times their width in each training forward."""

    def __init__(self, model: nn.Module):
        self.of_forwards: list[int] = []
        layers = [module for module in model.modules() if hasattr(module, "table") and hasattr(module, "value_proj")]
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
    torch.set_num_threads(arguments.threads)
    source = fetch_smollm()
    tokenizer = load_tokenizer(source)
    train, held_out = prepare_text(tokenizer, None, held_out_rows=arguments.held_out_rows)
    others = {"own chats": HeldOut(*torch.load(arguments.chats)), "code": held_out_code(tokenizer, arguments)}
    set_seed(arguments.seed)
    model = load_base(source, getattr(torch, arguments.dtype)).requires_grad_(False)
    found: dict[str, float] = {}
    if arguments.way == BASE:
        found["parameters of attention"] = parameters_of_attention(model)
    else:
        model = make_ways(arguments.rank, tokenizer, arguments.seed)[arguments.way](model)
        touched, times = TouchedNumbers(model), StepTimes()
        fields = {"learning_rate": arguments.learning_rate, "seed": arguments.seed, "callbacks": (times,)}
        make_trainer(model, train, Path("output/compare-adapters"), arguments.steps, **fields).train()
        found["seconds"] = statistics.median(times.seconds)
        found["peak"] = peak_mib()
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        found["touched"] = statistics.mean(touched.of_forwards) if touched.of_forwards else 0
    found["held-out"] = float(losses_of_rows(model, held_out, "held-out").mean())
    for name, text in others.items():
        found[name] = float(losses_of_rows(model, text, name).mean())
    return found


def held_out_code(tokenizer, arguments: argparse.Namespace) -> HeldOut:
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
    return held_out_text(tokenizer, documents, SEQ_LENGTH, arguments.other_rows)


@torch.no_grad()
def write_chats(path: Path, dtype: torch.dtype) -> None:
    """Let the base answer chat prompts, and keep prompt and answer as rows of text."""
    source = fetch_smollm()
    tokenizer, model = load_tokenizer(source), load_base(source, dtype)
    tokenizer.padding_side = "left"
    set_seed(0)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    generated = model.generate(
        **prompts, do_sample=True, temperature=1.0, top_k=0, min_new_tokens=96, max_new_tokens=96
    )
    # Rows end as the shortest of them does, and the longest prompt is cut, so that no row has padding.
    length = int(prompts["attention_mask"].sum(1).min()) + ANSWER_TOKENS
    torch.save((generated[:, -length:].cpu(), [str(i) for i in range(len(PROMPTS))]), path)


# All runs.


def start(way: str, seed: int, rate: float, rank: int, arguments: argparse.Namespace, chats: Path) -> dict[str, float]:
    """One run.

    Raises:
        RuntimeError: it failed; the message ends with what it printed.
    """
    given = {
        "way": way,
        "seed": seed,
        "learning-rate": rate,
        "rank": rank,
        "steps": arguments.steps,
        "held-out-rows": arguments.held_out_rows,
        "other-rows": arguments.other_rows,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "chats": chats,
    }
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items())]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{way} with seed {seed} failed:\n{ended.stderr[-3000:]}")
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    figures = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
    print(f"{way}, seed {seed}, rate {rate:g}: {figures}", flush=True)
    return found


def compare(arguments: argparse.Namespace, chats: Path) -> list[Table]:
    write_chats(chats, getattr(torch, arguments.dtype))
    base = start(BASE, arguments.seeds[0], 0.0, 0, arguments, chats)
    runs: dict[str, list[dict[str, float]]] = {}
    chosen: dict[str, float] = {}
    tried: list[list] = []
    rank = 1
    for way in (MEMORY, LORA, SMALL_LORA, BIAS, BOTH):
        of_rates = {}
        for rate in RATES[way][1:2] if arguments.untuned else RATES[way]:
            of_rates[rate] = start(way, arguments.seeds[0], rate, rank, arguments, chats)
            tried.append([way, rate, of_rates[rate]["held-out"]])
        chosen[way] = min(of_rates, key=lambda rate: of_rates[rate]["held-out"])
        runs[way] = [of_rates[chosen[way]]]
        if way == MEMORY:
            rank = max(1, round(runs[way][0]["touched"] / base["parameters of attention"]))
    for seed in arguments.seeds[1:]:
        for way in runs:
            runs[way].append(start(way, seed, chosen[way], rank, arguments, chats))
    rates = Table({"way": "", "rate": "g", "held-out loss": ".4f"}, tried, "Learning rates on the first seed")
    return [table_of(base, runs, chosen, rank), rates]


def table_of(base: dict, runs: dict[str, list[dict]], chosen: dict[str, float], rank: int) -> Table:
    columns = {
        "way": "",
        "rate": "g",
        "parameters that learn": ",",
        "numbers in the rows that a step touches": ",",
        "held-out loss, mean": ".4f",
        "lowest to highest": "",
        "to the base": "+.4f",
        "own chats, to the base": "+.4f",
        "code, to the base": "+.4f",
        "ms/step": ",.0f",
        "peak MiB": ",.0f",
    }
    rows = [[BASE, None, 0, None, base["held-out"], "", 0.0, 0.0, 0.0, None, None]]
    for way, found in runs.items():
        mean = {name: statistics.mean(each[name] for each in found) for name in found[0]}
        losses = [each["held-out"] for each in found]
        dense = int(mean["parameters"])
        name = f"{way} (rank {rank})" if way == SMALL_LORA else way
        rows.append(
            [
                name,
                chosen[way],
                dense,
                round(mean["touched"]) or None,
                mean["held-out"],
                f"{min(losses):.4f} to {max(losses):.4f}",
                *(mean[text] - base[text] for text in ("held-out", "own chats", "code")),
                1000 * mean["seconds"],
                mean["peak"],
            ]
        )
    note = f"The base has {base['own chats']:.3f} on its own chats and {base['code']:.3f} on code."
    return Table(columns, rows, note=note)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each run (default: {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument(
        "--held-out-rows", type=int, default=HELD_OUT_ROWS, help=f"rows of held-out text (default: {HELD_OUT_ROWS})"
    )
    parser.add_argument("--other-rows", type=int, default=64, help="rows of code (default: 64)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of each run (default: as torch chooses)"
    )
    parser.add_argument("--untuned", action="store_true", help="take the middle one of the learning rates of each way")
    parser.add_argument("--dtype", help="of the frozen model (default: what this machine computes fastest)")
    add_results_argument(parser)
    # Of one run.
    for name in ("--way", "--chats"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name, kind in (("--seed", int), ("--rank", int), ("--learning-rate", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.way is not None:
        print(json.dumps(run_once(arguments)))
        return
    arguments.dtype = arguments.dtype or str(fastest_dtype()).removeprefix("torch.")
    tokens = arguments.steps * ROWS_PER_STEP * SEQ_LENGTH
    fewer = f" This run has {arguments.steps} steps in place of {STEPS}." if arguments.steps < STEPS else ""
    fewer += " Learning rates were not tried: each way has the middle one of its list." if arguments.untuned else ""
    size = f"{tokens:,} tokens a run, {len(arguments.seeds)} seeds, the base in {arguments.dtype}.{fewer}"
    results = Results("A memory beside LoRA and biases", f"{about(__doc__)}\n\n{size}")
    folder = Path("output/compare-adapters")
    folder.mkdir(parents=True, exist_ok=True)
    results.tables = compare(arguments, folder / "chats.pt")
    results.write(arguments.results)


if __name__ == "__main__":
    main()

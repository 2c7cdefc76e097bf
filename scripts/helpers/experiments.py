"""What each experiment compares. An arm is a config and what is done to its tables; a run is an arm with a seed.

Sizes follow the demo's model (tiny_recipe.py), and for a GPU a model of about a hundred million parameters. All arms of
a scale read the same tokens in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engram_hf import EngramMoEConfig, count_parameters
from helpers.tiny_recipe import make_config, parameters_of_expert, without_memory


@dataclass(frozen=True)
class Scale:
    """preset: in tiny_recipe.py. fields: of the config, over those of the preset. tokens: of one run.

    hours_per_run: CPU hours that a run was measured to take on one thread; None where it was not measured.
    """

    preset: str
    tokens: int
    fields: dict[str, Any] = field(default_factory=dict)
    hours_per_run: float | None = None


SCALES = {
    "tiny": Scale("tiny", 3_000_000, hours_per_run=0.22),
    # For a GPU. It trains in several passes over the default text, or in one over a larger --dataset.
    "100m": Scale(
        "small",
        300_000_000,
        {
            "vocab_size": 16384,
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "intermediate_size": 1536,
            "moe_intermediate_size": 256,
            "n_routed_experts": 24,
            "hc_mult": 4,
            "engram_layer_ids": [1, 4],
            "engram_vocab_size": 30_000,
            "engram_n_heads": 8,
            "engram_head_dim": 32,
        },
    ),
}


@dataclass(frozen=True)
class Arm:
    """One kind of model in an experiment.

    name: of its runs and files.
    title: in tables.
    family: models of a family share the learning rate that was tuned for its first arm.
    config: makes the config of `make(**fields)`, which takes what differs from the scale's model.
    tables: what is done to the tables: "" (they learn), "zero", "random" (as they were drawn; neither learns) or
        "shuffled" (rows change places at each step).
    is_without_gate: the gate is 0.5 for every token.
    """

    name: str
    title: str
    family: str
    config: Callable[[Callable[..., EngramMoEConfig]], EngramMoEConfig]
    tables: str = ""
    is_without_gate: bool = False


@dataclass(frozen=True)
class Experiment:
    """number, title, claim: of the page. runs: (arm, seed) in the order in which they are trained.

    reads: experiments whose runs it uses besides its own. why_not: where there is nothing to run, the reason.
    """

    name: str
    number: int
    title: str
    claim: str
    runs: list[tuple[Arm, int]] = field(default_factory=list)
    reads: tuple[str, ...] = ()
    why_not: str = ""


def maker(scale: Scale, tokenizer) -> Callable[..., EngramMoEConfig]:
    """A function that makes the config of a scale, with the fields that it is given changed."""
    return lambda **fields: make_config(scale.preset, tokenizer, **{**scale.fields, **fields})


def dense(make: Callable[..., EngramMoEConfig]) -> EngramMoEConfig:
    """Without experts and memory, as many active parameters as EngramMoE."""
    layers = make().num_hidden_layers
    narrow = {"engram_layer_ids": [], "first_k_dense_replace": layers}
    missing = count_parameters(make()).active - count_parameters(make(**narrow)).active
    width = make().intermediate_size + round(missing / (3 * make().hidden_size * layers))
    return make(**narrow, intermediate_size=width)


def allocated(make: Callable[..., EngramMoEConfig], share_of_experts: float) -> EngramMoEConfig:
    """EngramMoE whose experts and tables have together as many parameters as they always have, and of those that a
    token does not compute with the experts have this share."""
    if share_of_experts == 1:
        return without_memory(make)
    config = make()
    layers = config.num_hidden_layers - config.first_k_dense_replace
    of_unused = layers * parameters_of_expert(config)  # parameters of one more routed expert in every layer
    budget = count_parameters(config).tables + (config.n_routed_experts - config.num_experts_per_tok) * of_unused
    unused = round(budget * share_of_experts / of_unused)
    heads = len(config.engram_layer_ids) * (config.engram_max_ngram_size - 1) * config.engram_n_heads
    rows = round((budget - unused * of_unused) / (heads * config.engram_head_dim))
    return make(n_routed_experts=config.num_experts_per_tok + unused, engram_vocab_size=max(2, rows))


def rows_per_head(make: Callable[..., EngramMoEConfig], factor: float) -> EngramMoEConfig:
    return make(engram_vocab_size=round(make().engram_vocab_sizes[0] * factor))


def orders(make: Callable[..., EngramMoEConfig], largest: int) -> EngramMoEConfig:
    """N-grams of 2 up to the largest order, in tables of the same size."""
    of_reference = make().engram_vocab_sizes[0] * (make().engram_max_ngram_size - 1)
    return make(engram_max_ngram_size=largest, engram_vocab_size=round(of_reference / (largest - 1)))


ENGRAM = Arm("engram", "EngramMoE", "engram", lambda make: make())
MOE = Arm("moe", "MoE, same total and active parameters", "moe", without_memory)
DENSE = Arm("dense", "dense, same active parameters", "dense", dense)
ZERO = Arm("zero-tables", "tables of zeros that cannot learn", "engram", lambda make: make(), "zero")
RANDOM = Arm("random-tables", "random tables that are not trained", "engram", lambda make: make(), "random")
SHUFFLED = Arm("shuffled-hash", "a hash that is shuffled at each step", "engram", lambda make: make(), "shuffled")
CONTROLS = [ENGRAM, MOE, DENSE, ZERO, RANDOM, SHUFFLED]
SEEDS = (0, 1, 2)
# Of no reported run.
TUNING_SEED = 1000

# Rows per head over those of the reference: two decades, the reference in their middle.
ROW_FACTORS = (0.1, 0.316, 1, 3.16, 10)
MEMORY_SIZES = [
    Arm(f"rows-{factor:g}x", f"{factor:g} times the rows", "engram", lambda make, f=factor: rows_per_head(make, f))
    if factor != 1
    else ENGRAM
    for factor in ROW_FACTORS
]
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.4)
ALLOCATIONS = [
    Arm(
        f"experts-{share:.0%}".replace("%", ""),
        f"{share:.0%} of the sparse budget in experts",
        "engram",
        lambda make, s=share: allocated(make, s),
    )
    if share != 1
    else MOE
    for share in SHARES
]
ABLATIONS = [
    Arm("one-stream", "one residual stream", "engram", lambda make: make(hc_mult=1)),
    Arm("no-compression", "raw token ids", "engram", lambda make: make(engram_compressed_vocab_size=None)),
    Arm("no-gate", "a gate of 0.5 for every token", "engram", lambda make: make(), is_without_gate=True),
    Arm("no-convolution", "no short convolution", "engram", lambda make: make(engram_kernel_size=0)),
    Arm("orders-2", "2-grams alone", "engram", lambda make: orders(make, 2)),
    Arm("orders-234", "2-, 3- and 4-grams", "engram", lambda make: orders(make, 4)),
    Arm("layer-0", "memory in layer 0", "engram", lambda make: make(engram_layer_ids=[0])),
    Arm("layer-2", "memory in layer 2", "engram", lambda make: make(engram_layer_ids=[2])),
    Arm(
        "layer-last",
        "memory in the last layer",
        "engram",
        lambda make: make(engram_layer_ids=[make().num_hidden_layers - 1]),
    ),
]


def of_seeds(arms: list[Arm], seeds: tuple[int, ...]) -> list[tuple[Arm, int]]:
    """Seed by seed, so that an experiment that was stopped has compared all arms."""
    return [(arm, seed) for seed in seeds for arm in arms]


EXPERIMENTS = [
    Experiment(
        "controls",
        1,
        "Controls",
        "At equal parameters and equal compute, a memory lowers the loss (27B: 1.622 with, 1.634 without).",
        of_seeds(CONTROLS, SEEDS),
    ),
    Experiment(
        "facts",
        2,
        "Facts and reading",
        "Without its memory a model keeps 29 % of TriviaQA and 93 % of reading: facts live in the tables.",
        reads=("controls",),
    ),
    Experiment(
        "rows",
        3,
        "Infinite memory",
        "At fixed compute, ten times the rows lower the loss by 0.028, on a straight line over the logarithm.",
        of_seeds(MEMORY_SIZES, (0, 1)),
    ),
    Experiment(
        "allocation",
        4,
        "The U-curve",
        "With the sparse budget fixed, the loss over the experts' share is a U with its minimum at 75 to 80 %.",
        of_seeds(ALLOCATIONS, (0, 1)),
    ),
    Experiment(
        "ablations",
        5,
        "Ablations",
        "Most to least: one stream +0.0065, no compression +0.0057, no gate +0.0046, 4-grams +0.0017, no convolution "
        "+0.0005; layer 1 is best.",
        of_seeds(ABLATIONS, (0,)),
        reads=("controls",),
    ),
    Experiment(
        "pretrained",
        6,
        "A real pretrained model",
        "None: the paper's models are trained from the start.",
        why_not="Nobody has written the runs on this text yet. On other text, "
        "scripts/experiments/compare_adapters.py compares a memory with LoRA.",
    ),
    Experiment(
        "depth",
        7,
        "Effective depth",
        "With a memory predictions settle earlier: layer 5 resembles layer 12 without.",
        reads=("controls",),
    ),
    Experiment(
        "long",
        8,
        "Long context",
        "At 32k tokens multi-query needles rise from 84.2 to 97.0, variable tracking from 77.0 to 89.0.",
        why_not="It needs a model that finds needles at the length that it was trained at, and none of this size was "
        "trained for that. YaRN itself is tested exactly, in tests/modeling/test_yarn.py.",
    ),
]

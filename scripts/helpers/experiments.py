"""What each experiment compares. An arm is a config and what is done to its tables; a run is an arm with a seed.

Sizes follow the demo's model (tiny_recipe.py), and for a GPU a model of about a hundred million parameters. All arms of
a scale read the same tokens in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from engram_hf import EngramMoEConfig, count_parameters
from engram_hf.planning import PAPER_SHARES, allocate
from helpers.tiny_recipe import PRESETS, make_config, without_memory


@dataclass(frozen=True)
class Scale:
    """preset: of tiny_recipe.py, or of the package. fields: of the config, over the preset's. tokens: of one run.

    hours_per_run: CPU hours that a run was measured to take on one thread; None where it was not measured.
    disk_limit_bytes: of memory for a run whose tables lie on disk; None where it is not limited.
    """

    preset: str
    tokens: int
    fields: dict[str, Any] = field(default_factory=dict)
    hours_per_run: float | None = None
    disk_limit_bytes: int | None = None


SCALES = {
    "tiny": Scale("tiny", 3_000_000, hours_per_run=0.12, disk_limit_bytes=2_000_000_000),
    # For a GPU: the package's preset. It reads the default text several times, or a larger --dataset once.
    "100m": Scale("100m", 300_000_000),
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
    is_on_disk: the tables lie and train on disk, within the memory of their scale where a limit can be set.
    """

    name: str
    title: str
    family: str
    config: Callable[[Callable[..., EngramMoEConfig]], EngramMoEConfig]
    tables: str = ""
    is_without_gate: bool = False
    is_on_disk: bool = False


@dataclass(frozen=True)
class Experiment:
    """number, title, claim: of the page. runs: (arm, seed) in the order in which they are trained.

    repeats: so many of its arms, those that differ most from EngramMoE, get a second seed.
    """

    name: str
    number: int
    title: str
    claim: str
    runs: list[tuple[Arm, int]] = field(default_factory=list)
    repeats: int = 0


def maker(scale: Scale, tokenizer) -> Callable[..., EngramMoEConfig]:
    """A function that makes the config of a scale, with the fields that it is given changed."""

    def make(**fields) -> EngramMoEConfig:
        fields = {**scale.fields, **fields}
        if scale.preset in PRESETS:
            return make_config(scale.preset, tokenizer, **fields)
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        return EngramMoEConfig.preset(scale.preset, **{name: getattr(tokenizer, name) for name in names}, **fields)

    return make


def dense(make: Callable[..., EngramMoEConfig]) -> EngramMoEConfig:
    """Without experts and memory, as many active parameters as EngramMoE."""
    layers = make().num_hidden_layers
    narrow = {"engram_layer_ids": [], "first_k_dense_replace": layers}
    missing = count_parameters(make()).active - count_parameters(make(**narrow)).active
    width = make().intermediate_size + round(missing / (3 * make().hidden_size * layers))
    return make(**narrow, intermediate_size=width)


def allocated(make: Callable[..., EngramMoEConfig], share_of_experts: float) -> EngramMoEConfig:
    """EngramMoE of the same size, whose experts have this share of what tables and unused experts have together.

    The vocabulary is left out of the budget: in so small a model it is a large part, and no share could be 100 %.
    """
    if share_of_experts == 1:
        return without_memory(make)
    config = make()
    count = count_parameters(config)
    unused = count.routed_experts * (1 - config.num_experts_per_tok / config.n_routed_experts)
    tables = (1 - share_of_experts) * (count.tables + unused)
    found = allocate(config, tables / (count.total - count.active))
    return make(n_routed_experts=found.n_routed_experts, engram_vocab_size=found.engram_vocab_size)


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
# The largest table once more. Its loss must be that of the table in memory, bit by bit.
ON_DISK = replace(MEMORY_SIZES[-1], name="rows-10x-disk", title="10 times the rows, on disk", is_on_disk=True)
# The last two show whether the loss rises again.
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2)
# Where the paper's U is lowest: what its tables leave to experts.
LOWEST_SHARES = (1 - max(PAPER_SHARES), 1 - min(PAPER_SHARES))
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
    ),
    Experiment(
        "rows",
        3,
        "Infinite memory",
        "At fixed compute, ten times the rows lower the loss by 0.028, on a straight line over the logarithm.",
        [*of_seeds(MEMORY_SIZES, (0, 1)), (ON_DISK, 0)],
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
        repeats=2,
    ),
    Experiment(
        "pretrained",
        6,
        "A real pretrained model",
        "None for pretrained models.",
    ),
    Experiment(
        "depth",
        7,
        "Effective depth",
        "With a memory predictions settle earlier: layer 5 resembles layer 12 without.",
    ),
    Experiment(
        "long",
        8,
        "Long context",
        "At 32k tokens multi-query needles rise from 84.2 to 97.0, variable tracking from 77.0 to 89.0.",
    ),
]

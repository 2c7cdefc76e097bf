"""What row patches cost: lookups that hit no patched row, patches of 8 users in a batch, switching between 200 users.

    python scripts/benchmarks/bench_patches.py         two minutes on 2 cores; writes 1.1 GB and removes it

Two layers have tables of 16 heads of about 131,072 rows of 128 bfloat16 numbers. 200 patches have 1,000 float32 rows of
each table. What is timed is the lookup of a forward as the model makes it: `find_rows` hashes the tokens, and then each
table is called. It begins without a cache, whose tokens would make the hash dearer. "A table alone" leaves the hash
out: one table is called with row ids. The 200 patches are known to the model, and one is active. Where 10% of the row
ids are patched, the patch has a tenth of all rows that are read.

Pages of the tables are in memory. Before anything is timed, patched lookups are compared with rows that were written by
hand, and a batch of 8 users with 8 single lookups. A plain lookup, another plain one and a patched one take turns, each
for other tokens. Both are compared with the first: the second plain one shows the noise. A ratio is the median over
turns, each of all lookups; the quartiles follow.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.made_tables import open_table, write_table
from helpers.memory_limit import own_bytes
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import EngramMoEConfig, PatchedRows, RowPatch
from engram_hf.modeling.ids_hashing import NgramHash
from engram_hf.modeling.memory_layer import find_rows
from engram_hf.modeling.memory_patches import ModelPatches
from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_blocks import DISK, HOST, RESIDENT


LAYERS, HEADS, WIDTH, ROWS_OF_PATCH, BATCH = (1, 2), 16, 128, 1_000, 8
SHAPES = {"1 token": (1, 1), "8 sequences of 1": (BATCH, 1), "128 tokens": (1, 128), "2,048 tokens": (1, 2_048)}
# Different lookups of a turn: a turn takes milliseconds.
LOOKUPS = {"1 token": 96, "8 sequences of 1": 96, "128 tokens": 32, "2,048 tokens": 8}
PATCHED_SHARE = 0.1


@dataclass
class Memory:
    """What a lookup needs of a memory layer."""

    layer_idx: int
    table: EngramTable

    def to_device(self, row_ids: torch.Tensor) -> torch.Tensor:
        return row_ids


@dataclass
class Lookups:
    """The hash and the tables of a model, and what is looked up.

    memories: one per layer.
    tokens: shape to (batch, seq) ids, one tensor per lookup.
    """

    ngram_hash: NgramHash
    memories: list[Memory]
    tokens: dict[str, list[torch.Tensor]]

    @property
    def tables(self) -> dict[str, EngramTable]:
        return {str(memory.layer_idx): memory.table for memory in self.memories}

    def of_forward(self, token_ids: torch.Tensor) -> list[torch.Tensor]:
        _, row_ids = find_rows(self.ngram_hash, self.memories, token_ids)  # type: ignore[arg-type]
        return [memory.table(row_ids[memory.layer_idx]) for memory in self.memories]


def read_rows(ngram_hash: NgramHash, tokens: list[torch.Tensor], layer: int) -> torch.Tensor:
    """Distinct row ids of a table that lookups read."""
    sizes = torch.tensor([rows for order in ngram_hash.primes(layer) for rows in order])
    firsts = sizes.cumsum(0) - sizes
    return torch.cat([(ngram_hash(each).row_ids[layer] + firsts).flatten() for each in tokens]).unique()


def patch_of(name: str, rows: dict[int, torch.Tensor], sizes: dict[int, int], generator: torch.Generator) -> RowPatch:
    made = {}
    for layer, row_ids in rows.items():
        values = torch.randn(len(row_ids), WIDTH, generator=generator)
        made[str(layer)] = PatchedRows(row_ids, values, sizes[layer])
    return RowPatch(name, made)


def make_patches(ngram_hash: NgramHash, tokens: dict[str, list[torch.Tensor]], users: int) -> list[RowPatch]:
    """Patches whose rows no lookup reads."""
    generator = torch.Generator().manual_seed(0)
    sizes = {layer: ngram_hash.num_rows(layer) for layer in LAYERS}
    free = {}
    for layer in LAYERS:
        is_free = torch.ones(sizes[layer], dtype=torch.bool)
        is_free[read_rows(ngram_hash, [each for some in tokens.values() for each in some], layer)] = False
        free[layer] = is_free.nonzero().flatten()
    patches = []
    for user in range(users):
        chosen = {
            layer: each[torch.randint(len(each), (2 * ROWS_OF_PATCH,), generator=generator).unique()]
            for layer, each in free.items()
        }
        # Ascending already, so a random part of them has to be sorted again.
        rows = {
            layer: each[torch.randperm(len(each), generator=generator)[:ROWS_OF_PATCH]].sort().values
            for layer, each in chosen.items()
        }
        patches.append(patch_of(f"user {user}", rows, sizes, generator))
    return patches


def make_hitting(ngram_hash: NgramHash, tokens: dict[str, list[torch.Tensor]]) -> dict[str, RowPatch]:
    """For each shape a patch with a tenth of the rows that its lookups read."""
    generator = torch.Generator().manual_seed(0)
    sizes = {layer: ngram_hash.num_rows(layer) for layer in LAYERS}
    hitting = {}
    for shape, some in tokens.items():
        rows = {}
        for layer in LAYERS:
            each = read_rows(ngram_hash, some, layer)
            rows[layer] = each[torch.rand(len(each), generator=generator) < PATCHED_SHARE]
        hitting[shape] = patch_of(f"hit by {shape}", rows, sizes, generator)
    return hitting


def written_by_hand(lookups: Lookups, token_ids: torch.Tensor, patch: RowPatch) -> tuple[list[torch.Tensor], int]:
    """The plain rows of a lookup, with those of a patch written over them one by one; and how many these are."""
    found, hits = [], 0
    row_ids = lookups.ngram_hash(token_ids).row_ids
    for memory in lookups.memories:
        in_table = row_ids[memory.layer_idx] + memory.table.first_rows_of_heads
        rows = memory.table(row_ids[memory.layer_idx]).clone().view(*in_table.shape, WIDTH)
        patched = patch.tables[str(memory.layer_idx)]
        of_row = {row_id: i for i, row_id in enumerate(patched.row_ids.tolist())}
        flat = rows.view(-1, WIDTH)
        for place, row_id in enumerate(in_table.flatten().tolist()):
            if row_id in of_row:
                flat[place] = patched.rows[of_row[row_id]].to(rows.dtype)
                hits += 1
        found.append(rows.flatten(-2))
    return found, hits


def check(known: ModelPatches, lookups: Lookups, patches: list[RowPatch], hitting: dict[str, RowPatch]) -> None:
    """Raise unless patched lookups give the rows of tables that were written to."""
    for shape, patch in hitting.items():
        token_ids = lookups.tokens[shape][0]
        known.set(lookups.tables, [])
        expected, hits = written_by_hand(lookups, token_ids, patch)
        plain = lookups.of_forward(token_ids)
        known.set(lookups.tables, [patch.name])
        if not hits or not all(map(torch.equal, lookups.of_forward(token_ids), expected)):
            raise RuntimeError("A patched lookup gives other rows than a table with these rows; nothing is timed.")
        known.set(lookups.tables, [patches[0].name])
        if not all(map(torch.equal, lookups.of_forward(token_ids), plain)):
            raise RuntimeError("A patch of other rows changes a lookup; nothing is timed.")
    names = [*hitting, *hitting]
    batch = torch.cat([lookups.tokens[name][0][:1, :1] for name in names])
    users = [hitting[name].name for name in names]
    with known.use(lookups.tables, users):
        together = lookups.of_forward(batch)
    for i, name in enumerate(users):
        known.set(lookups.tables, [name])
        if not all(torch.equal(one[0], all_[i]) for one, all_ in zip(lookups.of_forward(batch[i : i + 1]), together)):
            raise RuntimeError("A batch of users gives other rows than single lookups; nothing is timed.")
    known.set(lookups.tables, [])


def time_turn(call: Callable, given: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    for each in given:
        call(each)
    return (time.perf_counter() - start) / len(given)


def compare(
    known: ModelPatches, lookups: Lookups, patch: RowPatch, call: Callable, given: list[torch.Tensor], turns: int
) -> list:
    """Median milliseconds of plain lookups; of other plain ones, and of patched ones, median and quartiles in percent
    above them."""
    sides: list[list[str]] = [[], [], [patch.name]]
    plain, ratios = [], ([], [])
    for turn in range(turns + 3):
        seconds = [0.0] * len(sides)
        for number in range(len(given)):
            # Each side comes as often behind each other one.
            for place in range(len(sides)) if turn % 2 else reversed(range(len(sides))):
                side = (place + number + turn) % len(sides)
                known.set(lookups.tables, sides[side])
                # Tokens of this side are those that the others had in other lookups.
                seconds[side] += time_turn(call, [given[(number + side * len(given) // len(sides)) % len(given)]])
        if turn >= 3:
            plain.append(seconds[0] / len(given))
            for of_side, each in zip(ratios, seconds[1:]):
                of_side.append(100 * (each / seconds[0] - 1))
    known.set(lookups.tables, [])
    found = [1e3 * statistics.median(plain)]
    for of_side in ratios:
        low, middle, high = statistics.quantiles(of_side, n=4)
        found += [middle, f"{low:+.1f} to {high:+.1f}"]
    return found


def time_users(known: ModelPatches, lookups: Lookups, patches: list[RowPatch], turns: int) -> list[list]:
    """A decode step of 8 users against a plain one, and the time of a switch."""
    tables, decode = lookups.tables, lookups.tokens["8 sequences of 1"]
    switches, firsts, seconds, steps, plain, contexts = [], [], [], [], [], []
    for patch in patches:
        start = time.perf_counter()
        known.set(tables, [patch.name])
        switches.append(1e6 * (time.perf_counter() - start))
        firsts.append(1e6 * time_turn(lookups.of_forward, decode[:1]))
        seconds.append(1e6 * time_turn(lookups.of_forward, decode[:1]))
    known.set(tables, [])
    names = [patch.name for patch in patches]
    for turn in range(turns):
        users = [names[(turn * BATCH + i) % len(names)] for i in range(BATCH)]
        plain.append(1e6 * time_turn(lookups.of_forward, decode))
        with known.use(tables, users):
            steps.append(1e6 * time_turn(lookups.of_forward, decode))
        start = time.perf_counter()
        with known.use(tables, users):
            pass
        contexts.append(1e6 * (time.perf_counter() - start))
    middle = statistics.median
    extra = [first - second for first, second in zip(firsts, seconds)]
    return [
        ["set_patches", middle(switches), max(switches)],
        ["what the first lookup takes longer after it", middle(extra), max(extra)],
        ["use_patches, begin and end for 8 users", middle(contexts), max(contexts)],
        ["lookup of a decode step, plain", middle(plain), None],
        ["lookup of a decode step, 8 users", middle(steps), None],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--rows-of-head", type=int, default=131_072)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Row patches", about(__doc__))
    config = EngramMoEConfig(
        engram_layer_ids=list(LAYERS),
        engram_n_heads=HEADS // 2,
        engram_head_dim=WIDTH,
        engram_vocab_size=arguments.rows_of_head,
        engram_compressed_vocab_size=None,
        num_hidden_layers=max(LAYERS) + 1,
    )
    ngram_hash = NgramHash(config)
    ngram_hash.confirm("the benchmark")
    generator = torch.Generator().manual_seed(1)
    tokens = {
        shape: [torch.randint(0, config.vocab_size, SHAPES[shape], generator=generator) for _ in range(count)]
        for shape, count in LOOKUPS.items()
    }
    columns = {"lookup": "", "tier": "", "patched rows": ".0%", "plain, ms": ".3f"}
    columns |= {"plain again, more %": "+.1f", "its quartiles": "", "patched, more %": "+.1f", "quartiles": ""}
    forwards = Table(columns, [], "Hash and two tables, as a forward looks up")
    alone = Table(columns, [], "A table alone")
    users = Table({"of two tables": "", "median, microseconds": ",.1f", "most": ",.0f"}, [])
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        paths = {layer: Path(name) / f"table-{layer}.safetensors" for layer in LAYERS}
        for layer, path in paths.items():
            write_table(path, ngram_hash.num_rows(layer), WIDTH, torch.bfloat16)
        before = own_bytes("RssAnon")
        patches = make_patches(ngram_hash, tokens, arguments.users)
        held = own_bytes("RssAnon") - before
        hitting = make_hitting(ngram_hash, tokens)
        for tier in (RESIDENT, HOST, DISK):
            memories = []
            for layer, path in paths.items():
                sizes = [rows for order in ngram_hash.primes(layer) for rows in order]
                memories.append(Memory(layer, open_table(path, sizes, WIDTH, torch.bfloat16, tier)))
                memories[-1].table.block_records[0].rows.view(torch.int16).amax()
            lookups, known = Lookups(ngram_hash, memories, tokens), ModelPatches()
            for patch in [*patches, *hitting.values()]:
                known.add(lookups.tables, patch, 1.0)
            known.set(lookups.tables, [])
            check(known, lookups, patches, hitting)
            first = memories[0]
            for shape in SHAPES:
                row_ids = [ngram_hash(each).row_ids[first.layer_idx] for each in tokens[shape]]
                for share, patch in ((0.0, patches[0]), (PATCHED_SHARE, hitting[shape])):
                    given = (lookups, patch, lookups.of_forward, tokens[shape], arguments.turns)
                    forwards.rows.append([shape, tier, share, *compare(known, *given)])
                given = (lookups, patches[0], first.table, row_ids, arguments.turns)
                alone.rows.append([shape, tier, 0.0, *compare(known, *given)])
            if tier == DISK:
                users.rows = time_users(known, lookups, patches, arguments.turns)
    rows = sum(patch.nbytes for patch in patches)
    overlaid = sum(memory.table.patches.nbytes for memory in memories) - sum(each.nbytes for each in hitting.values())
    memory = Table(
        {f"{arguments.users} patches": "", "MB": ",.0f"},
        [
            ["rows and row ids", rows / 1e6],
            ["memory of the process for them", held / 1e6],
            ["rows, row ids and filters", overlaid / 1e6],
        ],
    )
    results.tables = [forwards, alone, users, memory]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

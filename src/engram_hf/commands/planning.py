"""What `engram-hf plan` prints: a table of sizes, and in words whether a model fits and what a step moves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..planning import MemoryEstimate, ParameterCount, allocate, count_parameters
from .inspecting import size


ASSUMED_BANDWIDTH = 25.0
ASSUMED_DISK_READS = 100_000


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: GB copied from RAM to the accelerator, random reads of the disk.

    Where a rate is not given, a usual one is assumed.
    """

    bandwidth: float | None = None
    disk_reads: int | None = None

    def copying(self, nbytes: int) -> str:
        """How long copying to the accelerator takes, and at which rate."""
        rate = self.bandwidth or ASSUMED_BANDWIDTH
        assumed = "" if self.bandwidth else ", which PCIe 4.0 x16 reaches (--bandwidth says what yours does)"
        return f"{_seconds(nbytes / rate / 1e9)} at {rate:g} GB/s{assumed}"

    def reading(self, reads: int) -> str:
        """How long random reads of the disk take, and at which rate."""
        rate = self.disk_reads or ASSUMED_DISK_READS
        assumed = "" if self.disk_reads else ", as of an NVMe drive (--disk-reads says what yours does)"
        return f"{_seconds(reads / rate)} at {rate:,} reads a second{assumed}"


def plan_as_dict(estimate: MemoryEstimate, parameters: ParameterCount) -> dict[str, Any]:
    """For JSON."""
    return {**vars(estimate), "parameters": {**vars(parameters), "memory_share": parameters.memory_share}}


def show_plan(
    model: str, estimate: MemoryEstimate, parameters: ParameterCount, tokens: int, rates: Rates, is_served: bool
) -> None:
    """Print a plan.

    Args:
        model: its name.
        estimate, parameters: of it.
        tokens: of a step.
        rates: of the machine.
        is_served: whether it is somebody else's model, whose tables `load_with_tables` serves.
    """
    rows = _by_memory(estimate)
    table = Table("place", "backbone", "tables", "largest step", title=model)
    if estimate.limits:
        table.add_column("limit")
    table.add_column("optimizer and gradients,\nonly when training")
    for place, columns in rows.items():
        limit = [size(estimate.limits[columns["key"]]) if columns["key"] in estimate.limits else ""]
        own = [size(columns[name]) for name in ("backbone", "tables", "step")]
        table.add_row(place, *own, *(limit if estimate.limits else []), size(columns["optimizer"]))
    Console().print(table)
    for line in plan_in_words(model, estimate, tokens, rates, is_served):
        typer.echo(line)
    of_budget = f": {parameters.memory_share:.1%} of the sparse budget (best by the paper: 20 to 25 %)."
    typer.echo(
        f"{parameters.total:,} parameters, {parameters.active:,} of them active, {parameters.tables:,} in tables"
        f"{'.' if is_served else of_budget}"
    )


def allocations_as_list(config: Any, shares: Sequence[float]) -> list[dict[str, Any]]:
    """For JSON: for each share of the sparse budget in tables, the fields to set and what they give."""
    found = []
    for share in shares:
        allocated = allocate(config, share)
        count = count_parameters(allocated)
        fields = {name: getattr(allocated, name) for name in ("n_routed_experts", "engram_vocab_size")}
        found.append({**fields, **vars(count), "memory_share": count.memory_share})
    return found


def show_allocations(allocations: list[dict[str, Any]]) -> None:
    """Print the fields that give each share, and the parameters of the model that they make."""
    table = Table("tables of the sparse budget", "n_routed_experts", "engram_vocab_size", "parameters", "active")
    for each in allocations:
        numbers = [f"{each[name]:,}" for name in ("n_routed_experts", "engram_vocab_size", "total", "active")]
        table.add_row(f"{each['memory_share']:.1%}", *numbers)
    Console().print(table)


def plan_in_words(model: str, estimate: MemoryEstimate, tokens: int, rates: Rates, is_served: bool) -> Iterator[str]:
    """Sentences: how large a model is, whether it fits, what every step moves and how long that takes, and how to load
    it so."""
    backbone, tables = sum(estimate.backbone.values()), sum(estimate.tables.values())
    if tables:
        of_rank = " a rank" if estimate.ranks > 1 else ""
        needed = backbone + max(estimate.step.values())
        yield (
            f"{model}: tables {size(tables)}{of_rank}, backbone {size(backbone)}; with the tables on disk it needs "
            f"{size(needed)} of memory where it computes."
        )
    if estimate.limits:
        yield f"{model} does not fit." if estimate.lacking else f"{model} fits."
    if estimate.ranks > 1:
        yield (
            f"Over {estimate.ranks:,} ranks each holds {size(tables)} of tables and the whole backbone. In a training "
            f"step of {tokens:,} tokens a rank, each moves {size(estimate.moved_per_step)} between ranks, if "
            f"{estimate.distinct_share:.0%} of the rows are distinct."
        )
    for place, nbytes in estimate.lacking.items():
        if place == "disk":
            yield f"does not fit: {size(nbytes)} of the backbone find no place in memory."
        else:
            yield f"does not fit: {_name(place)} needs {size(nbytes)} more than its limit."
    device = next((place for place in estimate.step if place != "cpu"), None)
    moved = sum(estimate.moved_per_forward.values())
    if moved and device is not None:
        seconds = moved / (rates.bandwidth or ASSUMED_BANDWIDTH) / 1e9
        yield (
            f"{size(moved)} of the backbone do not fit on accelerators. Every forward copies them there: "
            f"{rates.copying(moved)}. So at most {1 / seconds:,.1f} tokens a second of one sequence are generated."
        )
    for place, rows in estimate.rows_per_token.items():
        nbytes = estimate.read_per_token[place]
        read = f"Each token reads {rows} row{'s' if rows > 1 else ''} of tables from {_name(place)}, {size(nbytes)}"
        if place == "disk":
            yield f"{read}; a step of {tokens:,} tokens takes {rates.reading(rows * tokens)}, less where rows repeat."
        elif device is None:
            yield f"{read}; nothing is copied between memories."
        else:
            in_step = nbytes * tokens
            yield f"{read}; a step of {tokens:,} tokens copies {size(in_step)}: {rates.copying(in_step)}."
    if estimate.limits and not estimate.lacking:
        limits = ", ".join(f"{key!r}: {nbytes}" for key, nbytes in estimate.max_memory.items())
        loader = "load_with_tables" if is_served else "from_pretrained"
        yield f'To load it so, with room for the step: {loader}(..., device_map="auto", max_memory={{{limits}}})'


def _by_memory(estimate: MemoryEstimate) -> dict[str, dict[str, Any]]:
    """Bytes by memory: what is on the CPU and what is in host memory is in one RAM."""
    rows: dict[str, dict[str, Any]] = {}
    for place in estimate.places:
        row = rows.setdefault("host" if place == "cpu" else place, dict.fromkeys(("backbone", "tables", "step"), 0))
        row["key"] = "cpu" if place == "host" else place
        for name in ("backbone", "tables", "step", "optimizer"):
            row[name] = row.get(name, 0) + getattr(estimate, name).get(place, 0)
    return rows


def _name(place: str) -> str:
    return {"cpu": "host memory", "host": "host memory"}.get(place, place)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 0.1 else f"{1000 * seconds:,.2f} ms"

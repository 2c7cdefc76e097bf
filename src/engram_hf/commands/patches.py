"""What `engram-hf patch inspect` and `engram-hf patch compare` print."""

from dataclasses import asdict
from typing import Any

import typer

from ..adapters.patch_making import ComparedRows
from ..modeling.table_patches import RowPatch
from .inspecting import show_rows, size


def patch_as_dict(patch: RowPatch) -> dict[str, Any]:
    """For JSON."""
    tables = {
        name: {
            "rows": len(each.row_ids),
            "table_rows": each.table_rows,
            "head_dim": each.rows.shape[1],
            "dtype": str(each.rows.dtype).removeprefix("torch."),
            "base_digest": each.base_digest,
        }
        for name, each in patch.tables.items()
    }
    facts = {"name": patch.name, "mode": patch.mode, "rows": patch.num_rows, "nbytes": patch.nbytes}
    return {**facts, "tables": tables, "fingerprint": patch.fingerprint, "provenance": patch.provenance}


def show_patch(patch: RowPatch) -> None:
    """Print the tables that a patch changes, and what made it."""
    rows = []
    for name, each in patch.tables.items():
        dtype = str(each.rows.dtype).removeprefix("torch.")
        rows.append([name, f"{len(each.row_ids):,}", f"{each.table_rows:,}", f"{each.rows.shape[1]} x {dtype}"])
    title = f"{patch.name} ({patch.mode}, {size(patch.nbytes)})"
    show_rows(title, ("table", "changed rows", "of", "row"), rows)
    for fact, value in patch.provenance.items():
        typer.echo(f"{fact}: {value}")


def compared_as_dict(compared: list[ComparedRows]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(each) for each in compared]


def show_compared(compared: list[ComparedRows]) -> None:
    """Print which rows two patches share."""
    found = []
    for each in compared:
        # One below the other.
        rows, norms = ("\n".join(text) for text in (map("{:,}".format, each.rows), map("{:.3g}".format, each.norms)))
        figures = [f"{each.shared:,}", f"{each.conflicts:,}", norms, f"{each.largest_difference:.3g}"]
        found.append([each.table, rows, *figures])
    show_rows(None, ("table", "rows", "shared", "conflicts", "norms", "largest difference"), found)
    conflicts = sum(each.conflicts for each in compared)
    typer.echo(
        "the order of these patches is free"
        if not conflicts
        else f"on {conflicts:,} rows the patch that is laid over the other one decides"
    )

"""What `engram-hf inspect` prints, and how sizes are written."""

from collections.abc import Sequence
from textwrap import fill

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..checkpoints.inspecting import Inspection


FINGERPRINT_PARTS = {
    "map": "digest of the token map",
    "multipliers": "digest of the multipliers",
    "primes": "digest of the primes",
    "ids": "different ids",
    "orders": "tokens of an n-gram",
    "pad": "id that stands before a document",
}


def size(nbytes: float) -> str:
    """Bytes in the unit that they are read in, with three decimals."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale / 10:
            return f"{nbytes / scale:,.3f} {unit}"
    return f"{nbytes / 1e3:,.3f} KB" if nbytes else "0"


def show_rows(title: str | None, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is a name. Nothing is cut: where the terminal is too narrow, the figures stand
    below the names.

    Args:
        title: above the table; None for none.
        headers: one per column.
        rows: cells. Several lines of a cell stand one below the other.
    """
    console, table = Console(markup=False), Table(box=SIMPLE_HEAD, pad_edge=False, title=title)
    for header in headers:
        table.add_column(header, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
        return console.print(table)
    if title is not None:
        typer.echo(title)
    for name, *figures in rows:
        told = "; ".join(f"{header} {' and '.join(cell.splitlines())}" for header, cell in zip(headers[1:], figures))
        typer.echo(f"{name}\n{fill(told, console.width, initial_indent='  ', subsequent_indent='  ')}")


def show_inspection(found: Inspection) -> None:
    """Print the tables of a checkpoint, their files, and what binds them to a tokenizer."""
    rows = []
    for own in found.tables:
        row = f"{own.head_dim} x {own.dtype}"
        rows.append([own.name, f"{own.rows:,}", row, size(own.nbytes), str(len(own.blocks)), f"{own.changed_rows:,}"])
    show_rows(found.where, ("table", "rows", "row", "bytes", "blocks", "changed rows"), rows)
    for own in found.tables:
        files = sorted({block.file for block in own.blocks})
        typer.echo(f"{own.name} in {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""))
    typer.echo(f"backbone {size(found.backbone_nbytes)}, tables {size(found.tables_nbytes)}")
    typer.echo(
        "tables take this much memory where they are resident or in host memory, and next to none on disk; then the "
        f"weights need {size(found.backbone_nbytes)} where the model computes (engram-hf plan adds the step)"
    )
    if isinstance(found.compressed_vocab_size, int):
        merged = 1 - found.compressed_vocab_size / found.vocab_size
        typer.echo(
            f"{found.vocab_size:,} ids, {found.compressed_vocab_size:,} for the memory ({merged:.1%} merged away)"
        )
    if found.fingerprint:
        typer.echo("fingerprint of the hash, which binds tables to a tokenizer:")
    for name, value in (found.fingerprint or {}).items():
        typer.echo(f"  {FINGERPRINT_PARTS.get(name, name)}: {value}")

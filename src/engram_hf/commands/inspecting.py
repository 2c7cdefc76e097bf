"""What `engram-hf inspect` prints, and how sizes are written."""

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
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


def narrow_table(name: str, *figures: str) -> Table:
    """A table for 80 columns. A long name goes on in the next line, and a figure never does."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(name, overflow="fold")
    for figure in figures:
        table.add_column(figure, no_wrap=True)
    return table


def show_inspection(found: Inspection) -> None:
    """Print the tables of a checkpoint, their files, and what binds them to a tokenizer."""
    table = narrow_table("table", "rows", "row", "bytes", "blocks", "changed rows")
    table.title = found.where
    for own in found.tables:
        row = f"{own.head_dim} x {own.dtype}"
        table.add_row(own.name, f"{own.rows:,}", row, size(own.nbytes), str(len(own.blocks)), f"{own.changed_rows:,}")
    Console(markup=False).print(table)
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

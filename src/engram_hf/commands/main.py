"""`engram-hf`: what a checkpoint holds, what it will take, whether it is sound, and smaller tables.

Exit codes: 0 for done, 1 for damaged or impossible (with a sentence that says what), 2 for a command without sense.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..hub.inspecting import inspect_checkpoint
from ..hub.merging import merge_changed_rows
from ..hub.pushing import push_engram
from ..hub.quantizing import quantize_tables
from ..hub.verifying import verify_tables
from ..modeling.configuration_engram_moe import PRESETS, EngramMoEConfig
from ..planning import count_parameters, estimate_memory


app = typer.Typer(no_args_is_help=True, add_completion=False, help="Engram memory for Transformers.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Source = Annotated[Path, typer.Argument(help="Folder of a checkpoint.", exists=True, file_okay=False)]
Target = Annotated[Path, typer.Argument(help="Folder to write; another one.")]


def _or_exit(work: Callable[[], Any]) -> Any:
    """What some work gives; a sentence and exit code 1 where it fails as its documentation says it may."""
    try:
        return work()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.3f} MB"


@app.command(epilog="Example: engram-hf inspect output/tiny")
def inspect(
    path_or_repo: Annotated[str, typer.Argument(help="Folder, or repository of the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Of the repository.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show tables, blocks, sizes and fingerprint; reads headers only."""
    found = _or_exit(lambda: inspect_checkpoint(path_or_repo, revision))
    if as_json:
        return typer.echo(json.dumps(found.as_dict(), indent=2))
    table = Table(title=found.where)
    for column in ("table", "rows", "row", "bytes", "blocks", "changed rows", "files"):
        table.add_column(column)
    for own in found.tables:
        files = sorted({block.file for block in own.blocks})
        some = files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        row = f"{own.head_dim} x {own.dtype}"
        table.add_row(
            own.name, f"{own.rows:,}", row, _size(own.nbytes), str(len(own.blocks)), f"{own.changed_rows:,}", some
        )
    Console().print(table)
    typer.echo(f"backbone {_size(found.backbone_nbytes)}, tables {_size(found.tables_nbytes)}")
    typer.echo("tables resident or in host memory take their bytes; on disk, next to no memory")
    if isinstance(found.compressed_vocab_size, int):
        merged = 1 - found.compressed_vocab_size / found.vocab_size
        typer.echo(
            f"{found.vocab_size:,} ids, {found.compressed_vocab_size:,} for the memory ({merged:.1%} merged away)"
        )
    for name, digest in (found.fingerprint or {}).items():
        typer.echo(f"fingerprint of the {name}: {digest}")


@app.command(
    epilog='Example: engram-hf plan engram-27b --device-map auto --max-memory \'{"0": "80GB", "cpu": "64GB"}\''
)
def plan(
    model: Annotated[str, typer.Argument(help=f"Folder, repository, or one of {', '.join(PRESETS)}.")],
    device_map: Annotated[str | None, typer.Option(help='As for from_pretrained: "auto", a device, or JSON.')] = None,
    max_memory: Annotated[str | None, typer.Option(help="As for from_pretrained, in JSON.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the backbone.")] = "bfloat16",
    batch_size: int = 1,
    seq_length: int = 2048,
    as_json: AsJson = False,
) -> None:
    """Say what a model will take by tier, and what share of the sparse budget its tables are (best: 20 to 25 %)."""

    def work():
        config = EngramMoEConfig.preset(model) if model in PRESETS else EngramMoEConfig.from_pretrained(model)
        places = json.loads(device_map) if device_map and device_map.lstrip().startswith("{") else device_map
        limits = json.loads(max_memory) if max_memory else None
        if limits is not None:
            limits = {int(key) if key.isdigit() else key: value for key, value in limits.items()}
        source = config if model in PRESETS else model
        return config, estimate_memory(source, places, dtype, limits, batch_size, seq_length)

    config, estimate = _or_exit(work)
    parameters = count_parameters(config)
    parts = ("backbone", "tables", "optimizer", "step")
    if as_json:
        content = {part: getattr(estimate, part) for part in parts}
        content["parameters"] = {**vars(parameters), "memory_share": parameters.memory_share}
        return typer.echo(json.dumps(content, indent=2))
    table = Table("place", "backbone", "tables", "optimizer and gradients", "largest step", title=model)
    for place in estimate.places:
        table.add_row(place, *(_size(getattr(estimate, part).get(place, 0)) for part in parts))
    Console().print(table)
    typer.echo(f"{parameters.total:,} parameters, {parameters.active:,} active, {parameters.tables:,} in tables:")
    typer.echo(f"{parameters.memory_share:.1%} of the sparse budget (the paper's best: 20 to 25 %)")


@app.command(epilog="Example: engram-hf verify output/tiny")
def verify(
    path_or_repo: Annotated[str, typer.Argument(help="Folder, or repository whose files are on this machine.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint, and say what is not as it was saved or does not belong together."""
    files = _or_exit(lambda: verify_tables(path_or_repo))
    if as_json:
        return typer.echo(json.dumps([vars(file) for file in files], indent=2))
    for file in files:
        typer.echo(f"sound  {_size(file.nbytes):>12}  {file.name}")


@app.command(epilog="Example: engram-hf push output/tiny user/engram-tiny --license apache-2.0 --no-dry-run")
def push(
    folder: Source,
    repo_id: Annotated[str, typer.Argument(help="Repository, made where there is none.")],
    tables_repo: Annotated[str | None, typer.Option(help="Repository for the tables, if of their own.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, as the Hub writes it.")] = None,
    training: Annotated[Path | None, typer.Option(help="Folder of the run, for the card.", exists=True)] = None,
    data: Annotated[str | None, typer.Option(help="What it was trained on, for the card.")] = None,
    base_model: Annotated[list[str] | None, typer.Option(help="What it was made from, for the card.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made where there is none.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Send nothing, print every file and its size.")] = True,
    as_json: AsJson = False,
) -> None:
    """Push a checkpoint, with code, tokenizer and card; a dry run, unless --no-dry-run is given."""
    given = {"license": license, "training": training, "data": data, "base_model": base_model}
    arguments: dict[str, Any] = {
        "card": {name: value for name, value in given.items() if value},
        "revision": revision,
        "private": private or None,
        "create_pr": create_pr,
        "dry_run": dry_run,
    }
    pushed = _or_exit(lambda: push_engram(folder, repo_id, tables_repo, **arguments))
    if as_json:
        return typer.echo(json.dumps(pushed.as_dict(), indent=2))
    typer.echo(pushed)
    for commit in pushed.commits.values():
        typer.echo(commit.commit_url)
    if dry_run:
        typer.echo("a dry run; --no-dry-run sends these files")


@app.command(epilog="Example: engram-hf quantize output/tiny output/tiny-int8 --row-format int8")
def quantize(source: Source, target: Target, row_format: str = "float8_e4m3fn") -> None:
    """Write a checkpoint with tables in float8_e4m3fn, int8 or int4, block by block."""
    _or_exit(lambda: quantize_tables(source, target, row_format))
    typer.echo(f"wrote {target}")


@app.command(epilog="Example: engram-hf merge output/run/checkpoint-500 output/model")
def merge(source: Source, target: Target) -> None:
    """Write a training checkpoint as a model of its own: blocks and their changed rows become blocks."""
    _or_exit(lambda: merge_changed_rows(source, target))
    typer.echo(f"wrote {target}")

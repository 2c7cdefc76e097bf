"""`engram-hf`: what a checkpoint holds, what it will take, whether it is sound, and smaller tables.

Exit codes: 0 for done, 1 for damaged or impossible (with a sentence that says what), 2 for a command without sense.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import HTTPError
from rich.console import Console
from rich.table import Table

from ..checkpoints.inspecting import inspect_checkpoint
from ..checkpoints.merging import merge_changed_rows
from ..checkpoints.quantizing import quantize_tables
from ..checkpoints.verifying import verify_tables
from ..hub.pushing import push_engram
from ..modeling.configuration_engram_moe import PRESETS, EngramMoEConfig
from ..modeling.table_formats import QUANTIZED_FORMATS
from ..planning import count_parameters, estimate_memory


app = typer.Typer(no_args_is_help=True, add_completion=False)
FINGERPRINT_PARTS = {
    "map": "digest of the token map",
    "multipliers": "digest of the multipliers",
    "primes": "digest of the primes",
    "ids": "different ids",
    "orders": "tokens of an n-gram",
    "pad": "id that stands before a document",
}
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Source = Annotated[Path, typer.Argument(help="Folder of a checkpoint.", exists=True, file_okay=False)]
Target = Annotated[Path, typer.Argument(help="Folder to write, without weights yet.")]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(version("engram-hf"))
        raise typer.Exit()


@app.callback()
def describe(
    is_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Engram memory for Transformers."""


def _or_exit(work: Callable[[], Any], as_json: bool = False) -> Any:
    """What some work gives; a sentence and exit code 1 where it fails as its documentation says it may."""
    try:
        return work()
    except (ValueError, OSError, HTTPError) as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error)}, indent=2))
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.3f} MB"


@app.command(epilog="Example: engram-hf inspect output/tiny")
def inspect(
    path_or_repo: Annotated[str, typer.Argument(help="Folder, or repository of the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show tables, blocks, sizes and fingerprint; reads headers only."""
    found = _or_exit(lambda: inspect_checkpoint(path_or_repo, revision), as_json)
    if as_json:
        return typer.echo(json.dumps(found.as_dict(), indent=2))
    table = Table(title=found.where)
    for column in ("table", "rows", "row", "bytes", "blocks", "changed rows"):
        # What does not fit goes on in the next line: a name cut short would name nothing.
        table.add_column(column, overflow="fold", no_wrap=column == "table")
    for own in found.tables:
        row = f"{own.head_dim} x {own.dtype}"
        table.add_row(own.name, f"{own.rows:,}", row, _size(own.nbytes), str(len(own.blocks)), f"{own.changed_rows:,}")
    Console().print(table)
    for own in found.tables:
        files = sorted({block.file for block in own.blocks})
        typer.echo(f"{own.name} in {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""))
    typer.echo(f"backbone {_size(found.backbone_nbytes)}, tables {_size(found.tables_nbytes)}")
    typer.echo("tables resident or in host memory take their bytes; on disk, next to no memory")
    if isinstance(found.compressed_vocab_size, int):
        merged = 1 - found.compressed_vocab_size / found.vocab_size
        typer.echo(
            f"{found.vocab_size:,} ids, {found.compressed_vocab_size:,} for the memory ({merged:.1%} merged away)"
        )
    if found.fingerprint:
        typer.echo("fingerprint of the hash, which tables are bound to:")
    for name, value in (found.fingerprint or {}).items():
        typer.echo(f"  {FINGERPRINT_PARTS.get(name, name)}: {value}")


@app.command(
    epilog='Example: engram-hf plan engram-27b --device-map auto --max-memory \'{"0": "80GB", "cpu": "64GB"}\''
)
def plan(
    model: Annotated[str, typer.Argument(help=f"Folder, repository, or one of {', '.join(PRESETS)}.")],
    device_map: Annotated[str | None, typer.Option(help='As for from_pretrained: "auto", a device, or JSON.')] = None,
    max_memory: Annotated[
        str | None, typer.Option(help='Limits of --device-map auto, in JSON: {"0": "80GB", "cpu": "64GB"}.')
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the backbone; by default as in its config, bfloat16 for a preset.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of the step that is counted.", min=1)] = 1,
    seq_length: Annotated[int, typer.Option(help="Tokens of each of them.", min=1)] = 2048,
    as_json: AsJson = False,
) -> None:
    """Say what a model will take by tier, and what share of the sparse budget its tables are (best: 20 to 25 %)."""

    def work():
        config = _config(model)
        places = _from_json("--device-map", device_map) if device_map and device_map.startswith("{") else device_map
        limits = _from_json("--max-memory", max_memory) if max_memory else None
        if limits is not None:
            limits = {int(key) if key.isdigit() else key: value for key, value in limits.items()}
        type_of_backbone = dtype or ("bfloat16" if model in PRESETS else None)
        return config, estimate_memory(config, places, type_of_backbone, limits, batch_size, seq_length)

    config, estimate = _or_exit(work, as_json)
    parameters = count_parameters(config)
    if as_json:
        content = {**vars(estimate), "parameters": {**vars(parameters), "memory_share": parameters.memory_share}}
        return typer.echo(json.dumps(content, indent=2))
    table = Table("place", "backbone", "tables", "largest step", "optimizer and gradients,\nonly when training")
    table.title = model
    for place in estimate.places:
        columns = (estimate.backbone, estimate.tables, estimate.step, estimate.optimizer)
        table.add_row(place, *(_size(column.get(place, 0)) for column in columns))
    Console().print(table)
    for place, nbytes in estimate.lacking.items():
        what = "of the backbone find no place in memory" if place == "disk" else "more are needed than the limit allows"
        typer.echo(f"does not fit: {place}: {_size(nbytes)} {what}")
    typer.echo(f"{parameters.total:,} parameters, {parameters.active:,} active, {parameters.tables:,} in tables:")
    typer.echo(f"{parameters.memory_share:.1%} of the sparse budget (the paper's best: 20 to 25 %)")


def _config(model: str) -> EngramMoEConfig:
    """Of a preset, a folder or a repository.

    Raises:
        ValueError: it is none of these.
    """
    if model in PRESETS:
        return EngramMoEConfig.preset(model)
    if "/" not in model and not Path(model).is_dir():
        raise ValueError(f"{model} is no folder, no repository (user/model), and no preset: {', '.join(PRESETS)}.")
    return EngramMoEConfig.from_pretrained(model)


def _from_json(option: str, text: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no object.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is no JSON ({error}), got {text!r}.") from error
    if not isinstance(content, dict):
        raise ValueError(f'{option} is an object in JSON, such as {{"cpu": "64GB"}}; got {text!r}.')
    return content


@app.command(epilog="Example: engram-hf verify output/tiny")
def verify(
    path_or_repo: Annotated[str, typer.Argument(help="Folder, or repository whose files are on this machine.")],
    tables_from: Annotated[str | None, typer.Option(help="Of the tables, where they lie elsewhere.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint, and say what is not as it was saved or does not belong together."""
    files = _or_exit(lambda: verify_tables(path_or_repo, tables_from), as_json)
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
    pushed = _or_exit(lambda: push_engram(folder, repo_id, tables_repo, **arguments), as_json)
    if as_json:
        return typer.echo(json.dumps(pushed.as_dict(), indent=2))
    typer.echo(pushed)
    for commit in pushed.commits.values():
        typer.echo(commit.pr_url or commit.commit_url)
    if dry_run:
        typer.echo("a dry run; --no-dry-run sends these files")


@app.command(epilog="Example: engram-hf quantize output/tiny output/tiny-int8 --row-format int8")
def quantize(
    source: Source,
    target: Target,
    row_format: Annotated[str, typer.Option(help=f"{', '.join(QUANTIZED_FORMATS)}.")] = "float8_e4m3fn",
) -> None:
    """Write a checkpoint with tables in float8_e4m3fn, int8 or int4, block by block."""
    _or_exit(lambda: quantize_tables(source, target, row_format))
    typer.echo(f"wrote {target}")


@app.command(epilog="Example: engram-hf merge output/run/checkpoint-500 output/model")
def merge(source: Source, target: Target) -> None:
    """Write a training checkpoint as a model of its own: blocks and their changed rows become blocks."""
    _or_exit(lambda: merge_changed_rows(source, target))
    typer.echo(f"wrote {target}")

"""`engram-hf`: its commands, their options and their help. What a command does is in `engram_hf`.

This module is outside the package because importing `engram_hf` registers the models with transformers, which takes
seconds. Help, the version and a mistyped option have to answer at once, so a command imports the package when it runs.

Exit codes: 0 for done, 1 for damaged or impossible (with a sentence that says what), 2 for a command without sense, 130
for one that was interrupted.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# Named in the help, which cannot ask the package. A test compares them.
PRESETS = ("tiny", "100m", "dense-4b", "moe-27b", "engram-27b", "engram-40b")
ROW_FORMATS = ("float8_e4m3fn", "int8", "int4")
INTERRUPTED = 130

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
    """Look at, check, size, convert and push models with Engram memory."""


@contextmanager
def sentences(as_json: bool = False) -> Iterator[None]:
    """Turn what is documented to fail into one sentence and exit code 1, and Ctrl-C into one line."""
    try:
        from huggingface_hub.errors import HTTPError
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Who reads the output, such as `head`, has read enough. Typer ends without a word.
        raise
    except (ValueError, OSError, NotImplementedError, ImportError, HTTPError) as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error)}, indent=2))
        _end(f"error: {error}", 1)


def _end(line: str, code: int) -> None:
    typer.echo(line, err=True)
    # The cause is in the line.
    raise typer.Exit(code) from None


@app.command(epilog="Example: engram-hf inspect output/tiny")
def inspect(
    path_or_repo: Annotated[str, typer.Argument(help="Folder, or repository of the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show tables, blocks, sizes and the fingerprint of the hash.

    Reads the config and the headers of the weight files, so the size of a checkpoint does not matter and nothing is
    downloaded from a repository but these.
    """
    with sentences(as_json):
        from engram_hf.checkpoints.inspecting import inspect_checkpoint
        from engram_hf.commands.inspecting import show_inspection

        found = inspect_checkpoint(path_or_repo, revision)
        if as_json:
            return typer.echo(json.dumps(found.as_dict(), indent=2))
        show_inspection(found)


@app.command(
    epilog='Example: engram-hf plan engram-27b --device-map auto --max-memory \'{"0": "24GB", "cpu": "64GB"}\''
)
def plan(
    model: Annotated[str, typer.Argument(help=f"Folder, repository, or preset: {', '.join(PRESETS)}.")],
    device_map: Annotated[
        str | None,
        typer.Option(
            help='As for from_pretrained: "auto", a device, or JSON such as {"": "cpu", "...table": "disk"}. '
            "auto where --max-memory is given."
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help='Memory of the machine to plan for, in JSON: {"0": "24GB", "cpu": "64GB"}.')
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the backbone; by default that of its config, bfloat16 for a preset.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of the step that is counted.", min=1)] = 1,
    seq_length: Annotated[int, typer.Option(help="Tokens of each of them.", min=1)] = 2048,
    ranks: Annotated[
        int, typer.Option(help='Processes to cut tables over (engram_ranks="shard"); all sizes are of one.', min=1)
    ] = 1,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB a second from RAM to the accelerator; 25 (PCIe 4.0 x16) is assumed.")
    ] = None,
    disk_reads: Annotated[
        int | None, typer.Option(help="Random reads a second of the disk; 100,000 (an NVMe drive) are assumed.", min=1)
    ] = None,
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Also print the sizes that give tables their share at equal parameters.")
    ] = False,
    share: Annotated[
        list[float] | None, typer.Option(help="A share for --allocate, in percent; 20 and 25, the paper's, by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what goes where, whether it fits, and what a step then moves.

    Nothing is allocated, and the devices that are planned for need not be in this machine. Also counts parameters, and
    says which share of the sparse budget the tables have: 20 to 25 % is best by the paper. Ends with exit code 1 where
    the model does not fit.
    """
    with sentences(as_json):
        limits: dict[Any, Any] | None = _from_json("--max-memory", max_memory)
        places = _from_json("--device-map", device_map) if (device_map or "").startswith("{") else device_map
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"--bandwidth must be above 0, got {bandwidth}.")
        if share and not allocate:
            raise ValueError("--share says what --allocate gives to tables. Add --allocate.")
        from engram_hf.commands.planning import Rates, allocations_as_list, plan_as_dict, show_allocations, show_plan
        from engram_hf.planning import PAPER_SHARES, config_of, count_parameters, estimate_memory, is_served

        config = config_of(model)
        type_of_backbone = dtype or ("bfloat16" if model in PRESETS else None)
        by_device = None if limits is None else _by_device(limits)
        if by_device is not None:
            places = places or "auto"
        estimate = estimate_memory(config, places, type_of_backbone, by_device, batch_size, seq_length, ranks)
        parameters = count_parameters(config)
        shares = [each / 100 for each in share] if share else PAPER_SHARES
        allocations = {"allocations": allocations_as_list(config, shares)} if allocate else {}
        if as_json:
            typer.echo(json.dumps({**plan_as_dict(estimate, parameters), **allocations}, indent=2))
        else:
            rates = Rates(bandwidth, disk_reads)
            show_plan(model, estimate, parameters, batch_size * seq_length, rates, is_served(config))
            for found in allocations.values():
                show_allocations(found)
        if estimate.lacking:
            raise typer.Exit(1)


def _by_device(limits: dict[str, Any]) -> dict[int | str, Any]:
    """JSON has no numbers as keys: "0" is the first accelerator."""
    return {int(key) if key.isdigit() else key: value for key, value in limits.items()}


def _from_json(option: str, text: str | None) -> dict[str, Any] | None:
    """
    Raises:
        ValueError: it is no object.
    """
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{option} is no JSON ({error}), got {text!r:.200}.") from error
    if not isinstance(content, dict):
        raise ValueError(f'{option} is an object in JSON, such as {{"cpu": "64GB"}}; got {text!r:.200}.')
    return content


@app.command(epilog="Example: engram-hf verify output/tiny")
def verify(
    path_or_repo: Annotated[str, typer.Argument(help="Folder, or repository whose files are on this machine.")],
    tables_from: Annotated[
        str | None, typer.Option(help="Folder or repository of the tables, where they lie elsewhere.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint, and say what is not as it was saved or does not belong together.

    Takes as long as reading the files once. Ends with exit code 1 where something is wrong. Of other models with lookup
    tables (Qwen, Gemma) it compares files with the SHA-256 that save_pretrained wrote, and sees that the tables fit the
    config and that their rows are finite.
    """
    with sentences(as_json):
        from engram_hf.checkpoints.verifying import verify_tables
        from engram_hf.commands.inspecting import size

        files = verify_tables(path_or_repo, tables_from)
        if as_json:
            return typer.echo(json.dumps([vars(file) for file in files], indent=2))
        for file in files:
            typer.echo(f"sound  {size(file.nbytes):>12}  {file.name}")


@app.command(epilog="Example: engram-hf push output/tiny user/engram-tiny --license apache-2.0 --no-dry-run")
def push(
    folder: Source,
    repo_id: Annotated[str, typer.Argument(help="Repository, made where there is none.")],
    tables_repo: Annotated[str | None, typer.Option(help="Repository for the tables, if of their own.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, as the Hub writes it: apache-2.0.")] = None,
    training: Annotated[Path | None, typer.Option(help="Folder of the run, for the card.", exists=True)] = None,
    data: Annotated[str | None, typer.Option(help="What it was trained on, for the card.")] = None,
    base_model: Annotated[list[str] | None, typer.Option(help="What it was made from, for the card.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made where there is none.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Send nothing, print every file and its size.")] = True,
    as_json: AsJson = False,
) -> None:
    """Push a checkpoint, with code, tokenizer and card.

    Sends nothing unless --no-dry-run is given. Log in first: hf auth login. A push that was interrupted goes on when it
    is started again.
    """
    given = {"license": license, "training": training, "data": data, "base_model": base_model}
    arguments: dict[str, Any] = {
        "card": {name: value for name, value in given.items() if value},
        "revision": revision,
        "private": private or None,
        "create_pr": create_pr,
        "dry_run": dry_run,
    }
    with sentences(as_json):
        from engram_hf.hub.pushing import push_engram

        pushed = push_engram(folder, repo_id, tables_repo, **arguments)
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
    row_format: Annotated[str, typer.Option(help=f"{', '.join(ROW_FORMATS)}.")] = "float8_e4m3fn",
) -> None:
    """Write a checkpoint with tables in 8 or 4 bits, block by block.

    The source stays as it is. An interrupted run leaves no checkpoint in the target.
    """
    with sentences():
        from engram_hf.checkpoints.quantizing import quantize_tables

        quantize_tables(source, target, row_format)
        typer.echo(f"wrote {target}")


@app.command(epilog="Example: engram-hf merge output/run/checkpoint-500 output/model")
def merge(source: Source, target: Target) -> None:
    """Write a training checkpoint as a model of its own: blocks and their changed rows become blocks.

    The source stays as it is. An interrupted run leaves no checkpoint in the target.
    """
    with sentences():
        from engram_hf.checkpoints.merging import merge_changed_rows

        merge_changed_rows(source, target)
        typer.echo(f"wrote {target}")
        if (target / "patch.safetensors").exists():
            typer.echo("The row patch lies beside it and is not merged: engram-hf patch merge does that.")


patches = typer.Typer(no_args_is_help=True, help="Make, merge and look at row patches: changed rows as a small file.")
app.add_typer(patches, name="patch")
Patch = Annotated[str, typer.Argument(help="File or folder of a patch, or repository of the Hub.")]


@patches.command(epilog="Example: engram-hf patch extract output/tiny output/run/checkpoint-500 alice.safetensors")
def extract(
    before: Source,
    after: Annotated[Path, typer.Argument(help="The same model after training.", exists=True, file_okay=False)],
    target: Annotated[Path, typer.Argument(help="File for the patch, *.safetensors, or a folder for it.")],
    name: Annotated[str | None, typer.Option(help="Of the patch; by default that of the folder.")] = None,
) -> None:
    """Write the rows in which two checkpoints differ as a patch for the first one, block by block."""
    with sentences():
        from engram_hf.adapters.patch_making import extract_patch

        patch = extract_patch(before, after, target, name)
        typer.echo(f"wrote {patch.num_rows:,} rows of {len(patch.tables)} tables to {target}")


Scale = Annotated[float, typer.Option(help="What the patch's changes are multiplied by.")]


@patches.command("merge", epilog="Example: engram-hf patch merge output/tiny alice.safetensors output/alice")
def merge_one(source: Source, patch: Patch, target: Target, scale: Scale = 1.0) -> None:
    """Write a checkpoint whose tables have the rows of a patch. The source stays as it is."""
    with sentences():
        from engram_hf.adapters.patch_making import merge_patch

        merge_patch(source, patch, target, scale)
        typer.echo(f"wrote {target}")


@patches.command(epilog='Example: engram-hf patch apply output/tiny alice.safetensors "The list is"')
def apply(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, or repository of the Hub.")],
    patch: Patch,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 20,
    scale: Scale = 1.0,
    device_map: Annotated[
        str | None, typer.Option(help='As for from_pretrained: "auto", "cpu+disk", or JSON with an entry for a table.')
    ] = None,
) -> None:
    """Go on from a prompt greedily, without a patch and with it. Nothing is written."""
    with sentences():
        places = _from_json("--device-map", device_map) if (device_map or "").startswith("{") else device_map
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from engram_hf import add_patch, disable_patches, load_patch
        from engram_hf.adapters.sources import refuse_missing

        # Before a large model is loaded in vain.
        found = load_patch(patch)
        refuse_missing(source, "config.json")
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, device_map=places)
        add_patch(model, found, scale)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)

        def go_on() -> str:
            generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            return str(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :]))

        with disable_patches(model):
            typer.echo(f"without: {go_on()!r}")
        typer.echo(f"with:    {go_on()!r}")


@patches.command("inspect", epilog="Example: engram-hf patch inspect alice.safetensors")
def inspect_one(patch: Patch, as_json: AsJson = False) -> None:
    """Show which rows a patch changes, for which hash, and what made it."""
    with sentences(as_json):
        from engram_hf.adapters.row_patches import load_patch
        from engram_hf.commands.patches import patch_as_dict, show_patch

        found = load_patch(patch)
        if as_json:
            return typer.echo(json.dumps(patch_as_dict(found), indent=2))
        show_patch(found)


@patches.command(epilog="Example: engram-hf patch compare alice.safetensors bob.safetensors")
def compare(a: Patch, b: Patch, as_json: AsJson = False) -> None:
    """Show which rows two patches share, and on which of them their order matters."""
    with sentences(as_json):
        from engram_hf.adapters.patch_making import compare_patches
        from engram_hf.commands.patches import compared_as_dict, show_compared

        compared = compare_patches(a, b)
        if as_json:
            return typer.echo(json.dumps(compared_as_dict(compared), indent=2))
        show_compared(compared)


@app.command(epilog="Example: engram-hf memorize output/tiny --facts facts.jsonl --output facts.safetensors")
def memorize(
    folder: Source,
    facts: Annotated[
        Path,
        typer.Option(
            help='JSON lines such as {"prompt": "The capital of Zorvania is", "target": " Oskar"}, and with '
            '"paraphrases" and "related", two lists of prompts, if you like.',
            exists=True,
            dir_okay=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="File of the row patch.")] = Path("facts.safetensors"),
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text as the model meets it, in which rows are counted and drift is measured: .jsonl, or text with "
            "empty lines between documents. By default the help topics of Python.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    caution: Annotated[float, typer.Option(help="More of it changes other text less, and fewer facts hold.")] = 100.0,
    max_steps: Annotated[int, typer.Option(help="Steps of the optimisation at most.")] = 120,
    as_json: AsJson = False,
) -> None:
    """Write facts into the rows of a memory, as a row patch, and say what came of it.

    The model stays as it is. Ends with exit code 1 where a fact is not recalled; the patch is written nevertheless.
    """
    with sentences(as_json):
        from engram_hf.commands.memorizing import memorize_file

        report = memorize_file(folder, facts, output, text, caution=caution, max_steps=max_steps)
        typer.echo(report.to_json() if as_json else f"{report.markdown()}\n\nwrote {output}")
        if report.recalled < len(report.facts):
            raise typer.Exit(1)


@app.command(epilog="Example: engram-hf explore output/tiny --port 7860")
def explore(
    model: Annotated[str, typer.Argument(help="Folder, or repository of the Hub.")],
    port: Annotated[
        int | None, typer.Option(help="By default the first one that is free from 7860 on.", min=1, max=65535)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    device_map: Annotated[
        str | None, typer.Option(help='As for from_pretrained: "auto", "cpu+disk", or JSON with an entry for a table.')
    ] = None,
    as_space: Annotated[
        Path | None, typer.Option(help="Write the page as a Space of the Hub into this folder, and open nothing.")
    ] = None,
) -> None:
    """Open a page that shows what the memory of a model does to a text.

    Paste a text and click a token: its n-grams, rows and gates, and what the model would have said without them. The
    page needs the extra `explore`.
    """
    with sentences():
        places = _from_json("--device-map", device_map) if (device_map or "").startswith("{") else device_map
        if as_space is not None:
            from engram_hf.insight.page import write_space

            names = write_space(model, as_space, places)
            return typer.echo(f"wrote {as_space}: {', '.join(names)}")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from engram_hf.insight.explorer import Explorer
        from engram_hf.insight.page import find_gradio, serve

        # Before a large model is loaded in vain.
        find_gradio()
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, device_map=places)
        name = Path(model).resolve().name if Path(model).is_dir() else model
        serve(Explorer(loaded, tokenizer, name=name), host, port)
    return None


for command in (*app.registered_commands, *patches.registered_commands):
    # The lines of a docstring are not those of a terminal.
    paragraphs = cleandoc(str(command.callback.__doc__)).split("\n\n")
    command.help = "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in paragraphs)


if __name__ == "__main__":
    app()

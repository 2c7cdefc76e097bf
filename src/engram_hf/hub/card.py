"""Model cards with true facts only: rendered anew, or as a section of a README that is otherwise left as it is.

The section ends with its facts in a comment, so that a later update knows what it wrote, and what is the user's.
"""

import json
import math
import re
from dataclasses import replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from ..modeling.configuration_engram_moe import AUTO_MAP
from ..modeling.disk_safetensors import write_pieces
from ..modeling.modeling_engram_moe import EngramMoEForCausalLM
from ..modeling.table_formats import QUANTIZED_FORMATS
from .card_facts import BEGIN, END, SECTION, CardFacts, Evaluation, facts_in, read_facts
from .card_gathering import gather_facts
from .card_metadata import MODEL_INDEX, edit_block, merge_metadata, read_metadata


__all__ = ["CardFacts", "gather_facts", "make_metadata", "read_facts", "render_card", "update_card"]

TEMPLATE = Path(__file__).with_name("card_template.md")
PIPELINES = {
    "EngramMoEForCausalLM": "text-generation",
    "EngramMoEForSequenceClassification": "text-classification",
    "EngramMoEForTokenClassification": "token-classification",
    "EngramMoEModel": "feature-extraction",
}
# What the code of a checkpoint runs on, and `device_map`; their floors are those of this package.
NEEDED = ("transformers", "torch", "accelerate")
# The first that a model has: AutoModelForDecision is a second name of the causal one.
AUTO_CLASS = {model.split(".")[1]: auto for auto, model in reversed(AUTO_MAP.items())}
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Ready(str):
    """Text that is put into a card as it is; every other string is made a part of its line first."""


def render_card(facts: CardFacts) -> str:
    """The whole card: metadata, title and section.

    Example:
        >>> card = render_card(gather_facts(EngramMoEConfig.preset("engram-27b")))
        >>> "5,792,338,560 parameters in tables" in card
        True
    """
    return _render(facts, facts)


def make_metadata(facts: CardFacts) -> dict[str, Any]:
    """Metadata as the Hub understands it; a key whose value is not known is not there.

    Example:
        >>> make_metadata(gather_facts("output/tiny"))["pipeline_tag"]
        'text-generation'
    """
    # Without weights there is nothing that a pipeline, or a button of the Hub, could load.
    pipeline = PIPELINES.get(facts.architecture) if facts.has_weights else None
    data = facts.data
    tags = list(EngramMoEForCausalLM.model_tags) if facts.tables else ["engram_moe"]
    metadata = ModelCardData(
        library_name="transformers" if facts.has_weights else None,
        pipeline_tag=pipeline,
        license=facts.license,
        language=list(data.languages) if data and data.languages else None,
        base_model=list(facts.base_model) or None,
        datasets=list(data.datasets) if data and data.datasets else None,
        tags=[*tags, "mixture-of-experts"] if facts.shape["n_routed_experts"] else tags,
    ).to_dict()
    if facts.evaluation and pipeline is not None:
        # One after the other: results on several data sets without an id would be put under the first one's name.
        results = [
            eval_results_to_model_index(facts.name, [_result(evaluation, pipeline)])[0]["results"][0]
            for evaluation in facts.evaluation
        ]
        metadata[MODEL_INDEX] = [{"name": facts.name, "results": results}]
    return metadata


def _result(evaluation: Evaluation, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=evaluation.dataset_id or "custom",
        dataset_name=evaluation.dataset,
        dataset_split=evaluation.split,
        metric_type=evaluation.metric,
        metric_value=evaluation.value,
        metric_name=f"{evaluation.metric} ({evaluation.unit})" if evaluation.unit else None,
    )


def update_card(path: str | Path, facts: CardFacts) -> None:
    """Write a card, or the section of it that is ours, in one step; the rest of a README stays as it is, to the byte.

    In the metadata, the user's keys win, and lists are united; what an update has written there, the next one replaces.
    Licence and base models of the section are those of the metadata.

    Args:
        path: a card, or the folder of its README.md.
        facts: what the card shall say.

    Raises:
        ValueError: the README is no UTF-8, its metadata cannot be read, or the two lines around the section are not one
            pair. The file is left as it is.

    Example:
        >>> update_card("output/tiny", gather_facts("output/tiny", license="apache-2.0"))
    """
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    try:
        text = path.read_bytes().decode("utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); it was left as it is.") from error
    write_pieces(path, [_updated(text, facts, path).encode("utf-8")])


def _updated(text: str, facts: CardFacts, path: Path) -> str:
    if not text.strip():
        return render_card(facts)
    mark, text = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    newline = "\r\n" if "\r\n" in text else "\n"
    head = REGEX_YAML_BLOCK.search(text)
    body = text[head.end() :] if head else text
    there = SECTION.search(body)
    expected = 0 if there is None else 1
    if any(sum(line.rstrip() == wanted for line in body.split("\n")) != expected for wanted in (BEGIN, END)):
        raise ValueError(
            f"{path} must have the lines {BEGIN} and {END} once each and in this order, or not at all. It was left "
            "as it is; remove what is too much."
        )
    own = read_metadata(head[2] if head else "", str(path))
    before = facts_in(body)
    merged = merge_metadata(own, make_metadata(facts), {} if before is None else make_metadata(before))
    block = edit_block(head[2] if head else "", own, merged, newline)
    front = f"{head[1]}{block}{head[3]}" if head else newline.join(["---", block, "---", "", ""])

    models = merged.get("base_model") or ()
    licences = merged.get("license") or ()
    shown = replace(
        facts,
        base_model=(models,) if isinstance(models, str) else tuple(map(str, models)),
        license=licences if isinstance(licences, str) else ", ".join(map(str, licences)),
    )
    whole = _render(shown, facts)
    section = whole[whole.index(f"\n{BEGIN}\n") + 1 : whole.rindex(END)].replace("\n", newline) + END
    if there is not None:
        above, below = body[: there.start()], body[there.end() :]
        # A title that is still ours follows the name, as the results in the metadata do.
        if before is not None and above.strip() == _title(before):
            above = above.replace(_title(before), _title(facts))
        body = above + section + below
    else:
        body += ("" if body.endswith("\n") else newline) + newline + section + newline
    return mark + front + body


def _title(facts: CardFacts) -> str:
    return f"# {_inline(facts.name)}"


def _render(facts: CardFacts, recorded: CardFacts) -> str:
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=_inline,
    )
    environment.filters |= {"number": "{:,}".format, "percent": _percent, "size": _size, "code": _code}
    prefix = "" if facts.architecture == "EngramMoEModel" else "model."

    def entries(tier: str) -> Ready:
        return Ready(", ".join(f'"{prefix}{table.name}": "{tier}"' for table in facts.tables))

    record = json.dumps(recorded.as_dict(), sort_keys=True).replace("<", "\\u003c").replace(">", "\\u003e")
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        shape=facts.shape,
        metadata=Ready(yaml_dump(make_metadata(facts), sort_keys=False).strip()),
        layers=" and ".join(table.name.split(".")[1] for table in facts.tables),
        prefix=prefix,
        entries=entries,
        auto_class=AUTO_CLASS.get(facts.architecture),
        trust=Ready(", trust_remote_code=True" if facts.has_code else ""),
        commands=list(dict.fromkeys(result.command for result in facts.evaluation)),
        requirements=_requirements(),
        generates=facts.architecture == "EngramMoEForCausalLM" and facts.has_tokenizer,
        trained_tokens=_trained_tokens(facts),
        quantized=any(table.dtype in QUANTIZED_FORMATS for table in facts.tables),
        begin=Ready(BEGIN),
        record=Ready(f"<!-- engram-hf: facts {record} -->"),
        end=Ready(END),
    )


def _inline(value: Any) -> Any:
    """A string as a part of a line: it opens no block, no column, no comment and no tag."""
    if isinstance(value, str) and not isinstance(value, Ready):
        return " ".join(value.split()).replace("<", "&lt;").replace("|", "\\|")
    return value


def _requirements() -> Ready | None:
    """The oldest releases that a model runs with, from this package's own metadata; None where it has none."""
    try:
        lines = packages.requires("engram-hf") or ()
    except packages.PackageNotFoundError:
        return None
    # What extras need has a marker, after a semicolon.
    floors = dict(re.findall(r"^([\w-]+)[^;\n]*>=([\d.]+)[^;\n]*$", "\n".join(lines), re.MULTILINE))
    return Ready(", ".join(f"`{name}>={floors[name]}`" for name in NEEDED if name in floors)) or None


def _trained_tokens(facts: CardFacts) -> int | None:
    """Tokens of the text times epochs, to three digits: the log does not count them."""
    if facts.data is None or facts.training is None or not facts.data.tokens or not facts.training.epochs:
        return None
    tokens = facts.data.tokens * facts.training.epochs
    return int(round(tokens, 2 - math.floor(math.log10(tokens))))


def _code(command: str) -> Ready:
    """A command as it is, indented: no line of it can end the block or the section."""
    return Ready("\n".join(f"    {line}" for line in command.strip().splitlines()))


def _size(nbytes: int) -> str:
    scale, unit = next(((scale, unit) for scale, unit in UNITS if nbytes >= scale), (1, "bytes"))
    return f"{nbytes / scale:,.1f} {unit}" if scale > 1 else f"{nbytes} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""A model card with true facts only: a new one, or one section of a README whose other text stays as it is."""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard
from markupsafe import Markup

from ..modeling.configuration_engram_moe import AUTO_MAP
from ..modeling.disk_safetensors import write_pieces
from ..modeling.modeling_engram_moe import EngramMoEForCausalLM
from ..modeling.table_formats import QUANTIZED_FORMATS
from .card_facts import BEGIN, END, MEMORY, SECTION, WITH_MEMORY, CardFacts, as_list, decode_card, facts_in, record_of


TEMPLATE = Path(__file__).with_name("card_template.md")
PIPELINES = {
    "EngramMoEForCausalLM": "text-generation",
    "EngramMoEForSequenceClassification": "text-classification",
    "EngramMoEForTokenClassification": "token-classification",
    "EngramMoEModel": "feature-extraction",
    WITH_MEMORY: "text-generation",
}
# The first that a model has: AutoModelForDecision is a second name of the causal one.
AUTO_CLASS = {model.split(".")[1]: auto for auto, model in reversed(AUTO_MAP.items())}
AUTO_CLASS[WITH_MEMORY] = AUTO_CLASS[MEMORY] = "AutoModelForCausalLM"
# What YAML and huggingface_hub raise for damaged metadata.
UNREADABLE = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# How the form begins that `push_to_hub` of transformers writes where there is no card. Nobody has filled it in.
FORM = "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
FORM += "automatically generated."


def render_card(facts: CardFacts) -> str:
    """The whole card: metadata, title and section.

    Example:
        >>> card = render_card(gather_facts(EngramMoEConfig.preset("engram-27b")))
        >>> "5,792,338,560 parameters in tables" in card
        True
    """
    return updated_card(b"", facts, "the card").decode()


def update_card(path: str | Path, facts: CardFacts) -> None:
    """Write a card, or our section of a README. The user's text around the section stays.

    In the metadata, the user's values win and lists are united. What an update wrote there, the next one replaces.

    Args:
        path: a card, or the folder of its README.md.
        facts: what the card shall say.

    Raises:
        ValueError: the README is not UTF-8, its metadata cannot be read, or the two lines around the section are not
            one pair. The file stays as it is.

    Example:
        >>> update_card("output/tiny", gather_facts("output/tiny", license="apache-2.0"))
    """
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    write_pieces(path, [updated_card(path.read_bytes() if path.is_file() else b"", facts, path)])


def make_metadata(facts: CardFacts) -> ModelCardData:
    """Metadata as the Hub understands it. What is not known is None."""
    # Without weights there is nothing that a pipeline, or a button of the Hub, could load.
    pipeline = PIPELINES.get(facts.architecture) if facts.has_weights else None
    tags = list(EngramMoEForCausalLM.model_tags) if facts.tables else ["engram_moe"]
    if facts.architecture in (WITH_MEMORY, MEMORY):
        tags = [tag.replace("engram_moe", "engram_memory") for tag in tags]
    data = facts.data or {}
    results = [
        EvalResult(
            task_type=pipeline,
            # huggingface_hub puts all results of one type of data set under the name of the first.
            dataset_type=result["dataset_id"] or result["dataset"],
            dataset_name=result["dataset"],
            dataset_split=result["split"],
            metric_type=result["metric"],
            metric_value=result["value"],
            metric_name=f"{result['metric']} ({result['unit']})" if result["unit"] else None,
        )
        for result in facts.evaluation
        if pipeline is not None
    ]
    return ModelCardData(
        library_name="transformers" if facts.has_weights else None,
        pipeline_tag=pipeline,
        license=facts.license,
        language=data.get("languages"),
        base_model=facts.base_model,
        datasets=data.get("datasets"),
        tags=[*tags, "mixture-of-experts"] if facts.has_experts else tags,
        model_name=facts.name,
        eval_results=results,
    )


def updated_card(content: bytes, facts: CardFacts, where: object) -> bytes:
    """As `update_card`, for what a file holds. `where` names the file in errors."""
    card = _parse(decode_card(content, where), where)
    section = SECTION.search(card.text)
    marks = [len(re.findall(rf"^{mark}[ \t]*$", card.text, re.MULTILINE)) for mark in (BEGIN, END)]
    if marks != ([0, 0] if section is None else [1, 1]):
        raise ValueError(
            f"{where} must have the lines {BEGIN} and {END} once each and in this order, or not at all. Remove what is "
            "too much; nothing was changed."
        )
    before = facts_in(content, where)
    _merge(card.data, make_metadata(facts), ModelCardData() if before is None else make_metadata(before))
    ours = _render_section(facts, card.data)
    above, below = card.text.rstrip() + "\n\n", "\n"
    if section is not None:
        above, below = card.text[: section.start()], card.text[section.end() :]
    # A form is nobody's text, and a title that is still ours follows the name.
    form = ModelCard.from_template(ModelCardData(), model_description=FORM).text
    replaced = ["", form.strip()] if section is None else [] if before is None else [f"# {_inline(before.name)}"]
    if above.strip() in replaced:
        above = f"\n# {_inline(facts.name)}\n\n"
    card.text = above + ours + below
    return str(card).encode("utf-8", "replace")


def _parse(text: str, where: object) -> ModelCard:
    """
    Raises:
        ValueError: the metadata is not YAML, not a mapping, or not what huggingface_hub understands.
    """
    text = text if text.startswith("---\n") else f"---\n\n---\n{text}"
    try:
        card, index = ModelCard(text), RepoCard(text).data.get("model-index") or []
        if len(index) > 1:
            # ModelCardData would put them all under one name. They stay as they are.
            card.data["model_name"] = card.data["eval_results"] = None
            card.data["model-index"] = index
    except UNREADABLE as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"The metadata of {where} cannot be read: {problem}. Repair what is between its two lines of ---; nothing "
            "was changed."
        ) from error
    return card


def _merge(own: CardData, ours: ModelCardData, written: ModelCardData) -> None:
    """Write our values into the user's metadata where it has none, or where a value that we wrote still stands."""
    if "model-index" in own:
        ours.eval_results = None
    for key in vars(ours):
        mine, new, old = own.get(key), ours.get(key), as_list(written.get(key))
        if isinstance(mine, list):
            new = new if isinstance(new, list) else []
            kept = [item for item in mine if item in new or item not in old]
            value: Any = kept + [item for item in new if not any(_is_same(item, other) for other in kept)]
        else:
            value = new if mine is None or mine == written.get(key) else mine
        own[key] = value or None
    own["model_name"] = (own.get("model_name") or ours.model_name) if own.get("eval_results") else None


def _is_same(item: Any, other: Any) -> bool:
    """Results are the same if they measure the same: the user's value wins."""
    both = isinstance(item, EvalResult) and isinstance(other, EvalResult)
    return item.is_equal_except_value(other) if both else item == other


def _render_section(facts: CardFacts, metadata: CardData) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_inline
    )
    environment.filters["number"] = "{:,}".format
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        config=facts.config,
        auto_class=AUTO_CLASS.get(facts.architecture),
        trust=", trust_remote_code=True" if facts.has_code else "",
        is_memory=facts.architecture in (WITH_MEMORY, MEMORY),
        is_alone=facts.architecture == MEMORY,
        is_quantized=any(table["dtype"] in QUANTIZED_FORMATS for table in facts.tables),
        license=", ".join(item for item in as_list(metadata.get("license")) if isinstance(item, str)),
        base_model=", ".join(item for item in as_list(metadata.get("base_model")) if isinstance(item, str)),
        record=record_of(facts),
    )


def _inline(value: Any) -> Any:
    """Text as a part of its line: it starts no block, column, comment or tag. The filter `safe` prevents this."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return " ".join(value.split()).replace("<", "&lt;").replace("|", "\\|")
    return value

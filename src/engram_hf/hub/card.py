"""A model card with true facts only: a new one, or one section of a README whose other text stays as it is."""

import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard
from markupsafe import Markup

from ..modeling.configuration_engram_moe import AUTO_MAP
from ..modeling.disk_safetensors import write_pieces
from ..modeling.modeling_engram_moe import EngramMoEForCausalLM
from ..modeling.table_formats import QUANTIZED_FORMATS
from .card_facts import BEGIN, END, MEMORIES, MEMORY, CardFacts, as_list, facts_in, read_card, record_of


TEMPLATE = Path(__file__).with_name("card_template.md")
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
}
# The first that a model has: AutoModelForDecision is a second name of the causal one.
AUTO_CLASS = {model.split(".")[1]: auto for auto, model in reversed(AUTO_MAP.items())}
AUTO_CLASS |= dict.fromkeys(MEMORIES, "AutoModelForCausalLM")
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
    path, content = read_card(path)
    write_pieces(path, [updated_card(content, facts, path)])


def updated_card(content: bytes, facts: CardFacts, where: object) -> bytes:
    """As `update_card`, for what a file holds. `where` names the file in errors."""
    card, parts = parts_of_readme(content, where, BEGIN, END)
    before = facts_in(content, where)
    above, below = (parts[0], parts[-1]) if len(parts) > 1 else (card.text.rstrip() + "\n\n", "\n")
    # Nobody wrote an empty text, nor the form of transformers. A title that is still ours follows the name.
    titles = [] if before is None else [f"# {_inline(before.name)}"]
    if above.strip() in ["", ModelCard.from_template(ModelCardData(), model_description=FORM).text.strip(), *titles]:
        above = f"\n# {_inline(facts.name)}\n\n"
    _merge(card.data, _metadata(facts), {} if before is None else _metadata(before))
    card.text = above + _render_section(facts, card.data) + below
    return str(card).encode("utf-8", "replace")


def parts_of_readme(content: bytes, where: object, begin: str, end: str) -> tuple[RepoCard, list[str]]:
    """A README with its metadata, and its text cut at the lines around our section: whole, where there is none.

    Raises:
        ValueError: it is not UTF-8, its metadata cannot be read, or the two lines are not one pair.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        # huggingface_hub warns about a card without metadata.
        card = RepoCard(text if text.lstrip().startswith("---\n") else f"---\n\n---\n{text}")
        parts = re.split(rf"^({begin}|{end})[ \t]*$", card.text, flags=re.MULTILINE)
        if parts[1::2] not in ([], [begin, end]):
            raise ValueError(f"the lines {begin} and {end} must be there once each and in this order, or not at all")
    # Damaged metadata raise errors of many types.
    except Exception as error:
        raise ValueError(
            f"{where} cannot be read: {' '.join(str(error).split())}. Repair its metadata (YAML between two lines of "
            "---) or its text (UTF-8); nothing was changed."
        ) from error
    return card, parts


def _metadata(facts: CardFacts) -> dict[str, Any]:
    """Metadata as the Hub understands it. What is not known is not there."""
    # Without weights there is nothing that a pipeline, or a button of the Hub, could load.
    pipeline = PIPELINES.get(AUTO_CLASS.get(facts.architecture, "")) if facts.has_weights else None
    pipeline = None if facts.architecture == MEMORY else pipeline
    kind = "engram_memory" if facts.architecture in MEMORIES else "engram_moe"
    tags = [tag.replace("engram_moe", kind) for tag in EngramMoEForCausalLM.model_tags] if facts.tables else [kind]
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
        language=data.get("languages") or None,
        base_model=facts.base_model or None,
        datasets=data.get("datasets") or None,
        tags=[*tags, "mixture-of-experts"] if facts.has_experts else tags,
        model_name=facts.name if results else None,
        eval_results=results or None,
    ).to_dict()


def _merge(own: CardData, ours: dict[str, Any], written: dict[str, Any]) -> None:
    """Write our values into the user's metadata where it has none, or where a value that we wrote still stands."""
    for key in [*ours, *(key for key in written if key not in ours)]:
        mine, new, old = own.get(key), ours.get(key), written.get(key)
        # A list of results is one value: what another tool measured stays as it is.
        if isinstance(mine, list) and key != "model-index":
            new, old = new if isinstance(new, list) else [], as_list(old)
            kept = [item for item in mine if item in new or item not in old]
            own[key] = kept + [item for item in new if item not in mine] or None
        elif mine is None or mine == old:
            own[key] = new


def _render_section(facts: CardFacts, metadata: CardData) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_inline
    )
    environment.filters["number"] = "{:,}".format
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        auto_class=AUTO_CLASS.get(facts.architecture),
        is_memory=facts.architecture in MEMORIES,
        is_alone=facts.architecture == MEMORY,
        is_quantized=any(table["dtype"] in QUANTIZED_FORMATS for table in facts.tables),
        license=", ".join(map(str, as_list(metadata.get("license")))),
        base_model=", ".join(map(str, as_list(metadata.get("base_model")))),
        record=record_of(facts),
    )


def _inline(value: Any) -> Any:
    """Text as a part of its line: it starts no block, column, comment or tag. The filter `safe` prevents this."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return " ".join(value.split()).replace("<", "&lt;").replace("|", "\\|")
    return value

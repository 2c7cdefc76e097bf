"""A model card with true facts only: a new one, or one section of a README whose other text stays as it is."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData, RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from markupsafe import Markup

from ..modeling.disk_safetensors import write_pieces
from ..modeling.table_formats import QUANTIZED_FORMATS
from .card_facts import CardFacts, as_list, facts_in, read_card, record_of


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
    Metadata are written anew: their comments are lost, and a version such as 1.10 needs quotes. Lines end as in Unix.

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
    before = facts_in(content, where)
    values = {"facts": facts, "record": record_of(facts), "quantized": QUANTIZED_FORMATS}
    old_values = None if before is None else {**values, "facts": before}
    return updated_readme(content, where, "card_template.md", values, old_values)


def updated_readme(
    content: bytes,
    where: object,
    template: str,
    values: Mapping,
    before: Mapping | None,
    replaced: Sequence[str] = (),
) -> bytes:
    """A README with the metadata, title and section of a card of ours. What the user wrote around them stays.

    Args:
        content: of the README; empty for a new one.
        where: names it in errors.
        template: of the card, a file beside this one. The section lies between two comments, "begin" and "end".
        values: for the template, which also gets the README's own `metadata`.
        before: values of the card that is there, if they are known: what they gave, the new ones replace.
        replaced: names of metadata whose new value takes the place of the user's.

    Raises:
        ValueError: it is not UTF-8, its metadata cannot be read, or the two comments are not one pair.
    """
    ours, old = _render(template, values, {}), None if before is None else _render(template, before, {})
    title, begin, _, end, _ = _parts(ours)
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        # huggingface_hub warns about a card without metadata.
        card = RepoCard(text if text.lstrip().startswith("---\n") else f"---\n\n---\n{text}")
        if metadata := REGEX_YAML_BLOCK.search(text):
            card.data = CardData(**(yaml.load(metadata[2], _Words) or {}))  # noqa: S506, it is a safe loader
        parts = _parts(card, begin, end)
        if parts[1::2] not in ([], [begin, end]):
            raise ValueError(f"the lines {begin} and {end} must be there once each and in this order, or not at all")
    # Damaged metadata raise errors of many types.
    except Exception as error:
        raise ValueError(
            f"{where} cannot be read: {' '.join(str(error).split())}. Repair its metadata (YAML between two lines of "
            "---) or its text (UTF-8); nothing was changed."
        ) from error
    above, below = (parts[0], parts[-1]) if len(parts) > 1 else (card.text.rstrip() + "\n\n", "\n")
    unwritten = ["", ModelCard.from_template(ModelCardData(), model_description=FORM).text.strip()]
    if above.strip() in [*unwritten, "" if old is None else _parts(old)[0].strip()]:
        above = title
    for name in replaced:
        card.data[name] = None
    _merge(card.data, ours.data.to_dict(), {} if old is None else old.data.to_dict())
    card.text = "".join([above, *_parts(_render(template, values, card.data))[1:4], below])
    return str(card).encode("utf-8", "replace")


class _Words(yaml.SafeLoader):
    """Reads `no`, which is also a language, as a word, as YAML 1.2 does; and so `yes`, `on` and `off`."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if first in "tTfF" or tag != "tag:yaml.org,2002:bool"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _parts(card: RepoCard, begin: str = "<!-- .*: begin -->", end: str = "<!-- .*: end -->") -> list[str]:
    """Its text: above the section, the line that begins it, the section, the line that ends it, below."""
    return re.split(rf"^({begin}|{end})[ \t]*$", card.text, flags=re.MULTILINE)


def _render(template: str, values: Mapping, metadata: Mapping | CardData) -> RepoCard:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_in_line
    )
    environment.filters |= {"number": "{:,}".format, "as_list": as_list, "yaml": _yaml}
    source = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return RepoCard(environment.from_string(source).render(values, metadata=metadata))


def _in_line(value: Any) -> str:
    """A value as a part of its line: it starts no block, column, comment or tag. The filter `safe` prevents this."""
    if isinstance(value, Markup):
        return value
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")


def _yaml(value: Any) -> Markup:
    """A value on one line of YAML: as an entry of a list, without the brackets."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)
    return Markup(text.strip()[1:-1])


def _merge(own: CardData, ours: Mapping, written: Mapping) -> None:
    """Write our values into the user's metadata where it has none, or where a value that we wrote still stands."""
    for key in {**ours, **written}:
        mine, new, old = own.get(key), ours.get(key), written.get(key)
        if mine is None or mine == old:
            own[key] = new
        # A list of results is one value: what another tool measured stays as it is.
        elif isinstance(mine, list) and isinstance(new or old, list) and key != "model-index":
            kept = [item for item in mine if item in as_list(new) or item not in as_list(old)]
            own[key] = kept + [item for item in as_list(new) if item not in mine] or None

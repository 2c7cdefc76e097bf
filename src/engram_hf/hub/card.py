"""A model card with true facts only: a new one, or one section of a README whose other text stays as it is.

Facts are read from a checkpoint and from a training log, or given by the author. No tensor is read and nothing is
guessed. What is not known is None or empty, and the card leaves it out.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData, RepoCard
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup
from transformers.utils import logging

from ..adapters.memory_files import MemoryFiles
from ..checkpoints.checking import backbone_config, read_config
from ..checkpoints.inspecting import inspect_checkpoint
from ..insight.ablation import Ablation
from ..insight.plotting import read_figures
from ..modeling.checkpoint_loading import read_digests
from ..modeling.disk_safetensors import write_pieces
from ..planning import count_parameters


logger = logging.get_logger(__name__)
CONFIG_FIELDS: tuple[str, ...] = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
CONFIG_FIELDS += ("n_routed_experts", "num_experts_per_tok", "first_k_dense_replace")
CONFIG_FIELDS += ("engram_layer_ids", "engram_max_ngram_size", "engram_compressed_vocab_size")
TABLE_FIELDS = ("name", "rows", "head_dim", "dtype", "nbytes")
# Facts that an author gives: those that stay true of other weights, and those that do not.
ALWAYS = ("license", "base_model")
OF_WEIGHTS = ("data", "training", "picture", "gates", "evaluation", "ablation", "limits")
# A comment in our section of a card records its facts, with a digest against edits.
RECORD = re.compile(r"^<!-- engram-hf: begin -->[\s\S]*?^<!-- engram-hf: facts (\w+) (.*) -->$", re.MULTILINE)
# How the form begins that `push_to_hub` of transformers writes where there is no card. Nobody has filled it in.
FORM = "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
FORM += "automatically generated."


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says about a model, in the types of JSON.

    `weights` is a digest of all weight files: None if saving wrote no digests. `parameters` are counted for causal
    language models only. `preset` is one of the paper's models, of which there are no weights.
    """

    name: str
    architecture: str
    dtype: str
    config: dict[str, Any]
    parameters: dict[str, int] | None
    tables: list[dict[str, Any]]
    backbone_nbytes: int
    preset: str | None = None
    weights: str | None = None
    has_code: bool = False
    has_tokenizer: bool = False
    repo_id: str | None = None
    tables_repo: str | None = None
    license: str | None = None
    base_model: list[str] = field(default_factory=list)
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    picture: str | None = None
    gates: str | None = None
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    ablation: dict[str, Any] | None = None
    limits: list[str] = field(default_factory=list)


def gather_facts(
    folder: str | Path,
    *,
    training: str | Path | None = None,
    data: str | Mapping | None = None,
    evaluation: Mapping | Iterable[Mapping] | None = None,
    ablation: Ablation | None = None,
    license: str | None = None,
    base_model: str | Iterable[str] | None = None,
    repo_id: str | None = None,
    tables_repo: str | None = None,
    name: str | None = None,
    picture: str | None = None,
    gates: str | None = None,
    limits: str | Iterable[str] | None = None,
    tables_from: str | Path | None = None,
) -> CardFacts:
    """The facts of a checkpoint.

    Args:
        folder: of the checkpoint.
        training: folder of the run, with Trainer's log.
        data: what the model was trained on: a description, or a dict with "description" and, if known, "datasets" (ids
            on the Hub), "languages" (as the Hub writes them) and "tokens" (of the text, each counted once).
        evaluation: results, each a dict with "metric", "value", "dataset", the "command" that gives the value and, if
            known, "dataset_id" (on the Hub), "split" and "unit".
        ablation: what the parts of the memory are worth, from `engram_hf.insight.ablate`.
        license: as the Hub writes it ("apache-2.0").
        base_model: repositories that this model was made from; by default the one that a memory was added to.
        repo_id, tables_repo: where the model will be on the Hub, and where its tables will be if they are apart.
        name: title; by default the name of the repository or folder.
        picture, gates: files in the folder: curves of the training run, and a text in the shades of its gates.
        limits: sentences.
        tables_from: folder or repository of the tables, as in `from_pretrained`.

    Raises:
        FileNotFoundError: there are no weights, no log or no picture.
        ValueError: a file is damaged, an id is not valid on the Hub, or a result is not a number.

    Example:
        >>> facts = gather_facts("output/tiny", data="Python's standard library", license="apache-2.0")
        >>> facts.tables[0]["rows"]
        53826
    """
    folder = Path(folder)
    found, config = inspect_checkpoint(folder, tables_from=tables_from), read_config(folder)
    # Not of file names, so that saving the same weights again changes nothing.
    digests = sorted(read_digests(folder).values())
    for file, drawn_by in ((picture, "plot_training(run, picture)"), (gates, "show(trace).save(gates)")):
        if file is not None and not (folder / file).is_file():
            raise FileNotFoundError(f"{file} is not a file in {folder}. Draw it there: {drawn_by}.")
    if data is not None:
        data = {"description": data} if isinstance(data, str) else data
        data = _with_fields(data, "Data", ["description"], ["datasets", "languages", "tokens"])
    ids = [repo_id, tables_repo, *as_list(base_model), *as_list((data or {}).get("datasets"))]
    for repository in filter(None, ids):
        validate_repo_id(repository)
    return CardFacts(
        name=name or (repo_id or "").split("/")[-1] or folder.resolve().name,
        **facts_of_architecture(config, folder, found.tables),
        dtype=str(getattr(backbone_config(config), "dtype", None) or "float32").removeprefix("torch."),
        backbone_nbytes=found.backbone_nbytes,
        weights=_digest(json.dumps(digests)) if digests else None,
        has_code=getattr(config, "auto_map", None) is not None,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        repo_id=repo_id,
        tables_repo=tables_repo,
        license=license,
        base_model=as_list(base_model),
        data=data,
        training=None if training is None else read_figures(training),
        picture=picture,
        gates=gates,
        evaluation=[_result(result) for result in as_list(evaluation)],
        ablation=None if ablation is None else asdict(ablation),
        limits=as_list(limits),
    )


def facts_of_architecture(config: Any, source: Any, tables: Iterable[Any]) -> dict[str, Any]:
    """What follows from a config and its tables. `source`: what `count_parameters` takes."""
    backbone, facts = backbone_config(config), dict[str, Any]()
    architecture = (config.architectures or ["EngramMoEForCausalLM"])[0]
    if isinstance(config, MemoryFiles):
        base, facts["backbone"] = config.description.facts.base_model, ", ".join(config.architectures or [])
        facts["base_model"] = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None
        architecture = "EngramMemory" if config.description.is_alone else "EngramMemoryForCausalLM"
    return {
        "architecture": architecture,
        "config": {name: getattr(config, name, getattr(backbone, name, None)) for name in CONFIG_FIELDS} | facts,
        "parameters": asdict(count_parameters(source)) if architecture.endswith("ForCausalLM") else None,
        "tables": [{name: getattr(table, name) for name in TABLE_FIELDS} for table in tables],
    }


def read_facts(path: str | Path) -> CardFacts | None:
    """The facts that a card records; None if there is no card, or no section of this package in it.

    Fields that only another release knows are left out. A record that was edited, or that lacks fields, is not used; a
    warning says so.

    Args:
        path: a card, or the folder of its README.md.
    """
    path, content = read_card(path)
    return facts_in(content, path)


def read_card(path: str | Path) -> tuple[Path, bytes]:
    """The file of a card, which is the README.md of a folder, and its bytes: none if it does not exist."""
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    return path, path.read_bytes() if path.is_file() else b""


def facts_in(content: bytes, where: object) -> CardFacts | None:
    """As `read_facts`, for what a file holds. `where` names the file in the warning."""
    if (record := RECORD.search(content.decode(errors="replace"))) is None:
        return None
    with suppress(TypeError):
        if record[1] == _digest(record[2]):
            known, names = json.loads(record[2]), {each.name for each in fields(CardFacts)}
            return CardFacts(**{name: known[name] for name in names & set(known)})
    logger.warning(f"The facts recorded in {where} were edited, or another release left some out; they are not used.")
    return None


def record_of(facts: CardFacts) -> str:
    """The comment that `facts_in` reads. No text in it can end the comment."""
    text = json.dumps(asdict(facts), sort_keys=True).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- engram-hf: facts {_digest(text)} {text} -->"


def keep_known(facts: CardFacts, known: CardFacts) -> CardFacts:
    """`facts`, with what an earlier card said and nobody has given again; of other weights, what is true of any."""
    is_same = known.weights is not None and known.weights == facts.weights
    kept = [name for name in (*ALWAYS, *OF_WEIGHTS) if getattr(known, name) and not getattr(facts, name)]
    if lost := [name for name in kept if name in OF_WEIGHTS and not is_same]:
        logger.warning(
            f"The weights changed since this card was written. Removed: {', '.join(lost)}. Pass the values again if "
            "they still apply."
        )
    return replace(facts, **{name: getattr(known, name) for name in kept if name not in lost})


def as_list(value) -> list:
    return [] if value is None else [value] if isinstance(value, str | bool | Mapping) else list(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result(result: Mapping) -> dict[str, Any]:
    needed, known = ["metric", "value", "dataset", "command"], ["dataset_id", "split", "unit"]
    content = _with_fields(result, "A result", needed, known)
    value = content["value"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not content["command"].strip():
        raise ValueError(f"A result is a finite number with the command that gives it, got {content}.")
    return content


def _with_fields(content: Mapping, what: str, needed: list[str], known: list[str]) -> dict[str, Any]:
    """A copy with None for what is not known. `needed` must be there, and `known` may be."""
    if not set(needed) <= set(content) <= {*needed, *known}:
        raise ValueError(f"{what} has {', '.join(needed)}, and may have {', '.join(known)}; got {sorted(content)}.")
    return {**dict.fromkeys(known), **content}


def render_card(facts: CardFacts) -> str:
    """The whole card: metadata, title and section.

    Example:
        >>> card = render_card(gather_facts("output/tiny", license="apache-2.0"))
        >>> "861,216 parameters in tables" in card
        True
    """
    return updated_card(b"", facts, "the card").decode()


def update_card(path: str | Path, facts: CardFacts) -> None:
    """Write a card, or our section of a README. The user's text around the section stays.

    In the metadata, the user's values win and lists are united. What an update wrote there, the next one replaces.

    Args:
        path: a card, or the folder of its README.md.
        facts: all that the card shall say; what an earlier one said beside it is lost.

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
    values = {"facts": facts, "record": record_of(facts)}
    before = None if (known := facts_in(content, where)) is None else {**values, "facts": known}
    return updated_readme(content, where, "card_template.md", values, before)


def updated_readme(
    content: bytes,
    where: object,
    template: str,
    values: Mapping,
    before: Mapping | None,
    replaced: Sequence[str] = (),
) -> bytes:
    """A README with the metadata, title and section of a card of ours. What the user wrote around them stays.

    The template is a file beside this one; its section lies between two comments, "begin" and "end". What the values
    `before`, of the card that is there, have given, the new ones replace, and they take the place of the user's where
    metadata are named in `replaced`. `where` names the README in errors.

    Raises:
        ValueError: it is not UTF-8, its metadata cannot be read, or the two comments are not one pair.
    """
    ours, old = _render(template, values), _render(template, values if before is None else before)
    title, begin, _, end, _ = _parts(ours)
    try:
        card = _read(content.decode("utf-8-sig").replace("\r\n", "\n"))
        if len(_parts(card, begin, end)) == 1:
            card.text = f"{card.text.rstrip()}\n\n{begin}\n{end}\n"
        above, *section, below = _parts(card, begin, end)
        if section[::2] != [begin, end]:
            raise ValueError(f"the lines {begin} and {end} must be there once each and in this order, or not at all")
    # Damaged metadata raise errors of many types.
    except Exception as error:
        raise ValueError(
            f"{where} cannot be read: {' '.join(str(error).split())}. Repair its metadata (YAML between two lines of "
            "---) or its text (UTF-8); nothing was changed."
        ) from error
    form = ModelCard.from_template(ModelCardData(), model_description=FORM)
    if above.strip() in ("", form.text.strip(), _parts(old)[0].strip()):
        above = title
    for name in replaced:
        card.data[name] = None
    _merge(card.data, ours.data.to_dict(), {} if before is None else old.data.to_dict())
    card.text = "".join([above, *_parts(ours)[1:4], below])
    return str(card).encode("utf-8", "replace")


def _read(text: str) -> RepoCard:
    """A card. huggingface_hub warns about one without metadata."""
    card = RepoCard(text if text.lstrip().startswith("---\n") else f"---\n\n---\n{text}")
    if any(isinstance(word, bool) for word in as_list(card.data.get("language"))):
        raise ValueError('put a language that YAML takes for true or false into quotes: "no"')
    return card


def _parts(card: RepoCard, begin: str = "<!-- .*: begin -->", end: str = "<!-- .*: end -->") -> list[str]:
    """Its text: above the section, the line that begins it, the section, the line that ends it, below."""
    return re.split(rf"^({begin}|{end})[ \t]*$", card.text, flags=re.MULTILINE)


def _render(template: str, values: Mapping) -> RepoCard:
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_in_line)
    environment.filters |= {"number": "{:,}".format, "as_list": as_list, "yaml": _yaml}
    source = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return RepoCard(environment.from_string(source).render(values))


def _in_line(value: Any) -> str:
    """A value as a part of its line: it starts no block, column, comment or tag. The filter `safe` prevents this."""
    if isinstance(value, Markup):
        return value
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")


def _yaml(value: Any) -> Markup:
    """A value on one line of YAML: as an entry of a list, without the brackets."""
    return Markup(yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1])


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

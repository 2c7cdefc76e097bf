"""The YAML at the head of a model card, and how keys come into a card that has some of its own.

What a user wrote stays as it is, to the byte. A key that holds what we wrote follows the facts.
"""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.utils import yaml_dump


MODEL_INDEX = "model-index"


def read_metadata(block: str, where: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: a block of metadata is no YAML, no mapping, or nothing that the Hub's own library understands.
    """
    try:
        own = yaml.safe_load(block) or {}
        if not isinstance(own, dict):
            raise ValueError(f"it must be a mapping of keys to values, got {type(own).__name__}")
        ModelCardData(**own)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"The metadata of {where} cannot be read: {problem}. The file was left as it is; repair what is "
            "between its two lines of ---."
        ) from error
    return own


def merge_metadata(own: Mapping[str, Any], ours: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """What the card shall hold: the user's keys as they are, lists united, and ours.

    Args:
        own: of the card as it is.
        ours: of the facts.
        written: what we wrote into the card before; where that still stands, it gives way to `ours`.
    """
    merged: dict[str, Any] = {}
    for key, value in own.items():
        new, old = ours.get(key), written.get(key)
        if key == MODEL_INDEX and value:
            value = _merge_results(value, new or [], old or [])
        elif isinstance(value, list):
            new, old = new if isinstance(new, list) else [], old if isinstance(old, list) else []
            kept = [item for item in value if item in new or item not in old]
            value = kept + [item for item in new if item not in kept]
        elif value is None or value == old:
            value = new
        if value not in (None, []) or value == own[key]:
            merged[key] = value
    return {**merged, **{key: value for key, value in ours.items() if key not in own}}


def _merge_results(own: list, ours: list, written: list) -> list:
    """Results of the user, then those of ours that the user has no other number for; what we wrote before is gone.

    All are in the form of a model-index: models, each with its results.
    """
    before = [result for model in written for result in model["results"]]
    kept = []
    for model in own:
        if left := [result for result in model["results"] if result not in before]:
            kept.append({**model, "results": left})
    measured = [_what_is_measured(result) for model in kept for result in model["results"]]
    for model in ours:
        results = [result for result in model["results"] if _what_is_measured(result) not in measured]
        same = next((other for other in kept if other["name"] == model["name"]), None)
        if same is not None:
            same["results"] = same["results"] + results
        elif results:
            kept.append({**model, "results": results})
    return kept


def _what_is_measured(result: Mapping[str, Any]) -> tuple:
    """A result without its numbers."""
    return result["task"], result["dataset"], [metric["type"] for metric in result["metrics"]]


def edit_block(block: str, own: Mapping[str, Any], merged: Mapping[str, Any], newline: str) -> str:
    """The block of metadata with other values; lines of keys that stay the same, and comments, are left as they are."""
    # With what may stand before the end of a line; that of the last one belongs to the line below the block.
    before_end = newline.removesuffix("\n")
    lines = f"{block}{before_end}".split("\n") if block else []

    def dump(content: Mapping[str, Any]) -> list[str]:
        text = yaml_dump(dict(content), sort_keys=False) if content else ""
        return [f"{line}{before_end}" for line in text.rstrip("\n").split("\n")] if text else []

    node = yaml.compose(block, Loader=yaml.SafeLoader)
    entries = node.value if isinstance(node, yaml.MappingNode) and not node.flow_style else []
    for key, value in reversed(entries):
        name = key.value
        if name in own and (name not in merged or own[name] != merged[name]):
            start, end = key.start_mark.line, value.end_mark.line + (value.end_mark.column > 0)
            while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
                end -= 1
            lines[start:end] = dump({name: merged[name]} if name in merged else {})
    lines += dump({key: value for key, value in merged.items() if key not in own})
    edited = "\n".join(lines).removesuffix(before_end)
    try:
        is_right = yaml.safe_load(edited) == merged
    except yaml.YAMLError:
        is_right = False
    # Where lines do not stand for keys (all in one line, anchors), everything is written anew.
    return edited if is_right else "\n".join(dump(merged)).removesuffix(before_end)

"""`push_patch`: a row patch and a card of its own, in one commit."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.utils import validate_repo_id
from transformers.utils.hub import hf_api

from ..adapters.row_patches import load_patch
from ..modeling.disk_safetensors import file_digest
from ..modeling.table_patches import PATCH_FILE, RowPatch, write_patch
from .card import parts_of_readme
from .uploading import CARD_FILE, open_repository


BEGIN, END = "<!-- engram-hf patch: begin -->", "<!-- engram-hf patch: end -->"
TAGS = ["engram", "row-patch"]
SECTION = """
This is a row patch: {{ "{:,}".format(patch.num_rows) }} changed rows of the lookup tables of
{{ base_model or "a model with Engram memory" }}, {{ "{:,}".format(nbytes) }} bytes in all. The tables themselves are
not here, and a patch never writes to them.

```python
from engram_hf import add_patch, load_patch

add_patch(model, load_patch("{{ repo_id }}"))  # active at once; remove_patch(model, {{ name }}) takes it out
```

| table | rows | of | {{ "new rows" if patch.mode == "replace" else "added to the old rows" }} |
|---|---|---|---|
{% for table, each in patch.tables.items() %}
| `{{ table }}` | {{ "{:,}".format(each.row_ids | length) }} | {{ "{:,}".format(each.table_rows) }} | {{
each.rows.shape[1] }} x {{ each.rows.dtype | string | replace("torch.", "") }} |
{% endfor %}

{% if patch.provenance %}
What made it:

{% for fact, value in patch.provenance.items() %}
* {{ fact }}: {{ value }}
{% endfor %}

{% endif %}
`add_patch` refuses a model with another hash, table or width. SHA-256 of `{{ file }}`: `{{ sha256 }}`.
"""


def push_patch(
    patch: RowPatch | str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload row patch",
) -> CommitInfo:
    """Push a patch, with a card that says what it is for. A reader finds the old patch with its card, or the new one.

    Args:
        patch: a patch, or its file or folder.
        repo_id: repository; it is created if it does not exist. Only our section of its README is changed.
        base_model: repository of the model that the patch is for, for the card.
        license: for the card, as the Hub writes it.
        token, private, revision, create_pr, commit_message: as in `push_to_hub`.

    Returns:
        the commit.

    Raises:
        FileNotFoundError, ValueError: there is no patch, or it is damaged; the README cannot be read.
        OSError, huggingface_hub.errors.HTTPError: the connection broke or a right is missing; nothing is committed.

    Example:
        >>> push_patch(patch, "user/alice", base_model="user/engram-tiny")  # doctest: +SKIP
    """
    validate_repo_id(repo_id)
    patch = load_patch(patch) if isinstance(patch, str | Path) else patch
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PATCH_FILE
        write_patch(patch, file)
        repository = open_repository(repo_id, token, private, revision, create_pr)
        before = repository.read(CARD_FILE) or b""
        card = _card(patch, file, repository.repo_id, before, base_model, license)
        operations = [
            CommitOperationAdd(path_in_repo=PATCH_FILE, path_or_fileobj=str(file)),
            CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card),
        ]
        return hf_api().create_commit(
            repository.repo_id,
            operations=operations,
            revision=repository.revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message,
            parent_commit=repository.commit,
        )


def _card(
    patch: RowPatch, file: Path, repo_id: str, before: bytes, base_model: str | None, license: str | None
) -> bytes:
    """The README with our section and our metadata; everything else in it stays.

    Raises:
        ValueError: it cannot be read.
    """
    card, parts = parts_of_readme(before, f"{CARD_FILE} of {repo_id}", BEGIN, END)
    data: Any = card.data
    base_model = base_model or data.get("base_model")
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *TAGS]))
    for key, value in (("base_model", base_model), ("license", license), ("library_name", "engram-hf")):
        if value is not None and data.get(key) is None:
            data[key] = value
    above, below = (parts[0], parts[-1]) if len(parts) > 1 else (card.text.rstrip() + "\n\n", "\n")
    above = above if above.strip() else f"\n# {_in_line(patch.name)}\n\n"
    card.text = f"{above}{BEGIN}\n{_section(patch, file, repo_id, base_model)}\n{END}{below}"
    return str(card).encode("utf-8", "replace")


def _section(patch: RowPatch, file: Path, repo_id: str, base_model: Any) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_in_line
    )
    return environment.from_string(SECTION).render(
        patch=patch,
        repo_id=repo_id,
        base_model=base_model if isinstance(base_model, str) else ", ".join(base_model or []),
        nbytes=file.stat().st_size,
        # The same text in JSON and in Python.
        name=Code(json.dumps(patch.name, ensure_ascii=False)),
        file=PATCH_FILE,
        sha256=file_digest(file),
    )


class Code(str):
    """Text of one line inside a block of code, where nothing is escaped."""


def _in_line(value: Any) -> str:
    """A value as a part of its line: it starts no block, column, comment or tag."""
    if isinstance(value, Code):
        return value
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")

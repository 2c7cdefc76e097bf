"""What `engram-hf memorize` reads, and the run of it: a model in a folder, a file of facts, a file for the patch."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..adapters.fact_reports import FactReport
from ..adapters.facts import as_facts
from ..adapters.memorizing import memorize_many
from ..adapters.row_patches import save_patch


def read_documents(file: Path) -> list[Any]:
    """Documents of a text file: the objects of a .jsonl file, or the parts of any other between empty lines.

    Raises:
        ValueError: there are none, or a line is no JSON.
    """
    text = file.read_text("utf-8")
    try:
        if file.suffix == ".jsonl":
            documents = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            documents = [part for part in text.split("\n\n") if part.strip()]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"A line of {file} is no JSON ({error}).") from error
    if not documents:
        raise ValueError(f"{file} holds no text.")
    return documents


def memorize_file(folder: Path, facts: Path, output: Path, text: Path | None, **options: Any) -> FactReport:
    """Write the patch with which the model of a folder knows the facts of a file.

    Args:
        folder: of a model with its tokenizer.
        facts: JSON lines.
        output: file of the patch.
        text: as the model meets it; None for the help topics of Python.
        options: of `memorize_many`.

    Raises:
        ValueError, OSError: a file is missing or wrong, or the model has no memory.
    """
    # Before a large model is loaded in vain.
    known = as_facts(facts)
    documents = None if text is None else read_documents(text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    patch, report = memorize_many(model, tokenizer, known, text=documents, name=output.stem, **options)
    save_patch(patch, output)
    return report

"""Instruments: what a memory does to a text, what each of its parts is worth, and the curves of a run."""

from importlib import import_module
from typing import Any


# Name to the module that has it. Modules are imported when they are asked for, since some of them are seldom needed.
_MODULE_OF = {
    "ablate": "ablation",
    "layer_similarity": "similarity",
    "logit_lens": "lens",
    "nearest_ngrams": "neighbours",
    "plot_training": "plotting",
    "read_rows": "text_rows",
    "row_report": "row_use",
    "show": "showing",
    "silenced": "silencing",
    "trace": "tracing",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"engram_hf.insight has no {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)

"""What one looks at: curves of a run, what a memory does to a text, and what its parts are worth."""

from .ablation import ablate
from .lens import logit_lens
from .neighbours import nearest_ngrams
from .plotting import plot_training
from .row_use import row_report
from .similarity import layer_similarity
from .text_rows import read_rows


__all__ = [
    "ablate",
    "layer_similarity",
    "logit_lens",
    "nearest_ngrams",
    "plot_training",
    "read_rows",
    "row_report",
]

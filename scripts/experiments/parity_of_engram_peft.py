"""In which ways of running a model is a memory exact: one of engram-peft, and one of this package?

    ENV/bin/python scripts/experiments/parity_of_engram_peft.py        a minute

ENV is an environment with this package's requirements, pytest and engram-peft==1.2.7. It need not have this package.

A small Llama is run in 22 ways: with a cache, in chunks, with padding, packed, with beams, with assistants, and so on.
Each way is compared with one forward over the whole text; tests/adapters/test_parity.py has them. A way holds if both
agree to 2e-5. It is tried with the model alone, with a memory of this package, and with one of engram-peft 1.2.7, which
has as many n-grams, heads and rows in the same layers. All weights are drawn at random, in float32 on a CPU, because
the usual beginnings are zero and would hide what is wrong. A last column leaves the convolution of engram-peft at zero,
where it begins.

engram-peft is tried twice: through its own wrapper, and through the Llama to which it attaches its hooks. A way counts
as held if one of them holds.
"""

import argparse
import copy
import logging
import re
import sys
import warnings
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "adapters"))
from architectures import VOCAB_SIZE, tiny_backbone, tiny_memory, with_memory
from compare_adapters import import_engram_peft
from helpers.results import Results, Table, about, add_results_argument
from test_parity import CELLS, outcome, some_ids, whole


@torch.no_grad()
def with_engram_peft(model, has_convolution: bool):
    """engram-peft's wrapper of a model, with a memory that is as loud as the rest."""
    import_engram_peft()
    from engram_peft import EngramConfig, get_engram_model

    ours = tiny_memory()
    rows_of_order = ours.vocab_size * ours.n_heads
    config = EngramConfig(
        engram_vocab_size_per_ngram=[rows_of_order, rows_of_order],
        ngram_sizes=[2, 3],
        n_head_per_ngram=ours.n_heads,
        embedding_dim=2 * ours.n_heads * ours.head_dim,
        enable_tokenizer_compression=False,
        compressed_vocab_size=VOCAB_SIZE,
        target_layers=ours.layer_ids,
        hidden_size=model.config.hidden_size,
        pad_id=model.config.pad_token_id,
        hc_mult=1,
    )
    wrapped = get_engram_model(model, config, train_mode="engram_only").eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.engram_layers.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
        if "short_conv.conv" in name and not has_convolution:
            parameter.zero_()
    return wrapped


class ThroughTheWrapper:
    """A model whose forward and `generate` are those of engram-peft's wrapper, and whose rest is that of the Llama."""

    def __init__(self, wrapped):
        self.wrapped, self.generate = wrapped, wrapped.generate

    def __call__(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.wrapped.base_model, name)


def outcome_of_wrapped(cell, wrapped) -> str:
    """What happens through the wrapper, or through the Llama where only that holds."""
    found = []
    for model in (ThroughTheWrapper(wrapped), wrapped.base_model):
        # What it keeps of earlier tokens lies on the model, not in the cache.
        wrapped._inference_token_buffer = wrapped._current_hash_indices = None
        found.append(outcome(cell, model))
    return next((each for each in found if each == "holds"), found[0])


def shown(found: str) -> str:
    """What happened, in few words."""
    return re.sub(r"raises (\w+).*", r"raises \1", found, flags=re.DOTALL)


def change(model, backbone) -> float:
    """The largest change of a logit."""
    ids = some_ids(2)
    return float((whole(model, ids) - whole(backbone, ids)).abs().max())


@torch.no_grad()
def compare() -> Table:
    """
    Raises:
        RuntimeError: a memory changes nothing, so that its ways say nothing.
    """
    backbone = tiny_backbone("llama")
    ours = with_memory(copy.deepcopy(backbone))
    theirs = [with_engram_peft(copy.deepcopy(backbone), has_convolution) for has_convolution in (True, False)]
    changes = [change(model, backbone) for model in (ours, *(wrapped.base_model for wrapped in theirs))]
    if min(changes) < 1e-2:
        raise RuntimeError(f"A memory says nothing: it changes logits by at most {min(changes):g}.")
    rows = []
    for name, cell in CELLS.items():
        found = [outcome(cell, backbone), outcome(cell, ours), *(outcome_of_wrapped(cell, each) for each in theirs)]
        print(name, *found, sep=" | ", flush=True)
        rows.append([name.replace("_", " "), *map(shown, found)])
    rows.append(["ways that hold", *(str(sum(row[i] == "holds" for row in rows)) for i in range(1, 5))])
    names = ("the model alone", "engram-hf", "engram-peft", "engram-peft, convolution at zero")
    note = f"The memories change logits by at most {', '.join(f'{each:.2f}' for each in changes)}."
    return Table(dict.fromkeys(("way of running it", *names), ""), rows, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_results_argument(parser)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results = Results("Ways of running a model with an added memory, beside engram-peft", about(__doc__))
    results.tables = [compare()]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

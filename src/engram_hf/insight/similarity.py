"""Which layers of two models do the same: linear CKA of their hidden states, with the unbiased estimator of HSIC.

Sources: Kornblith et al., arXiv 1905.00414; Song et al., JMLR 13 (2012), for the estimator; arXiv 2601.07372, figure 4,
for the comparison of a model with a memory and one without.
"""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .drawing import new_figure, save_figure
from .hidden_layers import collapse_streams, hidden_states
from .silencing import silenced
from .text_rows import BATCH_TOKENS, TextRow, batches, evaluating, progress, rows_for, run


# Of these the states of all layers are kept at once.
MOST_TOKENS = 2048
# One state in so many is what the alignment of a state is averaged over: 5 of the 31 of a model of 30 layers.
CLOSEST_OF = 6
# With more states, numbers would not fit into the cells of the picture.
MOST_NUMBERED = 9


@dataclass(frozen=True)
class LayerSimilarity:
    """The similarity of each hidden state of model a to each of model b; state i is the one after i layers.

    cka: (layers of a + 1) lists of (layers of b + 1) numbers, up to 1; below 0 only by chance, NaN where a state is
        the same for all tokens.
    alignment: for each state of a, which state of b it resembles: the mean of the most similar ones (a sixth of them),
        weighted by similarity. A number above that of the state itself says that a is ahead of b.
    tokens: that were compared.
    name_a, name_b: what the models are called in pictures.
    """

    cka: list[list[float]]
    alignment: list[float]
    tokens: int
    name_a: str
    name_b: str

    def to_json(self) -> str:
        """All numbers as JSON; NaN is null."""
        content = asdict(self)
        content["cka"] = [[None if value != value else value for value in row] for row in self.cka]
        content["alignment"] = [None if value != value else value for value in self.alignment]
        return json.dumps(content, indent=1)

    def markdown(self) -> str:
        """A table with a row for each state of model a."""
        lines = ["| state of a | most like state of b | similarity | alignment |", "|---|---|---|---|"]
        for state, (row, aligned) in enumerate(zip(self.cka, self.alignment, strict=True)):
            known = [value if value == value else -1.0 for value in row]
            best = max(range(len(known)), key=known.__getitem__)
            lines.append(f"| {state} | {best} | {row[best]:.3f} | {aligned:.1f} |")
        names = f"a is {self.name_a}, b is {self.name_b}; {self.tokens:,} tokens."
        return "\n".join([*lines, "", names])

    _repr_markdown_ = __str__ = markdown

    def draw(self, picture: str | Path) -> Path:
        """Write a heat map of layers x layers as PNG, with the alignment as a line.

        Raises:
            ImportError: matplotlib is missing.
        """
        size = 1.8 + min(7.0, max(3.8, 0.42 * max(len(self.cka), len(self.cka[0]))))
        figure, (axis,) = new_figure("Which layers do the same", 1, 1, (size + 1.2, size))
        columns = [list(column) for column in zip(*self.cka)]
        shown = axis.imshow(columns, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axis.grid(False)
        axis.plot(self.alignment, color="white", linewidth=3.5)
        axis.plot(self.alignment, color="black", linewidth=1.5, marker="o", markersize=3, label="alignment")
        if max(len(self.cka), len(self.cka[0])) <= MOST_NUMBERED:
            for i, row in enumerate(self.cka):
                for j, value in enumerate(row):
                    axis.text(
                        i, j - 0.3, f"{value:.2f}", ha="center", color="black" if value > 0.5 else "white", size=8
                    )
        last = min(len(self.cka), len(self.cka[0])) - 1
        axis.plot([0, last], [0, last], color="white", linewidth=1.2, linestyle=":", label="same layer")
        axis.set(xlabel=f"{self.name_a}: after layers", ylabel=f"{self.name_b}: after layers")
        axis.set_title(
            f"Linear CKA of {self.tokens:,} tokens. Above the dotted line, {self.name_a} is ahead.",
            fontsize=10,
        )
        for each in (axis.xaxis, axis.yaxis):
            each.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper left", facecolor="#777777", labelcolor="white", framealpha=0.9)
        figure.colorbar(shown, ax=axis, label="similarity")
        return save_figure(figure, picture)


def layer_similarity(
    model_a: nn.Module, model_b: nn.Module | None, data: Iterable[Any], *, tokenizer: Any = None
) -> LayerSimilarity:
    """Compare the hidden states of two models over the same tokens, layer by layer.

    Up to 2,048 tokens are compared, spread over all rows. The first token of a row is left out: in most models its
    state is far larger than all others, and would decide the number alone.

    Args:
        model_a: a causal language model of transformers.
        model_b: another one with the same tokens, or None for model a with its memory silenced.
        data: rows of text; see `read_rows`.
        tokenizer: for data that is text.

    Raises:
        ValueError: there are fewer than 4 tokens, the layers of a model are not found, or model a has no memory to
            silence.

    Example:
        >>> similarity = layer_similarity(model, model, data)
        >>> [round(similarity.cka[i][i], 6) for i in range(5)]
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    rows = rows_for(model_a, data, tokenizer)
    total = sum(len(row.ids) - 1 for row in rows)
    if total < 4:
        raise ValueError(f"Similarity needs at least 4 tokens beside the first of each row, got {total}. Give more.")
    kept = min(total, MOST_TOKENS)
    chosen = torch.arange(kept) * total // kept
    name_b = "with its memory silenced" if model_b is None else "model b"
    with progress(2 * len(rows), "layer similarity") as bar:
        states_a = _states(model_a, rows, chosen, bar)
        if model_b is model_a:
            states_b = states_a
        else:
            with silenced(model_a) if model_b is None else nullcontext():
                states_b = _states(model_a if model_b is None else model_b, rows, chosen, bar)
    cka = unbiased_cka(states_a, states_b)
    return LayerSimilarity(cka.tolist(), align(cka), kept, "with its memory" if model_b is None else "model a", name_b)


def _states(model: nn.Module, rows: list[TextRow], chosen: torch.Tensor, bar: Any) -> list[torch.Tensor]:
    """For each state (chosen tokens, hidden) float32 on the CPU.

    Args:
        chosen: (n,) ascending numbers of tokens, the first of each row not counted.
    """
    found: list[list[torch.Tensor]] = []
    done = 0
    with evaluating(model):
        for batch in batches(rows, BATCH_TOKENS):
            with hidden_states(model) as states:
                run(model, batch)
            is_counted = batch.is_token.clone()
            is_counted[:, 0] = False
            count = int(is_counted.sum())
            wanted = chosen[(chosen >= done) & (chosen < done + count)] - done
            done += count
            places = is_counted.flatten().nonzero().flatten()[wanted]
            found.append(
                [
                    collapse_streams(model, state.flatten(0, 1)[places.to(state.device)]).float().cpu()
                    for state in states
                ]
            )
            bar.update(len(batch.input_ids))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def unbiased_cka(states_a: list[torch.Tensor], states_b: list[torch.Tensor]) -> torch.Tensor:
    """Linear CKA of every pair, by the unbiased estimator of HSIC.

    HSIC of two kernels K and L with zeros on their diagonals is
    (tr(KL) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1) / (n (n - 3)). Here it is computed in the space of
    features, without a matrix of tokens x tokens.

    Args:
        states_a: each (tokens, features).
        states_b: the same tokens, with features of their own.

    Returns:
        (states of a, states of b) float64.
    """
    # HSIC does not change with the mean of the features; small numbers keep its digits.
    a = [_centered(state) for state in states_a]
    b = [_centered(state) for state in states_b]
    own_a = torch.stack([_hsic(each, each) for each in a])
    own_b = torch.stack([_hsic(each, each) for each in b])
    both = torch.stack([torch.stack([_hsic(one, other) for other in b]) for one in a])
    return both / (own_a.unsqueeze(1) * own_b.unsqueeze(0)).sqrt()


def _centered(states: torch.Tensor) -> torch.Tensor:
    states = states.double()
    return states - states.mean(0)


def _hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate for linear kernels of (tokens, features), centred, so that 1'XX' = 0."""
    count = len(x)
    squares_x, squares_y = x.square().sum(1), y.square().sum(1)  # the diagonals of the kernels
    trace = (x.T @ y).square().sum() - squares_x @ squares_y
    # With the diagonals taken out, the rows of the kernels sum to minus their diagonals.
    sums = squares_x.sum() * squares_y.sum() / ((count - 1) * (count - 2))
    cross = squares_x @ squares_y * 2 / (count - 2)
    return (trace + sums - cross) / (count * (count - 3))


def align(cka: torch.Tensor) -> list[float]:
    """For each row, the mean of the columns of its largest numbers, weighted by them."""
    values, columns = cka.nan_to_num(0.0).clamp_min(0.0).topk(max(1, round(cka.shape[1] / CLOSEST_OF)), dim=1)
    return ((values * columns).sum(1) / values.sum(1)).tolist()

"""How sure a mean is: intervals by a bootstrap over documents. Rows of a document are alike, so it draws whole ones."""

from collections.abc import Sequence

import torch


DRAWS, DRAWS_AT_ONCE = 4000, 50


def interval(
    differences: torch.Tensor, documents: Sequence[str], weights: torch.Tensor | None = None
) -> tuple[float, float, float]:
    """The mean of the differences of rows and its 95% interval, by a bootstrap that draws whole documents.

    Args:
        differences: (rows,).
        documents: the name of the document of each row.
        weights: (rows,) such as the tokens of each row; all rows count alike by default.

    Returns:
        mean, lower and upper end. With one document alone all three are the mean, which says nothing of its error.

    Example:
        >>> mean, low, high = interval(torch.tensor([1.0, 3.0]), ["a", "b"])
        >>> mean, low, high
        (2.0, 1.0, 3.0)
    """
    weights = (torch.ones(len(differences)) if weights is None else weights).double()
    numbers = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    which = torch.tensor([numbers[name] for name in documents])
    zeros = torch.zeros(len(numbers), dtype=torch.float64)
    sums = zeros.index_add(0, which, differences.double() * weights)
    totals = zeros.index_add(0, which, weights)
    generator, means = torch.Generator().manual_seed(0), []
    # All draws at once would take gigabytes for thousands of documents.
    for _ in range(DRAWS // DRAWS_AT_ONCE):
        draws = torch.randint(len(numbers), (DRAWS_AT_ONCE, len(numbers)), generator=generator)
        means.append(sums[draws].sum(1) / totals[draws].sum(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(sums.sum() / totals.sum()), low, high

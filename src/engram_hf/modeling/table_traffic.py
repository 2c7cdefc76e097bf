"""What a training step of tables over ranks moves, computed from sizes and two stated assumptions. Nothing is measured.

A rank reads distinct rows, each once, and asks for those that others hold. Their gradients travel back in float32, or
in the type of the table where that is wider. Other ranks ask this one for as many rows, on average.
"""

# What is assumed of a step where nobody says better: tokens of a rank, and how many of their rows are distinct.
TOKENS_OF_A_STEP = 16_384
DISTINCT_SHARE = 0.5
# A row id goes to the owner with the question. A message of gradients names the question, and has one bit for each row.
ROW_ID_NBYTES = 4
NAMED_NBYTES = 1 / 8
# Of one number in a gradient.
GRADIENT_NBYTES = 4


def rows_of_step(rows_of_token: int, tokens: int = TOKENS_OF_A_STEP, distinct_share: float = DISTINCT_SHARE) -> float:
    """Distinct rows that the batch of a rank reads; an owner is asked for as many.

    Args:
        rows_of_token: that a token reads: one for each hash head.
        tokens: of a rank and step.
        distinct_share: of the rows of a batch, with repeated ones left out.

    Example:
        >>> rows_of_step(rows_of_token=16, tokens=2048)
        16384.0
    """
    return tokens * rows_of_token * distinct_share


def nbytes_of_step(rows: float, width: int, row_nbytes: int, ranks: int, is_trained: bool = True) -> float:
    """Bytes that a rank moves in a step: rows that others hold, as many gradients, and their row ids.

    Args:
        rows: distinct rows that the batch of a rank reads.
        width: numbers in a row.
        row_nbytes: bytes of a row as it is stored.
        ranks: over which the table is cut.
        is_trained: whether gradients travel back.

    Example:
        >>> nbytes_of_step(rows=1000, width=80, row_nbytes=160, ranks=1)
        0.0
        >>> nbytes_of_step(rows=1000, width=80, row_nbytes=160, ranks=4)
        363093.75
    """
    foreign = rows * (ranks - 1) / ranks
    if not is_trained:
        return foreign * (row_nbytes + ROW_ID_NBYTES)
    gradient_nbytes = max(width * GRADIENT_NBYTES, row_nbytes)
    return foreign * (row_nbytes + gradient_nbytes + ROW_ID_NBYTES + NAMED_NBYTES)

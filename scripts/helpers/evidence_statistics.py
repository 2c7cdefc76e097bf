"""How sure a figure of the experiments is. All runs read the same held-out articles, so articles are compared in pairs.

An interval is a 95% bootstrap over articles. It says how far other articles of this kind would move the figure. It says
nothing of other seeds: that spread is shown beside it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


DRAWS = 2000


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"

    @property
    def is_clear(self) -> bool:
        """Whether 0 is outside."""
        return self.low > 0 or self.high < 0


def losses_per_token(runs: Sequence[dict], weights: np.ndarray) -> np.ndarray:
    """Loss of each run in nats per token, (draws, runs), with articles counted by (draws, articles) weights."""
    nats = np.array([run["documents"]["nats"] for run in runs], dtype=np.float64)  # (runs, articles)
    tokens = np.array(runs[0]["documents"]["tokens"], dtype=np.float64)  # (articles,)
    return weights @ nats.T / (weights @ tokens)[:, None]


def bootstrap(runs: Sequence[dict], figure: Callable[[np.ndarray], float]) -> Interval:
    """A figure of the losses of several runs, with its interval.

    Args:
        runs: results of runs over the same articles.
        figure: makes a number of the losses of the runs, (runs,) in nats per token.

    Raises:
        ValueError: the runs have read different articles.
    """
    tokens = runs[0]["documents"]["tokens"]
    if different := [run["name"] for run in runs if run["documents"]["tokens"] != tokens]:
        raise ValueError(
            f"{different[0]} and {runs[0]['name']} have read different articles. Run one of them again with the text "
            "of the other."
        )
    articles = len(tokens)
    whole = losses_per_token(runs, np.ones((1, articles)))[0]
    draws = np.random.default_rng(0).multinomial(articles, np.full(articles, 1 / articles), size=DRAWS)
    found = [figure(losses) for losses in losses_per_token(runs, draws.astype(np.float64))]
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(figure(whole)), float(low), float(high))


def difference(runs: Sequence[dict], others: Sequence[dict]) -> Interval:
    """The mean loss of runs minus that of others, article by article. Pairs have the same seed."""
    count = len(runs)
    return bootstrap([*runs, *others], lambda losses: float(losses[:count].mean() - losses[count:].mean()))


def slope(places: Sequence[float], losses: np.ndarray) -> float:
    """Of the straight line of least squares."""
    return float(np.polyfit(places, losses, 1)[0])


def curvature(places: Sequence[float], losses: np.ndarray) -> float:
    """The quadratic term of the parabola of least squares: above 0 for a U."""
    return float(np.polyfit(places, losses, 2)[0])


def minimum(places: Sequence[float], losses: np.ndarray) -> float:
    """Where the parabola of least squares is lowest, within the places; at an end where it is no U."""
    square, line, _ = np.polyfit(places, losses, 2)
    inside = -line / (2 * square) if square > 0 else np.inf * -line
    return float(np.clip(np.nan_to_num(inside, posinf=max(places), neginf=min(places)), min(places), max(places)))


def share_right(digits: str) -> float:
    return digits.count("1") / len(digits)


def by_question(digits: str, seeds: int) -> np.ndarray:
    """How many of the seeds answer each question right, as a share: (questions,). Digits of one seed follow another's.

    All seeds get the same questions, so a second seed adds no question that could be drawn.
    """
    return np.array([int(digit) for digit in digits], dtype=np.float64).reshape(seeds, -1).mean(0)


def drawn_questions(count: int) -> np.ndarray:
    """How often each question is drawn, (draws, questions)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)


def share_interval(digits: str, seeds: int = 1) -> tuple[float, float]:
    """95% interval of a share of right answers, by Wilson's formula for so many questions as one seed gets."""
    count, share, z = len(digits) // seeds, share_right(digits), 1.96
    middle, reach = share + z * z / (2 * count), z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return float((middle - reach) / (1 + z * z / count)), float((middle + reach) / (1 + z * z / count))


def share_difference(own: str, other: str, seeds: int = 1) -> Interval:
    """How many more of the same questions are answered right, with a bootstrap over questions."""
    gains = by_question(own, seeds) - by_question(other, seeds)
    low, high = np.quantile(drawn_questions(len(gains)) @ gains / len(gains), [0.025, 0.975])
    return Interval(float(gains.mean()), float(low), float(high))


def kept_share(on: str, silent: str, chance: float, seeds: int = 1) -> Interval:
    """What silencing leaves of the right answers above chance, with a bootstrap over questions.

    A share has no meaning where the memory answers no better than chance: all three numbers are then NaN.
    """
    if share_interval(on, seeds)[0] <= chance:
        return Interval(float("nan"), float("nan"), float("nan"))
    pairs = np.stack([by_question(digits, seeds) for digits in (on, silent)])  # (2, questions)
    above, questions = pairs.mean(1) - chance, pairs.shape[1]
    drawn = drawn_questions(questions) @ pairs.T / questions - chance  # (draws, 2)
    drawn = drawn[drawn[:, 0] > 0]
    low, high = np.quantile(drawn[:, 1] / drawn[:, 0], [0.025, 0.975])
    return Interval(float(above[1] / above[0]), float(low), float(high))

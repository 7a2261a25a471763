"""What paired samples say: the median of the ratios, an interval of it, and whether the machine changed meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxshrink.weights import Array

CONFIDENCE = 0.95
FEWEST = 6  # rounds: with fewer, not even the extremes enclose the median with that confidence
# Two sessions of one and the same model differ by up to so much, for as long as they live: where its weights happen to
# lie in memory. More rounds do not tell that from a difference between models.
ALIKE = 0.02
_BLOCKS = 64  # neighbouring rounds are alike: more values than this would pretend to know more

Verdict = Literal["faster", "slower", "no difference"]


@dataclass(frozen=True)
class Timing:
    """How the latency of a second model compares with that of a first one.

    Attributes:
        seconds: median latency of each.
        ratio: of the second's latency to the first's: the median over rounds; below 1 is faster.
        low, high: an interval that holds this median with a confidence of 95 %; 0 and infinity for fewer than 6 rounds.
        runs: rounds, each of which timed both.
        drift: by what part both took longer in the last third of the rounds than in the first.
    """

    seconds: tuple[float, float]
    ratio: float
    low: float
    high: float
    runs: int
    drift: float

    @property
    def verdict(self) -> Verdict:
        """What can be told of the second model: the whole interval must lie beyond what equal models differ by."""
        if self.high < 1 - ALIKE:
            return "faster"
        return "slower" if self.low > 1 + ALIKE else "no difference"


def make_timing(first: Array, second: Array) -> Timing:
    """The comparison of two models by their seconds per round, as `measure` gives them."""
    ratios = second / first
    low, high = median_interval(_blocks(ratios))
    seconds = float(np.median(first)), float(np.median(second))
    return Timing(seconds, float(np.median(ratios)), low, high, len(ratios), drift([first, second]))


def median_interval(values: Array) -> tuple[float, float]:
    """The narrowest pair of values that encloses the median of what was sampled with `CONFIDENCE` or more.

    By order statistics: how many of n values lie below the median is binomial, whatever their distribution
    (David and Nagaraja, Order Statistics, 7.1).
    """
    count, rank, tail = len(values), 0, 0.5 ** len(values)
    while 2 * tail <= 1 - CONFIDENCE and rank < count // 2:
        rank += 1
        tail += math.comb(count, rank) * 0.5**count
    if rank == 0:
        return 0.0, math.inf
    ordered = np.sort(values)
    return float(ordered[rank - 1]), float(ordered[count - rank])


def _blocks(ratios: Array) -> Array:
    """The medians of so many stretches of rounds."""
    if len(ratios) <= _BLOCKS:
        return ratios
    return np.array([np.median(block) for block in np.array_split(ratios, _BLOCKS)])


def drift(samples: list[Array]) -> float:
    """By what part all models took longer in the last third of the rounds than in the first."""
    level = np.exp(np.mean([np.log(seconds / np.median(seconds)) for seconds in samples], axis=0))
    third = len(level) // 3
    return float(np.median(level[-third:]) / np.median(level[:third]) - 1) if third else 0.0

"""Medians, intervals and verdicts, on numbers made up for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxshrink.bench.statistics import FEWEST, Timing, drift, make_timing, median_interval


@pytest.mark.parametrize(
    # ranks from a table of the sign test: Conover, Practical Nonparametric Statistics, 3.2
    ("count", "lowest"),
    [(6, 1), (8, 1), (9, 2), (10, 2), (15, 4), (20, 6), (30, 10), (50, 18)],
)
def test_the_interval_of_a_median_is_that_of_the_sign_test(count: int, lowest: int) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert median_interval(values) == (lowest, count + 1 - lowest)


@pytest.mark.parametrize("count", range(1, FEWEST))
def test_few_values_say_nothing(count: int) -> None:
    assert median_interval(np.ones(count)) == (0.0, math.inf)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    intervals = [median_interval(random.lognormal(size=25)) for _ in range(2000)]
    held = np.mean([low <= 1 <= high for low, high in intervals])  # a lognormal's median is 1
    assert 0.95 <= held <= 0.975  # 25 values: 0.957 is the least that whole ranks allow


def test_a_slow_moment_that_hits_both_does_not_count() -> None:
    machine = np.array([1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 3.0, 1.0])
    timing = make_timing(0.002 * machine, 0.001 * machine)
    assert (timing.ratio, timing.low, timing.high, timing.runs) == (0.5, 0.5, 0.5, 8)
    assert timing.seconds == (0.002, 0.001)


def test_outliers_do_not_move_the_ratio() -> None:
    first, second = np.full(30, 0.002), np.full(30, 0.001)
    second[[3, 9]] *= 100
    assert make_timing(first, second).ratio == 0.5
    assert make_timing(first, second).high == 0.5


def test_the_ratio_is_of_the_second_to_the_first() -> None:
    assert make_timing(np.full(9, 2.0), np.full(9, 3.0)).ratio == 1.5


def test_neighbouring_rounds_count_as_one_where_there_are_many() -> None:
    """64 stretches of 100 rounds each: as sure as 64 rounds are, not as 6,400."""
    stretches = np.random.default_rng(0).normal(1, 0.05, 64)
    timing = make_timing(np.ones(6400), np.repeat(stretches, 100))
    assert (timing.low, timing.high) == median_interval(stretches)
    assert timing.runs == 6400


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.5, 0.6, "faster"),
        (0.5, 0.99, "no difference"),  # two sessions of one model differ by as much
        (0.9, 1.1, "no difference"),
        (1.01, 2.0, "no difference"),
        (1.03, 2.0, "slower"),
        (0.0, math.inf, "no difference"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert Timing((1.0, 1.0), 1.0, low, high, 9, 0.0).verdict == verdict


def test_drift_is_what_both_have_in_common() -> None:
    machine = np.array([1.0] * 6 + [1.5] * 6)
    assert drift([machine, 2 * machine]) == pytest.approx(0.5)
    assert drift([machine, 1 / machine]) == pytest.approx(0.0)
    assert drift([np.ones(2), np.ones(2)]) == 0.0

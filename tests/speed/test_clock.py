"""Timing in turns, and what is concluded from it."""

from __future__ import annotations

import time

import numpy as np

from onnxshrink.speed.clock import race, ratio


def test_functions_run_in_turns_in_alternating_order() -> None:
    order: list[int] = []
    times = race([lambda: order.append(0), lambda: order.append(1)], budget=1e-3, least=3, most=3)
    assert order == [0, 1, 0, 1, *[0, 1], *[1, 0], *[0, 1]]
    assert times.shape == (3, 2)


def test_a_race_ends_when_the_time_is_up() -> None:
    assert len(race([lambda: time.sleep(0.002)], budget=0.01, least=2, most=100)) < 10
    assert len(race([lambda: None], budget=10.0, most=7)) == 7


def test_a_ratio_is_paired_by_round() -> None:
    """A machine that slows down tenfold on the way does not blur a ratio of one half."""
    drift = np.linspace(1, 10, 41)
    found = ratio(0.5 * drift, drift)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_interval_tells_what_noise_hides() -> None:
    noise = np.random.default_rng(1).normal(1, 0.1, 60)
    same = ratio(noise, np.random.default_rng(2).normal(1, 0.1, 60))
    assert same.low < 1 < same.high
    slower = ratio(1.3 * noise, np.ones(60))
    assert 1.2 < slower.low < 1.3 < slower.high < 1.4

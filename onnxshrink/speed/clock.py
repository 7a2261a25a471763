"""Timing in turns, so that a slow moment of the machine hits all that is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from onnxshrink.weights import Array


def best_seconds(models: Sequence[onnx.ModelProto], rounds: int) -> list[float]:
    """The shortest run of each of some models with one float input of fixed shape."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    best = [float("inf")] * len(models)
    runs = []
    for model in models:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        feed = {given.name: np.random.default_rng(0).standard_normal(given.shape).astype(np.float32)}
        session.run(None, feed)
        runs.append((session, feed))
    for _ in range(rounds):
        for index, (session, feed) in enumerate(runs):
            start = time.perf_counter()
            session.run(None, feed)
            best[index] = min(best[index], time.perf_counter() - start)
    return best


_PATIENCE = 5


@dataclass(frozen=True)
class Ratio:
    """How long one takes by how long another takes: the median over rounds, and a 95 % interval of it."""

    value: float
    low: float
    high: float


def race(runs: Sequence[Callable[[], object]], budget: float, least: int = 5, most: int = 60) -> Array:
    """Run some functions in turns, in alternating order, until the time is up.

    Args:
        runs: what is timed; each is called twice beforehand.
        budget: seconds; `least` rounds are run all the same, unless that takes five times as long.
        least, most: bounds on the number of rounds.

    Returns:
        Seconds, one row per round, one column per function.
    """
    order = list(range(len(runs)))
    for _ in range(2):
        for run in runs:
            run()
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < most:
        row = [0.0] * len(runs)
        for index in order:
            begin = time.perf_counter()
            runs[index]()
            row[index] = time.perf_counter() - begin
        rounds.append(row)
        order.reverse()
        elapsed = time.perf_counter() - start
        if elapsed > budget and (len(rounds) >= least or elapsed > _PATIENCE * budget):
            break
    return np.array(rounds)


def ratio(over: Array, under: Array) -> Ratio:
    """The ratio of two columns of one race: each round gives one, and the median's interval comes from resampling."""
    paired = over / under
    random = np.random.default_rng(0)
    medians = np.median(random.choice(paired, (1000, paired.size)), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Ratio(float(np.median(paired)), float(low), float(high))

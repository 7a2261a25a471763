"""Timing some functions in turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import numpy as np

from onnxshrink.bench.statistics import FEWEST
from onnxshrink.weights import Array

Run = Callable[[], object]

_TURN = 0.01  # seconds that one function is run for before it is another's turn, at least one run
_MOST = 100  # runs in a turn
# What ran in between has taken the processor's caches. To fill them again takes milliseconds: a run that is not counted
# does it, unless it is so long that this does not show.
_LONG = 0.2
_OVERTIME = 3  # times the seconds asked for that the fewest rounds may take


def in_turns(runs: Sequence[Run], seconds: float, rounds: int | None = None) -> list[Array]:
    """Seconds of each function, one value per round: the median of its turn.

    Rounds run forwards and backwards (A B, B A, A B, ...), so that a steady drift cancels. Each function is run three
    times beforehand.

    Args:
        runs: what is timed.
        seconds: how long; at least `FEWEST` rounds are run unless they take three times as long.
        rounds: exactly so many instead, however long they take.
    """
    lengths = [_warm(run) for run in runs]
    order = list(range(len(runs)))
    samples: list[list[float]] = [[] for _ in runs]
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while not _is_over(done, time.perf_counter() - start, seconds, rounds):
            for index in order:
                samples[index].append(_turn(runs[index], lengths[index]))
            order.reverse()
            done += 1
    finally:
        if collecting:
            gc.enable()
    return [np.array(taken) for taken in samples]


def _is_over(done: int, elapsed: float, seconds: float, rounds: int | None) -> bool:
    if rounds is not None:
        return done >= rounds
    return elapsed >= seconds * (1 if done >= FEWEST else _OVERTIME) and done > 0


def _clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _warm(run: Run) -> float:
    """The first runs, which reserve memory and are not counted; how long a run takes."""
    run()
    return min(_clock(run) for _ in range(2))


def _turn(run: Run, length: float) -> float:
    if length < _LONG:
        run()
    count = min(max(round(_TURN / max(length, 1e-9)), 1), _MOST)
    return float(np.median([_clock(run) for _ in range(count)]))

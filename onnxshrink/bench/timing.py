"""Latencies of models, measured in turns in a process of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxshrink.bench.statistics import Timing, make_timing
from onnxshrink.bench.tasks import Tasks
from onnxshrink.graph import ModelLike
from onnxshrink.weights import Array


def compare(
    first: ModelLike,
    second: ModelLike,
    *,
    threads: int = 1,
    inputs: Mapping[str, Array] | None = None,
    seconds: float = 10.0,
    seed: int = 0,
) -> Timing:
    """How the latency of `second` compares with that of `first`; see `measure` and `Timing`."""
    return make_timing(*measure([first, second], threads=threads, inputs=inputs, seconds=seconds, seed=seed))


def measure(
    models: Sequence[ModelLike],
    *,
    threads: int = 1,
    inputs: Mapping[str, Array] | None = None,
    seconds: float = 10.0,
    rounds: int | None = None,
    seed: int = 0,
) -> list[Array]:
    """Latencies of some models in onnxruntime, in turns.

    A process of its own runs them, so that nothing which the caller holds or has set counts. Numbers too small for full
    precision (denormals), on which some processors are up to a hundred times slower, are taken for zero: whether a
    model has such is a matter of its weights and inputs, not of its widths.

    Args:
        models: paths or `ModelProto`s with the same inputs; all of them are in memory at once.
        threads: how many threads one operator may use.
        inputs: arrays by name; missing ones are drawn as for `verify`, so that the first model accepts them.
        seconds: how long to measure, once the models are loaded; at least 6 rounds are run unless they take three
            times as long.
        rounds: exactly so many rounds instead.
        seed: of the random inputs.

    Returns:
        Per model, seconds: one value per round, the median of the runs of its turn.

    Raises InputError when a model or an input cannot be used.
    """
    with Tasks(models, inputs or {}, threads, seed) as tasks:
        return tasks.time(seconds, rounds)

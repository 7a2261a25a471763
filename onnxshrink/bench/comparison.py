"""Everything that is measured of two models, in one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnxshrink.bench.denormals import Denormals
from onnxshrink.bench.memory import Memory
from onnxshrink.bench.operators import NodeChange, OperatorTime, by_node, by_operator
from onnxshrink.bench.statistics import Timing, make_timing
from onnxshrink.bench.tasks import Tasks
from onnxshrink.graph import ModelLike
from onnxshrink.weights import Array

_PROFILED = 0.2  # part of the seconds that is spent on the profile besides


@dataclass(frozen=True)
class Comparison:
    """How two models compare in onnxruntime.

    Attributes:
        models: the files; "a model in memory" for others.
        threads: how many threads one operator may use.
        inputs: type and shape of each input.
        timing: latencies.
        memory: of each model; None where the system does not tell.
        denormals: of each model. The latencies are those with such numbers taken for zero.
        operators: seconds by operator, as the runtime's profiler sees them, what takes longest first.
        nodes: seconds by node, what changed most first.
    """

    models: tuple[str, str]
    threads: int
    inputs: Mapping[str, str]
    timing: Timing
    memory: tuple[Memory | None, Memory | None]
    denormals: tuple[Denormals, Denormals]
    operators: tuple[OperatorTime, ...]
    nodes: tuple[NodeChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as dictionaries, lists, text and numbers; an interval without an end has none."""
        found = asdict(self)
        found["timing"]["verdict"] = self.timing.verdict
        if math.isinf(self.timing.high):
            found["timing"]["high"] = None
        return found

    def to_json(self) -> str:
        """The figures as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def compare_all(
    first: ModelLike,
    second: ModelLike,
    *,
    threads: int = 1,
    inputs: Mapping[str, Array] | None = None,
    seconds: float = 10.0,
    rounds: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Latency, memory, time by operator and denormal numbers of two models.

    Each is measured in a process of its own; the arguments are those of `measure`. `progress` is called with the name
    of each step as it begins.

    Raises InputError when a model or an input cannot be used.
    """
    step = progress or (lambda name: None)
    with Tasks([first, second], inputs or {}, threads, seed) as tasks:
        step("timing")
        timing = make_timing(*tasks.time(seconds, rounds))
        step("profiling")
        profiles = tasks.profile(_PROFILED * seconds, rounds)
        step("measuring memory")
        seen = tasks.inspect(0), tasks.inspect(1)
        found = tasks.inputs()
    return Comparison(
        models=(_name(first), _name(second)),
        threads=threads,
        inputs=found,
        timing=timing,
        memory=(seen[0][0], seen[1][0]),
        denormals=(seen[0][1], seen[1][1]),
        operators=by_operator(*profiles),
        nodes=by_node(*profiles),
    )


def _name(model: ModelLike) -> str:
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else "a model in memory"

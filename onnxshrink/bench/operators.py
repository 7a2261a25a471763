"""Where the time goes: onnxruntime's profile of a session, by node and by operator."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import onnx

from onnxshrink.bench.names import Kernel, Origin, find_origins

_SUFFIX = "_kernel_time"
OVERHEAD = "(between operators)"


@dataclass(frozen=True)
class NodeTime:
    """Time of a node: its name and operator, the operators that the runtime runs for it, seconds (a median over runs).

    What the runtime adds has the name and operator that it has there.
    """

    name: str
    op: str
    kernels: str
    seconds: float


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator in two models: how many, and their seconds together."""

    op: str
    nodes: tuple[int, int]
    seconds: tuple[float, float]


@dataclass(frozen=True)
class NodeChange:
    """A node in two models: what the runtime runs for it, and seconds; None in the one where no node has its name."""

    name: str
    op: str
    kernels: tuple[str | None, str | None]
    seconds: tuple[float | None, float | None]

    @property
    def change(self) -> float:
        """Seconds that the second model takes longer."""
        first, second = self.seconds
        return (second or 0.0) - (first or 0.0)


def read_profile(path: Path, graph: onnx.GraphProto, skip: int) -> list[NodeTime]:
    """Medians per node of `graph` over the runs of a profile that onnxruntime wrote, without the first `skip` runs.

    What a node's subgraphs do counts for their nodes, not for it. The last entry is what is left of a run besides.
    """
    events = [event for event in json.loads(path.read_text()) if event.get("ph") == "X"]
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")
    own = _own_times(event for event in events if event["cat"] == "Node" and event["name"].endswith(_SUFFIX))
    left = Counter({run: dur for run, (_, dur) in enumerate(runs)})
    taken: defaultdict[Kernel, Counter[int]] = defaultdict(Counter)
    for kernel, start, duration in own:
        run = bisect_right(runs, (start, float("inf"))) - 1
        taken[kernel][run] += duration
        left[run] -= duration
    counted = range(min(skip, len(runs) - 1), len(runs))
    times = _by_origin(taken, find_origins(graph, taken))
    return [NodeTime(*key, _seconds(times[key], counted)) for key in times] + [
        NodeTime(OVERHEAD, "", "", _seconds(left, counted))
    ]


def _seconds(microseconds: Mapping[int, int], runs: Iterable[int]) -> float:
    return max(0.0, median([microseconds[run] for run in runs] or [0.0])) * 1e-6


def _by_origin(
    taken: Mapping[Kernel, Counter[int]], origins: Mapping[Kernel, Origin]
) -> dict[tuple[str, str, str], Counter[int]]:
    """Times by name, operator and kernels of the nodes that these stand for."""
    kernels: dict[Origin, list[Kernel]] = {}
    for kernel in taken:
        kernels.setdefault(origins.get(kernel, Origin(kernel.name, kernel.op)), []).append(kernel)
    return {
        (origin.name, origin.op, " + ".join(kernel.op for kernel in some)): sum((taken[k] for k in some), Counter())
        for origin, some in kernels.items()
    }


def _own_times(events: Iterable[dict[str, Any]]) -> list[tuple[Kernel, int, int]]:
    """Per event its kernel, its start, and its duration less that of the events within it; in order, microseconds."""
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    ends = [event["ts"] + event["dur"] for event in ordered]
    own = [event["dur"] for event in ordered]
    around: list[int] = []
    for index, event in enumerate(ordered):
        while around and ends[around[-1]] < ends[index]:
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        around.append(index)
    names = _names(ordered)
    return [
        (Kernel(name, event["args"]["op_name"]), event["ts"], duration)
        for name, event, duration in zip(names, ordered, own, strict=True)
    ]


def _names(events: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the events' nodes. Those without one are counted: their index in the session tells nothing."""
    found = []
    numbers: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for event in events:
        name, op, index = event["name"].removesuffix(_SUFFIX), event["args"]["op_name"], event["args"]["node_index"]
        if name == f"{op}_{index}":
            name = f"{op} number {numbers[op].setdefault(index, len(numbers[op]) + 1)}"
        found.append(name)
    return found


def by_operator(first: Sequence[NodeTime], second: Sequence[NodeTime]) -> tuple[OperatorTime, ...]:
    """Sums over the nodes of each operator, what takes longest first."""
    counts = [Counter[str](), Counter[str]()]
    seconds: list[defaultdict[str, float]] = [defaultdict(float), defaultdict(float)]
    for side, nodes in enumerate((first, second)):
        for node in nodes:
            op = node.op or node.name
            seconds[side][op] += node.seconds
            counts[side][op] += bool(node.op)
    ops = dict.fromkeys(chain(*seconds))
    found = [
        OperatorTime(op, (counts[0][op], counts[1][op]), (seconds[0].get(op, 0.0), seconds[1].get(op, 0.0)))
        for op in ops
    ]
    return tuple(sorted(found, key=lambda operator: -max(operator.seconds)))


def by_node(first: Sequence[NodeTime], second: Sequence[NodeTime]) -> tuple[NodeChange, ...]:
    """Nodes of two models by name, what changed most first."""
    sides = [{node.name: node for node in nodes if node.op} for nodes in (first, second)]
    found = []
    for name in dict.fromkeys(chain(*sides)):
        pair = sides[0].get(name), sides[1].get(name)
        op = next(node.op for node in pair if node is not None)
        kernels, seconds = zip(*((node.kernels, node.seconds) if node else (None, None) for node in pair), strict=True)
        found.append(NodeChange(name, op, kernels, seconds))
    return tuple(sorted(found, key=lambda node: -abs(node.change)))

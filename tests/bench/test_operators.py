"""Profiles: each node's own time, per run, in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import build, draw

from onnxshrink.bench.operators import OVERHEAD, NodeTime, by_node, by_operator, read_profile

GRAPH = build(
    "g (float[1, 4] x) => (float[1, 4] y) { [first] a = MatMul(x, w) [second] y = Relu(a) }", w=draw(4, 4)
).graph


def event(name: str, start: int, duration: int, op: str = "", index: int = 0) -> dict[str, Any]:
    node = bool(op)
    return {
        "ph": "X",
        "cat": "Node" if node else "Session",
        "name": f"{name}_kernel_time" if node else name,
        "ts": start,
        "dur": duration,
        "args": {"op_name": op, "node_index": str(index)} if node else {},
    }


def profile(folder: Path, *events: dict[str, Any]) -> Path:
    path = folder / "profile.json"
    path.write_text(json.dumps([{"ph": "M", "name": "thread_name", "cat": "Session"}, *events]))
    return path


def run(start: int, first: int, second: int) -> list[dict[str, Any]]:
    """A run of 100 microseconds, with two nodes."""
    return [
        event("first", start + 1, first, "MatMul", 0),
        event("second", start + 50, second, "Relu", 1),
        event("model_run", start, 100),
    ]


def test_medians_over_the_runs_that_count(tmp_path: Path) -> None:
    events = [*run(0, 40, 30), *run(1000, 10, 5), *run(2000, 20, 5), *run(3000, 12, 7)]
    found = read_profile(profile(tmp_path, *events), GRAPH, skip=1)
    assert found == [
        NodeTime("first", "MatMul", "MatMul", pytest.approx(12e-6)),
        NodeTime("second", "Relu", "Relu", pytest.approx(5e-6)),
        NodeTime(OVERHEAD, "", "", pytest.approx(81e-6)),  # 85, 75, 81
    ]


def test_what_a_subgraph_does_is_not_its_nodes_own(tmp_path: Path) -> None:
    events = [
        event("model_run", 0, 100),
        event("branch", 10, 50, "If", 0),
        event("inner", 20, 15, "MatMul", 0),
        event("loop", 40, 10, "Loop", 1),
        event("inmost", 42, 5, "Relu", 0),
        event("after", 60, 20, "Relu", 1),  # begins where the If ends
    ]
    found = {node.name: node.seconds for node in read_profile(profile(tmp_path, *events), GRAPH, skip=0)}
    expected = {"branch": 25e-6, "inner": 15e-6, "loop": 5e-6, "inmost": 5e-6, "after": 20e-6, OVERHEAD: 30e-6}
    assert found == pytest.approx(expected)


def test_a_node_that_runs_twice_counts_twice(tmp_path: Path) -> None:
    events = [event("model_run", 0, 100), event("body", 10, 5, "Relu", 3), event("body", 20, 7, "Relu", 3)]
    assert read_profile(profile(tmp_path, *events), GRAPH, skip=0)[0].seconds == pytest.approx(12e-6)


def test_nodes_without_a_name_are_counted(tmp_path: Path) -> None:
    events = [
        event("model_run", 0, 100),
        event("Relu_31", 10, 5, "Relu", 31),
        event("Relu_7", 20, 6, "Relu", 7),
        event("Relu_31", 30, 5, "Relu", 31),
    ]
    found = {node.name: node.seconds for node in read_profile(profile(tmp_path, *events), GRAPH, skip=0)}
    assert found == pytest.approx({"Relu number 1": 10e-6, "Relu number 2": 6e-6, OVERHEAD: 84e-6})


FIRST = [NodeTime("a", "Conv", "Conv", 4.0), NodeTime("b", "Conv", "FusedConv", 1.0), NodeTime(OVERHEAD, "", "", 0.5)]
SECOND = [NodeTime("a", "Conv", "FusedConv", 1.0), NodeTime("c", "Relu", "Relu", 2.0), NodeTime(OVERHEAD, "", "", 0.7)]


def test_sums_by_operator() -> None:
    found = [(operator.op, operator.nodes, operator.seconds) for operator in by_operator(FIRST, SECOND)]
    assert found == [("Conv", (2, 1), (5.0, 1.0)), ("Relu", (0, 1), (0.0, 2.0)), (OVERHEAD, (0, 0), (0.5, 0.7))]


def test_nodes_that_changed_most_come_first() -> None:
    found = [(node.name, node.kernels, node.seconds, node.change) for node in by_node(FIRST, SECOND)]
    assert found == [
        ("a", ("Conv", "FusedConv"), (4.0, 1.0), -3.0),
        ("c", (None, "Relu"), (None, 2.0), 2.0),
        ("b", ("FusedConv", None), (1.0, None), -1.0),
    ]

"""Everything of two models, measured once; which figure belongs to which model."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from models import build, draw

from onnxshrink.bench import Comparison, compare_all


def network(width: int) -> onnx.ModelProto:
    text = """g (float[N, 64] x) => (float[N, 2] y) {
        [first] a = MatMul(x, w)
        [act] b = Sigmoid(a)
        [second] y = MatMul(b, v)
    }"""
    return build(text, w=draw(64, width), v=draw(width, 2))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A wide network, with denormal numbers, in a file; and a narrow one."""
    path = tmp_path_factory.mktemp("models") / "wide.onnx"
    wide = network(1 << 16)  # 17 MB of weights
    weights = onnx.numpy_helper.to_array(wide.graph.initializer[1]).copy()
    weights[:3] = 1e-40
    wide.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weights, "v"))
    onnx.save(wide, path)
    steps: list[str] = []
    compared = compare_all(
        path, network(8), inputs={"x": draw(3, 64)}, rounds=2, threads=2, seconds=1.0, progress=steps.append
    )
    assert steps == ["timing", "profiling", "measuring memory"]
    return compared


def test_what_was_compared(found: Comparison) -> None:
    assert Path(found.models[0]).name == "wide.onnx"
    assert found.models[1] == "a model in memory"
    assert found.inputs == {"x": "float32[3, 64]"}
    assert (found.threads, found.timing.runs) == (2, 2)


def test_memory_belongs_to_its_model(found: Comparison) -> None:
    wide, narrow = found.memory
    if wide is None or narrow is None:
        pytest.skip("this system does not tell")
    assert wide.loading - narrow.loading > 16 << 20
    assert wide.running - narrow.running > 16 << 20
    assert narrow.loading < 16 << 20  # the runtime itself is larger


def test_denormals_belong_to_their_model(found: Comparison) -> None:
    assert [denormals.weights for denormals in found.denormals] == [6, 0]
    assert [denormals.looked_at for denormals in found.denormals] == [3, 3]


def test_nodes_of_both_are_found_by_name(found: Comparison) -> None:
    assert {node.name: node.kernels for node in found.nodes} == {
        "first": ("MatMul", "MatMul"),
        "act": ("Sigmoid", "Sigmoid"),
        "second": ("MatMul", "MatMul"),
    }
    assert {operator.op: operator.nodes for operator in found.operators} == {
        "MatMul": (2, 2),
        "Sigmoid": (1, 1),
        "(between operators)": (0, 0),
    }
    assert all(seconds is not None and seconds >= 0 for node in found.nodes for seconds in node.seconds)


def test_all_of_it_is_json(found: Comparison) -> None:
    data = json.loads(found.to_json())
    assert data["timing"]["seconds"] == list(found.timing.seconds)
    assert data["timing"]["verdict"] == "no difference"  # two rounds say nothing
    assert data["timing"]["high"] is None  # JSON has no infinity
    assert data["denormals"][0] == {"weights": 6, "activations": found.denormals[0].activations, "looked_at": 3}
    assert [node["name"] for node in data["nodes"]] == [node.name for node in found.nodes]

"""Constants traced back to the weights that they are made of."""

from __future__ import annotations

import numpy as np
import onnx
from models import build, draw

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph
from onnxshrink.origins import Origins


def origins_of(body: str, **weights: np.ndarray) -> Origins:
    return Origins(analyse(Graph(build(f"g (float[2, 6] x) => (float[N, M] y) {{ {body} }}", **weights))))


def whole(mask: np.ndarray, shape: tuple[int, ...]) -> list:
    return np.broadcast_to(mask, shape).astype(int).tolist()


def test_a_stored_weight_is_its_own_origin() -> None:
    origins = origins_of("y = MatMul(x, w)", w=draw(6, 4))
    mask = np.array([[True, False, True, True]])
    assert origins.weights("w") == {"w"}
    assert origins.trace("w", mask)["w"] is mask


def test_transposed_and_reshaped() -> None:
    body = "r = Reshape(w, s) t = Transpose(r) y = MatMul(x, t)"
    origins = origins_of(body, w=draw(2, 2, 6), s=np.array([4, 6], np.int64))
    assert origins.weights("t") == {"w"}
    found = origins.trace("t", np.array([[False, True, False, False]]))
    assert whole(found["w"], (2, 2, 6)) == [[[0] * 6, [1] * 6], [[0] * 6, [0] * 6]]


def test_gates_that_are_cut_and_joined_in_another_order() -> None:
    body = """a = Slice(w, n0, n2, n0) b = Slice(w, n2, n4, n0) j = Concat <axis = 0> (b, a) t = Transpose(j)
        y = MatMul(x, t)"""
    numbers = {f"n{i}": np.array([i], np.int64) for i in (0, 2, 4)}
    origins = origins_of(body, w=draw(4, 6), **numbers)
    found = origins.trace("t", np.array([[True, False, False, True]]))  # rows 2, 3, 0, 1 of w
    assert set(found) == {"w"}
    assert whole(found["w"], (4, 6)) == [[0] * 6, [1] * 6, [1] * 6, [0] * 6]


def test_a_norm_over_rows_reads_all_of_them() -> None:
    body = "s = ReduceL2 <keepdims = 1, axes = [1]> (v) d = Div(v, s) w = Mul(d, g) t = Transpose(w) y = MatMul(x, t)"
    origins = origins_of(body, v=draw(4, 6), g=draw(4, 1))
    found = origins.trace("t", np.array([[False, True, False, False]]))
    assert set(found) == {"v", "g"}
    assert whole(found["g"], (4, 1)) == [[0], [1], [0], [0]]
    assert whole(found["v"], (4, 6)) == [[0] * 6, [1] * 6, [0] * 6, [0] * 6]
    columns = origins.trace("t", np.arange(6)[:, None] == 2)
    assert whole(columns["v"], (4, 6)) == [[1] * 6] * 4  # every column counts for the norm


def test_what_an_unknown_operator_computes_is_no_constant() -> None:
    model = build("g (float[2, 6] x) => (float[N, M] y) { d = Det(w) y = Mul(x, d) }", w=draw(4, 4))
    model.graph.node[0].CopyFrom(onnx.helper.make_node("Unknown", ["w"], ["d"], domain="com.acme"))
    model.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    analysis = analyse(Graph(model))
    assert "d" not in analysis.constants
    assert Origins(analysis).weights("w") == {"w"}

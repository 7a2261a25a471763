"""Sizes of models, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, draw

from onnxshrink import demo, measure
from onnxshrink.graph import Graph


def multiply_adds(text: str, **weights: Any) -> tuple[int, bool]:
    return measure.multiply_adds(Graph(build(text, **weights)))


@pytest.mark.parametrize(
    ("text", "weights", "expected"),
    [
        ("g (float[2, 5] x) => (float[2, 7] y) { y = MatMul(x, w) }", {"w": (5, 7)}, 2 * 5 * 7),
        ("g (float[3, 2, 5] x) => (float[3, 2, 7] y) { y = MatMul(x, w) }", {"w": (5, 7)}, 3 * 2 * 5 * 7),
        ("g (float[2, 5] x) => (float[2, 7] y) { y = Gemm<transB = 1>(x, w, b) }", {"w": (7, 5), "b": (7,)}, 70),
        ("g (float[5, 2] x) => (float[2, 7] y) { y = Gemm<transA = 1>(x, w) }", {"w": (5, 7)}, 70),
        # 8x8 outputs of 6 channels, each from 4 channels of 3x3
        ("g (float[1, 4, 10, 10] x) => (float[1, 6, 8, 8] y) { y = Conv(x, w) }", {"w": (6, 4, 3, 3)}, 64 * 6 * 36),
        # in two groups: each from 2 channels
        (
            "g (float[1, 4, 10, 10] x) => (float[1, 6, 8, 8] y) { y = Conv<group = 2>(x, w) }",
            {"w": (6, 2, 3, 3)},
            64 * 6 * 18,
        ),
        # every one of the 4x5x5 inputs meets 6 channels of 2x2
        (
            "g (float[1, 4, 5, 5] x) => (float[1, 6, 10, 10] y) { y = ConvTranspose<strides = [2, 2]>(x, w) }",
            {"w": (4, 6, 2, 2)},
            100 * 24,
        ),
        # 3 steps of 2 sentences: 4 gates of 8 units from 5 inputs and 8 states
        (
            "g (float[3, 2, 5] x) => (float[3, 1, 2, 8] y) { y = LSTM<hidden_size = 8>(x, w, r) }",
            {"w": (1, 32, 5), "r": (1, 32, 8)},
            6 * 32 * 13,
        ),
        ("g (float[2, 5] x) => (float[2, 5] y) { h = Add(x, b) y = Relu(h) }", {"b": (5,)}, 0),
    ],
)
def test_multiply_adds(text: str, weights: dict[str, tuple[int, ...]], expected: int) -> None:
    assert multiply_adds(text, **{name: draw(*shape) for name, shape in weights.items()}) == (expected, True)


def test_free_dimensions_count_as_one() -> None:
    text = "g (float[N, 5] x) => (float[N, 7] y) { y = MatMul(x, w) }"
    assert multiply_adds(text, w=draw(5, 7)) == (35, False)


def test_a_product_of_two_activations() -> None:
    text = "g (float[4, 6, 5] a, float[4, 5, 7] b) => (float[4, 6, 7] y) { y = MatMul(a, b) }"
    assert multiply_adds(text) == (4 * 6 * 5 * 7, True)


def test_an_unknown_rank_is_said() -> None:
    text = "g (float[2, 3] x, int64[n] s) => (float y) { h = Reshape(x, s) y = MatMul(h, h) }"
    assert not multiply_adds(text)[1]


INNER = """g (bool c, float[2, 5] x) => (float[2, 5] y) {
    two = Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0]>()
    shape = Constant<value_ints = [2, 5]>()
    z = Add(x, two)
    v = Mul(z, w)
    y = Reshape(v, shape)
}"""


def test_parameters_are_floating_point_initializers_and_constants() -> None:
    proto = build(INNER, w=draw(5), axes=np.arange(9))
    assert measure.parameters(proto) == 5 + 5
    assert measure.weights(proto) == measure.Weights(10, 40)
    assert measure.count_nodes(proto.graph) == 3


def test_bodies_count() -> None:
    body = onnx.parser.parse_graph("b () => (float[2, 5] z) { k = Constant<value_float = 2.0>() z = Mul(x, k) }")
    body.initializer.append(onnx.numpy_helper.from_array(draw(4), "inside"))
    proto = build("g (bool c, float[2, 5] x) => (float[2, 5] y) { y = Identity(x) }")
    proto.graph.node[0].CopyFrom(onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
    assert measure.parameters(proto) == 2 * (1 + 4)
    assert measure.count_nodes(proto.graph) == 1 + 2


@pytest.mark.parametrize(
    ("dtype", "parameters", "nbytes"), [(np.float16, 6, 12), (np.float64, 6, 48), (np.int8, 0, 6), (np.int64, 0, 0)]
)
def test_element_types(dtype: Any, parameters: int, nbytes: int) -> None:
    proto = build("g (float[2] x) => (float[2] y) { y = Relu(x) }", w=np.ones((2, 3), dtype))
    assert measure.weights(proto) == measure.Weights(parameters, nbytes)


def test_sparse_weights_count_what_is_stored() -> None:
    proto = build("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    values = onnx.numpy_helper.from_array(draw(3), "w")
    indices = onnx.numpy_helper.from_array(np.array([0, 4, 9]), "w_indices")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [10]))
    assert measure.parameters(proto) == 3


def test_the_demo_counts_the_same_way() -> None:
    assert demo.run().before.parameters == measure.parameters(onnx.load(demo.model_path()))

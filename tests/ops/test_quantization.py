"""Quantised operators: the zero point counts as zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, parameters, run, shapes, shrunk, weight

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph

Array = np.ndarray[Any, Any]


def integers(*shape: int, low: int = 4, high: int = 100, dtype: Any = np.uint8) -> Array:
    """Random integers without a zero or a 3."""
    return np.random.default_rng(shape).integers(low, high, shape).astype(dtype)


def scalar(value: float, dtype: Any = np.float32) -> Array:
    return np.array(value, dtype)


X = draw(1, 3, 6, 6)


def test_dead_channels_pass_a_pair_of_quantisers() -> None:
    model = build(
        """g (float[N, 3] x) => (float[N, 2] y) {
            a = MatMul(x, w) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, v) }""",
        w=dead(draw(3, 5), 1, 3, axis=1), s=scalar(0.02), z=scalar(117, np.uint8), v=draw(5, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 3), "s": (), "z": (), "v": (3, 2)}
    check_same(model, small, x=draw(4, 3))


def test_scales_per_channel_are_sliced() -> None:
    model = build(
        """g (float[N, 3] x) => (float[N, 2] y) {
            a = MatMul(x, w) q = QuantizeLinear<axis = 1>(a, s, z) d = DequantizeLinear<axis = -1>(q, s, z)
            y = MatMul(d, v) }""",
        w=dead(draw(3, 5), 1, 3, axis=1), s=np.linspace(0.01, 0.05, 5, dtype=np.float32),
        z=np.arange(5, dtype=np.int8), v=draw(5, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 3), "s": (3,), "z": (3,), "v": (3, 2)}
    assert weight(small, "z").tolist() == [0, 2, 4]
    check_same(model, small, x=draw(4, 3))


def test_a_constant_channel_is_folded_as_it_is_rounded() -> None:
    """0.537 at a scale of 0.1 is 0.5 by the time it is used."""
    model = build(
        """g (float[N, 3] x) => (float[N, 2] y) {
            a = Gemm(x, w, b) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) y = Gemm(d, v, c) }""",
        w=dead(draw(3, 4), 1, axis=1), b=np.array([0, 0.537, 0, 0], np.float32), s=scalar(0.1),
        z=scalar(128, np.uint8), v=draw(4, 2), c=draw(2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 3)
    np.testing.assert_allclose(weight(small, "c"), draw(2) + 0.5 * draw(4, 2)[1], rtol=1e-6)
    check_same(model, small, x=draw(4, 3))


def test_a_network_between_quantisers() -> None:
    """Weights stored as integers: two dead filters leave, with their scales, biases, and the kernels that read them."""
    body = """
        qx = QuantizeLinear(x, sx, zx) dx = DequantizeLinear(qx, sx, zx)
        w = DequantizeLinear<axis = 0>(qw, sw, zw) b = DequantizeLinear<axis = 0>(qb, sb)
        a = Conv<pads = [1, 1, 1, 1]>(dx, w, b) r = Relu(a)
        qr = QuantizeLinear(r, sx, zx) dr = DequantizeLinear(qr, sx, zx)
        v = DequantizeLinear(qv, sx) y = Conv(dr, v)"""
    filters, biases = integers(5, 3, 3, 3, dtype=np.int8), integers(5, dtype=np.int32)
    filters[[0, 3]] = 0
    biases[[0, 3]] = 0
    model = build(
        f"g (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {{ {body} }}",
        sx=scalar(0.04), zx=scalar(120, np.uint8), qw=filters, sw=np.linspace(0.001, 0.002, 5, dtype=np.float32),
        zw=np.zeros(5, np.int8), qb=biases, sb=np.full(5, 0.001, np.float32), qv=integers(2, 5, 1, 1),
    )  # fmt: skip
    small = shrunk(model)
    found = shapes(small)
    assert found["qw"] == (3, 3, 3, 3)
    assert found["qb"] == found["sw"] == found["zw"] == found["sb"] == (3,)
    assert found["qv"] == (2, 3, 1, 1)
    check_same(model, small, x=X)


def test_blocks_are_refused() -> None:
    model = build(
        "g (float[4, 6] x) => (uint8[4, 6] y) { y = QuantizeLinear<axis = 1, block_size = 3>(x, s) }",
        opset=21, ir=10, s=draw(4, 2) ** 2,
    )  # fmt: skip
    assert [r.reason for r in analyse(Graph(model)).refusals] == [
        "blocked quantisation: a block of elements shares one scale"
    ]


# --- dynamic quantisation ---------------------------------------------------------------------------------------


def dynamic(w: Array, bias: Array, weights: Array) -> onnx.ModelProto:
    return build(
        """g (float[4, 3] x) => (float[4, 2] y) {
            a = MatMul(x, w) p = Add(a, bias) q, s, z = DynamicQuantizeLinear(p)
            m = MatMulInteger(q, v, z, zv) f = Cast<to = 1>(m) y = Mul(f, s) }""",
        w=w, bias=bias, v=weights, zv=scalar(3, np.uint8),
    )  # fmt: skip


def test_a_zero_does_not_set_the_scale() -> None:
    """Channels 0 and 2 are zero; only the rows of 0 and 1 are at their zero point. Channel 1 still sets the scale."""
    v = integers(5, 2)
    v[[0, 1]] = 3
    model = dynamic(dead(draw(3, 5), 0, 2, axis=1), dead(draw(5), 0, 2), v)
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 4)
    assert shapes(small)["v"] == (4, 2)
    check_same(model, small, x=draw(4, 3))


def test_another_constant_may_set_the_scale() -> None:
    v = integers(5, 2)
    v[0] = 3
    bias = draw(5)
    bias[0] = 9
    model = dynamic(dead(draw(3, 5), 0, axis=1), bias, v)
    small = shrunk(model)
    assert shapes(small)["v"] == (5, 2)
    check_same(model, small, x=draw(4, 3))


# --- products of integers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [scalar(3, np.uint8), np.full(4, 3, np.uint8)])
def test_rows_and_columns_at_the_zero_point_leave(zero: Array) -> None:
    v = integers(5, 4)
    v[[1, 2]] = 3
    v[:, 3] = 3
    model = build(
        """g (float[N, 3] x) => (float[N, 2] y) {
            a = MatMul(x, w) q = QuantizeLinear(a, s, z) m = MatMulInteger(q, v, z, zv) f = Cast<to = 1>(m)
            y = MatMul(f, u) }""",
        w=draw(3, 5), s=scalar(0.02), z=scalar(117, np.uint8), v=v, zv=zero, u=draw(4, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 3)
    assert shapes(small)["v"] == (3, 3)
    assert shapes(small)["zv"] == (() if zero.ndim == 0 else (3,))
    assert shapes(small)["u"] == (3, 2)
    check_same(model, small, x=draw(4, 3))


def test_a_zero_point_of_the_input_contributes_nothing() -> None:
    """Channel 1 is zero before it is quantised: whatever its weights are, it leaves."""
    model = build(
        """g (float[N, 3] x) => (float[N, 2] y) {
            a = MatMul(x, w) q = QuantizeLinear(a, s, z) m = QLinearMatMul(q, s, z, v, s, zv, so, zo)
            y = DequantizeLinear(m, so, zo) }""",
        w=dead(draw(3, 5), 1, axis=1), s=scalar(0.02), z=scalar(117, np.uint8), v=integers(5, 2),
        zv=scalar(3, np.uint8), so=scalar(0.1), zo=scalar(90, np.uint8),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["v"] == (4, 2)
    check_same(model, small, x=draw(4, 3))


def test_an_idle_output_holds_the_zero_point() -> None:
    v = integers(5, 2)
    v[:, 0] = 3
    model = build(
        "g (uint8[N, 5] x) => (uint8[N, 2] y) { y = QLinearMatMul(x, s, z, v, s, z, s, zo) }",
        s=scalar(0.02), z=scalar(3, np.uint8), v=v, zo=scalar(90, np.uint8),
    )  # fmt: skip
    known = analyse(Graph(model)).known["y"]
    assert known.mask.tolist() == [[True, False]]
    assert known.value.reshape(-1)[0] == 90
    (actual,) = run(model, x=integers(3, 5))
    assert (actual[:, 0] == 90).all()


CONV = "m = ConvInteger<pads = [1, 1, 1, 1]>(q, w, z, zw) f = Cast<to = 1>(m)"
QLINEAR = """m = QLinearConv<pads = [1, 1, 1, 1]>(q, s, z, w, sw, zw, so, zo, b) f = DequantizeLinear(m, so, zo)"""


@pytest.mark.parametrize("body", [CONV, QLINEAR], ids=["ConvInteger", "QLinearConv"])
def test_channels_and_filters_at_the_zero_point_leave(body: str) -> None:
    """Filter 2 is idle and so is channel 0 of all filters; channel 3 holds the zero point of the data."""
    filters = integers(4, 5, 3, 3)
    filters[2] = 3
    filters[:, 0] = 3
    bias = integers(4, dtype=np.int32)
    bias[2] = 0
    model = build(
        f"""g (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {{
            a = Conv(x, k) q = QuantizeLinear(a, s, z) {body} y = Conv(f, v) }}""",
        k=dead(draw(5, 3, 1, 1), 3), s=scalar(0.03), z=scalar(120, np.uint8), w=filters, zw=scalar(3, np.uint8),
        v=draw(2, 4, 1, 1), sw=scalar(0.01), so=scalar(0.2), zo=scalar(99, np.uint8), b=bias,
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["k"] == (3, 3, 1, 1)
    assert shapes(small)["w"] == (3, 3, 3, 3)
    assert shapes(small)["v"] == (2, 3, 1, 1)
    if body == QLINEAR:
        assert shapes(small)["b"] == (3,)
    check_same(model, small, x=X)


def test_an_idle_filter_with_a_bias_is_folded() -> None:
    """5000 * 0.03 * 0.01 = 1.5, at a scale of 0.2 eight steps (7.5 rounded to even): left alone; 5100 is 7.65: 1.6."""
    filters = integers(3, 5, 1, 1)
    filters[[0, 1]] = 3
    model = build(
        """g (float[1, 5, 6, 6] x) => (float[1, 2, 6, 6] y) {
            q = QuantizeLinear(x, s, z) m = QLinearConv(q, s, z, w, sw, zw, so, zo, b) f = DequantizeLinear(m, so, zo)
            y = Conv(f, v, c) }""",
        s=scalar(0.03), z=scalar(120, np.uint8), w=filters, zw=scalar(3, np.uint8), v=draw(2, 3, 1, 1), c=draw(2),
        sw=scalar(0.01), so=scalar(0.2), zo=scalar(99, np.uint8), b=np.array([5000, 5100, 7], np.int32),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (2, 5, 1, 1)
    np.testing.assert_allclose(weight(small, "c"), draw(2) + 1.6 * draw(2, 3, 1, 1)[:, 1, 0, 0], rtol=1e-5)
    check_same(model, small, x=draw(1, 5, 6, 6))


def test_depthwise_convolutions_of_integers() -> None:
    model = build(
        """g (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {
            a = Conv(x, k) q = QuantizeLinear(a, s, z) m = ConvInteger<group = 4, pads = [1, 1, 1, 1]>(q, w, z)
            f = Cast<to = 1>(m) y = Conv(f, v) }""",
        k=dead(draw(4, 3, 1, 1), 1), s=scalar(0.03), z=scalar(120, np.uint8), w=integers(4, 1, 3, 3),
        v=dead(draw(2, 4, 1, 1), 2, axis=1),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["k"] == (2, 3, 1, 1)
    assert shapes(small)["w"] == (2, 1, 3, 3)
    groups = [a.i for node in small.graph.node for a in node.attribute if a.name == "group"]
    assert groups == [2]
    check_same(model, small, x=X)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("ConvInteger<group = 2>(x, w)", "a grouped convolution of integers that is not depthwise"),
        ("ConvInteger(x, v)", "its weights are computed"),
    ],
)
def test_refusals(call: str, reason: str) -> None:
    model = build(
        f"g (uint8[1, 4, 6, 6] x, uint8[4, 4, 1, 1] v) => (int32[1, 4, 6, 6] y) {{ y = {call} }}",
        w=integers(4, 2, 1, 1),
    )  # fmt: skip
    assert [r.reason for r in analyse(Graph(model)).refusals] == [reason]
    assert parameters(shrunk(model)) == 0

"""Selecting, accumulating, repeating and sampling: what is mixed stays whole, the other axes lose channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, run, shapes, shrunk, weight

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph

W = dead(draw(3, 6), 1, 4, axis=1)
V = dead(draw(6, 2), 5)


def along(body: str, **extra: Any) -> onnx.ModelProto:
    """A product with two dead columns, `body` on `[2, 5, 6]`, a product with a dead row: three channels are left."""
    opset = extra.pop("opset", 18)
    text = f"g (float[2, 5, 3] x) => (float[2, R, 2] y) {{ a = MatMul(x, w) {body} y = MatMul(b, v) }}"
    return build(text, opset=opset, ir=10, w=W, v=V, **extra)


PASSING = {
    "largest": ("b, i = TopK<axis = 1>(a, k)", {"k": np.array([2])}),
    "smallest": ("b, i = TopK<axis = -2, largest = 0>(a, k)", {"k": np.array([2])}),
    "selected": ("b = Compress<axis = 1>(a, c)", {"c": np.array([True, False, True])}),
    "sums": ("b = CumSum(a, one)", {"one": np.array(1)}),
    "sums backwards": ("b = CumSum<exclusive = 1, reverse = 1>(a, one)", {"one": np.array(-2)}),
    "reversed": ("b = ReverseSequence<time_axis = 1, batch_axis = 0>(a, l)", {"l": np.array([2, 5])}),
    "repeated": ("b = Tile(a, r)", {"r": np.array([1, 3, 1])}),
    "cropped": ("b = CenterCropPad<axes = [1]>(a, s)", {"s": np.array([3])}),
    "padded": ("b = CenterCropPad<axes = [1]>(a, s)", {"s": np.array([8])}),
}


@pytest.mark.parametrize(("body", "extra"), PASSING.values(), ids=PASSING)
def test_channels_pass(body: str, extra: dict[str, Any]) -> None:
    model = along(body, **extra)
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 3)
    assert shapes(small)["v"] == (3, 2)
    check_same(model, small, x=draw(2, 5, 3))


MIXING = {
    "largest": ("b, i = TopK<axis = 2>(a, k)", {"k": np.array([6])}),
    "sums": ("b = CumSum(a, two)", {"two": np.array(2)}),
    "selected": ("b = Compress<axis = 2>(a, c)", {"c": np.ones(6, np.bool_)}),
}


@pytest.mark.parametrize(("body", "extra"), MIXING.values(), ids=MIXING)
def test_channels_that_are_mixed_stay(body: str, extra: dict[str, Any]) -> None:
    model = along(body, **extra)
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 6)
    check_same(model, small, x=draw(2, 5, 3))


def test_a_constant_channel_is_its_own_largest_element() -> None:
    model = build(
        """g (float[5, 3] x) => (float[2, 2] y) {
            a = MatMul(x, w) c = Add(a, c0) b, i = TopK<axis = 0>(c, k) y = Gemm(b, v, d) }""",
        w=dead(draw(3, 4), 1, axis=1), c0=np.array([0, 0.5, 0, 0], np.float32), k=np.array([2]), v=draw(4, 2),
        d=draw(2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 3)
    np.testing.assert_allclose(weight(small, "d"), draw(2) + 0.5 * draw(4, 2)[1], rtol=1e-6)
    check_same(model, small, x=draw(5, 3))


def test_positions_of_the_largest_are_not_known() -> None:
    model = build(
        "g (float[3, 5] x) => (float[3, 2] y, int64[3, 2] i) { z = Mul(x, zero) y, i = TopK(z, k) }",
        zero=np.zeros(1, np.float32), k=np.array([2]),
    )  # fmt: skip
    known = analyse(Graph(model)).known
    assert known["y"].zero().all()
    assert "i" not in known
    check_same(model, shrunk(model), x=draw(3, 5))


@pytest.mark.parametrize(("upper", "diagonal"), [(1, 0), (0, 0), (1, 2), (0, -1)])
def test_a_triangle_knows_its_zeros_and_needs_the_rest(upper: int, diagonal: int) -> None:
    model = build(
        f"g (float[4, 5] x) => (float[4, 5] y) {{ a = Relu(x) y = Trilu<upper = {upper}>(a, k) }}",
        k=np.array(diagonal),
    )  # fmt: skip
    analysis = analyse(Graph(model))
    (expected,) = run(model, x=np.ones((4, 5), np.float32))
    np.testing.assert_array_equal(analysis.known["y"].zero(), expected == 0)
    np.testing.assert_array_equal(np.broadcast_to(analysis.needed["a"], (4, 5)), expected == 1)


def test_batches_of_determinants_lose_what_is_dead() -> None:
    model = build(
        """g (float[N, 4] x) => (float[N, 2] y) {
            a = MatMul(x, w) r = Reshape(a, s) d = Det(r) y = MatMul(d, v) }""",
        w=draw(4, 3 * 4), s=np.array([0, 3, 2, 2]), v=dead(draw(3, 2), 1),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (4, 8)
    check_same(model, small, x=draw(2, 4))


def test_one_hot_keeps_its_axis() -> None:
    model = build(
        "g (int64[N] i) => (float[N, 2] y) { h = OneHot(i, depth, values) y = MatMul(h, v) }",
        depth=np.array(4), values=np.array([0, 1], np.float32), v=dead(draw(4, 2), 1),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["v"] == (4, 2)
    check_same(model, small, i=np.array([0, 3, 1]))


def test_fills_follow_their_readers() -> None:
    """Zeros laid beside two dead channels: all of them leave."""
    model = build(
        """g (float[N, 3] x) => (float[N, 2] y) {
            a = MatMul(x, w) s = Shape<end = 1>(x) t = Concat<axis = 0>(s, four) z = ConstantOfShape(t)
            c = Concat<axis = 1>(a, z) y = MatMul(c, v) }""",
        w=W, four=np.array([4]), v=draw(10, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 4)
    assert shapes(small)["v"] == (4, 2)
    check_same(model, small, x=draw(2, 3))


def test_an_identity_matrix_is_known() -> None:
    model = build("g (float[3, 4] x) => (float[3, 4] y) { e = EyeLike<k = 1>(x) y = Mul(e, x) }")
    np.testing.assert_array_equal(analyse(Graph(model)).known["e"].value, np.eye(3, 4, 1))
    check_same(model, shrunk(model), x=draw(3, 4))


# --- sampling space ---------------------------------------------------------------------------------------------


def image(body: str, **extra: Any) -> onnx.ModelProto:
    """A convolution with dead filters 0 and 2, the latter with a bias; `body`; a convolution of one point."""
    bias = np.array([0, 0.1, 0.5, 0.2], np.float32)
    inputs = extra.pop("inputs", "")
    text = f"g (float[1, 2, 6, 6] x{inputs}) => (float[R, 3, H, W] y) {{ a = Conv(x, w, b) {body} y = Conv(c, v, d) }}"
    return build(text, opset=18, ir=10, w=dead(draw(4, 2, 1, 1), 0, 2), b=bias, v=draw(3, 4, 1, 1), d=draw(3), **extra)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_constants_pass_where_nothing_is_taken_from_outside(padding: str, mode: str) -> None:
    body = f'c = GridSample<mode = "{mode}", padding_mode = "{padding}">(a, g)'
    model = image(body, inputs=", float[1, 3, 4, 2] g")
    small = shrunk(model)
    left = 3 if padding == "zeros" else 2
    assert shapes(small)["w"] == (left, 2, 1, 1)
    grid = np.random.default_rng(0).uniform(-1.2, 1.2, (1, 3, 4, 2)).astype(np.float32)
    check_same(model, small, 1e-5, x=draw(1, 2, 6, 6), g=grid)


def test_regions_keep_live_channels() -> None:
    body = "c = RoiAlign<output_height = 2, output_width = 2, sampling_ratio = 2>(a, rois, batch)"
    model = image(body, inputs=", float[2, 4] rois", batch=np.array([0, 0]))
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 2, 1, 1)
    check_same(model, small, x=draw(1, 2, 6, 6), rois=np.array([[0, 0, 3, 3], [1, 2, 5, 5]], np.float32))


def test_columns_are_put_together_per_channel() -> None:
    model = build(
        """g (float[1, 9, 3] x) => (float[1, 3, 4, 4] y) {
            a = MatMul(x, k) t = Transpose<perm = [0, 2, 1]>(a) c = Col2Im(t, image, block) y = Conv(c, v) }""",
        opset=18, k=dead(draw(3, 12), *range(4, 8), axis=1), image=np.array([4, 4]), block=np.array([2, 2]),
        v=draw(3, 3, 1, 1),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["k"] == (3, 8)
    assert shapes(small)["v"] == (3, 2, 1, 1)
    check_same(model, small, x=draw(1, 9, 3))


@pytest.mark.parametrize("opset", [17, 20])
def test_frequencies_are_taken_per_channel(opset: int) -> None:
    call = "DFT<axis = 1>(u)" if opset == 17 else 'DFT(u, "", one)'
    extra = {} if opset == 17 else {"one": np.array(1)}
    model = build(
        f"""g (float[2, 8, 3] x) => (float[2, 8, 2, 2] y) {{
            a = MatMul(x, w) u = Unsqueeze(a, last) f = {call}
            t = Transpose<perm = [0, 1, 3, 2]>(f) y = MatMul(t, v) }}""",
        opset=opset, ir=9, w=W, v=V, last=np.array([-1]), **extra,
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 3)
    assert "DFT" in operators(small)
    check_same(model, small, 1e-5, x=draw(2, 8, 3))

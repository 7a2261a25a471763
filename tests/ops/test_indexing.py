"""Gathering and scattering: passive axes lose channels, indexed ones stay unless the indices are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, shapes, shrunk, weight

from onnxshrink.analyse import Analysis, analyse
from onnxshrink.graph import Graph


def known_zeros(model: onnx.ModelProto, name: str) -> Any:
    """Where a tensor is known to be zero, compressed."""
    return facts(model).known[name].zero()


def facts(model: onnx.ModelProto) -> Analysis:
    return analyse(Graph(model))


# --- Gather -----------------------------------------------------------------------------------------------------


def test_dead_columns_of_a_table_leave_and_its_rows_stay() -> None:
    table, head = dead(draw(7, 4), 1, 3, axis=1), draw(4, 2)
    model = build(
        "g (int64[N, 5] i) => (float[N, 5, 2] y) { e = Gather(table, i) y = MatMul(e, head) }", table=table, head=head
    )
    small = shrunk(model)
    assert shapes(small) == {"table": (7, 2), "head": (2, 2)}
    check_same(model, small, i=np.array([[0, 6, 3, 3, -1], [1, 2, 4, 5, 0]]))


def test_a_column_of_one_value_is_folded_in_what_follows() -> None:
    table, head = draw(7, 4), draw(4, 2)
    table[:, 2] = 0.25
    model = build(
        "g (int64[N] i) => (float[N, 2] y) { e = Gather(table, i) y = Gemm(e, head, bias) }",
        table=table, head=head, bias=draw(2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"table": (7, 3), "head": (3, 2), "bias": (2,)}
    np.testing.assert_allclose(weight(small, "bias"), draw(2) + 0.25 * head[2], rtol=1e-6)
    check_same(model, small, i=np.arange(7))


def test_columns_that_nothing_needs_leave() -> None:
    model = build(
        "g (int64[N] i) => (float[N, 2] y) { e = Gather(table, i) y = MatMul(e, head) }",
        table=draw(7, 4), head=dead(draw(4, 2), 0),
    )  # fmt: skip
    assert shapes(shrunk(model)) == {"table": (7, 3), "head": (3, 2)}


@pytest.mark.parametrize(("indices", "left"), [([4, 0], [1, 0]), ([-2], [0]), ([[4, 4], [1, 4]], [[1, 1], [0, 1]])])
def test_known_indices_pick_and_the_rest_leaves(indices: Any, left: Any) -> None:
    """Six channels are computed, of which the picked ones stay, in order."""
    picks = np.array(indices)
    shape = ", ".join(["N", *map(str, picks.shape)])
    model = build(
        f"g (float[N, 3] x) => (float[{shape}] y) {{ a = MatMul(x, w) y = Gather<axis = 1>(a, i) }}",
        w=draw(3, 6), i=picks,
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, len(np.unique(picks % 6)))
    np.testing.assert_array_equal(weight(small, "i"), left)
    check_same(model, small, x=draw(2, 3))


def test_a_picked_channel_that_is_dead_leaves_the_picks() -> None:
    model = build(
        "g (float[N, 3] x) => (float[N, 2] y) { a = MatMul(x, w) p = Gather<axis = 1>(a, i) y = MatMul(p, v) }",
        w=dead(draw(3, 6), 5, axis=1), i=np.array([2, 5, 0, 2]), v=draw(4, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 2), "i": (3,), "v": (3, 2)}
    assert weight(small, "i").tolist() == [1, 0, 1]
    check_same(model, small, x=draw(2, 3))


def test_a_scalar_index_takes_its_axis_away() -> None:
    """As exporters split a fused projection: three heads of four, only the middle one is read."""
    model = build(
        """g (float[N, 5] x) => (float[N, 2] y) {
            a = MatMul(x, w) r = Reshape(a, shape) k = Gather<axis = 1>(r, one) y = MatMul(k, v) }""",
        w=draw(5, 12), shape=np.array([0, 3, 4]), one=np.array(1), v=dead(draw(4, 2), 3),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (5, 3)
    np.testing.assert_array_equal(weight(small, "w"), draw(5, 12)[:, 4:7])
    check_same(model, small, x=draw(2, 5))


def test_partly_known_shapes_pass_through_gather() -> None:
    model = build(
        """g (float[N, 6, 4] x) => (float[N, 2, 2] y) {
            a = Transpose<perm = [0, 2, 1]>(x) s = Shape(a) n = Gather(s, zero)
            t = Concat<axis = 0>(n, rest) m = MatMul(a, w) r = Reshape(m, t) p = MatMul(r, v) y = Relu(p) }""",
        zero=np.array([0]), rest=np.array([2, 10]), w=dead(draw(6, 5), 1, axis=1), v=draw(10, 2),
    )  # fmt: skip
    assert facts(model).known["t"].mask.tolist() == [False, True, True]
    small = shrunk(model)
    assert shapes(small)["w"] == (6, 4)
    check_same(model, small, x=draw(3, 6, 4))


# --- GatherElements, ScatterElements ----------------------------------------------------------------------------


def test_gathered_elements_keep_only_live_channels() -> None:
    """The indices are spread over the channels: they lose the same ones."""
    model = build(
        """g (float[2, 5, 3] x, int64[2, 4, 1] i) => (float[2, 4, 2] y) {
            a = MatMul(x, w) j = Expand(i, shape) p = GatherElements<axis = 1>(a, j) y = MatMul(p, v) }""",
        w=dead(draw(3, 6), 0, 2, axis=1), shape=np.array([2, 4, 6]), v=draw(6, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 4), "shape": (3,), "v": (4, 2)}
    assert weight(small, "shape").tolist() == [2, 4, 4]
    check_same(model, small, x=draw(2, 5, 3), i=np.array([[[0], [4], [2], [2]], [[1], [1], [0], [3]]]))


def test_shorter_indices_pin_the_axis() -> None:
    model = build(
        "g (float[N, 3] x, int64[2, 4] i) => (float[2, 4] y) { a = MatMul(x, w) y = GatherElements(a, i) }",
        w=dead(draw(3, 6), 0, axis=1),
    )
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 6)}
    check_same(model, small, x=draw(3, 3), i=np.array([[0, 1, 2, 0], [2, 2, 1, 0]]))


@pytest.mark.parametrize(("reduction", "left"), [("none", 3), ("add", 3), ("mul", 3), ("max", 3), ("min", 3)])
def test_channels_that_are_zero_before_and_in_the_updates_leave(reduction: str, left: int) -> None:
    model = build(
        f"""g (float[4, 3] x, float[2, 3] u, int64[2, 1] i) => (float[4, 2] y) {{
            a = MatMul(x, w) b = MatMul(u, w) j = Expand(i, shape)
            s = ScatterElements<axis = 0, reduction = "{reduction}">(a, j, b) y = MatMul(s, v) }}""",
        opset=18, w=dead(draw(3, 5), 0, 2, axis=1), shape=np.array([2, 5]), v=draw(5, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, left)
    check_same(model, small, x=draw(4, 3), u=draw(2, 3), i=np.array([[3], [0]]))


@pytest.mark.parametrize(("reduction", "left"), [("none", 1), ("max", 1), ("add", 2), ("mul", 2)])
def test_equal_constants_survive_where_they_are_not_combined(reduction: str, left: int) -> None:
    """A channel that is one before, and one in the updates: one again, unless they are added."""
    model = build(
        f"""g (float[4, 1] x, float[2, 1] u, int64[2, 1] i) => (float[4, 1] y) {{
            a = Gemm(x, w, b) c = Gemm(u, w, b) j = Expand(i, shape)
            s = ScatterElements<reduction = "{reduction}">(a, j, c) y = Gemm(s, v, b1) }}""",
        opset=18, w=np.array([[2, 0]], np.float32), b=np.array([0, 1], np.float32), shape=np.array([2, 2]),
        v=draw(2, 1), b1=draw(1),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (1, left)
    check_same(model, small, x=draw(4, 1), u=draw(2, 1), i=np.array([[3], [0]]))


# --- GatherND, ScatterND ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "indices"), [(0, [[0, 3], [1, 0]]), (1, [[[3], [1]], [[0], [0]]])])
def test_trailing_axes_pass_through_gather_nd(batch: int, indices: Any) -> None:
    picks = np.array(indices)
    extents = ", ".join(map(str, picks.shape))
    outer = "2" if batch == 0 else "2, 2"
    model = build(
        f"""g (float[2, 4, 3] x, int64[{extents}] i) => (float[{outer}, 2] y) {{
            a = MatMul(x, w) p = GatherND<batch_dims = {batch}>(a, i) y = MatMul(p, v) }}""",
        w=dead(draw(3, 6), 1, 5, axis=1), v=draw(6, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 4), "v": (4, 2)}
    check_same(model, small, x=draw(2, 4, 3), i=picks)


def test_trailing_axes_pass_through_scatter_nd() -> None:
    model = build(
        """g (float[4, 3] x, float[2, 3] u, int64[2, 1] i) => (float[4, 2] y) {
            a = MatMul(x, w) b = MatMul(u, w) s = ScatterND(a, i, b) y = MatMul(s, v) }""",
        w=dead(draw(3, 5), 0, axis=1), v=dead(draw(5, 2), 4),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 3), "v": (3, 2)}
    check_same(model, small, x=draw(4, 3), u=draw(2, 3), i=np.array([[3], [0]]))


def test_shapes_written_element_by_element_are_partly_known() -> None:
    model = build(
        """g (float[N, 6] x) => (float[N, 2, 3] y) {
            s = Shape(x) p = Pad(s, pads) t = ScatterND(p, i, u) y = Reshape(x, t) }""",
        pads=np.array([0, 1]), i=np.array([[1], [2]]), u=np.array([2, 3]),
    )  # fmt: skip
    known = facts(model).known["t"]
    assert np.broadcast_to(known.mask, 3).tolist() == [False, True, True]
    assert known.value[1:].tolist() == [2, 3]


def test_a_cache_and_its_update_share_their_channels() -> None:
    model = build(
        """g (float[2, 6, 3] x, float[2, 1, 3] u, int64[2] i) => (float[2, 6, 2] y) {
            a = MatMul(x, w) b = MatMul(u, w) s = TensorScatter<axis = 1>(a, b, i) y = MatMul(s, v) }""",
        opset=24, ir=10, w=dead(draw(3, 5), 0, 3, axis=1), v=draw(5, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 3), "v": (3, 2)}
    check_same(model, small, x=draw(2, 6, 3), u=draw(2, 1, 3), i=np.array([2, 5]))


def test_indices_are_right_wherever_the_result_is_computed() -> None:
    """Row 1 of the result counts in column 0 only, row 0 in column 1 only: both indices are needed for both columns."""
    model = build(
        """g (float[2, 2] x, int64[2] i) => (float[2, 2] y) {
            j = Identity(i) p = Gather(x, j) q = Mul(p, m) y = Relu(q) }""",
        m=np.eye(2, dtype=np.float32),
    )  # fmt: skip
    assert facts(model).needed["i"].all()
    check_same(model, shrunk(model), x=draw(2, 2), i=np.array([1, 0]))
    assert "Gather" in operators(shrunk(model))

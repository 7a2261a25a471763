"""Gathering and scattering: passive axes lose channels, indexed ones stay unless the indices are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import Array, build, check_same, dead, draw, operators, shapes, shrunk, weight

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


@pytest.mark.parametrize("extent", ["5", "N"], ids=["static", "free"])
@pytest.mark.parametrize("dead_line", [4, 2], ids=["picked", "not picked"])
def test_only_lines_that_gather_nd_picks_by_known_indices_stay(extent: str, dead_line: int) -> None:
    w = dead(draw(3, 12), 2 * dead_line, 2 * dead_line + 1, axis=1)
    model = build(
        f"""g (float[{extent}, 3] x) => (float[1, 2, {extent}, 2] y) {{
            a = MatMul(x, w) r = Reshape(a, to) t = Transpose<perm = [1, 0, 2]>(r) y = GatherND(t, i) }}""",
        w=w, to=np.array([-1, 6, 2]), i=np.array([[[4], [-5]]]),
    )  # fmt: skip
    small = shrunk(model)
    np.testing.assert_array_equal(weight(small, "w"), w[:, [2, 3, 8, 9]])
    assert weight(small, "i").tolist() == [[[1], [0]]]
    check_same(model, small, x=draw(5, 3))


def test_query_heads_that_share_a_key_picked_by_gather_nd_leave() -> None:
    """Multi-query attention: four query heads, then one of keys, in one matrix; the last position is indexed."""
    v = dead(draw(8, 3), 2, 3, 6, 7)
    model = build(
        """g (float[N, 5, 3] x) => (float[N, 5, 3] y) {
            a = MatMul(x, w) r = Reshape(a, heads) q = Slice(r, zero, four, two)
            t = Transpose<perm = [2, 0, 1, 3]>(r) g = GatherND(t, i) k = Transpose<perm = [1, 0, 2, 3]>(g)
            p = Transpose<perm = [0, 2, 1, 3]>(q) kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(p, kt)
            m = Softmax<axis = 3>(s) c = MatMul(m, k) d = Transpose<perm = [0, 2, 1, 3]>(c) f = Reshape(d, flat)
            y = MatMul(f, v) }""",
        w=draw(3, 10), v=v, heads=np.array([0, 0, 5, 2]), flat=np.array([0, 0, 8]), zero=np.array([0]),
        four=np.array([4]), two=np.array([2]), i=np.array([[4]]),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 6)
    assert shapes(small)["v"] == (4, 3)
    check_same(model, small, x=draw(2, 5, 3))


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


# --- More of Gather ---------------------------------------------------------------------------------------------


def ids_of(*values: int) -> Array:
    return np.array(values, np.int64)


def embedding(table: Array, head: Array) -> onnx.ModelProto:
    text = "g (int64[N, S] ids) => (float[N, S, 2] y) { e = Gather(table, ids) y = MatMul(e, head) }"
    return build(text, table=table, head=head)


def test_a_column_that_differs_in_one_row_stays() -> None:
    """Three rows are compared first; the one that differs is none of them."""
    table = np.zeros((9, 5), np.float32)
    table[:, [0, 1, 2, 4]] = draw(9, 4)
    table[5, 3] = 0.1
    big = embedding(table, draw(5, 2))
    assert shapes(shrunk(big)) == shapes(big)


def test_indices_along_another_axis_than_the_first() -> None:
    """Columns are picked by index and stay; rows pass through."""
    text = "g (int64[K] ids) => (float[2, K] y) { e = Gather <axis = -1> (table, ids) y = MatMul(head, e) }"
    big = build(text, table=dead(draw(5, 7), 2), head=dead(draw(2, 5), 4, axis=1))
    small = shrunk(big)
    assert shapes(small) == {"table": (3, 7), "head": (2, 3)}
    check_same(big, small, ids=ids_of(6, 0, -2))


def picking(picks: Array, first: Array, head: Array, axis: int = 1) -> onnx.ModelProto:
    text = f"g (float[N, 3] x) => (float[N, 2] y) {{ h = MatMul(x, first) p = Gather <axis = {axis}> (h, picks) "
    return build(text + "y = MatMul(p, head) }", first=first, picks=picks, head=head)


def test_picks_that_nothing_reads_leave_with_what_they_pick() -> None:
    big = picking(ids_of(5, 0, 3, 0), draw(3, 6), dead(draw(4, 2), 0, 3))
    small = shrunk(big)
    assert shapes(small) == {"first": (3, 2), "picks": (2,), "head": (2, 2)}
    np.testing.assert_array_equal(weight(small, "picks"), [0, 1])
    check_same(big, small, x=draw(4, 3))


def test_a_free_axis_is_picked_from_whole() -> None:
    """The first token, as a classifier takes it: features pass through."""
    text = "g (float[N, S, 3] x) => (float[N, 2] y) { h = MatMul(x, first) p = Gather <axis = 1> (h, pick) "
    big = build(text + "y = MatMul(p, head) }", first=dead(draw(3, 6), 1, axis=1), pick=np.array(0), head=draw(6, 2))
    small = shrunk(big)
    assert shapes(small) == {"first": (3, 5), "pick": (), "head": (5, 2)}
    check_same(big, small, x=draw(2, 5, 3))


def test_a_target_put_together_from_gathered_extents_is_rewritten() -> None:
    """Four heads of two, the second and the last of which nothing reads; batch and steps are free."""
    text = """
        g (float[N, S, 3] x) => (float[N, S, 2] y) {
            h = MatMul(x, first)
            s = Shape(h)
            n = Gather(s, zero) t = Gather(s, one) c = Gather(s, two)
            n1 = Unsqueeze(n, axis) t1 = Unsqueeze(t, axis) d = Div(c, heads) d1 = Unsqueeze(d, axis)
            target = Concat <axis = 0> (n1, t1, four, d1)
            r = Reshape(h, target)
            e = Softmax <axis = -1> (r)
            back = Concat <axis = 0> (n1, t1, last)
            f = Reshape(e, back)
            y = MatMul(f, head)
        }
    """
    numbers = {"zero": np.array(0), "one": np.array(1), "two": np.array(2), "axis": ids_of(0), "heads": np.array(4)}
    numbers |= {"four": ids_of(4), "last": ids_of(-1)}
    big = build(text, first=draw(3, 8), head=dead(draw(8, 2), 2, 3, 6, 7), **numbers)
    small = shrunk(big)
    assert shapes(small)["first"] == (3, 4)
    assert shapes(small)["head"] == (4, 2)
    for batch, steps in ((1, 4), (3, 2)):
        check_same(big, small, x=draw(batch, steps, 3))


def test_an_index_that_is_computed_stays_one() -> None:
    """Only the second of two picks is read; both are made by one product, and both must point into the table."""
    text = """
        g (float[N, 3] x) => (float[N, 2] y) {
            f = MatMul(x, way) c = Clip(f, low, high) i = Cast <to = 7> (c) e = Gather(table, i) r = Flatten(e)
            y = MatMul(r, head)
        }
    """
    limits = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    big = build(text, way=draw(3, 2), table=draw(7, 4), head=dead(draw(8, 2), 0, 1, 2, 3), **limits)
    small = shrunk(big)
    assert shapes(small)["way"] == (3, 1)
    assert shapes(small)["head"] == (4, 2)
    check_same(big, small, x=9 * draw(5, 3))


# --- What the indices leave alone -------------------------------------------------------------------------------

FEATURES = 6
HEAD = (
    "g (float[2, 4, 3] x, {inputs}) => (float[2, {steps}, 2] y) {{ h = MatMul(x, first) {body} y = MatMul(z, head) }}"
)


def featured(body: str, inputs: str, steps: int = 4, opset: int = 18, **weights: Array) -> onnx.ModelProto:
    """Features 1 and 4 of `h` are zero, features 0 and 5 of `z` are not read: 2 and 3 are what counts."""
    first, head = dead(draw(3, FEATURES), 1, 4, axis=1), dead(draw(FEATURES, 2), 0, 5)
    text = HEAD.format(inputs=inputs, steps=steps, body=body)
    return build(text, opset=opset, ir=10, first=first, head=head, **weights)


X = draw(2, 4, 3)
WIDE = {"wide": ids_of(2, 3, FEATURES)}
PICKS = np.array([[[3], [0], [1]], [[0], [2], [1]]])


def test_elements_gathered_along_features_keep_them() -> None:
    big = featured("z = GatherElements <axis = 2> (h, ids)", f"int64[2, 4, {FEATURES}] ids")
    small = shrunk(big)
    assert shapes(small)["first"] == (3, FEATURES)
    check_same(big, small, x=X, ids=np.random.default_rng(0).integers(0, FEATURES, (2, 4, FEATURES)))


def test_an_update_other_than_zero_keeps_a_feature() -> None:
    body = "i = Expand(ids, wide) z = ScatterElements <axis = 1> (h, i, u)"
    updates = dead(draw(2, 3, FEATURES, seed=4), 4, axis=2)
    big = featured(body, "int64[2, 3, 1] ids", u=updates, **WIDE)
    small = shrunk(big)
    assert shapes(small)["head"] == (3, 2)
    assert shapes(small)["u"] == (2, 3, 3)
    check_same(big, small, x=X, ids=PICKS)


def test_features_scattered_by_index_stay() -> None:
    body = "z = ScatterND(h, ids, v)"
    big = featured(body, "int64[2, 3] ids, float[2] v")
    small = shrunk(big)
    assert shapes(small)["first"] == (3, FEATURES)
    check_same(big, small, x=X, v=draw(2), ids=np.array([[0, 3, 5], [1, 0, 1]]))


def test_a_reshape_target_with_scattered_extents() -> None:
    """Extents written in a shape at known places stay known."""
    text = """
        g (float[N, 3] x) => (float[N, 2] y) {
            h = MatMul(x, first) s = Shape(h) t = ScatterND(s, place, four) w = Concat <axis = 0> (t, two)
            r = Reshape(h, w) q = Softmax <axis = 2> (r) f = Flatten(q) y = MatMul(f, head)
        }
    """
    numbers = {"place": np.array([[1]]), "four": ids_of(4), "two": ids_of(2)}
    big = build(text, opset=18, first=draw(3, 8), head=dead(draw(8, 2), 0, 1, 4, 5), **numbers)
    small = shrunk(big)
    assert shapes(small)["first"] == (3, 4)
    assert shapes(small)["head"] == (4, 2)
    check_same(big, small, x=draw(5, 3))


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_a_cache_updated_in_place(mode: str) -> None:
    text = f"""
        g (float[2, 1, 4, 3] x, float[2, 1, 2, 3] v, int64[2] at) => (float[2, 1, 4, 2] y) {{
            h = MatMul(x, first) u = MatMul(v, first) z = TensorScatter <mode = "{mode}"> (h, u, at) y = MatMul(z, head)
        }}
    """
    first, head = dead(draw(3, FEATURES), 1, 4, axis=1), dead(draw(FEATURES, 2), 0, 5)
    big = build(text, opset=24, ir=10, first=first, head=head)
    small = shrunk(big)
    assert shapes(small) == {"first": (3, 2), "head": (2, 2)}
    check_same(big, small, x=draw(2, 1, 4, 3), v=draw(2, 1, 2, 3, seed=1), at=ids_of(2, 0))

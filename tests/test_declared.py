"""What a model declares of its tensors need not be so: negative extents, and ranks that its own targets contradict."""

from __future__ import annotations

import numpy as np
from models import build, check_same, dead, draw, shapes, shrunk

import onnxshrink


def test_a_negative_extent_is_a_free_one() -> None:
    model = build(
        "g (float[N, 3, H, W] x) => (float[N, 2, H, W] y) { h = Conv(x, w) r = Relu(h) y = Conv(r, u) }",
        w=dead(draw(6, 3, 1, 1), 1, 2, 5),
        u=draw(2, 6, 1, 1),
    )
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = -1
    small = shrunk(model)
    assert shapes(small) == {"w": (3, 3, 1, 1), "u": (2, 3, 1, 1)}
    assert [d.dim_value for d in small.graph.input[0].type.tensor_type.shape.dim] == [-1, 3, -1, -1]
    check_same(model, small, x=draw(2, 3, 4, 5))
    assert onnxshrink.shrink(model, align="none").report.equivalence is not None


def test_an_output_that_is_declared_with_another_rank_is_kept_whole() -> None:
    model = build(
        """g (float[4, 3] x) => (float[4, 5] y) {
            h = MatMul(x, w) r = Relu(h) o = MatMul(r, u) y = Reshape(o, target) }""",
        w=dead(draw(3, 6), 0, 4, axis=1),
        u=draw(6, 5),
        target=np.array([2, 2, 5]),
    )
    small = shrunk(model)
    assert shapes(small)["w"] == (3, 4)
    check_same(model, small, x=draw(4, 3))


def test_extents_below_zero_in_a_branch_that_never_runs() -> None:
    """Of four parts of five sizes, two in each, onnx infers an extent of -1 for the last one."""
    text = """g (float[N, 4] x, int64[5] size) => (float[N, 2] y) {
        count = Size(size) four = Constant <value_int = 4> () flat = Equal(count, four) h = MatMul(x, w1)
        z = If (flat) <
            then_branch = t () => (float[N, 3] p) {
                n, c, d, e = Split <num_outputs = 4> (size) s = ReduceSum(e) f = Cast <to = 1> (s) p = Mul(h, f) },
            else_branch = o () => (float[N, 3] q) { q = Relu(h) }>
        y = MatMul(z, w2) }"""
    model = build(text, opset=20, w1=dead(draw(4, 3), 1, axis=1), w2=draw(3, 2))
    small = onnxshrink.shrink(model, align="none").model
    assert (shapes(small)["w1"], shapes(small)["w2"]) == ((4, 2), (2, 2))


def test_weights_that_are_no_inputs_at_ir_version_3() -> None:
    model = build(
        "g (float[N, 3] x) => (float[N, 2] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, u) }",
        opset=8,
        w=dead(draw(3, 4), 1, 2, axis=1),
        u=draw(4, 2),
    )
    model.ir_version = 3
    small = onnxshrink.shrink(model, align="none").model
    assert small.ir_version == 3
    assert shapes(small) == {"w": (3, 2), "u": (2, 2)}

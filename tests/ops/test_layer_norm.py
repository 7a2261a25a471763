"""LayerNormalization behind many zeros: they leave; of what it makes of them, one channel stands for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, shapes, shrunk, shrunk_with_plan, weight

import onnxshrink
from onnxshrink.planning.align import Alignment

DEAD = (1, 2, 5)
TEXT = "g (float[N, T, 5] x) => (float[N, T, 3] y) {{ a = MatMul(x, w1) {norm} {readers} }}"
NORM = "n = LayerNormalization(a, g, h)"


def weights(**more: np.ndarray) -> dict[str, Any]:
    return {"w1": dead(draw(5, 8), *DEAD, axis=1), "g": draw(8, seed=1), "h": draw(8, seed=2), "w2": draw(8, 3)} | more


def normed(readers: str, norm: str = NORM, text: str = TEXT, **more: np.ndarray) -> onnx.ModelProto:
    model = build(text.format(norm=norm, readers=readers), **weights(**more))
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)
    return model


X = draw(2, 4, 5, seed=8)
TURNED = "Transpose <perm = [0, 2, 1]>"


@pytest.mark.parametrize("shift", [True, False], ids=["with shift", "without shift"])
def test_zeros_leave_in_front_and_all_but_one_of_what_they_become_behind(shift: bool) -> None:
    model = normed("y = MatMul(n, w2)", NORM if shift else "n = LayerNormalization(a, g)")
    small = shrunk(model)
    assert operators(small) == ["MatMul", "Pad", "LayerNormalization", "Gather", "MatMul", *["Add"] * shift]
    assert shapes(small)["w1"] == (5, 5)
    assert shapes(small)["w2"] == (6, 3)
    # The channel that stays is the one with the largest scale; the others add their multiples to its weights.
    scale, offset, w2 = draw(8, seed=1), draw(8, seed=2) if shift else np.zeros(8), draw(8, 3)
    host = max(DEAD, key=lambda channel: abs(scale[channel]))
    ratio = scale / scale[host]
    kept = sorted({0, 3, 4, 6, 7, host})
    expected = sum(w2[d] * ratio[d] for d in DEAD)
    np.testing.assert_allclose(weight(small, "w2")[kept.index(host)], expected, rtol=1e-5)
    if shift:
        bias = sum(w2[d] * (offset[d] - offset[host] * ratio[d]) for d in DEAD if d != host)
        added = next(node.input[1] for node in small.graph.node if node.op_type == "Add")
        np.testing.assert_allclose(weight(small, added), bias, rtol=1e-5)
    check_same(model, small, x=X)
    assert onnxshrink.shrink(small, align="none").model == small


def test_what_is_scaled_to_nothing_needs_no_channel_at_all() -> None:
    zero = {"g": dead(draw(8, seed=1), *DEAD), "h": dead(draw(8, seed=2), *DEAD)}
    model = normed("y = MatMul(n, w2)", **zero)
    small = shrunk(model)
    assert (shapes(small)["w1"], shapes(small)["w2"]) == ((5, 5), (5, 3))
    check_same(model, small, x=X)


def test_constants_and_followers_are_folded_together() -> None:
    """Of the three zeros one is scaled to nothing and leaves its shift."""
    model = normed("m = MatMul(n, w2) y = Add(m, b)", g=dead(draw(8, seed=1), 2), b=draw(3))
    small = shrunk(model)
    assert (shapes(small)["w1"], shapes(small)["w2"], shapes(small)["b"]) == ((5, 5), (6, 3), (3,))
    assert operators(small).count("Add") == 1
    check_same(model, small, x=X)


@pytest.mark.parametrize(
    "readers",
    [
        "f = Reshape(n, flat) m = Gemm(f, w2, b) y = Reshape(m, back)",
        "f = Reshape(n, flat) m = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, u, b) y = Reshape(m, back)",
        "f = Reshape(n, flat) m = Gemm(f, w2) y = Reshape(m, back)",
        "s = Slice(n, one, two, one) y = MatMul(s, w2)",
        "s = Gather <axis = 1> (n, one) y = MatMul(s, w2)",
        "s = Transpose <perm = [1, 0, 2]> (n) y = MatMul(s, w2)",
        "p = MatMul(n, w2) q = MatMul(n, w3) y = Add(p, q)",
        "p = MatMul(n, w2) s = Gather <axis = 1> (n, one) q = MatMul(s, w3) y = Add(p, q)",
    ],
    ids=["Gemm", "scaled Gemm", "Gemm without bias", "Slice", "Gather", "Transpose", "two readers", "a branch"],
)
def test_readers_may_be_further_behind(readers: str) -> None:
    more = {
        "flat": np.array([-1, 8]), "back": np.array([2, -1, 3]), "one": np.array([1]), "two": np.array([2]),
        "b": draw(3), "u": draw(3, 8), "w3": draw(8, 3, seed=4),
    }  # fmt: skip
    model = normed(readers, **more)
    small = shrunk(model)
    found = shapes(small)
    assert found["w1"] == (5, 5)
    assert {found[name] for name in ("w2", "w3", "u") if name in found} <= {(6, 3), (3, 6)}
    check_same(model, small, x=X)


@pytest.mark.parametrize(
    "readers",
    ["m = MatMul(n, w2) r = Relu(n) q = MatMul(r, w2) y = Add(m, q)", "t = Add(n, a) y = MatMul(t, w2)"],
    ids=["another function", "a residual connection"],
)
def test_a_reader_that_cannot_fold_keeps_what_the_norm_makes_of_zeros(readers: str) -> None:
    model = normed(readers)
    small = shrunk(model)
    assert (shapes(small)["w1"], shapes(small)["w2"]) == ((5, 8 if "Add(n, a)" in readers else 5), (8, 3))
    check_same(model, small, x=X)


def test_the_result_of_the_model_is_whole() -> None:
    model = normed("y = Identity(n)", text=TEXT.replace("float[N, T, 3] y", "float[N, T, 8] y"))
    small = shrunk(model)
    assert shapes(small)["w1"] == (5, 5)
    check_same(model, small, x=X)


@pytest.mark.parametrize(
    ("norm", "readers"),
    [
        ("n = LayerNormalization <axis = 1> (a, g2, h2)", "y = MatMul(n, w2)"),
        ("n, m = LayerNormalization(a, g, h)", "p = MatMul(n, w2) y = Add(p, m)"),
        ("t = Identity(g1) g = Mul(t, scale) n = LayerNormalization(a, g, h)", "y = MatMul(n, w2)"),
    ],
    ids=["over two axes", "with its mean", "with a scale that is given"],
)
def test_other_forms_stay_whole(norm: str, readers: str) -> None:
    text = TEXT.replace("float[N, T, 5] x", "float[N, 4, 5] x" + ", float[1] scale" * ("scale" in norm))
    more = {"g2": draw(4, 8), "h2": draw(4, 8), "g1": draw(8)}
    given = weights() | more
    used = {name: value for name, value in given.items() if name in (norm + readers).replace("(", " ") or name == "w1"}
    if "scale" in norm:
        used.pop("g")
    model = build(text.format(norm=norm, readers=readers), **used)
    small = shrunk(model)
    assert shapes(small)["w1"] == (5, 8)
    assert "Pad" not in operators(small)
    feeds = {"x": X} | ({"scale": np.array([1.5], np.float32)} if "scale" in norm else {})
    check_same(model, small, **feeds)


def test_a_stream_through_two_blocks() -> None:
    """As in a transformer that normalises first: every writer of the stream has the same dead rows."""
    rows = {"g2": draw(8, seed=3), "h2": draw(8, seed=4), "u1": draw(8, 6), "u2": dead(draw(6, 8), *DEAD, axis=1)}
    body = """a = MatMul(x, w1) n = LayerNormalization(a, g, h) i = MatMul(n, u1) r = Relu(i) o = MatMul(r, u2)
              s = Add(a, o) m = LayerNormalization(s, g2, h2) y = MatMul(m, w2)"""
    model = build(f"g (float[N, T, 5] x) => (float[N, T, 3] y) {{ {body} }}", **weights(**rows))
    small = shrunk(model)
    found = shapes(small)
    assert [found[name] for name in ("w1", "u1", "u2", "w2")] == [(5, 5), (6, 6), (6, 5), (6, 3)]
    check_same(model, small, x=X)


def test_wider_than_it_must_be() -> None:
    model = normed("y = MatMul(n, w2)")
    small, plan = shrunk_with_plan(model, Alignment(8))
    check_same(model, small, x=X)
    assert (shapes(small)["w1"], shapes(small)["w2"]) == ((5, 8), (8, 3))
    assert plan.kept["n"][2] is not None


@pytest.mark.parametrize(
    "reader",
    [
        "c = MatMul(n, w2) r = Relu(c) y = MatMul(r, w3)",
        "c = com.microsoft.FusedMatMul(n, w2) r = Relu(c) y = MatMul(r, w3)",
        f"t = {TURNED} (n) c = Conv(t, k) r = Relu(c) q = {TURNED} (r) y = MatMul(q, w3)",
        f"t = {TURNED} (n) c = MatMul(u, t) r = Relu(c) q = {TURNED} (r) y = MatMul(q, w3)",
    ],
    ids=["MatMul", "FusedMatMul", "Conv", "weights on the left"],
)
@pytest.mark.parametrize("multiple", [1, 6])
def test_outputs_that_stay_unread_do_not_spoil_the_constants(reader: str, multiple: int) -> None:
    """Output 3 alone reads two of the zeros, and nobody reads it; the third zero is a constant for all outputs."""
    w2 = dead(draw(8, 6), 1, 5)
    w2[[1, 5], 3] = 1.5, -0.7
    more = {"w2": w2, "u": np.ascontiguousarray(w2.T), "k": np.ascontiguousarray(w2.T)[:, :, None]}
    model = normed(reader, g=dead(draw(8, seed=1), 2), w3=dead(draw(6, 3), 3), **more)
    small, _ = shrunk_with_plan(model, Alignment(multiple))
    check_same(model, small, x=X)


def test_half_precision() -> None:
    model = normed("y = MatMul(n, w2)")
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    result = onnxshrink.shrink(half, align="none")
    assert (shapes(result.model)["w1"], shapes(result.model)["w2"]) == ((5, 5), (6, 3))


def test_a_plan_on_paper_does_the_same() -> None:
    model = normed("f = Reshape(n, flat) y = Gemm(f, w2, b)", text=TEXT.replace("float[N, T, 3] y", "float[M, 3] y"),
                   flat=np.array([-1, 8]), b=draw(3))  # fmt: skip
    plan = onnxshrink.ShrinkPlan.from_json(onnxshrink.make_plan(model, align="none").to_json())
    assert onnxshrink.apply_plan(model, plan).model == onnxshrink.shrink(model, align="none").model

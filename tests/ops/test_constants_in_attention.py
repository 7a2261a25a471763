"""Constants in front of a softmax: keys that agree shift all scores alike, values that agree come out as they went in.

Attention is written out here, as exporters write it, with all that may stand between scores and softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, run, shapes, shrunk

Array = np.ndarray[Any, Any]
TOKENS, WIDTH, SIZE = 5, 6, 4
GONE = (1, 3)
LEFT = SIZE - len(GONE)
LOWEST = np.finfo(np.float32).min
CAUSAL = np.triu(np.full((TOKENS, TOKENS), -np.inf, np.float32), 1)
MASKED_ROW = np.where(np.arange(TOKENS)[:, None] == 2, -np.inf, CAUSAL).astype(np.float32)


def attention(steps: str, kind: str = "float", outputs: str = "", inputs: str = "", **extra: Array) -> onnx.ModelProto:
    """Query, key and value with biases; `steps` lead from the scores `s` to the weights `p`."""
    dtype = {"float": np.float32, "float16": np.float16}[kind]
    given = {name: draw(WIDTH, SIZE, seed=seed, dtype=dtype) for seed, name in enumerate(("wq", "wk", "wv"))}
    given |= {name: draw(SIZE, seed=seed, dtype=dtype) for seed, name in enumerate(("bq", "bk", "bv"))}
    given["wo"] = draw(SIZE, WIDTH, seed=5, dtype=dtype)
    return build(
        f"""g ({kind}[{TOKENS}, {WIDTH}] x{inputs}) => ({kind}[{TOKENS}, {WIDTH}] y{outputs}) {{
            q0 = MatMul(x, wq) q = Add(q0, bq) k0 = MatMul(x, wk) k = Add(k0, bk) v0 = MatMul(x, wv) v = Add(v0, bv)
            kt = Transpose<perm = [1, 0]>(k) s = MatMul(q, kt) {steps} a = MatMul(p, v) y = MatMul(a, wo) }}""",
        opset=20,
        ir=10,
        **given | extra,
    )


def without(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The model with dead columns in some weights; the biases behind them stay."""
    for tensor in model.graph.initializer:
        if tensor.name in names:
            values = dead(onnx.numpy_helper.to_array(tensor), *GONE, axis=1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model


def feeds(model: onnx.ModelProto) -> dict[str, Array]:
    """Random inputs; conditions are mixed."""
    result = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        drawn = draw(*shape, seed=9)
        result[value.name] = drawn > 0 if dtype == np.bool_ else drawn.astype(dtype)
    return result


# --- keys -------------------------------------------------------------------------------------------------------

SHIFTED_ALIKE = {
    "nothing": ("p = Softmax(s)", {}),
    "a scale": ("z = Mul(s, c) p = Softmax(z)", {"c": np.float32(0.3)}),
    "a divisor": ("z = Div(s, c) p = Softmax(z)", {"c": np.float32(3.0)}),
    "a scale in front": ("z = Mul(c, s) p = Softmax(z)", {"c": np.float32(0.3)}),
    "a scale per query": ("z = Mul(s, c) p = Softmax(z)", {"c": draw(TOKENS, 1)}),
    "scales that are all the same": ("z = Mul(s, c) p = Softmax(z)", {"c": np.full(TOKENS, 0.3, np.float32)}),
    "a position bias": ("z = Add(s, c) p = Softmax(z)", {"c": draw(TOKENS, TOKENS)}),
    "a mask": ("z = Add(s, c) p = Softmax(z)", {"c": CAUSAL}),
    "a mask taken away": ("z = Sub(s, c) p = Softmax(z)", {"c": draw(TOKENS, TOKENS)}),
    "the scores taken away": ("z = Sub(c, s) p = Softmax(z)", {"c": draw(TOKENS, TOKENS)}),
    "masked by minus infinity": (
        "z = Where(w, s, c) p = Softmax(z)",
        {"c": np.float32(-np.inf), "w": np.isfinite(CAUSAL)},
    ),
    "masked by the lowest number": (
        "z = Where(w, c, s) p = Softmax(z)",
        {"c": np.float32(LOWEST), "w": ~np.isfinite(CAUSAL)},
    ),
    "queries chosen whole": (
        "z = Where(w, s, c) p = Softmax(z)",
        {"c": np.float32(0.7), "w": np.arange(TOKENS)[:, None] > 1},
    ),
    "another shape": (
        "z = Reshape(s, c) u = Softmax(z) p = Reshape(u, d)",
        {"c": np.array([1, TOKENS, TOKENS]), "d": np.array([TOKENS, TOKENS])},
    ),
    "turned": ("z = Transpose<perm = [1, 0]>(s) u = Softmax<axis = 0>(z) p = Transpose<perm = [1, 0]>(u)", {}),
    "another type": ("z = Cast<to = 11>(s) u = Softmax(z) p = Cast<to = 1>(u)", {}),
    "logarithms": ("p = LogSoftmax(s)", {}),
    "all of it": ("z = Mul(s, c) b = Add(z, d) e = Add(b, f) p = Softmax(e)",
                  {"c": np.float32(0.5), "d": draw(TOKENS, TOKENS), "f": CAUSAL}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIFTED_ALIKE)
def test_keys_that_agree_leave_with_the_queries_that_they_meet(name: str) -> None:
    steps, extra = SHIFTED_ALIKE[name]
    before = without(attention(steps, **extra), "wk")
    small = shrunk(before)
    assert {n: s for n, s in shapes(small).items() if n.startswith("w") and n != "w"} == {
        "wq": (WIDTH, LEFT), "wk": (WIDTH, LEFT), "wv": (WIDTH, SIZE), "wo": (SIZE, WIDTH)
    }  # fmt: skip
    check_same(before, small, **feeds(before))


def test_computed_masks_and_scales_per_query_let_them_leave_too() -> None:
    steps = "z = Mul(s, t) b = Add(z, m) e = Where(w, b, c) p = Softmax(e)"
    inputs = f", float[{TOKENS}, 1] t, float[{TOKENS}, {TOKENS}] m, bool[{TOKENS}, {TOKENS}] w"
    before = without(attention(steps, inputs=inputs, c=np.float32(-np.inf)), "wk")
    small = shrunk(before)
    assert shapes(small)["wq"] == shapes(small)["wk"] == (WIDTH, LEFT)
    given = feeds(before)
    given["w"][:, 0] = True
    check_same(before, small, **given)


SEEN = {
    "a scale per key": ("z = Mul(s, c) p = Softmax(z)", {"c": draw(TOKENS)}),
    "a divisor per key": ("z = Div(s, c) p = Softmax(z)", {"c": draw(TOKENS)}),
    "scores that divide": ("z = Div(c, s) p = Softmax(z)", {"c": np.float32(0.1)}),
    "scores times themselves": ("z = Mul(s, s) p = Softmax(z)", {}),
    "masked by a number": ("z = Where(w, s, c) p = Softmax(z)", {"c": np.float32(-1e4), "w": np.isfinite(CAUSAL)}),
    "masked by numbers": ("z = Where(w, s, c) p = Softmax(z)",
                          {"c": np.where(CAUSAL < -1, -np.inf, -9).astype(np.float32), "w": np.eye(TOKENS) > 0}),
    "a curve": ("z = Tanh(s) p = Softmax(z)", {}),
    "a sigmoid": ("p = Sigmoid(s)", {}),
    "the other axis": ("p = Softmax<axis = 0>(s)", {}),
    "both axes": ("z = Reshape(s, c) u = Softmax(z) p = Reshape(u, d)",
                  {"c": np.array([TOKENS * TOKENS]), "d": np.array([TOKENS, TOKENS])}),
    "a second reader": ("u = Softmax(s) p = Add(u, s)", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_keys_that_agree_stay_where_the_shift_is_seen(name: str) -> None:
    steps, extra = SEEN[name]
    before = without(attention(steps, **extra), "wk")
    small = shrunk(before)
    assert shapes(small)["wq"] == (WIDTH, SIZE)
    check_same(before, small, **feeds(before))


def test_keys_that_agree_stay_where_the_scores_are_an_output() -> None:
    before = without(attention("p = Softmax(s)", outputs=f", float[{TOKENS}, {TOKENS}] s"), "wk")
    assert shapes(shrunk(before))["wq"] == (WIDTH, SIZE)


def test_the_lowest_number_of_float16_is_within_reach_of_scores() -> None:
    lowest = np.finfo(np.float16).min
    steps, extra = "z = Where(w, s, c) p = Softmax(z)", {"w": np.isfinite(CAUSAL)}
    before = without(attention(steps, "float16", c=np.float16(lowest), **extra), "wk")
    assert shapes(shrunk(before))["wq"] == (WIDTH, SIZE)
    infinite = without(attention(steps, "float16", c=np.float16(-np.inf), **extra), "wk")
    assert shapes(shrunk(infinite))["wq"] == (WIDTH, LEFT)


def test_queries_that_agree_stay() -> None:
    """They weigh the keys, one against the other."""
    before = without(attention("p = Softmax(s)"), "wq")
    small = shrunk(before)
    assert shapes(small)["wk"] == (WIDTH, SIZE)
    check_same(before, small, **feeds(before))


def test_queries_and_keys_of_one_and_the_same_dimension_that_agree() -> None:
    before = without(attention("p = Softmax(s)"), "wq", "wk")
    small = shrunk(before)
    assert shapes(small)["wk"] == shapes(small)["wq"] == (WIDTH, LEFT)
    check_same(before, small, **feeds(before))


# --- values -----------------------------------------------------------------------------------------------------

GUARD = "u = Softmax(z) n = IsNaN(u) p = Where(n, o, u)"
NOTHING = np.float32(0)
MEANS = {
    "weights as they are": ("p = Softmax(s)", {}),
    "another type": ("z = Cast<to = 11>(s) u = Softmax(z) p = Cast<to = 1>(u)", {}),
    "another shape": ("u = Softmax(s) t = Reshape(u, c) p = Reshape(t, d)",
                      {"c": np.array([1, TOKENS, 1, TOKENS]), "d": np.array([TOKENS, TOKENS])}),
    "turned twice": ("t = Transpose<perm = [1, 0]>(s) u = Softmax<axis = 0>(t) p = Transpose<perm = [1, 0]>(u)", {}),
    "guarded": (f"z = Identity(s) {GUARD}", {"o": NOTHING}),
    "guarded behind a position bias": (f"z = Add(s, c) {GUARD}", {"c": draw(TOKENS, TOKENS), "o": NOTHING}),
    "guarded behind a mask": (f"z = Add(s, c) {GUARD}", {"c": CAUSAL, "o": NOTHING}),
    "guarded behind a choice": (f"z = Where(w, s, c) {GUARD}",
                                {"c": np.float32(-np.inf), "w": np.isfinite(CAUSAL), "o": NOTHING}),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANS)
def test_values_that_agree_leave_with_what_reads_them(name: str) -> None:
    steps, extra = MEANS[name]
    before = without(attention(steps, **extra), "wv")
    small = shrunk(before)
    left = shapes(small)
    assert (left["wq"], left["wv"], left["wo"]) == ((WIDTH, SIZE), (WIDTH, LEFT), (LEFT, WIDTH))
    assert "IsNaN" not in operators(small)
    check_same(before, small, **feeds(before))


NO_MEANS = {
    "a sigmoid": ("p = Sigmoid(s)", {}),
    "scaled weights": ("u = Softmax(s) p = Mul(u, c)", {"c": np.float32(1.2)}),
    "weights along the other axis": ("p = Softmax<axis = 0>(s)", {}),
    "weights left out": ("u = Softmax(s) p = Where(w, u, o)", {"w": np.isfinite(CAUSAL), "o": NOTHING}),
    "a query that is masked altogether": (f"z = Add(s, c) {GUARD}", {"c": MASKED_ROW, "o": NOTHING}),
    "a query that is masked by a choice": (f"z = Where(w, s, c) {GUARD}",
                                           {"c": np.float32(-np.inf), "w": np.isfinite(MASKED_ROW), "o": NOTHING}),
    "infinities of the other sign": (f"m = Neg(c) z = Sub(s, m) {GUARD}", {"c": MASKED_ROW, "o": NOTHING}),
    "a mask that is padded": (f"m = Pad(c, e, f) z = Add(s, m) {GUARD}",
                              {"c": draw(TOKENS - 1, TOKENS), "e": np.array([1, 0, 0, 0]),
                               "f": np.float32(-np.inf), "o": NOTHING}),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_MEANS)
def test_values_that_agree_stay_where_weights_may_not_sum_to_one(name: str) -> None:
    steps, extra = NO_MEANS[name]
    before = without(attention(steps, **extra), "wv")
    small = shrunk(before)
    assert shapes(small)["wo"] == (SIZE, WIDTH)
    check_same(before, small, **feeds(before))


@pytest.mark.parametrize(
    "steps",
    [
        "z = Add(s, m)",
        "z = Where(w, s, c)",
        "j = Where(w, o, c) z = Add(s, j)",
        "i = Cast<to = 1>(w) j = Log(i) z = Add(s, j)",
    ],
)
def test_a_guard_stays_where_inputs_may_mask_a_query_altogether(steps: str) -> None:
    inputs = f", float[{TOKENS}, {TOKENS}] m, bool[{TOKENS}, {TOKENS}] w"
    before = without(attention(f"{steps} {GUARD}", inputs=inputs, c=np.float32(-np.inf), o=NOTHING), "wv")
    masked = {**feeds(before), "w": np.isfinite(MASKED_ROW), "m": MASKED_ROW}
    small = shrunk(before)
    assert "IsNaN" in operators(small)
    assert shapes(small)["wo"] == (SIZE, WIDTH)
    check_same(before, small, **masked)


def test_a_guard_against_inputs_stays() -> None:
    model = build("g (float[3] x) => (float[3] y) { n = IsNaN(x) z = Where(n, o, x) y = Relu(z) }", opset=20, ir=10,
                  o=np.float32(7))  # fmt: skip
    small = shrunk(model)
    given = np.array([1, np.nan, -2], np.float32)
    np.testing.assert_array_equal(run(small, x=given)[0], [1, 7, 0])


def test_a_head_whose_values_agree_leaves_with_its_queries_and_keys() -> None:
    """Two heads, as exporters split them; the values of the first are their bias, and so is what it puts out."""
    split = " ".join(f"{n}4 = Reshape({n}b, split) {n} = Transpose<perm = [0, 2, {o}]>({n}4)"
                     for n, o in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3")))  # fmt: skip
    given = {f"w{n}": draw(8, 8, seed=i) for i, n in enumerate("qkv")} | {f"b{n}": draw(8, seed=3) for n in "qkv"}
    given["wv"][:, :4] = 0
    before = build(
        f"""g (float[2, 5, 8] x) => (float[2, 5, 8] y) {{
            {" ".join(f"{n}0 = MatMul(x, w{n}) {n}b = Add({n}0, b{n})" for n in "qkv")} {split}
            s = MatMul(q, k) z = Mul(s, scale) u = Softmax(z) n = IsNaN(u) p = Where(n, zero, u) a = MatMul(p, v)
            t = Transpose<perm = [0, 2, 1, 3]>(a) r = Reshape(t, joined) o = MatMul(r, wo) y = Add(o, bo) }}""",
        opset=20,
        ir=10,
        split=np.array([2, 5, 2, 4]),
        joined=np.array([2, 5, 8]),
        scale=np.float32(0.5),
        zero=NOTHING,
        wo=draw(8, 8, seed=4),
        bo=draw(8, seed=5),
        **given,
    )
    small = shrunk(before)
    left = shapes(small)
    assert [left[name] for name in ("wq", "wk", "wv", "wo", "bo")] == [(8, 4)] * 3 + [(4, 8), (8,)]
    check_same(before, small, x=draw(2, 5, 8))

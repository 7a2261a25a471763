"""com.microsoft attention: separate, packed and grouped heads, fused projections; what leaves and what keeps it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attention_heads import HEADS, SIZE, TOKENS, WIDTH, Array, attributes, dimensions, heads, sizes, weights
from models import build, check_same, draw, shapes, shrunk, weight

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph


def reasons(model: onnx.ModelProto) -> list[str]:
    return [refusal.reason for refusal in analyse(Graph(model)).refusals]


# --- MultiHeadAttention -----------------------------------------------------------------------------------------


def multi_head(given: dict[str, Array], extra: str = "", inputs: str = "", attrs: str = "") -> onnx.ModelProto:
    return build(
        f"""g (float[B, S, {WIDTH}] x{inputs}) => (float[B, S, {WIDTH}] y) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            a = com.microsoft.MultiHeadAttention<num_heads: int = {HEADS}{attrs}>(q, k, v{extra})
            y = MatMul(a, wo) }}""",
        **given,
    )


@pytest.mark.parametrize("side", ["value rows", "output columns"])
def test_dead_heads_leave(side: str) -> None:
    given = weights()
    if side == "value rows":
        given["wv"] = heads(given["wv"], 0, 2)
    else:
        given["wo"] = heads(given["wo"].T, 0, 2).T
    before = multi_head(given)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 2 * SIZE)] * 3 + [(2 * SIZE, WIDTH)]
    assert attributes(small, "MultiHeadAttention") == {"num_heads": 2}
    check_same(before, small, x=TOKENS)


def test_the_bias_of_the_projections_is_cut_in_three_places() -> None:
    given = weights(value_size=6)
    given["wv"] = heads(given["wv"], 1)
    given["wq"] = dimensions(given["wq"], 3)
    parts = draw(HEADS * SIZE, seed=5), draw(HEADS * SIZE, seed=6), draw(HEADS * 6, seed=7)
    parts = dimensions(parts[0], 3), parts[1], heads(parts[2], 1)
    before = multi_head({**given, "b": np.concatenate(parts)}, extra=", b")
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 3 * 7)] * 2 + [(WIDTH, 3 * 6), (3 * 6, WIDTH)]
    query, key, value = (part.reshape(HEADS, -1)[[0, 2, 3]] for part in parts)
    expected = [np.delete(query, 3, axis=1), np.delete(key, 3, axis=1), value]
    np.testing.assert_array_equal(weight(small, "b"), np.concatenate([part.reshape(-1) for part in expected]))
    assert attributes(small, "MultiHeadAttention")["scale"] == np.float32(1 / np.sqrt(SIZE))
    check_same(before, small, x=TOKENS)


def test_a_head_of_constant_values_leaves_with_a_bias_behind_and_any_padding() -> None:
    """Padding is filled with a finite number: rows of probabilities always sum to one."""
    given = weights()
    given["wv"] = heads(given["wv"], 1)
    bias = draw(3 * HEADS * SIZE, seed=5)
    before = multi_head({**given, "b": bias}, extra=", b, m", inputs=", int32[B, S] m")
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 3 * SIZE)] * 3 + [(3 * SIZE, WIDTH)]
    (added,) = set(shapes(small)) - {"wq", "wk", "wv", "wo", "b"}
    block = slice(SIZE, 2 * SIZE)
    np.testing.assert_allclose(weight(small, added), bias[2 * HEADS * SIZE :][block] @ given["wo"][block], rtol=1e-5)
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    check_same(before, small, x=TOKENS, m=mask)


def test_a_key_bias_alone_matters_to_nothing() -> None:
    given = weights()
    given["wk"] = dimensions(given["wk"], 0, 1)
    before = multi_head({**given, "b": draw(3 * HEADS * SIZE, seed=5)}, extra=", b")
    small = shrunk(before)
    assert sizes(small)[:2] == [(WIDTH, HEADS * 6)] * 2
    check_same(before, small, x=TOKENS)


def test_a_constant_bias_of_the_scores_is_cut_by_head() -> None:
    given = weights()
    given["wo"] = heads(given["wo"].T, 0, 3).T
    table = draw(1, HEADS, 5, 5)
    before = multi_head({**given, "t": table}, extra=", , , t")
    small = shrunk(before)
    np.testing.assert_array_equal(weight(small, "t"), table[:, [1, 2]])
    check_same(before, small, x=TOKENS)


def test_caches_that_are_interface_stay_whole() -> None:
    given = weights()
    given["wo"] = heads(given["wo"].T, 0).T
    cache = f"float[B, {HEADS}, P, {SIZE}]"
    before = build(
        f"""g (float[B, S, {WIDTH}] x, {cache} pk, {cache} pv)
            => (float[B, S, {WIDTH}] y, {cache.replace("P", "T")} nk, {cache.replace("P", "T")} nv) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            a, nk, nv = com.microsoft.MultiHeadAttention<num_heads: int = {HEADS}>(q, k, v, , , , pk, pv)
            y = MatMul(a, wo) }}""",
        **given,
    )
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, HEADS * SIZE)] * 3 + [(HEADS * SIZE, WIDTH)]
    check_same(before, small, x=TOKENS, pk=draw(2, HEADS, 3, SIZE), pv=draw(2, HEADS, 3, SIZE, seed=1))


def packed(matrix: Array, out: Array) -> onnx.ModelProto:
    return build(
        f"""g (float[2, 5, {WIDTH}] x) => (float[2, 5, {WIDTH}] y) {{
            m = MatMul(x, w) r = Reshape(m, five)
            a = com.microsoft.MultiHeadAttention<num_heads: int = {HEADS}>(r) y = MatMul(a, wo) }}""",
        w=matrix,
        wo=out,
        five=np.array([2, 5, HEADS, 3, SIZE]),
    )


def test_packed_heads_leave_whole() -> None:
    matrix = draw(WIDTH, HEADS, 3, SIZE)
    matrix[:, 1, 2] = 0
    out = heads(draw(HEADS * SIZE, WIDTH).T, 3).T
    before = packed(matrix.reshape(WIDTH, -1), out)
    # onnxruntime's CPU kernel takes no packed projections: the result is compared as a graph.
    small = shrunk(before)
    assert shapes(small)["w"] == (WIDTH, 2 * 3 * SIZE)
    assert shapes(small)["wo"] == (2 * SIZE, WIDTH)
    np.testing.assert_array_equal(weight(small, "w"), matrix[:, [0, 2]].reshape(WIDTH, -1))
    assert attributes(small, "MultiHeadAttention") == {"num_heads": 2}


def test_a_computed_bias_is_refused() -> None:
    before = multi_head(weights(), extra=", b", inputs=f", float[{3 * HEADS * SIZE}] b")
    assert reasons(before) == ["the bias of the projections is computed, or keys come split in heads"]


# --- GroupQueryAttention ----------------------------------------------------------------------------------------


def grouped(
    given: dict[str, Array], *, fused: bool = False, cache: bool = False, rotates: bool = False, size: int = SIZE
) -> onnx.ModelProto:
    given = dict(given)
    given["lengths"], given["total"] = np.full(2, 4, np.int32), np.array(5, np.int32)
    if fused:
        given["w"] = np.concatenate([given.pop(name) for name in ("wq", "wk", "wv")], axis=1)
    if rotates:
        turns = np.outer(np.arange(8), 0.5 ** np.arange(size // 2)).astype(np.float32)
        given["cosine"], given["sine"] = np.cos(turns), np.sin(turns)
    projections = "m = MatMul(x, w)" if fused else "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
    operands = f"{'m, , ' if fused else 'q, k, v'}, {'pk, pv' if cache else ', '}, lengths, total"
    past = f"float[2, 2, P, {size}]"
    inputs = f", {past} pk, {past} pv" if cache else ""
    outputs = f", {past.replace('P', 'T')} nk, {past.replace('P', 'T')} nv" if cache else ""
    attrs = f"num_heads: int = {HEADS}, kv_num_heads: int = 2, do_rotary: int = {int(rotates)}"
    return build(
        f"""g (float[2, 5, {WIDTH}] x{inputs}) => (float[2, 5, {WIDTH}] y{outputs}) {{
            {projections}
            a{", nk, nv" if cache else ""} = com.microsoft.GroupQueryAttention<{attrs}>(
                {operands}{", cosine, sine" if rotates else ""})
            y = MatMul(a, wo) }}""",
        **given,
    )


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_heads_leave_by_group(fused: bool, rotates: bool) -> None:
    size = 16 if rotates else SIZE
    given = {
        "wq": draw(WIDTH, HEADS * size),
        "wk": draw(WIDTH, 2 * size),
        "wv": heads(draw(WIDTH, 2 * size), 0, count=2),
        "wo": draw(HEADS * size, WIDTH),
    }
    before = grouped(given, fused=fused, rotates=rotates, size=size)
    small = shrunk(before)
    assert shapes(small)["wo"] == (2 * size, WIDTH)
    expected = [given["wq"][:, 2 * size :], given["wk"][:, size:], given["wv"][:, size:]]
    if fused:
        np.testing.assert_array_equal(weight(small, "w"), np.concatenate(expected, axis=1))
    else:
        for name, array in zip(("wq", "wk", "wv"), expected, strict=True):
            np.testing.assert_array_equal(weight(small, name), array)
    found = attributes(small, "GroupQueryAttention")
    assert (found["num_heads"], found["kv_num_heads"]) == (2, 1)
    assert "scale" not in found
    check_same(before, small, x=TOKENS)


@pytest.mark.parametrize("fused", [False, True])
def test_dimensions_of_a_grouped_head_stay(fused: bool) -> None:
    """onnxruntime takes head sizes that are multiples of eight only."""
    given = weights(groups=2)
    given["wq"], given["wv"] = dimensions(given["wq"], 0), dimensions(given["wv"], 1, count=2)
    before = grouped(given, fused=fused)
    small = shrunk(before)
    assert shapes(small)["wo"] == (HEADS * SIZE, WIDTH)
    check_same(before, small, x=TOKENS)


@pytest.mark.parametrize("fused", [False, True])
def test_grouped_caches_that_are_interface_stay_whole(fused: bool) -> None:
    given = weights(groups=2)
    given["wv"] = heads(given["wv"], 0, count=2)
    before = grouped(given, fused=fused, cache=True)
    small = shrunk(before)
    assert shapes(small)["wo"] == (HEADS * SIZE, WIDTH)
    assert attributes(small, "GroupQueryAttention")["num_heads"] == HEADS
    empty = np.zeros((2, 2, 0, SIZE), np.float32)
    check_same(before, small, x=TOKENS, pk=empty, pv=empty)


# --- Attention: fused projections -------------------------------------------------------------------------------


class Fused:
    """Weights and bias of a fused attention, in parts."""

    def __init__(self, value_size: int = SIZE) -> None:
        self.widths = [HEADS * SIZE, HEADS * SIZE, HEADS * value_size]
        self.parts = [draw(WIDTH, width, seed=n) for n, width in enumerate(self.widths)]
        self.biases = [draw(width, seed=n + 5) for n, width in enumerate(self.widths)]
        self.out = draw(self.widths[2], WIDTH, seed=9)

    def model(self, *, bias: bool = True, extra: str = "", inputs: str = "", dead: bool = False) -> onnx.ModelProto:
        given = {"w": np.concatenate(self.parts, axis=1), "wo": self.out}
        if bias:
            given["b"] = np.concatenate(self.biases)
        given["wi"], given["bi"] = draw(WIDTH, WIDTH), draw(WIDTH, seed=2)
        if dead:
            given["wi"][:, [1, 4]] = 0
        attrs = f"num_heads: int = {HEADS}"
        if self.widths[2] != self.widths[0]:
            attrs += f", qkv_hidden_sizes: ints = {self.widths}"
        return build(
            f"""g (float[B, S, {WIDTH}] x{inputs}) => (float[B, S, {WIDTH}] y) {{
                i0 = MatMul(x, wi) i = Add(i0, bi)
                a = com.microsoft.Attention<{attrs}>(i, w, {"b" if bias else ""}{extra}) y = MatMul(a, wo) }}""",
            **given,
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", ["value rows", "output columns"])
def test_heads_leave_fused_projections(side: str, bias: bool) -> None:
    fused = Fused()
    if side == "value rows":
        fused.parts[2], fused.biases[2] = heads(fused.parts[2], 0, 2), heads(fused.biases[2], 0, 2)
    else:
        fused.out = heads(fused.out.T, 0, 2).T
    before = fused.model(bias=bias)
    small = shrunk(before)
    assert shapes(small)["wo"] == (2 * SIZE, WIDTH)
    blocks = [part.reshape(WIDTH, HEADS, SIZE)[:, [1, 3]].reshape(WIDTH, -1) for part in fused.parts]
    np.testing.assert_array_equal(weight(small, "w"), np.concatenate(blocks, axis=1))
    if bias:
        blocks = [part.reshape(HEADS, SIZE)[[1, 3]].reshape(-1) for part in fused.biases]
        np.testing.assert_array_equal(weight(small, "b"), np.concatenate(blocks))
    assert attributes(small, "Attention") == {"num_heads": 2}
    check_same(before, small, x=TOKENS)


def test_dimensions_leave_fused_projections() -> None:
    fused = Fused()
    fused.parts[0], fused.biases[0] = dimensions(fused.parts[0], 0), dimensions(fused.biases[0], 0)
    fused.parts[1] = dimensions(fused.parts[1], 3, 4)
    fused.parts[2], fused.biases[2] = dimensions(fused.parts[2], 7), dimensions(fused.biases[2], 7)
    before = fused.model()
    small = shrunk(before)
    assert shapes(small)["w"] == (WIDTH, HEADS * (5 + 5 + 7))
    assert attributes(small, "Attention") == {
        "num_heads": HEADS,
        "qkv_hidden_sizes": [HEADS * 5, HEADS * 5, HEADS * 7],
        "scale": np.float32(1 / np.sqrt(SIZE)),
    }
    check_same(before, small, x=TOKENS)


def test_value_heads_of_another_size() -> None:
    fused = Fused(value_size=6)
    fused.parts[2], fused.biases[2] = heads(fused.parts[2], 1), heads(fused.biases[2], 1)
    before = fused.model()
    small = shrunk(before)
    assert attributes(small, "Attention")["qkv_hidden_sizes"] == [3 * SIZE, 3 * SIZE, 3 * 6]
    check_same(before, small, x=TOKENS)


def test_constant_value_heads_are_folded_behind_whatever_the_mask() -> None:
    fused = Fused()
    fused.parts[2] = heads(fused.parts[2], 1)
    before = fused.model(extra=", m", inputs=", int32[B, S] m")
    small = shrunk(before)
    assert shapes(small)["w"] == (WIDTH, 3 * 3 * SIZE)
    check_same(before, small, x=TOKENS, m=np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32))


@pytest.mark.parametrize("bias", [True, False])
def test_constant_inputs_are_folded_in_the_bias(bias: bool) -> None:
    fused = Fused()
    before = fused.model(bias=bias, dead=True)
    small = shrunk(before)
    assert shapes(small)["w"] == (WIDTH - 2, 3 * HEADS * SIZE)
    assert shapes(small)["wi"] == (WIDTH, WIDTH - 2)
    (node,) = [node for node in small.graph.node if node.op_type == "Attention"]
    matrix, constant = np.concatenate(fused.parts, axis=1), draw(WIDTH, seed=2)
    expected = matrix[[1, 4]].T @ constant[[1, 4]] + (np.concatenate(fused.biases) if bias else 0)
    np.testing.assert_allclose(weight(small, node.input[2]), expected, rtol=1e-5)
    check_same(before, small, x=TOKENS)


def test_a_fused_attention_that_hands_on_its_keys_is_refused() -> None:
    given = {"w": draw(WIDTH, 3 * HEADS * SIZE), "b": draw(3 * HEADS * SIZE)}
    past = f"float[2, B, {HEADS}, P, {SIZE}]"
    before = build(
        f"""g (float[B, S, {WIDTH}] x, {past} p)
            => (float[B, S, {HEADS * SIZE}] y, {past.replace("P", "T")} n) {{
            y, n = com.microsoft.Attention<num_heads: int = {HEADS}>(x, w, b, , p) }}""",
        **given,
    )
    assert reasons(before) == ["keys and values are handed on"]
    small = shrunk(before)
    assert shapes(small) == {name: value.shape for name, value in given.items()}
    check_same(before, small, x=TOKENS, p=draw(2, 2, HEADS, 3, SIZE))

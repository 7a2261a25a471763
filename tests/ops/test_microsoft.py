"""com.microsoft activations, normalisations and products."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, run, shapes, shrunk, weight

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph

Array = np.ndarray[Any, Any]
WIDTH, HIDDEN = 6, 16
TOKENS = draw(2, 5, WIDTH, seed=3)
SEQUENCE = f"float[B, S, {WIDTH}]"


def attributes(model: onnx.ModelProto, op: str) -> dict[str, Any]:
    (node,) = [node for node in model.graph.node if node.op_type == op]
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


# --- feed-forward widths ----------------------------------------------------------------------------------------

ACTIVATIONS = {
    "Gelu": "com.microsoft.Gelu(a)",
    "QuickGelu": "com.microsoft.QuickGelu<alpha: float = 1.3>(a)",
    "FastGelu": "com.microsoft.FastGelu(a)",
    "FastGelu with bias": "com.microsoft.FastGelu(a, b1)",
    "BiasGelu": "com.microsoft.BiasGelu(a, b1)",
}


def feed_forward(activation: str, given: dict[str, Array]) -> onnx.ModelProto:
    text = ACTIVATIONS[activation]
    given = {name: value for name, value in given.items() if name != "b1" or "b1" in text}
    return build(
        f"g ({SEQUENCE} x) => ({SEQUENCE} y) {{ a = MatMul(x, w1) h = {text} z = MatMul(h, w2) y = Add(z, b2) }}",
        **given,
    )


def feed_forward_weights() -> dict[str, Array]:
    return {
        "w1": dead(draw(WIDTH, HIDDEN), 1, 4, 9, axis=1),
        "b1": dead(draw(HIDDEN), 1, 4, 9),
        "w2": dead(draw(HIDDEN, WIDTH), 0, 1),
        "b2": draw(WIDTH, seed=2),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dead_units_leave_through_an_activation(activation: str) -> None:
    """Rows 1, 4, 9 give nothing, column 0 is not read."""
    before = feed_forward(activation, feed_forward_weights())
    small = shrunk(before)
    left = HIDDEN - 4
    found = shapes(small)
    assert (found["w1"], found["w2"]) == ((WIDTH, left), (left, WIDTH))
    assert found.get("b1", (left,)) == (left,)
    check_same(before, small, x=TOKENS)


@pytest.mark.parametrize("activation", ["FastGelu with bias", "BiasGelu"])
def test_a_unit_of_bias_alone_is_folded_in_the_next_bias(activation: str) -> None:
    given = feed_forward_weights()
    given["b1"] = draw(HIDDEN)
    before = feed_forward(activation, given)
    small = shrunk(before)
    assert shapes(small)["w1"] == (WIDTH, HIDDEN - 4)
    assert shapes(small)["b2"] == (WIDTH,)
    assert not np.array_equal(weight(small, "b2"), given["b2"])
    check_same(before, small, x=TOKENS)


# --- Skip norms -------------------------------------------------------------------------------------------------


def skip(op: str, *, hands_on: bool, statistics: bool = False, **given: Array) -> onnx.ModelProto:
    """Two writers of a residual stream, the norm of their sum, a reader of it, and one of the sum."""
    beta = "beta, " if op == "SkipLayerNormalization" else ""
    operands = f"a, b, gamma, {beta}{'bias' if 'bias' in given else ''}"
    outputs = f"n, {'m, i' if statistics else ', '}, s" if hands_on else "n"
    given = {
        "w1": draw(WIDTH, HIDDEN),
        "w2": draw(WIDTH, HIDDEN, seed=1),
        "gamma": draw(HIDDEN),
        "w3": draw(HIDDEN, WIDTH),
        **given,
    }
    if beta:
        given["beta"] = draw(HIDDEN, seed=5)
    reader = "s0 = MatMul(s, w4) y = Add(y0, s0)" if hands_on else "y = Identity(y0)"
    if hands_on:
        given["w4"] = draw(HIDDEN, WIDTH, seed=4)
    extra = ", float[B, S, 1] i" if statistics else ""
    return build(
        f"""g ({SEQUENCE} x) => ({SEQUENCE} y{extra}) {{ a = MatMul(x, w1) b = MatMul(x, w2)
            {outputs} = com.microsoft.{op}<epsilon: float = 0.001>({operands})
            y0 = MatMul(n, w3) {reader} }}""",
        **given,
    )


@pytest.mark.parametrize("hands_on", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_channels_that_no_writer_writes_leave_a_root_mean_square(bias: bool, hands_on: bool) -> None:
    given = {"w1": dead(draw(WIDTH, HIDDEN), 1, 2, 3, axis=1), "w2": dead(draw(WIDTH, HIDDEN, seed=1), 2, 3, 4, axis=1)}
    if bias:
        given["bias"] = dead(draw(HIDDEN, seed=6), 2, 3)
    before = skip("SkipSimplifiedLayerNormalization", hands_on=hands_on, **given)
    small = shrunk(before)
    left = HIDDEN - 2
    found = shapes(small)
    assert (found["w1"], found["w2"], found["w3"]) == ((WIDTH, left), (WIDTH, left), (left, WIDTH))
    ratio = HIDDEN / left
    expected = np.delete(weight(before, "gamma"), [2, 3]) * np.sqrt(ratio)
    np.testing.assert_allclose(weight(small, "gamma"), expected, rtol=1e-6)
    found_attributes = attributes(small, "SkipSimplifiedLayerNormalization")
    np.testing.assert_allclose(found_attributes["epsilon"], 0.001 * ratio, rtol=1e-6)
    check_same(before, small, x=TOKENS)


def test_a_bias_keeps_a_channel_in_a_root_mean_square() -> None:
    given = {"w1": dead(draw(WIDTH, HIDDEN), 2, axis=1), "w2": dead(draw(WIDTH, HIDDEN, seed=1), 2, axis=1)}
    before = skip("SkipSimplifiedLayerNormalization", hands_on=True, **given, bias=draw(HIDDEN, seed=6))
    small = shrunk(before)
    assert shapes(small)["w3"] == (HIDDEN, WIDTH)
    check_same(before, small, x=TOKENS)


def test_statistics_that_are_handed_out_keep_the_axis_whole() -> None:
    given = {"w1": dead(draw(WIDTH, HIDDEN), 2, axis=1), "w2": dead(draw(WIDTH, HIDDEN, seed=1), 2, axis=1)}
    before = skip("SkipSimplifiedLayerNormalization", hands_on=True, statistics=True, **given)
    assert shapes(shrunk(before))["w3"] == (HIDDEN, WIDTH)


@pytest.mark.parametrize("bias", [True, False])
def test_a_mean_keeps_its_axis_whole(bias: bool) -> None:
    given = {"w1": dead(draw(WIDTH, HIDDEN), 1, 2, axis=1), "w2": dead(draw(WIDTH, HIDDEN, seed=1), 2, axis=1)}
    if bias:
        given["bias"] = dead(draw(HIDDEN, seed=6), 2)
    before = skip("SkipLayerNormalization", hands_on=True, **given)
    small = shrunk(before)
    assert shapes(small) == shapes(before)
    check_same(before, small, x=TOKENS)


def test_the_sum_alone_passes_channels_through() -> None:
    """Nothing reads the norm: what is left is an addition."""
    before = build(
        f"""g ({SEQUENCE} x) => ({SEQUENCE} y) {{ a = MatMul(x, w1) b = MatMul(x, w2)
            n, , , s = com.microsoft.SkipSimplifiedLayerNormalization(a, b, gamma) y = MatMul(s, w4) }}""",
        w1=dead(draw(WIDTH, HIDDEN), 1, 2, axis=1),
        w2=dead(draw(WIDTH, HIDDEN, seed=1), 2, axis=1),
        gamma=draw(HIDDEN),
        w4=dead(draw(HIDDEN, WIDTH), 5, 6),
    )
    small = shrunk(before)
    assert shapes(small)["w4"] == (HIDDEN - 3, WIDTH)
    check_same(before, small, x=TOKENS)


def test_a_skip_that_is_broadcast_over_the_batch() -> None:
    before = build(
        f"""g (float[2, 5, {WIDTH}] x) => (float[2, 5, {WIDTH}] y) {{ a = MatMul(x, w1)
            n = com.microsoft.SkipSimplifiedLayerNormalization(a, table, gamma) y = MatMul(n, w3) }}""",
        w1=dead(draw(WIDTH, HIDDEN), 1, 2, axis=1),
        table=dead(draw(2, 5, HIDDEN), 2, 3, axis=2),
        gamma=draw(HIDDEN),
        w3=draw(HIDDEN, WIDTH),
    )
    small = shrunk(before)
    assert shapes(small)["table"] == (2, 5, HIDDEN - 1)
    check_same(before, small, x=TOKENS)


def test_a_simplified_norm_stands_in_the_default_domain() -> None:
    """onnx's checker does not know it; onnxruntime does."""
    before = build(
        f"""g ({SEQUENCE} x) => ({SEQUENCE} y) {{ a = MatMul(x, w1)
            n = SimplifiedLayerNormalization<axis: int = -1, epsilon: float = 0.001>(a, gamma)
            y = MatMul(n, w3) }}""",
        w1=dead(draw(WIDTH, HIDDEN), 1, 2, axis=1),
        gamma=draw(HIDDEN),
        w3=draw(HIDDEN, WIDTH),
    )
    small = shrunk(before)
    assert shapes(small)["w3"] == (HIDDEN - 2, WIDTH)
    check_same(before, small, x=TOKENS)


# --- EmbedLayerNormalization ------------------------------------------------------------------------------------


def embedding() -> onnx.ModelProto:
    return build(
        f"""g (int32[B, S] ids, int32[B, S] segments, int32[B, S] mask) => ({SEQUENCE} y, int32[B] counts) {{
            e, counts = com.microsoft.EmbedLayerNormalization(ids, segments, words, places, kinds, gamma, beta, mask)
            a = MatMul(e, w1) h = Relu(a) y = MatMul(h, w2) }}""",
        words=draw(20, HIDDEN),
        places=draw(8, HIDDEN),
        kinds=draw(2, HIDDEN),
        gamma=draw(HIDDEN),
        beta=draw(HIDDEN, seed=2),
        w1=dead(draw(HIDDEN, 10), 3, axis=1),
        w2=draw(10, WIDTH),
    )


def test_what_follows_an_embedding_shrinks() -> None:
    before = embedding()
    small = shrunk(before)
    assert shapes(small)["w1"] == (HIDDEN, 9)
    assert shapes(small)["words"] == (20, HIDDEN)
    ids = np.array([[1, 5, 7], [0, 2, 19]], np.int32)
    kinds = np.array([[0, 1, 0], [1, 1, 0]], np.int32)
    check_same(before, small, ids=ids, segments=kinds, mask=np.ones_like(ids))


# --- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_product_with_a_factor_folds_constants_by_that_factor(transposed: int) -> None:
    w2 = draw(HIDDEN, WIDTH)
    before = build(
        f"""g ({SEQUENCE} x) => ({SEQUENCE} y) {{ a = MatMul(x, w1) h = Add(a, b1)
            z = com.microsoft.FusedMatMul<alpha: float = 0.5, transB: int = {transposed}>(h, w2) y = Add(z, b2) }}""",
        w1=dead(draw(WIDTH, HIDDEN), 2, 7, axis=1),
        b1=dead(draw(HIDDEN), 7),
        w2=w2.T.copy() if transposed else w2,
        b2=draw(WIDTH, seed=2),
    )
    small = shrunk(before)
    left = HIDDEN - 2
    assert shapes(small)["w2"] == ((WIDTH, left) if transposed else (left, WIDTH))
    expected = draw(WIDTH, seed=2) + 0.5 * w2[2] * draw(HIDDEN)[2]
    np.testing.assert_allclose(weight(small, "b2"), expected, rtol=1e-5)
    check_same(before, small, x=TOKENS)


def test_a_product_of_two_computed_matrices() -> None:
    """Contracted channels leave where either side is zero."""
    before = build(
        f"""g ({SEQUENCE} x) => (float[B, S, S] y) {{ a = MatMul(x, w1) b = MatMul(x, w2)
            y = com.microsoft.FusedMatMul<alpha: float = 0.25, transB: int = 1>(a, b) }}""",
        w1=dead(draw(WIDTH, HIDDEN), 0, 1, axis=1),
        w2=dead(draw(WIDTH, HIDDEN, seed=1), 1, 2, axis=1),
    )
    small = shrunk(before)
    assert shapes(small) == {"w1": (WIDTH, HIDDEN - 3), "w2": (WIDTH, HIDDEN - 3)}
    check_same(before, small, x=TOKENS)


def test_a_product_with_the_left_side_transposed() -> None:
    before = build(
        f"""g (float[5, {WIDTH}] x) => (float[5, {HIDDEN}] y) {{ t = MatMul(w1, x2) x2 = Transpose(x)
            y = com.microsoft.FusedMatMul<transA: int = 1>(t, w2) }}""".replace(
            "t = MatMul(w1, x2) x2 = Transpose(x)", "x2 = Transpose(x) t = MatMul(w1, x2)"
        ),
        w1=dead(draw(8, WIDTH), 3, 4),
        w2=draw(8, HIDDEN),
    )
    small = shrunk(before)
    assert shapes(small) == {"w1": (6, WIDTH), "w2": (6, HIDDEN)}
    check_same(before, small, x=draw(5, WIDTH))


@pytest.mark.parametrize(
    ("activation", "constant"),
    [
        ('"Relu"', 0.7),
        ('"Tanh"', np.tanh(0.7)),
        ('"LeakyRelu", activation_alpha: float = 0.3', 0.7),
        ('"Sigmoid"', 1 / (1 + np.exp(-0.7))),
    ],
)
def test_a_fused_layer_folds_its_activated_constants(activation: str, constant: float) -> None:
    b1, w2 = draw(HIDDEN), draw(WIDTH, HIDDEN)
    b1[3] = 0.7
    before = build(
        f"""g (float[B, {WIDTH}] x) => (float[B, {WIDTH}] y) {{
            h = com.microsoft.FusedGemm<transB: int = 1, activation: string = {activation}>(x, w1, b1)
            y = Gemm<transB = 1>(h, w2, b2) }}""",
        w1=dead(draw(HIDDEN, WIDTH), 3),
        b1=b1,
        w2=w2,
        b2=draw(WIDTH, seed=2),
    )
    small = shrunk(before)
    assert (shapes(small)["w1"], shapes(small)["w2"]) == ((HIDDEN - 1, WIDTH), (WIDTH, HIDDEN - 1))
    np.testing.assert_allclose(weight(small, "b2"), draw(WIDTH, seed=2) + w2[:, 3] * constant, rtol=1e-5)
    check_same(before, small, x=TOKENS[0])


@pytest.mark.parametrize(
    ("activation", "constant"),
    [
        ('"Relu"', 0.7),
        ('"HardSigmoid", activation_params: floats = [0.2, 0.6]', 0.2 * 0.7 + 0.6),
        ('"Clip", activation_params: floats = [-0.5, 0.5]', 0.5),
    ],
)
def test_a_fused_convolution_folds_its_activated_constants(activation: str, constant: float) -> None:
    b1, w2 = draw(8), draw(2, 8, 3, 3)
    b1[3] = 0.7
    before = build(
        f"""g (float[B, 3, 6, 7] x) => (float[B, 2, 4, 5] y) {{
            h = com.microsoft.FusedConv<pads: ints = [1, 1, 1, 1], activation: string = {activation}>(x, w1, b1)
            y = Conv(h, w2, b2) }}""",
        w1=dead(draw(8, 3, 3, 3), 3),
        b1=b1,
        w2=w2,
        b2=draw(2, seed=2),
    )
    small = shrunk(before)
    assert (shapes(small)["w1"], shapes(small)["w2"]) == ((7, 3, 3, 3), (2, 7, 3, 3))
    np.testing.assert_allclose(weight(small, "b2"), draw(2, seed=2) + w2[:, 3].sum(axis=(1, 2)) * constant, rtol=1e-5)
    check_same(before, small, x=draw(2, 3, 6, 7))


# --- refused ----------------------------------------------------------------------------------------------------


def refused(text: str, **given: Array) -> list[tuple[str, str]]:
    return [(r.op, r.reason) for r in analyse(Graph(build(text, **given))).refusals]


def test_packed_weights_are_refused_and_kept() -> None:
    text = """g (float[2, 32] x) => (float[2, 4] y) {
        a = MatMul(x, w1)
        y = com.microsoft.MatMulNBits<K: int = 32, N: int = 4, bits: int = 4, block_size: int = 32>(a, q, s) }"""
    given = {
        "w1": dead(draw(32, 32), 5, axis=1),
        "q": np.random.default_rng(0).integers(0, 255, (4, 1, 16), np.uint8),
        "s": draw(4, 1),
    }
    assert refused(text, **given) == [("MatMulNBits", "its weights are packed in blocks of a few bits")]
    before = build(text, **given)
    small = shrunk(before)
    assert shapes(small)["w1"] == (32, 32)
    check_same(before, small, x=draw(2, 32))


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("com.microsoft.FusedMatMul<transBatchA: int = 1>(x, w)", "axes of the batch are transposed"),
        ("com.microsoft.FusedMatMul(x, v)", "a product with a vector"),
    ],
)
def test_products_that_are_refused(node: str, reason: str) -> None:
    text = f"g (float[4, 4, 4] x) => (float[4, 4, N] y) {{ y = {node} }}"
    given = {"w": draw(4, 4, 4)} if "w)" in node else {"v": draw(4)}
    assert refused(text, **given)[0][0] == "FusedMatMul"
    assert reason in refused(text, **given)[0][1] or "rank or type" in refused(text, **given)[0][1]


def test_models_run_as_built() -> None:
    """Every operator used above has a CPU kernel: comparisons compare something."""
    assert run(feed_forward("BiasGelu", feed_forward_weights()), x=TOKENS)[0].std() > 0

"""RotaryEmbedding, onnx's and onnxruntime's: pairs of dimensions leave together, heads leave whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from attention_heads import HEADS, SIZE, TOKENS, WIDTH, Array, attributes, dimensions, heads, sizes, weights
from models import build, check_same, dead, draw, operators, shapes, shrunk, weight

OPSET = 23


def angles(pairs: int, positions: int = 16) -> dict[str, Array]:
    turns = np.outer(np.arange(positions), 0.5 ** np.arange(pairs))
    return {"cosine": np.cos(turns).astype(np.float32), "sine": np.sin(turns).astype(np.float32)}


def rotary(
    given: dict[str, Array], pairs: int = SIZE // 2, attrs: str = "", count: str = f", num_heads: int = {HEADS}"
) -> onnx.ModelProto:
    """Rotated queries and keys in front of an attention."""
    attrs = f"{attrs}{count}".removeprefix(", ")
    return build(
        f"""g (float[B, S, {WIDTH}] x, int64[B, S] p) => (float[B, S, {WIDTH}] y) {{
            q0 = MatMul(x, wq) k0 = MatMul(x, wk) v = MatMul(x, wv)
            q = RotaryEmbedding<{attrs}>(q0, cosine, sine, p) k = RotaryEmbedding<{attrs}>(k0, cosine, sine, p)
            a = Attention<q_num_heads: int = {HEADS}, kv_num_heads: int = {HEADS}>(q, k, v) y = MatMul(a, wo) }}""",
        opset=OPSET,
        ir=10,
        **given,
        **angles(pairs),
    )


POSITIONS = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])


def counts(small: onnx.ModelProto) -> list[dict[str, Any]]:
    nodes = [node for node in small.graph.node if node.op_type == "RotaryEmbedding"]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]


def test_heads_leave_through_a_rotation() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 1, 2)
    before = rotary(given)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 2 * SIZE)] * 3 + [(2 * SIZE, WIDTH)]
    assert counts(small) == [{"num_heads": 2}] * 2
    check_same(before, small, x=TOKENS, p=POSITIONS)


@pytest.mark.parametrize(("interleaved", "pair"), [(0, (1, 1 + SIZE // 2)), (1, (2, 3))])
def test_a_pair_of_dead_dimensions_leaves_with_its_angle(interleaved: int, pair: tuple[int, int]) -> None:
    given = weights()
    given["wq"] = dimensions(given["wq"], *pair)
    before = rotary(given, attrs=f", interleaved: int = {interleaved}")
    small = shrunk(before)
    assert sizes(small)[:2] == [(WIDTH, HEADS * 6)] * 2
    assert shapes(small)["cosine"] == (16, 3)
    np.testing.assert_array_equal(weight(small, "sine"), np.delete(angles(4)["sine"], 1, axis=1))
    assert attributes(small)["scale"] == np.float32(1 / np.sqrt(SIZE))
    check_same(before, small, x=TOKENS, p=POSITIONS)


def test_half_a_pair_stays() -> None:
    given = weights()
    given["wq"] = dimensions(given["wq"], 1)
    before = rotary(given)
    small = shrunk(before)
    assert sizes(small)[0] == (WIDTH, HEADS * SIZE)
    check_same(before, small, x=TOKENS, p=POSITIONS)


def test_where_only_some_dimensions_turn_whole_heads_leave() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 0)
    given["wq"] = dimensions(given["wq"], 1, 3, 7)
    before = rotary(given, pairs=2, attrs=", rotary_embedding_dim: int = 4")
    small = shrunk(before)
    assert sizes(small)[0] == (WIDTH, 3 * SIZE)
    assert counts(small) == [{"num_heads": 3, "rotary_embedding_dim": 4}] * 2
    check_same(before, small, x=TOKENS, p=POSITIONS)


def test_angles_without_positions_and_split_heads() -> None:
    before = build(
        f"""g (float[2, 1, 5, {SIZE}] x) => (float[2, 5, {SIZE}] y) {{
            q = Mul(x, heads) r = RotaryEmbedding(q, cosine, sine) s = Mul(r, keep) y = ReduceSum<keepdims = 0>(s, one)
        }}""",
        opset=OPSET,
        ir=10,
        heads=draw(HEADS, 1, 1),
        keep=dead(draw(HEADS, 1, 1), 1, 3),
        one=np.array([1]),
        **{name: np.stack([value[:5]] * 2) for name, value in angles(SIZE // 2).items()},
    )
    small = shrunk(before)
    assert (shapes(small)["keep"], shapes(small)["heads"]) == ((2, 1, 1), (2, 1, 1))
    assert counts(small) == [{}]
    check_same(before, small, x=draw(2, 1, 5, SIZE))


# --- onnxruntime's: positions come second -----------------------------------------------------------------------------


def fused_rotary(given: dict[str, Array], pairs: int, attrs: str) -> onnx.ModelProto:
    turns = np.outer(np.arange(8), 0.5 ** np.arange(pairs)).astype(np.float32)
    rotations = " ".join(f"{n} = com.microsoft.RotaryEmbedding<{attrs}>({n}0, p, cosine, sine)" for n in "qk")
    return build(
        f"""g (float[B, S, {WIDTH}] x, int64[B, S] p) => (float[B, S, {WIDTH}] y) {{
            q0 = MatMul(x, wq) k0 = MatMul(x, wk) v = MatMul(x, wv) {rotations}
            a = com.microsoft.MultiHeadAttention<num_heads: int = {HEADS}>(q, k, v) y = MatMul(a, wo) }}""",
        **given,
        cosine=np.cos(turns),
        sine=np.sin(turns),
    )


@pytest.mark.parametrize(("interleaved", "pair"), [(0, (2, 2 + SIZE // 2)), (1, (4, 5))])
def test_pairs_and_heads_leave_onnxruntime_s_rotation(interleaved: int, pair: tuple[int, int]) -> None:
    given = weights()
    given["wq"], given["wv"] = dimensions(given["wq"], *pair), heads(given["wv"], 3)
    before = fused_rotary(given, SIZE // 2, f"interleaved: int = {interleaved}")
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 3 * 6)] * 2 + [(WIDTH, 3 * SIZE), (3 * SIZE, WIDTH)]
    assert shapes(small)["cosine"] == (8, 3)
    assert operators(small).count("RotaryEmbedding") == 2
    check_same(before, small, x=TOKENS, p=np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]))


def test_onnxruntime_s_rotation_of_some_dimensions_keeps_the_head_whole() -> None:
    given = weights()
    given["wq"], given["wv"] = dimensions(given["wq"], 0, 2, 6), heads(given["wv"], 3)
    before = fused_rotary(given, 2, f"num_heads: int = {HEADS}, rotary_embedding_dim: int = 4")
    small = shrunk(before)
    assert sizes(small)[0] == (WIDTH, 3 * SIZE)
    check_same(before, small, x=TOKENS, p=np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]))

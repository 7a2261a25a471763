"""Attention and fused operators where outputs go unread, nothing is left of a factor, or a sum is fused."""

from __future__ import annotations

import numpy as np
import pytest
from attention_heads import HEADS, SIZE, TOKENS, WIDTH, dimensions, heads, sizes, weights
from models import build, check_same, dead, draw, operators, shapes, shrunk

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph

OPSET = 23
COUNTS = f"q_num_heads = {HEADS}, kv_num_heads = {HEADS}"
PROJECTED = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"


def test_caches_that_nobody_reads_keep_nothing() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 0, 2)
    before = build(
        f"""g (float[B, S, {WIDTH}] x) => (float[B, S, {WIDTH}] y) {{ {PROJECTED}
            a, present_key, present_value = Attention<{COUNTS}>(q, k, v) y = MatMul(a, wo) }}""",
        opset=OPSET,
        ir=10,
        **given,
    )
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 2 * SIZE)] * 3 + [(2 * SIZE, WIDTH)]
    check_same(before, small, x=TOKENS)


def test_packed_groups_keep_their_node_when_their_caches_go_unread() -> None:
    given = weights(groups=2)
    matrix = np.concatenate([given[name] for name in ("wq", "wk", "wv")], axis=1)
    before = build(
        f"""g (float[2, 5, {WIDTH}] x) => (float[2, 5, {WIDTH}] y) {{ p = MatMul(x, w)
            a, key, value = com.microsoft.GroupQueryAttention<num_heads: int = {HEADS}, kv_num_heads: int = 2>
                (p, , , , , lengths, total)
            y = MatMul(a, wo) }}""",
        w=matrix,
        wo=dead(given["wo"], *range(2 * SIZE)),
        lengths=np.full(2, 4, np.int32),
        total=np.array(5, np.int32),
    )
    small = shrunk(before)
    assert operators(small) == ["MatMul", "GroupQueryAttention", "MatMul"]
    assert len(small.graph.node[1].output) == 3
    check_same(before, small, x=TOKENS)


@pytest.mark.parametrize("dead_head", [0, 2])
def test_queries_that_never_meet_a_key_keep_one_dimension_of_the_heads_that_stay(dead_head: int) -> None:
    """Queries are dead in some dimensions, keys in the others: all scores are zero."""
    given = weights()
    given["wq"] = dimensions(given["wq"], *range(5))
    given["wk"] = dimensions(given["wk"], *range(5, SIZE))
    given["wv"] = heads(given["wv"], dead_head)
    before = build(
        f"""g (float[B, S, {WIDTH}] x) => (float[B, S, {WIDTH}] y) {{ {PROJECTED}
            a = Attention<{COUNTS}>(q, k, v) y = MatMul(a, wo) }}""",
        opset=OPSET,
        ir=10,
        **given,
    )
    small = shrunk(before)
    left = HEADS - 1
    assert sizes(small)[2:] == [(WIDTH, left * SIZE), (left * SIZE, WIDTH)]
    assert sum(int(np.prod(size)) for size in sizes(small)[:2]) <= 2 * WIDTH * left
    check_same(before, small, x=TOKENS)


@pytest.mark.parametrize(
    ("window", "known"),
    [("", True), ("left_window_size = 1,", False), ("right_window_size = 0,", False)],
    ids=["everywhere", "left", "right"],
)
def test_a_window_may_leave_a_query_nothing(window: str, known: bool) -> None:
    """A head of constant values gives that constant only where every query finds a key."""
    model = build(
        f"""g (float[B, S, {WIDTH}] x, float[B, T, {WIDTH}] z) => (float[B, S, {WIDTH}] y) {{
            q = MatMul(x, wq) k = MatMul(z, wk) p = MatMul(z, wv) v = Add(p, bv)
            a = Attention<{window} {COUNTS}>(q, k, v) y = MatMul(a, wo) }}""",
        opset=25,
        ir=10,
        **{**weights(), "wv": heads(weights()["wv"], 1)},
        bv=draw(HEADS * SIZE),
    )
    assert ("a" in analyse(Graph(model)).known) == known


@pytest.mark.parametrize("activation", ['"Relu"', '"Clip", activation_params: floats = [-0.5, 0.9]'])
def test_a_sum_fused_in_a_convolution_keeps_its_channels(activation: str) -> None:
    """Dead in the convolution alone, a channel stays; dead in what is added too, it leaves, with its constant."""
    weight, bias = dead(draw(6, 3, 1, 1), 1, 4), draw(6)
    before = build(
        f"""g (float[B, 3, 5, 5] x) => (float[B, 2, 5, 5] y) {{
            z = Conv(x, w1, b1)
            h = com.microsoft.FusedConv<activation: string = {activation}>(x, w2, b2, z)
            y = Conv(h, w3, b3) }}""",
        w1=dead(draw(6, 3, 1, 1, seed=1), 4, 5),
        b1=draw(6, seed=2),
        w2=weight,
        b2=bias,
        w3=draw(2, 6, 1, 1),
        b3=draw(2),
    )
    small = shrunk(before)
    assert shapes(small)["w1"] == shapes(small)["w2"] == (5, 3, 1, 1)
    assert shapes(small)["w3"] == (2, 5, 1, 1)
    check_same(before, small, x=draw(2, 3, 5, 5))


@pytest.mark.parametrize("handed_out", [False, True])
def test_a_deviation_that_is_handed_out_is_that_of_all_channels(handed_out: bool) -> None:
    outputs = "float[B, 5, 4] y, float[B, 5, 1] d" if handed_out else "float[B, 5, 4] y"
    before = build(
        f"""g (float[B, 5, {WIDTH}] x) => ({outputs}) {{ a = MatMul(x, w1)
            n{", d" if handed_out else ""} = SimplifiedLayerNormalization<axis: int = -1>(a, scale)
            y = MatMul(n, w2) }}""",
        w1=dead(draw(WIDTH, 8), 2, 6, axis=1),
        scale=draw(8),
        w2=draw(8, 4),
    )
    small = shrunk(before)
    assert shapes(small)["w2"] == ((8 if handed_out else 6), 4)
    check_same(before, small, x=TOKENS)

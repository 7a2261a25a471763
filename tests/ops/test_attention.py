"""Attention and RotaryEmbedding: which heads and dimensions leave, with what, and what keeps them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attention_heads import HEADS, SIZE, TOKENS, WIDTH, Array, attributes, dimensions, heads, sizes, weights
from models import build, check_same, draw, operators, shapes, shrunk, weight

OPSET = 23


def model(
    given: dict[str, Array], groups: int = HEADS, extra: str = "", inputs: str = "", more: str = "", attrs: str = ""
) -> onnx.ModelProto:
    """Projections, attention on joined heads, a projection."""
    return build(
        f"""g (float[B, S, {WIDTH}] x{inputs}) => (float[B, S, {WIDTH}] y{more}) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            a = Attention<q_num_heads: int = {HEADS}, kv_num_heads: int = {groups}{attrs}>(q, k, v{extra})
            y = MatMul(a, wo) }}""",
        opset=OPSET,
        ir=10,
        **given,
    )


# --- heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [(1,), (0, 3), (1, 2, 3)])
@pytest.mark.parametrize("side", ["value rows", "output columns"])
def test_dead_heads_leave_with_their_queries_and_keys(side: str, which: tuple[int, ...]) -> None:
    given = weights()
    if side == "value rows":
        given["wv"] = heads(given["wv"], *which)
    else:
        given["wo"] = heads(given["wo"].T, *which).T
    before = model(given)
    small = shrunk(before)
    left = HEADS - len(which)
    assert sizes(small) == [(WIDTH, left * SIZE)] * 3 + [(left * SIZE, WIDTH)]
    assert attributes(small) == {"q_num_heads": left, "kv_num_heads": left}
    check_same(before, small, x=TOKENS)


def test_the_kept_head_keeps_its_own_weights() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 0, 1, 3)
    small = shrunk(model(given))
    for name in ("wq", "wk", "wv"):
        np.testing.assert_array_equal(weight(small, name), given[name][:, 2 * SIZE : 3 * SIZE])
    np.testing.assert_array_equal(weight(small, "wo"), given["wo"][2 * SIZE : 3 * SIZE])


def test_dead_queries_or_keys_do_not_make_a_head_dead() -> None:
    """Scores of zero make a mean of the values."""
    given = weights()
    given["wq"] = heads(given["wq"], 1)
    before = model(given)
    small = shrunk(before)
    assert sizes(small)[2:] == [(WIDTH, HEADS * SIZE), (HEADS * SIZE, WIDTH)]
    check_same(before, small, x=TOKENS)


def test_heads_leave_by_group() -> None:
    given = weights(groups=2)
    given["wv"] = heads(given["wv"], 0, count=2)
    before = model(given, groups=2)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 2 * SIZE), (WIDTH, SIZE), (WIDTH, SIZE), (2 * SIZE, WIDTH)]
    assert attributes(small) == {"q_num_heads": 2, "kv_num_heads": 1}
    check_same(before, small, x=TOKENS)


def test_the_same_member_of_every_group_leaves_alone() -> None:
    given = weights(groups=2)
    given["wo"] = heads(given["wo"].T, 1, 3).T
    before = model(given, groups=2)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 2 * SIZE), (WIDTH, 2 * SIZE), (WIDTH, 2 * SIZE), (2 * SIZE, WIDTH)]
    assert attributes(small) == {"q_num_heads": 2, "kv_num_heads": 2}
    check_same(before, small, x=TOKENS)


def test_one_query_head_of_a_group_stays_with_its_group() -> None:
    given = weights(groups=2)
    given["wo"] = heads(given["wo"].T, 1).T
    before = model(given, groups=2)
    small = shrunk(before)
    assert sizes(small)[0] == (WIDTH, HEADS * SIZE)
    check_same(before, small, x=TOKENS)


def test_split_heads_need_no_attribute() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 2)
    split = " ".join(f"{n}r = Reshape({n}, split) {n}t = Transpose<perm = [0, 2, 1, 3]>({n}r)" for n in "qkv")
    before = build(
        f"""g (float[2, 5, {WIDTH}] x) => (float[2, 5, {WIDTH}] y) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) {split}
            a = Attention(qt, kt, vt) t = Transpose<perm = [0, 2, 1, 3]>(a) r = Reshape(t, joined) y = MatMul(r, wo)
        }}""",
        opset=OPSET,
        ir=10,
        split=np.array([2, 5, HEADS, SIZE]),
        joined=np.array([2, 5, HEADS * SIZE]),
        **given,
    )
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 3 * SIZE)] * 3 + [(3 * SIZE, WIDTH)]
    assert attributes(small) == {}
    check_same(before, small, x=TOKENS)


# --- dimensions of a head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wq", "wk"])
def test_dead_query_or_key_dimensions_leave_and_the_scale_stays(name: str) -> None:
    given = weights()
    given[name] = dimensions(given[name], 0, 5)
    before = model(given)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, HEADS * 6)] * 2 + [(WIDTH, HEADS * SIZE), (HEADS * SIZE, WIDTH)]
    assert attributes(small)["scale"] == np.float32(1 / np.sqrt(SIZE))
    check_same(before, small, x=TOKENS)


def test_a_scale_that_is_given_is_not_touched() -> None:
    given = weights()
    given["wq"] = dimensions(given["wq"], 1)
    before = model(given, attrs=", scale: float = 0.3")
    small = shrunk(before)
    assert sizes(small)[0] == (WIDTH, HEADS * 7)
    assert attributes(small)["scale"] == np.float32(0.3)
    check_same(before, small, x=TOKENS)


def test_dead_value_dimensions_leave() -> None:
    given = weights()
    given["wv"] = dimensions(given["wv"], 3, 4)
    before = model(given)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, HEADS * SIZE)] * 2 + [(WIDTH, HEADS * 6), (HEADS * 6, WIDTH)]
    assert "scale" not in attributes(small)
    check_same(before, small, x=TOKENS)


def biased(given: dict[str, Array], extra: str = "", inputs: str = "", attrs: str = "") -> onnx.ModelProto:
    return build(
        f"""g (float[B, S, {WIDTH}] x{inputs}) => (float[B, S, {WIDTH}] y) {{
            q0 = MatMul(x, wq) q = Add(q0, bq) k0 = MatMul(x, wk) k = Add(k0, bk) v0 = MatMul(x, wv) v = Add(v0, bv)
            a = Attention<q_num_heads: int = {HEADS}, kv_num_heads: int = {HEADS}{attrs}>(q, k, v{extra})
            y0 = MatMul(a, wo) y = Add(y0, bo) }}""",
        opset=OPSET,
        ir=10,
        bq=draw(HEADS * SIZE, seed=5),
        bk=draw(HEADS * SIZE, seed=6),
        bv=draw(HEADS * SIZE, seed=7),
        bo=draw(WIDTH, seed=8),
        **given,
    )


def test_a_constant_value_head_is_folded_in_the_bias_that_follows() -> None:
    """Rows of probabilities sum to one."""
    given = weights()
    given["wv"] = heads(given["wv"], 1)
    before = biased(given)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, 3 * SIZE)] * 3 + [(3 * SIZE, WIDTH)]
    block = slice(SIZE, 2 * SIZE)
    expected = weight(before, "bo") + weight(before, "bv")[block] @ given["wo"][block]
    np.testing.assert_allclose(weight(small, "bo"), expected, rtol=1e-5)
    check_same(before, small, x=TOKENS)


def test_a_constant_value_head_stays_where_a_mask_may_leave_a_query_nothing() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 1)
    before = biased(given, extra=", m", inputs=", bool[S, S] m")
    small = shrunk(before)
    assert sizes(small)[3] == (HEADS * SIZE, WIDTH)
    mask = np.tril(np.ones((5, 5), np.bool_))
    mask[2] = False
    check_same(before, small, x=TOKENS, m=mask)


def test_constant_keys_shift_all_scores_alike() -> None:
    given = weights()
    given["wk"] = dimensions(given["wk"], 2)
    before = biased(given)
    small = shrunk(before)
    assert sizes(small)[:2] == [(WIDTH, HEADS * 7)] * 2
    check_same(before, small, x=TOKENS)


def test_constant_keys_stay_under_a_soft_cap() -> None:
    given = weights()
    given["wk"] = dimensions(given["wk"], 2)
    before = biased(given, attrs=", softcap: float = 2.0")
    small = shrunk(before)
    assert sizes(small)[:2] == [(WIDTH, HEADS * SIZE)] * 2
    check_same(before, small, x=TOKENS)


def test_constant_queries_weight_the_keys() -> None:
    given = weights()
    given["wq"] = dimensions(given["wq"], 2)
    before = biased(given)
    small = shrunk(before)
    assert sizes(small)[:2] == [(WIDTH, HEADS * SIZE)] * 2
    check_same(before, small, x=TOKENS)


def test_constant_queries_and_constant_keys_under_a_soft_cap_stay_together() -> None:
    """Neither depends on the input, and their product is not zero."""
    given = weights()
    given["wq"], given["wk"] = dimensions(given["wq"], 2), dimensions(given["wk"], 2)
    before = biased(given, attrs=", softcap: float = 2.0")
    small = shrunk(before)
    assert sizes(small)[:2] == [(WIDTH, HEADS * SIZE)] * 2
    check_same(before, small, x=TOKENS)


# --- masks, caches, scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["S, S", "1, S, S", "B, 1, S, S"])
def test_a_mask_for_all_heads_is_left_alone(axes: str) -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 0)
    before = model(given, extra=", m", inputs=f", float[{axes}] m", attrs=", is_causal: int = 1")
    small = shrunk(before)
    assert attributes(small)["q_num_heads"] == 3
    shape = {"S, S": (5, 5), "1, S, S": (1, 5, 5), "B, 1, S, S": (2, 1, 5, 5)}[axes]
    check_same(before, small, x=TOKENS, m=draw(*shape))


def test_a_constant_mask_per_head_is_cut() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 0, 2)
    before = model(given, extra=", m")
    before.graph.initializer.append(onnx.numpy_helper.from_array(draw(1, HEADS, 5, 5), "m"))
    small = shrunk(before)
    assert shapes(small)["m"] == (1, 2, 5, 5)
    np.testing.assert_array_equal(weight(small, "m"), draw(1, HEADS, 5, 5)[:, [1, 3]])
    check_same(before, small, x=TOKENS)


CACHE = f"float[B, {HEADS}, P, {SIZE}]"


def cached(given: dict[str, Array], present: bool) -> onnx.ModelProto:
    outputs = f", {CACHE.replace('P', 'T')} nk, {CACHE.replace('P', 'T')} nv" if present else ""
    return build(
        f"""g (float[B, S, {WIDTH}] x, {CACHE} pk, {CACHE} pv) => (float[B, S, {WIDTH}] y{outputs}) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            a, nk, nv = Attention<q_num_heads: int = {HEADS}, kv_num_heads: int = {HEADS}>(q, k, v, , pk, pv)
            y = MatMul(a, wo) }}""",
        opset=OPSET,
        ir=10,
        **given,
    )


@pytest.mark.parametrize("present", [True, False])
def test_caches_that_the_caller_hands_in_stay_whole(present: bool) -> None:
    given = weights()
    given["wo"] = heads(given["wo"].T, 1).T
    given["wv"] = heads(given["wv"], 2)
    before = cached(given, present)
    small = shrunk(before)
    assert sizes(small) == [(WIDTH, HEADS * SIZE)] * 3 + [(HEADS * SIZE, WIDTH)]
    past = draw(2, HEADS, 3, SIZE)
    check_same(before, small, x=TOKENS, pk=past, pv=past + 1)


def test_scores_that_are_handed_out_keep_their_heads_and_dimensions() -> None:
    given = weights()
    given["wv"] = heads(given["wv"], 1)
    given["wq"] = dimensions(given["wq"], 0)
    before = build(
        f"""g (float[B, S, {WIDTH}] x) => (float[B, S, {WIDTH}] y, float[B, {HEADS}, S, S] scores) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            a, , , scores = Attention<q_num_heads: int = {HEADS}, kv_num_heads: int = {HEADS}>(q, k, v)
            y = MatMul(a, wo) }}""",
        opset=OPSET,
        ir=10,
        **given,
    )
    small = shrunk(before)
    assert attributes(small)["q_num_heads"] == HEADS
    assert sizes(small)[0] == (WIDTH, HEADS * 7)
    check_same(before, small, x=TOKENS)


def test_attention_whose_values_are_all_dead_goes() -> None:
    given = weights()
    given["wv"] = np.zeros_like(given["wv"])
    before = build(
        f"""g (float[B, S, {WIDTH}] x) => (float[B, S, {WIDTH}] y) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            a = Attention<q_num_heads: int = {HEADS}, kv_num_heads: int = {HEADS}>(q, k, v)
            b = MatMul(a, wo) y = Add(x, b) }}""",
        opset=OPSET,
        ir=10,
        **given,
    )
    small = shrunk(before)
    assert "Attention" not in operators(small)
    assert shapes(small).keys().isdisjoint(given)
    check_same(before, small, x=TOKENS)

"""The places where exactness is won or lost, each on a graph small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, parameters, run, shapes, shrunk, shrunk_with_plan, weight

IMAGE = draw(2, 3, 6, 6, seed=9)


def image_model(body: str, weights: dict[str, Any], inputs: str = "float[N, 3, 6, 6] x", opset: int = 17) -> Any:
    return build(f"g ({inputs}) => (float[N, C, H, W] y) {{ {body} }}", opset=opset, **weights)


# --- constants without a border: folded in the next bias --------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "constant"),
    [("Relu", 0.5), ("Sigmoid", 1 / (1 + np.exp(-0.5))), ("Tanh", np.tanh(0.5)), ("Identity", 0.5)],
)
def test_a_constant_unit_is_folded_in_the_next_bias(activation: str, constant: float) -> None:
    w1, b1 = dead(draw(4, 3, 3, 3), 1), np.array([0.1, 0.5, -0.2, 0.3], np.float32)
    w2, b2 = draw(2, 4, 1, 1), draw(2)
    model = image_model(
        f"a = Conv(x, w1, b1) r = {activation}(a) y = Conv(r, w2, b2)", {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    )
    small = shrunk(model)
    assert shapes(small) == {"w1": (3, 3, 3, 3), "b1": (3,), "w2": (2, 3, 1, 1), "b2": (2,)}
    np.testing.assert_allclose(weight(small, "b2"), b2 + w2[:, 1, 0, 0] * constant, rtol=1e-6)
    check_same(model, small, x=IMAGE)


def test_a_bias_is_created_where_there_is_none() -> None:
    w1, b1 = dead(draw(4, 3, 3, 3), 0, 2), draw(4)
    w2 = draw(2, 4, 1, 1)
    model = image_model("a = Conv(x, w1, b1) y = Conv(a, w2)", {"w1": w1, "b1": b1, "w2": w2})
    small = shrunk(model)
    assert len(small.graph.node[-1].input) == 3
    np.testing.assert_allclose(
        weight(small, small.graph.node[-1].input[2]), w2[:, 0, 0, 0] * b1[0] + w2[:, 2, 0, 0] * b1[2], rtol=1e-6
    )
    check_same(model, small, x=IMAGE)


def test_constants_pass_flatten_and_sum_over_positions() -> None:
    w1, b1 = dead(draw(3, 3, 3, 3), 1), np.array([0.1, 0.7, 0.2], np.float32)
    w2, b2 = draw(12, 2), draw(2)
    text = "g (float[N, 3, 4, 4] x) => (float[N, 2] y) { a = Conv(x, w1, b1) f = Flatten(a) y = Gemm(f, w2, b2) }"
    model = build(text, w1=w1, b1=b1, w2=w2, b2=b2)
    small = shrunk(model)
    assert shapes(small) == {"w1": (2, 3, 3, 3), "b1": (2,), "w2": (8, 2), "b2": (2,)}
    np.testing.assert_allclose(weight(small, "b2"), b2 + 0.7 * w2[4:8].sum(axis=0), rtol=1e-5)
    check_same(model, small, x=draw(2, 3, 4, 4))


def test_a_product_without_bias_gets_an_addition_or_uses_the_one_that_follows() -> None:
    w1, b1 = dead(draw(5, 4), 2, axis=1), np.array([0.1, 0.2, 0.9, 0.3], np.float32)
    w2, b2 = draw(4, 3), draw(3)
    head = "g (float[N, S, 5] x) => (float[N, S, 3] y) { a = MatMul(x, w1) c = Add(a, b1) r = Relu(c) "
    plain = build(head + "y = MatMul(r, w2) }", w1=w1, b1=b1, w2=w2)
    small = shrunk(plain)
    assert operators(small) == ["MatMul", "Add", "Relu", "MatMul", "Add"]
    check_same(plain, small, x=draw(2, 6, 5))
    biased = build(head + "m = MatMul(r, w2) y = Add(b2, m) }", w1=w1, b1=b1, w2=w2, b2=b2)
    small = shrunk(biased)
    assert operators(small) == ["MatMul", "Add", "Relu", "MatMul", "Add"]
    np.testing.assert_allclose(weight(small, "b2"), b2 + np.float32(0.9) * w2[2], rtol=1e-6)
    assert shapes(small) == {"w1": (5, 3), "b1": (3,), "w2": (3, 3), "b2": (3,)}
    check_same(biased, small, x=draw(2, 6, 5))


# --- borders ----------------------------------------------------------------------------------------------------


def test_under_padding_one_channel_of_ones_stands_for_all_constants() -> None:
    w1, b1 = dead(draw(6, 3, 1, 1), 1, 3, 4), np.array([0.1, 0.5, -0.2, 0.3, -2.0, 0.4], np.float32)
    w2, b2 = draw(2, 6, 3, 3), draw(2)
    body = "a = Conv(x, w1, b1) y = Conv <pads = [1, 1, 1, 1]> (a, w2, b2)"
    model = image_model(body, {"w1": w1, "b1": b1, "w2": w2, "b2": b2}, inputs="float[N, 3, H, W] x")
    small = shrunk(model)
    assert operators(small) == ["Conv", "Pad", "Conv"]
    assert shapes(small)["w1"] == (3, 3, 1, 1)
    assert shapes(small)["w2"] == (2, 4, 3, 3)
    expected = w2[:, 1] * b1[1] + w2[:, 3] * b1[3] + w2[:, 4] * b1[4]
    np.testing.assert_allclose(weight(small, "w2")[:, 3], expected, rtol=1e-5)
    check_same(model, small, x=IMAGE)
    check_same(model, small, x=draw(1, 3, 9, 4))


PADS = np.array([0, 0, 1, 0, 0, 0, 1, 2])
W1 = dead(draw(6, 3, 1, 1), 1, 3, 4)
B1 = np.array([0.1, 0.5, -0.2, 0.3, 2.0, 0.4], np.float32)


@pytest.mark.parametrize("inputs", ["float[N, 3, 6, 6] x", "float[N, 3, H, W] x"], ids=["static", "free"])
@pytest.mark.parametrize("opset", [13, 18])
def test_behind_a_pad_of_its_own_the_channel_of_ones_is_padded_along(inputs: str, opset: int) -> None:
    weights = {"w1": W1, "b1": B1, "w2": draw(2, 6, 3, 3), "pads": PADS}
    body = "a = Conv(x, w1, b1) r = Relu(a) p = Pad(r, pads) y = Conv(p, w2)"
    model = image_model(body, weights, inputs=inputs, opset=opset)
    small = shrunk(model)
    assert operators(small) == ["Conv", "Relu", "Pad", "Pad", "Conv"]
    assert shapes(small)["w1"] == (3, 3, 1, 1)
    assert shapes(small)["w2"] == (2, 4, 3, 3)
    expected = weights["w2"][:, 1] * B1[1] + weights["w2"][:, 3] * B1[3] + weights["w2"][:, 4] * B1[4]
    np.testing.assert_allclose(weight(small, "w2")[:, 3], expected, rtol=1e-5)
    check_same(model, small, x=IMAGE)
    again = shrunk(small)
    assert operators(again) == operators(small)
    assert shapes(again) == shapes(small)


@pytest.mark.parametrize("node", ["Conv <pads = [1, 1, 1, 1]> (p, w2)", "Conv <strides = [2, 2]> (p, w2)"])
def test_before_ones_can_be_padded_one_channel_behind_a_pad_takes_the_others(node: str) -> None:
    body = f"a = Conv(x, w1, b1) p = Pad <pads = [0, 0, 1, 0, 0, 0, 1, 2]> (a) y = {node}"
    model = image_model(body, {"w1": W1, "b1": B1, "w2": draw(2, 6, 3, 3)}, opset=10)
    small = shrunk(model)
    assert operators(small) == ["Conv", "Pad", "Conv"]
    assert shapes(small) == {"w1": (4, 3, 1, 1), "b1": (4,), "w2": (2, 4, 3, 3)}
    check_same(model, small, x=IMAGE)


def test_each_group_behind_a_pad_has_its_own_constant() -> None:
    weights = {"w1": dead(draw(8, 3, 1, 1), 1, 2, 5, 6), "b1": draw(8), "w2": draw(4, 4, 3, 3), "pads": PADS}
    body = "a = Conv(x, w1, b1) p = Pad(a, pads) y = Conv <group = 2> (p, w2)"
    model = image_model(body, weights)
    small = shrunk(model)
    assert shapes(small)["w1"] == (6, 3, 1, 1)
    assert shapes(small)["w2"] == (4, 3, 3, 3)
    check_same(model, small, x=IMAGE)


def test_two_readers_of_a_pad_that_is_computed_share_the_ones() -> None:
    weights = {
        "w1": W1, "b1": B1, "w2": draw(2, 6, 3, 3), "w3": draw(5, 6, 3, 3, seed=4), "none": np.zeros(2, np.int64),
        "two": np.array([2, 2]), "from": np.array([2]), "to": np.array([4]),
    }  # fmt: skip
    model = build(
        """g (float[N, 3, H, W] x) => (float[N, 2, A, B] y, float[N, 5, A, B] z) {
            a = Conv(x, w1, b1) s = Shape(x) hw = Slice(s, from, to) odd = Mod(hw, two)
            pads = Concat <axis = 0> (none, odd, none, odd) p = Pad(a, pads) y = Conv(p, w2) z = Conv(p, w3) }""",
        **weights,
    )
    small = shrunk(model)
    assert operators(small) == ["Conv", "Shape", "Slice", "Mod", "Concat", "Pad", "Pad", "Conv", "Conv"]
    assert shapes(small)["w1"] == (3, 3, 1, 1)
    assert shapes(small)["w2"] == (2, 4, 3, 3)
    assert shapes(small)["w3"] == (5, 4, 3, 3)
    check_same(model, small, x=draw(2, 3, 7, 5))


@pytest.mark.parametrize(
    "rest",
    [
        "p = Pad(a, pads, half) y = Conv(p, w2)",
        "p = Pad(a, more) y = Conv(p, w3)",
        "p = Pad(a, pads) q = MaxPool <kernel_shape = [2, 2]> (p) y = Conv(q, w2)",
        "p = Pad(a, pads) t = Tanh(p) y = Conv(p, w2) z = Conv(t, w2)",
    ],
    ids=["half around", "channels around", "a maximum between", "another reader"],
)
def test_behind_other_pads_a_constant_stays(rest: str) -> None:
    weights = {"w1": W1, "b1": B1, "w2": draw(2, 6, 3, 3), "w3": draw(2, 7, 3, 3), "pads": PADS}
    weights |= {"half": np.array(0.7, np.float32), "more": np.array([0, 1, 1, 1, 0, 0, 1, 1])}
    second = ", float[N, 2, E, F] z" if "z = " in rest else ""
    text = f"g (float[N, 3, 6, 6] x) => (float[N, 2, C, D] y{second}) {{ a = Conv(x, w1, b1) {rest} }}"
    model = build(text, **weights)
    small = shrunk(model)
    assert shapes(small)["w1"] == (6, 3, 1, 1)
    check_same(model, small, x=IMAGE)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_where_all_channels_are_constant_the_one_that_stays_can_take_the_others(order: list[int]) -> None:
    bias = np.array([-2.4, 1.2], np.float32)[order]
    weights = {"w1": np.zeros((2, 3, 1, 1), np.float32), "b1": bias, "w2": draw(2, 2, 3, 3), "b2": draw(2)}
    body = "a = Conv(x, w1, b1) r = Relu(a) y = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)"
    model = image_model(body, weights, inputs="float[N, 3, H, W] x")
    small = shrunk(model)
    assert operators(small) == ["Conv", "Relu", "Conv"]
    assert parameters(small) == 3 + 1 + 18 + 2
    check_same(model, small, x=IMAGE)


def test_a_constant_that_stays_anyway_takes_the_others() -> None:
    w1, b1 = dead(draw(4, 3, 1, 1), 1, 2), np.array([0.1, 0.5, -0.8, 0.3], np.float32)
    w2 = draw(2, 4, 3, 3)
    body = "a = Conv(x, w1, b1) s = Add(a, z) y = Conv <pads = [1, 1, 1, 1]> (s, w2)"
    other = np.zeros((1, 4, 6, 6), np.float32)
    text = "g (float[N, 3, 6, 6] x, float[N, 4, 6, 6] z) => (float[N, 2, 6, 6] y) { m = Mul(z, k) "
    text += body.replace("Add(a, z)", "Add(a, m)") + " }"
    keep = np.array([1, 1, 0, 1], np.float32).reshape(4, 1, 1)
    model = build(text, w1=w1, b1=b1, w2=w2, k=keep)
    small = shrunk(model)
    check_same(model, small, x=IMAGE, z=draw(2, 4, 6, 6))
    check_same(model, small, x=IMAGE, z=np.broadcast_to(other, (2, 4, 6, 6)).copy())


@pytest.mark.parametrize(
    ("groups", "first", "second", "appended"),
    [(2, 5, (5, 6, 3, 3), 1), (4, 12, (10, 6, 3, 3), 0)],
    ids=["to one: a channel of ones", "to two: one constant in each"],
)
def test_groups_that_are_joined_share_what_carries_their_constants(
    groups: int, first: int, second: tuple[int, ...], appended: int
) -> None:
    """Of two groups, one has many live inputs and the other many live outputs: joined, they are smaller."""
    rows = [4 * g + i for g in range(0, groups, 2) for i in (1, 2, 3)]
    unread = [4 * g + i for g in range(1, groups, 2) for i in (1, 2, 3)]
    w1, b1, w2 = dead(draw(4 * groups, 3, 1, 1), *rows), draw(4 * groups), draw(4 * groups, 4, 3, 3)
    w3 = dead(draw(2, 4 * groups, 1, 1), *unread, axis=1)
    body = f"a = Conv(x, w1, b1) g = Conv <pads = [1, 1, 1, 1], group = {groups}> (a, w2) y = Conv(g, w3)"
    model = image_model(body, {"w1": w1, "b1": b1, "w2": w2, "w3": w3})
    small = shrunk(model)
    assert shapes(small)["w1"] == (first, 3, 1, 1)
    assert shapes(small)["w2"] == second
    assert operators(small).count("Pad") == appended
    check_same(model, small, x=IMAGE)
    assert shapes(shrunk(small)) == shapes(small)


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_carry_constants(pads: list[int], groups: int) -> None:
    w1, b1 = dead(draw(4, 3, 1, 1), 1, 2), draw(4)
    w2 = draw(4, 4 // groups, 2, 2)
    body = f"a = Conv(x, w1, b1) y = ConvTranspose <pads = {pads}, group = {groups}> (a, w2)"
    model = image_model(body, {"w1": w1, "b1": b1, "w2": w2})
    check_same(model, shrunk(model), x=IMAGE)


# --- uniform stops being uniform --------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["float[N, 3, 6, 6] x", "float[N, 3, H, W] x"], ids=["static", "free"])
@pytest.mark.parametrize("whole", [True, False], ids=["of all extents", "of positions"])
def test_scales_are_read_as_far_as_they_are_known(inputs: str, whole: bool) -> None:
    weights = {
        "w1": dead(draw(4, 3, 1, 1), 1, 2), "w2": draw(2, 4, 1, 1), "from": np.array([2]), "to": np.array([4]),
        "two": np.array([2, 2]), "four": np.array([1, 1, 2, 2]), "one": np.ones(2, np.float32),
    }  # fmt: skip
    extents = "e = Identity(s) m = Mul(e, four)" if whole else "e = Slice(s, from, to) m = Mul(e, two)"
    scales = "c = Identity(d)" if whole else "c = Concat <axis = 0> (one, d)"
    body = f"""a = Conv(x, w1) s = Shape(a) {extents} f = Cast <to = 1> (m) g = Cast <to = 1> (e) d = Div(f, g)
               {scales} u = Resize <mode = "linear"> (a, , c) y = Conv(u, w2)"""
    model = image_model(body, weights, inputs=inputs)
    small = shrunk(model)
    assert shapes(small)["w1"] == (2, 3, 1, 1)
    assert shapes(small)["w2"] == (2, 2, 1, 1)
    check_same(model, small, x=IMAGE)


def test_an_extent_of_free_times_fixed_is_no_fixed_extent() -> None:
    """Windows as a traced model writes them: merged with the batch, and read again from the shape of the result."""
    weights = {
        "w1": dead(draw(3, 4), 1, axis=1), "w2": draw(4, 2), "zero": np.array([0]), "windows": np.array([4]),
        "rest": np.array([6, 4]), "parts": np.array([6, 2, 1]),
    }  # fmt: skip
    text = """g (float[N, 4, 6, 3] x) => (float[A, B, C, D] y) {
              a = MatMul(x, w1) s = Shape(a) n = Gather(s, zero) m = Mul(n, windows) t = Concat <axis = 0> (m, rest)
              r = Reshape(a, t) q = MatMul(r, w2) k = Shape(q) b = Gather(k, zero) u = Concat <axis = 0> (b, parts)
              y = Reshape(q, u) }"""
    model = build(text, **weights)
    small = shrunk(model)
    assert shapes(small)["w1"] == (3, 3)
    for count in (1, 3):
        check_same(model, small, x=draw(count, 4, 6, 3))


def test_channels_may_be_resampled_by_scales_that_are_given() -> None:
    weights = {"w1": dead(draw(4, 3, 1, 1), 1, 2), "w2": draw(2, 4, 1, 1)}
    text = """g (float[1, 3, 6, 6] x, float[4] c) => (float[1, 2, 12, 12] y) <float[1, 4, 12, 12] u> {
              a = Conv(x, w1) u = Resize <mode = "linear"> (a, , c) y = Conv(u, w2) }"""
    small = shrunk(build(text, **weights))
    assert shapes(small) == {"w1": (4, 3, 1, 1), "w2": (2, 4, 1, 1)}


@pytest.mark.parametrize(
    "node",
    [
        "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (a)",
        "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)",
        "AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (a)",
        "AveragePool <kernel_shape = [2, 2], strides = [3, 3], ceil_mode = 1, pads = [1, 0, 0, 1]> (a)",
        "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)",
        "MaxPool <kernel_shape = [2, 2], strides = [3, 3], ceil_mode = 1> (a)",
        "MaxPool <kernel_shape = [2, 2], dilations = [2, 2]> (a)",
        "LpPool <kernel_shape = [2, 2]> (a)",
        "GlobalAveragePool (a)",
        "GlobalMaxPool (a)",
        "GlobalLpPool (a)",
        "Pad (a, pads)",
        'Pad <mode = "reflect"> (a, pads)',
        "Pad (a, pads, half)",
        'Resize <mode = "linear"> (a, none, scales)',
        'Resize <mode = "cubic"> (a, none, scales)',
        "Conv <dilations = [2, 2]> (a, dw)",
        "Conv <pads = [1, 0, 0, 1], group = 4> (a, ddw)",
    ],
)
def test_constants_through_windows(node: str) -> None:
    w1, b1 = dead(draw(4, 3, 1, 1), 1, 2), np.array([0.1, 0.5, 0.0, 0.3], np.float32)
    weights = {"w1": w1, "b1": b1, "w2": draw(2, 4, 1, 1)}
    if "pads)" in node or "pads," in node.split("(")[-1]:
        weights["pads"] = np.array([0, 0, 1, 1, 0, 0, 2, 0])
    if "half" in node:
        weights["half"] = np.array(0.5, np.float32)
    if "scales" in node:
        weights["scales"] = np.array([1, 1, 2, 1.5], np.float32)
        weights["none"] = np.zeros(0, np.float32)
    if " dw" in node:
        weights["dw"] = draw(4, 4, 2, 2)
    if "ddw" in node:
        weights["ddw"] = draw(4, 1, 2, 2)
    model = image_model(f"a = Conv(x, w1, b1) p = {node} y = Conv(p, w2)", weights)
    small = shrunk(model)
    check_same(model, small, x=IMAGE)
    assert parameters(small) < parameters(model)


# --- whole branches ---------------------------------------------------------------------------------------------


def test_a_residual_branch_of_zeros_vanishes() -> None:
    weights = {
        "w1": draw(4, 3, 1, 1),
        "w2": draw(4, 4, 3, 3),
        "w3": np.zeros((4, 4, 3, 3), np.float32),
        "w4": draw(2, 4, 1, 1),
    }
    body = """a = Conv(x, w1) r = Relu(a) b = Conv <pads = [1, 1, 1, 1]> (r, w2) c = Relu(b)
              d = Conv <pads = [1, 1, 1, 1]> (c, w3) s = Add(r, d) y = Conv(s, w4)"""
    model = image_model(body, weights)
    small = shrunk(model)
    assert operators(small) == ["Conv", "Relu", "Conv"]
    assert parameters(small) == 12 + 8
    check_same(model, small, x=IMAGE)


def test_a_constant_branch_becomes_the_constant() -> None:
    weights = {"w1": draw(4, 3, 1, 1), "w3": np.zeros((4, 4, 1, 1), np.float32), "b3": draw(4), "w4": draw(2, 4, 1, 1)}
    model = image_model("r = Conv(x, w1) d = Conv(r, w3, b3) e = Sigmoid(d) s = Mul(r, e) y = Conv(s, w4)", weights)
    small = shrunk(model)
    assert operators(small) == ["Conv", "Mul", "Conv"]
    assert parameters(small) == 12 + 4 + 8
    check_same(model, small, x=IMAGE)


def test_a_gate_of_one_is_left_out() -> None:
    weights = {
        "w1": draw(4, 3, 1, 1),
        "g": np.zeros((4, 4, 1, 1), np.float32),
        "b": np.ones(4, np.float32),
        "w4": draw(2, 4, 1, 1),
    }
    body = "r = Conv(x, w1) m = GlobalAveragePool(r) d = Conv(m, g, b) e = Relu(d) s = Mul(r, e) y = Conv(s, w4)"
    model = image_model(body, weights)
    small = shrunk(model)
    assert operators(small) == ["Conv", "Conv"]
    check_same(model, small, x=IMAGE)


def test_a_concat_of_one_and_a_dead_part() -> None:
    weights = {"w1": draw(4, 3, 1, 1), "w2": np.zeros((3, 3, 1, 1), np.float32), "w4": draw(2, 7, 1, 1)}
    model = image_model("a = Conv(x, w1) b = Conv(x, w2) s = Concat <axis = 1> (a, b) y = Conv(s, w4)", weights)
    small = shrunk(model)
    assert operators(small) == ["Conv", "Conv"]
    assert parameters(small) == 12 + 8
    check_same(model, small, x=IMAGE)


# --- normalisations ---------------------------------------------------------------------------------------------


def test_batch_norm_after_relu_moves_the_constant() -> None:
    w1, b1 = dead(draw(4, 3, 3, 3), 1, 2), np.array([0.1, 0.5, -0.2, 0.3], np.float32)
    weights = {
        "w1": w1,
        "b1": b1,
        "g": draw(4),
        "h": draw(4),
        "m": draw(4),
        "v": np.abs(draw(4)),
        "w2": draw(2, 4, 1, 1),
    }
    model = image_model(
        "a = Conv(x, w1, b1) r = Relu(a) n = BatchNormalization(r, g, h, m, v) y = Conv(n, w2)", weights
    )
    small = shrunk(model)
    found = shapes(small)
    assert [found[name] for name in "ghmv"] == [(2,)] * 4
    assert found["w2"] == (2, 2, 1, 1)
    check_same(model, small, x=IMAGE)


def test_instance_norm_turns_a_zero_channel_into_its_bias() -> None:
    weights = {"w1": dead(draw(4, 3, 3, 3), 1), "g": draw(4), "h": draw(4), "w2": draw(2, 4, 1, 1)}
    model = image_model("a = Conv(x, w1) n = InstanceNormalization(a, g, h) y = Conv(n, w2)", weights)
    small = shrunk(model)
    assert shapes(small)["w2"] == (2, 3, 1, 1)
    np.testing.assert_allclose(
        weight(small, small.graph.node[-1].input[2]), weights["w2"][:, 1, 0, 0] * weights["h"][1], rtol=1e-6
    )
    check_same(model, small, x=IMAGE)


@pytest.mark.parametrize("opset", [18, 21])
def test_group_norm_loses_whole_groups(opset: int) -> None:
    size = 3 if opset == 18 else 6
    weights = {"w1": dead(draw(6, 3, 3, 3), 2, 3, 4), "g": draw(size), "h": draw(size), "w2": draw(2, 6, 1, 1)}
    body = "a = Conv(x, w1) n = GroupNormalization <num_groups = 3> (a, g, h) y = Conv(n, w2)"
    model = image_model(body, weights, opset=opset)
    small = shrunk(model)
    assert shapes(small)["w1"] == (4, 3, 3, 3)
    assert shapes(small)["g"] == (size * 2 // 3,)
    assert next(a.i for a in small.graph.node[1].attribute if a.name == "num_groups") == 2
    check_same(model, small, x=IMAGE)


def test_group_norm_in_its_reshape_form() -> None:
    weights = {
        "w1": dead(draw(6, 3, 3, 3), 2, 3, 4), "to": np.array([0, 3, -1]), "one": np.ones(3, np.float32),
        "nil": np.zeros(3, np.float32),
        "back": np.array([-1, 6, 4, 4]), "g": draw(6, 1, 1), "h": draw(6, 1, 1), "w2": draw(2, 6, 1, 1),
    }  # fmt: skip
    body = """a = Conv(x, w1) f = Reshape(a, to) i = InstanceNormalization(f, one, nil) b = Reshape(i, back)
              s = Mul(b, g) n = Add(s, h) y = Conv(n, w2)"""
    model = image_model(body, weights)
    small = shrunk(model)
    found = shapes(small)
    assert found["w1"] == (4, 3, 3, 3)
    assert found["one"] == (2,)
    assert found["w2"] == (2, 4, 1, 1)
    check_same(model, small, x=IMAGE)


@pytest.mark.parametrize("channels", [[2, 3], [4, 5], [2, 3, 4, 5]], ids=["second", "third", "both"])
def test_group_norm_in_its_reshape_form_with_free_positions(channels: list[int]) -> None:
    weights = {
        "w1": dead(draw(6, 3, 3, 3), *channels), "to": np.array([0, 3, -1]), "one": np.ones(3, np.float32),
        "nil": np.zeros(3, np.float32), "g": draw(6, 1, 1), "h": draw(6, 1, 1), "w2": draw(2, 6, 1, 1),
    }  # fmt: skip
    body = """a = Conv(x, w1) f = Reshape(a, to) i = InstanceNormalization(f, one, nil) back = Shape(a)
              b = Reshape(i, back) s = Mul(b, g) n = Add(s, h) y = Conv(n, w2)"""
    model = image_model(body, weights, inputs="float[N, 3, H, W] x")
    small = shrunk(model)
    found, left = shapes(small), 6 - len(channels)
    assert found["w1"] == (left, 3, 3, 3)
    assert found["one"] == (left // 2,)
    assert found["w2"] == (2, left, 1, 1)
    check_same(model, small, x=IMAGE)


def test_a_group_of_unequal_constants_is_not_known() -> None:
    """What differs within a group is lost where its channels are merged with positions."""
    weights = {
        "w1": dead(draw(6, 3, 3, 3), 2, 3), "b1": draw(6), "to": np.array([0, 3, -1]), "one": np.ones(3, np.float32),
        "nil": np.zeros(3, np.float32), "w2": draw(2, 6, 1, 1),
    }  # fmt: skip
    body = """a = Conv(x, w1, b1) f = Reshape(a, to) i = InstanceNormalization(f, one, nil) back = Shape(a)
              b = Reshape(i, back) y = Conv(b, w2)"""
    model = image_model(body, weights, inputs="float[N, 3, H, W] x")
    small = shrunk(model)
    assert shapes(small)["w1"] == (6, 3, 3, 3)
    check_same(model, small, x=IMAGE)


def test_rms_norm_of_zeros_is_rescaled() -> None:
    weights = {"w1": dead(draw(5, 8), 1, 2, 5, axis=1), "g": draw(8), "w2": draw(8, 3)}
    text = """g (float[N, 5] x) => (float[N, 3] y) {
              a = MatMul(x, w1) n = RMSNormalization <epsilon = 0.1> (a, g) y = MatMul(n, w2) }"""
    model = build(text, opset=23, ir=11, **weights)
    small = shrunk(model)
    assert shapes(small) == {"w1": (5, 5), "g": (5,), "w2": (5, 3)}
    np.testing.assert_allclose(weight(small, "g"), weights["g"][[0, 3, 4, 6, 7]] * np.sqrt(8 / 5), rtol=1e-6)
    epsilon = next(a.f for a in small.graph.node[1].attribute if a.name == "epsilon")
    assert epsilon == pytest.approx(0.1 * 8 / 5)
    check_same(model, small, x=draw(4, 5))


def test_rms_norm_written_out() -> None:
    weights = {
        "w1": dead(draw(5, 8), 1, 2, 5, axis=1),
        "g": draw(8),
        "w2": draw(8, 3),
        "two": np.array(2, np.float32),
        "e": np.array(0.1, np.float32),
    }
    text = """g (float[N, 5] x) => (float[N, 3] y) { a = MatMul(x, w1) q = Pow(a, two) m = ReduceMean <axes = [-1]> (q)
              t = Add(m, e) s = Sqrt(t) n = Div(a, s) z = Mul(n, g) y = MatMul(z, w2) }"""
    model = build(text, **weights)
    small = shrunk(model)
    assert shapes(small)["w1"] == (5, 5)
    assert shapes(small)["w2"] == (5, 3)
    check_same(model, small, x=draw(4, 5))


def test_a_choice_that_is_settled_by_what_stays_is_left_out() -> None:
    weights = {"w1": dead(draw(5, 6), 1, 2, axis=1), "c": np.isin(np.arange(6), [1, 2]), "v": dead(draw(6), 1, 2),
               "w2": draw(6, 3)}  # fmt: skip
    model = build("g (float[N, 5] x) => (float[N, 3] y) { a = MatMul(x, w1) z = Where(c, v, a) y = MatMul(z, w2) }",
                  **weights)  # fmt: skip
    small = shrunk(model)
    assert operators(small) == ["MatMul", "MatMul"]
    assert shapes(small) == {"w1": (5, 4), "w2": (4, 3)}
    check_same(model, small, x=draw(4, 5))


def test_layer_norm_keeps_its_inputs_and_says_why() -> None:
    weights = {"w1": dead(draw(5, 8), 2, axis=1), "g": draw(8), "h": draw(8), "w2": draw(8, 3)}
    text = (
        "g (float[N, 5] x) => (float[N, 3] y) { a = MatMul(x, w1) n = LayerNormalization(a, g, h) y = MatMul(n, w2) }"
    )
    model = build(text, **weights)
    small, plan = shrunk_with_plan(model)
    assert shapes(small)["w1"] == (5, 8)
    causes = {plan.causes[number].reason for number in plan.cause["a"][1] if number > 1}
    assert causes == {"the operator keeps this axis whole"}
    check_same(model, small, x=draw(4, 5))


def test_layer_norm_outputs_of_zero_scale_are_constants() -> None:
    weights = {"w1": draw(5, 8), "g": dead(draw(8), 3, 4), "h": draw(8), "w2": draw(8, 3)}
    text = (
        "g (float[N, 5] x) => (float[N, 3] y) { a = MatMul(x, w1) n = LayerNormalization(a, g, h) y = MatMul(n, w2) }"
    )
    model = build(text, **weights)
    check_same(model, shrunk(model), x=draw(4, 5))


@pytest.mark.parametrize(
    ("node", "extra"),
    [
        ("LpNormalization <axis = 1, p = 2> (a)", {}),
        ("LRN <size = 3> (a)", {}),
        ("MeanVarianceNormalization (a)", {}),
        ("Softmax <axis = 1> (a)", {}),
        ("LogSoftmax <axis = 1> (a)", {}),
        ("ReduceMean <axes = [1]> (a)", {}),
        ("ReduceSum (a, one)", {"one": np.array([1])}),
        ("ReduceL2 <axes = [1]> (a)", {}),
        ("ReduceMax <axes = [1]> (a)", {}),
        ("ReduceSumSquare <axes = [1]> (a)", {}),
    ],
)
def test_norms_over_channels_stay_exact(node: str, extra: dict[str, Any]) -> None:
    w1, b1 = dead(draw(4, 3, 1, 1), 1, 2), np.array([0.1, 0.5, 0.0, 0.3], np.float32)
    width = 1 if "Reduce" in node else 4
    model = image_model(
        f"a = Conv(x, w1, b1) p = {node} y = Conv(p, w2)", dict(w1=w1, b1=b1, w2=draw(2, width, 1, 1), **extra)
    )
    check_same(model, shrunk(model), x=IMAGE)


# --- sharing, interface, types ----------------------------------------------------------------------------------


def test_a_shared_weight_is_split_only_where_that_is_smaller() -> None:
    shared = dead(draw(6, 6), 1, axis=1)
    text = (
        "g (float[N, 5] x) => (float[N, 3] y) { a = MatMul(x, w) b = MatMul(a, s) c = MatMul(b, s) y = MatMul(c, z) }"
    )
    model = build(text, w=draw(5, 6), s=shared, z=draw(6, 3))
    small = shrunk(model)
    check_same(model, small, x=draw(4, 5))
    assert parameters(small) <= parameters(model)


def test_a_bias_shared_between_layers() -> None:
    weights = {"w1": dead(draw(4, 3, 1, 1), 1), "w2": dead(draw(4, 4, 1, 1), 2), "b": draw(4), "w3": draw(2, 4, 1, 1)}
    model = image_model("a = Conv(x, w1, b) r = Relu(a) c = Conv(r, w2, b) d = Relu(c) y = Conv(d, w3)", weights)
    small = shrunk(model)
    check_same(model, small, x=IMAGE)
    assert shapes(small)["w2"] == (3, 3, 1, 1)


def test_an_initializer_that_the_caller_may_replace_stays() -> None:
    weights = {"w1": dead(draw(4, 3, 1, 1), 1), "w2": draw(2, 4, 1, 1)}
    model = image_model("a = Conv(x, w1) y = Conv(a, w2)", weights)
    info = onnx.helper.make_tensor_value_info("w1", onnx.TensorProto.FLOAT, [4, 3, 1, 1])
    model.graph.input.append(info)
    small = shrunk(model)
    assert shapes(small)["w1"] == (4, 3, 1, 1)
    replaced = draw(4, 3, 1, 1, seed=5)
    check_same(model, small, x=IMAGE, w1=replaced)


def test_before_ir_4_initializers_are_listed_as_inputs() -> None:
    weights = {"w1": dead(draw(4, 3, 1, 1), 1), "w2": draw(2, 4, 1, 1)}
    model = image_model("a = Conv(x, w1) y = Conv(a, w2)", weights, opset=11)
    model.ir_version = 3
    for name, shape in (("w1", [4, 3, 1, 1]), ("w2", [2, 4, 1, 1])):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    small = shrunk(model)
    assert shapes(small) == {"w1": (3, 3, 1, 1), "w2": (2, 3, 1, 1)}
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in small.graph.input}
    assert dims["w1"] == [3, 3, 1, 1]
    check_same(model, small, x=IMAGE)


def test_half_precision() -> None:
    weights = {
        "w1": dead(draw(6, 3, 1, 1, dtype=np.float16), 1, 3), "b1": draw(6, dtype=np.float16),
        "w2": draw(4, 6, 3, 3, dtype=np.float16), "w3": draw(2, 4, 1, 1, dtype=np.float16),
    }  # fmt: skip
    text = """g (float16[N, 3, 6, 6] x) => (float16[N, 2, 6, 6] y)
      { a = Conv(x, w1, b1) r = Sigmoid(a) c = Conv <pads = [1, 1, 1, 1]> (r, w2) y = Conv(c, w3) }"""
    model = build(text, **weights)
    small = shrunk(model)
    assert shapes(small)["w1"] == (4, 3, 1, 1)
    assert shapes(small)["w2"] == (4, 5, 3, 3)
    # A few units in the last place of float16.
    check_same(model, small, 3e-3, x=draw(2, 3, 6, 6, dtype=np.float16))


def test_double_precision() -> None:
    weights = {"w1": dead(draw(3, 6, dtype=np.float64), 1, 3, axis=1), "b1": draw(6, dtype=np.float64)}
    weights |= {"w2": draw(6, 2, dtype=np.float64)}
    text = """g (double[N, 3] x) => (double[N, 2] y)
      { a = MatMul(x, w1) c = Add(a, b1) r = Sigmoid(c) y = MatMul(r, w2) }"""
    model = build(text, **weights)
    small = shrunk(model)
    assert shapes(small)["w1"] == (3, 4)
    check_same(model, small, 1e-14, x=draw(2, 3, dtype=np.float64))


def test_if_bodies_shrink() -> None:
    text = """g (float[N, 3] x, bool c) => (float[N, 2] y) {
      a = MatMul(x, w1)
      b = If (c) <then_branch = t () => (float[N, 6] p) { p = Relu(a) },
                  else_branch = e () => (float[N, 6] q) { h = MatMul(a, w2) q = Add(h, a) }>
      y = MatMul(b, w3) }"""
    weights = {"w1": dead(draw(3, 6), 1, 4, axis=1), "w2": dead(draw(6, 6), 1, 4, axis=1), "w3": draw(6, 2)}
    model = build(text, **weights)
    small = shrunk(model)
    assert shapes(small) == {"w1": (3, 4), "w2": (4, 4), "w3": (4, 2)}
    for condition in (True, False):
        check_same(model, small, x=draw(5, 3), c=np.array(condition))


def test_loop_bodies_shrink_inside() -> None:
    text = """g (float[N, 3] x, int64 n, bool c) => (float[N, 3] y) {
      y = Loop (n, c, x) <body = l (int64 i, bool k, float[N, 3] s) => (bool k2, float[N, 3] s2)
        { k2 = Identity(k) a = MatMul(s, w1) r = Relu(a) s2 = MatMul(r, w2) }> }"""
    model = build(text, w1=dead(draw(3, 6), 1, 4, axis=1), w2=draw(6, 3))
    small = shrunk(model)
    assert shapes(small) == {"w1": (3, 4), "w2": (4, 3)}
    check_same(model, small, x=draw(5, 3), n=np.array(3), c=np.array(True))


def test_extents_read_for_other_purposes_keep_their_value() -> None:
    text = """g (float[N, 3] x) => (float[N, 2] y) { a = MatMul(x, w1) s = Shape(a) d = Gather(s, one)
      f = Cast <to = 1> (d) q = Sqrt(f) r = Div(a, q) y = MatMul(r, w2) }"""
    model = build(text, w1=dead(draw(3, 9), 1, 4, axis=1), w2=draw(9, 2), one=np.array(1))
    small = shrunk(model)
    assert shapes(small)["w1"] == (3, 7)
    check_same(model, small, x=draw(5, 3))


def test_everything_dead_still_runs() -> None:
    model = image_model(
        "a = Conv(x, w1, b1) y = Conv(a, w2)",
        {"w1": np.zeros((4, 3, 1, 1), np.float32), "b1": draw(4), "w2": draw(2, 4, 1, 1)},
    )
    small = shrunk(model)
    check_same(model, small, x=IMAGE)
    assert parameters(small) < parameters(model)
    assert run(small, x=IMAGE)[0].shape == (2, 2, 6, 6)

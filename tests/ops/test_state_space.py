"""Layers of linear attention: channels and heads that are zero leave, with the attributes that count heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import Array, build, check_same, dead, draw, shapes, shrunk, weight
from onnx import helper

BATCH, STEPS, WIDTH = 2, 5, 4
X = draw(BATCH, STEPS, WIDTH, seed=3)

# --- Causal convolution -----------------------------------------------------------------------------------------

CHANNELS = 6


def convolution(
    body: str = "o, s = CausalConvWithState(h, w, b)", outputs: str = "", **changes: Array
) -> onnx.ModelProto:
    """Six channels, of which 1 and 4 are zero before the convolution."""
    weights = {
        "first": dead(draw(WIDTH, CHANNELS), 1, 4, axis=1),
        "w": draw(CHANNELS, 1, 3),
        "b": dead(draw(CHANNELS), 1, 4),
        "head": draw(CHANNELS, 2),
    }
    text = f"""
        g (float[{BATCH}, {STEPS}, {WIDTH}] x) => (float[{BATCH}, {STEPS}, 2] y{outputs}) {{
            m = MatMul(x, first) h = Transpose <perm = [0, 2, 1]> (m) {body}
            t = Transpose <perm = [0, 2, 1]> (o) y = MatMul(t, head)
        }}
    """
    used = {name: value for name, value in {**weights, **changes}.items() if f"{name}" in text}
    return build(text, opset=27, ir=10, **used)


def test_zero_channels_leave_the_kernel() -> None:
    big = convolution()
    small = shrunk(big)
    assert shapes(small) == {"first": (4, 4), "w": (4, 1, 3), "b": (4,), "head": (4, 2)}
    np.testing.assert_array_equal(weight(small, "w"), draw(CHANNELS, 1, 3)[[0, 2, 3, 5]])
    check_same(big, small, x=X)


def test_channels_that_nothing_reads_leave() -> None:
    big = convolution(head=dead(draw(CHANNELS, 2), 0, 5))
    small = shrunk(big)
    assert shapes(small) == {"first": (4, 2), "w": (2, 1, 3), "b": (2,), "head": (2, 2)}
    check_same(big, small, x=X)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_a_bias_alone_is_folded_in_what_follows(activation: str) -> None:
    """Channel 2 has a kernel of zeros: it holds its bias, activated."""
    bias = dead(draw(CHANNELS), 1, 4)
    body = f'o, s = CausalConvWithState <activation = "{activation}"> (h, w, b)'
    big = convolution(body, b=bias, w=dead(draw(CHANNELS, 1, 3), 2))
    small = shrunk(big)
    assert shapes(small)["first"] == (4, 3)
    (added,) = [name for name in shapes(small) if name not in ("first", "w", "b", "head")]
    value = bias[2] / (1 + np.exp(-bias[2])) if activation == "silu" else bias[2]
    np.testing.assert_allclose(weight(small, added), value * draw(CHANNELS, 2)[2], rtol=1e-6)
    check_same(big, small, x=X)


def test_a_state_that_is_read_keeps_what_it_carries() -> None:
    """The kernel of channel 2 is zero, but the next state still holds the channel's last inputs."""
    body = "o, s = CausalConvWithState(h, w, b) u = Transpose <perm = [0, 2, 1]> (s) z = MatMul(u, head)"
    big = convolution(body, f", float[{BATCH}, 2, 2] z", w=dead(draw(CHANNELS, 1, 3), 2))
    small = shrunk(big)
    assert shapes(small)["first"] == (4, 4)
    check_same(big, small, x=X)


@pytest.mark.parametrize(("value", "left"), [(0.0, 4), (0.5, 5)])
def test_a_state_before_the_first_step_counts(value: float, left: int) -> None:
    past = dead(draw(BATCH, CHANNELS, 2), 1, 4, axis=1)
    past[0, 4, 1] = value
    big = convolution("o, s = CausalConvWithState(h, w, b, past)", past=past)
    small = shrunk(big)
    assert shapes(small)["past"] == (BATCH, left, 2)
    check_same(big, small, x=X)


# --- Linear attention -------------------------------------------------------------------------------------------

HEADS, KEY, VALUE = 3, 2, 3


def attention(
    rule: str = "linear", shared: int = 1, gate: str = "key", past: Array | None = None, **changes: Any
) -> Any:
    """Three heads of three values; the second head's values are zero."""
    values = dead(draw(WIDTH, HEADS * VALUE), *range(VALUE, 2 * VALUE), axis=1)
    weights = {
        "wq": draw(WIDTH, HEADS * shared * KEY),
        "wk": 0.3 * draw(WIDTH, HEADS * KEY),
        "wv": values,
        "wo": draw(HEADS * shared * VALUE, 2),
        **changes,
    }
    inputs, gates = ["q", "k", "v", "past" if past is not None else "", "", ""], ""
    if "gated" in rule:
        weights["wg"] = draw(WIDTH, HEADS * KEY if gate == "key" else HEADS)
        gates, inputs[4] = "g0 = MatMul(x, wg) g1 = Abs(g0) g = Neg(g1) ", "g"
    if "delta" in rule:
        weights["wb"] = draw(WIDTH, HEADS)
        gates, inputs[5] = gates + "b0 = MatMul(x, wb) b = Sigmoid(b0) ", "b"
    if past is not None:
        weights["past"] = past
    text = f"""
        g (float[{BATCH}, {STEPS}, {WIDTH}] x) => (float[{BATCH}, {STEPS}, 2] y) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) {gates} o = Identity(v) y = MatMul(o, wo)
        }}
    """
    model = build(text, opset=27, ir=10, **weights)
    attributes = {"q_num_heads": HEADS * shared, "kv_num_heads": HEADS, "update_rule": rule}
    (place,) = [node for node in model.graph.node if node.op_type == "Identity"]
    place.CopyFrom(helper.make_node("LinearAttention", inputs, ["o", "s"], **attributes))
    return model


def head_counts(model: onnx.ModelProto) -> tuple[int, int]:
    (node,) = [node for node in model.graph.node if node.op_type == "LinearAttention"]
    found = {attribute.name: attribute.i for attribute in node.attribute}
    return found["q_num_heads"], found["kv_num_heads"]


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("gate", ["key", "head"])
def test_a_head_without_values_leaves(rule: str, shared: int, gate: str) -> None:
    big = attention(rule, shared, gate)
    small = shrunk(big)
    assert head_counts(small) == (2 * shared, 2)
    expected = {"wq": (4, 4 * shared), "wk": (4, 4), "wv": (4, 6), "wo": (6 * shared, 2)}
    if "gated" in rule:
        expected["wg"] = (4, 4 if gate == "key" else 2)
    if "delta" in rule:
        expected["wb"] = (4, 2)
    assert shapes(small) == expected
    check_same(big, small, x=X, tolerance=1e-5)


def test_a_head_that_nothing_reads_leaves() -> None:
    big = attention("gated_delta", wv=draw(WIDTH, HEADS * VALUE), wo=dead(draw(HEADS * VALUE, 2), 6, 7, 8))
    small = shrunk(big)
    assert head_counts(small) == (2, 2)
    assert shapes(small)["wk"] == (4, 4)
    check_same(big, small, x=X, tolerance=1e-5)


def test_a_value_that_is_zero_in_every_head_leaves() -> None:
    big = attention("delta", wv=dead(draw(WIDTH, HEADS * VALUE), 1, 4, 7, axis=1))
    small = shrunk(big)
    assert head_counts(small) == (3, 3)
    assert shapes(small)["wv"] == (4, 6)
    assert shapes(small)["wo"] == (6, 2)
    assert shapes(small)["wk"] == (4, 6)
    check_same(big, small, x=X, tolerance=1e-5)


@pytest.mark.parametrize(("value", "left"), [(0.0, 2), (0.4, 3)])
def test_a_state_before_the_first_step_keeps_its_head(value: float, left: int) -> None:
    past = np.zeros((BATCH, HEADS, KEY, VALUE), np.float32)
    past[1, 1, 0, 2] = value
    big = attention("linear", past=past)
    small = shrunk(big)
    assert head_counts(small) == (left, left)
    check_same(big, small, x=X, tolerance=1e-5)

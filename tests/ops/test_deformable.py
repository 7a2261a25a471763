"""Deformable convolution: channels of the input and of the output leave, offsets stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import Array, build, check_same, dead, draw, shapes, shrunk, weight

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph

FEED = {"x": draw(2, 3, 6, 6), "offset": 0.7 * draw(2, 18, 4, 4), "mask": np.abs(draw(2, 9, 4, 4))}


def model(attributes: str = "", inputs: str = "h, w, offset, b, mask", **changes: Array) -> onnx.ModelProto:
    """Five channels of the input, of which 1 and 3 are zero; six of the output, of which 2 and 5 are not read."""
    weights: dict[str, Any] = {
        "first": dead(draw(5, 3, 1, 1), 1, 3),
        "w": draw(6, 5, 3, 3),
        "b": draw(6),
        "last": dead(draw(2, 6, 1, 1), 2, 5, axis=1),
        **changes,
    }
    text = f"""
        g (float[2, 3, 6, 6] x, float[2, 18, 4, 4] offset, float[2, 9, 4, 4] mask) => (float[2, 2, 4, 4] y) {{
            h = Conv(x, first) d = DeformConv {attributes} ({inputs}) y = Conv(d, last)
        }}
    """
    return build(text, opset=22, ir=10, **weights)


@pytest.mark.parametrize("inputs", ["h, w, offset", "h, w, offset, b", "h, w, offset, b, mask"])
def test_channels_leave_on_both_sides(inputs: str) -> None:
    big = model(inputs=inputs)
    small = shrunk(big)
    assert shapes(small)["first"] == (3, 3, 1, 1)
    assert shapes(small)["w"] == (4, 3, 3, 3)
    assert shapes(small)["last"] == (2, 4, 1, 1)
    expected = draw(6, 5, 3, 3)[[0, 1, 3, 4]][:, [0, 2, 4]]
    np.testing.assert_array_equal(weight(small, "w"), expected)
    check_same(big, small, **FEED)


def test_a_channel_without_weights_holds_its_bias() -> None:
    big = model(w=dead(draw(6, 5, 3, 3), 0))
    small = shrunk(big)
    assert shapes(small)["w"] == (3, 3, 3, 3)
    (added,) = [name for name in shapes(small) if name not in ("first", "w", "b", "last")]
    np.testing.assert_allclose(weight(small, added), draw(6)[0] * draw(2, 6, 1, 1)[:, 0, 0, 0], rtol=1e-6)
    check_same(big, small, **FEED)


def test_a_constant_channel_stays() -> None:
    """Samples outside the image are zero, so that its contribution is not the same everywhere."""
    bias = np.array([0, 0.5, 0, 0, 0], np.float32)
    big = model(offset_bias=bias)
    (first,) = [node for node in big.graph.node if node.input[1] == "first"]
    first.input.append("offset_bias")
    small = shrunk(big)
    assert shapes(small)["w"] == (4, 4, 3, 3)
    check_same(big, small, **FEED)


def test_groups_that_share_offsets_keep_the_input() -> None:
    text = """
        g (float[2, 3, 6, 6] x, float[2, 36, 4, 4] offset) => (float[2, 6, 4, 4] y) {
            h = Conv(x, first) y = DeformConv <offset_group = 2> (h, w, offset)
        }
    """
    big = build(text, opset=22, ir=10, first=dead(draw(4, 3, 1, 1), 1), w=draw(6, 4, 3, 3))
    small = shrunk(big)
    assert shapes(small) == shapes(big)
    check_same(big, small, x=FEED["x"], offset=0.7 * draw(2, 36, 4, 4))


def test_groups_of_channels_are_refused() -> None:
    text = """
        g (float[2, 3, 6, 6] x, float[2, 18, 4, 4] offset) => (float[2, 6, 4, 4] y) {
            h = Conv(x, first) y = DeformConv <group = 2> (h, w, offset)
        }
    """
    big = build(text, opset=22, ir=10, first=dead(draw(4, 3, 1, 1), 1), w=draw(6, 2, 3, 3))
    (refusal,) = analyse(Graph(big)).refusals
    assert refusal.reason == "a deformable convolution with groups of channels"
    assert shapes(shrunk(big)) == shapes(big)

"""Extents that a graph computes from extents bear the symbol of what they were computed from."""

from __future__ import annotations

import numpy as np
import pytest
from models import build

from onnxshrink.graph import Graph

ONE, ZERO, TWO = np.array(1, np.int64), np.array(0, np.int64), np.array([2], np.int64)
ONES, MINUS = np.array([1, 1, 1], np.int64), np.array([-1], np.int64)


def shape_of(name: str, body: str, **weights: np.ndarray) -> tuple[int | str | None, ...] | None:
    text = f"g (float[batch, length, 4] x) => (float[N, M, K] y) {{ {body} }}"
    return Graph(build(text, zero=ZERO, one=ONE, two=TWO, ones=ONES, minus=MINUS, **weights)).shape(name)


LENGTH = "s = Shape(x) n = Gather(s, one)"


@pytest.mark.parametrize(
    "body",
    [
        f"{LENGTH} r = Range(zero, n, one)",
        f"{LENGTH} f = Cast <to = 7> (n) r = Range(zero, f, one)",
        f"{LENGTH} m = Mul(n, one) a = Add(zero, m) r = Range(zero, a, one)",
        "n = Shape <start = 1, end = 2> (x) q = Squeeze(n) r = Range(zero, q, one)",
    ],
    ids=["gathered", "cast", "unchanged by arithmetic", "a slice of the shape"],
)
def test_a_range_is_as_long_as_its_limit_says(body: str) -> None:
    assert shape_of("r", f"{body} y = Identity(x)") == ("length",)


def test_a_range_that_starts_elsewhere_has_an_extent_of_its_own() -> None:
    found = shape_of("r", f"{LENGTH} r = Range(one, n, one) y = Identity(x)")
    assert found is not None
    assert found != ("length",)


def test_a_target_in_which_minus_one_is_replaced_keeps_its_symbols() -> None:
    """As the older PyTorch exporter writes `expand(batch, -1, 4)`: no extent is -1, so that nothing is replaced."""
    body = "s = Shape(x) c = Equal(s, minus) t = Where(c, ones, s) e = Expand(one_f, t) y = Identity(e)"
    assert shape_of("e", body, one_f=np.ones((1, 1, 1), np.float32)) == ("batch", "length", 4)


def test_what_is_broadcast_against_such_an_extent_keeps_it() -> None:
    broadcast = "f = Cast <to = 1> (r) u = Unsqueeze(f, minus) z = Mul(x, u) y = Identity(z)"
    body = f"{LENGTH} r = Range(zero, n, one) {broadcast}"
    assert shape_of("u", body) == ("length", 1)
    assert shape_of("z", body) == ("batch", "length", 4)


def test_a_filled_tensor_takes_its_extents_from_its_target() -> None:
    body = "s = Shape(x) f = ConstantOfShape(s) y = Add(x, f)"
    assert shape_of("f", body) == ("batch", "length", 4)


def test_a_target_put_together_from_extents() -> None:
    body = f"""{LENGTH} b = Gather(s, zero) u = Unsqueeze(b, axis) v = Unsqueeze(n, axis)
        t = Concat <axis = 0> (v, u, two, two) r = Reshape(x, t) y = Identity(x)"""
    assert shape_of("r", body, axis=np.array([0], np.int64)) == ("length", "batch", 2, 2)

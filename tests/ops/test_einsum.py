"""Einsum: its equation tells which axes lose what."""

from __future__ import annotations

import numpy as np
import pytest
from models import build, check_same, dead, draw, shapes, shrunk

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph
from onnxshrink.ops.einsum import contract


def test_a_projection_to_heads_loses_features_heads_and_dimensions() -> None:
    w = dead(dead(draw(4, 3, 5), 1, axis=1), 0, 2, axis=2)
    model = build(
        """g (float[N, 6, 3] x) => (float[N, 6, 2] y) {
            a = MatMul(x, u) q = Einsum<equation = "bsf,fhd->bhsd">(a, w)
            y = Einsum<equation = "bhsd,hdo->bso">(q, v) }""",
        u=dead(draw(3, 4), 3, axis=1), w=w, v=draw(3, 5, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"u": (3, 3), "w": (3, 2, 3), "v": (2, 3, 2)}
    check_same(model, small, x=draw(2, 6, 3))


@pytest.mark.parametrize("equation", ["...f,fo->...o", "abf,fo", "a b f , f o -> a b o"])
def test_ways_to_write_a_product(equation: str) -> None:
    model = build(
        f'g (float[2, 6, 3] x) => (float[2, 6, 2] y) {{ a = MatMul(x, u) y = Einsum<equation = "{equation}">(a, w) }}',
        u=dead(draw(3, 4), 3, axis=1), w=dead(draw(4, 2), 0),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"u": (3, 2), "w": (2, 2)}
    check_same(model, small, x=draw(2, 6, 3))


def test_an_index_leaves_when_any_factor_is_zero() -> None:
    model = build(
        """g (float[2, 3] x) => (float[2, 2] y) {
            a = MatMul(x, u) b = MatMul(x, t) y = Einsum<equation = "nk,nk,ko->no">(a, b, w) }""",
        u=dead(draw(3, 5), 0, axis=1), t=dead(draw(3, 5), 1, axis=1), w=dead(draw(5, 2), 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"u": (3, 2), "t": (3, 2), "w": (2, 2)}
    check_same(model, small, x=draw(2, 3))


def test_a_constant_that_meets_a_constant_stays() -> None:
    model = build(
        """g (float[2, 3] x) => (float[2, 2] y) {
            a = Gemm(x, u, b) y = Einsum<equation = "nk,ko->no">(a, w) }""",
        u=dead(draw(3, 4), 0, 1, axis=1), b=np.array([0.5, 0, 0.1, 0.2], np.float32), w=draw(4, 2),
    )  # fmt: skip
    small = shrunk(model)
    assert shapes(small) == {"u": (3, 3), "b": (3,), "w": (3, 2)}
    check_same(model, small, x=draw(2, 3))


def test_a_diagonal_is_kept_whole() -> None:
    model = build(
        'g (float[2, 3] x) => (float[2] y) { a = MatMul(x, u) r = Reshape(a, s) y = Einsum<equation = "nii->n">(r) }',
        u=dead(draw(3, 4), 1, 3, axis=1), s=np.array([0, 2, 2]),
    )  # fmt: skip
    assert [r.reason for r in analyse(Graph(model)).refusals] == ["a diagonal is taken"]
    small = shrunk(model)
    check_same(model, small, x=draw(2, 3))


def test_compressed_masks_are_contracted_without_being_spread() -> None:
    """One row for all of `n`, one column for all of `o`: the result has extent one on both."""
    left, right = np.array([[1.0, 0.0, 2.0]]), np.array([[1.0], [1.0], [0.5]])
    np.testing.assert_array_equal(contract([left, right], ["nk", "ko"], "no"), [[2.0]])

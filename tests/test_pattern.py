"""Patterns of matrices, with equal lines stored once."""

from __future__ import annotations

import numpy as np
import pytest

from onnxshrink import pattern as module
from onnxshrink.ops.contraction import bool_product
from onnxshrink.pattern import BoolArray, Pattern, collect

SHAPES = [(1, 1), (5, 1), (1, 9), (64, 70), (200, 3), (0, 4), (3, 0)]


def matrix(shape: tuple[int, int], kind: str, seed: int = 0) -> BoolArray:
    """Lines that are dead as a whole, single zeros, or both."""
    rng = np.random.default_rng(seed)
    lines = np.logical_and.outer(rng.random(shape[0]) < 0.5, rng.random(shape[1]) < 0.5)
    single = rng.random(shape) < 0.5
    return {"lines": lines, "single": single, "both": lines & single}[kind]


@pytest.mark.parametrize("kind", ["lines", "single", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_matrix(shape: tuple[int, int], kind: str) -> None:
    given = matrix(shape, kind)
    found = collect([given])
    chosen = np.random.default_rng(1).random(shape[0]) < 0.5, np.random.default_rng(2).random(shape[1]) < 0.5
    for some, expected, (rows, columns) in ((found, given, chosen), (found.T, given.T, chosen[::-1])):
        assert some.shape == expected.shape
        assert np.array_equal(some.full(), expected)
        assert np.array_equal(some.reached(0, columns), (expected & columns).any(axis=1))
        assert np.array_equal(some.reached(1, rows), (expected & rows[:, None]).any(axis=0))
        assert np.array_equal(some.anywhere(0), expected.any(axis=1))
        assert np.array_equal(some.anywhere(1), expected.any(axis=0))


def test_equal_lines_are_stored_once() -> None:
    found = collect([matrix((512, 300), "lines")])
    assert found.lines.shape == (2, 300)
    assert found.index.shape == (512,)


def test_lines_that_come_in_parts() -> None:
    given = matrix((100, 40), "both")
    found = collect([given[:30], given[30:31], given[31:]])
    assert np.array_equal(found.full(), given)
    assert found.lines.shape[0] == np.unique(given, axis=0).shape[0]


def test_lines_that_share_a_number_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPREAD", np.uint64(0))
    given = matrix((60, 50), "both")
    assert np.array_equal(collect([given]).full(), given)


@pytest.mark.parametrize("kind", ["lines", "single"])
@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 1, 1), (1, 6, 40), (3, 30, 40), (2, 1, 1)], ids=str)
def test_products_with_a_pattern(shape: tuple[int, ...], kind: str) -> None:
    left, right = np.random.default_rng(3).random(shape) < 0.2, matrix((40, 24), kind)
    expected = (np.broadcast_to(left, (*shape[:-1], 40)).astype(int) @ right) > 0
    found = bool_product(left, collect([right]))
    assert np.array_equal(np.broadcast_to(found, expected.shape), expected)
    flipped = bool_product(collect([right]).T, left.swapaxes(-1, -2))
    assert np.array_equal(np.broadcast_to(flipped, expected.swapaxes(-1, -2).shape), expected.swapaxes(-1, -2))


def test_a_product_of_two_patterns() -> None:
    left, right = matrix((20, 30), "single"), matrix((30, 10), "lines", seed=5)
    assert np.array_equal(bool_product(collect([left]), collect([right])), (left.astype(int) @ right) > 0)


def test_no_line_at_all() -> None:
    found = Pattern(np.zeros((0, 4), np.bool_), np.zeros(0, np.intp))
    assert found.anywhere(1).tolist() == [False] * 4
    assert found.full().shape == (0, 4)

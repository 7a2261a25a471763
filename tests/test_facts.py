"""The lattice of what is known: compressed arrays, and what keeps them small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.facts import (
    Known,
    along,
    compress,
    constant,
    everything,
    fits,
    nothing,
    partial,
    project,
    uniform,
)


def test_nothing_is_known_of_a_new_tensor() -> None:
    known = nothing(3, np.dtype(np.float16))
    assert known.mask.shape == known.value.shape == (1, 1, 1)
    assert known.value.dtype == np.float16
    assert not known.anything
    assert not known.everything


def test_a_constant_is_known_everywhere() -> None:
    known = constant(np.array([[0.0, 2.0]]))
    assert known.everything
    assert known.zero().tolist() == [[True, False]]
    assert known.nonzero().tolist() == [[False, True]]


def test_zero_and_nonzero_hold_where_something_is_known_only() -> None:
    known = Known(np.array([True, False, True]), np.array([0.0, 0.0, 3.0]))
    assert known.zero().tolist() == [True, False, False]
    assert known.nonzero().tolist() == [False, False, True]


def test_zeros_are_looked_for_once() -> None:
    known = constant(np.array([0.0, 1.0]))
    assert known.zero() is known.zero()
    assert not known.zero().flags.writeable


def test_a_value_that_is_not_a_number_is_known_and_not_zero() -> None:
    known = constant(np.array([np.nan]))
    assert not known.zero().any()
    assert known.nonzero().all()


# --- compression ------------------------------------------------------------------------------------------------


def test_axes_along_which_nothing_varies_are_cut() -> None:
    assert compress(np.broadcast_to(np.array([[1.0], [2.0]]), (2, 5))).shape == (2, 1)
    assert compress(np.zeros((4, 5))).shape == (1, 1)


def test_not_a_number_equals_itself_here() -> None:
    assert compress(np.full((3, 3), np.nan)).shape == (1, 1)


def test_large_arrays_are_not_searched() -> None:
    array = np.zeros((1 << 11, 1 << 10), np.bool_)
    assert compress(array) is array


def test_a_partial_fact_is_compressed() -> None:
    mask = np.zeros((2, 3, 4), np.bool_)
    mask[:, 1] = True
    known = partial(mask, np.where(mask, 5.0, 0.0))
    assert known.mask.shape == (1, 3, 1)
    assert known.value.shape == (1, 3, 1)


def test_an_empty_mask_leaves_nothing() -> None:
    known = partial(np.zeros((2, 2), np.bool_), np.ones((2, 2)))
    assert known.mask.shape == (1, 1)
    assert not known.anything


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_compression_loses_nothing(seed: int, shape: list[int]) -> None:
    rng = np.random.default_rng(seed)
    small = [extent if rng.random() < 0.5 else 1 for extent in shape]
    array = np.broadcast_to(rng.integers(0, 2, small), shape)
    compressed = compress(array)
    assert np.array_equal(np.broadcast_to(compressed, shape), array)
    assert all(cut in (1, extent) for cut, extent in zip(compressed.shape, small, strict=True))


# --- what is the same along an axis -----------------------------------------------------------------------------


def test_uniform_needs_one_value_and_full_knowledge_along_the_axes() -> None:
    mask = np.array([[True, True], [True, True], [True, False]])
    value = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    known = uniform(Known(mask, value), [1])
    assert known.mask.tolist() == [[True], [False], [False]]
    assert known.value[0, 0] == 1.0


def test_a_compressed_axis_is_uniform_already() -> None:
    known = uniform(Known(np.array([[True], [False]]), np.array([[3.0], [0.0]])), [1])
    assert known.mask.tolist() == [[True], [False]]


def test_along_expands_one_axis_only() -> None:
    assert along(np.zeros((1, 2)), 0, 5).shape == (5, 2)
    assert along(np.zeros((5, 2)), 0, 5).shape == (5, 2)


def test_project_asks_whether_any_element_holds() -> None:
    mask = np.array([[True, False, False]])
    assert project(mask, 1, 3).tolist() == [True, False, False]
    assert project(mask, 0, 4).tolist() == [True] * 4
    assert project(everything(2), 1, 2).tolist() == [True, True]


def test_a_projection_may_be_written_to() -> None:
    kept = project(everything(1), 0, 3)
    kept[1] = False
    assert kept.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("array", "shape", "fitting"),
    [((1, 3), (2, 3), True), ((1, 3), ("N", 3), True), ((2, 3), ("N", 3), False), ((3,), (2, 3), False)],
    ids=["compressed", "free axis", "full along a free axis", "rank"],
)
def test_fits(array: tuple[int, ...], shape: tuple[int | str, ...], fitting: bool) -> None:
    assert fits(np.zeros(array), shape) is fitting

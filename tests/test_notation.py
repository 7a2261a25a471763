"""Index notation: parsing, binding to shapes, reshapes, and carrying arrays between operands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.errors import RuleError
from onnxshrink.graph import Shape
from onnxshrink.notation import (
    Link,
    Relation,
    UnresolvedError,
    elementwise,
    opaque,
    parse,
    resolve,
    transfer,
)
from onnxshrink.reshaping import reshape

# --- parsing ----------------------------------------------------------------------------------------------------


def test_axes_products_and_pins() -> None:
    pattern = parse("n (g i) [*x], (g o) i [*k], (g o) -> n (g o) [*y]")
    assert [[axis.factors for axis in axes] for axes in pattern.inputs] == [
        [("n",), ("g", "i"), ("x",)],
        [("g", "o"), ("i",), ("k",)],
        [("g", "o")],
    ]
    assert [axis.factors for axis in pattern.outputs[0]] == [("n",), ("g", "o"), ("y",)]
    assert [axis.variadic for axis in pattern.outputs[0]] == [False, False, True]
    assert pattern.pinned == {"x", "k", "y"}


def test_an_axis_of_extent_one_has_no_factor() -> None:
    (axes,) = parse("n 1 -> n").inputs
    assert axes[1].factors == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a b", "exactly one '->'"),
        ("a -> b -> c", "exactly one '->'"),
        ("a ? -> a", "cannot read"),
        ("*a *b -> *a", "two variadic axes"),
    ],
    ids=["no arrow", "two arrows", "strange character", "two variadic axes"],
)
def test_malformed(text: str, complaint: str) -> None:
    with pytest.raises(RuleError, match=complaint):
        parse(text)


# --- binding to shapes ------------------------------------------------------------------------------------------


def test_a_variadic_axis_aligns_from_the_right() -> None:
    relation = resolve("*b m k, *b k n -> *b m n", [(5, 2, 3, 4), (2, 4, 6)], [(5, 2, 3, 6)])
    assert relation.inputs == ((("b2",), ("b1",), ("m",), ("k",)), (("b1",), ("k",), ("n",)))
    assert relation.outputs == ((("b2",), ("b1",), ("m",), ("n",)),)
    assert relation.sizes == {"b2": 5, "b1": 2, "m": 3, "k": 4, "n": 6}


def test_an_axis_that_broadcasts_carries_no_factor() -> None:
    relation = elementwise([(2, 3, 4), (3, 1)], [(2, 3, 4)])
    assert relation.inputs[1] == (("a2",), ())
    assert relation.sizes["a2"] == 3


def test_a_product_is_solved_from_the_other_operands() -> None:
    shapes: list[Shape | None] = [(1, 6, 5), (8, 3, 3), (8,)]
    relation = resolve("n (g i) [*x], (g o) i [*k], (g o) -> n (g o) [*y]", shapes, [(1, 8, 3)], {"g": 2})
    assert (relation.sizes["g"], relation.sizes["i"], relation.sizes["o"]) == (2, 3, 4)
    assert relation.pinned == {"x1", "k1", "y1", "x", "k", "y"}


def test_a_factor_on_an_axis_of_unknown_extent_stays_whole() -> None:
    relation = elementwise([("N", 3), (3,)], [("N", 3)])
    assert relation.pinned == {"a2"}
    assert relation.sizes["a2"] is None


@pytest.mark.parametrize(
    ("text", "inputs", "outputs"),
    [
        ("a b -> a b", [(2, 3)], [(2, 4)]),
        ("a b c -> a b c", [(2, 3)], [(2, 3)]),
        ("(a b) -> a b", [(7,)], [(2, None)]),
        ("(a b) -> a b", [(6,)], [(2, 4)]),
    ],
    ids=["extents differ", "rank too small", "does not divide", "product differs"],
)
def test_shapes_that_do_not_fit(text: str, inputs: list[Shape | None], outputs: list[Shape | None]) -> None:
    with pytest.raises(UnresolvedError):
        resolve(text, inputs, outputs)


def test_omitted_operands_take_no_part() -> None:
    relation = resolve("a b, b -> a b", [(2, 3), None], [(2, 3)])
    assert relation.spec(1) is None
    assert [slot for slot, _ in relation.slots()] == [0, -1]
    assert relation.spec(7) is None


def test_an_input_outside_the_notation_is_read_whole() -> None:
    shapes: list[Shape | None] = [(2, 3), (4,)]
    relation = resolve("a b -> a b", [shapes[0], None], [(2, 3)]).whole(shapes)
    assert relation.spec(1) == (("whole1_0",),)
    assert "whole1_0" in relation.pinned
    assert relation.sizes["whole1_0"] == 4


def test_of_an_opaque_operator_every_axis_is_pinned() -> None:
    relation = opaque([(2, "N"), None], [(3,)])
    assert relation.spec(0) == (("t0_0",), ("t0_1",))
    assert relation.spec(1) is None
    assert relation.pinned == {"t0_0", "t0_1", "t2_0"}
    assert relation.sizes == {"t0_0": 2, "t0_1": None, "t2_0": 3}


def test_pinning_more_factors_leaves_the_relation_as_it_was() -> None:
    relation = resolve("a b -> a b", [(2, 3)], [(2, 3)])
    assert relation.pin("b").pinned == {"b"}
    assert relation.pinned == frozenset()


# --- reshapes ---------------------------------------------------------------------------------------------------


def _extents(relation: Relation, slot: int) -> list[list[int | None]]:
    return [[relation.sizes[factor] for factor in factors] for factors in relation.spec(slot) or ()]


def _factors(relation: Relation, slot: int) -> list[str]:
    return [factor for factors in relation.spec(slot) or () for factor in factors]


@pytest.mark.parametrize(
    ("source", "target", "extents"),
    [
        ((2, 12), (2, 3, 4), [[2], [3, 4]]),
        ((2, 3, 4), (6, 4), [[2], [3], [4]]),
        ((8, 3), (4, 6), [[4, 2], [3]]),
        ((2, 1, 3), (1, 2, 3), [[2], [], [3]]),
    ],
    ids=["split", "merge", "both", "ones"],
)
def test_reshape_of_fixed_shapes(source: Shape, target: Shape, extents: list[list[int]]) -> None:
    relation = reshape(source, target)
    assert _extents(relation, 0) == extents
    assert _factors(relation, 0) == _factors(relation, -1)
    assert not relation.pinned


def test_extents_that_do_not_divide_each_other_are_pinned() -> None:
    relation = reshape((5, 6, 4), (5, 4, 6))
    assert (relation.spec(0) or ())[0] == (relation.spec(-1) or ())[0]
    assert (relation.spec(0) or ())[0][0] not in relation.pinned
    rest = {factor for factors in (relation.spec(0) or ())[1:] for factor in factors}
    assert rest & relation.pinned


def test_free_axes_of_one_name_match_and_stay_whole() -> None:
    relation = reshape(("N", 4, 6), ("N", 24))
    assert _extents(relation, 0) == [[None], [4], [6]]
    assert _extents(relation, -1) == [[None], [4, 6]]
    (free,) = (relation.spec(0) or ())[0]
    assert relation.pinned == {free}


def test_what_hides_in_a_free_axis_is_pinned() -> None:
    relation = reshape(("N", "M", 6), (None, 6))
    assert (relation.spec(0) or ())[2] == (relation.spec(-1) or ())[1]
    pinned = {f for axis in (relation.spec(0) or ())[:2] for f in axis} | set((relation.spec(-1) or ())[0])
    assert pinned <= relation.pinned


def test_a_tensor_without_elements_is_pinned_throughout() -> None:
    relation = reshape((0, 3), (3, 0))
    assert {f for _, spec in relation.slots() for axis in spec for f in axis} == relation.pinned


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes made of the same prime factors in the same order."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=6))
    shapes = []
    for _ in range(2):
        shape = [1]
        for prime in primes:
            if draw(st.booleans()):
                shape.append(prime)
            else:
                shape[-1] *= prime
        shapes.append(tuple(shape))
    return shapes[0], shapes[1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(reshapes(), st.integers(0, 2**16))
def test_unpinned_factors_move_elements_as_numpy_does(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    source, target = shapes
    relation = reshape(source, target)
    # A mask that is a product of what its free factors keep, and whole along the pinned ones.
    rng = np.random.default_rng(seed)
    kept = {
        name: np.ones(size or 1, np.bool_) if name in relation.pinned else rng.random(size or 1) < 0.5
        for name, size in relation.sizes.items()
    }
    masks = []
    for slot in (0, -1):
        mask = np.ones((), np.bool_)
        for factors in relation.spec(slot) or ():
            axis = np.ones(1, np.bool_)
            for factor in factors:
                axis = np.logical_and.outer(axis, kept[factor]).reshape(-1)
            mask = np.logical_and.outer(mask, axis)
        masks.append(mask)
    assert masks[0].shape == source
    assert np.array_equal(masks[0].reshape(target), masks[1])


# --- carrying arrays --------------------------------------------------------------------------------------------


def test_a_compressed_axis_stays_compressed() -> None:
    relation = resolve("a b -> b a", [(1000, 3)], [(3, 1000)])
    mask = np.array([[True, False, True]])
    moved = transfer(relation, mask, 0, -1)
    assert moved.shape == (3, 1)
    assert moved[:, 0].tolist() == [True, False, True]


def test_factors_that_the_target_lacks_are_reduced() -> None:
    relation = resolve("m k, k n -> m n", [(2, 3), (3, 4)], [(2, 4)])
    rows = np.zeros((2, 3), np.bool_)
    rows[1, 2] = True
    assert transfer(relation, rows, 0, -1).tolist() == [[False], [True]]
    assert transfer(relation, rows, 0, 1).tolist() == [[False], [False], [True]]


def test_a_product_axis_unfolds() -> None:
    relation = resolve("(a b) -> b a", [(6,)], [(3, 2)], {"a": 2})
    values = np.arange(6)
    moved = transfer(relation, values, 0, -1, fill=0)
    assert np.array_equal(moved, values.reshape(2, 3).T)


def test_links_pick_and_fill() -> None:
    links = {"a0": (Link(0, -1, np.array([2, 0]), np.array([0, 3])),)}
    relation = Relation(((("a0",),),), ((("a0",),),), {"a0@0": 3, "a0@-1": 4}, links=links)
    assert transfer(relation, np.array([5, 6, 7]), 0, -1, fill=9).tolist() == [7, 9, 9, 5]
    backwards = transfer(relation, np.array([True, True, True, False]), -1, 0)
    assert backwards.tolist() == [False, False, True]


def test_a_position_that_is_repeated_is_needed_if_any_copy_is() -> None:
    links = {"a0": (Link(0, -1, np.array([0, 0, 1]), np.array([0, 1, 2])),)}
    relation = Relation(((("a0",),),), ((("a0",),),), {"a0@0": 2, "a0@-1": 3}, links=links)
    assert transfer(relation, np.array([True, False, False]), -1, 0).tolist() == [True, False]


def test_an_operand_without_notation_carries_nothing() -> None:
    relation = resolve("a -> a", [(2,), None], [(2,)])
    with pytest.raises(RuleError, match="takes no part"):
        transfer(relation, np.ones(2, np.bool_), 1, -1)

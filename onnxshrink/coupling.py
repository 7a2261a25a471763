"""How the axes of a node hang together, found by trial where no rule says it. Names no operator.

Only for nodes for which somebody states that they can shrink, and how (`onnxshrink.replacement`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxshrink.facts import project
from onnxshrink.families import needed_by_relation
from onnxshrink.notation import Relation, TensorSpec
from onnxshrink.probe import draw, run
from onnxshrink.registry import Keep
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray, any_along

_EXTENT = 2  # of free dimensions
Place = tuple[int, int]  # slot and axis


def couple(view: View, samples: int) -> Relation:
    """A relation in which an input axis and an output axis are one factor where each index follows the same index.

    Besides those, an axis may shrink that a constant input has too, told by its extent: what is summed over with
    weights, or made by them. All others stay whole.

    Raises UnresolvedError when the node cannot be run alone.
    """
    names = {place: f"s{place[0]}_{place[1]}" for place, _ in _places(view)}
    extents = dict(_places(view))
    joined: set[str] = set()
    for place, partner in _partners(view, samples):
        old, new = names[partner], names[place]
        names = {p: new if name == old else name for p, name in names.items()}
        joined.add(new)
    weights = {extent for o in view.inputs if o is not None and o.constant is not None for extent in o.constant.shape}
    free = {p for p, size in extents.items() if size is None or not (names[p] in joined or size in weights)}
    sizes = {name: extents[place] for place, name in names.items()}
    inputs = [_spec(view, slot, names) for slot in range(len(view.inputs))]
    outputs = [_spec(view, -1 - index, names) for index in range(len(view.outputs))]
    return Relation(tuple(inputs), tuple(outputs), sizes, frozenset(names[place] for place in free))


def _places(view: View) -> Iterator[tuple[Place, int | None]]:
    """Every axis of a computed input or of an output that has more than one index, and its extent."""
    for slot in (*range(len(view.inputs)), *(-1 - index for index in range(len(view.outputs)))):
        operand = view.operand(slot)
        if operand is not None and operand.constant is None:
            for axis in range(operand.rank):
                if operand.extent(axis) != 1:
                    yield (slot, axis), operand.extent(axis)


def _spec(view: View, slot: int, names: dict[Place, str]) -> TensorSpec | None:
    operand = view.operand(slot)
    if operand is None or operand.constant is not None:
        return None
    return tuple((names[slot, axis],) if (slot, axis) in names else () for axis in range(operand.rank))


# --- what passes through ---------------------------------------------------------------------------------------------


def _partners(view: View, samples: int) -> Iterator[tuple[Place, Place]]:
    """Pairs of an input axis and an output axis of which each index follows the same index and no other."""
    places = dict(_places(view))
    for place, extent in places.items():
        if place[0] < 0 or extent is None:
            continue
        candidates = [other for other, size in places.items() if other[0] < 0 and size == extent]
        for partner in _surviving(view, place, extent, candidates, samples):
            yield place, partner


def _surviving(view: View, place: Place, extent: int, candidates: list[Place], samples: int) -> list[Place]:
    moved: set[Place] = set()
    for sample in range(samples):
        if not candidates:
            break
        rng = np.random.default_rng([sample, extent])
        chosen = rng.permutation(extent) < rng.integers(1, extent)
        before, after = _pair(view, place, chosen, rng)
        changed = {p: _changes(before, after, p, extent) for p in candidates}
        candidates = [p for p in candidates if not (changed[p] & ~chosen).any()]
        moved |= {p for p in candidates if changed[p].any()}
    found = [p for p in candidates if p in moved]
    # Where several axes of an output would do, none is known to be the one.
    return [p for p in found if sum(other[0] == p[0] for other in found) == 1]


def _pair(
    view: View, place: Place, chosen: BoolArray, rng: np.random.Generator
) -> tuple[dict[int, Array], dict[int, Array]]:
    """Outputs before and after some indices of an input axis are drawn again."""
    slot, axis = place
    base, other = draw(view, rng, _EXTENT), draw(view, rng, _EXTENT)
    first, second = base[slot], other[slot]
    assert first is not None
    assert second is not None
    shape = [1] * first.ndim
    shape[axis] = chosen.size
    drawn = list(base)
    drawn[slot] = np.where(chosen.reshape(shape), second, first)
    return outputs_of(view, base), outputs_of(view, drawn)


def outputs_of(view: View, inputs: list[Array | None]) -> dict[int, Array]:
    """Outputs of the node alone, by slot. Raises UnresolvedError when it does not run."""
    results = run(view, inputs)
    return {-1 - index: next(results) for index, operand in enumerate(view.outputs) if operand is not None}


def _changes(before: dict[int, Array], after: dict[int, Array], place: Place, extent: int) -> BoolArray:
    a, b = before[place[0]], after[place[0]]
    if a.shape != b.shape:
        return np.ones(extent, np.bool_)
    return project((a != b) & ~((a != a) & (b != b)), place[1], extent)


# --- what is needed, and what must stay ------------------------------------------------------------------------------


def needed(view: View, samples: int) -> list[BoolArray | None]:
    """What the relation says, less the indices that zeros in a constant input make idle, found by trial."""
    masks = needed_by_relation(view)
    for slot, axis, idle in _idle(view):
        mask = masks[slot]
        if mask is not None and idle.any() and _are_idle(view, (slot, axis), idle, samples):
            shape = [1] * mask.ndim
            shape[axis] = idle.size
            masks[slot] = mask & ~idle.reshape(shape)
    return masks


def _idle(view: View) -> Iterator[tuple[int, int, BoolArray]]:
    """Indices of an input axis at which a constant with one axis of that extent is zero."""
    for slot, axis in _summed(view):
        operand = view.data(slot)
        extent = operand.extent(axis) or 0
        idle = np.zeros(extent, np.bool_)
        for other in view.inputs:
            if other is not None and other.constant is not None and other.constant.shape.count(extent) == 1:
                idle |= ~other.constant.nonzero((other.constant.shape.index(extent),))
        yield slot, axis, idle


def _summed(view: View) -> Iterator[Place]:
    """Input axes that no output has and that may shrink."""
    relation = view.relation
    assert relation is not None
    made = {factor for spec in relation.outputs for factors in spec or () for factor in factors}
    for slot, spec in relation.slots():
        for axis, factors in enumerate(spec):
            if slot >= 0 and factors and not (made | relation.pinned).intersection(factors):
                yield slot, axis


def _are_idle(view: View, place: Place, idle: BoolArray, samples: int) -> bool:
    """Whether no live element of an output moves when these indices are drawn again."""
    for sample in range(samples):
        before, after = _pair(view, place, idle, np.random.default_rng([sample, 7]))
        for index, operand in enumerate(view.outputs):
            if operand is not None:
                a, b = before[-1 - index], after[-1 - index]
                if (view.live(index) & (a != b)).any():
                    return False
    return True


def retain(view: View) -> list[Keep]:
    """Summed indices that hold a constant other than zero, for which nothing could make up."""
    found = []
    for slot, axis in _summed(view):
        operand = view.data(slot)
        nonzero = _nonzero(operand, axis)
        idle = next((mask for s, a, mask in _idle(view) if (s, a) == (slot, axis)), np.zeros_like(nonzero))
        found.append(Keep(slot, axis, nonzero & ~idle, "it holds a constant that no replacement makes up for"))
    return found


def _nonzero(operand: Operand, axis: int) -> BoolArray:
    known = operand.known.nonzero()
    rest = tuple(a for a in range(known.ndim) if a != axis)
    return np.array(np.broadcast_to(any_along(known, rest), (operand.extent(axis) or 0,)))

"""Forward and backward rules that whole families of operators share. No operator is named here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import numpy as np

from onnxshrink.facts import Known, Line, along, everything, nothing, partial
from onnxshrink.notation import Relation, transfer
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray, any_along

# What numpy calls floating-point types, bfloat16 included.
_REAL_KINDS = "fV"
# A node is run on full-size values only where that is cheap.
_RUN_ELEMENTS = 1 << 16


def _fill_unknown(known: Known) -> Array:
    """Values with ones where nothing is known, so that no kernel divides by zero."""
    if known.everything:
        return known.value
    return np.where(known.mask, known.value, np.ones((), known.value.dtype))


def _present(view: View) -> list[Operand]:
    return [operand for operand in view.inputs if operand is not None]


def pointwise(view: View) -> list[Known | None]:
    """Outputs known where every input is: the operator itself, run on compressed values."""
    masks = [operand.known.mask for operand in _present(view)]
    mask = reduce(np.logical_and, masks)
    rank = view.output().rank
    if not mask.any():
        return [None] * len(view.outputs)
    values = view.run([None if operand is None else _fill_unknown(operand.known) for operand in view.inputs])
    if values is None:
        return [None] * len(view.outputs)
    mask = mask.reshape((1,) * (rank - mask.ndim) + mask.shape)
    return [partial(mask, value.reshape((1,) * (rank - value.ndim) + value.shape)) for value in values]


def same_index(view: View) -> list[Known | None]:
    """As `pointwise`, where the notation and not numpy says which axes of the inputs belong together.

    Nothing is known where the notation pins a factor, or has one that an output lacks.
    """
    relation, unknown = view.relation, [None] * len(view.outputs)
    assert relation is not None
    slots = [slot for slot, operand in enumerate(view.inputs) if operand is not None]
    outputs = [-1 - index for index, operand in enumerate(view.outputs) if operand is not None]
    read = {factor for slot in slots for factors in relation.spec(slot) or () for factor in factors}
    made = [{factor for factors in relation.spec(output) or () for factor in factors} for output in outputs]
    # Free dimensions are pinned too, for they cannot shrink.
    pinned = {factor for factor in relation.pinned & read if relation.sizes.get(factor) is not None}
    if pinned or relation.links or any(factors != read for factors in made):
        return list(unknown)
    masks = [
        reduce(np.logical_and, (transfer(relation, view.data(slot).known.mask, slot, output) for slot in slots))
        for output in outputs
    ]
    if not any(mask.any() for mask in masks):
        return list(unknown)
    results = view.run(_aligned(view, relation, slots))
    if results is None:
        return list(unknown)
    found = iter(zip(masks, results, strict=True))
    return [None if operand is None else partial(*next(found)) for operand in view.outputs]


def _aligned(view: View, relation: Relation, slots: list[int]) -> list[Array | None]:
    """Values of the inputs, each axis at full extent where any input varies along it."""
    values: list[Array | None] = [None] * len(view.inputs)
    for slot in slots:
        values[slot] = _fill_unknown(view.data(slot).known)
    varying: set[str] = set()
    for slot in slots:
        for axis, factors in enumerate(relation.spec(slot) or ()):
            value = values[slot]
            if value is not None and value.shape[axis] > 1:
                varying.update(factors)
    for slot in slots:
        value = values[slot]
        for axis, factors in enumerate(relation.spec(slot) or ()):
            if value is not None and value.shape[axis] == 1 and varying.intersection(factors):
                value = along(value, axis, int(np.prod([relation.sizes[f] or 1 for f in factors], dtype=np.int64)))
        values[slot] = value
    return values


def product(view: View) -> list[Known | None]:
    """As `pointwise`, and zero where any factor is known to be zero."""
    (found,) = pointwise(view)
    output = view.output()
    zeros = [operand.zero() for operand in _present(view)]
    zero: BoolArray = reduce(np.logical_or, zeros)
    if not zero.any():
        return [found]
    zero = zero.reshape((1,) * (output.rank - zero.ndim) + zero.shape)
    base = found or nothing(output.rank, output.dtype)
    value = np.where(zero, np.zeros((), base.value.dtype), base.value)
    return [partial(base.mask | zero, value)]


def layout(view: View) -> list[Known | None]:
    """Outputs made of elements of the first input, moved as the relation says."""
    return [
        moved(view.relation, view.data().known, 0, -1 - index) if operand is not None else None
        for index, operand in enumerate(view.outputs)
    ]


def moved(relation: Relation | None, known: Known, source: int, target: int) -> Known | None:
    """A fact carried from one operand to another by a relation without reduced factors."""
    assert relation is not None
    if not known.anything or known.value.size == 0:
        return None
    mask, value = known.mask, carry(relation, known.value, source, target)
    if _loses(relation, source, target):
        # Along a factor that the target lacks, only what is the same carries over.
        mask = np.asarray(mask & (known.value == carry(relation, value, target, source)))
    return partial(transfer(relation, mask, source, target, reduce=np.all), value)


def _loses(relation: Relation, source: int, target: int) -> bool:
    """Whether an operand has a factor that another one lacks."""
    there = {factor for factors in relation.spec(target) or () for factor in factors}
    return any(not there.issuperset(factors) for factors in relation.spec(source) or ())


def carry(relation: Relation, value: Array, source: int, target: int) -> Array:
    """Values carried from one operand to another."""
    return transfer(relation, value, source, target, reduce=_first, fill=value.dtype.type(0))


def _first(array: Array, axis: tuple[int, ...]) -> Array:
    return array[tuple(0 if index in axis else slice(None) for index in range(array.ndim))]


def whole(view: View) -> list[Known | None]:
    """Outputs known when all inputs are, by running the operator on them at full size."""
    unknown: list[Known | None] = [None] * len(view.outputs)
    values = [None if operand is None else operand.value() for operand in view.inputs]
    if any(o is not None and v is None for o, v in zip(view.inputs, values, strict=True)):
        return unknown
    if sum(v.size for v in values if v is not None) > _RUN_ELEMENTS or _large(view):
        return unknown
    results = view.run(values)
    if results is None:
        return unknown
    found = iter(results)
    return [
        None if o is None else partial(everything(value.ndim), value)
        for o in view.outputs
        for value in ([next(found)] if o is not None else [np.zeros(0)])
    ]


def _large(view: View) -> bool:
    for operand in view.outputs:
        if operand is None:
            continue
        shape = operand.static_shape()
        if shape is None or math.prod(shape) > _RUN_ELEMENTS:
            return True
    return False


def needed_by_relation(view: View) -> list[BoolArray | None]:
    """Elements of the inputs that reach a live element of an output, as the relation says.

    A pinned factor mixes its indices: if one is needed, all are.
    """
    relation = view.relation
    assert relation is not None
    result: list[BoolArray | None] = []
    live = [(-1 - i, view.live(i)) for i, o in enumerate(view.outputs) if o is not None]
    for slot, operand in enumerate(view.inputs):
        result.append(None if operand is None else _reach(relation, slot, operand, live))
    return result


def _reach(relation: Relation, slot: int, operand: Operand, live: list[tuple[int, BoolArray]]) -> BoolArray:
    if relation.spec(slot) is None:
        return everything(operand.rank) & any(mask.any() for _, mask in live)
    found: BoolArray = ~everything(operand.rank)
    for output, mask in live:
        if relation.spec(output) is None:
            found = found | bool(mask.any())
        elif mask.any():
            found = found | transfer(relation, mask, output, slot)
    return spread(relation, slot, found)


def spread(relation: Relation, slot: int, mask: BoolArray) -> BoolArray:
    """`mask` with "any" along every pinned factor."""
    for axis, factors in enumerate(relation.spec(slot) or ()):
        if mask.shape[axis] > 1 and relation.pinned & set(factors):
            mask = _spread_axis(relation, factors, mask, axis)
    return mask


def _spread_axis(relation: Relation, factors: tuple[str, ...], mask: BoolArray, axis: int) -> BoolArray:
    """The pinned ones among the factors of an axis; the whole axis where their extents are not known."""
    sizes = [relation.sizes.get(factor) or 0 for factor in factors]
    if len(factors) == 1 or math.prod(sizes) != mask.shape[axis]:
        return any_along(mask, axis, keepdims=True)
    apart = mask.reshape((*mask.shape[:axis], *sizes, *mask.shape[axis + 1 :]))
    pinned = tuple(axis + index for index, factor in enumerate(factors) if factor in relation.pinned)
    found = np.broadcast_to(any_along(apart, pinned, keepdims=True), apart.shape)
    return found.reshape(mask.shape)


def factors_of(view: View, *slots: int) -> list[BoolArray | None]:
    """`needed_by_relation` for a product of `slots`: an element multiplied by a known zero is not needed."""
    needed = needed_by_relation(view)
    relation = view.relation
    assert relation is not None
    for slot in slots:
        mask = needed[slot]
        for other in slots:
            operand = view.input(other)
            if other == slot or mask is None or operand is None:
                continue
            zero = operand.zero()
            if zero.any():
                live = view.live() & ~transfer(relation, zero, other, -1)
                mask = mask & transfer(relation, live, -1, slot)
        needed[slot] = mask
    return needed


def hull(mask: BoolArray) -> BoolArray:
    """The smallest product of index sets, one per axis, that covers `mask`: what is computed once it is kept."""
    result = everything(mask.ndim)
    for axis in range(mask.ndim):
        if mask.shape[axis] > 1:
            rest = tuple(a for a in range(mask.ndim) if a != axis)
            result = result & any_along(mask, rest, keepdims=True)
    return result & bool(mask.any())


def partial_in(*slots: int) -> Callable[[View], list[BoolArray | None]]:
    """Backward rule of a function that has no finite value everywhere, such as a logarithm.

    An element that nothing needs may hold anything once its inputs are gone; here it must not, or a later
    multiplication by zero would not give zero. So the inputs at `slots` are needed wherever the output is computed:
    on the hull of what is live, or throughout where planning found that it keeps more than that.
    """

    def backward(view: View) -> list[BoolArray | None]:
        needed = needed_by_relation(view)
        relation = view.relation
        assert relation is not None
        for slot in slots:
            operand = view.input(slot)
            if operand is None:
                continue
            if view.throughout or relation.spec(slot) is None:
                needed[slot] = everything(operand.rank)
            else:
                needed[slot] = spread(relation, slot, transfer(relation, hull(view.live()), -1, slot))
        return needed

    return backward


def endless(known: Known) -> BoolArray | None:
    """Known elements that are minus infinity; all, where one is a positive infinity or no number; None: none."""
    if known.value.dtype.kind not in _REAL_KINDS:
        return None
    found = known.mask & ~np.isfinite(known.value)
    if not found.any():
        return None
    low = known.value == -np.inf
    return found if not bool((found & ~low).any()) else everything(found.ndim)


def infinities(operand: Operand) -> BoolArray | None:
    """Elements of an operand that may be minus infinity."""
    if operand.constant is None:
        return operand.infinite
    return None if operand.constant.finite else endless(operand.known)


def spoilt(view: View) -> list[BoolArray | None]:
    """Every element of the outputs may be infinite, or no number, where any of the inputs may be.

    But what is summed over is not meant to be infinite: no numbers would come out.
    """
    relation = view.relation
    assert relation is not None
    contracted = _contracted_inputs(relation)
    for slot, operand in enumerate(view.inputs):
        if operand is not None and slot not in contracted and infinities(operand) is not None:
            return endless_everywhere(view)
    return [None] * len(view.outputs)


def endless_everywhere(view: View) -> list[BoolArray | None]:
    """Every element of the outputs may be infinite."""
    return [None if output is None else everything(output.rank) for output in view.outputs]


def _contracted_inputs(relation: Relation) -> set[int]:
    written = {f for spec in relation.outputs for factors in spec or () for f in factors} | relation.pinned
    return {
        slot
        for slot, spec in enumerate(relation.inputs)
        if any(factor not in written for factors in spec or () for factor in factors)
    }


def infinite_moves(view: View) -> list[BoolArray | None]:
    """An element of an output may be infinite where the elements that it is made of may be."""
    relation = view.relation
    assert relation is not None
    found: list[BoolArray | None] = []
    given = [(slot, infinities(o)) for slot, o in enumerate(view.inputs) if o is not None and o.dtype is not None]
    for index, output in enumerate(view.outputs):
        mask = None
        for slot, part in given:
            if output is not None and part is not None and relation.spec(slot) is not None:
                part = spread(relation, -1 - index, transfer(relation, part, slot, -1 - index))
                mask = part if mask is None else mask | part
        found.append(mask)
    return found


def unit_moves(view: View) -> int | None:
    """Where elements only change place, the axis along which they sum to one."""
    unit = view.data().unit
    return same_axis(view, 0, unit, -1) if unit is not None else None


def line_moves(view: View) -> Line | None:
    """Where elements only change place, indices that follow one number per position go on doing so."""
    line = view.data().line
    axis = same_axis(view, 0, line.axis, -1) if line is not None else None
    return replace(line, axis=axis) if line is not None and axis is not None else None


def blind_moves(view: View) -> dict[int, int]:
    """Where elements only change place, the axis along which a number may be added to the first input."""
    axis = view.blind[0] if view.blind else None
    found = same_axis(view, -1, axis, 0) if axis is not None else None
    return {} if found is None else {0: found}


def same_axis(view: View, source: int, axis: int, target: int) -> int | None:
    """The axis of another operand that runs through the same factor, and through nothing else."""
    relation = view.relation
    assert relation is not None
    here, there = relation.spec(source), relation.spec(target)
    if here is None or there is None or len(here[axis]) != 1 or here[axis][0] in relation.links:
        return None
    return next((position for position, factors in enumerate(there) if factors == here[axis]), None)

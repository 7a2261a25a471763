"""Operators that move elements at indices chosen by data: gathering, scattering, selecting, sampling.

The axes that are indexed stay whole unless the indices are known; the others pass through. An index that nothing needs
must still be one that is there, so computed indices are needed wherever the output is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from onnxshrink.facts import Known, everything, partial, uniform
from onnxshrink.families import hull, line_moves, partial_in, whole
from onnxshrink.notation import Relation, opaque, resolve
from onnxshrink.registry import Forward, Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray, any_along

# Tables are compared at this many rows before they are read whole.
_PROBES = 3


def uniform_along(known: Known, axis: int) -> Known | None:
    """What is the same all along one axis; a large table is read whole only where some rows agree."""
    value = known.value
    count = value.shape[axis]
    if count > _PROBES:
        probes = value.take(np.linspace(0, count - 1, _PROBES).astype(np.int64), axis)
        if not (probes == probes.take([0], axis)).all(axis=axis).any():
            return None
    found = uniform(known, (axis,))
    return found if found.anything else None


def axis_of(view: View, default: int = 0, slot: int = 0) -> int:
    """The `axis` attribute, counted from the left."""
    return int(view.attribute("axis", default)) % max(view.data(slot).rank, 1)


def names(rank: int, axes: Iterable[int] = (), own: str = "[x]") -> list[str]:
    """Factors of a tensor's axes, those of `axes` pinned or named otherwise."""
    chosen = set(axes)
    return [own.replace("x", f"x{a}") if a in chosen else f"a{a}" for a in range(rank)]


def resolved(view: View, notation: str) -> Relation:
    """A notation bound to the shapes of the node."""
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))


def all_pinned(view: View) -> Relation:
    """Every axis stays whole."""
    return opaque(view.shapes(view.inputs), view.shapes(view.outputs))


def along_axes(axes: Callable[[View], Iterable[int]], resized: bool = False) -> Callable[[View], Relation]:
    """A relation of the first input and the outputs: some axes stay whole (or change their extent), others pass."""

    def relate(view: View) -> Relation:
        """Some axes stay whole, the others pass through."""
        chosen = set(axes(view))
        left = " ".join(names(view.data().rank, chosen))
        right = " ".join(names(view.data().rank, chosen, "[xo]" if resized else "[x]"))
        shapes = [view.data().shape, *[None] * (len(view.inputs) - 1)]
        notation = f"{left} -> {', '.join([right] * len(view.outputs))}"
        return resolve(notation, shapes, view.shapes(view.outputs))

    return relate


def zeros_along(axes: Callable[[View], Iterable[int]]) -> Forward:
    """Zero all along the given axes stays zero."""

    def forward(view: View) -> list[Known | None]:
        known = uniform(view.data().known, axes(view))
        zero = known.zero()
        found = partial(zero, np.zeros((1,) * zero.ndim, view.output().dtype)) if zero.any() else None
        return [found, *[None] * (len(view.outputs) - 1)] if found is not None else whole(view)

    return forward


def indices_of(view: View, slot: int, axis: int) -> Array | None:
    """Indices into an axis of the first input, none negative; None when they are computed."""
    value, extent = view.data(slot).value(), view.data().extent(axis)
    if value is None or extent is None:
        return None
    return np.where(value < 0, value + extent, value)


def else_whole(view: View, found: Known | None) -> list[Known | None]:
    return [found] if found is not None else whole(view)


# --- Gather -----------------------------------------------------------------------------------------------------


def _gather(view: View) -> Relation:
    """`*a x *b, *j -> *a *j *b`: `x` stays whole unless the indices are known."""
    axis, rank = axis_of(view), view.data().rank
    own = "[x]" if indices_of(view, 1, axis) is None else "x"
    left = names(rank, [axis], own)
    picked = [f"j{position}" for position in range(view.data(1).rank)]
    right = [*left[:axis], *picked, *left[axis + 1 :]]
    return resolved(view, f"{' '.join(left)}, {' '.join(picked)} -> {' '.join(right)}")


def _gather_forward(view: View) -> list[Known | None]:
    axis, known = axis_of(view), view.data().known
    if not known.anything:
        return [None]
    indices, count = indices_of(view, 1, axis), view.data(1).rank
    if indices is not None:
        return [partial(*(picked(array, indices, axis) for array in (known.mask, known.value)))]
    found = uniform_along(known, axis)
    if found is None:
        return [None]
    return [partial(*(_respread(array, axis, count) for array in (found.mask, found.value)))]


def picked(array: Array, indices: Array, axis: int) -> Array:
    return _respread(array, axis, indices.ndim) if array.shape[axis] == 1 else array.take(indices, axis)


def _respread(array: Array, axis: int, count: int) -> Array:
    """An axis of extent one as `count` such axes."""
    return array.reshape((*array.shape[:axis], *[1] * count, *array.shape[axis + 1 :]))


def _gather_backward(view: View) -> list[BoolArray | None]:
    axis, data, indices = axis_of(view), view.data(), view.data(1)
    picked = tuple(range(axis, axis + indices.rank))
    live, chosen = view.live(), indices_of(view, 1, axis)
    valid = any_along(hull(live), tuple(a for a in range(live.ndim) if a not in picked))
    needed: list[BoolArray | None] = [None, everything(indices.rank) if view.throughout else valid]
    if data.constant is not None:
        return needed
    if chosen is None:
        reduced = any_along(live, picked)
        needed[0] = np.expand_dims(reduced, axis)
        return needed
    needed[0] = needed_picks(view, axis, chosen)
    return needed


def needed_picks(view: View, axis: int, chosen: Array) -> BoolArray:
    """Elements of the data that are picked for a live element of the output."""
    live = view.live()
    picked = range(axis, axis + chosen.ndim)
    wide = [live.shape[a] if a not in picked else chosen.shape[a - axis] for a in range(live.ndim)]
    flat = np.broadcast_to(live, wide).reshape((*wide[:axis], chosen.size, *wide[axis + chosen.ndim :]))
    result = np.zeros((*wide[:axis], view.data().extent(axis) or 0, *wide[axis + chosen.ndim :]), np.bool_)
    np.logical_or.at(np.moveaxis(result, axis, 0), chosen.reshape(-1), np.moveaxis(flat, axis, 0))
    return result


def _kept_picks(view: View, axis: int, indices: Array) -> Array:
    """The indices that stay."""
    kept = view.kept[-1][axis : axis + indices.ndim]
    for position, mask in enumerate(kept):
        if mask is not None:
            indices = indices.compress(mask, axis=position)
    return indices


def _gather_retain(view: View) -> Iterable[Keep]:
    axis = axis_of(view)
    return retain_picks(view, axis, indices_of(view, 1, axis))


def retain_picks(view: View, axis: int, indices: Array | None) -> Iterable[Keep]:
    extent = view.data().extent(axis)
    if indices is None or extent is None:
        return []
    wanted = np.zeros(extent, np.bool_)
    wanted[_kept_picks(view, axis, indices).reshape(-1)] = True
    return [Keep(0, axis, wanted, "it is picked by index")]


def _gather_rewrite(view: View) -> Rewrite:
    axis = axis_of(view)
    picks = new_picks(view, axis, indices_of(view, 1, axis))
    return Rewrite() if picks is None else Rewrite(constants={1: picks})


def new_picks(view: View, axis: int, indices: Array | None) -> Array | None:
    """The indices that stay, counted among those of the data that stay; None where nothing changes."""
    kept = view.kept[0][axis]
    if indices is None or kept is None or kept.all():
        return None
    position = np.cumsum(kept) - 1
    return np.asarray(position[_kept_picks(view, axis, indices)]).astype(view.data(1).dtype)


register(
    Rule(
        "Gather",
        relate=_gather,
        forward=_gather_forward,
        line=line_moves,
        backward=_gather_backward,
        partial=(1,),
        retain=_gather_retain,
        rewrite=_gather_rewrite,
    )
)


# --- GatherElements, ScatterElements ----------------------------------------------------------------------------


def _passive(view: View, axis: int) -> set[int]:
    """Axes other than the indexed one along which data and indices have the same extent."""
    data, indices = view.data().shape or (), view.data(1).shape or ()
    return {a for a in range(len(data)) if a != axis and data[a] == indices[a] and data[a] is not None}


def _elements(view: View) -> tuple[str, str]:
    """Factors of the data and of the indices."""
    axis, rank = axis_of(view), view.data().rank
    active = set(range(rank)) - _passive(view, axis)
    return " ".join(names(rank, active)), " ".join(names(rank, active, "[xi]"))


def _gather_elements(view: View) -> Relation:
    """The indexed axis stays whole, and axes along which the indices are shorter; the others pass through."""
    data, indices = _elements(view)
    return resolved(view, f"{data}, {indices} -> {indices}")


def _mixed(view: View, passive: set[int]) -> tuple[int, ...]:
    return tuple(a for a in range(view.data().rank) if a not in passive)


def _gather_elements_forward(view: View) -> list[Known | None]:
    known = uniform(view.data().known, _mixed(view, _passive(view, axis_of(view))))
    return else_whole(view, partial(known.mask, known.value) if known.anything else None)


register(
    Rule(
        "GatherElements",
        relate=_gather_elements,
        forward=_gather_elements_forward,
        backward=partial_in(1),
        partial=(1,),
    )
)


def _scatter_elements(view: View) -> Relation:
    """The indexed axis stays whole, and axes along which the indices are shorter; the others pass through."""
    data, indices = _elements(view)
    return resolved(view, f"{data}, {indices}, {indices} -> {data}")


def both(view: View, data: Known, updates: Known, rank: int) -> Known | None:
    """What is known where the old and the new elements have the same known value; masks aligned on `rank` axes."""
    mask = data.mask & updates.mask & (data.value == updates.value)
    reduction = view.attribute("reduction", "none")
    if reduction in ("add", "mul"):
        mask = mask & (data.value == 0)
    value = np.broadcast_to(data.value, np.broadcast_shapes(data.value.shape, (1,) * rank))
    return partial(np.asarray(mask), value) if mask.any() else None


def _scatter_elements_forward(view: View) -> list[Known | None]:
    mixed = _mixed(view, _passive(view, axis_of(view)))
    data, updates = (uniform(view.data(slot).known, mixed) for slot in (0, 2))
    return else_whole(view, both(view, data, updates, view.output().rank))


for _op, _since, _until in (("ScatterElements", 11, 10_000), ("Scatter", 9, 10)):
    register(
        Rule(
            _op,
            since=_since,
            until=_until,
            relate=_scatter_elements,
            forward=_scatter_elements_forward,
            backward=partial_in(1),
            partial=(1,),
        )
    )

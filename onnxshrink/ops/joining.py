"""Joining and cutting along one axis: Concat, Split, Slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxshrink.facts import Known, along, partial
from onnxshrink.families import infinite_moves, layout, line_moves
from onnxshrink.graph import Shape
from onnxshrink.notation import Link, Relation, UnresolvedError, resolve
from onnxshrink.ops.layout import shape_of, with_other_inputs
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array


def linked(
    inputs: Sequence[Shape | None], outputs: Sequence[Shape | None], axis: int, links: Sequence[Link]
) -> Relation:
    """Operands of one rank whose axes pass through, except one along which `links` map positions."""
    specs: list[tuple[tuple[str, ...], ...] | None] = []
    sizes: dict[str, int | None] = {}
    pinned: set[str] = set()
    joined = {link.input for link in links} | {link.output for link in links}
    for number, shape in enumerate((*inputs, *outputs)):
        slot = number if number < len(inputs) else len(inputs) - 1 - number
        if shape is None or slot not in joined:
            specs.append(None)
            continue
        factors: list[tuple[str, ...]] = []
        for position, extent in enumerate(shape):
            name = f"a{position}"
            size = extent if isinstance(extent, int) else None
            if position == axis:
                sizes[f"{name}@{slot}"] = size
                factors.append((name,))
            else:
                sizes[name] = size if sizes.get(name) is None else sizes[name]
                factors.append(() if extent == 1 else (name,))
                if not isinstance(extent, int):
                    pinned.add(name)
        specs.append(tuple(factors))
    count = len(inputs)
    return Relation(tuple(specs[:count]), tuple(specs[count:]), sizes, frozenset(pinned), {f"a{axis}": tuple(links)})


def _static(operand: Operand, axis: int) -> int:
    extent = operand.extent(axis)
    if extent is None:
        raise UnresolvedError(f"axis {axis} of {operand.name!r} has no fixed extent")
    return extent


def _concat(view: View) -> Relation:
    output = view.output()
    axis = int(view.attribute("axis", 1)) % output.rank
    if any(operand is not None and operand.extent(axis) is None for operand in view.inputs):
        return _concat_free(view, axis)
    links, position = [], 0
    for slot in range(len(view.inputs)):
        extent = _static(view.data(slot), axis)
        links.append(Link(slot, -1, np.arange(extent), np.arange(position, position + extent)))
        position += extent
    return linked(view.shapes(view.inputs), view.shapes(view.outputs), axis, links)


def _concat_free(view: View, axis: int) -> Relation:
    """The joined axis is free: it stays whole, the others pass through."""
    rank = view.output().rank
    names = [f"a{position}" for position in range(rank)]
    left = [" ".join(f"[j{slot}]" if p == axis else n for p, n in enumerate(names)) for slot in range(len(view.inputs))]
    right = " ".join("[j]" if p == axis else n for p, n in enumerate(names))
    return resolve(f"{', '.join(left)} -> {right}", view.shapes(view.inputs), view.shapes(view.outputs))


def _concat_forward(view: View) -> list[Known | None]:
    output = view.output()
    axis = int(view.attribute("axis", 1)) % output.rank
    # What is empty adds nothing.
    operands = [operand for operand in view.inputs if operand is not None and operand.extent(axis) != 0]
    facts = [operand.known for operand in operands]
    if not any(fact.anything for fact in facts):
        return [None]
    extents = [operand.extent(axis) for operand in operands]
    if any(extent is None for extent in extents):
        return [None]
    return [partial(*(_joined([_part(f, k) for f in facts], extents, axis) for k in (0, 1)))]


def _part(fact: Known, index: int) -> Array:
    return fact.mask if index == 0 else fact.value


def _joined(arrays: list[Array], extents: list[int | None], axis: int) -> Array:
    full = [along(array, axis, extent or 1) for array, extent in zip(arrays, extents, strict=True)]
    shape = [max(array.shape[a] for array in full) for a in range(full[0].ndim)]
    parts = []
    for array in full:
        wanted = list(shape)
        wanted[axis] = array.shape[axis]
        parts.append(np.broadcast_to(array, wanted))
    return np.concatenate(parts, axis=axis)


register(Rule("Concat", since=4, relate=_concat, forward=_concat_forward, infinite=infinite_moves))


def _split(view: View) -> Relation:
    data = view.data()
    axis = int(view.attribute("axis", 0)) % data.rank
    _static(data, axis)
    links, position = [], 0
    for index, operand in enumerate(view.outputs):
        if operand is None:
            raise UnresolvedError("an output of a split is left out")
        extent = _static(operand, axis)
        if extent == 0:
            raise UnresolvedError("an output of a split is empty")
        links.append(Link(0, -1 - index, np.arange(position, position + extent), np.arange(extent)))
        position += extent
    return linked(view.shapes(view.inputs), view.shapes(view.outputs), axis, links)


def _split_rewrite(view: View) -> Rewrite:
    axis = int(view.attribute("axis", 0)) % view.data().rank
    counts = [view.kept_count(-1 - index, axis) or 0 for index in range(len(view.outputs))]
    if all(counts) and not any(view.shrinks(-1 - index, axis) for index in range(len(view.outputs))):
        return Rewrite()
    sizes = [count for count in counts if count]
    if view.version < 13:
        return Rewrite(attributes={"split": sizes})
    attributes = {"num_outputs": None} if view.version >= 18 else {}
    return Rewrite(constants={1: np.array(sizes, np.int64)}, attributes=attributes)


register(Rule("Split", since=2, relate=_split, forward=layout, rewrite=_split_rewrite, infinite=infinite_moves))


def slice_positions(view: View) -> dict[int, Array]:
    """Per sliced axis, the positions that a `Slice` takes. Raises UnresolvedError where they are not constant."""
    data = view.data()
    old = view.version < 10
    starts, ends = view.ints(1, "starts" if old else None), view.ints(2, "ends" if old else None)
    axes = view.ints(3, "axes" if old else None)
    steps = None if old else view.ints(4)
    if starts is None or ends is None or (not old and _missing(view, 3, axes)) or _missing(view, 4, steps):
        raise UnresolvedError("where the slice begins and ends is computed")
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    found: dict[int, Array] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= data.rank
        extent = data.extent(axis)
        if extent is None:
            if start == 0 and step == 1 and end >= 2**31 - 1:
                continue
            found[axis] = np.zeros(0, np.int64)
            continue
        found[axis] = np.arange(extent)[slice(start, end if end >= -extent or step > 0 else None, step)]
    return {a: p for a, p in found.items() if data.extent(a) is None or len(p) != data.extent(a) or _reversed(p)}


def _missing(view: View, slot: int, value: list[int] | None) -> bool:
    return view.version >= 10 and view.input(slot) is not None and value is None


def _reversed(positions: Array) -> bool:
    return len(positions) > 1 and bool(positions[0] > positions[-1])


def _backwards(view: View, axis: int) -> bool:
    """Whether an axis is sliced with a negative step."""
    steps = None if view.version < 10 else view.ints(4)
    axes = view.ints(3, "axes" if view.version < 10 else None) or list(range(view.data().rank))
    return steps is not None and any(s < 0 for a, s in zip(axes, steps, strict=False) if a % view.data().rank == axis)


def _slice(view: View) -> Relation:
    data, output = view.data(), view.output()
    positions = slice_positions(view)
    static = {axis: p for axis, p in positions.items() if data.extent(axis) is not None}
    if not static:
        return _free_slice(view, set(positions))
    if len(positions) > 1:
        return _many_slices(view, positions)
    ((axis, taken),) = static.items()
    if output.extent(axis) != len(taken):
        raise UnresolvedError("the slice does not fit the inferred shape")
    link = Link(0, -1, taken, np.arange(len(taken)))
    shapes = [data.shape, *[None] * (len(view.inputs) - 1)]
    return linked(shapes, [output.shape], axis, [link])


def _free_slice(view: View, cut: set[int]) -> Relation:
    names = [f"a{axis}" for axis in range(view.data().rank)]
    left = " ".join(f"[{n}]" if axis in cut else n for axis, n in enumerate(names))
    right = " ".join(f"[{n}o]" if axis in cut else n for axis, n in enumerate(names))
    return with_other_inputs(view, resolve(f"{left} -> {right}", [shape_of(view.data())], [shape_of(view.output())]))


def _many_slices(view: View, positions: dict[int, Array]) -> Relation:
    """Several axes cut: each with a link of its own; those of free extent stay whole."""
    relation = _free_slice(view, set(positions))
    links = {}
    sizes = dict(relation.sizes)
    inputs, outputs = list(relation.inputs[0] or ()), list(relation.outputs[0] or ())
    pinned = set(relation.pinned)
    for axis, taken in positions.items():
        if view.data().extent(axis) is None or view.output().extent(axis) != len(taken):
            continue
        name = f"s{axis}"
        links[name] = (Link(0, -1, taken, np.arange(len(taken))),)
        sizes[f"{name}@0"], sizes[f"{name}@-1"] = view.data().extent(axis), len(taken)
        inputs[axis], outputs[axis] = (name,), (name,)
        pinned -= {f"a{axis}", f"a{axis}o"}
    rest = [None] * (len(view.inputs) - 1)
    return Relation((tuple(inputs), *rest), (tuple(outputs),), sizes, frozenset(pinned), links)


def _slice_rewrite(view: View) -> Rewrite:
    """New bounds: kept positions of a slice follow each other again, whatever was taken from between."""
    data = view.data()
    positions = {a: p for a, p in slice_positions(view).items() if data.extent(a) is not None and view.shrinks(0, a)}
    if not positions:
        return Rewrite()
    bounds = {axis: _bounds(view, axis, taken) for axis, taken in positions.items()}
    old = view.version < 10
    starts, ends = view.ints(1, "starts" if old else None), view.ints(2, "ends" if old else None)
    axes = view.ints(3, "axes" if old else None)
    assert starts is not None
    assert ends is not None
    for index, axis in enumerate(axes if axes is not None else range(len(starts))):
        if axis % data.rank in bounds:
            starts[index], ends[index] = bounds[axis % data.rank]
    if old:
        return Rewrite(attributes={"starts": starts, "ends": ends})
    dtype = view.data(1).dtype
    return Rewrite(constants={1: np.array(starts, dtype), 2: np.array(ends, dtype)})


def _bounds(view: View, axis: int, taken: Array) -> tuple[int, int]:
    kept = view.kept[0][axis]
    assert kept is not None
    position = np.cumsum(kept) - 1
    stay = taken[kept[taken]]
    first, last = int(position[stay[0]]), int(position[stay[-1]])
    if _backwards(view, axis):
        return first, last - 1 if last > 0 else -(2**31)
    return first, last + 1


def _slice_retain(view: View) -> list[Keep]:
    """A stride counts positions: along such an axis nothing between may leave."""
    keeps = []
    for axis, taken in slice_positions(view).items():
        extent = view.data().extent(axis)
        if extent is not None and len(taken) > 1 and abs(int(taken[1] - taken[0])) > 1:
            keeps.append(Keep(0, axis, np.ones(extent, np.bool_), "a slice with a stride counts positions"))
    return keeps


register(
    Rule(
        "Slice",
        relate=_slice,
        forward=layout,
        retain=_slice_retain,
        rewrite=_slice_rewrite,
        infinite=infinite_moves,
        line=line_moves,
    )
)

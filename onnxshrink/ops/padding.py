"""Padding: positions that are added around, or taken away."""

from __future__ import annotations

import numpy as np

from onnxshrink.facts import Known, along, partial, uniform
from onnxshrink.families import moved
from onnxshrink.notation import Link, Relation, UnresolvedError, resolve, transfer
from onnxshrink.ops.layout import shape_of, with_other_inputs
from onnxshrink.registry import Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray


def _pads(view: View) -> tuple[list[int], list[int | None], list[int | None]]:
    """Axes, and how much is added before and after each; None where that is computed."""
    pads = _pad_amounts(view)
    axes = view.ints(3) if view.version >= 18 else None
    if view.version >= 18 and view.input(3) is not None and axes is None:
        raise UnresolvedError("which axes are padded is computed")
    rank = view.data().rank
    axes = [a % rank for a in axes] if axes is not None else list(range(rank))
    half = len(pads) // 2
    return axes, pads[:half], pads[half:]


def _pad_amounts(view: View) -> list[int | None]:
    operand = view.input(1)
    if view.version < 11 or operand is None:
        return list(view.attribute("pads"))
    count = operand.extent(0)
    if count is None:
        raise UnresolvedError("how many axes are padded is computed")
    mask, value = along(operand.known.mask, 0, count), along(operand.known.value, 0, count)
    return [int(v) if m else None for m, v in zip(mask, value, strict=True)]


def _padded(view: View) -> dict[int, tuple[int | None, int | None]]:
    """What is added per axis, where that is not nothing."""
    axes, before, after = _pads(view)
    return {a: (b, e) for a, b, e in zip(axes, before, after, strict=True) if (b, e) != (0, 0)}


def _pad(view: View) -> Relation:
    padded = _padded(view)
    channel = 1 in padded and view.data().rank >= 3
    rank = view.data().rank
    names = [f"a{axis}" for axis in range(rank)]
    left = " ".join(f"[{n}]" if axis in padded else n for axis, n in enumerate(names))
    right = " ".join(f"[{n}o]" if axis in padded else n for axis, n in enumerate(names))
    relation = resolve(f"{left} -> {right}", [shape_of(view.data())], [shape_of(view.output())])
    last = {rank - 1} & set(padded)
    for axis in {1} if channel else last:
        relation = _pad_link(view, relation, axis, padded[axis])
    return with_other_inputs(view, relation)


def _pad_link(view: View, relation: Relation, axis: int, amount: tuple[int | None, int | None]) -> Relation:
    """The padded axis of channels as an index map; added positions come from nowhere."""
    extent, result = view.data().extent(axis), view.output().extent(axis)
    first, last = amount
    if extent is None or result is None or first is None or last is None or min(first, last) < 0:
        return relation
    if view.attribute("mode", "constant") != "constant":
        return relation
    name = f"p{axis}"
    link = Link(0, -1, np.arange(extent), np.arange(first, first + extent))
    inputs, outputs = list(relation.inputs[0] or ()), list(relation.outputs[0] or ())
    inputs[axis], outputs[axis] = (name,), (name,)
    sizes = {**relation.sizes, f"{name}@0": extent, f"{name}@-1": result}
    pinned = relation.pinned - {f"a{axis}", f"a{axis}o"}
    return Relation((tuple(inputs),), (tuple(outputs),), sizes, pinned, {name: (link,)})


def _pad_value(view: View) -> Array | None:
    """The constant that is added, None when it is not known or not a constant."""
    dtype = view.data().dtype or np.dtype(np.float32)
    if view.attribute("mode", "constant") != "constant":
        return None
    if view.version < 11:
        return np.array(view.attribute("value", 0.0), dtype)
    operand = view.input(2)
    if operand is None:
        return np.zeros((), dtype)
    value = operand.value()
    return None if value is None else value.reshape(())


def _pad_forward(view: View) -> list[Known | None]:
    """A channel of the padding's own value stays uniform; channels that are added hold that value."""
    relation, known = view.relation, view.data().known
    assert relation is not None
    padded = _padded(view)
    pinned = [a for a, f in enumerate(relation.inputs[0] or ()) if f and f[0] in relation.pinned and a in padded]
    known = uniform(known, pinned)
    if view.attribute("mode", "constant") != "constant":
        # Reflected, repeated or wrapped, what holds one value along the axis goes on holding it.
        return [moved(relation, known, 0, -1)] if len(pinned) == len(padded) else [None]
    value = _pad_value(view)
    if value is None:
        return [None]
    return [_pad_added(view, np.asarray(known.mask & (known.value == value)), value)]


def _pad_added(view: View, mask: BoolArray, value: Array) -> Known | None:
    relation = view.relation
    assert relation is not None
    moved_mask = transfer(relation, mask, 0, -1, fill=True)
    if not moved_mask.any():
        return None
    return partial(moved_mask, np.broadcast_to(value, (1,) * view.output().rank))


def _pad_frame(view: View) -> Known | None:
    """A channel of one value keeps it within the zeros that are put around every channel alike."""
    value, padded = _pad_value(view), _padded(view)
    if 1 in padded or value is None or value != 0:
        return None
    known = uniform(view.data().known, padded)
    return known if known.nonzero().any() else None


def _pad_rewrite(view: View) -> Rewrite:
    axes, before, after = _pads(view)
    amounts = np.array([amount or 0 for amount in (*before, *after)], np.int64)
    changed = np.zeros(amounts.size, np.bool_)
    for index, axis in enumerate(axes):
        extent, kept, start = view.data().extent(axis), view.kept[-1][axis], before[index]
        if kept is None or extent is None or start is None or axis not in _padded(view) or kept.all():
            continue
        both = [index, index + len(axes)]
        amounts[both] = int(kept[:start].sum()), int(kept[start + extent :].sum())
        changed[both] = True
    if not changed.any():
        return Rewrite()
    if view.version < 11:
        return Rewrite(attributes={"pads": amounts.tolist()})
    if None in (*before, *after):
        return Rewrite(partly={1: (changed, amounts)})
    return Rewrite(constants={1: amounts})


register(Rule("Pad", since=2, relate=_pad, forward=_pad_forward, rewrite=_pad_rewrite, frame=_pad_frame))

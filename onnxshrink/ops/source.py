"""Operators whose output is not made from the values of their input: shapes, fills."""

from __future__ import annotations

import numpy as np

from onnxshrink.facts import Known, partial
from onnxshrink.notation import Relation, UnresolvedError
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray


def _shape_range(view: View) -> tuple[int, int]:
    rank = view.data().rank
    start, end = int(view.attribute("start", 0)), int(view.attribute("end", rank))
    return (max(0, min(rank, v + rank if v < 0 else v)) for v in (start, end))  # type: ignore[return-value]


def _shape_relation(view: View) -> Relation:
    """The extents of the input are read, never its elements: no axis takes part."""
    return Relation((None,), ((("e",),),), {"e": view.output().extent(0)}, frozenset({"e"}))


def _extents(view: View) -> tuple[BoolArray, Array]:
    start, end = _shape_range(view)
    extents = [view.data().extent(axis) for axis in range(start, end)]
    mask = np.array([extent is not None for extent in extents], np.bool_)
    return mask, np.array([extent or 0 for extent in extents], np.int64)


def _shape_forward(view: View) -> list[Known | None]:
    mask, value = _extents(view)
    return [partial(mask, value) if mask.size else None]


def _nothing_needed(view: View) -> list[BoolArray | None]:
    return [None] * len(view.inputs)


def _shape_retain(view: View) -> list[Keep]:
    """An extent with a free part that shrinks could not be told any more."""
    axes = [axis for axis in range(*_shape_range(view)) if view.data().period(axis) is not None]
    reason = "its extent, which has a free part, is read"
    return [Keep(0, axis, np.ones(view.data().period(axis) or 0, np.bool_), reason) for axis in axes]


def _shape_rewrite(view: View) -> Rewrite:
    """Whoever reads an extent gets the original one; operators that take it as a target are told the new one."""
    start, end = _shape_range(view)
    if not any(view.shrinks(0, axis) for axis in range(start, end)):
        return Rewrite()
    return Rewrite(fixed=_extents(view))


register(
    Rule(
        "Shape",
        relate=_shape_relation,
        shape_only=True,
        forward=_shape_forward,
        backward=_nothing_needed,
        retain=_shape_retain,
        rewrite=_shape_rewrite,
    )
)


def _size_relation(view: View) -> Relation:
    if view.data().static_shape() is None:
        raise UnresolvedError("the number of elements of a tensor with free dimensions")
    return Relation((None,), ((),), {})


def _size_forward(view: View) -> list[Known | None]:
    extents = [view.data().extent(axis) or 0 for axis in range(view.data().rank)]
    return [partial(np.array(True), np.array(int(np.prod(extents, dtype=np.int64)), np.int64))]


def _size_rewrite(view: View) -> Rewrite:
    (known,) = _size_forward(view)
    return Rewrite(fixed=(known.mask, known.value)) if known is not None else Rewrite()


register(
    Rule(
        "Size",
        relate=_size_relation,
        shape_only=True,
        forward=_size_forward,
        backward=_nothing_needed,
        rewrite=_size_rewrite,
    )
)

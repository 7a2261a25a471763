"""Operators that fold an axis: sums, means, extrema, arguments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxshrink.facts import Known, partial, uniform
from onnxshrink.families import partial_in, whole
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View, vector
from onnxshrink.weights import Array, BoolArray

_AXES_INPUT_SINCE = {"ReduceSum": 13}


def axes_of(view: View) -> list[int] | None:
    """The reduced axes; None when they are computed."""
    rank = view.data().rank
    as_input = view.version >= _AXES_INPUT_SINCE.get(view.node.op, 18)
    axes = view.ints(1) if as_input else view.ints(-1, "axes") if "axes" in view.node.attributes else []
    if as_input and view.input(1) is None:
        axes = []
    if axes is None:
        return None
    if not axes:
        return [] if view.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return [axis % rank for axis in axes]


def reduced(view: View, axes: list[int]) -> Relation:
    """Reduced axes pinned, the others passing through."""
    rank = view.data().rank
    keep = bool(view.attribute("keepdims", 1))
    left = " ".join(f"[a{a}]" if a in axes else f"a{a}" for a in range(rank))
    right = " ".join("1" if a in axes else f"a{a}" for a in range(rank) if keep or a not in axes)
    if not right:
        right = "*s"
    shapes = [view.data().shape, *[None] * (len(view.inputs) - 1)]
    return resolve(f"{left} -> {right}", shapes, view.shapes(view.outputs))


def _relate(view: View) -> Relation:
    axes = axes_of(view)
    if axes is None:
        raise UnresolvedError("which axes are reduced is computed")
    return reduced(view, axes)


def _mean_forward(view: View) -> list[Known | None]:
    """A mean or extremum of equal values is that value."""
    axes = axes_of(view)
    known = view.data().known
    if axes is None or not known.anything:
        return [None]
    known = uniform(known, axes)
    if not known.anything:
        return [None]
    mask, value = known.mask, known.value
    if not view.attribute("keepdims", 1):
        mask, value = mask.squeeze(tuple(axes)), value.squeeze(tuple(axes))
    return [partial(mask, value)]


def _sum_forward(view: View) -> list[Known | None]:
    """A sum of zeros is zero; other sums need every element."""
    found = _mean_forward(view)[0]
    if found is None or not found.zero().any():
        return whole(view)
    return [partial(found.zero(), found.value)]


# --- Sums and means: an index leaves with a contribution that is known ------------------------------------------


def _additive(view: View) -> Relation:
    """Axes of fixed extent may lose indices; the contribution that goes with them is put back."""
    axes = axes_of(view)
    relation = _relate(view)
    fixed = {f"a{a}" for a in axes or () if view.data().extent(a) is not None}
    return replace(relation, pinned=relation.pinned - fixed)


def _contribution(view: View, axis: int) -> tuple[BoolArray, Array]:
    """Indices of a reduced axis that hold one known value everywhere, and what each adds to the result."""
    data = view.data()
    known = uniform(data.known, (a for a in range(data.rank) if a != axis))
    extent = data.extent(axis) or 0
    value = vector(known.value, axis, extent).astype(np.float64)
    mask = vector(known.mask, axis, extent).astype(np.bool_)
    if view.node.op == "ReduceSumSquare":
        value = value**2
    elif view.node.op == "ReduceL1":
        value = np.abs(value)
    elif view.node.op == "ReduceL2":
        mask = mask & (value == 0)
    return mask, value


def _additive_axes(view: View) -> list[int]:
    return [axis for axis in axes_of(view) or () if view.data().extent(axis) is not None]


def _additive_retain(view: View) -> list[Keep]:
    """With several axes cut at once only zeros may leave: the products of their constants are not looked at."""
    axes = _additive_axes(view)
    keeps = []
    for axis in axes:
        mask, value = _contribution(view, axis)
        if len(axes) > 1 or (len(axes_of(view) or ()) > 1 and view.node.op != "ReduceMean"):
            mask = mask & (value == 0)
        keeps.append(Keep(0, axis, ~mask, "the sum reads it"))
    return keeps


def _additive_rewrite(view: View) -> Rewrite:
    """A mean divides by the extent: what is left is scaled by kept / original."""
    added, scale = 0.0, 1.0
    for axis in _additive_axes(view):
        kept = view.kept[0][axis]
        if kept is None or kept.all():
            continue
        mask, value = _contribution(view, axis)
        rest = int(np.prod([view.data().extent(a) or 1 for a in _additive_axes(view) if a != axis], dtype=np.int64))
        added += float(value[mask & ~kept].sum()) * rest
        scale *= float(kept.sum()) / kept.size
    if view.node.op == "ReduceMean":
        extents = [view.data().extent(axis) or 1 for axis in _additive_axes(view)]
        added /= float(np.prod(extents))
    else:
        scale = 1.0
    dtype = view.output().dtype
    return Rewrite(
        multiply=np.array(scale, dtype) if scale != 1.0 else None, add=np.array(added, dtype) if added else None
    )


def _may_shrink(view: View) -> bool:
    """Whether a correction can be made in the output's type."""
    return view.output().dtype is not None and np.issubdtype(view.output().dtype, np.floating)


def _relate_additive(view: View) -> Relation:
    return _additive(view) if _may_shrink(view) else _relate(view)


def _retain_additive(view: View) -> list[Keep]:
    return _additive_retain(view) if _may_shrink(view) else []


def _rewrite_additive(view: View) -> Rewrite:
    return _additive_rewrite(view) if _may_shrink(view) else Rewrite()


for _op in ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
    register(
        Rule(
            _op,
            relate=_relate_additive,
            forward=_mean_forward if _op == "ReduceMean" else _sum_forward,
            retain=_retain_additive,
            rewrite=_rewrite_additive,
        )
    )
for _op in ("ReduceMax", "ReduceMin"):
    register(Rule(_op, relate=_relate, forward=_mean_forward))
register(Rule("ReduceProd", relate=_relate, forward=_sum_forward))
for _op in ("ReduceLogSum", "ReduceLogSumExp"):
    register(Rule(_op, relate=_relate, backward=partial_in(0), partial=(0,)))


def _argument(view: View) -> Relation:
    return reduced(view, [int(view.attribute("axis", 0)) % view.data().rank])


for _op in ("ArgMax", "ArgMin"):
    register(Rule(_op, relate=_argument))

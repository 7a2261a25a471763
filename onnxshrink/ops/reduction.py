"""Operators that fold an axis: sums, means, extrema, arguments."""

from __future__ import annotations

from onnxshrink.facts import Known, partial, uniform
from onnxshrink.families import whole
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Rule, register
from onnxshrink.view import View

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


for _op in ("ReduceMean", "ReduceMax", "ReduceMin"):
    register(Rule(_op, relate=_relate, forward=_mean_forward))
for _op in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd"):
    register(Rule(_op, relate=_relate, forward=_sum_forward))
for _op in ("ReduceLogSum", "ReduceLogSumExp"):
    register(Rule(_op, relate=_relate))


def _argument(view: View) -> Relation:
    return reduced(view, [int(view.attribute("axis", 0)) % view.data().rank])


for _op in ("ArgMax", "ArgMin"):
    register(Rule(_op, relate=_argument))

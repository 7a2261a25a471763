"""Deformable convolution: samples lie at offsets that are computed, the channels hang together as in a convolution."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxshrink.facts import Known, everything
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops._linear import Linear, known_result
from onnxshrink.registry import Keep, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import BoolArray

_WEIGHTS, _OFFSET, _BIAS, _MASK = 1, 2, 3, 4


def _relate(view: View) -> Relation:
    """`n i [*x], o i [*k], n [f] [*y], o, n [m] [*y] -> n o [*y]`; `i` stays whole where groups of it share offsets"""
    if int(view.attribute("group", 1)) > 1:
        raise UnresolvedError("a deformable convolution with groups of channels")
    if view.data(_WEIGHTS).constant is None:
        raise UnresolvedError("its weights are computed")
    notation = "n i [*x], o i [*k], n [f] [*y], o, n [m] [*y] -> n o [*y]"
    relation = resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))
    return relation.pin("i") if int(view.attribute("offset_group", 1)) > 1 else relation


def _linear(view: View) -> Linear:
    """No bias stands for a constant channel: samples outside are zero."""
    weights = view.data(_WEIGHTS).constant
    assert weights is not None
    return Linear(view, 0, 1, 1, weights.pattern(0, 1), border=True, bias=False, editable=False)


def _forward(view: View) -> list[Known | None]:
    """The bias, where nothing else contributes."""
    bias, output = view.input(_BIAS), view.output()
    assert output.dtype is not None
    linear = _linear(view)
    return [known_result(linear, bias.known if bias is not None else None, _no_weights, output.rank, output.dtype)]


def _no_weights(channels: BoolArray) -> BoolArray:
    raise AssertionError(f"{int(channels.sum())} constant channels at a border")


def _backward(view: View) -> list[BoolArray | None]:
    linear = _linear(view)
    live = linear.live_outputs()
    needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
    needed[0] = linear.needed_channels(live).reshape([1, -1] + [1] * (view.data().rank - 2))
    if view.input(_BIAS) is not None:
        needed[_BIAS] = live
    return needed


def _retain(view: View) -> Iterable[Keep]:
    linear = _linear(view)
    mask, value = linear.constants()
    wanted = linear.needed_channels(linear.live_outputs()) & ~np.asarray(mask & (value == 0))
    return [Keep(0, 1, wanted, "its constant cannot be folded: samples outside are zero")]


register(
    Rule("DeformConv", since=19, relate=_relate, forward=_forward, backward=_backward, retain=_retain),
)

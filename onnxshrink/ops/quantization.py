"""Quantised operators. A stored integer stands for its distance to a zero point: what counts as zero is that point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxshrink.facts import Known, along, everything, nothing, partial, project, uniform
from onnxshrink.families import whole
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops.contraction import bool_product, reduce_to
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray, any_along

# --- Between real numbers and integers --------------------------------------------------------------------------


def _scaled_axis(view: View) -> int | None:
    """The axis along which scales differ, None for one scale. Raises UnresolvedError for blocks."""
    scale, data = view.data(1), view.data()
    if scale.rank > 1 or view.attribute("block_size", 0):
        raise UnresolvedError("blocked quantisation: a block of elements shares one scale")
    axis = int(view.attribute("axis", 1))
    if scale.rank == 0 or not -data.rank <= axis < data.rank:
        if scale.rank == 1 and data.rank == 1 and scale.extent(0) == data.extent(0):
            return 0
        return None
    axis %= data.rank
    return axis if scale.extent(0) == data.extent(axis) else None


def _scale_relation(view: View) -> Relation:
    """`*a c *b, c, c -> *a c *b`, or one scale for all."""
    axis = _scaled_axis(view)
    axes = " ".join(f"a{position}" for position in range(view.data().rank))
    scales = [f"a{axis}" if axis is not None else "1" if o is not None and o.rank else "" for o in view.inputs[1:]]
    notation = f"{', '.join([axes, *scales])} -> {axes}"
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))


def _scale_forward(view: View) -> list[Known | None]:
    """Known where the input is: the operator itself, its input compressed except along the axis of the scales."""
    known, axis = view.data().known, _scaled_axis(view)
    scales = [None if operand is None else operand.value() for operand in view.inputs[1:]]
    if not known.anything or any(o is not None and s is None for o, s in zip(view.inputs[1:], scales, strict=True)):
        return [None]
    extent = None if axis is None else view.data().extent(axis)
    mask, value = known.mask, np.where(known.mask, known.value, np.ones((), known.value.dtype))
    if axis is not None and extent is not None:
        mask, value = along(mask, axis, extent), along(value, axis, extent)
    found = view.run([value, *scales])
    return [None if found is None else partial(mask, found[0])]


register(Rule("QuantizeLinear", since=10, relate=_scale_relation, forward=_scale_forward))
register(Rule("DequantizeLinear", since=10, relate=_scale_relation, forward=_scale_forward, decodes=True))


# --- One scale for what the data turns out to be ----------------------------------------------------------------


def _range_backward(view: View) -> list[BoolArray | None]:
    """The smallest and the largest element set the scale; zero is always within the range."""
    return [everything(view.data().rank)]


def _range_retain(view: View) -> Iterable[Keep]:
    nonzero = view.data().known.nonzero()
    if not nonzero.any():
        return []
    extents = [(axis, view.data().extent(axis)) for axis in range(view.data().rank)]
    reason = "its constant may be the smallest or the largest element, which sets the scale"
    return [Keep(0, axis, project(nonzero, axis, extent), reason) for axis, extent in extents if extent is not None]


register(
    Rule(
        "DynamicQuantizeLinear",
        since=11,
        relate="*a -> *a, , ",
        backward=_range_backward,
        retain=_range_retain,
    )
)


# --- Products of integers ---------------------------------------------------------------------------------------


def shifted(view: View, slot: int, zero_slot: int, axis: int) -> Known:
    """Distance of the elements of an input to its zero point, which may differ along one axis."""
    operand, zero = view.data(slot), view.input(zero_slot)
    known = operand.known
    if zero is None:
        return Known(known.mask, known.value.astype(np.int64))
    point = zero.value()
    if point is None:
        return nothing(operand.rank, np.dtype(np.int64))
    point = point.astype(np.int64)
    if point.size == 1:
        return Known(known.mask, known.value.astype(np.int64) - point.reshape(()))
    shape = [1] * operand.rank
    shape[axis] = point.size
    return Known(known.mask, known.value.astype(np.int64) - point.reshape(shape))


def _not_zero(known: Known) -> BoolArray:
    return np.asarray(~known.zero())


@dataclass(frozen=True)
class _Slots:
    """Where an operator has its two factors and their zero points, and its output's zero point and bias.

    `factors` tells along which factor each scale, zero point and bias may differ.
    """

    left: int
    left_zero: int
    right: int
    right_zero: int
    factors: tuple[str, ...]
    output_zero: int | None = None
    bias: int | None = None


_SLOTS = {
    "MatMulInteger": _Slots(0, 2, 1, 3, ("", "", "m", "n")),
    "QLinearMatMul": _Slots(0, 2, 3, 5, ("", "m", "m", "", "n", "n", "[s]", "[s]"), output_zero=7),
    "ConvInteger": _Slots(0, 2, 1, 3, ("", "", "[s]", "o")),
    "QLinearConv": _Slots(0, 2, 3, 5, ("", "[s]", "[s]", "", "o", "o", "[s]", "[s]", "o"), output_zero=7, bias=8),
}


def _parameter(view: View, slot: int) -> str:
    """Notation of a scale, zero point or bias: one for all, or one per index of a factor."""
    operand = view.input(slot)
    if operand is None or operand.rank == 0:
        return ""
    if operand.rank > 1:
        raise UnresolvedError("scales or zero points with more than one axis")
    return "1" if operand.extent(0) == 1 else _SLOTS[view.node.op].factors[slot]


def _relation(view: View, left: str, right: str, output: str) -> Relation:
    slots = _SLOTS[view.node.op]
    for slot in (slots.left, slots.right):
        dtype = view.data(slot).dtype
        if dtype is None or dtype.kind not in "iu":
            raise UnresolvedError("factors that are not integers")
    sides = {slots.left: left, slots.right: right}
    texts = [sides[slot] if slot in sides else _parameter(view, slot) for slot in range(len(view.inputs))]
    return resolve(f"{', '.join(texts)} -> {output}", view.shapes(view.inputs), view.shapes(view.outputs))


def _known_zero_output(view: View, unknown: BoolArray) -> Known | None:
    """Zero, or the output's zero point, where nothing contributes."""
    slots, output = _SLOTS[view.node.op], view.output()
    mask = np.asarray(~unknown)
    point: Array | None = np.zeros((), output.dtype)
    if slots.output_zero is not None:
        point = view.data(slots.output_zero).value()
    if point is None or point.size != 1 or not mask.any():
        return None
    return partial(mask, point.astype(output.dtype).reshape((1,) * mask.ndim))


# --- Matrix products --------------------------------------------------------------------------------------------


def _matmul_relation(view: View) -> Relation:
    """`*b m k, *b k n -> *b m n`, scales and zero points one for all or per `m`, per `n`"""
    slots = _SLOTS[view.node.op]
    if min(view.data(slots.left).rank, view.data(slots.right).rank) < 2:
        raise UnresolvedError("a product with a vector")
    return _relation(view, "*b m k", "*b k n", "*b m n")


def _sides(view: View) -> tuple[Known, Known]:
    slots = _SLOTS[view.node.op]
    left, right = view.data(slots.left), view.data(slots.right)
    return (
        shifted(view, slots.left, slots.left_zero, left.rank - 2),
        shifted(view, slots.right, slots.right_zero, right.rank - 1),
    )


def _matmul_forward(view: View) -> list[Known | None]:
    left, right = _sides(view)
    found = _known_zero_output(view, bool_product(_not_zero(left), _not_zero(right)))
    return [found] if found is not None else whole(view)


def _matmul_backward(view: View) -> list[BoolArray | None]:
    slots, live = _SLOTS[view.node.op], view.live()
    left, right = _sides(view)
    needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
    wanted = bool_product(live, _not_zero(right).swapaxes(-1, -2))
    needed[slots.left] = reduce_to(wanted, view.data(slots.left))
    wanted = bool_product(_not_zero(left).swapaxes(-1, -2), live)
    needed[slots.right] = reduce_to(wanted, view.data(slots.right))
    return needed


def _matmul_retain(view: View) -> Iterable[Keep]:
    """Contracted indices at which two known values multiply to something other than zero."""
    slots = _SLOTS[view.node.op]
    left, right = (known.nonzero() for known in _sides(view))
    both = any_along(left, tuple(range(left.ndim - 1)))
    both = np.asarray(both & any_along(right, (*range(right.ndim - 2), right.ndim - 1)))
    keeps = []
    for slot, axis in ((slots.left, view.data(slots.left).rank - 1), (slots.right, view.data(slots.right).rank - 2)):
        extent = view.data(slot).extent(axis)
        if view.data(slot).constant is None and extent is not None:
            wanted = along(both, 0, extent).copy()
            keeps.append(Keep(slot, axis, wanted, "its constant is multiplied by another constant"))
    return keeps


for _op in ("MatMulInteger", "QLinearMatMul"):
    register(
        Rule(
            _op,
            since=10,
            relate=_matmul_relation,
            forward=_matmul_forward,
            backward=_matmul_backward,
            retain=_matmul_retain,
        )
    )


# --- Convolutions -----------------------------------------------------------------------------------------------


def _depthwise(view: View) -> bool:
    return int(view.attribute("group", 1)) > 1


def _conv_relation(view: View) -> Relation:
    """`n i [*x], o i [*k] -> n o [*y]`, or depthwise; scales and zero points one for all or per `o`"""
    slots = _SLOTS[view.node.op]
    data, weights = view.data(slots.left), view.data(slots.right)
    if weights.constant is None:
        raise UnresolvedError("its weights are computed")
    if data.extent(1) is None:
        raise UnresolvedError("the number of channels is not known")
    group = int(view.attribute("group", 1))
    if group == 1:
        relation = _relation(view, "n i [*x]", "o i [*k]", "n o [*y]")
    elif group == data.extent(1) == weights.extent(0) and weights.extent(1) == 1:
        relation = _relation(view, "n o [*x]", "o 1 [*k]", "n o [*y]")
    else:
        raise UnresolvedError("a grouped convolution of integers that is not depthwise")
    return relation


def _pattern(view: View) -> BoolArray:
    """`[out, in]`: where the weights differ from their zero point."""
    slots = _SLOTS[view.node.op]
    known = shifted(view, slots.right, slots.right_zero, 0)
    grid = any_along(_not_zero(known), tuple(range(2, known.value.ndim)))
    if not _depthwise(view):
        shape = [view.data(slots.right).extent(axis) or 1 for axis in (0, 1)]
        return np.broadcast_to(grid, shape)
    return np.asarray(np.eye(grid.shape[0], dtype=np.bool_) & grid)


def _zero_channels(view: View) -> BoolArray:
    """Channels of the input that hold its zero point everywhere."""
    slots = _SLOTS[view.node.op]
    known = shifted(view, slots.left, slots.left_zero, 1)
    known = uniform(known, (a for a in range(known.value.ndim) if a != 1))
    return along(known.zero().reshape(-1), 0, view.data(slots.left).extent(1) or 1)


def _conv_forward(view: View) -> list[Known | None]:
    pattern = _pattern(view)
    idle = ~any_along(pattern & ~_zero_channels(view), 1)
    if not idle.any():
        return [None]
    values = _idle_values(view, idle.size)
    if values is None:
        return [None]
    mask, value = values
    shape = [1, idle.size] + [1] * (view.output().rank - 2)
    return [partial((idle & mask).reshape(shape), value.astype(view.output().dtype).reshape(shape))]


def _idle_values(view: View, count: int) -> tuple[BoolArray, Array] | None:
    """Values of output channels to which nothing but the bias contributes, and where they are certain."""
    slots = _SLOTS[view.node.op]
    if slots.output_zero is None:
        return np.ones(count, np.bool_), np.zeros(count)
    given = [view.data(slot).value() for slot in (1, 4, 6, slots.output_zero)]
    bias = view.input(slots.bias or 0)
    addend = bias.value() if bias is not None else np.zeros(count, np.int32)
    if addend is None or any(value is None for value in given):
        return None
    x, w, y, point = (np.asarray(value, np.float64).reshape(-1) for value in given)
    real = addend.astype(np.float64) * (x * w / y)
    limits = np.iinfo(view.output().dtype or np.int8)
    # Half-way cases depend on how a kernel rounds.
    certain = np.abs(np.abs(real - np.floor(real)) - 0.5) > 1e-3
    return np.asarray(certain), np.clip(np.rint(real) + point, limits.min, limits.max)


def _live_channels(view: View) -> BoolArray:
    return project(view.live(), 1, view.output().extent(1) or 1)


def _conv_backward(view: View) -> list[BoolArray | None]:
    slots = _SLOTS[view.node.op]
    needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
    reached = any_along(_pattern(view) & _live_channels(view)[:, None], 0)
    needed[slots.left] = reached.reshape([1, -1] + [1] * (view.data(slots.left).rank - 2))
    return needed


def _conv_retain(view: View) -> Iterable[Keep]:
    slots = _SLOTS[view.node.op]
    reached = any_along(_pattern(view) & _live_channels(view)[:, None], 0)
    wanted = np.asarray(reached & ~_zero_channels(view))
    return [Keep(slots.left, 1, wanted, "its constant cannot be folded in a product of integers")]


def _conv_rewrite(view: View) -> Rewrite:
    if not _depthwise(view) or not view.shrinks(-1, 1):
        return Rewrite()
    return Rewrite(attributes={"group": view.kept_count(-1, 1)})


for _op in ("ConvInteger", "QLinearConv"):
    register(
        Rule(
            _op,
            since=10,
            relate=_conv_relation,
            forward=_conv_forward,
            backward=_conv_backward,
            retain=_conv_retain,
            rewrite=_conv_rewrite,
        )
    )

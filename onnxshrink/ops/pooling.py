"""Pooling, resampling and rearrangement of space: channels pass through, positions stay whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxshrink.facts import Known, along, partial, uniform
from onnxshrink.families import layout, moved
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import BoolArray

Test = Callable[[View], bool]
_CHANNELS = "n c [*x] -> n c [*y], n c [*y]"


def _pooled(keeps_constant: Test) -> Callable[[View], list[Known | None]]:
    """A channel that holds one value keeps it, if `keeps_constant`; a zero channel always stays zero."""

    def forward(view: View) -> list[Known | None]:
        data = view.data()
        known = uniform(data.known, range(2, data.rank))
        mask: BoolArray = known.mask if keeps_constant(view) else known.zero()
        rest: list[Known | None] = [None] * (len(view.outputs) - 1)
        return [partial(mask, known.value) if mask.any() else None, *rest]

    return forward


def _padded(view: View) -> bool:
    automatic = view.attribute("auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or any(pad != 0 for pad in view.attribute("pads", []))


def _windows_touch(view: View) -> bool:
    """Whether even the last window of an axis begins inside the tensor.

    Rounded up, the last window begins before extent + pad_begin + stride - kernel + pad_end - pad_begin.
    """
    if not view.attribute("ceil_mode", 0):
        return True
    kernel = view.attribute("kernel_shape", [])
    ends = view.attribute("pads", [0] * 2 * len(kernel))[len(kernel) :]
    strides = view.attribute("strides", [1] * len(kernel))
    plain = set(view.attribute("dilations", [1])) == {1} and view.attribute("auto_pad", "NOTSET") == "NOTSET"
    return plain and all(s + e <= k for k, s, e in zip(kernel, strides, ends, strict=True))


def _average_keeps(view: View) -> bool:
    """An average of equal values is that value, unless zeros of the padding are counted."""
    if not _windows_touch(view):
        return False
    return not (_padded(view) and view.attribute("count_include_pad", 0))


def _maximum_keeps(view: View) -> bool:
    """Padding counts as minus infinity, so every window must touch the tensor."""
    return _windows_touch(view)


def _always(view: View) -> bool:
    return True


def _never(view: View) -> bool:
    return False


def _max_relation(view: View) -> Relation:
    """The second output holds positions in the whole tensor, which would move."""
    notation = "n c [*x] -> n c [*y]" if len(view.outputs) == 1 or view.outputs[1] is None else "[*x] -> [*y], [*y]"
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))


for _op, _test in {"AveragePool": _average_keeps, "LpPool": _never, "GlobalLpPool": _never}.items():
    register(Rule(_op, relate=_CHANNELS, forward=_pooled(_test)))
for _op in ("GlobalAveragePool", "GlobalMaxPool"):
    register(Rule(_op, relate=_CHANNELS, forward=_pooled(_always)))
register(Rule("MaxPool", relate=_max_relation, forward=_pooled(_maximum_keeps)))


# --- Resize -----------------------------------------------------------------------------------------------------


def _resize_relation(view: View) -> Relation:
    """Axes that keep their extent pass through; resampled ones stay whole."""
    data, output = view.data(), view.output()
    if data.shape is None or output.shape is None or len(data.shape) != len(output.shape):
        raise UnresolvedError("the ranks of input and output are not known")
    if _crops(view):
        raise UnresolvedError("a crop may extrapolate")
    names = [f"a{axis}" for axis in range(data.rank)]
    passes = [_passes(view, axis) for axis in range(data.rank)]
    left = " ".join(n if p else f"[{n}]" for n, p in zip(names, passes, strict=True))
    right = " ".join(n if p else f"[{n}o]" for n, p in zip(names, passes, strict=True))
    shapes = [data.shape, *[None] * (len(view.inputs) - 1)]
    return resolve(f"{left} -> {right}", shapes, [output.shape])


def _crops(view: View) -> bool:
    return bool(view.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize")


def _passes(view: View, axis: int) -> bool:
    axes = view.attribute("axes")
    if axes is not None:
        return axis not in [a % view.data().rank for a in axes]
    unscaled = _unscaled(view)
    if unscaled is not None:
        return bool(unscaled[axis])
    extent = view.data().extent(axis)
    return axis < 2 and extent is not None and extent == view.output().extent(axis)


def _unscaled(view: View) -> BoolArray | None:
    """Axes of which the scale is known to be one; None where no scales are given."""
    slot = 2 if view.version >= 11 and view.node.op == "Resize" else 1
    operand = view.input(slot)
    if operand is None or operand.extent(0) == 0:
        return None
    one = operand.known.mask & (operand.known.value == 1)
    return along(one, 0, view.data().rank)


def _resize_forward(view: View) -> list[Known | None]:
    data = view.data()
    resampled = [axis for axis in range(data.rank) if not _passes(view, axis)]
    known = uniform(data.known, resampled)
    mask = known.mask if view.attribute("mode", "nearest") != "cubic" else known.zero()
    return [moved(view.relation, Known(mask, known.value), 0, -1)]


def _resize_rewrite(view: View) -> Rewrite:
    """`sizes` names the extent of every axis (of those in `axes`, when given, which stay whole)."""
    sizes = view.input(3)
    if sizes is None or view.attribute("axes") is not None:
        return Rewrite()
    counts = [view.kept_count(-1, axis) for axis in range(view.output().rank)]
    mask = np.array([view.shrinks(-1, axis) for axis in range(len(counts))])
    if not mask.any():
        return Rewrite()
    value = sizes.value()
    new = np.array([count or 0 for count in counts], np.int64)
    if value is not None:
        return Rewrite(constants={3: np.where(mask, new, value)})
    return Rewrite(partly={3: (mask, new)})


register(Rule("Resize", since=10, relate=_resize_relation, forward=_resize_forward, rewrite=_resize_rewrite))
register(Rule("Upsample", since=9, relate=_resize_relation, forward=_resize_forward))


# --- Space and depth --------------------------------------------------------------------------------------------


def _depth_to_space(view: View) -> Relation:
    block = int(view.attribute("blocksize"))
    depth = "(c r s)" if view.attribute("mode", "DCR") == "CRD" else "(r s c)"
    return _rearranged(view, f"n {depth} y x -> n c (y r) (x s)", block)


def _space_to_depth(view: View) -> Relation:
    return _rearranged(view, "n c (y r) (x s) -> n (r s c) y x", int(view.attribute("blocksize")))


def _rearranged(view: View, notation: str, block: int) -> Relation:
    sizes = {"r": block, "s": block}
    relation = resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs), sizes)
    return relation.pin("r", "s", "y", "x")


register(Rule("DepthToSpace", relate=_depth_to_space, forward=layout))
register(Rule("SpaceToDepth", relate=_space_to_depth, forward=layout))

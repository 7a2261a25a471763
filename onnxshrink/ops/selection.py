"""Operators that select, order, repeat or sample positions: they mix what they choose from, the rest passes through."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxshrink.facts import Known, everything, partial, uniform
from onnxshrink.families import partial_in, whole
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops.indexing import all_pinned, along_axes, axis_of, names, resolved, zeros_along
from onnxshrink.ops.layout import shape_rewrite
from onnxshrink.registry import Rule, register
from onnxshrink.view import View
from onnxshrink.weights import BoolArray, any_along

# A triangle larger than this is not spelled out.
_TRIANGLE_ELEMENTS = 1 << 20

# --- Selecting along an axis ------------------------------------------------------------------------------------


def _top_k_forward(view: View) -> list[Known | None]:
    """The largest of equal values is that value; which ones are taken is left open."""
    known = uniform(view.data().known, [axis_of(view, -1)])
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    return [partial(known.mask, known.value), *rest] if known.anything and view.outputs[0] is not None else whole(view)


def _last(view: View) -> list[int]:
    return [axis_of(view, -1)]


register(Rule("TopK", relate=along_axes(_last, resized=True), forward=_top_k_forward))


def _compress(view: View) -> Relation:
    """The axis that is selected from stays whole, the others pass through."""
    if "axis" not in view.node.attributes:
        return all_pinned(view)
    return along_axes(lambda v: [axis_of(v)], resized=True)(view)


def _compress_forward(view: View) -> list[Known | None]:
    axes = [axis_of(view)] if "axis" in view.node.attributes else range(view.data().rank)
    known = uniform(view.data().known, axes)
    if not known.anything:
        return whole(view)
    shape = (1,) * view.output().rank
    if view.output().rank == view.data().rank:
        return [partial(known.mask, known.value)]
    return [partial(known.mask.reshape(shape), known.value.reshape(shape))]


register(Rule("Compress", since=9, relate=_compress, forward=_compress_forward))

# The number of results depends on the data; known only where all of it is.
for _op in ("NonZero", "Unique", "AffineGrid"):
    register(Rule(_op, relate=all_pinned))


def _one_hot(view: View) -> Relation:
    """`*a, d, v -> *a [x]`, the new axis where the attribute says."""
    rank = view.data().rank
    axis = int(view.attribute("axis", -1)) % (rank + 1)
    left = names(rank)
    shapes = [view.data().shape, *[None] * (len(view.inputs) - 1)]
    right = " ".join([*left[:axis], "[x]", *left[axis:]])
    return resolve(f"{' '.join(left)} -> {right}", shapes, view.shapes(view.outputs))


register(Rule("OneHot", since=9, relate=_one_hot))


# --- Running along an axis --------------------------------------------------------------------------------------


def _scanned(view: View) -> list[int]:
    axes = view.ints(1)
    if axes is None:
        raise UnresolvedError("which axis is accumulated is computed")
    return [axes[0] % view.data().rank]


def _product_forward(view: View) -> list[Known | None]:
    if view.attribute("exclusive", 0):
        return whole(view)
    return zeros_along(_scanned)(view)


register(Rule("CumSum", since=11, relate=along_axes(_scanned), forward=zeros_along(_scanned)))
register(Rule("CumProd", since=26, relate=along_axes(_scanned), forward=_product_forward))


def _time(view: View) -> int:
    return int(view.attribute("time_axis", 0)) % view.data().rank


def _reverse(view: View) -> Relation:
    """`[t] n *a, n -> [t] n *a`, or the batch first."""
    rank = view.data().rank
    axes = " ".join(names(rank, [_time(view)]))
    batch = int(view.attribute("batch_axis", 1)) % rank
    return resolved(view, f"{axes}, a{batch} -> {axes}")


def _reverse_forward(view: View) -> list[Known | None]:
    known = uniform(view.data().known, [_time(view)])
    return [partial(known.mask, known.value)] if known.anything else whole(view)


register(
    Rule("ReverseSequence", since=10, relate=_reverse, forward=_reverse_forward, backward=partial_in(1), partial=(1,))
)


# --- Triangles --------------------------------------------------------------------------------------------------


def _last_two(view: View) -> list[int]:
    rank = view.data().rank
    return [rank - 2, rank - 1]


def _outside(view: View) -> BoolArray | None:
    """Elements that are set to zero, where the extents and the diagonal are known."""
    rows, columns = (view.data().extent(axis) for axis in _last_two(view))
    diagonal = 0
    if view.input(1) is not None:
        given = view.ints(1)
        if given is None:
            return None
        diagonal = given[0]
    if rows is None or columns is None or rows * columns > _TRIANGLE_ELEMENTS:
        return None
    offset = np.arange(columns)[None, :] - np.arange(rows)[:, None] - diagonal
    outside = np.asarray(offset < 0 if view.attribute("upper", 1) else offset > 0)
    return outside.reshape((1,) * (view.data().rank - 2) + outside.shape)


def _trilu_forward(view: View) -> list[Known | None]:
    known, outside = view.data().known, _outside(view)
    if outside is None:
        return zeros_along(_last_two)(view)
    value = np.where(outside, np.zeros((), known.value.dtype), known.value)
    return [partial(np.asarray(known.mask | outside), value)]


def _trilu_backward(view: View) -> list[BoolArray | None]:
    outside = _outside(view)
    live = view.live()
    rest: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs[1:]]
    return [live if outside is None else np.asarray(live & ~outside), *rest]


register(Rule("Trilu", since=14, relate=along_axes(_last_two), forward=_trilu_forward, backward=_trilu_backward))


def _determinant(view: View) -> Relation:
    """`*a [x] [y] -> *a`"""
    batch = " ".join(f"a{axis}" for axis in range(view.data().rank - 2))
    return resolved(view, f"{batch} [x] [y] -> {batch}")


register(Rule("Det", since=11, relate=_determinant))


# --- Repeating --------------------------------------------------------------------------------------------------


def _repeats(view: View) -> list[int | None]:
    """How often each axis is repeated, None where it is computed."""
    rank, repeats = view.data().rank, view.data(1)
    known = repeats.known
    mask = np.broadcast_to(known.mask, (rank,))
    value = np.broadcast_to(known.value, (rank,))
    return [int(v) if m else None for m, v in zip(mask, value, strict=True)]


def _tile(view: View) -> Relation:
    """`a b -> ([r] a) ([s] b)`"""
    left, right = [], []
    for axis, repeat in enumerate(_repeats(view)):
        extents = view.data().extent(axis), view.output().extent(axis)
        if repeat == 1:
            left.append(f"a{axis}")
            right.append(f"a{axis}")
        elif all(extents):
            left.append(f"a{axis}")
            right.append(f"([r{axis}] a{axis})")
        else:
            left.append(f"[a{axis}]")
            right.append(f"[b{axis}]")
    shapes = [view.data().shape, *[None] * (len(view.inputs) - 1)]
    return resolve(f"{' '.join(left)} -> {' '.join(right)}", shapes, view.shapes(view.outputs))


def _tile_forward(view: View) -> list[Known | None]:
    """Known where the input is: repeated where it varies, and where the number of repeats is known."""
    known = view.data().known
    given = _repeats(view)
    known = uniform(known, [axis for axis, repeat in enumerate(given) if repeat is None])
    if not known.anything or 0 in given:
        return [None]
    repeats = [repeat or 1 for repeat in given]
    found = []
    for array in (known.mask, known.value):
        counts = [r if array.shape[axis] > 1 else 1 for axis, r in enumerate(repeats)]
        found.append(np.tile(array, counts))
    return [partial(*found)]


register(Rule("Tile", since=6, relate=_tile, forward=_tile_forward))


# --- Made from extents or scalars -------------------------------------------------------------------------------


def _fill_relation(view: View) -> Relation:
    """`[s] -> *a`: as large as its readers want."""
    axes = " ".join(f"a{axis}" for axis in range(view.output().rank))
    return resolve(f"[s] -> {axes}", view.shapes(view.inputs), view.shapes(view.outputs))


def _fill_forward(view: View) -> list[Known | None]:
    """One element tells what all are."""
    rank = view.output().rank
    found = view.run([np.ones(1, np.int64)])
    return [None if found is None else Known(everything(rank), found[0].reshape((1,) * rank))]


register(
    Rule(
        "ConstantOfShape",
        since=9,
        relate=_fill_relation,
        forward=_fill_forward,
        rewrite=shape_rewrite(0),  # type: ignore[arg-type]
    )
)


def _shape_alone(view: View) -> list[BoolArray | None]:
    """The elements of the input are never read."""
    return [None] * len(view.inputs)


def _eye_forward(view: View) -> list[Known | None]:
    shape = view.data().static_shape()
    if shape is None or int(np.prod(shape, dtype=np.int64)) > _TRIANGLE_ELEMENTS:
        return [None]
    found = view.run([np.zeros(shape, view.data().dtype)])
    return [None if found is None else partial(everything(2), found[0])]


register(Rule("EyeLike", since=9, relate=all_pinned, forward=_eye_forward, backward=_shape_alone))
for _op, _since in (
    ("Range", 11),
    ("BlackmanWindow", 17),
    ("HammingWindow", 17),
    ("HannWindow", 17),
    ("MelWeightMatrix", 17),
):
    register(Rule(_op, since=_since, relate=all_pinned))


# --- Sampling space ---------------------------------------------------------------------------------------------


def _space(view: View) -> Iterable[int]:
    return range(2, view.data().rank)


def _grid_sample_forward(view: View) -> list[Known | None]:
    """Where nothing is taken from outside, a mean of equal values is that value."""
    if view.attribute("padding_mode", "zeros") == "zeros":
        return zeros_along(_space)(view)
    known = uniform(view.data().known, _space(view))
    return [partial(known.mask, known.value)] if known.anything else whole(view)


register(
    Rule(
        "GridSample",
        since=16,
        relate="n c [*x], n *y [d] -> n c *y",
        forward=_grid_sample_forward,
        backward=partial_in(1),
        partial=(1,),
    )
)
register(
    Rule(
        "RoiAlign",
        since=10,
        relate="[n] c [h] [w], r [f], r -> r c [y] [x]",
        forward=zeros_along(lambda v: (0, 2, 3)),
        backward=partial_in(1, 2),
        partial=(1, 2),
    )
)
register(
    Rule(
        "MaxRoiPool",
        relate="[n] c [h] [w], r [f] -> r c [y] [x]",
        forward=zeros_along(lambda v: (0, 2, 3)),
        backward=partial_in(1),
        partial=(1,),
    )
)


def _col2im(view: View) -> Relation:
    """`n (c [k]) [l], s, k -> n c [*y]`"""
    block = view.ints(2)
    if block is None:
        raise UnresolvedError("the shape of its blocks is computed")
    sizes: dict[str, int | None] = {"k": int(np.prod(block, dtype=np.int64))}
    shapes = [view.data().shape, *[None] * (len(view.inputs) - 1)]
    return resolve("n (c [k]) [l] -> n c [*y]", shapes, view.shapes(view.outputs), sizes)


def _col2im_forward(view: View) -> list[Known | None]:
    """Zero where every element that is summed is zero."""
    channels = view.output().extent(1)
    zero = view.data().zero()
    if channels is None or not zero.any():
        return whole(view)
    batch, columns, _ = zero.shape
    columns = channels if columns > 1 else 1
    folded = ~any_along(~zero.reshape(batch, columns, -1), 2)
    if not folded.any():
        return [None]
    mask = folded.reshape((batch, columns, *[1] * (view.output().rank - 2)))
    return [partial(mask, np.zeros((1,) * mask.ndim, view.output().dtype))]


register(Rule("Col2Im", since=18, relate=_col2im, forward=_col2im_forward))


def _center_axes(view: View) -> list[int]:
    rank = view.data().rank
    return [int(a) % rank for a in view.attribute("axes", range(rank))]


register(
    Rule(
        "CenterCropPad",
        since=18,
        relate=along_axes(_center_axes, resized=True),
        forward=zeros_along(_center_axes),
    )
)


# --- Frequencies ------------------------------------------------------------------------------------------------


def _transformed(view: View) -> list[int]:
    rank = view.data().rank
    if view.version < 20:
        axis = int(view.attribute("axis", 1))
    else:
        given = view.ints(2)
        if given is None and view.input(2) is not None:
            raise UnresolvedError("which axis is transformed is computed")
        axis = given[0] if given is not None else -2
    return [axis % rank, rank - 1]


register(Rule("DFT", since=17, relate=along_axes(_transformed, resized=True), forward=zeros_along(_transformed)))
register(Rule("STFT", since=17, relate=all_pinned))

"""Gathering and scattering by indices that name several axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from onnxshrink.facts import Known, partial, uniform
from onnxshrink.families import partial_in, whole
from onnxshrink.notation import Relation, UnresolvedError
from onnxshrink.ops.indexing import (
    axis_of,
    both,
    else_whole,
    indices_of,
    names,
    needed_picks,
    new_picks,
    picked,
    resolved,
    retain_picks,
)
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray


def _depth(view: View) -> int:
    """How many axes an index names."""
    indices = view.data(1)
    depth = indices.extent(indices.rank - 1)
    if depth is None:
        raise UnresolvedError("how many axes are indexed is not known")
    return depth


def _nd_picks(view: View) -> Array | None:
    """Known indices into the first axis alone, without the axis that would hold those into others: as `Gather`'s."""
    if _depth(view) != 1 or int(view.attribute("batch_dims", 0)):
        return None
    indices = indices_of(view, 1, 0)
    return None if indices is None else indices[..., 0]


def _gather_nd(view: View) -> Relation:
    """`*b [*x] *a, *b *j [m] -> *b *j *a`: one axis `x` does not stay whole where the indices into it are known."""
    batch, depth = int(view.attribute("batch_dims", 0)), _depth(view)
    data = names(view.data().rank, range(batch, batch + depth), "[x]" if _nd_picks(view) is None else "x")
    picks = [*data[:batch], *(f"j{p}" for p in range(batch, view.data(1).rank - 1))]
    return resolved(view, f"{' '.join(data)}, {' '.join(picks)} [m] -> {' '.join([*picks, *data[batch + depth :]])}")


def _gather_nd_forward(view: View) -> list[Known | None]:
    known = view.data().known
    if not known.anything:
        return [None]
    picks = _nd_picks(view)
    if picks is not None:
        return [partial(*(picked(array, picks, 0) for array in (known.mask, known.value)))]
    found = _run_on_masks(view, (0,))
    if found is not None:
        return [found]
    batch, depth = int(view.attribute("batch_dims", 0)), _depth(view)
    known = uniform(known, range(batch, batch + depth))
    if not known.anything:
        return [None]
    count = view.data(1).rank - 1 - batch
    flat = [np.squeeze(array, tuple(range(batch, batch + depth))) for array in (known.mask, known.value)]
    return [partial(*(np.expand_dims(array, tuple(range(batch, batch + count))) for array in flat))]


def _run_on_masks(view: View, slots: Sequence[int]) -> Known | None:
    """What is known when the elements of `slots` are moved by known indices: the operator run on values and masks."""
    values: list[Array | None] = []
    masks: list[Array | None] = []
    for slot, operand in enumerate(view.inputs):
        shape = None if operand is None else operand.static_shape()
        if operand is None or shape is None or int(np.prod(shape, dtype=np.int64)) > 1 << 12:
            return None
        if slot not in slots and operand.value() is None:
            return None
        values.append(np.broadcast_to(operand.known.value, shape))
        moves = slot in slots
        masks.append(np.broadcast_to(operand.known.mask, shape).astype(np.float32) if moves else values[-1])
    value, mask = view.run(values), view.run(masks)
    return None if value is None or mask is None else partial(mask[0] > 0, value[0])


def _gather_nd_backward(view: View) -> list[BoolArray | None]:
    needed, picks = partial_in(1)(view), _nd_picks(view)
    return needed if picks is None else [needed_picks(view, 0, picks), *needed[1:]]


def _gather_nd_retain(view: View) -> Iterable[Keep]:
    return retain_picks(view, 0, _nd_picks(view))


def _gather_nd_rewrite(view: View) -> Rewrite:
    picks = new_picks(view, 0, _nd_picks(view))
    return Rewrite() if picks is None else Rewrite(constants={1: picks[..., None]})


register(
    Rule(
        "GatherND",
        relate=_gather_nd,
        forward=_gather_nd_forward,
        backward=_gather_nd_backward,
        partial=(1,),
        retain=_gather_nd_retain,
        rewrite=_gather_nd_rewrite,
    )
)


def _scatter_nd(view: View) -> Relation:
    """`[*x] *a, *j [m], *j *a -> [*x] *a`"""
    depth = _depth(view)
    data = names(view.data().rank, range(depth))
    picks = " ".join(f"j{p}" for p in range(view.data(1).rank - 1))
    return resolved(view, f"{' '.join(data)}, {picks} [m], {picks} {' '.join(data[depth:])} -> {' '.join(data)}")


def _scatter_nd_forward(view: View) -> list[Known | None]:
    if view.attribute("reduction", "none") == "none":
        found = _run_on_masks(view, (0, 2))
        if found is not None:
            return [found]
    depth, rank, picks = _depth(view), view.data().rank, view.data(1).rank - 1
    data = uniform(view.data().known, range(depth))
    updates = uniform(view.data(2).known, range(picks))
    if not (data.anything and updates.anything):
        return whole(view)
    shape = [1] * depth + list(updates.mask.shape[picks:])
    values = [1] * depth + list(updates.value.shape[picks:])
    aligned = Known(updates.mask.reshape(shape), updates.value.reshape(values))
    return else_whole(view, both(view, data, aligned, rank))


register(Rule("ScatterND", relate=_scatter_nd, forward=_scatter_nd_forward, backward=partial_in(1), partial=(1,)))


def _tensor_scatter(view: View) -> Relation:
    """`n *a [x] *b, n *a [u] *b, n -> n *a [x] *b`"""
    axis, rank = axis_of(view, -2), view.data().rank
    cache, update = " ".join(names(rank, [axis])), " ".join(names(rank, [axis], "[xu]"))
    lengths = ", a0" if view.input(2) is not None else ""
    return resolved(view, f"{cache}, {update}{lengths} -> {cache}")


def _tensor_scatter_forward(view: View) -> list[Known | None]:
    axis = axis_of(view, -2)
    data, update = (uniform(view.data(slot).known, (axis,)) for slot in (0, 1))
    return [both(view, data, update, view.output().rank)]


register(
    Rule("TensorScatter", relate=_tensor_scatter, forward=_tensor_scatter_forward, backward=partial_in(2), partial=(2,))
)

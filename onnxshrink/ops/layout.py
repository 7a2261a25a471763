"""Operators that move elements at fixed indices: reshaping, transposing, repeating."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxshrink.facts import Known, along
from onnxshrink.families import blind_moves, infinite_moves, layout, line_moves, unit_moves
from onnxshrink.graph import Shape
from onnxshrink.notation import Relation, UnresolvedError, opaque, resolve
from onnxshrink.registry import Rewrite, Rule, register
from onnxshrink.reshaping import reshape
from onnxshrink.view import Operand, View


def shape_of(operand: Operand) -> Shape:
    if operand.shape is None:
        raise UnresolvedError(f"the rank of {operand.name!r} is not known")
    return operand.shape


def with_other_inputs(view: View, relation: Relation) -> Relation:
    """The relation of the first input and the output; the other inputs are read whole."""
    inputs = (*relation.inputs, *[None] * (len(view.inputs) - len(relation.inputs)))
    return replace(relation, inputs=inputs)


# --- Transpose and the reshaping family -------------------------------------------------------------------------


def _transpose(view: View) -> Relation:
    shape = shape_of(view.data())
    order = view.attribute("perm") or list(range(len(shape)))[::-1]
    names = [f"a{axis}" for axis in range(len(shape))]
    notation = f"{' '.join(names)} -> {' '.join(names[axis] for axis in order)}"
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))


def _reshape(view: View) -> Relation:
    target = list(shape_of(view.output()))
    given = view.input(1)
    if given is not None and given.shape is not None:
        if given.rank == 1 and given.extent(0) not in (None, len(target)):
            raise UnresolvedError("the output is declared with another rank than the target has")
        _complete(target, given.known)
    relation = reshape(shape_of(view.data()), tuple(target))
    if relation.periods and given is not None and _infers_other(given.known, set(relation.periods)):
        # Only one extent can be left to the runtime.
        relation = opaque([shape_of(view.data())], [tuple(target)])
    return with_other_inputs(view, relation)


def _infers_other(known: Known, axes: set[int]) -> bool:
    """Whether the target leaves the extent of another axis to the runtime."""
    value = np.where(known.mask, known.value, 0)
    return any(axis not in axes for axis in np.flatnonzero(np.broadcast_to(value, known.value.shape) == -1))


def _complete(target: list[int | str | None], known: Known) -> None:
    """Extents that shape inference did not find, from what is known of the target."""
    count = len(target)
    mask, value = along(known.mask, 0, count), along(known.value, 0, count)
    for axis in range(count):
        if not isinstance(target[axis], int) and mask[axis] and value[axis] > 0:
            target[axis] = int(value[axis])


def _same_elements(view: View) -> Relation:
    return with_other_inputs(view, reshape(shape_of(view.data()), shape_of(view.output())))


def shape_rewrite(slot: int) -> object:
    """A rewrite that puts new extents in the target shape given at an input."""

    def rewrite(view: View) -> Rewrite:
        target = view.data(slot)
        output = view.output()
        mask = np.array([view.shrinks(-1, axis) for axis in range(output.rank)], np.bool_)
        if not mask.any():
            return Rewrite()
        mask = np.array([output.extent(axis) is not None for axis in range(output.rank)], np.bool_)
        counts = np.array([view.kept_count(-1, axis) or 0 for axis in range(output.rank)], np.int64)
        for axis in range(output.rank):
            if output.period(axis) is not None and view.shrinks(-1, axis):
                # A free dimension times fewer: the runtime works it out.
                mask[axis], counts[axis] = True, -1
        value = target.value()
        if value is None:
            return Rewrite(partly={slot: (mask, counts)})
        return Rewrite(constants={slot: np.where(mask, counts, value)})

    return rewrite


register(Rule("Identity", since=10_001, relate="*a -> *a"))
register(
    Rule(
        "Transpose",
        relate=_transpose,
        forward=layout,
        unit=unit_moves,
        line=line_moves,
        blind=blind_moves,
        infinite=infinite_moves,
    )
)
register(
    Rule(
        "Reshape",
        since=5,
        target=1,
        relate=_reshape,
        forward=layout,
        rewrite=shape_rewrite(1),  # type: ignore[arg-type]
        unit=unit_moves,
        line=line_moves,
        blind=blind_moves,
        infinite=infinite_moves,
    )
)
for _op in ("Flatten", "Squeeze", "Unsqueeze"):
    register(
        Rule(
            _op,
            relate=_same_elements,
            forward=layout,
            unit=unit_moves,
            line=line_moves,
            blind=blind_moves,
            infinite=infinite_moves,
        )
    )


# --- Repeating --------------------------------------------------------------------------------------------------


def _expand(view: View) -> Relation:
    relation = resolve("*a -> *a", [shape_of(view.data())], [shape_of(view.output())])
    return with_other_inputs(view, relation)


def _expand_forward(view: View) -> list[Known | None]:
    known, rank = view.data().known, view.output().rank
    if not known.anything:
        return [None]
    lead = (1,) * (rank - known.mask.ndim)
    return [Known(known.mask.reshape(lead + known.mask.shape), known.value.reshape(lead + known.value.shape))]


def _expand_rewrite(view: View) -> Rewrite:
    """The target may be shorter than the output's rank, or hold ones where the input is larger."""
    output, target = view.output(), view.data(1)
    mask = np.array([view.shrinks(-1, axis) for axis in range(output.rank)], np.bool_)
    if not mask.any():
        return Rewrite()
    length = target.extent(0)
    assert length is not None
    counts = np.array([view.kept_count(-1, axis) or 1 for axis in range(output.rank)], np.int64)[-length:]
    mask = mask[-length:]
    value = target.value()
    if value is None:
        return Rewrite(partly={1: (mask, counts)})
    return Rewrite(constants={1: np.where(mask & (value != 1), counts, value)})


register(
    Rule(
        "Expand",
        since=8,
        target=1,
        relate=_expand,
        forward=_expand_forward,
        rewrite=_expand_rewrite,
        infinite=infinite_moves,
    )
)

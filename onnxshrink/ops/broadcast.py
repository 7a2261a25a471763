"""Operators with several data inputs that work on each element alone, broadcast as numpy does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxshrink.facts import Known, everything, nothing, partial, uniform
from onnxshrink.families import (
    factors_of,
    infinite_moves,
    infinities,
    needed_by_relation,
    partial_in,
    pointwise,
    product,
    same_axis,
    spoilt,
)
from onnxshrink.notation import Relation, elementwise, transfer
from onnxshrink.registry import Rewrite, Rule, register
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray

WORDS = """
    And BitShift BitwiseAnd BitwiseOr BitwiseXor Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Or PRelu
    Sum Xor
"""
# Before opset 7 broadcasting was an attribute; those versions have no rule.
SINCE = {"Max": 8, "Min": 8, "Mean": 8, "Sum": 8}


def _relate(view: View) -> Relation:
    return elementwise(view.shapes(view.inputs), view.shapes(view.outputs))


def _power_needed(view: View) -> list[BoolArray | None]:
    """A fractional power of anything but the true base may not be a number."""
    exponent = view.data(1).value()
    if exponent is not None and bool(np.all(exponent == np.round(exponent))) and bool(np.all(exponent >= 0)):
        return needed_by_relation(view)
    return partial_in(0, 1)(view)


def _quotient(view: View) -> list[Known | None]:
    """Zero divided by anything is zero: where the divisor were zero too, the model would give no number."""
    (found,) = pointwise(view)
    dividend, output = view.data(0), view.output()
    zero = np.asarray(dividend.zero() & ~view.data(1).zero())
    if not zero.any() or not np.issubdtype(output.dtype or np.dtype(np.int64), np.floating):
        return [found]
    zero = zero.reshape((1,) * (output.rank - zero.ndim) + zero.shape)
    base = found or nothing(output.rank, output.dtype)
    return [partial(base.mask | zero, np.where(zero, np.zeros((), base.value.dtype), base.value))]


# --- One number added along an axis that nobody would notice ------------------------------------------------------


def _blind_axis(view: View, slot: int) -> int | None:
    """The axis of an input along which a number may be added if it comes out added along the blind axis."""
    axis = view.blind[0] if view.blind else None
    return None if axis is None else same_axis(view, -1, axis, slot)


def _varies(view: View, slot: int) -> bool:
    """Whether an input may hold different elements along the blind axis."""
    axis, operand = view.blind[0], view.data(slot)
    assert axis is not None
    position = axis - view.output().rank
    if -position > operand.rank or operand.extent(position) == 1:
        return False
    known = uniform(operand.known, [position % operand.rank])
    return not known.everything


def _blind_terms(view: View) -> dict[int, int]:
    """A number added to a term is added to the sum, and one taken away is taken away."""
    found = {slot: _blind_axis(view, slot) for slot in (0, 1)}
    return {slot: axis for slot, axis in found.items() if axis is not None}


def _blind_factors(view: View, slots: tuple[int, ...] = (0, 1)) -> dict[int, int]:
    """A number added along a line comes out multiplied, if the whole line is multiplied by one and the same."""
    found = {slot: _blind_axis(view, slot) for slot in slots}
    return {slot: axis for slot, axis in found.items() if axis is not None and not _varies(view, 1 - slot)}


def _blind_choice(view: View) -> dict[int, int]:
    """A number is added to all that counts: lines are chosen whole, or what is chosen instead has no weight."""
    found = {slot: _blind_axis(view, slot) for slot in (1, 2)}
    axes = {slot: axis for slot, axis in found.items() if axis is not None}
    if not axes or not _varies(view, 0):
        return axes
    return {slot: axis for slot, axis in axes.items() if _is_bottom(view.data(3 - slot))}


def _is_bottom(operand: Operand) -> bool:
    """Whether every element is so low that its weight in a softmax is nothing, whatever is added to the others.

    The lowest number of float16 is not: scores that a model may well have come close to it.
    """
    known = operand.known
    if not known.everything or known.value.dtype not in (np.float32, np.float64):
        return bool(known.everything and np.all(known.value == -np.inf))
    return bool(np.all(known.value <= np.finfo(known.value.dtype).min))


def _difference_infinite(view: View) -> list[BoolArray | None]:
    """Taking away what is infinite makes infinities of the other sign."""
    return infinite_moves(view) if infinities(view.data(1)) is None else spoilt(view)


# --- Choosing ---------------------------------------------------------------------------------------------------


def _choice(view: View) -> list[Known | None]:
    """Known where the condition and what it chooses are known, or where both choices are and agree."""
    rank, dtype = view.output().rank, view.output().dtype
    masks, values = [], []
    for slot in range(3):
        known = view.data(slot).known
        lead = (1,) * (rank - known.mask.ndim)
        masks.append(known.mask.reshape(lead + known.mask.shape))
        values.append(known.value.reshape(lead + known.value.shape))
    yes, no = masks[0] & values[0], masks[0] & ~values[0]
    agree = masks[1] & masks[2] & (values[1] == values[2])
    mask = (yes & masks[1]) | (no & masks[2]) | agree
    return [partial(mask, np.where(yes | agree, values[1], values[2]).astype(dtype))] if mask.any() else [None]


def _choice_needed(view: View) -> list[BoolArray | None]:
    """What is never chosen is not needed."""
    needed, relation, known = needed_by_relation(view), view.relation, view.data().known
    assert relation is not None
    for slot in (1, 2):
        never = known.mask & (~known.value if slot == 1 else known.value)
        if never.any():
            live = view.live() & ~transfer(relation, never, 0, -1)
            needed[slot] = transfer(relation, live, -1, slot)
    return needed


def _always(view: View) -> int | None:
    """The input that a condition that is known always chooses."""
    known = view.data().known
    return _chosen(known.value) if known.everything else None


def _chosen(condition: Array) -> int | None:
    return 1 if condition.all() else 2 if not condition.any() else None


def _choice_unit(view: View) -> int | None:
    slot = _always(view)
    unit = view.data(slot).unit if slot is not None else None
    return same_axis(view, slot, unit, -1) if slot is not None and unit is not None else None


def _choice_infinite(view: View) -> list[BoolArray | None]:
    relation, known, rank = view.relation, view.data().known, view.output().rank
    assert relation is not None
    found: BoolArray | None = None
    for slot in (1, 2):
        mask = infinities(view.data(slot))
        if mask is not None:
            never = transfer(relation, known.mask & (~known.value if slot == 1 else known.value), 0, -1)
            chosen = transfer(relation, mask, slot, -1) & ~never
            found = chosen if found is None else found | chosen
    return [found if found is None or found.ndim == rank else everything(rank)]


def _choice_rewrite(view: View) -> Rewrite:
    """Where the condition is settled for all that is kept, the readers may read what it chooses."""
    slot = _chosen(_kept_values(view, 0)) if view.data().known.everything else None
    if slot is None or slot in view.frozen or not _same_shape(view.data(slot), view.output()):
        return Rewrite()
    return Rewrite(bypass=slot)


# --- Neutral elements -------------------------------------------------------------------------------------------


def _neutral(value: float, slots: tuple[int, ...]) -> Callable[[View], Rewrite]:
    """A rewrite that leaves the node out where one operand is the operator's neutral element."""

    def rewrite(view: View) -> Rewrite:
        for slot in slots:
            operand, other = view.data(slot), view.data(1 - slot)
            if 1 - slot in view.frozen or (operand.constant is None and slot not in view.frozen):
                continue
            if _same_shape(other, view.output()) and bool(np.all(_kept_values(view, slot) == value)):
                return Rewrite(bypass=1 - slot)
        return Rewrite()

    return rewrite


def _same_shape(operand: Operand, output: Operand) -> bool:
    return operand.shape == output.shape and operand.shape is not None and None not in operand.shape


def _kept_values(view: View, slot: int) -> Array:
    value = view.data(slot).known.value
    for axis, mask in enumerate(view.kept[slot]):
        if mask is not None and value.shape[axis] == mask.size:
            value = value.compress(mask, axis=axis)
    return value


for _word in WORDS.split():
    register(Rule(_word, since=SINCE.get(_word, 7), relate=_relate, forward=pointwise, absorbs=True))
register(
    Rule(
        "Add",
        since=7,
        relate=_relate,
        forward=pointwise,
        absorbs=True,
        rewrite=_neutral(0.0, (0, 1)),
        blind=_blind_terms,
        infinite=infinite_moves,
    )
)
register(
    Rule(
        "Sub",
        since=7,
        relate=_relate,
        forward=pointwise,
        absorbs=True,
        rewrite=_neutral(0.0, (1,)),
        blind=_blind_terms,
        infinite=_difference_infinite,
    )
)
register(
    Rule(
        "Mul",
        since=7,
        relate=_relate,
        forward=product,
        backward=lambda view: factors_of(view, 0, 1),
        absorbs=True,
        rewrite=_neutral(1.0, (0, 1)),
        blind=_blind_factors,
    )
)
register(Rule("SwiGLU", since=28, relate="*a, *a -> *a", forward=product, backward=lambda view: factors_of(view, 0, 1)))
register(
    Rule(
        "Div",
        since=7,
        relate=_relate,
        forward=_quotient,
        backward=partial_in(1),
        partial=(1,),
        absorbs=True,
        blind=lambda view: _blind_factors(view, (0,)),
    )
)
register(
    Rule(
        "Where",
        since=9,
        relate=_relate,
        forward=_choice,
        backward=_choice_needed,
        absorbs=True,
        rewrite=_choice_rewrite,
        unit=_choice_unit,
        blind=_blind_choice,
        infinite=_choice_infinite,
    )
)
register(Rule("Mod", since=10, relate=_relate, forward=pointwise, backward=partial_in(1), partial=(1,), absorbs=True))
register(Rule("Pow", since=7, relate=_relate, forward=pointwise, backward=_power_needed, partial=(0, 1), absorbs=True))

"""Operators with several data inputs that work on each element alone, broadcast as numpy does."""

from __future__ import annotations

import numpy as np

from onnxshrink.facts import Known, nothing, partial
from onnxshrink.families import factors_of, needed_by_relation, partial_in, pointwise, product
from onnxshrink.notation import Relation, elementwise
from onnxshrink.registry import Rewrite, Rule, register
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray

WORDS = """
    And BitShift BitwiseAnd BitwiseOr BitwiseXor Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Or PRelu
    Sum Where Xor
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


def _constant_of(view: View, slot: int) -> Array | None:
    operand = view.input(slot)
    return operand.value() if operand is not None else None


def _neutral(value: float, slots: tuple[int, ...]) -> object:
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
register(Rule("Add", since=7, relate=_relate, forward=pointwise, absorbs=True, rewrite=_neutral(0.0, (0, 1))))  # type: ignore[arg-type]
register(Rule("Sub", since=7, relate=_relate, forward=pointwise, absorbs=True, rewrite=_neutral(0.0, (1,))))  # type: ignore[arg-type]
register(
    Rule(
        "Mul",
        since=7,
        relate=_relate,
        forward=product,
        backward=lambda view: factors_of(view, 0, 1),
        absorbs=True,
        rewrite=_neutral(1.0, (0, 1)),  # type: ignore[arg-type]
    )
)
register(Rule("SwiGLU", since=28, relate="*a, *a -> *a", forward=product, backward=lambda view: factors_of(view, 0, 1)))
register(Rule("Div", since=7, relate=_relate, forward=_quotient, backward=partial_in(1), partial=(1,), absorbs=True))
register(Rule("Mod", since=10, relate=_relate, forward=pointwise, backward=partial_in(1), partial=(1,), absorbs=True))
register(Rule("Pow", since=7, relate=_relate, forward=pointwise, backward=_power_needed, partial=(0, 1), absorbs=True))

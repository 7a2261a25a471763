"""Operators with one data input that work on each element alone: same index in and out."""

from __future__ import annotations

import numpy as np

from onnxshrink.facts import Known, everything, partial
from onnxshrink.families import (
    blind_moves,
    endless_everywhere,
    infinite_moves,
    partial_in,
    pointwise,
    unit_moves,
)
from onnxshrink.notation import Relation, UnresolvedError, elementwise, resolve
from onnxshrink.registry import Rule, register
from onnxshrink.view import View

WORDS = """
    Abs BitwiseNot Ceil Celu Elu Erf Floor Gelu HardSigmoid HardSwish Identity IsInf LeakyRelu Mish Neg Not Relu
    Round Selu Shrink Sigmoid Sign Sin Cos Atan Asinh Softplus Softsign Swish Tanh ThresholdedRelu Cast
"""

# These overflow, or have no finite value everywhere. An element that nothing needs may hold anything once its inputs
# are gone; here it must not, or a later multiplication by zero would not give zero.
PARTIAL_WORDS = "Acos Acosh Asin Atanh BitCast Cosh Exp Log Reciprocal Sinh Sqrt Tan"


# A cast to a floating-point type rounds at most.
MOVING_WORDS = ("Identity", "Cast")


def _is_real(view: View) -> bool:
    return np.issubdtype(view.output().dtype or np.dtype(np.int64), np.floating)


def _unit(view: View) -> int | None:
    return unit_moves(view) if _is_real(view) else None


def _blind(view: View) -> dict[int, int]:
    return blind_moves(view) if _is_real(view) else {}


for _word in WORDS.split():
    _moves = _word in MOVING_WORDS
    register(
        Rule(
            _word,
            relate="*a -> *a",
            forward=pointwise,
            unit=_unit if _moves else None,
            blind=_blind if _moves else None,
            infinite=infinite_moves if _moves else None,
        )
    )


def _is_nan(view: View) -> list[Known | None]:
    """What sums to one holds numbers, but where all that it was made of is masked."""
    (found,) = pointwise(view)
    data = view.data()
    if data.unit is None or data.infinite is not None:
        return [found]
    return [Known(everything(data.rank), np.zeros((1,) * data.rank, np.bool_))]


register(Rule("IsNaN", since=9, relate="*a -> *a", forward=_is_nan))
for _word in PARTIAL_WORDS.split():
    register(
        Rule(
            _word,
            relate="*a -> *a",
            forward=pointwise,
            backward=partial_in(0),
            partial=(0,),
            infinite=endless_everywhere,
        )
    )


def _first_input(view: View) -> Relation:
    """The further inputs are scalars or types."""
    shapes = [view.data().shape, *[None] * (len(view.inputs) - 1)]
    return resolve("*a -> *a, *a", shapes, view.shapes(view.outputs))


def _first_known(view: View) -> list[Known | None]:
    """The first output is the first input, in the output's type."""
    known, dtype = view.data().known, view.output().dtype
    value = known.value.astype(dtype) if dtype is not None else known.value
    return [partial(known.mask, value), *[None] * (len(view.outputs) - 1)]


def _dropout(view: View) -> Relation:
    training = view.input(2)
    if training is not None:
        value = training.value()
        if value is None or bool(np.any(value)):
            raise UnresolvedError("dropout in training mode is random")
    return _first_input(view)


register(Rule("Clip", until=10, relate="*a -> *a", forward=pointwise))
register(
    Rule("Clip", since=11, relate=lambda v: elementwise(v.shapes(v.inputs), v.shapes(v.outputs)), forward=pointwise)
)
register(
    Rule(
        "Dropout",
        until=11,
        relate=_first_input,
        forward=_first_known,
        unit=unit_moves,
        blind=blind_moves,
        infinite=infinite_moves,
    )
)
register(
    Rule(
        "Dropout",
        since=12,
        relate=_dropout,
        forward=_first_known,
        unit=unit_moves,
        blind=blind_moves,
        infinite=infinite_moves,
    )
)
register(Rule("CastLike", relate=_first_input, forward=_first_known))

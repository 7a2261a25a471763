"""com.microsoft activations and normalisations, as onnxruntime's optimizer fuses them.

Source: onnxruntime's operator schemas (docs/ContribOperators.md).
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np

from onnxshrink.facts import Known, along, partial
from onnxshrink.families import needed_by_relation, pointwise
from onnxshrink.notation import Relation, elementwise, resolve
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray, all_along, any_along

_DOMAIN = "com.microsoft"
UNARY = "Gelu QuickGelu"
BROADCAST = "BiasAdd BiasGelu FastGelu"

for _word in UNARY.split():
    register(Rule(_word, _DOMAIN, relate="*a -> *a", forward=pointwise))


def _broadcast(view: View) -> Relation:
    return elementwise(view.shapes(view.inputs), view.shapes(view.outputs))


for _word in BROADCAST.split():
    # A bias must stay a vector: nothing is absorbed.
    register(Rule(_word, _DOMAIN, relate=_broadcast, forward=pointwise))


# --- Skip norms: a sum, normalised; the sum is an output too ----------------------------------------------------

_SUM = 3


class Skip:
    """`norm(input + skip + bias)`: where the sum is handed out, what goes in it, and the norm's parameters."""

    def __init__(self, view: View, shifted: bool) -> None:
        self.view = view
        self.shifted = shifted
        self.terms = [slot for slot in (0, 1, 4 if shifted else 3) if view.input(slot) is not None]

    def relation(self) -> Relation:
        """Every operand ends in the hidden axis."""
        gamma = "c, c, c" if self.shifted else "c, c"
        text = f"*a c, *a c, {gamma} -> *a c, *a 1, *a 1, *a c"
        relation = resolve(text, self.view.shapes(self.view.inputs), self.view.shapes(self.view.outputs))
        statistics = any(output is not None for output in self.view.outputs[1:_SUM])
        if self.shifted or statistics or self.view.data(2).constant is None:
            # A mean over fewer channels would be another one.
            return relation.pin("c")
        return relation

    def total(self) -> Known | None:
        """What is known of the sum."""
        facts = [self.view.data(slot).known for slot in self.terms]
        rank = self.view.output().rank if self.view.outputs[0] is not None else self.view.data().rank
        mask = reduce(np.logical_and, [_aligned(fact.mask, rank) for fact in facts])
        if not mask.any():
            return None
        value = reduce(np.add, [_aligned(fact.value, rank) for fact in facts])
        return partial(mask, np.where(mask, value, np.zeros((), value.dtype)))

    def forward(self) -> list[Known | None]:
        total = self.total()
        return [self._norm(total), None, None, total][: len(self.view.outputs)]

    def _norm(self, total: Known | None) -> Known | None:
        """Where the scale is zero, the shift; under a root mean square, zero where the sum is zero."""
        scale, shift = self.view.data(2).value(), self.view.input(3) if self.shifted else None
        rank = self.view.data().rank
        none = np.zeros((1,) * rank, np.bool_)
        dead = none if scale is None else _aligned(scale == 0, rank)
        if shift is not None:
            value = shift.value()
            return None if value is None or not dead.any() else partial(dead, _aligned(value, rank))
        zero = none if total is None or self.shifted else total.zero()
        mask = dead | zero
        return partial(mask, np.zeros((1,) * rank, self.view.data().dtype)) if mask.any() else None

    def backward(self) -> list[BoolArray | None]:
        """The norm reads its whole axis, the sum the same index."""
        needed = needed_by_relation(replace(self.view, needed=(None, *self.view.needed[1:])))
        if self.view.outputs[0] is None:
            return needed
        normed = needed_by_relation(replace(self.view, needed=(self.view.needed[0], None, None, None)))
        for slot, mask in enumerate(normed):
            before = needed[slot]
            if mask is not None and before is not None:
                mask = any_along(mask, -1, keepdims=True) if slot in self.terms else mask
                needed[slot] = before | mask
        return needed

    def retain(self) -> list[Keep]:
        """Channels of which the sum is not known to be zero: the norm's divisor reads them."""
        total, view = self.total(), self.view
        extent = view.data().extent(view.data().rank - 1)
        if extent is None or view.outputs[0] is None or not view.live(0).any():
            return []
        wanted = np.ones(extent, np.bool_)
        if total is not None:
            zero = total.zero()
            wanted &= ~all_along(zero, tuple(range(zero.ndim - 1)))
        return [Keep(s, view.data(s).rank - 1, wanted, "the norm's divisor reads it") for s in self.terms]

    def rewrite(self) -> Rewrite:
        """See `normalization.rms_rewrite`: the divisor is kept by a larger epsilon and scale."""
        view, axis = self.view, self.view.data().rank - 1
        extent, kept = view.data().extent(axis), view.kept[0][axis]
        if extent is None or kept is None or kept.all():
            return Rewrite()
        ratio = extent / int(kept.sum())
        scale = view.data(2).known.value
        new = (along(scale, 0, extent)[kept].astype(np.float64) * np.sqrt(ratio)).astype(scale.dtype)
        return Rewrite(constants={2: new}, attributes={"epsilon": float(view.attribute("epsilon", 1e-12)) * ratio})


def _aligned(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def _skip_rule(op: str, shifted: bool) -> Rule:
    return Rule(
        op,
        _DOMAIN,
        relate=lambda view: Skip(view, shifted).relation(),
        forward=lambda view: Skip(view, shifted).forward(),
        backward=lambda view: Skip(view, shifted).backward(),
        retain=lambda view: [] if shifted else Skip(view, shifted).retain(),
        rewrite=lambda view: Rewrite() if shifted else Skip(view, shifted).rewrite(),
    )


register(_skip_rule("SkipLayerNormalization", shifted=True))
register(_skip_rule("SkipSimplifiedLayerNormalization", shifted=False))


# --- Embedding: rows are picked by what comes in, channels are normalised ----------------------------------------


def _embedding(view: View) -> Relation:
    text = "b [s], b [s], [v] [c], [w] [c], [x] [c], [c], [c], b [s], [p] [s] -> b [s] [c], b, b [s] [c]"
    return resolve(text, view.shapes(view.inputs), view.shapes(view.outputs))


def _embedding_forward(view: View) -> list[Known | None]:
    """Where the scale is zero, the shift."""
    scale, shift = view.data(5).value(), view.data(6).value()
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    if scale is None or shift is None or not (scale == 0).any():
        return [None, *rest]
    return [partial((scale == 0).reshape(1, 1, -1), shift.reshape(1, 1, -1)), *rest]


register(Rule("EmbedLayerNormalization", _DOMAIN, relate=_embedding, forward=_embedding_forward))


# --- Refused ----------------------------------------------------------------------------------------------------

REFUSALS = {
    "MatMulNBits": "its weights are packed in blocks of a few bits",
    "BiasSplitGelu": "onnxruntime has no CPU kernel for it, so that nothing could be verified",
}
for _word, _reason in REFUSALS.items():
    register(Rule(_word, _DOMAIN, refusal=_reason))

"""Layers that carry a state from step to step without a non-linearity in between: the blocks of linear attention."""

from __future__ import annotations

import numpy as np

from onnxshrink.facts import Known, partial, uniform
from onnxshrink.families import needed_by_relation, partial_in
from onnxshrink.notation import Relation, UnresolvedError, resolve, transfer
from onnxshrink.registry import Rewrite, Rule, register
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray, any_along

# --- Causal convolution -----------------------------------------------------------------------------------------


def _silent_weights(view: View) -> BoolArray:
    """Channels whose kernel is zero, `[channel]` or compressed."""
    weights = view.data(1)
    if weights.constant is not None:
        return ~any_along(weights.constant.nonzero((0, 1, 2)), (1, 2))
    return np.asarray(weights.zero().all(axis=(1, 2)))


def _still(operand: Operand | None) -> BoolArray:
    """`[batch, channel, 1]`: where a sequence is zero at every step; one that is left out counts as zero."""
    if operand is None:
        return np.ones((1, 1, 1), np.bool_)
    return uniform(operand.known, (2,)).zero()


def _activated(view: View, bias: Array) -> Array:
    if view.attribute("activation", "none") == "none":
        return bias
    wide = bias.astype(np.float64)
    return np.asarray(wide / (1 + np.exp(-wide))).astype(bias.dtype)


def _convolution_forward(view: View) -> list[Known | None]:
    """Where nothing but the bias contributes, the output is that; a state of zeros stays one."""
    zero, bias = np.asarray(_still(view.data()) & _still(view.input(3))), view.input(2)
    idle = np.asarray(zero | _silent_weights(view).reshape(1, -1, 1))
    dtype = view.output().dtype or np.dtype(np.float32)
    value = np.zeros((1, 1, 1), dtype)
    if bias is not None:
        idle &= bias.known.mask.reshape(1, -1, 1)
        value = _activated(view, np.where(bias.known.mask, bias.known.value, 0).astype(dtype)).reshape(1, -1, 1)
    facts = [partial(idle, value), partial(zero, np.zeros((1, 1, 1), dtype))]
    return [fact if fact.anything else None for fact in facts][: len(view.outputs)]


def _convolution_backward(view: View) -> list[BoolArray | None]:
    """A channel with a kernel of zeros does not read its input, unless the next state is read."""
    needed = needed_by_relation(view)
    relation = view.relation
    assert relation is not None
    if len(view.outputs) < 2 or view.outputs[1] is None or not view.live(1).any():
        reads = ~_silent_weights(view).reshape(1, -1, 1)
        for slot in (0, 3):
            mask = needed[slot] if slot < len(needed) else None
            if mask is not None:
                needed[slot] = np.asarray(mask & reads)
    return needed


register(
    Rule(
        "CausalConvWithState",
        since=27,
        relate="n c [l], c 1 [k], c, n c [s] -> n c [l], n c [p]",
        forward=_convolution_forward,
        backward=_convolution_backward,
    )
)

# --- Linear attention -------------------------------------------------------------------------------------------

_VALUE, _PAST, _DECAY, _RATE = 2, 3, 4, 5


def _heads(view: View) -> tuple[int, int]:
    """Heads of the state, and how many query heads share each."""
    heads = int(view.attribute("kv_num_heads"))
    return heads, int(view.attribute("q_num_heads")) // heads


def _per_head(operand: Operand | None, heads: int) -> str:
    """Notation of a gate: one value per head and dimension of the key, per head, or per step."""
    extent = operand.extent(2) if operand is not None else 1
    if extent is None:
        raise UnresolvedError("the number of heads of a gate is not known")
    return "b [t] 1" if extent == 1 else "b [t] h" if extent == heads else "b [t] (h [d])"


def _attention_relation(view: View) -> Relation:
    heads, shared = _heads(view)
    gates = ", ".join(_per_head(view.input(slot), heads) for slot in (_DECAY, _RATE))
    notation = f"b [t] (h q [d]), b [t] (h [d]), b [t] (h v), b h [d] v, {gates} -> b [t] (h q v), b h [d] v"
    sizes: dict[str, int | None] = {"h": heads, "q": shared}
    relation = resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs), sizes)
    return relation.pin("q")


def _attention_forward(view: View) -> list[Known | None]:
    """Values of zero leave a state of zeros as it is, and nothing can be read from that."""
    relation = view.relation
    assert relation is not None
    zero = uniform(view.data(_VALUE).known, (1,)).zero()
    past = view.input(_PAST)
    if past is not None:
        empty = uniform(past.known, (2,)).zero()
        zero = np.asarray(zero & transfer(relation, empty, _PAST, _VALUE))
    if not zero.any():
        return [None] * len(view.outputs)
    return [
        None
        if operand is None
        else partial(transfer(relation, zero, _VALUE, -1 - index), np.zeros((1,) * operand.rank, operand.dtype))
        for index, operand in enumerate(view.outputs)
    ]


def _attention_rewrite(view: View) -> Rewrite:
    """The number of heads that stay, of the query and of the state."""
    heads, shared = _heads(view)
    kept = view.kept[1][2]
    if kept is None or kept.all():
        return Rewrite()
    left = int(kept.reshape(heads, -1).any(axis=1).sum())
    return Rewrite(attributes={"kv_num_heads": left, "q_num_heads": left * shared})


register(
    Rule(
        "LinearAttention",
        since=27,
        relate=_attention_relation,
        forward=_attention_forward,
        # Keys and gates that are not the true ones could let the state grow beyond all bounds.
        backward=partial_in(1, _DECAY, _RATE),
        partial=(1, _DECAY, _RATE),
        rewrite=_attention_rewrite,
    )
)

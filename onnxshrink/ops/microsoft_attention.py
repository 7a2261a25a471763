"""com.microsoft attention: separate, packed and fused projections, key-value caches.

Source: onnxruntime's operator schemas (docs/ContribOperators.md) and its CPU kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxshrink.facts import Known, everything, partial
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops._heads import Heads, fixed, head_counts, live, mask_notation, per_factor, to_operand
from onnxshrink.ops.attention import rotary_rule
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray

_DOMAIN = "com.microsoft"


def _given(view: View, slot: int) -> bool:
    return view.input(slot) is not None


def _scale_given(view: View) -> bool:
    """Zero stands for the default here."""
    return bool(view.attribute("scale", 0.0))


def _made(view: View, index: int) -> bool:
    return index < len(view.outputs) and view.outputs[index] is not None


# --- MultiHeadAttention -----------------------------------------------------------------------------------------

_BIAS, _PADDING, _SCORE_BIAS, _PAST = 3, 4, 5, (6, 7)
_BUFFER = (8, 9)
_SCORES = 3
_JOINED = 3


def _packed(view: View) -> bool:
    """Whether query, key and value, or key and value, come in one tensor."""
    return view.input(2) is None


def _multi_head(view: View) -> Relation:
    sizes = head_counts(int(view.attribute("num_heads", 0)), int(view.attribute("num_heads", 0)))
    if any(_given(view, slot) for slot in _BUFFER):
        raise UnresolvedError("keys and values live in a shared buffer")
    if _packed(view):
        return _packed_heads(view, sizes)
    key = "[b] [t] (k d)" if view.data(1).rank == _JOINED else "[b] k [t] d"
    value = "[b] [t] (k v)" if view.data(2).rank == _JOINED else "[b] k [t] v"
    bias = view.input(_BIAS)
    if bias is not None and (bias.constant is None or view.data(1).rank != _JOINED):
        raise UnresolvedError("the bias of the projections is computed, or keys come split in heads")
    masks = ", ".join(_whole(view, slot) for slot in (_BIAS, _PADDING))
    left = f"[b] [s] (k r d), {key}, {value}, {masks}, {_score_bias(view, _SCORE_BIAS)}, [b] k [w] d, [b] k [w] v"
    right = "[b] [s] (k r v), [b] k [u] d, [b] k [u] v, [b] (k r) [s] [u]"
    return fixed(resolve(f"{left} -> {right}", view.shapes(view.inputs), view.shapes(view.outputs), sizes))


def _whole(view: View, slot: int) -> str:
    operand = view.input(slot)
    return " ".join(f"[m{slot}_{axis}]" for axis in range(operand.rank)) if operand is not None else "1"


def _score_bias(view: View, slot: int) -> str:
    operand = view.input(slot)
    return mask_notation(operand.shape or (), int(view.attribute("num_heads", 0))) if operand is not None else "1"


def _segments(view: View) -> tuple[Array, Array, Array] | None:
    """The bias in its parts: `[k, r, d]`, `[k, d]`, `[k, v]`."""
    bias, relation = view.input(_BIAS), view.relation
    if bias is None:
        return None
    assert relation is not None
    k, d, v = (relation.sizes[name] or 1 for name in "kdv")
    array = bias.known.value
    return array[: k * d].reshape(k, 1, d), array[k * d : 2 * k * d].reshape(k, d), array[2 * k * d :].reshape(k, v)


def _heads(view: View) -> Heads:
    return Heads(
        view,
        past=_PAST if _given(view, _PAST[0]) else None,
        scores=_SCORES if _made(view, _SCORES) else None,
        blank=_given(view, _SCORE_BIAS),
        # Where all keys of a query are padding, its scores are rounded at the size of what fills them, -10000.
        shifts=not _given(view, _PADDING),
        biases=_segments(view),
        counts=("num_heads",),
    )


def _multi_head_rewrite(view: View) -> Rewrite:
    if _packed(view):
        return _packed_rewrite(view)
    heads = _heads(view)
    rewrite = heads.rewrite(_scale_given(view))
    bias = view.input(_BIAS)
    if bias is None:
        return rewrite
    query, key, value = (view.kept[slot][_axis(view, slot)] for slot in heads.slots)
    if query is None or value is None or key is None or (query.all() and value.all()):
        return rewrite
    kept = np.concatenate([query, key, value])
    return Rewrite(attributes=rewrite.attributes, constants={_BIAS: lambda: bias.known.value[kept]})


def _axis(view: View, slot: int) -> int:
    return view.data(slot).rank - 1


# --- Packed: heads leave whole ----------------------------------------------------------------------------------


def _packed_heads(view: View, sizes: dict[str, int | None]) -> Relation:
    """Axis 3 tells query, key and value apart (or key and value)."""
    if _given(view, _BIAS) or _given(view, _PAST[0]):
        raise UnresolvedError("a bias or cache with packed projections")
    query = "[b] [s] k [three] [d]" if view.data(0).rank != _JOINED else "[b] [s] (k [d])"
    masks = f"1, {_whole(view, _PADDING)}, {_score_bias(view, _SCORE_BIAS)}"
    left = f"{query}, [b] [t] k [two] [d], 1, {masks}"
    right = "[b] [s] (k [d]), [b] k [u] [d], [b] k [u] [d], [b] k [s] [u]"
    text = f"{left} -> {right}".replace("(k r)", "k")
    return resolve(text, view.shapes(view.inputs), view.shapes(view.outputs), {"k": sizes["k"]})


def _packed_slot(view: View) -> int:
    return 0 if view.data(0).rank != _JOINED else 1


def _packed_forward(view: View) -> list[Known | None]:
    """A head whose values are zero gives zero."""
    slot = _packed_slot(view)
    zero = view.data(slot).zero()
    zero = zero[:, :, :, -1:] if zero.shape[3] > 1 else zero
    dead = per_factor(view, zero, slot, ("k",), "all")
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    value = np.zeros((1,) * view.output().rank, view.output().dtype)
    return [partial(to_operand(view, dead, ("k",), -1), value), *rest]


def _packed_backward(view: View) -> list[BoolArray | None]:
    heads = np.any([live(view, index, ("k",)) for index in range(len(view.outputs))], axis=0)
    needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
    for slot in range(_packed_slot(view) + 1):
        needed[slot] = to_operand(view, heads, ("k",), slot)
    return needed


def _packed_rewrite(view: View) -> Rewrite:
    kept = view.kept[_packed_slot(view)][2]
    if kept is None or kept.all():
        return Rewrite()
    return Rewrite(attributes={"num_heads": int(kept.sum())})


def _multi_head_forward(view: View) -> list[Known | None]:
    return _packed_forward(view) if _packed(view) else _heads(view).forward()


def _multi_head_backward(view: View) -> list[BoolArray | None]:
    return _packed_backward(view) if _packed(view) else _heads(view).backward()


def _multi_head_represent(view: View) -> Iterable[Keep]:
    return () if _packed(view) else _heads(view).represent()


def _multi_head_retain(view: View) -> Iterable[Keep]:
    return () if _packed(view) else _heads(view).retain()


register(
    Rule(
        "MultiHeadAttention",
        _DOMAIN,
        relate=_multi_head,
        forward=_multi_head_forward,
        backward=_multi_head_backward,
        retain=_multi_head_retain,
        represent=_multi_head_represent,
        rewrite=_multi_head_rewrite,
    )
)
register(rotary_rule(_DOMAIN, 1, (2, 3)))

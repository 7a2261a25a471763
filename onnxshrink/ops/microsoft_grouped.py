"""com.microsoft GroupQueryAttention: heads leave by group; the dimensions of a head stay.

onnxruntime takes head sizes that are multiples of eight only, and may rotate or normalise query and key inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from onnxshrink.facts import Known, everything, partial
from onnxshrink.notation import Link, Relation, UnresolvedError, resolve
from onnxshrink.ops._heads import Heads, fixed, head_counts, mask_notation
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import BoolArray, any_along

_PAST = (3, 4)
_SCORE_BIAS, _SINK = 10, 11
_SCALES, _ROW_COUNTS = (12, 13), 16
_SCORES = 3
# Inputs that are read whole: lengths, caches of angles, positions, norms.
_ROWS = ("[l]", "*e", "[m] [a]", "[m] [a]", "[pb] [ps]")


def _packed(view: View) -> bool:
    return view.input(1) is None


def _counts(view: View) -> tuple[int, int]:
    return int(view.attribute("num_heads", 0)), int(view.attribute("kv_num_heads", 0))


def _relate(view: View) -> Relation:
    sizes = head_counts(*_counts(view))
    if any(view.input(slot) is not None for slot in (*_SCALES, _ROW_COUNTS)):
        raise UnresolvedError("keys and values are quantised, or rows are padded")
    if _packed(view):
        return _packed_relation(view)
    bias = view.input(_SCORE_BIAS)
    masks = mask_notation(bias.shape or (), _counts(view)[0]) if bias is not None else "1"
    left = ["[b] [s] (k r [d])", "[b] [t] (k [d])", "[b] [t] (k [v])", "[b] k [w] [d]", "[b] k [w] [v]", *_ROWS]
    left += [masks, "(k r)", "1", "1", "[d]", "[d]"]
    right = "[b] [s] (k r [v]), [b] k [u] [d], [b] k [u] [v], [b] (k r) [s] [c]"
    text = f"{', '.join(left)} -> {right}"
    return fixed(resolve(text, view.shapes(view.inputs), view.shapes(view.outputs), sizes))


def _heads(view: View) -> Heads:
    scores = len(view.outputs) > _SCORES and view.outputs[_SCORES] is not None
    return Heads(
        view,
        past=_PAST if view.input(_PAST[0]) is not None else None,
        scores=_SCORES if scores else None,
        blank=True,
        counts=("num_heads", "kv_num_heads"),
        divisible=False,
    )


# --- Packed: query, key and value heads side by side on one axis -------------------------------------------------


class _Packed:
    """Positions of the parts on the packed axis, per group: `[k, r, d]`, `[k, d]`, `[k, d]`."""

    def __init__(self, view: View) -> None:
        heads, groups = _counts(view)
        extent = view.data().extent(2)
        if extent is None or extent % (heads + 2 * groups):
            raise UnresolvedError("the size of a head is not known")
        width = extent // (heads + 2 * groups)
        places = np.arange(extent)
        self.view = view
        self.width = width
        self.query = places[: heads * width].reshape(groups, heads // groups, width)
        self.key = places[heads * width : (heads + groups) * width].reshape(groups, width)
        self.value = places[(heads + groups) * width :].reshape(groups, width)

    def links(self) -> tuple[Link, ...]:
        """Every element of the output is tied to its query, its key and its value."""
        target = np.arange(self.query.size)
        parts = [self.query, *(np.broadcast_to(part[:, None], self.query.shape) for part in (self.key, self.value))]
        return tuple(Link(0, -1, part.reshape(-1), target) for part in parts)

    def groups(self, mask: BoolArray, output: bool) -> BoolArray:
        """Groups of which any position is in `mask`, of the output or of the input."""
        if output:
            return any_along(mask.reshape(self.query.shape), (1, 2))
        query, key, value = (mask[part] for part in (self.query, self.key, self.value))
        return any_along(query, (1, 2)) | any_along(key, 1) | any_along(value, 1)

    def positions(self, groups: BoolArray) -> BoolArray:
        """Every position of these groups on the packed axis."""
        mask = np.zeros(self.view.data().extent(2) or 0, np.bool_)
        for part in (self.query, self.key, self.value):
            mask[part[groups]] = True
        return mask

    def live(self) -> BoolArray:
        """Groups whose output matters; all, if more than the output is made."""
        extent = self.query.size
        found = np.broadcast_to(any_along(self.view.live(), (0, 1)), (extent,))
        others = [i for i, o in enumerate(self.view.outputs) if i and o is not None and self.view.live(i).any()]
        return np.ones(len(self.key), np.bool_) if others else self.groups(found, output=True)


def _packed_relation(view: View) -> Relation:
    parts = _Packed(view)
    # What is read or made beside is whole.
    rest = ["1"] * (len(view.inputs) - 1)
    beside = [_beside(view, index) for index in range(1, len(view.outputs))]
    text = f"{', '.join(['[b] [s] x', *rest])} -> {', '.join(['[b] [s] x', *beside])}"
    shapes = [view.data().shape, *[None] * len(rest)]
    sizes = {"x@0": view.data().extent(2), "x@-1": parts.query.size}
    relation = resolve(text, shapes, [None, *view.shapes(view.outputs[1:])], sizes)
    outputs = (relation.inputs[0], *relation.outputs[1:])
    others = [view.input(slot) for slot in (*_PAST, _SCORE_BIAS, _SINK)] + list(view.outputs[1:])
    pinned = relation.pinned | ({"x"} if any(operand is not None for operand in others) else set())
    return replace(relation, outputs=outputs, pinned=pinned, links={"x": parts.links()})


def _beside(view: View, index: int) -> str:
    operand = view.outputs[index]
    return " ".join(f"[o{index}_{axis}]" for axis in range(operand.rank)) if operand is not None else "1"


def _packed_forward(view: View) -> list[Known | None]:
    """Zero values give zero."""
    parts = _Packed(view)
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    zero = np.broadcast_to(view.data().zero().all(axis=(0, 1)), (view.data().extent(2) or 0,))[parts.value]
    if not zero.any() or view.input(_PAST[0]) is not None:
        return [None, *rest]
    mask = np.broadcast_to(zero[:, None], parts.query.shape).reshape(1, 1, -1)
    return [partial(mask, np.zeros((1, 1, 1), view.output().dtype)), *rest]


def _packed_backward(view: View) -> list[BoolArray | None]:
    parts = _Packed(view)
    needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
    needed[0] = parts.positions(parts.live()).reshape(1, 1, -1)
    return needed


def _packed_retain(view: View) -> Iterable[Keep]:
    parts = _Packed(view)
    groups = np.zeros(len(parts.key), np.bool_)
    for slot in (0, -1):
        kept = view.kept[slot][2] if slot in view.kept else None
        if kept is not None:
            groups |= parts.groups(kept, output=slot < 0)
    yield Keep(0, 2, parts.positions(groups), "heads leave by group")


def _packed_rewrite(view: View) -> Rewrite:
    parts = _Packed(view)
    kept = view.kept[-1][2]
    if kept is None or kept.all():
        return Rewrite()
    groups = int(parts.groups(kept, output=True).sum())
    return Rewrite(attributes={"num_heads": groups * parts.query.shape[1], "kv_num_heads": groups})


# --- The rule ---------------------------------------------------------------------------------------------------


def _forward(view: View) -> list[Known | None]:
    return _packed_forward(view) if _packed(view) else _heads(view).forward()


def _backward(view: View) -> list[BoolArray | None]:
    return _packed_backward(view) if _packed(view) else _heads(view).backward()


def _retain(view: View) -> Iterable[Keep]:
    return _packed_retain(view) if _packed(view) else _heads(view).retain()


def _rewrite(view: View) -> Rewrite:
    return _packed_rewrite(view) if _packed(view) else _heads(view).rewrite(scale_given=True)


register(
    Rule(
        "GroupQueryAttention",
        "com.microsoft",
        relate=_relate,
        forward=_forward,
        backward=_backward,
        retain=_retain,
        rewrite=_rewrite,
    )
)

"""ONNX's own attention, and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxshrink.facts import Known, everything, partial
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops._heads import Heads, fixed, head_counts, kept_factor, live, mask_notation, per_factor, to_operand
from onnxshrink.registry import Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import BoolArray, all_along, any_along

_PAST = (4, 5)
_SCORES = 3
_NONPAD = 6
_JOINED = 3
_ROWS = {
    True: "[b] [s] (k r d), [b] [t] (k d), [b] [t] (k v)",
    False: "[b] (k r) [s] d, [b] k [t] d, [b] k [t] v",
}
_OUTPUT = {True: "[b] [s] (k r v)", False: "[b] (k r) [s] v"}


def _relate(view: View) -> Relation:
    query, key = view.data(0), view.data(1)
    joined = query.rank == _JOINED
    if joined:
        sizes = head_counts(int(view.attribute("q_num_heads", 0)), int(view.attribute("kv_num_heads", 0)))
    else:
        sizes = head_counts(query.extent(1), key.extent(1))
    mask = view.input(3)
    heads = (sizes["k"] or 1) * (sizes["r"] or 1)
    masks = mask_notation(mask.shape or (), heads) if mask is not None else "1"
    left = f"{_ROWS[joined]}, {masks}, [b] k [p] d, [b] k [p] v, [b]"
    right = f"{_OUTPUT[joined]}, [b] k [u] d, [b] k [u] v, [b] (k r) [s] [u]"
    return fixed(resolve(f"{left} -> {right}", view.shapes(view.inputs), view.shapes(view.outputs), sizes))


def _may_be_blank(view: View) -> bool:
    """Whether a query may find no key: masked, beyond the padding, or out of its window."""
    windows = [int(view.attribute(name, -1)) for name in ("left_window_size", "right_window_size")]
    return max(windows) >= 0 or view.input(3) is not None or view.input(_NONPAD) is not None


def _heads(view: View) -> Heads:
    scores = len(view.outputs) > _SCORES and view.outputs[_SCORES] is not None
    return Heads(
        view,
        past=_PAST if view.input(_PAST[0]) is not None else None,
        scores=_SCORES if scores else None,
        blank=_may_be_blank(view),
        shifts=not view.attribute("softcap", 0.0),
        counts=("q_num_heads", "kv_num_heads") if view.data().rank == _JOINED else (),
    )


register(
    Rule(
        "Attention",
        since=23,
        relate=_relate,
        forward=lambda view: _heads(view).forward(),
        backward=lambda view: _heads(view).backward(),
        retain=lambda view: _heads(view).retain(),
        represent=lambda view: _heads(view).represent(),
        rewrite=lambda view: _heads(view).rewrite("scale" in view.node.attributes),
    )
)


# --- Rotary positions: both halves of a pair stay or leave together ---------------------------------------------


@dataclass(frozen=True)
class Rotary:
    """Where an operator takes its caches, and what a cache without positions looks like."""

    caches: tuple[int, int]

    def relate(self, view: View) -> Relation:
        """`h` heads of pairs: `t` (two) by `p`."""
        data, cosine = view.data(), view.data(self.caches[0])
        pairs = cosine.extent(cosine.rank - 1)
        if pairs is None or view.attribute("is_packed_batching", 0):
            raise UnresolvedError("the number of rotated dimensions is not known")
        inside, sizes = self._inside(view, pairs)
        rows = f"[b] [s] (h {inside})" if data.rank == _JOINED else f"[b] h [s] ({inside})"
        specs = [rows, "[pb] [ps]" if self.caches[0] == 2 else "1", "1", "1"]
        for slot in self.caches:
            specs[slot] = "[m] p" if view.data(slot).rank == 2 else "[cb] [cs] p"
        if self.caches[0] == 1:
            specs[3] = "[pb] [ps]"
        elif view.data(1).rank == 1:
            specs[1] = "[ps]"
        return resolve(f"{', '.join(specs)} -> {rows}", view.shapes(view.inputs), view.shapes(view.outputs), sizes)

    def _inside(self, view: View, pairs: int) -> tuple[str, dict[str, int | None]]:
        """Notation of a head, and the sizes that the shapes do not tell."""
        data = view.data()
        width = data.extent(data.rank - 1)
        heads = int(view.attribute("num_heads", 0)) or None
        if data.rank == _JOINED:
            heads = heads or (width // (2 * pairs) if width is not None else None)
            width = width // heads if width is not None and heads else None
        if width is None:
            raise UnresolvedError("the size of a head is not known")
        sizes: dict[str, int | None] = {"h": heads} if data.rank == _JOINED else {}
        if width != 2 * pairs:
            # Some dimensions are not rotated: which are is counted from the front.
            return "[n]", {**sizes, "n": width, "p": pairs}
        return "p [t]" if view.attribute("interleaved", 0) else "[t] p", {**sizes, "t": 2, "p": pairs}

    def names(self, view: View) -> tuple[str, ...]:
        """Factors of a head's dimensions."""
        assert view.relation is not None
        return ("h", "n") if "n" in view.relation.sizes else ("h", "t", "p")

    def forward(self, view: View) -> list[Known | None]:
        """A pair of zeros stays zero; a head of zeros, where only some dimensions are rotated."""
        names = self.names(view)
        zero = per_factor(view, view.data().zero(), 0, names, "all")
        zero = np.broadcast_to(all_along(zero, 1, keepdims=True), zero.shape)
        return [self._zero(view, to_operand(view, zero, names, -1))]

    def _zero(self, view: View, mask: BoolArray) -> Known | None:
        value = np.zeros((1,) * view.output().rank, view.output().dtype)
        return partial(mask, value) if mask.any() else None

    def _partial(self, view: View) -> bool:
        return len(self.names(view)) == 2

    def backward(self, view: View) -> list[BoolArray | None]:
        """Both dimensions of a pair, and the column of the caches."""
        names = self.names(view)
        needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
        mask = live(view, 0, names)
        mask = np.broadcast_to(any_along(mask, 1, keepdims=True), mask.shape)
        needed[0] = to_operand(view, mask, names, 0)
        if not self._partial(view):
            for slot in self.caches:
                needed[slot] = to_operand(view, any_along(mask, (0, 1)), ("p",), slot)
        return needed

    def rewrite(self, view: View) -> Rewrite:
        """Head count and rotated dimensions, where attributes hold them."""
        changed: dict[str, object] = {}
        heads = kept_factor(view, 0, "h") if view.data().rank == _JOINED else np.ones(1, np.bool_)
        if not heads.all() and view.attribute("num_heads", 0):
            changed["num_heads"] = int(heads.sum())
        if not self._partial(view) and view.attribute("rotary_embedding_dim", 0):
            changed["rotary_embedding_dim"] = 2 * int(kept_factor(view, 0, "p").sum())
        return Rewrite(attributes=changed)


def rotary_rule(domain: str, since: int, caches: tuple[int, int]) -> Rule:
    """The rule of a rotary embedding with its caches at the given inputs."""
    rotary = Rotary(caches)
    return Rule(
        "RotaryEmbedding",
        domain,
        since,
        relate=rotary.relate,
        forward=rotary.forward,
        backward=rotary.backward,
        rewrite=rotary.rewrite,
    )


register(rotary_rule("", 23, (1, 2)))

"""com.microsoft Attention: the projections of query, key and value fused in the node, side by side in one matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np

from onnxshrink.facts import Known, everything
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops._heads import kept_factor, mask_notation
from onnxshrink.ops._linear import Linear, known_result
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import Fold, View
from onnxshrink.weights import Array, BoolArray, any_along

_WEIGHTS, _BIAS, _MASK, _PAST, _SCORE_BIAS, _LENGTH = 1, 2, 3, 4, 5, 6


class Fused:
    """One node, its weights seen as `[input, head, dimension]` for query, key and value."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.heads = int(view.attribute("num_heads", 0))
        total = view.data(_WEIGHTS).extent(1) or 0
        widths = list(view.attribute("qkv_hidden_sizes") or [total // 3] * 3)
        if not self.heads or sum(widths) != total or widths[0] != widths[1]:
            raise UnresolvedError("the number of heads is not known")
        self.size, self.value_size = widths[0] // self.heads, widths[2] // self.heads
        places = np.arange(total)
        hidden = widths[0]
        self.query = places[:hidden].reshape(self.heads, -1)
        self.key = places[hidden : 2 * hidden].reshape(self.heads, -1)
        self.value = places[2 * hidden :].reshape(self.heads, -1)

    def relation(self) -> Relation:
        view = self.view
        mask, scores = view.input(_MASK), view.input(_SCORE_BIAS)
        masks = " ".join(f"[m{axis}]" for axis in range(mask.rank)) if mask is not None else "1"
        bias = mask_notation(scores.shape or (), self.heads).replace("(k r)", "k") if scores is not None else "1"
        text = f"[b] [s] i, i [w], [w], {masks}, 1, {bias} -> [b] [s] (k v)"
        sizes: dict[str, int | None] = {"k": self.heads, "v": self.value_size}
        return resolve(text, view.shapes(view.inputs), view.shapes(view.outputs[:1]), sizes)

    # --- what the projections give ------------------------------------------------------------------------------

    @cached_property
    def _nonzero(self) -> BoolArray:
        """`[column, input]`: where the weights are not zero."""
        weights = self.view.data(_WEIGHTS).constant
        assert weights is not None
        return np.asarray(weights.nonzero((0, 1)).T)

    def _linear(self, pattern: BoolArray) -> Linear:
        bias = self.view.input(_BIAS)
        return Linear(self.view, 0, 2, 2, pattern[None], border=False, bias=bias is None or bias.constant is not None)

    def _projected(self, columns: Array) -> tuple[BoolArray, Array]:
        """Per column of the weights: whether it gives one constant, and which."""
        operand = self.view.input(_BIAS)
        bias = Known(np.ones(1, np.bool_), operand.known.value[columns]) if operand is not None else None
        dtype = self.view.data(_WEIGHTS).dtype or np.dtype(np.float32)

        def weigh(inputs: BoolArray) -> Array:
            part = self.view.data(_WEIGHTS).known.value[inputs]
            return np.asarray(part[:, columns].T.astype(np.float64))

        found = known_result(self._linear(self._nonzero[columns]), bias, weigh, 3, dtype)
        if found is None:
            return np.zeros(columns.size, np.bool_), np.zeros(columns.size, dtype)
        return found.mask.reshape(-1), found.value.reshape(-1)

    @cached_property
    def useful(self) -> BoolArray:
        """`[head, dimension]`: where query times key is neither zero nor the same for every key."""
        if self.view.attribute("do_rotary", 0):
            return np.ones(self.query.shape, np.bool_)
        queries, value = self._projected(self.query.reshape(-1))
        keys, shift = self._projected(self.key.reshape(-1))
        if self.view.input(_MASK) is not None:
            # Where all keys of a query are padding, its scores are rounded at the size of what fills them, -10000.
            keys = keys & (shift == 0)
        return np.asarray(~((queries & (value == 0)) | keys).reshape(self.query.shape))

    def forward(self) -> Known | None:
        """A mean of equal values is that value."""
        mask, value = self._projected(self.value.reshape(-1))
        if self.view.input(_SCORE_BIAS) is not None:
            # Where that is infinite, a query may find no key.
            mask = mask & (value == 0)
        if not mask.any():
            return None
        return Known(mask.reshape(1, 1, -1), np.where(mask, value, 0).reshape(1, 1, -1))

    @cached_property
    def linear(self) -> Linear:
        """The whole node as a product: an output depends on an input through its head's query, key and value."""
        scored = self.useful[:, :, None] & (self._nonzero[self.query] | self._nonzero[self.key])
        pattern = self._nonzero[self.value] | any_along(scored, 1, keepdims=True)
        return self._linear(pattern.reshape(self.value.size, -1))

    # --- slicing ------------------------------------------------------------------------------------------------

    def kept(self) -> tuple[BoolArray, BoolArray, BoolArray]:
        """Heads that stay, dimensions of their queries, dimensions of their values."""
        heads, values = (kept_factor(self.view, -1, factor) for factor in "kv")
        sizes = any_along(self.useful[heads], 0)
        sizes[0] |= not sizes.any()
        return heads, sizes, values

    def columns(self) -> Array:
        """Columns of the weights that stay."""
        heads, sizes, values = self.kept()
        parts = [part[heads][:, kept] for part, kept in ((self.query, sizes), (self.key, sizes), (self.value, values))]
        return np.concatenate([part.reshape(-1) for part in parts])

    def attributes(self) -> dict[str, object]:
        heads, sizes, values = (int(mask.sum()) for mask in self.kept())
        changed: dict[str, object] = {}
        if heads < self.heads:
            changed["num_heads"] = heads
        if sizes < self.size and not self.view.attribute("scale", 0.0):
            changed["scale"] = float(1.0 / np.sqrt(self.size))
        if self.view.attribute("qkv_hidden_sizes") or sizes != values:
            changed["qkv_hidden_sizes"] = [heads * sizes, heads * sizes, heads * values]
        return changed

    def sliced(self) -> Array:
        kept = self.view.kept[0][2]
        weights = self.view.data(_WEIGHTS).known.value[:, self.columns()]
        return weights if kept is None else weights[kept]

    def new_bias(self, fold: Fold | None) -> Array:
        """The bias with the constants that leave, then sliced."""
        weights, bias = self.view.data(_WEIGHTS).known.value, self.view.input(_BIAS)
        columns = self.columns()
        result = np.zeros(columns.size) if bias is None else bias.known.value[columns].astype(np.float64)
        if fold is not None:
            result = result + fold.values @ weights[fold.indices][:, columns].astype(np.float64)
        return result.astype(weights.dtype)


def _relate(view: View) -> Relation:
    weights, bias = view.data(_WEIGHTS), view.input(_BIAS)
    if weights.constant is None or (bias is not None and bias.constant is None):
        raise UnresolvedError("the weights are computed")
    if any(view.input(slot) is not None for slot in (_PAST, _LENGTH)) or any(o is not None for o in view.outputs[1:]):
        raise UnresolvedError("keys and values are handed on")
    return Fused(view).relation()


def _forward(view: View) -> list[Known | None]:
    return [Fused(view).forward(), *[None] * (len(view.outputs) - 1)]


def _backward(view: View) -> list[BoolArray | None]:
    needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
    linear = Fused(view).linear
    needed[0] = linear.needed_channels(linear.live_outputs()).reshape(1, 1, -1)
    return needed


def _retain(view: View) -> Iterable[Keep]:
    return Fused(view).linear.retain()


def _fold(view: View) -> Mapping[int, Fold]:
    return Fused(view).linear.fold()


def _rewrite(view: View) -> Rewrite:
    fused = Fused(view)
    fold = view.folds.get(0)
    if fold is None and not (view.shrinks(0, 2) or fused.columns().size < (view.data(_WEIGHTS).extent(1) or 0)):
        return Rewrite()
    constants: dict[int, object] = {_WEIGHTS: fused.sliced}
    if fold is not None or view.input(_BIAS) is not None:
        constants[_BIAS] = lambda: fused.new_bias(fold)
    return Rewrite(constants=constants, attributes=fused.attributes())  # type: ignore[arg-type]


register(
    Rule(
        "Attention",
        "com.microsoft",
        relate=_relate,
        forward=_forward,
        backward=_backward,
        retain=_retain,
        fold=_fold,
        rewrite=_rewrite,
    )
)

"""Operators that contract their data with weights or with other data: matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxshrink.facts import Known, along, everything, partial, uniform
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops._linear import Linear, collapsed, lined
from onnxshrink.pattern import Pattern, collect
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import Fold, Operand, View
from onnxshrink.weights import Array, BoolArray, any_along

# Beyond so many distinct lines on both sides, a product of numbers is faster than one line after the other.
_FEW_LINES = 8


def bool_product(left: BoolArray | Pattern, right: BoolArray | Pattern) -> BoolArray:
    """`any over k of left[..., m, k] & right[..., k, n]` on compressed masks."""
    if isinstance(left, Pattern):
        # (A B)' = B' A': the pattern always comes second.
        other = right.full() if isinstance(right, Pattern) else right
        found: BoolArray = bool_product(other.swapaxes(-1, -2), left.T).swapaxes(-1, -2)
        return found
    if isinstance(right, Pattern):
        return _pattern_product(left, right)
    if left.shape[-1] == 1:
        return left & any_along(right, -2, keepdims=True)
    if right.shape[-2] == 1:
        return any_along(left, -1, keepdims=True) & right
    if left.size == left.shape[-1] and right.ndim == 2:
        row = any_along(right[left.reshape(-1)], 0)
        return row.reshape((1,) * (left.ndim - 1) + (-1,))
    if right.ndim == 2 and left.shape[-2] > 1:
        return _by_distinct_rows(left, right)
    return _float_product(left, right)


def _pattern_product(left: BoolArray, right: Pattern) -> BoolArray:
    """Positions mostly share one mask: each distinct row is multiplied once."""
    if left.shape[-1] == 1:
        return left & right.anywhere(1)
    rows = collect([left.reshape(-1, left.shape[-1])])
    if min(rows.lines.shape[0], right.lines.shape[0]) > _FEW_LINES:
        found = _float_product(rows.lines, right.full())
    else:
        found = np.stack([right.reached(1, line) for line in rows.lines])
    return found[rows.index].reshape(*left.shape[:-1], right.shape[1])


def _swapped(mask: BoolArray | Pattern) -> BoolArray | Pattern:
    return mask.T if isinstance(mask, Pattern) else mask.swapaxes(-1, -2)


def _along_inner(mask: BoolArray | Pattern, axis: int) -> BoolArray:
    """Positions of one of the last two axes at which anything holds."""
    if isinstance(mask, Pattern):
        return mask.anywhere(axis)
    kept = mask.ndim - 2 + axis
    return any_along(mask, tuple(other for other in range(mask.ndim) if other != kept))


def _float_product(left: BoolArray, right: BoolArray) -> BoolArray:
    return np.asarray((left.astype(np.float32) @ right.astype(np.float32)) > 0)


def _by_distinct_rows(left: BoolArray, right: BoolArray) -> BoolArray:
    """Positions mostly share one mask: each distinct row is multiplied once."""
    rows = left.reshape(-1, left.shape[-1])
    packed = np.ascontiguousarray(np.packbits(rows, axis=1))
    _, first, inverse = np.unique(packed.view(f"V{packed.shape[1]}"), return_index=True, return_inverse=True)
    found = _float_product(rows[first], right)
    return found[inverse.reshape(-1)].reshape(*left.shape[:-1], right.shape[1])


def reduce_to(mask: BoolArray, operand: Operand) -> BoolArray:
    """Undo broadcasting: "any" over the axes that `operand` lacks or has with extent one."""
    extra = mask.ndim - operand.rank
    if extra > 0:
        mask = any_along(mask, tuple(range(extra)))
    ones = tuple(a for a in range(operand.rank) if operand.extent(a) == 1 and mask.shape[a] > 1)
    return any_along(mask, ones, keepdims=True) if ones else mask


def not_zero(operand: Operand) -> BoolArray:
    """Elements that may be other than zero."""
    if operand.constant is not None:
        return operand.constant.nonzero(tuple(range(operand.rank)))
    return ~operand.zero()


def unknown(operand: Operand) -> BoolArray:
    """Elements that depend on the inputs of the model."""
    if operand.constant is not None:
        return ~everything(operand.rank)
    return ~operand.known.mask


class Product:
    """A matrix product `left @ right`, either side transposed or not."""

    def __init__(self, view: View, slots: tuple[int, int] = (0, 1), transposed: tuple[bool, bool] = (False, False)):
        self.view = view
        self.slots = slots
        self.transposed = transposed
        self.operands = view.data(slots[0]), view.data(slots[1])

    def _matrix(self, side: int, array: Array) -> Array:
        return array.swapaxes(-1, -2) if self.transposed[side] else array

    def masks(self, side: int) -> tuple[BoolArray, BoolArray | Pattern]:
        """Unknown elements, and elements that may not be zero, as `[..., row, column]`."""
        operand = self.operands[side]
        if operand.constant is not None and operand.rank == 2:
            pattern = operand.constant.pattern(0, 1)
            return unknown(operand), pattern.T if self.transposed[side] else pattern
        counts = not_zero(operand) & ~self._unnoticed(side)
        return self._matrix(side, unknown(operand)), self._matrix(side, counts)

    def _known_nonzero(self, side: int) -> BoolArray | Pattern:
        """Elements that are known and may not be zero; a constant is known everywhere."""
        unknown, counts = self.masks(side)
        return counts if isinstance(counts, Pattern) else counts & ~unknown

    def _unnoticed(self, side: int) -> BoolArray:
        """Elements that add the same number to a whole line of the product along which nobody would notice.

        Attention's scores: a dimension in which all keys agree shifts all scores of a query alike.
        """
        operand = self.operands[side]
        blind = self.view.blind[0] if self.view.blind else None
        if blind != self.view.output().rank - 2 + side or any(o.constant is not None for o in self.operands):
            return ~everything(operand.rank)
        axis = operand.rank - (1 if (side == 1) != self.transposed[side] else 2)
        return uniform(operand.known, [axis]).mask

    def unknown_output(self) -> BoolArray:
        """Elements of the product that depend on the inputs."""
        (ua, za), (ub, zb) = self.masks(0), self.masks(1)
        result = bool_product(ua, zb)
        return result | bool_product(za, ub) if ub.any() else result

    def forward(self, scale: float = 1.0) -> Known | None:
        """What is known of the product."""
        mask = ~self.unknown_output()
        if self._contracted() is None:
            # Constants times constants would add up over an axis of unknown extent.
            mask = mask & ~bool_product(self._known_nonzero(0), self._known_nonzero(1))
        means, mean = self._means()
        if not mask.any() and not means.any():
            return None
        output = self.view.output()
        dtype = output.dtype or np.dtype(np.float32)
        value = np.zeros((1,) * mask.ndim)
        if mask.any() and self._contracted() is not None and self._both_nonzero().any():
            value = self._value() * scale
        value = np.where(mask, value, np.where(means, mean * scale, 0))
        return partial(mask | means, value.astype(dtype))

    def _means(self) -> tuple[BoolArray, Array]:
        """Elements that are a mean of equal values, as attention's results are where all values agree."""
        rank = self.view.output().rank
        for side, operand in enumerate(self.operands):
            last = (side == 0) != self.transposed[side]
            other = self.operands[1 - side]
            if operand.unit is None or operand.unit != operand.rank - (1 if last else 2):
                continue
            axis = other.rank - (2 if (side == 0) != self.transposed[1 - side] else 1)
            known = uniform(other.known, [axis])
            if known.anything:
                lead = (1,) * (rank - other.rank)
                arrays = [self._matrix(1 - side, array) for array in (known.mask, known.value)]
                mask, value = (array.reshape(lead + array.shape) for array in arrays)
                return mask, value.astype(np.float64)
        return ~everything(rank), np.zeros((1,) * rank)

    def _both_nonzero(self) -> BoolArray:
        """Contracted indices at which both sides may hold a known value other than zero."""
        left, right = self._known_nonzero(0), self._known_nonzero(1)
        return _along_inner(left, 1) & _along_inner(right, 0)

    def _value(self) -> Array:
        """The product of what is known, in double precision; only the contracted indices that matter are read."""
        both = self._both_nonzero()
        parts = []
        for side, axis in ((0, -1), (1, -2)):
            known = self.operands[side].known
            array = self._matrix(side, known.value)
            mask = self._matrix(side, known.mask)
            array = np.broadcast_to(array, np.broadcast_shapes(array.shape, mask.shape))
            count = self._contracted() or 1
            array = along(array, array.ndim + axis, count)
            mask = along(mask, mask.ndim + axis, count)
            chosen = np.flatnonzero(along(both, 0, count))
            part = np.where(mask.take(chosen, axis), array.take(chosen, axis), 0)
            parts.append(part.astype(np.float64))
        result: Array = parts[0] @ parts[1]
        return result

    def _contracted(self) -> int | None:
        left = self.operands[0]
        extent = left.extent(left.rank - 2 if self.transposed[0] else left.rank - 1)
        right = self.operands[1]
        other = right.extent(right.rank - 1 if self.transposed[1] else right.rank - 2)
        return extent or other

    def backward(self) -> tuple[BoolArray, BoolArray]:
        """Needed elements of both sides."""
        live = self.view.live()
        (_, za), (_, zb) = self.masks(0), self.masks(1)
        left = bool_product(live, _swapped(zb))
        needed = reduce_to(self._matrix(0, left), self.operands[0])
        if self.operands[1].constant is not None:
            return needed, everything(self.operands[1].rank)
        right = bool_product(_swapped(za), live)
        return needed, reduce_to(self._matrix(1, right), self.operands[1])

    def retain(self) -> list[Keep]:
        """Contracted indices at which two known values multiply to something other than zero."""
        both = self._both_nonzero()
        keeps = []
        for side in (0, 1):
            operand, slot = self.operands[side], self.slots[side]
            inner = operand.rank - 1 if (side == 0) != self.transposed[side] else operand.rank - 2
            kept = self.view.kept[slot][inner] if slot in self.view.kept else None
            if operand.constant is None and kept is not None:
                wanted = along(both, 0, kept.size).copy()
                keeps.append(Keep(slot, inner, wanted, "its constant is multiplied by another constant"))
        return keeps


def _is_weights(operand: Operand) -> bool:
    return operand.constant is not None and operand.rank == 2


def _batch_relation(view: View, left: str, right: str) -> Relation:
    return resolve(f"{left}, {right} -> *b m n", view.shapes(view.inputs), view.shapes(view.outputs))


def _matmul_relation(view: View) -> Relation:
    if min(view.data(0).rank, view.data(1).rank) < 2:
        raise UnresolvedError("a product with a vector")
    return _batch_relation(view, "*b m k", "*b k n")


def matmul_linear(view: View) -> Linear | None:
    """The product as one with constant weights, whichever side they are on; None when neither side is constant."""
    left, right = view.data(0), view.data(1)
    output = view.output().rank
    if _is_weights(right) and left.extent(left.rank - 1) is not None:
        assert right.constant is not None
        pattern = right.constant.pattern(0, 1).T
        return Linear(view, 0, left.rank - 1, output - 1, pattern, border=False, bias=True, follows=True)
    if _is_weights(left) and right.extent(right.rank - 2) is not None:
        assert left.constant is not None
        pattern = left.constant.pattern(0, 1)
        return Linear(view, 1, right.rank - 2, output - 2, pattern, border=False, bias=True, follows=True)
    return None


def _matmul_forward(view: View) -> list[Known | None]:
    return [Product(view).forward()]


def _matmul_backward(view: View) -> list[BoolArray | None]:
    return list(Product(view).backward())


def _matmul_retain(view: View) -> Iterable[Keep]:
    linear = matmul_linear(view)
    return linear.retain() if linear is not None else Product(view).retain()


def _matmul_fold(view: View) -> Mapping[int, Fold]:
    linear = matmul_linear(view)
    return linear.fold() if linear is not None else {}


def _matmul_lined(view: View) -> tuple[int, ...]:
    return lined(matmul_linear(view))


def _matmul_rewrite(view: View) -> Rewrite:
    return next((_matmul_folded(view, slot, fold) for slot, fold in view.folds.items()), Rewrite())


def _matmul_folded(view: View, slot: int, fold: Fold) -> Rewrite:
    constants = {} if fold.into is None else {1 - slot: lambda: _collapsed(view, slot, fold)}
    if fold.biases is None:
        return Rewrite(constants)
    weights = view.data(1 - slot).known.value
    offset = (weights.T if slot == 0 else weights)[:, fold.indices].astype(np.float64) @ fold.biases
    kept = view.kept[-1][view.output().rank - (1 if slot == 0 else 2)]
    offset = offset.compress(kept, axis=0) if kept is not None else offset
    return Rewrite(constants, add=(offset if slot == 0 else offset[:, None]).astype(view.output().dtype))


def _collapsed(view: View, slot: int, fold: Fold) -> Array:
    """Weights with the lines of `fold` added to those that stand for them, then sliced."""
    weights = view.data(1 - slot).known.value
    whole = collapsed(weights.T if slot == 0 else weights, fold)
    rows, columns = view.kept[-1][view.output().rank - (1 if slot == 0 else 2)], view.kept[slot][fold.axis]
    whole = whole if rows is None else whole[rows]
    whole = (whole if columns is None else whole[:, columns]).astype(weights.dtype)
    return np.ascontiguousarray(whole.T if slot == 0 else whole)


register(
    Rule(
        "MatMul",
        relate=_matmul_relation,
        forward=_matmul_forward,
        backward=_matmul_backward,
        retain=_matmul_retain,
        fold=_matmul_fold,
        lined=_matmul_lined,
        rewrite=_matmul_rewrite,
    )
)

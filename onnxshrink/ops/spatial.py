"""Operators that window space: convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxshrink.errors import RuleError
from onnxshrink.facts import Known, everything
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops._linear import Linear, known_result
from onnxshrink.pattern import Pattern
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import APPENDED, Fold, View
from onnxshrink.weights import Array, BoolArray, any_nonzero

_NOTATION = {
    (False, False): "n i [*x], o i [*k], o -> n o [*y]",
    (False, True): "n (g i) [*x], (g o) i [*k], (g o) -> n (g o) [*y]",
    (True, False): "n i [*x], i o [*k], o -> n o [*y]",
    (True, True): "n (g i) [*x], (g i) o [*k], (g o) -> n (g o) [*y]",
}


class Kernel:
    """Weights of a convolution, transposed or not, seen as `[group, out, in, *kernel]`."""

    def __init__(self, view: View, transposed: bool) -> None:
        self.view = view
        self.transposed = transposed
        self.groups = int(view.attribute("group", 1))
        self.weights = view.data(1)
        self.data = view.data(0)

    def pattern(self) -> BoolArray | Pattern:
        """`[group, out, in]`, or `[out, in]` of one group: where any element of the kernel is not zero."""
        if self.weights.constant is not None and self.groups == 1:
            pattern = self.weights.constant.pattern(0, 1)
            return pattern.T if self.transposed else pattern
        if self.weights.constant is not None:
            found = self.weights.constant.nonzero((0, 1))
        elif self.weights.known.everything:
            shape = [self.weights.extent(axis) or 1 for axis in (0, 1)]
            found = np.broadcast_to(any_nonzero(self.weights.known.value, (0, 1)), shape)
        else:
            found = np.ones([self.weights.extent(axis) or 1 for axis in (0, 1)], np.bool_)
        return self.canonical(found)

    def _values(self) -> Array:
        """All weights at full extent; asked only where every one is known."""
        value = self.weights.value()
        assert value is not None
        return value

    def canonical(self, weights: Array) -> Array:
        """Weights as `[group, out, in, ...]`."""
        grouped = weights.reshape(self.groups, weights.shape[0] // self.groups, *weights.shape[1:])
        return grouped.swapaxes(1, 2) if self.transposed else grouped

    def stored(self, weights: Array) -> Array:
        """`[group, out, in, ...]` as the operator wants it."""
        if self.transposed:
            weights = weights.swapaxes(1, 2)
        return np.ascontiguousarray(weights.reshape(-1, *weights.shape[2:]))

    def border(self) -> bool:
        """Whether a constant channel contributes differently near a border."""
        if self.transposed:
            return True
        automatic = self.view.attribute("auto_pad", "NOTSET")
        if automatic == "VALID":
            return False
        if automatic != "NOTSET":
            return any(extent != 1 for extent in (self.weights.shape or ())[2:])
        return any(pad != 0 for pad in self.view.attribute("pads", []))

    def linear(self) -> Linear:
        """The convolution as a product with constant weights."""
        bias = self.view.input(2)
        constant = self.weights.constant is not None
        foldable = constant and (bias is None or bias.constant is not None)
        extend = constant and (self.view.blocks or self.groups) == 1 and self.view.opset() >= 11
        # What a constant adds through weights that are not known is not known either.
        framed = self.data.framed
        varies = self.border() or framed is not None or not (constant or self.weights.known.everything)
        return Linear(self.view, 0, 1, 1, self.pattern(), varies, foldable, constant, extend, framed)

    def summed(self, channels: BoolArray) -> Array:
        """Weights of some channels, summed over the kernel: `[out, channel]`, zero across groups."""
        weights = self.canonical(self._values())
        groups, outs, ins = weights.shape[:3]
        chosen = np.flatnonzero(channels)
        group, index = np.divmod(chosen, ins)
        kernels = weights[group, :, index].astype(np.float64).reshape(chosen.size, outs, -1).sum(axis=2)
        result = np.zeros((groups, outs, chosen.size))
        result[group, :, np.arange(chosen.size)] = kernels
        return result.reshape(groups * outs, -1)


def _kernel(view: View) -> Kernel:
    return Kernel(view, transposed=view.node.op == "ConvTranspose")


def _relate(view: View) -> Relation:
    groups = int(view.attribute("group", 1))
    data, weights = view.data(0), view.data(1)
    if data.extent(1) is None or weights.extent(0) is None or weights.extent(1) is None:
        raise UnresolvedError("the number of channels is not known")
    notation = _NOTATION[view.node.op == "ConvTranspose", groups > 1]
    relation = resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs), {"g": groups})
    if groups == 1:
        return relation
    if weights.constant is None:
        return relation.pin("g", "i", "o")
    return Relation(
        relation.inputs, relation.outputs, relation.sizes, relation.pinned, relation.links, frozenset({"g"})
    )


def _bias(view: View) -> Known | None:
    bias = view.input(2)
    return bias.known if bias is not None else None


def _forward(view: View) -> list[Known | None]:
    kernel = _kernel(view)
    output = view.output()
    if not (view.data().known.anything or _has_dead_rows(kernel)):
        return [None]
    assert output.dtype is not None
    return [known_result(kernel.linear(), _bias(view), kernel.summed, output.rank, output.dtype)]


def _has_dead_rows(kernel: Kernel) -> bool:
    pattern = kernel.pattern()
    rows = pattern.anywhere(0) if isinstance(pattern, Pattern) else pattern.any(axis=2)
    return not bool(rows.all())


def _backward(view: View) -> list[BoolArray | None]:
    linear = _kernel(view).linear()
    live = linear.live_outputs()
    shape = [1, -1] + [1] * (view.data().rank - 2)
    needed: list[BoolArray | None] = [linear.needed_channels(live).reshape(shape), everything(view.data(1).rank)]
    return [*needed, live] if view.input(2) is not None else [*needed, *[None] * (len(view.inputs) - 2)]


def _retain(view: View) -> Iterable[Keep]:
    return _kernel(view).linear().retain()


def _represent(view: View) -> Iterable[Keep]:
    return _kernel(view).linear().represent()


def _fold(view: View) -> Mapping[int, Fold]:
    return _kernel(view).linear().fold()


def _rewrite(view: View) -> Rewrite:
    kernel = _kernel(view)
    fold = view.folds.get(0)
    collapses = fold is not None and fold.into is not None
    constants: dict[int, object] = {}
    attributes: dict[str, object] = {}
    if kernel.groups > 1 and (view.shrinks(0, 1) or view.shrinks(-1, 1)):
        attributes["group"] = int(_kept_blocks(kernel).sum())
    if collapses or attributes:
        constants[1] = lambda: _weights(kernel, fold if collapses else None)
    if fold is not None and not collapses:
        constants[2] = _new_bias(kernel, fold)
    appended = collapses and fold is not None and fold.appends
    return Rewrite(constants=constants, attributes=attributes, append={0: 1} if appended else {})  # type: ignore[arg-type]


def _kept_blocks(kernel: Kernel) -> BoolArray:
    kept = kernel.view.kept[-1][1]
    assert kept is not None
    found: BoolArray = np.asarray(kept.reshape(kernel.view.blocks or kernel.groups, -1).any(axis=1))
    return found


def _new_bias(kernel: Kernel, fold: Fold) -> Array:
    view = kernel.view
    leaving = np.zeros(view.data().extent(1) or 0, np.bool_)
    leaving[fold.indices] = True
    offset = kernel.summed(leaving) @ fold.values
    bias = view.input(2)
    if bias is not None:
        offset = offset + bias.known.value.astype(np.float64)
    kept = view.kept[-1][1]
    assert kept is not None
    return offset[kept].astype(view.output().dtype)


def _weights(kernel: Kernel, fold: Fold | None) -> Array:
    """Weights with the channels of `fold` added to those that stand for them, then sliced block by block."""
    stored = kernel.weights.known.value
    view = kernel.view
    rows, columns = view.kept[-1][1], view.kept[0][1]
    if rows is None or columns is None:
        raise RuleError("a convolution without static channels was sliced")
    blocks = view.blocks or kernel.groups
    weights = _joined(kernel.canonical(stored), blocks)
    if fold is not None:
        weights = _collapsed(weights, fold)
    rows, columns = rows.reshape(blocks, -1), columns.reshape(blocks, -1)
    if fold is not None and fold.appends:
        columns = np.concatenate([columns, np.ones((1, 1), np.bool_)], axis=1)
    sliced = [
        weights[b][np.flatnonzero(rows[b])][:, np.flatnonzero(columns[b])] for b in np.flatnonzero(rows.any(axis=1))
    ]
    return kernel.stored(np.stack(sliced).astype(stored.dtype))


def _joined(weights: Array, blocks: int) -> Array:
    """`[group, out, in, ...]` with groups joined to fewer blocks, zero between the groups of one block."""
    groups, outs, ins = weights.shape[:3]
    size = groups // blocks
    if size == 1:
        return weights
    joined = np.zeros((blocks, size, outs, size, ins, *weights.shape[3:]), weights.dtype)
    parts = weights.reshape(blocks, size, outs, ins, *weights.shape[3:])
    for index in range(size):
        joined[:, index, :, index] = parts[:, index]
    return joined.reshape(blocks, size * outs, size * ins, *weights.shape[3:])


def _collapsed(weights: Array, fold: Fold) -> Array:
    """Weights in double precision, columns added to those that take them; an appended column comes last."""
    assert fold.into is not None
    assert fold.scale is not None
    weights = weights.astype(np.float64)
    size = weights.shape[2]
    if fold.appends:
        weights = np.concatenate([weights, np.zeros_like(weights[:, :, :1])], axis=2)
    for index, into, ratio in zip(fold.indices, fold.into, fold.values / fold.scale, strict=True):
        block, column = divmod(int(index), size)
        host = size if into == APPENDED else int(into) % size
        weights[block, :, host] += weights[block, :, column] * ratio
    return weights


for _op in ("Conv", "ConvTranspose"):
    register(
        Rule(
            _op,
            relate=_relate,
            forward=_forward,
            backward=_backward,
            retain=_retain,
            represent=_represent,
            fold=_fold,
            rewrite=_rewrite,
            framed=(0,),
        )
    )

"""What a model costs, predicted from the widths of its tensors and the figures of the runtime's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.graph import Node, Period
from onnxshrink.planning.data import Plan
from onnxshrink.planning.widths import Axis
from onnxshrink.speed.kernels import Kernels

Extent = Callable[[Axis], int]
FREE = 16  # what a free extent counts as: how often a layer runs is then alike along the network

# Elementwise functions that the runtime does in the kernel of the layer before, and moves that cost nothing.
_FREE_OF_CHARGE = frozenset({
    "Relu", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Shape", "Clip", "LeakyRelu",
})  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one node does.

    Attributes:
        node: the node.
        kind: of layer, as in `Kernels.units`; "" for anything else, which costs by elements.
        factor: multiply-adds (or elements) are this times the extents of `axes`.
        axes: the axes that the work grows with.
        widths: the axes whose widths decide how well the kernel runs, with what each is divided by (a group count).
        window: the weights of the node are this times the extents of the `widths`; 0: it has none.
    """

    node: Node
    kind: str
    factor: float
    axes: tuple[Axis, ...]
    widths: tuple[tuple[Axis, int], ...] = ()
    window: float = 0.0

    def parameters(self, extent: Extent) -> float:
        """Elements of the weights."""
        return self.window * math.prod(extent(axis) for axis, _ in self.widths)

    def seconds(self, kernels: Kernels, extent: Extent) -> float:
        """Time of one run, given the extent of every axis."""
        amount = self.factor * math.prod(extent(axis) for axis in self.axes)
        if not self.kind:
            return amount * kernels.element
        units = [kernels.unit(self.kind, max(1, extent(axis) // parts)) for axis, parts in self.widths]
        return amount * math.prod(units) ** (1 / len(units))


def works(analysis: Analysis) -> list[Work]:
    """The work of every node."""
    return [work for node in analysis.nodes() for work in _works_of(analysis, node)]


def extents(analysis: Analysis, plan: Plan) -> Extent:
    """The extent of every axis under a plan; what is not computed has extent zero."""

    def extent(axis: Axis) -> int:
        name, position = axis
        if name not in plan.kept:
            return whole(analysis, axis)
        if name not in plan.present:
            return 0
        kept = plan.kept[name][position]
        return whole(analysis, axis) if kept is None else int(np.count_nonzero(kept))

    return extent


def whole(analysis: Analysis, axis: Axis) -> int:
    """The extent of an axis before anything is removed."""
    name, position = axis
    size = (analysis.shape(name) or ())[position]
    return int(size) if isinstance(size, int) and not isinstance(size, Period) else FREE


def total(found: Iterable[Work], kernels: Kernels, extent: Extent) -> float:
    """Predicted seconds of one run."""
    return sum(work.seconds(kernels, extent) for work in found)


def planned(analysis: Analysis, found: Iterable[Work], kernels: Kernels, plan: Plan) -> float:
    """Predicted seconds of one run under a plan. A channel of ones that is appended widens the input, and copies it."""
    extent = extents(analysis, plan)
    seconds = 0.0
    for work in found:
        wider = {
            (work.node.inputs[slot], fold.axis)
            for slot, fold in plan.folds.get(work.node.index, {}).items()
            if fold.appends
        }
        copied = sum(math.prod(map(extent, _axes(analysis, name))) for name, _ in wider)
        seconds += copied * kernels.element
        seconds += work.seconds(kernels, lambda axis, wider=wider: extent(axis) + (axis in wider))  # type: ignore[misc]
    return seconds


def _works_of(analysis: Analysis, node: Node) -> list[Work]:
    shapes = [analysis.shape(name) for name in (*node.inputs, *node.outputs) if name]
    if any(shape is None for shape in shapes) or not any(node.outputs) or node.op in _FREE_OF_CHARGE:
        return []
    if not node.domain and node.op in _WORKS:
        return _WORKS[node.op](analysis, node)
    return [Work(node, "", 1, _axes(analysis, next(filter(None, node.outputs))))]


def _axes(analysis: Analysis, name: str) -> tuple[Axis, ...]:
    return tuple((name, position) for position in range(analysis.rank(name)))


def _convolution(analysis: Analysis, node: Node) -> list[Work]:
    data, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
    kernel = (analysis.shape(weight) or ())[2:]
    window = int(np.prod([k if isinstance(k, int) else 1 for k in kernel]))
    groups = int(node.attributes.get("group", 1))
    channels = ((data, 1), (output, 1))
    if groups > 1 and whole(analysis, (data, 1)) == groups:
        return [Work(node, "depthwise", window, _axes(analysis, output), ((channels[1], 1),), window)]
    kind = "pointwise" if window == 1 else "convolution"
    axes = (*_axes(analysis, output), channels[0])  # an output channel reads the inputs of one group
    return [Work(node, kind, window / groups, axes, tuple((axis, groups) for axis in channels), window / groups)]


def _product(analysis: Analysis, node: Node) -> list[Work]:
    data, output = node.inputs[0], node.outputs[0]
    transposed = bool(node.attributes.get("transA", 0))
    inner = (data, analysis.rank(data) - (2 if transposed else 1))
    outer = (output, analysis.rank(output) - 1)
    weights = int(any(name in analysis.constants for name in node.inputs[:2]))
    return [Work(node, "product", 1, (*_axes(analysis, output), inner), ((inner, 1), (outer, 1)), weights)]


def _recurrent(analysis: Analysis, node: Node) -> list[Work]:
    data, weight = node.inputs[0], node.inputs[1]
    name = next(filter(None, node.outputs))
    unit = (name, analysis.rank(name) - 1)
    directions, rows = (whole(analysis, (weight, axis)) for axis in (0, 1))
    gates = directions * rows // max(1, whole(analysis, unit))
    steps = _axes(analysis, data)[:-1]
    inputs = [(data, analysis.rank(data) - 1), unit]
    return [Work(node, "product", gates, (*steps, unit, inner), ((inner, 1), (unit, 1)), gates) for inner in inputs]


_WORKS: dict[str, Callable[[Analysis, Node], list[Work]]] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Gemm": _product,
    "MatMul": _product,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}

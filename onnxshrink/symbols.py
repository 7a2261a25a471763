"""Extents that a graph computes from other extents: `Range(0, length)` is as long as `length` says.

onnx's inference follows numbers and a few symbols; where it loses one it invents a new symbol, and two extents that
are one and the same look different. Here small integer tensors are followed element by element, each a number, a
declared symbol, or unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from onnxshrink.protos import UNTOLD, BareNode, dims_of

Element = int | str | None
Dims = list[int | str | None]
_LARGEST = 64
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


@dataclass(frozen=True)
class Vector:
    """A scalar or one-dimensional tensor of integers."""

    elements: tuple[Element, ...]
    rank: int


@dataclass(frozen=True, eq=False)
class _Node(BareNode):
    inputs: tuple[Vector | None, ...]
    shapes: tuple[Dims | None, ...]

    def input(self, slot: int) -> Vector | None:
        return self.inputs[slot] if slot < len(self.inputs) else None

    def numbers(self, slot: int) -> list[int] | None:
        """Elements of an input, when all of them are numbers."""
        vector = self.input(slot)
        found = [e for e in vector.elements if isinstance(e, int)] if vector is not None else None
        return found if found is not None and vector is not None and len(found) == len(vector.elements) else None


# --- values -----------------------------------------------------------------------------------------------------


def _shape(node: _Node) -> Vector | None:
    dims = node.shapes[0]
    if dims is None:
        return None
    start, end = int(node.attribute("start", 0)), node.attribute("end")
    return Vector(tuple(dims[start : None if end is None else int(end)]), 1)


def _same(node: _Node) -> Vector | None:
    return node.input(0)


def _gather(node: _Node) -> Vector | None:
    source, index, numbers = node.input(0), node.input(1), node.numbers(1)
    if source is None or source.rank != 1 or index is None or numbers is None:
        return None
    count = len(source.elements)
    if any(not -count <= n < count for n in numbers):
        return None
    return Vector(tuple(source.elements[n] for n in numbers), index.rank)


def _slice(node: _Node) -> Vector | None:
    source, starts, ends = node.input(0), node.numbers(1), node.numbers(2)
    steps = node.numbers(4) if node.given(4) else [1]
    if source is None or source.rank != 1 or starts is None or ends is None or steps is None:
        return None
    start, end, step = starts[0], ends[0], steps[0]
    if step < 1:
        return None
    return Vector(source.elements[slice(start, end, step)], 1)


def _unsqueeze(node: _Node) -> Vector | None:
    source = node.input(0)
    return Vector(source.elements, 1) if source is not None and source.rank == 0 else None


def _squeeze(node: _Node) -> Vector | None:
    source = node.input(0)
    return Vector(source.elements, 0) if source is not None and len(source.elements) == 1 else None


def _reshape(node: _Node) -> Vector | None:
    source, target = node.input(0), node.input(1)
    if source is None or target is None or len(target.elements) > 1:
        return None
    return Vector(source.elements, len(target.elements))


def _concat(node: _Node) -> Vector | None:
    elements: list[Element] = []
    for vector, shape in zip(node.inputs, node.shapes, strict=True):
        if vector is not None:
            elements += vector.elements
        elif shape is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] <= _LARGEST:
            elements += [None] * shape[0]
        else:
            return None
    return Vector(tuple(elements), 1)


def _pairs(node: _Node) -> tuple[list[tuple[Element, Element]], int] | None:
    left, right = node.input(0), node.input(1)
    if left is None or right is None:
        return None
    count = max(len(left.elements), len(right.elements))
    if any(len(v.elements) not in (1, count) for v in (left, right)):
        return None
    a, b = (v.elements * count if len(v.elements) == 1 else v.elements for v in (left, right))
    return list(zip(a, b, strict=False))[:count], max(left.rank, right.rank)


def _each(function: Callable[[Element, Element], Element]) -> Callable[[_Node], Vector | None]:
    def value(node: _Node) -> Vector | None:
        pairs = _pairs(node)
        return None if pairs is None else Vector(tuple(function(a, b) for a, b in pairs[0]), pairs[1])

    return value


def _sum(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return a if b == 0 else b if a == 0 else None


def _difference(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return a if b == 0 else None


def _product(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return a if b == 1 else b if a == 1 else None


def _quotient(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b > 0 and a >= 0 else None
    return a if b == 1 else None


def _equal(a: Element, b: Element) -> Element:
    """A symbol is an extent: never negative."""
    if a is None or b is None:
        return None
    if a == b:
        return 1
    numbers = [e for e in (a, b) if isinstance(e, int)]
    return 0 if len(numbers) == 2 or (numbers and numbers[0] < 0) else None


def _where(node: _Node) -> Vector | None:
    vectors = [node.input(slot) for slot in range(3)]
    found = [vector for vector in vectors if vector is not None]
    if len(found) < len(vectors):
        return None
    count = max(len(vector.elements) for vector in found)
    if any(len(vector.elements) not in (1, count) for vector in found):
        return None
    wanted, yes, no = (v.elements * count if len(v.elements) == 1 else v.elements for v in found)
    chosen = [y if w == 1 else n if w == 0 else y if y == n else None for w, y, n in zip(wanted, yes, no, strict=False)]
    return Vector(tuple(chosen[:count]), max(vector.rank for vector in found))


def _filled(node: _Node) -> Vector | None:
    numbers, value = node.numbers(0), node.attribute("value")
    if numbers is None or len(numbers) != 1 or not 0 <= numbers[0] <= _LARGEST:
        return None
    array = np.zeros(1) if value is None else onnx.numpy_helper.to_array(value)
    return Vector((int(array.reshape(-1)[0]),) * numbers[0], 1) if array.dtype.kind in "iu" else None


_VALUES: dict[str, Callable[[_Node], Vector | None]] = {
    "Add": _each(_sum),
    "Cast": _same,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Div": _each(_quotient),
    "Equal": _each(_equal),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _each(_product),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _each(_difference),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}


# --- extents ----------------------------------------------------------------------------------------------------


def _range_extents(node: _Node) -> Dims | None:
    first, last, step = (node.input(slot) for slot in range(3))
    if first is None or last is None or step is None or first.elements != (0,) or step.elements != (1,):
        return None
    (count,) = last.elements
    return [max(0, count) if isinstance(count, int) else count]


def _expanded_extents(node: _Node) -> Dims | None:
    source, target = node.shapes[0], node.input(1)
    if source is None or target is None:
        return None
    count = max(len(source), len(target.elements))
    given = [None if isinstance(element, int) and element < 0 else element for element in target.elements]
    own: Dims = [*[1] * (count - len(source)), *source]
    wanted: Dims = [*[1] * (count - len(given)), *given]
    return [_broadcast(a, b) for a, b in zip(own, wanted, strict=True)]


def _broadcast(a: Element, b: Element) -> Element:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    # One of them is a number: the other is the same, or one.
    return a if isinstance(a, int) else b if isinstance(b, int) else None


def _filled_extents(node: _Node) -> Dims | None:
    target = node.input(0)
    return None if target is None else list(target.elements)


def _reshaped_extents(node: _Node) -> Dims | None:
    source, target = node.shapes[0], node.input(1)
    if target is None or node.attribute("allowzero", 0):
        return None
    found: Dims = []
    for axis, element in enumerate(target.elements):
        if element == 0:
            found.append(source[axis] if source is not None and axis < len(source) else None)
        else:
            found.append(None if isinstance(element, int) and element < 0 else element)
    return found


_EXTENTS: dict[str, Callable[[_Node], Dims | None]] = {
    "ConstantOfShape": _filled_extents,
    "Expand": _expanded_extents,
    "Range": _range_extents,
    "Reshape": _reshaped_extents,
}


# --- the graph --------------------------------------------------------------------------------------------------


def fill(graph: onnx.GraphProto) -> bool:
    """Set extents that follow from computed integers. True if that told anything new.

    Symbols that inference invented are then forgotten, so that the next round can derive what they stand for.

    Args:
        graph: a graph after inference, with its types in `value_info`.
    """
    types = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    values = {tensor.name: _of_tensor(tensor) for tensor in graph.initializer}
    constant: dict[str, Dims] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    changed = False
    for proto in graph.node:
        if proto.op_type == "Constant":
            values[proto.output[0]] = next((_of_tensor(a.t) for a in proto.attribute if a.name == "value"), None)
        if proto.domain not in ("", "ai.onnx") or not (proto.op_type in _VALUES or proto.op_type in _EXTENTS):
            continue
        shapes = tuple(constant.get(name) or _dims(types.get(name)) for name in proto.input)
        node = _Node(proto, tuple(values.get(name) for name in proto.input), shapes)
        if proto.op_type in _VALUES:
            values[proto.output[0]] = _VALUES[proto.op_type](node)
        dims = _EXTENTS[proto.op_type](node) if proto.op_type in _EXTENTS else None
        if dims is not None and proto.output[0] in types:
            changed |= _set(types[proto.output[0]], dims)
    if changed:
        forget_invented(graph)
    return changed


def _of_tensor(tensor: onnx.TensorProto) -> Vector | None:
    small = len(tensor.dims) <= 1 and math.prod(tensor.dims) <= _LARGEST
    if tensor.data_type not in _INTEGERS or not small or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    array = onnx.numpy_helper.to_array(tensor)
    return Vector(tuple(int(v) for v in array.reshape(-1)), array.ndim)


def is_invented(name: str) -> bool:
    """Whether a symbol is one that inference made up: it stands for no extent that the model names."""
    return name.startswith(UNTOLD)


def _dims(value: onnx.ValueInfoProto | None) -> Dims | None:
    """Extents of a tensor; an invented symbol counts as unknown."""
    dims = dims_of(value) if value is not None else None
    return [None if isinstance(d, str) and is_invented(d) else d for d in dims] if dims is not None else None


def _set(value: onnx.ValueInfoProto, dims: Dims) -> bool:
    """Complete extents that are unknown so far."""
    before = _dims(value)
    if before is None or len(before) != len(dims):
        return False
    changed = False
    for dim, old, new in zip(value.type.tensor_type.shape.dim, before, dims, strict=True):
        if old is not None or new is None:
            continue
        changed = True
        if isinstance(new, int):
            dim.dim_value = new
        else:
            dim.dim_param = new
    return changed


def forget_invented(graph: onnx.GraphProto) -> None:
    """Make extents unknown again that bear a symbol of inference's own, which would outlive better knowledge."""
    for value in graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if is_invented(dim.dim_param):
                dim.Clear()

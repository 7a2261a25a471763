"""What a model does with its inputs, so that they can be drawn: an index below its table's extent, a mask, a choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import inliner, numpy_helper, shape_inference

from onnxshrink.errors import InputError
from onnxshrink.protos import extents_of

Array = npt.NDArray[Any]
Size = int | str
Kind = Literal["plain", "positive", "mask", "index", "choice"]

# Larger constants are weights: only their shape matters here.
_SMALL = 1024

# Operators whose output only holds (some of the) elements of these operands, perhaps cast, repeated or moved.
_DATA_OPERANDS: dict[str, tuple[int, ...]] = {
    "Concat": tuple(range(64)), "Where": (1, 2), "Cast": (0,), "CastLike": (0,), "Reshape": (0,), "Unsqueeze": (0,),
    "Squeeze": (0,), "Identity": (0,), "Transpose": (0,), "Flatten": (0,), "Expand": (0,), "Slice": (0,), "Tile": (0,),
    "Split": (0,), "Pad": (0,), "Clip": (0,), "Dropout": (0,), "Gather": (0,), "GatherElements": (0,), "GatherND": (0,),
}  # fmt: skip

# (operator, operand) -> (operand that is indexed, its axis as an attribute name with a default, or a fixed axis).
_INDEXES: dict[tuple[str, int], tuple[int, tuple[str, int] | int]] = {
    ("Gather", 1): (0, ("axis", 0)),
    ("GatherElements", 1): (0, ("axis", 0)),
    ("GatherBlockQuantized", 1): (0, ("gather_axis", 0)),
    ("GatherND", 1): (0, ("batch_dims", 0)),
    ("Scatter", 1): (0, ("axis", 0)),
    ("ScatterElements", 1): (0, ("axis", 0)),
    ("ScatterND", 1): (0, 0),
    ("ArrayFeatureExtractor", 1): (0, -1),
    ("EmbedLayerNormalization", 0): (2, 0),
    ("EmbedLayerNormalization", 1): (4, 0),
}


@dataclass(frozen=True)
class Input:
    """One graph input and how to draw it: `index` below `bound`, `choice` among `values`, and so on."""

    name: str
    element: int
    dims: tuple[Size, ...] | None
    kind: Kind = "plain"
    bound: Size = 0
    values: tuple[int, ...] = ()
    wrapper: str = ""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type to feed; bfloat16, which numpy lacks, is fed as float32 and rounded at the runtime's door."""
        if self.element == onnx.TensorProto.BFLOAT16:
            return np.dtype(np.float32)
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.element))


def describe(model: onnx.ModelProto) -> list[Input]:
    """The inputs that a caller must feed (initializers that are also inputs have their value already).

    The data of large initializers is not read and may be missing.
    """
    reader = _Reader(_with_shapes(model))
    return [reader.input(value) for value in fed(model.graph)]


def fed(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs that have no default value."""
    defaults = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return [value for value in graph.input if value.name not in defaults]


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        flat = inliner.inline_local_functions(model) if model.functions else model
        return shape_inference.infer_shapes(flat, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError):
        # A table whose extent stays unknown is met by smaller and smaller indices later.
        return model


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _dims(kind: onnx.TypeProto.Tensor, name: str) -> tuple[Size, ...] | None:
    """Extents; a free dimension (or a negative extent) is its symbol, or a name of its own where it has none."""
    dims = extents_of(kind)
    return None if dims is None else tuple(f"{name}#{a}" if dim is None else dim for a, dim in enumerate(dims))


class _Reader:
    """Follows each input through the graph to where its values matter."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.constants: dict[str, Array] = {}
        self.shapes: dict[str, tuple[Size, ...] | None] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.HasField("tensor_type"):
                self.shapes[value.name] = _dims(value.type.tensor_type, value.name)
        for tensor in graph.initializer:
            self._constant(tensor.name, tensor)
        for node in _nodes(graph):
            if node.op_type == "Constant":
                self._constant(node.output[0], _attribute(node, "value", None))
            for operand, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, operand))

    def _constant(self, name: str, tensor: onnx.TensorProto | None) -> None:
        if tensor is None:  # a constant that is not a tensor is no table
            return
        self.shapes[name] = tuple(tensor.dims)
        # A stripped weight has fewer bytes than elements and is never a small constant.
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            self.constants[name] = numpy_helper.to_array(tensor)

    def input(self, value: onnx.ValueInfoProto) -> Input:
        kind, wrapper = value.type, ""
        while (which := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
            kind, wrapper = getattr(kind, str(which)).elem_type, wrapper or str(which).removesuffix("_type")
        if which != "tensor_type":
            raise InputError(f"input '{value.name}' is a {which}: only tensors and sequences of tensors can be drawn")
        dims = _dims(kind.tensor_type, value.name)
        return self._role(Input(value.name, kind.tensor_type.elem_type, dims, wrapper=wrapper))

    def _role(self, item: Input) -> Input:
        bounds: list[Size] = []
        values: list[int] = []
        positive = False
        for node, operand, offset in self._destinations(item.name):
            bounds += self._bound(node, operand, offset)
            if node.op_type == "Equal" and item.dtype.kind in "iu":
                values += self.constants.get(node.input[1 - operand], np.empty(0, int)).ravel().tolist()
            positive |= node.op_type in ("Log", "Sqrt")
        if bounds:
            return replace(item, kind="index", bound=min((b for b in bounds if isinstance(b, int)), default=bounds[0]))
        if "mask" in item.name.lower() and item.dtype.kind in "iubf":
            return replace(item, kind="mask")
        if values:
            return replace(item, kind="choice", values=tuple(values))
        return replace(item, kind="positive") if positive and item.dtype.kind == "f" else item

    def _destinations(self, name: str) -> Iterator[tuple[onnx.NodeProto, int, int]]:
        """Every node that the input's elements reach unchanged but for an added constant: (node, operand, constant)."""
        queue, seen = [(name, 0)], {name}
        while queue:
            current, offset = queue.pop()
            for node, operand in self.readers.get(current, ()):
                yield node, operand, offset
                step = self._step(node, operand)
                for output in node.output if step is not None else ():
                    if output and output not in seen:
                        seen.add(output)
                        queue.append((output, offset + (step or 0)))

    def _step(self, node: onnx.NodeProto, operand: int) -> int | None:
        """What the node adds to the elements that it passes on; None where it does something else to them."""
        if operand in _DATA_OPERANDS.get(node.op_type, ()):
            return 0
        if node.op_type == "Add":
            other = self.constants.get(node.input[1 - operand])
            if other is not None and other.size and other.dtype.kind in "iu":
                return int(other.max())
        return None

    def _bound(self, node: onnx.NodeProto, operand: int, offset: int) -> list[Size]:
        """The extent that the node indexes with this operand, if it does and the extent is known."""
        if node.op_type == "OneHot" and operand == 0:
            depth = self.constants.get(node.input[1])
            return [] if depth is None else [int(depth.ravel()[0]) - offset]
        if (node.op_type, operand) not in _INDEXES:
            return []
        table, axis = _INDEXES[node.op_type, operand]
        dims = self.shapes.get(node.input[table])
        where = axis if isinstance(axis, int) else int(_attribute(node, *axis))
        if not dims:
            return []
        # An index tuple walks several axes: the smallest is safe for all.
        extents = dims[where:] if node.op_type in ("GatherND", "ScatterND") else [dims[where]]
        return [d - offset if isinstance(d, int) else d for d in extents]

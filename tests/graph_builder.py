"""Builds random valid models, one small operator at a time; every decision comes from a `Chooser`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

Array = np.ndarray[Any, Any]
Dim = int | str | None
T = TypeVar("T")

# No tensor grows beyond this, so that a graph runs in microseconds.
LARGEST_TENSOR = 4096
MOST_CHANNELS = 24
IR_VERSION = 8
# What onnxruntime does not compute in double precision.
SINGLE_ONLY = """
    Conv ConvTranspose GlobalLpPool GlobalAveragePool GlobalMaxPool AveragePool LpPool Elu ThresholdedRelu LeakyRelu
    Selu Softplus HardSigmoid HardSwish Mish Gelu Mean LRN MeanVarianceNormalization InstanceNormalization PRelu Erf
    Atan Asinh Softsign Celu Resize GroupNormalization Shrink
"""


class Chooser(Protocol):
    """Where decisions come from: hypothesis, or a generator of random numbers."""

    def integer(self, low: int, high: int) -> int:
        """A number, both ends included."""
        ...


class RandomChooser:
    """Decisions from numpy: fast, and reproducible from a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))


class Rejected(Exception):  # noqa: N818 - a signal, not an error
    """A step that does not fit the graph so far."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph being built: its extents in the sample run, and as the model declares them."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    element: int = onnx.TensorProto.FLOAT

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def fixed(self, axis: int) -> bool:
        """Whether the model declares this extent as a number."""
        return isinstance(self.dims[axis], int)

    def all_fixed(self, axes: Iterable[int] | None = None) -> bool:
        return all(self.fixed(axis) for axis in (range(self.rank) if axes is None else axes))


class Builder:
    """The graph so far."""

    def __init__(self, chooser: Chooser, dtype: type[Any], opset: int) -> None:
        self.chooser = chooser
        self.dtype = np.dtype(dtype)
        self.element = int(helper.np_dtype_to_tensor_dtype(self.dtype))
        self.opset = opset
        self.rng = np.random.default_rng(chooser.integer(0, 2**31 - 1))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self.used: set[str] = set()
        self.arrays: dict[str, Array] = {}
        self.declared: dict[str, Array] = {}
        self._count = 0

    # --- decisions ----------------------------------------------------------------------------------------------

    def integer(self, low: int, high: int) -> int:
        return self.chooser.integer(low, high)

    def chance(self, percent: int) -> bool:
        """True with this probability; False is the simpler choice."""
        return self.chooser.integer(0, 99) >= 100 - percent

    def choice(self, options: Sequence[T]) -> T:
        if not options:
            raise Rejected
        return options[self.chooser.integer(0, len(options) - 1)]

    def integers(self, count: int, low: int, high: int) -> list[int]:
        return [self.chooser.integer(low, high) for _ in range(count)]

    def pick(self, fits: Callable[[Tensor], bool]) -> Tensor:
        """A tensor made before; a recent one more often."""
        found = [tensor for tensor in self.tensors if fits(tensor)]
        if not found:
            raise Rejected
        fresh = [tensor for tensor in found if tensor.name not in self.used]
        if fresh and self.chance(75):
            return fresh[-1]
        return self.choice(found[::-1])

    # --- values -------------------------------------------------------------------------------------------------

    def values(self, shape: Sequence[int], scale: float = 1.0) -> Array:
        """Random weights without zeros."""
        return np.asarray(self.rng.standard_normal(tuple(shape)) * scale + 0.01)

    def deaden(self, array: Array, axis: int, percent: int = 60, value: float = 0.0) -> Array:
        """Set random slices along one axis to zero (perhaps none, perhaps all but one, seldom all)."""
        if not self.chance(percent):
            return array
        extent = array.shape[axis]
        dead = self.rng.random(extent) < self.choice([0.3, 0.5, 0.8])
        if dead.all() and not self.chance(10):
            dead[int(self.rng.integers(extent))] = False
        array = np.moveaxis(array.copy(), axis, 0)
        array[dead] = value
        return np.moveaxis(array, 0, axis)

    def constant(self, array: Array, wish: str = "w") -> str:
        """A weight of the model's type, as an initializer or a `Constant` node; integers stay integers."""
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        name = self._name(wish)
        proto = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        if self.chance(10):
            self.nodes.append(helper.make_node("Constant", [], [name], value=proto))
        else:
            self.weights.append(proto)
        self.arrays[name] = array
        return name

    def integers_constant(self, values: Iterable[int]) -> str:
        return self.constant(np.array(list(values), np.int64), "i")

    def _name(self, wish: str) -> str:
        self._count += 1
        return f"{wish}{self._count}"

    # --- nodes --------------------------------------------------------------------------------------------------

    def input(self, shape: Sequence[int], dims: Sequence[Dim]) -> Tensor:
        tensor = Tensor(self._name("x"), tuple(shape), tuple(dims), self.element)
        self.inputs.append(tensor)
        self.tensors.append(tensor)
        return tensor

    def node(
        self, op: str, inputs: Sequence[Tensor | str | None], count: int = 1, keep: bool = True, **attributes: Any
    ) -> list[Tensor]:
        """Append a node; shapes come from onnx. Raises Rejected when the operator does not take these inputs."""
        names = [t.name if isinstance(t, Tensor) else t or "" for t in inputs]
        if self.dtype == np.float64 and op in SINGLE_ONLY.split():
            raise Rejected
        outputs = [self._name("t") for _ in range(count)]
        given = {name: value for name, value in attributes.items() if value is not None}
        proto = helper.make_node(op, names, outputs, name=f"{op}_{outputs[0]}", **given)
        operands = [t for t in inputs if isinstance(t, Tensor) and t.name not in self.arrays]
        values = self._infer(proto, operands, symbolic=False)
        symbols = self._infer(proto, operands, symbolic=True)
        made = [_made(value, symbol) for value, symbol in zip(values, symbols, strict=True)]
        self.nodes.append(proto)
        self.used.update(names)
        if keep:
            self.tensors += [t for t in made if t.element == self.element]
        return made

    def one(self, op: str, inputs: Sequence[Tensor | str | None], keep: bool = True, **attributes: Any) -> Tensor:
        """A node with one output."""
        return self.node(op, inputs, keep=keep, **attributes)[0]

    def _infer(self, node: onnx.NodeProto, operands: list[Tensor], symbolic: bool) -> list[onnx.ValueInfoProto]:
        values = [_value_info(t, symbolic) for t in {t.name: t for t in operands}.values()]
        arrays = {**self.arrays, **(self.declared if symbolic else {})}
        constants = [numpy_helper.from_array(arrays[n], n) for n in dict.fromkeys(node.input) if n in arrays]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
        graph = helper.make_graph([node], "one", values, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSION)
        try:
            inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        except shape_inference.InferenceError:
            raise Rejected from None
        return list(inferred.graph.output)

    def mark(self) -> tuple[int, ...]:
        """The state before a step, for `rewind`."""
        return len(self.nodes), len(self.weights), len(self.tensors)

    def rewind(self, mark: tuple[int, ...]) -> None:
        """Take back what a rejected step has added."""
        nodes, weights, tensors = mark
        del self.nodes[nodes:], self.weights[weights:], self.tensors[tensors:]
        read = {name for node in self.nodes for name in node.input}
        self.used &= read

    # --- the model ----------------------------------------------------------------------------------------------

    def model(self, outputs: Sequence[Tensor]) -> onnx.ModelProto:
        interface = [[_value_info(t, symbolic=True) for t in side] for side in (self.inputs, outputs)]
        graph = helper.make_graph(self.nodes, "random", *interface, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSION)


def _value_info(tensor: Tensor, symbolic: bool) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.element, list(tensor.dims if symbolic else tensor.shape))


def _made(value: onnx.ValueInfoProto, symbol: onnx.ValueInfoProto) -> Tensor:
    shape, dims = _dims_of(value), _dims_of(symbol)
    if shape is None or dims is None or len(shape) > 6:
        raise Rejected
    extents = tuple(extent for extent in shape if isinstance(extent, int))
    if len(extents) != len(shape) or min(extents, default=1) < 1 or np.prod(extents, dtype=np.int64) > LARGEST_TENSOR:
        raise Rejected
    return Tensor(value.name, extents, dims, value.type.tensor_type.elem_type)


def _dims_of(value: onnx.ValueInfoProto) -> tuple[Dim, ...] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    )


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]

"""How large a model is: parameters, bytes, nodes, multiply-adds. The same rules before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx

from onnxshrink.flatten import subgraphs
from onnxshrink.graph import Graph, Shape, constant_tensor

_T = onnx.TensorProto
# Shapes, axes and conditions: constants of the graph, not weights that it learnt.
_STRUCTURE = frozenset({_T.INT64, _T.BOOL, _T.STRING})
_INTEGER = frozenset(
    {_T.INT4, _T.UINT4, _T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.INT32, _T.UINT32, _T.UINT64, _T.INT64}
)


@dataclass(frozen=True)
class Size:
    """Size of a model.

    Attributes:
        parameters: elements of floating-point initializers and `Constant` nodes.
        bytes: of the model as it is stored, with external data.
        multiply_adds: of convolutions, matrix products and recurrent layers for one inference, free dimensions as 1.
        nodes: operators in the graph and its subgraphs, without `Constant`.
    """

    parameters: int
    bytes: int
    multiply_adds: int
    nodes: int


@dataclass(frozen=True)
class Weights:
    """What the constants of a model add up to: floating-point elements, and bytes of all that are not structure."""

    parameters: int
    bytes: int


def tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """Every initializer and `Constant` value of a graph and its subgraphs; of sparse ones the values."""
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
        yield from (sparse.values for sparse in graph.sparse_initializer)
    for node in graph.node:
        value = constant_tensor(node)
        if value is not None:
            yield value
        for inner in subgraphs(node):
            yield from tensors(inner)


def weights(model: onnx.ModelProto) -> Weights:
    """Parameters and their bytes."""
    parameters = nbytes = 0
    for body in (model.graph, *model.functions):
        for tensor in tensors(body):
            if tensor.data_type in _STRUCTURE:
                continue
            elements = math.prod(tensor.dims)
            nbytes += elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            if tensor.data_type not in _INTEGER:
                parameters += elements
    return Weights(parameters, nbytes)


def parameters(model: onnx.ModelProto) -> int:
    """Elements of floating-point initializers and `Constant` nodes, subgraphs included."""
    return weights(model).parameters


def count_nodes(graph: onnx.GraphProto) -> int:
    """Operators of a graph and its subgraphs, without `Constant`."""
    own: int = sum(node.op_type != "Constant" for node in graph.node)
    return own + sum(count_nodes(inner) for node in graph.node for inner in subgraphs(node))


# --- multiply-adds -------------------------------------------------------------------------------------------------

Extents = list[tuple[int, ...]]


def _convolution(kernel: int) -> Callable[[Extents, Extents], int]:
    def count(inputs: Extents, outputs: Extents) -> int:
        return _elements(outputs[0]) * _elements(inputs[kernel][1:])

    return count


def _transposed(inputs: Extents, outputs: Extents) -> int:
    return _elements(inputs[0]) * _elements(inputs[1][1:])


def _product(data: int) -> Callable[[Extents, Extents], int]:
    def count(inputs: Extents, outputs: Extents) -> int:
        depth = inputs[data][-1] if inputs[data] else 1
        return _elements(outputs[0]) * depth

    return count


def _gemm(inputs: Extents, outputs: Extents) -> int:
    rows, columns = outputs[0]
    return rows * columns * (_elements(inputs[0]) // max(rows, 1))


def _recurrent(inputs: Extents, outputs: Extents) -> int:
    sequence, batch, _ = inputs[0]
    return sequence * batch * (_elements(inputs[1]) + _elements(inputs[2]))


_COUNTS: dict[str, Callable[[Extents, Extents], int]] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _product(0),
    "MatMulInteger": _product(0),
    "QLinearMatMul": _product(0),
    "RNN": _recurrent,
    "GRU": _recurrent,
    "LSTM": _recurrent,
}


def _elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def multiply_adds(graph: Graph) -> tuple[int, bool]:
    """Multiply-adds of one inference, and whether every extent that they depend on is fixed; free ones count as 1."""
    total, fixed = 0, True
    for node in graph.nodes:
        if node.op in _COUNTS and not node.domain:
            operands = [graph.shape(name) for name in (*node.inputs, *node.outputs) if name]
            fixed &= all(_is_fixed(shape) for shape in operands)
            try:
                total += _COUNTS[node.op](_extents(graph, node.inputs), _extents(graph, node.outputs))
            except (IndexError, ValueError):  # a rank that is not known
                fixed = False
    return total, fixed


def _is_fixed(shape: Shape | None) -> bool:
    return shape is not None and all(isinstance(extent, int) for extent in shape)


def _extents(graph: Graph, names: tuple[str, ...]) -> Extents:
    shapes = [graph.shape(name) if name else None for name in names]
    return [tuple(e if isinstance(e, int) else 1 for e in shape or ()) for shape in shapes]

"""Numbers too small for full precision, on which some processors are up to a hundred times slower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxshrink.graph import load_proto
from onnxshrink.inputs import Feed, RunError
from onnxshrink.measure import tensors
from onnxshrink.runtime import Model, Session
from onnxshrink.weights import read_tensor

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)  # those that processors compute with
_LOOKED_AT = 256  # tensors: in a larger network, so many of them, evenly spread
_CHUNK = 64  # tensors that one run exposes


@dataclass(frozen=True)
class Denormals:
    """How many denormal numbers a model has.

    Attributes:
        weights: in its weights.
        activations: in what its nodes compute from the inputs of the comparison.
        looked_at: tensors that nodes compute, among which those were counted.
    """

    weights: int
    activations: int
    looked_at: int

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.weights or self.activations)


def count_denormals(path: str, model: Model, feed: Feed) -> Denormals:
    """Denormal numbers of a model in a file, run on `feed`; in a process that does not flush them."""
    names = _computed(model.light.graph)
    found = [count for start in range(0, len(names), _CHUNK) for count in _exposed(model, names[start:][:_CHUNK], feed)]
    return Denormals(_in_weights(path), sum(found), len(found))


def _count(array: Any) -> int:
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
        return 0
    return int(np.count_nonzero((np.abs(array) < np.finfo(array.dtype).tiny) & (array != 0)))


def _in_weights(path: str) -> int:
    model, folder = load_proto(Path(path))
    bodies = (model.graph, *model.functions)
    floats = (tensor for body in bodies for tensor in tensors(body) if tensor.data_type in _TYPES)
    return sum(_count(read_tensor(tensor, folder)) for tensor in floats)


def _computed(graph: onnx.GraphProto) -> list[str]:
    """Tensors that nodes compute, in order; of many, some of each part of the network."""
    names = [name for node in graph.node if node.op_type != "Constant" for name in node.output if name]
    chosen = np.linspace(0, len(names) - 1, min(len(names), _LOOKED_AT)).round().astype(int)
    return [names[index] for index in chosen]


def _exposed(model: Model, names: Sequence[str], feed: Feed) -> Iterator[int]:
    """Per tensor, how many denormal numbers it holds; tensors that cannot be an output are left out."""
    outputs = {value.name for value in model.light.graph.output}
    try:
        session = Session(model, exposed=[name for name in names if name not in outputs])
        values = dict(zip(session.names, session.run(feed), strict=True))
    except RunError:
        middle = len(names) // 2
        if middle:
            yield from _exposed(model, names[:middle], feed)
            yield from _exposed(model, names[middle:], feed)
        return
    yield from (_count(values[name]) for name in names)

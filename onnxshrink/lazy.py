"""Models without the data of their larger weights, which are read one at a time, when they are written or asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from onnxshrink.protos import copy_fields, split_at
from onnxshrink.weights import WHOLE_BYTES, Values, stored

LARGEST = 2**31 - 2**24  # bytes of weights in one message: protobuf serialises less than 2 GB
# Smaller tensors hold their data: whoever reads a model without its weights still wants their values.
_EAGER_ELEMENTS = 1024
_TYPED = frozenset({"float_data", "int32_data", "int64_data", "double_data", "uint64_data"})
FIELDS_OF_DATA = _TYPED | {"raw_data", "external_data", "data_location"}


@dataclass(frozen=True, eq=False)
class LazyModel:
    """A model whose larger weights are read when they are asked for.

    Attributes:
        proto: the model. Initializers that `values` names have a name, a shape and a type, but no data; none of the
            others lies in a file of its own.
        values: elements of initializers of the main graph, by name.
    """

    proto: onnx.ModelProto
    values: dict[str, Values] = field(default_factory=dict)

    @classmethod
    def of(cls, model: onnx.ModelProto, folder: Path | None = None) -> LazyModel:
        """The same model, which is not changed. Raises InputError where external data in `folder` is unusable."""
        lazy = cls(onnx.ModelProto())
        copy_fields(model, lazy.proto, frozenset({"graph"}))
        copy_fields(model.graph, lazy.proto.graph, frozenset({"initializer"}))
        for tensor in model.graph.initializer:
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            lazy.add_again(tensor, stored(tensor, folder) if external else None)
        return lazy

    def add_again(self, tensor: onnx.TensorProto, values: Values | None = None, name: str = "") -> None:
        """Append an initializer of another model, under its own or another name; it holds its data, or `values` do."""
        target = self.proto.graph.initializer.add()
        if values is None and (not tensor.HasField("raw_data") or _is_eager(tensor)):
            target.CopyFrom(tensor)
            target.name = name or tensor.name
            return
        copy_fields(tensor, target, FIELDS_OF_DATA)
        target.name = name or tensor.name
        self._fill(target, values or stored(tensor, None))

    def add(self, name: str, values: Values) -> None:
        """Append an initializer."""
        target = self.proto.graph.initializer.add()
        target.name = name
        target.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        target.dims.extend(values.shape)
        self._fill(target, values)

    def _fill(self, target: onnx.TensorProto, values: Values) -> None:
        if _is_eager(target):
            made = onnx.numpy_helper.from_array(np.asarray(values.array(), order="C"))
            copy_fields(made, target, frozenset({"name", "dims", "data_type"}))
        else:
            self.values[target.name] = values

    def load(self) -> None:
        """Read all weights, and keep them."""
        for name, values in self.values.items():
            self.values[name] = Values.of(np.asarray(values.array(), order="C"))

    def whole(self) -> onnx.ModelProto:
        """The model with all its weights."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        for tensor in model.graph.initializer:
            if tensor.name in self.values:
                tensor.raw_data = b"".join(data_blocks(self.values[tensor.name]))
        return model

    # --- as bytes ---------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The bytes of the whole model, as protobuf writes them; no more than one weight is in memory at a time."""
        before, after = split_at(self.proto, "graph")
        yield before.SerializeToString()
        yield from self._graph_pieces()
        yield after.SerializeToString()

    def nbytes(self) -> int:
        """How many bytes `pieces` gives; no weight is read for this."""
        bare: int = self.proto.ByteSize()
        graph: int = self.proto.graph.ByteSize()
        full = graph
        for tensor in self.proto.graph.initializer:
            if tensor.name in self.values:
                small, data = tensor.ByteSize(), self.values[tensor.name].nbytes
                large = small + _prefixed(data)
                full += _prefixed(large) - _prefixed(small)
        return bare + _prefixed(full) - _prefixed(graph)

    def _graph_pieces(self) -> Iterator[bytes | memoryview]:
        before, after = (part.SerializeToString() for part in split_at(self.proto.graph, "initializer"))
        ends = [self._ends(tensor) for tensor in self.proto.graph.initializer]
        data = [self.values.get(tensor.name) for tensor in self.proto.graph.initializer]
        sizes = [sum(map(len, end)) + (d.nbytes if d is not None else 0) for end, d in zip(ends, data, strict=True)]
        yield _head(onnx.ModelProto, "graph", len(before) + sum(_prefixed(size) for size in sizes) + len(after))
        yield before
        for (start, stop), values, size in zip(ends, data, sizes, strict=True):
            yield _head(onnx.GraphProto, "initializer", size) + start
            if values is not None:
                yield from data_blocks(values)
            yield stop
        yield after

    def _ends(self, tensor: onnx.TensorProto) -> tuple[bytes, bytes]:
        """What comes before and after the data of a tensor."""
        if tensor.name not in self.values:
            return tensor.SerializeToString(), b""
        before, after = (part.SerializeToString() for part in split_at(tensor, "raw_data"))
        return before + _head(onnx.TensorProto, "raw_data", self.values[tensor.name].nbytes), after


def _is_eager(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type not in WHOLE_BYTES or int(np.prod(tensor.dims, dtype=np.int64)) <= _EAGER_ELEMENTS


def data_blocks(values: Values) -> Iterator[memoryview]:
    """The elements of a weight as bytes, in pieces."""
    for block in values.blocks():
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first; the top bit tells that more follow."""
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    return bytes((*result, number))


def _prefixed(size: int) -> int:
    """Bytes of a field with so many bytes of content and a number below 16."""
    return 1 + len(_varint(size)) + size


def _head(kind: type[onnx.ModelProto | onnx.GraphProto | onnx.TensorProto], name: str, size: int) -> bytes:
    """What stands before the content of a field that has a length: its number and wire type, and the length."""
    number: int = kind.DESCRIPTOR.fields_by_name[name].number
    return _varint(number << 3 | 2) + _varint(size)

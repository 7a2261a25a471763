"""Reading models from files: whole or refused, and without the data of weights that lie in files of their own."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxshrink.errors import InputError
from onnxshrink.flatten import subgraphs
from onnxshrink.lazy import LazyModel
from onnxshrink.weights import WHOLE_BYTES, read_tensor, tensor_dtype

# A path, a model with all its weights, or one whose weights are read when they are asked for.
ModelLike = str | os.PathLike[str] | onnx.ModelProto | LazyModel


def read_model(model: ModelLike) -> tuple[LazyModel, frozenset[Path]]:
    """A model from a file, or as it is, and the files that it lies in, links resolved.

    Raises InputError where the file, or one with its weights, cannot be used.
    """
    if isinstance(model, LazyModel):
        return model, frozenset()
    if isinstance(model, onnx.ModelProto):
        _check_storage(model, None)
        return LazyModel(model), frozenset()
    path = Path(model)
    proto, _ = load_proto(path)
    _check_storage(proto, path.parent)
    data = data_files(proto, path.parent)
    lazy = LazyModel.of(proto, path.parent) if data else LazyModel(proto)
    return lazy, frozenset({Path(os.path.realpath(path)), *data})


def data_files(model: onnx.ModelProto, folder: Path) -> set[Path]:
    """The files outside the model that its initializers lie in."""
    locations = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return {Path(os.path.realpath(folder / location)) for location in locations}


def load_proto(path: Path) -> tuple[onnx.ModelProto, Path]:
    """The model without the external data of its initializers, and the folder of the file. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise InputError(f"{path}: not an ONNX file, or truncated") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not proto.HasField("graph"):
        raise InputError(f"{path}: not an ONNX file: it holds no graph")
    _read_in(proto, path.parent)
    return proto, path.parent


def _check_storage(model: onnx.ModelProto, folder: Path | None) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if folder is None:
                raise InputError(f"{tensor.name!r} has external data that is not loaded; give the model as a file")
        elif tensor.HasField("raw_data") and not _is_complete(tensor):
            try:
                onnx.checker.check_tensor(tensor)
            except onnx.checker.ValidationError as error:
                raise InputError(f"invalid model: initializer {tensor.name!r}: {first_line(error)}") from None


def _is_complete(tensor: onnx.TensorProto) -> bool:
    """Whether as many bytes are there as the shape asks for; types of less than a byte are left to the checker."""
    if tensor.data_type not in WHOLE_BYTES:
        return False
    count: int = math.prod(tensor.dims)
    return len(tensor.raw_data) == count * tensor_dtype(tensor).itemsize


def _read_in(model: onnx.ModelProto, folder: Path) -> None:
    """Read in external tensors other than initializers of the main graph: of `Constant` nodes and of bodies."""
    bodies: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while bodies:
        body = bodies.pop()
        tensors = [] if body is model.graph or isinstance(body, onnx.FunctionProto) else list(body.initializer)
        for node in body.node:
            tensors += [attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR]
            bodies += subgraphs(node)
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                array = np.asarray(read_tensor(tensor, folder), order="C")
                name = tensor.name
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def first_line(error: Exception) -> str:
    """The first line of a message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""onnxruntime: models as it can load them, sessions that are silent and repeatable.

The runtime itself is imported when the first session is made: not every command needs one.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from onnxshrink.errors import InputError
from onnxshrink.inputs import Feed, RunError
from onnxshrink.lazy import LARGEST, LazyModel
from onnxshrink.protos import copy_fields
from onnxshrink.reading import ModelLike, read_model
from onnxshrink.roles import Array
from onnxshrink.save import weight_bytes, write_model

_SMALL = 1024  # elements; larger initializers are weights, and only their shape matters for drawing inputs


@cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    """What the runtime raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (found for found in vars(state).values() if isinstance(found, type) and issubclass(found, Exception))
    return (*own, RuntimeError, ValueError, MemoryError, OSError, EncodeError)


class Model:
    """A model as onnxruntime can load it, and its graph without the weights' data."""

    def __init__(self, source: ModelLike, label: str, folder: Path) -> None:
        self.label = label
        self.path: Path | None = None
        self._model: LazyModel | None = None
        if isinstance(source, onnx.ModelProto):
            self._model = LazyModel(source)
            full = source
        elif isinstance(source, LazyModel):
            self._model = source
            full = source.proto
        else:
            self.path = Path(source)
            full = _read(source, label)
        self.light = _skeleton(full)
        self.single = any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in full.graph.initializer)
        self.nbytes = weight_bytes(full)
        self._folder = folder

    def lazy(self) -> LazyModel:
        """The model with its weights left where they are. Raises InputError."""
        if self._model is not None:
            return self._model
        assert self.path is not None
        return read_model(self.path)[0]

    def load(self, options: Any, exposed: Sequence[str]) -> Any:
        """An onnxruntime session whose outputs also are the tensors named in `exposed`."""
        if self.nbytes > LARGEST:
            self.on_disk()
        source: Any = str(self.path) if self._model is None else b"".join(self._model.pieces())
        if exposed and self.path is not None:
            source = self.path.read_bytes()
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent.resolve())
            )
        if exposed:  # protobuf messages merge when their bytes are joined: no copy of the weights is edited
            extra = onnx.ModelProto()
            extra.graph.output.extend(onnx.ValueInfoProto(name=name) for name in exposed)
            source += extra.SerializeToString()
        import onnxruntime

        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def on_disk(self) -> Path:
        """The file that the model lies in, which is written if need be."""
        if self._model is not None:
            self._folder.mkdir()
            self.path = self._folder / "model.onnx"
            write_model(self._model, self.path)
            self._model = None
        assert self.path is not None
        return self.path


class Loadable(Protocol):
    """What a session can be made of."""

    def load(self, options: Any, exposed: Sequence[str]) -> Any:
        """An onnxruntime session whose outputs also are the tensors named in `exposed`."""


class Session:
    """A silent onnxruntime session, single-threaded (so repeatable) unless told otherwise; raises RunError.

    Args:
        model: the model.
        optimised: with graph optimisations.
        exposed: tensors that are outputs besides those of the model.
        threads: how many threads an operator may use.
        entries: further configuration of the session, by onnxruntime's keys.
        profile: beginning of the name of a file to note each operator's time in; see `end_profile`.
    """

    def __init__(
        self,
        model: Loadable,
        optimised: bool = True,
        exposed: Sequence[str] = (),
        *,
        threads: int = 1,
        entries: Mapping[str, str] = MappingProxyType({}),
        profile: Path | None = None,
    ) -> None:
        import onnxruntime

        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        try:
            self._session = model.load(options, exposed)
        except _runtime_errors() as error:
            raise RunError(_first_line(error)) from error
        self.names: list[str] = [output.name for output in self._session.get_outputs()]
        self.types: list[str] = [output.type for output in self._session.get_outputs()]
        self._halves = {i.name for i in self._session.get_inputs() if i.type == "tensor(bfloat16)"}
        self._by_value = bool(self._halves) or "tensor(bfloat16)" in self.types

    def run_all(self, feeds: Iterable[Feed]) -> list[list[Any]]:
        """The outputs on some sets of inputs."""
        return [self.run(feed) for feed in feeds]

    def run(self, feed: Feed) -> list[Any]:
        """The outputs on one set of inputs."""
        try:
            if not self._by_value:
                return list(self._session.run(None, feed))
            values = {name: _to_value(array, name in self._halves) for name, array in feed.items()}
            return [_from_value(value) for value in self._session.run_with_ort_values(None, values)]
        except _runtime_errors() as error:
            raise RunError(_first_line(error)) from error

    def prepare(self, feed: Feed) -> Callable[[], object]:
        """One run on these inputs, which need no conversion any more: what there is to time."""
        if not self._by_value:
            return lambda: self._session.run(None, feed)
        values = {name: _to_value(array, name in self._halves) for name, array in feed.items()}
        return lambda: self._session.run_with_ort_values(None, values)

    def end_profile(self) -> Path:
        """The file with each operator's time, complete."""
        return Path(self._session.end_profiling())


def _to_value(array: Array, half: bool) -> Any:
    """numpy has no bfloat16: it is the upper half of a float32."""
    from onnxruntime import OrtValue

    if not half:
        return OrtValue.ortvalue_from_numpy(array)
    bits = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)


def _from_value(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    shape = value.shape()
    bits = np.frombuffer(ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape))), np.uint16)
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32).reshape(shape))


def _first_line(error: Exception) -> str:
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip().partition("\n")[0])


class LoadError(InputError):
    """onnxruntime does not take a model; `label` says which one."""

    def __init__(self, message: str, label: str) -> None:
        super().__init__(message)
        self.label = label


def load_error(model: Model, error: RunError) -> LoadError:
    """What to raise where onnxruntime does not take a model."""
    # Advice for the reference alone: a candidate that does not load must not be written unverified.
    advice = "; where the runtime lacks an operator, use --no-verify" if model.label == "reference" else ""
    message = f"the {model.label} model does not load in onnxruntime ({error}){advice}"
    return LoadError(message, model.label)


def _read(path: str | os.PathLike[str], label: str) -> onnx.ModelProto:
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise InputError(f"the {label} model '{os.fspath(path)}' cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise InputError(f"the {label} model '{os.fspath(path)}' is not an ONNX file, or is cut short") from error


def _hollow(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without initializers."""
    copy = onnx.ModelProto()
    copy_fields(model, copy, frozenset({"graph"}))
    copy_fields(model.graph, copy.graph, frozenset({"initializer"}))
    return copy


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the data of large initializers: types, shapes, nodes and small constants."""
    copy = _hollow(model)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            copy.graph.initializer.append(tensor)
        else:
            copy.graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    return copy

"""Writing files: whole or not at all, beside their target and then in its place."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Set
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxshrink.errors import InputError
from onnxshrink.graph import copy_fields

LARGEST = 2**31 - 2**24  # bytes of weights in one file: protobuf serialises less than 2 GB
_INLINE = 1024  # smaller tensors stay in the model, as onnx does it
_PAGE = 4096  # the specification's advice for mapping


def check_target(path: str | os.PathLike[str], what: str) -> Path:
    """The path, if a file can be written there. Raises InputError; writes nothing."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise InputError(f"{what} {target}: is a folder, not a file name")
    if not folder.is_dir():
        raise InputError(f"{what} {target}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{what} {target}: the folder {folder} is not writable")
    if target.exists() and not target.is_file():
        raise InputError(f"{what} {target}: is not a regular file")
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` once it is complete and on disk.

    When anything goes wrong `path` is as it was. Raises InputError where the system refuses to write.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:150]}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can; the file itself is on disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(text: str, path: Path) -> None:
    """Write text, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_model(model: onnx.ModelProto, path: Path, *, external: bool = False, keep: Set[Path] = frozenset()) -> None:
    """Write a model, whole or not at all.

    Args:
        model: a model that holds all its weights; it is not changed.
        path: the file.
        external: put the weights in a file of their own, `NAME.data`; forced beyond 2 GB.
        keep: data files that are not to be removed, although the model that was at `path` refers to them.
    """
    path = Path(os.path.realpath(path))
    stale = _own_data(path) - keep
    if external or sum(_nbytes(tensor) for tensor in model.graph.initializer) > LARGEST:
        stale -= {_write_external(model, path)}
    else:
        with replacing(path) as file:
            file.write(model.SerializeToString())
    for data in stale:
        data.unlink(missing_ok=True)


def _nbytes(tensor: onnx.TensorProto) -> int:
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
    elements: int = math.prod(tensor.dims)
    return elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


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


def _own_data(path: Path) -> set[Path]:
    """Data files of the model that lies at `path` now, as far as their names say that they are its own."""
    own = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.data")
    if not path.is_file() or not any(own.fullmatch(name) for name in os.listdir(path.parent)):
        return set()
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError):
        return set()
    return {data for data in data_files(model, path.parent) if data.parent == path.parent and own.fullmatch(data.name)}


def _write_external(model: onnx.ModelProto, path: Path) -> Path:
    """Weights under a fresh name first, then the model: a reader finds the old pair or the new one."""
    data = path.with_name(f"{path.name}.data")
    if data.exists():
        data = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data")
    light = onnx.ModelProto()
    copy_fields(model, light, frozenset({"graph"}))
    copy_fields(model.graph, light.graph, frozenset({"initializer"}))
    try:
        with replacing(data) as file:
            for tensor in model.graph.initializer:
                _move(tensor, light.graph.initializer.add(), file, data.name)
        with replacing(path) as file:
            file.write(light.SerializeToString())
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    return data


def _move(tensor: onnx.TensorProto, light: onnx.TensorProto, file: BinaryIO, location: str) -> None:
    if _nbytes(tensor) < _INLINE:
        light.CopyFrom(tensor)
        return
    if not tensor.HasField("raw_data"):
        tensor = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
    copy_fields(tensor, light, frozenset({"raw_data"}))
    file.write(b"\0" * (-file.tell() % _PAGE))
    light.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location, "offset": file.tell(), "length": file.write(tensor.raw_data)}
    for key, value in entries.items():
        light.external_data.add(key=key, value=str(value))

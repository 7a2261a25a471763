"""Access to constant tensors: one at a time, never all at once, external data mapped rather than read."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxshrink.errors import InputError

Array = NDArray[Any]
BoolArray = NDArray[np.bool_]


def external_file(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int | None]:
    """The file, offset and length in bytes of a tensor stored outside the model.

    Raises InputError when the file is missing, too short, or not inside `folder`: a model file must not make
    the reader open arbitrary files.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    root = folder.resolve()
    path = (root / location).resolve()
    if not location or not path.is_relative_to(root):
        raise InputError(
            f"external data of {tensor.name!r} is at {location!r}, outside the model's folder {root}: refused"
        )
    if not path.is_file():
        raise InputError(f"external data of {tensor.name!r} is missing: {path} does not exist; put it beside the model")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else None
    except ValueError:
        raise InputError(f"external data of {tensor.name!r} has an offset or length that is no number") from None
    size = path.stat().st_size
    if offset < 0 or (length is not None and length < 0) or offset + (length or 0) > size:
        raise InputError(f"external data of {tensor.name!r} is truncated: {path} has {size} bytes")
    return path, offset, length


def tensor_dtype(tensor: onnx.TensorProto) -> np.dtype[Any]:
    """numpy's type for an ONNX tensor (`ml_dtypes` for those that numpy lacks)."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def read_tensor(tensor: onnx.TensorProto, folder: Path | None) -> Array:
    """The values of a tensor; a read-only view where the storage allows it."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    if folder is None:
        raise InputError(
            f"external data of {tensor.name!r} cannot be found: give the model as a file, not as an object"
        )
    path, offset, length = external_file(tensor, folder)
    dtype = tensor_dtype(tensor)
    count = math.prod(tensor.dims)
    if count == 0:
        return np.zeros(tuple(tensor.dims), dtype)
    if dtype.itemsize * count != (length if length is not None else dtype.itemsize * count):
        whole = onnx.TensorProto()
        whole.CopyFrom(tensor)
        onnx.external_data_helper.load_external_data_for_tensor(whole, str(folder))
        return onnx.numpy_helper.to_array(whole)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if offset + dtype.itemsize * count > len(mapped):
        raise InputError(f"external data of {tensor.name!r} is truncated: {path} has {len(mapped)} bytes")
    return np.frombuffer(mapped, dtype, count, offset).reshape(tuple(tensor.dims))


def same(array: Array) -> Array:
    """The array itself: how to read one that is there already."""
    return array


class Constant:
    """A constant tensor of the model: an initializer, the value of a `Constant` node, or computed from such.

    The array is read when asked for and not kept; what analysis asks again (which slices hold a non-zero) is kept.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[], Array]) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._read = read
        self._small: Array | None = None
        self._nonzero: dict[tuple[int, ...], BoolArray] = {}

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self.size * self.dtype.itemsize

    def array(self) -> Array:
        """All values, read-only."""
        if self._small is not None:
            return self._small
        array = self._read()
        if array.nbytes <= 1 << 16:
            self._small = array
        return array

    def nonzero(self, axes: tuple[int, ...]) -> BoolArray:
        """Where along `axes` (in order of the tensor) any element is not zero, reduced over the other axes."""
        if axes not in self._nonzero:
            finer = next((known for known in self._nonzero if set(axes) < set(known)), None)
            if finer is None:
                self._nonzero[axes] = any_nonzero(self.array(), axes)
            else:
                rest = tuple(position for position, axis in enumerate(finer) if axis not in axes)
                self._nonzero[axes] = any_along(self._nonzero[finer], rest)
        return self._nonzero[axes]


def any_along(mask: BoolArray, axes: int | tuple[int, ...], keepdims: bool = False) -> BoolArray:
    """`mask.any` over some axes, always an array."""
    return np.asarray(mask.any(axis=axes, keepdims=keepdims))


def all_along(mask: BoolArray, axes: int | tuple[int, ...], keepdims: bool = False) -> BoolArray:
    """`mask.all` over some axes, always an array."""
    return np.asarray(mask.all(axis=axes, keepdims=keepdims))


def any_nonzero(array: Array, axes: tuple[int, ...]) -> BoolArray:
    """`(array != 0)` reduced with `any` over every axis not in `axes`."""
    rest = tuple(axis for axis in range(array.ndim) if axis not in axes)
    return any_along(array != 0, rest)

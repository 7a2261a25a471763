"""Access to constant tensors: one at a time, never all at once, external data mapped rather than read."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxshrink.errors import InputError
from onnxshrink.pattern import Pattern, collect

Array = NDArray[Any]
BoolArray = NDArray[np.bool_]

_BLOCK = 1 << 22  # bytes of a file that are mapped at a time
_REAL_KINDS = "fV"  # V: those that numpy lacks, such as bfloat16
_SMALL = 1 << 16  # bytes; smaller constants are kept once they are read
_T = onnx.TensorProto
# Types whose elements fill whole bytes. Of the others the checker knows how many bytes there must be.
WHOLE_BYTES = frozenset({_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.BFLOAT16, _T.INT64, _T.INT32, _T.INT8, _T.UINT8})


class Values:
    """The elements of a tensor, read when they are asked for and not kept.

    Args:
        shape: extents.
        dtype: numpy's type.
        read: gives all elements.
        blocks: gives them in pieces along the first axis, in order; None: in one.
        place: where they lie as they are, in a file of their own.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        read: Callable[[], Array],
        blocks: Callable[[], Iterator[Array]] | None = None,
        place: Place | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.place = place
        self._read = read
        self._blocks = blocks

    @classmethod
    def of(cls, array: Array) -> Values:
        """Elements that are there already."""
        return cls(array.shape, array.dtype, partial(same, array))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self.size * self.dtype.itemsize

    def array(self) -> Array:
        """All elements, read-only."""
        return self._read()

    def blocks(self) -> Iterator[Array]:
        """The elements in pieces along the first axis; a large tensor in a file is never in memory as a whole."""
        return iter((self.array(),)) if self._blocks is None else self._blocks()

    def cut(self, kept: Sequence[BoolArray | None]) -> Values:
        """The elements at the indices that every axis keeps; None keeps all."""
        extents = zip(self.shape, kept, strict=True)
        shape = tuple(n if mask is None else int(np.count_nonzero(mask)) for n, mask in extents)
        return Values(shape, self.dtype, lambda: taken(self.array(), kept), lambda: self._cut_blocks(kept))

    def _cut_blocks(self, kept: Sequence[BoolArray | None]) -> Iterator[Array]:
        start = 0
        for block in self.blocks():
            rows = kept[0] if kept else None
            part = None if rows is None else rows[start : start + block.shape[0]]
            yield taken(block, [part, *kept[1:]] if kept else kept)
            start += block.shape[0] if block.ndim else 0


def taken(array: Array, kept: Sequence[BoolArray | None]) -> Array:
    """`array` with every axis cut to what is kept; a compressed axis stays as it is."""
    for axis, mask in enumerate(kept):
        if mask is not None and array.shape[axis] == mask.size and not mask.all():
            array = array.compress(mask, axis=axis)
    return array


# --- storage -------------------------------------------------------------------------------------------------------


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
    return dtype_of(tensor.data_type)


@cache
def dtype_of(code: int) -> np.dtype[Any]:
    """numpy's type for one that ONNX numbers."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code))


def stored(tensor: onnx.TensorProto, folder: Path | None) -> Values:
    """The values of a tensor of a model in `folder`. Raises InputError where the file of external data is unusable.

    A file that has changed since this was called is not read: its elements may be those of another tensor now.
    """
    shape, dtype = tuple(tensor.dims), tensor_dtype(tensor)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return Values(shape, dtype, lambda: onnx.numpy_helper.to_array(tensor))
    if folder is None:
        raise InputError(
            f"external data of {tensor.name!r} cannot be found: give the model as a file, not as an object"
        )
    path, offset, length = external_file(tensor, folder)
    if tensor.data_type not in WHOLE_BYTES or length not in (None, math.prod(shape) * dtype.itemsize):
        return Values(shape, dtype, lambda: _load_external(tensor, folder))
    if offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
        raise InputError(f"external data of {tensor.name!r} is truncated: {path} has {path.stat().st_size} bytes")
    place = Place(tensor.name, path, offset, shape, dtype, _stamp(path.stat()))
    return Values(shape, dtype, place.read, place.blocks, place)


def read_tensor(tensor: onnx.TensorProto, folder: Path | None) -> Array:
    """The values of a tensor; a read-only view where the storage allows it."""
    return stored(tensor, folder).array()


def _load_external(tensor: onnx.TensorProto, folder: Path) -> Array:
    whole = onnx.TensorProto()
    whole.CopyFrom(tensor)
    onnx.external_data_helper.load_external_data_for_tensor(whole, str(folder))
    return onnx.numpy_helper.to_array(whole)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Place:
    """Where the elements of a tensor lie in a file, and what tells that it is still the same file."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stamp: tuple[int, ...]

    def read(self) -> Array:
        return self._map(0, math.prod(self.shape)).reshape(self.shape)

    def blocks(self) -> Iterator[Array]:
        if not self.shape or math.prod(self.shape) * self.dtype.itemsize <= _BLOCK:
            yield self.read()
            return
        rest = self.shape[1:]
        row = math.prod(rest)
        step = max(1, _BLOCK // (row * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            count = min(step, self.shape[0] - start)
            yield self._map(start * row, count * row).reshape(count, *rest)

    def _map(self, start: int, count: int) -> Array:
        """Some elements, mapped: what nobody looks at is not read, and what nobody holds any more is not in memory."""
        if not count:
            return np.zeros(0, self.dtype)
        first = self.offset + start * self.dtype.itemsize
        begin = first - first % mmap.ALLOCATIONGRANULARITY
        nbytes = count * self.dtype.itemsize
        with self.path.open("rb") as file:
            if _stamp(os.fstat(file.fileno())) != self.stamp:
                raise InputError(f"external data of {self.name!r}: {self.path} has changed since the model was read")
            mapped = mmap.mmap(file.fileno(), first - begin + nbytes, access=mmap.ACCESS_READ, offset=begin)
        found = np.frombuffer(mapped, self.dtype, count, first - begin)
        return found.copy() if nbytes <= _SMALL else found  # a system maps so many pieces at a time and no more


def same(array: Array) -> Array:
    """The array itself: how to read one that is there already."""
    return array


class Constant(Values):
    """A constant tensor of the model: an initializer, the value of a `Constant` node, or computed from such.

    The array is read when asked for and not kept unless it is small; what analysis asks again (which slices hold a
    non-zero) is kept.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        read: Callable[[], Array],
        blocks: Callable[[], Iterator[Array]] | None = None,
    ) -> None:
        super().__init__(shape, dtype, read, blocks)
        self.name = name
        self._small: Array | None = None
        self._nonzero: dict[tuple[int, ...], BoolArray] = {}
        self._patterns: dict[tuple[int, int], Pattern] = {}

    @classmethod
    def named(cls, name: str, values: Values) -> Constant:
        """Stored values under the name of a tensor."""
        return cls(name, values.shape, values.dtype, values.array, values.blocks)

    def array(self) -> Array:
        """All values, read-only."""
        if self._small is not None:
            return self._small
        array = super().array()
        if array.nbytes <= _SMALL:
            self._small = array
        return array

    def nonzero(self, axes: tuple[int, ...]) -> BoolArray:
        """Where along `axes` (in order of the tensor) any element is not zero, reduced over the other axes."""
        if len(axes) == 2:
            return self.pattern(axes[0], axes[1]).full()
        if axes not in self._nonzero:
            self._nonzero[axes] = self._find_nonzero(axes)
        return self._nonzero[axes]

    def pattern(self, first: int, second: int) -> Pattern:
        """`nonzero((first, second))`, with equal lines stored once."""
        if (first, second) not in self._patterns:
            finer = self._finer((first, second))
            parts = [finer] if finer is not None else self._parts((first, second))
            self._patterns[first, second] = collect(parts)
        return self._patterns[first, second]

    @cached_property
    def finite(self) -> bool:
        """Whether no element is infinite, or no number."""
        if not self.size or self.dtype.kind not in _REAL_KINDS:
            return True
        # Neither the least nor the largest of some numbers is finite where one is none.
        return all(bool(np.isfinite(block.min()) and np.isfinite(block.max())) for block in self.blocks())

    def _find_nonzero(self, axes: tuple[int, ...]) -> BoolArray:
        finer = self._finer(axes)
        if finer is not None:
            return finer
        if len(axes) == 1:
            for (first, second), pattern in self._patterns.items():
                if axes[0] in (first, second):
                    return pattern.anywhere((first, second).index(axes[0]))
        parts = self._parts(axes)
        return np.concatenate(list(parts)) if axes[:1] == (0,) else next(iter(parts))

    def _finer(self, axes: tuple[int, ...]) -> BoolArray | None:
        """What follows from a pattern along more axes that was found already."""
        for known, mask in self._nonzero.items():
            if set(axes) < set(known):
                return any_along(mask, tuple(position for position, axis in enumerate(known) if axis not in axes))
        return None

    def _parts(self, axes: tuple[int, ...]) -> Iterator[BoolArray]:
        """Pieces of a pattern along the first axis, if that is one of `axes`; else all of it."""
        if axes[:1] == (0,):
            yield from (any_nonzero(block, axes) for block in self.blocks())
            return
        found: BoolArray | None = None
        for block in self.blocks():
            part = any_nonzero(block, axes)
            found = part if found is None else found | part
        assert found is not None
        yield found


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

"""What is known about a tensor: immutable, broadcast-compressed numpy arrays.

An axis of extent one in an array stands for "the same along this whole axis", so that the cost of a fact follows
channels and not activations, and free dimensions need no size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxshrink.graph import Shape
from onnxshrink.weights import Array, BoolArray, all_along, any_along

# Results larger than this are not searched for axes along which they are uniform.
_COMPRESS_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Known:
    """Elements that have the same value for every input of the model.

    Attributes:
        mask: True where the value is known; compressed, one axis per axis of the tensor.
        value: the values, of the tensor's type; compressed; meaningless where `mask` is False.
    """

    mask: BoolArray
    value: Array

    @property
    def anything(self) -> bool:
        """Whether any element is known."""
        return bool(self.mask.any())

    @property
    def everything(self) -> bool:
        """Whether every element is known."""
        return bool(self.mask.all())

    def zero(self) -> BoolArray:
        """Elements known to be zero."""
        return self._zero

    @cached_property
    def _zero(self) -> BoolArray:
        # The values may be those of a large weight, and are asked about again and again.
        found = np.asarray(self.mask & (self.value == 0))
        found.setflags(write=False)
        return found

    def nonzero(self) -> BoolArray:
        """Elements known to be a value other than zero."""
        return np.asarray(self.mask & (self.value != 0))


@dataclass(frozen=True, eq=False)
class Line:
    """Indices of one axis that all follow one number per position: `slope * number + offset`.

    Attributes:
        axis: the axis.
        mask: the indices, as a vector of the axis.
        slope: per index; not zero where `mask` is set.
        offset: per index.
    """

    axis: int
    mask: BoolArray
    slope: Array
    offset: Array

    @property
    def host(self) -> int:
        """The index that can stand for the others with the least loss."""
        return int(np.where(self.mask, np.abs(self.slope), 0.0).argmax())

    @property
    def others(self) -> BoolArray:
        """All of the indices but the host."""
        found: BoolArray = self.mask.copy()
        found[self.host] = False
        return found


def nothing(rank: int, dtype: np.dtype[Any] | None) -> Known:
    """No knowledge of a tensor of this rank."""
    return Known(np.zeros((1,) * rank, np.bool_), np.zeros((1,) * rank, dtype or np.float32))


def constant(value: Array) -> Known:
    """Every element known."""
    return Known(np.ones((1,) * value.ndim, np.bool_), value)


def partial(mask: BoolArray, value: Array) -> Known:
    """Knowledge of the elements in `mask`, in the most compressed form that is cheap to find."""
    if not mask.any():
        return nothing(value.ndim, value.dtype)
    mask = compress(mask)
    if mask.size > 1 or value.size > 1:
        value = compress(value)
    return Known(mask, value)


def compress(array: Array) -> Array:
    """Cut every axis along which `array` does not vary to extent one."""
    if array.size > _COMPRESS_ELEMENTS:
        return array
    for axis, extent in enumerate(array.shape):
        if extent > 1:
            first = array[(slice(None),) * axis + (slice(0, 1),)]
            if np.array_equal(np.broadcast_to(first, array.shape), array, equal_nan=array.dtype.kind in "fc"):
                array = first
    return array


def everything(rank: int) -> BoolArray:
    """All elements needed."""
    return np.ones((1,) * rank, np.bool_)


def uniform(known: Known, axes: Iterable[int]) -> Known:
    """The part of `known` that holds one value along all of `axes` (where the value does not depend on them)."""
    axes = tuple(axes)
    mask, value = known.mask, known.value
    if any(mask.shape[axis] > 1 for axis in axes):
        mask = all_along(mask, axes, keepdims=True)
    if any(value.shape[axis] > 1 for axis in axes):
        first = value[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(value.ndim))]
        same = (value == first).all(axis=axes, keepdims=True)
        mask, value = mask & same, first
    return Known(mask, value)


def along(array: Array, axis: int, extent: int) -> Array:
    """`array` expanded along one axis to its full extent."""
    if array.shape[axis] == extent:
        return array
    shape = list(array.shape)
    shape[axis] = extent
    return np.broadcast_to(array, shape)


def project(mask: BoolArray, axis: int, extent: int) -> BoolArray:
    """Indices of one axis at which any element of a compressed mask holds."""
    rest = tuple(a for a in range(mask.ndim) if a != axis)
    reduced = any_along(mask, rest)
    return reduced.copy() if reduced.size == extent else np.array(np.broadcast_to(reduced, (extent,)))


def fits(array: Array, shape: Shape) -> bool:
    """Whether `array` is a compressed array of a tensor of this shape."""
    return array.ndim == len(shape) and all(extent in (1, dim) for extent, dim in zip(array.shape, shape, strict=True))

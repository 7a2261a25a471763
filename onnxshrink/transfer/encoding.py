"""Arrays, index sets and the like as JSON, and back."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import onnx

from onnxshrink.graph import Dim, Shape
from onnxshrink.weights import Array, BoolArray

_T = TypeVar("_T")
Json = Any


def encode_array(array: Array) -> str:
    """An array of any type that ONNX has: base64 of a compressed `TensorProto`."""
    tensor = onnx.numpy_helper.from_array(np.asarray(array, order="C"))
    return base64.b64encode(zlib.compress(tensor.SerializeToString(deterministic=True))).decode()


def decode_array(text: str) -> Array:
    """What `encode_array` made of an array, read-only."""
    tensor = onnx.TensorProto.FromString(zlib.decompress(base64.b64decode(text, validate=True)))
    array = np.array(onnx.numpy_helper.to_array(tensor))
    array.setflags(write=False)
    return array


def encode_mask(mask: BoolArray | None) -> Json:
    """A set of indices: the extent alone where it holds all, else with base64 of a bit for each; None for None."""
    if mask is None:
        return None
    return mask.size if mask.all() else [mask.size, base64.b64encode(np.packbits(mask).tobytes()).decode()]


def decode_mask(data: Json) -> BoolArray | None:
    """What `encode_mask` made of a set of indices."""
    if data is None:
        return None
    if isinstance(data, int):
        return np.ones(_natural(data), np.bool_)
    extent, text = _natural(data[0]), base64.b64decode(data[1], validate=True)
    if len(text) != -(-extent // 8):
        raise ValueError(f"{len(text)} bytes for {extent} indices")
    return np.unpackbits(np.frombuffer(text, np.uint8), count=extent).astype(np.bool_)


def encode_numbers(numbers: Array | None) -> Json:
    """A vector of integers: how often its only number comes, or an array; None for None."""
    if numbers is None:
        return None
    same = numbers.size and (numbers == numbers[0]).all()
    return [int(numbers[0]), numbers.size] if same else encode_array(numbers)


def decode_numbers(data: Json) -> Array | None:
    """What `encode_numbers` made of a vector, as 32-bit integers."""
    if data is None:
        return None
    if isinstance(data, str):
        return decode_array(data).astype(np.int32)
    number, count = data
    return np.full(_natural(count), number, np.int32)


def encode_shape(shape: Shape | None) -> Json:
    """A shape: numbers, symbols, and None for what is not known."""
    return (
        None if shape is None else [extent if isinstance(extent, str) else extent and int(extent) for extent in shape]
    )


def decode_shape(data: Json) -> Shape | None:
    """What `encode_shape` made of a shape."""
    if data is None:
        return None
    found: list[Dim] = []
    for extent in data:
        if not (extent is None or isinstance(extent, (int, str))):
            raise ValueError(f"an extent of {extent!r}")
        found.append(extent)
    return tuple(found)


def by_index(data: Mapping[str, Json], decode: Callable[[Json], _T]) -> dict[int, _T]:
    """A mapping whose keys are numbers, which JSON has as text."""
    return {_natural(int(key)): decode(value) for key, value in data.items()}


def by_name(data: Mapping[str, Json], decode: Callable[[Json], _T]) -> dict[str, _T]:
    """A mapping whose keys are names."""
    return {key: decode(value) for key, value in data.items()}


def natural_numbers(data: Iterable[Json]) -> frozenset[int]:
    """A set of indices."""
    return frozenset(map(_natural, data))


def _natural(value: Json) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} where a number from 0 is expected")
    return value

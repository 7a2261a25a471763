"""What goes into JSON comes out as it was."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxshrink.graph import Period
from onnxshrink.transfer import encoding
from onnxshrink.transfer.encoding import (
    decode_array,
    decode_mask,
    decode_numbers,
    decode_shape,
    encode_array,
    encode_mask,
    encode_numbers,
    encode_shape,
)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (1, 5, 1), (2, 3)], ids=str)
def test_arrays(dtype: Any, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3).astype(dtype)
    found = decode_array(through_json(encode_array(array)))
    np.testing.assert_array_equal(found, array, strict=True)
    assert not found.flags.writeable


def test_every_bit_of_a_number_comes_back() -> None:
    values = np.array([0.1, -0.0, np.inf, np.nan, 5e-324])
    assert decode_array(encode_array(values)).tobytes() == values.tobytes()
    strided = np.arange(6.0).reshape(2, 3).T
    np.testing.assert_array_equal(decode_array(encode_array(strided)), strided, strict=True)


@pytest.mark.parametrize("extent", [0, 1, 8, 13, 64])
def test_index_sets(extent: int) -> None:
    for mask in (np.arange(extent) % 3 == 0, np.ones(extent, np.bool_), np.zeros(extent, np.bool_)):
        found = decode_mask(through_json(encode_mask(mask)))
        assert found is not None
        np.testing.assert_array_equal(found, mask, strict=True)
    assert decode_mask(through_json(encode_mask(None))) is None


def test_a_whole_axis_is_a_number() -> None:
    assert encode_mask(np.ones(64, np.bool_)) == 64


@pytest.mark.parametrize("values", [[], [7, 7, 7], [0, -1, 2, 2]], ids=str)
def test_numbers(values: list[int]) -> None:
    found = decode_numbers(through_json(encode_numbers(np.array(values, np.int32))))
    assert found is not None
    np.testing.assert_array_equal(found, np.array(values, np.int32), strict=True)
    assert decode_numbers(through_json(encode_numbers(None))) is None


@pytest.mark.parametrize("shape", [None, (), (3, "N", None, 0)], ids=str)
def test_shapes(shape: Any) -> None:
    assert decode_shape(through_json(encode_shape(shape))) == shape
    assert encode_shape((Period(4),)) == [4]


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (decode_array, "no base64!"),
        (decode_array, "AAAA"),
        (decode_mask, -1),
        (decode_mask, [9, "gA=="]),  # a byte, where nine bits need two
        (decode_mask, "x"),
        (decode_numbers, [1, -2]),
        (decode_shape, [1.5]),
        (encoding.natural_numbers, [1, -1]),
        (lambda data: encoding.by_index(data, int), {"-1": 3}),
    ],
)
def test_what_was_damaged_is_refused(decode: Any, data: Any) -> None:
    with pytest.raises(Exception, match=r".+"):
        decode(data)

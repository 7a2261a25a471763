"""Weights are read one at a time, and what analysis asks of them again is kept."""

from __future__ import annotations

import numpy as np

from onnxshrink.weights import Array, Constant


class Reads:
    """A constant that counts how often its values are read."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.count = 0
        self.constant = Constant("w", values.shape, values.dtype, self.read)

    def read(self) -> Array:
        self.count += 1
        return self.values


def test_patterns_along_fewer_axes_follow_from_those_along_more() -> None:
    values = np.zeros((64, 96, 3, 3), np.float32)
    values[3, 5, 1, 2] = values[7, 90, 0, 0] = 1
    reads = Reads(values)
    assert np.argwhere(reads.constant.nonzero((0, 1))).tolist() == [[3, 5], [7, 90]]
    assert np.flatnonzero(reads.constant.nonzero((0,))).tolist() == [3, 7]
    assert np.flatnonzero(reads.constant.nonzero((1,))).tolist() == [5, 90]
    assert reads.constant.nonzero(()).tolist() is True
    assert reads.count == 1

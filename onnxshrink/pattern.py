"""Where matrices are not zero, with equal lines stored once: pruned matrices have few that differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio: its multiples differ in all of their bits


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which elements of a matrix are not zero.

    Attributes:
        lines: `[distinct, extent of the other axis]`.
        index: which of `lines` stands at each position of the axis.
        axis: the axis that `index` runs along.
    """

    lines: BoolArray
    index: NDArray[np.intp]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Extents of the matrix."""
        return (self.index.size, self.lines.shape[1]) if self.axis == 0 else (self.lines.shape[1], self.index.size)

    @property
    def T(self) -> Pattern:
        """The matrix transposed."""
        return Pattern(self.lines, self.index, 1 - self.axis)

    def full(self) -> BoolArray:
        """All elements."""
        rows = self.lines[self.index]
        return rows if self.axis == 0 else rows.T

    def reached(self, axis: int, chosen: BoolArray) -> BoolArray:
        """Positions of one axis at which any of the chosen positions of the other axis is not zero."""
        if axis == self.axis:
            found = np.asarray((self.lines & chosen).any(axis=1))
            return found[self.index]
        used = np.zeros(self.lines.shape[0], np.bool_)
        used[self.index[chosen]] = True
        return np.asarray(self.lines[used].any(axis=0))

    def anywhere(self, axis: int) -> BoolArray:
        """Positions of one axis at which anything is not zero."""
        return self.reached(axis, np.ones(self.shape[1 - axis], np.bool_))


def collect(parts: Iterable[BoolArray]) -> Pattern:
    """The pattern of a matrix that comes in parts along its first axis."""
    numbers: dict[bytes, int] = {}
    found: list[NDArray[np.intp]] = []
    extent = 0
    for part in parts:
        extent = part.shape[1]
        lines, index = _distinct(np.packbits(part, axis=1))
        found.append(np.array([numbers.setdefault(line.tobytes(), len(numbers)) for line in lines], np.intp)[index])
    packed = np.frombuffer(b"".join(numbers), np.uint8).reshape(len(numbers), -(-extent // 8))
    lines = np.unpackbits(packed, axis=1, count=extent).view(np.bool_)
    return Pattern(np.asarray(lines, np.bool_), np.concatenate(found))


def _distinct(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Every line once, and which of them stands where. Lines are told apart by a number that is made of them."""
    count, width = packed.shape
    words = np.zeros((count, -(-width // 8) * 8), np.uint8)
    words[:, :width] = packed
    factors = np.arange(1, words.shape[1] // 8 + 1, dtype=np.uint64) * _SPREAD
    keys = (words.view(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    index = index.reshape(-1)
    if np.array_equal(packed[first[index]], packed):
        return packed[first], index
    return packed, np.arange(count)  # two lines with one number: as if all were distinct

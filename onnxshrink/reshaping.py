"""The relation of two shapes that hold the same elements in the same order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from onnxshrink.graph import Dim, Period, Shape
from onnxshrink.notation import Relation, TensorSpec, opaque


@dataclass
class _Walk:
    """Two shapes being matched from one end; the factors found so far, outermost last."""

    shape: list[Dim]
    specs: list[list[str]]
    position: int = 0
    rest: Dim = 1
    done: set[int] = field(default_factory=set)

    def advance(self) -> bool:
        """Step over axes that are used up. False at the end."""
        while self.rest == 1 and self.position < len(self.shape):
            self.rest = self.shape[self.position]
            self.position += 1
        return self.rest != 1

    def take(self, factor: str, size: Dim) -> None:
        self.specs[self.position - 1].append(factor)
        if isinstance(self.rest, int) and isinstance(size, int):
            self.rest //= size
        else:
            self.rest = 1


def _match(left: _Walk, right: _Walk, sizes: dict[str, int | None], prefix: str) -> None:
    while left.advance() and right.advance():
        a, b = left.rest, right.rest
        if isinstance(a, Period) != isinstance(b, Period):
            return
        if a == b and a is not None:
            step: Dim = a
        elif isinstance(a, int) and isinstance(b, int) and (a % b == 0 or b % a == 0):
            step = min(a, b)
        else:
            return
        name = f"{prefix}{len(sizes)}"
        sizes[name] = step if isinstance(step, int) else None
        left.take(name, step)
        right.take(name, step)


def reshape(source: Shape, target: Shape) -> Relation:
    """The relation of two shapes that hold the same elements in the same order.

    Walks both shapes from the left, then what is left from the right, splitting the larger extent by the smaller.
    Where that does not divide, or where a free dimension hides, the rest is pinned.
    """
    sizes: dict[str, int | None] = {}
    if 0 in source or 0 in target:
        return opaque([source], [target])
    left = [_Walk(list(shape), [[] for _ in shape]) for shape in (source, target)]
    _match(left[0], left[1], sizes, "l")
    right = []
    for walk in left:
        rest = list(walk.shape)
        if walk.position:
            rest[walk.position - 1] = walk.rest
            rest[: walk.position - 1] = [1] * (walk.position - 1)
        right.append(_Walk(rest[::-1], [[] for _ in rest]))
    _match(right[0], right[1], sizes, "r")
    pinned: set[str] = set()
    free_product = _free_product(left, right, sizes)
    specs = [_join_walks(a, b, sizes, pinned, side) for a, b, side in zip(left, right, "io", strict=True)]
    free = {name for name, size in sizes.items() if size is None}
    return Relation((specs[0],), (specs[1],), sizes, frozenset(pinned | free), periods=free_product)


def _free_product(left: list[_Walk], right: list[_Walk], sizes: dict[str, int | None]) -> dict[int, int]:
    """Where all that is left is one free dimension times fixed ones, merged in one axis: let the fixed ones pass.

    The same backwards, from such an axis to its parts. Returns the period of the merged axis of the output.
    """
    rests = [_rests(a, b) for a, b in zip(left, right, strict=True)]
    for merged in (1, 0):
        whole, parts = rests[merged], rests[1 - merged]
        if len(whole) != 1 or len(parts) < 2 or isinstance(parts[0][1], int):
            continue
        axis, extent = whole[0]
        fixed = [size for _, size in parts[1:] if isinstance(size, int) and not isinstance(size, Period)]
        period = math.prod(fixed)
        known = isinstance(extent, Period) and extent == period
        if period == 1 or len(fixed) < len(parts) - 1 or not (known or (merged == 1 and not isinstance(extent, int))):
            continue
        for part, size in parts[1:]:
            name = f"p{len(sizes)}"
            sizes[name] = int(size) if isinstance(size, int) else None
            left[merged].specs[axis].append(name)
            left[1 - merged].specs[part].append(name)
            left[1 - merged].done.add(part)
        left[merged].done.add(axis)
        return {axis: period} if merged == 1 else {}
    return {}


def _rests(left: _Walk, right: _Walk) -> list[tuple[int, Dim]]:
    """Axes with something that was not matched, and how much."""
    rank = len(left.shape)
    found = [(axis, _remaining(right, rank - 1 - axis)) for axis in range(rank)]
    # Of a fixed extent, a part may have been matched; a free one was matched whole or not at all.
    return [(axis, rest) for axis, rest in found if rest != 1]


def _join_walks(left: _Walk, right: _Walk, sizes: dict[str, int | None], pinned: set[str], side: str) -> TensorSpec:
    rank = len(left.shape)
    result = []
    for axis in range(rank):
        mirrored = rank - 1 - axis
        outer, inner = left.specs[axis], right.specs[mirrored][::-1]
        remaining = _remaining(right, mirrored)
        if remaining != 1 and axis not in left.done:
            name = f"{side}{axis}"
            sizes[name] = remaining if isinstance(remaining, int) else None
            pinned.add(name)
            if sizes[name] is None:
                pinned.update((*outer, *inner))
            outer = [*outer, name]
        result.append((*outer, *inner))
    return tuple(result)


def _remaining(walk: _Walk, axis: int) -> Dim:
    if axis < walk.position - 1:
        return 1
    return walk.rest if axis == walk.position - 1 else walk.shape[axis]

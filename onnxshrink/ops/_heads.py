"""What attention operators share: which heads and which of their dimensions matter.

A node has `k` groups of `r` query heads each; a group shares one key and one value head. Query and key heads have `d`
dimensions, value heads `v`. Facts are looked at per such index, whatever the layout of the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxshrink.facts import Known, everything, partial, project, uniform
from onnxshrink.notation import Relation, TensorSpec, UnresolvedError, transfer
from onnxshrink.registry import Keep, Rewrite
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray, any_along

Names = tuple[str, ...]
QUERY: Names = ("k", "r", "d")
KEY: Names = ("k", "d")
VALUE: Names = ("k", "v")
OUTPUT: Names = ("k", "r", "v")


def head_counts(heads: int | None, groups: int | None) -> dict[str, int | None]:
    """Sizes of the factors for the groups and the heads of one group. Raises UnresolvedError."""
    if not heads or not groups or heads % groups:
        raise UnresolvedError("the number of heads is not known")
    return {"k": groups, "r": heads // groups}


def fixed(relation: Relation) -> Relation:
    """The relation, once it is sure that every factor of the heads has a size. Raises UnresolvedError."""
    if any(relation.sizes.get(factor) is None for factor in "krdv"):
        raise UnresolvedError("the size of a head is not known")
    return relation


def _first(array: Array, axis: tuple[int, ...]) -> Array:
    return array[tuple(0 if index in axis else slice(None) for index in range(array.ndim))]


_REDUCE: Mapping[str, Callable[..., Any]] = {"any": np.any, "all": np.all, "first": _first}


def _alone(names: Names) -> TensorSpec:
    return tuple((name,) for name in names)


def per_factor(view: View, array: Array, slot: int, names: Names, kind: str = "any") -> Array:
    """A compressed array of an operand with one axis per factor in `names`, at full extent.

    Other factors are reduced: with "any", "all", or "first" for what does not vary along them.
    """
    relation = view.relation
    assert relation is not None
    reduce: Callable[..., Array] = _REDUCE[kind]
    alone = Relation((relation.spec(slot),), (_alone(names),), relation.sizes)
    return np.broadcast_to(transfer(alone, array, 0, -1, reduce), [relation.sizes[name] or 1 for name in names])


def to_operand(view: View, array: Array, names: Names, slot: int, first: bool = False) -> Array:
    """The inverse of `per_factor`: a compressed array of an operand."""
    relation = view.relation
    assert relation is not None
    alone = Relation((_alone(names),), (relation.spec(slot),), relation.sizes)
    return transfer(alone, array, 0, -1, _first if first else np.any)


def constants(view: View, slot: int, names: Names) -> tuple[BoolArray, Array]:
    """Per index of `names`: whether an operand holds one known value there, and that value."""
    relation = view.relation
    assert relation is not None
    spec = relation.spec(slot) or ()
    other = [axis for axis, factors in enumerate(spec) if factors and not set(factors) & set(names)]
    known = uniform(view.data(slot).known, other)
    return per_factor(view, known.mask, slot, names, "all"), per_factor(view, known.value, slot, names, "first")


def live(view: View, index: int, names: Names) -> BoolArray:
    """Per index of `names`: whether an output is live there; an omitted one is not."""
    relation = view.relation
    assert relation is not None
    if index >= len(view.outputs) or view.outputs[index] is None:
        return np.zeros([relation.sizes[name] or 1 for name in names], np.bool_)
    return per_factor(view, view.live(index), -1 - index, names)


def kept_factor(view: View, slot: int, factor: str) -> BoolArray:
    """Indices of one factor that an operand keeps."""
    relation = view.relation
    assert relation is not None
    for axis, factors in enumerate(relation.spec(slot) or ()):
        kept = view.kept[slot][axis]
        if factor in factors and kept is not None:
            grid = kept.reshape([relation.sizes[name] or 1 for name in factors])
            return any_along(grid, tuple(i for i, name in enumerate(factors) if name != factor))
    return np.ones(relation.sizes[factor] or 1, np.bool_)


def keeps(view: View, slot: int, mask: BoolArray, names: Names, reason: str) -> Iterator[Keep]:
    """Demands for every axis of an operand along which `mask` tells anything."""
    relation = view.relation
    assert relation is not None
    array = to_operand(view, mask, names, slot)
    for axis, factors in enumerate(relation.spec(slot) or ()):
        extent = view.data(slot).extent(axis)
        if extent is not None and set(factors) & set(names):
            yield Keep(slot, axis, project(array, axis, extent), reason)


@dataclass(frozen=True, eq=False)
class Heads:
    """One attention node.

    Attributes:
        view: the node, its relation in the factors `k`, `r`, `d`, `v`.
        slots: inputs that hold query, key and value.
        past: inputs that hold keys and values of before, if any.
        scores: output that holds the scores, if any.
        blank: whether a query may find no key at all, so that its output is zero and not a mean of values.
        shifts: whether one and the same number added to all scores of a query changes nothing.
        biases: what is added to query, key and value first, `[k, r, d]`, `[k, d]`, `[k, v]`.
        counts: attributes that hold the number of query heads, and of key heads.
        divisible: whether the dimensions of a head can be told apart; otherwise they stay whole.
    """

    view: View
    slots: tuple[int, int, int] = (0, 1, 2)
    past: tuple[int, int] | None = None
    scores: int | None = None
    blank: bool = False
    shifts: bool = True
    biases: Sequence[Array] | None = None
    counts: tuple[str, ...] = ()
    divisible: bool = True

    def _size(self, factor: str) -> int:
        assert self.view.relation is not None
        return self.view.relation.sizes[factor] or 1

    def _constants(self, part: int, names: Names) -> tuple[BoolArray, Array]:
        mask, value = constants(self.view, self.slots[part], names)
        if self.biases is None:
            return mask, value
        return mask, (value.astype(np.float64) + self.biases[part]).astype(value.dtype)

    def _with_past(self, which: int, zero: BoolArray, names: Names) -> BoolArray:
        if self.past is None:
            return zero
        mask, value = constants(self.view, self.past[which], names)
        return np.asarray(zero & mask & (value == 0))

    @cached_property
    def idle_queries(self) -> BoolArray:
        """`[k, r, d]`: zero, so that the key's dimension does not matter."""
        mask, value = self._constants(0, QUERY)
        return np.asarray(mask & (value == 0) & self.divisible)

    @cached_property
    def idle_keys(self) -> BoolArray:
        """`[k, d]`: the same for every key, so that it shifts all scores of a query alike, or not at all."""
        mask, value = self._constants(1, KEY)
        mask = np.asarray(mask & self.divisible)
        if self.shifts and self.past is None and self.scores is None:
            return mask
        return self._with_past(0, mask & (value == 0), KEY)

    def steady_values(self) -> tuple[BoolArray, Array]:
        """`[k, v]`: the same in every value, and so in every mean of values; and what it is."""
        mask, value = self._constants(2, VALUE)
        if self.past is None and not self.blank:
            return mask, value
        return self._with_past(1, mask & (value == 0), VALUE), value

    def forward(self) -> list[Known | None]:
        """A mean of equal values is that value."""
        rest: list[Known | None] = [None] * (len(self.view.outputs) - 1)
        mask, value = self.steady_values()
        if not mask.any() or self.view.outputs[0] is None:
            return [None, *rest]
        shape = (self._size("k"), self._size("r"), self._size("v"))
        mask, value = (np.broadcast_to(array[:, None], shape) for array in (mask, value))
        value = np.where(mask, value, 0).astype(self.view.output().dtype)
        known = to_operand(self.view, mask, OUTPUT, -1), to_operand(self.view, value, OUTPUT, -1, first=True)
        return [partial(*known), *rest]

    @cached_property
    def live_heads(self) -> BoolArray:
        """`[k, r]`: heads whose output or scores matter."""
        found = any_along(live(self.view, 0, OUTPUT), 2)
        return found if self.scores is None else found | live(self.view, self.scores, ("k", "r"))

    def needed(self) -> tuple[BoolArray, BoolArray, BoolArray]:
        """What is needed of query, key and value: `[k, r, d]`, `[k, d]`, `[k, v]`."""
        heads = self.live_heads[:, :, None]
        query = heads & ~self.idle_keys[:, None]
        key = any_along(heads & ~self.idle_queries, 1) | live(self.view, 1, KEY)
        value = any_along(live(self.view, 0, OUTPUT), 1) | live(self.view, 2, VALUE)
        return query, key, value

    def backward(self) -> list[BoolArray | None]:
        """What is needed of every input; masks and the like for the live heads."""
        view, relation = self.view, self.view.relation
        assert relation is not None
        found: list[BoolArray | None] = []
        for slot, operand in enumerate(view.inputs):
            spec = relation.spec(slot) or ()
            if operand is None:
                found.append(None)
            elif any("r" in factors for factors in spec) and not any("d" in factors for factors in spec):
                found.append(to_operand(view, self.live_heads, ("k", "r"), slot))
            else:
                found.append(everything(operand.rank))
        for part, (names, mask) in enumerate(zip((QUERY, KEY, VALUE), self.needed(), strict=True)):
            found[self.slots[part]] = to_operand(view, mask, names, self.slots[part])
            if part and self.past is not None:
                found[self.past[part - 1]] = to_operand(view, mask, names, self.past[part - 1])
        return found

    def retain(self) -> Iterator[Keep]:
        """Dimensions in which a known query meets known keys, neither of which is live."""
        wanted = self.live_heads[:, :, None] & ~self.idle_queries & ~self.idle_keys[:, None]
        reason = "its constant enters the scores"
        yield from keeps(self.view, self.slots[0], wanted, QUERY, reason)
        yield from keeps(self.view, self.slots[1], any_along(wanted, 1), KEY, reason)

    def represent(self) -> Iterator[Keep]:
        """One dimension of the heads that stay, where queries, keys or values keep none."""
        groups, repeats = self._kept_heads("k"), self._kept_heads("r")
        for slot, names in zip(self.slots, (QUERY, KEY, VALUE), strict=True):
            sizes = {"k": groups, "r": repeats, names[-1]: np.arange(self._size(names[-1])) == 0}
            if groups.any() and repeats.any() and not kept_factor(self.view, slot, names[-1]).any():
                mask = np.ix_(*(np.flatnonzero(sizes[name]) for name in names))
                wanted = np.zeros([self._size(name) for name in names], np.bool_)
                wanted[mask] = True
                yield from keeps(self.view, slot, wanted, names, "a head keeps at least one dimension")

    def _kept_heads(self, factor: str) -> BoolArray:
        slots = [slot for slot in (*self.slots, -1) if slot in self.view.kept]
        kept = [kept_factor(self.view, slot, factor) for slot in slots if self._has(slot, factor)]
        return any_along(np.stack(kept), 0) if kept else np.ones(self._size(factor), np.bool_)

    def _has(self, slot: int, factor: str) -> bool:
        assert self.view.relation is not None
        return any(factor in factors for factors in self.view.relation.spec(slot) or ())

    def count(self, factor: str) -> int:
        """How many indices of a factor of the query stay."""
        return int(kept_factor(self.view, self.slots[0], factor).sum())

    def attributes(self, scale_given: bool) -> dict[str, object]:
        """Head counts, and the scale that the original head size implies."""
        changed: dict[str, object] = {}
        groups, heads = self.count("k"), self.count("k") * self.count("r")
        if heads < self._size("k") * self._size("r"):
            changed.update(zip(self.counts, (heads, groups), strict=False))
        if self.count("d") < self._size("d") and not scale_given:
            changed["scale"] = float(1.0 / np.sqrt(self._size("d")))
        return changed

    def rewrite(self, scale_given: bool) -> Rewrite:
        """The attributes; slices follow from the notation."""
        return Rewrite(attributes=self.attributes(scale_given))


def mask_notation(shape: Sequence[object], heads: int) -> str:
    """Notation of what is broadcast to `[batch, head, query, key]`: whole, but for the heads."""
    names = ["[mb]", "(k r)" if len(shape) >= 3 and shape[-3] == heads else "[mh]", "[ms]", "[mt]"]
    return " ".join(names[len(names) - len(shape) :]) or "1"

"""A multiple for every class of coupled axes, by the cost model: 16, 8, 4, or the width as it falls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from onnxshrink.analyse import Analysis
from onnxshrink.planning.align import Words
from onnxshrink.planning.data import Plan
from onnxshrink.planning.widths import Axis, Coupled
from onnxshrink.speed.cost import Work, extents
from onnxshrink.speed.kernels import Kernels

MULTIPLES = (1, 4, 8, 16)  # 1: as it falls
_WORTH = 0.005  # a larger multiple must save this share of what its layers take
_SWEEPS = 3


class Mixture:
    """What each class may be raised to, and what that costs.

    Args:
        analysis: the facts.
        plans: the plan of the whole model for each multiple.
        works: the work of every node.
        kernels: what work costs.

    Attributes:
        chosen: the multiple of each class.
    """

    def __init__(self, analysis: Analysis, plans: Mapping[int, Plan], works: Iterable[Work], kernels: Kernels) -> None:
        self._coupled = Coupled(analysis)
        self._extents = {multiple: extents(analysis, plan) for multiple, plan in plans.items()}
        self._kernels = kernels
        self._parts = self._joined(analysis)
        self._works = list(works)
        self._users: defaultdict[Axis, list[Work]] = defaultdict(list)
        self.chosen: dict[Axis, int] = {}
        for work in self._works:
            keys = {key for axis in work.axes for key in self._sources(axis)}
            for key in keys:
                self._users[key].append(work)
        for key in self._users:
            if len({extent(key) for extent in self._extents.values()}) > 1:
                self.chosen[key] = MULTIPLES[0]

    def choose(self, most: float) -> dict[Axis, int]:
        """Settle every class in turn on what makes its layers fastest, until nothing changes.

        Args:
            most: weights that may be left, by those with every width as it falls.
        """
        allowed = most * self._parameters()
        for _ in range(_SWEEPS):
            before = dict(self.chosen)
            for key in self.chosen:
                self._choose(key)
            if self.chosen == before:
                break
        self._economise(allowed)
        return {key: multiple for key, multiple in self.chosen.items() if multiple > 1}

    def _parameters(self) -> float:
        return sum(work.parameters(self._extent) for work in self._works)

    def _economise(self, allowed: float) -> None:
        """Step down where that costs the least time per weight saved, until few enough are left."""
        excess = self._parameters() - allowed
        while excess > 0:
            steps = sorted(step for key in self.chosen if (step := self._step_down(key)) is not None)
            if not steps:
                return
            for _, saved, key, multiple in steps:
                self.chosen[key] = multiple
                excess -= saved
                if excess <= 0:
                    break
            excess = self._parameters() - allowed

    def _step_down(self, key: Axis) -> tuple[float, float, Axis, int] | None:
        """Seconds lost per weight saved by the next smaller multiple, weights saved, the class and the multiple."""
        before = self.chosen[key]
        if before == MULTIPLES[0]:
            return None
        found = None
        for multiple in reversed(MULTIPLES[: MULTIPLES.index(before)]):
            figures = [(self._seconds(key), self._weights(key))]
            self.chosen[key] = multiple
            figures.append((self._seconds(key), self._weights(key)))
            self.chosen[key] = before
            (fast, large), (slow, small) = figures
            if small < large:
                found = ((slow - fast) / (large - small), large - small, key, multiple)
                break
        return found

    def _weights(self, key: Axis) -> float:
        return sum(work.parameters(self._extent) for work in self._users[key])

    def _choose(self, key: Axis) -> None:
        costs = {}
        for multiple in MULTIPLES:
            self.chosen[key] = multiple
            costs[multiple] = self._seconds(key)
        best = MULTIPLES[0]
        for multiple in MULTIPLES[1:]:
            if costs[multiple] < costs[best] * (1 - _WORTH):
                best = multiple
        self.chosen[key] = best

    def _seconds(self, key: Axis) -> float:
        return sum(work.seconds(self._kernels, self._extent) for work in self._users[key])

    def _extent(self, axis: Axis) -> int:
        """The extent of an axis with what is chosen now; a joined one is no rounder than its parts."""
        multiple = min((self.chosen.get(key, MULTIPLES[0]) for key in self._sources(axis)), default=MULTIPLES[0])
        return self._extents[multiple](axis)

    def _sources(self, axis: Axis) -> frozenset[Axis]:
        """The classes that an axis is made of: its own, or those of the parts that are laid end to end in it."""
        key = self._coupled.key(axis)
        seen, open_keys, found = {key}, [key], set()
        while open_keys:
            current = open_keys.pop()
            parts = self._parts.get(current, set()) - seen
            seen |= parts
            open_keys += parts
            if not self._parts.get(current):
                found.add(current)
        return frozenset(found)

    def _joined(self, analysis: Analysis) -> dict[Axis, set[Axis]]:
        """Per class of axes that others are laid end to end in, the classes of these."""
        parts: defaultdict[Axis, set[Axis]] = defaultdict(set)
        for node in analysis.nodes():
            relation = analysis.relations[node.index]
            for factor in relation.links:
                sides: list[list[Axis]] = [[], []]
                for slot, spec in relation.slots():
                    name = node.inputs[slot] if slot >= 0 else node.outputs[-1 - slot]
                    sides[slot < 0] += [(name, a) for a, f in enumerate(spec) if f == (factor,) and name]
                whole, pieces = (sides[1], sides[0]) if len(sides[1]) == 1 else (sides[0], sides[1])
                if len(whole) == 1 and len(pieces) > 1:
                    parts[self._coupled.key(whole[0])] |= {self._coupled.key(axis) for axis in pieces}
        return dict(parts)

    def classes(self, labels: Collection[str]) -> frozenset[Axis]:
        """The classes that the layers of these nodes read or write, as far as they can be raised."""
        users = {key: {work.node.label for work in some if work.kind} for key, some in self._users.items()}
        return frozenset(key for key in self.chosen if not users[key].isdisjoint(labels))

    def words(self) -> dict[Axis, Words]:
        """Per class, how much faster its layers are predicted to run for being raised."""
        return {key: self._words(key) for key in self._users}

    def _words(self, key: Axis) -> Words:
        def reason(before: int, after: int) -> str:
            gain = self._with(key, before) / max(self._with(key, after), 1e-30)
            if gain < 1.01:
                return f"a width of {after} instead of {before}"
            return f"a width of {after} is {gain:.2g}x faster than {before}"

        return reason

    def _with(self, key: Axis, width: int) -> float:
        """Seconds of the layers of a class, were it this wide."""
        return sum(
            work.seconds(self._kernels, lambda axis: width if self._coupled.key(axis) == key else self._extent(axis))
            for work in self._users[key]
        )

"""Making the sets agree with a node: its factors, its index maps, its groups, and what its rule asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.graph import Node
from onnxshrink.notation import AxisSpec, Relation, axis_of, joined_inputs
from onnxshrink.planning.data import Cause, Kept
from onnxshrink.planning.sets import Sets
from onnxshrink.registry import Keep
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray, any_along


class Agreement(Sets):
    """Sets that grow until they agree with every node."""

    def __init__(self, analysis: Analysis, apart: set[int]) -> None:
        super().__init__(analysis, apart)
        self.blocks: dict[int, int] = {}
        self._choosing = False
        self._views: dict[int, View] = {}

    def _agree(self, node: Node) -> None:
        relation = self.analysis.relations[node.index]
        self._demand_inputs(node, relation)
        slots = [(slot, spec, name) for slot, spec in relation.slots() if (name := self.slot_name(node, slot))]
        self._agree_on_factors(node, relation, slots)
        self._agree_on_links(node, relation)
        self._balance(node, relation)
        rule = self.analysis.rules[node.index]
        if rule is not None and rule.retain is not None:
            self._retain(node, rule.retain(self.view(node)))

    def _demand_inputs(self, node: Node, relation: Relation) -> None:
        optional = joined_inputs(relation)
        for slot, name in enumerate(node.inputs):
            if name not in self.kept or slot in self.frozen[node.index] or name in self.present:
                continue
            axis = optional.get(slot)
            kept = self.kept[name][axis] if axis is not None else None
            if kept is None or kept.any():
                self._appear(name)

    def _retain(self, node: Node, keeps: Iterable[Keep]) -> bool:
        grown = False
        for keep in keeps:
            name = self.slot_name(node, keep.slot)
            if name is not None:
                grown |= self._add(name, keep.axis, keep.indices, Cause(node.label, name, keep.reason))
        return grown

    def _agree_on_factors(
        self, node: Node, relation: Relation, slots: list[tuple[int, tuple[AxisSpec, ...], str]]
    ) -> None:
        unions = self._unions(relation, slots)
        for factor in relation.pinned:
            size = relation.sizes.get(factor)
            if size is not None and factor not in relation.links:
                unions[factor] = np.ones(size, np.bool_)
        for _slot, spec, name in slots:
            for axis, factors in enumerate(spec):
                if not factors or self.kept[name][axis] is None or factors[0] in relation.links:
                    continue
                if factors[0] in relation.ragged and len(factors) > 1:
                    self._add_by_source(node, slots, name, axis, factors, np.ones(1, np.bool_))
                    continue
                wanted = _product(factors, unions)
                if wanted is not None and self._lacks(name, axis, wanted):
                    pinned = bool(relation.pinned.intersection(factors))
                    if not pinned:
                        self._add_by_source(node, slots, name, axis, factors, wanted)
                    self._add(name, axis, wanted, _cause(node, "" if pinned else name, name))

    def _lacks(self, name: str, axis: int, wanted: BoolArray) -> bool:
        kept = self.kept[name][axis]
        return kept is not None and bool((wanted & ~kept).any())

    def _add_by_source(
        self,
        node: Node,
        slots: list[tuple[int, tuple[AxisSpec, ...], str]],
        name: str,
        axis: int,
        factors: AxisSpec,
        wanted: BoolArray,
    ) -> None:
        """Grow by what an operand with the same axis keeps, so that the cause names that operand."""
        for _slot, spec, other in slots:
            for position, theirs in enumerate(spec):
                kept = self.kept[other][position]
                if theirs == factors and other != name and kept is not None:
                    self._add(name, axis, wanted & kept, _cause(node, other, name))

    def _unions(self, relation: Relation, slots: list[tuple[int, tuple[AxisSpec, ...], str]]) -> dict[str, BoolArray]:
        """Per factor, the indices that any operand keeps."""
        unions: dict[str, BoolArray] = {}
        for _slot, spec, name in slots:
            for axis, factors in enumerate(spec):
                kept = self.kept[name][axis]
                if kept is None or not factors or factors[0] in relation.links:
                    continue
                for factor, part in _projections(factors, kept, relation).items():
                    before = unions.get(factor)
                    unions[factor] = part if before is None else before | part
        return unions

    def _agree_on_links(self, node: Node, relation: Relation) -> None:
        for factor, links in relation.links.items():
            for link in links:
                self._follow(node, relation, factor, link.input, link.output, link.source, link.target)

    def _follow(
        self, node: Node, relation: Relation, factor: str, slot: int, output: int, source: Array, target: Array
    ) -> None:
        names = self.slot_name(node, slot), self.slot_name(node, output)
        ends = [(slot, source), (output, target)]
        sets: list[tuple[str, int, BoolArray]] = []
        for name, (end, _) in zip(names, ends, strict=True):
            axis = axis_of(relation, end, factor)
            if name is None:
                raw = self._raw_name(node, end)
                name = raw if raw is not None else ""
            kept = self.kept[name][axis] if name else None
            if kept is None:
                return
            sets.append((name, axis, kept))
        (a, axis_a, kept_a), (b, axis_b, kept_b) = sets
        together = kept_a[source] | kept_b[target]
        if factor in relation.pinned:
            together = np.ones_like(together)
        if not together.any():
            return
        for name, axis, index, kept, other in ((a, axis_a, source, kept_a, b), (b, axis_b, target, kept_b, a)):
            wanted = np.zeros_like(kept)
            wanted[index[together]] = True
            self._appear(name)
            self._add(name, axis, wanted, _cause(node, other, name))

    def choose_blocks(self) -> None:
        """For every node with groups, the exact grouping that leaves the smallest weights, as things stand now."""
        self._choosing = True
        for node in self.nodes:
            if self.analysis.relations[node.index].ragged and self.working(node):
                self._choose_blocks(node)
                self._enqueue(node)

    def _choose_blocks(self, node: Node) -> None:
        relation = self.analysis.relations[node.index]
        (factor,) = relation.ragged
        groups = relation.sizes[factor] or 1
        grids = [grid.sum(axis=1) for _, _, grid in self._grids(node, relation, factor, groups)]
        divisors = [
            d for d in range(groups, 0, -1) if groups % d == 0 and (d == groups or node.index not in self._apart)
        ]
        self.blocks[node.index] = min(divisors, key=lambda blocks: block_cost(grids, blocks))

    def _grids(self, node: Node, relation: Relation, factor: str, blocks: int) -> list[tuple[str, int, BoolArray]]:
        """Every axis of groups: its tensor, its number, and what it keeps, one row per block."""
        found = []
        for slot, spec in relation.slots():
            name = self.slot_name(node, slot)
            for axis, factors in enumerate(spec):
                kept = self.kept[name][axis] if name is not None else None
                if name is not None and kept is not None and factors[:1] == (factor,):
                    found.append((name, axis, kept.reshape(blocks, -1)))
        return found

    def _balance(self, node: Node, relation: Relation) -> None:
        """Ragged factors: the same blocks in every operand, and equally many indices in each block of an axis."""
        for factor in relation.ragged:
            if not self._choosing:
                continue
            if node.index not in self.blocks:
                self._choose_blocks(node)
            grids = self._grids(node, relation, factor, self.blocks[node.index])
            used = np.any([grid.any(axis=1) for _, _, grid in grids], axis=0)
            for name, axis, grid in grids:
                wanted = level(grid, used, max(1, int(grid.sum(axis=1).max())))
                unused = ~any_along(grid, 1)
                for other, _, theirs in grids:
                    if other != name:
                        rows = unused & any_along(theirs, 1)
                        self._add(name, axis, (wanted & rows[:, None]).reshape(-1), _cause(node, other, name))
                reason = "every group of a grouped operator keeps equally many"
                self._add(name, axis, wanted.reshape(-1), Cause(node.label, name, reason))

    def grow(self) -> None:
        """Make the sets agree with every node until nothing changes."""
        while self.queue:
            node = self.queue.popleft()
            self.queued.discard(node.index)
            if self.working(node):
                self._agree(node)

    def view(self, node: Node) -> View:
        """The node with what it keeps now."""
        view = self._views.get(node.index)
        if view is None or view.blocks != self.blocks.get(node.index):
            view = replace(self.analysis.view(node), blocks=self.blocks.get(node.index))
            self._views[node.index] = view
            view.free.update({slot: self.free.get(name, {}) for slot, name in enumerate(node.inputs)})
        view.kept.clear()
        view.kept.update(self._kept_of(node, view))
        return view

    def _kept_of(self, node: Node, view: View) -> dict[int, Kept]:
        relation = self.analysis.relations[node.index]
        kept: dict[int, Kept] = {}
        slots = []
        for slot in (*range(len(view.inputs)), *(-1 - i for i in range(len(view.outputs)))):
            raw = self._raw_name(node, slot)
            if raw is not None:
                kept[slot] = self.kept[raw]
            name, spec = self.slot_name(node, slot), relation.spec(slot)
            if name is not None and spec is not None:
                slots.append((slot, spec, name))
        unions = self._unions(relation, slots)
        axes = {f: self.kept[n][a] for _s, spec, n in slots for a, f in enumerate(spec) if len(f) > 1}
        for slot, operand in enumerate(view.inputs):
            if operand is not None and slot not in kept:
                kept[slot] = [
                    self._of_spec(node, relation, slot, axis, operand, unions, axes) for axis in range(operand.rank)
                ]
        return kept

    def _of_links(self, node: Node, relation: Relation, slot: int, factor: str, extent: int) -> BoolArray:
        """What a constant keeps of an axis that is laid end to end with others: its part of the output."""
        kept = np.zeros(extent, np.bool_)
        for link in relation.links[factor]:
            name = self._raw_name(node, link.output)
            whole = self.kept[name][axis_of(relation, link.output, factor)] if name is not None else None
            if link.input == slot:
                kept[link.source] |= True if whole is None else whole[link.target]
        return kept

    def _of_spec(
        self,
        node: Node,
        relation: Relation,
        slot: int,
        axis: int,
        operand: Operand,
        unions: dict[str, BoolArray],
        axes: dict[AxisSpec, BoolArray | None],
    ) -> BoolArray | None:
        """What a constant keeps of one axis: the same as an operand with the same factors, else their product."""
        extent = operand.extent(axis)
        spec = relation.spec(slot)
        if extent is None:
            return None
        factors = spec[axis] if spec is not None else ()
        if not factors:
            return np.ones(extent, np.bool_)
        if factors[0] in relation.links:
            return self._of_links(node, relation, slot, factors[0], extent)
        same = axes.get(factors)
        if same is not None:
            return same
        whole = {f: np.ones(relation.sizes[f] or 1, np.bool_) for f in factors if f not in unions}
        wanted = _product(factors, unions | whole if whole else unions)
        assert wanted is not None
        return wanted


def block_cost(counts: list[Array], blocks: int) -> float:
    """Size of weights with this many blocks, given how many indices each group keeps on every axis of groups."""
    size, used = 1.0, np.zeros(blocks, np.bool_)
    for count in counts:
        block = count.reshape(blocks, -1).sum(axis=1)
        used |= block > 0
        size *= max(1, int(block.max()))
    return size * max(1, int(used.sum()))


def level(grid: BoolArray, used: BoolArray, count: int) -> BoolArray:
    """Raise every used row of `grid` to `count` indices, first those that are there, then the lowest."""
    order = np.argsort(~grid, axis=1, kind="stable")
    wanted = np.zeros_like(grid)
    np.put_along_axis(wanted, order[:, :count], True, axis=1)
    return wanted & used[:, None]


def _projections(factors: AxisSpec, kept: BoolArray, relation: Relation) -> dict[str, BoolArray]:
    if len(factors) == 1:
        return {factors[0]: kept}
    sizes = [relation.sizes[f] for f in factors]
    if any(size is None for size in sizes):
        return {}
    grid = kept.reshape([size or 1 for size in sizes])
    axes = range(len(factors))
    return {f: any_along(grid, tuple(a for a in axes if a != i)) for i, f in enumerate(factors)}


def _product(factors: AxisSpec, unions: dict[str, BoolArray]) -> BoolArray | None:
    if any(factor not in unions for factor in factors):
        return None
    result = unions[factors[0]]
    for factor in factors[1:]:
        result = np.logical_and.outer(result, unions[factor]).reshape(-1)
    return result


def _cause(node: Node, source: str, name: str) -> Cause:
    if not source:
        return Cause(node.label, source, "the operator keeps this axis whole")
    return Cause(node.label, source, "it stays in " + source if source != name else "axes keep a product")

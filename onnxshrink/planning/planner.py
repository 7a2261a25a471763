"""When nothing grows by itself: representatives, shared weights, empty axes; then the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.facts import everything, project
from onnxshrink.graph import Node
from onnxshrink.planning.agreement import Agreement, block_cost
from onnxshrink.planning.data import Cause, Kept, Plan
from onnxshrink.weights import BoolArray


class Planner(Agreement):
    """The sets from start to plan."""

    def __init__(self, analysis: Analysis, apart: set[int]) -> None:
        super().__init__(analysis, apart)
        self.shared = _shared_constants(analysis, self.nodes)
        self._users = {name: [node for node in self.nodes if name in node.inputs] for name in self.shared}

    def settle(self) -> bool:
        """Ask for representatives of constants, then for one index where an axis has none. True if that grew a set."""
        grown = False
        for node in self.nodes:
            rule = self.analysis.rules[node.index]
            if rule is not None and rule.represent is not None and self.working(node):
                grown |= self._retain(node, rule.represent(self.view(node)))
                self.grow()
        return grown or self._share() or self._fill()

    def _share(self) -> bool:
        """Let the uses of one constant agree where the copies would be larger than what they agree on."""
        grown = False
        for name in sorted(self.shared):
            if _agreed(self._kept_by_users(name)) is None:
                continue
            state, changed = self.snapshot(), False
            while self._unite(name):
                changed = True
            if not changed:
                continue
            united, after = self.snapshot(), self._weights()
            self.restore(state)
            if after > self._weights():
                # What comes back with it weighs more than the copy.
                self.shared.discard(name)
            else:
                self.restore(united)
                grown = True
        return grown

    def _unite(self, name: str) -> bool:
        """Let each use of a constant keep what the others keep. Whether that grew a set."""
        together = _agreed(self._kept_by_users(name))
        if together is None:
            return False
        grown = False
        for node, slot, other, _ in self._constant_uses(self._users[name]):
            grown |= other == name and self._grow_constant(node, slot, name, together)
        self.grow()
        return grown

    def _kept_by_users(self, constant: str) -> list[Kept]:
        """What each use of a shared constant keeps of it."""
        return [kept for _, _, name, kept in self._constant_uses(self._users[constant]) if name == constant]

    def _constant_uses(self, nodes: Iterable[Node]) -> list[tuple[Node, int, str, Kept]]:
        """Every use of a constant by some nodes: the node, the input, the constant, what this use keeps."""
        found = []
        for node in nodes:
            if self.working(node):
                kept = self.view(node).kept
                found += [
                    (node, slot, name, list(kept[slot]))
                    for slot, name in enumerate(node.inputs)
                    if name in self.analysis.constants and slot in kept
                ]
        return found

    def _weights(self) -> int:
        """Elements of all constants as they would be written, equal copies once."""
        sizes = {}
        for _, _, name, kept in self._constant_uses(self.nodes):
            masks = [mask for mask in kept if mask is not None]
            key = (name, *(mask.tobytes() for mask in masks))
            sizes[key] = int(np.prod([int(mask.sum()) for mask in masks], dtype=np.int64))
        return sum(sizes.values())

    def _grow_constant(self, node: Node, slot: int, constant: str, wanted: list[BoolArray]) -> bool:
        """Let a use of a constant keep more, by growing the computed operands that share its factors."""
        relation, grown = self.analysis.relations[node.index], False
        cause = Cause(node.label, constant, f"{constant} is shared, and a copy would be larger")
        for axis, factors in enumerate(relation.spec(slot) or ()):
            if len(factors) != 1 or factors[0] in relation.links or relation.ragged:
                continue
            for other, spec in relation.slots():
                name = self.slot_name(node, other)
                for position, theirs in enumerate(spec):
                    if name is not None and theirs == factors:
                        grown |= self._add(name, position, wanted[axis], cause)
        return grown

    def _fill(self) -> bool:
        # From the end: there the factors of a product are often axes of their own, some of which keep indices already.
        grown = False
        for name in reversed(self.kept):
            for axis, kept in enumerate(self.kept[name]):
                if name in self.present and kept is not None and kept.size and not kept.any():
                    chosen = np.zeros_like(kept)
                    chosen[self._best_host(name, axis, kept.size)] = True
                    self._add(name, axis, chosen, Cause("", name, "an axis keeps at least one index"))
                    self.grow()
                    grown = True
        return grown

    def _best_host(self, name: str, axis: int, extent: int) -> int:
        """The index of the largest constant, in which others can be folded; the first where nothing is known."""
        known = self.analysis.known.get(name)
        if known is None or known.value.dtype.kind != "f":
            return 0
        size = np.where(known.mask, np.abs(known.value.astype(np.float64)), 0.0)
        largest = size.max(axis=tuple(a for a in range(size.ndim) if a != axis))
        return int(np.broadcast_to(largest, (extent,)).argmax())

    def misjoined(self) -> set[int]:
        """Nodes whose groups were joined, and would now be smaller apart: more is kept than when that was decided."""
        found = set()
        for node in self.nodes:
            relation = self.analysis.relations[node.index]
            if node.index not in self.blocks or not self.working(node):
                continue
            (factor,) = relation.ragged
            groups = relation.sizes[factor] or 1
            grids = [grid.sum(axis=1) for _, _, grid in self._grids(node, relation, factor, groups)]
            blocks = self.blocks[node.index]
            if blocks < groups and block_cost(grids, groups) <= block_cost(grids, blocks):
                found.add(node.index)
        return found

    def careless(self) -> set[int]:
        """Nodes with a partial function that keep elements which neither count nor are known: those could be anything.

        The set only ever grows, and is nearly always empty.
        """
        found = set()
        for node in self.nodes:
            rule = self.analysis.rules[node.index]
            if rule is None or node.index in self.analysis.throughout or not self.working(node):
                continue
            names = [node.inputs[slot] for slot in rule.partial if slot < len(node.inputs)]
            if all(name in self.analysis.constants for name in names):
                continue
            # Of several inputs one may make the result known, and another must still not be anything: 0 / 0.
            one = sum(bool(name) for name in node.inputs) == 1
            if any(self._keeps_idle(name, one) for name in node.outputs if name in self.present):
                found.add(node.index)
        return found

    def _keeps_idle(self, name: str, unknown_only: bool) -> bool:
        known, live = self.analysis.known.get(name), self.analysis.live(name)
        rest = ~known.mask if known is not None and unknown_only else everything(live.ndim)
        for axis, kept in enumerate(self.kept[name]):
            if kept is not None:
                idle = kept & ~project(live, axis, kept.size) & project(rest, axis, kept.size)
                if idle.any():
                    return True
        return False

    def finish(self) -> Plan:
        settled = {n.index: self.settled[n.index] for n in self.nodes if n.index in self.settled and self.active(n)}
        plan = Plan(self.kept, self.present, settled=settled, causes=self.causes, cause=self.cause)
        for node in self.nodes:
            if not self.working(node):
                continue
            rule, view = self.analysis.rules[node.index], self.view(node)
            plan.frozen[node.index] = self.frozen[node.index]
            if node.index in self.blocks:
                plan.blocks[node.index] = self.blocks[node.index]
            plan.constants[node.index] = {
                slot: view.kept[slot]
                for slot in range(len(view.inputs))
                if self._raw_name(node, slot) is None and slot in view.kept
            }
            if rule is not None and rule.fold is not None:
                plan.folds[node.index] = dict(rule.fold(view))
        return plan


def _shared_constants(analysis: Analysis, nodes: list[Node]) -> set[str]:
    """Constants of more than one dimension that several inputs read."""
    counts = Counter(name for node in nodes for name in node.inputs if name in analysis.constants)
    return {name for name, count in counts.items() if count > 1 and len(analysis.constants[name].shape) > 1}


def _agreed(uses: list[Kept]) -> list[BoolArray] | None:
    """What the uses of a constant keep together, if that is smaller than the copies that they would need."""
    sizes = {}
    for kept in uses:
        masks = [mask for mask in kept if mask is not None]
        sizes[tuple(mask.tobytes() for mask in masks)] = int(np.prod([mask.sum() for mask in masks], dtype=np.int64))
    if len(sizes) < 2 or any(mask is None for kept in uses for mask in kept):
        return None
    union = [
        np.any(np.stack([mask for kept in uses if (mask := kept[axis]) is not None]), axis=0)
        for axis in range(len(uses[0]))
    ]
    size = int(np.prod([mask.sum() for mask in union], dtype=np.int64))
    return union if size < sum(sizes.values()) else None

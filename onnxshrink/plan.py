"""Which indices of which axis stay: the least fixpoint of *kept*, with a cause for each growth. Names no operator.

Every axis starts from the indices that hold a live element. Then, node by node until nothing grows, the sets are made
to agree with the node's factors and index maps. Growth only, so it ends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from onnxshrink.analyse import Analysis, find_needed
from onnxshrink.facts import Known, everything, project
from onnxshrink.graph import Node
from onnxshrink.notation import AxisSpec, Relation
from onnxshrink.registry import Keep
from onnxshrink.view import Fold, Operand, View
from onnxshrink.weights import Array, BoolArray, any_along

Kept = list[BoolArray | None]


@dataclass(frozen=True)
class Cause:
    """Why an index stays: the node that asked, the tensor that it came from, and the reason in words."""

    node: str
    source: str
    reason: str


# A node whose outputs are known becomes a constant no larger than its own weights; shape arithmetic, than this.
_SETTLED_ELEMENTS = 4096

LIVE = Cause("", "", "live")
INTERFACE = Cause("", "", "an input or output of the model")


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays of every tensor, and what is folded where. Data only.

    Attributes:
        kept: per computed tensor, per axis, a mask of what stays; None for an axis of unknown extent.
        present: tensors that are computed at all.
        folds: per node index, per input, constants that leave.
        frozen: per node index, per input, the compressed constant that takes the place of a computed tensor.
        settled: per node index, the constants that take the place of a node's outputs.
        blocks: per node index, into how many blocks the groups of an operator are joined.
        constants: per node index, per constant (or frozen) input, per axis, a mask of what this use keeps.
        causes: every cause, referred to by number.
        cause: per tensor, per axis, the number of the cause of each index; -1: does not stay.
    """

    kept: dict[str, Kept]
    present: set[str]
    folds: dict[int, dict[int, Fold]] = field(default_factory=dict)
    frozen: dict[int, dict[int, Array]] = field(default_factory=dict)
    constants: dict[int, dict[int, Kept]] = field(default_factory=dict)
    settled: dict[int, list[Array]] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)
    cause: dict[str, list[Array | None]] = field(default_factory=dict)

    def shrinks(self, name: str) -> bool:
        """Whether a tensor that stays loses indices."""
        return name in self.present and any(k is not None and not k.all() for k in self.kept[name])


def make_plan(analysis: Analysis) -> Plan:
    """The smallest sets that agree with every node of the graph."""
    apart: set[int] = set()
    while True:
        planner = _Planner(analysis, apart)
        planner.start()
        planner.grow()
        planner.choose_blocks()
        planner.grow()
        while planner.settle():
            planner.grow()
        careless, misjoined = planner.careless(), planner.misjoined()
        if not careless and not misjoined:
            return planner.finish()
        apart |= misjoined
        if careless:
            analysis.throughout.update(careless)
            find_needed(analysis)


class _Planner:
    """The growing sets."""

    def __init__(self, analysis: Analysis, apart: set[int]) -> None:
        self.analysis = analysis
        self._apart = apart
        self.nodes = analysis.nodes()
        self.kept: dict[str, Kept] = {}
        self.cause: dict[str, list[Array | None]] = {}
        self.causes = [LIVE, INTERFACE]
        self.present: set[str] = set()
        self.frozen: dict[int, dict[int, Array]] = {}
        self.users: dict[str, list[Node]] = {}
        self.queue: deque[Node] = deque()
        self.queued: set[int] = set()
        self._views: dict[int, View] = {}
        self._choosing = False
        self.settled: dict[int, list[Array]] = {}
        self.blocks: dict[int, int] = {}
        self.shared = _shared_constants(analysis, self.nodes)
        self.free: dict[str, dict[int, BoolArray]] = {}

    # --- where the sets start -----------------------------------------------------------------------------------

    def start(self) -> None:
        for name in self.analysis.graph.inputs:
            self._start_tensor(name)
        for node in self.nodes:
            for name in (*node.inputs, *node.outputs):
                if name and name not in self.analysis.constants:
                    self.users.setdefault(name, []).append(node)
                    self._start_tensor(name)
        interface = (*self.analysis.graph.inputs, *self.analysis.graph.outputs)
        for name in interface:
            if name in self.kept:
                self._keep_all(name)
        for node in self.nodes:
            values = _settled(self.analysis, node)
            if values is not None:
                self.settled[node.index] = values
            self.frozen[node.index] = self._freeze(node)
            self._find_free(node)
        for node in reversed(self.nodes):
            self._enqueue(node)

    def _start_tensor(self, name: str) -> None:
        if name in self.kept:
            return
        shape, live = self.analysis.shape(name), self.analysis.live(name)
        kept: Kept = []
        for axis, extent in enumerate(shape or ()):
            kept.append(project(live, axis, extent) if isinstance(extent, int) else None)
        self.kept[name] = kept
        self.cause[name] = [None if k is None else np.where(k, 0, -1).astype(np.int32) for k in kept]
        if shape is None or live.any():
            self.present.add(name)

    def _keep_all(self, name: str) -> None:
        self.present.add(name)
        for axis, kept in enumerate(self.kept[name]):
            if kept is not None:
                self._add(name, axis, np.ones_like(kept), INTERFACE)

    def _find_free(self, node: Node) -> None:
        """Positions of a linked axis that no input fills."""
        relation = self.analysis.relations[node.index]
        for factor, links in relation.links.items():
            for output in {link.output for link in links}:
                size = relation.sizes[f"{factor}@{output}"]
                unfilled = np.ones(size or 0, np.bool_)
                for link in links:
                    if link.output == output:
                        unfilled[link.target] = False
                if unfilled.any():
                    axes = self.free.setdefault(node.outputs[-1 - output], {})
                    axes[_axis_of(relation, output, factor)] = unfilled

    def _freeze(self, node: Node) -> dict[int, Array]:
        """Computed inputs that this node can take as a constant instead."""
        rule = self.analysis.rules[node.index]
        if rule is None or not rule.absorbs:
            return {}
        view = self.analysis.view(node)
        output = view.output()
        frozen: dict[int, Array] = {}
        for slot, operand in enumerate(view.inputs):
            if operand is None or operand.constant is not None or self.analysis.live(operand.name).any():
                continue
            others = [o for s, o in enumerate(view.inputs) if s != slot and s not in frozen and o is not None]
            if _covers(output, others, operand):
                frozen[slot] = stand_in(operand.known)
        return frozen

    # --- growth -------------------------------------------------------------------------------------------------

    def _enqueue(self, node: Node) -> None:
        if node.index not in self.queued:
            self.queued.add(node.index)
            self.queue.append(node)

    def _touch(self, name: str) -> None:
        for node in self.users.get(name, ()):
            self._enqueue(node)

    def _add(self, name: str, axis: int, indices: BoolArray, cause: Cause) -> bool:
        kept = self.kept[name][axis]
        if kept is None:
            return False
        new = indices & ~kept
        if not new.any():
            return False
        if cause not in self.causes[-1:]:
            self.causes.append(cause)
        numbers = self.cause[name][axis]
        assert numbers is not None
        numbers[new] = len(self.causes) - 1
        kept |= new
        self._touch(name)
        return True

    def _appear(self, name: str) -> None:
        if name not in self.present:
            self.present.add(name)
            self._touch(name)

    def grow(self) -> None:
        """Make the sets agree with every node until nothing changes."""
        while self.queue:
            node = self.queue.popleft()
            self.queued.discard(node.index)
            if self.working(node):
                self._agree(node)

    def active(self, node: Node) -> bool:
        """Whether the node is computed at all."""
        return any(name in self.present for name in node.outputs)

    def working(self, node: Node) -> bool:
        """Whether the node is computed by its operator, and not replaced by a constant."""
        return node.index not in self.settled and self.active(node)

    def slot_name(self, node: Node, slot: int) -> str | None:
        """The computed tensor at a slot; None for constants, frozen inputs and tensors that are not there."""
        names = node.inputs if slot >= 0 else node.outputs
        name = names[slot if slot >= 0 else -1 - slot]
        if name not in self.kept or (slot >= 0 and slot in self.frozen[node.index]):
            return None
        return name if name in self.present else None

    def _agree(self, node: Node) -> None:
        relation = self.analysis.relations[node.index]
        self._demand_inputs(node, relation)
        slots = [(slot, spec, name) for slot, spec in relation.slots() if (name := self.slot_name(node, slot))]
        self._agree_on_factors(node, relation, [(slot, spec, name) for slot, spec, name in slots])
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
        unions, origin = self._unions(relation, slots)
        for factor in relation.pinned:
            size = relation.sizes.get(factor)
            if size is not None and factor not in relation.links:
                unions[factor] = np.ones(size, np.bool_)
                origin[factor] = ""
        for _slot, spec, name in slots:
            for axis, factors in enumerate(spec):
                if not factors or self.kept[name][axis] is None or factors[0] in relation.links:
                    continue
                if factors[0] in relation.ragged and len(factors) > 1:
                    continue
                wanted = _product(factors, unions)
                if wanted is not None:
                    source = next((origin[f] for f in factors if origin.get(f, name) != name), name)
                    self._add(name, axis, wanted, _cause(node, source, name))

    def _unions(
        self, relation: Relation, slots: list[tuple[int, tuple[AxisSpec, ...], str]]
    ) -> tuple[dict[str, BoolArray], dict[str, str]]:
        """Per factor, the indices that any operand keeps, and the operand that keeps most of them."""
        unions: dict[str, BoolArray] = {}
        origin: dict[str, str] = {}
        for _slot, spec, name in slots:
            for axis, factors in enumerate(spec):
                kept = self.kept[name][axis]
                if kept is None or not factors or factors[0] in relation.links:
                    continue
                for factor, part in _projections(factors, kept, relation).items():
                    before = unions.get(factor)
                    if before is None:
                        unions[factor], origin[factor] = part, name
                    else:
                        if (part & ~before).any():
                            origin[factor] = name
                        unions[factor] = before | part
        return unions, origin

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
            axis = _axis_of(relation, end, factor)
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

    def _raw_name(self, node: Node, slot: int) -> str | None:
        names = node.inputs if slot >= 0 else node.outputs
        name = names[slot if slot >= 0 else -1 - slot]
        return name if name in self.kept and slot not in self.frozen[node.index] else None

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
        self.blocks[node.index] = min(divisors, key=lambda blocks: _block_cost(grids, blocks))

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
                reason = "every group of a grouped operator keeps equally many"
                self._add(name, axis, wanted.reshape(-1), Cause(node.label, name, reason))

    # --- when nothing grows by itself ---------------------------------------------------------------------------

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
        uses: dict[str, list[tuple[Node, int, Kept]]] = {}
        for node in self.nodes:
            names = [n for n in node.inputs if n in self.shared]
            if names and self.working(node):
                view = self.view(node)
                for slot, name in enumerate(node.inputs):
                    if name in names:
                        uses.setdefault(name, []).append((node, slot, list(view.kept[slot])))
        grown = False
        for name, found in uses.items():
            together = _agreed([kept for _, _, kept in found])
            if together is not None:
                for node, slot, _ in found:
                    grown |= self._grow_constant(node, slot, name, together)
        return grown

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
        for name in self.kept:
            if name not in self.present:
                continue
            for axis, kept in enumerate(self.kept[name]):
                if kept is not None and kept.size and not kept.any():
                    first = np.zeros_like(kept)
                    first[0] = True
                    self._add(name, axis, first, Cause("", name, "an axis keeps at least one index"))
                    return True
        return False

    # --- the result ---------------------------------------------------------------------------------------------

    def view(self, node: Node) -> View:
        """The node with what it keeps now."""
        view = self._views.get(node.index)
        if view is None:
            view = self.analysis.view(node)
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
        unions, _ = self._unions(relation, slots)
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
            whole = self.kept[name][_axis_of(relation, link.output, factor)] if name is not None else None
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
        wanted = _product(factors, {f: unions.get(f, np.ones(relation.sizes[f] or 1, np.bool_)) for f in factors})
        assert wanted is not None
        return wanted

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
            if blocks < groups and _block_cost(grids, groups) <= _block_cost(grids, blocks):
                found.add(node.index)
        return found

    def careless(self) -> set[int]:
        """Nodes with a partial function that keep elements which neither count nor are known: those could be anything.

        The set only ever grows, and is nearly always empty.
        """
        found = set()
        for node in self.nodes:
            rule = self.analysis.rules[node.index]
            if rule is None or not rule.partial or node.index in self.analysis.throughout or not self.working(node):
                continue
            if any(self._keeps_unknown(name) for name in node.outputs if name in self.present):
                found.add(node.index)
        return found

    def _keeps_unknown(self, name: str) -> bool:
        known, live = self.analysis.known.get(name), self.analysis.live(name)
        rest = ~known.mask if known is not None else everything(live.ndim)
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
                view = replace(view, blocks=self.blocks[node.index])
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


def _settled(analysis: Analysis, node: Node) -> list[Array] | None:
    """Values of a node all of whose outputs are known wherever they are needed, where they are not larger than what they take the place of."""
    if analysis.rules[node.index] is None:
        return None
    view = analysis.view(node)
    values = [_full(analysis, operand) if operand is not None else None for operand in view.outputs]
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return None
    inputs = [operand for operand in view.inputs if operand is not None]
    weights = sum(operand.constant.size for operand in inputs if operand.constant)
    if all(operand.constant for operand in inputs):
        # Analysis would have taken the outputs for constants, were they not larger than what they are made of.
        weights = 0
    size = sum(value.size for value in found)
    numbers = all(np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_ for value in found)
    return found if size <= (_SETTLED_ELEMENTS if numbers else weights) else None


def _full(analysis: Analysis, operand: Operand) -> Array | None:
    shape = operand.static_shape()
    if shape is None or analysis.live(operand.name).any():
        return None
    return np.broadcast_to(stand_in(operand.known), shape)


def stand_in(known: Known) -> Array:
    """Values that do where nothing is live: what is known, and zero where nothing is needed."""
    return known.value if known.everything else np.where(known.mask, known.value, np.zeros((), known.value.dtype))


def _block_cost(counts: list[Array], blocks: int) -> float:
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


def _covers(output: Operand, others: list[Operand], operand: Operand) -> bool:
    """Whether the output keeps its shape when `operand` becomes a compressed constant."""
    if output.shape is None or operand.shape is None or not others:
        return False
    for position in range(1, output.rank + 1):
        extent = output.shape[-position]
        mine = operand.shape[-position] if position <= operand.rank else 1
        reached = [o.shape[-position] for o in others if o.shape is not None and position <= o.rank]
        if extent not in reached and mine != 1:
            return False
        if extent is None and mine != 1:
            return False
    return max((o.rank for o in others), default=0) == output.rank


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


def _axis_of(relation: Relation, slot: int, factor: str) -> int:
    spec = relation.spec(slot)
    assert spec is not None
    return next(axis for axis, factors in enumerate(spec) if factors == (factor,))


def joined_inputs(relation: Relation) -> dict[int, int]:
    """Inputs laid end to end along a linked axis: one that keeps nothing there is left out of the node."""
    found: dict[int, int] = {}
    for factor, links in relation.links.items():
        inputs = {link.input for link in links}
        if len(inputs) > 1 and len({link.output for link in links}) == 1:
            found.update({slot: _axis_of(relation, slot, factor) for slot in inputs})
    return found


def _cause(node: Node, source: str, name: str) -> Cause:
    if not source:
        return Cause(node.label, source, "the operator keeps this axis whole")
    return Cause(node.label, source, "it stays in " + source if source != name else "axes keep a product")

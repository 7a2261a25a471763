"""What every tensor keeps, as it grows: where the sets start, and what is told when one grows."""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.facts import project
from onnxshrink.graph import Node
from onnxshrink.notation import axis_of
from onnxshrink.planning.constants import freeze, settle
from onnxshrink.planning.data import INTERFACE, LIVE, Cause, Kept
from onnxshrink.weights import Array, BoolArray


class Sets:
    """The growing sets.

    Attributes:
        kept, cause, causes, present: as in the plan.
        frozen: per node index, per input, the compressed constant that takes the place of a computed tensor.
        settled: per node index, the constants that take the place of its outputs.
        free: per tensor, per axis, positions that no input fills.
        users: per tensor, its producer and its readers.
        readers: per tensor, its readers.
        journal: what grew since it was begun, to be taken back by `undo`; None: nothing is noted.
    """

    def __init__(self, analysis: Analysis, apart: set[int]) -> None:
        self.analysis = analysis
        self._apart = apart
        self.nodes = analysis.nodes()
        self.kept: dict[str, Kept] = {}
        self.cause: dict[str, list[Array | None]] = {}
        self.causes = [LIVE, INTERFACE]
        self.present: set[str] = set()
        self.frozen: dict[int, dict[int, Array]] = {}
        self.settled: dict[int, list[Array]] = {}
        self.free: dict[str, dict[int, BoolArray]] = {}
        self.users: dict[str, list[Node]] = {}
        self.readers: defaultdict[str, list[Node]] = defaultdict(list)
        self.queue: deque[Node] = deque()
        self.queued: set[int] = set()
        self.journal: list[tuple[str, int, BoolArray] | str] | None = None

    def start(self) -> None:
        for node in self.nodes:
            for name in node.inputs:
                self.readers[name].append(node)
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
            values = settle(self.analysis, node)
            if values is not None:
                self.settled[node.index] = values
            self.frozen[node.index] = freeze(self.analysis, node)
            self._find_free(node)
        for node in reversed(self.nodes):
            self._enqueue(node)

    def _start_tensor(self, name: str) -> None:
        if name in self.kept:
            return
        shape, live = self.analysis.shape(name), self.analysis.live(name)
        kept: Kept = []
        start = live & ~self._foldable_frame(name) & ~self._foldable_line(name)
        for axis, extent in enumerate(shape or ()):
            kept.append(project(start, axis, extent) if isinstance(extent, int) else None)
        self.kept[name] = kept
        self.cause[name] = [None if k is None else np.where(k, 0, -1).astype(np.int32) for k in kept]
        if shape is None or live.any():
            self.present.add(name)

    def _foldable_frame(self, name: str) -> BoolArray:
        """Elements that hold one value but for a frame of zeros, where every reader folds those."""
        framed = self.analysis.framed.get(name)
        if framed is None or not all(self._folds_frames(node, name) for node in self.readers[name]):
            return np.zeros((1,) * self.analysis.rank(name), np.bool_)
        return framed.mask

    def _foldable_line(self, name: str) -> BoolArray:
        """Indices for which another one can stand, where every reader lets it."""
        line, rank = self.analysis.lines.get(name), self.analysis.rank(name)
        if line is None or not self._folds_line(name):
            return np.zeros((1,) * rank, np.bool_)
        return np.asarray(line.others.reshape([-1 if axis == line.axis else 1 for axis in range(rank)]))

    def _folds_line(self, name: str) -> bool:
        """Whether every reader folds the line of a tensor, or passes it on to such as do."""
        if name not in self.analysis.lines or name in self.analysis.graph.outputs:
            return False
        for node in self.readers[name]:
            rule, slots = self.analysis.rules[node.index], [s for s, given in enumerate(node.inputs) if given == name]
            folded = rule.lined(self.analysis.view(node)) if rule is not None and rule.lined is not None else ()
            moved = rule is not None and rule.line is not None and slots == [0] and self._folds_line(node.outputs[0])
            if not moved and not set(slots) <= set(folded):
                return False
        return True

    def _folds_frames(self, node: Node, name: str) -> bool:
        rule = self.analysis.rules[node.index]
        return rule is not None and all(slot in rule.framed for slot, given in enumerate(node.inputs) if given == name)

    def _keep_all(self, name: str) -> None:
        self.present.add(name)
        for axis, kept in enumerate(self.kept[name]):
            if kept is not None:
                self._add(name, axis, np.ones_like(kept), INTERFACE)

    def _find_free(self, node: Node) -> None:
        """Positions of a linked axis that no input fills; a frame put around them costs nothing either."""
        relation = self.analysis.relations[node.index]
        if node.outputs[0] in self.analysis.framed and node.inputs[0] in self.free:
            self.free[node.outputs[0]] = dict(self.free[node.inputs[0]])
        for factor, links in relation.links.items():
            for output in {link.output for link in links}:
                size = relation.sizes[f"{factor}@{output}"]
                unfilled = np.ones(size or 0, np.bool_)
                for link in links:
                    if link.output == output:
                        unfilled[link.target] = False
                if unfilled.any():
                    axes = self.free.setdefault(node.outputs[-1 - output], {})
                    axes[axis_of(relation, output, factor)] = unfilled

    def _enqueue(self, node: Node) -> None:
        if node.index not in self.queued:
            self.queued.add(node.index)
            self.queue.append(node)

    def snapshot(self) -> tuple[dict[str, Kept], dict[str, list[Array | None]], set[str]]:
        """What is kept now, to return to."""
        kept = {name: [None if k is None else k.copy() for k in axes] for name, axes in self.kept.items()}
        cause = {name: [None if c is None else c.copy() for c in axes] for name, axes in self.cause.items()}
        return kept, cause, set(self.present)

    def restore(self, state: tuple[dict[str, Kept], dict[str, list[Array | None]], set[str]]) -> None:
        """Return to what was kept at a snapshot."""
        self.kept, self.cause, self.present = state

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
        if self.journal is not None:
            self.journal.append((name, axis, new))
        self._touch(name)
        return True

    def _appear(self, name: str) -> None:
        if name not in self.present:
            self.present.add(name)
            if self.journal is not None:
                self.journal.append(name)
            self._touch(name)

    def undo(self, journal: list[tuple[str, int, BoolArray] | str]) -> None:
        """Take back what was noted while the sets grew."""
        for entry in journal:
            if isinstance(entry, str):
                self.present.discard(entry)
                continue
            name, axis, new = entry
            kept, numbers = self.kept[name][axis], self.cause[name][axis]
            assert kept is not None
            assert numbers is not None
            kept &= ~new
            numbers[new] = -1

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

    def _raw_name(self, node: Node, slot: int) -> str | None:
        names = node.inputs if slot >= 0 else node.outputs
        name = names[slot if slot >= 0 else -1 - slot]
        return name if name in self.kept and slot not in self.frozen[node.index] else None

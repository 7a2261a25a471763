"""Widths: channel axes of weights, rounded up to a multiple where the original has the channels. Names no operator.

Kernels work in blocks of channels, so a width of 61 may take longer than one of 64. A few dead channels that stay are
lossless: they hold what they hold in the original.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.graph import Node
from onnxshrink.notation import AxisSpec, Relation
from onnxshrink.planning.agreement import level
from onnxshrink.planning.data import Cause
from onnxshrink.planning.planner import Planner
from onnxshrink.weights import BoolArray, any_along

Axis = tuple[str, int]  # a tensor and one of its axes
Journal = list[tuple[str, int, BoolArray] | str]
Words = Callable[[int, int], str]  # why a width is raised, from the widths before and after


@dataclass(frozen=True)
class Alignment:
    """The widths that are asked for.

    Attributes:
        multiple: of every width; 1: as it falls.
        chosen: for some classes of coupled axes, another multiple, by the first axis of the class.
        whole: classes that keep all channels.
        words: per class, the reason that goes on record.
        hosts: let a constant channel stay rather than append a channel of ones, which copies the whole tensor.
    """

    multiple: int = 1
    chosen: Mapping[Axis, int] = field(default_factory=dict)
    whole: frozenset[Axis] = frozenset()
    words: Mapping[Axis, Words] = field(default_factory=dict)
    hosts: bool = True

    def of(self, key: Axis) -> int:
        """The multiple for one class."""
        return self.chosen.get(key, self.multiple)

    def reason(self, key: Axis, before: int, after: int) -> str:
        """Why a width is raised."""
        if key in self.whole:
            return "it runs faster whole"
        if key in self.words:
            return self.words[key](before, after)
        return f"a width of {after}, a multiple of {self.of(key)}, instead of {before}"


@dataclass(frozen=True)
class Width:
    """A channel axis of a weight, seen at the computed tensor that it reads or writes.

    Attributes:
        node: the node with the weight.
        tensor, axis: the axis.
        key: first axis of the class of axes that lose the same indices.
        reads: whether the weight is summed over this axis.
        ragged: factor whose groups the axis consists of, if any.
    """

    node: Node
    tensor: str
    axis: int
    key: Axis
    reads: bool
    ragged: str | None = None


def find_widths(analysis: Analysis) -> list[Width]:
    """Every channel axis of a constant weight that sums over some of its axes, narrow axes first.

    Joined axes are wider than the parts that they are made of, and come out as the sum of these.
    """
    coupled = _Coupled(analysis)
    found = []
    for node in analysis.nodes():
        relation = analysis.relations[node.index]
        if analysis.rules[node.index] is not None:
            found += [
                Width(node, name, axis, coupled.key((name, axis)), reads, ragged)
                for name, axis, reads, ragged in _channel_axes(analysis, node, relation)
            ]
    return sorted(found, key=lambda width: _extent(analysis, width.tensor, width.axis))


def _extent(analysis: Analysis, name: str, axis: int) -> int:
    extent = (analysis.shape(name) or ())[axis]
    return extent if isinstance(extent, int) else 0


def _channel_axes(analysis: Analysis, node: Node, relation: Relation) -> list[tuple[str, int, bool, str | None]]:
    written = {f for spec in relation.outputs for factors in spec or () for f in factors}
    weights = [
        {f for factors in spec for f in factors}
        for slot, spec in enumerate(relation.inputs)
        if spec is not None and len(spec) > 1 and node.inputs[slot] in analysis.constants
    ]
    channels = set().union(*(factors for factors in weights if factors - written))
    found = []
    for slot, spec in relation.slots():
        name = node.inputs[slot] if slot >= 0 else node.outputs[-1 - slot]
        for axis, factors in enumerate(spec):
            if (
                name
                and name not in analysis.constants
                and _is_channel(analysis, relation, name, axis, factors, channels)
            ):
                ragged = factors[0] if factors[0] in relation.ragged else None
                found.append((name, axis, slot >= 0, ragged))
    return found


def _is_channel(
    analysis: Analysis, relation: Relation, name: str, axis: int, factors: AxisSpec, channels: set[str]
) -> bool:
    extent = (analysis.shape(name) or ())[axis]
    if not factors or not isinstance(extent, int) or relation.pinned.intersection(factors):
        return False
    return channels.issuperset(factors) and not any(f in relation.links for f in factors)


class _Coupled:
    """Axes that lose the same indices, by union and find."""

    def __init__(self, analysis: Analysis) -> None:
        self.above: dict[Axis, Axis] = {}
        for node in analysis.nodes():
            relation = analysis.relations[node.index]
            together: defaultdict[str, list[Axis]] = defaultdict(list)
            for slot, spec in relation.slots():
                name = node.inputs[slot] if slot >= 0 else node.outputs[-1 - slot]
                for axis, factors in enumerate(spec):
                    if factors and (len(factors) == 1 or factors[0] in relation.ragged) and name:
                        together[factors[0]].append((name, axis))
            for factor, axes in together.items():
                if factor not in relation.links:
                    for axis_ in axes[1:]:
                        self._join(axes[0], axis_)

    def key(self, axis: Axis) -> Axis:
        """The first axis of the class."""
        while axis in self.above:
            axis = self.above[axis]
        return axis

    def _join(self, one: Axis, other: Axis) -> None:
        a, b = self.key(one), self.key(other)
        if a != b:
            self.above[b] = a


class Aligner(Planner):
    """A planner that raises widths once nothing else grows.

    Attributes:
        refused: widths that could not be raised to the multiple asked for, with the reason.
    """

    def __init__(self, analysis: Analysis, apart: set[int], alignment: Alignment) -> None:
        super().__init__(analysis, apart)
        self.alignment = alignment
        self.widths = find_widths(analysis)
        self.refused: dict[Axis, str] = {}
        self._by_axis: defaultdict[Axis, list[Width]] = defaultdict(list)
        for width in self.widths:
            self._by_axis[width.tensor, width.axis].append(width)

    def start(self) -> None:
        super().start()
        if self.alignment.hosts:
            self.free = {n: dict(enumerate(map(_everywhere, kept))) for n, kept in self.kept.items()}

    def settle(self) -> bool:
        return super().settle() or self._align()

    def _align(self) -> bool:
        raised = [self._raise(width) for width in self.widths if (width.tensor, width.axis) not in self.refused]
        return any(raised)

    def _mask(self, width: Width) -> BoolArray | None:
        """What the axis keeps, None where nothing is to be raised: it is not there, or whole."""
        kept = self.kept[width.tensor][width.axis]
        if width.tensor not in self.present or not self.working(width.node) or kept is None or kept.all():
            return None
        return kept

    def _wanted(self, width: Width, kept: BoolArray) -> BoolArray | None:
        """What the axis should keep; None where the original has too few channels."""
        if width.key in self.alignment.whole:
            return np.ones_like(kept)
        multiple = self.alignment.of(width.key)
        blocks = self._blocks_of(width)
        grid = kept.reshape(blocks, -1)
        if blocks > 1 and grid.shape[1] > 1:
            used = any_along(grid, 1)
            target = _rounded(int(grid.sum(axis=1).max()), multiple)
            return level(grid, used, target).reshape(-1) if target <= grid.shape[1] else None
        count = int(kept.sum())
        target = _rounded(count, multiple)
        if target > kept.size:
            return None
        wanted: BoolArray = kept.copy()
        wanted[self._order(width, kept)[: target - count]] = True
        return wanted

    def _blocks_of(self, width: Width) -> int:
        if width.ragged is None:
            return 1
        size = self.analysis.relations[width.node.index].sizes[width.ragged]
        return self.blocks.get(width.node.index, size or 1)

    def _order(self, width: Width, kept: BoolArray) -> list[int]:
        """Dead channels, those first that constants can be folded in."""
        known = self.analysis.known.get(width.tensor)
        dead = np.flatnonzero(~kept)
        if known is None:
            return [int(i) for i in dead]
        found = known.nonzero()
        rest = tuple(a for a in range(found.ndim) if a != width.axis)
        hosts = np.broadcast_to(found.any(axis=rest), kept.shape)
        return [int(i) for i in dead[np.argsort(~hosts[dead], kind="stable")]]

    def _is_aligned(self, width: Width, without: BoolArray | None = None) -> bool:
        kept = self._mask(width)
        if kept is None:
            return True
        kept = kept if without is None else kept & ~without
        wanted = self._wanted(width, kept)
        return wanted is not None and bool((wanted == kept).all())

    def _spoils(self, width: Width, grown: Journal) -> bool:
        """Whether a growth leaves a width odd that was not."""
        new: dict[Axis, BoolArray] = {}
        for entry in grown:
            if not isinstance(entry, str):
                axis = entry[:2]
                new[axis] = new[axis] | entry[2] if axis in new else entry[2]
        others = [other for axis in new for other in self._by_axis.get(axis, ()) if other.key != width.key]
        return any(
            not self._is_aligned(other) and self._is_aligned(other, new[other.tensor, other.axis]) for other in others
        )

    def _raise(self, width: Width) -> bool:
        kept = self._mask(width)
        if kept is None:
            return False
        before, wanted = int(kept.sum()), self._wanted(width, kept)
        axis = (width.tensor, width.axis)
        if wanted is None:
            self.refused[axis] = (
                f"{before} of {kept.size} channels: no more multiples of {self.alignment.of(width.key)}"
            )
            return False
        if (wanted & ~kept).any():
            cause = Cause(width.node.label, width.tensor, self.alignment.reason(width.key, before, int(wanted.sum())))
            return self._try(width, wanted, cause)
        return False

    def _try(self, width: Width, wanted: BoolArray, cause: Cause) -> bool:
        """Grow an axis with its partners, unless that leaves one of them with another odd width."""
        self.journal = []
        self._add(width.tensor, width.axis, wanted, cause)
        self.grow()
        grown, self.journal = self.journal, None
        if width.key in self.alignment.whole or (self._is_aligned(width) and not self._spoils(width, grown)):
            return True
        self.undo(grown)
        self.refused[width.tensor, width.axis] = "what it is coupled with grows by another number"
        return False


def _everywhere(kept: BoolArray | None) -> BoolArray:
    return np.ones(0 if kept is None else kept.size, np.bool_)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

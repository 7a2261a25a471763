"""Channel axes of weights, and which axes lose the same indices. Names no operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from onnxshrink.analyse import Analysis
from onnxshrink.graph import Node
from onnxshrink.notation import AxisSpec, Relation, TensorSpec

Axis = tuple[str, int]  # a tensor and one of its axes


@dataclass(frozen=True)
class Width:
    """A channel axis of a weight, seen at the computed tensor that it reads or writes.

    Attributes:
        node: the node with the weight.
        tensor, axis: the axis.
        key: first axis of the class of axes that lose the same indices.
        ragged: factor whose groups the axis consists of, if any.
    """

    node: Node
    tensor: str
    axis: int
    key: Axis
    ragged: str | None = None


def find_widths(analysis: Analysis) -> list[Width]:
    """Every channel axis of a constant weight that sums over some of its axes, narrow axes first.

    Joined axes are wider than the parts that they are made of, and come out as the sum of these.
    """
    coupled = Coupled(analysis)
    found = []
    for node in analysis.nodes():
        relation = analysis.relations[node.index]
        if analysis.rules[node.index] is not None:
            found += [
                Width(node, name, axis, coupled.key((name, axis)), ragged)
                for name, axis, ragged in _channel_axes(analysis, node, relation)
            ]
    # Groups first: what suits each of them suits all together, but not the other way round.
    return sorted(found, key=lambda width: (width.ragged is None, _extent(analysis, width.tensor, width.axis)))


def _extent(analysis: Analysis, name: str, axis: int) -> int:
    extent = (analysis.shape(name) or ())[axis]
    return extent if isinstance(extent, int) else 0


def _channel_axes(analysis: Analysis, node: Node, relation: Relation) -> list[tuple[str, int, str | None]]:
    written = {f for spec in relation.outputs for factors in spec or () for f in factors}
    weights = [
        {f for factors in spec for f in factors}
        for slot, spec in enumerate(relation.inputs)
        if spec is not None and len(spec) > 1 and node.inputs[slot] in analysis.constants
    ]
    channels = set().union(*(factors for factors in weights if factors - written))
    found = []
    for name, spec in _computed(analysis, node, relation):
        for axis, factors in enumerate(spec):
            if _is_channel(analysis, relation, name, axis, factors, channels):
                ragged = factors[0] if factors[0] in relation.ragged else None
                found.append((name, axis, ragged))
    return found


def _computed(analysis: Analysis, node: Node, relation: Relation) -> Iterator[tuple[str, TensorSpec]]:
    """Operands that take part and are no constants: name and axes."""
    for slot, spec in relation.slots():
        name = node.inputs[slot] if slot >= 0 else node.outputs[-1 - slot]
        if name and name not in analysis.constants:
            yield name, spec


def _is_channel(
    analysis: Analysis, relation: Relation, name: str, axis: int, factors: AxisSpec, channels: set[str]
) -> bool:
    extent = (analysis.shape(name) or ())[axis]
    if not factors or not isinstance(extent, int) or relation.pinned.intersection(factors):
        return False
    return channels.issuperset(factors) and not any(f in relation.links for f in factors)


class Coupled:
    """Axes that lose the same indices, by union and find."""

    def __init__(self, analysis: Analysis) -> None:
        self.above: dict[Axis, Axis] = {}
        for node in analysis.nodes():
            relation = analysis.relations[node.index]
            together: defaultdict[str, list[Axis]] = defaultdict(list)
            for name, spec in _computed(analysis, node, relation):
                for axis, factors in enumerate(spec):
                    if factors and (len(factors) == 1 or factors[0] in relation.ragged):
                        together[factors[0]].append((name, axis))
            for factor, axes in together.items():
                if factor not in relation.links:
                    for axis_ in axes[1:]:
                        self._join(axes[0], axis_)

    def key(self, axis: Axis) -> Axis:
        """The first axis of the class."""
        root = axis
        while root in self.above:
            root = self.above[root]
        while axis != root:
            self.above[axis], axis = root, self.above[axis]
        return root

    def _join(self, one: Axis, other: Axis) -> None:
        a, b = self.key(one), self.key(other)
        if a != b:
            self.above[b] = a

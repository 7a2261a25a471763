"""Constants that a model computes from constants: from which, and whether taking them for constants takes more room."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from functools import partial

from onnxshrink.graph import Graph, Node
from onnxshrink.registry import find
from onnxshrink.weights import Array, Constant, same

_KEPT = 1 << 16  # bytes; smaller results are kept for good
_ROOM = 1 << 27  # bytes of larger ones: those that were read last


class Results:
    """What nodes compute from constants. Large results are kept while there is room, and else computed again when read.

    Where an exporter transposes each weight before its product, all of them together are as large as the model.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[str, Array] = OrderedDict()

    def constant(self, name: str, value: Array, compute: Callable[[], Array]) -> Constant:
        """A computed tensor, given its elements now and how to compute them again."""
        if value.nbytes <= _KEPT:
            value.setflags(write=False)
            return Constant(name, value.shape, value.dtype, partial(same, value))
        self._remember(name, value)
        return Constant(name, value.shape, value.dtype, partial(self._read, name, compute))

    def _read(self, name: str, compute: Callable[[], Array]) -> Array:
        found = self._recent.get(name)
        return self._remember(name, compute() if found is None else found)

    def _remember(self, name: str, value: Array) -> Array:
        value.setflags(write=False)
        self._recent[name] = value
        self._recent.move_to_end(name)
        # The last one always stays: a node may read it twice.
        while len(self._recent) > 1 and sum(kept.nbytes for kept in self._recent.values()) > _ROOM:
            self._recent.popitem(last=False)
        return value


class Sources:
    """What the computed constants of a graph are made of. Small tensors of any kind are not looked at.

    Attributes:
        of: per computed constant, the stored ones that it is made of.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.of: dict[str, frozenset[str]] = {}
        self._results: dict[str, set[str]] = {}
        self._makers = {name: node for node in graph.nodes for name in node.outputs if name}
        for node in graph.nodes:
            given = [self.stored(name) for name in node.inputs if name]
            if _is_function(node) and given and None not in given:
                made_of = frozenset[str]().union(*(part for part in given if part is not None))
                self.of.update({name: made_of for name in node.outputs if name})
            else:
                self._read(name for name in node.inputs if name)
        self._read(iter(graph.outputs))

    def stored(self, name: str) -> frozenset[str] | None:
        """The stored constants that a tensor is made of; None when it depends on the model's inputs."""
        return frozenset([name]) if name in self._graph.constants else self.of.get(name)

    def behind(self, name: str, derived: Container[str]) -> frozenset[str]:
        """The stored constants that a constant is computed from, as the graph stands.

        Args:
            name: the constant.
            derived: all computed constants, those included that turned out to be known.
        """
        if name in self._graph.constants:
            return frozenset([name])
        node = self._makers.get(name) if name in derived else None
        return frozenset[str]().union(*(self.behind(given, derived) for given in node.inputs)) if node else frozenset()

    def _read(self, names: Iterator[str]) -> None:
        for name in names:
            for source in self.stored(name) or ():
                self._results.setdefault(source, set()).add(name)

    def swells(self, name: str, least: int) -> bool:
        """Whether all that is computed from a constant's sources takes more room than they do.

        Args:
            name: a stored or computed constant.
            least: no more bytes than this do not matter.
        """
        for source in self.stored(name) or ():
            results = self._results.get(source, set())
            if self._graph.constants[source].nbytes > least:
                # Other sources may go into the same results.
                sources = frozenset([source]).union(*(self.stored(result) or () for result in results))
                given = sum(self._graph.constants[other].nbytes for other in sources)
                if sum(map(self._nbytes, results)) > given + least:
                    return True
        return False

    def _nbytes(self, name: str) -> float:
        constant, shape, dtype = self._graph.constants.get(name), self._graph.shape(name), self._graph.dtype(name)
        if constant is not None:
            return constant.nbytes
        extents = [extent for extent in shape or () if isinstance(extent, int)]
        if shape is None or dtype is None or len(extents) < len(shape):
            return math.inf
        return math.prod(extents) * dtype.itemsize


def _is_function(node: Node) -> bool:
    """Whether a node's outputs are numbers that follow from its inputs."""
    rule = find(node.op, node.domain, node.version)
    return rule is not None and rule.refusal is None and not rule.decodes

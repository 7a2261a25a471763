"""Which stored weights a computed constant is made of, element by element. Names no operator.

Exporters transpose, cut, join and reshape the weights of a module before an operator reads them. What is known of the
result is carried back along the same relations that couple axes everywhere else.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.facts import compress, everything
from onnxshrink.graph import Node
from onnxshrink.notation import Relation, UnresolvedError, transfer
from onnxshrink.registry import find
from onnxshrink.weights import BoolArray


class Origins:
    """The constants of a graph, traced back to the weights that are stored in it."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._makers = {
            name: node for node in analysis.graph.nodes for name in node.outputs if name in analysis.derived
        }
        self._relation = cache(self._find_relation)

    def weights(self, name: str) -> frozenset[str]:
        """Names of the stored floating-point weights that a constant is made of; the constant itself when stored."""
        node = self._makers.get(name)
        if node is None:
            return frozenset({name})
        return frozenset().union(*(self.weights(source) for source in self._sources(node)))

    def trace(self, name: str, mask: BoolArray) -> dict[str, BoolArray]:
        """Elements of the stored weights that any of the given elements of a constant is made of.

        Args:
            name: the constant.
            mask: its elements; compressed, one axis per axis of the constant.

        Returns:
            by stored weight, a compressed mask of its elements.
        """
        node = self._makers.get(name)
        if node is None:
            return {name: mask}
        relation, output = self._relation(node), -1 - node.outputs.index(name)
        found: dict[str, BoolArray] = {}
        for slot, source in enumerate(node.inputs):
            if source in self._sources(node):
                for weight, part in self.trace(source, self._part(relation, mask, output, slot, source)).items():
                    found[weight] = compress(found[weight] | part) if weight in found else part
        return found

    def _sources(self, node: Node) -> list[str]:
        """Inputs that hold weights; integers are shapes and positions."""
        constants = self._analysis.constants
        return [name for name in node.inputs if name in constants and constants[name].dtype.kind not in "iub"]

    def _find_relation(self, node: Node) -> Relation | None:
        rule = find(node.op, node.domain, node.version)
        if rule is None or rule.refusal is not None:
            return None
        try:
            return rule.relation(self._analysis.view(node))
        except UnresolvedError:
            return None

    def _part(self, relation: Relation | None, mask: BoolArray, output: int, slot: int, source: str) -> BoolArray:
        if relation is None or relation.spec(slot) is None or relation.spec(output) is None:
            return np.asarray(everything(len(self._analysis.constants[source].shape)) & bool(mask.any()))
        return transfer(relation, mask, output, slot)

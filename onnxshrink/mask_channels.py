"""Masks of output channels, one number each, spread over the weights that make those channels. Names no operator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from onnxshrink.analyse import Analysis, analyse
from onnxshrink.errors import MaskError
from onnxshrink.graph import Graph, Node
from onnxshrink.notation import transfer
from onnxshrink.origins import Origins
from onnxshrink.weights import BoolArray


class Channels:
    """Which elements of a weight make an output channel of the node that reads it, as the node's axes tell."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._analysis: Analysis = analyse(Graph(model))
        self._origins = Origins(self._analysis)

    def spread(self, name: str, weight: str, kept: BoolArray) -> BoolArray | None:
        """A mask of channels as one of the weight's shape; None when no node makes so many channels of the weight.

        Raises MaskError when it could be for more than one axis.
        """
        shape = self._analysis.graph.shape(weight)
        found = [np.broadcast_to(mask, shape) for mask in self._masks(weight, kept)]  # type: ignore[arg-type]
        if not found:
            return None
        if not all(np.array_equal(mask, found[0]) for mask in found[1:]):
            raise MaskError(
                f"mask {name!r}: {kept.size} channels may be more than one axis of the weight; give all of it"
            )
        return found[0]

    def _masks(self, weight: str, kept: BoolArray) -> Iterator[BoolArray]:
        constants = self._analysis.constants
        if weight not in constants:
            return
        for node in self._analysis.nodes():
            for slot, source in enumerate(node.inputs):
                if source in constants and weight in self._origins.weights(source):
                    yield from self._of_use(node, slot, source, weight, kept)

    def _of_use(self, node: Node, slot: int, source: str, weight: str, kept: BoolArray) -> Iterator[BoolArray]:
        relation = self._analysis.relations[node.index]
        mine = {factor for factors in relation.spec(slot) or () for factor in factors}
        for axis, factors in enumerate(relation.spec(-1) or ()):
            shape = self._analysis.shape(node.outputs[0]) or ()
            if factors and mine.issuperset(factors) and shape[axis] == kept.size:
                lost = ~kept.reshape([-1 if a == axis else 1 for a in range(len(shape))])
                yield ~self._origins.trace(source, transfer(relation, lost, -1, slot))[weight]

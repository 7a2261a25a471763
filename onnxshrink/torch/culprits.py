"""Which operators to suspect when a cut module fails or computes something else, the likeliest first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from onnxshrink.graph import Node
from onnxshrink.plan import Plan
from onnxshrink.scopes import module_path, source_lines
from onnxshrink.torch.exported import Exported
from onnxshrink.torch.layers import KNOWN, channel_axis
from onnxshrink.torch.trial import Call, Raised, Trial
from onnxshrink.weights import BoolArray, all_along

Place = tuple[str, int] | None
Suspects = Iterator[tuple[list[Node], Place]]


def place_of(node: Node, place: Place) -> str:
    """Why something stays, in words: forward() fixes it, at a line or an operator."""
    lines = [place] if place else source_lines(node.flat.source)
    where = f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else node.label
    return f"sizes that forward() fixes at {where}"


class Culprits:
    """The operators of an exported module, by what their misbehaviour looks like."""

    def __init__(self, exported: Exported, trial: Trial) -> None:
        self._exported = exported
        self._analysis = exported.analysis
        self._trial = trial
        self._calls: list[Call] = []

    # --- an error ---------------------------------------------------------------------------------------------------

    def after_error(self, raised: Raised) -> Suspects:
        """Operators of the line that raised it, of the module, in front of the layer, everywhere."""
        kind = type(self._exported.parts[raised.path])
        if not issubclass(kind, KNOWN):
            nodes = [node for node in self._analysis.nodes() if self._is_of(node, kind)]
            for frame in reversed(raised.frames):
                yield [node for node in nodes if frame in source_lines(node.flat.source)], frame
            yield [node for node in nodes if self._exported.anchor(node) is None], None
        anchors = self._exported.anchors.get(raised.path, [])
        yield self._behind([name for anchor in anchors for name in anchor.node.inputs]), None
        yield self._rest(), None

    def _is_of(self, node: Node, kind: type[nn.Module]) -> bool:
        path = module_path(node.flat.source)
        return path is not None and isinstance(self._exported.parts.get(path), kind)

    # --- a difference -----------------------------------------------------------------------------------------------

    def first_difference(self, plan: Plan, small: nn.Module) -> int:
        """The first call of a layer that takes (an even number) or gives (an odd one) something else; else the end."""
        paths = {path for path in self._exported.anchors if channel_axis(self._exported.parts[path]) is not None}
        before, after = self._trial.records(small, paths)
        self._calls = list(before.taken)
        for position, key in enumerate(self._calls):
            path, count = key
            anchors = self._exported.anchors[path]
            if key not in after.taken or count >= len(anchors):
                continue
            node, axis = anchors[count].node, channel_axis(anchors[count].layer)
            if not self._same(plan, node.inputs[0], axis, before.taken[key], after.taken[key]):
                return 2 * position
            if not self._same(plan, node.outputs[0], axis, before.given[key], after.given[key]):
                return 2 * position + 1
        return 2 * len(self._calls)

    def after_difference(self, position: int | None) -> Suspects:
        """Operators in front of the layer where it shows, the layer itself, those in front of the outputs, all."""
        if position is not None and position < 2 * len(self._calls):
            path, count = self._calls[position // 2]
            node = self._exported.anchors[path][count].node
            yield ([node] if position % 2 else self._behind([node.inputs[0]])), None
        yield self._behind(list(self._analysis.graph.outputs)), None
        yield self._rest(), None

    def _same(self, plan: Plan, name: str, axis: int | None, expected: torch.Tensor, actual: torch.Tensor) -> bool:
        """Whether a tensor is what it was where it stays and is needed, as far as its channels tell."""
        kept = plan.kept.get(name)
        mask = kept[axis] if kept and axis is not None and -len(kept) <= axis < len(kept) else None
        if mask is None or axis is None or expected.shape[axis] != mask.size:
            return True
        expected = expected.index_select(axis, _indices(mask, expected))
        if expected.shape != actual.shape:
            return False
        chosen = _indices(self._needed(name, axis, mask)[mask], expected)
        a, b = (tensor.index_select(axis, chosen).double() for tensor in (expected, actual))
        return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()) if a.numel() else 0.0))

    def _needed(self, name: str, axis: int, mask: BoolArray) -> BoolArray:
        """Channels of which every element can influence an output: what others hold does not matter."""
        needed = self._analysis.needed.get(name)
        if needed is None:
            return np.zeros_like(mask)
        rest = tuple(a for a in range(needed.ndim) if a != axis % needed.ndim)
        return np.broadcast_to(all_along(needed, rest), mask.shape)

    # --- parts of the graph -----------------------------------------------------------------------------------------

    def _behind(self, names: list[str]) -> list[Node]:
        """What some tensors are made by, back to the layers that it comes from; the nearest first."""
        makers = {name: node for node in self._analysis.nodes() for name in node.outputs}
        nodes: dict[int, Node] = {}
        names = list(names)
        while names:
            node = makers.get(names.pop(0))
            if node is not None and node.index not in nodes and self._exported.anchor(node) is None:
                nodes[node.index] = node
                names += node.inputs
        return list(nodes.values())

    def _rest(self) -> list[Node]:
        """Everything but the layers."""
        return [node for node in self._analysis.nodes() if self._exported.anchor(node) is None]


def _indices(mask: BoolArray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(like.device)

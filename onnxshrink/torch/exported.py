"""A module beside the graph that it was exported to: which initializer is which parameter, which node reads which."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from onnxshrink.analyse import Analysis
from onnxshrink.graph import Node
from onnxshrink.origins import Origins
from onnxshrink.scopes import module_path
from onnxshrink.torch.layers import KNOWN
from onnxshrink.weights import Array


@dataclass(frozen=True, eq=False)
class Anchor:
    """A node that reads the weight of a layer."""

    node: Node
    path: str
    layer: nn.Module


class Exported:
    """A module and the analysis of what it was exported to, without optimisations.

    Attributes:
        analysis: of the exported graph.
        module: the masked module.
        parts: its modules, by path.
        tensors: its parameters and buffers, by name.
        names: per stored constant, the parameters and buffers that it is.
        anchors: nodes that read the weights of layers whose sizes can follow, by path, in order.

    `by_values` finds names that the exporter has lost.
    """

    def __init__(self, analysis: Analysis, module: nn.Module, by_values: bool = False) -> None:
        self.analysis = analysis
        self.module = module
        self.parts = dict(module.named_modules(remove_duplicate=False))
        self.tensors: dict[str, torch.Tensor] = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        self.names = self._find_names(by_values)
        self.origins = Origins(analysis)
        self.anchors: dict[str, list[Anchor]] = defaultdict(list)
        self._anchor_of: dict[int, Anchor] = {}
        for node in analysis.nodes():
            anchor = self._find_anchor(node)
            if anchor is not None:
                self.anchors[anchor.path].append(anchor)
                self._anchor_of[node.index] = anchor

    def _find_names(self, by_values: bool) -> dict[str, list[str]]:
        """The parameters and buffers that each stored constant is, by its name or else by its values.

        The older exporter stores equal ones once, under one of their names, and unsaved buffers without a name.
        """
        weights = {n: c for n, c in self.analysis.graph.constants.items() if c.dtype.kind not in "iub"}
        found = {name: [name] for name in weights if name in self.tensors}
        ids = {id(self.tensors[name]) for name in found}
        for name, tensor in self.tensors.items() if by_values else ():
            if id(tensor) in ids or not tensor.is_floating_point():
                continue
            for stored, constant in weights.items():
                if constant.shape == tuple(tensor.shape) and np.array_equal(constant.array(), _as_array(tensor)):
                    found.setdefault(stored, []).append(name)
        return found

    def anchor(self, node: Node) -> Anchor | None:
        """The layer whose weight a node reads."""
        return self._anchor_of.get(node.index)

    def is_of_layer(self, node: Node) -> bool:
        """Whether a node was exported from a layer whose sizes can follow: what constants it makes follow too."""
        path = module_path(node.flat.source)
        return node.index in self._anchor_of or isinstance(self.parts.get(path or ""), KNOWN)

    def parameters(self, node: Node, constant: str) -> list[tuple[str, str]]:
        """Parameters and buffers that a node's constant is made of: the name in the graph, and that in the module."""
        path = module_path(node.flat.source)
        found = []
        for stored in sorted(self.origins.weights(constant) & self.names.keys()):
            names = self.names[stored]
            own = [name for name in names if name.rpartition(".")[0] == path]
            found += [(stored, name) for name in own or names]
        return found

    def _find_anchor(self, node: Node) -> Anchor | None:
        for constant in node.inputs:
            for _, name in self.parameters(node, constant) if constant in self.analysis.constants else ():
                path, _, leaf = name.rpartition(".")
                weight = leaf.startswith("weight") or leaf == "running_mean"
                if weight and isinstance(self.parts[path], KNOWN):
                    return Anchor(node, path, self.parts[path])
        return None


def _as_array(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())

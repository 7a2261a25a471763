"""Which node of a model a node of the runtime stands for, from the names that fusions leave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from onnxshrink.graph import label_of

# "fused NAME", "NAME/MatMulAddFusion", "TENSOR_nchwc", where the tensor is the last one that the kernel computes.
_FUSED = re.compile(r"^(?:fused )?(.+?)(?:/\w+Fusion\b.*|_nchwc\w*)?$")
_STEPS = 4  # nodes back from the last one that was fused to the one that the kernel is named after


@dataclass(frozen=True)
class Kernel:
    """A node as the runtime runs it: its name and operator."""

    name: str
    op: str


@dataclass(frozen=True)
class Origin:
    """A node of the model: its name and operator."""

    name: str
    op: str


def find_origins(graph: onnx.GraphProto, kernels: Iterable[Kernel]) -> dict[Kernel, Origin]:
    """The node of the graph that each kernel stands for; kernels that the runtime added are left out.

    A kernel that computes several nodes stands for the one of its own operator, a convolution with what follows it for
    the convolution.
    """
    nodes = list(graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    names = {node.name: index for index, node in enumerate(nodes) if node.name}
    last: dict[Kernel, int] = {}
    for kernel in kernels:
        base = _FUSED.sub(r"\1", kernel.name)
        found = next((table[name] for name in (kernel.name, base) for table in (names, makers) if name in table), None)
        if found is not None:
            last[kernel] = found
    # Those first that say themselves which node they are: two convolutions may be added up in one of them.
    origins = {kernel: index for kernel, index in last.items() if nodes[index].op_type == _operator(kernel)}
    for kernel, index in last.items():
        if kernel not in origins:
            origins[kernel] = _nearest(nodes, makers, index, _operator(kernel), set(origins.values()))
    return {kernel: Origin(label_of(nodes[index]), nodes[index].op_type) for kernel, index in origins.items()}


def _operator(kernel: Kernel) -> str:
    return kernel.op.removeprefix("Fused")


def _nearest(nodes: list[onnx.NodeProto], makers: Mapping[str, int], index: int, op: str, taken: set[int]) -> int:
    """The nearest node of an operator before another, and of several the last; that other one if there is none."""
    level = {index}
    for _ in range(_STEPS):
        level = {makers[name] for number in level for name in nodes[number].input if name in makers}
        found = [number for number in level if nodes[number].op_type == op and number not in taken]
        if found:
            return max(found)
    return index

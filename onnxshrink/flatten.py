"""Control flow laid flat: the nodes of If, Loop and Scan bodies stand in one list with all others.

A body's node comes before the node that owns the body, whose outputs the owner takes as further inputs. Names that a
body defines are made unique. So analysis and editing see one flat graph; `Scope` says how to put the bodies back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

CONTROL = ("If", "Loop", "Scan")


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Every graph among the attributes of `node`."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def outer_names(graph: onnx.GraphProto) -> set[str]:
    """Names that `graph` reads and does not define."""
    defined = {value.name for value in (*graph.input, *graph.initializer)}
    defined |= {sparse.values.name for sparse in graph.sparse_initializer}
    read = {value.name for value in graph.output}
    for node in graph.node:
        read.update(node.input)
        for inner in subgraphs(node):
            read |= outer_names(inner)
        defined.update(node.output)
    return read - defined - {""}


def is_control(node: onnx.NodeProto) -> bool:
    """Whether the bodies of `node` are laid flat."""
    return node.op_type in CONTROL and node.domain in ("", "ai.onnx")


@dataclass(frozen=True, eq=False)
class Scope:
    """One body: the attribute that holds it, its graph, and the flat names of its inputs."""

    attribute: str
    graph: onnx.GraphProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class FlatNode:
    """A node with flat names. `proto` has no bodies; `source` is the node as it was.

    Attributes:
        scope: the body that the node belongs to, None for the main graph.
        formal: how many inputs the operator itself has; the rest are outputs of its bodies, then captured names.
        bodies: the bodies of a control-flow node.
    """

    proto: onnx.NodeProto
    source: onnx.NodeProto
    scope: Scope | None
    formal: int
    bodies: tuple[Scope, ...] = ()


@dataclass(frozen=True, eq=False)
class Flat:
    """A graph laid flat.

    Attributes:
        nodes: all nodes, each after those that it reads.
        constants: initializers and dense `Constant` values of bodies, by flat name.
        body_inputs: flat names of what loops hand to their bodies.
        names: per flat name of a body's tensor, the name that it has there and the body's graph.
    """

    nodes: list[FlatNode] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    body_inputs: list[str] = field(default_factory=list)
    names: dict[str, tuple[onnx.GraphProto, str]] = field(default_factory=dict)


def flatten(graph: onnx.GraphProto) -> Flat:
    """Lay the control flow of `graph` flat; the graph is not changed."""
    return _Flattener(graph).flat


class _Flattener:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.flat = Flat()
        self._used = {value.name for value in (*graph.input, *graph.initializer)}
        self._used |= {name for node in graph.node for name in node.output}
        self._walk(graph, None, {})

    def _walk(self, graph: onnx.GraphProto, scope: Scope | None, names: dict[str, str]) -> None:
        for node in graph.node:
            self._node(node, scope, names)

    def _node(self, node: onnx.NodeProto, scope: Scope | None, names: dict[str, str]) -> None:
        bodies: list[Scope] = []
        if is_control(node):
            bodies = [self._body(a, names) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
            captured: list[str] = []
        else:
            captured = sorted({name for graph in subgraphs(node) for name in outer_names(graph)})
        proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain, name=node.name)
        proto.attribute.extend(a for a in node.attribute if not bodies or a.type != onnx.AttributeProto.GRAPH)
        inner = [name for body in bodies for name in body.outputs]
        proto.input.extend([*(names.get(n, n) for n in node.input), *inner, *(names.get(n, n) for n in captured)])
        proto.output.extend(names.get(name, name) for name in node.output)
        self.flat.nodes.append(FlatNode(proto, node, scope, len(node.input), tuple(bodies)))

    def _body(self, attribute: onnx.AttributeProto, outer: dict[str, str]) -> Scope:
        graph, names = attribute.g, dict(outer)
        defined = [value.name for value in (*graph.input, *graph.initializer)]
        defined += [name for node in graph.node for name in node.output if name]
        for name in defined:
            names[name] = self._unique(name)
            self.flat.names[names[name]] = (graph, name)
        for tensor in graph.initializer:
            self.flat.constants[names[tensor.name]] = tensor
        inputs = tuple(names[value.name] for value in graph.input)
        outputs = tuple(names.get(value.name, value.name) for value in graph.output)
        scope = Scope(attribute.name, graph, inputs, outputs)
        self.flat.body_inputs.extend(inputs)
        self._walk(graph, scope, names)
        return scope

    def _unique(self, name: str) -> str:
        wish, number = name, 0
        while wish in self._used:
            number += 1
            wish = f"{name}__{number}"
        self._used.add(wish)
        return wish

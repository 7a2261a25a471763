"""What a plan rests on: the graph, and the weights that were looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxshrink.errors import InputError
from onnxshrink.graph import Graph
from onnxshrink.weights import Constant

_DIGITS = 32  # of a digest in hexadecimal: 128 bits


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a model, whichever way it is stored.

    Attributes:
        graph: of nodes, attributes, inputs, outputs and operator sets.
        weights: per constant, of its type, shape and values.
    """

    graph: str
    weights: Mapping[str, str]


def take_fingerprint(graph: Graph) -> Fingerprint:
    """The fingerprint of a model; every weight is read once."""
    return Fingerprint(_digest_graph(graph), {name: _digest(c) for name, c in graph.constants.items()})


def check_fingerprint(graph: Graph, fingerprint: Fingerprint) -> None:
    """Raise InputError unless a plan with this fingerprint is for the model."""
    if _digest_graph(graph) != fingerprint.graph:
        raise InputError("the plan is for another model: its nodes, inputs or outputs are not those of this one")
    if graph.constants.keys() != fingerprint.weights.keys():
        name = min(graph.constants.keys() ^ fingerprint.weights.keys())
        raise InputError(f"the plan is for another model: only one of them has the weight '{name}'")
    for name, constant in graph.constants.items():
        if _digest(constant) != fingerprint.weights[name]:
            raise InputError(
                f"the plan is for another model: the weight '{name}' has other values or another shape (are the masks "
                "those of the plan?)"
            )


def _digest_graph(graph: Graph) -> str:
    found = hashlib.sha256()
    for part in _parts(graph):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:_DIGITS]


def _parts(graph: Graph) -> Iterator[bytes]:
    """Everything that tells one graph from another, but for values of constants, names of nodes and doc strings."""
    for domain, version in sorted(graph.opsets.items()):
        yield f"{domain} {version}".encode()
    for value in (*graph.proto.graph.input, *graph.proto.graph.output):
        if value.name not in graph.constants:
            yield onnx.ValueInfoProto(name=value.name, type=value.type).SerializeToString(deterministic=True)
    for node in graph.nodes:
        bare = onnx.NodeProto(
            op_type=node.op, domain=node.domain, input=node.inputs, output=node.outputs, attribute=node.proto.attribute
        )
        yield bare.SerializeToString(deterministic=True)


def _digest(constant: Constant) -> str:
    found = hashlib.sha256(f"{constant.dtype} {constant.shape}".encode())
    for block in constant.blocks():
        found.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:_DIGITS]

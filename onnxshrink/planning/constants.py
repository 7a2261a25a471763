"""Computed tensors that a constant may take the place of, since nothing in them is live."""

from __future__ import annotations

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.facts import Known
from onnxshrink.graph import Node
from onnxshrink.view import Operand
from onnxshrink.weights import Array

# A node whose outputs are known becomes a constant no larger than its own weights; shape arithmetic, than this.
_SETTLED_ELEMENTS = 4096


def freeze(analysis: Analysis, node: Node) -> dict[int, Array]:
    """Computed inputs that this node can take as a constant instead."""
    rule = analysis.rules[node.index]
    if rule is None or not rule.absorbs:
        return {}
    view = analysis.view(node)
    output = view.output()
    frozen: dict[int, Array] = {}
    for slot, operand in enumerate(view.inputs):
        if operand is None or operand.constant is not None or not _replaceable(analysis, operand):
            continue
        others = [o for s, o in enumerate(view.inputs) if s != slot and s not in frozen and o is not None]
        value = stand_in(operand.known)
        # A constant that varies along several axes may well be larger than what computes it.
        if value.size == max(value.shape, default=1) and _covers(output, others, operand):
            frozen[slot] = value
    return frozen


def _covers(output: Operand, others: list[Operand], operand: Operand) -> bool:
    """Whether the output keeps its shape when `operand` becomes a compressed constant."""
    if output.shape is None or operand.shape is None or not others:
        return False
    for position in range(1, output.rank + 1):
        extent = output.shape[-position]
        mine = operand.shape[-position] if position <= operand.rank else 1
        reached = [o.shape[-position] for o in others if o.shape is not None and position <= o.rank]
        if extent not in reached and mine != 1:
            return False
        if extent is None and mine != 1:
            return False
    return max((o.rank for o in others), default=0) == output.rank


def settle(analysis: Analysis, node: Node) -> list[Array] | None:
    """Values of a node whose outputs are known wherever they are needed, unless larger than what they replace."""
    if analysis.rules[node.index] is None:
        return None
    values = [_full(analysis, analysis.operand(name)) if name else None for name in node.outputs]
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return None
    inputs = [analysis.operand(name) for name in node.inputs if name]
    weights = sum(operand.constant.size for operand in inputs if operand.constant)
    if all(operand.constant for operand in inputs):
        # Analysis would have taken the outputs for constants, were they not larger than what they are made of.
        weights = 0
    size = sum(value.size for value in found)
    numbers = all(np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_ for value in found)
    return found if size <= (_SETTLED_ELEMENTS if numbers else weights) else None


def _full(analysis: Analysis, operand: Operand) -> Array | None:
    shape = operand.static_shape()
    if shape is None or not _replaceable(analysis, operand):
        return None
    return np.broadcast_to(stand_in(operand.known), shape)


def _replaceable(analysis: Analysis, operand: Operand) -> bool:
    """Whether nothing in a tensor is live. What may become an extent must be known besides: it is read all the same."""
    if analysis.live(operand.name).any():
        return False
    return operand.known.everything or (operand.dtype is not None and np.issubdtype(operand.dtype, np.floating))


def stand_in(known: Known) -> Array:
    """Values that do where nothing is live: what is known, and one, by which anything may be divided, elsewhere."""
    return known.value if known.everything else np.where(known.mask, known.value, np.ones((), known.value.dtype))

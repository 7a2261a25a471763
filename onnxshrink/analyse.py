"""Forward and backward analysis: what is known and what is needed, for every tensor. Names no operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from onnxshrink.facts import Known, compress, everything
from onnxshrink.families import needed_by_relation, whole
from onnxshrink.graph import Graph, Node
from onnxshrink.notation import Relation, UnresolvedError, opaque
from onnxshrink.registry import Rule, find
from onnxshrink.view import Operand, View
from onnxshrink.weights import BoolArray, Constant, same

# A node with constant inputs counts as a constant itself unless that would be larger than its inputs and this.
_DERIVED_BYTES = 1 << 14


@dataclass(frozen=True)
class Refusal:
    """A node that is kept whole, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True, eq=False)
class Analysis:
    """Facts of a graph.

    Attributes:
        graph: the graph.
        known: per tensor, the elements that do not depend on the inputs; absent: none.
        needed: per tensor, the elements that can influence an output; absent: none.
        rules: per node index, its rule; None: kept whole.
        relations: per node index, how its axes hang together.
        refusals: nodes kept whole for want of a rule, with the reason.
        derived: names of constants that are computed from constants.
        throughout: indices of nodes with a partial function whose inputs are needed everywhere.
        readers: how many inputs read each tensor.
    """

    graph: Graph
    known: dict[str, Known] = field(default_factory=dict)
    needed: dict[str, BoolArray] = field(default_factory=dict)
    rules: dict[int, Rule | None] = field(default_factory=dict)
    relations: dict[int, Relation] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    readers: Counter[str] = field(default_factory=Counter)
    throughout: set[int] = field(default_factory=set)

    def nodes(self) -> list[Node]:
        """The nodes that compute something that is not constant."""
        return [node for node in self.graph.nodes if not all(n in self.constants for n in node.outputs if n)]

    def rank(self, name: str) -> int:
        """Number of axes of a tensor; 0 when unknown."""
        return len(self.graph.shape(name) or ())

    def live(self, name: str) -> BoolArray:
        """Elements that are needed and not known."""
        needed = self.needed.get(name)
        if needed is None:
            return ~everything(self.rank(name))
        known = self.known.get(name)
        return needed if known is None else needed & ~known.mask

    def view(self, node: Node, relation: Relation | None = None) -> View:
        """The node as its rule sees it."""
        inputs = tuple(self._operand(name) for name in node.inputs)
        outputs = tuple(self._operand(name) for name in node.outputs)
        needed = tuple(self.needed.get(name) for name in node.outputs)
        opsets = tuple(self.graph.opsets.items())
        relation = relation or self.relations.get(node.index)
        return View(node, inputs, outputs, opsets, relation, needed, throughout=node.index in self.throughout)

    def _operand(self, name: str) -> Operand | None:
        if not name:
            return None
        weights = self.constants.get(name)
        if weights is not None:
            return Operand(name, weights.shape, weights.dtype, constant=weights)
        return Operand(name, self.graph.shape(name), self.graph.dtype(name), self.known.get(name))


def analyse(graph: Graph) -> Analysis:
    """Facts of every tensor of `graph`."""
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    analysis = Analysis(graph, constants=dict(graph.constants), readers=readers)
    for node in graph.nodes:
        _forward(analysis, node)
    find_needed(analysis)
    return analysis


def find_needed(analysis: Analysis) -> None:
    """The backward analysis, from the start."""
    analysis.needed.clear()
    for name in analysis.graph.outputs:
        analysis.needed[name] = everything(analysis.rank(name))
    for node in reversed(analysis.graph.nodes):
        _backward(analysis, node)


def _forward(analysis: Analysis, node: Node) -> None:
    view = analysis.view(node)
    rule = find(node.op, node.domain, node.version)
    rule, relation, reason = _relate(view, rule)
    analysis.rules[node.index] = rule
    analysis.relations[node.index] = relation
    if rule is None:
        analysis.refusals.append(Refusal(node.label, node.op, reason))
        return
    if _derive(analysis, view):
        return
    view = analysis.view(node, relation)
    facts: Sequence[Known | None] = rule.forward(view) if rule.forward else whole(view)
    for name, fact in zip(node.outputs, facts, strict=True):
        if name and fact is not None and fact.anything:
            analysis.known[name] = fact


def _relate(view: View, rule: Rule | None) -> tuple[Rule | None, Relation, str]:
    """The rule that applies, the relation, and why there is no rule."""
    whole_relation = opaque(view.shapes(view.inputs), view.shapes(view.outputs))
    if rule is None:
        return None, whole_relation, "no rule for this operator"
    if rule.refusal is not None:
        return None, whole_relation, rule.refusal
    for operand in (*view.inputs, *view.outputs):
        if operand is not None and (operand.shape is None or operand.dtype is None):
            return None, whole_relation, f"rank or type of {operand.name!r} is not known"
    try:
        return rule, rule.relation(view), ""
    except UnresolvedError as error:
        return None, whole_relation, str(error)


def _derive(analysis: Analysis, view: View) -> bool:
    """Treat the outputs of a node with constant inputs as constants, evaluated when read."""
    inputs = [operand for operand in view.inputs if operand is not None]
    if not inputs or any(operand.constant is None for operand in inputs):
        return False
    sizes = []
    for operand in view.outputs:
        if operand is None:
            continue
        shape = operand.static_shape()
        if shape is None or operand.dtype is None:
            return False
        sizes.append(int(np.prod(shape, dtype=np.int64)) * operand.dtype.itemsize)
    given = [o.constant for o in inputs if o.constant is not None]
    if sum(sizes) > max(_DERIVED_BYTES, sum(c.nbytes for c in given)):
        return False
    if any(c.nbytes > _DERIVED_BYTES and _stored_twice(analysis, c, sum(sizes)) for c in given):
        return False
    return _evaluate_constants(analysis, view)


def _stored_twice(analysis: Analysis, weights: Constant, nbytes: int) -> bool:
    """Whether a large weight that others read too would take more room, were every reader's result a constant."""
    readers = analysis.readers[weights.name]
    return readers > 1 and readers * nbytes > weights.nbytes


def _evaluate_constants(analysis: Analysis, view: View) -> bool:
    results = view.run([None if o is None else o.value() for o in view.inputs])
    if results is None:
        return False
    values = iter(results)
    for operand in view.outputs:
        if operand is not None:
            value = next(values)
            value.setflags(write=False)
            analysis.constants[operand.name] = Constant(operand.name, value.shape, value.dtype, partial(same, value))
            analysis.derived.add(operand.name)
    return True


def _backward(analysis: Analysis, node: Node) -> None:
    view = analysis.view(node)
    if all(name in analysis.constants for name in node.outputs if name):
        return
    if not any(_is_live(analysis, name) for name in node.outputs if name):
        return
    rule = analysis.rules[node.index]
    masks = rule.backward(view) if rule is not None and rule.backward else needed_by_relation(view)
    for name, mask in zip(node.inputs, masks, strict=True):
        if not name or mask is None or name in analysis.constants:
            continue
        before = analysis.needed.get(name)
        analysis.needed[name] = compress(mask if before is None else before | mask)


def _is_live(analysis: Analysis, name: str) -> bool:
    return analysis.graph.shape(name) is None or bool(analysis.live(name).any())

"""Forward and backward analysis: what is known and what is needed, for every tensor. Names no operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from onnxshrink.collector import paused
from onnxshrink.derive import Results, Sources
from onnxshrink.facts import Known, Line, along, compress, everything
from onnxshrink.families import endless, needed_by_relation, spoilt, whole
from onnxshrink.graph import Graph, Node, Period, Shape
from onnxshrink.notation import Relation, UnresolvedError, opaque
from onnxshrink.registry import Lookup, Rule, rule_of
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray, Constant, same

# A node with constant inputs counts as a constant itself unless that would be larger than its inputs and this.
_DERIVED_BYTES = 1 << 14
_LEARNED_ELEMENTS = 256
_REFINEMENTS = 8


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
        results: the elements of these.
        taken: indices of nodes whose outputs are constants although their inputs are not.
        shapes: shapes that are better known than by inference.
        throughout: indices of nodes with a partial function whose inputs are needed everywhere.
        unit: per tensor, the axis along which its elements sum to one.
        blind: per tensor, the axis along which one number may be added to all elements, and nobody would notice.
        infinite: per tensor, elements that may be minus infinity by design; absent: none.
        framed: per tensor, elements that hold one value but for a frame of zeros; absent: none.
        lines: per tensor, indices of an axis that all follow one number per position; absent: none.
        lookup: finds the rule of a node.
    """

    graph: Graph
    known: dict[str, Known] = field(default_factory=dict)
    needed: dict[str, BoolArray] = field(default_factory=dict)
    rules: dict[int, Rule | None] = field(default_factory=dict)
    relations: dict[int, Relation] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    results: Results = field(default_factory=Results)
    throughout: set[int] = field(default_factory=set)
    shapes: dict[str, Shape] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    unit: dict[str, int] = field(default_factory=dict)
    blind: dict[str, int | None] = field(default_factory=dict)
    infinite: dict[str, BoolArray] = field(default_factory=dict)
    framed: dict[str, Known] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    lookup: Lookup = rule_of

    @cached_property
    def sources(self) -> Sources:
        """What the constants that the graph computes are made of."""
        return Sources(self.graph)

    def nodes(self) -> list[Node]:
        """The nodes that compute something that is not constant."""
        return [node for node in self.graph.nodes if not all(n in self.constants for n in node.outputs if n)]

    def unproven(self) -> list[Node]:
        """The nodes whose facts or whose shrinking nothing proves: the result must be compared with the original."""
        return [node for node in self.nodes() if (rule := self.rules.get(node.index)) is not None and rule.unproven]

    def shape(self, name: str) -> Shape | None:
        """Extents of a tensor, as far as they are known."""
        constant = self.constants.get(name)
        if constant is not None:
            return constant.shape
        found = self.shapes.get(name)
        return found if found is not None else self.graph.shape(name)

    def rank(self, name: str) -> int:
        """Number of axes of a tensor; 0 when unknown."""
        return len(self.shape(name) or ())

    def live(self, name: str) -> BoolArray:
        """Elements that are needed and not known."""
        needed = self.needed.get(name)
        if needed is None:
            return ~everything(self.rank(name))
        known = self.known.get(name)
        return needed if known is None else needed & ~known.mask

    def view(self, node: Node, relation: Relation | None = None) -> View:
        """The node as its rule sees it."""
        inputs = tuple(self.operand(name) if name else None for name in node.inputs)
        outputs = tuple(self.operand(name) if name else None for name in node.outputs)
        needed = tuple(self.needed.get(name) for name in node.outputs)
        opsets = tuple(self.graph.opsets.items())
        relation = relation or self.relations.get(node.index)
        blind = tuple(self.blind.get(name) for name in node.outputs)
        return View(node, inputs, outputs, opsets, relation, needed, blind, throughout=node.index in self.throughout)

    def operand(self, name: str) -> Operand:
        """A tensor as rules see it."""
        weights = self.constants.get(name)
        if weights is not None:
            return Operand(name, weights.shape, weights.dtype, constant=weights)
        shape, dtype = self.shape(name), self.graph.dtype(name)
        unit, infinite, framed = self.unit.get(name), self.infinite.get(name), self.framed.get(name)
        line = self.lines.get(name)
        return Operand(name, shape, dtype, self.known.get(name), None, unit, infinite, framed, line)


Note = Callable[[Analysis, View, "Rule | None"], None]


@paused()
def analyse(graph: Graph, lookup: Lookup = rule_of) -> Analysis:
    """Facts of every tensor of `graph`; `lookup` finds the rule of a node, in the registry unless told otherwise."""
    analysis = _forward_pass(graph, lookup)
    for _ in range(_REFINEMENTS):
        values, shapes = learned(analysis)
        if not graph.refine(values, shapes):
            break
        # Shapes that follow from values found on the way make more of the rules apply.
        analysis = _forward_pass(graph, lookup)
    find_needed(analysis)
    return analysis


def begin(graph: Graph, lookup: Lookup = rule_of) -> Analysis:
    """An analysis that knows nothing yet."""
    analysis = Analysis(graph, constants=dict(graph.constants), lookup=lookup)
    for name in graph.inputs:
        # A mask that is given may well hold infinities.
        analysis.infinite[name] = everything(analysis.rank(name))
    for name in graph.outputs:
        analysis.needed[name], analysis.blind[name] = everything(analysis.rank(name)), None
    return analysis


def _forward_pass(graph: Graph, lookup: Lookup) -> Analysis:
    analysis = begin(graph, lookup)
    for node in graph.nodes:
        forward(analysis, node)
    return analysis


def learned(analysis: Analysis) -> tuple[dict[str, Array], dict[str, Shape]]:
    """Integer tensors that turned out to be constant, and shapes that follow from partly known targets."""
    values: dict[str, Array] = {}
    for node in analysis.graph.nodes:
        for name in node.outputs:
            found = _small_integers(analysis, name) if name else None
            if found is not None:
                values[name] = found
    shapes = {name: tuple(None if isinstance(d, Period) else d for d in s) for name, s in analysis.shapes.items()}
    return values, shapes


def _small_integers(analysis: Analysis, name: str) -> Array | None:
    constant, known = analysis.constants.get(name), analysis.known.get(name)
    if constant is not None:
        array: Array | None = constant.array() if constant.size <= _LEARNED_ELEMENTS else None
    else:
        array = analysis.operand(name).value() if known is not None and known.everything else None
    if array is None or array.size > _LEARNED_ELEMENTS or array.dtype.kind not in "iub":
        return None
    return array


def _target_shape(view: View, slot: int) -> Shape | None:
    """The shape of the output where the target at an input tells more of it than inference did."""
    target, output = view.input(slot), view.output()
    if target is None or target.rank != 1 or target.extent(0) is None:
        return None
    count = target.extent(0) or 0
    mask, value = along(target.known.mask, 0, count), along(target.known.value, 0, count)
    before = output.shape if output.shape is not None else (None,) * count
    if len(before) != count:
        return None
    given = [int(v) if m and v > 1 else None for m, v in zip(mask, value, strict=True)]
    found = tuple(d if isinstance(d, int) else g if g is not None else d for d, g in zip(before, given, strict=True))
    return found if found != output.shape else None


def find_needed(analysis: Analysis) -> None:
    """The backward analysis, from the start."""
    analysis.needed.clear()
    analysis.blind.clear()
    for name in analysis.graph.outputs:
        analysis.needed[name] = everything(analysis.rank(name))
        analysis.blind[name] = None
    for node in reversed(analysis.graph.nodes):
        _backward(analysis, node)


def update_known(analysis: Analysis, node: Node) -> None:
    """Work out again what is known of the outputs of one node, from what is known of its inputs now."""
    analysis.refusals[:] = [refusal for refusal in analysis.refusals if refusal.node != node.label]
    forward(analysis, node)


def update_needed(analysis: Analysis, node: Node) -> None:
    """Work out again what is needed of the inputs of one node, from what is needed of the outputs of their readers."""
    names = {name for name in node.inputs if name and name not in analysis.constants}
    for name in names:
        analysis.needed.pop(name, None)
        analysis.blind.pop(name, None)
        if name in analysis.graph.outputs:
            analysis.needed[name], analysis.blind[name] = everything(analysis.rank(name)), None
    for reader in analysis.graph.nodes:
        if names.intersection(reader.inputs) and reader.index in analysis.rules:
            _backward(analysis, reader)


def forward(analysis: Analysis, node: Node, note: Note | None = None) -> None:
    """The forward analysis of one node; `note` says what is known of its outputs: by its rule unless told otherwise."""
    view = analysis.view(node)
    rule = analysis.lookup(node)
    if rule is not None and rule.refusal is None and not rule.decodes and _derive(analysis, view):
        analysis.rules[node.index] = rule
        analysis.relations[node.index] = opaque(view.shapes(view.inputs), view.shapes(view.outputs))
        return
    if rule is not None and rule.target is not None and (shape := _target_shape(view, rule.target)) is not None:
        analysis.shapes[node.outputs[0]] = shape
        view = analysis.view(node)
    rule, relation, reason = _relate(view, rule)
    if rule is not None and _spread_extents(analysis, view, relation):
        view = analysis.view(node)
        rule, relation, reason = _relate(view, rule)
    analysis.rules[node.index] = rule
    analysis.relations[node.index] = relation
    if rule is None:
        analysis.refusals.append(Refusal(node.label, node.op, reason))
    (note or _note_facts)(analysis, replace(view, relation=relation), rule)
    if rule is not None:
        _note_patterns(analysis, analysis.view(node), rule)
    if rule is not None and not rule.decodes:
        _take_for_constants(analysis, node)


def _note_patterns(analysis: Analysis, view: View, rule: Rule) -> None:
    """Frames and lines of the first output: they follow from the facts that are noted already."""
    framed = rule.frame(view) if rule.frame is not None else None
    if framed is not None:
        analysis.framed[view.node.outputs[0]] = framed
    line = rule.line(view) if rule.line is not None else None
    if line is not None and line.others.any():
        analysis.lines[view.node.outputs[0]] = line


def _note_facts(analysis: Analysis, view: View, rule: Rule | None) -> None:
    """What is known of the outputs of a node."""
    if rule is not None:
        _note_known(analysis, view, rule)
    _note_infinite(analysis, view, rule)


def _note_known(analysis: Analysis, view: View, rule: Rule) -> None:
    facts: Sequence[Known | None] = rule.forward(view) if rule.forward else whole(view)
    for name, fact in zip(view.node.outputs, facts, strict=True):
        if name and fact is not None and fact.anything:
            analysis.known[name] = fact
    unit = rule.unit(view) if rule.unit is not None else None
    if unit is not None:
        analysis.unit[view.node.outputs[0]] = unit


def _note_infinite(analysis: Analysis, view: View, rule: Rule | None) -> None:
    """Elements that may be minus infinity: by a constant or known value, and what is made of them."""
    masks = rule.infinite(view) if rule is not None and rule.infinite is not None else spoilt(view)
    for operand, mask in zip(view.outputs, masks, strict=True):
        if operand is None:
            continue
        known = analysis.known.get(operand.name)
        found = endless(known) if known is not None else None
        found = mask if found is None else found if mask is None else found | mask
        if found is not None and found.any():
            analysis.infinite[operand.name] = compress(found)


def _take_for_constants(analysis: Analysis, node: Node) -> None:
    """Small vectors and integers that turn out to be known are constants, whatever they were made from."""
    operands = [analysis.operand(name) for name in node.outputs if name]
    values = [operand.value() for operand in operands if operand.name in analysis.known]
    small = [
        v for v in values if v is not None and v.nbytes <= _DERIVED_BYTES and (v.ndim <= 1 or v.dtype.kind in "iub")
    ]
    if len(small) < len(operands):
        return
    for operand, value in zip(operands, small, strict=True):
        found = np.array(value)
        analysis.constants[operand.name] = Constant(operand.name, found.shape, found.dtype, partial(same, found))
        analysis.derived.add(operand.name)
    if operands:
        analysis.taken.add(node.index)


def _spread_extents(analysis: Analysis, view: View, relation: Relation) -> bool:
    """Note what is known of output axes of unknown extent: those that pass through, and periods, new or passed on."""
    changed = False
    for index, output in enumerate(view.outputs):
        spec = relation.spec(-1 - index)
        if output is None or output.shape is None or spec is None:
            continue
        shape = list(output.shape)
        for axis, factors in enumerate(spec):
            if isinstance(shape[axis], int):
                continue
            period = relation.periods.get(axis) if index == 0 else None
            extent = Period(period) if period is not None else _extent_of(view, relation, factors)
            if extent is not None:
                shape[axis] = extent
        if tuple(shape) != output.shape:
            analysis.shapes[output.name] = tuple(shape)
            changed = True
    return changed


def _extent_of(view: View, relation: Relation, factors: tuple[str, ...]) -> int | None:
    """What an axis that passes through inherits: its extent, or only its period."""
    if len(factors) != 1:
        return None
    size = relation.sizes.get(factors[0])
    return size if size is not None else _period_of(view, relation, factors[0])


def _period_of(view: View, relation: Relation, factor: str) -> Period | None:
    for slot, operand in enumerate(view.inputs):
        for axis, factors in enumerate(relation.spec(slot) or ()):
            period = operand.period(axis) if operand is not None else None
            if factors == (factor,) and period is not None:
                return Period(period)
    return None


def _relate(view: View, rule: Rule | None) -> tuple[Rule | None, Relation, str]:
    """The rule that applies, the relation, and why there is no rule."""
    reason = _obstacle(view, rule)
    if rule is not None and reason is None:
        try:
            return rule, rule.relation(view), ""
        except UnresolvedError as error:
            reason = str(error)
    return None, opaque(view.shapes(view.inputs), view.shapes(view.outputs)), reason or ""


def _obstacle(view: View, rule: Rule | None) -> str | None:
    """Why a rule cannot even be tried, if so."""
    if rule is None:
        return "no rule for this operator"
    if rule.refusal is not None:
        return rule.refusal
    for operand in (*view.inputs, *view.outputs):
        if operand is not None and (operand.shape is None or operand.dtype is None):
            return f"rank or type of {operand.name!r} is not known"
    return None


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
        if operand.shape is None and _cannot_explode(inputs):
            continue
        if shape is None or operand.dtype is None:
            return False
        sizes.append(math.prod(shape) * operand.dtype.itemsize)
    given = [o.constant for o in inputs if o.constant is not None]
    if sum(sizes) > max(_DERIVED_BYTES, sum(c.nbytes for c in given)):
        return False
    if any(analysis.sources.swells(o.name, _DERIVED_BYTES) for o in inputs):
        return False
    return _evaluate_constants(analysis, view)


def _cannot_explode(inputs: list[Operand]) -> bool:
    """Whether a result of unknown shape is small: no shape that could be asked for has many elements."""
    values = [operand.value() for operand in inputs if operand.constant is not None and operand.constant.size <= 64]
    if len(values) < len(inputs):
        return False
    extents = [np.abs(value[value != 0].astype(np.float64)) for value in values if value is not None]
    return bool(np.prod(np.concatenate([np.ones(1), *[e.reshape(-1) for e in extents]])) <= _DERIVED_BYTES)


def _evaluate_constants(analysis: Analysis, view: View) -> bool:
    results = _run_on_values(view)
    if results is None:
        return False
    names = [operand.name for operand in view.outputs if operand is not None]
    for index, (name, value) in enumerate(zip(names, results, strict=True)):
        analysis.constants[name] = analysis.results.constant(name, value, partial(_run_again, view, index))
        analysis.derived.add(name)
    return True


def _run_on_values(view: View) -> list[Array] | None:
    return view.run([None if operand is None else operand.value() for operand in view.inputs])


def _run_again(view: View, index: int) -> Array:
    results = _run_on_values(view)
    assert results is not None  # it ran before
    return results[index]


def _backward(analysis: Analysis, node: Node) -> None:
    view = analysis.view(node)
    if all(name in analysis.constants for name in node.outputs if name):
        return
    rule = analysis.rules[node.index]
    if any(_is_live(analysis, name) for name in node.outputs if name):
        masks = rule.backward(view) if rule is not None and rule.backward else needed_by_relation(view)
    elif rule is not None and node.index in analysis.throughout:
        # It is computed although nothing in it is live, and must not come out as no number.
        slots = [(slot, o) for slot, o in enumerate(view.inputs)]
        masks = [everything(o.rank) if o is not None and slot in rule.partial else None for slot, o in slots]
    else:
        return
    _note_blind(analysis, node, rule.blind(view) if rule is not None and rule.blind is not None else {})
    for name, mask in zip(node.inputs, masks, strict=True):
        if not name or mask is None or name in analysis.constants:
            continue
        before = analysis.needed.get(name)
        analysis.needed[name] = compress(mask if before is None else before | mask)


def _note_blind(analysis: Analysis, node: Node, axes: Mapping[int, int]) -> None:
    """All readers of a tensor must be blind along the same axis."""
    for slot, name in enumerate(node.inputs):
        if name:
            axis = axes.get(slot)
            analysis.blind[name] = axis if analysis.blind.get(name, axis) == axis else None


def _is_live(analysis: Analysis, name: str) -> bool:
    return analysis.shape(name) is None or bool(analysis.live(name).any())

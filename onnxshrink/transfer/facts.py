"""What analysis finds out, as data, and an analysis that is put together from it without looking at weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxshrink.analyse import Analysis, begin, forward
from onnxshrink.errors import InputError
from onnxshrink.facts import Known
from onnxshrink.graph import Graph, Shape
from onnxshrink.registry import Rule
from onnxshrink.view import View
from onnxshrink.weights import BoolArray

# What an analysis holds besides: the graph itself, and what follows from it and from these facts at once.
FOLLOWS = frozenset({
    "graph", "rules", "relations", "refusals", "constants", "derived", "results", "shapes", "taken", "lookup", "framed",
    "lines",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Facts:
    """What analysis finds out by evaluation, per tensor; the fields are those of `Analysis`, and two more.

    Attributes:
        types: shapes and types that are known better than by inference on the graph alone.
        unruled: indices of the nodes that are kept whole for want of a rule.
    """

    known: Mapping[str, Known]
    needed: Mapping[str, BoolArray]
    unit: Mapping[str, int]
    blind: Mapping[str, int | None]
    infinite: Mapping[str, BoolArray]
    throughout: frozenset[int]
    types: Mapping[str, tuple[Shape | None, int]]
    unruled: frozenset[int]


def facts_of(analysis: Analysis) -> Facts:
    """The facts of an analysis, as they are now."""
    return Facts(
        known=dict(analysis.known),
        needed=dict(analysis.needed),
        unit=dict(analysis.unit),
        blind=dict(analysis.blind),
        infinite=dict(analysis.infinite),
        throughout=frozenset(analysis.throughout),
        types=dict(analysis.graph.refined),
        unruled=_unruled(analysis),
    )


def _unruled(analysis: Analysis) -> frozenset[int]:
    return frozenset(index for index, rule in analysis.rules.items() if rule is None)


def recall(graph: Graph, facts: Facts) -> Analysis:
    """The analysis of a graph whose facts are known.

    Raises InputError where the rules are not those that the facts were found with.
    """

    def note(analysis: Analysis, view: View, rule: Rule | None) -> None:
        for name in view.node.outputs:
            if name in facts.known:
                analysis.known[name] = facts.known[name]
            if name in facts.unit:
                analysis.unit[name] = facts.unit[name]
            if name in facts.infinite:
                analysis.infinite[name] = facts.infinite[name]

    graph.recall(facts.types)
    analysis = begin(graph)
    for node in graph.nodes:
        forward(analysis, node, note)
    different = _unruled(analysis) ^ facts.unruled
    if different:
        label = graph.nodes[min(different)].label
        raise InputError(f"the plan was made with other rules for node {label}: register the same ones, or plan again")
    analysis.needed.update(facts.needed)
    analysis.blind.update(facts.blind)
    analysis.throughout.update(facts.throughout)
    return analysis

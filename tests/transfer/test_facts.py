"""An analysis put together from facts: the same as the one that they were taken from, without evaluating anything."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, dead, draw
from networks import NETWORKS

from onnxshrink import analyse as engine
from onnxshrink.analyse import Analysis, analyse
from onnxshrink.errors import InputError
from onnxshrink.graph import Graph
from onnxshrink.plan import make_plan
from onnxshrink.registry import Rule
from onnxshrink.transfer.facts import FOLLOWS, Facts, facts_of, recall


def test_every_field_of_an_analysis_is_a_fact_or_follows() -> None:
    """Whoever gives `Analysis` another field decides here which of the two it is."""
    assert {f.name for f in fields(Analysis)} == FOLLOWS | ({f.name for f in fields(Facts)} - {"types", "unruled"})


def test_the_analysis_is_the_same() -> None:
    for make in NETWORKS.values():
        model = make(True)
        first = analyse(Graph(model))
        make_plan(first)
        second = recall(Graph(model), facts_of(first))
        for name in ("refusals", "derived", "shapes", "taken", "rules"):
            assert getattr(second, name) == getattr(first, name), name
        assert repr(second.relations) == repr(first.relations)
        assert second.constants.keys() == first.constants.keys()
        for name, constant in first.constants.items():
            np.testing.assert_array_equal(second.constants[name].array(), constant.array(), strict=True)
        for node in first.nodes():
            assert [same_view(a, b) for a, b in zip(operands(first, node), operands(second, node), strict=True)]


def operands(analysis: Analysis, node: Any) -> list[Any]:
    view = analysis.view(node)
    return [*view.inputs, *view.outputs, *view.needed, *view.blind]


def same_view(first: Any, second: Any) -> bool:
    if first is None or isinstance(first, int):
        assert first == second
    elif isinstance(first, np.ndarray):
        np.testing.assert_array_equal(first, second, strict=True)
    else:
        assert (first.name, first.shape, first.dtype, first.unit) == (
            second.name,
            second.shape,
            second.dtype,
            second.unit,
        )
        np.testing.assert_array_equal(first.known.mask, second.known.mask, strict=True)
        np.testing.assert_array_equal(first.known.value, second.known.value, strict=True)
    return True


def test_shapes_that_were_found_on_the_way_are_remembered() -> None:
    """The target of a reshape is computed from constants, in a way that shape inference does not follow."""
    text = """g (float[2, 6] x) => (float[A, B, C] y) {
        k = Relu(p) i = Cast <to = 7> (k) r = Reshape(x, i) q = Relu(r) y = Identity(q)
    }"""
    model = build(text, p=np.array([2, 2, 3], np.float32))
    assert Graph(model).shape("q") != (2, 2, 3)
    facts = facts_of(analyse(Graph(model)))
    assert facts.types == dict.fromkeys(("r", "q", "y"), ((2, 2, 3), onnx.TensorProto.FLOAT))
    assert recall(Graph(model), facts).shape("q") == (2, 2, 3)


def test_no_rule_is_asked_and_no_large_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": dead(draw(300, 300), 1, 2, axis=1), "v": dead(draw(300, 300), 7)}
    model = build(
        "g (float[N, 300] x) => (float[N, 300] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }", **weights
    )
    facts = facts_of(analyse(Graph(model)))
    graph = Graph(model)
    monkeypatch.setattr(engine, "_note_facts", None)
    for name in weights:
        monkeypatch.setattr(graph.constants[name], "_read", None)
    analysis = recall(graph, facts)
    np.testing.assert_array_equal(np.flatnonzero(analysis.known["a"].mask), [1, 2])
    np.testing.assert_array_equal(np.flatnonzero(~analysis.needed["b"]), [7])


def test_other_rules_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("g (float[N, 4] x) => (float[N, 4] y) { [middle] a = Relu(x) y = Abs(a) }")
    facts = facts_of(analyse(Graph(model)))
    message = r"^the plan was made with other rules for node middle: register the same ones, or plan again$"
    with pytest.raises(InputError, match=message):
        recall(Graph(model), replace(facts, unruled=frozenset({0})))
    known = engine.rule_of

    def forgetful(node: Any) -> Rule | None:
        return None if node.op == "Relu" else known(node)

    monkeypatch.setattr(engine.begin, "__defaults__", (forgetful,))
    with pytest.raises(InputError, match=message):
        recall(Graph(model), facts)


def test_facts_do_not_change_with_the_analysis() -> None:
    analysis = analyse(Graph(onnx.ModelProto.FromString(NETWORKS["chain"](True).SerializeToString())))
    facts = facts_of(analysis)
    count = len(facts.needed)
    analysis.needed.clear()
    analysis.throughout.add(3)
    assert (len(facts.needed), facts.throughout) == (count, frozenset())

"""A rule that fails costs no run: the node stays whole, the rest shrinks, the report and a warning say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import onnx
import pytest
from models import build, check_same, dead, draw, shapes

import onnxshrink
from onnxshrink import registry
from onnxshrink.guard import RuleWarning, despite_faults
from onnxshrink.registry import Lookup, rule_of
from onnxshrink.view import View


def model() -> onnx.ModelProto:
    """Three layers; four of eight units are dead behind the first, and four of six behind the second."""
    weights = {"w1": dead(draw(5, 8), 0, 2, 5, 7, axis=1), "w2": dead(draw(8, 6), 1, 2, 3, 5, axis=1), "w3": draw(6, 3)}
    text = """g (float[N, 5] x) => (float[N, 3] y) {
        a = MatMul(x, w1) b = Softsign(a) c = MatMul(b, w2) d = Relu(c) y = MatMul(d, w3) }"""
    return build(text, **weights)


def failing(part: str) -> Any:
    def fails(view: View) -> Iterator[None]:
        raise IndexError("out of range")
        yield

    def at_once(view: View) -> None:
        raise IndexError("out of range")

    return fails if part in ("retain", "represent") else at_once


@pytest.fixture
def softsign(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The rule of Softsign fails in one of its functions."""
    part = str(request.param)
    rule = registry.find("Softsign", "", 17)
    assert rule is not None
    broken = replace(rule, **{part: failing(part)})
    monkeypatch.setitem(registry._rules, ("", "Softsign"), [broken])
    return part


@pytest.mark.parametrize(
    "softsign", ["relate", "forward", "backward", "retain", "represent", "fold", "rewrite", "infinite"], indirect=True
)
def test_the_node_stays_whole_and_the_rest_shrinks(softsign: str) -> None:
    with pytest.warns(RuleWarning, match=r"^Softsign '.*' is kept whole: its rule failed \(IndexError: out of range\)"):
        result = onnxshrink.shrink(model(), align="none")
    assert shapes(result.model) == {"w1": (5, 8), "w2": (8, 2), "w3": (2, 3)}
    assert [(r.op, r.reason) for r in result.report.refusals] == [
        ("Softsign", "its rule failed (IndexError: out of range)")
    ]
    check_same(model(), result.model, x=draw(4, 5))


def test_a_rule_in_order_is_asked_once() -> None:
    runs = []

    def run(lookup: Lookup) -> int:
        runs.append(lookup)
        return 7

    assert despite_faults(rule_of, run) == 7
    assert len(runs) == 1


def test_errors_that_are_told_on_purpose_are_passed_on() -> None:
    def run(lookup: Lookup) -> int:
        raise onnxshrink.InputError("no such input")

    with pytest.raises(onnxshrink.InputError, match="no such input"):
        despite_faults(rule_of, run)


@pytest.mark.parametrize("softsign", ["forward"], indirect=True)
def test_a_rule_that_fails_twice_is_not_asked_again(softsign: str) -> None:
    body = " ".join(f"h{i + 1} = Softsign(h{i})" for i in range(6))
    deep = build(f"g (float[N, 3] x) => (float[N, 3] y) {{ h0 = Identity(x) {body} y = MatMul(h6, w) }}", w=draw(3, 3))
    with pytest.warns(RuleWarning) as caught:
        result = onnxshrink.shrink(deep, align="none")
    assert len(caught) == 2
    assert [len(refusal.nodes) for refusal in result.report.refusals] == [6]

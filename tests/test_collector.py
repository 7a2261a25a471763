"""The collector of reference cycles rests while a graph is worked on, and only then."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from models import build, draw

from onnxshrink.analyse import analyse
from onnxshrink.collector import paused
from onnxshrink.graph import Graph, Node
from onnxshrink.registry import Rule, rule_of


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    before = gc.isenabled()
    gc.enable()
    yield
    if not before:
        gc.disable()


def test_it_rests_and_goes_on() -> None:
    with paused():
        assert not gc.isenabled()
        with paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(KeyError), paused():
        raise KeyError
    assert gc.isenabled()


def test_what_the_caller_switched_off_stays_off() -> None:
    gc.disable()
    with paused():
        pass
    assert not gc.isenabled()


def test_analysis_is_not_disturbed() -> None:
    seen: list[bool] = []

    def lookup(node: Node) -> Rule | None:
        seen.append(gc.isenabled())
        return rule_of(node)

    graph = Graph(build("agraph (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) y = Relu(h) }", w=draw(8, 8)))
    analyse(graph, lookup)
    assert seen == [False, False]
    assert gc.isenabled()

"""Plans as text: the model that comes of one is the same, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import onnx
import pytest
from graph_builder import RandomChooser
from networks import NETWORKS, chain, normed
from strategies import random_graph

from onnxshrink.analyse import analyse
from onnxshrink.apply import apply
from onnxshrink.errors import InputError, OnnxshrinkError
from onnxshrink.graph import Graph
from onnxshrink.plan import make_plan
from onnxshrink.planning.align import Alignment
from onnxshrink.transfer.facts import facts_of, recall
from onnxshrink.transfer.fingerprint import take_fingerprint
from onnxshrink.transfer.portable import ShrinkPlan
from onnxshrink.version import __version__

GRAPHS = 150


def there(model: onnx.ModelProto, alignment: Alignment | None = None) -> tuple[bytes, str]:
    """The smaller model and the plan, where the analysis is made."""
    graph = Graph(model)
    analysis = analyse(graph)
    plan = make_plan(analysis, alignment)
    small = apply(analysis, plan)
    return serialized(small.whole()), ShrinkPlan(plan, facts_of(analysis), take_fingerprint(graph), (2, 1)).to_json()


def elsewhere(model: onnx.ModelProto, text: str) -> bytes:
    """The smaller model, where the plan is carried out."""
    plan = ShrinkPlan.from_json(text)
    assert plan.to_json() == text
    return serialized(apply(recall(Graph(model), plan.facts), plan.plan).whole())


def serialized(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("alignment", [None, Alignment(3)], ids=["none", "3"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, alignment: Alignment | None) -> None:
    model = NETWORKS[name](True)
    small, text = there(model, alignment)
    assert elsewhere(model, text) == small
    if alignment is None:
        assert len(small) < len(serialized(model))


@pytest.mark.parametrize("block", range(3))
def test_random_graphs(block: int) -> None:
    smaller = 0
    for seed in range(block * GRAPHS // 3, (block + 1) * GRAPHS // 3):
        model = random_graph(RandomChooser(seed)).model
        try:
            Graph(model)
        except OnnxshrinkError:
            continue
        small, text = there(model, Alignment(4) if seed % 3 == 0 else None)
        assert elsewhere(model, text) == small, seed
        smaller += len(small) < len(serialized(model))
    assert smaller > GRAPHS // 6


def test_the_text_is_json_that_names_everything_by_name() -> None:
    data = json.loads(there(chain(True))[1])
    assert (data["format"], data["version"], data["whole"]) == ("onnxshrink plan", __version__, False)
    assert set(data["fingerprint"]["weights"]) == {"w1", "b1", "w2", "b2"}
    # Channels 0 and 2 of four.
    assert data["plan"]["kept"]["r"] == [None, [4, "oA=="], 4, 4]
    assert data["plan"]["constants"]["0"]["1"] == [[4, "oA=="], 3, 3, 3]
    assert ["", "", "live"] in data["plan"]["causes"]
    assert normed(True).graph.node[1].op_type == "BatchNormalization"
    assert json.loads(there(normed(True))[1])["plan"]["folds"]


def changed(text: str, **changes: Any) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "not a plan: Expecting value"),
        (lambda text: text[:-10], "not a plan: "),
        (lambda text: "[]", "not a plan: `onnxshrink plan` writes one"),
        (lambda text: "{}", "not a plan: `onnxshrink plan` writes one"),
        (
            lambda text: changed(text, version="9.9.9"),
            f"the plan is one of onnxshrink 9.9.9, this is {__version__}: plan again",
        ),
        (lambda text: changed(text, facts={}), "the plan is damaged: KeyError: 'known'"),
        (lambda text: changed(text, plan=3), "the plan is damaged: TypeError"),
        (
            lambda text: text.replace('[4,"oA=="]', '[4,"oAoA"]'),
            "the plan is damaged: ValueError: 3 bytes for 4 indices",
        ),
    ],
)
def test_what_is_no_plan_is_refused(change: Any, message: str) -> None:
    text = there(chain(True))[1]
    with pytest.raises(InputError) as caught:
        ShrinkPlan.from_json(change(text))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)

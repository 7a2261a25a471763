"""The report: what was removed, what stayed and why, against what can be worked out by hand."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, dead, draw
from networks import NETWORKS, Network, chain, residual, unknown

from onnxshrink import Report, shrink
from onnxshrink.measure import Size
from onnxshrink.report import Cut, Layer, Refused, Stay, runs


def report(model: onnx.ModelProto) -> Report:
    return shrink(model, verify=False).report


def padded() -> onnx.ModelProto:
    """Channels 1 and 2 are constants other than zero in front of a padded convolution."""
    weights = {
        "w1": dead(draw(4, 3, 1, 1), 1, 2),
        "b1": np.array([0.1, 0.5, 0.8, 0.3], np.float32),
        "w2": draw(2, 4, 3, 3),
    }
    body = "a = Conv(x, w1, b1) y = Conv <pads = [1, 1, 1, 1]> (a, w2)"
    return build(f"padded (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {{ {body} }}", **weights)


# --- sizes ------------------------------------------------------------------------------------------------------


def test_sizes_before_and_after() -> None:
    model = chain(True)
    result = shrink(model)
    # 4x4 positions of 4 channels with 27 products each, then of 2 channels with 4; later 2 and 2 of each
    assert result.report.before == Size(122, model.ByteSize(), 16 * (4 * 27 + 2 * 4), 3)
    assert result.report.after == Size(62, result.model.ByteSize(), 16 * (2 * 27 + 2 * 2), 3)
    assert result.report.changed
    assert not result.report.fixed  # the batch is free


def test_fixed_extents_are_counted_in_full() -> None:
    found = report(padded())
    assert found.fixed
    assert found.before.multiply_adds == 36 * (4 * 3 + 2 * 36)


def test_widths_are_listed_in_graph_order() -> None:
    assert report(chain(True)).layers == (
        Layer("Conv(a)", "Conv", "w1", (4, 3, 3, 3), (2, 3, 3, 3)),
        Layer("Conv(y)", "Conv", "w2", (2, 4, 1, 1), (2, 2, 1, 1)),
    )


def test_folds_are_counted() -> None:
    found = report(padded())
    # both constants leave through one channel of ones
    assert (found.folded, found.appended) == (2, 1)
    assert found.layers[-1].after == (2, 3, 3, 3)
    assert (report(chain(True)).folded, report(chain(True)).appended) == (0, 0)


# --- what stayed ------------------------------------------------------------------------------------------------


def test_a_channel_that_one_branch_keeps_is_told_with_the_addition() -> None:
    # channel 3 of the branch is dead, the stream is live there; channel 1 is dead in both
    assert report(residual(True)).stays == (Stay(1, "Add(t)", "they are live in s"),)


def test_the_most_come_first() -> None:
    weights = {"w1": dead(draw(6, 3, 1, 1), 0), "w2": dead(draw(6, 3, 1, 1), 1, 2, 3), "w3": draw(6, 3, 1, 1)}
    body = """a = Conv(x, w1) b = Conv(x, w2) c = Conv(x, w3) s = Add(a, c) t = Add(b, c)
        u = GlobalMaxPool(s) v = GlobalMaxPool(t) y = Add(u, v)"""
    model = build(f"g (float[N, 3, 6, 6] x) => (float[N, 6, 1, 1] y) {{ {body} }}", **weights)
    stays = report(model).stays
    assert [stay.channels for stay in stays] == sorted((stay.channels for stay in stays), reverse=True)
    assert sum(stay.channels for stay in stays) == 4


def test_interface_and_live_channels_are_no_news() -> None:
    weights = {"w1": draw(4, 3, 1, 1), "w2": dead(draw(5, 4, 1, 1), 0, 1)}
    body = "a = Conv(x, w1) y = Conv(a, w2)"
    model = build(f"g (float[N, 3, 6, 6] x) => (float[N, 5, 6, 6] y) {{ {body} }}", **weights)
    assert report(model).stays == ()


def test_refusals_are_counted_by_operator_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = sys.modules["onnxshrink.registry"]
    find = engine.find
    monkeypatch.setattr(engine, "find", lambda op, *rest: None if op in ("Hardmax", "Relu") else find(op, *rest))
    model = unknown(True)
    model.graph.node[3].name = "classes"
    model.graph.node.append(onnx.helper.make_node("Hardmax", ["y"], ["z"], "again"))
    model.graph.output[0].name = "z"
    assert report(model).refusals == (
        Refused("Hardmax", "no rule for this operator", ("classes", "again")),
        Refused("Relu", "no rule for this operator", ("Relu(r)",)),
    )


def test_nothing_removed_still_tells_why() -> None:
    weights = {"w1": dead(draw(4, 3), 1), "w2": draw(4, 4)}
    text = "a = Gemm <transB = 1> (x, w1) s = Hardmax <axis = 1> (a) y = MatMul(s, w2)"
    found = report(build(f"g (float[N, 3] x) => (float[N, 4] y) {{ {text} }}", **weights))
    assert not found.changed
    assert found.before == found.after
    assert [(stay.channels, stay.node) for stay in found.stays] == [(1, "Hardmax(s)")]


# --- index sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([], ()),
        ([0, 0], ()),
        ([1], ((0, 0),)),
        ([1, 1, 0, 1], ((0, 1), (3, 3))),
        ([0, 1, 1, 1, 0], ((1, 3),)),
    ],
)
def test_runs(mask: list[int], expected: tuple[tuple[int, int], ...]) -> None:
    assert runs(np.array(mask, np.bool_)) == expected


def test_every_kept_and_removed_index() -> None:
    found = report(chain(True))
    kept, removed = ((0, 0), (2, 2)), ((1, 1), (3, 3))
    assert dict(found.tensors) == {"a": (Cut(1, kept, removed),), "r": (Cut(1, kept, removed),)}
    assert dict(found.weights) == {
        "w1": (Cut(0, kept, removed, "Conv(a)"),),
        "b1": (Cut(0, kept, removed, "Conv(a)"),),
        "w2": (Cut(1, kept, removed, "Conv(y)"),),
    }
    assert found.gone == ()


def test_tensors_that_are_no_longer_computed() -> None:
    weights = {"w1": draw(4, 3, 1, 1), "w2": np.zeros((4, 4, 1, 1), np.float32), "w3": draw(2, 4, 1, 1)}
    body = "a = Conv(x, w1) b = Conv(a, w2) r = Relu(b) s = Add(a, r) y = Conv(s, w3)"
    found = report(build(f"g (float[N, 3, 6, 6] x) => (float[N, 2, 6, 6] y) {{ {body} }}", **weights))
    assert {"b", "r"} <= set(found.gone)
    assert found.after.parameters == found.before.parameters - 16


@pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
def test_index_sets_add_up_to_the_tensors(network: Network) -> None:
    result = shrink(network(True), verify=False)
    shapes = {tensor.name: tensor.dims for tensor in network(True).graph.initializer}
    for name, cuts in result.report.weights.items():
        for cut in cuts:
            indices = [i for first, last in (*cut.kept, *cut.removed) for i in range(first, last + 1)]
            extent = shapes[name][cut.axis] if name in shapes else len(indices)
            assert sorted(indices) == list(range(extent))
            assert cut.removed


# --- JSON -------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
@pytest.mark.parametrize("pruned", [True, False])
def test_json_holds_the_report(network: Network, pruned: bool) -> None:
    found = shrink(network(pruned)).report
    assert json.loads(found.to_json()) == plain(found.to_dict())
    assert found.to_json().endswith("}\n")


def test_json_keeps_numbers_on_one_line_and_names_untouched() -> None:
    model = chain(True)
    model.graph.node[0].name = "a [1,\n 2] name"
    text = report(model).to_json()
    assert '"kept": [[0, 0], [2, 2]],' in text
    assert '"before": [4, 3, 3, 3],' in text
    assert json.loads(text)["layers"][0]["node"] == "a [1,\n 2] name"


def test_equivalence_figures_are_in_the_report() -> None:
    found = shrink(chain(True)).report.to_dict()["equivalence"]
    assert set(found) == {"error", "noise", "multiple", "absolute", "samples", "outputs", "limit"}
    assert found["error"] <= found["limit"]

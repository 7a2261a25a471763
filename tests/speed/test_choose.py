"""The forms of a model, what they are predicted to cost, and which of them is chosen."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import Array, build, check_same, dead, draw, parameters, shapes

import onnxshrink
from onnxshrink.analyse import Analysis, analyse
from onnxshrink.graph import Graph
from onnxshrink.lazy import LazyModel
from onnxshrink.plan import make_plan
from onnxshrink.speed import auto
from onnxshrink.speed.choose import Forms, is_short
from onnxshrink.speed.cost import planned, whole, works
from onnxshrink.speed.kernels import BLOCK, NOMINAL, Kernels

# Kernels that work in blocks of four channels: other widths take twice as long.
_ROW = tuple(1e-10 * (1 if width % 4 == 0 else 2) for width in range(1, 2 * BLOCK + 1))
BLOCKS = Kernels(dict.fromkeys(NOMINAL.units, _ROW), 1e-12)
IMAGE = draw(1, 3, 34, 34, seed=9)


def chain(lost: int = 13, width: int = 64) -> onnx.ModelProto:
    """Two convolutions with dead channels between them."""
    weights = {
        "w1": dead(draw(width, 3, 3, 3), *range(lost)),
        "b1": dead(draw(width), *range(lost)),
        "w2": draw(8, width, 1, 1),
    }
    body = "a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2)"
    return build(f"net (float[1, 3, 34, 34] x) => (float[1, 8, 32, 32] y) {{ {body} }}", **weights)


def facts(model: onnx.ModelProto) -> Analysis:
    return analyse(Graph(model))


# --- cost -------------------------------------------------------------------------------------------------------


def multiply_adds(model: onnx.ModelProto) -> dict[str, float]:
    """Per kind of layer, at one second each."""
    analysis = facts(model)
    unit = Kernels(dict.fromkeys(NOMINAL.units, (1.0,) * 2 * BLOCK), 0.0)
    found: dict[str, float] = {}
    for work in works(analysis):
        found[work.kind] = found.get(work.kind, 0) + work.seconds(unit, lambda axis: whole(analysis, axis))
    return found


def test_a_convolution_costs_its_multiply_adds() -> None:
    counted = multiply_adds(chain())
    assert counted["convolution"] == pytest.approx(32 * 32 * 64 * 3 * 9)
    assert counted["pointwise"] == pytest.approx(32 * 32 * 64 * 8)


def test_groups_and_depthwise_convolutions_cost_their_share() -> None:
    body = "a = Conv <group = 8> (x, w1) y = Conv <group = 2> (a, w2)"
    model = build(
        f"net (float[1, 8, 5, 5] x) => (float[1, 4, 3, 3] y) {{ {body} }}", w1=draw(8, 1, 3, 3), w2=draw(4, 4, 1, 1)
    )
    counted = multiply_adds(model)
    assert counted["depthwise"] == pytest.approx(9 * 8 * 9)
    assert counted["pointwise"] == pytest.approx(9 * 4 * 4)


def test_products_and_recurrent_layers_cost_their_multiply_adds() -> None:
    model = build(
        "net (float[5, 2, 3] x) => (float[5, 2, 7] y) { a, h, c = LSTM <hidden_size = 4> (x, w, r) "
        "s = Squeeze(a, axes) y = MatMul(s, v) }",
        w=draw(1, 16, 3), r=draw(1, 16, 4), axes=np.array([1]), v=draw(4, 7),
    )  # fmt: skip
    assert multiply_adds(model)["product"] == pytest.approx(5 * 2 * 16 * (3 + 4) + 5 * 2 * 4 * 7)


def test_a_channel_of_ones_that_is_appended_costs_a_copy_and_a_wider_layer() -> None:
    weights = {"w0": dead(draw(8, 3, 1, 1), 0, 1, 2, 3), "b0": draw(8), "w1": draw(4, 8, 3, 3)}
    body = "a = Conv(x, w0, b0) y = Conv <pads = [1, 1, 1, 1]> (a, w1)"
    model = build(f"net (float[1, 3, 10, 10] x) => (float[1, 4, 10, 10] y) {{ {body} }}", **weights)
    analysis = facts(model)
    plan = make_plan(analysis)
    assert [fold.appends for folds in plan.folds.values() for fold in folds.values()] == [True]
    flat = Kernels(dict.fromkeys(NOMINAL.units, (1.0,) * 2 * BLOCK), 1000.0)
    layers = 100 * 4 * 3 + 100 * 4 * 5 * 9
    assert planned(analysis, works(analysis), flat, plan) == pytest.approx(layers + 1000 * 400)


# --- forms ------------------------------------------------------------------------------------------------------


def test_forms_are_the_smallest_and_rounder_ones_that_weigh_little_more() -> None:
    analysis = facts(chain())
    forms = Forms(analysis, make_plan(analysis), BLOCKS).all
    assert {form.name: form.parameters for form in forms} == {"none": 51 * 36, "4": 52 * 36, "8": 56 * 36}
    assert forms[1].seconds < 0.75 * forms[0].seconds


def test_the_mixture_is_predicted_to_be_no_slower_than_any_uniform_form() -> None:
    weights = {
        "w1": dead(draw(64, 3, 3, 3), *range(13)),
        "w2": dead(draw(64, 64, 1, 1), *range(24)),
        "w3": draw(8, 64, 1, 1),
    }
    body = "a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b) y = Conv(s, w3)"
    model = build(f"net (float[1, 3, 34, 34] x) => (float[1, 8, 32, 32] y) {{ {body} }}", **weights)
    analysis = facts(model)
    forms = Forms(analysis, make_plan(analysis), BLOCKS)
    by_name = {form.name: form for form in forms.all}
    # 51 is raised to 52; 40 is a multiple of all that pays.
    assert by_name["4"].parameters == 52 * 27 + 52 * 40 + 40 * 8
    assert min(form.seconds for form in forms.all) == by_name["4"].seconds
    assert "mixed" not in by_name  # it is the same


def test_the_smallest_of_equally_fast_forms_is_predicted() -> None:
    analysis = facts(chain())
    assert Forms(analysis, make_plan(analysis), BLOCKS).predicted().name == "4"
    assert Forms(analysis, make_plan(analysis), NOMINAL).predicted().name == "none"


def test_short_runs_are_told_by_their_multiply_adds() -> None:
    assert not is_short(facts(chain()))
    assert is_short(facts(build("net (float[1, 3] x) => (float[1, 4] y) { y = MatMul(x, w) }", w=draw(3, 4))))


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, float]]:
    """Instead of a race: seconds by the width of the result, 64 being the input's; the first entry, then the next."""
    scripts: list[dict[int, float]] = []

    def run(self: auto._Contest, models: list[LazyModel]) -> list[Array]:
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        return [np.full(8, script[width]) for width in (64, *(shapes(model.proto)["w1"][0] for model in models))]

    monkeypatch.setattr(auto._Contest, "_race", run)
    monkeypatch.setattr(auto, "load_kernels", lambda: BLOCKS)
    return scripts


def test_the_fastest_form_is_chosen(clock: list[dict[int, float]]) -> None:
    clock.append({64: 1.0, 51: 0.9, 52: 0.6, 56: 0.5})
    result = onnxshrink.shrink(chain())
    assert shapes(result.model)["w1"] == (56, 3, 3, 3)
    check_same(chain(), result.model, x=IMAGE)
    latency = result.report.latency
    assert latency is not None
    assert (latency.timing.seconds, latency.timing.ratio, latency.align) == ((1.0, 0.5), 0.5, "8")
    assert latency.tried == {"none": 0.9, "4": 0.6, "8": 0.5}
    assert set(latency.nodes) >= {"Conv(a)"}


def test_of_equally_fast_forms_the_one_that_is_predicted_to_be_the_fastest_is_chosen(
    clock: list[dict[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.append({64: 1.0, 51: 0.503, 52: 0.501, 56: 0.5})
    assert shapes(onnxshrink.shrink(chain()).model)["w1"] == (52, 3, 3, 3)
    clock[:] = [{64: 1.0, 51: 0.503, 52: 0.52, 56: 0.5}]
    assert shapes(onnxshrink.shrink(chain()).model)["w1"] == (56, 3, 3, 3)
    monkeypatch.setattr(auto, "load_kernels", lambda: NOMINAL)
    assert shapes(onnxshrink.shrink(chain()).model)["w1"] == (51, 3, 3, 3)


def test_noise_does_not_decide() -> None:
    """Forms that cannot be told apart are as good as the fastest, however their medians come out."""
    analysis = facts(chain())
    forms = Forms(analysis, make_plan(analysis), BLOCKS).all[:2]
    noise = np.random.default_rng(0).lognormal(0, 0.3, (2, 20))
    noise[1] *= 1.05 * np.median(noise[0]) / np.median(noise[1])
    assert auto._winner(forms, [noise[0], noise[1]]).name == "4"
    assert auto._winner(forms, [noise[0], 2 * noise[1]]).name == "none"


def test_the_reason_of_a_raised_width_names_the_gain(clock: list[dict[int, float]]) -> None:
    clock.append({64: 1.0, 51: 0.9, 52: 0.5, 56: 0.6})
    report = onnxshrink.shrink(chain()).report
    assert [(stay.channels, stay.reason) for stay in report.stays] == [(1, "a width of 52 is 1.4x faster than 51")]


def test_where_every_form_is_slower_the_input_stays(clock: list[dict[int, float]]) -> None:
    clock.append({64: 1.0, 51: 1.3, 52: 1.2, 56: 1.1})
    model = chain()
    result = onnxshrink.shrink(model)
    assert result.model == model
    assert not result.report.changed
    assert result.report.note is not None
    assert "slower than the input (1.10 times as long at best); --align none" in result.report.note


def test_a_layer_that_runs_faster_whole_stays_whole(
    clock: list[dict[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two stages the first is slower when cut: it keeps its channels, and the other is cut."""
    monkeypatch.setattr(auto._Contest, "_profile", lambda self, model: {"Conv(a)": (1.0, 2.0), "Conv(s)": (1.0, 0.5)})
    weights = {
        "w1": dead(draw(64, 3, 3, 3), *range(13)),
        "w2": dead(draw(64, 64, 1, 1), *range(24)),
        "w3": draw(8, 64, 1, 1),
    }
    body = "a = Conv(x, w1) r = Relu(a) s = Conv(r, w2) t = Relu(s) y = Conv(t, w3)"
    model = build(f"net (float[1, 3, 34, 34] x) => (float[1, 8, 32, 32] y) {{ {body} }}", **weights)
    clock += [{64: 1.0, 51: 1.3, 52: 1.2, 56: 1.1}, {64: 0.9}]
    result = onnxshrink.shrink(model)
    assert shapes(result.model) == {"w1": (64, 3, 3, 3), "w2": (40, 64, 1, 1), "w3": (8, 40, 1, 1)}
    assert result.report.latency is not None
    assert result.report.latency.align.endswith("some layers whole")
    assert "it runs faster whole" in {stay.reason for stay in result.report.stays}


def test_without_timing_the_cost_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "load_kernels", lambda: BLOCKS)
    monkeypatch.setattr(auto, "_Contest", None)
    result = onnxshrink.shrink(chain(), timing=False)
    assert shapes(result.model)["w1"] == (52, 3, 3, 3)
    assert result.report.latency is None


def test_a_model_that_cannot_be_timed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "load_kernels", lambda: BLOCKS)
    model = chain()
    model.graph.node.append(onnx.helper.make_node("Unheard", ["y"], ["z"], domain="com.acme"))
    model.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n"]))
    result = onnxshrink.shrink(model, verify=False)
    assert shapes(result.model)["w1"] == (52, 3, 3, 3)
    assert result.report.untimed is not None
    assert "does not load in onnxruntime" in result.report.untimed


def test_short_runs_are_not_timed() -> None:
    model = build(
        "net (float[1, 3] x) => (float[1, 2] y) { a = MatMul(x, w) y = MatMul(a, v) }",
        w=dead(draw(3, 8), 1, axis=1), v=draw(8, 2),
    )  # fmt: skip
    report = onnxshrink.shrink(model).report
    assert report.after.parameters == 7 * 5
    assert report.untimed == "one run takes microseconds"


def test_real_kernels_choose_a_form_that_computes_the_same() -> None:
    """No figure is asserted: which form is the fastest depends on the machine."""
    result = onnxshrink.shrink(chain())
    assert parameters(result.model) <= 1.11 * 51 * 36 or not result.report.changed
    check_same(chain(), result.model, x=IMAGE)

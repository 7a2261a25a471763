"""Facts found by running a node alone: what they are, how they are marked, and that they are always compared."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, parameters, shapes
from rich.console import Console

import onnxshrink
from onnxshrink.analyse import analyse
from onnxshrink.errors import InputError
from onnxshrink.graph import Graph
from onnxshrink.probe import prober
from onnxshrink.report import Refused, Unproven
from onnxshrink.tables import print_report


def declared(model: onnx.ModelProto, **tensors: tuple[int | str, ...]) -> onnx.ModelProto:
    """The model with the shapes of what custom operators make."""
    for name, shape in tensors.items():
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return model


def opaque(**lost: int) -> onnx.ModelProto:
    """A product by an operator without a rule, with dead columns, then a layer that reads it."""
    weights = {"w": dead(draw(5, 6), 1, 4, axis=1), "b": draw(6), "w2": draw(6, 3), "b2": draw(3)}
    body = "t = com.microsoft.TransposeMatMul(x, w) s = Add(t, b) y = Gemm(s, w2, b2)"
    return declared(build(f"g (float[N, 5] x) => (float[N, 3] y) {{ {body} }}", **weights), t=("N", 6))


X = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)


def test_outputs_that_never_change_are_found_and_what_reads_them_shrinks() -> None:
    model = opaque()
    result = onnxshrink.shrink(model, align="none", probe=4)
    assert shapes(result.model)["w2"] == (4, 3)
    assert operators(result.model) == ["TransposeMatMul", "Gather", "Add", "Gemm"]
    assert result.report.unproven == (
        Unproven("TransposeMatMul(t)", "TransposeMatMul", "4 random samples", constant=2),
    )
    assert result.report.refusals == ()
    check_same(model, result.model, x=X)


def test_without_a_request_nothing_is_probed() -> None:
    result = onnxshrink.shrink(opaque(), align="none")
    assert not result.report.changed
    assert result.report.unproven == ()
    assert result.report.refusals == (Refused("TransposeMatMul", "no rule for this operator", ("TransposeMatMul(t)",)),)


def test_what_was_probed_is_compared_even_where_the_user_wants_no_comparison() -> None:
    assert onnxshrink.shrink(opaque(), align="none", probe=4, verify=False).report.equivalence is not None


def test_an_output_that_is_constant_altogether_takes_its_node_along() -> None:
    weights = {"zero": np.zeros((5, 6), np.float32), "w": draw(5, 6), "w2": draw(6, 3)}
    body = "t = com.microsoft.TransposeMatMul(x, zero) m = MatMul(x, w) s = Add(t, m) r = Relu(s) y = MatMul(r, w2)"
    model = declared(build(f"g (float[N, 5] x) => (float[N, 3] y) {{ {body} }}", **weights), t=("N", 6))
    result = onnxshrink.shrink(model, align="none", probe=4)
    assert operators(result.model) == ["MatMul", "Relu", "MatMul"]
    assert parameters(result.model) == 5 * 6 + 6 * 3
    check_same(model, result.model, x=X)


def test_a_probe_that_finds_nothing_says_so() -> None:
    body = "t = com.microsoft.TransposeMatMul(x, w) y = Relu(t)"
    text = f"g (float[N, 5] x) => (float[N, 6] y) {{ {body} }}"
    report = onnxshrink.shrink(declared(build(text, w=draw(5, 6)), t=("N", 6)), align="none", probe=3).report
    assert [r.reason for r in report.refusals] == [
        "no rule for this operator; in 3 random samples no output was constant"
    ]


def test_whole_numbers_are_not_drawn() -> None:
    body = "t = com.microsoft.ExpandDims(x, axis) y = Cast <to = 1> (t)"
    model = build(f"g (int64[N, 5] x, int32 axis) => (float[N, 1, 5] y) {{ {body} }}")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.INT64, ("N", 1, 5)))
    (refusal,) = analyse(Graph(model), prober(4)).refusals
    assert refusal.reason == "its input 'x' is of int64, of which random values may not be valid"


def test_what_cannot_run_alone_is_refused() -> None:
    text = "g (float[N, 5] x) => (float[N, 5] y) { t = com.microsoft.Nowhere(x) y = Relu(t) }"
    (refusal,) = analyse(Graph(declared(build(text), t=("N", 5))), prober(4)).refusals
    assert refusal.reason == "no rule for this operator, and onnxruntime cannot run it alone"


def test_random_numbers_are_no_constants_though_their_inputs_are() -> None:
    text = "g (float[4, 5] x) => (float[4, 5] y) { r = RandomNormalLike(c) y = Add(x, r) }"
    analysis = analyse(Graph(build(text, c=draw(4, 5))), prober(4))
    assert "r" not in analysis.known
    assert "r" not in analysis.constants


def test_known_inputs_hold_their_values_while_the_others_are_drawn() -> None:
    weights = {"w": dead(draw(6, 5), 2), "b": np.array([0, 0, 0.5, 0, 0, 0], np.float32)}
    body = "a = Gemm <transB = 1> (x, w, b) s = com.microsoft.SampleOp(a) y = Neg(s)"
    model = declared(build(f"g (float[N, 5] x) => (float[N, 6] y) {{ {body} }}", **weights), s=("N", 6))
    known = analyse(Graph(model), prober(4)).known["s"]
    assert known.mask.tolist() == [[False, False, True, False, False, False]]
    assert known.value[0, 2] == 0.5


@pytest.mark.parametrize("samples", [1, -1])
def test_one_sample_shows_no_change(samples: int) -> None:
    with pytest.raises(InputError, match=f"^{samples} samples cannot tell what changes; probe with at least 2$"):
        onnxshrink.shrink(opaque(), probe=samples)


def test_the_screen_says_what_rests_on_the_comparison_alone() -> None:
    report = onnxshrink.shrink(opaque(), align="none", probe=4).report
    screen = Console(width=100, file=io.StringIO())
    print_report(screen, report, verified=True)
    assert isinstance(screen.file, io.StringIO)
    told = "Operators whose shrinking rests on the comparison alone:\n  TransposeMatMul TransposeMatMul(t): "
    assert f"{told}4 random samples; 2 constant elements\n" in screen.file.getvalue()

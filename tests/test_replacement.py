"""Functions that write nodes anew: what they see, what they may return, and that the result is what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, shapes
from test_probe import declared

import onnxshrink
from onnxshrink.errors import InputError
from onnxshrink.replacement import Masks, ReplaceableNode, Replacement
from onnxshrink.report import Unproven

X = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)


def custom(**changed: Any) -> onnx.ModelProto:
    """Two operators without a rule between layers: 2 of 8 channels dead in front, 2 of 6 unread behind.

    The second one's weights have a column of zeros of their own, and what they make there is constant too.
    """
    weights = {
        "w1": dead(draw(8, 5), 1, 3),
        "b1": dead(draw(8), 1, 3),
        "w2": dead(draw(8, 6), 0),
        "w3": dead(draw(6, 4), 2, 5),
        **changed,
    }
    body = """a = Gemm <transB = 1> (x, w1, b1) r = Relu(a) s = com.microsoft.SampleOp(r)
        t = com.microsoft.TransposeMatMul(s, w2) y = MatMul(t, w3)"""
    model = build(f"g (float[N, 5] x) => (float[N, 4] y) {{ {body} }}", **weights)
    return declared(model, s=("N", 8), t=("N", 6))


class Functions:
    """Replacements for both operators, and what they were called with."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[ReplaceableNode, Masks]] = {}

    def same(self, node: ReplaceableNode, masks: Masks) -> dict[str, np.ndarray]:
        self.calls[node.op_type] = node, masks
        return {}

    def product(self, node: ReplaceableNode, masks: Masks) -> dict[str, np.ndarray]:
        self.calls[node.op_type] = node, masks
        (inputs,), outputs, _ = masks
        return {"w2": node.constants["w2"][inputs[0] == 1][:, outputs[0] == 1]}

    def all(self) -> dict[str, Any]:
        return {"com.microsoft::SampleOp": self.same, "TransposeMatMul": self.product}


def test_a_custom_operator_shrinks_on_both_sides() -> None:
    model, functions = custom(), Functions()
    result = onnxshrink.shrink(model, align="none", replace_functions=functions.all())
    # Channel 0 has no weight behind it, 1 and 3 are dead; outputs 2 and 5 are not read.
    assert shapes(result.model) == {"w1": (5, 5), "b1": (5,), "w2": (5, 4), "w3": (4, 4)}
    check_same(model, result.model, x=X)
    assert [(u.op, u.how, u.constant) for u in result.report.unproven] == [
        ("SampleOp", "replaced by same, 8 random samples", 2),
        ("TransposeMatMul", "replaced by product, 8 random samples", 0),
    ]


def test_without_functions_the_rest_shrinks_and_they_are_named() -> None:
    report = onnxshrink.shrink(custom(), align="none").report
    assert [refusal.op for refusal in report.refusals] == ["SampleOp", "TransposeMatMul"]
    assert not report.layers


def test_a_function_sees_the_node_and_full_size_masks() -> None:
    functions = Functions()
    onnxshrink.shrink(custom(), align="none", replace_functions=functions.all())
    node, (inputs, output, weights) = functions.calls["TransposeMatMul"]
    assert (node.name, node.op_type, node.domain) == ("TransposeMatMul(t)", "TransposeMatMul", "com.microsoft")
    assert (node.inputs, node.outputs, node.module) == (("s", "w2"), ("t",), None)
    assert node.constants["w2"].shape == (8, 6)
    assert [mask.tolist() for mask in inputs] == [[[0, 0, 1, 0, 1, 1, 1, 1]]]
    assert output.tolist() == [[1, 1, 0, 1, 1, 0]]
    assert {name: mask.sum(axis=1).tolist() for name, mask in weights.items()} == {"w2": [0, *[6] * 7]}


def test_the_result_is_compared_even_where_the_user_wants_no_comparison() -> None:
    functions = Functions().all()
    assert onnxshrink.shrink(custom(), verify=False, replace_functions=functions).report.equivalence is not None


def test_new_nodes_and_weights_take_the_place_of_a_node() -> None:
    def plain(node: ReplaceableNode, masks: Masks) -> Replacement:
        (inputs,), outputs, _ = masks
        weight = node.constants["w2"][inputs[0] == 1][:, outputs[0] == 1]
        nodes = [
            onnx.helper.make_node("MatMul", [node.inputs[0], "half"], ["part"]),
            onnx.helper.make_node("Add", ["part", "part"], [node.outputs[0]]),
        ]
        return Replacement(nodes=nodes, weights={"half": weight / 2})

    model = custom()
    functions = {**Functions().all(), "TransposeMatMul": plain}
    result = onnxshrink.shrink(model, align="none", replace_functions=functions)
    assert operators(result.model) == ["Gemm", "Relu", "SampleOp", "MatMul", "Add", "MatMul"]
    assert shapes(result.model) == {"w1": (5, 5), "b1": (5,), "half": (5, 4), "w3": (4, 4)}
    check_same(model, result.model, x=X)


def test_attributes_can_change() -> None:
    def scaled(node: ReplaceableNode, masks: Masks) -> Replacement:
        (inputs,), outputs, _ = masks
        weight = node.constants["w2"][inputs[0] == 1][:, outputs[0] == 1]
        return Replacement({"w2": weight / 4}, {"alpha": 4.0})

    model = custom()
    functions = {**Functions().all(), "TransposeMatMul": scaled}
    result = onnxshrink.shrink(model, align="none", replace_functions=functions)
    assert shapes(result.model)["w2"] == (5, 4)
    check_same(model, result.model, x=X)


def test_a_constant_that_no_function_makes_up_for_stays() -> None:
    bias = draw(8)
    bias[3] = 0
    model = custom(b1=bias)
    bias[[1, 3]] = 0.75, -2.0  # behind a ReLU one is a constant, the other nothing
    model = custom(b1=bias)
    result = onnxshrink.shrink(model, align="none", replace_functions=Functions().all())
    assert shapes(result.model)["w2"] == (6, 4)
    check_same(model, result.model, x=X)


def test_axes_that_mean_something_else_stay_whole() -> None:
    """Rows of zeros at the border of a map are no channels."""
    weights = {"w": draw(4, 3, 1, 1), "pads": np.array([0, 0, 1, 0, 0, 0, 1, 0], np.int64), "v": draw(5, 2)}
    body = "a = Conv(x, w) p = Pad(a, pads) t = com.microsoft.TransposeMatMul(p, v) y = Relu(t)"
    text = f"g (float[N, 3, 6, 5] x) => (float[N, 4, 8, 2] y) {{ {body} }}"
    model = declared(build(text, **weights), t=("N", 4, 8, 2))

    def never(node: ReplaceableNode, masks: Masks) -> dict[str, Any]:
        raise AssertionError("nothing shrinks at this node")

    assert not onnxshrink.shrink(model, align="none", replace_functions={"TransposeMatMul": never}).report.changed


def test_a_function_of_the_model_is_such_an_operator_too() -> None:
    weights = {"w1": dead(draw(8, 5), 1, 3), "b1": dead(draw(8), 1, 3), "gain": draw(8), "w3": dead(draw(8, 4), 2)}
    body = "a = Gemm <transB = 1> (x, w1, b1) s = acme.Scale(a, gain) y = MatMul(s, w3)"
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
        g (float[N, 5] x) => (float[N, 4] y) {{ {body} }}
        <domain: "acme", opset_import: ["" : 17]> Scale (v, g) => (r) {{ m = Mul(v, g) r = Tanh(m) }}
    """)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())

    def scale(node: ReplaceableNode, masks: Masks) -> dict[str, np.ndarray]:
        (inputs,), _, _ = masks
        return {"gain": node.constants["gain"][inputs[0] == 1]}

    result = onnxshrink.shrink(model, align="none", replace_functions={"acme::Scale": scale})
    assert operators(result.model) == ["Gemm", "Scale", "MatMul"]
    assert shapes(result.model) == {"w1": (5, 5), "b1": (5,), "gain": (5,), "w3": (5, 4)}
    check_same(model, result.model, x=X)


def chain() -> onnx.ModelProto:
    weights = {"w1": dead(draw(6, 5), 2), "b1": dead(draw(6), 2), "w2": draw(3, 6), "b2": draw(3)}
    body = "a = Gemm <transB = 1> (x, w1, b1) r = Tanh(a) y = Gemm <transB = 1> (r, w2, b2)"
    return build(f"g (float[N, 5] x) => (float[N, 3] y) {{ {body} }}", **weights)


def test_an_operator_with_a_rule_shrinks_by_it_and_the_function_has_the_last_word() -> None:
    seen = []

    def write(node: ReplaceableNode, masks: Masks) -> Replacement:
        seen.append((node.name, masks[1].tolist(), {name: value.shape for name, value in node.proposal.items()}))
        return Replacement({"w1": 2 * node.proposal["w1"]}, {"alpha": 0.5}) if "w1" in node.constants else Replacement()

    model = chain()
    result = onnxshrink.shrink(model, align="none", replace_functions={"Gemm": write})
    assert shapes(result.model) == {"w1": (5, 5), "b1": (5,), "w2": (3, 5), "b2": (3,)}
    assert seen == [
        ("Gemm(a)", [[1, 1, 0, 1, 1, 1]], {"w1": (5, 5), "b1": (5,)}),
        ("Gemm(y)", [[1, 1, 1]], {"w2": (3, 5), "b2": (3,)}),
    ]
    assert result.report.unproven == (
        Unproven("Gemm(a)", "Gemm", "replaced by write", 1),
        Unproven("Gemm(y)", "Gemm", "replaced by write", 0),
    )
    check_same(model, result.model, x=X)


def test_a_function_may_leave_a_node_to_its_rule() -> None:
    plain = onnxshrink.shrink(chain(), align="none").model
    assert onnxshrink.shrink(chain(), align="none", replace_functions={"Gemm": lambda node, masks: None}).model == plain


def test_a_function_that_changes_the_numbers_is_caught() -> None:
    def wrong(node: ReplaceableNode, masks: Masks) -> dict[str, np.ndarray]:
        return {name: value * 1.5 for name, value in node.proposal.items()}

    with pytest.raises(onnxshrink.OutputsDiffer, match=r"output 'y' differs"):
        onnxshrink.shrink(chain(), align="none", verify=False, replace_functions={"Gemm": wrong})


def whole(node: ReplaceableNode, masks: Masks) -> Any:
    return dict(node.constants)


def narrow(node: ReplaceableNode, masks: Masks) -> Any:
    return {"w2": node.constants["w2"][3:, 1:]}


def other(node: ReplaceableNode, masks: Masks) -> Any:
    return {"w2": node.constants["w2"][3:, 2:]}


def doubled(node: ReplaceableNode, masks: Masks) -> Any:
    return {"w2": node.constants["w2"][3:, 2:].astype(np.float64)}


def nothing(node: ReplaceableNode, masks: Masks) -> Any:
    return None


def number(node: ReplaceableNode, masks: Masks) -> Any:
    return 3


def misspelt(node: ReplaceableNode, masks: Masks) -> Any:
    return {"w": node.constants["w2"]}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (whole, r"what it returned does not run on inputs and constants of the shapes \[\[2, 5\], \[8, 6\]\]"),
        (narrow, r"output 't' has shape \[2, 5\], not \[2, 4\]"),
        (other, r"output 't' has other values than the node has there"),
        (doubled, r"'w2' is of float64, not of float32"),
        (nothing, r"nothing was returned, and the operator has no rule"),
        (number, r"it returned a int, not a Replacement or a mapping of constants"),
        (misspelt, r"the node has no constant 'w'; near names: 'w2'"),
    ],
)
def test_what_does_not_fit_names_the_function_and_the_node(function: Any, reason: str) -> None:
    functions = {**Functions().all(), "TransposeMatMul": function}
    where = rf"customized_replace_func\['TransposeMatMul'\] \({function.__name__}\), node TransposeMatMul\(t\): "
    with pytest.raises(InputError, match=where + reason) as caught:
        onnxshrink.shrink(custom(), align="none", replace_functions=functions)
    assert "\n" not in str(caught.value)


def test_a_constant_of_the_wrong_shape_for_an_operator_with_a_rule_is_named() -> None:
    def whole_bias(node: ReplaceableNode, masks: Masks) -> dict[str, np.ndarray]:
        return {name: value for name, value in node.constants.items() if name == "b1"}

    message = r"customized_replace_func\['Gemm'\] \(whole_bias\), node Gemm\(a\): 'b1' has shape \[6\], not \[5\]"
    with pytest.raises(InputError, match=message):
        onnxshrink.shrink(chain(), align="none", replace_functions={"Gemm": whole_bias})


def test_what_is_no_function_is_named() -> None:
    with pytest.raises(InputError, match=r"customized_replace_func\['Gemm'\] is a int, not a function"):
        onnxshrink.shrink(chain(), replace_functions={"Gemm": 3})  # type: ignore[dict-item]

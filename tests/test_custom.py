"""Rules of one's own: registered, proven, shipped by a package, and honoured for model-local functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from models import draw, run

import onnxshrink
from onnxshrink import registry
from onnxshrink.errors import RuleError
from onnxshrink.families import pointwise, same_index
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Rewrite
from onnxshrink.testing import Case, RuleViolation, check_rule, make_case
from onnxshrink.view import View

SNAKE = """Snake (x, a) => (y) {
    one = Constant <value_ints = [1]> ()
    scale = Unsqueeze (a, one)
    angle = Mul (x, scale)
    sine = Sin (angle)
    square = Mul (sine, sine)
    wave = Div (square, scale)
    y = Add (x, wave)
}"""
BLOCKS = """Blocks <groups> (x, w) => (y) {
    g = Constant <value_int: int = @groups> ()
    one = Constant <value_ints = [1]> ()
    zero = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    count = Reshape (g, one)
    split = Concat <axis = 0> (zero, count, one, rest)
    parts = Reshape (x, split)
    product = MatMul (parts, w)
    joint = Concat <axis = 0> (zero, rest)
    y = Reshape (product, joint)
}"""


def function(text: str) -> onnx.FunctionProto:
    header = '<domain: "com.acme", opset_import: ["" : 17]>'
    return onnx.parser.parse_function(header + text)


def model_of(body: str, inputs: str, outputs: str, functions: list[str], **weights: np.ndarray) -> onnx.ModelProto:
    header = '<ir_version: 8, opset_import: ["" : 17, "com.acme" : 1]>'
    model = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {body} }}")
    model.functions.extend(function(text) for text in functions)
    for name, value in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


def snake_model() -> onnx.ModelProto:
    """Three of eight channels are dead in front of a Snake; one of them has a bias."""
    first, bias = draw(8, 3, 1), draw(8)
    first[[1, 4, 6]] = 0
    bias[[1, 4]] = 0
    weights = {"w": first, "b": bias, "a": np.abs(draw(8)) + 0.5, "v": draw(2, 8, 1)}
    body = "h = Conv (x, w, b) s = com.acme.Snake (h, a) y = Conv (s, v)"
    return model_of(body, "float[N, 3, T] x", "float[N, 2, T] y", [SNAKE], **weights)


def blocks_model() -> onnx.ModelProto:
    """Of four groups of three inputs and two outputs, nobody reads the second."""
    last = draw(8, 2)
    last[2:4] = 0
    body = "h = Gemm <transB = 1> (x, w) g = com.acme.Blocks <groups = 4> (h, k) y = MatMul (g, v)"
    return model_of(body, "float[N, 5] x", "float[N, 2] y", [BLOCKS], w=draw(12, 5), k=draw(4, 3, 2), v=last)


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that a test registers are gone afterwards."""
    registry.load()
    monkeypatch.setattr(registry, "_rules", {key: list(rules) for key, rules in registry._rules.items()})


def blocks_rewrite(view: View) -> Rewrite:
    count = view.kept_count(1, 0)  # None: a free dimension, which stays as it is
    return Rewrite() if count is None else Rewrite(attributes={"groups": count})


def register_blocks(**changes: Any) -> None:
    @onnxshrink.rule("Blocks", domain="com.acme", **{"rewrite": blocks_rewrite, **changes})
    def blocks(view: View) -> tuple[str, dict[str, int]]:
        return "n (g i), g i o -> n (g o)", {"g": view.attribute("groups")}


def snake_case(count: int = 6) -> Case:
    node = onnx.helper.make_node("Snake", ["x", "a"], ["y"], domain="com.acme")
    return make_case(node, {"x": draw(2, count, 5), "a": np.abs(draw(count)) + 0.5}, [function(SNAKE)])


def blocks_case() -> Case:
    node = onnx.helper.make_node("Blocks", ["x", "w"], ["y"], domain="com.acme", groups=4)
    return make_case(node, {"x": draw(3, 12), "w": draw(4, 3, 1)}, [function(BLOCKS)])


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


# --- what a rule does ----------------------------------------------------------------------------------------------


def test_notation_alone() -> None:
    """Channels pass through; without a forward rule a constant channel is not known behind the operator."""
    onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme")
    result = onnxshrink.shrink(snake_model())
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Snake", "Conv"]
    assert [f.name for f in result.model.functions] == ["Snake"]
    assert result.report.after.parameters == result.report.before.parameters


def test_with_a_forward_rule_dead_channels_leave() -> None:
    onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", forward=same_index)
    result = onnxshrink.shrink(snake_model())
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Snake", "Conv"]
    found = shapes(result.model)
    # Five channels are left; the constant of one of the others is in the bias of the last layer.
    assert sorted(found.values()) == [(2,), (2, 5, 1), (5,), (5,), (5, 3, 1)]
    x = draw(2, 3, 7)
    np.testing.assert_allclose(run(result.model, x=x)[0], run(snake_model(), x=x)[0], rtol=1e-5, atol=1e-6)


def test_without_a_rule_a_function_is_inlined() -> None:
    result = onnxshrink.shrink(snake_model())
    assert not result.model.functions
    assert "Snake" not in {node.op_type for node in result.model.graph.node}
    assert {(2, 5, 1), (5, 3, 1)} <= set(shapes(result.model).values())


def test_without_a_rule_an_operator_is_kept_whole_and_named() -> None:
    model = snake_model()
    del model.functions[:]
    result = onnxshrink.shrink(model, verify=False)
    assert ("Snake", "no rule for this operator") in [(r.op, r.reason) for r in result.report.refusals]
    assert result.report.after.parameters == result.report.before.parameters


def test_a_function_describes_each_node() -> None:
    register_blocks()
    result = onnxshrink.shrink(blocks_model())
    assert sorted(shapes(result.model).values()) == [(3, 3, 2), (6, 2), (9, 5)]
    (node,) = [node for node in result.model.graph.node if node.op_type == "Blocks"]
    assert [(a.name, a.i) for a in node.attribute] == [("groups", 3)]
    assert result.report.equivalence is not None
    assert result.report.equivalence.error < 1e-6


def test_a_function_may_return_a_relation() -> None:
    @onnxshrink.rule("Blocks", domain="com.acme", rewrite=blocks_rewrite)
    def blocks(view: View) -> Relation:
        return resolve("n (g i), g i o -> n (g o)", view.shapes(view.inputs), view.shapes(view.outputs), {"g": 4})

    assert isinstance(blocks, type(lambda: None))
    assert sorted(shapes(onnxshrink.shrink(blocks_model()).model).values()) == [(3, 3, 2), (6, 2), (9, 5)]


def test_a_function_may_give_a_reason() -> None:
    @onnxshrink.rule("Blocks", domain="com.acme")
    def blocks(view: View) -> str:
        raise UnresolvedError("not with four groups")

    result = onnxshrink.shrink(blocks_model())
    assert [(r.op, r.reason) for r in result.report.refusals] == [("Blocks", "not with four groups")]
    assert result.report.after.parameters == result.report.before.parameters


def test_other_functions_are_inlined_all_the_same() -> None:
    """Also those that the one with a rule calls."""
    onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", forward=same_index)
    twice = "Twice (x, a) => (y) { h = com.acme.Snake (x, a) y = Neg (h) }"
    model = snake_model()
    model.graph.node[1].op_type = "Twice"
    made = onnx.parser.parse_function(f'<domain: "com.acme", opset_import: ["" : 17, "com.acme" : 1]>{twice}')
    model.functions.append(made)
    result = onnxshrink.shrink(model)
    assert [node.op_type for node in result.model.graph.node if node.op_type != "Identity"] == [
        "Conv", "Snake", "Neg", "Conv"
    ]  # fmt: skip
    assert [f.name for f in result.model.functions] == ["Snake"]
    assert {(2, 5, 1), (5, 3, 1)} <= set(shapes(result.model).values())


# --- registration --------------------------------------------------------------------------------------------------


def test_a_rule_for_the_same_operator_is_an_error_or_takes_its_place() -> None:
    first = onnxshrink.rule("Snake", "n [c] *x, [c] -> n [c] *x", domain="com.acme")
    with pytest.raises(RuleError, match=r"two rules for com\.acme\.Snake at opset 1"):
        onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme")
    assert registry.find("Snake", "com.acme", 1) is first
    second = onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", replace=True)
    assert registry.find("Snake", "com.acme", 1) is second


def test_a_range_of_opsets() -> None:
    onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", since=2, until=3)
    assert [registry.find("Snake", "com.acme", version) is not None for version in (1, 2, 3, 4)] == [
        False, True, True, False
    ]  # fmt: skip


@pytest.mark.parametrize("notation", ["n c", "n c -> n c -> n", "n ? -> n", "*a *b -> *a"])
def test_malformed_notation_is_an_error_at_once(notation: str) -> None:
    with pytest.raises(RuleError, match="notation"):
        onnxshrink.rule("Snake", notation, domain="com.acme")
    assert registry.find("Snake", "com.acme", 1) is None


# --- proof ---------------------------------------------------------------------------------------------------------


def test_right_rules_are_proven() -> None:
    onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", forward=same_index)
    register_blocks()
    for op, cases in (("Snake", [snake_case(), snake_case(4)]), ("Blocks", [blocks_case()])):
        tally = check_rule(op, "com.acme", cases, range(24))
        assert tally.ran == 24 * len(cases)
        assert tally.unneeded > 0
        assert tally.shrunk > 0


def test_numpy_s_alignment_is_not_that_of_the_notation() -> None:
    """The frequencies stand along the channels, and not along the last axis."""
    onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", forward=pointwise)
    with pytest.raises(RuleViolation, match="a fact of shape"):
        check_rule("Snake", "com.acme", [snake_case()], range(24))


def dead_wrong(view: View) -> list[Any]:
    """Claims that zero comes out wherever the frequency is large."""
    from onnxshrink.facts import Known

    return [Known(np.ones((1, 1, 1), np.bool_), np.zeros((1, 1, 1), np.float32))]


WRONG = {
    "forward": lambda: onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", forward=dead_wrong),
    "backward": lambda: onnxshrink.rule(
        "Snake", "n c *x, c -> n c *x", domain="com.acme", backward=lambda view: [np.zeros((1, 1, 1), np.bool_), None]
    ),
    "attribute": lambda: register_blocks(rewrite=None),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_rules_are_objected_to(wrong: Any) -> None:
    wrong()
    op = "Blocks" if registry.find("Blocks", "com.acme", 1) else "Snake"
    with pytest.raises(RuleViolation):
        check_rule(op, "com.acme", [snake_case() if op == "Snake" else blocks_case()], range(24))


def test_a_case_of_an_operator_that_does_not_run() -> None:
    from onnxshrink.testing import InputsCannotRun

    node = onnx.helper.make_node("Snake", ["x", "a"], ["y"], domain="com.acme")
    with pytest.raises(InputsCannotRun, match="Snake"):
        make_case(node, {"x": draw(2, 3, 4), "a": draw(3)})


# --- rules that a package ships ------------------------------------------------------------------------------------


def install(folder: Path, code: str) -> None:
    """A distribution as pip leaves it: a module, and metadata with an entry point."""
    (folder / "acme_rules.py").write_text(code)
    metadata = folder / "acme_rules-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rules\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[onnxshrink.rules]\nacme = acme_rules\n")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


SHRINK = "import onnxshrink, sys; print(onnxshrink.shrink(sys.argv[1]).report.after.parameters)"


def test_a_package_ships_its_rules(tmp_path: Path) -> None:
    install(
        tmp_path,
        "import onnxshrink\nfrom onnxshrink.families import same_index\n"
        'onnxshrink.rule("Snake", "n c *x, c -> n c *x", domain="com.acme", forward=same_index)\n',
    )
    found = python(
        'from onnxshrink.registry import find, rules; print(find("Snake", "com.acme", 1).relate, '
        '[rule.op for rule in rules() if rule.domain == "com.acme"])',
        tmp_path,
    )
    assert found.stdout == "n c *x, c -> n c *x ['Snake']\n", found.stderr


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('no such thing')", "no such thing"),
        ('import onnxshrink\nonnxshrink.rule("Relu", "*a -> *a")', "two rules for ai.onnx.Relu at opset 1"),
    ],
    ids=["broken", "there already"],
)
def test_a_package_whose_rules_fail_is_named(tmp_path: Path, code: str, reason: str) -> None:
    install(tmp_path, code)
    found = python('from onnxshrink.registry import find; find("Relu", "", 17)', tmp_path)
    last = found.stderr.strip().splitlines()[-1]
    assert "entry point 'acme' (acme_rules) of onnxshrink.rules" in last
    assert reason in last

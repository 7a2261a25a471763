"""The checkers object to wrong rules, planted here one by one, and pass the right ones with something claimed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from models import Array, build, dead, draw

from onnxshrink import registry
from onnxshrink.facts import Known, Line, everything, partial, uniform
from onnxshrink.notation import resolve
from onnxshrink.registry import Rewrite
from onnxshrink.testing import (
    InputsCannotRun,
    RuleViolation,
    check_backward,
    check_forward,
    check_shrink,
    compare,
    parameters,
    run,
)
from onnxshrink.view import View

Plant = Callable[..., None]
Checker = Callable[..., Any]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Change the rules of one operator."""

    def change(op: str, **changes: Any) -> None:
        registry.load()
        rules = [replace(rule, **changes) for rule in registry._rules["", op]]
        monkeypatch.setitem(registry._rules, ("", op), rules)

    return change


# --- models in which there is something to claim ----------------------------------------------------------------


def chain(node: str, rows: Array, columns: Array, bias: Array | None = None, **more: Array) -> onnx.ModelProto:
    """`x -> Conv(rows, bias) -> h -> node -> y -> Conv(columns)`: the node between dead rows and dead columns."""
    text = (
        f"g (float[2, 3, 5, 5] x) => (float[2, M, H, W] z) {{ h = Conv (x, rows, bias) {node} z = Conv (y, columns) }}"
    )
    bias = np.zeros(rows.shape[0], np.float32) if bias is None else bias
    return build(text, opset=18, rows=rows, bias=bias, columns=columns, **more)


ROWS = dead(draw(4, 3, 1, 1), 1, 3)
COLUMNS = dead(draw(2, 4, 1, 1), 0, axis=1)
FULL = draw(2, 4, 1, 1)
BIAS = np.array([0.5, 0.75, -0.25, 1.0], np.float32)


def image() -> dict[str, Array]:
    return {"x": draw(2, 3, 5, 5, seed=3)}


def rows() -> dict[str, Array]:
    return {"x": draw(5, 4, seed=3)}


RIGHT = {
    "Sigmoid": chain("y = Sigmoid (h)", ROWS, COLUMNS),
    "Softmax over space": chain("y = Softmax <axis = 3> (h)", ROWS, COLUMNS),
    "AveragePool": chain("y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (h)", ROWS, COLUMNS, BIAS),
    "MaxPool": chain("y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (h)", ROWS, COLUMNS, BIAS),
    "grouped": chain("y = Conv <group = 2> (h, w)", ROWS, COLUMNS, BIAS, w=draw(4, 2, 1, 1)),
    "padded": chain("y = Conv <pads = [1, 1, 1, 1]> (h, w)", ROWS, COLUMNS, BIAS, w=draw(4, 4, 3, 3)),
    "padded before": chain(
        "p = Pad (h, a) y = Conv (p, w)", ROWS, COLUMNS, BIAS, w=draw(4, 4, 3, 3), a=np.array([0, 0, 1, 0, 0, 0, 2, 1])
    ),
}


@pytest.mark.parametrize("model", RIGHT.values(), ids=RIGHT.keys())
def test_right_rules_pass_and_claim_something(model: onnx.ModelProto) -> None:
    assert check_forward(model, image()) > 0
    assert check_backward(model, image()) > 0
    result = check_shrink(model, image())
    assert result.removed > 0
    assert result.indices > 0


# --- wrong in what is known -------------------------------------------------------------------------------------


def zero_stays_zero(view: View) -> list[Known | None]:
    zero = view.data().zero()
    return [partial(zero, np.zeros((1,) * zero.ndim, np.float32))]


def constant_stays(view: View) -> list[Known | None]:
    """A channel that holds one value keeps it, whatever pads."""
    data = view.data()
    known = uniform(data.known, range(2, data.rank))
    return [partial(known.mask, known.value) if known.anything else None]


def everything_is_zero(view: View) -> list[Known | None]:
    return [Known(everything(view.output().rank), np.zeros((1,) * view.output().rank, np.float32))]


POOL = "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (h)"
CEIL = """y = AveragePool
    <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1, count_include_pad = 1, pads = [1, 1, 0, 0]> (h)"""
WRONG_FORWARD = {
    "a sigmoid of zero is zero": ("Sigmoid", zero_stays_zero, chain("y = Sigmoid (h)", ROWS, FULL)),
    "a softmax of zero is zero": ("Softmax", zero_stays_zero, chain("y = Softmax <axis = 3> (h)", ROWS, FULL)),
    "an average keeps constants that padding dilutes": ("AveragePool", constant_stays, chain(POOL, ROWS, FULL, BIAS)),
    "an average keeps constants at the last window": ("AveragePool", constant_stays, chain(CEIL, ROWS, FULL, BIAS)),
    "a transposed convolution is uniform": (
        "ConvTranspose",
        constant_stays,
        chain("y = ConvTranspose (h, w)", ROWS, FULL, BIAS, w=draw(4, 4, 3, 3)),
    ),
    "an exponential is zero": ("Exp", everything_is_zero, chain("y = Exp (h)", ROWS, FULL)),
}


@pytest.mark.parametrize(("op", "forward", "model"), WRONG_FORWARD.values(), ids=WRONG_FORWARD.keys())
@pytest.mark.parametrize("check", [check_forward, check_shrink], ids=["forward", "shrink"])
def test_wrong_knowledge_is_objected_to(
    plant: Plant, check: Checker, op: str, forward: Any, model: onnx.ModelProto
) -> None:
    plant(op, forward=forward)
    with pytest.raises(RuleViolation):
        check(model, image())


def framed_by_anything(view: View) -> Known | None:
    """A channel of one value holds it within zeros, whatever the operator does."""
    return uniform(view.data().known, range(2, view.data().rank))


AROUND = np.array([0, 0, 1, 0, 0, 0, 2, 1])
EACH = np.pad(np.ones((1, 1, 4, 4), np.float32), [(0, 0), (0, 3), (0, 1), (0, 1)], mode="wrap")
EACH[:, :2, 4:], EACH[:, 2:, :, 4:] = 0, 0
WRONG_FRAMES = {
    "neither zero nor its value": ("Pad", chain("y = Pad (h, a, c)", ROWS, FULL, BIAS, a=AROUND, c=np.float32(0.5))),
    "the frame differs": ("Mul", chain("y = Mul (h, m)", ROWS, FULL, BIAS, m=EACH)),
}


@pytest.mark.parametrize(("reason", "op"), [(reason, op) for reason, (op, _) in WRONG_FRAMES.items()])
def test_wrong_frames_are_objected_to(plant: Plant, reason: str, op: str) -> None:
    plant(op, frame=framed_by_anything)
    model = WRONG_FRAMES[reason][1]
    with pytest.raises(RuleViolation, match=reason):
        check_forward(model, image())
    with pytest.raises(RuleViolation):
        check_shrink(model, image())


def same_slopes(view: View) -> Line:
    """Zeros that are said to become one number, whatever their scales are."""
    zero = view.data().known.zero().reshape(-1)
    return Line(1, zero, np.ones(zero.size), np.zeros(zero.size))


def test_wrong_lines_are_objected_to(plant: Plant) -> None:
    plant("LayerNormalization", line=same_slopes)
    text = "g (float[2, 3] x) => (float[2, 2] z) { h = MatMul(x, v) n = LayerNormalization(h, s) z = MatMul(n, w) }"
    model = build(text, v=dead(draw(3, 6), 1, 2, axis=1), s=draw(6), w=draw(6, 2))
    with pytest.raises(RuleViolation, match="claimed to follow another one"):
        check_forward(model, {"x": draw(2, 3)})
    with pytest.raises(RuleViolation):
        check_shrink(model, {"x": draw(2, 3)})


def test_a_fact_of_another_rank_is_objected_to(plant: Plant) -> None:
    plant("Relu", forward=lambda view: [Known(np.ones((1, 1), np.bool_), np.zeros((1, 1), np.float32))])
    with pytest.raises(RuleViolation, match="axes"):
        check_forward(build("g (float[2, 3, 5, 5] x) => (float[2, 3, 5, 5] z) { z = Relu (x) }"), image())


# --- wrong in what is needed ------------------------------------------------------------------------------------


def nothing_needed(view: View) -> list[Any]:
    return [None if operand is None else ~everything(operand.rank) for operand in view.inputs]


def first_only(view: View) -> list[Any]:
    """As if every operator worked on each element alone."""
    return [view.live(), *[everything(operand.rank) if operand is not None else None for operand in view.inputs[1:]]]


WRONG_BACKWARD = {
    "a product needs neither side": (
        "MatMul",
        nothing_needed,
        build("g (float[5, 4] x) => (float[5, 4] z) { h = Relu (x) z = MatMul (h, w) }", w=draw(4, 4)),
        rows,
    ),
    "a softmax needs each element alone": (
        "Softmax",
        first_only,
        chain("y = Softmax <axis = 1> (h)", draw(4, 3, 1, 1), COLUMNS),
        image,
    ),
    "a product of weights needs each column alone": (
        "MatMul",
        first_only,
        build(
            "g (float[5, 4] x) => (float[5, 4] z) { h = Relu (x) y = MatMul (h, w) z = Mul (y, v) }",
            w=draw(4, 4),
            v=np.array([1, 0, 1, 0], np.float32),
        ),
        rows,
    ),
}


@pytest.mark.parametrize(("op", "backward", "model", "inputs"), WRONG_BACKWARD.values(), ids=WRONG_BACKWARD.keys())
def test_wrong_needs_are_objected_to(
    plant: Plant, op: str, backward: Any, model: onnx.ModelProto, inputs: Callable[[], dict[str, Array]]
) -> None:
    plant(op, backward=backward)
    with pytest.raises(RuleViolation):
        check_backward(model, inputs())


# --- wrong in what is cut ---------------------------------------------------------------------------------------


def unpinned(view: View) -> Any:
    return resolve("*a -> *a", [view.data().shape], [view.output().shape])


def swapped(view: View) -> Any:
    """The weights of a transposed convolution are `[in, out]`, not `[out, in]`."""
    return resolve("n i [*x], o i [*k] -> n o [*y]", view.shapes(view.inputs), view.shapes(view.outputs))


SQUARE = draw(4, 4, 1, 1, seed=5)
WRONG_CUT = {
    "a softmax may lose channels": (
        "Softmax",
        {"relate": unpinned, "backward": first_only},
        chain("y = Softmax <axis = 1> (h)", ROWS, COLUMNS),
    ),
    "a norm over channels may lose some": (
        "LRN",
        {"relate": unpinned},
        chain("y = LRN <size = 3, alpha = 0.9> (h)", draw(4, 3, 1, 1), COLUMNS),
    ),
    "rows and columns swapped": (
        "ConvTranspose",
        {"relate": swapped},
        chain("y = ConvTranspose (h, w)", ROWS, FULL, w=SQUARE),
    ),
    "a constant leaves without a trace": (
        "Conv",
        {"retain": None, "represent": None, "fold": None},
        chain("y = Conv (h, w)", ROWS, FULL, BIAS, w=SQUARE),
    ),
    "a mean over fewer channels is not scaled": (
        "ReduceMean",
        {"rewrite": None},
        build(
            "g (float[2, 3, 5, 5] x) => (float[2, 1, 5, 5] z) { h = Conv (x, rows) z = ReduceMean (h, axes) }",
            opset=18,
            rows=ROWS,
            axes=np.array([1]),
        ),
    ),
    "the target of a reshape stays": (
        "Reshape",
        {"rewrite": None},
        chain("y = Reshape (h, shape)", ROWS, FULL, shape=np.array([2, 4, 5, 5])),
    ),
    "a node is left out that does something": (
        "Relu",
        {"rewrite": lambda view: Rewrite(bypass=0)},
        chain("y = Relu (h)", ROWS, FULL),
    ),
}


@pytest.mark.parametrize(("op", "changes", "model"), WRONG_CUT.values(), ids=WRONG_CUT.keys())
def test_wrong_cuts_are_objected_to(plant: Plant, op: str, changes: dict[str, Any], model: onnx.ModelProto) -> None:
    assert check_shrink(model, image()).before > 0
    plant(op, **changes)
    with pytest.raises(RuleViolation):
        check_shrink(model, image())


def test_a_rule_that_learns_nothing_passes_and_is_seen_to(plant: Plant) -> None:
    model = chain("y = Tanh (h)", ROWS, FULL)
    learned = check_shrink(model, image())
    plant("Tanh", refusal="not looked at")
    pinned = check_shrink(model, image())
    assert learned.removed > 0
    assert pinned.removed == 0


# --- the checkers themselves ------------------------------------------------------------------------------------


def test_inputs_become_constants() -> None:
    model = build("g (float[2, 3] x, float[3] w) => (float[2, 3] y) { y = Mul (x, w) }")
    fixed = {"x": draw(2, 3), "w": np.array([0, 1, 0], np.float32)}
    assert check_forward(model, fixed) == 0
    assert check_forward(model, fixed, ["w"]) == 4
    assert check_backward(model, fixed, ["w"]) == 4
    assert [value.name for value in model.graph.input] == ["x", "w"]


def test_models_that_do_not_run_are_told_from_wrong_ones() -> None:
    model = build("g (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }")
    with pytest.raises(InputsCannotRun, match="onnxruntime"):
        run(model, [{"x": np.zeros((9, 9, 9), np.float32)}])


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    model = build("g (float[2, 3] x) => (float[2, 3] y) { y = Log (x) }")
    with pytest.raises(InputsCannotRun, match="not finite"):
        check_shrink(model, {"x": np.full((2, 3), -1, np.float32)})


def test_parameters_count_floats_that_are_not_scalars() -> None:
    model = build(
        """g (float[2, 3] x) => (float[2, 3] y) {
            c = Constant <value = float[3] {1, 2, 3}> ()
            a = Add (x, c)
            y = Mul (a, s)
        }""",
        s=np.array(2, np.float32),
        w=draw(4, 5),
        i=np.arange(9),
    )
    assert parameters(model) == 3 + 20


@pytest.mark.parametrize(
    ("expected", "actual", "equal"),
    [
        (np.ones(3, np.float32), np.ones(3, np.float32), True),
        (np.ones(3, np.float32), np.ones(3, np.float64), False),
        (np.ones(3, np.float32), np.ones((1, 3), np.float32), False),
        (np.array([1, np.inf, np.nan], np.float32), np.array([1, np.inf, np.nan], np.float32), True),
        (np.array([1, np.inf], np.float32), np.array([1, 5], np.float32), False),
        (np.array([1, 1000], np.float32), np.array([1.005, 1000], np.float32), True),
        (np.array([1, 10], np.float32), np.array([1.005, 10], np.float32), False),
        (np.array([1, 2]), np.array([1, 3]), False),
        (np.zeros(0, np.float32), np.zeros(0, np.float32), True),
    ],
    ids=["same", "type", "shape", "infinities", "infinity lost", "within range", "beyond", "integers", "empty"],
)
def test_compare(expected: Array, actual: Array, equal: bool) -> None:
    error, bound = compare(expected, actual)
    assert (error <= bound) is equal

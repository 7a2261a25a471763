"""What stays, and why: the engine on operators that exist in these tests alone, then groups, sharing and causes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from models import Array, build, dead, draw
from onnx import helper, numpy_helper

from onnxshrink import registry
from onnxshrink.analyse import Analysis, analyse
from onnxshrink.graph import Graph
from onnxshrink.notation import Link, Relation
from onnxshrink.plan import INTERFACE, LIVE, Cause, Plan, level, make_plan
from onnxshrink.planning.agreement import block_cost
from onnxshrink.registry import Keep, Rule
from onnxshrink.view import View

DOMAIN = "toy"
Define = Callable[..., None]


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch) -> Define:
    """Give an operator of the toy domain a rule."""
    registry.load()

    def add(op: str, **says: object) -> None:
        monkeypatch.setitem(registry._rules, (DOMAIN, op), [Rule(op, DOMAIN, **says)])  # type: ignore[arg-type]

    return add


Step = tuple[str, Sequence[str], Sequence[str]]
Shapes = dict[str, tuple[int, ...]]


def toy(steps: Sequence[Step], shapes: Shapes, output: str, **weights: Array) -> onnx.ModelProto:
    """A model of toy operators; only `MatMul`, the source of dead indices, is a real one."""
    nodes = [
        helper.make_node(op, ins, outs, name=outs[0], domain="" if op == "MatMul" else DOMAIN)
        for op, ins, outs in steps
    ]
    made = {name for _, _, outs in steps for name in outs}
    infos = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        nodes,
        "toy",
        [info for name, info in infos.items() if name not in made],
        [infos[output]],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[info for name, info in infos.items() if name in made and name != output],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def planned(model: onnx.ModelProto) -> tuple[Analysis, Plan]:
    analysis = analyse(Graph(model))
    return analysis, make_plan(analysis)


def kept(plan: Plan, name: str, axis: int) -> list[int]:
    mask = plan.kept[name][axis]
    assert mask is not None
    return np.flatnonzero(mask).tolist()


def cause(plan: Plan, name: str, axis: int, index: int) -> Cause | None:
    numbers = plan.cause[name][axis]
    assert numbers is not None
    return plan.causes[numbers[index]] if numbers[index] >= 0 else None


# --- factors ----------------------------------------------------------------------------------------------------

LINE: Shapes = {"x": (2, 4), "a": (2, 6), "b": (2, 6), "z": (2,)}


def line(op: str) -> onnx.ModelProto:
    """`x -> MatMul -> a -> op -> b -> Sum -> z`: what `op` does with the dead indices 1 and 4 of `a`."""
    steps: list[Step] = [("MatMul", ["x", "w"], ["a"]), (op, ["a"], ["b"]), ("Sum", ["b"], ["z"])]
    return toy(steps, LINE, "z", w=dead(draw(4, 6), 1, 4, axis=1))


def test_a_factor_takes_dead_indices_through(define: Define) -> None:
    define("Pass", relate="n c -> n c", forward=lambda view: [view.data().known])
    define("Sum", relate="n c -> n")
    _, plan = planned(line("Pass"))
    assert kept(plan, "a", 1) == kept(plan, "b", 1) == [0, 2, 3, 5]
    assert kept(plan, "x", 1) == [0, 1, 2, 3]
    assert plan.shrinks("a")
    assert not plan.shrinks("x")


def test_an_operator_that_forgets_what_is_known_makes_its_input_stay(define: Define) -> None:
    define("Pass", relate="n c -> n c", forward=lambda view: [None])
    define("Sum", relate="n c -> n")
    _, plan = planned(line("Pass"))
    assert kept(plan, "a", 1) == [0, 1, 2, 3, 4, 5]
    assert cause(plan, "a", 1, 1) == Cause("b", "b", "it stays in b")
    assert cause(plan, "a", 1, 0) == LIVE


def test_a_pinned_factor_keeps_its_axis_whole_and_says_so(define: Define) -> None:
    define("Pin", relate="n [c] -> n [c]", forward=lambda view: [view.data().known])
    define("Sum", relate="n c -> n")
    _, plan = planned(line("Pin"))
    assert kept(plan, "a", 1) == kept(plan, "b", 1) == [0, 1, 2, 3, 4, 5]
    why = cause(plan, "a", 1, 4)
    assert why is not None
    assert why.reason == "the operator keeps this axis whole"
    assert why.node == "b"


def test_an_operator_without_a_rule_keeps_everything_and_is_named(define: Define) -> None:
    define("Sum", relate="n c -> n")
    analysis, plan = planned(line("Unheard"))
    assert kept(plan, "a", 1) == [0, 1, 2, 3, 4, 5]
    (refusal,) = analysis.refusals
    assert (refusal.op, refusal.reason) == ("Unheard", "no rule for this operator")


def test_a_refusal_carries_its_reason(define: Define) -> None:
    define("Odd", refusal="it reads the clock")
    define("Sum", relate="n c -> n")
    analysis, _ = planned(line("Odd"))
    assert [refusal.reason for refusal in analysis.refusals] == ["it reads the clock"]


def test_notation_that_does_not_fit_is_a_refusal(define: Define) -> None:
    define("Cube", relate="a b c -> a b c")
    define("Sum", relate="n c -> n")
    analysis, plan = planned(line("Cube"))
    assert "rank 2" in analysis.refusals[0].reason
    assert kept(plan, "a", 1) == [0, 1, 2, 3, 4, 5]


def test_a_product_keeps_the_hull_of_its_factors(define: Define) -> None:
    define("Split", relate="n (g c) -> n g c", forward=lambda view: [None])
    define("Fold", relate="n g c -> n", backward=_needs_corners)
    steps: list[Step] = [("MatMul", ["x", "w"], ["a"]), ("Split", ["a"], ["b"]), ("Fold", ["b"], ["z"])]
    shapes = {"x": (2, 4), "a": (2, 6), "b": (2, 2, 3), "z": (2,)}
    _, plan = planned(toy(steps, shapes, "z", w=draw(4, 6)))
    assert kept(plan, "b", 1) == [0, 1]
    assert kept(plan, "b", 2) == [0, 2]
    # live are (0, 0) and (1, 2): elements 0 and 5 of the axis; the hull adds 2 and 3.
    assert kept(plan, "a", 1) == [0, 2, 3, 5]
    assert cause(plan, "a", 1, 0) == LIVE
    why = cause(plan, "a", 1, 2)
    assert why is not None
    assert why.node == "b"


def _needs_corners(view: View) -> list[Array | None]:
    needed = np.zeros((1, 2, 3), np.bool_)
    needed[0, 0, 0] = needed[0, 1, 2] = True
    return [needed]


def test_a_rule_may_retain_and_its_reason_is_the_cause(define: Define) -> None:
    define("Pass", relate="n c -> n c", forward=lambda view: [view.data().known], retain=_retain_four)
    define("Sum", relate="n c -> n")
    _, plan = planned(line("Pass"))
    assert kept(plan, "a", 1) == [0, 2, 3, 4, 5]
    assert cause(plan, "a", 1, 4) == Cause("b", "a", "four is a lucky number")
    assert cause(plan, "a", 1, 1) is None


def _retain_four(view: View) -> list[Keep]:
    return [Keep(0, 1, np.arange(6) == 4, "four is a lucky number")]


# --- links ------------------------------------------------------------------------------------------------------


def _joined(view: View) -> Relation:
    links = (
        Link(0, -1, np.arange(6), np.arange(6)),
        Link(1, -1, np.arange(6), np.arange(6, 12)),
    )
    sizes = {"n": 2, "c@0": 6, "c@1": 6, "c@-1": 12}
    return Relation(((("n",), ("c",)),) * 2, ((("n",), ("c",)),), sizes, links={"c": links})


def test_links_keep_positions_together(define: Define) -> None:
    define("Join", relate=_joined)
    define("Pick", relate="n c -> n", backward=lambda view: [np.isin(np.arange(12), [1, 7, 11])[None]])
    steps: list[Step] = [
        ("MatMul", ["x", "w"], ["a"]),
        ("MatMul", ["x", "v"], ["b"]),
        ("Join", ["a", "b"], ["c"]),
        ("Pick", ["c"], ["z"]),
    ]
    shapes = {"x": (2, 4), "a": (2, 6), "b": (2, 6), "c": (2, 12), "z": (2,)}
    _, plan = planned(toy(steps, shapes, "z", w=draw(4, 6), v=draw(4, 6)))
    assert kept(plan, "c", 1) == [1, 7, 11]
    assert kept(plan, "a", 1) == [1]
    assert kept(plan, "b", 1) == [1, 5]


# --- the interface ----------------------------------------------------------------------------------------------


def test_inputs_and_outputs_stay_whole() -> None:
    text = "g (float[5, 4] x) => (float[5, 6] y, float[5, 2] z) { y = MatMul (x, w) z = MatMul (y, v) }"
    model = build(text, w=dead(draw(4, 6), 1, 3, axis=1), v=dead(draw(6, 2), 0))
    _, plan = planned(model)
    assert kept(plan, "y", 1) == list(range(6))
    assert kept(plan, "x", 1) == list(range(4))
    assert cause(plan, "y", 1, 1) == INTERFACE


def test_a_tensor_that_nothing_needs_is_not_computed() -> None:
    text = (
        "g (float[5, 4] x) => (float[5, 2] z) { a = MatMul (x, w) b = Mul (a, zero) c = Add (x, b) z = MatMul (c, v) }"
    )
    _, plan = planned(build(text, w=draw(4, 4), zero=np.zeros(4, np.float32), v=draw(4, 2)))
    assert "a" not in plan.present
    assert "c" in plan.present


def test_an_axis_keeps_at_least_one_index() -> None:
    text = "g (float[N, 4] x) => (float[N, 2] z) { a = MatMul (x, w) b = Relu (a) z = MatMul (b, v) }"
    _, plan = planned(build(text, w=np.zeros((4, 3), np.float32), v=draw(3, 2)))
    for name in plan.present:
        assert all(axis is None or axis.any() for axis in plan.kept[name])


# --- residual streams -------------------------------------------------------------------------------------------

RESIDUAL = """g (float[5, 4] x) => (float[5, 2] z) {
    h = MatMul (x, stem)
    a = MatMul (h, inner)
    r = Relu (a)
    b = MatMul (r, outer)
    s = Add (h, b)
    z = MatMul (s, head)
}"""


def test_a_channel_of_a_residual_stream_goes_when_all_its_writers_are_dead() -> None:
    model = build(
        RESIDUAL,
        stem=dead(draw(4, 6), 1, 2, axis=1),
        inner=draw(6, 3),
        outer=dead(draw(3, 6), 2, 4, axis=1),
        head=draw(6, 2),
    )
    _, plan = planned(model)
    for name in ("h", "b", "s"):
        assert kept(plan, name, 1) == [0, 1, 3, 4, 5]
    why = cause(plan, "b", 1, 4)
    assert why is not None
    assert why.reason == "it stays in h"


def test_or_when_all_its_readers_are() -> None:
    head, inner = dead(draw(6, 2), 0, 5), dead(draw(6, 3), 5)
    _, plan = planned(build(RESIDUAL, stem=draw(4, 6), inner=inner, outer=draw(3, 6), head=head))
    assert kept(plan, "s", 1) == [0, 1, 2, 3, 4]
    assert kept(plan, "h", 1) == [0, 1, 2, 3, 4]


# --- groups -----------------------------------------------------------------------------------------------------


def grouped(live_out: Sequence[Sequence[int]], live_in: Sequence[Sequence[int]], outs: int, ins: int) -> Plan:
    """`Conv -> grouped Conv -> Conv`: per group, which outputs are read and which inputs are written."""
    groups = len(live_out)
    channels, rows = groups * ins, groups * outs
    first, last = draw(channels, 3, 1, 1), draw(2, rows, 1, 1)
    first[[g * ins + i for g in range(groups) for i in range(ins) if i not in live_in[g]]] = 0
    last[:, [g * outs + o for g in range(groups) for o in range(outs) if o not in live_out[g]]] = 0
    text = f"""g (float[2, 3, 5, 5] x) => (float[2, 2, 3, 3] z) {{
        a = Conv (x, first)
        b = Conv <group = {groups}> (a, w)
        z = Conv (b, last)
    }}"""
    _, plan = planned(build(text, first=first, w=draw(rows, ins, 3, 3), last=last))
    return plan


def test_a_group_without_anything_live_goes_whole() -> None:
    plan = grouped([[0, 1], [], [0, 1]], [[0, 1]] * 3, 2, 2)
    assert kept(plan, "b", 1) == [0, 1, 4, 5]
    assert kept(plan, "a", 1) == [0, 1, 4, 5]


def test_unequal_groups_are_balanced_with_the_fewest_extra_channels() -> None:
    plan = grouped([[0, 1, 2], [1, 2], [0, 1, 2]], [[0, 1, 2]] * 3, 3, 3)
    assert kept(plan, "b", 1) == list(range(9))
    extra = cause(plan, "b", 1, 3)
    assert extra is not None
    assert extra.reason == "every group of a grouped operator keeps equally many"


def test_each_axis_is_balanced_for_itself() -> None:
    plan = grouped([[0], [2]], [[0, 1], [1, 2]], 3, 3)
    assert kept(plan, "b", 1) == [0, 5]
    assert kept(plan, "a", 1) == [0, 1, 4, 5]


def test_one_large_group_among_small_ones_is_cheaper_as_a_plain_convolution() -> None:
    # Two groups of 4 inputs each: (4 + 4) x 4 weights balanced, (4 + 1) x (1 + 4) joined.
    plan = grouped([[0, 1, 2, 3], [0]], [[0], [0, 1, 2, 3]], 4, 4)
    assert kept(plan, "b", 1) == [0, 1, 2, 3, 4]
    assert kept(plan, "a", 1) == [0, 4, 5, 6, 7]
    assert list(plan.blocks.values()).count(1) >= 1


def test_of_two_groupings_of_one_size_the_one_with_more_groups_is_taken() -> None:
    # Two groups: 3 x 2 x 2 weights; joined: 4 x 3.
    outs, ins = np.array([3, 1]), np.array([2, 1])
    assert block_cost([ins, outs], 2) == block_cost([ins, outs], 1) == 12
    plan = grouped([[0, 1, 2], [0]], [[0, 1], [0]], 3, 2)
    assert sorted(plan.blocks.values()) == [2]
    assert kept(plan, "b", 1) == [0, 1, 2, 3, 4, 5]
    assert kept(plan, "a", 1) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("grid", "used", "count", "wanted"),
    [
        ([[1, 0, 0], [1, 1, 0]], [1, 1], 2, [[1, 1, 0], [1, 1, 0]]),
        ([[0, 0, 1], [0, 1, 1]], [1, 1], 2, [[1, 0, 1], [0, 1, 1]]),
        ([[0, 0, 0], [0, 1, 1]], [0, 1], 2, [[0, 0, 0], [0, 1, 1]]),
    ],
    ids=["raise", "keep what is there", "leave dead rows dead"],
)
def test_level(grid: list[list[int]], used: list[int], count: int, wanted: list[list[int]]) -> None:
    found = level(np.array(grid, np.bool_), np.array(used, np.bool_), count)
    assert found.astype(int).tolist() == wanted


# --- shared weights ---------------------------------------------------------------------------------------------

SHARED = """g (float[5, 8] x, float[5, 8] y) => (float[5, 3] z, float[5, 3] u) {
    a = MatMul (x, w)
    z = MatMul (a, v)
    b = MatMul (y, w)
    u = MatMul (b, t)
}"""


def test_uses_of_a_shared_weight_agree_where_copies_would_be_larger() -> None:
    model = build(SHARED, w=draw(8, 6), v=dead(draw(6, 3), 0, 1), t=dead(draw(6, 3), 1, 2))
    _, plan = planned(model)
    assert kept(plan, "a", 1) == kept(plan, "b", 1) == [0, 2, 3, 4, 5]
    why = cause(plan, "a", 1, 0)
    assert why is not None
    assert why.reason == "w is shared, and a copy would be larger"


def test_they_part_where_copies_are_smaller() -> None:
    model = build(SHARED, w=draw(8, 6), v=dead(draw(6, 3), 0, 1, 2, 3), t=dead(draw(6, 3), 4, 5, 2, 3))
    _, plan = planned(model)
    # Two copies of 8 x 2 are as large as one of 8 x 4 that both could use, so nothing is gained by agreeing.
    assert kept(plan, "a", 1) == [4, 5]
    assert kept(plan, "b", 1) == [0, 1]


def test_equal_uses_share_one_weight() -> None:
    model = build(SHARED, w=draw(8, 6), v=dead(draw(6, 3), 0, 1), t=dead(draw(6, 3), 0, 1))
    _, plan = planned(model)
    assert kept(plan, "a", 1) == kept(plan, "b", 1) == [2, 3, 4, 5]


# --- constants --------------------------------------------------------------------------------------------------


def test_a_constant_unit_leaves_and_is_folded() -> None:
    text = "g (float[5, 4] x) => (float[5, 2] z) { a = Gemm (x, w, b) h = Sigmoid (a) z = Gemm (h, v, c) }"
    weights = {"w": dead(draw(4, 6), 2, axis=1), "b": draw(6), "v": draw(6, 2), "c": draw(2)}
    _, plan = planned(build(text, **weights))
    assert kept(plan, "h", 1) == [0, 1, 3, 4, 5]
    (fold,) = [fold for folds in plan.folds.values() for fold in folds.values()]
    assert fold.indices.tolist() == [2]
    assert fold.values == pytest.approx(1 / (1 + np.exp(-weights["b"][2:3].astype(np.float64))), rel=1e-6)


def test_under_padding_one_constant_channel_stands_for_all() -> None:
    text = """g (float[2, 3, 6, 6] x) => (float[2, 2, 6, 6] z) {
        h = Conv (x, w, b)
        z = Conv <group = 1, pads = [1, 1, 1, 1]> (h, v, c)
    }"""
    bias = np.array([0.1, 0.5, -0.9, 0.2, 0.3], np.float32)
    model = build(text, opset=17, w=dead(draw(5, 3, 1, 1), 1, 2, 4), b=bias, v=draw(2, 5, 3, 3), c=draw(2))
    _, plan = planned(model)
    (fold,) = [fold for folds in plan.folds.values() for fold in folds.values()]
    constant_channels = {1, 2, 4}
    stays = constant_channels & set(kept(plan, "h", 1))
    assert len(stays) <= 1
    assert set(fold.indices.tolist()) == constant_channels - stays
    assert fold.into is not None

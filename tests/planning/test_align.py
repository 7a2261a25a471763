"""Widths raised to a multiple: how many stay, on which axes, and the reason on record."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx
import pytest
from graph_builder import RandomChooser
from models import Array, build, check_same, dead, draw, operators, shapes, shrunk_with_plan
from strategies import random_graph

from onnxshrink.plan import Plan
from onnxshrink.planning.align import Alignment
from onnxshrink.testing import InputsCannotRun, check_shrink


def kept(plan: Plan, name: str, axis: int) -> int:
    mask = plan.kept[name][axis]
    assert mask is not None
    return int(mask.sum())


def reasons(plan: Plan, name: str, axis: int) -> set[str]:
    """Why the indices of an axis stay."""
    numbers = plan.cause[name][axis]
    assert numbers is not None
    return {plan.causes[number].reason for number in set(numbers.tolist()) if number >= 0}


def image(channels: int = 3) -> Array:
    return draw(1, channels, 6, 6, seed=9)


def chain(width: int, lost: int) -> onnx.ModelProto:
    """Two convolutions with `lost` dead ones among `width` channels between them."""
    w, b = dead(draw(width, 3, 3, 3), *range(lost)), dead(draw(width), *range(lost))
    body = "a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2)"
    return build(
        f"net (float[N, 3, 6, 6] x) => (float[N, 2, 4, 4] y) {{ {body} }}", w1=w, b1=b, w2=draw(2, width, 1, 1)
    )


@pytest.mark.parametrize(
    ("multiple", "width", "reason"),
    [
        (1, 7, "live"),
        (4, 8, "a width of 8, a multiple of 4, instead of 7"),
        (5, 10, "a width of 10, a multiple of 5, instead of 7"),
        (12, 12, "a width of 12, a multiple of 12, instead of 7"),
    ],
)
def test_a_width_is_raised_to_the_next_multiple(multiple: int, width: int, reason: str) -> None:
    model = chain(12, 5)
    small, plan = shrunk_with_plan(model, Alignment(multiple))
    assert shapes(small) == {"w1": (width, 3, 3, 3), "b1": (width,), "w2": (2, width, 1, 1)}
    assert reason in reasons(plan, "a", 1)
    check_same(model, small, x=image())


def test_a_width_never_exceeds_the_original_and_says_so() -> None:
    model = chain(12, 5)
    small, plan = shrunk_with_plan(model, Alignment(16))
    assert shapes(small)["w1"] == (7, 3, 3, 3)
    assert [cause.reason for cause in plan.unaligned] == ["7 of 12 channels: no multiple of 16 in between"]
    check_same(model, small, x=image())


def test_a_width_that_is_a_multiple_stays() -> None:
    small, plan = shrunk_with_plan(chain(12, 4), Alignment(8))
    assert shapes(small)["w1"] == (8, 3, 3, 3)
    assert plan.unaligned == []


def residual() -> onnx.ModelProto:
    """A stem and a branch that are added; together they keep 5 of 12 channels, the inside of the branch 3 of 8."""
    weights = {
        "w0": dead(draw(12, 3, 1, 1), *range(7)),
        "w1": dead(draw(8, 12, 1, 1, seed=1), *range(5)),
        "w2": dead(draw(12, 8, 1, 1, seed=2), *range(7)),
        "w3": draw(2, 12, 1, 1, seed=3),
    }
    body = "s = Conv(x, w0) a = Conv(s, w1) r = Relu(a) c = Conv(r, w2) t = Add(s, c) y = Conv(t, w3)"
    return build(f"net (float[N, 3, 6, 6] x) => (float[N, 2, 6, 6] y) {{ {body} }}", **weights)


def test_coupled_axes_are_raised_together() -> None:
    model = residual()
    small, plan = shrunk_with_plan(model, Alignment(4))
    assert shapes(small) == {"w0": (8, 3, 1, 1), "w1": (4, 8, 1, 1), "w2": (8, 4, 1, 1), "w3": (2, 8, 1, 1)}
    masks = [plan.kept[name][1] for name in ("s", "c", "t")]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    check_same(model, small, x=image())


def test_each_class_may_have_a_multiple_of_its_own() -> None:
    model = residual()
    small, _ = shrunk_with_plan(model, Alignment(1, chosen={("a", 1): 4}))
    assert shapes(small) == {"w0": (5, 3, 1, 1), "w1": (4, 5, 1, 1), "w2": (5, 4, 1, 1), "w3": (2, 5, 1, 1)}
    small, plan = shrunk_with_plan(model, Alignment(1, whole=frozenset({("a", 1)})))
    assert shapes(small)["w1"] == (8, 5, 1, 1)
    assert "it runs faster whole" in reasons(plan, "a", 1)


def test_the_words_of_a_class_go_on_record() -> None:
    words = {("a", 1): lambda before, after: f"{after} is faster than {before}"}
    _, plan = shrunk_with_plan(chain(12, 5), Alignment(4, words=words))
    assert reasons(plan, "a", 1) == {"live", "8 is faster than 7"}


def grouped(lost: list[int]) -> onnx.ModelProto:
    """A convolution with 2 groups of 8 channels, some of its inputs and outputs dead."""
    weights = {
        "w0": dead(draw(16, 3, 1, 1), *lost),
        "w1": dead(draw(16, 8, 1, 1, seed=1), *lost),
        "w2": draw(2, 16, 1, 1, seed=2),
    }
    body = "a = Conv(x, w0) b = Conv <group = 2> (a, w1) y = Conv(b, w2)"
    return build(f"net (float[N, 3, 6, 6] x) => (float[N, 2, 6, 6] y) {{ {body} }}", **weights)


def test_groups_are_aligned_each() -> None:
    model = grouped([0, 1, 2, 3, 4, 8, 9, 10, 11, 12])
    small, _ = shrunk_with_plan(model)
    assert shapes(small) == {"w0": (6, 3, 1, 1), "w1": (6, 3, 1, 1), "w2": (2, 6, 1, 1)}
    small, _ = shrunk_with_plan(model, Alignment(4))
    assert shapes(small) == {"w0": (8, 3, 1, 1), "w1": (8, 4, 1, 1), "w2": (2, 8, 1, 1)}
    check_same(model, small, x=image())


def joined() -> onnx.ModelProto:
    """Two convolutions laid end to end, 3 and 6 channels alive of 8 each."""
    weights = {
        "w0": dead(draw(8, 3, 1, 1), *range(5)),
        "w1": dead(draw(8, 3, 1, 1, seed=1), 0, 1),
        "w2": draw(2, 16, 1, 1, seed=2),
    }
    body = "a = Conv(x, w0) b = Conv(x, w1) c = Concat <axis = 1> (a, b) y = Conv(c, w2)"
    return build(f"net (float[N, 3, 6, 6] x) => (float[N, 2, 6, 6] y) {{ {body} }}", **weights)


def test_joined_axes_come_out_as_the_sum_of_their_parts() -> None:
    model = joined()
    small, plan = shrunk_with_plan(model, Alignment(4))
    assert shapes(small) == {"w0": (4, 3, 1, 1), "w1": (8, 3, 1, 1), "w2": (2, 12, 1, 1)}
    assert kept(plan, "c", 1) == 12
    check_same(model, small, x=image())


def padded(width: int = 8, lost: int = 3) -> onnx.ModelProto:
    """Dead channels with a bias in front of a padded convolution: constants that are not uniform at the border."""
    weights = {"w0": dead(draw(width, 3, 1, 1), *range(lost)), "b0": draw(width), "w1": draw(2, width, 3, 3, seed=1)}
    body = "a = Conv(x, w0, b0) y = Conv <pads = [1, 1, 1, 1]> (a, w1)"
    return build(f"net (float[N, 3, 6, 6] x) => (float[N, 2, 6, 6] y) {{ {body} }}", **weights)


def test_a_channel_that_is_raised_carries_the_constants_of_the_others() -> None:
    model = padded()
    small, _ = shrunk_with_plan(model)
    assert "Pad" in operators(small)  # a channel of ones is appended, which copies the tensor
    small, _ = shrunk_with_plan(model, Alignment(4))
    assert operators(small) == ["Conv", "Conv"]
    assert shapes(small)["w0"] == (8, 3, 1, 1)
    small, _ = shrunk_with_plan(padded(8, 4), Alignment(1))
    assert operators(small) == ["Conv", "Conv"]
    assert shapes(small)["w0"] == (5, 3, 1, 1)
    check_same(padded(8, 4), small, x=image())


def test_raising_one_width_does_not_spoil_another() -> None:
    """12 indices are read as 3 heads of 4: a width that grows by one grows by a whole head or by three."""
    w = dead(draw(3, 12), 0, 1, 2, 3, axis=1)
    body = "a = MatMul(x, w) h = Reshape(a, s) t = Transpose <perm = [0, 2, 1]> (h) f = Reshape(t, e) y = MatMul(f, v)"
    model = build(
        f"net (float[2, 3] x) => (float[2, 2] y) {{ {body} }}",
        w=w, v=draw(12, 2), s=np.array([2, 3, 4]), e=np.array([2, 12]),
    )  # fmt: skip
    small, plan = shrunk_with_plan(model, Alignment(5))
    assert kept(plan, "a", 1) == 8
    assert plan.unaligned[0].reason in (
        "what it is coupled with grows by another number",
        "8 of 12 channels: no multiple of 5 in between",
    )
    check_same(model, small, x=draw(2, 3, seed=5))


@pytest.mark.parametrize("multiple", [2, 4])
def test_random_graphs_keep_their_function(multiple: int) -> None:
    checked = 0
    for seed in range(60):
        graph = random_graph(RandomChooser(seed))
        feeds = graph.feeds(0)[:1]
        try:
            onnx.checker.check_model(graph.model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            continue
        with suppress(InputsCannotRun):  # of the model as it is: that of the result is a violation
            checked += check_shrink(graph.model, feeds, again=False, align=multiple).removed > 0
    assert checked > 30

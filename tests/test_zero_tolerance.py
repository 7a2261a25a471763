"""Weights near zero count as zero when asked for, and the report says how many."""

from __future__ import annotations

import numpy as np
import pytest
from models import build, check_same, draw, shapes

import onnxshrink
from onnxshrink.masks import zero_near


def model_with_small_columns() -> tuple[object, np.ndarray]:
    weights = draw(3, 8)
    weights[:, [1, 4]] = 1e-6
    text = "g (float[N, 3] x) => (float[N, 2] y) { a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2) }"
    return build(text, w1=weights, w2=draw(8, 2)), weights


def test_nothing_is_zeroed_by_default() -> None:
    model, _ = model_with_small_columns()
    result = onnxshrink.shrink(model)  # type: ignore[arg-type]
    assert result.report.zeroed == 0
    assert shapes(result.model)["w1"] == (3, 8)


def test_small_weights_leave_and_are_counted() -> None:
    model, weights = model_with_small_columns()
    result = onnxshrink.shrink(model, zero_tolerance=1e-5)  # type: ignore[arg-type]
    assert result.report.zeroed == 6
    assert shapes(result.model) == {"w1": (3, 6), "w2": (6, 2)}
    weights[:, [1, 4]] = 0
    text = "g (float[N, 3] x) => (float[N, 2] y) { a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2) }"
    check_same(build(text, w1=weights, w2=draw(8, 2)), result.model, x=draw(5, 3))


def test_scalars_are_no_weights() -> None:
    text = "g (float[N, 3] x) => (float[N, 3] y) { y = Add(x, e) }"
    copy, zeroed = zero_near(build(text, e=np.array(1e-9, np.float32)), 1e-3)
    assert zeroed == 0
    assert copy.graph.initializer[0].raw_data != bytes(4)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_a_tolerance_that_is_none(tolerance: float) -> None:
    model, _ = model_with_small_columns()
    with pytest.raises(onnxshrink.InputError, match="give a number that is not negative"):
        onnxshrink.shrink(model, zero_tolerance=tolerance)  # type: ignore[arg-type]

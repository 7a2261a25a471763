"""Denormal numbers are counted one by one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from models import build, draw

from onnxshrink.bench.denormals import Denormals, count_denormals
from onnxshrink.runtime import Model

TINY = 1e-40  # below 1.2e-38, the smallest float32 of full precision


def found(model: onnx.ModelProto, folder: Path, **feed: np.ndarray) -> Denormals:
    onnx.save(model, folder / "model.onnx")
    path = str(folder / "model.onnx")
    return count_denormals(path, Model(path, "first", folder / "work"), dict(feed))


def test_weights_and_activations(tmp_path: Path) -> None:
    weights = draw(4, 5)
    weights[1] = TINY  # 5 of them
    weights[2] = 0
    text = "g (float[2, 4] x) => (float[2, 5] y) { a = Mul(x, s) b = Exp(a) y = MatMul(b, w) }"
    x = np.array([[0, -90, -100, -1], [-95, 1, -1000, 0]], np.float32)  # exp(-90) is denormal, exp(-1000) zero
    s = np.array([1.0, 1.0, 1.0, -TINY], np.float32)
    # Of a, -1 * -TINY is denormal; of b, the exponentials of -90, -100 and -95.
    assert found(build(text, w=weights, s=s), tmp_path, x=x) == Denormals(weights=6, activations=4, looked_at=3)


def test_a_model_without_any(tmp_path: Path) -> None:
    half = np.full((3, 3), 1e-7, np.float16)  # denormal as such, but computed with as float32
    text = "g (float[2, 3] x) => (float[2, 3] y) { h = Cast <to = 1> (w) y = MatMul(x, h) }"
    none = found(build(text, w=half), tmp_path, x=np.ones((2, 3), np.float32))
    assert not none
    assert (none.weights, none.activations) == (0, 0)


def test_of_a_large_network_some_tensors_are_looked_at(tmp_path: Path) -> None:
    names = ["x", *(f"t{index}" for index in range(599)), "y"]
    steps = " ".join(f"{b} = Neg({a})" for a, b in pairwise(names))
    result = found(build(f"g (float[2] x) => (float[2] y) {{ {steps} }}"), tmp_path, x=np.array([TINY, 1], np.float32))
    assert result == Denormals(weights=0, activations=256, looked_at=256)

"""What is shrunk has nothing left to shrink, and what has no zeros comes back as it was; over many models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.backend.test
import pytest
from graph_builder import RandomChooser
from models import build, dead, draw
from strategies import random_graph

import onnxshrink
from onnxshrink import demo
from onnxshrink.measure import count_nodes, parameters

RANDOM_GRAPHS = 150


def two_layers() -> onnx.ModelProto:
    text = "g (float[N, 6] x) => (float[N, 4] y) { h = MatMul(x, a) k = Add(h, b) r = Relu(k) y = MatMul(r, c) }"
    return build(text, a=dead(draw(6, 9), 1, 4, axis=1), b=draw(9), c=dead(draw(9, 4), 2, 7))


def padded_constants() -> onnx.ModelProto:
    text = """g (float[N, 3, H, W] x) => (float[N, 5, H, W] y) {
        h = Conv<pads = [1, 1, 1, 1]>(x, a, p) r = Relu(h) y = Conv<pads = [1, 1, 1, 1]>(r, b)
    }"""
    return build(text, a=dead(draw(8, 3, 3, 3), 0, 2, 5), p=np.abs(draw(8)), b=draw(5, 8, 3, 3))


def residual() -> onnx.ModelProto:
    text = """g (float[N, 3, H, W] x) => (float[N, 5, H, W] y) {
        s = Conv(x, a) t = Relu(s) h = Conv<pads = [1, 1, 1, 1]>(t, b) k = Relu(h) m = Conv(k, c)
        n = Add(m, t) y = Conv(n, d)
    }"""
    stream = dead(draw(8, 3, 1, 1), 0, 1, 2)
    inner, outer = dead(draw(10, 8, 3, 3), 3, 4), dead(draw(8, 10, 1, 1, seed=1), 1, 2, 6)
    return build(text, a=stream, b=inner, c=outer, d=draw(5, 8, 1, 1))


def grouped() -> onnx.ModelProto:
    text = """g (float[N, 4, H, W] x) => (float[N, 3, H, W] y) {
        h = Conv(x, a, p) k = Conv<group = 4>(h, b, q) r = Sigmoid(k) y = Conv(r, c)
    }"""
    gone = dead(draw(8, 4, 1, 1), 0, 1, 5), dead(draw(8), 0, 1, 5)
    return build(text, a=gone[0], p=gone[1], b=dead(draw(8, 2, 1, 1), 2, 6), q=draw(8), c=draw(3, 8, 1, 1))


def dead_branch() -> onnx.ModelProto:
    text = "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, a) r = Tanh(h) k = MatMul(r, b) y = Add(x, k) }"
    return build(text, a=draw(6, 9), b=np.zeros((9, 6), np.float32))


def all_constant() -> onnx.ModelProto:
    text = "g (float[2, 6] x) => (float[2, 4] y) { h = MatMul(x, a) y = Add(h, b) }"
    return build(text, a=np.zeros((6, 4), np.float32), b=draw(4))


def weights_in_nodes() -> onnx.ModelProto:
    proto = two_layers()
    for tensor in list(proto.graph.initializer):
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    del proto.graph.initializer[:]
    return proto


def half_precision() -> onnx.ModelProto:
    text = "g (float16[N, 6] x) => (float16[N, 4] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
    return build(text, a=dead(draw(6, 9), 1, axis=1).astype(np.float16), c=draw(9, 4).astype(np.float16))


def classifier() -> onnx.ModelProto:
    return onnx.load(demo.model_path())


MODELS: list[Callable[[], onnx.ModelProto]] = [
    two_layers,
    padded_constants,
    residual,
    grouped,
    dead_branch,
    all_constant,
    weights_in_nodes,
    half_precision,
    classifier,
]


def shrink_twice(proto: onnx.ModelProto) -> onnx.ModelProto:
    given = proto.SerializeToString(deterministic=True)
    once = onnxshrink.shrink(proto, verify=False, align="none").model
    assert proto.SerializeToString(deterministic=True) == given
    assert (parameters(once), count_nodes(once.graph)) <= (parameters(proto), count_nodes(proto.graph))
    assert onnxshrink.shrink(once, verify=False, align="none").model == once
    return once


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_shrinking_again_changes_nothing(make: Callable[[], onnx.ModelProto]) -> None:
    proto = make()
    small = shrink_twice(proto)
    assert small != proto
    assert onnxshrink.verify(proto, small).error < (1e-3 if make is half_precision else 1e-6)


@pytest.mark.parametrize("start", range(0, RANDOM_GRAPHS, 50))
def test_shrinking_random_graphs_again_changes_next_to_nothing(start: int) -> None:
    """Facts are worked out once: in one graph of a few hundred, what has left makes more of them."""
    changed = [seed for seed in range(start, start + 50) if differs_when_shrunk_again(seed)]
    assert len(changed) <= 1


def differs_when_shrunk_again(seed: int) -> bool:
    proto = random_graph(RandomChooser(seed)).model
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    once = onnxshrink.shrink(proto, verify=False, align="none").model
    return bool(onnxshrink.shrink(once, verify=False, align="none").model != once)


# --- nothing to remove ---------------------------------------------------------------------------------------------


def without_zeros(proto: onnx.ModelProto) -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f":
            tensor.CopyFrom(onnx.numpy_helper.from_array(filled(values, rng), tensor.name))
    return proto


def filled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(values == 0, rng.uniform(0.2, 1, values.shape), values).astype(values.dtype)


# weights_in_nodes has no initializers to fill
@pytest.mark.parametrize("make", [m for m in MODELS if m is not weights_in_nodes], ids=lambda make: make.__name__)
def test_a_model_without_zeros_comes_back_as_it_was(make: Callable[[], onnx.ModelProto]) -> None:
    proto = without_zeros(make())
    result = onnxshrink.shrink(proto, align="none")
    assert result.model == proto
    assert result.model is not proto
    assert not result.report.changed
    assert result.report.equivalence is None


def test_weights_are_free_to_hold_single_zeros() -> None:
    proto = two_layers()
    for name, tensor in zip("abc", proto.graph.initializer, strict=True):
        assert tensor.name == name
        values = filled(onnx.numpy_helper.to_array(tensor), np.random.default_rng(0))
        values.flat[::5] = 0
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    assert onnxshrink.shrink(proto, align="none").model == proto


def test_one_node_models_of_onnx_come_back_or_shrink_for_good() -> None:
    """onnx's own examples of every operator, where their inputs stay inputs: nothing is zero, so little can go."""
    cases = onnx.backend.test.loader.load_model_tests(kind="simple")
    protos = [onnx.load(f"{case.model_dir}/model.onnx") for case in cases]
    assert len(protos) > 20
    for proto in protos:
        shrink_twice(proto)

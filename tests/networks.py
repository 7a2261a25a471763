"""Small networks of every kind, pruned or whole, for tests of the whole path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from models import Array, build, dead, draw

Network = Callable[[bool], onnx.ModelProto]


def rows(pruned: bool, *shape: int, lost: tuple[int, ...] = (1, 3), seed: int = 0) -> Array:
    """A weight, some of whose first axis is zero in the pruned network."""
    values = draw(*shape, seed=seed)
    return dead(values, *lost) if pruned else values


def chain(pruned: bool) -> onnx.ModelProto:
    """Two convolutions: 3*9*4+4 and 4*2+2 parameters; pruned, two of the four channels between are zero."""
    weights = {"w1": rows(pruned, 4, 3, 3, 3), "b1": rows(pruned, 4), "w2": draw(2, 4, 1, 1), "b2": draw(2)}
    body = "a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2, b2)"
    return build(f"chain (float[N, 3, 6, 6] x) => (float[N, 2, 4, 4] y) {{ {body} }}", **weights)


def residual(pruned: bool) -> onnx.ModelProto:
    """A residual block; channel 1 is dead in both branches, channel 3 in one of them."""
    weights = {
        "w0": rows(pruned, 4, 3, 1, 1, lost=(1,)),
        "b0": rows(pruned, 4, lost=(1,)),
        "w1": rows(pruned, 4, 4, 3, 3, seed=1),
        "w2": rows(pruned, 4, 4, 3, 3, seed=2),
        "head": draw(4, 2),
    }
    body = """s = Conv(x, w0, b0) a = Conv <pads = [1, 1, 1, 1]> (s, w1) r = Relu(a)
        c = Conv <pads = [1, 1, 1, 1]> (r, w2) t = Add(s, c)
        p = GlobalAveragePool(t) f = Flatten(p) y = MatMul(f, head)"""
    return build(f"residual (float[N, 3, H, W] x) => (float[N, 2] y) {{ {body} }}", **weights)


def normed(pruned: bool) -> onnx.ModelProto:
    """BatchNorm with shifts: dead channels are constants."""
    weights = {
        "w1": rows(pruned, 4, 3, 1, 1),
        "scale": np.abs(draw(4)),
        "shift": draw(4, seed=3),
        "mean": rows(pruned, 4, seed=4),
        "var": np.abs(draw(4, seed=5)),
        "w2": draw(2, 4, 1, 1),
    }
    body = "a = Conv(x, w1) n = BatchNormalization(a, scale, shift, mean, var) r = Relu(n) y = Conv(r, w2)"
    return build(f"normed (float[N, 3, 6, 6] x) => (float[N, 2, 6, 6] y) {{ {body} }}", **weights)


def depthwise(pruned: bool) -> onnx.ModelProto:
    """A separable convolution."""
    weights = {
        "w1": rows(pruned, 4, 3, 1, 1),
        "w2": draw(4, 1, 3, 3),
        "b2": rows(pruned, 4),
        "w3": draw(5, 4, 1, 1),
    }
    body = "a = Conv(x, w1) d = Conv <group = 4, pads = [1, 1, 1, 1]> (a, w2, b2) c = Clip(d) y = Conv(c, w3)"
    return build(f"depthwise (float[N, 3, 6, 6] x) => (float[N, 5, 6, 6] y) {{ {body} }}", **weights)


def joined(pruned: bool) -> onnx.ModelProto:
    """Two branches, laid end to end and shuffled."""
    weights = {
        "w1": rows(pruned, 4, 3, 1, 1),
        "w2": rows(pruned, 4, 3, 1, 1, seed=1),
        "w3": draw(2, 8, 1, 1),
    }
    shuffle = "h = Reshape(j, split) t = Transpose <perm = [0, 2, 1, 3, 4]> (h) k = Reshape(t, merge)"
    text = f"a = Conv(x, w1) b = Conv(x, w2) j = Concat <axis = 1> (a, b) {shuffle} y = Conv(k, w3)"
    sizes = {"split": np.array([0, 2, 4, 6, 6], np.int64), "merge": np.array([0, 8, 6, 6], np.int64)}
    return build(f"joined (float[2, 3, 6, 6] x) => (float[2, 2, 6, 6] y) {{ {text} }}", **weights, **sizes)


def perceptron(pruned: bool) -> onnx.ModelProto:
    """Gemm layers, one with its weights in a `Constant` node."""
    weights = {"w1": rows(pruned, 6, 5), "b1": rows(pruned, 6), "b2": draw(3)}
    text = "a = Gemm <transB = 1> (x, w1, b1) r = Relu(a) y = Gemm(r, w2, b2)"
    model = build(f"perceptron (float[N, 5] x) => (float[N, 3] y) {{ {text} }}", **weights)
    value = onnx.numpy_helper.from_array(draw(6, 3), "w2")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w2"], value=value))
    return model


def decoder(pruned: bool) -> onnx.ModelProto:
    """Transposed convolution and resizing."""
    weights = {
        "w1": rows(pruned, 4, 3, 3, 3),
        "w2": draw(4, 4, 2, 2),
        "b2": draw(4),
        "w3": draw(2, 4, 1, 1),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    text = """a = Conv(x, w1) u = ConvTranspose <strides = [2, 2]> (a, w2, b2)
        s = Resize <mode = "nearest"> (u, , scales) y = Conv(s, w3)"""
    return build(f"decoder (float[N, 3, 6, 6] x) => (float[N, 2, 16, 16] y) {{ {text} }}", **weights)


def unknown(pruned: bool) -> onnx.ModelProto:
    """An operator that no rule describes, in the middle."""
    weights = {"w1": rows(pruned, 4, 5), "b1": rows(pruned, 4), "w2": rows(pruned, 4, 4), "w3": draw(4, 3)}
    text = """a = Gemm <transB = 1> (x, w1, b1) r = Relu(a) m = Gemm <transB = 1> (r, w2)
        d = Hardmax <axis = 1> (m) y = MatMul(d, w3)"""
    return build(f"unknown (float[N, 5] x) => (float[N, 3] y) {{ {text} }}", **weights)


NETWORKS: dict[str, Network] = {
    network.__name__: network for network in (chain, residual, normed, depthwise, joined, perceptron, decoder, unknown)
}

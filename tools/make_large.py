"""Writes large models to measure with: `python tools/make_large.py KIND OUT.onnx [options]`.

    cnn            a residual network of many small convolutions, `--nodes` nodes
    transformer    many small encoder layers, `--nodes` nodes, batch and sequence free
    bert           layers of BERT-large's shape, 400 MB in one file
    external       wide layers, `--gigabytes` of weights in a file of their own beside OUT.onnx

Weights are random. In every layer half of the inner units (and half of the attention's heads) are dead: what computes
them is zero. The bias of every other dead feed-forward unit stays, so that constants have to be folded. Weights of
`external` are written one at a time: the file may be larger than the memory. With `--transposed`, its matrices are
stored the other way round and transposed before each product, as PyTorch's exporter writes large layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_PAGE = 4096
_CNN_NODES = 7  # per block
_LAYER_NODES = 34  # per encoder layer

Store = Callable[[np.ndarray, str], onnx.TensorProto]


class Drawing:
    """A network being drawn.

    Args:
        store: takes an array and a name to the initializer that stands for it.
    """

    def __init__(self, store: Store = numpy_helper.from_array, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._store = store

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str] | None = None, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        made = list(outputs or [name])
        self.nodes.append(helper.make_node(op, list(inputs), made, name, **attributes))
        return made[0]

    def weight(self, values: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(self._store(values, name))
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale))

    def half(self, count: int) -> np.ndarray:
        """Which of some units are dead: half of them."""
        dead = np.zeros(count, np.bool_)
        dead[self.random.permutation(count)[: count // 2]] = True
        return dead

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "large", inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# --- convolutions --------------------------------------------------------------------------------------------------


def convolutional(nodes: int, width: int = 16) -> onnx.ModelProto:
    """Residual blocks with BatchNorm on one stream; about as many nodes as asked for."""
    net = Drawing()
    x = _convolution(net, "image", 3, width, np.zeros(width, np.bool_))
    for _ in range(max(1, nodes // _CNN_NODES)):
        dead = net.half(width)
        y = net.node("Relu", [_normed(net, _convolution(net, x, width, width, dead), dead)])
        y = _convolution(net, y, width, width, np.zeros(width, np.bool_), scale=0.1)
        x = net.node("Relu", [net.node("Add", [x, _normed(net, y, np.zeros(width, np.bool_))])])
    net.nodes[-1].output[0] = "features"
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", width, 8, 8])
    return net.model([image], [features])


def _convolution(net: Drawing, x: str, inputs: int, outputs: int, dead: np.ndarray, scale: float = 1.0) -> str:
    values = net.normal(outputs, inputs, 3, 3, scale=scale / np.sqrt(9 * inputs))
    values[dead] = 0
    return net.node("Conv", [x, net.weight(values)], kernel_shape=[3, 3], pads=[1] * 4)


def _normed(net: Drawing, x: str, dead: np.ndarray) -> str:
    gain, shift = np.abs(net.normal(dead.size)) + 0.5, net.normal(dead.size, scale=0.1)
    shift[dead] = 0
    mean, variance = np.zeros(dead.size, np.float32), np.ones(dead.size, np.float32)
    return net.node("BatchNormalization", [x, *map(net.weight, (gain, shift, mean, variance))])


# --- transformers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A transformer's encoder: its layers, and extents of its stream, heads, feed-forward layers and vocabulary.

    `transposed`: matrices are stored the other way round, and transposed before each product.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    transposed: bool = False


def encoder(shape: Encoder, store: Store = numpy_helper.from_array) -> onnx.ModelProto:
    """Layers with LayerNorm in front, as most exporters write them; batch and sequence are free."""
    net = Drawing(store)
    x = net.node("Gather", [net.weight(net.normal(shape.vocabulary, shape.width)), "tokens"])
    for layer in range(shape.layers):
        x = net.node("Add", [x, _attention(net, shape, _layer_norm(net, x, shape.width))])
        x = net.node("Add", [x, _feed_forward(net, shape, _layer_norm(net, x, shape.width), biased=layer % 2 == 1)])
    net.nodes[-1].output[0] = "hidden"
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "sequence"])
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", shape.width])
    return net.model([tokens], [hidden])


def _layer_norm(net: Drawing, x: str, width: int) -> str:
    gain, shift = np.abs(net.normal(width)) + 0.5, net.normal(width, scale=0.1)
    return net.node("LayerNormalization", [x, net.weight(gain), net.weight(shift)], axis=-1)


def _linear(net: Drawing, shape: Encoder, x: str, weights: np.ndarray, bias: np.ndarray) -> str:
    if shape.transposed:
        matrix = net.node("Transpose", [net.weight(np.ascontiguousarray(weights.T))], perm=[1, 0])
    else:
        matrix = net.weight(weights)
    return net.node("Add", [net.node("MatMul", [x, matrix]), net.weight(bias)])


def _attention(net: Drawing, shape: Encoder, x: str) -> str:
    width, size = shape.width, shape.width // shape.heads
    dead = np.repeat(net.half(shape.heads), size)
    split = net.weight(np.array([0, 0, shape.heads, size], np.int64))
    parts = []
    for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        weights, bias = net.normal(width, width, scale=width**-0.5), net.normal(width, scale=0.1)
        if part == "value":
            weights[:, dead], bias[dead] = 0, 0
        y = net.node("Reshape", [_linear(net, shape, x, weights, bias), split])
        parts.append(net.node("Transpose", [y], perm=order))
    query, key, value = parts
    scores = net.node("Mul", [net.node("MatMul", [query, key]), net.weight(np.array(size**-0.5, np.float32))])
    mixed = net.node("MatMul", [net.node("Softmax", [scores], axis=-1), value])
    merge = net.weight(np.array([0, 0, width], np.int64))
    y = net.node("Reshape", [net.node("Transpose", [mixed], perm=[0, 2, 1, 3]), merge])
    return _linear(net, shape, y, net.normal(width, width, scale=0.3 * width**-0.5), net.normal(width, scale=0.1))


def _feed_forward(net: Drawing, shape: Encoder, x: str, biased: bool) -> str:
    width, inner = shape.width, shape.inner
    dead = net.half(inner)
    weights, bias = net.normal(width, inner, scale=width**-0.5), net.normal(inner, scale=0.1)
    weights[:, dead] = 0
    if not biased:
        bias[dead] = 0
    y = _gelu(net, _linear(net, shape, x, weights, bias))
    return _linear(net, shape, y, net.normal(inner, width, scale=0.3 * inner**-0.5), net.normal(width, scale=0.1))


def _gelu(net: Drawing, x: str) -> str:
    root, one, half = (net.weight(np.array(value, np.float32)) for value in (2**0.5, 1.0, 0.5))
    error = net.node("Add", [net.node("Erf", [net.node("Div", [x, root])]), one])
    return net.node("Mul", [net.node("Mul", [x, error]), half])


# --- files ---------------------------------------------------------------------------------------------------------


def deep_transformer(nodes: int) -> onnx.ModelProto:
    """Small layers; about as many nodes as asked for."""
    return encoder(Encoder(max(1, nodes // _LAYER_NODES), 16, 4, 32, 50))


def bert(layers: int = 6) -> onnx.ModelProto:
    """Layers of BERT-large's shape behind its table of words: 400 MB when there are 6 of its 24."""
    return encoder(Encoder(layers, 1024, 16, 4096, 30522 - 6000))


def write_external(path: Path, shape: Encoder) -> int:
    """A model whose weights lie in `NAME.data` beside it, written one at a time. Returns the bytes of that file."""
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:

        def store(values: np.ndarray, name: str) -> onnx.TensorProto:
            if values.nbytes < 1024:
                return numpy_helper.from_array(values, name)
            file.write(b"\0" * (-file.tell() % _PAGE))
            kind = helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor = TensorProto(name=name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
            places = {"location": data.name, "offset": file.tell(), "length": values.nbytes}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.ascontiguousarray(values).data)
            return tensor

        model = encoder(shape, store)
    onnx.save(model, path)
    return data.stat().st_size


def wide(gigabytes: float, width: int = 2048) -> Encoder:
    """As many layers as fit in the size, behind a table of 32,000 words (of fewer where that alone is too much)."""
    total, layer = gigabytes * 1e9 / 4, 12 * width * width
    vocabulary = int(min(32_000, total / 8 / width))
    layers = max(1, round((total - vocabulary * width) / layer))
    return Encoder(layers, width, max(1, width // 128), 4 * width, vocabulary)


def main(argv: Sequence[str] | None = None) -> int:
    """Write one model."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("kind", choices=("cnn", "transformer", "bert", "external"))
    parser.add_argument("output", type=Path, metavar="OUT.onnx")
    parser.add_argument("--nodes", type=int, default=10_000, help="about how many nodes (10,000)")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="about how large (3)")
    parser.add_argument("--transposed", action="store_true", help="of external, transpose each matrix before its use")
    arguments = parser.parse_args(argv)
    if arguments.kind == "external":
        write_external(arguments.output, replace(wide(arguments.gigabytes), transposed=arguments.transposed))
        return 0
    makers: dict[str, Callable[[], onnx.ModelProto]] = {
        "cnn": lambda: convolutional(arguments.nodes),
        "transformer": lambda: deep_transformer(arguments.nodes),
        "bert": bert,
    }
    onnx.save(makers[arguments.kind](), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

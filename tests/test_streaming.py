"""Models whose weights lie in files of their own: each weight is read when it is needed, and never all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, draw

import onnxshrink
from onnxshrink import derive, weights
from onnxshrink.reading import read_model
from onnxshrink.weights import Array

TEXT = """agraph (int64[N, S] tokens) => (float[N, S, 64] y) {
  x = Gather(table, tokens)
  h = MatMul(x, w1) i = Add(h, b1) k = Relu(i) s = MatMul(k, w2) t = Add(s, b2) u = Add(x, t)
  n = LayerNormalization(u, g)
  o = MatMul(n, w3) p = Sigmoid(o) y = MatMul(p, w4)
}"""


LARGE = ("table", "w1", "w2", "w3", "w4")


def transformer_like() -> onnx.ModelProto:
    """Half of the units are dead; of one layer the constants that they leave have to be folded."""
    first, second = draw(64, 256), draw(64, 128, seed=1)
    first[:, ::2], second[:, 1::2] = 0, 0
    bias = np.abs(draw(256, seed=2)) + 1
    return build(
        TEXT,
        table=draw(300, 64, seed=3),
        w1=first,
        b1=bias,
        w2=draw(256, 64, seed=4),
        b2=draw(64, seed=5),
        g=np.ones(64, np.float32),
        w3=second,
        w4=draw(128, 64, seed=6),
    )


def save_external(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_external(transformer_like(), tmp_path / "model.onnx")


class Reader:
    """Counts how often each tensor is gone through, or looked into at some places."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scans: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        blocks, read = weights.Place.blocks, weights.Place.read

        def count_blocks(place: Any) -> Iterator[Array]:
            self.scans[place.name] += 1
            yield from blocks(place)

        def count_read(place: Any) -> Array:
            self.looks[place.name] += 1
            return read(place)

        monkeypatch.setattr(weights, "_BLOCK", 1 << 13)  # a tensor of one block is read as a whole
        monkeypatch.setattr(weights.Place, "blocks", count_blocks)
        monkeypatch.setattr(weights.Place, "read", count_read)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch)


def test_it_is_the_model_that_comes_of_one_file(path: Path) -> None:
    output = path.with_name("out.onnx")
    result = onnxshrink.shrink(path, output=output, align="none")
    assert result.report.equivalence is not None
    expected = onnxshrink.shrink(transformer_like(), align="none")
    assert read_model(output)[0].whole() == expected.model
    assert (
        result.report.after.parameters
        == expected.report.after.parameters
        == 300 * 64 + 2 * 128 * 64 + 128 + 64 + (64 + 64 * 64 + 128 * 64 - 64 * 64 + 64)
    )
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        "out.onnx",
        "out.onnx.data",
    ]


def test_no_weight_is_gone_through_more_than_twice(path: Path, reader: Reader) -> None:
    """Once to find what is zero, once to cut; the weights of constants are looked up besides."""
    onnxshrink.shrink(path, output=path.with_name("out.onnx"), verify=False, align="none")
    large = {name: reader.scans[name] for name in LARGE}
    assert large == dict.fromkeys(LARGE, 2)
    assert {name: reader.looks[name] for name in LARGE} == {"table": 1, "w1": 0, "w2": 1, "w3": 0, "w4": 1}


def with_transposed_weights() -> onnx.ModelProto:
    """Each matrix is stored the other way round and transposed before its product, as PyTorch's exporter writes it."""
    model = transformer_like()
    for tensor in model.graph.initializer:
        if tensor.name in LARGE[1:]:
            turned = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
            tensor.CopyFrom(onnx.numpy_helper.from_array(turned, tensor.name))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "MatMul":
            model.graph.node.append(onnx.helper.make_node("Transpose", [node.input[1]], [f"{node.input[1]}_turned"]))
            node.input[1] += "_turned"
        model.graph.node.append(node)
    return model


def test_weights_that_are_transposed_first_are_not_all_held(
    path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is transposed to be looked through, and again to be written; once more where constants are folded."""
    expected = onnxshrink.shrink(with_transposed_weights(), align="none").model
    source = save_external(with_transposed_weights(), path.with_name("turned.onnx"))
    monkeypatch.setattr(derive, "_KEPT", 1 << 10)
    monkeypatch.setattr(derive, "_ROOM", 0)
    monkeypatch.setattr(weights, "_SMALL", 1 << 10)
    output = path.with_name("out.onnx")
    onnxshrink.shrink(source, output=output, verify=False, align="none")
    assert {name: reader.looks[name] for name in LARGE} == {"table": 1, "w1": 2, "w2": 3, "w3": 2, "w4": 3}
    assert read_model(output)[0].whole() == expected

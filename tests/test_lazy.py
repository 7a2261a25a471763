"""Models whose weights are read when they are asked for: the same model, byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import build, draw

from onnxshrink.lazy import LARGEST, LazyModel
from onnxshrink.reading import read_model
from onnxshrink.weights import Values

TEXT = """agraph (float[N, 64] x) => (float[N, 64] y) {
  h = MatMul(x, a) k = Relu(h) s = MatMul(k, b) t = Add(s, c) y = Mul(t, d) }"""
LARGE = {"a", "b"}


def model() -> onnx.ModelProto:
    made = build(TEXT, a=draw(64, 64), b=draw(64, 64, seed=1), c=draw(64), d=np.float32(2))
    made.doc_string, made.graph.doc_string = "before the graph", "between weights and inputs"
    made.graph.initializer[0].doc_string = "behind the data"
    made.metadata_props.add(key="behind", value="the graph")
    return made


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


def test_only_large_weights_are_left_out() -> None:
    lazy = LazyModel.of(model())
    assert lazy.values.keys() == LARGE
    assert {tensor.name for tensor in lazy.proto.graph.initializer if not tensor.raw_data} == LARGE


def test_the_bytes_are_those_that_protobuf_writes() -> None:
    lazy = LazyModel.of(model())
    written = b"".join(lazy.pieces())
    assert written == model().SerializeToString()
    assert lazy.nbytes() == len(written)
    assert lazy.whole() == model()


@pytest.mark.parametrize("elements", [0, 1, 31, 32, 4000, 2**19])
def test_the_size_is_told_for_every_length_of_a_length(elements: int) -> None:
    """Lengths take a byte per seven bits, in the weight, in the graph around it and in the model around that."""
    lazy = LazyModel(onnx.ModelProto(ir_version=8))
    lazy.values["w"] = Values.of(np.ones(elements, np.float32))
    lazy.proto.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[elements])
    written = b"".join(lazy.pieces())
    assert lazy.nbytes() == len(written)
    (weight,) = onnx.ModelProto.FromString(written).graph.initializer
    assert onnx.numpy_helper.to_array(weight).shape == (elements,)


def test_weights_in_files_become_part_of_the_model(external: Path) -> None:
    lazy, files = read_model(external)
    assert files == {external, external.with_name("weights")}
    assert lazy.values.keys() == LARGE
    assert not any(tensor.external_data for tensor in lazy.proto.graph.initializer)
    assert lazy.whole().SerializeToString() == model().SerializeToString()


def test_a_weight_is_not_read_before_it_is_asked_for() -> None:
    lazy, reads = LazyModel(onnx.ModelProto()), []

    def read() -> np.ndarray:
        reads.append(1)
        return np.ones((64, 64), np.float32)

    lazy.add("w", Values((64, 64), np.dtype(np.float32), read))
    assert not reads
    assert lazy.nbytes() > 4 * 64 * 64
    assert not reads
    lazy.load()
    lazy.whole()
    b"".join(lazy.pieces())
    assert len(reads) == 1


def test_small_weights_and_those_of_less_than_a_byte_hold_their_data() -> None:
    import ml_dtypes

    lazy = LazyModel(onnx.ModelProto())
    lazy.add("small", Values.of(np.arange(1024, dtype=np.float64)))
    lazy.add("half a byte", Values.of(np.arange(5000).astype(ml_dtypes.int4)))
    assert not lazy.values
    small, narrow = (onnx.numpy_helper.to_array(tensor) for tensor in lazy.proto.graph.initializer)
    assert small.tolist() == list(range(1024))
    assert narrow.astype(int)[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert narrow.size == 5000


def test_a_copy_under_another_name() -> None:
    lazy = LazyModel(onnx.ModelProto())
    source = LazyModel.of(model())
    for tensor in source.proto.graph.initializer:
        lazy.add_again(tensor, source.values.get(tensor.name), f"new_{tensor.name}")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in lazy.whole().graph.initializer}
    expected = {f"new_{tensor.name}": onnx.numpy_helper.to_array(tensor) for tensor in model().graph.initializer}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_one_message_holds_less_than_two_gigabytes() -> None:
    assert 2**31 - 2**25 < LARGEST < 2**31

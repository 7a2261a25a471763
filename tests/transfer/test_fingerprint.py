"""A plan is for one model, however that is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import chain, perceptron

from onnxshrink.errors import InputError
from onnxshrink.graph import Graph
from onnxshrink.transfer.fingerprint import check_fingerprint, take_fingerprint


def weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return tensor


def set_weight(model: onnx.ModelProto, name: str, change: Any) -> None:
    tensor = weight(model, name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))


def one_more(values: np.ndarray) -> np.ndarray:
    values.flat[-1] = np.nextafter(values.flat[-1], np.float32(9))
    return values


def test_storage_names_of_nodes_and_doc_strings_do_not_count(tmp_path: Path) -> None:
    fingerprint = take_fingerprint(Graph(chain(True)))
    onnx.save(chain(True), tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    check_fingerprint(Graph(tmp_path / "model.onnx"), fingerprint)
    other = chain(True)
    other.graph.doc_string, other.graph.node[0].name, other.producer_name = "words", "first", "somebody"
    weights = list(other.graph.initializer)
    del other.graph.initializer[:]
    other.graph.initializer.extend(reversed(weights))
    tensor = weight(other, "b1")
    values = onnx.numpy_helper.to_array(tensor).tolist()
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values)
    check_fingerprint(Graph(other), fingerprint)


def rename_weight(model: onnx.ModelProto) -> None:
    weight(model, "b2").name = "b3"
    model.graph.node[-1].input[2] = "b3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: set_weight(model, "w2", one_more), "the weight 'w2' has other values or another shape"),
        (lambda model: set_weight(model, "b1", one_more), "the weight 'b1' has other values or another shape"),
        (rename_weight, "its nodes, inputs or outputs are not"),
        (lambda model: setattr(model.graph.node[1], "op_type", "Abs"), "its nodes, inputs or outputs are not"),
        (
            lambda model: model.graph.node[0].attribute.append(onnx.helper.make_attribute("group", 1)),
            "its nodes, inputs or outputs are not",
        ),
        (lambda model: setattr(model.opset_import[0], "version", 18), "its nodes, inputs or outputs are not"),
        (
            lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[2], "dim_param", "H"),
            "its nodes, inputs or outputs are not",
        ),
    ],
)
def test_another_model_is_refused(change: Any, message: str) -> None:
    fingerprint = take_fingerprint(Graph(chain(True)))
    model = chain(True)
    change(model)
    with pytest.raises(InputError) as caught:
        check_fingerprint(Graph(model), fingerprint)
    assert str(caught.value).startswith("the plan is for another model: " + message)
    assert "\n" not in str(caught.value)


def test_weights_of_constant_nodes_count() -> None:
    fingerprint = take_fingerprint(Graph(perceptron(True)))
    assert set(fingerprint.weights) >= {"w1", "w2"}
    model = perceptron(True)
    value = onnx.numpy_helper.to_array(model.graph.node[0].attribute[0].t)
    model.graph.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(one_more(value.copy()), "w2"))
    with pytest.raises(InputError, match="the weight 'w2' has other values"):
        check_fingerprint(Graph(model), fingerprint)
    with pytest.raises(InputError, match="its nodes, inputs or outputs are not"):
        check_fingerprint(Graph(chain(True)), fingerprint)

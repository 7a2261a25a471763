"""What exporters note about where a node comes from."""

from __future__ import annotations

import onnx
import pytest

from onnxshrink.scopes import absorbed_norm, module_path, source_lines


def node(name: str = "n", **metadata: str) -> onnx.NodeProto:
    made = onnx.helper.make_node("Relu", ["x"], ["y"], name=name)
    for key, value in metadata.items():
        made.metadata_props.append(onnx.StringStringEntryProto(key=key.replace("__", "."), value=value))
    return made


SCOPES = "pkg__torch__onnx__name_scopes"


@pytest.mark.parametrize(
    ("scopes", "path"),
    [
        ("['', 'layer1.0.conv1', 'conv2d']", "layer1.0.conv1"),
        ("['', 'relu']", ""),
        ("['relu']", ""),
        ("no list", None),
        ("[1]", None),
        ("", None),
    ],
)
def test_the_module_in_the_metadata(scopes: str, path: str | None) -> None:
    assert module_path(node(**{SCOPES: scopes})) == path


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/Relu", ""),
        ("/conv1/Conv", "conv1"),
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/encoder/layers.3/attention/MatMul_2", "encoder.layers.3.attention"),
        ("Relu_7", None),
        ("", None),
    ],
)
def test_the_module_in_the_name(name: str, path: str | None) -> None:
    assert module_path(node(name)) == path


def test_the_metadata_counts_more_than_the_name() -> None:
    assert module_path(node("/a/Relu", **{SCOPES: "['', 'b', 'relu']"})) == "b"


def test_source_lines() -> None:
    trace = (
        'File "/a/model.py", line 6, in forward\n    x = f(x)\n  File "/b/rnn.py", line 1125, in forward\n    zeros('
    )
    assert source_lines(node(pkg__torch__onnx__stack_trace=trace)) == [("/a/model.py", 6), ("/b/rnn.py", 1125)]
    assert source_lines(node()) == []


def test_absorbed_norms() -> None:
    rules = "FuseBatchNormIntoConv, RemoveOptionalBiasFromConv"
    assert absorbed_norm(node(pkg__onnxscript__rewriter__rule_name=rules))
    assert not absorbed_norm(node(pkg__onnxscript__rewriter__rule_name="FusePad"))
    assert not absorbed_norm(node())

"""A model that amplifies the rounding of its inputs is left as it is, and the report says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import build, dead, draw

import onnxshrink
from onnxshrink import cli
from onnxshrink.lazy import LazyModel

TEXT = """g (float[8, 6] x) => (float[8, 4] y) {
    h = MatMul(x, a) k = Add(h, b) r = Relu(k) m = MatMul(r, c) [wave] w = Mul(m, s) y = Sin(w)
}"""
# Half of 64 hidden units are constants: folded, they are summed up in another order.
DEAD = range(0, 64, 2)


def model(scale: float) -> onnx.ModelProto:
    return build(TEXT, a=dead(draw(6, 64), *DEAD, axis=1), b=draw(64), c=draw(64, 4), s=np.float32(scale))


def test_rounding_that_is_amplified_is_no_difference() -> None:
    proto = model(1e4)
    result = onnxshrink.shrink(proto)
    assert result.model == proto
    assert not result.report.changed
    assert result.report.equivalence is None
    assert "amplified to the limit or beyond it by" in result.report.note
    assert "--no-verify" in result.report.note
    assert result.report.to_dict()["note"] == result.report.note


def test_without_verification_it_is_shrunk() -> None:
    assert onnxshrink.shrink(model(1e4), verify=False).report.changed


def test_a_model_that_amplifies_little_is_shrunk() -> None:
    report = onnxshrink.shrink(model(1)).report
    assert report.changed
    assert report.note is None


def test_a_model_that_amplifies_nearly_to_the_limit_is_left_as_it_is() -> None:
    """Half of the limit on these inputs may be twice the limit on others."""
    proto = model(3)
    small = onnxshrink.shrink(proto, verify=False).model
    found = onnxshrink.verify(proto, small)
    assert 0.2 * found.limit < found.error < found.limit
    result = onnxshrink.shrink(proto)
    assert result.model == proto
    assert "amplified to the limit or beyond it by the model" in result.report.note


def test_the_command_line_says_so_and_writes_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(model(1e4), tmp_path / "in.onnx")
    assert cli.main(["shrink", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx")]) == 0
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    printed = " ".join(capsys.readouterr().out.split())
    assert "Nothing removed: rounding differences are amplified to the limit or beyond it by" in printed
    assert "pass --no-verify" in printed


def test_a_wrong_weight_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["onnxshrink.shrink"]
    real = module.apply

    def wrong(*arguments: object) -> LazyModel:
        small = real(*arguments).whole()
        weight = next(t for t in small.graph.initializer if t.name.startswith("c"))
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.001)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return LazyModel(small)

    monkeypatch.setattr(module, "apply", wrong)
    with pytest.raises(onnxshrink.OutputsDiffer):
        onnxshrink.shrink(model(1))

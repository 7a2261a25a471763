"""Results whose weights are read when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, draw

from onnxshrink import InputError, ShrinkResult, shrink
from onnxshrink import result as results
from onnxshrink.reading import read_model

TEXT = "agraph (float[N, 64] x) => (float[N, 64] y) { h = MatMul(x, a) k = Relu(h) y = MatMul(k, b) }"


def pruned(seed: int = 0) -> onnx.ModelProto:
    """Half of the units between two products are dead."""
    first = draw(64, 128, seed=seed)
    first[:, ::2] = 0
    return build(TEXT, a=first, b=draw(128, 64, seed=seed + 1))


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(pruned(), path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


def quick(model: Any, **options: Any) -> ShrinkResult:
    return shrink(model, verify=False, align="none", **options)


def shapes(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    return [onnx.numpy_helper.to_array(tensor).shape for tensor in model.graph.initializer]


def whole(path: Path) -> onnx.ModelProto:
    """The model of a file, without the traces that onnx leaves where it has read external data."""
    return read_model(path)[0].whole()


SMALL = [(64, 64), (64, 64)]


def test_a_result_without_a_file(external: Path) -> None:
    result = quick(external)
    assert shapes(result.model) == SMALL
    assert result.model == quick(pruned()).model
    assert result.model is result.model


def test_a_result_in_a_file(external: Path) -> None:
    output = external.with_name("out.onnx")
    result = quick(external, output=output)
    external.unlink()
    external.with_name("weights").unlink()
    assert result.model == whole(output)
    assert shapes(result.model) == SMALL


def test_a_result_in_the_place_of_the_input(external: Path) -> None:
    expected = quick(pruned()).model
    result = quick(external, output=external)
    assert result.model == expected
    result.save(external.with_name("copy.onnx"))
    assert whole(external.with_name("copy.onnx")) == expected


def test_the_input_has_changed_since(external: Path) -> None:
    result = quick(external)
    onnx.save(pruned(5), external, save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(InputError, match="weights has changed since the model was read"):
        _ = result.model
    with pytest.raises(InputError, match="weights has changed since the model was read"):
        result.save(external.with_name("out.onnx"))
    assert not external.with_name("out.onnx").exists()


def test_an_object_that_changes_later(tmp_path: Path) -> None:
    model = pruned()
    expected, result = quick(pruned()).model, quick(model)
    whole = quick(build(TEXT, a=draw(64, 128), b=draw(128, 64)))
    for tensor in model.graph.initializer:
        tensor.raw_data = bytes(len(tensor.raw_data))
    assert result.model == expected
    assert not np.any([np.all(onnx.numpy_helper.to_array(t) == 0) for t in whole.model.graph.initializer])


def test_a_result_that_is_as_it_was_belongs_to_nobody_else() -> None:
    model = build(TEXT, a=draw(64, 128), b=draw(128, 64))
    before, result = model.SerializeToString(), quick(model)
    model.graph.initializer[0].raw_data = bytes(4 * 64 * 128)
    assert result.model.SerializeToString() == before


def test_what_is_changed_in_a_result_is_saved(tmp_path: Path) -> None:
    result = quick(pruned())
    result.model.producer_name = "somebody"
    result.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").producer_name == "somebody"


def test_weights_beyond_one_object_stay_in_their_file(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "LARGEST", 1000)
    result = quick(external, output=external.with_name("out.onnx"))
    with pytest.raises(InputError, match=r"0\.0 GB of weights, more than one object holds .* save it"):
        _ = result.model
    assert shapes(onnx.load(external.with_name("out.onnx"))) == SMALL


def test_a_report_that_cannot_be_written_leaves_the_output_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.onnx"
    output.write_text("as it was")
    monkeypatch.setattr("onnxshrink.report.Report.to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quick(pruned(), output=output, report=tmp_path / "report.json")
    assert output.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_result_tells_what_it_is() -> None:
    assert repr(quick(pruned())) == "<ShrinkResult: 16,384 parameters became 8,192>"

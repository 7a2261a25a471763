"""Latencies from a process of its own: which models, which inputs, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, draw

from onnxshrink import InputError, OnnxshrinkError
from onnxshrink.bench import compare, make_timing, measure, tasks


def product(name: str = "x", width: int = 4) -> onnx.ModelProto:
    return build(f"g (float[N, {width}] {name}) => (float[N, 3] y) {{ y = MatMul({name}, w) }}", w=draw(width, 3))


def refused(call: Any, *given: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*given, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_model_has_a_value_per_round(tmp_path: Path) -> None:
    onnx.save(product(), tmp_path / "model.onnx")
    given = {"x": draw(5, 4)}
    found = measure([tmp_path / "model.onnx", product(), product()], inputs=given, rounds=4, threads=2)
    assert [samples.shape for samples in found] == [(4,)] * 3
    assert all((samples > 0).all() for samples in found)


def test_denormals_are_flushed_there_and_not_here() -> None:
    timing = make_timing(*measure([product(), product()], rounds=6))
    assert timing.runs == 6
    assert timing.low <= timing.ratio <= timing.high
    assert np.float32(1e-40) * np.ones(1, np.float32) > 0


def test_models_and_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    missing = tmp_path / "missing.onnx"
    assert (
        refused(compare, missing, product()) == f"the first model '{missing}' cannot be read: No such file or directory"
    )
    message = refused(compare, product(), product("z"), seconds=1)
    assert message.startswith("the second model does not run on the inputs of the first: ")
    unknown = build("g (float[N, 4] x) => (float[N, 4] y) { y = Magic(x) }")
    message = refused(measure, [product(), product(), unknown], rounds=1)
    assert message.startswith("the third model does not load in onnxruntime (")
    message = refused(compare, product(), product(), inputs={"x": draw(1, 3)})
    assert message == "input 'x' has shape [1, 3], the model wants [N, 4]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"seconds": 0.0}, "seconds must be more than 0, not 0.0"),
        ({"seconds": float("nan")}, "seconds must be more than 0, not nan"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    assert refused(measure, [product()], **options) == message


def test_no_model_at_all() -> None:
    assert refused(measure, []) == "there is no model to measure"


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*words: str) -> list[str]:
        import sys

        return [sys.executable, "-c", "import os, sys; print('the last words', file=sys.stderr); os._exit(7)"]

    monkeypatch.setattr(tasks, "python_command", dying)
    with pytest.raises(OnnxshrinkError, match=r"ended with code 7: the last words"):
        measure([product()], rounds=1)

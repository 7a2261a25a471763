"""`onnxshrink bench`: what it hands on, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import draw
from networks import chain

from onnxshrink.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models and an input in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    onnx.save(chain(True), "a.onnx")
    onnx.save(chain(False), "b.onnx")
    np.save("x.npy", draw(4, 3, 6, 6))


def test_it_prints_and_writes_what_it_measured(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--runs", "2", "--threads", "2", "--input", "x=x.npy", "--report", "report.json"]
    assert main(["bench", "a.onnx", "b.onnx", *words]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[:3] == ["A: a.onnx", "B: b.onnx", "inputs: x float32[4, 3, 6, 6]"]
    assert "No difference can be told." in out
    report = json.loads(Path("report.json").read_text())
    assert report["models"] == ["a.onnx", "b.onnx"]
    assert (report["timing"]["runs"], report["threads"]) == (2, 2)
    assert sorted(os.listdir()) == ["a.onnx", "b.onnx", "report.json", "x.npy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.onnx", "b.onnx"], "the first model 'missing.onnx' cannot be read"),
        (["a.onnx", "x.npy"], "the second model 'x.npy' is not an ONNX file, or is cut short"),
        (["a.onnx"], "B.onnx"),
        (["a.onnx", "b.onnx", "--threads", "0"], "threads must be at least 1, not 0"),
        (["a.onnx", "b.onnx", "--runs", "0"], "rounds must be at least 1, not 0"),
        (["a.onnx", "b.onnx", "--seconds", "-1"], "seconds must be more than 0, not -1.0"),
        (["a.onnx", "b.onnx", "--seconds", "1", "--runs", "2"], "not allowed with"),
        (["a.onnx", "b.onnx", "--input", "z=x.npy"], "the model has no input 'z'"),
        (["a.onnx", "b.onnx", "--report", "b.onnx"], "report b.onnx: would overwrite b.onnx"),
        (["a.onnx", "b.onnx", "--report", "no/report.json"], "the folder no does not exist"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_used(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    assert main(["bench", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("onnxshrink: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(os.listdir()) == before

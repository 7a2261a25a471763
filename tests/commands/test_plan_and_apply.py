"""`onnxshrink plan` and `onnxshrink apply`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import draw
from networks import chain, normed

from onnxshrink.cli import main
from onnxshrink.measure import parameters
from onnxshrink.transfer import steps


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    onnx.save(chain(True), "model.onnx")


def test_both_together_write_what_shrink_writes(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model.onnx", "-o", "plan.json", "--align", "none"]) == 0
    assert capfd.readouterr() == ("122 parameters become 62 (50.8%).\n", "")
    assert main(["apply", "model.onnx", "plan.json", "-o", "small.onnx", "--report", "report.json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[2].split() == ["parameters", "122", "62", "50.8%"]
    assert "Verified: the outputs differ by at most " in out
    assert main(["shrink", "model.onnx", "-o", "direct.onnx", "--align", "none", "-q"]) == 0
    assert Path("small.onnx").read_bytes() == Path("direct.onnx").read_bytes()
    assert json.loads(Path("report.json").read_text())["after"]["parameters"] == 62


def test_in_place_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model.onnx", "-o", "plan.json", "-q", "--no-timing"]) == 0
    assert main(["apply", "model.onnx", "plan.json", "-o", "model.onnx", "-q", "--no-verify"]) == 0
    assert capfd.readouterr() == ("", "")
    assert parameters(onnx.load("model.onnx")) == 62
    assert sorted(os.listdir()) == ["model.onnx", "plan.json"]


def test_options_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def noted(function: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            seen.update(options, masks=given[-1])
            return function(*given, **options)

        return call

    for name in ("make_plan", "apply_plan"):
        monkeypatch.setattr(steps, name, noted(getattr(steps, name)))
    np.savez("masks.npz", b2=np.ones(2))
    np.save("x.npy", draw(2, 3, 6, 6))
    common = ["--masks", "masks.npz", "--zero-tolerance", "1e-9", "--seed", "5", "--input", "x=x.npy", "-q"]
    assert main(["plan", "model.onnx", "-o", "plan.json", "--align", "2", "--no-timing", *common]) == 0
    expected = {"masks": "masks.npz", "zero_tolerance": 1e-9, "seed": 5}
    assert {name: seen[name] for name in expected} == expected
    assert (seen["align"], seen["timing"], list(seen["inputs"])) == (2, False, ["x"])
    seen.clear()
    assert main(["apply", "model.onnx", "plan.json", "-o", "small.onnx", "--no-verify", *common]) == 0
    assert {name: seen[name] for name in expected} == expected
    assert (seen["verify"], list(seen["inputs"])) == (False, ["x"])


def save_plan_of_another_model() -> None:
    onnx.save(normed(True), "other.onnx")
    assert main(["plan", "other.onnx", "-o", "plan.json", "-q", "--align", "none"]) == 0
    os.remove("other.onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "missing.onnx", "-o", "new.json"], "missing.onnx: no such file"),
        (["plan", "model.onnx", "-o", "model.onnx"], "output model.onnx: would overwrite the model"),
        (["plan", "model.onnx", "-o", "no/plan.json"], "the folder no does not exist"),
        (["plan", "model.onnx", "-o", "new.json", "--align", "0"], "--align"),
        (["plan", "model.onnx", "-o", "new.json", "--masks", "missing.npz"], "no such file"),
        (["plan", "model.onnx"], "-o/--output"),
        (["apply", "model.onnx", "missing.json", "-o", "new.onnx"], "plan missing.json: cannot be read: No such file"),
        (["apply", "model.onnx", "model.onnx", "-o", "new.onnx"], "plan model.onnx: not a plan: "),
        (["apply", "model.onnx", "plan.json", "-o", "new.onnx"], "the plan is for another model: its nodes"),
        (["apply", "model.onnx", "plan.json", "-o", "plan.json"], "output plan.json: would overwrite the plan"),
        (["apply", "model.onnx", "plan.json", "-o", "n.onnx", "--report", "plan.json"], "would overwrite the plan"),
        (["apply", "model.onnx", "plan.json"], "-o/--output"),
        (["apply", "model.onnx", "plan.json", "-o", "new.onnx", "--align", "8"], "--align"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_used(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    save_plan_of_another_model()
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("onnxshrink: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before

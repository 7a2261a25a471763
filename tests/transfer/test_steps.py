"""Shrinking in two steps: the result is that of one, and what does not belong together is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, dead, draw
from networks import NETWORKS, chain, normed

import onnxshrink
from onnxshrink import InputError, OutputsDiffer, ShrinkPlan, apply_plan, make_plan, shrink
from onnxshrink.measure import parameters


def moved(plan: ShrinkPlan) -> ShrinkPlan:
    """The plan as it arrives elsewhere."""
    return ShrinkPlan.from_json(plan.to_json())


@pytest.mark.parametrize("align", ["none", 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_files_are_those_of_shrink(name: str, align: str | int, tmp_path: Path) -> None:
    onnx.save(NETWORKS[name](True), tmp_path / "model.onnx")
    one = shrink(tmp_path / "model.onnx", align=align, output=tmp_path / "one.onnx", report=tmp_path / "one.json")
    plan = moved(make_plan(tmp_path / "model.onnx", align=align))
    assert plan.parameters == (one.report.before.parameters, one.report.after.parameters)
    two = apply_plan(tmp_path / "model.onnx", plan, output=tmp_path / "two.onnx", report=tmp_path / "two.json")
    assert (tmp_path / "two.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()
    assert two.model == one.model
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())


def test_external_data_and_objects(tmp_path: Path) -> None:
    """A plan is for a model, not for a file: made from an object, carried out on a file with its weights beside it."""
    model = chain(True)
    plan = moved(make_plan(model, align="none"))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    small = apply_plan(tmp_path / "model.onnx", plan, output=tmp_path / "small.onnx").model
    assert parameters(small) == 62
    assert small == shrink(tmp_path / "model.onnx", align="none").model


def test_masks_and_tolerance_belong_to_the_model(tmp_path: Path) -> None:
    mask = np.ones((4, 3, 3, 3))
    mask[[1, 3]] = 0
    masks = {"w1": mask, "b1": mask[:, 0, 0, 0]}
    np.savez(tmp_path / "masks.npz", **masks)
    model = chain(False)
    plan = moved(make_plan(model, masks, align="none"))
    assert parameters(apply_plan(model, plan, tmp_path / "masks.npz").model) == 62
    with pytest.raises(InputError, match="the weight 'w1' has other values or another shape"):
        apply_plan(model, plan)
    weights = draw(4, 3)
    weights[1] *= 1e-6
    model = build(
        "g (float[N, 3] x) => (float[N, 2] y) { a = MatMul(x, t) y = MatMul(a, v) }", t=weights.T, v=draw(4, 2)
    )
    plan = moved(make_plan(model, align="none", zero_tolerance=1e-3))
    result = apply_plan(model, plan, zero_tolerance=1e-3)
    assert (result.report.after.parameters, result.report.zeroed) == (15, 3)
    with pytest.raises(InputError, match="the weight 't' has other values"):
        apply_plan(model, plan)


def test_nothing_to_remove(tmp_path: Path) -> None:
    plan = moved(make_plan(chain(False)))
    assert (plan.whole, plan.note, plan.parameters) == (True, None, (122, 122))
    assert plan.summary() == "Nothing goes: no channel can go."
    result = apply_plan(chain(False), plan)
    assert not result.report.changed
    assert result.model == chain(False)


def test_a_reason_to_keep_everything_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxshrink.speed import auto

    monkeypatch.setattr(auto, "choose", lambda *given, **options: auto.Choice(None, None, "all forms are slower"))
    plan = moved(make_plan(chain(True)))
    assert plan.summary() == "Nothing goes: all forms are slower."
    result = apply_plan(chain(True), plan)
    assert (result.report.changed, result.report.note) == (False, "all forms are slower")
    assert result.model == chain(True)


def test_another_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    plan = make_plan(chain(True), align="none")
    with pytest.raises(InputError, match="the plan is for another model"):
        apply_plan(normed(True), plan, output=tmp_path / "small.onnx", report=tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = make_plan(chain(True), align="none")
    # The digests are what keeps this from happening.
    monkeypatch.setattr("onnxshrink.transfer.steps.check_fingerprint", lambda *given: None)
    with pytest.raises(OutputsDiffer):
        apply_plan(chain(False), plan, output=tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []
    assert parameters(apply_plan(chain(False), plan, verify=False).model) == 62


def test_inputs_seed_and_steps_are_handed_on() -> None:
    steps: list[str] = []
    plan = make_plan(chain(True), align="none", progress=steps.append)
    assert steps == ["reading", "analysing", "planning"]
    steps.clear()
    x = draw(5, 3, 6, 6)
    result = apply_plan(chain(True), plan, inputs={"x": x}, samples=3, progress=steps.append)
    assert steps == ["reading", "checking the plan", "cutting", "comparing", "writing"]
    assert result.report.equivalence is not None
    with pytest.raises(InputError, match="'z'"):
        apply_plan(chain(True), plan, inputs={"z": x})


@pytest.mark.parametrize(
    "call", [make_plan, lambda model, **options: apply_plan(model, make_plan(chain(True)), **options)]
)
def test_models_that_cannot_be_used(call: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.onnx: no such file"):
        call(tmp_path / "missing.onnx")


def test_align_is_checked() -> None:
    with pytest.raises(InputError, match="align"):
        make_plan(chain(True), align="most")


def test_the_models_are_untouched() -> None:
    model = chain(True)
    before = model.SerializeToString()
    plan = make_plan(model, align="none")
    apply_plan(model, plan)
    apply_plan(model, plan)
    assert model.SerializeToString() == before
    assert onnxshrink.ShrinkPlan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_constants_that_leave_travel() -> None:
    """A dead unit that is not zero: its value, folded in the next bias, comes from the plan."""
    weights = {"w": dead(draw(4, 3), 1), "b": draw(4), "v": draw(4, 2)}
    text = "g (float[N, 3] x) => (float[N, 2] y) { a = Gemm <transB = 1> (x, w, b) s = Sigmoid(a) y = MatMul(s, v) }"
    model = build(text, **weights)
    plan = moved(make_plan(model, align="none"))
    result = apply_plan(model, plan)
    assert result.report.folded == 1
    assert result.report.after.parameters < result.report.before.parameters

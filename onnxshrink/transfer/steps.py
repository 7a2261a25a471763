"""Shrinking in two steps, which may be done in different places: make a plan, apply it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnxshrink.analyse import analyse
from onnxshrink.masks import MaskTree
from onnxshrink.measure import parameters
from onnxshrink.planning.align import check_align
from onnxshrink.reading import ModelLike
from onnxshrink.result import ShrinkResult
from onnxshrink.shrink import Form, Options, carry_out, check_targets, choose_form, conclude
from onnxshrink.source import PathLike, open_source
from onnxshrink.transfer.facts import facts_of, recall
from onnxshrink.transfer.fingerprint import check_fingerprint, take_fingerprint
from onnxshrink.transfer.portable import ShrinkPlan
from onnxshrink.weights import Array


def make_plan(
    model: ModelLike,
    masks: MaskTree | PathLike | None = None,
    *,
    inputs: Mapping[str, Array] | None = None,
    seed: int = 0,
    align: str | int = "auto",
    timing: bool = True,
    zero_tolerance: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> ShrinkPlan:
    """Decide what of a model goes, without writing the smaller model: the first step of `shrink`.

    The arguments are those of `shrink`. `apply_plan` is the second step; `ShrinkPlan.to_json` takes the plan there.

    Raises InputError when the model, a mask, an input or an option cannot be used.
    """
    step = progress or (lambda name: None)
    check_align(align)
    step("reading")
    source = open_source(model, masks, zero_tolerance)
    step("analysing")
    analysis = analyse(source.graph)
    step("planning")
    form = choose_form(source, analysis, Options(inputs=inputs, seed=seed, align=align, timing=timing))
    before = parameters(source.graph.proto)
    after = before if form.model is None else parameters(form.model.proto)
    facts, fingerprint = facts_of(analysis), take_fingerprint(source.graph)
    return ShrinkPlan(form.plan, facts, fingerprint, (before, after), whole=form.model is None, note=form.note)


def apply_plan(
    model: ModelLike,
    plan: ShrinkPlan,
    masks: MaskTree | PathLike | None = None,
    *,
    output: PathLike | None = None,
    verify: bool = True,
    inputs: Mapping[str, Array] | None = None,
    samples: int = 2,
    seed: int = 0,
    zero_tolerance: float = 0.0,
    report: PathLike | None = None,
    progress: Callable[[str], None] | None = None,
) -> ShrinkResult:
    """Write the smaller model that a plan describes: the second step of `shrink`, with the same result, byte for byte.

    Args:
        model: the model that the plan was made for, as a path or a `ModelProto`.
        plan: from `make_plan`, perhaps by way of `ShrinkPlan.to_json` and `ShrinkPlan.from_json`.
        masks, zero_tolerance: those that the plan was made with.
        output, verify, inputs, samples, seed, report, progress: as for `shrink`.

    Raises:
        InputError: the plan is for another model, or as for `shrink`.
        OutputsDiffer: as for `shrink`.
    """
    step = progress or (lambda name: None)
    check_targets(model, masks, output, report)
    step("reading")
    source = open_source(model, masks, zero_tolerance)
    step("checking the plan")
    check_fingerprint(source.graph, plan.fingerprint)
    analysis = recall(source.graph, plan.facts)
    step("cutting")
    form = Form(plan.plan, None if plan.whole else carry_out(analysis, plan.plan), note=plan.note)
    options = Options(verify, inputs, samples, seed, output=output, report=report, step=step)
    return conclude(source, analysis, options, form)

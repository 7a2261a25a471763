"""The whole path: load, mask, analyse, plan, apply, verify, save."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnxshrink import measure, save
from onnxshrink.analyse import Analysis, analyse
from onnxshrink.apply import apply
from onnxshrink.collector import paused
from onnxshrink.errors import InputError, OnnxshrinkError
from onnxshrink.graph import Graph, make_skeleton
from onnxshrink.guard import despite_faults
from onnxshrink.lazy import LazyModel
from onnxshrink.plan import Plan, make_plan
from onnxshrink.planning.align import Alignment, check_align
from onnxshrink.probe import DEFAULT_SAMPLES, prober
from onnxshrink.reading import ModelLike
from onnxshrink.registry import Lookup, rule_of
from onnxshrink.report import Report, make_report
from onnxshrink.result import ShrinkResult, stage
from onnxshrink.source import PathLike, Source, open_source, size
from onnxshrink.speed.latency import Latency
from onnxshrink.version import __version__
from onnxshrink.weights import Array

if TYPE_CHECKING:
    from onnxshrink.masks import MaskTree
    from onnxshrink.replacement import ReplaceFunction
    from onnxshrink.verify import Equivalence

# Models with more weights are not timed: several forms are in memory at once.
_TIMED_BYTES = 1 << 30


def shrink(
    model: ModelLike,
    masks: MaskTree | PathLike | None = None,
    *,
    output: PathLike | None = None,
    verify: bool = True,
    inputs: Mapping[str, Array] | None = None,
    samples: int = 2,
    seed: int = 0,
    align: str | int = "auto",
    timing: bool = True,
    zero_tolerance: float = 0.0,
    probe: int = 0,
    replace_functions: Mapping[str, ReplaceFunction] | None = None,
    report: PathLike | None = None,
    progress: Callable[[str], None] | None = None,
) -> ShrinkResult:
    """Remove every channel of a model that cannot influence its outputs.

    The result computes the same function as the masked model, with the same interface; onnxruntime runs both unless
    `verify` is off. When nothing can be removed, or when the model amplifies mere rounding so much that the comparison
    says nothing, the result equals the masked input, and the report says so. `model` itself never changes.

    Args:
        model: a path or a `ModelProto`.
        masks: 0/1 arrays by the name of the weight that they multiply, or a file of such (`.npz`, `.pt`, `.pth`,
            `.safetensors`). None: zeros in the weights are enough.
        output: file to write; nothing is written when anything fails.
        verify: compare the outputs of both models.
        inputs: input arrays by name for that comparison; missing ones are drawn at random.
        samples: how many sets of random inputs are drawn.
        seed: of the random inputs.
        align: how wide the layers become. "none": the fewest parameters. A number: multiples of it, where the original
            has the channels. "auto": what is fastest in onnxruntime on this machine, and not slower than the input.
        timing: with "auto", run the forms that may be the fastest; without, a cost model decides alone.
        zero_tolerance: weights up to this magnitude count as zero. Lossy when not 0: the result is compared with the
            model that has zeros in their place, and the report says how many they are.
        probe: run operators without a rule alone on so many random samples, to find outputs that never change. Nothing
            proves them; they are marked in the report, and the result is compared whatever `verify` says. 0: do not.
        replace_functions: functions that write nodes anew, by operator type (`Op`, `domain::Op`) or class of PyTorch
            module (`onnxshrink.replacement.replacer`); the result is compared whatever `verify` says.
        report: JSON file to write the report to.
        progress: called with the name of each step as it begins.

    Raises:
        InputError: the model, a mask, an input or an option cannot be used, or a file cannot be written.
        OutputsDiffer: the two models do not compute the same; nothing is written.
    """
    step = progress or (lambda name: None)
    check_align(align)
    check_targets(model, masks, output, report)
    step("reading")
    source = open_source(model, masks, zero_tolerance, tuple(replace_functions or ()))
    options = Options(verify, inputs, samples, seed, align, timing, output, report, step)
    return despite_faults(lookup_for(probe, replace_functions), partial(_carry_on, source, options))


def _carry_on(source: Source, options: Options, lookup: Lookup) -> ShrinkResult:
    options.step("analysing")
    analysis = analyse(source.graph, lookup)
    options.step("cutting")
    return conclude(source, analysis, options)


@dataclass(frozen=True, eq=False)
class Options:
    """How to finish once the facts are there; as in `shrink`."""

    verify: bool = True
    inputs: Mapping[str, Array] | None = None
    samples: int = 2
    seed: int = 0
    align: str | int = "none"
    timing: bool = True
    output: PathLike | None = None
    report: PathLike | None = None
    step: Callable[[str], None] = lambda name: None


def conclude(source: Source, analysis: Analysis, options: Options, form: Form | None = None) -> ShrinkResult:
    """The result for a model with its facts: planned (unless `form` is given), cut, compared and written.

    Raises what `shrink` raises.
    """
    form = form or choose_form(source, analysis, options)
    small = _checked(form, analysis, source.external)
    with contextlib.ExitStack() as stack:
        # Complete on disk before it is compared: what takes the output's place is what was run.
        staged = None if small is None else _stage(source, small.model, options, stack)
        equivalence, note = None, form.note
        if small is not None and (options.verify or analysis.unproven()):
            options.step("comparing")
            from onnxshrink.examine import examine  # brings all that runs models

            equivalence, excuse = examine(source, staged.path if staged else small.model, form.plan, options)
            small, note = (small, note) if excuse is None else (None, excuse)
        final = source.again() if small is None else small.model
        if small is None:
            staged = _stage(source, final, options, stack)
        told = _report(source, analysis, form, small, equivalence, note)
        result = ShrinkResult(final, told, form.plan, external=source.external, sources=source.files)
        options.step("writing")
        if options.report is not None:
            stack.enter_context(save.replacing(Path(options.report))).write(told.to_json().encode())
        if staged is not None:
            staged.commit()
            result.adopt(staged.target)
    return result


def _stage(source: Source, model: LazyModel, options: Options, stack: contextlib.ExitStack) -> save.Staged | None:
    """The model complete on disk, beside the output, if there is to be one."""
    if options.output is None:
        return None
    return stack.enter_context(stage(model, options.output, external=source.external, sources=source.files))


def lookup_for(probe: int, functions: Mapping[str, ReplaceFunction] | None, samples: int = DEFAULT_SAMPLES) -> Lookup:
    """Where the rules come from; `samples` are drawn for operators that have a function and no rule.

    Raises InputError.
    """
    lookup: Lookup = prober(probe) if probe else rule_of
    if not functions:
        return lookup
    from onnxshrink.replacement import replacer

    return replacer(functions, probe or samples, lookup)


# --- what comes in -------------------------------------------------------------------------------------------------


def check_targets(model: ModelLike, masks: object, output: PathLike | None, report: PathLike | None) -> None:
    """Find out before any work is done that the results could not be written."""
    given = {"the model": model, "the masks": masks}
    files = {name: _real(value) for name, value in given.items() if isinstance(value, (str, os.PathLike))}
    if output is not None:
        target = _real(save.check_target(output, "output"))
        if target == files.get("the masks"):
            raise InputError(f"output {os.fspath(output)}: would overwrite the masks")
        files["the output"] = target
    if report is not None:
        target = _real(save.check_target(report, "report"))
        for name, file in files.items():
            if target == file:
                raise InputError(f"report {os.fspath(report)}: would overwrite {name}")


def _real(path: PathLike) -> Path:
    return Path(os.path.realpath(path))


# --- what goes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Form:
    """What is to be written: the plan, its model (None: the model as it came in), how fast it is, what to tell."""

    plan: Plan
    model: LazyModel | None
    latency: Latency | None = None
    note: str | None = None
    untimed: str | None = None


def choose_form(source: Source, analysis: Analysis, options: Options) -> Form:
    """What is to be written of a model with its facts. Raises what `shrink` raises."""
    align = options.align
    plan = make_plan(analysis, Alignment(align) if isinstance(align, int) else None)
    model = carry_out(analysis, plan)
    if align != "auto" or model is None:
        return Form(plan, model)
    from onnxshrink.speed.auto import choose

    def make(other: Plan) -> LazyModel | None:
        return model if other is plan else carry_out(analysis, other)

    fits = source.nbytes <= _TIMED_BYTES
    timing, inputs = options.timing and fits, options.inputs or {}
    found = choose(source.model, analysis, plan, make, timing=timing, inputs=inputs, seed=options.seed)
    if found.plan is None:
        return Form(plan, None, None, found.note)
    untimed = "the model is too large to hold several forms of it" if options.timing and not fits else found.note
    return Form(found.plan, make(found.plan), found.latency, None, untimed)


def carry_out(analysis: Analysis, plan: Plan) -> LazyModel | None:
    """The smaller model, None when the plan does not make it smaller."""
    model = apply(analysis, plan)
    return model if _is_smaller(analysis, plan, model.proto) else None


@paused()
def _checked(form: Form, analysis: Analysis, external: bool) -> Graph | None:
    """The smaller model, if there is one. Raises OnnxshrinkError if it is invalid."""
    if form.model is None:
        return None
    try:
        _check(form.model.proto, analysis.graph)
        small = Graph(form.model)
    except (InputError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise OnnxshrinkError(f"the result would not be a valid model (a fault of onnxshrink): {reason}") from error
    if not external:
        small.model.load()  # weights that were read from one file fit in memory, and the caller's object may change
    return small


def _is_smaller(analysis: Analysis, plan: Plan, model: onnx.ModelProto) -> bool:
    before, after = measure.weights(analysis.graph.proto), measure.weights(model)
    if after.parameters < before.parameters or after.bytes < before.bytes:
        return True
    nodes = measure.count_nodes(analysis.graph.skeleton.graph), measure.count_nodes(model.graph)
    return nodes[1] < nodes[0] and after == before and _removes(analysis, plan)


def _removes(analysis: Analysis, plan: Plan) -> bool:
    """Whether more goes than arithmetic on shapes, which is constant without any pruning."""
    return any(
        name not in plan.present and analysis.graph.dtype(name) not in (np.dtype(np.int64), np.dtype(np.bool_))
        for node in analysis.nodes()
        for name in node.outputs
        if name
    )


_FAULTS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


def _check(model: onnx.ModelProto, source: Graph) -> None:
    """Check the result in full; where the checker finds fault with the input too, that is not held against it."""
    try:
        # Without the weights' data, of which the checker would make two copies.
        onnx.checker.check_model(make_skeleton(model), full_check=True)
    except _FAULTS as error:
        try:
            onnx.checker.check_model(source.skeleton, full_check=True)
        except type(error):
            return
        raise


def _report(
    source: Source,
    analysis: Analysis,
    form: Form,
    small: Graph | None,
    equivalence: Equivalence | None,
    note: str | None,
) -> Report:
    before, fixed = _size(source.graph, source.nbytes)
    after = before if small is None else _size(small, size(small.model))[0]
    made = make_report(__version__, (before, after), fixed, analysis, form.plan, small, equivalence, note)
    latency = form.latency if small is not None else None
    return replace(made, zeroed=source.zeroed, latency=latency, untimed=form.untimed)


def _size(graph: Graph, nbytes: int) -> tuple[measure.Size, bool]:
    operations, fixed = measure.multiply_adds(graph)
    nodes = measure.count_nodes(graph.skeleton.graph)
    return measure.Size(measure.parameters(graph.proto), nbytes, operations, nodes), fixed

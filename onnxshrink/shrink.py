"""The whole path: load, mask, analyse, plan, apply, verify, save."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from onnxshrink import measure, save
from onnxshrink.analyse import Analysis, analyse
from onnxshrink.apply import apply
from onnxshrink.errors import InputError, OnnxshrinkError
from onnxshrink.graph import Graph, ModelLike, load_proto, make_skeleton
from onnxshrink.masks import MaskTree, apply_masks, load_masks, zero_near
from onnxshrink.plan import Plan, make_plan
from onnxshrink.planning.align import Alignment, check_align
from onnxshrink.probe import DEFAULT_SAMPLES, prober
from onnxshrink.registry import Lookup, rule_of
from onnxshrink.replacement import ReplaceFunction, replacer
from onnxshrink.report import Report, make_report
from onnxshrink.runtime import LoadError
from onnxshrink.speed.latency import Latency
from onnxshrink.verify import Equivalence, OutputsDiffer, amplification
from onnxshrink.verify import verify as compare
from onnxshrink.version import __version__
from onnxshrink.weights import Array, read_tensor

PathLike = str | os.PathLike[str]
# Models with more weights are not timed: several forms are in memory at once.
_TIMED_BYTES = 1 << 30
# An error counts as rounding that the model amplifies when it is within so many times what the rounding of the inputs
# alone does to the outputs: every layer rounds too, and its sums are taken in another order.
_AMPLIFIED = 30.0
# Rounding alone makes a few hundredths of the limit. Where the outputs differ by more than the first share of it, and
# the rounding of the inputs' last bit alone makes more than the second, other inputs may well be beyond the limit.
_DOUBTFUL, _UNSTABLE = 0.2, 0.5


@dataclass(frozen=True, eq=False)
class ShrinkResult:
    """A shrunk model.

    Attributes:
        model: the result, with all its weights; an equal copy of the (masked) input when nothing could be removed.
        report: what was removed, what stayed and why.
        plan: which indices of which tensor stay.
    """

    model: onnx.ModelProto
    report: Report
    plan: Plan
    _external: bool = field(default=False, repr=False)
    _sources: frozenset[Path] = field(default=frozenset(), repr=False)

    def save(self, path: PathLike) -> None:
        """Write the model, whole or not at all; an existing file is replaced.

        Weights go to a file of their own beside it, `NAME.data`, when the input had such or beyond 2 GB.

        Raises InputError when the file cannot be written; what was there is then untouched.
        """
        target = save.check_target(path, "output")
        in_place = Path(os.path.realpath(target)) in self._sources
        keep = frozenset() if in_place else self._sources
        save.write_model(self.model, target, external=self._external, keep=keep)


@dataclass(frozen=True, eq=False)
class Source:
    """What comes in.

    Attributes:
        model: the masked model, or the path of one without masks: what the result is compared with.
        graph: its graph.
        nbytes: of the model as it was stored.
        files: every file that it was read from.
        external: whether it had weights in files of their own.
    """

    model: ModelLike
    graph: Graph
    nbytes: int
    files: frozenset[Path]
    external: bool


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
    _check_targets(model, masks, output, report)
    step("reading")
    own = tuple(replace_functions or ())
    source, zeroed = _zeroed(_load(model, masks, own), zero_tolerance, own)
    step("analysing")
    analysis = analyse(source.graph, lookup_for(probe, replace_functions))
    private = masks is not None or zeroed > 0
    options = Options(verify, inputs, samples, seed, align, timing, zeroed, private, step)
    result = conclude(source, analysis, options)
    step("writing")
    if output is not None:
        result.save(output)
    if report is not None:
        save.write_text(result.report.to_json(), Path(report))
    return result


@dataclass(frozen=True, eq=False)
class Options:
    """How to finish once the facts are there; as in `shrink`, and:

    Attributes:
        zeroed: how many weights near zero were set to zero.
        private: whether nobody else holds the model that came in.
    """

    verify: bool = True
    inputs: Mapping[str, Array] | None = None
    samples: int = 2
    seed: int = 0
    align: str | int = "none"
    timing: bool = True
    zeroed: int = 0
    private: bool = False
    step: Callable[[str], None] = lambda name: None


def conclude(source: Source, analysis: Analysis, options: Options) -> ShrinkResult:
    """The result for a model with its facts: planned, cut, compared. Raises what `shrink` raises."""
    inputs, samples, seed = options.inputs, options.samples, options.seed
    options.step("cutting")
    form = _choose(source, analysis, options.align, options.timing, inputs or {}, seed)
    small, equivalence, note = _checked(form, analysis), None, form.note
    if small is not None and (options.verify or analysis.unproven()):
        options.step("comparing")
        equivalence, excuse = _examine(source, small, form.plan, inputs, samples, seed)
        small, note = (small, note) if excuse is None else (None, excuse)
    final = _whole(source, options.private) if small is None else small.proto
    told = _report(source, analysis, form, small, equivalence, note, options.zeroed)
    return ShrinkResult(final, told, form.plan, source.external, source.files)


def lookup_for(probe: int, functions: Mapping[str, ReplaceFunction] | None, samples: int = DEFAULT_SAMPLES) -> Lookup:
    """Where the rules come from; `samples` are drawn for operators that have a function and no rule.

    Raises InputError.
    """
    lookup: Lookup = prober(probe) if probe else rule_of
    return replacer(functions, probe or samples, lookup) if functions else lookup


def open_model(model: onnx.ModelProto, keep: Collection[str] = ()) -> Source:
    """A model that nobody else changes, as `conclude` takes it; `keep` as in `Graph`. Raises InputError."""
    return _load(model, None, keep)


# --- what comes in -------------------------------------------------------------------------------------------------


def _check_targets(model: ModelLike, masks: object, output: PathLike | None, report: PathLike | None) -> None:
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


def _load(model: ModelLike, masks: MaskTree | PathLike | None, keep: Collection[str]) -> Source:
    if masks is None:
        graph, reference = Graph(model, keep), model
        data = _data_files(graph.proto, graph.folder)
    else:
        proto, folder = load_proto(model)
        data = _data_files(proto, folder)
        tree = load_masks(os.fspath(masks)) if isinstance(masks, (str, os.PathLike)) else masks
        reference = apply_masks(_with_data(proto, folder), tree)
        graph = Graph(reference, keep)
    if isinstance(model, onnx.ModelProto):
        return Source(reference, graph, _nbytes(model), frozenset(), False)
    files = frozenset({_real(model), *data})
    return Source(reference, graph, sum(file.stat().st_size for file in files), files, bool(data))


def _zeroed(source: Source, tolerance: float, keep: Collection[str]) -> tuple[Source, int]:
    """The source with weights near zero set to zero, and how many they were."""
    if tolerance == 0:
        return source, 0
    model, zeroed = zero_near(source.graph.proto, tolerance, source.graph.folder)
    if not zeroed:
        return source, 0
    model = _with_data(model, source.graph.folder)
    return replace(source, model=model, graph=Graph(model, keep)), zeroed


def _data_files(model: onnx.ModelProto, folder: Path | None) -> set[Path]:
    return set() if folder is None else save.data_files(model, folder)


def _with_data(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """The same model, its weights read in from their files. Raises InputError."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            values = onnx.numpy_helper.from_array(read_tensor(tensor, folder), tensor.name)
            tensor.raw_data = values.raw_data
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return model


def _whole(source: Source, private: bool) -> onnx.ModelProto:
    """The model as it came in, with all its weights, in an object that nobody else holds."""
    if private or not isinstance(source.model, onnx.ModelProto):
        return _with_data(source.graph.proto, source.graph.folder)
    copy = onnx.ModelProto()
    copy.CopyFrom(source.model)
    return copy


def _nbytes(model: onnx.ModelProto) -> int:
    weights = measure.weights(model).bytes
    return weights if weights > save.LARGEST else model.ByteSize()


# --- what goes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Form:
    """What is to be written: the plan, its model (None: the model as it came in), how fast it is, what to tell."""

    plan: Plan
    model: onnx.ModelProto | None
    latency: Latency | None = None
    note: str | None = None
    untimed: str | None = None


def _choose(
    source: Source, analysis: Analysis, align: str | int, timing: bool, inputs: Mapping[str, Array], seed: int
) -> _Form:
    plan = make_plan(analysis, Alignment(align) if isinstance(align, int) else None)
    model = _carry_out(analysis, plan)
    if align != "auto" or model is None:
        return _Form(plan, model)
    from onnxshrink.speed.auto import choose

    def carry_out(other: Plan) -> onnx.ModelProto | None:
        return model if other is plan else _carry_out(analysis, other)

    fits = source.nbytes <= _TIMED_BYTES
    found = choose(source.model, analysis, plan, carry_out, timing=timing and fits, inputs=inputs, seed=seed)
    if found.plan is None:
        return _Form(plan, None, None, found.note)
    untimed = "the model is too large to hold several forms of it" if timing and not fits else found.note
    return _Form(found.plan, carry_out(found.plan), found.latency, None, untimed)


def _carry_out(analysis: Analysis, plan: Plan) -> onnx.ModelProto | None:
    """The smaller model, None when the plan does not make it smaller."""
    model = apply(analysis, plan)
    return model if _is_smaller(analysis, plan, model) else None


def _checked(form: _Form, analysis: Analysis) -> Graph | None:
    """The smaller model, if there is one. Raises OnnxshrinkError if it is invalid."""
    if form.model is None:
        return None
    try:
        _check(form.model, analysis.graph)
        return Graph(form.model)
    except (InputError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise OnnxshrinkError(f"the result would not be a valid model (a fault of onnxshrink): {reason}") from error


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


def _examine(
    source: Source, small: Graph, plan: Plan, inputs: Mapping[str, Array] | None, samples: int, seed: int
) -> tuple[Equivalence | None, str | None]:
    """The comparison; or why it says nothing. Raises OutputsDiffer where the outputs differ without an excuse."""
    try:
        equivalence = _verify(source, small, plan, inputs, samples, seed)
    except OutputsDiffer as error:
        note = _excuse(source, error, inputs, samples, seed)
        if note is None:
            raise
        return None, note
    if equivalence.error > _DOUBTFUL * equivalence.limit:
        moved = amplification(source.model, inputs=inputs, samples=samples, seed=seed)
        if moved > _UNSTABLE * equivalence.limit:
            return None, _amplified(equivalence.error, moved, "the model")
    return equivalence, None


def _verify(
    source: Source, small: Graph, plan: Plan, inputs: Mapping[str, Array] | None, samples: int, seed: int
) -> Equivalence:
    kept = {name: axes for name, axes in plan.kept.items() if name in plan.present}
    try:
        return compare(source.model, small.proto, inputs=inputs, samples=samples, seed=seed, kept=kept)
    except LoadError as error:
        if error.label == "reference":
            raise
        raise OnnxshrinkError(f"onnxruntime does not take the result (a fault of onnxshrink): {error}") from error


def _excuse(
    source: Source, error: OutputsDiffer, inputs: Mapping[str, Array] | None, samples: int, seed: int
) -> str | None:
    """Why a difference is rounding and no fault: the model does as much to a change of its inputs' last bit."""
    if error.equivalence is None or error.divergence is None:
        return None
    moved = amplification(source.model, inputs=inputs, samples=samples, seed=seed)
    if error.equivalence.error > _AMPLIFIED * moved:
        return None
    return _amplified(error.equivalence.error, moved, error.divergence.node or error.divergence.tensor)


def _amplified(error: float, moved: float, culprit: str) -> str:
    return (
        f"rounding differences are amplified to the limit or beyond it by {culprit} "
        f"({error:.1e} of the range; a change in the inputs' last bit makes {moved:.1e}); "
        "pass --no-verify (in Python, verify=False) to shrink anyway"
    )


def _report(
    source: Source,
    analysis: Analysis,
    form: _Form,
    small: Graph | None,
    equivalence: Equivalence | None,
    note: str | None,
    zeroed: int,
) -> Report:
    graph = source.graph
    before, fixed = _size(graph, source.nbytes)
    after = before if small is None else _size(small, _nbytes(small.proto))[0]
    made = make_report(__version__, (before, after), fixed, analysis, form.plan, small, equivalence, note)
    return replace(made, zeroed=zeroed, latency=form.latency if small is not None else None, untimed=form.untimed)


def _size(graph: Graph, nbytes: int) -> tuple[measure.Size, bool]:
    operations, fixed = measure.multiply_adds(graph)
    nodes = measure.count_nodes(graph.skeleton.graph)
    return measure.Size(measure.parameters(graph.proto), nbytes, operations, nodes), fixed

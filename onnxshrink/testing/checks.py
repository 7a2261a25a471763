"""The three checkers: what is claimed forward, what is claimed backward, and the smaller model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxshrink.analyse import Analysis, analyse
from onnxshrink.apply import apply
from onnxshrink.graph import Graph
from onnxshrink.plan import Plan, make_plan
from onnxshrink.planning.align import Alignment
from onnxshrink.testing.running import (
    Feed,
    InputsCannotRun,
    RuleViolation,
    compare,
    error_of,
    extent_of,
    is_floating,
    rounding_of,
    run,
    run_every_tensor,
    shuffled,
    with_fixed,
)
from onnxshrink.weights import Array, BoolArray

# A known value was computed in double precision and rounded once; the kernel rounds at every step of a short sum.
_KNOWN_ROUNDINGS = 64
# Kernels do the same operations in the same order on what is needed; but a normalised constant is its bias only up to
# rounding, which an unneeded scale multiplies.
_UNNEEDED_ROUNDINGS = 64


@dataclass(frozen=True)
class Shrinkage:
    """What a shrink removed: floating-point parameters before and after, and indices taken from computed tensors.

    `unfinished`: a second run would remove more. Facts are worked out once, and what has left may make more of them.
    """

    before: int
    after: int
    indices: int = 0
    unfinished: bool = False

    @property
    def removed(self) -> int:
        """Parameters that left."""
        return self.before - self.after


# --- forward ----------------------------------------------------------------------------------------------------


def check_forward(
    model: onnx.ModelProto,
    inputs: Feed,
    fixed: Iterable[str] = (),
    of: Collection[str] | None = None,
    draws: int = 3,
) -> int:
    """Whatever the inputs are, every element claimed known holds its value, within a frame of zeros if so claimed.

    Args:
        model: the model.
        inputs: a value for each input; their elements are drawn again in another order.
        fixed: inputs that become constants.
        of: tensors whose claims are counted; all are checked.
        draws: how often.

    Returns:
        the number of elements claimed known.

    Raises:
        RuleViolation: one of them does not.
        InputsCannotRun: onnxruntime does not run the model.
    """
    model = with_fixed(model, inputs, fixed)
    feeds = [dict(inputs), *[shuffled(inputs, seed) for seed in range(1, draws)]]
    runs = run_every_tensor(model, feeds)
    analysis = analyse(Graph(model))
    claimed = 0
    for values in runs:
        counts = {name: _check_known(analysis, model, name, values) for name in values}
        claimed = sum(count for name, count in counts.items() if of is None or name in of)
        for name in analysis.framed:
            _check_framed(analysis, model, name, values[name])
        for name in analysis.lines:
            _check_line(analysis, model, name, values[name])
    return claimed


def _check_known(analysis: Analysis, model: onnx.ModelProto, name: str, values: Mapping[str, Array]) -> int:
    actual = values[name]
    if name in analysis.derived:
        mask, value = np.array(True), analysis.constants[name].array()
    elif name in analysis.known:
        mask, value = analysis.known[name].mask, analysis.known[name].value
        if mask.ndim != actual.ndim:
            raise RuleViolation(f"{_where(model, name)}: a fact of {mask.ndim} axes for {actual.ndim}")
    else:
        return 0
    try:
        mask, value = np.broadcast_to(mask, actual.shape), np.broadcast_to(value, actual.shape)
    except ValueError:
        raise RuleViolation(f"{_where(model, name)}: a fact of shape {value.shape} for {actual.shape}") from None
    checked = mask & ~np.isnan(actual) if is_floating(actual) and _reads_infinities(model, name, values) else mask
    error = error_of(value[checked], actual[checked])
    bound = _KNOWN_ROUNDINGS * rounding_of(actual) * extent_of(actual)
    if error > bound:
        raise RuleViolation(f"{_where(model, name)}: an element claimed known differs by {error:.3g}")
    return int(mask.sum())


def _check_framed(analysis: Analysis, model: onnx.ModelProto, name: str, actual: Array) -> None:
    """Elements with one value within a frame hold that or zero, at the same positions in every channel."""
    framed = analysis.framed[name]
    value = np.broadcast_to(framed.value.astype(np.float64), actual.shape)
    claimed = np.broadcast_to(framed.nonzero(), actual.shape)
    inside = np.divide(actual, value, out=np.full(actual.shape, np.nan), where=claimed)
    found = inside[claimed]
    error = np.minimum(np.abs(found), np.abs(found - 1)).max(initial=0.0)
    if error > _KNOWN_ROUNDINGS * rounding_of(actual):
        raise RuleViolation(f"{_where(model, name)}: an element claimed framed is neither zero nor its value")
    channels = [c for c in np.moveaxis(inside, 1, 0) if not np.isnan(c).any()]
    if any((np.round(c) != np.round(channels[0])).any() for c in channels):
        raise RuleViolation(f"{_where(model, name)}: the frame differs between channels")


def _check_line(analysis: Analysis, model: onnx.ModelProto, name: str, actual: Array) -> None:
    """Indices that follow one number per position are what their slopes and offsets make of the host's."""
    line = analysis.lines[name]
    found = np.moveaxis(actual.astype(np.float64), line.axis, -1)
    number = (found[..., line.host] - line.offset[line.host]) / line.slope[line.host]
    expected = number[..., None] * line.slope[line.mask] + line.offset[line.mask]
    error = np.abs(found[..., line.mask] - expected).max(initial=0.0)
    if error > _KNOWN_ROUNDINGS * rounding_of(actual) * extent_of(actual):
        raise RuleViolation(f"{_where(model, name)}: an index claimed to follow another one differs by {error:.3g}")


def _reads_infinities(model: onnx.ModelProto, name: str, values: Mapping[str, Array]) -> bool:
    """Whether a computed tensor is made of values that are not finite: nothing is promised about those."""
    sources = [source for node in model.graph.node if name in node.output for source in node.input]
    arrays = [values[source] for source in sources if source in values]
    return any(is_floating(array) and not np.isfinite(array).all() for array in arrays)


def _where(model: onnx.ModelProto, name: str) -> str:
    for node in model.graph.node:
        if name in node.output:
            return f"{node.op_type} {node.name!r}, output {name!r}"
    return repr(name)


# --- backward ---------------------------------------------------------------------------------------------------


def check_backward(
    model: onnx.ModelProto,
    inputs: Feed,
    fixed: Iterable[str] = (),
    of: Collection[str] | None = None,
    draws: int = 2,
) -> int:
    """With noise in every element claimed unneeded, in all tensors at once, no finite output moves.

    Arguments and errors are those of `check_forward`.

    Returns:
        the number of elements claimed unneeded (and not known).
    """
    model = with_fixed(model, inputs, fixed)
    feeds = [dict(inputs), *[shuffled(inputs, seed) for seed in range(1, draws)]]
    expected = run(model, feeds)
    shapes = run_every_tensor(model, feeds[:1])[0]
    shapes.update({value.name: inputs[value.name] for value in model.graph.input if value.name in inputs})
    analysis = analyse(Graph(model))
    unneeded = {name: mask for name, value in shapes.items() if (mask := _unneeded(analysis, name, value)).any()}
    if not unneeded:
        return 0
    noisy = _with_noise(model, {name: (mask, shapes[name]) for name, mask in unneeded.items()})
    for before, after in zip(expected, run(noisy, feeds), strict=True):
        for value, a, b in zip(model.graph.output, before, after, strict=True):
            finite = np.isfinite(a) if is_floating(a) else np.ones(a.shape, np.bool_)
            error = error_of(a[finite], b[finite])
            if error > _UNNEEDED_ROUNDINGS * rounding_of(a) * extent_of(a):
                raise RuleViolation(f"output {value.name!r} moves by {error:.3g} with {sorted(unneeded)}, not needed")
    return sum(int(mask.sum()) for name, mask in unneeded.items() if of is None or name in of)


def _unneeded(analysis: Analysis, name: str, value: Array) -> BoolArray:
    """Elements of a computed tensor of floats that may hold anything."""
    if not is_floating(value) or name in analysis.constants or analysis.graph.shape(name) is None:
        return np.zeros(value.shape, np.bool_)
    needed = analysis.needed.get(name, np.zeros((1,) * value.ndim, np.bool_))
    known = analysis.known.get(name)
    kept = needed if known is None else needed | known.mask
    try:
        return np.array(~np.broadcast_to(kept, value.shape))
    except ValueError:
        raise RuleViolation(f"{name!r}: a fact of shape {kept.shape} for {value.shape}") from None


def _with_noise(model: onnx.ModelProto, places: Mapping[str, tuple[BoolArray, Array]]) -> onnx.ModelProto:
    """The model with `Where(mask, noise, tensor)` between some tensors and whoever reads them."""
    rng = np.random.default_rng(0)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    known = {value.name for value in model.graph.input}
    for name in places:
        if name in known:
            result.graph.node.append(_noise_node(result, name, f"{name}_noisy", *places[name], rng=rng))
    for node in model.graph.node:
        copy = result.graph.node.add()
        copy.CopyFrom(node)
        for slot, name in enumerate(node.input):
            copy.input[slot] = f"{name}_noisy" if name in places and name in known else name
        for index, name in enumerate(node.output):
            if name in places:
                copy.output[index] = f"{name}_clean"
                result.graph.node.append(_noise_node(result, f"{name}_clean", name, *places[name], rng=rng))
    return result


def _noise_node(
    model: onnx.ModelProto, source: str, target: str, mask: BoolArray, value: Array, rng: np.random.Generator
) -> onnx.NodeProto:
    noise = (rng.standard_normal(value.shape) * 3).astype(value.dtype)
    model.graph.initializer.append(numpy_helper.from_array(mask, f"{target}_where_noise"))
    model.graph.initializer.append(numpy_helper.from_array(noise, f"{target}_noise_values"))
    return helper.make_node("Where", [f"{target}_where_noise", f"{target}_noise_values", source], [target])


# --- shrink -----------------------------------------------------------------------------------------------------


def shrink_model(model: onnx.ModelProto, align: int = 1) -> tuple[onnx.ModelProto, Plan]:
    """The smaller model and its plan, unverified; widths are multiples of `align` where they can be."""
    analysis = analyse(Graph(model))
    plan = make_plan(analysis, Alignment(align) if align > 1 else None)
    return apply(analysis, plan).whole(), plan


def parameters(model: onnx.ModelProto) -> int:
    """Floating-point elements in initializers and `Constant` nodes of the main graph; scalars are not counted."""
    tensors = [*model.graph.initializer]
    tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    sizes = [int(np.prod(t.dims, dtype=np.int64)) for t in tensors if t.data_type in floats]
    return sum(size for size in sizes if size > 1)


def check_shrink(
    model: onnx.ModelProto,
    inputs: Feed | Sequence[Feed],
    fixed: Iterable[str] = (),
    of: Collection[str] | None = None,
    again: bool = True,
    align: int = 1,
) -> Shrinkage:
    """The smaller model is valid, has the same interface, is not larger, and gives the same outputs.

    Args:
        model: the model.
        inputs: values for each input; one or several sets.
        fixed: inputs that become constants.
        of: tensors whose indices are counted.
        again: shrink the result once more and raise if that makes it smaller; else it is only told.
        align: multiple that widths are raised to.

    Raises:
        RuleViolation: any of this does not hold.
        InputsCannotRun: onnxruntime does not run the model, or its outputs are not finite.
    """
    feeds: list[Feed] = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    model = with_fixed(model, feeds[0], fixed)
    expected = run(model, feeds)
    if not all(np.isfinite(value).all() for values in expected for value in values if is_floating(value)):
        raise InputsCannotRun("the outputs are not finite")
    small, plan = shrink_model(model, align)
    _check_form(model, small)
    _check_outputs(model, small, feeds, expected)
    if parameters(small) > parameters(model):
        # As `shrink` does: what would grow stays as it is.
        return Shrinkage(parameters(model), parameters(model))
    result = Shrinkage(parameters(model), parameters(small), _indices(plan, of))
    twice = parameters(shrink_model(small, align)[0])
    if again and twice < result.after:
        raise RuleViolation(f"{result.before} parameters shrink to {result.after}, and those to {twice}")
    return replace(result, unfinished=twice < result.after)


def _invalid(model: onnx.ModelProto) -> str | None:
    """Why a model is not valid; None when it is."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _check_form(model: onnx.ModelProto, small: onnx.ModelProto) -> None:
    reason = _invalid(small)
    # onnx's own inference fails on some valid models; then that of the result may fail too.
    if reason is not None and _invalid(model) is None:
        raise RuleViolation(f"the result is not a valid model: {reason}")
    fixed = {tensor.name for tensor in model.graph.initializer}
    for side in ("input", "output"):
        before, after = (
            [v.SerializeToString(deterministic=True) for v in getattr(m.graph, side) if v.name not in fixed]
            for m in (model, small)
        )
        if before != after:
            raise RuleViolation(f"the {side}s of the model have changed")


def _check_outputs(
    model: onnx.ModelProto, small: onnx.ModelProto, feeds: Sequence[Feed], expected: Sequence[Sequence[Array]]
) -> None:
    try:
        actual = run(small, feeds)
    except InputsCannotRun as error:
        raise RuleViolation(f"the result does not run: {error}") from None
    worst = _worst(model, expected, actual, expected)
    if worst is None:
        return
    noisy = [run(model, feeds, optimised=True), *_nearby(model, feeds)]
    worst = _worst(model, expected, actual, *noisy)
    if worst is not None:
        raise RuleViolation(worst)


def _worst(
    model: onnx.ModelProto, expected: Sequence[Sequence[Array]], actual: Sequence[Sequence[Array]], *noisy: Any
) -> str | None:
    """The first output beyond its bound, in words."""
    for run_index, values in enumerate(expected):
        for index, value in enumerate(values):
            noise = max(compare(value, other[run_index][index])[0] for other in noisy)
            error, bound = compare(value, actual[run_index][index], noise)
            if error > bound:
                name = model.graph.output[index].name
                return f"output {name!r} differs by {error:.3g}, more than {bound:.3g} (noise {noise:.2g})"
    return None


def _nearby(model: onnx.ModelProto, feeds: Sequence[Feed]) -> list[list[list[Array]]]:
    """Outputs with every weight and input one rounding away: how well the function is conditioned."""
    results = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        moved = onnx.ModelProto()
        moved.CopyFrom(model)
        for tensor in moved.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(_rounded(numpy_helper.to_array(tensor), rng), tensor.name))
        results.append(run(moved, [{name: _rounded(a, rng) for name, a in feed.items()} for feed in feeds]))
    return results


def _rounded(array: Array, rng: np.random.Generator) -> Array:
    if not is_floating(array):
        return array
    return np.asarray(array * (1 + rounding_of(array) * rng.choice([-0.5, 0.5], array.shape))).astype(array.dtype)


def _indices(plan: Plan, of: Collection[str] | None) -> int:
    """Indices taken from computed tensors; a tensor that is gone counts as one."""
    names = [name for name in plan.kept if of is None or name in of]
    gone = sum(name not in plan.present for name in names)
    kept = [mask for name in names if name in plan.present for mask in plan.kept[name] if mask is not None]
    return gone + sum(int((~mask).sum()) for mask in kept)

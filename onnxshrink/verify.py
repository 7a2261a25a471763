"""Do two models compute the same function? onnxruntime runs both, and the reference's own rounding sets the bound."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxshrink.errors import DifferenceError, InputError
from onnxshrink.graph import ModelLike
from onnxshrink.inputs import Feed, PartError, RunError, draw_runnable, fixed_sizes
from onnxshrink.roles import Array, Input, describe, fed
from onnxshrink.runtime import Model, Session, load_error
from onnxshrink.segments import StreamedSession, make_session, open_session

Kept = Mapping[str, Sequence[Array | None]]

# The least bound, as a share of an output's range, by element type: what re-associated sums of a deep network may
# differ by even where the reference happens to agree with itself to the last bit.
FLOORS = {
    "double": 1e-10,  # rounding is 1e-16; the rest is room for sums that cancel, far below any change of a weight
    "float": 1e-5,  # about 80 roundings of 1.2e-7: a hundred layers deep, measured errors stay near 1e-6
    "float16": 1e-2,  # about 10 roundings of 1e-3
    "bfloat16": 5e-2,  # about 6 roundings of 8e-3
}
NOISE_FACTOR = 10.0  # another order of summation is as good as the one that the noise was measured with, within this
WORST_LIMIT = 0.1  # a reference that differs from itself by more than this proves nothing, so nothing passes on it

_CHUNK = 128  # intermediate tensors that one run exposes: bounds the memory that a search for a divergence takes
_ROUNDINGS = 4  # ways to round the inputs that `amplification` tries


@dataclass(frozen=True)
class Divergence:
    """The first tensor that differs: its error relative to its range, its noise, and its node ("Op name")."""

    tensor: str
    error: float
    noise: float
    node: str | None


@dataclass(frozen=True)
class Equivalence:
    """How closely two models agree.

    `error` is the worst absolute difference divided by the output's range (its largest magnitude, 1 if that is 0), over
    all outputs and samples; for integers, the share of elements that differ. `noise` is the same figure for the
    reference against itself, graph optimisations on against off; `multiple` is error / max(noise, floor); `absolute` is
    the worst absolute difference. `limit` is the bound on `error`: max(floor, min(10 * noise, 0.1)), with a floor of
    1e-5 for float32, 1e-2 for float16, 5e-2 for bfloat16, 1e-10 for double (1e-5 where weights are float32) and 0 for
    everything else. Where outputs have several element types, the figures are of the type closest to its limit.
    """

    error: float
    noise: float
    multiple: float
    absolute: float
    samples: int
    outputs: int
    limit: float


class OutputsDiffer(DifferenceError):  # noqa: N818 - reads as what it says
    """The outputs (or the interfaces) of two models differ."""

    def __init__(
        self, message: str, equivalence: Equivalence | None = None, divergence: Divergence | None = None
    ) -> None:
        super().__init__(message)
        self.equivalence = equivalence
        self.divergence = divergence


def verify(
    reference: ModelLike,
    candidate: ModelLike,
    *,
    inputs: Mapping[str, Array] | None = None,
    samples: int = 2,
    seed: int = 0,
    kept: Kept | None = None,
) -> Equivalence:
    """Run both models on the same inputs and raise unless they agree; the figures are those of `Equivalence`.

    Inputs missing from `inputs` are drawn at random, `samples` times, free dimensions in different sizes. `kept` tells
    which indices of each axis of the reference's intermediate tensors the candidate still has (None: all), so that the
    first diverging tensor can be found among tensors that shrank.

    Raises OutputsDiffer (a DifferenceError) when interfaces or outputs differ, InputError when a model or input cannot
    be used. The models are not changed.
    """
    if samples < 1:
        raise InputError(f"samples must be at least 1, not {samples}")
    with tempfile.TemporaryDirectory() as folder:
        first = Model(reference, "reference", Path(folder, "reference"))
        second = Model(candidate, "candidate", Path(folder, "candidate"))
        _check_interface(first.light.graph, second.light.graph)
        return _compare(first, second, inputs or {}, samples, seed, kept or {})


def amplification(
    reference: ModelLike, *, inputs: Mapping[str, Array] | None = None, samples: int = 2, seed: int = 0
) -> float:
    """How far the outputs move, relative to their range, when each float input moves by one unit in its last place.

    The inputs are those that `verify` runs on. A model for which this is large rounds so badly that its outputs do not
    tell another order of summation from a wrong weight.
    """
    given = inputs or {}
    with tempfile.TemporaryDirectory() as folder:
        model = Model(reference, "reference", Path(folder, "reference"))
        described = describe(model.light)
        samples = 1 if all(item.name in given for item in described) else samples
        session, runs = _draw(model, described, given, samples, seed)
        moved = [_moved(session, feed, outputs, np.random.default_rng(seed)) for feed, outputs in runs]
        return max(moved)


def _draw(
    model: Model, described: list[Input], given: Mapping[str, Array], samples: int, seed: int
) -> tuple[Session | StreamedSession, list[tuple[Feed, list[Any]]]]:
    """A session, and sets of inputs that it accepts with their outputs. Raises InputError."""
    session = open_session(model)
    try:
        return session, draw_runnable(described, given, session.run, samples, seed)
    except PartError as error:
        raise load_error(model, error) from error


def _moved(session: Session | StreamedSession, feed: Feed, outputs: list[Any], rng: np.random.Generator) -> float:
    """The largest movement of an output, over a few ways to round the inputs."""
    nudged = [{name: _nudged(value, rng) for name, value in feed.items()} for _ in range(_ROUNDINGS)]
    moved = session.run_all(nudged)
    return max((_difference(a, b)[0] for other in moved for a, b in zip(outputs, other, strict=True)), default=0.0)


def _nudged(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, list):
        return [_nudged(item, rng) for item in value]
    if value.dtype.kind != "f":
        return value
    return np.nextafter(value, rng.choice(np.array([-np.inf, np.inf], value.dtype), value.shape))


def _compare(
    reference: Model, candidate: Model, given: Mapping[str, Array], samples: int, seed: int, kept: Kept
) -> Equivalence:
    """One session at a time is alive, so that a model of several gigabytes is in memory once."""
    described = describe(reference.light)
    fixed_sizes(described, given)
    if all(item.name in given for item in described):
        samples = 1
    session, runs = _draw(reference, described, given, samples, seed)
    floors = [_floor(kind, reference.single) for kind in session.types]
    names = session.names
    del session
    feeds, expected = [feed for feed, _ in runs], [outputs for _, outputs in runs]
    plain = _reference_noise(reference, feeds)
    actual = _candidate_outputs(candidate, feeds)
    scores = [
        _Score(name, sample, floor, *_difference(a, b), noise=_difference(a, c)[0])
        for sample, sets in enumerate(zip(expected, actual, plain or expected, strict=True))
        for name, floor, a, b, c in zip(names, floors, *sets, strict=True)
    ]
    result, worst = _summary(scores, samples, len(names))
    if result.error <= result.limit:
        return result
    search = _Search(reference, candidate, feeds[worst.sample], kept, optimised=plain is None)
    divergence = search.first() or worst.divergence(candidate.light.graph)
    raise OutputsDiffer(_message(result, worst, divergence), result, divergence)


def _message(result: Equivalence, worst: _Score, divergence: Divergence) -> str:
    figure = worst.reason or f"by {result.error:.2e} of the range"
    where = f"'{divergence.tensor}'" + (f" of {divergence.node}" if divergence.node else "")
    return (
        f"output '{worst.name}' differs: {figure} (limit {result.limit:.2e}, the reference's own noise "
        f"{result.noise:.2e}); first tensor that diverges: {where}, by {divergence.error:.2e}"
    )


# ------------------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True)
class _Score:
    """One output of one sample."""

    name: str
    sample: int
    floor: float
    error: float
    absolute: float
    reason: str
    noise: float

    def divergence(self, graph: onnx.GraphProto) -> Divergence:
        return Divergence(self.name, self.error, self.noise, _producers(graph).get(self.name))


def _limit(floor: float, noise: float) -> float:
    return max(floor, min(NOISE_FACTOR * noise, WORST_LIMIT))


def _summary(scores: list[_Score], samples: int, outputs: int) -> tuple[Equivalence, _Score]:
    """The figures of the element type that is closest to its limit, and the score that decided."""
    ranked = []
    for floor in {score.floor for score in scores}:
        group = [score for score in scores if score.floor == floor]
        worst, noise = max(group, key=lambda s: s.error), max(s.noise for s in group)
        absolute, limit = max(s.absolute for s in group), _limit(floor, noise)
        multiple = _ratio(worst.error, max(noise, floor))
        result = Equivalence(worst.error, noise, multiple, absolute, samples, outputs, limit)
        ranked.append((_ratio(worst.error, limit), result, worst))
    _, result, worst = max(ranked, key=lambda r: r[0])
    return result, worst


def _ratio(error: float, unit: float) -> float:
    return error / unit if unit else (float("inf") if error else 0.0)


def _floor(kind: str, single: bool) -> float:
    """The least bound for an onnxruntime type such as `seq(tensor(float))`; a double made of floats is no better."""
    element = re.findall(r"\w+", kind)[-1]
    return FLOORS.get("float" if element == "double" and single else element, 0.0)


def _difference(a: Any, b: Any) -> tuple[float, float, str]:
    """(error, absolute difference, why they cannot be compared or are not finite), over all parts of an output."""
    parts, others = _parts(a), _parts(b)
    if len(parts) != len(others):
        return np.inf, np.inf, f"{len(parts)} elements became {len(others)}"
    pairs = [_array_difference(x, y) for x, y in zip(parts, others, strict=True)]
    return max(pairs, key=lambda p: p[0], default=(0.0, 0.0, ""))


def _parts(value: Any) -> list[Array]:
    """The arrays that an output is made of: a tensor, a sequence, a map (keys, then values), an absent optional."""
    if value is None:
        return []
    if isinstance(value, list):
        return [part for item in value for part in _parts(item)]
    if isinstance(value, dict):
        return [np.array(list(value)), np.array(list(value.values()))]
    return [np.asarray(value)]


def _array_difference(a: Array, b: Array) -> tuple[float, float, str]:
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf, np.inf, f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
    if not a.size:
        return 0.0, 0.0, ""
    if a.dtype.kind != "f":
        different = a != b
        absolute = np.abs(a.astype(float) - b.astype(float)).max() if a.dtype.kind in "iu" else float(different.any())
        return float(different.mean()), float(absolute), ""
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
        return np.inf, np.inf, "infinite or NaN at other positions"
    x, y = x[finite], y[finite]
    absolute = float(np.abs(x - y).max(initial=0.0))
    return absolute / (float(np.abs(x).max(initial=0.0)) or 1.0), absolute, ""


# ------------------------------------------------------------------------------------------------- running both


def _reference_noise(reference: Model, feeds: Sequence[Feed]) -> list[list[Any]] | None:
    """The outputs with graph optimisations off; None where onnxruntime has no kernel for the plain graph."""
    try:
        return make_session(reference, optimised=False).run_all(feeds)
    except RunError:
        return None


def _candidate_outputs(candidate: Model, feeds: Sequence[Feed]) -> list[list[Any]]:
    session = open_session(candidate)
    try:
        return session.run_all(feeds)
    except PartError as error:
        raise load_error(candidate, error) from error
    except RunError as error:
        raise OutputsDiffer(f"the candidate model does not run where the reference does: {error}") from error


def _check_interface(reference: onnx.GraphProto, candidate: onnx.GraphProto) -> None:
    sides = (("input", fed(reference), fed(candidate)), ("output", reference.output, candidate.output))
    for side, before, after in sides:
        texts = [_signature(v) for v in before], [_signature(v) for v in after]
        for old, new in zip_longest(*texts, fillvalue="nothing"):
            if old != new:
                raise OutputsDiffer(f"the interface differs: {side} {old} became {new}")


def _signature(value: onnx.ValueInfoProto) -> str:
    return f"'{value.name}' {_type_text(value.type)}"


def _type_text(kind: onnx.TypeProto) -> str:
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, which)
        dims = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
        element = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        return f"{element}[{', '.join(dims)}]" if tensor.HasField("shape") else element
    if which in ("sequence_type", "optional_type"):
        return f"{which.removesuffix('_type')} of {_type_text(getattr(kind, which).elem_type)}"
    return " ".join(str(kind).split())


# ---------------------------------------------------------------------------------------------- the first divergence


def _producers(graph: onnx.GraphProto) -> dict[str, str]:
    """The tensors that nodes compute, in topological order, each with its node."""
    return {
        name: f"{node.op_type} {node.name}".strip()
        for node in graph.node
        for name in node.output
        if name and node.op_type != "Constant"
    }


@dataclass(frozen=True)
class _Search:
    """Looks for the first tensor of the candidate, in topological order, that differs from the reference's."""

    reference: Model
    candidate: Model
    feed: Feed
    kept: Kept
    optimised: bool

    def first(self) -> Divergence | None:
        producers = _producers(self.candidate.light.graph)
        shared = producers.keys() & _producers(self.reference.light.graph).keys()
        names = [name for name in producers if name in shared]
        for start in range(0, len(names), _CHUNK):
            for found in self._among(names[start : start + _CHUNK]):
                return Divergence(*found, producers[found[0]])
        return None

    def _among(self, names: list[str]) -> Iterator[tuple[str, float, float]]:
        """(name, error, noise) of those that differ; where a tensor cannot be an output, without it."""
        try:
            yield from self._compared(names)
        except RunError:
            middle = len(names) // 2
            if middle:
                yield from self._among(names[:middle])
                yield from self._among(names[middle:])

    def _compared(self, names: list[str]) -> list[tuple[str, float, float]]:
        before, floors = self._values(self.reference, names, self.optimised)
        after, _ = self._values(self.candidate, names, self.optimised)
        # Integers (floor 0) are shapes more often than not, and those are meant to shrink.
        same = [n for n in names if floors[n] and np.shape(before[n]) == np.shape(after[n])]
        errors = {n: _difference(before[n], after[n])[0] for n in same}
        suspects = [n for n in same if errors[n] > floors[n]]
        if not suspects:
            return []
        again, _ = self._values(self.reference, suspects, True)
        noises = {n: _difference(before[n], again[n])[0] for n in suspects}
        return [(n, errors[n], noises[n]) for n in suspects if errors[n] > _limit(floors[n], noises[n])]

    def _values(self, model: Model, names: list[str], optimised: bool) -> tuple[dict[str, Any], dict[str, float]]:
        """The named tensors, of the reference the indices that are kept, and the floors of their types."""
        outputs = {value.name for value in model.light.graph.output}
        session = make_session(model, optimised, [name for name in names if name not in outputs])
        values = dict(zip(session.names, session.run(self.feed), strict=True))
        if model is self.reference:
            values = {name: _sliced(value, self.kept.get(name)) for name, value in values.items()}
        return values, {n: _floor(t, self.reference.single) for n, t in zip(session.names, session.types, strict=True)}


def _sliced(value: Any, kept: Sequence[Array | None] | None) -> Any:
    """What the candidate still has of the reference's tensor; the value as it is where the indices do not fit it."""
    if kept is None or not isinstance(value, np.ndarray) or len(kept) != value.ndim:
        return value
    for axis, indices in enumerate(kept):
        if indices is None:
            continue
        where = np.flatnonzero(indices) if np.asarray(indices).dtype == bool else np.asarray(indices)
        if where.size and where.max() >= value.shape[axis]:
            return value
        value = np.take(value, where, axis)
    return value

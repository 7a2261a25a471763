"""Cases for the checkers: onnx's own one-node models, set between dead slices."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxshrink.testing.checks import check_backward, check_forward, check_shrink
from onnxshrink.testing.running import Feed, InputsCannotRun, RuleViolation, compare, is_floating, run
from onnxshrink.weights import Array

# The newest opset that onnxruntime is sure to run.
_NEWEST_OPSET = 26


@dataclass(frozen=True, eq=False)
class Case:
    """A model and inputs for it; `expected` are the outputs, where they are known."""

    name: str
    model: onnx.ModelProto
    inputs: Feed
    expected: Sequence[Array] | None = None


@dataclass
class Tally:
    """What `check_rule` saw: checks that ran and that could not, and in how many of them there was each claim."""

    ran: int = 0
    skipped: int = 0
    known: int = 0
    unneeded: int = 0
    shrunk: int = 0
    claiming: set[str] = field(default_factory=set)
    cases: set[str] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        """Count what another tally has seen."""
        self.ran += other.ran
        self.skipped += other.skipped
        self.known += other.known
        self.unneeded += other.unneeded
        self.shrunk += other.shrunk
        self.claiming |= other.claiming
        self.cases |= other.cases


# --- onnx's own cases -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _collected() -> dict[tuple[str, str], list[Case]]:
    from onnx.backend.test.case.node import collect_testcases

    found: dict[tuple[str, str], list[Case]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    for case in collected:
        if case.model is None or len(case.model.graph.node) != 1 or not case.data_sets:
            continue
        inputs, outputs = case.data_sets[0]
        names = [value.name for value in case.model.graph.input]
        if len(names) != len(inputs) or not all(isinstance(value, np.ndarray) for value in (*inputs, *outputs)):
            continue
        node = case.model.graph.node[0]
        domain = "" if node.domain == "ai.onnx" else node.domain
        made = Case(case.name, case.model, dict(zip(names, inputs, strict=True)), list(outputs))
        found.setdefault((domain, node.op_type), []).append(made)
    return found


def node_cases(op_type: str | None = None, domain: str = "") -> list[Case]:
    """onnx's one-node test cases, of one operator or of all."""
    if op_type is None:
        return [case for cases in _collected().values() for case in cases]
    return list(_collected().get((domain, op_type), ()))


def make_case(
    node: onnx.NodeProto,
    inputs: Feed,
    functions: Iterable[onnx.FunctionProto] = (),
    opsets: Mapping[str, int] = MappingProxyType({"": 17}),
) -> Case:
    """A case of one node, for operators that onnx has none of.

    Args:
        node: the node.
        inputs: a value for each of its inputs, by name.
        functions: model-local functions, such as the one that the node calls.
        opsets: versions by domain; a domain of the node or of a function that is missing is at version 1.

    Raises:
        InputsCannotRun: onnxruntime does not run it.
    """
    model = onnx.ModelProto(ir_version=8)
    model.functions.extend(functions)
    versions = {node.domain: 1, **{function.domain: 1 for function in model.functions}, **opsets}
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    model.graph.name = node.op_type
    model.graph.node.append(node)
    for name, array in inputs.items():
        code = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.input.append(helper.make_tensor_value_info(name, code, array.shape))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
    (results,) = run(model, [inputs])
    for value, array in zip(model.graph.output, results, strict=True):
        code = helper.np_dtype_to_tensor_dtype(array.dtype)
        value.CopyFrom(helper.make_tensor_value_info(value.name, code, array.shape))
    return Case(node.name or node.op_type, model, dict(inputs), results)


def at_opset(case: Case, version: int | None = None) -> Case | None:
    """The case at an opset that onnxruntime runs, None when there is none or when it means something else there.

    Without `version`: the newest opset at which the operator is what it is in the case.
    """
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = min(max(model.ir_version, 7), 10) if version is None else 7
    opset = next((entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is None:
        return None
    opset.version = _newest_version(model.graph.node[0], opset.version) if version is None else version
    moved = Case(case.name if version is None else f"{case.name} at {version}", model, case.inputs, case.expected)
    return moved if _as_expected(moved) else None


def _newest_version(node: onnx.NodeProto, version: int) -> int:
    if node.domain not in ("", "ai.onnx"):
        return min(version, _NEWEST_OPSET)
    for newest in range(_NEWEST_OPSET, version, -1):
        if onnx.defs.get_schema(node.op_type, newest, "").since_version <= version:
            return newest
    return min(version, _NEWEST_OPSET)


def _as_expected(case: Case) -> bool:
    try:
        onnx.checker.check_model(case.model)
        (results,) = run(case.model, [case.inputs])
    except (InputsCannotRun, onnx.checker.ValidationError):
        return False
    if case.expected is None:
        return True
    pairs = zip(results, case.expected, strict=False)
    # onnx's expected values come from numpy, so a hundred times the rounding error of a kernel is still the same.
    return all(a.shape == b.shape and compare(a, b.astype(a.dtype))[0] <= 100 * compare(a, a)[1] for a, b in pairs)


# --- dead slices around a model ---------------------------------------------------------------------------------


class _Frame:
    """The model being put between what makes its inputs and what reads its outputs."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.rng = np.random.default_rng(seed)
        self.before: list[onnx.NodeProto] = []
        self.after: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.feed: dict[str, Array] = {}
        self.weights: list[onnx.TensorProto] = []
        self.free = self.rng.random() < 0.3

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def constant(self, name: str, array: Array) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def feed_input(self, name: str, array: Array) -> str:
        """A graph input; with free extents, equal numbers share a symbol."""
        self.feed[name] = array
        dims = [
            f"d{extent}" if self.free and axis == 0 and extent > 1 else extent
            for axis, extent in enumerate(array.shape)
        ]
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), dims))
        return name

    def dead(self, extent: int) -> Array:
        """Which indices of an axis are dead: some, sometimes none, never all."""
        mask = self.rng.random(extent) < self.rng.choice([0.0, 0.5, 0.5, 0.7])
        mask[int(self.rng.integers(extent))] = False
        return np.asarray(mask)

    def axis(self, rank: int) -> int:
        """An axis, most often that of channels."""
        return 1 if rank > 1 and self.chance(0.75) else int(self.rng.integers(rank))

    def along(self, vector: Array, axis: int, rank: int, dtype: np.dtype[np.generic]) -> Array:
        return vector.reshape([-1 if a == axis else 1 for a in range(rank)]).astype(dtype)

    # --- inputs ---

    def put_input(self, name: str, array: Array, first: bool) -> None:
        if not is_floating(array) or array.size == 0:
            if self.chance(0.7):
                self.constant(name, array)
            else:
                self.feed_input(name, array)
            return
        array = np.nan_to_num(array, nan=1.0, posinf=1.0, neginf=-1.0)
        roles = ["grown", "killed", "free", "constant"]
        role = self.rng.choice(roles, p=[0.6, 0.25, 0.1, 0.05] if first else [0.15, 0.1, 0.1, 0.65])
        if array.ndim == 0 and role in ("grown", "killed"):
            role = "free"
        {"grown": self.grow, "killed": self.kill, "constant": self.fix, "free": self.feed_input}[str(role)](name, array)

    def fix(self, name: str, array: Array) -> str:
        """A weight with dead slices."""
        if array.ndim:
            axis = int(self.rng.integers(min(array.ndim, 2) if self.chance(0.8) else array.ndim))
            array = np.where(self.along(self.dead(array.shape[axis]), axis, array.ndim, np.dtype(np.bool_)), 0, array)
        return self.constant(name, array.astype(self.case.inputs[name].dtype))

    def kill(self, name: str, array: Array) -> str:
        """`x * keep + value`: elements of a slice hold a constant."""
        axis = self.axis(array.ndim)
        keep = ~self.dead(array.shape[axis])
        value = np.where(keep, 0, self.rng.choice(array.reshape(-1), keep.size))
        if self.chance(0.4):
            value = np.zeros_like(value)
        self._affine(name, self.feed_input(f"{name}_fed", array), keep, value, axis, array)
        return name

    def grow(self, name: str, array: Array) -> str:
        """`x[..., :1, ...] * w + b`: an axis that nothing but weights makes, so that its dead indices can leave."""
        axis = self.axis(array.ndim)
        dead = self.dead(array.shape[axis])
        weights = np.where(dead, 0, self.rng.uniform(0.5, 1.0, dead.size))
        value = np.where(dead, self.rng.choice(array.reshape(-1), dead.size), 0)
        if self.chance(0.4):
            value = np.zeros_like(value)
        source = self.feed_input(f"{name}_fed", array.take([0], axis))
        self._affine(name, source, weights, value, axis, array)
        return name

    def _affine(self, name: str, source: str, scale: Array, value: Array, axis: int, array: Array) -> None:
        factor, offset = (self.along(v, axis, array.ndim, array.dtype) for v in (scale, value))
        scaled = name if not value.any() else f"{name}_scaled"
        self.before.append(helper.make_node("Mul", [source, self.constant(f"{name}_scale", factor)], [scaled]))
        if value.any():
            self.before.append(helper.make_node("Add", [scaled, self.constant(f"{name}_value", offset)], [name]))

    # --- outputs ---

    def put_output(self, value: onnx.ValueInfoProto, array: Array) -> None:
        name = value.name
        if not is_floating(array) or array.ndim == 0 or array.size == 0 or self.chance(0.15):
            self._declare(name, array, array.shape)
        elif array.ndim == 1 or self.chance(0.3):
            axis = self.axis(array.ndim)
            mask = self.along(~self.dead(array.shape[axis]), axis, array.ndim, array.dtype)
            self.after.append(helper.make_node("Mul", [name, self.constant(f"{name}_mask", mask)], [f"{name}_masked"]))
            self._declare(f"{name}_masked", array, array.shape)
        else:
            self._contract(name, array)

    def _contract(self, name: str, array: Array) -> None:
        """A product along a random axis, with zero rows."""
        axis = self.axis(array.ndim)
        order = [a for a in range(array.ndim) if a != axis] + [axis]
        weights = self.rng.standard_normal((array.shape[axis], 2)).astype(array.dtype)
        weights[self.dead(array.shape[axis])] = 0
        self.after.append(helper.make_node("Transpose", [name], [f"{name}_moved"], perm=order))
        names = [f"{name}_moved", self.constant(f"{name}_weights", weights)]
        self.after.append(helper.make_node("MatMul", names, [f"{name}_product"]))
        self._declare(f"{name}_product", array, [*(array.shape[a] for a in order[:-1]), 2])

    def _declare(self, name: str, array: Array, shape: Sequence[int]) -> None:
        """A graph output; of free extents the rank alone is told, unless shape inference finds more."""
        dims = [None] * len(shape) if self.free else list(shape)
        code = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.outputs.append(helper.make_tensor_value_info(name, code, dims))

    def model(self) -> onnx.ModelProto:
        source = self.case.model
        weights = [*source.graph.initializer, *self.weights]
        nodes = [*self.before, *source.graph.node, *self.after]
        graph = helper.make_graph(nodes, "framed", self.inputs, self.outputs, weights)
        model = helper.make_model(graph, opset_imports=list(source.opset_import), ir_version=source.ir_version)
        model.functions.extend(source.functions)
        return onnx.shape_inference.infer_shapes(model)


def embed(case: Case, seed: int) -> Case:
    """The model of a case between producers and readers with dead slices, drawn from a seed.

    An input becomes a weight with dead slices, or is made from a graph input by an elementwise product and sum, so that
    some of its slices hold a constant; an output is masked, or multiplied with weights that have zero rows.

    Raises:
        InputsCannotRun: onnxruntime does not run the case itself.
    """
    frame = _Frame(case, seed)
    (results,) = run(case.model, [case.inputs])
    fed = {value.name for value in case.model.graph.input}
    for index, value in enumerate(case.model.graph.input):
        if value.name in fed and value.name in case.inputs:
            frame.put_input(value.name, np.asarray(case.inputs[value.name]), first=index == 0)
    chosen = [i for i in range(len(results)) if i == seed % len(results) or frame.chance(0.7)]
    for index in chosen:
        frame.put_output(case.model.graph.output[index], results[index])
    try:
        model = frame.model()
    except onnx.shape_inference.InferenceError as error:
        raise InputsCannotRun(f"shape inference: {error}") from None
    return Case(f"{case.name} #{seed}", model, frame.feed)


# --- all obligations --------------------------------------------------------------------------------------------


def check_rule(
    op_type: str, domain: str = "", cases: Iterable[Case] | None = None, seeds: Iterable[int] = range(3)
) -> Tally:
    """The three obligations on many cases of one operator.

    Args:
        op_type, domain: the operator.
        cases: cases to check; without, onnx's own for the operator, as far as onnxruntime runs them.
        seeds: each case is embedded once per seed.

    Raises:
        RuleViolation: a claim is wrong; the message names the case.
    """
    tally = Tally()
    if cases is None:
        cases = [moved for case in node_cases(op_type, domain) if (moved := at_opset(case)) is not None]
    for case, seed in ((case, seed) for case in cases for seed in seeds):
        try:
            _check(embed(case, seed), case, tally)
        except InputsCannotRun:
            tally.skipped += 1
        except RuleViolation as error:
            raise RuleViolation(f"{case.name}, seed {seed}: {error}") from error
    return tally


def _check(embedded: Case, case: Case, tally: Tally) -> None:
    run(embedded.model, [embedded.inputs])
    node = case.model.graph.node[0]
    claims = list(_claims(embedded, {*node.input}, {*node.output}, tally))
    tally.ran += 1
    tally.cases.add(case.name)
    if any(claims):
        tally.claiming.add(case.name)


def _claims(case: Case, inputs: set[str], outputs: set[str], tally: Tally) -> Iterator[int]:
    known = check_forward(case.model, case.inputs, of=outputs)
    tally.known += known > 0
    yield known
    unneeded = check_backward(case.model, case.inputs, of=inputs)
    tally.unneeded += unneeded > 0
    yield unneeded
    try:
        removed = check_shrink(case.model, case.inputs, of=inputs | outputs, again=False)
    except InputsCannotRun:
        return
    tally.shrunk += removed.indices > 0
    yield removed.indices

"""Prune a module at random, export it, shrink it, and hold the result against what it came from."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

import onnxshrink
from onnxshrink.analyse import Analysis, analyse
from onnxshrink.facts import project
from onnxshrink.graph import Graph
from onnxshrink.measure import parameters
from onnxshrink.plan import Plan

Array = npt.NDArray[Any]
Feed = dict[str, Array]
FLOOR, NOISE_FACTOR = 1e-5, 20.0
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})
PROJECTIONS = {"qkv": 3, "kv": 2, "q": 1, "k": 1, "v": 1}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Variant:
    """How a module is pruned and exported.

    Attributes:
        dynamo: which of the two exporters.
        free: axes of the input that are free dimensions.
        together: whether all layers of one width lose the same rows, as along a residual stream.
        silent: whether biases and shifts of pruned rows are zero too.
        fold: whether the exporter may fold BatchNorm in convolutions.
    """

    dynamo: bool = True
    free: tuple[int, ...] = ()
    together: bool = True
    silent: bool = False
    fold: bool = True
    seed: int = 0

    def __str__(self) -> str:
        words = ["dynamo" if self.dynamo else "traced", "together" if self.together else "apart"]
        words += ["silent"] * self.silent + [f"free{''.join(map(str, self.free))}"] * bool(self.free)
        return "-".join([*words, *["norms"] * (not self.fold), *[f"seed{self.seed}"] * (self.seed > 0)])


@dataclass
class Finding:
    """What shrinking one model came to.

    Attributes:
        before: parameters.
        after: parameters of the result.
        again: parameters when the result is shrunk once more.
        error: of the outputs, relative to their range; `noise` is the model's own.
        extra: per tensor, how many channels are kept beyond the live ones, with the reasons.
    """

    before: int = 0
    after: int = 0
    again: int = 0
    error: float = 0.0
    noise: float = 0.0
    extra: dict[str, tuple[int, str]] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    stays: list[str] = field(default_factory=list)
    nodes: tuple[int, int] = (0, 0)

    @property
    def exact(self) -> bool:
        """Whether the outputs agree."""
        return self.error <= max(FLOOR, NOISE_FACTOR * self.noise)


def prune(module: nn.Module, variant: Variant) -> nn.Module:
    """The module in evaluation mode with other statistics than the initial ones, half of most layers' rows zero."""
    generator = torch.Generator().manual_seed(variant.seed + 7)
    with torch.no_grad():
        for name, part in module.named_modules():
            _unsettle(part, generator)
            if name.split(".")[-1] != "head":
                if isinstance(part, (nn.LSTM, nn.GRU)):
                    _silence_units(part, _dead_rows(name, part.hidden_size, variant, 1))
                for axis, weights, vectors in _layers(part):
                    dead = _dead_rows(name, weights[0].shape[axis], variant, getattr(module, "rows_per_block", 1))
                    parts = _parts(module, name)
                    if parts is not None and variant.together:
                        dead = _dead_heads(weights[0].shape[axis], *parts)
                    for weight in weights:
                        weight.index_fill_(axis, dead, 0.0)
                    for vector in vectors if variant.silent else ():
                        vector.index_fill_(0, dead, 0.0)
        if variant.silent:
            _silence_norms(module)
    return module.eval()


def _unsettle(part: nn.Module, generator: torch.Generator) -> None:
    if isinstance(part, NORMS):
        part.weight.uniform_(0.5, 1.5, generator=generator)
        part.bias.normal_(0, 0.3, generator=generator)
    if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
        part.running_mean.normal_(0, 0.3, generator=generator)
        part.running_var.uniform_(0.5, 1.5, generator=generator)
    bias = getattr(part, "bias", None)
    if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)) and bias is not None:
        bias.normal_(0, 0.3, generator=generator)


def _silence_units(part: nn.LSTM | nn.GRU, dead: torch.Tensor) -> None:
    """Hidden units that stay at zero: no weight of any gate, in either direction."""
    gates = part.weight_hh_l0.shape[0] // part.hidden_size
    rows = (torch.arange(gates)[:, None] * part.hidden_size + dead).flatten()
    for weight in part.parameters():
        weight.index_fill_(0, rows, 0.0)


def _layers(part: nn.Module) -> Iterator[tuple[int, list[torch.Tensor], list[torch.Tensor]]]:
    """Axis of the outputs, weights, and biases."""
    if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        weight = part.parametrizations.weight.original1 if hasattr(part, "parametrizations") else part.weight
        yield 0, [weight], [part.bias] if part.bias is not None else []
    elif isinstance(part, nn.ConvTranspose2d) and part.groups == 1:
        yield 1, [part.weight], [part.bias] if part.bias is not None else []


def _dead_rows(name: str, count: int, variant: Variant, block: int) -> torch.Tensor:
    """Half of the rows, in blocks where a module says that rows live and die together."""
    key = str(count) if variant.together else name
    rng = np.random.default_rng([variant.seed, zlib.crc32(key.encode())])
    first = np.sort(rng.permutation(count // block)[: count // block // 2]) * block
    return torch.as_tensor((first[:, None] + np.arange(block)).reshape(-1))


def _parts(module: nn.Module, name: str) -> tuple[int, int] | None:
    """Of a layer that makes queries, keys or values: how many of these, and how many heads of each."""
    path = name.removesuffix(".linear").split(".")
    path = path[:-1] if path[-1].isdigit() else path
    last = path[-1] if path else ""
    if last not in PROJECTIONS:
        return None
    parent = module.get_submodule(".".join(path[:-1]))
    return 1 if hasattr(parent, "keys") else PROJECTIONS[last], getattr(parent, "heads", 4)


def _dead_heads(count: int, parts: int, heads: int) -> torch.Tensor:
    """The rows of every other head, and the last half of the dimensions of the rest."""
    grid = torch.zeros(parts, heads, count // parts // heads, dtype=torch.bool)
    grid[:, ::2] = True
    if grid.shape[2] < 8:  # else queries, keys and values share this axis
        grid[:, :, grid.shape[2] // 2 :] = True
    return grid.flatten().nonzero().flatten()


def _silence_norms(module: nn.Module) -> None:
    """Shift and mean of a BatchNorm are zero where the layer in front of it is silent."""
    before: torch.Tensor | None = None
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            before = part.weight
        elif isinstance(part, nn.BatchNorm2d) and before is not None and before.shape[0] == part.num_features:
            dead = ~before.flatten(1).any(1)
            part.bias[dead], part.running_mean[dead], before = 0.0, 0.0, None  # type: ignore[index]


def export(module: nn.Module, shapes: tuple[tuple[int, ...], ...], variant: Variant) -> onnx.ModelProto:
    """The ONNX model."""
    inputs = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes)
    names = [f"x{i}" for i in range(len(shapes))]
    buffer = io.BytesIO()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        if variant.dynamo:
            free = tuple(dict.fromkeys(variant.free, torch.export.Dim.DYNAMIC) for _ in shapes)
            program = torch.onnx.export(
                module, inputs, input_names=names, dynamo=True, dynamic_shapes=free, optimize=variant.fold
            )
            return program.model_proto
        axes = {name: {axis: f"d{axis}" for axis in variant.free} for name in names}
        mode = torch.onnx.TrainingMode.EVAL if variant.fold else torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(
            module,
            inputs,
            buffer,
            input_names=names,
            dynamo=False,
            dynamic_axes=axes,
            opset_version=17,
            training=mode,
            do_constant_folding=variant.fold,
        )
    return onnx.load_from_string(buffer.getvalue())


def _session(model: onnx.ModelProto, optimised: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(shapes: tuple[tuple[int, ...], ...], variant: Variant, grow: Callable[[int, int], int]) -> list[Feed]:
    """Random inputs: of the exported size, and of another where a dimension is free."""
    rng = np.random.default_rng(variant.seed)
    others = [tuple(grow(a, n) if a in variant.free else n for a, n in enumerate(shape)) for shape in shapes]
    sizes = [shapes, others]
    return [{f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(size)} for size in sizes]


def compare(model: onnx.ModelProto, small: onnx.ModelProto, inputs: list[Feed]) -> tuple[float, float]:
    """Error and noise, relative to the range of the output."""
    error = noise = 0.0
    sessions = [_session(model, True), _session(small, True), _session(model, False)]
    for feed in inputs:
        for a, b, c in zip(*(session.run(None, feed) for session in sessions), strict=True):
            if a.shape != b.shape or (not np.isfinite(b).all() and np.isfinite(a).all()):
                return float("inf"), noise
            scale = float(np.abs(a).max()) or 1.0
            error = max(error, float(np.abs(a - b).max()) / scale)
            noise = max(noise, float(np.abs(a - c).max()) / scale)
    return error, noise


def check(model: onnx.ModelProto, inputs: list[Feed]) -> Finding:
    """Shrink and measure."""
    result = onnxshrink.shrink(model, verify=False, align="none")
    again = onnxshrink.shrink(result.model, verify=False, align="none")
    finding = Finding(parameters(model), parameters(result.model), parameters(again.model))
    finding.nodes = (len(result.model.graph.node), len(again.model.graph.node))
    finding.error, finding.noise = compare(model, result.model, inputs)
    analysis = analyse(Graph(model))
    finding.extra = dict(extra(analysis, result.plan))
    finding.idle = idle(model, result.plan, inputs[:1] * 2)
    finding.stays = [f"{stay.channels} {stay.node}: {stay.reason}" for stay in result.report.stays]
    finding.stays += [f"refused {r.op} x{len(r.nodes)}: {r.reason}" for r in result.report.refusals]
    return finding


def extra(analysis: Analysis, plan: Plan) -> Iterator[tuple[str, tuple[int, str]]]:
    """Tensors of floats that keep more channels along an axis than hold a live element, and why."""
    outputs = set(analysis.graph.outputs)
    for name in sorted(plan.present):
        dtype = analysis.graph.dtype(name)
        if name in outputs or dtype is None or dtype.kind != "f":
            continue
        live = analysis.live(name)
        for axis, kept in enumerate(plan.kept[name]):
            if kept is None or not live.any():
                continue
            more = kept & ~project(live, axis, kept.size)
            if more.any():
                numbers = plan.cause[name][axis]
                assert numbers is not None
                reasons = {f"{plan.causes[n].node}: {plan.causes[n].reason}" for n in numbers[more].tolist() if n >= 0}
                yield f"{name}[{axis}]", (int(more.sum()), "; ".join(sorted(reasons)))


def idle(model: onnx.ModelProto, plan: Plan, inputs: list[Feed]) -> dict[str, int]:
    """How many kept channels turn out to be one constant for all positions of two different inputs."""
    outputs = {o.name for o in model.graph.output}
    made = [n.output[0] for n in model.graph.node if n.op_type in PRODUCTS]
    names = [name for name in made if name in plan.present and name not in outputs]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = _session(exposed, False)
    values: list[Mapping[str, Array]] = []
    for scale, feed in zip((1.0, -1.3), inputs, strict=True):
        scaled = {k: (v[..., ::-1] * scale).astype(v.dtype) for k, v in feed.items()}
        values.append(dict(zip(names, session.run(None, scaled), strict=True)))
    found = {}
    for name in names:
        first, second = values[0][name], values[1][name]
        if first.dtype.kind != "f":
            continue
        for axis, kept in enumerate(plan.kept[name]):
            if kept is None or first.shape[axis] != kept.size or kept.size < 3:
                continue
            rows = [np.moveaxis(v, axis, 0).reshape(kept.size, -1) for v in (first, second)]
            same = np.ptp(np.concatenate(rows, 1), axis=1) == 0
            if (same & kept).sum() > 1 and not same.all():
                found[f"{name}[{axis}]"] = int((same & kept).sum())
    return found


def sweep(build: Callable[[], nn.Module], shape: tuple[int, ...], variant: Variant) -> Finding:
    """Build, prune, export, shrink, compare. Free dimensions are tried at a second size, space at twice the size."""
    torch.manual_seed(variant.seed)
    model = export(prune(build(), variant), (shape,), variant)
    return check(model, feeds((shape,), variant, lambda axis, extent: extent * 2 if axis else extent + 1))

"""A cut module beside the masked one: do they compute the same, and if not, what in forward() did not follow."""

from __future__ import annotations

import inspect
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from onnxshrink.inputs import RunError
from onnxshrink.runtime import Model, Session
from onnxshrink.torch.layers import CHANNEL_NORMS, fit_to_input

# Shares of an output's range that rounding may make: those of the comparison of models, and for narrow types a few
# dozen of their roundings. Or so many times what a change in the last bit of the inputs makes.
_SHARES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_AMPLIFIED = 30.0
# Beyond this share a comparison says nothing, whatever rounding makes.
_MOST = 1e-2
# Another runtime sums in another order in every layer; another module differs by far more.
_OTHER_RUNTIME = 100.0

Call = tuple[str, int]  # a module, and how often it was called before


@dataclass(frozen=True, eq=False)
class Raised:
    """forward() raised an error.

    Attributes:
        path: the innermost module that was being called.
        calls: how many modules had been called by then.
        frames: files and lines of the stack, the innermost last.
        reason: the error, in one line.
    """

    path: str
    calls: int
    frames: tuple[tuple[str, int], ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Record:
    """What each call of the modules in question took first and gave first, in order."""

    taken: dict[Call, torch.Tensor] = field(default_factory=dict)
    given: dict[Call, torch.Tensor] = field(default_factory=dict)


class Inputs:
    """Arguments of a module: the example, and others like it."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.example = (args, dict(kwargs))

    def others(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The example itself, and one with other numbers; indices stay among those of the example."""
        yield self.example
        generator = torch.Generator().manual_seed(0)
        yield tree_map(lambda leaf: _redrawn(leaf, generator), self.example)

    def nudged(self, given: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same with the last bit of every number changed."""
        return tree_map(_nudged, given)  # type: ignore[no-any-return]


def _redrawn(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.numel() < 2:
        return leaf
    if leaf.is_floating_point():
        spread = leaf.detach().float()
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device)
        return (noise * (spread.std() + 1e-3) + spread.mean()).to(leaf.dtype)
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return leaf.detach().reshape(-1)[order].reshape(leaf.shape)


def _nudged(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.detach() * (1 + torch.finfo(leaf.dtype).eps)


def call(module: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> list[torch.Tensor]:
    """The tensors that a module gives for copies of some arguments."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, given)
    return [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def excess(expected: list[torch.Tensor], actual: list[torch.Tensor], nudged: list[torch.Tensor]) -> float:
    """The largest difference of two lists of outputs, in units of what rounding may make; infinite for other shapes."""
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in actual]:
        return float("inf")
    worst = 0.0
    for a, b, c in zip(expected, actual, nudged, strict=True):
        if not a.numel():
            continue
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        a, b, c = (tensor.detach().double() for tensor in (a, b, c))
        share = _SHARES.get(expected[0].dtype, 1e-5)
        finite = a[a.isfinite()].abs()
        extent = float(finite.max()) if finite.numel() else 1.0
        limit = max(share * extent, min(_AMPLIFIED * _distance(a, c), _MOST * extent), 1e-30)
        worst = max(worst, _distance(a, b) / limit)
    return worst


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; equal infinities and two that are no numbers do not differ."""
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs())
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def outputs_of(model: onnx.ModelProto, module: nn.Module, inputs: Inputs) -> list[torch.Tensor] | None:
    """What onnxruntime makes of the example; None when it is not clear which argument is which input, or on failure."""
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    tensors = _by_input(names, module, inputs)
    if tensors is None or any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
        return None
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            values = Session(Model(model, "result", Path(folder))).run(feed)
        except RunError:
            return None
    return [torch.from_numpy(np.asarray(value)) for value in values]


def _by_input(names: list[str], module: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor] | None:
    """The example's tensor for each input of a model: by position, or by the names of the parameters of forward()."""
    args, kwargs = inputs.example
    if not kwargs:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        return dict(zip(names, tensors, strict=True)) if len(names) == len(tensors) else None
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    given = {**given, **kwargs}
    found = {name: given[name] for name in names if isinstance(given.get(name), torch.Tensor)}
    return found if len(found) == len(names) else None


class Trial:
    """Runs of the masked module and of a cut one."""

    def __init__(self, masked: nn.Module, inputs: Inputs) -> None:
        self.masked = masked
        self.inputs = inputs

    def fit(self, small: nn.Module) -> Raised | None:
        """Let normalisations without weights follow what they are given; the error that forward() raises, if any."""
        handles = [
            part.register_forward_pre_hook(lambda layer, args: fit_to_input(layer, args[0]))
            for part in small.modules()
            if isinstance(part, (nn.GroupNorm, *CHANNEL_NORMS))
        ]
        try:
            return self._run(small)
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, small: nn.Module) -> Raised | None:
        stack: list[str] = []
        called: list[str] = []
        handles = []

        def enter(name: str) -> None:
            stack.append(name)
            called.append(name)

        for name, part in small.named_modules():
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            handles.append(part.register_forward_hook(lambda *_: stack.pop() and None))
        try:
            with torch.no_grad():
                call(small, self.inputs.example)
        except Exception as error:  # whatever forward() raises where a size is not what it was
            frames = traceback.extract_tb(error.__traceback__)
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            where = tuple((frame.filename, frame.lineno or 0) for frame in frames)
            return Raised(stack[-1] if stack else "", len(called), where, reason)
        finally:
            for handle in handles:
                handle.remove()
        return None

    def excess(self, small: nn.Module) -> float:
        """The largest difference in units of what rounding may make, over all inputs, with gradients and without."""
        worst = 0.0
        for given in self.inputs.others():
            with torch.no_grad():
                expected = self._reference(given)
                if expected is not None:
                    worst = max(worst, excess(expected[0], self._outputs(small, given), expected[1]))
            if given is self.inputs.example and expected is not None:
                # Some modules take another way while gradients are recorded.
                with torch.enable_grad():
                    worst = max(worst, excess(expected[0], self._outputs(small, given), expected[1]))
        return worst

    def _reference(self, given: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        """What the masked module gives, and what for inputs a bit off; None when it does not take them."""
        try:
            return call(self.masked, given), call(self.masked, self.inputs.nudged(given))
        except Exception:  # whatever forward() raises for inputs that are not the example
            if given is self.inputs.example:
                raise
            return None

    def _outputs(self, small: nn.Module, given: Any) -> list[torch.Tensor]:
        try:
            return call(small, given)
        except Exception:  # forward() may refuse other sizes on one of its ways only
            return []

    def repeats_itself(self) -> bool:
        """Whether the masked module gives the same each time."""
        with torch.no_grad():
            first, second = call(self.masked, self.inputs.example), call(self.masked, self.inputs.example)
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def agrees_with(self, small: nn.Module, model: onnx.ModelProto) -> bool:
        """Whether a model computes the same, as far as another runtime's rounding lets one tell."""
        expected = outputs_of(model, self.masked, self.inputs)
        if expected is None:
            return True
        with torch.no_grad():
            actual = [tensor.cpu() for tensor in call(small, self.inputs.example)]
            nudged = [tensor.cpu() for tensor in call(small, self.inputs.nudged(self.inputs.example))]
        return excess(actual, expected, nudged) <= _OTHER_RUNTIME

    def records(self, small: nn.Module, paths: set[str]) -> tuple[Record, Record]:
        """What each call of some modules took and gave, in both."""
        return self._record(self.masked, paths), self._record(small, paths)

    def _record(self, module: nn.Module, paths: set[str]) -> Record:
        record, counts, handles = Record(), defaultdict[str, int](int), []

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                key = (name, counts[name])
                counts[name] += 1
                for store, leaves in ((record.taken, tree_leaves(args)), (record.given, tree_leaves(output))):
                    found = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
                    if found is not None:
                        store[key] = found.detach().clone()

            return hook

        for name, part in module.named_modules():
            if name in paths:
                handles.append(part.register_forward_hook(note(name)))
        try:
            with torch.no_grad():
                call(module, self.inputs.example)
        finally:
            for handle in handles:
                handle.remove()
        return record

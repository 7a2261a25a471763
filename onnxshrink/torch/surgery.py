"""Cuts carried out on a copy of a module: parameters sliced, constants folded in biases, sizes that follow."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from onnxshrink.torch.cuts import Cuts
from onnxshrink.torch.layers import refit
from onnxshrink.weights import Array, BoolArray

REMOVED = "onnxshrink_removed"


def operate(module: nn.Module, cuts: Cuts) -> nn.Module:
    """A deep copy of `module`, cut.

    Every module that loses something of a parameter gets the attribute `onnxshrink_removed`: by parameter, one tuple of
    removed indices per axis.
    """
    small = copy.deepcopy(module)
    surgeon = _Surgeon(small, cuts)
    surgeon.fold()
    surgeon.slice()
    surgeon.add_biases()
    surgeon.correct()
    return small


class _Surgeon:
    def __init__(self, module: nn.Module, cuts: Cuts) -> None:
        self.cuts = cuts
        self.parts = dict(module.named_modules(remove_duplicate=False))
        self.tensors = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        self.names: defaultdict[int, list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            self.names[id(tensor)].append(name)

    def fold(self) -> None:
        """Constant features of recurrent layers, into the biases of their inputs."""
        for path, layers in self.cuts.folds.items():
            part = self.parts[path]
            for layer, fold in layers.items():
                for suffix in ("", "_reverse") if part.bidirectional else ("",):
                    weight = getattr(part, f"weight_ih_l{layer}{suffix}")
                    offset = weight.detach()[:, fold.indices].double() @ torch.from_numpy(fold.values).to(weight.device)
                    with torch.no_grad():
                        getattr(part, f"bias_ih_l{layer}{suffix}").copy_(
                            (getattr(part, f"bias_ih_l{layer}{suffix}").double() + offset).to(weight.dtype)
                        )

    def slice(self) -> None:
        """Every parameter and buffer, under all of its names."""
        for name, kept in self.cuts.kept.items():
            tensor, value = self.tensors[name], self.cuts.values.get(name)
            if value is not None:
                made = _like(tensor, value)
            elif all(mask.all() for mask in kept):
                continue
            else:
                made = _sliced(tensor.detach(), kept)
            made = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            for shared in self.names[id(tensor)]:
                path, _, leaf = shared.rpartition(".")
                setattr(self.parts[path], leaf, made)
                _note(self.parts[path], leaf, kept)

    def add_biases(self) -> None:
        """What constants add to the bias of a layer, which is made where there is none."""
        for path, value in self.cuts.biases.items():
            self._set_bias(path, lambda weight, value=value: _like(weight, value))  # type: ignore[misc]
        for path, offset in self.cuts.added.items():
            before = self.parts[path].bias
            start = before.detach().double() if before is not None else 0.0
            made = start + torch.from_numpy(offset.astype(np.float64)).to(self.parts[path].weight.device)
            self._set_bias(path, lambda weight, made=made: made.to(weight.dtype))  # type: ignore[misc]

    def _set_bias(self, path: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        part = self.parts[path]
        weight, before = part.weight, part.bias
        assert isinstance(weight, torch.Tensor)
        needs = before.requires_grad if isinstance(before, torch.Tensor) else weight.requires_grad
        part.bias = nn.Parameter(make(weight.detach()), needs)

    def correct(self) -> None:
        """Numbers of groups, divisors of norms, and sizes."""
        for path, groups in self.cuts.groups.items():
            part = self.parts[path]
            setattr(part, "num_groups" if isinstance(part, nn.GroupNorm) else "groups", groups)
        for path in self.cuts.scaled:
            self._scale(self.parts[path])
        for path, epsilon in self.cuts.epsilon.items():
            self.parts[path].eps = epsilon
        for part in self.parts.values():
            refit(part)

    def _scale(self, norm: nn.Module) -> None:
        """`k` of `C` elements are left, the others zero: `eps * C / k` and `weight * sqrt(C / k)` give the same."""
        assert isinstance(norm, nn.RMSNorm)
        ratio = norm.normalized_shape[-1] / norm.weight.shape[-1]
        epsilon = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
        norm.eps = epsilon * ratio
        with torch.no_grad():
            norm.weight.mul_(math.sqrt(ratio))


def _like(tensor: torch.Tensor, value: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value)).to(tensor.device, tensor.dtype)


def _sliced(tensor: torch.Tensor, kept: list[BoolArray]) -> torch.Tensor:
    for axis, mask in enumerate(kept):
        if not mask.all():
            tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device))
    return tensor.clone()


def _note(part: nn.Module, leaf: str, kept: list[BoolArray]) -> None:
    removed: dict[str, tuple[tuple[int, ...], ...]] = getattr(part, REMOVED, {})
    lost = tuple(tuple(np.flatnonzero(~mask).tolist()) for mask in kept)
    setattr(part, REMOVED, {**removed, leaf: lost})

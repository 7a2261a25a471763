"""Masks of activations: what enters or leaves a module, multiplied by ones and zeros."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from onnxshrink.errors import MaskError
from onnxshrink.facts import compress
from onnxshrink.mask_arrays import kept_elements, near_names

_NAME = re.compile(r"_(input|output)_(\w*)")


def is_activation_mask(name: str) -> bool:
    """Whether a mask's name, `module._input_NAME` or `module._output_0`, says that it is for an activation."""
    return _NAME.fullmatch(name.rpartition(".")[2]) is not None


def mask_activations(module: nn.Module, masks: Mapping[str, np.ndarray]) -> None:
    """Let every call of some parts of a module multiply what they take or give by masks; exporters write that down.

    An input goes by the name of its parameter of `forward` or by its position; an output by its position among the
    tensors that come out, or by its key where a dictionary does. A mask broadcasts against its activation; the batch,
    or whatever else is to stay a free dimension, is an axis of extent one or one along which it does not vary.

    Raises MaskError for an unknown module or input, values other than 0 and 1, and two different masks for one
    activation. What only a call can tell, such as another shape, is raised by the call.
    """
    parts = dict(module.named_modules(remove_duplicate=False))
    applied: dict[tuple[int, str], tuple[str, np.ndarray]] = {}
    for name, mask in masks.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in parts:
            raise MaskError(f"mask {name!r}: there is no module {owner!r}{near_names(owner, parts)}")
        kept = compress(kept_elements(name, np.asarray(mask), mask.shape))
        part, found = parts[owner], _NAME.fullmatch(leaf)
        assert found is not None
        key = found[2] if found[1] == "output" else _parameter(part, name, found[2])
        first, before = applied.setdefault((id(part), f"{found[1]} {key}"), (name, kept))
        if not np.array_equal(before, kept):
            raise MaskError(f"masks {first!r} and {name!r} differ, but they are for one activation")
        if first == name and not kept.all():
            attach = _mask_input if found[1] == "input" else _mask_output
            attach(part, name, key, _buffer(part, leaf, kept))


def _parameter(part: nn.Module, name: str, wish: str) -> str:
    """The parameter of a module's `forward` that a mask is for, by its name or position."""
    names = list(inspect.signature(part.forward).parameters)
    if wish in names:
        return wish
    if wish.isdigit() and int(wish) < len(names):
        return names[int(wish)]
    raise MaskError(f"mask {name!r}: {type(part).__name__} takes no input {wish!r}; its inputs are {', '.join(names)}")


def _buffer(part: nn.Module, leaf: str, kept: np.ndarray) -> str:
    """Keep a mask as a buffer, under a name that stays readable in the exported model; its name."""
    name = f"{leaf.lstrip('_')}_mask"
    part.register_buffer(name, torch.from_numpy(kept.astype(np.float32)), persistent=False)
    return name


def _mask_input(part: nn.Module, name: str, parameter: str, buffer: str) -> None:
    position = list(inspect.signature(part.forward).parameters).index(parameter)
    part.register_forward_pre_hook(_InputMask(name, parameter, buffer, position), with_kwargs=True)


def _mask_output(part: nn.Module, name: str, key: str, buffer: str) -> None:
    part.register_forward_hook(_OutputMask(name, key, buffer))


@dataclass(frozen=True)
class _Mask:
    """A hook that can be saved with its module: the mask's name, what it is for, and the buffer that holds it."""

    name: str
    key: str
    buffer: str


@dataclass(frozen=True)
class _InputMask(_Mask):
    position: int

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask, position = getattr(module, self.buffer), self.position
        if position < len(args):
            masked = _masked(self.name, args[position], mask)
            return (*args[:position], masked, *args[position + 1 :]), kwargs
        if self.key not in kwargs:
            raise MaskError(f"mask {self.name!r}: the input {self.key!r} is not given to the module")
        return args, {**kwargs, self.key: _masked(self.name, kwargs[self.key], mask)}


@dataclass(frozen=True)
class _OutputMask(_Mask):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        name, key, mask = self.name, self.key, getattr(module, self.buffer)
        if isinstance(output, Mapping) and key in output:
            return {**output, key: _masked(name, output[key], mask)}
        leaves, tree = torch.utils._pytree.tree_flatten(output)
        tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        wanted = 0 if key == "" else int(key) if key.isdigit() else len(tensors)
        if wanted >= len(tensors):
            raise MaskError(f"mask {name!r}: the module gives {len(tensors)} tensors, and no output {key!r}")
        leaves[tensors[wanted]] = _masked(name, leaves[tensors[wanted]], mask)
        return torch.utils._pytree.tree_unflatten(leaves, tree)


def drop_full_masks(module: nn.Module) -> None:
    """Remove masks of activations that multiply by ones alone."""
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Mask) and bool(getattr(part, hook.buffer).all()):
                    del hooks[key], part._buffers[hook.buffer]
                    part._non_persistent_buffers_set.discard(hook.buffer)
                    part._forward_pre_hooks_with_kwargs.pop(key, None)


def _masked(name: str, value: Any, mask: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise MaskError(f"mask {name!r} is for a {type(value).__name__}; only a tensor can be masked")
    while mask.ndim > value.ndim and _extents(mask)[0] == 1:
        mask = mask[0]
    _check_shape(name, _extents(value), _extents(mask))
    if value.dtype == torch.bool:
        return value & mask.bool()
    return value * mask.to(value.dtype)


def _check_shape(name: str, own: list[Any], shape: list[Any]) -> None:
    told = f"mask {name!r} of shape {shape}, once cut where it does not vary,"
    aligned = own[len(own) - len(shape) :] if len(shape) <= len(own) else []
    for extent, there in zip(shape, aligned, strict=False):
        if extent != 1 and isinstance(there, torch.SymInt):
            raise MaskError(f"{told} varies along an axis that is a free dimension")
    if len(aligned) != len(shape) or any(e not in (1, t) for e, t in zip(shape, aligned, strict=True)):
        raise MaskError(f"{told} does not broadcast against the activation of shape {[str(e) for e in own]}")


def _extents(value: torch.Tensor) -> list[Any]:
    if not torch.jit.is_tracing():
        return list(value.shape)
    with warnings.catch_warnings():
        # While a call is traced, extents are tensors; here they are looked at, and not computed with.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return list(value.detach().float().numpy().shape)

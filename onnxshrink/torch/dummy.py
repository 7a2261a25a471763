"""The example input of a module: as exporters want it, with a free batch, and as arrays to compare outputs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch

from onnxshrink.errors import InputError
from onnxshrink.weights import Array

_tree_map = torch.utils._pytree.tree_map
_tree_leaves = torch.utils._pytree.tree_leaves


class DummyInput:
    """An example input brought to a batch.

    The batch is what the first tensor has along `batch_dim`, and every other one with the same extent there.

    Args:
        given: a tensor, a tuple or list of arguments, or a dictionary of keyword arguments.
        batch_dim: the axis of the batch.
        batch: its extent.

    Attributes:
        args, kwargs: what the module is called with, by position and by name.

    Raises InputError for anything else, for no tensor, and where no tensor has that axis.
    """

    def __init__(self, given: Any, batch_dim: int, batch: int) -> None:
        if not isinstance(given, (torch.Tensor, tuple, list, Mapping)):
            raise InputError(
                f"dummy_input is a {type(given).__name__}; give a tensor, a tuple or list of arguments, "
                "or a dictionary of keyword arguments"
            )
        whole = dict(given) if isinstance(given, Mapping) else [given] if isinstance(given, torch.Tensor) else given
        tensors = _tensors(whole)
        extents = [leaf.shape[batch_dim] for leaf in tensors if -leaf.ndim <= batch_dim < leaf.ndim]
        if not extents or not extents[0]:
            reason = "dummy_input holds no tensor" if not tensors else f"no tensor of dummy_input has axis {batch_dim}"
            raise InputError(f"{reason}, or its batch is empty; give an example of at least one sample")
        self._axis, self._batch, self._extent = batch_dim, batch, extents[0]
        grown = _tree_map(self._of_batch, whole)
        self.args: tuple[Any, ...] = () if isinstance(grown, dict) else tuple(grown)
        self.kwargs: dict[str, Any] = grown if isinstance(grown, dict) else {}

    def _has_batch(self, leaf: Any, extent: int) -> bool:
        if not isinstance(leaf, torch.Tensor) or not -leaf.ndim <= self._axis < leaf.ndim:
            return False
        return bool(leaf.shape[self._axis] == extent)

    def _of_batch(self, leaf: Any) -> Any:
        """A tensor with its batch repeated or cut to the extent that is wanted."""
        if not self._has_batch(leaf, self._extent):
            return leaf
        return leaf.detach().index_select(self._axis, torch.arange(self._batch, device=leaf.device) % self._extent)

    def free_batch(self, dynamo: bool) -> dict[str, Any]:
        """What tells an exporter that the batch is a free dimension."""
        if dynamo:
            return {"dynamic_shapes": _tree_map(self._free, self.kwargs or self.args)}
        named = list(self.kwargs.items()) or [(f"input_{i}", leaf) for i, leaf in enumerate(self.args)]
        tensors = {name: leaf for name, leaf in named if isinstance(leaf, torch.Tensor)}
        axes = {n: {self._axis % t.ndim: "batch"} for n, t in tensors.items() if self._has_batch(t, self._batch)}
        return {"dynamic_axes": axes, "input_names": list(tensors)}

    def _free(self, leaf: Any) -> Any:
        if not self._has_batch(leaf, self._batch):
            return None
        return {self._axis % leaf.ndim: torch.export.Dim.DYNAMIC}

    def feed(self, model: onnx.ModelProto, seed: int) -> dict[str, Array]:
        """Values for the inputs of an exported model: numbers of the size of the example's, drawn at random.

        Whole numbers and truth values are those of the example: others may not be valid. Nothing, where the model has
        other inputs than the example has tensors.
        """
        names = [value.name for value in model.graph.input]
        by_name = set(names) <= set(self.kwargs)
        tensors = _tensors([self.kwargs[name] for name in names] if by_name else [self.args, self.kwargs])
        if len(names) != len(tensors):
            return {}
        generator = torch.Generator().manual_seed(seed)
        return {name: _drawn(tensor.cpu(), generator) for name, tensor in zip(names, tensors, strict=True)}


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _drawn(example: torch.Tensor, generator: torch.Generator) -> Array:
    if not example.dtype.is_floating_point or not example.numel():
        return np.asarray(example.numpy())
    values = example.detach().double()
    # Where no number is negative, a negative one may not be valid.
    draw = torch.rand if bool((values >= 0).all()) else torch.randn
    scale = float(values.square().mean().sqrt()) or 1.0
    drawn = (draw(example.shape, generator=generator, dtype=torch.float64) * scale).to(example.dtype)
    # numpy has no bfloat16: onnxruntime is given such numbers as float32.
    return np.asarray((drawn.float() if example.dtype == torch.bfloat16 else drawn).numpy())

"""Inferred masks: what counts in every tensor and parameter, as full-size arrays of zeros and ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.origins import Origins
from onnxshrink.parts import Parts
from onnxshrink.plan import Kept, Plan
from onnxshrink.weights import Array, BoolArray


class LazyMasks(Mapping[str, Array]):
    """Arrays by name, each made when it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Array]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Array:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __repr__(self) -> str:
        return f"masks of {', '.join(self._makers)}"


def tensor_mask(analysis: Analysis, name: str) -> Array:
    """1 where an element of a computed tensor can influence an output and is not constant.

    Of the tensor's shape; a free dimension has extent one, and stands for all of it.
    """
    shape = [extent if isinstance(extent, int) else 1 for extent in analysis.shape(name) or ()]
    return np.broadcast_to(analysis.live(name), shape).astype(np.uint8)


def tensor_masks(analysis: Analysis) -> LazyMasks:
    """The masks of all computed tensors."""
    names = [n for node in analysis.nodes() for n in node.outputs if n and analysis.shape(n) is not None]
    names = [*(n for n in analysis.graph.inputs if analysis.shape(n) is not None), *names]
    return LazyMasks({name: lambda name=name: tensor_mask(analysis, name) for name in names})  # type: ignore[misc]


class WeightMasks:
    """What is left of each stored weight by a plan, and is not zero."""

    def __init__(self, analysis: Analysis, plan: Plan) -> None:
        self._analysis = analysis
        self._plan = plan
        self._origins = Origins(analysis)

    def mask(self, name: str) -> Array:
        """1 where an element of a stored weight stays and is not zero; of the weight's shape."""
        weight = self._analysis.graph.constants[name]
        found: BoolArray = np.zeros(weight.shape, np.bool_)
        for node in self._analysis.nodes():
            for slot, kept in self._plan.constants.get(node.index, {}).items():
                read = node.inputs[slot]
                if read in self._analysis.constants and name in self._origins.weights(read):
                    shape = self._analysis.constants[read].shape
                    found |= self._origins.trace(read, _product(kept, shape))[name]
        mask: Array = (found & (weight.array() != 0)).astype(np.uint8)
        return mask


def _product(kept: Kept, shape: tuple[int, ...]) -> BoolArray:
    mask = np.ones((1,) * len(shape), np.bool_)
    for axis, indices in enumerate(kept):
        if indices is not None:
            spread = [1] * len(shape)
            spread[axis] = indices.size
            mask = mask & indices.reshape(spread)
    return mask


def module_masks(
    parts: Parts, analysis: Analysis, weights: WeightMasks, parameters: Mapping[str, tuple[str, bool]]
) -> dict[str, LazyMasks]:
    """The masks of every module that has nodes, by module and then by name.

    Args:
        parameters: the stored weight of each parameter `module.name`, and whether it is stored transposed.

    Returns:
        per module, `_input_0`, `_output_0` and so on (tensors in the order in which the module reads and makes them),
        and its own parameters.
    """
    found: dict[str, LazyMasks] = {}
    for module in parts.names:
        makers: dict[str, Callable[[], Array]] = {}
        if not parts.nodes(module):
            continue
        for side, names in (("input", parts.inputs(module)), ("output", parts.outputs(module))):
            for number, name in enumerate(names):
                makers[f"_{side}_{number}"] = lambda name=name: tensor_mask(analysis, name)  # type: ignore[misc]
        for name, (weight, transposed) in parameters.items():
            if name.rpartition(".")[0] == module:
                makers[name.rpartition(".")[2]] = _weight(weights, weight, transposed)
        found[module] = LazyMasks(makers)
    return found


def _weight(weights: WeightMasks, name: str, transposed: bool) -> Callable[[], Array]:
    return lambda: weights.mask(name).T if transposed else weights.mask(name)

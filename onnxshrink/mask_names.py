"""The names that pruners give their masks, matched to the weights of an exported model.

Exporters rename weights, transpose those of linear layers, join and reorder the gates of recurrent ones, and fold batch
normalisation into those of convolutions. What they note about the modules that nodes come from tells which is which.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxshrink.errors import MaskError
from onnxshrink.mask_arrays import kept_elements, near_names
from onnxshrink.scopes import absorbed_norm, module_path

if TYPE_CHECKING:
    from onnxshrink.mask_channels import Channels

ACTIVATION = re.compile(r"_(input|output)_")
_WRAPPERS = ("module.", "_orig_mod.")
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)(_reverse)?")
# For each gate in ONNX's order, its place in PyTorch's.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
_PRODUCTS = ("MatMul", "Gemm")
_CONTRACTIONS = (*_PRODUCTS, "Conv", "ConvTranspose")


@dataclass(frozen=True, eq=False)
class Match:
    """One weight that a mask is for: the name of the mask, the name of the weight, the mask in the weight's layout."""

    mask: str
    weight: str
    values: np.ndarray


def select_masks(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks among the entries of a file, by the name of what they mask.

    - a state dictionary of a module that is being pruned, with `NAME_mask` beside `NAME_orig` (or `NAME`): the masks;
    - names that all end in `_mask`: without that ending;
    - `MODULE.block_mask`: a mask of the module's weight, in blocks;
    - else the entries as they are.
    """
    stems = {name: name.removesuffix("_mask") for name in flat if name.endswith("_mask")}
    found = {stem: flat[name] for name, stem in stems.items() if f"{stem}_orig" in flat or stem in flat}
    blocks = {name.removesuffix(".block_mask"): mask for name, mask in flat.items() if name.endswith(".block_mask")}
    if found or blocks:
        return {**found, **blocks}
    if stems and len(stems) == len(flat):
        return {stem: flat[name] for name, stem in stems.items()}
    return dict(flat)


def spellings(name: str) -> Iterator[tuple[str, bool]]:
    """What a mask's name may stand for: a parameter, or a module (True) and then its weight; without wrappers too."""
    while True:
        yield name, False
        yield f"{name}.weight", True
        wrapper = next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None)
        if wrapper is None:
            return
        name = name.removeprefix(wrapper)


def fitted(mask: np.ndarray, shape: tuple[int, ...], blocks: bool) -> np.ndarray:
    """A mask of the weight's rank at full extent: axes of extent one are repeated, and with `blocks` any that divides.

    What does not fit is returned as it is.
    """
    if mask.shape == shape or mask.ndim != len(shape):
        return mask
    if all(extent in (1, whole) for extent, whole in zip(mask.shape, shape, strict=True)):
        return np.broadcast_to(mask, shape)
    if blocks and all(extent and whole % extent == 0 for extent, whole in zip(mask.shape, shape, strict=True)):
        for axis, whole in enumerate(shape):
            mask = mask.repeat(whole // mask.shape[axis], axis)
    return mask


class Copies:
    """Weights that an exporter has written more than once: as they are for one use, transposed for another."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = weights
        self._alike: defaultdict[tuple[int, float, float], list[str]] = defaultdict(list)
        for name, weight in weights.items():
            array = _values(weight)
            if array is not None and array.ndim > 1 and array.size:
                self._alike[_key(array)].append(name)

    def of(self, match: Match) -> Iterator[Match]:
        """Matches of the same mask with the other copies of a weight."""
        array = _values(self._weights[match.weight])
        if array is None or array.ndim < 2 or not array.size or match.values.shape != array.shape:
            return
        if _is_uniform(array):  # alike by chance
            return
        for name in self._alike[_key(array)]:
            other = _values(self._weights[name])
            if name == match.weight or other is None:
                continue
            if other.shape == array.shape and np.array_equal(other, array):
                yield Match(match.mask, name, match.values)
            elif other.shape == array.T.shape and np.array_equal(other, array.T):
                yield Match(match.mask, name, match.values.T)


def _key(array: np.ndarray) -> tuple[int, float, float]:
    """What is the same for a matrix and its transpose."""
    return array.size, float(array.flat[0]), float(array.flat[-1])


class Matcher:
    """The weights of a model, found by the names of masks.

    Args:
        model: the model.
        weights: every weight of it, by name: what has a shape in `dims`.
    """

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Any]) -> None:
        self._model = model
        self._weights = weights
        self._modules: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            path = module_path(node)
            if path is not None:
                self._modules[path].append(node)

    def match(self, masks: Mapping[str, np.ndarray]) -> list[Match]:
        """The weights that some masks are for.

        Raises MaskError for a mask that matches no weight, or none that can be told from others.
        """
        norms = {name: found for name in masks if (found := self._absorbed(name)) is not None}
        dead, matches = self._match_norms(masks, norms)
        for name, mask in masks.items():
            if name not in norms:
                matches += self._match_one(name, mask, dead)
        self._check_shared(matches)
        return [*matches, *(copy for match in matches for copy in self._copies.of(match))]

    @cached_property
    def _copies(self) -> Copies:
        return Copies(self._weights)

    def _check_shared(self, matches: list[Match]) -> None:
        """Weights of several modules whose elements are all alike may be one by chance: exporters store them once."""
        found: defaultdict[str, list[Match]] = defaultdict(list)
        for match in matches:
            found[match.weight].append(match)
        for weight, group in found.items():
            paths = sorted(p for p, nodes in self._modules.items() if any(weight in node.input for node in nodes))
            same = all(np.array_equal(match.values, group[0].values) for match in group[1:])
            array = _values(self._weights[weight])
            if len(paths) < 2 or (same and len(group) == len(paths)) or array is None or not _is_uniform(array):
                continue
            if array.any() and not all(np.all(match.values) for match in group):
                others = ", ".join(repr(path) for path in paths)
                raise MaskError(
                    f"mask {group[0].mask!r}: the modules {others} share this weight, all of whose elements are alike, "
                    f"perhaps by chance; {_WAY_OUT}"
                )

    def _match_one(self, name: str, mask: np.ndarray, dead: Mapping[str, np.ndarray]) -> list[Match]:
        for wish, module in spellings(name):
            if wish in self._weights:
                self._check_bias(name, wish, mask, dead)
                return [Match(name, wish, self._fitted(name, wish, mask, module))]
        if ACTIVATION.match(name.rpartition(".")[2]):
            raise MaskError(f"mask {name!r} is for an activation; only weights can be masked here")
        for wish, module in spellings(name):
            found = self._in_module(name, wish, mask, module)
            if found:
                return found
        names = {*self._weights, *(f"{path}.weight" for path in self._modules)}
        raise MaskError(f"mask {name!r} matches no initializer{near_names(name, names)}")

    def _shape(self, weight: str) -> tuple[int, ...] | None:
        """The shape of a weight; None for a constant whose shape is not stored."""
        dims = getattr(self._weights[weight], "dims", None)
        return None if dims is None else tuple(dims)

    # --- one mask, one weight ---------------------------------------------------------------------------------------

    def _fitted(self, name: str, weight: str, mask: np.ndarray, blocks: bool = False) -> np.ndarray:
        shape = self._shape(weight)
        if shape is None:
            return mask
        if mask.ndim == 1 and len(shape) > 1:
            return self._spread(name, weight, mask)
        return fitted(mask, shape, blocks)

    def _spread(self, name: str, weight: str, mask: np.ndarray) -> np.ndarray:
        """A mask of output channels, as a mask of the weight; as it came when the weight makes no such channels."""
        kept = kept_elements(name, mask, mask.shape)
        found = self._channels.spread(name, weight, kept)
        return mask if found is None else found

    @cached_property
    def _channels(self) -> Channels:
        from onnxshrink.mask_channels import Channels

        return Channels(self._model)

    # --- by module --------------------------------------------------------------------------------------------------

    def _in_module(self, name: str, wish: str, mask: np.ndarray, blocks: bool) -> list[Match]:
        """Weights without a name of their own that the nodes of the mask's module read."""
        path, _, leaf = wish.rpartition(".")
        nodes = self._modules.get(path, [])
        recurrent = _RECURRENT.fullmatch(leaf)
        if recurrent is not None:
            return self._recurrent(name, mask, nodes, recurrent)
        if "weight" not in leaf and "bias" not in leaf:
            return []
        found: dict[str, np.ndarray] = {}
        for node in nodes:
            for slot, weight in enumerate(node.input):
                if weight not in self._weights or weight.startswith(f"{path}.") or node.op_type in _GATES:
                    continue
                if _is_bias(node, slot) == ("bias" in leaf):
                    arranged = self._arranged(name, node, slot, mask, blocks)
                    if arranged is not None:
                        self._check_renamed(name, node, slot, mask)
                        found[weight] = arranged
        if not self._agree(list(found)):
            names = ", ".join(sorted(map(repr, found)))
            raise MaskError(f"mask {name!r} may be for any of {names}; name the one that it is for")
        return [Match(name, weight, values) for weight, values in found.items()]

    def _arranged(
        self, name: str, node: onnx.NodeProto, slot: int, mask: np.ndarray, blocks: bool
    ) -> np.ndarray | None:
        """A mask in the layout that the exporter gave the weight; None when it does not fit."""
        weight = node.input[slot]
        shape = self._shape(weight)
        if shape is None:
            return None
        if node.op_type in _PRODUCTS and slot == 1 and not _keeps_rows(node):
            mask = mask.T
        whole = [extent for extent in shape if extent > 1]
        if whole == [extent for extent in mask.shape if extent > 1]:
            return mask.reshape(shape)
        mask = self._fitted(name, weight, mask, blocks)
        return mask if mask.shape == shape else None

    def _agree(self, names: list[str]) -> bool:
        """Whether weights are one and the same, which the exporter has written once per use."""
        arrays = [_values(self._weights[name]) for name in names]
        return all(a is not None and arrays[0] is not None and np.array_equal(a, arrays[0]) for a in arrays[1:])

    # --- recurrent layers -------------------------------------------------------------------------------------------

    def _recurrent(self, name: str, mask: np.ndarray, nodes: list[onnx.NodeProto], leaf: re.Match[str]) -> list[Match]:
        """Masks of the gates of one layer and direction, in the order of ONNX and joined with the others."""
        kind, side, layer, reverse = leaf.groups()
        matches = {}
        for node in self._layer(nodes, int(layer)):
            weight = node.input[3 if kind == "bias" else 1 if side == "ih" else 2]
            if weight not in self._weights:
                continue
            shape = self._shape(weight) or ()
            order = _GATES[node.op_type]
            rows = shape[1] // (2 if kind == "bias" else 1)
            gates = _gates(name, mask, (rows, *shape[2:]), len(order))
            values = np.ones(shape, np.bool_)
            start = rows if kind == "bias" and side == "hh" else 0
            values[1 if reverse else 0, start : start + rows] = gates[list(order)].reshape(rows, *shape[2:])
            matches[weight] = Match(name, weight, values)
        return list(matches.values())

    def _layer(self, nodes: list[onnx.NodeProto], layer: int) -> list[onnx.NodeProto]:
        """The nodes of one layer: those that read the same weights, when the module is used more than once."""
        layers: list[list[onnx.NodeProto]] = []
        for node in nodes:
            if node.op_type not in _GATES:
                continue
            same = next((known for known in layers if self._agree([known[0].input[1], node.input[1]])), None)
            if same is None:
                layers.append([node])
            else:
                same.append(node)
        return layers[layer] if layer < len(layers) else []

    # --- folded normalisations --------------------------------------------------------------------------------------

    def _absorbed(self, name: str) -> tuple[onnx.NodeProto, str] | None:
        """The node that a batch normalisation was folded into, and which of its parameters the mask is for."""
        for wish, _ in spellings(name):
            path, _, leaf = wish.rpartition(".")
            if wish in self._weights or leaf not in ("weight", "bias"):
                continue
            for node in self._modules.get(path, ()):
                if absorbed_norm(node):
                    return node, leaf
        return None

    def _match_norms(
        self, masks: Mapping[str, np.ndarray], norms: Mapping[str, tuple[onnx.NodeProto, str]]
    ) -> tuple[dict[str, np.ndarray], list[Match]]:
        """Rows of the weights that normalisations were folded into; the channels that are zero, by name of the bias."""
        dead: dict[str, np.ndarray] = {}
        matches: list[Match] = []
        groups: defaultdict[str, dict[str, str]] = defaultdict(dict)
        nodes = {}
        for name, (node, leaf) in norms.items():
            groups[node.output[0]][leaf] = name
            nodes[node.output[0]] = node
        for output, names in groups.items():
            node, kept = nodes[output], [kept_elements(n, masks[n], masks[n].shape) for n in names.values()]
            name = next(iter(names.values()))
            if len(kept) < 2 or not np.array_equal(kept[0], kept[1]):
                if all(mask.all() for mask in kept):
                    continue
                raise MaskError(
                    f"mask {name!r}: the exporter folded this normalisation into {node.name}; its weight and bias can "
                    f"only be masked at the same channels; {_WAY_OUT}"
                )
            matches.append(Match(name, node.input[1], self._fitted(name, node.input[1], kept[0])))
            if len(node.input) > 2 and node.input[2] in self._weights:
                matches.append(Match(name, node.input[2], kept[0]))
                dead[node.input[2]] = ~kept[0]
        return dead, matches

    def _check_bias(self, name: str, weight: str, mask: np.ndarray, dead: Mapping[str, np.ndarray]) -> None:
        """A bias that a normalisation was folded into is not the module's: where that is zero, it is the shift."""
        if weight not in self._shifts:
            return
        lost = ~kept_elements(name, mask, self._shape(weight) or mask.shape)
        if (lost & ~dead.get(weight, np.zeros_like(lost))).any():
            raise MaskError(f"mask {name!r}: the exporter folded a normalisation into this bias; {_WAY_OUT}")

    @cached_property
    def _shifts(self) -> frozenset[str]:
        """Biases that a normalisation was folded into."""
        nodes = [node for some in self._modules.values() for node in some if absorbed_norm(node)]
        return frozenset(node.input[2] for node in nodes if len(node.input) > 2)

    def _check_renamed(self, name: str, node: onnx.NodeProto, slot: int, mask: np.ndarray) -> None:
        """A bias that lost its name has other values than the module's."""
        if slot == 2 and node.op_type in _CONTRACTIONS and not kept_elements(name, mask, mask.shape).all():
            raise MaskError(f"mask {name!r}: the exporter folded a normalisation into this bias; {_WAY_OUT}")


_WAY_OUT = "export without optimisations, or give the module and its masks to onnxshrink.export"


def _is_bias(node: onnx.NodeProto, slot: int) -> bool:
    return node.op_type in ("Add", "Sub") or slot == 2


def _keeps_rows(node: onnx.NodeProto) -> bool:
    """Whether a product reads its weights as a linear layer stores them, one row per output."""
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _gates(name: str, mask: np.ndarray, shape: tuple[int, ...], gates: int) -> np.ndarray:
    """A mask of one weight of a recurrent layer as `[gate, unit, ...]`; a mask of units is for all gates."""
    units = shape[0] // gates
    kept = kept_elements(name, mask, mask.shape)
    if kept.shape == (units,):
        kept = np.tile(kept, gates)
    if kept.ndim == 1 and kept.shape[0] == shape[0]:
        kept = kept.reshape(-1, *[1] * (len(shape) - 1))
    kept = kept_elements(name, np.broadcast_to(kept, shape) if _fits(kept, shape) else kept, shape)
    return kept.reshape(gates, units, *shape[1:])


def _fits(mask: np.ndarray, shape: tuple[int, ...]) -> bool:
    return mask.ndim == len(shape) and all(e in (1, whole) for e, whole in zip(mask.shape, shape, strict=True))


def _is_uniform(array: np.ndarray | None) -> bool:
    """Whether all elements are the same."""
    return array is not None and array.size > 0 and bool((array == array.flat[0]).all())


def _values(weight: Any) -> np.ndarray | None:
    """The values of a stored tensor, None when they are not at hand."""
    if not isinstance(weight, onnx.TensorProto) or weight.data_location == onnx.TensorProto.EXTERNAL:
        return None
    try:
        return onnx.numpy_helper.to_array(weight)
    except ValueError:  # stored incompletely, which is for whoever masks it to say
        return None

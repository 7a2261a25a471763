"""From a plan for an exported module to new values of the module's parameters, or to what the plan must leave whole.

The module's forward() stays as it is. So a plan can be followed where every change is a slice of a parameter, or
another value of one: a constant folded in a bias, say. Where it is not, the indices in question are demanded back.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from onnxshrink.analyse import Analysis
from onnxshrink.apply import plan_view
from onnxshrink.graph import Node
from onnxshrink.notation import joined_inputs
from onnxshrink.plan import Cause, Demand, Plan
from onnxshrink.registry import Rewrite
from onnxshrink.scopes import module_path
from onnxshrink.torch.exported import Anchor, Exported
from onnxshrink.torch.layers import CONTRACTIONS, CONVOLUTIONS, TRANSPOSED, is_closed
from onnxshrink.view import Fold, View
from onnxshrink.weights import Array, BoolArray, any_along

_RECURRENT = re.compile(r"weight_ih_l(\d+)(_reverse)?")
_WEIGHTS, _BIAS = 1, 2


@dataclass(frozen=True, eq=False)
class Use:
    """One input of a node that reads a constant made of a parameter: what it keeps of each axis of the parameter."""

    node: Node
    slot: int
    kept: list[BoolArray]


@dataclass(eq=False)
class Cuts:
    """What becomes of a module.

    Attributes:
        kept: per parameter or buffer, per axis, a mask of what stays.
        values: new values of parameters, where they are not slices of the old ones.
        biases: new biases, by module.
        added: what is added to biases, by module.
        groups: new numbers of groups, by module.
        folds: features of recurrent layers that leave with a constant: by module, layer and fold.
        scaled: root mean square norms that mean over fewer elements.
        epsilon: new epsilons, by module.
    """

    kept: dict[str, list[BoolArray]] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    biases: dict[str, Array] = field(default_factory=dict)
    added: dict[str, Array] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    folds: dict[str, dict[int, Fold]] = field(default_factory=dict)
    scaled: set[str] = field(default_factory=set)
    epsilon: dict[str, float] = field(default_factory=dict)

    def size(self) -> int:
        """Elements that are left of what is cut, and of what is not."""
        return sum(int(np.prod([mask.sum() for mask in kept], dtype=np.int64)) for kept in self.kept.values())


class Reader:
    """One plan, read for the parameters of the module."""

    def __init__(self, exported: Exported, plan: Plan) -> None:
        self._exported = exported
        self._analysis = exported.analysis
        self._plan = plan
        self._uses: defaultdict[str, list[Use]] = defaultdict(list)
        self._values: defaultdict[str, dict[int, Array]] = defaultdict(dict)
        self._biases: defaultdict[str, dict[int, Array]] = defaultdict(dict)
        self._added: defaultdict[str, dict[int, Array]] = defaultdict(dict)
        self.cuts = Cuts()
        self.demands: list[Demand] = []

    def read(self) -> list[Demand]:
        """Fill in `cuts`; what cannot be expressed, as demands on the next plan."""
        for node in self._analysis.nodes():
            self._read(node)
        self._agree()
        self._check_layers()
        return self.demands

    def _read(self, node: Node) -> None:
        view = plan_view(self._analysis, self._plan, node)
        for slot, name in enumerate(node.inputs):
            if name in self._analysis.constants and slot in view.kept:
                self._read_constant(node, slot, name, list(view.kept[slot]))
        rule = self._analysis.rules[node.index]
        if rule is not None and rule.rewrite is not None:
            rewrite = rule.rewrite(view)
            reason = self._rewritten(node, view, rewrite)
            if reason is not None:
                self._refuse(node, view, reason)

    # --- slices -----------------------------------------------------------------------------------------------------

    def _read_constant(self, node: Node, slot: int, name: str, kept: list[BoolArray | None]) -> None:
        kept = self._without_picks(node, slot, kept)
        masks = [np.ones(e, np.bool_) if m is None else m for m, e in zip(kept, self._extents(name), strict=True)]
        parameters, weights = self._exported.parameters(node, name), self._exported.origins.weights(name)
        cut = not all(mask.all() for mask in masks)
        if cut and {stored for stored, _ in parameters} < weights and not self._exported.is_of_layer(node):
            self._demand_constant(node, slot, masks, "forward() makes a constant of this size")
        for stored, parameter in parameters:
            found = self._traced(name, stored, masks)
            if found is None:
                self._demand_constant(node, slot, masks, f"{parameter} does not lose whole slices")
            else:
                self._uses[parameter].append(Use(node, slot, found))

    def _extents(self, name: str) -> tuple[int, ...]:
        return self._analysis.constants[name].shape

    def _without_picks(self, node: Node, slot: int, kept: list[BoolArray | None]) -> list[BoolArray | None]:
        """What stays where forward() picks elements at its own positions: all of them."""
        relation = self._analysis.relations[node.index]
        joined = joined_inputs(relation)
        spec = relation.spec(slot) or ((),) * len(kept)
        return [
            None if factors and factors[0] in relation.links and joined.get(slot) != axis else mask
            for axis, (factors, mask) in enumerate(zip(spec, kept, strict=True))
        ]

    def _traced(self, name: str, parameter: str, masks: list[BoolArray]) -> list[BoolArray] | None:
        """What stays of each axis of a parameter, given what stays of a constant made of it; None: not whole slices."""
        if name == parameter:
            return masks
        shape = self._extents(parameter)
        trace = self._exported.origins.trace
        covered = np.broadcast_to(trace(name, np.ones((1,) * len(masks), np.bool_))[parameter], shape)
        stays = covered
        for axis, mask in enumerate(masks):
            if not mask.all():
                along = mask.reshape([-1 if a == axis else 1 for a in range(len(masks))])
                stays = stays & trace(name, along)[parameter]
        if stays is covered:
            return [np.ones(extent, np.bool_) for extent in shape]
        kept = []
        for axis in range(len(shape)):
            rest = tuple(a for a in range(len(shape)) if a != axis)
            kept.append(any_along(stays, rest) | ~any_along(covered, rest))
        product = covered
        for axis, mask in enumerate(kept):
            product = product & mask.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return kept if np.array_equal(product, stays) else None

    # --- other changes ----------------------------------------------------------------------------------------------

    def _rewritten(self, node: Node, view: View, rewrite: Rewrite) -> str | None:
        """Take in what changes at a node besides slices; why it cannot be expressed, if it cannot."""
        anchor = self._exported.anchor(node)
        if rewrite.partly or rewrite.append or rewrite.fixed is not None:
            return "a constant would have to be written into what forward() computes"
        for slot, value in rewrite.constants.items():
            name = node.inputs[slot] if slot < len(node.inputs) else ""
            operand = view.input(slot)
            if operand is not None and operand.dtype is not None and operand.dtype.kind in "iub":
                continue  # sizes and positions: whether forward() follows shows when it runs
            array = value() if callable(value) else value
            if array.dtype.kind in "iub":
                continue
            if name in self._exported.names:
                for _, parameter in self._exported.parameters(node, name):
                    self._values[parameter][node.index] = array
            elif anchor is not None and isinstance(anchor.layer, CONTRACTIONS) and slot == _BIAS:
                self._biases[anchor.path][node.index] = array
            elif anchor is None or not self._fold_recurrent(anchor, view):
                return "a constant would have to be folded in a weight that forward() makes"
        if rewrite.add is not None:
            if anchor is None or not isinstance(anchor.layer, CONTRACTIONS) or rewrite.add.ndim != 1:
                return "a constant would have to be folded in a bias, and no layer is there to have one"
            self._added[anchor.path][node.index] = rewrite.add
        if rewrite.multiply is not None and not self._scale_norm(node):
            return "forward() divides by the number of elements, some of which would leave"
        return self._new_attributes(anchor, rewrite)

    def _new_attributes(self, anchor: Anchor | None, rewrite: Rewrite) -> str | None:
        if anchor is None:
            return None
        if "group" in rewrite.attributes:
            if not isinstance(anchor.layer, (*CONVOLUTIONS, *TRANSPOSED)):
                return "the number of groups is written in forward()"
            self.cuts.groups[anchor.path] = int(rewrite.attributes["group"])
        if "epsilon" in rewrite.attributes:
            if not isinstance(anchor.layer, nn.RMSNorm):
                return "the layer means over all of its elements"
            self.cuts.epsilon[anchor.path] = float(rewrite.attributes["epsilon"])
        return None

    def _scale_norm(self, node: Node) -> bool:
        path = module_path(node.flat.source)
        layer = self._exported.parts.get(path) if path is not None else None
        if path is None or not isinstance(layer, nn.RMSNorm) or layer.weight is None:
            return False
        self.cuts.scaled.add(path)
        return True

    def _fold_recurrent(self, anchor: Anchor, view: View) -> bool:
        """Whether a constant feature of a recurrent layer can be folded in its biases."""
        fold = view.folds.get(0)
        if fold is None or not isinstance(anchor.layer, nn.RNNBase) or not anchor.layer.bias:
            return False
        layers = {int(m[1]) for m in map(_RECURRENT.fullmatch, self._leaves(anchor.node, _WEIGHTS)) if m}
        if len(layers) != 1:
            return False
        self.cuts.folds.setdefault(anchor.path, {})[layers.pop()] = fold
        return True

    def _leaves(self, node: Node, slot: int) -> list[str]:
        return [name.rpartition(".")[2] for _, name in self._exported.parameters(node, node.inputs[slot])]

    # --- agreement of all uses --------------------------------------------------------------------------------------

    def _agree(self) -> None:
        for parameter, uses in self._uses.items():
            values = self._values.get(parameter, {})
            if values:
                self._agree_on_values(parameter, uses, values)
            else:
                self._agree_on_slices(parameter, uses)
        for of_bias, target in ((self._biases, self.cuts.biases), (self._added, self.cuts.added)):
            for path, found in of_bias.items():
                nodes = [anchor.node for anchor in self._exported.anchors[path]]
                if self._same(nodes, found):
                    target[path] = found[nodes[0].index]

    def _same(self, nodes: Iterable[Node], found: Mapping[int, Array]) -> bool:
        """Whether all uses of a parameter ask for the same values; if not, the constants in question are demanded."""
        nodes = list(nodes)
        arrays = [found.get(node.index) for node in nodes]
        first = arrays[0]
        if first is not None and all(array is not None and np.array_equal(array, first) for array in arrays[1:]):
            return True
        for node in nodes:
            if node.index in found:
                view = plan_view(self._analysis, self._plan, node)
                self._refuse(node, view, "the layer is used more than once, each time with another constant")
        return False

    def _agree_on_values(self, parameter: str, uses: list[Use], values: Mapping[int, Array]) -> None:
        if self._same([use.node for use in uses], values):
            self.cuts.values[parameter] = values[uses[0].node.index]
            self.cuts.kept[parameter] = uses[0].kept

    def _agree_on_slices(self, parameter: str, uses: list[Use]) -> None:
        together = [np.any([use.kept[axis] for use in uses], axis=0) for axis in range(len(uses[0].kept))]
        for mask in together:
            if mask.size and not mask.any():
                mask[0] = True
        for use in uses:
            if not all(np.array_equal(a, b) for a, b in zip(use.kept, together, strict=True)):
                self._demand_use(use, parameter, together)
        owner = self._exported.parts[parameter.rpartition(".")[0]]
        own = isinstance(self._exported.tensors[parameter], nn.Parameter)
        if own and is_closed(owner) and not all(mask.all() for mask in together):
            for use in uses:
                whole = [np.ones_like(mask) for mask in together]
                self._demand_use(use, parameter, whole, f"{type(owner).__name__} keeps its sizes")
        self.cuts.kept[parameter] = together

    # --- layers -----------------------------------------------------------------------------------------------------

    def _check_layers(self) -> None:
        for path, anchors in self._exported.anchors.items():
            layer = anchors[0].layer
            if isinstance(layer, nn.RNNBase):
                self._equal_units(path, layer)
            elif isinstance(layer, nn.GroupNorm):
                self._whole_groups(path, layer)

    def _equal_units(self, path: str, layer: nn.RNNBase) -> None:
        """All layers of a recurrent module have one number of units: those with fewer get some back."""
        prefix = f"{path}.weight_hh" if path else "weight_hh"
        names = [name for name in self.cuts.kept if name.startswith(prefix)]
        units = {name: self.cuts.kept[name][1] for name in names}
        most = max((int(mask.sum()) for mask in units.values()), default=0)
        for name, mask in units.items():
            missing = most - int(mask.sum())
            if missing:
                wanted = mask.copy()
                wanted[np.flatnonzero(~mask)[:missing]] = True
                for use in self._uses[name]:
                    axis = len(self._extents(use.node.inputs[use.slot])) - 1
                    reason = f"all layers of {path or 'the module'} have equally many units"
                    self._demand_along(use.node, use.slot, axis, wanted, reason)

    def _whole_groups(self, path: str, layer: nn.GroupNorm) -> None:
        name = f"{path}.weight" if path else "weight"
        if name not in self.cuts.kept:
            return
        grid = self.cuts.kept[name][0].reshape(layer.num_groups, -1)
        whole = np.repeat(grid.any(axis=1), grid.shape[1])
        if not np.array_equal(whole, self.cuts.kept[name][0]):
            for use in self._uses[name]:
                self._demand_use(use, name, [whole], "whole groups leave, or none of their channels")
        self.cuts.groups[path] = int(grid.any(axis=1).sum())

    # --- demands ----------------------------------------------------------------------------------------------------

    def _refuse(self, node: Node, view: View, reason: str) -> None:
        """Keep the constants that a node would have to fold; all of its axes where it folds none."""
        if not view.folds:
            self.demands += whole(self._analysis, self._plan, node, reason)
        for slot, fold in view.folds.items():
            wanted = np.zeros(view.data(slot).extent(fold.axis) or 0, np.bool_)
            wanted[fold.indices] = True
            self.demands.append(Demand(node.inputs[slot], fold.axis, wanted, cause_of(self._analysis, node, reason)))

    def _demand_constant(self, node: Node, slot: int, masks: list[BoolArray], reason: str) -> None:
        for axis, mask in enumerate(masks):
            if not mask.all():
                self._demand_along(node, slot, axis, np.ones_like(mask), reason)

    def _demand_use(self, use: Use, parameter: str, wanted: list[BoolArray], reason: str = "") -> None:
        """Let a use of a parameter keep more."""
        reason = reason or f"{parameter} is used more than once"
        name = use.node.inputs[use.slot]
        kept = plan_view(self._analysis, self._plan, use.node).kept[use.slot]
        for axis, mask in enumerate(kept):
            if mask is None:
                continue
            # An axis of the constant is one of the parameter where both keep the same; else all of it is demanded.
            same = [w for k, w in zip(use.kept, wanted, strict=True) if np.array_equal(k, mask)]
            more = same[0] if len(same) == 1 or name == parameter else np.ones_like(mask)
            more = wanted[axis] if name == parameter else more
            if (more & ~mask).any():
                self._demand_along(use.node, use.slot, axis, more, reason)

    def _demand_along(self, node: Node, slot: int, axis: int, wanted: BoolArray, reason: str) -> None:
        """Demand indices of a constant's axis from the computed tensors that share it."""
        relation = self._analysis.relations[node.index]
        factors = (relation.spec(slot) or ((),) * (axis + 1))[axis]
        found = [
            (name, position)
            for other, spec in relation.slots()
            for position, theirs in enumerate(spec)
            if theirs == factors and (name := self._computed(node, other)) is not None
        ]
        cause = cause_of(self._analysis, node, reason)
        if factors and found:
            self.demands += [Demand(name, position, wanted, cause) for name, position in found]
        else:
            self.demands += whole(self._analysis, self._plan, node, reason)

    def _computed(self, node: Node, slot: int) -> str | None:
        name = node.inputs[slot] if slot >= 0 else node.outputs[-1 - slot]
        return name if name in self._plan.kept else None


def cause_of(analysis: Analysis, node: Node, reason: str) -> Cause:
    """Why something stays that the plan would let go: by the name of the module that the node is of."""
    path = module_path(node.flat.source)
    if path is None:  # made by the exporter: of the module that it reads from
        sources = (module_path(other.flat.source) for other in analysis.nodes() if set(other.outputs) & {*node.inputs})
        path = next((source for source in sources if source is not None), None)
    return Cause(node.label if path is None else path or "the module", "", reason)


def whole(analysis: Analysis, plan: Plan, node: Node, reason: str) -> list[Demand]:
    """Demand everything that a node reads and makes."""
    return list(_whole(analysis, plan, node, reason))


def _whole(analysis: Analysis, plan: Plan, node: Node, reason: str) -> Iterator[Demand]:
    for name in (*node.inputs, *node.outputs):
        for axis, mask in enumerate(plan.kept.get(name, ())):
            if mask is not None and not mask.all():
                yield Demand(name, axis, np.ones_like(mask), cause_of(analysis, node, reason))

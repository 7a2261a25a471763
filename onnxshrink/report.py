"""What shrinking did, as data: sizes, widths, what stayed and why, every index set. `tables` prints it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.collector import paused
from onnxshrink.graph import Graph, Node
from onnxshrink.measure import Size
from onnxshrink.plan import INTERFACE, LIVE, Cause, Kept, Plan
from onnxshrink.speed.latency import Latency
from onnxshrink.weights import BoolArray

if TYPE_CHECKING:
    from onnxshrink.verify import Equivalence

_STAYS = "it stays in "  # how the plan words a growth that came from another tensor
_RAW = re.compile(r"_raw(_\d+)?$")  # what the editor adds to the name of an output that is corrected afterwards


@dataclass(frozen=True)
class Layer:
    """A weight that became smaller: its node, and its shape before and after."""

    node: str
    op: str
    weight: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Stay:
    """Channels that carry nothing and stay all the same: how many, for the sake of which node, and why."""

    channels: int
    node: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """Operators that are kept whole, and why."""

    op: str
    reason: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Unaligned:
    """A width that could not be raised to the multiple asked for: one node that has it, the tensor, and why."""

    node: str
    tensor: str
    reason: str


@dataclass(frozen=True)
class Unproven:
    """A node of which facts were found by trial, or that a function of the user wrote: how, and what was found.

    `constant` counts the elements of its outputs that are taken to be constant, along a free dimension once.
    """

    node: str
    op: str
    how: str
    constant: int


@dataclass(frozen=True)
class Cut:
    """What one axis of a tensor keeps and loses, as runs of indices: pairs of the first and the last one."""

    axis: int
    kept: tuple[tuple[int, int], ...]
    removed: tuple[tuple[int, int], ...]
    node: str = ""


@dataclass(frozen=True)
class Report:
    """What shrinking did.

    Attributes:
        version: of onnxshrink.
        before: size of the (masked) model that came in.
        after: size of the result.
        changed: whether anything was removed; if not, the result equals what came in.
        fixed: whether all extents that the multiply-adds depend on are fixed; free ones count as 1.
        equivalence: the comparison of the two models; None when there was none, or nothing to compare.
        layers: weights that became smaller, in graph order.
        stays: channels without effect that stay, the most first.
        refusals: operators that are kept whole.
        unproven: nodes about which nothing is proven, though something was used; the outputs were compared.
        folded: constant channels that left, their contribution folded in a bias or another channel.
        appended: channels of ones that were appended to carry constants across a padded border.
        tensors: per computed tensor, the axes that lost indices.
        weights: per weight, the axes that lost indices, for each node that uses it.
        gone: tensors that are no longer computed.
        note: why nothing was removed although something could be; None otherwise.
        latency: how long a run takes before and after; None where nothing was timed.
        untimed: why nothing was timed although that was asked for.
        unaligned: widths that could not be raised to the multiple asked for, and why.
        zeroed: weights near zero that were set to zero first; the result is equal to the model with those zeros.
    """

    version: str
    before: Size
    after: Size
    changed: bool
    fixed: bool
    equivalence: Equivalence | None
    layers: tuple[Layer, ...] = ()
    stays: tuple[Stay, ...] = ()
    refusals: tuple[Refused, ...] = ()
    unproven: tuple[Unproven, ...] = ()
    folded: int = 0
    appended: int = 0
    tensors: Mapping[str, tuple[Cut, ...]] = field(default_factory=dict)
    weights: Mapping[str, tuple[Cut, ...]] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    note: str | None = None
    latency: Latency | None = None
    untimed: str | None = None
    unaligned: tuple[Unaligned, ...] = ()
    zeroed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, text and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON; lists of numbers stand on one line."""
        return _json(self.to_dict(), "\n") + "\n"


def _json(value: Any, line: str) -> str:
    """JSON with two spaces per level; `line` begins a line at this level."""
    inner = line + "  "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key, ensure_ascii=False)}: {_json(item, inner)}" for key, item in value.items()]
        return "{" + ",".join(inner + item for item in items) + line + "}"
    if isinstance(value, (list, tuple)) and not _numbers_only(value):
        return "[" + ",".join(inner + _json(item, inner) for item in value) + line + "]"
    return json.dumps(value, ensure_ascii=False)


def _numbers_only(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_numbers_only(item) for item in value)
    return isinstance(value, int)


@paused()
def make_report(
    version: str,
    sizes: tuple[Size, Size],
    fixed: bool,
    analysis: Analysis,
    plan: Plan,
    result: Graph | None,
    equivalence: Equivalence | None,
    note: str | None = None,
) -> Report:
    """The report of a plan that was carried out. `result` is the smaller model, None when it is as it was."""
    before, after = sizes
    same = Report(
        version,
        before,
        after,
        False,
        fixed,
        equivalence,
        stays=_stays(analysis, plan),
        refusals=_refusals(analysis),
        unproven=tuple(_unproven(analysis)),
        note=note,
    )
    if result is None:
        return same
    cutter = _Cutter()
    folds = [fold for folds in plan.folds.values() for fold in folds.values()]
    return replace(
        same,
        changed=True,
        layers=tuple(_layers(analysis, result)),
        unaligned=tuple(Unaligned(cause.node, cause.source, cause.reason) for cause in plan.unaligned),
        folded=sum(len(fold.indices) for fold in folds),
        appended=sum(fold.appends for fold in folds),
        tensors=_tensor_cuts(plan, cutter),
        weights=_weight_cuts(analysis, plan, cutter),
        gone=tuple(n for node in analysis.nodes() for n in node.outputs if n and n not in plan.present),
    )


# --- widths --------------------------------------------------------------------------------------------------------


def _layers(analysis: Analysis, result: Graph) -> Iterator[Layer]:
    there = {}
    for node in result.nodes:
        for name in node.outputs[:1]:
            there[_RAW.sub("", name)] = there[name] = node
    for node in analysis.nodes():
        other = there.get(node.outputs[0]) if node.outputs else None
        if other is not None and other.op == node.op:
            yield from _changes(analysis, result, node, other)


def _changes(analysis: Analysis, result: Graph, node: Node, other: Node) -> Iterator[Layer]:
    """The weights of one node that have other shapes now; vectors (biases, statistics) go with a weight of the node."""
    for before, after in zip(node.inputs, other.inputs, strict=False):
        old, new = analysis.constants.get(before), result.constants.get(after)
        if old is not None and new is not None and len(old.shape) > 1 and old.shape != new.shape:
            yield Layer(node.label, node.op, before, old.shape, new.shape)


# --- what stayed ---------------------------------------------------------------------------------------------------


def _stays(analysis: Analysis, plan: Plan) -> tuple[Stay, ...]:
    found: Counter[tuple[str, str]] = Counter()
    makers = {name: node.label for node in analysis.nodes() for name in node.outputs}
    for node in analysis.nodes():
        weighted = any(name in analysis.constants and len(analysis.constants[name].shape) > 1 for name in node.inputs)
        for name in node.outputs if weighted else ():
            if name in plan.present:
                _count_dead(plan, makers, name, found)
    return tuple(Stay(count, node, reason) for (node, reason), count in found.most_common())


def _count_dead(plan: Plan, makers: Mapping[str, str], name: str, found: Counter[tuple[str, str]]) -> None:
    for axis, numbers in enumerate(plan.cause.get(name, ())):
        if numbers is None:
            continue
        values, firsts, counts = np.unique(numbers, return_index=True, return_counts=True)
        for number, index, count in zip(values.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            if number >= 0 and plan.causes[number] not in (LIVE, INTERFACE):
                cause = _root(plan, plan.causes[number], name, axis, index, numbers.size)
                found[cause.node, _words(plan, makers, cause, axis, index, numbers.size)] += count


def _root(plan: Plan, cause: Cause, name: str, axis: int, index: int, extent: int) -> Cause:
    """Where a chain of growths began: each cause names the tensor that it came from, which has a cause of its own."""
    seen = {name}
    while cause.source not in seen and cause.reason.startswith(_STAYS):
        seen.add(cause.source)
        before = _cause_at(plan, cause.source, axis, index, extent)
        if before is None or before in (LIVE, INTERFACE):
            break
        cause = before
    return cause


def _words(plan: Plan, makers: Mapping[str, str], cause: Cause, axis: int, index: int, extent: int) -> str:
    if not cause.reason.startswith(_STAYS):
        return cause.reason
    start = _cause_at(plan, cause.source, axis, index, extent)
    if start == INTERFACE:
        return f"{cause.source} is an input or output of the model"
    if start != LIVE:
        return cause.reason
    if makers.get(cause.source) == cause.node:
        return "another input is live there"
    return f"they are live in {cause.source}"


def _cause_at(plan: Plan, name: str, axis: int, index: int, extent: int) -> Cause | None:
    """Why an index stays along the axis of a tensor that corresponds to another's, as far as extents tell."""
    causes = plan.cause.get(name, [])
    same = [a for a, numbers in enumerate(causes) if numbers is not None and numbers.size == extent]
    found = axis if axis in same else same[0] if len(same) == 1 else None
    numbers = causes[found] if found is not None else None
    if numbers is None or numbers[index] < 0:
        return None
    return plan.causes[int(numbers[index])]


def _unproven(analysis: Analysis) -> Iterator[Unproven]:
    for node in analysis.unproven():
        rule, constant = analysis.rules[node.index], 0
        for name in node.outputs:
            known, shape = analysis.known.get(name), analysis.shape(name)
            if known is not None and shape is not None:
                extents = [extent if isinstance(extent, int) else 1 for extent in shape]
                constant += int(np.broadcast_to(known.mask, extents).sum())
        yield Unproven(node.label, node.op, rule.unproven if rule is not None else "", constant)


def _refusals(analysis: Analysis) -> tuple[Refused, ...]:
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for refusal in analysis.refusals:
        found[refusal.op, refusal.reason].append(refusal.node)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return tuple(Refused(op, reason, tuple(nodes)) for (op, reason), nodes in ordered)


# --- index sets ----------------------------------------------------------------------------------------------------


Runs = tuple[tuple[int, int], ...]


def runs(mask: BoolArray) -> Runs:
    """The stretches of True: pairs of the first and the last index."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).view(np.int8)))
    return tuple(zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True))


class _Cutter:
    """Masks as runs. Most tensors of a model share a few masks, whose runs are found once."""

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[Runs, Runs]] = {}

    def cuts(self, kept: Kept, node: str = "") -> tuple[Cut, ...]:
        masks = [(axis, mask) for axis, mask in enumerate(kept) if mask is not None and not mask.all()]
        return tuple(Cut(axis, *self._runs(mask), node) for axis, mask in masks)

    def _runs(self, mask: BoolArray) -> tuple[Runs, Runs]:
        key = mask.tobytes()
        if key not in self._found:
            self._found[key] = runs(mask), runs(~mask)
        return self._found[key]


def _tensor_cuts(plan: Plan, cutter: _Cutter) -> dict[str, tuple[Cut, ...]]:
    return {name: cutter.cuts(kept) for name, kept in plan.kept.items() if plan.shrinks(name)}


def _weight_cuts(analysis: Analysis, plan: Plan, cutter: _Cutter) -> dict[str, tuple[Cut, ...]]:
    found: dict[str, tuple[Cut, ...]] = {}
    for node in analysis.nodes():
        for slot, kept in plan.constants.get(node.index, {}).items():
            name = node.inputs[slot]
            cuts = cutter.cuts(kept, node.label)
            if cuts and name in analysis.constants:
                found[name] = (*found.get(name, ()), *cuts)
    return found

"""A smaller PyTorch module from a masked one: planned, cut, compared, and planned again where forward() does not fit.

The module is exported without optimisations, so that every weight is one of its parameters. What the plan removes is
cut from a copy. The copy runs beside the masked module; where sizes are written in forward() it fails or differs, and
the axes in question are kept whole by the next plan. Nothing is returned that does not compute the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from torch import nn

from onnxshrink.analyse import Analysis, analyse
from onnxshrink.errors import InputError
from onnxshrink.graph import Graph, Node
from onnxshrink.plan import Demand, Plan, make_plan
from onnxshrink.registry import plain_rule_of
from onnxshrink.scopes import source_lines
from onnxshrink.torch.activations import drop_full_masks
from onnxshrink.torch.culprits import Culprits, Place, place_of
from onnxshrink.torch.cuts import Cuts, Reader, whole
from onnxshrink.torch.exported import Exported
from onnxshrink.torch.layers import refit
from onnxshrink.torch.surgery import operate
from onnxshrink.torch.trial import Inputs, Raised, Trial

NOTES = "onnxshrink_notes"
# Every round demands more, so it ends; this many are a fault.
_ROUNDS = 500
_MOST_NOTES = 4


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a result comes from: the example, the masks and the options that a module was exported with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    masks: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Attempt:
    """One smaller module: what was demanded of its plan, and how far it computes what it should.

    Attributes:
        demands: all of them, also those that came up while planning.
        raised: the error that forward() raised, if any.
        differs: where it begins to differ, as a number that grows along forward(); None: it does not.
    """

    demands: list[Demand]
    plan: Plan
    cuts: Cuts
    small: nn.Module
    raised: Raised | None
    differs: int | None

    @property
    def done(self) -> bool:
        """Whether it computes the same."""
        return self.raised is None and self.differs is None

    def goes_beyond(self, other: Attempt) -> bool:
        """Whether forward() follows further than in another attempt."""
        return self._reach() > other._reach()

    def _reach(self) -> tuple[int, ...]:
        if self.raised is not None:
            line = self.raised.frames[-1][1] if self.raised.frames else 0
            return (0, self.raised.calls, line)
        return (1, self.differs, 0) if self.differs is not None else (2, 0, 0)


class Rebuilder:
    """The attempts at one module.

    Args:
        masked: the masked module, in evaluation mode.
        model: the same, exported without optimisations.
        inputs: arguments that it takes.
        by_values: whether the exporter may have lost names of parameters.
    """

    def __init__(self, masked: nn.Module, model: onnx.ModelProto, inputs: Inputs, by_values: bool = False) -> None:
        self.masked = masked
        self.analysis: Analysis = analyse(Graph(model), plain_rule_of)
        self.exported = Exported(self.analysis, masked, by_values)
        self.trial = Trial(masked, inputs)
        self.culprits = Culprits(self.exported, self.trial)
        self.smallest: int | None = None

    def run(self) -> nn.Module:
        """The smaller module, with `onnxshrink_notes`. Raises InputError when none computes the same."""
        if not self.trial.repeats_itself():
            raise InputError("to_torch: the module gives something else each time; it cannot be compared")
        attempt = self._attempt([])
        for _ in range(_ROUNDS):
            if attempt.done:
                setattr(attempt.small, NOTES, self._notes(attempt))
                return attempt.small
            better = self._remedy(attempt)
            if better is None:
                break
            attempt = better
        raised = attempt.raised
        what = f"fails in {raised.path or 'forward()'}: {raised.reason}" if raised else "computes something else"
        raise InputError(f"to_torch: a smaller module {what}; use the ONNX model")

    def _attempt(self, demands: Sequence[Demand]) -> Attempt:
        """The smallest plan that meets some demands and that parameters can express, carried out and tried."""
        demands = list(demands)
        for _ in range(_ROUNDS):
            plan = make_plan(self.analysis, demands=demands)
            reader = Reader(self.exported, plan)
            more = reader.read()
            cuts = reader.cuts
            self.smallest = cuts.size() if self.smallest is None else self.smallest
            if not more:
                break
            demands += more
        else:
            raise InputError("to_torch: no plan was found that parameters can express; use the ONNX model")
        small = operate(self.masked, cuts)
        raised = self.trial.fit(small)
        for part in small.modules():
            refit(part)  # again: some weights are computed when forward() runs
        differs = None
        if raised is None and self.trial.excess(small) > 1:
            differs = self.culprits.first_difference(plan, small)
        return Attempt(demands, plan, cuts, small, raised, differs)

    # --- what did not follow ----------------------------------------------------------------------------------------

    def _remedy(self, attempt: Attempt) -> Attempt | None:
        """An attempt that goes further: with one axis whole, or with all that the nodes in question read and make."""
        for nodes, place in self._suspects(attempt):
            better = self._one_axis(attempt, nodes, place)
            if better is not None:
                return better
            demands = [demand for node in nodes for demand in self._whole(attempt, node, place)]
            if demands:
                return self._attempt([*attempt.demands, *demands])
        return None

    def _suspects(self, attempt: Attempt) -> Iterator[tuple[list[Node], Place]]:
        if attempt.raised is not None:
            return self.culprits.after_error(attempt.raised)
        return self.culprits.after_difference(attempt.differs)

    def _whole(self, attempt: Attempt, node: Node, place: Place) -> list[Demand]:
        return whole(self.analysis, attempt.plan, node, place_of(node, place))

    def _one_axis(self, attempt: Attempt, nodes: Iterable[Node], place: Place) -> Attempt | None:
        """The first of the axes that gets further when it is whole, there and where the same line is run again."""
        failed: list[Attempt] = []
        for node in nodes:
            for demand in self._whole(attempt, node, place):
                if any(_is_whole(other.plan, demand) for other in failed):
                    continue  # that much was whole already, and it did not help
                demands = [demand, *self._elsewhere(attempt, node, demand, place)]
                tried = self._attempt([*attempt.demands, *demands])
                if tried.goes_beyond(attempt):
                    return tried
                failed.append(tried)
        return None

    def _elsewhere(self, attempt: Attempt, node: Node, demand: Demand, place: Place) -> list[Demand]:
        """The same demand on nodes of the same kind that come from the same line: of other blocks of a network."""
        lines = source_lines(node.flat.source)
        names = [*node.inputs, *node.outputs]
        found = []
        for other in self.analysis.nodes() if lines else ():
            if other is node or other.op != node.op or source_lines(other.flat.source) != lines:
                continue
            theirs = [*other.inputs, *other.outputs]
            if len(theirs) != len(names):
                continue
            wanted = theirs[names.index(demand.tensor)]
            more = self._whole(attempt, other, place)
            found += [each for each in more if each.tensor == wanted and each.axis == demand.axis]
        return found

    # --- notes ------------------------------------------------------------------------------------------------------

    def _notes(self, attempt: Attempt) -> tuple[str, ...]:
        """Why it is not as small as the weights alone would allow; nothing when it is."""
        if attempt.cuts.size() <= (self.smallest or 0):
            return ()
        words = (f"{demand.cause.node}: {demand.cause.reason}" for demand in attempt.demands)
        return tuple(dict.fromkeys(words))


def _is_whole(plan: Plan, demand: Demand) -> bool:
    kept = plan.kept[demand.tensor][demand.axis]
    return kept is None or bool(kept.all())


def rebuild(module: nn.Module, origin: Origin, result: onnx.ModelProto, strict: bool) -> nn.Module:
    """The smaller module: see `ShrinkResult.to_torch`. `result` is the smaller model."""
    from onnxshrink.torch.export import export_plain, masked_copy

    masked = masked_copy(module, origin.masks)
    model = export_plain(masked, origin.args, {**origin.options, "kwargs": dict(origin.kwargs)})
    rebuilder = Rebuilder(masked, model, Inputs(origin.args, origin.kwargs), not origin.options.get("dynamo", True))
    small = rebuilder.run()
    if not rebuilder.trial.agrees_with(small, result):
        raise InputError("to_torch: the module computes something else than the model; give the one that was exported")
    notes: tuple[str, ...] = getattr(small, NOTES)
    if notes:
        rest = len(notes) - _MOST_NOTES
        more = f"; and {rest} more, see {NOTES}" if rest > 0 else ""
        text = f"{'; '.join(notes[:_MOST_NOTES])}{more}"
        if strict:
            raise InputError(f"to_torch: forward() cannot follow: {text}; with strict=False these stay whole")
        warnings.warn(f"to_torch: channels without effect stay: {text}", stacklevel=3)
    drop_full_masks(small)
    training = {name: part.training for name, part in module.named_modules()}
    for name, part in small.named_modules():
        part.training = training.get(name, False)
    return small

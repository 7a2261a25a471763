"""The forms of a model that compute the same, from the fewest parameters to rounder widths, and what each costs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.plan import make_plan
from onnxshrink.planning.align import Alignment
from onnxshrink.planning.data import Plan
from onnxshrink.speed.cost import planned, total, whole, works
from onnxshrink.speed.kernels import NOMINAL, Kernels
from onnxshrink.speed.mixture import MULTIPLES, Mixture

MOST_MORE = 1.10  # parameters, by those of the smallest form
_ROOM = 1.08  # the same for the mixture: its plan may come out a little larger than predicted
ALIKE = 1.01  # forms that differ by less in time: the smallest of them is as good
_FAR = 1.2  # forms that are predicted to take so much longer than the best are not timed
_TIMED = 4  # forms that are timed at most, besides the smallest
_TOO_SHORT = 5e-5  # seconds of a run


@dataclass(frozen=True, eq=False)
class Form:
    """One way to shrink a model.

    Attributes:
        name: "none": the fewest parameters; a number: widths are multiples of it; "mixed": each class has its own.
        alignment: the widths asked for; None: none.
        plan: what stays.
        parameters: elements of the weights that stay.
        seconds: predicted time of one run.
    """

    name: str
    alignment: Alignment | None
    plan: Plan
    parameters: int
    seconds: float


class Forms:
    """The forms of one model, the smallest first.

    Args:
        analysis: the facts.
        smallest: the plan with the fewest parameters.
        kernels: what work costs."""

    def __init__(self, analysis: Analysis, smallest: Plan, kernels: Kernels) -> None:
        self._analysis = analysis
        self._kernels = kernels
        self._works = works(analysis)
        self._mixture: Mixture | None = None
        self.all = [self._form("none", None, smallest)]
        self._align()

    def _align(self) -> None:
        """Add forms with rounder widths, as far as they weigh little more than the smallest."""
        alignments = {str(multiple): Alignment(multiple) for multiple in MULTIPLES}
        plans = {name: make_plan(self._analysis, alignment) for name, alignment in alignments.items()}
        self._mixture = Mixture(self._analysis, {int(n): p for n, p in plans.items()}, self._works, self._kernels)
        alignments["mixed"] = Alignment(1, self._mixture.choose(_ROOM))
        plans["mixed"] = make_plan(self._analysis, alignments["mixed"])
        seen = {_signature(self.all[0].plan)}
        for name, plan in plans.items():
            signature, form = _signature(plan), self._form(name, alignments[name], plan)
            if signature not in seen and form.parameters <= MOST_MORE * self.all[0].parameters:
                self.all.append(form)
            seen.add(signature)

    def _form(self, name: str, alignment: Alignment | None, plan: Plan) -> Form:
        seconds = planned(self._analysis, self._works, self._kernels, plan)
        return Form(name, alignment, plan, _weights(plan), seconds)

    def predicted(self) -> Form:
        """The form that is predicted to be the fastest."""
        return fastest(self.all, [form.seconds for form in self.all])

    def promising(self) -> list[Form]:
        """The smallest form and those that may be the fastest."""
        best = min(form.seconds for form in self.all)
        others = [form for form in self.all[1:] if form.seconds <= _FAR * best]
        return [self.all[0], *sorted(others, key=lambda form: form.seconds)[:_TIMED]]

    def whole(self, form: Form, slow: Collection[str]) -> Form | None:
        """The same form, but layers with these labels keep all their channels; None when they do so already."""
        if self._mixture is None:
            return None
        before = form.alignment or Alignment()
        keys = before.whole | self._mixture.classes(slow)
        if keys == before.whole:
            return None
        alignment = replace(before, whole=keys)
        return self._form(f"{form.name}, some layers whole", alignment, make_plan(self._analysis, alignment))

    def final(self, form: Form) -> Plan:
        """The plan of a form, with the reasons for its widths on record."""
        if form.alignment is None or self._mixture is None:
            return form.plan
        return make_plan(self._analysis, replace(form.alignment, words=self._mixture.words()))


def is_short(analysis: Analysis) -> bool:
    """Whether a run is spent on starting kernels, whatever their widths are."""
    seconds = total(works(analysis), NOMINAL, lambda axis: whole(analysis, axis))
    return seconds < _TOO_SHORT


def fastest(forms: Sequence[Form], seconds: Sequence[float]) -> Form:
    """The smallest of those that are as good as the fastest."""
    limit = min(seconds) * ALIKE
    good = [form for form, value in zip(forms, seconds, strict=True) if value <= limit]
    return min(good, key=lambda form: form.parameters)


def _signature(plan: Plan) -> int:
    return hash(tuple(mask.tobytes() for axes in plan.kept.values() for mask in axes if mask is not None))


def _weights(plan: Plan) -> int:
    """Elements of the constants that stay, each use counted."""
    masks = [
        [mask for mask in kept if mask is not None] for slots in plan.constants.values() for kept in slots.values()
    ]
    return sum(int(np.prod([np.count_nonzero(mask) for mask in kept], dtype=np.int64)) for kept in masks)

"""The forms of a model that compute the same, from the fewest parameters to rounder widths, and the fastest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.plan import make_plan
from onnxshrink.planning.align import Alignment
from onnxshrink.planning.data import Plan
from onnxshrink.speed.cost import planned, total, whole, works
from onnxshrink.speed.kernels import Kernels
from onnxshrink.speed.mixture import MULTIPLES, Mixture

MOST_MORE = 1.10  # parameters, by those of the smallest form
_ALIKE = 0.01  # forms that differ by less in time: the smallest of them is as good
_FAR = 1.2  # forms that are predicted to take so much longer than the best are not timed
_TIMED = 4  # forms that are timed at most, besides the smallest
_TOO_SHORT = 5e-5  # seconds; such a run is spent on starting kernels, whatever their widths


@dataclass(frozen=True, eq=False)
class Form:
    """One way to shrink a model.

    Attributes:
        name: "none": the fewest parameters; a number: widths are multiples of it; "mixed": each class has its own.
        plan: what stays.
        parameters: elements of the weights that stay.
        seconds: predicted time of one run.
    """

    name: str
    plan: Plan
    parameters: int
    seconds: float


class Forms:
    """The forms of one model, the smallest first."""

    def __init__(self, analysis: Analysis, smallest: Plan, kernels: Kernels) -> None:
        self._analysis = analysis
        self._kernels = kernels
        self._works = works(analysis)
        self._seen: set[int] = set()
        self.input_seconds = total(self._works, kernels, lambda axis: whole(analysis, axis))
        self.all: list[Form] = []
        self._add("none", smallest)

    def align(self) -> None:
        """Add forms with rounder widths, as far as they weigh little more than the smallest."""
        if self.input_seconds < _TOO_SHORT:
            return
        plans = {m: make_plan(self._analysis, Alignment(m)) for m in MULTIPLES}
        mixture = Mixture(self._analysis, plans, self._works, self._kernels)
        chosen, words = mixture.choose(), mixture.words()
        for multiple in MULTIPLES:
            # Once more, for the reasons on record.
            self._add(str(multiple), make_plan(self._analysis, Alignment(multiple, words=words)))
        self._add("mixed", make_plan(self._analysis, Alignment(1, chosen, words=words)))

    def _add(self, name: str, plan: Plan) -> None:
        key = hash(tuple(mask.tobytes() for axes in plan.kept.values() for mask in axes if mask is not None))
        if key in self._seen:
            return
        self._seen.add(key)
        form = Form(name, plan, _weights(plan), planned(self._analysis, self._works, self._kernels, plan))
        if not self.all or form.parameters <= MOST_MORE * self.all[0].parameters:
            self.all.append(form)

    def predicted(self) -> Form:
        """The form that is predicted to be the fastest."""
        return _fastest(self.all, [form.seconds for form in self.all])

    def promising(self) -> list[Form]:
        """The smallest form and those that may be the fastest."""
        best = min(form.seconds for form in self.all)
        others = [form for form in self.all[1:] if form.seconds <= _FAR * best]
        return [self.all[0], *sorted(others, key=lambda form: form.seconds)[:_TIMED]]


def _fastest(forms: Sequence[Form], seconds: Sequence[float]) -> Form:
    """The smallest of those that are as good as the fastest."""
    limit = min(seconds) * (1 + _ALIKE)
    good = [form for form, value in zip(forms, seconds, strict=True) if value <= limit]
    return min(good, key=lambda form: form.parameters)


def _weights(plan: Plan) -> int:
    """Elements of the constants that stay, each use counted."""
    masks = [
        [mask for mask in kept if mask is not None] for slots in plan.constants.values() for kept in slots.values()
    ]
    return sum(int(np.prod([np.count_nonzero(mask) for mask in kept], dtype=np.int64)) for kept in masks)

"""Choosing the fastest form of a model by running it, and never one that is slower than the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.bench import make_timing, measure
from onnxshrink.bench.operators import by_node
from onnxshrink.bench.tasks import Tasks
from onnxshrink.errors import InputError
from onnxshrink.graph import ModelLike
from onnxshrink.lazy import LazyModel
from onnxshrink.planning.data import Plan
from onnxshrink.speed.choose import ALIKE, Form, Forms, fastest, is_short
from onnxshrink.speed.kernels import load_kernels
from onnxshrink.speed.latency import Latency
from onnxshrink.weights import Array

Apply = Callable[[Plan], "LazyModel | None"]  # None: the plan removes nothing
_BUDGET = 0.6  # seconds of timing per model
_TRIES = 3  # how often more layers are kept whole where the result is slower


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen.

    Attributes:
        plan: what stays; None: everything, because every smaller form is slower.
        latency: how long it takes; None where nothing was timed, or nothing was chosen.
        note: why nothing was timed, or why everything stays.
    """

    plan: Plan | None
    latency: Latency | None = None
    note: str | None = None


def choose(
    source: ModelLike,
    analysis: Analysis,
    smallest: Plan,
    apply: Apply,
    *,
    timing: bool,
    inputs: Mapping[str, Array],
    seed: int,
) -> Choice:
    """The plan of the fastest form.

    Args:
        source: the model that came in, or its path.
        analysis: its facts.
        smallest: the plan with the fewest parameters.
        apply: makes the model of a plan.
        timing: run the forms; without, the cost model decides alone.
        inputs: values of some inputs; the others are drawn at random.
        seed: of the random inputs.
    """
    if is_short(analysis):
        return Choice(smallest, note="one run takes microseconds")
    forms = Forms(analysis, smallest, load_kernels())
    if not timing:
        return Choice(forms.final(forms.predicted()))
    try:
        return _Contest(source, forms, apply, inputs, seed).decide()
    except InputError as error:
        return Choice(forms.final(forms.predicted()), note=str(error))


class _Contest:
    """The input and its forms, run in turns."""

    def __init__(self, source: ModelLike, forms: Forms, apply: Apply, inputs: Mapping[str, Array], seed: int) -> None:
        self._source = source
        self._forms = forms
        self._apply = apply
        self._inputs = inputs
        self._seed = seed
        self._before = 0.0
        self._tried: dict[str, float] = {}

    def decide(self) -> Choice:
        """The fastest form, unless the input is faster. Raises InputError where the input cannot be run."""
        forms = self._forms.promising()
        for _ in range(1 + _TRIES):
            made = [(form, model) for form in forms if (model := self._apply(form.plan)) is not None]
            if not made:
                break
            before, *after = self._race([model for _, model in made])
            self._before = float(np.median(before))
            entrants = [form for form, _ in made]
            self._tried |= {form.name: float(np.median(s)) for form, s in zip(entrants, after, strict=True)}
            best = entrants.index(_winner(entrants, after))
            timing, nodes = make_timing(before, after[best]), self._profile(made[best][1])
            if timing.verdict != "slower":
                latency = Latency(timing, entrants[best].name, dict(self._tried), nodes)
                return Choice(self._forms.final(entrants[best]), latency)
            slow = {name for name, (seconds, longer) in nodes.items() if longer > seconds}
            wider = self._forms.whole(entrants[best], slow)
            if wider is None:
                break
            forms = [wider]
        return Choice(None, None, self._regret())

    def _race(self, models: list[LazyModel]) -> list[Array]:
        everything = [self._source, *models]
        return measure(everything, inputs=self._inputs, seconds=_BUDGET * len(everything), seed=self._seed)

    def _profile(self, model: LazyModel) -> dict[str, tuple[float, float]]:
        """Seconds before and after, of every node that is in both."""
        with Tasks([self._source, model], self._inputs, 1, self._seed) as tasks:
            nodes = by_node(*tasks.profile(_BUDGET, None))
        found = {}
        for node in nodes:
            before, after = node.seconds
            if before is not None and after is not None:
                found[node.name] = (before, after)
        return found

    def _regret(self) -> str:
        """Why nothing is removed although something could be."""
        if not self._tried:
            return "with the widths that the runtime is fastest at, no channel can go; --align none removes what can go"
        best = min(self._tried.values()) / self._before
        return (
            f"every smaller form that was tried runs slower than the input ({best:.2f} times as long at best); "
            "--align none removes what can go all the same"
        )


def _winner(entrants: Sequence[Form], taken: Sequence[Array]) -> Form:
    """Of the forms that cannot be told from the fastest, the one predicted to be it; of equal ones the smallest."""
    first = taken[int(np.argmin([np.median(seconds) for seconds in taken]))]
    timings = [make_timing(first, seconds) for seconds in taken]
    alive = [form for form, timing in zip(entrants, timings, strict=True) if min(timing.low, timing.ratio / ALIKE) <= 1]
    return fastest(alive, [form.seconds for form in alive])

"""Choosing the fastest form of a model by running it, and never one that is slower than the input."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from onnxshrink.analyse import Analysis
from onnxshrink.errors import InputError
from onnxshrink.graph import ModelLike
from onnxshrink.inputs import RunError, draw_runnable
from onnxshrink.planning.data import Plan
from onnxshrink.roles import describe
from onnxshrink.runtime import Model, Session, open_session
from onnxshrink.speed.choose import Form, Forms, fastest, is_short
from onnxshrink.speed.clock import race, ratio
from onnxshrink.speed.kernels import load_kernels
from onnxshrink.speed.latency import Latency
from onnxshrink.speed.profile import profile
from onnxshrink.weights import Array

Apply = Callable[[Plan], "onnx.ModelProto | None"]  # None: the plan removes nothing
_BUDGET = 3.0  # seconds of timing per race
_SLOWER = 1.01  # a ratio within this is no difference that anybody would notice
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
    with tempfile.TemporaryDirectory() as folder:
        try:
            contest = _Contest(source, forms, apply, Path(folder), inputs, seed)
        except InputError as error:
            return Choice(forms.final(forms.predicted()), note=str(error))
        return contest.decide()


@dataclass(frozen=True, eq=False)
class _Entrant:
    """A form that can be run."""

    form: Form
    model: Model
    session: Session


class _Contest:
    """The input and its forms, run in turns."""

    def __init__(
        self, source: ModelLike, forms: Forms, apply: Apply, folder: Path, inputs: Mapping[str, Array], seed: int
    ) -> None:
        self._forms = forms
        self._apply = apply
        self._folder = folder
        self._input = Model(source, "reference", folder / "reference")
        self._session = open_session(self._input)
        described = describe(self._input.light)
        ((self._feed, _),) = draw_runnable(described, inputs, self._session.run, 1, seed)
        self._tried: dict[str, float] = {}
        self._before = 0.0

    def decide(self) -> Choice:
        """The fastest form, unless the input is faster."""
        forms = self._forms.promising()
        for _ in range(1 + _TRIES):
            entrants = [entrant for form in forms if (entrant := self._enter(form)) is not None]
            if not entrants:
                break
            times = self._race(entrants)
            medians = np.median(times, axis=0)
            best = fastest([entrant.form for entrant in entrants], medians[1:].tolist())
            column = 1 + next(i for i, entrant in enumerate(entrants) if entrant.form is best)
            entrant, found = entrants[column - 1], ratio(times[:, column], times[:, 0])
            nodes = self._profile(entrant)
            if found.low <= 1 or found.value <= _SLOWER:
                figures = (found.value, found.low, found.high, len(times))
                latency = Latency(self._before, float(medians[column]), *figures, best.name, dict(self._tried), nodes)
                return Choice(self._forms.final(best), latency)
            wider = self._forms.whole(best, {name for name, (before, after) in nodes.items() if after > before})
            if wider is None:
                break
            forms = [wider]
        return Choice(None, None, self._regret())

    def _enter(self, form: Form) -> _Entrant | None:
        """The form as a model; None when it is the input itself, or does not run (verification tells why)."""
        proto = self._apply(form.plan)
        if proto is None:
            return None
        model = Model(proto, "candidate", self._folder / form.name)
        try:
            session = Session(model)
            session.run(self._feed)
        except RunError:
            return None
        return _Entrant(form, model, session)

    def _race(self, entrants: list[_Entrant]) -> Array:
        sessions = [self._session, *(entrant.session for entrant in entrants)]
        times = race([partial(session.run, self._feed) for session in sessions], _BUDGET)
        medians = np.median(times, axis=0)
        self._before = float(medians[0])
        self._tried |= {e.form.name: float(m) for e, m in zip(entrants, medians[1:], strict=True)}
        return times

    def _profile(self, entrant: _Entrant) -> dict[str, tuple[float, float]]:
        before, after = profile(self._input, self._feed), profile(entrant.model, self._feed)
        return {name: (seconds, after[name]) for name, seconds in before.items() if name in after}

    def _regret(self) -> str:
        """Why nothing is removed although something could be."""
        if not self._tried:
            return "with the widths that the runtime is fastest at, no channel can go; --align none removes what can go"
        best = min(self._tried.values()) / self._before
        return (
            f"every smaller form that was tried runs slower than the input ({best:.2f} times as long at best); "
            "--align none removes what can go all the same"
        )

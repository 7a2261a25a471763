"""A smaller model compared with what it was made from; differences that are mere rounding are told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxshrink.errors import OnnxshrinkError
from onnxshrink.plan import Plan
from onnxshrink.reading import ModelLike
from onnxshrink.runtime import LoadError
from onnxshrink.source import Source
from onnxshrink.verify import Equivalence, OutputsDiffer, amplification
from onnxshrink.verify import verify as compare

if TYPE_CHECKING:
    from onnxshrink.shrink import Options

# An error counts as rounding that the model amplifies when it is within so many times what the rounding of the inputs
# alone does to the outputs: every layer rounds too, and its sums are taken in another order.
_AMPLIFIED = 30.0
# Rounding alone makes a few hundredths of the limit. Where the outputs differ by more than the first share of it, and
# the rounding of the inputs' last bit alone makes more than the second, other inputs may well be beyond the limit.
_DOUBTFUL, _UNSTABLE = 0.2, 0.5


def examine(
    source: Source, candidate: ModelLike, plan: Plan, options: Options
) -> tuple[Equivalence | None, str | None]:
    """The comparison; or why it says nothing. Raises OutputsDiffer where the outputs differ without an excuse."""
    try:
        equivalence = _verify(source, candidate, plan, options)
    except OutputsDiffer as error:
        note = _excuse(source, error, options)
        if note is None:
            raise
        return None, note
    if equivalence.error > _DOUBTFUL * equivalence.limit:
        moved = _moved(source, options)
        if moved > _UNSTABLE * equivalence.limit:
            return None, _amplified(equivalence.error, moved, "the model")
    return equivalence, None


def _verify(source: Source, candidate: ModelLike, plan: Plan, options: Options) -> Equivalence:
    kept = {name: axes for name, axes in plan.kept.items() if name in plan.present}
    inputs, samples, seed = options.inputs, options.samples, options.seed
    try:
        return compare(source.model, candidate, inputs=inputs, samples=samples, seed=seed, kept=kept)
    except LoadError as error:
        if error.label == "reference":
            raise
        raise OnnxshrinkError(f"onnxruntime does not take the result (a fault of onnxshrink): {error}") from error


def _moved(source: Source, options: Options) -> float:
    """What a change of the inputs' last bit does to the outputs."""
    return amplification(source.model, inputs=options.inputs, samples=options.samples, seed=options.seed)


def _excuse(source: Source, error: OutputsDiffer, options: Options) -> str | None:
    """Why a difference is rounding and no fault: the model does as much to a change of its inputs' last bit."""
    if error.equivalence is None or error.divergence is None:
        return None
    moved = _moved(source, options)
    if error.equivalence.error > _AMPLIFIED * moved:
        return None
    return _amplified(error.equivalence.error, moved, error.divergence.node or error.divergence.tensor)


def _amplified(error: float, moved: float, culprit: str) -> str:
    return (
        f"rounding differences are amplified to the limit or beyond it by {culprit} "
        f"({error:.1e} of the range; a change in the inputs' last bit makes {moved:.1e}); "
        "pass --no-verify (in Python, verify=False) to shrink anyway"
    )

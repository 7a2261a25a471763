"""Facts found by trial: one node at a time, run alone on random inputs. Names no operator.

Nothing here is proven: an output that did not change in any sample may change in another. So it is done on request
only, what it finds is marked (`Rule.unproven`), and the result is compared with the original whatever the user says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from onnxshrink.errors import InputError
from onnxshrink.facts import Known, partial
from onnxshrink.graph import Node
from onnxshrink.notation import Relation, UnresolvedError
from onnxshrink.registry import Lookup, Rewrite, Rule, rule_of
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray

# Free dimensions take these extents in turn: what holds must not depend on them.
_EXTENTS = (2, 3)
# Values of many magnitudes, so that an operator that saturates or has a threshold shows it.
_SCALES = (1.0, 0.1, 10.0, 100.0)
_MINIMUM = 2
# How many samples are drawn where nobody says.
DEFAULT_SAMPLES = 8


def prober(samples: int, otherwise: Lookup = rule_of) -> Lookup:
    """Rules for nodes that have none: which elements of their outputs hold one value in so many random samples.

    Raises InputError for fewer than two samples.
    """
    if samples < _MINIMUM:
        raise InputError(f"{samples} samples cannot tell what changes; probe with at least {_MINIMUM}")

    def lookup(node: Node) -> Rule | None:
        rule = otherwise(node)
        if rule is not None and rule.refusal is None:
            return rule
        reason = "no rule for this operator" if rule is None else rule.refusal or ""
        return Rule(
            node.op,
            node.domain,
            relate=lambda view: _outputs_alone(view, samples, reason),
            forward=lambda view: constant_outputs(view, samples),
            rewrite=_select,
            decodes=True,
            unproven=f"{samples} random samples",
        )

    return lookup


def _outputs_alone(view: View, samples: int, reason: str) -> Relation:
    """Every input whole, every output free to lose indices: those that are not needed are left out behind the node.

    Raises UnresolvedError where no output is constant anywhere.
    """
    found = constant_outputs(view, samples)
    if all(fact is None for fact in found):
        raise UnresolvedError(f"{reason}; in {samples} random samples no output was constant")
    sizes: dict[str, int | None] = {}
    specs = []
    for index, operand in enumerate(view.outputs):
        names = [f"o{index}_{axis}" for axis in range(operand.rank if operand is not None else 0)]
        sizes.update({name: operand.extent(axis) for axis, name in enumerate(names) if operand is not None})
        specs.append(None if operand is None else tuple((name,) for name in names))
    pinned = frozenset(name for name, size in sizes.items() if size is None)
    return Relation((None,) * len(view.inputs), tuple(specs), sizes, pinned)


def _select(view: View) -> Rewrite:
    axes: dict[int, Mapping[int, Array]] = {}
    for index, operand in enumerate(view.outputs):
        slot = -1 - index
        if operand is not None and slot in view.kept:
            cut = {axis: view.kept_indices(slot, axis) for axis in range(operand.rank) if view.shrinks(slot, axis)}
            axes[index] = cut
    return Rewrite(select=axes)


# --- what is constant ------------------------------------------------------------------------------------------------


def constant_outputs(view: View, samples: int) -> list[Known | None]:
    """Per output, the elements that hold one value in every sample.

    Raises UnresolvedError when the node cannot be run alone.
    """
    found: list[Known | None] = []
    for sample in range(samples):
        extent = _EXTENTS[sample % len(_EXTENTS)]
        results = run(view, draw(view, np.random.default_rng(sample), extent, _SCALES[sample % len(_SCALES)]))
        facts = [_along_free(operand, next(results)) if operand is not None else None for operand in view.outputs]
        found = facts if not sample else [_agreed(a, b) for a, b in zip(found, facts, strict=True)]
    return [partial(fact.mask, fact.value) if fact is not None and fact.anything else None for fact in found]


def _along_free(operand: Operand, value: Array) -> Known:
    """The elements that are the same along every free dimension."""
    if value.ndim != operand.rank:
        raise UnresolvedError(f"the shape of {operand.name!r} is not what it seems")
    mask: BoolArray = np.ones(value.shape, np.bool_)
    for axis in range(operand.rank):
        if operand.extent(axis) is None:
            first = value[(slice(None),) * axis + (slice(0, 1),)]
            mask = (mask & (value == first)).all(axis=axis, keepdims=True)
            value = first
    return Known(mask, value)


def _agreed(a: Known | None, b: Known | None) -> Known | None:
    if a is None or b is None or a.value.shape != b.value.shape:
        return None
    return Known(a.mask & b.mask & (a.value == b.value), a.value)


# --- running one node ------------------------------------------------------------------------------------------------


def shape_of(operand: Operand, extent: int) -> tuple[int, ...]:
    """The shape of a tensor, free dimensions with the extent given."""
    sizes = [operand.extent(axis) for axis in range(operand.rank)]
    return tuple(extent if size is None else size for size in sizes)


def draw(view: View, rng: np.random.Generator, extent: int, scale: float = 1.0) -> list[Array | None]:
    """Values for every input of a node: constants and known elements as they are, the rest random.

    Raises UnresolvedError for whole numbers, of which random ones may not be valid.
    """
    return [None if operand is None else _draw_one(operand, rng, extent, scale) for operand in view.inputs]


def _draw_one(operand: Operand, rng: np.random.Generator, extent: int, scale: float) -> Array:
    if operand.constant is not None:
        return operand.constant.array()
    shape, dtype = shape_of(operand, extent), operand.dtype
    if dtype is not None and dtype.kind == "b":
        drawn = rng.integers(0, 2, shape).astype(np.bool_)
    elif dtype is not None and np.issubdtype(dtype, np.floating):
        drawn = (rng.standard_normal(shape) * scale).astype(dtype)
    else:
        raise UnresolvedError(f"its input {operand.name!r} is of {dtype}, of which random values may not be valid")
    known = operand.known
    return np.where(known.mask, known.value, drawn).astype(drawn.dtype) if known.anything else drawn


def run(view: View, inputs: list[Array | None]) -> Iterator[Array]:
    """Outputs of the node alone, those that are left out excepted. Raises UnresolvedError when it does not run."""
    results = view.run(inputs)
    if results is None:
        raise UnresolvedError("no rule for this operator, and onnxruntime cannot run it alone")
    return iter(results)

"""Operators that mix an axis and keep the shape: normalisations and softmaxes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxshrink.facts import Known, along, everything, partial, uniform
from onnxshrink.families import infinities, needed_by_relation
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray, all_along, any_along

# --- BatchNormalization: an affine map per channel --------------------------------------------------------------


def _batch_norm(view: View) -> Relation:
    if view.attribute("training_mode", 0) or any(output is not None for output in view.outputs[1:]):
        raise UnresolvedError("batch normalisation in training mode")
    return resolve("n c *x, c, c, c, c -> n c *x", view.shapes(view.inputs), view.shapes(view.outputs[:1]))


def _batch_norm_forward(view: View) -> list[Known | None]:
    """Known where the input is; constant where the scale is zero."""
    parameters = [view.data(slot).value() for slot in range(1, 5)]
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    if any(value is None for value in parameters):
        return [None, *rest]
    shape = [1, -1] + [1] * (view.data().rank - 2)
    scale, shift, mean, variance = (np.asarray(value, np.float64).reshape(shape) for value in parameters)
    known = view.data().known
    mask = known.mask | (scale == 0)
    if not mask.any():
        return [None, *rest]
    factor = scale / np.sqrt(variance + view.attribute("epsilon", 1e-5))
    value = np.where(known.mask, known.value, 0).astype(np.float64)
    result = np.where(scale == 0, shift, (value - mean) * factor + shift)
    return [partial(mask, np.where(mask, result, 0).astype(view.output().dtype)), *rest]


register(Rule("BatchNormalization", since=9, relate=_batch_norm, forward=_batch_norm_forward))


# --- Softmax: all or nothing along its axis ---------------------------------------------------------------------


def _softmax(view: View) -> Relation:
    rank = view.data().rank
    old = view.version < 13
    axis = int(view.attribute("axis", 1 if old else -1)) % max(rank, 1)
    mixed = range(axis, rank) if old else [axis]
    axes = " ".join(f"[a{a}]" if a in mixed else f"a{a}" for a in range(rank))
    return resolve(f"{axes} -> {axes}", view.shapes(view.inputs), view.shapes(view.outputs))


def _softmax_axis(view: View) -> int | None:
    """The axis along which the results sum to one, if it is one alone."""
    rank = view.data().rank
    old = view.version < 13
    axis = int(view.attribute("axis", 1 if old else -1)) % max(rank, 1)
    return None if rank == 0 or (old and axis != rank - 1) else axis


def _softmax_infinite(view: View) -> list[BoolArray | None]:
    """No number comes out where all scores are minus infinity; else every result is finite."""
    axis, mask = _softmax_axis(view), infinities(view.data())
    if mask is None:
        return [None]
    return [everything(mask.ndim) if axis is None else all_along(mask, (axis,), keepdims=True)]


def _softmax_blind(view: View) -> dict[int, int]:
    """A number added to all scores leaves as it came."""
    axis = _softmax_axis(view)
    return {} if axis is None else {0: axis}


for _op in ("Softmax", "Hardmax"):
    register(Rule(_op, relate=_softmax, unit=_softmax_axis, blind=_softmax_blind, infinite=_softmax_infinite))
register(Rule("LogSoftmax", relate=_softmax, blind=_softmax_blind))


# --- Normalisations that mean over their axis: whole, unless their output forgets the input ---------------------


def _mixed_axes(view: View) -> str:
    """Notation of the input: the axes from `axis` on are mixed."""
    rank = view.data().rank
    axis = int(view.attribute("axis", -1)) % rank
    return " ".join(f"[a{a}]" if a >= axis else f"a{a}" for a in range(rank))


def _layer_norm(view: View) -> Relation:
    rank = view.data().rank
    axis = int(view.attribute("axis", -1)) % rank
    scale = " ".join(f"[a{a}]" for a in range(axis, rank))
    statistics = " ".join("1" if a >= axis else f"a{a}" for a in range(rank))
    notation = f"{_mixed_axes(view)}, {scale}, {scale} -> {_mixed_axes(view)}, {statistics}, {statistics}"
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))


def _scaled_to_nothing(view: View) -> list[Known | None]:
    """Where the scale is zero, the output is the shift, whatever comes in."""
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    scale, shift = view.data(1).value(), view.input(2)
    if scale is None or not (scale == 0).any() or (shift is not None and shift.value() is None):
        return [None, *rest]
    lead = (1,) * (view.data().rank - scale.ndim)
    value = np.zeros_like(scale) if shift is None else np.broadcast_to(shift.known.value, scale.shape)
    return [partial((scale == 0).reshape(lead + scale.shape), value.reshape(lead + scale.shape)), *rest]


WHOLE_NORM = Rule("LayerNormalization", since=17, relate=_layer_norm, forward=_scaled_to_nothing)


# --- Root mean square: zeros leave, the divisor is rescaled -----------------------------------------------------


def rms_relation(view: View) -> Relation:
    """`... c, c -> ... c` over the last axis; further outputs are statistics."""
    rank = view.data().rank
    if int(view.attribute("axis", -1)) % rank != rank - 1:
        raise UnresolvedError("a norm over several axes")
    outputs = ["*b c", "*b 1", "*b 1", "*b c"][: max(1, len(view.outputs))]
    notation = f"*b c, c -> {', '.join(outputs)}"
    relation = resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))
    # The statistics are those of the whole axis.
    return relation.pin("c") if any(output is not None for output in view.outputs[1:]) else relation


def zero_stays(view: View) -> list[Known | None]:
    """Zero elements of the data come out as zero."""
    known = view.data().known
    zero = known.zero()
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    if not zero.any():
        return [None, *rest]
    dtype = view.output().dtype
    return [partial(zero, np.zeros((1,) * zero.ndim, dtype)), *rest]


def mixes(*axes: int) -> Callable[[View], list[BoolArray | None]]:
    """Every element of the data along `axes` is needed where any output along them is; the rest as related."""

    def backward(view: View) -> list[BoolArray | None]:
        needed = needed_by_relation(view)
        data = needed[0]
        assert data is not None
        normal = tuple(axis % data.ndim for axis in axes)
        return [any_along(data, normal, keepdims=True), *needed[1:]]

    return backward


def only_zeros_leave(slot: int, axis: int) -> Callable[[View], list[Keep]]:
    """Indices of one axis that are not known to be zero throughout must stay: the norm reads them."""

    def retain(view: View) -> list[Keep]:
        data = view.data(slot)
        kept = view.kept[slot][axis % data.rank]
        if kept is None:
            return []
        zero = data.zero()
        rest = tuple(a for a in range(zero.ndim) if a != axis % data.rank)
        wanted = np.array(np.broadcast_to(~zero.all(axis=rest), (kept.size,)))
        return [Keep(slot, axis % data.rank, wanted, "the norm's divisor reads it")]

    return retain


def rms_rewrite(view: View) -> Rewrite:
    """`k` of `C` channels stay, the others are zero: `eps * C / k` and `scale * sqrt(C / k)` give the same.

    With S the sum of squares: x * g / sqrt(S / C + e) = x * g * sqrt(C / k) / sqrt(S / k + e * C / k).
    """
    axis = view.data().rank - 1
    extent, count = view.data().extent(axis), view.kept_count(0, axis)
    if extent is None or count is None or extent == count:
        return Rewrite()
    scale = view.data(1)
    value = scale.value()
    assert value is not None
    kept = view.kept[0][axis]
    ratio = extent / count
    new = (value.astype(np.float64) * np.sqrt(ratio)).astype(value.dtype)
    new = new[kept] if new.shape[-1:] == (extent,) else new
    epsilon = float(view.attribute("epsilon", 1e-5)) * ratio
    return Rewrite(constants={1: new}, attributes={"epsilon": epsilon})


def _rms(view: View) -> Relation:
    relation = rms_relation(view)
    return relation if view.data(1).constant is not None else relation.pin("c")


def rms_rule(op: str, domain: str = "", since: int = 1) -> Rule:
    """The rule of a root mean square norm over the last axis."""
    return Rule(
        op,
        domain,
        since,
        relate=_rms,
        forward=zero_stays,
        backward=mixes(-1),
        retain=only_zeros_leave(0, -1),
        rewrite=rms_rewrite,
    )


register(rms_rule("RMSNormalization", since=23))
register(rms_rule("SimplifiedLayerNormalization"))


# --- Per channel and per group: a constant channel or group becomes its shift -----------------------------------


def _instance_norm(view: View) -> Relation:
    return resolve("n c [*x], c, c -> n c [*x]", view.shapes(view.inputs), view.shapes(view.outputs))


def _normalised_groups(view: View, groups: int | None, shift: Array | None) -> list[Known | None]:
    """A group whose channels all hold one and the same value is centred to zero: the shift is left."""
    data = view.data()
    count = data.extent(1)
    known = uniform(data.known, (a for a in range(data.rank) if a != 1))
    if not known.anything or count is None or shift is None:
        return [None]
    mask = along(known.mask, 1, count).reshape(groups or count, -1)
    value = along(known.value, 1, count).reshape(groups or count, -1)
    dead = mask.all(axis=1) & (value == value[:, :1]).all(axis=1)
    shape = [1, count] + [1] * (data.rank - 2)
    result = np.broadcast_to(shift, (count,)).astype(view.output().dtype).reshape(shape)
    return [partial(np.repeat(dead, count // dead.size).reshape(shape), result)]


def _instance_norm_forward(view: View) -> list[Known | None]:
    return _normalised_groups(view, None, view.data(2).value())


register(Rule("InstanceNormalization", since=6, relate=_instance_norm, forward=_instance_norm_forward))


def _group_norm(view: View) -> Relation:
    """Whole groups leave. The scale is given per group at opset 18, per channel from opset 21 on."""
    scale = "(g c)" if view.version >= 21 else "g"
    notation = f"n (g c) [*x], {scale}, {scale} -> n (g c) [*x]"
    sizes = {"g": int(view.attribute("num_groups"))}
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs), sizes).pin("c")


def _group_norm_forward(view: View) -> list[Known | None]:
    groups, count = int(view.attribute("num_groups")), view.data().extent(1)
    shift = view.data(2).value()
    if shift is not None and count is not None and shift.size == groups:
        shift = np.repeat(shift, count // groups)
    return _normalised_groups(view, groups, shift)


def _group_norm_rewrite(view: View) -> Rewrite:
    kept = view.kept[0][1]
    if kept is None or kept.all():
        return Rewrite()
    groups = kept.reshape(int(view.attribute("num_groups")), -1).any(axis=1)
    return Rewrite(attributes={"num_groups": int(groups.sum())})


register(
    Rule(
        "GroupNormalization",
        since=18,
        relate=_group_norm,
        forward=_group_norm_forward,
        rewrite=_group_norm_rewrite,
    )
)


# --- Others -----------------------------------------------------------------------------------------------------


def _lp_norm(view: View) -> Relation:
    rank = view.data().rank
    axes = " ".join(f"a{a}" for a in range(rank))
    return resolve(f"{axes} -> {axes}", view.shapes(view.inputs), view.shapes(view.outputs))


def _lp_axis(view: View) -> int:
    return int(view.attribute("axis", -1))


register(
    Rule(
        "LpNormalization",
        relate=_lp_norm,
        forward=zero_stays,
        backward=lambda view: mixes(_lp_axis(view))(view),
        retain=lambda view: only_zeros_leave(0, _lp_axis(view))(view),
    )
)


def _mean_variance(view: View) -> Relation:
    axes = [axis % view.data().rank for axis in view.attribute("axes", [0, 2, 3])]
    names = " ".join(f"[a{a}]" if a in axes else f"a{a}" for a in range(view.data().rank))
    return resolve(f"{names} -> {names}", view.shapes(view.inputs), view.shapes(view.outputs))


def _mean_variance_forward(view: View) -> list[Known | None]:
    """Zeros throughout what is averaged stay zero."""
    known = view.data().known
    axes = tuple(axis % view.data().rank for axis in view.attribute("axes", [0, 2, 3]))
    zero = all_along(known.zero(), axes, keepdims=True)
    return [partial(zero, np.zeros((1,) * zero.ndim, view.output().dtype))]


register(Rule("MeanVarianceNormalization", since=9, relate=_mean_variance, forward=_mean_variance_forward))
# Local response normalisation reads neighbouring channels, counted by position.
register(Rule("LRN", relate="n [c] *x -> n [c] *x", forward=zero_stays))

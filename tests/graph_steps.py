"""The steps that a random graph is made of: windows, elementwise operators, normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from graph_builder import MOST_CHANNELS, Array, Builder, Rejected, Tensor, divisors

Step = Callable[[Builder], None]
STEPS: list[tuple[int, Step]] = []


def step(weight: int) -> Callable[[Step], Step]:
    """Register a step; `weight` is how often it is drawn."""

    def add(function: Step) -> Step:
        STEPS.append((weight, function))
        return function

    return add


def draw_step(builder: Builder) -> Step:
    """A step, drawn by weight."""
    position = builder.integer(0, sum(weight for weight, _ in STEPS) - 1)
    for weight, function in STEPS:
        position -= weight
        if position < 0:
            return function
    raise AssertionError("weights add up")


def image(builder: Builder) -> Tensor:
    """A tensor with channels at axis 1 and one to three axes of space."""
    return builder.pick(lambda t: 3 <= t.rank <= 5 and t.fixed(1))


def reduction_axes(builder: Builder, op: str, x: Tensor, axes: Sequence[int], **attributes: int | None) -> Tensor:
    """A node whose axes are an attribute or an input, as the opset has it."""
    since = {"Squeeze": 13, "Unsqueeze": 13, "ReduceSum": 13}.get(op, 18)
    if builder.opset >= since:
        return builder.one(op, [x, builder.integers_constant(axes)], **attributes)
    return builder.one(op, [x], axes=list(axes), **attributes)


# --- windows ----------------------------------------------------------------------------------------------------


def _window(builder: Builder, x: Tensor, dilated: bool = True) -> dict[str, object]:
    """Random kernel, strides, dilations and padding, no window larger than the padded space."""
    rank = x.rank - 2
    kernel = builder.integers(rank, 1, 3)
    found: dict[str, object] = {"kernel_shape": kernel}
    if builder.chance(40):
        found["strides"] = builder.integers(rank, 1, 2)
    if dilated and builder.chance(20):
        found["dilations"] = builder.integers(rank, 1, 2)
    if builder.chance(15) and "dilations" not in found:
        found["auto_pad"] = builder.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
    elif builder.chance(70):
        same = [k // 2 for k in kernel] * 2
        found["pads"] = same if builder.chance(60) else [builder.integer(0, max(k - 1, 0)) for k in kernel * 2]
    pads, dilations = found.get("pads", [0] * 2 * rank), found.get("dilations", [1] * rank)
    for axis in range(rank):
        padded = x.shape[2 + axis] + pads[axis] + pads[rank + axis]  # type: ignore[index]
        if padded < (kernel[axis] - 1) * dilations[axis] + 1:  # type: ignore[index]
            raise Rejected
    return found


def _groups(builder: Builder, channels: int) -> int:
    if not builder.chance(35):
        return 1
    return channels if builder.chance(50) else builder.choice(divisors(channels))


def convolution(builder: Builder, x: Tensor, outputs: int | None = None, transposed: bool = False) -> Tensor:
    """A convolution with dead rows, columns and biases."""
    channels = x.shape[1]
    groups = 1 if outputs is not None else _groups(builder, channels)
    rows = outputs if outputs is not None else groups * builder.integer(1, max(1, min(8, MOST_CHANNELS // groups)))
    window = _window(builder, x)
    kernel = list(window["kernel_shape"])  # type: ignore[call-overload]
    if transposed and window.get("auto_pad") in ("SAME_UPPER", "SAME_LOWER"):
        raise Rejected
    shape = [channels, rows // groups] if transposed else [rows, channels // groups]
    scale = (2 / (channels // groups * int(np.prod(kernel)))) ** 0.5
    weights = builder.deaden(builder.values([*shape, *kernel], scale), 0)
    weights = builder.deaden(weights, 1, 25)
    inputs: list[Tensor | str | None] = [x, builder.constant(weights)]
    if builder.chance(70):
        inputs.append(builder.constant(_bias(builder, weights, rows, transposed)))
    attributes = {"group": groups} if groups > 1 or builder.chance(20) else {}
    return builder.one("ConvTranspose" if transposed else "Conv", inputs, **window, **attributes)


def _bias(builder: Builder, weights: Array, rows: int, transposed: bool) -> Array:
    """A bias: independent of the weights, or zero where they are."""
    bias = builder.values([rows])
    if not transposed and builder.chance(50):
        bias[~weights.reshape(rows, -1).any(axis=1)] = 0
    return builder.deaden(bias, 0, 20)


@step(24)
def conv(builder: Builder) -> None:
    convolution(builder, image(builder))


@step(4)
def conv_transpose(builder: Builder) -> None:
    convolution(builder, image(builder), transposed=True)


@step(6)
def conv_block(builder: Builder) -> None:
    """Convolution, normalisation, activation."""
    x = convolution(builder, image(builder))
    if builder.chance(70):
        x = batch_normalization(builder, x)
    activation(builder, x)


@step(6)
def residual_block(builder: Builder) -> None:
    """A branch that comes back to the same channels, added to its input."""
    x = builder.pick(lambda t: t.rank == 4 and t.fixed(1))
    channels = x.shape[1]
    y = x
    for last in (False, True):
        rows = channels if last else builder.integer(1, 8)
        weights = builder.deaden(builder.values([rows, y.shape[1], 3, 3], 0.3), 0)
        inputs: list[Tensor | str | None] = [y, builder.constant(weights)]
        if builder.chance(60):
            inputs.append(builder.constant(_bias(builder, weights, rows, False)))
        y = builder.one("Conv", inputs, pads=[1] * 4)
        y = y if last else activation(builder, y)
    builder.one("Add", [x, y] if builder.chance(50) else [y, x])


@step(3)
def squeeze_excite(builder: Builder) -> None:
    """A gate per channel, computed from the mean over space."""
    x = builder.pick(lambda t: t.rank == 4 and t.fixed(1))
    y = builder.one("GlobalAveragePool", [x])
    for rows in (builder.integer(1, 6), x.shape[1]):
        weights = builder.deaden(builder.values([rows, y.shape[1], 1, 1], 0.5), 0)
        y = builder.one("Conv", [y, builder.constant(weights), builder.constant(_bias(builder, weights, rows, False))])
        y = builder.one("Sigmoid" if rows == x.shape[1] else "Relu", [y])
    builder.one("Mul", [x, y])


@step(10)
def pool(builder: Builder) -> None:
    x = image(builder)
    op = builder.choice(["MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
    if op.startswith("Global"):
        builder.one(op, [x])
        return
    modern = {"MaxPool": 11, "AveragePool": 19, "LpPool": 18}[op]
    window = _window(builder, x, dilated=builder.opset >= modern)
    if builder.chance(30) and builder.opset >= {"MaxPool": 11, "AveragePool": 11, "LpPool": 18}[op]:
        window["ceil_mode"] = 1
    if op == "AveragePool" and builder.chance(50):
        window["count_include_pad"] = 1
    builder.one(op, [x], **window)


# --- elementwise ------------------------------------------------------------------------------------------------

_SINCE = {"HardSwish": 14, "Mish": 18, "Gelu": 20, "Celu": 12}
_ACTIVATIONS = ["Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Elu", "HardSwish", "Softplus", "Mish", "Gelu"]
_UNARY = [
    *("Abs", "Neg", "Erf", "Sin", "Cos", "Atan", "Softsign", "Selu", "Celu", "ThresholdedRelu", "Identity", "Exp"),
    *("Sqrt", "Reciprocal", "Asinh", "Dropout", "Clip", "Shrink"),
]


def activation(builder: Builder, x: Tensor) -> Tensor:
    op = builder.choice([op for op in _ACTIVATIONS if _SINCE.get(op, 1) <= builder.opset])
    return builder.one(op, [x])


@step(8)
def activate(builder: Builder) -> None:
    activation(builder, builder.pick(lambda t: True))


@step(5)
def unary(builder: Builder) -> None:
    op = builder.choice([op for op in _UNARY if _SINCE.get(op, 1) <= builder.opset])
    x = builder.pick(lambda t: True)
    if op == "Sqrt":
        x = builder.one("Abs", [x], keep=False)
    elif op == "Exp":
        x = builder.one("Tanh", [x], keep=False)
    elif op == "Reciprocal":
        x = builder.one("Softplus", [x], keep=False)
    if op == "Clip":
        low, high = builder.constant(np.array(-0.5)), builder.constant(np.array(0.75))
        builder.one(op, [x, low if builder.chance(70) else None, high])
        return
    builder.one(op, [x])


def _broadcastable(builder: Builder, x: Tensor) -> Array:
    """A constant for `x`: a scalar, per channel, along a random axis, or over all axes that are fixed."""
    kind = builder.integer(0, 3)
    if kind == 0:
        return builder.values([1] * builder.integer(0, x.rank))
    if kind == 1 and x.rank >= 2 and x.fixed(1):
        shape = [x.shape[1], *[1] * (x.rank - 2)]
        return builder.deaden(builder.values(shape), 0)
    if kind == 2 and x.rank and x.fixed(axis := builder.integer(0, x.rank - 1)):
        shape = [x.shape[axis], *[1] * (x.rank - 1 - axis)]
        return builder.deaden(builder.values(shape), 0)
    shape = [extent if x.fixed(a) and builder.chance(60) else 1 for a, extent in enumerate(x.shape)]
    return builder.deaden(builder.values(shape), min(1, x.rank - 1)) if x.rank else builder.values([])


@step(12)
def with_constant(builder: Builder) -> None:
    op = builder.choice(["Add", "Mul", "Sub", "Div", "Max", "Min", "PRelu", "Pow", "Where", "Sum", "Mean"])
    x = builder.pick(lambda t: True)
    value = _broadcastable(builder, x)
    if op == "Div":
        value = np.abs(value) + 0.5
    if op == "Pow":
        value = np.array(2.0)
    name = builder.constant(value)
    if op == "Where":
        condition = builder.constant(builder.rng.random(value.shape) < 0.5, "c")
        builder.one(op, [condition, x, name] if builder.chance(50) else [condition, name, x])
    elif op in ("PRelu", "Pow", "Div") or builder.chance(60):
        builder.one(op, [x, name])
    else:
        builder.one(op, [name, x])


def _broadcasts(a: Tensor, b: Tensor) -> bool:
    pairs = zip(a.shape[::-1], b.shape[::-1], strict=False)
    declared = zip(a.dims[::-1], b.dims[::-1], strict=False)
    return all(x == y or 1 in (x, y) for x, y in pairs) and all(p == q or 1 in (p, q) for p, q in declared)


@step(14)
def binary(builder: Builder) -> None:
    """Two or three tensors joined element by element."""
    x = builder.pick(lambda t: t.rank > 0)
    y = builder.pick(lambda t: t.name != x.name and _broadcasts(x, t))
    op = builder.choice(["Add", "Add", "Mul", "Mul", "Sub", "Max", "Min", "Div", "Sum"])
    if op == "Div":
        y = builder.one("Softplus", [y], keep=False)
    operands: list[Tensor | str | None] = [x, y] if builder.chance(50) or op == "Div" else [y, x]
    if op == "Sum" and builder.chance(50):
        operands.append(builder.constant(_broadcastable(builder, x)))
    builder.one(op, operands)


@step(3)
def compare(builder: Builder) -> None:
    """Where one tensor exceeds another, a choice between them and a constant."""
    x = builder.pick(lambda t: t.rank > 0)
    y = builder.pick(lambda t: t.name != x.name and t.shape == x.shape and t.dims == x.dims)
    condition = builder.one("Greater", [x, y])
    builder.one("Where", [condition, x, builder.constant(_broadcastable(builder, x))])


# --- normalisations ---------------------------------------------------------------------------------------------


def batch_normalization(builder: Builder, x: Tensor) -> Tensor:
    channels = x.shape[1]
    scale = builder.deaden(builder.values([channels]) + 1, 0, 40)
    shift = builder.values([channels], 0.5)
    if builder.chance(40):
        shift[scale == 0] = 0
    parts = [scale, shift, builder.values([channels], 0.3), np.abs(builder.values([channels])) + 0.5]
    return builder.one("BatchNormalization", [x, *[builder.constant(part) for part in parts]])


@step(8)
def batch_norm(builder: Builder) -> None:
    batch_normalization(builder, builder.pick(lambda t: t.rank >= 2 and t.fixed(1)))


def _scale_and_shift(builder: Builder, extent: int | Sequence[int]) -> list[str]:
    shape = [extent] if isinstance(extent, int) else list(extent)
    scale = builder.deaden(builder.values(shape) + 1, 0, 50)
    shift = builder.deaden(builder.values(shape), 0, 30)
    return [builder.constant(scale), builder.constant(shift)]


@step(3)
def instance_norm(builder: Builder) -> None:
    x = image(builder)
    builder.one("InstanceNormalization", [x, *_scale_and_shift(builder, x.shape[1])], epsilon=1e-3)


@step(3)
def layer_norm(builder: Builder) -> None:
    if builder.opset < 17:
        raise Rejected
    x = builder.pick(lambda t: t.rank >= 2 and t.fixed(t.rank - 1))
    axis = builder.choice([a for a in range(1, x.rank) if x.all_fixed(range(a, x.rank))])
    parts = _scale_and_shift(builder, x.shape[axis:])
    builder.one("LayerNormalization", [x, *parts[: builder.integer(1, 2)]], axis=axis, epsilon=1e-3)


@step(3)
def group_norm(builder: Builder) -> None:
    """GroupNormalization as an operator, or as Reshape, InstanceNormalization, Reshape."""
    x = builder.pick(lambda t: 3 <= t.rank <= 5 and t.all_fixed(range(1, t.rank)))
    groups = builder.choice(divisors(x.shape[1]))
    if builder.opset >= 18 and builder.chance(50):
        count = groups if builder.opset < 21 else x.shape[1]
        builder.one("GroupNormalization", [x, *_scale_and_shift(builder, count)], num_groups=groups, epsilon=1e-3)
        return
    ones, zeros = builder.constant(np.ones(groups)), builder.constant(np.zeros(groups))
    y = builder.one("Reshape", [x, builder.integers_constant([0, groups, -1])], keep=False)
    y = builder.one("InstanceNormalization", [y, ones, zeros], keep=False, epsilon=1e-3)
    target = [-1, *x.shape[1:]]
    y = builder.one("Reshape", [y, builder.integers_constant(target)], keep=False)
    scale, shift = (builder.arrays[n] for n in _scale_and_shift(builder, [x.shape[1], *[1] * (x.rank - 2)]))
    y = builder.one("Mul", [y, builder.constant(scale)], keep=False)
    builder.one("Add", [y, builder.constant(shift)])


@step(3)
def softmax(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 2)
    builder.one(builder.choice(["Softmax", "LogSoftmax"]), [x], axis=builder.integer(1 - x.rank, x.rank - 1))


@step(4)
def other_norm(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 2)
    op = builder.choice(["LRN", "LpNormalization", "MeanVarianceNormalization", "RMS", "RMSNormalization", "Layer"])
    if op == "LRN":
        if x.rank != 4:
            raise Rejected
        builder.one(op, [x], size=builder.choice([1, 3, 5]), alpha=0.5, beta=0.75, bias=1.0)
    elif op == "LpNormalization":
        shifted = builder.one("Softplus", [x], keep=False)
        builder.one(op, [shifted], axis=builder.integer(1, x.rank - 1), p=builder.integer(1, 2))
    elif op == "MeanVarianceNormalization":
        shifted = builder.one("Sigmoid", [x], keep=False)
        builder.one(op, [shifted], axes=sorted({0, builder.integer(1, x.rank - 1)}))
    else:
        _root_mean_square(builder, x, op)


def _root_mean_square(builder: Builder, x: Tensor, op: str) -> None:
    """RMSNorm or LayerNorm over one axis, spelled out or as an operator."""
    axis = builder.choice([a for a in range(1, x.rank) if x.fixed(a)])
    gamma = builder.deaden(builder.values([x.shape[axis], *[1] * (x.rank - 1 - axis)]) + 1, 0)
    if op == "RMSNormalization":
        if builder.opset < 23 or axis != x.rank - 1:
            raise Rejected
        builder.one(op, [x, builder.constant(gamma)], axis=-1, epsilon=1e-3)
        return
    y = x
    if op == "Layer":
        y = builder.one("Sub", [x, reduction_axes(builder, "ReduceMean", x, [axis])], keep=False)
    two = builder.constant(np.array(2.0))
    power = builder.one("Pow", [y, two], keep=False) if builder.chance(50) else builder.one("Mul", [y, y], keep=False)
    mean = reduction_axes(builder, "ReduceMean", power, [axis - x.rank])
    shifted = builder.one("Add", [mean, builder.constant(np.array(1e-3))], keep=False)
    root = builder.one("Sqrt", [shifted], keep=False)
    y = builder.one("Div", [y, root], keep=False)
    builder.one("Mul", [y, builder.constant(gamma)])

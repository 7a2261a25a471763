"""Steps of several nodes: gates, separable convolutions, heads, recurrent layers, masked and tied weights, branches."""

from __future__ import annotations

import numpy as np
from graph_builder import Array, Builder, Rejected, Tensor
from graph_layout_steps import dense
from graph_steps import activation, batch_normalization, image, reduction_axes, step
from onnx import helper


def linear(builder: Builder, x: Tensor, columns: int) -> Tensor:
    """A product with constant weights, dead rows and columns, then perhaps a bias."""
    weights = builder.values([x.shape[-1], columns], (2 / x.shape[-1]) ** 0.5)
    weights = builder.deaden(builder.deaden(weights, 1), 0, 25)
    y = builder.one("MatMul", [x, builder.constant(weights)])
    return _biased(builder, y, weights) if builder.chance(65) else y


def _biased(builder: Builder, y: Tensor, weights: Array) -> Tensor:
    bias = builder.values([weights.shape[1]])
    if builder.chance(50):
        bias[~weights.any(axis=0)] = 0
    return builder.one("Add", [y, builder.constant(bias)])


def _rows(tensor: Tensor) -> bool:
    return tensor.rank >= 2 and tensor.fixed(tensor.rank - 1)


@step(4)
def gated(builder: Builder) -> None:
    """Two products of one tensor, one of them the gate of the other, and a third that leads back."""
    x = builder.pick(_rows)
    hidden = builder.integer(2, 8)
    gate = builder.one(builder.choice(["Sigmoid", "Tanh", "HardSigmoid"]), [linear(builder, x, hidden)])
    y = builder.one("Mul", [gate, linear(builder, x, hidden)])
    builder.one("Add", [linear(builder, y, x.shape[-1]), x])


@step(4)
def separable(builder: Builder) -> None:
    """Widen, filter each channel by itself, narrow: the block of a MobileNet."""
    x = builder.pick(lambda t: t.rank == 4 and t.fixed(1))
    wide = _pointwise(builder, x, builder.integer(2, 8))
    multiplier = builder.integer(1, 2)
    kernels = builder.deaden(builder.values([wide.shape[1] * multiplier, 1, 3, 3], 0.5), 0)
    operands: list[Tensor | str | None] = [wide, builder.constant(kernels)]
    if builder.chance(60):
        operands.append(builder.constant(builder.deaden(builder.values([kernels.shape[0]]), 0)))
    deep = builder.one("Conv", operands, group=wide.shape[1], pads=[1] * 4)
    y = _pointwise(builder, activation(builder, deep), x.shape[1])
    builder.one("Add", [x, y])


def _pointwise(builder: Builder, x: Tensor, rows: int) -> Tensor:
    weights = builder.deaden(builder.values([rows, x.shape[1], 1, 1], 0.5), 0)
    y = builder.one("Conv", [x, builder.constant(weights)])
    if builder.chance(60):
        y = batch_normalization(builder, y)
    return activation(builder, y) if builder.chance(60) else y


@step(4)
def heads(builder: Builder) -> None:
    """Attention in which whole heads are dead."""
    x = builder.pick(lambda t: t.rank == 3 and t.fixed(2))
    count, width = builder.integer(2, 4), builder.integer(1, 3)
    dead = builder.integer(0, count)
    query, key, value = (_head_rows(builder, x, count, width, dead if part == 2 else count) for part in range(3))
    scores = builder.one("MatMul", [query, builder.one("Transpose", [key], keep=False, perm=[0, 1, 3, 2])], keep=False)
    scores = builder.one("Div", [scores, builder.constant(np.array(width**0.5))], keep=False)
    mixed = builder.one("MatMul", [builder.one("Softmax", [scores], keep=False, axis=-1), value], keep=False)
    y = builder.one("Transpose", [mixed], keep=False, perm=[0, 2, 1, 3])
    y = builder.one("Reshape", [y, builder.integers_constant([0, 0, -1])], keep=False)
    if not y.fixed(2):
        raise Rejected
    builder.one("Add", [x, linear(builder, y, x.shape[2])])


def _head_rows(builder: Builder, x: Tensor, count: int, width: int, dead: int) -> Tensor:
    """`[batch, head, time, width]`; the columns of head `dead` are zero."""
    weights = builder.values([x.shape[2], count * width], 0.5)
    weights[:, dead * width : (dead + 1) * width] = 0
    y = builder.one("MatMul", [x, builder.constant(weights)], keep=False)
    if builder.chance(40):
        y = builder.one("Add", [y, builder.constant(builder.deaden(builder.values([count * width]), 0))], keep=False)
    y = builder.one("Reshape", [y, builder.integers_constant([0, 0, count, width])], keep=False)
    return builder.one("Transpose", [y], keep=False, perm=[0, 2, 1, 3])


@step(3)
def batched(builder: Builder) -> None:
    """A product with constant weights of their own for each index of the leading axes."""
    x = builder.pick(lambda t: t.rank >= 3 and t.all_fixed(range(1, t.rank)) and t.size <= 600)
    shape = [*x.shape[1:-2], x.shape[-1], builder.integer(1, 6)]
    weights = builder.deaden(builder.values(shape, 0.5), len(shape) - 1)
    builder.one("MatMul", [x, builder.constant(builder.deaden(weights, len(shape) - 2, 40))])


@step(3)
def masked(builder: Builder) -> None:
    """A convolution whose weights are a product of weights and a mask, as some exporters leave it."""
    x = image(builder)
    weights = builder.values([builder.integer(2, 8), x.shape[1], *[1] * (x.rank - 2)], 0.5)
    mask = builder.deaden(np.ones_like(weights), builder.integer(0, 1), 90)
    product = builder.one("Mul", [builder.constant(weights), builder.constant(mask)], keep=False)
    builder.one("Conv", [x, product])


@step(3)
def tied(builder: Builder) -> None:
    """One weight read as it is and transposed."""
    x = builder.pick(lambda t: t.rank == 2 and t.fixed(1))
    hidden = builder.integer(2, 6)
    weights = builder.values([x.shape[1], hidden], 0.5)
    name = builder.constant(builder.deaden(builder.deaden(weights, 1), 0, 40))
    inner = activation(builder, builder.one("MatMul", [x, name]))
    builder.one("Gemm", [inner, name], transB=1)


@step(3)
def cast(builder: Builder) -> None:
    """There and back through double precision."""
    x = builder.pick(lambda t: True)
    there = builder.one("Cast", [x], to=helper.np_dtype_to_tensor_dtype(np.dtype(np.float64)))
    builder.one("Cast", [builder.one("Neg", [there])], to=builder.element)


@step(3)
def standardise(builder: Builder) -> None:
    """Subtract the mean over the channels, divide by what their squares sum to."""
    x = builder.pick(lambda t: t.rank >= 2 and t.fixed(1))
    centred = builder.one("Sub", [x, reduction_axes(builder, "ReduceMean", x, [1])])
    squares = reduction_axes(builder, "ReduceSumSquare", centred, [1])
    shifted = builder.one("Add", [squares, builder.constant(np.array(0.5))], keep=False)
    builder.one("Div", [centred, builder.one("Sqrt", [shifted], keep=False)])


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@step(4)
def recurrent(builder: Builder) -> None:
    """A recurrent layer over the first axis, some of its units dead."""
    x = builder.pick(lambda t: t.rank == 3 and t.fixed(2) and t.shape[0] <= 8)
    op = builder.choice(sorted(_GATES))
    directions, hidden, gates = builder.integer(1, 2), builder.integer(2, 4), _GATES[op]
    alive = np.ones(hidden) if builder.chance(30) else (builder.rng.random(hidden) < 0.6).astype(np.float64)
    rows = np.tile(alive, gates)[None, :, None]
    inputs = builder.values([directions, gates * hidden, x.shape[2]], 0.5) * rows
    states = builder.values([directions, gates * hidden, hidden], 0.5) * rows
    bias = builder.values([directions, 2 * gates * hidden]) * np.tile(rows[..., 0], 2)
    operands: list[Tensor | str | None] = [x, *[builder.constant(part) for part in (inputs, states)]]
    if builder.chance(60):
        operands.append(builder.constant(bias))
    direction = "bidirectional" if directions == 2 else builder.choice(["forward", "reverse"])
    extra = {"linear_before_reset": builder.integer(0, 1)} if op == "GRU" else {}
    outputs = builder.node(op, operands, 2, keep=False, hidden_size=hidden, direction=direction, **extra)
    if builder.chance(50):
        y = builder.one("Transpose", [outputs[0]], keep=False, perm=[0, 2, 1, 3])
        y = builder.one("Reshape", [y, builder.integers_constant([0, 0, -1])])
    else:
        y = builder.one("Transpose", [outputs[1]], keep=False, perm=[1, 0, 2])
        y = builder.one("Reshape", [y, builder.integers_constant([0, -1])])
    if y.fixed(y.rank - 1):
        linear(builder, y, builder.integer(1, 4))


@step(4)
def branch(builder: Builder) -> None:
    """`If` on the mean of an input: two products, or a product and a constant times the tensor."""
    x = builder.pick(lambda t: t.rank == 2 and t.fixed(1))
    first = builder.inputs[0]
    axes = list(range(first.rank))
    mean = reduction_axes(builder, "ReduceMean", first, axes, keepdims=0)
    condition = builder.one("Greater", [mean, builder.constant(np.array(0.0))], keep=False)
    columns = builder.integer(1, 6)
    bodies = [_body(builder, x, columns, name) for name in ("then", "else")]
    (then, result), (other, _) = bodies
    output = Tensor(f"{result.name}_if", result.shape, result.dims, result.element)
    node = helper.make_node("If", [condition.name], [output.name], then_branch=then, else_branch=other)
    builder.nodes.append(node)
    builder.tensors.append(output)


def _body(builder: Builder, x: Tensor, columns: int, name: str) -> tuple[object, Tensor]:
    """A body that reads an outer tensor. What it makes is not offered to later steps."""
    outer, offered = builder.nodes, len(builder.tensors)
    builder.nodes = []
    try:
        y = dense(builder, x, columns) if builder.chance(50) else linear(builder, x, columns)
        y = activation(builder, y) if builder.chance(50) else y
        info = helper.make_tensor_value_info(y.name, y.element, list(y.dims))
        return helper.make_graph(builder.nodes, name, [], [info]), y
    finally:
        builder.nodes = outer
        del builder.tensors[offered:]

"""The steps that join, cut, move and contract."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from graph_builder import MOST_CHANNELS, Builder, Rejected, Tensor, divisors
from graph_steps import activation, convolution, image, reduction_axes, step

# --- joining and cutting ----------------------------------------------------------------------------------------


def _joins(a: Tensor, axis: int) -> Callable[[Tensor], bool]:
    def fits(b: Tensor) -> bool:
        if a.rank != b.rank:
            return False
        others = [i for i in range(a.rank) if i != axis]
        return all(a.shape[i] == b.shape[i] and a.dims[i] == b.dims[i] for i in others)

    return fits


@step(10)
def concat(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 2)
    axis = 1 if builder.chance(75) else builder.integer(0, x.rank - 1)
    operands: list[Tensor | str | None] = [x]
    for _ in range(builder.integer(1, 2)):
        operands.append(builder.pick(_joins(x, axis)))
    if builder.chance(15) and x.all_fixed():
        operands.append(builder.constant(builder.values(x.shape)))
    axis = axis if builder.chance(70) else axis - x.rank
    builder.one("Concat", operands, axis=axis)


@step(5)
def split(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 2 and any(t.fixed(a) and t.shape[a] > 1 for a in range(1, t.rank)))
    axis = builder.choice([a for a in range(1, x.rank) if x.fixed(a) and x.shape[a] > 1])
    extent = x.shape[axis]
    if extent % 2 == 0 and builder.chance(50):
        sizes = [extent // 2] * 2
    else:
        first = builder.integer(1, extent - 1)
        sizes = [first, extent - first]
    if builder.opset >= 18 and sizes[0] == sizes[1] and builder.chance(50):
        builder.node("Split", [x], count=2, axis=axis, num_outputs=2)
    elif builder.opset >= 13:
        builder.node("Split", [x, builder.integers_constant(sizes)], count=2, axis=axis)
    else:
        builder.node("Split", [x], count=2, axis=axis, split=sizes)


@step(5)
def cut(builder: Builder) -> None:
    """Slice, on one or two axes, perhaps with a stride or backwards."""
    x = builder.pick(lambda t: any(t.fixed(a) and t.shape[a] > 1 for a in range(t.rank)))
    axes = [a for a in range(x.rank) if x.fixed(a) and x.shape[a] > 1]
    chosen = axes[: builder.integer(1, 2)] if builder.chance(30) else [builder.choice(axes)]
    starts, ends, steps = [], [], []
    for axis in chosen:
        extent, step_size = x.shape[axis], builder.choice([1, 1, 1, 2, -1])
        first = builder.integer(0, extent - 1)
        last = builder.integer(first + 1, extent)
        if step_size < 0:
            first, last = last - 1, first - 1 if first else -extent - 5
        elif builder.chance(20) and last < extent:
            last -= extent
        starts, ends, steps = [*starts, first], [*ends, last], [*steps, step_size]
    lists = [starts, ends, chosen, steps] if builder.chance(60) or -1 in steps or 2 in steps else [starts, ends, chosen]
    builder.one("Slice", [x, *[builder.integers_constant(values) for values in lists]])


@step(4)
def pad(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 2)
    mode = builder.choice(["constant", "constant", "constant", "reflect", "edge"])
    pads = np.zeros((2, x.rank), np.int64)
    for axis in range(2 if builder.chance(70) and x.rank > 2 else 1, x.rank):
        pads[:, axis] = builder.integer(0, 1), builder.integer(0, 1)
    operands: list[Tensor | str | None] = [x, builder.integers_constant(pads.reshape(-1))]
    if mode == "constant" and builder.chance(50):
        operands.append(builder.constant(np.array(builder.choice([0.0, 0.5]))))
    builder.one("Pad", operands, mode=mode)


@step(3)
def resize(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank == 4 and t.fixed(1))
    scales = np.array([1, 1, builder.choice([1, 2]), builder.choice([1, 2, 1.5])], np.float32)
    mode = builder.choice(["nearest", "linear", "cubic"])
    attributes: dict[str, object] = {"mode": mode}
    modes = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
    attributes["coordinate_transformation_mode"] = builder.choice(modes)
    roi = builder.constant(np.zeros(0)) if builder.opset < 13 else None
    if x.all_fixed() and builder.chance(40):
        sizes = [*x.shape[:2], x.shape[2] + builder.integer(0, 2), x.shape[3] * builder.integer(1, 2)]
        empty = builder.constant(np.zeros(0, np.float32).astype(np.float32)) if builder.opset < 13 else None
        builder.one("Resize", [x, roi, empty, builder.integers_constant(sizes)], **attributes)
        return
    name = builder.constant(scales)
    if builder.dtype != np.float32:
        raise Rejected
    builder.one("Resize", [x, roi, name], **attributes)


@step(3)
def repeat(builder: Builder) -> None:
    """Expand or Tile."""
    x = builder.pick(lambda t: t.rank >= 2 and t.size <= 1000)
    if builder.chance(50):
        repeats = [1] * x.rank
        repeats[builder.integer(0, x.rank - 1)] = 2
        builder.one("Tile", [x, builder.integers_constant(repeats)])
        return
    target = [builder.integer(1, 3) if extent == 1 and x.fixed(a) else 1 for a, extent in enumerate(x.shape)]
    if builder.chance(40) and x.all_fixed():
        target = [max(a, b) for a, b in zip(target, x.shape, strict=True)]
    builder.one("Expand", [x, builder.integers_constant(target[builder.integer(0, x.rank - 1) :])])


@step(4)
def gather(builder: Builder) -> None:
    """Constant indices, repeated or permuted, or one that removes the axis."""
    x = builder.pick(lambda t: t.rank >= 2 and any(t.fixed(a) for a in range(1, t.rank)))
    axis = builder.choice([a for a in range(1, x.rank) if x.fixed(a)])
    extent = x.shape[axis]
    if builder.chance(25):
        indices = np.array(builder.integer(-extent, extent - 1), np.int64)
    elif builder.chance(50):
        indices = builder.rng.permutation(extent)
    else:
        indices = builder.rng.integers(-extent, extent, builder.integer(1, extent + 1))
    builder.one("Gather", [x, builder.constant(indices.astype(np.int64), "i")], axis=axis)


# --- reshaping --------------------------------------------------------------------------------------------------


@step(5)
def reshape(builder: Builder) -> None:
    """Split one axis in two, or merge two, written with 0, -1, numbers, or computed from the shape."""
    x = builder.pick(lambda t: t.rank >= 2)
    if builder.chance(50):
        axis = builder.choice([a for a in range(x.rank) if x.fixed(a) and x.shape[a] > 1])
        part = builder.choice(divisors(x.shape[axis]))
        target = [*x.shape[:axis], part, x.shape[axis] // part, *x.shape[axis + 1 :]]
        origin: list[int | None] = [*range(axis), None, None, *range(axis + 1, x.rank)]
    else:
        axis = builder.integer(0, x.rank - 2)
        target = [*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]]
        origin = [*range(axis), None, *range(axis + 2, x.rank)]
    reshape_to(builder, x, target, origin)


def reshape_to(builder: Builder, x: Tensor, target: list[int], origin: list[int | None]) -> Tensor:
    """Reshape; `origin` names the axis of `x` that an axis of the target comes from, None where it is new."""
    written = list(target)
    merged = not all(x.all_fixed([a]) for a in range(x.rank) if a not in origin)
    for position, source in enumerate(origin):
        if source is not None and not x.fixed(source):
            written[position] = 0 if source == position else -1
        elif source is not None and source == position and builder.chance(20):
            written[position] = 0
        elif source is None and merged:
            written[position] = -1
    if written.count(-1) > 1:
        raise Rejected
    if -1 not in written and builder.chance(40):
        written[builder.integer(0, len(written) - 1)] = -1
    if builder.chance(25) and origin[:1] == [0] and written[0] in (0, target[0]):
        return builder.one("Reshape", [x, _computed_target(builder, x, written[1:])])
    return builder.one("Reshape", [x, builder.integers_constant(written)])


def _computed_target(builder: Builder, x: Tensor, rest: list[int]) -> Tensor:
    """`[Shape(x)[0], *rest]`, as exporters write it."""
    if 0 in rest or -1 in rest:
        raise Rejected
    shape = builder.one("Shape", [x])
    first = builder.one("Gather", [shape, builder.integers_constant([0])], axis=0)
    target = builder.one("Concat", [first, builder.integers_constant(rest)], axis=0)
    builder.arrays[target.name] = np.array([x.shape[0], *rest], np.int64)
    builder.declared[target.name] = np.array([x.dims[0] if x.fixed(0) else -1, *rest], np.int64)
    return target


@step(8)
def windows(builder: Builder) -> None:
    """Merge a free batch with the next axis, contract the last one, and part them again; all targets are computed."""
    x = builder.pick(lambda t: 3 <= t.rank <= 4 and not t.fixed(0) and t.all_fixed(range(1, t.rank)))
    batch, count, *rest = x.shape
    target = _scaled_target(builder, x, "Mul", count, [batch * count, *rest])
    y = builder.one("Reshape", [x, target])
    weights = builder.deaden(builder.values([rest[-1], builder.integer(2, 6)], 0.5), builder.integer(0, 1))
    y = builder.one("MatMul", [y, builder.constant(weights)])
    parts = [count, *y.shape[1:]] if builder.chance(50) else [count * y.shape[1], *y.shape[2:]]
    builder.one("Reshape", [y, _scaled_target(builder, y, "Div", count, [batch, *parts])])


def _scaled_target(builder: Builder, x: Tensor, operator: str, factor: int, extents: list[int]) -> Tensor:
    """`[Shape(x)[0] * factor, *extents[1:]]`, or divided by it."""
    shape = builder.one("Shape", [x])
    first = builder.one("Gather", [shape, builder.integers_constant([0])], axis=0)
    first = builder.one(operator, [first, builder.integers_constant([factor])])
    target = builder.one("Concat", [first, builder.integers_constant(extents[1:])], axis=0)
    builder.arrays[target.name] = np.array(extents, np.int64)
    builder.declared[target.name] = np.array([-1, *extents[1:]], np.int64)
    return target


@step(3)
def flatten(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 2)
    builder.one("Flatten", [x], axis=builder.choice([1, 1, 1, 2, -1]))


@step(6)
def flatten_gemm(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 3 and t.all_fixed(range(1, t.rank)) and t.size <= 800)
    dense(builder, builder.one("Flatten", [x]))


@step(4)
def transpose(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank >= 2)
    order = [int(a) for a in builder.rng.permutation(x.rank)]
    if builder.chance(60):
        order = [0, *[int(a) + 1 for a in builder.rng.permutation(x.rank - 1)]]
    builder.one("Transpose", [x], perm=order)


@step(3)
def squeeze(builder: Builder) -> None:
    if builder.chance(50):
        x = builder.pick(lambda t: t.rank >= 2 and any(t.dims[a] == 1 for a in range(t.rank)))
        reduction_axes(builder, "Squeeze", x, [builder.choice([a for a in range(x.rank) if x.dims[a] == 1])])
        return
    x = builder.pick(lambda t: 1 <= t.rank <= 4)
    reduction_axes(builder, "Unsqueeze", x, [builder.integer(0, x.rank)])


@step(3)
def channel_shuffle(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank == 4 and t.all_fixed(range(1, 4)) and t.shape[1] >= 4)
    groups = builder.choice([d for d in divisors(x.shape[1]) if 1 < d < x.shape[1]])
    _, channels, height, width = x.shape
    y = builder.one("Reshape", [x, builder.integers_constant([-1, groups, channels // groups, height, width])])
    y = builder.one("Transpose", [y], perm=[0, 2, 1, 3, 4])
    builder.one("Reshape", [y, builder.integers_constant([-1, channels, height, width])])


@step(3)
def space_and_depth(builder: Builder) -> None:
    x = builder.pick(lambda t: t.rank == 4 and t.fixed(1))
    if x.shape[1] % 4 == 0:
        builder.one("DepthToSpace", [x], blocksize=2, mode=builder.choice(["DCR", "CRD"]))
        return
    if x.shape[2] % 2 or x.shape[3] % 2 or not x.all_fixed([2, 3]):
        raise Rejected
    builder.one("SpaceToDepth", [x], blocksize=2)


# --- contracting and reducing -----------------------------------------------------------------------------------


def dense(builder: Builder, x: Tensor, outputs: int | None = None) -> Tensor:
    """Gemm with dead rows and columns."""
    columns = outputs or builder.integer(1, 8)
    weights = builder.values([x.shape[1], columns], (2 / x.shape[1]) ** 0.5)
    weights = builder.deaden(builder.deaden(weights, 1, 60 if outputs is None else 0), 0, 20)
    attributes: dict[str, object] = {}
    if builder.chance(50):
        weights, attributes["transB"] = weights.T, 1
    if builder.chance(20):
        attributes["alpha"], attributes["beta"] = 0.5, builder.choice([2.0, 0.0])
    operands: list[Tensor | str | None] = [x, builder.constant(weights)]
    if builder.chance(70):
        shape = builder.choice([(columns,), (columns,), (1, columns), (1,), ()])
        operands.append(builder.constant(builder.deaden(builder.values(shape), 0, 30) if shape else builder.values([])))
    return builder.one("Gemm", operands, **attributes)


@step(6)
def gemm(builder: Builder) -> None:
    dense(builder, builder.pick(lambda t: t.rank == 2 and t.fixed(1)))


@step(8)
def matmul(builder: Builder) -> None:
    """A product with constant weights on the right (mostly) or on the left."""
    x = builder.pick(lambda t: t.rank >= 2 and t.fixed(t.rank - 1))
    if builder.chance(20) and x.fixed(x.rank - 2):
        weights = builder.deaden(builder.values([builder.integer(1, 8), x.shape[-2]], 0.4), 0)
        builder.one("MatMul", [builder.constant(weights), x])
        return
    columns = builder.integer(1, 8)
    weights = builder.deaden(builder.deaden(builder.values([x.shape[-1], columns], 0.4), 1), 0, 30)
    y = builder.one("MatMul", [x, builder.constant(weights)])
    if builder.chance(60):
        bias = builder.values([columns])
        if builder.chance(50):
            bias[~weights.any(axis=0)] = 0
        builder.one("Add", [y, builder.constant(bias)])


@step(5)
def mixer(builder: Builder) -> None:
    """Two dense layers over the last axis with an activation between, added to the input."""
    x = builder.pick(lambda t: t.rank >= 2 and t.fixed(t.rank - 1))
    width, hidden = x.shape[-1], builder.integer(2, 8)
    first = builder.deaden(builder.values([width, hidden], 0.4), 1)
    bias = builder.values([hidden])
    if builder.chance(50):
        bias[~first.any(axis=0)] = 0
    y = builder.one("MatMul", [x, builder.constant(first)])
    y = activation(builder, builder.one("Add", [y, builder.constant(bias)]))
    second = builder.deaden(builder.values([hidden, width], 0.4), builder.integer(0, 1), 40)
    builder.one("Add", [x, builder.one("MatMul", [y, builder.constant(second)])])


@step(5)
def norm_first(builder: Builder) -> None:
    """A LayerNorm behind a product with dead columns, and products or something else behind it."""
    x = builder.pick(lambda t: t.rank >= 2 and t.fixed(t.rank - 1) and builder.opset >= 17)
    width = builder.integer(4, 8)
    made = builder.deaden(builder.values([x.shape[-1], width], 0.5), 1, 60)
    y = builder.one("MatMul", [x, builder.constant(made)], keep=builder.chance(20))
    scale = builder.constant(builder.deaden(builder.values([width], 0.5) + 1, 0, 20))
    shift = [builder.constant(builder.deaden(builder.values([width]), 0, 30))] if builder.chance(80) else []
    y = builder.one("LayerNormalization", [y, scale, *shift], keep=builder.chance(30), epsilon=1e-3)
    if builder.chance(20):
        y = builder.one("Transpose", [y], perm=[*reversed(range(y.rank - 1)), y.rank - 1])
    for _ in range(builder.integer(1, 2)):
        outputs = builder.deaden(builder.values([width, builder.integer(2, 6)], 0.5), builder.integer(0, 1))
        z = builder.one("MatMul", [y, builder.constant(outputs)])
        if builder.chance(40):
            builder.one("Add", [z, builder.constant(builder.values([z.shape[-1]]))])


@step(4)
def attention(builder: Builder) -> None:
    """Queries, keys and values of one or two heads over the last two axes of a `[batch, time, width]` tensor."""
    x = builder.pick(lambda t: t.rank == 3 and t.fixed(2))
    heads, size = builder.integer(1, 2), builder.integer(1, 3)
    parts = []
    for _ in range(3):
        weights = builder.deaden(builder.values([x.shape[2], heads * size], 0.5), 1)
        y = builder.one("MatMul", [x, builder.constant(weights)], keep=False)
        y = builder.one("Add", [y, builder.constant(builder.deaden(builder.values([heads * size]), 0))], keep=False)
        y = builder.one("Reshape", [y, builder.integers_constant([0, 0, heads, size])], keep=False)
        parts.append(builder.one("Transpose", [y], keep=False, perm=[0, 2, 1, 3]))
    keys = builder.one("Transpose", [parts[1]], keep=False, perm=[0, 1, 3, 2])
    scores = builder.one("MatMul", [parts[0], keys], keep=False)
    scaled = builder.one("Mul", [scores, builder.constant(np.array(size**-0.5))], keep=False)
    mixed = builder.one("MatMul", [builder.one("Softmax", [scaled], keep=False, axis=-1), parts[2]], keep=False)
    y = builder.one("Transpose", [mixed], keep=False, perm=[0, 2, 1, 3])
    y = builder.one("Reshape", [y, builder.integers_constant([0, 0, heads * size])], keep=False)
    out = builder.deaden(builder.values([heads * size, x.shape[2]], 0.5), 0, 40)
    builder.one("MatMul", [y, builder.constant(out)])


@step(2)
def product(builder: Builder) -> None:
    """A product of two computed tensors."""
    x = builder.pick(lambda t: t.rank >= 2)
    order = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    y = builder.pick(lambda t: t.shape == x.shape and t.dims == x.dims)
    builder.one("MatMul", [x, builder.one("Transpose", [y], keep=False, perm=order)])


@step(5)
def reduction(builder: Builder) -> None:
    ops = ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"]
    x = builder.pick(lambda t: t.rank >= 2)
    axes = sorted({builder.integer(1, x.rank - 1) for _ in range(builder.integer(1, 2))})
    if builder.chance(20):
        axes = [axis - x.rank for axis in axes]
    reduction_axes(builder, builder.choice(ops), x, axes, keepdims=builder.integer(0, 1))


@step(3)
def shared_weights(builder: Builder) -> None:
    """Two convolutions with one and the same kernel, on two tensors of as many channels."""
    x = image(builder)
    y = builder.pick(lambda t: t.rank == x.rank and t.fixed(1) and t.shape[1] == x.shape[1] and t.name != x.name)
    rows = builder.integer(1, min(8, MOST_CHANNELS))
    kernel = [1] * (x.rank - 2)
    name = builder.constant(builder.deaden(builder.values([rows, x.shape[1], *kernel], 0.5), 0))
    builder.one("Conv", [x, name])
    builder.one("Conv", [y, name])


def stem(builder: Builder, x: Tensor) -> Tensor:
    """A first contraction with dead rows."""
    if 3 <= x.rank <= 5 and x.fixed(1) and not (x.rank == 3 and builder.chance(50)):
        return convolution(builder, x)
    weights = builder.deaden(builder.values([x.shape[-1], builder.integer(2, 8)], 0.5), 1, 90)
    return builder.one("MatMul", [x, builder.constant(weights)])


def finish(builder: Builder, x: Tensor) -> Tensor:
    """A last contraction, so that what is dead before it can leave."""
    if 3 <= x.rank <= 5 and x.fixed(1):
        return convolution(builder, x, outputs=builder.integer(1, 4))
    if x.rank == 2 and x.fixed(1):
        return dense(builder, x, outputs=builder.integer(1, 4))
    if x.rank >= 2 and x.fixed(x.rank - 1):
        weights = builder.values([x.shape[-1], builder.integer(1, 4)], 0.5)
        return builder.one("MatMul", [x, builder.constant(weights)])
    return x

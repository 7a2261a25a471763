"""Networks that are drawn at random and pruned at random, and the same networks as a person would have built them.

In every layer that writes them, the channels that do not live are zero: inside each block, and in each residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Shape:
    """A residual network: blocks per stage, channels of the first, bottlenecks or not, and the share that lives."""

    name: str
    blocks: tuple[int, ...]
    width: int
    bottleneck: bool
    image: int
    classes: int
    share: float = 0.5


FULL = (
    Shape("ResNet-18", (2, 2, 2, 2), 64, False, 224, 1000),
    Shape("ResNet-50", (3, 4, 6, 3), 64, True, 224, 1000),
)
SMOKE = (Shape("small, basic", (1, 1), 8, False, 32, 10), Shape("small, bottleneck", (1, 1), 8, True, 32, 10))


@dataclass
class Drawing:
    """A network being drawn twice over the same weights: as pruned, or `by_hand` with the dead channels left out."""

    by_hand: bool
    share: float
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def some(self, channels: int) -> np.ndarray:
        """Which channels live."""
        live = np.zeros(channels, np.bool_)
        live[self.random.permutation(channels)[: int(channels * self.share)]] = True
        return live

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def weight(self, values: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def convolution(self, x: str, live: tuple[np.ndarray, np.ndarray], kernel: int, stride: int = 1) -> str:
        inputs, outputs = live
        fan = inputs.size * kernel * kernel
        values = self.random.standard_normal((outputs.size, inputs.size, kernel, kernel)) * np.sqrt(2 / fan)
        bias = self.random.standard_normal(outputs.size) * 0.1
        if self.by_hand:
            values, bias = values[outputs][:, inputs], bias[outputs]
        else:
            values[~outputs], bias[~outputs] = 0, 0
        operands = [x, self.weight(values), self.weight(bias)]
        return self.node("Conv", operands, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def depthwise(self, x: str, live: np.ndarray, stride: int) -> str:
        values = self.random.standard_normal((live.size, 1, 3, 3)) * 0.5
        bias = self.random.standard_normal(live.size) * 0.1
        if self.by_hand:
            values, bias = values[live], bias[live]
        else:
            values[~live], bias[~live] = 0, 0
        operands = [x, self.weight(values), self.weight(bias)]
        return self.node("Conv", operands, group=len(values), strides=[stride] * 2, pads=[1] * 4)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x])

    def relu6(self, x: str) -> str:
        return self.node("Clip", [x, self.weight(np.array(0.0)), self.weight(np.array(6.0))])

    def classifier(self, name: str, x: str, live: np.ndarray, image: int, classes: int) -> onnx.ModelProto:
        """The network, ended by a mean over the image and a linear layer."""
        x = self.node("Flatten", [self.node("GlobalAveragePool", [x])])
        values = self.random.standard_normal((classes, live.size)) * 0.05
        operands = [x, self.weight(values[:, live] if self.by_hand else values), self.weight(np.zeros(classes))]
        self.nodes.append(helper.make_node("Gemm", operands, ["logits"], "classifier", transB=1))
        given = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, image, image])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes])
        graph = helper.make_graph(self.nodes, name, [given], [logits], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def draw(shape: Shape, by_hand: bool) -> onnx.ModelProto:
    """The network as pruned, or as a person would have built it with the same widths."""
    net = Drawing(by_hand, shape.share)
    live = net.some(shape.width)
    x = net.relu(net.convolution("image", (np.ones(3, np.bool_), live), 7, 2))
    x = net.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for stage, blocks in enumerate(shape.blocks):
        x, live = draw_stage(net, shape, x, live, stage, blocks)
    return net.classifier(shape.name, x, live, shape.image, shape.classes)


def draw_stage(net: Drawing, shape: Shape, x: str, live: np.ndarray, stage: int, blocks: int) -> tuple[str, np.ndarray]:
    """Blocks that share one residual stream."""
    middle = shape.width * 2**stage
    stream = net.some(middle * (4 if shape.bottleneck else 1))
    for block in range(blocks):
        stride = 2 if stage and not block else 1
        shortcut = x if block else net.convolution(x, (live, stream), 1, stride)
        inner = net.some(middle)
        if shape.bottleneck:
            y = net.relu(net.convolution(x, (live, inner), 1))
            other = net.some(middle)
            y = net.relu(net.convolution(y, (inner, other), 3, stride))
            y = net.convolution(y, (other, stream), 1)
        else:
            y = net.relu(net.convolution(x, (live, inner), 3, stride))
            y = net.convolution(y, (inner, stream), 3)
        x, live = net.relu(net.node("Add", [y, shortcut])), stream
    return x, live


@dataclass(frozen=True)
class Inverted:
    """A network of inverted residuals: per stage, expansion, channels, blocks and stride (Sandler et al., 2018)."""

    name: str
    stages: tuple[tuple[int, int, int, int], ...]
    stem: int
    last: int
    image: int
    classes: int
    share: float

    def draw(self, by_hand: bool) -> onnx.ModelProto:
        """The network as pruned, or as a person would have built it with the same widths."""
        net = Drawing(by_hand, self.share)
        live = net.some(self.stem)
        x = net.relu6(net.convolution("image", (np.ones(3, np.bool_), live), 3, 2))
        for expansion, channels, blocks, stride in self.stages:
            stream = net.some(channels)
            for block in range(blocks):
                y = x
                hidden = live
                if expansion > 1:
                    hidden = net.some(live.size * expansion)
                    y = net.relu6(net.convolution(x, (live, hidden), 1))
                y = net.relu6(net.depthwise(y, hidden, stride if block == 0 else 1))
                y = net.convolution(y, (hidden, stream), 1)
                x, live = (net.node("Add", [x, y]) if block else y), stream
        top = net.some(self.last)
        x = net.relu6(net.convolution(x, (live, top), 1))
        return net.classifier(self.name, x, top, self.image, self.classes)

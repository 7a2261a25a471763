"""Convolutional networks whose branches meet: at several resolutions, by gates, by concatenation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures.classic import Bottleneck, Head, InvertedResidual, conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(width, width), conv(width, width, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + x)


class Exchange(nn.Module):
    """Every resolution becomes the sum of all: resized up by 1x1 and nearest, down by strided convolutions."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.rows = nn.ModuleList()
        for target, outputs in enumerate(widths):
            row = nn.ModuleList()
            for source, inputs in enumerate(widths):
                if source > target:
                    up = nn.Upsample(scale_factor=2 ** (source - target), mode="nearest")
                    row.append(nn.Sequential(conv(inputs, outputs, 1, act=False), up))
                elif source == target:
                    row.append(nn.Identity())
                else:
                    steps = [conv(inputs, inputs, 3, 2) for _ in range(target - source - 1)]
                    row.append(nn.Sequential(*steps, conv(inputs, outputs, 3, 2, act=False)))
            self.rows.append(row)

    def forward(self, *maps: Tensor) -> list[Tensor]:
        return [torch.relu(sum(f(x) for f, x in zip(row, maps, strict=True))) for row in self.rows]


class Hrnet(nn.Module):
    """Three resolutions side by side, exchanged twice, joined bilinearly for the head."""

    def __init__(self) -> None:
        super().__init__()
        widths = [6, 8, 12]
        self.stem, self.down1, self.down2 = conv(3, 6, 3, 2), conv(6, 8, 3, 2), conv(8, 12, 3, 2)
        self.blocks = nn.ModuleList([BasicBlock(width) for width in widths])
        self.first, self.second = Exchange(widths), Exchange(widths)
        self.join, self.head = nn.Conv2d(26, 14, 1), nn.Conv2d(14, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.stem(x)
        two = self.down1(one)
        maps = [block(m) for block, m in zip(self.blocks, [one, two, self.down2(two)], strict=True)]
        maps = self.second(*self.first(*maps))
        size = maps[0].shape[2:]
        same = [functional.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
        return self.head(torch.relu(self.join(torch.cat(same, 1))))


class Dla(nn.Module):
    """Aggregation nodes: 1x1 convolutions over all that a tree has computed, with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.a, self.b, self.c, self.d = conv(8, 12, 3, 2), BasicBlock(12), BasicBlock(12), BasicBlock(12)
        self.root1, self.root2 = conv(24, 12, 1, act=False), conv(8 + 12 * 3, 12, 1, act=False)
        self.tail = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        bottom = functional.max_pool2d(x, 2)
        one = self.a(x)
        two = self.b(one)
        tree = torch.relu(self.root1(torch.cat([two, one], 1)) + two)
        three = self.c(tree)
        four = self.d(three)
        return self.tail(torch.relu(self.root2(torch.cat([four, three, bottom, tree], 1)) + four))


class Res2Block(nn.Module):
    """The middle convolution in four parts, each fed by the one before."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.last = conv(width, 4 * inner, 1), conv(4 * inner, width, 1, act=False)
        self.parts = nn.ModuleList([conv(inner, inner) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        chunks = torch.chunk(self.first(x), 4, 1)
        done = [self.parts[0](chunks[0])]
        for part, chunk in zip(list(self.parts)[1:], chunks[1:3], strict=True):
            done.append(part(done[-1] + chunk))
        return torch.relu(self.last(torch.cat([*done, chunks[3]], 1)) + x)


class Res2net(nn.Sequential):
    """Two hierarchical blocks."""

    def __init__(self) -> None:
        super().__init__(conv(3, 12, 3, 2), Res2Block(12, 4), Res2Block(12, 6), Head(12))


class DualPath(nn.Module):
    """The result is split: one part is added, the other laid at the end; the input likewise."""

    def __init__(self, inputs: int, stream: int, growth: int) -> None:
        super().__init__()
        self.stream = stream
        self.norm, self.body = nn.BatchNorm2d(inputs), nn.Sequential(conv(inputs, 12, 1), conv(12, 12, 3, groups=4))
        self.last = nn.Conv2d(12, stream + growth, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.body(torch.relu(self.norm(x))))
        added = x[:, : self.stream] + y[:, : self.stream]
        return torch.cat([added, x[:, self.stream :], y[:, self.stream :]], 1)


class Dpn(nn.Sequential):
    """Three dual path blocks."""

    def __init__(self) -> None:
        blocks = [DualPath(12 + 4 * i, 8, 4) for i in range(3)]
        super().__init__(conv(3, 12, 3, 2), *blocks, nn.BatchNorm2d(24), nn.ReLU(), Head(24))


class SelectiveKernel(nn.Module):
    """Two branches of different dilation, weighted by a softmax over the branches, channel by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv(width, width), conv(width, width, dilation=2)])
        self.down, self.norm, self.up = nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([branch(x) for branch in self.branches], 1)
        gate = both.sum(1).mean((2, 3), keepdim=True)
        gate = self.up(torch.relu(self.norm(self.down(gate))))
        count, _, width = both.shape[:3]
        weights = torch.softmax(gate.view(count, 2, width, 1, 1), 1)
        return (both * weights).sum(1)


class Sknet(nn.Sequential):
    """Bottlenecks around selective kernels."""

    def __init__(self) -> None:
        super().__init__(conv(3, 8, 3, 2), SelectiveKernel(8), conv(8, 12, 1), SelectiveKernel(12), Head(12))


class SplitAttention(nn.Module):
    """A grouped convolution makes several versions of each channel; a softmax weighs them."""

    def __init__(self, inputs: int, width: int, radix: int = 2, cardinal: int = 2) -> None:
        super().__init__()
        self.radix, self.cardinal = radix, cardinal
        self.body = conv(inputs, width * radix, 3, groups=cardinal * radix)
        self.fc1, self.norm = nn.Conv2d(width, 8, 1, groups=cardinal), nn.BatchNorm2d(8)
        self.fc2 = nn.Conv2d(8, width * radix, 1, groups=cardinal)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        count, channels, height, width = x.shape
        parts = x.reshape(count, self.radix, channels // self.radix, height, width)
        gate = parts.sum(1).mean((2, 3), keepdim=True)
        gate = self.fc2(torch.relu(self.norm(self.fc1(gate))))
        gate = gate.view(count, self.cardinal, self.radix, -1).transpose(1, 2)
        gate = torch.softmax(gate, 1).reshape(count, self.radix, channels // self.radix, 1, 1)
        return (parts * gate).sum(1)


class Resnest(nn.Sequential):
    """Convolutions around split attention."""

    def __init__(self) -> None:
        blocks = [SplitAttention(8, 8), conv(8, 12, 1), SplitAttention(12, 12, 2, 1)]
        super().__init__(conv(3, 8, 3, 2), *blocks, conv(12, 12, 1), Head(12))


class GhostModule(nn.Module):
    """Half of the channels by a convolution, the others by a cheap depthwise one; the surplus is cut off."""

    def __init__(self, inputs: int, outputs: int, act: bool = True) -> None:
        super().__init__()
        self.outputs, half = outputs, -(-outputs // 2)
        self.primary, self.cheap = conv(inputs, half, 1, act=act), conv(half, half, 3, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)[:, : self.outputs]


class GhostBottleneck(nn.Module):
    """Two ghost modules, a gate between them, a depthwise shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = GhostModule(inputs, inner), GhostModule(inner, outputs, act=False)
        self.down, self.up = nn.Conv2d(inner, 6, 1), nn.Conv2d(6, inner, 1)
        same = nn.Sequential(conv(inputs, inputs, 3, groups=inputs, act=False), conv(inputs, outputs, 1, act=False))
        self.shortcut = nn.Identity() if inputs == outputs else same

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        gate = self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True))))
        return self.second(y * functional.hardsigmoid(gate)) + self.shortcut(x)


class Ghostnet(nn.Sequential):
    """Two ghost bottlenecks."""

    def __init__(self) -> None:
        super().__init__(conv(3, 8, 3, 2), GhostBottleneck(8, 18, 8), GhostBottleneck(8, 22, 11), Head(11))


class RepvggBlock(nn.Module):
    """3x3, 1x1 and identity, each with its BatchNorm, added."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.three, self.one = conv(inputs, outputs, 3, stride, act=False), conv(inputs, outputs, 1, stride, act=False)
        self.same = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.three(x) + self.one(x)
        return torch.relu(y if self.same is None else y + self.same(x))


class Repvgg(nn.Sequential):
    """Not yet merged."""

    def __init__(self) -> None:
        super().__init__(RepvggBlock(3, 8, 2), RepvggBlock(8, 8), RepvggBlock(8, 12, 2), RepvggBlock(12, 12), Head(12))


class ScaledConv(nn.Conv2d):
    """Weights standardised where they are used, with a gain per output."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        scale = torch.rsqrt(torch.clamp(variance * self.weight[0].numel(), min=1e-4)) * self.gain
        return functional.conv2d(
            x, (self.weight - mean) * scale, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class NfBlock(nn.Module):
    """Scaled activations around standardised convolutions, a gate, a skip gain."""

    def __init__(self, width: int, inner: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.convs = nn.ModuleList(
            [ScaledConv(width, inner, 1), ScaledConv(inner, inner, 3, groups=2), ScaledConv(inner, width, 1)]
        )
        self.down, self.up = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 1)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.gelu(x) * (1.7 * self.beta)
        y = self.convs[0](y)
        for layer in list(self.convs)[1:]:
            y = layer(functional.gelu(y) * 1.7)
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return y * gate * 2.0 * self.gain * self.alpha + x


class Nfnet(nn.Sequential):
    """Two normaliser-free blocks."""

    def __init__(self) -> None:
        super().__init__(ScaledConv(3, 12, 3, 2), NfBlock(12, 8, 0.2, 1.0), NfBlock(12, 16, 0.2, 0.9), Head(12))


class Fpn(nn.Module):
    """Lateral 1x1 convolutions, top-down nearest resizing, a head shared by the levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Bottleneck(3, 6, 8, 2), Bottleneck(8, 6, 12, 2), Bottleneck(12, 8, 16, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(width, 10, 1) for width in (8, 12, 16)])
        self.smooth = nn.ModuleList([nn.Conv2d(10, 10, 3, padding=1) for _ in range(3)])
        self.shared, self.head, self.head_box = (
            nn.Conv2d(10, 10, 3, padding=1),
            nn.Conv2d(10, 6, 1),
            nn.Conv2d(10, 4, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top: Tensor | None = None
        results: list[Tensor] = []
        for level in reversed(range(3)):
            lateral = self.lateral[level](maps[level])
            top = lateral if top is None else lateral + functional.interpolate(top, lateral.shape[2:], mode="nearest")
            tower = torch.relu(self.shared(self.smooth[level](top)))
            results += [self.head(tower), self.head_box(tower)]
        return tuple(results)


class Deeplab(nn.Module):
    """Parallel dilated convolutions and a global branch, resized and joined; a low-level skip in the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.body = conv(3, 8, 3, 2), nn.Sequential(InvertedResidual(8, 16, 12, 2), conv(12, 12, dilation=2))
        self.one, self.pool = conv(12, 8, 1), conv(12, 8, 1)
        self.rates = nn.ModuleList([conv(12, 8, 3, dilation=rate) for rate in (2, 3, 4)])
        self.project, self.skip = conv(40, 12, 1), conv(8, 6, 1)
        self.last, self.head = nn.Sequential(conv(18, 12), nn.Dropout(0.1)), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        y = self.body(low)
        pooled = self.pool(functional.adaptive_avg_pool2d(y, 1))
        pooled = functional.interpolate(pooled, y.shape[2:], mode="bilinear", align_corners=False)
        y = self.project(torch.cat([self.one(y), *[rate(y) for rate in self.rates], pooled], 1))
        y = functional.interpolate(y, low.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(self.last(torch.cat([y, self.skip(low)], 1)))
        return functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)

"""Convolutional networks for images: chains, residual, dense and multi-branch ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True, dilation: int = 1
) -> nn.Sequential:
    """Convolution, BatchNorm and, unless it ends a branch, ReLU."""
    padding = dilation * (kernel - 1) // 2
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class Head(nn.Module):
    """Mean over space and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class Vgg(nn.Module):
    """Convolutions with biases, max pooling, and linear layers on the flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [(3, 8), (8, 8), (8, 12), (12, 12)]
        self.layers = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in pairs])
        self.fc1, self.fc2, self.head = nn.Linear(12 * 16, 20), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            if index % 2:
                x = functional.max_pool2d(x, 2)
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 4), 1)
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(inputs, inner, 1), conv(inner, inner, 3, stride, groups), conv(inner, outputs, 1, act=False)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class Resnet50(nn.Sequential):
    """Stem with max pooling and two stages of bottlenecks."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__(
            conv(3, 8, 7, 2),
            nn.MaxPool2d(3, 2, 1),
            Bottleneck(8, 8, 16, groups=groups),
            Bottleneck(16, 8, 16, groups=groups),
            Bottleneck(16, 12, 24, 2, groups),
            Bottleneck(24, 12, 24, groups=groups),
            Head(24),
        )


class Resnext(Resnet50):
    """The same with grouped convolutions."""

    def __init__(self) -> None:
        super().__init__(4)


class DenseLayer(nn.Module):
    """BatchNorm in front of each convolution; the result is laid beside the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 3 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(3 * growth), nn.Conv2d(3 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(new)))], 1)


class Densenet(nn.Sequential):
    """Two dense blocks, a transition with average pooling between them."""

    def __init__(self) -> None:
        dense = [DenseLayer(8 + 4 * i, 4) for i in range(3)]
        later = [DenseLayer(10 + 4 * i, 4) for i in range(2)]
        transition = [nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)]
        super().__init__(conv(3, 8), *dense, *transition, *later, nn.BatchNorm2d(18), nn.ReLU(), Head(18))


class InceptionBlock(nn.Module):
    """Four branches side by side: 1x1, factorised 3x3, double 3x3, and an average that counts its padding."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = conv(inputs, 6, 1)
        self.three = nn.Sequential(conv(inputs, 4, 1), conv(4, 6))
        self.five = nn.Sequential(conv(inputs, 4, 1), conv(4, 6), conv(6, 6))
        self.flat = nn.Sequential(nn.Conv2d(inputs, 6, (1, 5), padding=(0, 2)), nn.Conv2d(6, 6, (5, 1), padding=(2, 0)))
        self.pool = conv(inputs, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.avg_pool2d(x, 3, 1, 1)
        return torch.cat([self.one(x), self.three(x), self.five(x), self.flat(x), self.pool(pooled)], 1)


class Inception(nn.Sequential):
    """Stem and two blocks."""

    def __init__(self) -> None:
        super().__init__(
            conv(3, 8, 3, 2), InceptionBlock(8), nn.MaxPool2d(3, 2, ceil_mode=True), InceptionBlock(28), Head(28)
        )


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; a shortcut where shapes allow; squeeze and excitation on request."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1, squeeze: int = 0) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.Hardswish()
        )
        self.down, self.up = (nn.Conv2d(inner, squeeze, 1), nn.Conv2d(squeeze, inner, 1)) if squeeze else (None, None)
        self.project = conv(inner, outputs, 1, act=False)
        self.same = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        if self.down is not None and self.up is not None:
            gate = functional.adaptive_avg_pool2d(y, 1)
            y = y * functional.hardsigmoid(self.up(functional.silu(self.down(gate))))
        y = self.project(y)
        return x + y if self.same else y


class Mobilenet(nn.Sequential):
    """Inverted residuals, with squeeze and excitation in the later ones."""

    def __init__(self) -> None:
        super().__init__(
            conv(3, 8, 3, 2),
            InvertedResidual(8, 16, 8),
            InvertedResidual(8, 24, 12, 2, 6),
            InvertedResidual(12, 24, 12, 1, 6),
            nn.Conv2d(12, 20, 1),
            nn.Hardswish(),
            Head(20),
        )


class Up(nn.Module):
    """Upsample by a transposed convolution, lay the skip beside it, convolve twice."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        self.convs = nn.Sequential(conv(outputs + skip, outputs), conv(outputs, outputs))

    def forward(self, x: Tensor, *skips: Tensor) -> Tensor:
        return self.convs(torch.cat([*skips, self.up(x)], 1))


class Unet(nn.Module):
    """Two levels down and up, transposed convolutions and concats."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv(3, 8), conv(8, 8))
        self.down2 = nn.Sequential(conv(8, 12), conv(12, 12))
        self.down3 = nn.Sequential(conv(12, 16), conv(16, 16))
        self.up2, self.up1 = Up(16, 12, 12), Up(12, 8, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(functional.max_pool2d(one, 2))
        three = self.down3(functional.max_pool2d(two, 2))
        return self.head(self.up1(self.up2(three, two), one))


class UnetPlus(nn.Module):
    """Nested skips, two outputs of which the mean is taken."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 10, 12]
        self.down = nn.ModuleList([conv(a, b) for a, b in zip([3, 8, 10], widths, strict=True)])
        self.up01, self.up11, self.up02 = Up(10, 8, 8), Up(12, 10, 10), Up(10, 16, 8)
        self.head, self.head1 = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x00 = self.down[0](x)
        x10 = self.down[1](functional.max_pool2d(x00, 2))
        x20 = self.down[2](functional.max_pool2d(x10, 2))
        x01 = self.up01(x10, x00)
        x11 = self.up11(x20, x10)
        x02 = self.up02(x11, x00, x01)
        return (self.head(x02) + self.head1(x01)) / 2

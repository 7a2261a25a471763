"""Networks in the shape of AlexNet, EfficientNet, MnasNet and SqueezeNet, a stage or two of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.classic import Head, conv


class Alexnet(nn.Sequential):
    """Large kernels with biases, overlapping max pooling, linear layers with dropout on the flattened maps."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(8, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 1)),
            *(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(12, 20), nn.ReLU()),
            nn.Linear(20, 5),
        )


class Gate(nn.Module):
    """Squeeze and excitation with SiLU and a sigmoid."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(nn.functional.silu(self.down(self.pool(x)))))


class Inverted(nn.Module):
    """Expand, depthwise, perhaps gated, project; a shortcut where shapes allow."""

    def __init__(self, inputs: int, inner: int, outputs: int, kernel: int, stride: int, act: type, gate: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), act()]
        layers += [nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False)]
        layers += [nn.BatchNorm2d(inner), act(), *([Gate(inner, gate)] if gate else [])]
        self.layers = nn.Sequential(*layers, nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.same = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.same else y


class Mnasnet(nn.Sequential):
    """Inverted residuals with kernels of three and five."""

    def __init__(self) -> None:
        super().__init__(
            conv(3, 8, 3, 2),
            Inverted(8, 16, 8, 3, 1, nn.ReLU, 0),
            Inverted(8, 24, 12, 5, 2, nn.ReLU, 0),
            Inverted(12, 24, 12, 5, 1, nn.ReLU, 0),
            conv(12, 16, 1),
            Head(16),
        )


class Efficientnet(nn.Sequential):
    """Inverted residuals with SiLU and gates."""

    def __init__(self) -> None:
        super().__init__(
            conv(3, 8, 3, 2),
            Inverted(8, 16, 8, 3, 1, nn.SiLU, 4),
            Inverted(8, 24, 12, 5, 2, nn.SiLU, 6),
            Inverted(12, 24, 12, 5, 1, nn.SiLU, 6),
            conv(12, 16, 1),
            Head(16),
        )


class Fire(nn.Module):
    """Squeeze by 1x1, then 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, inner, 1)
        self.one, self.three = nn.Conv2d(inner, outputs, 1), nn.Conv2d(inner, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.one(x)), torch.relu(self.three(x))], 1)


class Squeezenet(nn.Sequential):
    """Fire modules, and a convolution for a classifier."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Fire(8, 4, 8), Fire(16, 4, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 6, 10)),
            *(nn.Dropout(), nn.Conv2d(20, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )

"""Networks for sound, text in images, and super-resolution; and convolutional ones with other norms than BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from architectures.classic import Head
from architectures.mixed import LayerNorm2d
from architectures.windows import Mlp, SelfAttention


class Espcn(nn.Module):
    """Convolutions at low resolution, then pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 3 * 9, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return functional.pixel_shuffle(self.head(x), 3)


class Edsr(nn.Module):
    """Residual blocks without norms, a long skip, two steps of pixel shuffle inside the network."""

    rows_per_block = 4  # channels that one channel of the larger image is made of

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.first = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(3)])
        self.second = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(3)])
        self.up1, self.up2 = (nn.Conv2d(width, 4 * width, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.stem(x - 0.4)
        for first, second in zip(self.first, self.second, strict=True):
            y = y + 0.1 * second(torch.relu(first(y)))
        x = functional.pixel_shuffle(self.up1(x + self.tail(y)), 2)
        return self.head(functional.pixel_shuffle(self.up2(x), 2)) + 0.4


class DenseResidual(nn.Module):
    """Each convolution reads all that came before in its block; the result is scaled and added."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        sizes = [*[growth] * 4, width]
        self.convs = nn.ModuleList([nn.Conv2d(width + i * growth, n, 3, padding=1) for i, n in enumerate(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in list(self.convs)[:-1]:
            maps.append(functional.leaky_relu(layer(torch.cat(maps, 1)), 0.2))
        return self.convs[-1](torch.cat(maps, 1)) * 0.2 + x


class Esrgan(nn.Module):
    """Dense residual blocks, nearest upsampling between convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, width, 3, padding=1), nn.Sequential(*[DenseResidual(width, 4)] * 1)
        self.trunk, self.up = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.trunk(self.blocks(x))
        x = functional.interpolate(x, scale_factor=2, mode="nearest")
        return self.head(functional.leaky_relu(self.up(x), 0.2))


class Crnn(nn.Module):
    """Convolutions, columns as time, two bidirectional LSTMs with a linear layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)])
        self.last, self.bn = nn.Conv2d(12, 16, (4, 2)), nn.BatchNorm2d(16)
        self.first, self.second = nn.LSTM(16, 10, bidirectional=True), nn.LSTM(12, 10, bidirectional=True)
        self.middle, self.head = nn.Linear(20, 12), nn.Linear(20, 9)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = functional.max_pool2d(torch.relu(layer(x)), 2)
        x = torch.relu(self.bn(self.last(x))).squeeze(2).permute(2, 0, 1)
        x, _ = self.first(x)
        x, _ = self.second(self.middle(x))
        return self.head(x)


class Wav2vec(nn.Module):
    """Strided convolutions with GroupNorm, a transformer, a grouped positional convolution with weight norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 12, 10, 5, bias=False), nn.GroupNorm(12, 12)
        self.convs = nn.ModuleList([nn.Conv1d(12, 12, 3, 2, bias=False), nn.Conv1d(12, 12, 2, 2, bias=False)])
        self.feature_norm, self.project = nn.LayerNorm(12), nn.Linear(12, width)
        self.place = weight_norm(nn.Conv1d(width, width, 8, padding=4, groups=4), dim=2)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.attention, self.mlp, self.head = SelfAttention(width, 4), Mlp(width, 24), nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.norm(self.first(x)))
        for layer in self.convs:
            x = functional.gelu(layer(x))
        x = self.project(self.feature_norm(x.transpose(1, 2)))
        x = self.norms[0](x + functional.gelu(self.place(x.transpose(1, 2))[:, :, :-1]).transpose(1, 2))
        x = self.norms[1](x + self.attention(x))
        return self.head(self.norms[2](x + self.mlp(x)))


class Crepe(nn.Module):
    """Framed sound: wide one-dimensional kernels with padding, ReLU in front of BatchNorm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 8, 8, 12]
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(a, b, (k, 1), (s, 1))
                for a, b, k, s in zip(widths, widths[1:], (33, 8, 8, 8), (4, 1, 1, 1), strict=False)
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in widths[1:]])
        self.head = nn.Linear(12 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for index, (layer, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.pad(x, (0, 0, 14, 15) if index == 0 else (0, 0, 3, 4))
            x = functional.max_pool2d(norm(torch.relu(layer(x))), (2, 1), (2, 1))
        return torch.sigmoid(self.head(x.permute(0, 2, 1, 3).reshape(x.shape[0], -1)))


class Grouped(nn.Module):
    """GroupNorm after every convolution, a shortcut, an upsampled second half: as in diffusion models."""

    rows_per_block = 4  # channels that are normalised together

    def __init__(self, width: int = 16, groups: int = 4) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(groups, width) for _ in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(4)])
        self.join, self.head = nn.Conv2d(2 * width, width, 1), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.convs[1](functional.silu(self.norms[1](self.convs[0](functional.silu(self.norms[0](x))))))
        z = self.down(y)
        z = z + self.convs[2](functional.silu(self.norms[2](z)))
        z = functional.interpolate(z, scale_factor=2, mode="nearest")
        return self.head(self.convs[3](functional.silu(self.norms[3](self.join(torch.cat([y, z], 1))))))


class Convnext(nn.Module):
    """Depthwise 7x7, LayerNorm over channels, a wide feed-forward layer with layer scale; downsampling between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 12, 4, 4), LayerNorm2d(12)
        self.depth = nn.ModuleList([nn.Conv2d(w, w, 7, padding=3, groups=w) for w in (12, 16)])
        self.norms = nn.ModuleList([nn.LayerNorm(w) for w in (12, 16)])
        self.mlps = nn.ModuleList([Mlp(12, 32), Mlp(16, 40)])
        self.gammas = nn.ParameterList([nn.Parameter(torch.rand(w)) for w in (12, 16)])
        self.down_norm, self.down, self.last, self.tail = (
            LayerNorm2d(12),
            nn.Conv2d(12, 16, 2, 2),
            LayerNorm2d(16),
            Head(16),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        for index, (depth, norm, mlp, gamma) in enumerate(
            zip(self.depth, self.norms, self.mlps, self.gammas, strict=True)
        ):
            if index:
                x = self.down(self.down_norm(x))
            x = x + (gamma * mlp(norm(depth(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.tail(self.last(x))


class RepMixer(nn.Module):
    """FastViT: depthwise mixing minus its norm, then a convolutional feed-forward layer, both with layer scale."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.GELU())
        self.norm, self.skip = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.mixer, self.mixer_norm = (
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
        )
        self.depth = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False), nn.BatchNorm2d(width)
        )
        self.fc1, self.fc2 = nn.Conv2d(width, 24, 1), nn.Conv2d(24, width, 1)
        self.gammas, self.tail = nn.Parameter(torch.rand(2, width, 1, 1)), Head(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.gammas[0] * (self.mixer_norm(self.mixer(x)) + self.skip(x) - self.norm(x))
        x = x + self.gammas[1] * self.fc2(functional.gelu(self.fc1(self.depth(x))))
        return self.tail(x)

"""Attention over windows and grids of an image, and over patches unfolded from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures.classic import Head, InvertedResidual, conv


class Mlp(nn.Sequential):
    """Two linear layers around GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def partition(x: Tensor, window: int) -> Tensor:
    """Windows as batch: `[n h w c]` to `[n*windows, window*window, c]`."""
    count, height, width, channels = x.shape
    x = x.view(count, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def reverse(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Back from windows."""
    channels = x.shape[-1]
    x = x.view(-1, height // window, width // window, window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def grid_partition(x: Tensor, grid: int) -> Tensor:
    """Dilated windows as batch."""
    count, height, width, channels = x.shape
    x = x.view(count, grid, height // grid, grid, width // grid, channels)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, channels)


def grid_reverse(x: Tensor, grid: int, height: int, width: int) -> Tensor:
    """Back from a grid."""
    channels = x.shape[-1]
    x = x.view(-1, height // grid, width // grid, grid, grid, channels)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, height, width, channels)


class WindowAttention(nn.Module):
    """Attention in a window with a table of relative positions, or cosine similarity and a small network."""

    index: Tensor
    coordinates: Tensor

    def __init__(self, width: int, window: int, heads: int, cosine: bool = False) -> None:
        super().__init__()
        self.heads, self.cosine = heads, cosine
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offsets = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", offsets[0] * (2 * window - 1) + offsets[1], persistent=False)
        steps = torch.arange(1 - window, window).float() / window
        self.register_buffer("coordinates", torch.cartesian_prod(steps, steps), persistent=False)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.2)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), 2.0))
        self.positions = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, heads, bias=False))

    def bias(self) -> Tensor:
        length = self.index.shape[0]
        table = torch.sigmoid(self.positions(self.coordinates)) * 16 if self.cosine else self.table
        return table[self.index.view(-1)].view(length, length, self.heads).permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        count, length, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.cosine:
            scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * torch.clamp(self.scale, max=4.6).exp()
        else:
            scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.bias()
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(count // windows, windows, self.heads, length, length) + mask[:, None]
            scores = scores.view(-1, self.heads, length, length)
        x = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(count, length, width)
        return self.out(x)


class SwinBlock(nn.Module):
    """Shifted windows; in version 2 the norms follow the branches and similarity is the cosine."""

    mask: Tensor | None

    def __init__(self, width: int, heads: int, shift: int, version: int, size: int = 8, window: int = 4) -> None:
        super().__init__()
        self.shift, self.window, self.version = shift, window, version
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = WindowAttention(width, window, heads, version == 2), Mlp(width, 2 * width)
        regions = torch.zeros(1, size, size, 1)
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
            regions[:, rows, columns] = number
        parts = partition(regions, window).squeeze(-1)
        apart = parts[:, None, :] != parts[:, :, None]
        self.register_buffer("mask", apart.float() * -100 if shift else None, persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = reverse(self.attention(partition(x, self.window), self.mask), self.window, height, width)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x

    def forward(self, x: Tensor) -> Tensor:
        if self.version == 2:
            x = x + self.norm1(self.attend(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Patches, a shifted pair of blocks, merging of patches, a second stage."""

    def __init__(self, version: int = 1) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.blocks = nn.Sequential(SwinBlock(16, 4, 0, version), SwinBlock(16, 4, 2, version))
        self.merge_norm, self.merge = nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
        self.later, self.last = SwinBlock(32, 4, 0, version, 4), nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.patches(x).permute(0, 2, 3, 1)))
        corners = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        x = self.merge(self.merge_norm(torch.cat(corners, -1)))
        return self.head(self.last(self.later(x)).mean((1, 2)))


class Swin2(Swin):
    """Version 2."""

    def __init__(self) -> None:
        super().__init__(2)


class Maxvit(nn.Module):
    """A gated inverted residual, attention in blocks, attention in a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv(3, 12, 3, 2), InvertedResidual(12, 24, 12, 1, 6)
        self.norms = nn.ModuleList([nn.LayerNorm(12) for _ in range(4)])
        self.block, self.grid = WindowAttention(12, 4, 3), WindowAttention(12, 4, 3)
        self.mlps = nn.ModuleList([Mlp(12, 24), Mlp(12, 24)])
        self.tail = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).permute(0, 2, 3, 1)
        _, height, width, _ = x.shape
        x = x + reverse(self.block(partition(self.norms[0](x), 4)), 4, height, width)
        x = x + self.mlps[0](self.norms[1](x))
        x = x + grid_reverse(self.grid(grid_partition(self.norms[2](x), 4)), 4, height, width)
        x = x + self.mlps[1](self.norms[3](x))
        return self.tail(x.permute(0, 3, 1, 2))


class SelfAttention(nn.Module):
    """Multi-head attention by one projection and the fused function."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(x).reshape(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(x.transpose(1, 2).reshape(count, length, width))


class Mobilevit(nn.Module):
    """Local convolution, patches unfolded to sequences, a transformer, folded back and joined with the input."""

    def __init__(self, width: int = 12, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.stem, self.expand = conv(3, 8, 3, 2), InvertedResidual(8, 16, 8, 2)
        self.local, self.widen = conv(8, 8), nn.Conv2d(8, width, 1, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.attention, self.mlp = SelfAttention(width, 3), Mlp(width, 20)
        self.back, self.join, self.tail = conv(width, 8, 1), conv(16, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.stem(x))
        y = self.widen(self.local(x))
        count, width, height, breadth = y.shape
        size, rows, columns = self.patch, height // self.patch, breadth // self.patch
        y = y.reshape(count * width * rows, size, columns, size).transpose(1, 2)
        y = y.reshape(count, width, rows * columns, size * size).transpose(1, 3).reshape(-1, rows * columns, width)
        y = y + self.attention(self.norms[0](y))
        y = self.norms[2](y + self.mlp(self.norms[1](y)))
        y = y.view(count, size * size, rows * columns, width).transpose(1, 3)
        y = y.reshape(count * width * rows, columns, size, size).transpose(1, 2)
        y = self.back(y.reshape(count, width, height, breadth))
        return self.tail(self.join(torch.cat([x, y], 1)))

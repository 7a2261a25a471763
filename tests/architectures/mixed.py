"""Transformers for images that attend across channels, to fewer positions, or beside convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures.classic import Head, conv
from architectures.windows import Mlp, SelfAttention


class ChannelAttention(nn.Module):
    """Cross-covariance: channels attend to channels, queries and keys of unit length along positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(x).reshape(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        x = (torch.softmax(scores * self.temperature, -1) @ v).permute(0, 3, 1, 2).reshape(count, length, width)
        return self.out(x)


class Xcit(nn.Module):
    """Cross-covariance attention, local patch interaction, layer scale, class attention."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2, act=False), nn.GELU(), conv(8, width, 3, 2, act=False))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(5)])
        self.attention, self.mlp = ChannelAttention(width, 4), Mlp(width, 24)
        self.local1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn, self.local2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.gammas = nn.Parameter(torch.rand(4, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        count, width, height, breadth = x.shape
        x = x.reshape(count, width, -1).transpose(1, 2)
        x = x + self.gammas[0] * self.attention(self.norms[0](x))
        y = self.norms[1](x).permute(0, 2, 1).reshape(count, width, height, breadth)
        y = self.local2(self.bn(functional.gelu(self.local1(y))))
        x = x + self.gammas[1] * y.reshape(count, width, -1).permute(0, 2, 1)
        x = x + self.gammas[2] * self.mlp(self.norms[2](x))
        both = self.norms[3](torch.cat([self.token.expand(count, -1, -1), x], 1))
        q = self.q(both[:, :1]).reshape(count, 1, 4, -1).permute(0, 2, 1, 3)
        k, v = (f(both).reshape(count, -1, 4, width // 4).permute(0, 2, 1, 3) for f in (self.k, self.v))
        token = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, 1, width)
        return self.head(self.norms[4](self.gammas[3] * self.out(token))[:, 0])


class LinearNorm(nn.Module):
    """Linear layer and BatchNorm over flattened positions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LevitAttention(nn.Module):
    """Values wider than keys, a bias per offset looked up in a table, hard swish in front of the projection."""

    index: Tensor

    def __init__(self, width: int, keys: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.keys, self.values = heads, keys, 2 * keys
        self.qkv, self.out = LinearNorm(width, heads * 4 * keys), LinearNorm(heads * 2 * keys, width)
        self.biases = nn.Parameter(torch.randn(heads, size * size))
        places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        offsets = (places[:, None] - places[None]).abs()
        self.register_buffer("index", offsets[..., 0] * size + offsets[..., 1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        q, k, v = self.qkv(x).view(count, length, self.heads, -1).split([self.keys, self.keys, self.values], 3)
        scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * self.keys**-0.5 + self.biases[:, self.index]
        x = (torch.softmax(scores, -1) @ v.permute(0, 2, 1, 3)).transpose(1, 2).reshape(count, length, -1)
        return self.out(functional.hardswish(x))


class Levit(nn.Module):
    """Strided convolutions, then attention and feed-forward layers with BatchNorm; two heads averaged."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2, act=False), nn.Hardswish(), conv(8, width, 3, 4, act=False))
        self.attention1, self.attention2 = (LevitAttention(width, 4, 3, 4) for _ in range(2))
        self.wide1, self.thin1 = LinearNorm(width, 24), LinearNorm(24, width)
        self.bn, self.head = nn.BatchNorm1d(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attention1(x)
        x = x + self.thin1(functional.hardswish(self.wide1(x)))
        x = x + self.attention2(x)
        return self.head(self.bn(x.mean(1)))


class ReducedAttention(nn.Module):
    """Keys and values from a strided convolution of the map."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.reduce, self.norm, self.out = (
            nn.Conv2d(width, width, ratio, ratio),
            nn.LayerNorm(width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor, height: int, breadth: int) -> Tensor:
        count, length, width = x.shape
        q = self.q(x).reshape(count, length, self.heads, -1).permute(0, 2, 1, 3)
        small = x.permute(0, 2, 1).reshape(count, width, height, breadth)
        small = self.norm(self.reduce(small).reshape(count, width, -1).permute(0, 2, 1))
        k, v = self.kv(small).reshape(count, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        return self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(count, length, width))


class Pvt(nn.Module):
    """Spatial reduction attention; a depthwise convolution inside the feed-forward layer; position by convolution."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, width, 7, 4, 3), nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.attention = ReducedAttention(width, 4, 2)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)
        self.depth, self.head = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        count, width, height, breadth = x.shape
        x = self.norms[0](x.flatten(2).transpose(1, 2))
        x = x + self.attention(self.norms[1](x), height, breadth)
        y = x.transpose(1, 2).view(count, width, height, breadth)
        x = (self.position(y) + y).flatten(2).transpose(1, 2)
        y = self.fc1(self.norms[2](x)).transpose(1, 2).view(count, 24, height, breadth)
        x = x + self.fc2(functional.gelu(self.depth(y).flatten(2).transpose(1, 2)))
        return self.head(self.norms[3](x).mean(1))


class FactorAttention(nn.Module):
    """Softmax over positions for the keys, then keys times values; a convolution of the values as relative position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        half = width // 2
        self.small = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.large = nn.Conv2d(half, half, 5, padding=2, groups=half)

    def forward(self, x: Tensor, height: int, breadth: int) -> Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(x).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        factor = q @ (torch.softmax(k, 2).transpose(-1, -2) @ v)
        image = v[:, :, 1:].transpose(-1, -2).reshape(count, width, height, breadth)
        parts = torch.split(image, width // 2, 1)
        image = torch.cat([self.small(parts[0]), self.large(parts[1])], 1)
        image = image.reshape(count, self.heads, -1, height * breadth).transpose(-1, -2)
        place = functional.pad(q[:, :, 1:] * image, (0, 0, 1, 0))
        x = (width // self.heads) ** -0.5 * factor + place
        return self.out(x.transpose(1, 2).reshape(count, length, width))


class Coat(nn.Module):
    """Class token, convolutional position, factorised attention."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.attention, self.mlp, self.head = FactorAttention(width, 4), Mlp(width, 24), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        count, width, height, breadth = x.shape
        x = self.norms[0](x.flatten(2).transpose(1, 2))
        y = x.transpose(1, 2).view(count, width, height, breadth)
        x = (self.position(y) + y).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(count, -1, -1), x], 1)
        x = x + self.attention(self.norms[1](x), height, breadth)
        x = x + self.mlp(self.norms[2](x))
        return self.head(self.norms[3](x)[:, 0])


class Twins(nn.Module):
    """Attention in local groups and to reduced keys, with a convolutional position between."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(5)])
        self.local, self.all = SelfAttention(width, 4), ReducedAttention(width, 4, 4)
        self.mlp1, self.mlp2, self.head = Mlp(width, 24), Mlp(width, 24), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        count, width, height, breadth = x.shape
        x = x.flatten(2).transpose(1, 2)
        y = self.norms[0](x).view(count, height // 4, 4, breadth // 4, 4, width).transpose(2, 3)
        y = self.local(y.reshape(-1, 16, width)).reshape(count, height // 4, breadth // 4, 4, 4, width)
        x = x + y.transpose(2, 3).reshape(count, height * breadth, width)
        x = x + self.mlp1(self.norms[1](x))
        y = x.transpose(1, 2).view(count, width, height, breadth)
        x = (self.position(y) + y).flatten(2).transpose(1, 2)
        x = x + self.all(self.norms[2](x), height, breadth)
        x = x + self.mlp2(self.norms[3](x))
        return self.head(self.norms[4](x).mean(1))


class Crossvit(nn.Module):
    """Two branches of different patch sizes; the class token of each attends to the patches of the other."""

    def __init__(self) -> None:
        super().__init__()
        widths = [12, 16]
        self.patches = nn.ModuleList([nn.Conv2d(3, w, p, p) for w, p in zip(widths, (4, 8), strict=True)])
        self.tokens = nn.ParameterList([nn.Parameter(torch.randn(1, 1, w)) for w in widths])
        self.places = nn.ParameterList([nn.Parameter(torch.randn(1, n, w)) for n, w in ((65, 12), (17, 16))])
        self.norms = nn.ModuleList([nn.LayerNorm(w) for w in widths])
        self.attention = nn.ModuleList([SelfAttention(w, 4) for w in widths])
        self.mlp_norms = nn.ModuleList([nn.LayerNorm(w) for w in widths])
        self.mlps = nn.ModuleList([Mlp(w, 2 * w) for w in widths])
        self.across = nn.ModuleList([nn.Linear(a, b) for a, b in ((12, 16), (16, 12))])
        self.back = nn.ModuleList([nn.Linear(a, b) for a, b in ((16, 12), (12, 16))])
        self.q = nn.ModuleList([nn.Linear(w, w) for w in (16, 12)])
        self.kv = nn.ModuleList([nn.Linear(w, 2 * w) for w in (16, 12)])
        self.out = nn.ModuleList([nn.Linear(w, w) for w in (16, 12)])
        self.ends = nn.ModuleDict({str(i): nn.ModuleDict({"head": nn.Linear(w, 5)}) for i, w in enumerate(widths)})

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for index, patches in enumerate(self.patches):
            token = self.tokens[index].expand(x.shape[0], -1, -1)
            y = torch.cat([token, patches(x).flatten(2).transpose(1, 2)], 1) + self.places[index]
            y = y + self.attention[index](self.norms[index](y))
            branches.append(y + self.mlps[index](self.mlp_norms[index](y)))
        results = []
        for index, own in enumerate(branches):
            token = self.across[index](own[:, :1])
            both = torch.cat([token, branches[1 - index][:, 1:]], 1)
            q = self.q[index](both[:, :1]).unflatten(2, (4, -1)).transpose(1, 2)
            kv = self.kv[index](both).unflatten(2, (2, 4, -1)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, kv[0], kv[1]).transpose(1, 2).flatten(2)
            results.append(
                self.ends[str(index)]["head"]((own[:, :1] + self.back[index](token + self.out[index](y)))[:, 0])
            )
        return (results[0] + results[1]) / 2


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Edgenext(nn.Module):
    """Convolutional encoder with layer scale, then split depthwise and cross-covariance attention."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 4, 4), LayerNorm2d(width, 1e-6)
        self.depth, self.norm1 = nn.Conv2d(width, width, 5, padding=2, groups=width), nn.LayerNorm(width, 1e-6)
        self.mlp1, self.mlp2 = Mlp(width, 24), Mlp(width, 24)
        self.gammas = nn.Parameter(torch.rand(3, width))
        part = width // 4
        self.convs = nn.ModuleList([nn.Conv2d(part, part, 3, padding=1, groups=part) for _ in range(3)])
        self.norm2, self.norm3 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attention, self.tail = ChannelAttention(width, 4), Head(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        x = x + (self.gammas[0] * self.mlp1(self.norm1(self.depth(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        chunks, done = torch.chunk(x, 4, 1), []
        for index, layer in enumerate(self.convs):
            done.append(layer(chunks[index] if index == 0 else done[-1] + chunks[index]))
        y = torch.cat([*done, chunks[3]], 1)
        count, width, height, breadth = y.shape
        y = y.reshape(count, width, height * breadth).permute(0, 2, 1)
        y = y + self.gammas[1] * self.attention(self.norm2(y))
        y = self.gammas[2] * self.mlp2(self.norm3(y.reshape(count, height, breadth, width)))
        return self.tail(x + y.permute(0, 3, 1, 2))

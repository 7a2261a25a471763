"""Small transformers of our own, and pruning by zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

WIDTH, HEADS, SIZE, INNER, WORDS = 24, 4, 6, 40, 30
# The head of six has three pairs of rotated dimensions: (0, 3), (1, 4), (2, 5).
PAIR = (0, 3)


class Rms(nn.Module):
    """Root mean square norm, as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions, the halves of a head rotated against each other."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[2]).float(), 0.5 ** torch.arange(half).float())
    cosine, sine = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat([-right, left], -1) * sine


class Attention(nn.Module):
    """Self-attention with projections of their own, `groups` key and value heads, in one of several spellings."""

    def __init__(
        self,
        heads: int = HEADS,
        groups: int | None = None,
        size: int = SIZE,
        value_size: int = SIZE,
        style: str = "fused",
        width: int = WIDTH,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.style = heads, groups or heads, style
        self.q = nn.Linear(width, heads * size, bias)
        self.k = nn.Linear(width, self.groups * size, bias)
        self.v = nn.Linear(width, self.groups * value_size, bias)
        self.o = nn.Linear(heads * value_size, width, bias)
        self.table = nn.Embedding(9, heads) if style == "relative" else None

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        if self.groups == self.heads:
            return x
        batch, groups, length, size = x.shape
        wide = x[:, :, None].expand(batch, groups, self.heads // groups, length, size)
        return wide.reshape(batch, self.heads, length, size)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.style in ("fused", "causal", "rotary"):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=self.style == "causal")
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.table is not None:
            place = torch.arange(q.shape[2])
            scores = scores + self.table((place[None] - place[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
        return torch.softmax(scores, -1) @ v

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None) -> Any:
        q, k, v = (
            self.split(self.q(x), self.heads),
            self.split(self.k(x), self.groups),
            self.split(self.v(x), self.groups),
        )
        if self.style == "rotary":
            q, k = rotate(q), rotate(k)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = self.mix(q, self.repeat(k), self.repeat(v))
        y = self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return y if past is None else (y, k, v)


class Joined(nn.Module):
    """Attention with one projection for query, key and value."""

    def __init__(self, heads: int = HEADS, size: int = SIZE) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(WIDTH, 3 * heads * size)
        self.o = nn.Linear(heads * size, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = ((q * self.size**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(batch, length, -1))


class Torch(nn.Module):
    """PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class FeedForward(nn.Module):
    def __init__(self, inner: int = INNER, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(x)))


class Gated(nn.Module):
    def __init__(self, inner: int = INNER, width: int = WIDTH) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Every expert runs; a router weighs them."""

    def __init__(self, widths: Sequence[int] = (INNER, INNER)) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, len(widths))
        self.experts = nn.ModuleList(FeedForward(inner) for inner in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.router(x).softmax(-1)
        return sum(share[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, with residual connections."""

    def __init__(
        self, attention: nn.Module, inner: nn.Module, norm: Callable[[int], nn.Module], width: int = WIDTH
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm(width), norm(width)])
        self.attention, self.inner = attention, inner

    def forward(self, x: torch.Tensor, key: torch.Tensor | None = None, value: torch.Tensor | None = None) -> Any:
        past = () if key is None else ((key, value),)
        result = self.attention(self.norms[0](x), *past)
        x = x + (result[0] if past else result)
        x = x + self.inner(self.norms[1](x))
        return (x, *result[1:]) if past else x


class Language(nn.Module):
    """Embedding, two blocks, norm and head."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        blocks = [
            Block(Attention(style="rotary", width=width, bias=False), Gated(width=width), Rms, width) for _ in "ab"
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = Rms(width), nn.Linear(width, WORDS, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids))))


# --- pruning ----------------------------------------------------------------------------------------------------


def randomise(module: nn.Module) -> Any:
    """Weights without a zero, biases too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        sign = torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -1.0, 1.0)
        size = 0.3 if parameter.ndim > 1 else 1.0
        parameter.data = (torch.rand(parameter.shape, generator=generator) * 0.8 + 0.2) * sign * size
    return module.eval()


def of_heads(*heads: int, size: int = SIZE) -> list[int]:
    return [head * size + index for head in heads for index in range(size)]


def of_dimensions(*dimensions: int, heads: int = HEADS) -> list[int]:
    return [head * SIZE + index for head in range(heads) for index in dimensions]


def zero_rows(weight: nn.Parameter, bias: nn.Parameter | None, rows: Sequence[int], offset: int = 0) -> None:
    index = [offset + row for row in rows]
    weight.data[index] = 0
    if bias is not None:
        bias.data[index] = 0


def zero_linear(linear: nn.Linear, rows: Sequence[int], offset: int = 0) -> None:
    zero_rows(linear.weight, linear.bias, rows, offset)


def zero_columns(linear: nn.Linear, columns: Sequence[int]) -> None:
    linear.weight.data[:, list(columns)] = 0


def dead_inner(inner: nn.Module) -> None:
    """Five units by the rows that make them, seven by the columns that read them."""
    zero_linear(inner.gate if isinstance(inner, Gated) else inner.up, range(5))
    zero_columns(inner.down, range(20, 27))

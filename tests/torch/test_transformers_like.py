"""Small transformers of our own, exported by torch: exact parameter counts, static and with free batch and sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

from models import check_same, parameters, shrunk
from torch import nn

WIDTH, HEADS, SIZE, HIDDEN, WORDS = 32, 4, 8, 48, 20
BATCH, LENGTH = 2, 7
# Two sizes: the exported one, and another where it is free.
FREE_SIZES = ((BATCH, LENGTH), (3, 5))
ROUNDING = 1e-5


def kill(weight: torch.Tensor, rows: Any, axis: int = 0) -> None:
    """Set slices of a parameter to zero."""
    with torch.no_grad():
        weight.index_fill_(axis, torch.as_tensor(rows), 0.0)


def head_rows(*heads: int) -> list[int]:
    return [head * SIZE + row for head in heads for row in range(SIZE)]


class Attention(nn.Module):
    """Multi-head attention with separate projections, or one for all three."""

    def __init__(self, *, fused: bool, eager: bool, groups: int = HEADS, causal: bool = False) -> None:
        super().__init__()
        self.groups, self.eager, self.causal = groups, eager, causal
        widths = [WIDTH, groups * SIZE, groups * SIZE]
        self.widths = widths
        self.fused = nn.Linear(WIDTH, sum(widths)) if fused else None
        self.parts = None if fused else nn.ModuleList(nn.Linear(WIDTH, width) for width in widths)
        self.out = nn.Linear(WIDTH, WIDTH)

    def value(self) -> tuple[nn.Linear, int]:
        """The layer that makes the values, and the first of its rows."""
        if self.fused is not None:
            return self.fused, sum(self.widths[:2])
        assert self.parts is not None
        return self.parts[2], 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused is not None:
            parts = self.fused(x).split(self.widths, -1)
        else:
            assert self.parts is not None
            parts = [part(x) for part in self.parts]
        q, k, v = (p.unflatten(-1, (-1, SIZE)).transpose(1, 2) for p in parts)
        if self.groups != HEADS:
            k, v = (t.repeat_interleave(HEADS // self.groups, 1) for t in (k, v))
        if self.eager:
            scores = q @ k.transpose(-1, -2) / SIZE**0.5
            if self.causal:
                scores = scores + torch.full_like(scores, -1e9).triu(1)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight


class Gated(nn.Module):
    """A feed-forward layer with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """A feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Transformer(nn.Module):
    """Embedding, two blocks, a head."""

    def __init__(self, norm: Callable[[], nn.Module], feed: Callable[[], nn.Module], **attention: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.attentions = nn.ModuleList(Attention(**attention) for _ in range(2))
        self.feeds = nn.ModuleList(feed() for _ in range(2))
        self.norms = nn.ModuleList(norm() for _ in range(5))
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for index, (attention, feed) in enumerate(zip(self.attentions, self.feeds, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            x = x + feed(self.norms[2 * index + 1](x))
        return self.head(self.norms[4](x))


def layer_norm() -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def make(norm: Callable[[], nn.Module] = layer_norm, feed: Callable[[], nn.Module] = Plain, **attention: Any) -> Any:
    torch.manual_seed(0)
    return Transformer(norm, feed, **{"fused": False, "eager": True, **attention}).eval()


def export(module: nn.Module, folder: Path, *, free: bool) -> onnx.ModelProto:
    path = str(folder / "model.onnx")
    ids = torch.randint(0, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    dims = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (ids,),
            path,
            dynamo=True,
            external_data=False,
            verbose=False,
            dynamic_shapes=dims if free else None,
            input_names=["ids"],
        )
    return onnx.load(path)


def check(module: nn.Module, folder: Path, gone: int, *, free: bool) -> onnx.ModelProto:
    """Exactly `gone` of the module's parameters leave; the outputs stay."""
    before = export(module, folder, free=free)
    small = shrunk(before)
    total = sum(parameter.numel() for parameter in module.parameters())
    extra = parameters(before) - total
    assert parameters(small) - extra == total - gone
    for batch, length in FREE_SIZES if free else FREE_SIZES[:1]:
        ids = np.random.default_rng(batch).integers(0, WORDS, (batch, length))
        check_same(before, small, tolerance=ROUNDING, ids=ids)
    return small


FREE = pytest.mark.parametrize("free", [False, True], ids=["static", "free"])
EAGER = pytest.mark.parametrize("eager", [True, False], ids=["eager", "sdpa"])
# Query, key and value rows and biases, and output columns of one head.
PER_HEAD = 4 * SIZE * WIDTH + 3 * SIZE


@FREE
@EAGER
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_heads_leave_by_value_rows_and_by_output_columns(tmp_path: Path, fused: bool, eager: bool, free: bool) -> None:
    module = make(fused=fused, eager=eager)
    value, first = module.attentions[0].value()
    kill(value.weight, [first + row for row in head_rows(1)])
    kill(value.bias, [first + row for row in head_rows(1)])
    kill(module.attentions[1].out.weight, head_rows(0, 3), axis=1)
    check(module, tmp_path, 3 * PER_HEAD, free=free)


@FREE
def test_a_value_bias_that_is_kept_is_folded(tmp_path: Path, free: bool) -> None:
    """Where the values of a head are one constant, so is its output; softmax is not told apart from other products."""
    module = make()
    kill(module.attentions[0].out.weight, head_rows(2), axis=1)
    check(module, tmp_path, PER_HEAD, free=free)


@FREE
@EAGER
def test_grouped_heads_leave_by_group(tmp_path: Path, eager: bool, free: bool) -> None:
    module = make(groups=2, eager=eager)
    value, _ = module.attentions[0].value()
    kill(value.weight, head_rows(1))
    kill(value.bias, head_rows(1))
    kill(module.attentions[1].out.weight, head_rows(0, 1), axis=1)
    per_group = 2 * (2 * SIZE * WIDTH + SIZE) + 2 * (SIZE * WIDTH + SIZE) - 2 * SIZE
    assert per_group == 2 * 2 * SIZE * WIDTH + 2 * SIZE * WIDTH + 4 * SIZE - 2 * SIZE + 0
    # Two query heads and their output columns, one key head, one value head; biases of queries, keys and values.
    gone = 2 * (2 * SIZE * WIDTH) + 2 * (SIZE * WIDTH) + 2 * SIZE + 2 * SIZE
    check(module, tmp_path, 2 * gone, free=free)


@FREE
@EAGER
def test_causal_attention(tmp_path: Path, eager: bool, free: bool) -> None:
    module = make(eager=eager, causal=True)
    kill(module.attentions[0].out.weight, head_rows(1), axis=1)
    check(module, tmp_path, PER_HEAD, free=free)


@FREE
def test_dead_query_and_key_dimensions_leave(tmp_path: Path, free: bool) -> None:
    """The scale of the original head size stays: it is a constant of the graph."""
    module = make()
    rows = [head * SIZE + 3 for head in range(HEADS)]
    for attention in module.attentions:
        kill(attention.parts[0].weight, rows)
        kill(attention.parts[0].bias, rows)
    check(module, tmp_path, 2 * 2 * HEADS * (WIDTH + 1), free=free)


@FREE
def test_dead_value_dimensions_leave(tmp_path: Path, free: bool) -> None:
    module = make()
    kill(module.attentions[0].out.weight, [head * SIZE + 5 for head in range(HEADS)], axis=1)
    check(module, tmp_path, HEADS * (WIDTH + 1 + WIDTH), free=free)


@FREE
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_feed_forward_units_leave(tmp_path: Path, side: str, free: bool) -> None:
    module = make()
    for layer in module.feeds:
        if side == "rows":
            kill(layer.up.weight, range(0, HIDDEN, 2))
            kill(layer.up.bias, range(0, HIDDEN, 2))
        else:
            kill(layer.down.weight, range(0, HIDDEN, 2), axis=1)
    check(module, tmp_path, 2 * (HIDDEN // 2) * (2 * WIDTH + 1), free=free)


@FREE
@pytest.mark.parametrize("side", ["gate", "up", "down"])
def test_gated_units_leave(tmp_path: Path, side: str, free: bool) -> None:
    module = make(norm=RootMeanSquare, feed=Gated)
    for layer in module.feeds:
        kill(getattr(layer, side).weight, range(5), axis=1 if side == "down" else 0)
    check(module, tmp_path, 2 * 5 * 3 * WIDTH, free=free)


def kill_stream(module: Any, channels: list[int]) -> int:
    """Silence channels of the residual stream at every writer; what that makes superfluous."""
    kill(module.embedding.weight, channels, axis=1)
    for attention, feed in zip(module.attentions, module.feeds, strict=True):
        kill(attention.out.weight, channels)
        kill(attention.out.bias, channels)
        kill(feed.down.weight, channels)
    projections = 2 * (3 * WIDTH + WIDTH + 3 * HIDDEN)
    return len(channels) * (WORDS + projections + 2 + 5 + 6)


@FREE
def test_channels_of_a_root_mean_square_stream_leave(tmp_path: Path, free: bool) -> None:
    """Embedding, every projection, output biases, norms and head."""
    module = make(norm=RootMeanSquare, feed=Gated)
    gone = kill_stream(module, [0, 3, 4, 17, 31])
    check(module, tmp_path, gone, free=free)


@FREE
def test_channels_of_a_layer_norm_stream_stay(tmp_path: Path, free: bool) -> None:
    """The mean is over all of them."""
    module = make(feed=Gated)
    kill_stream(module, [0, 3, 4])
    check(module, tmp_path, 0, free=free)


@FREE
def test_everything_at_once(tmp_path: Path, free: bool) -> None:
    module = make(norm=RootMeanSquare, feed=Gated, eager=False)
    gone = kill_stream(module, list(range(8)))
    left = WIDTH - 8
    kill(module.attentions[0].out.weight, head_rows(1), axis=1)
    kill(module.feeds[1].gate.weight, range(10))
    check(module, tmp_path, gone + 4 * SIZE * left + 3 * SIZE + 3 * 10 * left, free=free)

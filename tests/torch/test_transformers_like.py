"""Small transformers of our own, exported by torch: exact parameter counts, static and with free batch and sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import torch
from models import check_same, shrunk
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
                length = x.shape[1]
                scores = scores + torch.full((length, length), -1e9).triu(1)
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


def weights(model: onnx.ModelProto) -> int:
    """Elements of floating-point initializers; single numbers, such as an epsilon or a scale, aside."""
    sizes = [int(np.prod(t.dims, dtype=np.int64)) for t in model.graph.initializer if t.data_type == t.FLOAT]
    return sum(size for size in sizes if size > 1)


def check(module: nn.Module, folder: Path, gone: int, *, free: bool) -> None:
    """Exactly `gone` of the module's parameters leave; the outputs stay."""
    before = export(module, folder, free=free)
    small = shrunk(before)
    total = sum(parameter.numel() for parameter in module.parameters())
    tables = weights(before) - total
    assert weights(small) - tables == total - gone
    for batch, length in FREE_SIZES if free else FREE_SIZES[:1]:
        ids = np.random.default_rng(batch).integers(0, WORDS, (batch, length))
        check_same(before, small, tolerance=ROUNDING, ids=ids)


FREE = pytest.mark.parametrize("free", [False, True], ids=["static", "free"])
# Query, key and value rows with their biases, and output columns, of one head; a unit of a feed-forward layer.
PER_HEAD = 4 * SIZE * WIDTH + 3 * SIZE
PER_UNIT = 2 * WIDTH + 1


@FREE
@pytest.mark.parametrize(("fused", "eager"), [(False, True), (True, False)], ids=["eager", "fused-sdpa"])
def test_heads_and_feed_forward_units_leave(tmp_path: Path, fused: bool, eager: bool, free: bool) -> None:
    """By what they write in one block, by what is read of them in the other."""
    module = make(fused=fused, eager=eager)
    value, first = module.attentions[0].value()
    kill(value.weight, [first + row for row in head_rows(1)])
    kill(value.bias, [first + row for row in head_rows(1)])
    kill(module.attentions[1].out.weight, head_rows(0, 3), axis=1)
    kill(module.feeds[0].up.weight, range(0, HIDDEN, 2))
    kill(module.feeds[0].up.bias, range(0, HIDDEN, 2))
    kill(module.feeds[1].down.weight, range(10), axis=1)
    check(module, tmp_path, 3 * PER_HEAD + (HIDDEN // 2 + 10) * PER_UNIT, free=free)


def test_dimensions_of_heads_leave(tmp_path: Path) -> None:
    """Of queries and keys in one block, where the scale of the original size stays; of values in the other."""
    module = make()
    query = module.attentions[0].parts[0]
    kill(query.weight, [head * SIZE + 3 for head in range(HEADS)])
    kill(query.bias, [head * SIZE + 3 for head in range(HEADS)])
    kill(module.attentions[1].out.weight, [head * SIZE + 5 for head in range(HEADS)], axis=1)
    check(module, tmp_path, 2 * HEADS * (WIDTH + 1) + HEADS * (2 * WIDTH + 1), free=True)


def silence(module: Any, channels: list[int]) -> int:
    """Kill channels of the residual stream at every writer; what that makes superfluous under a root mean square."""
    kill(module.embedding.weight, channels, axis=1)
    for attention, feed in zip(module.attentions, module.feeds, strict=True):
        kill(attention.out.weight, channels)
        kill(attention.out.bias, channels)
        kill(feed.down.weight, channels)
    queries, values = WIDTH, module.attentions[0].widths[2]
    block = queries + 2 * values + WIDTH + 1 + 3 * HIDDEN
    return len(channels) * (WORDS + 2 * block + 5 + module.head.out_features)


@FREE
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "sdpa"])
def test_groups_gated_units_and_the_residual_stream_leave(tmp_path: Path, eager: bool, free: bool) -> None:
    """Grouped and causal heads, gated units and hidden channels of a network with root mean square norms."""
    module = make(norm=RootMeanSquare, feed=Gated, groups=2, causal=True, eager=eager)
    channels = [0, 3, 4, 17, 31]
    gone, left = silence(module, channels), WIDTH - len(channels)
    for attention in module.attentions:
        kill(attention.value()[0].weight, head_rows(1))
        kill(attention.value()[0].bias, head_rows(1))
    # Two query heads, one key head and one value head, with their biases, and the output columns of the query heads.
    gone += 2 * ((2 * SIZE + 2 * SIZE) * (left + 1) + 2 * SIZE * left)
    kill(module.feeds[0].gate.weight, range(5))
    kill(module.feeds[1].up.weight, range(5, 12))
    kill(module.feeds[1].down.weight, [0, 1], axis=1)
    gone += (5 + 7 + 2) * 3 * left
    check(module, tmp_path, gone, free=free)


def test_channels_of_a_layer_norm_stream_stay(tmp_path: Path) -> None:
    """The mean is over all of them."""
    module = make(feed=Gated)
    silence(module, [0, 3, 4])
    check(module, tmp_path, 0, free=True)


class Stock(nn.Module):
    """torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(ids))


def test_torch_s_own_encoder_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Stock().eval()
    attention = module.layer.self_attn
    nn.init.normal_(attention.in_proj_bias)
    kill(attention.in_proj_weight, [2 * WIDTH + row for row in head_rows(2)])
    kill(attention.in_proj_bias, [2 * WIDTH + row for row in head_rows(2)])
    kill(module.layer.linear1.weight, range(7))
    kill(module.layer.linear1.bias, range(7))
    check(module, tmp_path, PER_HEAD + 7 * PER_UNIT, free=False)

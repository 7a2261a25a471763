"""Transformers from either PyTorch exporter, with static and with free extents, end as small as written by hand.

Every test prunes a module, exports it, shrinks it, and counts: as many parameters are left as the same module has
when it is made with fewer heads, a smaller head or a narrower feed-forward part.
"""

from __future__ import annotations

import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import torch
from models import check_same, shapes, shrunk
from torch import nn
from torch.nn import functional

WIDTH, HEADS, SIZE, INNER, WORDS = 24, 4, 6, 40, 30
# Sums of at most 40 products of numbers around one, four layers deep, relative to the range of the output.
TOLERANCE = 1e-5
EXPORTERS = [pytest.param(True, id="dynamo"), pytest.param(False, id="torchscript")]
EXTENTS = [pytest.param(False, id="static"), pytest.param(True, id="free")]
# The head of six has three pairs of rotated dimensions: (0, 3), (1, 4), (2, 5).
PAIR = (0, 3)


# --- modules ----------------------------------------------------------------------------------------------------


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


# --- exporting and counting -------------------------------------------------------------------------------------


def export(
    module: nn.Module, inputs: dict[str, torch.Tensor], free: dict[str, dict[int, str]], dynamo: bool, outputs: int = 1
) -> onnx.ModelProto:
    """The ONNX model; `free` names the free extents per input."""
    options: dict[str, Any] = {"input_names": list(inputs), "output_names": [f"y{i}" for i in range(outputs)]}
    if free and dynamo:
        names = {name for axes in free.values() for name in axes.values()}
        dims = {name: torch.export.Dim(name) for name in names}
        options["dynamic_shapes"] = tuple({a: dims[d] for a, d in free.get(name, {}).items()} for name in inputs)
    elif free:
        options["dynamic_axes"] = free
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        extra = {"external_data": False, "verbose": False} if dynamo else {}
        torch.onnx.export(
            module, tuple(inputs.values()), str(path), dynamo=dynamo, opset_version=20, **options, **extra
        )
        return onnx.load(path)


@pytest.fixture(autouse=True)
def quiet() -> Iterable[None]:
    """Exporters speak of their own progress."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def floats(model: onnx.ModelProto) -> int:
    """Elements of floating-point weights; numbers that stand alone do not count."""
    tensors = [*model.graph.initializer]
    tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    sizes = [int(np.prod(t.dims, dtype=np.int64)) for t in tensors if t.data_type == onnx.TensorProto.FLOAT]
    return sum(size for size in sizes if size > 1)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


TOKENS = torch.linspace(-1, 1, 2 * 5 * WIDTH).sin().reshape(2, 5, WIDTH)


def other_tokens(length: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((3, length, WIDTH)).astype(np.float32)


BOTH = {0: "batch", 1: "length"}


def check_block(
    block: Block, dynamo: bool, free: bool, wanted: nn.Module, other: int = 0, extents: dict[int, str] | None = None
) -> None:
    """Export, shrink, compare at one or two sizes, and count; `other` constants are no parameters."""
    extents = BOTH if extents is None else extents
    model = export(block, {"x": TOKENS}, {"x": extents} if free else {}, dynamo)
    small = shrunk(model)
    check_same(model, small, TOLERANCE, x=TOKENS.numpy())
    if free:
        check_same(model, small, TOLERANCE, x=other_tokens(7 if 1 in extents else 5))
    assert floats(small) == count(wanted) + other


# --- heads and widths -------------------------------------------------------------------------------------------

STYLES = ["fused", "written", "causal", "rotary", "relative"]


def tables(style: str, dynamo: bool, free: bool) -> int:
    """Constants besides parameters: a mask, cosines and sines, positions and frequencies, as the exporters fold them."""
    if free:
        return 3 if style == "rotary" and dynamo else 0
    if style == "relative":
        # The bias of two heads has taken the place of their table of nine distances.
        return 2 * 25 - 2 * 9
    return {"causal": 25, "rotary": 2 * 30 if dynamo else 2 * (5 + 3)}.get(style, 0)


@pytest.mark.parametrize("free", EXTENTS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("style", STYLES)
def test_heads_leave_by_values_or_by_output_columns_alone(style: str, dynamo: bool, free: bool) -> None:
    block = randomise(Block(Attention(style=style), FeedForward(), nn.LayerNorm))
    zero_linear(block.attention.v, of_heads(1))
    zero_columns(block.attention.o, of_heads(3))
    dead_inner(block.inner)
    wanted = Block(Attention(2, style=style), FeedForward(INNER - 12), nn.LayerNorm)
    check_block(block, dynamo, free, wanted, tables(style, dynamo, free))


@pytest.mark.parametrize("free", EXTENTS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("style", ["fused", "rotary"])
def test_grouped_heads_leave_by_group(style: str, dynamo: bool, free: bool) -> None:
    """Four heads in two groups: one group has dead values. A head that dies alone in the other stays."""
    block = randomise(Block(Attention(groups=2, style=style, bias=False), Gated(), Rms))
    zero_linear(block.attention.v, of_heads(1))
    zero_columns(block.attention.o, of_heads(3))
    dead_inner(block.inner)
    wanted = Block(Attention(2, 1, style=style, bias=False), Gated(INNER - 12), Rms)
    check_block(block, dynamo, free, wanted, tables(style, dynamo, free))


@pytest.mark.parametrize("free", EXTENTS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_heads_of_one_joined_projection(dynamo: bool, free: bool) -> None:
    block = randomise(Block(Joined(), FeedForward(), nn.LayerNorm))
    zero_linear(block.attention.qkv, of_heads(1), offset=2 * WIDTH)
    zero_columns(block.attention.o, of_heads(3))
    check_block(block, dynamo, free, Block(Joined(2), FeedForward(), nn.LayerNorm))


@pytest.mark.parametrize("free", EXTENTS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_heads_of_torch_attention(dynamo: bool, free: bool) -> None:
    block = randomise(Block(Torch(), FeedForward(), nn.LayerNorm))
    inner = block.attention.inner
    zero_rows(inner.in_proj_weight, inner.in_proj_bias, of_heads(1), offset=2 * WIDTH)
    zero_columns(inner.out_proj, of_heads(3))
    # The older exporter writes the length down as a number.
    extents = BOTH if dynamo else {0: "batch"}
    check_block(block, dynamo, free, Block(Joined(2), FeedForward(), nn.LayerNorm), extents=extents)


# --- dimensions of a head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("style", ["fused", "written"])
def test_dimensions_leave_under_the_scale_of_before(style: str, dynamo: bool) -> None:
    block = randomise(Block(Attention(style=style), FeedForward(), nn.LayerNorm))
    zero_linear(block.attention.q, of_dimensions(1, 2))
    zero_linear(block.attention.v, of_dimensions(5))
    wanted = Block(Attention(size=4, value_size=5, style=style), FeedForward(), nn.LayerNorm)
    check_block(block, dynamo, True, wanted)


@pytest.mark.parametrize("free", EXTENTS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_rotated_dimensions_leave_in_pairs(dynamo: bool, free: bool) -> None:
    """One pair is dead in the queries; of another, one half only, which stays."""
    block = randomise(Block(Attention(style="rotary"), FeedForward(), nn.LayerNorm))
    zero_linear(block.attention.q, of_dimensions(*PAIR, 1))
    model = export(block, {"x": TOKENS}, {"x": BOTH} if free else {}, dynamo)
    small = shrunk(model)
    check_same(model, small, TOLERANCE, x=TOKENS.numpy())
    matrices = sorted(shape for shape in shapes(small).values() if len(shape) == 2 and WIDTH in shape)
    assert matrices.count((WIDTH, HEADS * 4)) + matrices.count((HEADS * 4, WIDTH)) == 2


def test_dimensions_of_a_joined_projection_leave_where_all_three_are_dead() -> None:
    block = randomise(Block(Joined(), FeedForward(), nn.LayerNorm))
    zero_linear(block.attention.qkv, of_dimensions(0, 4))
    zero_linear(block.attention.qkv, of_dimensions(0, 4), offset=2 * WIDTH)
    check_block(block, True, True, Block(Joined(size=4), FeedForward(), nn.LayerNorm))


# --- the stream, experts, caches --------------------------------------------------------------------------------


@pytest.mark.parametrize("free", EXTENTS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_dead_channels_leave_a_whole_language_model(dynamo: bool, free: bool) -> None:
    """Every writer of the stream is dead there: embedding, attention and feed-forward of both blocks."""
    module = randomise(Language())
    dead = list(range(0, WIDTH, 3))
    module.embedding.weight.data[:, dead] = 0
    for block in module.blocks:
        zero_linear(block.attention.o, dead)
        zero_linear(block.inner.down, dead)
    ids = torch.arange(10).reshape(2, 5) * 3 % WORDS
    model = export(module, {"ids": ids}, {"ids": BOTH} if free else {}, dynamo)
    small = shrunk(model)
    check_same(model, small, TOLERANCE, ids=ids.numpy())
    assert floats(small) == count(Language(WIDTH - len(dead))) + floats(model) - count(module)


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_every_expert_loses_its_own_width(dynamo: bool) -> None:
    block = randomise(Block(Attention(), Experts(), nn.LayerNorm))
    dead_inner(block.inner.experts[0])
    zero_linear(block.inner.experts[1].up, range(30))
    check_block(block, dynamo, True, Block(Attention(), Experts((INNER - 12, INNER - 30)), nn.LayerNorm))


@pytest.mark.parametrize("free", EXTENTS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_caches_are_interface_and_stay_whole(groups: int, dynamo: bool, free: bool) -> None:
    """Dead heads keep their keys and values, which the caches hold; the feed-forward part still shrinks."""
    block = randomise(Block(Attention(groups=groups), FeedForward(), nn.LayerNorm))
    zero_linear(block.attention.v, of_heads(1))
    dead_inner(block.inner)
    shape = (2, groups, 3, SIZE)
    inputs = {"x": TOKENS, "key": torch.ones(shape), "value": torch.full(shape, 0.5)}
    cache = {0: "batch", 2: "past"}
    extents = {"x": BOTH, "key": cache, "value": cache} if free else {}
    model = export(block, inputs, extents, dynamo, outputs=3)
    small = shrunk(model)
    check_same(model, small, TOLERANCE, **{name: value.numpy() for name, value in inputs.items()})
    wanted = Block(Attention(groups=groups), FeedForward(INNER - 12), nn.LayerNorm)
    assert floats(small) == count(wanted) + floats(model) - count(block)

"""Transformers from either PyTorch exporter, with static and with free extents, end as small as written by hand.

Every test prunes a module, exports it, shrinks it, and counts: as many parameters are left as the same module has
when it is made with fewer heads, a smaller head or a narrower feed-forward part.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterable
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
from transformer_modules import (
    HEADS,
    INNER,
    PAIR,
    SIZE,
    WIDTH,
    WORDS,
    Attention,
    Block,
    Experts,
    FeedForward,
    Gated,
    Joined,
    Language,
    Rms,
    Torch,
    dead_inner,
    of_dimensions,
    of_heads,
    randomise,
    zero_columns,
    zero_linear,
    zero_rows,
)

# Sums of at most 40 products of numbers around one, four layers deep, relative to the range of the output.
TOLERANCE = 1e-5
EXPORTERS = [pytest.param(True, id="dynamo"), pytest.param(False, id="torchscript")]
EXTENTS = [pytest.param(False, id="static"), pytest.param(True, id="free")]


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
    """Constants besides parameters: a mask, cosines and sines, positions, frequencies."""
    if free:
        return 3 if style == "rotary" and dynamo else 0
    if style == "relative":
        # The bias of two heads has taken the place of their table of nine distances.
        return 2 * 25 - 2 * 9
    return {"causal": 25 if dynamo else 0, "rotary": 2 * 30 if dynamo else 2 * (5 + 3)}.get(style, 0)


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

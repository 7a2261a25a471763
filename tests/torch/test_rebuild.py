"""What a module's forward() can follow, what it cannot, and what is said of it. Whole networks: test_to_torch.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import torch
from torch import Tensor, nn
from torch.nn import functional

import onnxshrink
from onnxshrink.errors import InputError
from onnxshrink.torch import masked_copy

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
Shapes = dict[str, tuple[int, ...]]


def drop(layer: nn.Module, *rows: int, bias: bool = True, weight: str = "weight") -> None:
    with torch.no_grad():
        getattr(layer, weight)[list(rows)] = 0
        if bias and getattr(layer, "bias", None) is not None:
            layer.bias[list(rows)] = 0


def rebuilt(module: nn.Module, *args: Any, dynamo: bool = False, masks: Any = None, **options: Any) -> nn.Module:
    """The smaller module, which computes the same; the older exporter is the faster one."""
    module.eval()
    with warnings.catch_warnings(record=True):
        result = onnxshrink.export(module, args, masks, dynamo=dynamo, verify=False, align="none", **options)
    small = result.to_torch(module, strict=False)
    with torch.no_grad():
        expected, actual = masked_copy(module, masks)(*args), small(*args)
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), **TOLERANCE)
    return small


def shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


# --- attention -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Four heads of eight dimensions, split as `how` says: heads, dimensions, or both as literal numbers."""

    def __init__(self, how: str, scale: str = "literal") -> None:
        super().__init__()
        self.sizes = {"heads": (4, -1), "dimensions": (-1, 8), "both": (4, 8)}[how]
        self.scale = scale
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], *self.sizes).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        scores = q @ k.transpose(-1, -2) / (8**0.5 if self.scale == "literal" else q.shape[-1] ** 0.5)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x + self.out(y)


SEQUENCE = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def test_heads_leave_where_their_number_follows() -> None:
    module = Attention("dimensions")
    drop(module.v, *range(8, 16))
    small = rebuilt(module, SEQUENCE)
    assert {name: shape for name, shape in shapes(small).items() if "weight" in name and "norm" not in name} == {
        "q.weight": (24, 32), "k.weight": (24, 32), "v.weight": (24, 32), "out.weight": (32, 24)
    }  # fmt: skip
    assert small.onnxshrink_notes == ()


def test_dimensions_leave_where_their_number_follows() -> None:
    module = Attention("heads")
    drop(module.q, *range(1, 32, 8), *range(5, 32, 8))
    drop(module.v, *range(2, 32, 8))
    found = shapes(rebuilt(module, SEQUENCE))
    assert (found["q.weight"], found["k.weight"], found["v.weight"]) == ((24, 32), (24, 32), (28, 32))


def test_dimensions_that_a_scale_is_computed_from_stay_and_no_others() -> None:
    module = Attention("heads", scale="computed")
    drop(module.q, *range(1, 32, 8), *range(5, 32, 8))
    drop(module.v, *range(2, 32, 8))
    with pytest.warns(UserWarning, match="to_torch: channels without effect stay: the module: sizes that forward"):
        found = shapes(rebuilt(module, SEQUENCE))
    assert (found["q.weight"], found["k.weight"], found["v.weight"]) == ((32, 32), (32, 32), (28, 32))


def test_heads_whose_number_is_written_in_forward_stay_and_are_named() -> None:
    module = nn.Sequential(Attention("both"), Attention("both"), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))
    for part in module[:2]:
        drop(part.v, *range(8, 16))
    drop(module[2], 0, 1, 2)
    with pytest.warns(UserWarning, match=r"0: sizes that forward\(\) fixes at test_rebuild\.py:\d+; 1: sizes that"):
        small = rebuilt(module, SEQUENCE, dynamo=True)
    found = shapes(small)
    assert {found[f"{index}.{leaf}.weight"] for index in (0, 1) for leaf in "qkv"} == {(32, 32)}
    assert (found["2.weight"], found["4.weight"]) == ((5, 32), (2, 5))
    assert [note.split(":")[0] for note in small.onnxshrink_notes] == ["0", "1"]


def test_what_would_stay_is_refused_unless_asked_for() -> None:
    module = Attention("both").eval()
    drop(module.v, *range(8, 16))
    with warnings.catch_warnings(record=True):
        result = onnxshrink.export(module, SEQUENCE, dynamo=False, verify=False)
    with pytest.raises(InputError, match=r"to_torch: forward\(\) cannot follow: the module: sizes that forward"):
        result.to_torch(module)


def test_pytorch_s_own_attention_keeps_its_sizes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.wide, self.thin = nn.Linear(16, 12), nn.Linear(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.thin(torch.relu(self.wide(x)))

    module = Block()
    drop(module.attention, *range(32, 36), weight="in_proj_weight")
    drop(module.wide, 0, 5)
    with pytest.warns(UserWarning, match="attention: MultiheadAttention keeps its sizes"):
        found = shapes(rebuilt(module, torch.randn(2, 5, 16)))
    assert found["attention.in_proj_weight"] == (48, 16)
    assert (found["wide.weight"], found["thin.weight"]) == ((10, 16), (16, 10))


# --- pieces of an axis ---------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Two halves of an axis, multiplied; and a layer beside them."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.cut = cut
        self.both, self.out = nn.Linear(8, 24), nn.Linear(12, 3)
        self.wide, self.thin = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.cut(self.both(x))
        return self.out(left * torch.sigmoid(right)) + self.thin(torch.relu(self.wide(x)))


@pytest.mark.parametrize(
    ("cut", "width"),
    [
        (lambda x: x.chunk(2, -1), 16),
        (lambda x: x.split([12, 12], -1), 24),
        (lambda x: (x[..., :12], x[..., 12:]), 24),
        (lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]), 16),
    ],
    ids=["chunk", "literal split", "literal slices", "slices by size"],
)
@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "dynamo"])
def test_halves(cut: Callable[[Tensor], tuple[Tensor, ...]], width: int, dynamo: bool) -> None:
    if dynamo and width == 24:
        pytest.skip("what follows is the same")
    module = Gated(cut)
    drop(module.both, 0, 1, 2, 3)
    drop(module.wide, 0, 3, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = shapes(rebuilt(module, torch.randn(4, 8), dynamo=dynamo))
    assert found["both.weight"] == (width, 8)
    assert (found["wide.weight"], found["thin.weight"]) == ((13, 8), (3, 13))
    assert any("to_torch" in str(warning.message) for warning in caught) == (width == 24)


def test_what_the_exporter_made_goes_by_the_module_in_front_of_it() -> None:
    """chunk() becomes an operator that carries no name of a module."""

    class Third(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.three, self.outs = nn.Conv2d(3, 12, 1), nn.ModuleList([nn.Conv2d(4, 2, 1) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return sum(out(part) for out, part in zip(self.outs, self.three(x).chunk(3, 1), strict=True))

    module = nn.Sequential(nn.Conv2d(3, 3, 1), Third()).eval()
    drop(module[1].three, 0, 1, 4)
    result = onnxshrink.export(module, torch.randn(2, 3, 4, 4), verify=False, align="none")
    with pytest.raises(InputError, match=r"cannot follow: 1[.\w]*: sizes that forward\(\) fixes"):
        result.to_torch(module)


def test_channels_that_are_shuffled() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            n, c, h, w = x.shape
            return self.last(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w))

    module = Shuffle()
    drop(module.first, 1, 3, 9, 11)
    assert shapes(rebuilt(module, torch.randn(2, 3, 4, 4)))["first.weight"] == (12, 3, 1, 1)


def test_a_mean_over_channels_keeps_them() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.meant, self.wide, self.thin = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.meant(x)).mean(-1, keepdim=True) + self.thin(torch.relu(self.wide(x)))

    module = Mean()
    drop(module.meant, 1, 2, 3)
    drop(module.wide, 1, 2, 3)
    with pytest.warns(UserWarning, match="divides by the number of elements, some of which would leave"):
        found = shapes(rebuilt(module, torch.randn(4, 6)))
    assert (found["meant.weight"], found["wide.weight"]) == ((16, 6), (13, 6))


def test_a_stream_in_front_of_layer_norms_keeps_its_width() -> None:
    """The ONNX model puts zeros in the place of what left; PyTorch's own LayerNorm cannot."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.wide, self.thin = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.first, self.last, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + self.thin(torch.relu(self.wide(self.norm(x))))
            return self.head(self.last(x))

    module = Block()
    for norm in (module.norm, module.last):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    drop(module.first, 1, 2, 5)
    drop(module.thin, 1, 2, 5)
    drop(module.wide, 0, 1, 2, 3)
    result = onnxshrink.export(module.eval(), torch.randn(4, 5), dynamo=False, align="none")
    assert sorted(layer.after for layer in result.report.layers) == [(3, 6), (5, 5), (5, 8), (8, 6)]
    found = shapes(rebuilt(module, torch.randn(4, 5)))
    assert (found["first.weight"], found["wide.weight"], found["head.weight"]) == ((8, 5), (8, 8), (3, 8))


# --- constants -----------------------------------------------------------------------------------------------------


def test_constants_go_into_biases_that_are_made_where_there_are_none() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 6, 3, bias=False), nn.Sigmoid(),
        nn.Flatten(2), nn.Linear(16, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 2, bias=False),
    )  # fmt: skip
    drop(module[0], 1, 4, bias=False)
    drop(module[5], 3)
    module[7].weight.requires_grad_(False)
    small = rebuilt(module, torch.randn(2, 3, 6, 6))
    assert shapes(small) == {
        "0.weight": (6, 3, 1, 1), "0.bias": (6,), "2.weight": (6, 6, 3, 3), "2.bias": (6,),
        "5.weight": (4, 16), "7.weight": (2, 4), "7.bias": (2,),
    }  # fmt: skip
    assert [small[2].bias.requires_grad, small[7].bias.requires_grad] == [True, False]
    half = 0.5 * module[7].weight[:, 3]
    torch.testing.assert_close(small[7].bias.detach(), half)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_constants_go_into_the_biases_of_recurrent_layers(kind: type[nn.RNNBase], gates: int) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.layer, self.head = nn.Linear(5, 10), kind(10, 12, batch_first=True), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(torch.sigmoid(self.project(x)))[0])

    module = Recurrent()
    drop(module.project, 1, 2, 5)
    with torch.no_grad():
        for parameter in module.layer.parameters():
            parameter[[12 * gate + unit for gate in range(gates) for unit in (0, 4, 11)]] = 0
    small = rebuilt(module, torch.randn(2, 6, 5))
    assert shapes(small.layer) == {
        "weight_ih_l0": (9 * gates, 7), "weight_hh_l0": (9 * gates, 9), "bias_ih_l0": (9 * gates,),
        "bias_hh_l0": (9 * gates,),
    }  # fmt: skip


def test_recurrent_layers_without_biases_keep_the_constants_in_front_of_them() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.layer = nn.Linear(5, 10), nn.LSTM(10, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.sigmoid(self.project(x)))[0]

    module = Recurrent()
    drop(module.project, 1, 2, 5)
    with pytest.warns(UserWarning, match="layer: a constant would have to be folded in a weight that forward"):
        assert shapes(rebuilt(module, torch.randn(6, 2, 5)))["project.weight"] == (10, 5)


def test_layers_of_a_recurrent_module_have_equally_many_units() -> None:
    module = nn.GRU(4, 6, num_layers=2, batch_first=True)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter[[6 * gate + unit for gate in range(3) for unit in ((0, 1, 2) if "l0" in name else ())]] = 0

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = module, nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(x)[0])

    whole = Last()
    with pytest.warns(UserWarning, match="layers: all layers of layers have equally many units"):
        assert rebuilt(whole, torch.randn(2, 3, 4)).layers.hidden_size == 6
    with torch.no_grad():
        whole.head.weight[:, 1] = 0
        for name in ("weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"):
            getattr(module, name)[[1, 7, 13]] = 0
    with pytest.warns(UserWarning, match="equally many units"):
        assert rebuilt(whole, torch.randn(2, 3, 4)).layers.hidden_size == 5


def test_a_layer_that_is_used_twice_with_other_constants() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.shared = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 6)
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.sigmoid(self.left(x)), torch.sigmoid(self.right(x))
            return self.out(torch.relu(self.shared(left)) + torch.relu(self.shared(right)))

    module = Twice()
    drop(module.left, 1, 2, bias=False)
    drop(module.right, 1, 3, bias=False)
    drop(module.shared, 0)
    with pytest.warns(UserWarning, match="the layer is used more than once, each time with another constant"):
        found = shapes(rebuilt(module, torch.randn(5, 4)))
    assert found["shared.weight"] == (5, 8)


def test_a_branch_that_gives_nothing_stays_as_thin_as_can_be() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.inner, self.norm, self.outer = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.out(x + self.outer(torch.relu(self.norm(self.inner(x)))))

    module = Branch()
    drop(module.outer, *range(8), bias=False)
    drop(module.stem, 1)
    nn.init.normal_(module.norm.bias)
    found = shapes(rebuilt(module, torch.randn(2, 3, 6, 6)))
    assert (found["inner.weight"], found["outer.weight"]) == ((1, 7, 3, 3), (7, 1, 1, 1))


# --- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False], ids=["with weights", "without"])
def test_norms(affine: bool) -> None:
    module = nn.Sequential(
        nn.Conv1d(3, 16, 3), nn.GroupNorm(4, 16, affine=affine), nn.ReLU(), nn.Conv1d(16, 12, 1, bias=False),
        nn.BatchNorm1d(12, affine=affine), nn.PReLU(12), nn.InstanceNorm1d(12, affine=affine), nn.Conv1d(12, 2, 1),
    )  # fmt: skip
    drop(module[0], 4, 5, 6, 7)
    if affine:
        with torch.no_grad():
            module[1].bias[4:8] = 0
    drop(module[3], 0, 3)
    small = rebuilt(module, torch.randn(2, 3, 9))
    assert (small[1].num_groups, small[1].num_channels) == (3, 12)
    assert (small[4].num_features, small[5].num_parameters, small[6].num_features) == (10, 10, 10)
    assert (small[3].weight.shape, small[7].weight.shape) == ((10, 12, 1), (2, 10, 1))


def test_root_mean_squares_keep_their_divisor() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(20, 16), nn.RMSNorm(16)
            self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
            self.last, self.head = nn.RMSNorm(16, eps=0.1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.words(x)
            return self.head(self.last(x + self.down(functional.silu(self.up(self.norm(x))))))

    module = Stream()
    with torch.no_grad():
        module.words.weight[:, [2, 3, 7, 9]] = 0
        module.last.weight.uniform_(0.5, 1.5)
    drop(module.down, 2, 3, 7, 9)
    drop(module.up, 0, 1)
    small = rebuilt(module, torch.randint(20, (2, 6)), dynamo=True)
    assert (small.words.embedding_dim, small.up.weight.shape, small.last.normalized_shape) == (12, (22, 12), (12,))
    assert small.last.eps == pytest.approx(0.1 * 16 / 12)
    kept = [i for i in range(16) if i not in (2, 3, 7, 9)]
    torch.testing.assert_close(small.last.weight, module.last.weight[kept] * (16 / 12) ** 0.5)


def test_parameters_and_buffers_of_one_s_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.ConvTranspose3d(2, 8, 2, groups=2), nn.Conv3d(8, 2, 1)
            self.gain = nn.Parameter(torch.randn(8, 1, 1, 1))
            self.register_buffer("shift", torch.randn(1, 8, 1, 1, 1))
            self.mix = nn.Parameter(torch.randn(2, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.up(x) * self.gain + self.shift)).mean((2, 3, 4)) @ self.mix

    module = Own()
    with torch.no_grad():
        module.up.weight[:, [1, 2]] = 0
        module.up.bias[[1, 2, 5, 6]] = module.shift[:, [1, 2, 5, 6]] = 0
    small = rebuilt(module, torch.randn(2, 2, 3, 3, 3))
    assert shapes(small) == {
        "gain": (4, 1, 1, 1), "mix": (2, 5), "up.weight": (2, 2, 2, 2, 2), "up.bias": (4,),
        "out.weight": (2, 4, 1, 1, 1), "out.bias": (2,),
    }  # fmt: skip
    assert (small.shift.shape, small.up.out_channels) == ((1, 4, 1, 1, 1), 4)
    assert small.onnxshrink_removed["gain"] == ((1, 2, 5, 6), (), (), ())


def test_weights_that_are_computed_from_parameters() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 4, 1))
    with torch.no_grad():
        module[0].parametrizations.weight.original0[[1, 2]] = 0
        module[0].bias[[1, 2]] = 0
    small = rebuilt(module, torch.randn(2, 3, 9))
    assert (small[0].weight.shape, small[0].out_channels, small[2].in_channels) == ((6, 3, 3), 6, 6)


def test_weights_that_two_layers_share() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.wide, self.thin = nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 16)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.words(x)
            return self.head(x + self.thin(torch.relu(self.wide(x))))

    module = Tied()
    with torch.no_grad():
        module.words.weight[:, [1, 2]] = 0
    drop(module.thin, 1, 2)
    drop(module.wide, 0)
    small = rebuilt(module, torch.randint(30, (2, 4)))
    assert small.head.weight is small.words.weight
    assert (small.head.weight.shape, small.words.embedding_dim, small.head.in_features) == ((30, 14), 14, 14)


def test_positions_beyond_the_example_stay() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.places = nn.Embedding(12, 8), nn.Parameter(torch.randn(12, 8))
            self.wide, self.thin = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[1]
            x = self.wide(x) + self.table(torch.arange(length)) + self.places[:length]
            return self.thin(torch.relu(x))

    module = Placed()
    drop(module.wide, 1, 6)
    with torch.no_grad():
        module.table.weight[:, [1, 6]] = module.places[:, [1, 6]] = 0
    for dynamo in (False, True):
        small = rebuilt(module, torch.randn(2, 5, 4), dynamo=dynamo)
        assert (small.table.weight.shape, small.places.shape) == ((12, 6), (12, 6))
        with torch.no_grad():
            longer = torch.randn(2, 11, 4)
            torch.testing.assert_close(small(longer), module(longer))


# --- inputs, masks, types ------------------------------------------------------------------------------------------


class Several(nn.Module):
    """Keywords, a flag, and a dictionary of results."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.thin = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, gain: Tensor, flag: bool = False) -> dict[str, Tensor]:
        y = torch.relu(self.wide(x))
        return {"result": self.thin(y * gain) if flag else x, "total": y.sum()}


def test_keywords_and_dictionaries() -> None:
    module = Several().eval()
    drop(module.wide, 0, 5)
    args, kwargs = (torch.randn(3, 4),), {"gain": torch.tensor(2.0), "flag": True}
    small = onnxshrink.export(module, args, kwargs=kwargs, verify=False).to_torch(module)
    assert shapes(small)["wide.weight"] == (6, 4)
    with torch.no_grad():
        torch.testing.assert_close(small(*args, **kwargs), module(*args, **kwargs))


def test_masks_of_activations() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    small = rebuilt(module, torch.randn(3, 4), masks={"1": {"_output_0": mask}})
    assert shapes(small) == {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (2, 6), "2.bias": (2,)}


def test_double_precision() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)).double()
    drop(module[0], 0, 1)
    small = rebuilt(module, torch.randn(3, 4, dtype=torch.float64))
    assert {tensor.dtype for tensor in small.parameters()} == {torch.float64}
    assert shapes(small)["2.weight"] == (2, 6)


def test_free_dimensions_go_to_the_exporter() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    drop(module[0], 0, 1)
    free = torch.export.Dim("batch")
    assert shapes(rebuilt(module, torch.randn(3, 4), dynamo=True, dynamic_shapes=({0: free},)))["0.weight"] == (6, 4)


def test_a_module_that_is_random_cannot_be_compared() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.thin = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.thin(torch.relu(self.wide(x))) + torch.rand(2)

    module = Random().eval()
    drop(module.wide, 0)
    result = onnxshrink.export(module, torch.randn(3, 4), dynamo=True, verify=False)
    with pytest.raises(InputError, match="to_torch: the module gives something else each time"):
        result.to_torch(module)


def test_a_result_can_be_shrunk_again() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    drop(module[0], 0, 1)
    small = rebuilt(module, torch.randn(3, 4))
    again = copy.deepcopy(small)
    drop(again[0], 3)
    assert shapes(rebuilt(again, torch.randn(3, 4)))["0.weight"] == (5, 4)

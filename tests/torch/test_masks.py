"""Masks of modules, given for ONNX files whose exporter renamed, transposed, joined and folded the weights."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime
import torch
from torch import nn
from torch.nn.utils import prune

import onnxshrink
from onnxshrink import cli
from onnxshrink.errors import MaskError
from onnxshrink.masks import apply_masks
from onnxshrink.torch import export_onnx, masked_copy

# Sums of at most 200 products of numbers around 1, taken in another order: a few units in the last place.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


class Convolutions(nn.Module):
    """Folded batch normalisations, a grouped transposed convolution, a group norm, products of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False)
        self.second = nn.Conv2d(6, 6, 1)
        self.norm2 = nn.BatchNorm2d(6)
        self.token = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.groups(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.norm2(self.second(self.up(x))))
        x = torch.relu(self.token(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


class Sequences(nn.Module):
    """An embedding, recurrent layers that are used twice, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tag = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.words(x))
        y, _ = self.gru(self.gru(y)[0])
        return self.tag(self.attention(y, y, y, need_weights=False)[0])


INPUTS = {
    Convolutions: torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)),
    Sequences: torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1)),
}


@cache
def module_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = kind().eval()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(part.weight, 1, 0.5)
            nn.init.normal_(part.bias)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        if isinstance(part, nn.MultiheadAttention):
            nn.init.normal_(part.in_proj_bias)
            nn.init.normal_(part.in_proj_weight)
            nn.init.normal_(part.out_proj.bias)
        if isinstance(part, nn.RNNBase):
            for parameter in part.parameters():  # large ones, or the outputs hardly depend on the first layers
                nn.init.normal_(parameter)
    return module


@cache
def exported(kind: type[nn.Module], dynamo: bool) -> onnx.ModelProto:
    with warnings.catch_warnings(record=True):  # the older exporter warns that shapes become constants
        return export_onnx(module_of(kind), INPUTS[kind], dynamo=dynamo)


def run(model: onnx.ModelProto, value: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: value.numpy()})[0]


def expected(kind: type[nn.Module], masks) -> np.ndarray:
    with torch.no_grad():
        return masked_copy(module_of(kind), masks)(INPUTS[kind]).numpy()


def assert_masks_the_same(kind: type[nn.Module], dynamo: bool, masks, given=None) -> None:
    """Masks on the file have the effect that they have on the module, and they have one."""
    before = expected(kind, {})
    wanted = expected(kind, masks)
    assert np.abs(wanted - before).max() > 1e-3
    result = apply_masks(exported(kind, dynamo), masks if given is None else given)
    np.testing.assert_allclose(run(result, INPUTS[kind]), wanted, **TOLERANCE)


def scattered(kind: type[nn.Module], name: str) -> dict[str, np.ndarray]:
    """A mask without any pattern, so that each element must land on its own weight."""
    shape = tuple(dict(module_of(kind).named_parameters())[name].shape)
    rng = np.random.default_rng(len(name))
    return {name: rng.random(shape) < 0.5}


FOLDED = ("norm.weight", "norm.bias", "second.bias", "norm2.weight", "norm2.bias")
EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])


@EXPORTERS
@pytest.mark.parametrize("kind", [Convolutions, Sequences])
def test_every_element_lands_on_its_weight(kind: type[nn.Module], dynamo: bool) -> None:
    masks: dict[str, np.ndarray] = {}
    before = expected(kind, {})
    for name, _ in module_of(kind).named_parameters():
        if name not in FOLDED:
            mask = scattered(kind, name)
            assert np.abs(expected(kind, mask) - before).max() > 1e-4, f"{name} does not count"
            masks |= mask
    assert len(masks) == {Convolutions: 8, Sequences: 27}[kind]
    assert_masks_the_same(kind, dynamo, masks)


def test_the_exporters_do_rename_and_fold() -> None:
    """Else the test above shows little."""
    names = {tensor.name for tensor in exported(Convolutions, True).graph.initializer}
    assert not names & {"token.weight", "groups.weight", "norm.weight", "norm2.weight"}
    assert "second.bias" in names  # under its old name, with the shift of the norm in it
    names = {tensor.name for tensor in exported(Convolutions, False).graph.initializer}
    assert not names & {"stem.weight", "second.bias", "token.weight", "norm.weight"}
    for dynamo in (True, False):
        assert not any("lstm" in t.name.lower().split("::")[0] for t in exported(Sequences, dynamo).graph.initializer)


# --- one number per channel ----------------------------------------------------------------------------------------


CHANNELS = [
    (Convolutions, "stem.weight", 8),
    (Convolutions, "up.weight", 6),
    (Convolutions, "second.weight", 6),
    (Convolutions, "token.weight", 6),
    (Convolutions, "head.weight", 3),
    (Sequences, "words.weight", 6),
    (Sequences, "tag.weight", 5),
]


@EXPORTERS
@pytest.mark.parametrize(("kind", "name", "count"), CHANNELS, ids=[name for _, name, _ in CHANNELS])
def test_masks_of_channels_are_spread(kind: type[nn.Module], name: str, count: int, dynamo: bool) -> None:
    mask = np.arange(count) % 3 != 1
    assert_masks_the_same(kind, dynamo, {name: mask})


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_masks_of_units_hold_for_all_gates(dynamo: bool) -> None:
    kept = np.array([1, 0, 1, 1])
    name = "lstm.weight_hh_l1_reverse"
    whole = {name: np.broadcast_to(np.tile(kept, 4)[:, None], (16, 4))}
    assert_masks_the_same(Sequences, dynamo, whole, given={name: kept})


def test_channels_of_a_module_are_rows_of_its_weight() -> None:
    module = module_of(Convolutions)
    masked = masked_copy(
        module, {"up.weight": np.array([1, 0, 1, 1, 1, 0]), "token.weight": np.array([1, 1, 0, 1, 1, 1])}
    )
    # 4 input channels of each of 2 groups make 3 output channels of the group.
    assert [bool(row.any()) for row in masked.up.weight[0]] == [True, False, True]
    assert [bool(row.any()) for row in masked.up.weight[7]] == [True, True, False]
    assert [bool(row.any()) for row in masked.token.weight] == [True, True, False, True, True, True]


@pytest.mark.parametrize("name", ["stem.weight", "up.weight", "words.weight"])
def test_another_number_of_channels_is_an_error(name: str) -> None:
    kind = Sequences if name.startswith("words") else Convolutions
    message = rf"mask '{name}' has shape \[13\], its weight has"
    with pytest.raises(MaskError, match=message):
        masked_copy(module_of(kind), {name: np.ones(13)})
    with pytest.raises(MaskError, match=message):
        apply_masks(exported(kind, True), {name: np.ones(13)})


# --- folded normalisations -----------------------------------------------------------------------------------------


def test_a_folded_norm_is_masked_where_weight_and_bias_are() -> None:
    kept = np.array([1, 1, 0, 1, 0, 1, 1, 1])
    assert_masks_the_same(Convolutions, True, {"norm": {"weight": kept, "bias": kept}})


def test_a_bias_in_front_of_a_masked_norm_counts_for_nothing() -> None:
    kept = np.array([0, 1, 0, 0, 1, 1])
    assert_masks_the_same(Convolutions, True, {"norm2": {"weight": kept, "bias": kept}, "second": {"bias": kept}})


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"norm.weight": [0] * 8}, r"mask 'norm\.weight': the exporter folded this normalisation into node_Conv"),
        ({"norm.weight": [0] * 8, "norm.bias": [1] * 8}, r"can only be masked at the same channels; export without"),
        ({"second.bias": [0] * 6}, r"mask 'second\.bias': the exporter folded a normalisation into this bias; export"),
    ],
)
def test_what_a_folded_norm_hides_is_an_error(masks, message: str) -> None:
    masks = {name: np.array(mask) for name, mask in masks.items()}
    with pytest.raises(MaskError, match=message):
        apply_masks(exported(Convolutions, True), masks)


def test_what_the_older_exporter_folded_is_an_error_too() -> None:
    with pytest.raises(MaskError, match=r"mask 'second\.bias': the exporter folded a normalisation into this bias"):
        apply_masks(exported(Convolutions, False), {"second.bias": np.zeros(6)})


def test_masks_of_ones_do_nothing() -> None:
    masks = {name: np.ones(8 if "norm." in name else 6) for name in FOLDED}
    model = exported(Convolutions, True)
    assert apply_masks(model, masks).graph.initializer == model.graph.initializer


# --- weights that are stored once, or twice -----------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding that is the last layer too, and a linear layer that is used on matrices and on batches of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(torch.relu(self.mix(self.words(x))))
        y = self.norm2(y + self.mix(y.mean(1))[:, None])
        return self.out(y)


INPUTS[Tied] = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(1))


@EXPORTERS
@pytest.mark.parametrize("name", ["words.weight", "mix.weight"])
def test_all_copies_of_a_weight_are_masked(name: str, dynamo: bool) -> None:
    assert_masks_the_same(Tied, dynamo, scattered(Tied, name))


def test_the_exporter_stores_equal_weights_once() -> None:
    model = exported(Tied, True)
    assert not {"norm1.weight", "norm2.weight"} <= {tensor.name for tensor in model.graph.initializer}
    kept = np.array([1, 1, 0, 1, 0, 1])
    assert_masks_the_same(Tied, True, {"norm1.weight": kept, "norm2.weight": kept})
    for name in ("norm1.weight", "norm2.weight"):
        with pytest.raises(MaskError, match=rf"mask '{name}': the modules 'norm1', 'norm2' share this weight, all of"):
            apply_masks(model, {name: kept})


# --- where masks come from -----------------------------------------------------------------------------------------


def pruned() -> nn.Module:
    """The convolutions, as torch.nn.utils.prune leaves them."""
    module = Convolutions()
    module.load_state_dict(module_of(Convolutions).state_dict())
    prune.ln_structured(module.stem, "weight", 0.5, n=1, dim=0)
    prune.ln_structured(module.token, "weight", 0.3, n=1, dim=0)
    prune.custom_from_mask(module.token, "bias", torch.tensor([1, 0, 1, 1, 0, 1]))
    return module.eval()


def masks_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removesuffix("_mask"): buffer for name, buffer in module.named_buffers() if name.endswith("_mask")}


@EXPORTERS
def test_the_state_dictionary_of_a_module_that_is_being_pruned(dynamo: bool) -> None:
    module = pruned()
    assert "stem.weight_orig" in module.state_dict()
    assert_masks_the_same(Convolutions, dynamo, masks_of(module), given=dict(module.state_dict()))


def test_the_state_dictionary_masks_a_module_too() -> None:
    module = pruned()
    result = masked_copy(module_of(Convolutions), dict(module.state_dict()))
    assert torch.equal(result.stem.weight, module.stem.weight)
    assert torch.equal(result.token.bias, module.token.bias)
    assert torch.equal(result.head.weight, module.head.weight)


def test_names_that_end_in_mask() -> None:
    masks = masks_of(pruned())
    given = {f"{name}_mask": mask for name, mask in masks.items()}
    assert_masks_the_same(Convolutions, True, masks, given=given)
    torch.testing.assert_close(
        masked_copy(module_of(Convolutions), given).state_dict(), masked_copy(pruned()).state_dict()
    )


def test_masks_of_weights_by_the_name_of_the_module() -> None:
    """As Intel Neural Compressor keeps them, whole and in blocks."""
    whole = np.repeat(np.repeat([[1, 0, 1], [0, 1, 1]], 3, axis=0), 2, axis=1)
    blocks = {"token": np.array([[1, 0, 1], [0, 1, 1]], bool), "stem": np.ones((8, 3, 3, 3), bool)}
    for given in (blocks, {"token": whole}, {"token": {"block_mask": blocks["token"]}}):
        assert_masks_the_same(Convolutions, True, {"token.weight": whole}, given=given)
        assert not masked_copy(module_of(Convolutions), given).token.weight[:3, 2:4].any()


def test_blocks_need_the_name_of_the_module() -> None:
    with pytest.raises(MaskError, match=r"mask 'second\.weight' has shape \[2, 3, 1, 1\]"):
        apply_masks(exported(Convolutions, True), {"second.weight": np.ones((2, 3, 1, 1))})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_in_names(prefix: str) -> None:
    masks = {
        name: mask for layer in ("stem", "token") for name, mask in scattered(Convolutions, f"{layer}.weight").items()
    }
    given = {prefix + name: mask for name, mask in masks.items()}
    assert_masks_the_same(Convolutions, True, masks, given=given)
    assert torch.equal(
        masked_copy(module_of(Convolutions), given).token.weight,
        masked_copy(module_of(Convolutions), masks).token.weight,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokn.weight", r"matches no initializer; near names: 'token\.weight'"),
        ("token._output_0", "is for an activation; only weights can be masked here"),
        ("norm.running_mean", "matches no initializer"),
        ("lstm.weight_ih_l7", "matches no initializer"),
    ],
)
def test_what_matches_nothing(name: str, message: str) -> None:
    with pytest.raises(MaskError, match=f"mask '{name}' {message}"):
        apply_masks(exported(Convolutions, True), {name: np.ones(6)})


@EXPORTERS
def test_a_file_of_masks_for_a_file_of_the_model(tmp_path: Path, dynamo: bool) -> None:
    module = pruned()
    torch.save(
        {name.rpartition(".")[0]: {"weight": mask} for name, mask in masks_of(module).items() if "bias" not in name},
        tmp_path / "m.pth",
    )
    onnx.save(exported(Convolutions, dynamo), tmp_path / "model.onnx")
    arguments = ["shrink", str(tmp_path / "model.onnx"), "--masks", str(tmp_path / "m.pth"), "-q"]
    assert cli.main([*arguments, "-o", str(tmp_path / "small.onnx")]) == 0
    small = onnx.load(tmp_path / "small.onnx")
    masks = {name: mask for name, mask in masks_of(module).items() if "bias" not in name}
    np.testing.assert_allclose(run(small, INPUTS[Convolutions]), expected(Convolutions, masks), **TOLERANCE)
    before = onnxshrink.shrink(exported(Convolutions, dynamo), align="none").report.after.parameters
    assert sum(int(np.prod(t.dims)) for t in small.graph.initializer if t.data_type == 1) < before - 2 * 6

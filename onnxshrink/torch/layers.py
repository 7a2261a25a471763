"""What PyTorch's layers say about their own weights: sizes that follow from them, and axes of channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONTRACTIONS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
# Batch and instance normalisation, of any number of dimensions.
CHANNEL_NORMS = (nn.modules.batchnorm._NormBase,)
LAST_AXIS = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def _linear(layer: nn.Linear) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


def _convolution(layer: nn.Conv2d) -> None:
    layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups


def _transposed(layer: nn.ConvTranspose2d) -> None:
    layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups


def _embedding(layer: nn.Embedding) -> None:
    layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def _channel_norm(layer: nn.BatchNorm2d) -> None:
    sized = layer.weight if layer.weight is not None else layer.running_mean
    if sized is not None:
        layer.num_features = sized.shape[0]


def _group_norm(layer: nn.GroupNorm) -> None:
    if layer.weight is not None:
        layer.num_channels = layer.weight.shape[0]


def _whole_norm(layer: nn.LayerNorm | nn.RMSNorm) -> None:
    if layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)


def _recurrent(layer: nn.RNNBase) -> None:
    layer.hidden_size, layer.input_size = layer.weight_hh_l0.shape[1], layer.weight_ih_l0.shape[1]
    layer.flatten_parameters()


def _prelu(layer: nn.PReLU) -> None:
    layer.num_parameters = layer.weight.shape[0]


_REFIT: tuple[tuple[tuple[type[nn.Module], ...], Callable[..., None]], ...] = (
    ((nn.Linear,), _linear),
    (CONVOLUTIONS, _convolution),
    (TRANSPOSED, _transposed),
    ((nn.Embedding,), _embedding),
    (CHANNEL_NORMS, _channel_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _whole_norm),
    ((nn.RNNBase,), _recurrent),
    ((nn.PReLU,), _prelu),
)
KNOWN = tuple(kind for kinds, _ in _REFIT for kind in kinds)


def refit(layer: nn.Module) -> None:
    """Let the sizes that a layer keeps as numbers follow those of its weights."""
    for kinds, follow in _REFIT:
        if isinstance(layer, kinds):
            follow(layer)
            return


def is_closed(module: nn.Module) -> bool:
    """Whether a module of PyTorch keeps parameters in a way of its own: nothing is known of how it reads them."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, KNOWN)


def fit_to_input(layer: nn.Module, value: torch.Tensor) -> None:
    """The same for a normalisation without weights, from what it is given: whole groups have left."""
    axis = 1 if value.ndim > 1 else 0
    if isinstance(layer, nn.GroupNorm) and layer.weight is None:
        size = layer.num_channels // layer.num_groups
        if value.shape[axis] % size == 0:
            layer.num_channels, layer.num_groups = value.shape[axis], value.shape[axis] // size
    elif isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.weight is None:
        layer.num_features = value.shape[axis]


def channel_axis(layer: nn.Module) -> int | None:
    """The axis of channels of what a layer takes and gives, counted from the left or the right; None: nobody says."""
    if isinstance(layer, LAST_AXIS):
        return -1
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, *CHANNEL_NORMS, nn.GroupNorm)):
        return 1
    return None

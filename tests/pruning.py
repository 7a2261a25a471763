"""Masks as NNI's pruners make them, for the tests of what comes after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

Masks = dict[str, dict[str, torch.Tensor | None]]


def row_mask(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Which rows (along axis 0) stay when the given share of them, those of the least L1 norm, is pruned; 0 and 1."""
    norms = weight.detach().abs().flatten(1).sum(1)
    kept = torch.ones(len(norms))
    kept[norms.argsort()[: int(len(norms) * sparsity)]] = 0
    return kept


def l1_masks(module: nn.Module, sparsity: float | Callable[[str], float]) -> Masks:
    """Output channels of convolutions, each layer on its own; a bias goes with its channel, a norm stays as it is."""
    masks: Masks = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            kept = row_mask(part.weight, sparsity(name) if callable(sparsity) else sparsity)
            weight = kept.reshape(-1, *[1] * (part.weight.ndim - 1)).expand_as(part.weight).clone()
            masks[name] = {"weight": weight, "bias": None if part.bias is None else kept}
    return masks


def l1_channel_masks(module: nn.Module, sparsity: float, leave: tuple[str, ...] = ()) -> Masks:
    """Input channels of convolutions and linear layers pruned, those that the weights use the least."""
    masks: Masks = {}
    for name, part in module.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)) and name not in leave and part.weight.shape[1] > 1:
            kept = row_mask(part.weight.transpose(0, 1), sparsity)
            shape = [1, -1, *[1] * (part.weight.ndim - 2)]
            masks[name] = {"weight": kept.reshape(shape).expand_as(part.weight).clone(), "bias": None}
    return masks


def unsettle(module: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm scales, shifts and statistics as after training: nothing is trivial."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(part.weight, 0.5, 1.5, generator)
            nn.init.normal_(part.bias, 0, 0.3, generator)
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def live(masks: Mapping[str, Mapping[str, torch.Tensor | None]], name: str) -> int:
    """How many rows of a weight a mask leaves."""
    mask = masks[name]["weight"]
    assert mask is not None
    return int(mask.flatten(1).any(1).sum())

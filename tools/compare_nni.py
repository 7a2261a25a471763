"""NNI's scenario on networks of torchvision: half of every Conv2d's channels masked by L1 norm, then sped up.

    python tools/compare_nni.py                      # the networks that NNI was measured on
    python tools/compare_nni.py resnet18 alexnet     # some
    python tools/compare_nni.py --apart              # each layer pruned on its own
    python tools/compare_nni.py --smoke              # one small network, without torchvision

Needs torchvision beside PyTorch. Weights are random, BatchNorm statistics as after training. Layers whose channels
NNI's dependency groups prune together (those that an addition or multiplication joins, and depthwise convolutions with
what feeds them) lose the same channels, those of the least mean norm; with `--apart`, each loses its own. Prints what
is left, by how much of their range the outputs differ from the masked module's in PyTorch, and seconds of one core.

Exits with 1 when one of them differs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnxruntime
import torch
import torch.fx
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

from onnxshrink import ShrinkResult
from onnxshrink.torch import ModelSpeedup, masked_copy

NETWORKS = (
    "alexnet", "resnet18", "resnet50", "mobilenet_v2", "densenet121", "mnasnet0_5", "efficientnet_b0", "squeezenet1_0",
)  # fmt: skip
# Relative to the range of the outputs; float32 sums in another order stay well below.
EXACT = 1e-5
SPARSITY = 0.5
_JOINS = ("add", "iadd", "mul", "imul")

Masks = dict[str, dict[str, torch.Tensor]]


class Small(nn.Module):  # type: ignore[misc]
    """A residual block, for a run of seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(i, 8, 3, padding=1, bias=False) for i in (3, 8, 8))
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.stem(x)))
        x = x + self.norms[2](self.outer(torch.relu(self.norms[1](self.inner(x)))))
        return self.head(x.mean((2, 3)))


# --- pruning ---------------------------------------------------------------------------------------------------------


def unsettle(module: nn.Module) -> nn.Module:
    """BatchNorm as after training: scale 0.5 to 1.5, shift and mean N(0, 0.3), variance 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5, generator)
            nn.init.normal_(part.bias, 0, 0.3, generator)
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def groups(module: nn.Module, image: torch.Tensor) -> Iterator[list[str]]:
    """Names of the convolutions that lose the same channels."""
    traced = torch.fx.symbolic_trace(module)
    ShapeProp(traced).propagate(image)
    parts = dict(traced.named_modules())
    above: dict[str, str] = {}

    def key(name: str) -> str:
        while name in above:
            name = above[name]
        return name

    for node in traced.graph.nodes:
        together: list[str] = []
        part = parts.get(node.target) if node.op == "call_module" else None
        if isinstance(part, nn.Conv2d) and part.groups == part.out_channels > 1:
            together = [node.target, *_writers(node, parts)]
        elif node.op in ("call_function", "call_method") and _name(node.target) in _JOINS:
            together = list(_writers(node, parts))
        for name in together[1:]:
            if key(name) != key(together[0]):
                above[key(name)] = key(together[0])
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            found[key(name)].append(name)
    yield from found.values()


def _writers(node: torch.fx.Node, parts: dict[str, nn.Module]) -> Iterator[str]:
    """The nearest convolutions behind a node, as far as the number of channels stays the same."""
    for other in node.all_input_nodes:
        if other.op == "call_module" and isinstance(parts[other.target], nn.Conv2d):
            yield other.target
        elif _channels(other) is not None and all(_channels(n) == _channels(other) for n in other.all_input_nodes):
            yield from _writers(other, parts)


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _channels(node: torch.fx.Node) -> int | None:
    shape: list[int] = list(getattr(node.meta.get("tensor_meta"), "shape", ()))
    return int(shape[1]) if len(shape) > 1 else None


def make_masks(module: nn.Module, image: torch.Tensor, apart: bool) -> Masks:
    """Masks of the weights and biases of all Conv2d."""
    parts = dict(module.named_modules())
    names = [name for name, part in parts.items() if isinstance(part, nn.Conv2d)]
    masks: Masks = {}
    for group in [[name] for name in names] if apart else groups(module, image):
        norms = torch.stack([parts[name].weight.detach().abs().flatten(1).sum(1) for name in group]).mean(0)
        kept = torch.ones(len(norms))
        kept[norms.argsort()[: int(len(norms) * SPARSITY)]] = 0
        for name in group:
            weight = parts[name].weight
            masks[name] = {"weight": kept.reshape(-1, 1, 1, 1).expand_as(weight).clone()}
            if parts[name].bias is not None:
                masks[name]["bias"] = kept
    return masks


# --- measuring -------------------------------------------------------------------------------------------------------


def error_of(result: ShrinkResult, module: nn.Module, masks: Masks, image: torch.Tensor) -> float:
    """The largest difference from the masked module in PyTorch, relative to its range."""
    with torch.no_grad():
        expected = masked_copy(module, masks)(image).numpy()
    session = onnxruntime.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def measure(name: str, apart: bool) -> tuple[list[str], bool]:
    """One row of the table, and whether it is exact."""
    torch.manual_seed(0)
    small = name == "small"
    made = Small() if small else getattr(importlib.import_module("torchvision").models, name)(weights=None)
    module, size = unsettle(made), 32 if small else 224
    image = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))
    masks = make_masks(module, image, apart)
    start = time.process_time()
    result = ModelSpeedup(module, image[:2], masks, confidence=2).speedup_model()
    seconds, error = time.process_time() - start, error_of(result, module, masks, image)
    before = sum(parameter.numel() for parameter in module.parameters())
    left = f"{result.report.after.parameters:,}"
    return [name, f"{before:,}", left, f"{error:.1e}", f"{seconds:.1f}"], error <= EXACT


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="names in torchvision.models")
    parser.add_argument("--apart", action="store_true", help="prune each layer on its own")
    parser.add_argument("--smoke", action="store_true", help="one small network")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table("network", *(("parameters", "left", "error", "seconds")))
    exact = True
    for name in ("small",) if arguments.smoke else arguments.networks:
        row, fine = measure(name, arguments.apart)
        exact &= fine
        table.add_row(*row)
        print(" | ".join(row), file=sys.stderr, flush=True)
    Console().print(table)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())

"""The same masked networks through onnxshrink and its peers, side by side: exact or not, what is left, how long.

    python tools/compare_exactness.py            # the table
    python tools/compare_exactness.py --smoke    # the first two networks

Exits with 1 when onnxshrink is not exact on one of them.

Peers are used where they are installed: torch-simplify (`pip install torch-simplify`) and Torch-Pruning
(`pip install torch-pruning`). Torch-Pruning takes no masks; it is told to remove the dead rows of each layer.
Networks are small, with BatchNorm statistics that are not trivial; half of the rows of every layer but the last are
masked, layer by layer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

# Relative to the range of the outputs; float32 sums in another order stay well below.
EXACT = 1e-5


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):  # type: ignore[misc]
    """Two blocks with skips; layers do not agree on which channels are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32)
        self.first = nn.Sequential(conv(32, 48), nn.Conv2d(48, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.second = nn.Sequential(conv(32, 48), nn.Conv2d(48, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):  # type: ignore[misc]
    """An inverted residual with a depthwise convolution and a squeeze-and-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.expand, self.depthwise = conv(16, 64, 1), conv(64, 64, groups=64)
        self.squeeze, self.excite = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)
        self.project = nn.Sequential(nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y * gate)).mean((2, 3)))


class Dense(nn.Module):  # type: ignore[misc]
    """Concatenated features, each read through a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 24)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(24 + 16 * i), nn.ReLU(), nn.Conv2d(24 + 16 * i, 16, 3, padding=1))
            for i in range(3)
        )
        self.head = nn.Linear(72, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))


def plain() -> nn.Module:
    """Convolutions and pooling in a row, then two linear layers."""
    features = [conv(3, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2), conv(64, 64), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10))


def grouped() -> nn.Module:
    """A grouped convolution between two ordinary ones."""
    rest = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(conv(3, 32), conv(32, 64, groups=8), conv(64, 32), *rest)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": Residual,
    "inverted residual": Inverted,
    "dense": Dense,
    "grouped": grouped,
}


def masked(make: Callable[[], nn.Module], keep_bias: bool) -> nn.Module:
    """A network with statistics of its own and half of each layer's rows zero, the last layer's excepted."""
    torch.manual_seed(0)
    network = make().eval()
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        for module in layers[:-1]:
            dead = torch.randperm(len(module.weight))[: len(module.weight) // 2]
            module.weight[dead] = 0
            if not keep_bias:
                module.bias[dead] = 0
    return network


@dataclass(frozen=True)
class Outcome:
    """What one tool made of one network."""

    parameters: int
    error: float
    seconds: float

    def cells(self) -> list[str]:
        """For the table."""
        return [
            f"{self.parameters:,}",
            "yes" if self.error <= EXACT else f"no ({self.error:.1e})",
            f"{self.seconds:.1f}",
        ]


def count(network: nn.Module) -> int:
    """Parameters of a PyTorch network; BatchNorm statistics count, since ONNX stores them as weights too."""
    tensors = [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
    return sum(tensor.numel() for tensor in tensors)


def distance(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    """Largest difference, of the range."""
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


def by_onnxshrink(network: nn.Module, image: torch.Tensor, expected: np.ndarray[Any, Any]) -> Outcome:
    """Export, shrink without verification, run."""
    import onnxruntime

    import onnxshrink
    from onnxshrink.torch import export_onnx

    exported = export_onnx(network, (image,))
    start = time.perf_counter()
    result = onnxshrink.shrink(exported, verify=False, align="none")
    seconds = time.perf_counter() - start
    session = onnxruntime.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return Outcome(result.report.after.parameters, distance(expected, actual), seconds)


def by_simplify(network: nn.Module, image: torch.Tensor, expected: np.ndarray[Any, Any]) -> Outcome:
    """torch-simplify, with its default of folding BatchNorm."""
    import simplify

    start = time.perf_counter()
    small = simplify.simplify(network, torch.zeros_like(image[:1]), fuse_bn=True)
    seconds = time.perf_counter() - start
    return Outcome(count(small), distance(expected, small(image).detach().numpy()), seconds)


def by_torch_pruning(network: nn.Module, image: torch.Tensor, expected: np.ndarray[Any, Any]) -> Outcome:
    """Torch-Pruning's dependency graph, told to remove the dead rows of each layer and all that is coupled."""
    import torch_pruning

    start = time.perf_counter()
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=image[:1])
    for module in [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        prune = torch_pruning.prune_conv_out_channels
        if isinstance(module, nn.Linear):
            prune = torch_pruning.prune_linear_out_channels
        rows = module.weight.flatten(1).abs().amax(1)
        dead = torch.nonzero(rows == 0).flatten().tolist()
        if dead and len(dead) < len(rows):
            group = graph.get_pruning_group(module, prune, idxs=dead)
            if graph.check_pruning_group(group):
                group.prune()
    seconds = time.perf_counter() - start
    return Outcome(count(network), distance(expected, network(image).detach().numpy()), seconds)


TOOLS = {"onnxshrink": by_onnxshrink, "torch-simplify": by_simplify, "Torch-Pruning": by_torch_pruning}


def outcome(tool: str, network: nn.Module, image: torch.Tensor) -> Outcome | str:
    """What a tool made of one network, or why there is nothing."""
    expected = network(image).detach().numpy()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return TOOLS[tool](copy.deepcopy(network), image, expected)
    except ImportError:
        return "not installed"
    except Exception as error:
        # A tool may fail in any way; that is what the table is for.
        return type(error).__name__


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two networks only")
    smoke = parser.parse_args().smoke
    warnings.simplefilter("ignore")
    table = Table("network", "biases", "parameters", "tool", "left", "exact", "seconds")
    image = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    exact = True
    for name in list(NETWORKS)[: 2 if smoke else None]:
        for keep_bias in (False, True):
            network = masked(NETWORKS[name], keep_bias)
            head = [name, "kept" if keep_bias else "zero", f"{count(network):,}"]
            for tool in TOOLS:
                found = outcome(tool, network, image)
                table.add_row(*head, tool, *(["", found, ""] if isinstance(found, str) else found.cells()))
                if tool == "onnxshrink":
                    exact &= not isinstance(found, str) and found.error <= EXACT
                head = ["", "", ""]
    Console(width=110).print(table)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())

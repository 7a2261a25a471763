"""Trains, prunes and exports the classifier that ships in `onnxshrink/demo`, and writes the held-out samples beside it.

    python tools/train_demo.py [--output FOLDER] [--smoke]

The data are scikit-learn's digits. The network is trained, whole rows of its layers are pruned by their L1 norm, each
layer on its own, and the rest is trained further with the masks held. `--smoke` trains for two passes and asks for no
accuracy: it shows that the script runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.utils import prune

SEED = 20
HELD_OUT = 450
BATCH = 64
LEAST_ACCURACY = 0.97
MOST_BYTES = 1_000_000
FOLDER = Path(__file__).resolve().parent.parent / "onnxshrink" / "demo"

# What share of each layer's rows goes. A layer named in SILENCED loses its BatchNorm scale and shift with the row, so
# that the channel is zero; every other pruned row keeps its shift or bias, so that the channel is a constant.
ROWS = {
    "stem": 0.5,
    "widen": 0.5,
    "block.first": 0.6,
    "block.second": 0.55,
    "expand": 0.4,
    "depthwise": 0.35,
    "hidden": 0.6,
}
SILENCED = ("stem", "widen", "block.first", "block.second", "expand")


@dataclass(frozen=True)
class Data:
    """Images `[N, 1, 8, 8]` of integers 0 to 16, and labels `[N]`, split in two."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


# torch is not followed by the type checker, so its classes are `Any` there
class ConvNorm(nn.Module):  # type: ignore[misc]
    """A convolution without bias, and its BatchNorm."""

    def __init__(self, inputs: int, outputs: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images))


class Residual(nn.Module):  # type: ignore[misc]
    """Two convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, channels, 3)
        self.second = ConvNorm(channels, channels, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(images + self.second(torch.relu(self.first(images))))


class Digits(nn.Module):  # type: ignore[misc]
    """A small convolutional classifier: images `[N, 1, 8, 8]` to logits `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 32, 3)
        self.widen = ConvNorm(32, 64, 3)
        self.block = Residual(64)
        self.expand = ConvNorm(64, 128, 1)
        self.depthwise = ConvNorm(128, 128, 3, groups=128)
        self.hidden = nn.Linear(128, 96)
        self.classes = nn.Linear(96, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stream = self.block(torch.relu(self.widen(torch.relu(self.stem(images)))))
        stream = torch.relu(self.expand(torch.max_pool2d(stream, 2)))
        pooled = torch.relu(self.depthwise(stream)).mean((2, 3))
        return self.classes(torch.relu(self.hidden(pooled)))


def load_data() -> Data:
    """The digits, split with a fixed seed and the same share of each digit on both sides."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target.astype(np.int64), test_size=HELD_OUT, random_state=SEED, stratify=digits.target
    )
    return Data(train_images, train_labels, test_images, test_labels)


def scaled(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / np.float32(16))


def shifted(images: torch.Tensor) -> torch.Tensor:
    """A batch moved by at most one pixel, so that 1,300 images are enough."""
    down, right = (int(step) for step in torch.randint(-1, 2, (2,)))
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    return padded[:, :, 1 + down : 9 + down, 1 + right : 9 + right]


def batches(data: Data) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = scaled(data.train_images), torch.from_numpy(data.train_labels)
    for chosen in torch.randperm(len(labels)).split(BATCH):
        # a last batch of a few images would spoil BatchNorm's statistics
        if len(chosen) == BATCH:
            yield shifted(images[chosen]), labels[chosen]


def train(network: nn.Module, data: Data, epochs: int, rate: float) -> None:
    """Trains in place; parametrised masks stay held, for the loss sees the masked weights only."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for images, labels in batches(data):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels, label_smoothing=0.05).backward()
            optimizer.step()
        schedule.step()
    network.eval()


def accuracy(network: nn.Module, data: Data) -> float:
    with torch.no_grad():
        predicted = network(scaled(data.test_images)).argmax(1).numpy()
    return float((predicted == data.test_labels).mean())


def weighted(network: nn.Module, name: str) -> nn.Module:
    module = network.get_submodule(name)
    return module.conv if isinstance(module, ConvNorm) else module


def prune_rows(network: nn.Module) -> None:
    """Masks the rows of every layer in `ROWS` with the smallest L1 norm, no layer heeding another."""
    for name, share in ROWS.items():
        layer = weighted(network, name)
        prune.ln_structured(layer, "weight", amount=share, n=1, dim=0)
        if name in SILENCED:
            silence(network.get_submodule(name).norm, layer.weight_mask)


def silence(norm: nn.Module, row_mask: torch.Tensor) -> None:
    """Masks the scale and the shift of the channels whose rows are masked."""
    live = row_mask.flatten(1).amax(1)
    prune.custom_from_mask(norm, "weight", live)
    prune.custom_from_mask(norm, "bias", live)


def make_permanent(network: nn.Module) -> None:
    for module in network.modules():
        for name in ("weight", "bias"):
            if hasattr(module, f"{name}_mask"):
                prune.remove(module, name)


def export(network: nn.Module) -> onnx.ModelProto:
    """The network as an ONNX model with a free batch, by torch's exporter (which folds BatchNorm into the weights)."""
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 1, 8, 8),),
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    model: onnx.ModelProto = program.model_proto
    forget_origin(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def forget_origin(model: onnx.ModelProto) -> None:
    """Drops what the exporter notes about the source: stack traces that name files of this machine, above all."""
    graph = model.graph
    holders: list[Any] = [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]
    for holder in holders:
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")


def dead_share(weight: np.ndarray) -> float:
    return float((weight.reshape(len(weight), -1) == 0).all(1).mean())


def report(model: onnx.ModelProto) -> None:
    """Prints, for each weight matrix, how many rows are zero, and for each bias how many entries."""
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim:
            print(f"  {tensor.name:32s} {'x'.join(map(str, values.shape)):12s} zero rows {dead_share(values):.0%}")


def model_accuracy(model: onnx.ModelProto, data: Data) -> float:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"images": scaled(data.test_images).numpy()})[0]
    return float((logits.argmax(1) == data.test_labels).mean())


def save(model: onnx.ModelProto, data: Data, folder: Path) -> int:
    """Writes both files; returns their size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "digits.onnx")
    np.savez_compressed(folder / "digits.npz", images=data.test_images, labels=data.test_labels.astype(np.uint8))
    return sum((folder / name).stat().st_size for name in ("digits.onnx", "digits.npz"))


def build(data: Data, epochs: int) -> nn.Module:
    """A trained network whose pruned rows are zeros."""
    network = Digits()
    train(network, data, epochs, 3e-3)
    print(f"trained: accuracy {accuracy(network, data):.4f}")
    prune_rows(network)
    print(f"pruned: accuracy {accuracy(network, data):.4f}")
    train(network, data, epochs, 2e-3)
    make_permanent(network)
    print(f"trained further: accuracy {accuracy(network, data):.4f}")
    return network


def make(folder: Path, smoke: bool) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = load_data()
    model = export(build(data, 2 if smoke else 40))
    report(model)
    reached, size = model_accuracy(model, data), save(model, data, folder)
    print(f"{folder}: {size:,} bytes, accuracy in onnxruntime {reached:.4f} on {len(data.test_labels)} samples")
    if size > MOST_BYTES or (reached < LEAST_ACCURACY and not smoke):
        raise SystemExit("the model is too large or not accurate enough")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train, prune and export the demo's classifier.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder to write to")
    parser.add_argument("--smoke", action="store_true", help="a short run into a temporary folder")
    options = parser.parse_args(arguments)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), smoke=True)
    else:
        make(options.output, smoke=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

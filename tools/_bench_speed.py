"""Latency by how the widths are chosen: `python tools/bench.py --speed [--smoke]`.

Networks of odd widths, drawn at random, and the convolutional ones of a folder of exported networks, where there is one
(`ONNXSHRINK_ZOO`). Each is shrunk with `--align none`, `auto`, 4, 8 and 16; all of these, the input, and the network
that a person would have built with the fewest parameters run in turns, in one process, on one thread. Figures are
medians.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _drawing import SMOKE, Inverted, Shape, draw
from rich.console import Console
from rich.table import Table

from onnxshrink import shrink
from onnxshrink.bench import measure
from onnxshrink.measure import parameters

MOBILE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
DRAWN: tuple[Shape | Inverted, ...] = (
    Inverted("MobileNetV2, 0.55 alive", MOBILE, 32, 1280, 224, 1000, 0.55),
    Inverted("MobileNetV2, 0.95 alive", MOBILE, 32, 1280, 224, 1000, 0.95),
    Shape("ResNet-50, 0.55 alive", (3, 4, 6, 3), 64, True, 224, 1000, 0.55),
    Shape("ResNet-50, 0.95 alive", (3, 4, 6, 3), 64, True, 224, 1000, 0.95),
    Shape("ResNet-18, 0.55 alive", (2, 2, 2, 2), 64, False, 224, 1000, 0.55),
)
PATTERNS = ("tv-*", "own-detector*", "seg-*")
_WITHOUT = ("mixer", "convnext", "swin", "vit")
ALIGNS: tuple[str | int, ...] = ("none", "auto", 4, 8, 16)
SECONDS = 1.5  # per model


@dataclass(frozen=True)
class Row:
    """One network: milliseconds and parameters by form; "input" and "by hand" besides the ways to align."""

    name: str
    latency: dict[str, float]
    parameters: dict[str, int]


def networks(smoke: bool) -> Iterator[tuple[str, onnx.ModelProto, onnx.ModelProto | None]]:
    """Name, the pruned network, and the one built by hand where that is known."""
    if smoke:
        yield SMOKE[0].name, draw(SMOKE[0], False), draw(SMOKE[0], True)
        small = Inverted("small, inverted", ((1, 16, 1, 1), (4, 24, 2, 2)), 16, 64, 32, 10, 0.55)
        yield small.name, small.draw(False), small.draw(True)
        return
    for shape in DRAWN:
        make = shape.draw if isinstance(shape, Inverted) else lambda by_hand, shape=shape: draw(shape, by_hand)
        yield shape.name, make(False), make(True)
    folder = Path(os.environ.get("ONNXSHRINK_ZOO", "../shared/zoo"))
    if (folder / "skeleton.py").is_file():
        yield from exported(folder)


def exported(folder: Path) -> Iterator[tuple[str, onnx.ModelProto, onnx.ModelProto | None]]:
    """The convolutional networks of a folder of skeletons, with weights drawn anew."""
    sys.path.insert(0, str(folder))
    skeleton: Any = importlib.import_module("skeleton")
    paths = sorted(path for pattern in PATTERNS for path in folder.glob(f"{pattern}.onnx"))
    for path in paths:
        if not path.stem.endswith(".small") and not any(word in path.stem for word in _WITHOUT):
            by_hand = path.with_name(f"{path.stem}.small.onnx")
            yield (
                path.stem,
                skeleton.materialize(path, 11),
                skeleton.materialize(by_hand, 11) if by_hand.exists() else None,
            )


def compare(name: str, model: onnx.ModelProto, by_hand: onnx.ModelProto | None, seconds: float) -> Row:
    """Every form of one network, in turns."""
    models = {"input": model}
    for align in ALIGNS:
        models[str(align)] = shrink(model, align=align, verify=False).model
    if by_hand is not None:
        models["by hand"] = by_hand
    with tempfile.TemporaryDirectory() as folder:
        paths = {form: Path(folder, f"{number}.onnx") for number, form in enumerate(models)}
        for form, path in paths.items():
            onnx.save(models[form], path)
        taken = measure(list(paths.values()), seconds=seconds * len(paths))
    latency = {form: 1e3 * float(np.median(values)) for form, values in zip(models, taken, strict=True)}
    return Row(name, latency, {form: parameters(other) for form, other in models.items()})


def make_table(rows: list[Row]) -> Table:
    """One row per network."""
    forms = ["input", *map(str, ALIGNS), "by hand"]
    table = Table(title="latency in ms, medians of interleaved runs on one thread")
    table.add_column("")
    for form in (*forms, "auto / best other", "auto / none", "auto / input", "parameters: auto / none"):
        table.add_column(form, justify="right")
    for row in rows:
        others = [value for form, value in row.latency.items() if form != "auto"]
        auto = row.latency["auto"]
        ratios = (auto / min(others), auto / row.latency["none"], auto / row.latency["input"])
        cells = [f"{row.latency[form]:.2f}" if form in row.latency else "" for form in forms]
        share = row.parameters["auto"] / row.parameters["none"]
        table.add_row(row.name, *cells, *(f"{ratio:.2f}" for ratio in (*ratios, share)))
    return table


def run(smoke: bool) -> int:
    """Measure everything and print the table."""
    rows = []
    for name, model, by_hand in networks(smoke):
        rows.append(compare(name, model, by_hand, 0.1 if smoke else SECONDS))
        print(rows[-1], file=sys.stderr, flush=True)
    Console(width=200 if not sys.stdout.isatty() else None).print(make_table(rows))
    return 0

"""Inputs of a model in a file: arrays by name, or lists of arrays where an input is a sequence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.inputs import Feed
from onnxshrink.weights import Array


def write_feed(feed: Mapping[str, Any], folder: Path) -> None:
    """Write inputs to a folder, which is made."""
    folder.mkdir()
    arrays: dict[str, Array] = {}
    layout: dict[str, str | list[str]] = {}
    for name, value in feed.items():
        parts = value if isinstance(value, list) else [value]
        keys = [f"{len(arrays) + index}" for index in range(len(parts))]
        arrays |= {key: _plain(part) for key, part in zip(keys, parts, strict=True)}
        layout[name] = keys if isinstance(value, list) else keys[0]
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (folder / "layout.json").write_text(json.dumps(layout))


def read_feed(folder: Path) -> Feed:
    """The inputs that were written to a folder."""
    layout = json.loads((folder / "layout.json").read_text())
    with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
        return {
            name: [stored[key] for key in keys] if isinstance(keys, list) else stored[keys]
            for name, keys in layout.items()
        }


def _plain(array: Array) -> Array:
    """Text as numpy's own type for it, which is stored without pickling."""
    array = np.asarray(array)
    return array.astype(str) if array.dtype.kind == "O" else array

"""What comes in: a model, masked where masks are given, and what is remembered of how it was stored."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxshrink import measure
from onnxshrink.collector import paused
from onnxshrink.graph import Graph
from onnxshrink.lazy import LARGEST, LazyModel
from onnxshrink.reading import ModelLike, read_model

if TYPE_CHECKING:
    from onnxshrink.masks import MaskTree

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Source:
    """What comes in.

    Attributes:
        graph: the graph of the masked model.
        nbytes: of the model as it was stored.
        files: every file that it was read from, links resolved.
        path: the file; None where the model is not as it lies there.
        shared: whether somebody else holds the model as an object.
        zeroed: weights near zero that were set to zero.
    """

    graph: Graph
    nbytes: int
    files: frozenset[Path] = frozenset()
    path: Path | None = None
    shared: bool = False
    zeroed: int = 0

    @property
    def external(self) -> bool:
        """Whether weights lie in files of their own."""
        return len(self.files) > 1

    @property
    def model(self) -> ModelLike:
        """The masked model: what a result is compared with."""
        return self.graph.model if self.path is None else self.path

    def again(self) -> LazyModel:
        """The masked model as a result that is as it was: an object that nobody else holds."""
        if not self.shared:
            return self.graph.model
        copy = LazyModel.of(self.graph.proto)
        copy.load()
        return copy


@paused()
def open_source(
    model: ModelLike,
    masks: MaskTree | PathLike | None = None,
    zero_tolerance: float = 0.0,
    keep: Collection[str] = (),
) -> Source:
    """Read a model, apply masks, and set weights near zero to zero. Raises InputError.

    Args:
        model: a path or a model.
        masks: masks by name, or a file of such.
        zero_tolerance: weights up to this magnitude become zero.
        keep: model-local functions that stay nodes; see `Graph`.
    """
    lazy, files = read_model(model)
    nbytes = sum(file.stat().st_size for file in files) if files else size(lazy)
    if masks is None and zero_tolerance == 0:
        path = Path(model) if isinstance(model, (str, os.PathLike)) else None
        return Source(Graph(lazy, keep), nbytes, files, path, shared=path is None)
    from onnxshrink.masks import apply_masks, load_masks, zero_near

    whole, zeroed = lazy.whole() if lazy.values else lazy.proto, 0
    if masks is not None:
        tree = load_masks(os.fspath(masks)) if isinstance(masks, (str, os.PathLike)) else masks
        whole = apply_masks(whole, tree)
    if zero_tolerance != 0:
        whole, zeroed = zero_near(whole, zero_tolerance)
    return Source(Graph(LazyModel(whole), keep), nbytes, files, zeroed=zeroed)


def size(model: LazyModel) -> int:
    """Bytes of a model in one file, or of its weights where they are too large for one."""
    weights = measure.weights(model.proto).bytes
    return weights if weights > LARGEST else model.nbytes()

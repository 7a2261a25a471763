"""What comes out: the smaller model, the report, the plan."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from onnxshrink import save
from onnxshrink.errors import InputError
from onnxshrink.lazy import LARGEST, LazyModel
from onnxshrink.plan import Plan
from onnxshrink.reading import read_model
from onnxshrink.report import Report

if TYPE_CHECKING:
    from torch import nn

    from onnxshrink.torch.rebuild import Origin


class ShrinkResult:
    """A shrunk model.

    Attributes:
        report: what was removed, what stayed and why.
        plan: which indices of which tensor stay.
        origin: the example inputs, masks and options that a PyTorch module was exported with; None for other models.
    """

    origin: Origin | None = None

    def __init__(
        self,
        model: LazyModel,
        report: Report,
        plan: Plan,
        *,
        external: bool = False,
        sources: frozenset[Path] = frozenset(),
    ) -> None:
        self.report = report
        self.plan = plan
        self._lazy = model
        self._external = external
        self._sources = sources

    def __repr__(self) -> str:
        before, after = self.report.before.parameters, self.report.after.parameters
        return f"<ShrinkResult: {before:,} parameters became {after:,}>"

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The result, with all its weights; an equal copy of the (masked) input when nothing could be removed.

        Where the input's weights lie in files of their own, those of the result are read when this is asked for: from
        the file that was written, else from the input's. Raises InputError where that has changed since, or where they
        are larger than one message may be (2 GB): `save` the result, and use the file.
        """
        nbytes = save.weight_bytes(self._lazy)
        if self._external and nbytes > LARGEST:
            raise InputError(
                f"the result has {nbytes / 1e9:.1f} GB of weights, more than one object holds (2 GB): save it, and use "
                "the file"
            )
        return self._lazy.whole()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, whole or not at all; an existing file is replaced.

        Weights go to a file of their own beside it, `NAME.data`, when the input had such or beyond 2 GB.

        Raises InputError when the file cannot be written; what was there is then untouched.
        """
        model = self.__dict__.get("model", self._lazy)  # with what the caller may have changed in it
        with stage(model, path, external=self._external, sources=self._sources) as staged:
            staged.commit()
        self.adopt(path)

    def to_torch(self, module: nn.Module, *, strict: bool = True) -> nn.Module:
        """A smaller copy of the PyTorch module that the model was exported from; `module` itself is not changed.

        Every Conv, Linear, norm, Embedding, LSTM and GRU of it, and every other parameter, is sliced as far as the
        module's `forward()` follows; constants of removed channels are in the biases. It computes the same as the
        masked module and as the model, which is checked before it is returned, and can be trained, saved and exported
        like any other. A layer that lost something has `onnxshrink_removed`: by parameter, the removed indices of each
        axis.

        Args:
            module: what the model was exported from.
            strict: whether everything that can go must go. If not, what `forward()` cannot follow stays whole, such as
                heads whose number it has as a literal; a warning and `onnxshrink_notes` of the copy name the places.

        Raises InputError that says which layer and why: `forward()` cannot follow (with `strict`), or follows nothing;
        `module` is not the one that was exported, or the model did not come from a module.
        """
        if self.origin is None:
            raise InputError("to_torch: no module belongs to this result; it is not one of export or ModelSpeedup")
        from onnxshrink.torch.rebuild import rebuild

        return rebuild(module, self.origin, self.model, strict)

    def adopt(self, path: str | os.PathLike[str]) -> None:
        """Read weights that lie in files from here from now on: the input's may be gone."""
        if self._external:
            self._lazy, _ = read_model(path)


def stage(
    model: onnx.ModelProto | LazyModel, path: str | os.PathLike[str], *, external: bool, sources: frozenset[Path]
) -> save.Staged:
    """Write a model beside the file whose place it is to take.

    Args:
        model: the model.
        path: that file.
        external: whether weights go to a file of their own.
        sources: files that the model was made from, which stay unless it takes their place.
    """
    target = save.check_target(path, "output")
    in_place = Path(os.path.realpath(target)) in sources
    return save.Staged(model, target, external=external, keep=frozenset() if in_place else sources)

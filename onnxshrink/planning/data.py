"""The plan and its causes: data only."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxshrink.view import Fold
from onnxshrink.weights import Array, BoolArray

Kept = list[BoolArray | None]


@dataclass(frozen=True)
class Cause:
    """Why an index stays: the node that asked, the tensor that it came from, and the reason in words."""

    node: str
    source: str
    reason: str


LIVE = Cause("", "", "live")
INTERFACE = Cause("", "", "an input or output of the model")


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays of every tensor, and what is folded where. Data only.

    Attributes:
        kept: per computed tensor, per axis, a mask of what stays; None for an axis of unknown extent.
        present: tensors that are computed at all.
        folds: per node index, per input, constants that leave.
        frozen: per node index, per input, the compressed constant that takes the place of a computed tensor.
        settled: per node index, the constants that take the place of a node's outputs.
        blocks: per node index, into how many blocks the groups of an operator are joined.
        constants: per node index, per constant (or frozen) input, per axis, a mask of what this use keeps.
        causes: every cause, referred to by number.
        cause: per tensor, per axis, the number of the cause of each index; -1: does not stay.
        unaligned: widths that could not be raised to the multiple asked for: the node, the tensor, and the reason.
    """

    kept: dict[str, Kept]
    present: set[str]
    folds: dict[int, dict[int, Fold]] = field(default_factory=dict)
    frozen: dict[int, dict[int, Array]] = field(default_factory=dict)
    constants: dict[int, dict[int, Kept]] = field(default_factory=dict)
    settled: dict[int, list[Array]] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)
    cause: dict[str, list[Array | None]] = field(default_factory=dict)
    unaligned: list[Cause] = field(default_factory=list)

    def shrinks(self, name: str) -> bool:
        """Whether a tensor that stays loses indices."""
        return name in self.present and any(k is not None and not k.all() for k in self.kept[name])

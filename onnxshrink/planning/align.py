"""Widths: channel axes of weights, rounded up to a multiple where the original has the channels. Names no operator.

Kernels work in blocks of channels, so a width of 61 may take longer than one of 64. A few dead channels that stay are
lossless: they hold what they hold in the original.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.errors import InputError
from onnxshrink.planning.agreement import level
from onnxshrink.planning.data import Cause, Plan
from onnxshrink.planning.planner import Planner
from onnxshrink.planning.widths import Axis, Width, find_widths
from onnxshrink.weights import BoolArray, any_along

Journal = list[tuple[str, int, BoolArray] | str]
Words = Callable[[int, int], str]  # why a width is raised, from the widths before and after


@dataclass(frozen=True)
class Alignment:
    """The widths that are asked for.

    Attributes:
        multiple: of every width; 1: as it falls.
        chosen: for some classes of coupled axes, another multiple, by the first axis of the class.
        whole: classes that keep all channels.
        words: per class, the reason that goes on record.
        hosts: let a constant channel stay rather than append a channel of ones, which copies the whole tensor.
    """

    multiple: int = 1
    chosen: Mapping[Axis, int] = field(default_factory=dict)
    whole: frozenset[Axis] = frozenset()
    words: Mapping[Axis, Words] = field(default_factory=dict)
    hosts: bool = True

    def of(self, key: Axis) -> int:
        """The multiple for one class."""
        return self.chosen.get(key, self.multiple)

    def reason(self, key: Axis, before: int, after: int) -> str:
        """Why a width is raised."""
        if key in self.whole:
            return "it runs faster whole"
        if key in self.words:
            return self.words[key](before, after)
        return f"a width of {after}, a multiple of {self.of(key)}, instead of {before}"


def check_align(align: str | int) -> None:
    """Raises InputError for what is no way to choose widths."""
    number = isinstance(align, int) and not isinstance(align, bool)
    if align not in ("none", "auto") and not (number and int(align) >= 1):
        raise InputError(
            f"align {align!r} is not known; it is 'none', 'auto', or the number that widths are multiples of"
        )


class Aligner(Planner):
    """A planner that raises widths once nothing else grows.

    Attributes:
        refused: widths that could not be raised to the multiple asked for, with the reason.
    """

    def __init__(self, analysis: Analysis, apart: set[int], alignment: Alignment) -> None:
        super().__init__(analysis, apart)
        self.alignment = alignment
        self.widths = find_widths(analysis)
        self.refused: dict[Width, str] = {}
        self._by_axis: defaultdict[Axis, list[Width]] = defaultdict(list)
        for width in self.widths:
            self._by_axis[width.tensor, width.axis].append(width)

    def start(self) -> None:
        super().start()
        if self.alignment.hosts:
            self.free = {n: dict(enumerate(map(_everywhere, kept))) for n, kept in self.kept.items()}

    def settle(self) -> bool:
        return super().settle() or self._align()

    def finish(self) -> Plan:
        plan = super().finish()
        told: set[Axis] = set()
        for width in self.widths:
            reason = self.refused.get(width)
            if reason is not None and width.key not in told:
                told.add(width.key)
                plan.unaligned.append(Cause(width.node.label, width.tensor, reason))
        return plan

    def _align(self) -> bool:
        raised = [self._raise(width) for width in self.widths if width not in self.refused]
        return any(raised)

    def _mask(self, width: Width) -> BoolArray | None:
        """What the axis keeps, None where nothing is to be raised: it is not there, or whole."""
        kept = self.kept[width.tensor][width.axis]
        if width.tensor not in self.present or not self.working(width.node) or kept is None or kept.all():
            return None
        return kept

    def _wanted(self, width: Width, kept: BoolArray) -> BoolArray | None:
        """What the axis should keep; None where the original has too few channels."""
        if width.key in self.alignment.whole:
            return np.ones_like(kept)
        multiple = self.alignment.of(width.key)
        blocks = self._blocks_of(width)
        grid = kept.reshape(blocks, -1)
        if blocks > 1 and grid.shape[1] > 1:
            used = any_along(grid, 1)
            target = _rounded(int(grid.sum(axis=1).max()), multiple)
            return level(grid, used, target).reshape(-1) if target <= grid.shape[1] else None
        count = int(kept.sum())
        target = _rounded(count, multiple)
        if target > kept.size:
            return None
        wanted: BoolArray = kept.copy()
        wanted[self._order(width, kept)[: target - count]] = True
        return wanted

    def _blocks_of(self, width: Width) -> int:
        if width.ragged is None:
            return 1
        size = self.analysis.relations[width.node.index].sizes[width.ragged]
        return self.blocks.get(width.node.index, size or 1)

    def _order(self, width: Width, kept: BoolArray) -> list[int]:
        """Dead channels, those first that constants can be folded in."""
        known = self.analysis.known.get(width.tensor)
        dead = np.flatnonzero(~kept)
        if known is None:
            return [int(i) for i in dead]
        found = known.nonzero()
        rest = tuple(a for a in range(found.ndim) if a != width.axis)
        hosts = np.broadcast_to(found.any(axis=rest), kept.shape)
        return [int(i) for i in dead[np.argsort(~hosts[dead], kind="stable")]]

    def _is_aligned(self, width: Width, without: BoolArray | None = None) -> bool:
        kept = self._mask(width)
        if kept is None:
            return True
        kept = kept if without is None else kept & ~without
        wanted = self._wanted(width, kept)
        return wanted is not None and bool((wanted == kept).all())

    def _is_round(self, width: Width) -> bool:
        """Whether a width that was raised came out as it was asked for, and not as more."""
        kept = self.kept[width.tensor][width.axis]
        return self._is_aligned(width) and kept is not None and int(kept.sum()) % self.alignment.of(width.key) == 0

    def _spoils(self, width: Width, grown: Journal) -> bool:
        """Whether a growth leaves a width odd that was not."""
        new: dict[Axis, BoolArray] = {}
        for entry in grown:
            if not isinstance(entry, str):
                axis = entry[:2]
                new[axis] = new[axis] | entry[2] if axis in new else entry[2]
        others = [other for axis in new for other in self._by_axis.get(axis, ()) if other.key != width.key]
        return any(
            not self._is_aligned(other) and self._is_aligned(other, new[other.tensor, other.axis]) for other in others
        )

    def _raise(self, width: Width) -> bool:
        kept = self._mask(width)
        if kept is None:
            return False
        before, wanted = int(kept.sum()), self._wanted(width, kept)
        if wanted is None:
            self.refused[width] = (
                f"{before} of {kept.size} channels: no multiple of {self.alignment.of(width.key)} in between"
            )
            return False
        if (wanted & ~kept).any():
            cause = Cause(width.node.label, width.tensor, self.alignment.reason(width.key, before, int(wanted.sum())))
            return self._try(width, wanted, cause)
        return False

    def _try(self, width: Width, wanted: BoolArray, cause: Cause) -> bool:
        """Grow an axis with its partners, unless that leaves one of them with another odd width."""
        self.journal = []
        self._add(width.tensor, width.axis, wanted, cause)
        self.grow()
        grown, self.journal = self.journal, None
        if width.key in self.alignment.whole or (self._is_round(width) and not self._spoils(width, grown)):
            return True
        self.undo(grown)
        self.refused[width] = "what it is coupled with grows by another number"
        return False


def _everywhere(kept: BoolArray | None) -> BoolArray:
    return np.ones(0 if kept is None else kept.size, np.bool_)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

"""What products with constant weights share: which constants leave, and where they are folded.

The weights are seen as `[group, out, in]`, whatever their layout: a convolution, a matrix product, a transposed
convolution. A *channel* below is an index `(group, in)` of the data input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxshrink.facts import Known, Line, along, uniform
from onnxshrink.pattern import Pattern
from onnxshrink.registry import Keep
from onnxshrink.view import APPENDED, Fold, View, vector
from onnxshrink.weights import Array, BoolArray, any_along

Weigh = Callable[[BoolArray], Array]


@dataclass(frozen=True, eq=False)
class Linear:
    """A product of a data input and constant weights.

    Attributes:
        view: the node.
        slot: the data input.
        axis: its channel axis.
        output_axis: channel axis of the output.
        pattern: `[group, out, in]`, where the weights are not zero (summed over a kernel); `[out, in]` of one group.
        border: whether a constant channel contributes differently near a border, so that no bias can stand for it.
        bias: whether a constant may be added to the output.
        editable: whether the weights are constant, so that columns can be added to each other.
        extend: whether a channel of ones may be appended to the data, to carry constants that no bias can.
        framed: channels of the data that hold one value but for a frame of zeros; then there is a border.
        follows: whether the rule can fold channels that follow one number; only such a rule says so by `lined`.
    """

    view: View
    slot: int
    axis: int
    output_axis: int
    pattern: BoolArray | Pattern
    border: bool
    bias: bool
    editable: bool = True
    extend: bool = False
    framed: Known | None = None
    follows: bool = False

    @property
    def line(self) -> Line | None:
        """Channels that follow one number per position, where all but one can be folded in that one and a bias."""
        line = self.view.data(self.slot).line if self.follows and self.bias else None
        return line if line is not None and line.axis == self.axis else None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return 1 if isinstance(self.pattern, Pattern) else int(self.pattern.shape[0])

    def _channels(self) -> int:
        return self.groups * int(self.pattern.shape[-1])

    def _outputs(self) -> int:
        return self.groups * int(self.pattern.shape[-2])

    def constants(self) -> tuple[BoolArray, Array]:
        """Channels that hold one known value everywhere, within a frame if there is one, and the values."""
        mask, value = self._uniform(self.view.data(self.slot).known)
        if self.framed is None:
            return mask.copy(), value
        within, inner = self._uniform(self.framed)
        return mask | within, np.where(mask, value, inner)

    def _uniform(self, known: Known) -> tuple[BoolArray, Array]:
        known = uniform(known, (a for a in range(known.mask.ndim) if a != self.axis))
        count = self._channels()
        return vector(known.mask, self.axis, count), vector(known.value, self.axis, count)

    def unknown_outputs(self, bias: Known | None) -> tuple[BoolArray, BoolArray, Array]:
        """Output channels that depend on the input; then known channels of the input and their values."""
        mask, value = self.constants()
        blocking = ~mask | ((value != 0) & self.border)
        unknown = self._reached_outputs(blocking)
        if bias is not None:
            unknown |= ~along(bias.mask.reshape(-1), 0, self._outputs())
        return unknown, mask, value

    def needed_channels(self, outputs: BoolArray) -> BoolArray:
        """Channels that reach any of the given output channels."""
        if isinstance(self.pattern, Pattern):
            return self.pattern.reached(1, outputs)
        grid = outputs.reshape(self.groups, -1, 1)
        return np.asarray((self.pattern & grid).any(axis=1).reshape(-1))

    def _reached_outputs(self, channels: BoolArray) -> BoolArray:
        if isinstance(self.pattern, Pattern):
            return self.pattern.reached(0, channels)
        grid = channels.reshape(self.groups, 1, -1)
        return np.asarray((self.pattern & grid).any(axis=2).reshape(-1))

    def live_outputs(self) -> BoolArray:
        """Output channels with a live element."""
        return self._reduced(self.view.live())

    def _reduced(self, mask: BoolArray) -> BoolArray:
        rest = tuple(a for a in range(mask.ndim) if a != self.output_axis)
        return np.array(np.broadcast_to(any_along(mask, rest), (self._outputs(),)))

    def _kept(self) -> BoolArray:
        kept = self.view.kept[self.slot][self.axis]
        assert kept is not None
        return kept

    def _leaving(self) -> tuple[BoolArray, Array]:
        """Channels that leave with a constant that the kept outputs would miss."""
        mask, value = self.constants()
        leaving = mask & (value != 0) & ~self._kept() & self.needed_channels(self._kept_outputs())
        return np.asarray(leaving), value

    def retain(self) -> list[Keep]:
        """Channels whose constant cannot be folded anywhere."""
        mask, _ = self.constants()
        wanted = self.needed_channels(self.live_outputs()) & ~mask
        wanted |= self._varying() & ~mask & self.needed_channels(self._kept_outputs())
        if self.line is not None:
            wanted &= ~self.line.others
            wanted[self.line.host] |= bool(self._following().any())
        keeps = [Keep(self.slot, self.axis, wanted, "its value is constant but not the same at every position")]
        if not self.editable:
            leaving, _ = self._leaving()
            keeps.append(Keep(self.slot, self.axis, leaving, "its constant cannot be folded: the weights are computed"))
        return keeps

    def _following(self) -> BoolArray:
        """Channels of the line that leave although kept outputs depend on them; another one stands for them."""
        assert self.line is not None
        return np.asarray(self.line.others & ~self._kept() & self.needed_channels(self._kept_outputs()))

    def _varying(self) -> BoolArray:
        """Channels with a known element other than zero."""
        operand = self.view.data(self.slot)
        found = operand.known.nonzero()
        rest = tuple(a for a in range(found.ndim) if a != self.axis)
        return np.array(np.broadcast_to(any_along(found, rest), (self._channels(),)))

    def _kept_outputs(self) -> BoolArray:
        outputs = self.view.kept[-1][self.output_axis]
        return np.ones(self._outputs(), np.bool_) if outputs is None else outputs

    def represent(self) -> list[Keep]:
        """One constant channel per block that the others can be folded in, where a bias cannot stand for them."""
        if not self.editable or (self.bias and not self.border):
            return []
        leaving, value = self._leaving()
        # A channel that costs nothing where it comes from is as good as an appended one.
        allowed = leaving & self.view.free_indices(self.slot, self.axis) if self.extend else leaving
        wanted = np.zeros_like(leaving)
        for start, stop in self._blocks(allowed):
            if not self._hosts(start, stop).any():
                candidates = np.where(allowed[start:stop], np.abs(value[start:stop].astype(np.float64)), 0.0)
                wanted[start + int(candidates.argmax())] = True
        reason = "one channel stands for all constant channels, whose effect at the border no bias can have"
        return [Keep(self.slot, self.axis, wanted, reason)]

    def _blocks(self, leaving: BoolArray) -> list[tuple[int, int]]:
        """First and last channel of the groups that lose some; joined groups count as one."""
        blocks = self.view.blocks or self.groups
        size = self._channels() // blocks
        used = leaving.reshape(blocks, -1).any(axis=1)
        return [(int(b) * size, int(b + 1) * size) for b in np.flatnonzero(used)]

    def _hosts(self, start: int, stop: int) -> BoolArray:
        """Kept channels of one block that hold a constant other than zero."""
        mask, value = self.constants()
        hosts: BoolArray = np.asarray(mask & (value != 0) & self._kept())
        hosts[:start] = False
        hosts[stop:] = False
        return hosts

    def fold(self) -> Mapping[int, Fold]:
        """The constants that leave, and where they go."""
        leaving, value = self._leaving()
        if self.line is not None and self._following().any():
            return {self.slot: self._fold_line(self.line, leaving, value)}
        indices = np.flatnonzero(leaving)
        if not indices.size:
            return {}
        values = value[indices].astype(np.float64)
        if self.bias and not self.border:
            return {self.slot: Fold(self.axis, indices, values)}
        into, scale = np.full_like(indices, APPENDED), np.ones(indices.size)
        for start, stop in self._blocks(leaving):
            hosts = self._hosts(start, stop)
            if hosts.any():
                best = int(np.where(hosts, np.abs(value.astype(np.float64)), 0.0).argmax())
                block = (indices >= start) & (indices < stop)
                into[block], scale[block] = best, float(value[best])
        return {self.slot: Fold(self.axis, indices, values, into, scale)}

    def _fold_line(self, line: Line, leaving: BoolArray, value: Array) -> Fold:
        """Constants go to the bias; of the others, a multiple of the host's channel and the rest to the bias."""
        following = self._following()
        indices = np.flatnonzero(leaving | following)
        slopes = np.where(following, line.slope, 0.0)
        rests = line.offset - line.offset[line.host] * slopes / line.slope[line.host]
        offsets = np.where(following, rests, value.astype(np.float64))[indices]
        return Fold(
            self.axis,
            indices,
            slopes[indices],
            into=np.full_like(indices, line.host),
            scale=np.full(indices.size, line.slope[line.host]),
            offsets=offsets if offsets.any() else None,
        )


def lined(linear: Linear | None) -> tuple[int, ...]:
    """The input of which channels that follow one number per position may leave."""
    return (linear.slot,) if linear is not None and linear.line is not None else ()


def collapsed(weights: Array, fold: Fold) -> Array:
    """`[out, in]` in double precision, the columns of a fold added to those that stand for them."""
    assert fold.into is not None
    assert fold.scale is not None
    whole = weights.astype(np.float64)
    np.add.at(whole.T, fold.into, (whole[:, fold.indices] * (fold.values / fold.scale)).T)
    return whole


def known_result(
    linear: Linear, bias: Known | None, weigh: Weigh, rank: int, dtype: np.dtype[np.generic]
) -> Known | None:
    """What is known of the output, one value per channel.

    `weigh` gives the weights of some channels, summed over a kernel, as `[out, channel]` in double precision, with
    zeros for channels of another group.
    """
    unknown, mask, value = linear.unknown_outputs(bias)
    if unknown.all():
        return None
    result = np.zeros(unknown.size)
    if bias is not None:
        result += along(bias.value.reshape(-1), 0, unknown.size)
    active = mask & (value != 0)
    if active.any() and not linear.border:
        result = result + weigh(active) @ value[active].astype(np.float64)
    shape = [1] * rank
    shape[linear.output_axis] = unknown.size
    return Known(~unknown.reshape(shape), np.where(unknown, 0, result).astype(dtype).reshape(shape))

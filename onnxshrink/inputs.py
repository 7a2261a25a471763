"""Random inputs that a model accepts: indices below their table's extent, masks of ones and zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from onnxshrink.errors import InputError
from onnxshrink.roles import Array, Input, Size

Feed = dict[str, Any]
Run = Callable[[Feed], list[Any]]
Axis = Literal["batch", "channel", "height", "width", "length"]


class RunError(Exception):
    """onnxruntime could not run a model on the given inputs; the message is its first line."""


class PartError(RunError):
    """onnxruntime does not take a part of a model, whatever the inputs are."""


# --------------------------------------------------------------------------------------------------- choosing sizes

# Tried in turn until the model runs: (height, width, length). Strides, windows and position tables decide what a model
# takes; 48 and 32 are what text recognisers want, 256 and up what audio front ends want, 1 what exported caches want.
_SIZES = (
    (64, 96, 7), (64, 64, 64), (96, 96, 96), (128, 128, 128), (224, 224, 256), (320, 320, 320),
    (48, 320, 512), (32, 128, 1), (256, 256, 16), (1, 1, 3000), (512, 512, 16000), (640, 640, 1024),
)  # fmt: skip
_CAPS = (10, 2, 1)  # exclusive upper bounds of integers of no known role
_AUDIO = 1024  # longer than this only for floats of rank 1 to 3: attention over 16000 positions would fill the memory


@dataclass(frozen=True)
class _Attempt:
    """One way to size the free dimensions: a row of `_SIZES`, the batch, the cap of integers, and growth per sample.

    `states`: the free axis between two fixed ones is the batch, as in the state of a recurrent layer.
    """

    row: int = 0
    batch: int = 2
    cap: int = 10
    grow_batch: int = 0
    grow: int = 0
    states: bool = False

    def axis(self, dims: tuple[Size, ...], axis: int) -> Axis:
        """What a free axis is taken for."""
        fixed = [isinstance(dim, int) for dim in dims]
        return "batch" if self.states and fixed == [True, False, True] else _axis(dims, axis)

    def size(self, axis: Axis, audio: bool) -> int:
        height, width, length = _SIZES[self.row]
        if axis == "batch":
            return self.batch + self.grow_batch
        if axis == "channel":
            return 3 if self.row % 2 == 0 else 1
        if axis == "length":
            grown = length + self.grow * (5 if self.row == 0 else 64)
            return grown if audio else min(grown, _AUDIO)
        return (height if axis == "height" else width) + 32 * self.grow


_ALL = [
    _Attempt(row, batch, cap, states=states)
    for states, row, batch, cap in sorted(
        product((False, True), range(len(_SIZES)), (2, 1), _CAPS),
        key=lambda a: (a[0], a[1] + 2 - a[2] + _CAPS.index(a[3])),
    )
]


def _grown(worked: _Attempt, sample: int) -> list[_Attempt]:
    """Attempts for a later sample: every free dimension grows, or the batch alone, or nothing."""
    options = [(sample, sample), (sample, 0), (0, 0)]
    return [replace(worked, grow_batch=batch, grow=grow) for batch, grow in options]


# A symbol's name says what it measures, more surely than its position does.
_WORDS: dict[str, Axis] = {
    "batch": "batch", "seq": "length", "len": "length", "time": "length", "frame": "length", "height": "height",
    "width": "width",
}  # fmt: skip


def _axis(dims: tuple[Size, ...], axis: int) -> Axis:
    """What a free axis probably is, from its symbol's name, the rank and the position."""
    name = str(dims[axis]).lower()
    for word, kind in _WORDS.items():
        if word in name and "#" not in name:
            return kind
    if axis == 0 and len(dims) > 1:
        return "batch"
    if len(dims) != 4:
        return "length"
    channels_last = isinstance(dims[3], int) and not isinstance(dims[1], int)
    layout: tuple[Axis, ...] = (
        ("batch", "height", "width") if channels_last else ("batch", "channel", "height", "width")
    )
    return layout[axis]


def _choose_sizes(inputs: Iterable[Input], given: Mapping[str, Array], attempt: _Attempt) -> dict[str, int]:
    """A size for every symbol: the given inputs decide first, and one symbol has one size everywhere."""
    sizes = fixed_sizes(inputs, given)
    free = [(item, axis, d) for item in inputs for axis, d in enumerate(item.dims or ()) if isinstance(d, str)]
    audio = {d for item, _, d in free if item.dtype.kind == "f" and len(item.dims or ()) <= 3}
    for item, axis, dim in free:
        if dim not in sizes and "+" not in dim:
            sizes[dim] = attempt.size(attempt.axis(item.dims or (), axis), dim in audio)
    for dim in (d for _, _, d in free if d not in sizes):  # "past + sequence": the extent of two joined axes
        parts = [part.strip() for part in dim.split("+")]
        sizes[dim] = sum(int(p) if p.isdigit() else sizes.get(p, attempt.size("length", False)) for p in parts)
    return sizes


def fixed_sizes(inputs: Iterable[Input], given: Mapping[str, Array]) -> dict[str, int]:
    """The sizes of free dimensions that the given arrays decide; raises InputError where an array does not fit."""
    sizes: dict[str, int] = {}
    known = {item.name: item for item in inputs}
    for name, array in given.items():
        item = known.get(name)
        if item is None:
            raise InputError(f"the model has no input '{name}'; its inputs are: {', '.join(known) or 'none'}")
        if array.dtype != item.dtype and not (array.dtype.kind in "UO" and item.dtype.kind == "O"):
            raise InputError(f"input '{name}' is {array.dtype}, the model wants {item.dtype}")
        if item.dims is None:
            continue
        fits = len(array.shape) == len(item.dims)
        for dim, extent in zip(item.dims, array.shape, strict=False):
            fits &= extent == (dim if isinstance(dim, int) else sizes.setdefault(dim, extent))
        if not fits:
            wanted = ", ".join(str(d) if isinstance(d, int) or "#" not in d else "?" for d in item.dims)
            raise InputError(f"input '{name}' has shape {list(array.shape)}, the model wants [{wanted}]")
    return sizes


# ----------------------------------------------------------------------------------------------------------- drawing


def _draw_one(item: Input, sizes: Mapping[str, int], cap: int, rng: np.random.Generator) -> Array:
    if item.dims is None:
        raise InputError(f"input '{item.name}' has no known rank: give it with --input {item.name}=FILE.npy")
    shape = [d if isinstance(d, int) else sizes[d] for d in item.dims]
    dtype = item.dtype
    if item.kind == "mask":
        return _mask(shape, rng).astype(dtype)
    if item.kind == "index":
        bound = item.bound if isinstance(item.bound, int) else sizes.get(item.bound, cap)
        bound = min(bound, cap) if cap < _CAPS[0] else bound
        return rng.integers(0, max(bound, 1), shape).astype(dtype)
    if item.kind == "choice":
        return _choice(item, shape, cap, rng).astype(dtype)
    if dtype.kind == "f":
        values = rng.standard_normal(shape)
        return (np.abs(values) + 0.1 if item.kind == "positive" else values).astype(dtype)
    return _plain(dtype, shape, cap, rng)


def _plain(dtype: np.dtype[Any], shape: list[int], cap: int, rng: np.random.Generator) -> Array:
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind == "O":
        return rng.choice(np.array(["a", "b", "c"], dtype=object), shape)
    if dtype == np.uint8 and len(shape) >= 3:  # an image of bytes
        return rng.integers(0, 256, shape).astype(dtype)
    # The last resort is all ones, which is what a length, a count or a factor always allows.
    return rng.integers(0, cap, shape).astype(dtype) if cap > 1 else np.ones(shape, dtype)


def _mask(shape: list[int], rng: np.random.Generator) -> Array:
    """Ones, then zeros, along the last axis; at least the first half are ones, since a row of zeros divides by zero."""
    if not shape:
        return np.ones(())
    extent = shape[-1]
    ends = rng.integers((extent + 1) // 2, extent + 1, [*shape[:-1], 1])
    return np.arange(extent) < ends


def _choice(item: Input, shape: list[int], cap: int, rng: np.random.Generator) -> Array:
    """Values that the model compares with: a lone one as it is (a sample rate), else among them and a few others."""
    if np.prod(shape) == 1:
        return np.full(shape, item.values[0])
    others = () if len(set(item.values)) > 1 else tuple(range(cap))
    return rng.choice(np.array([*item.values, *others]), shape)


def _draw(inputs: list[Input], given: Mapping[str, Array], attempt: _Attempt, rng: np.random.Generator) -> Feed:
    sizes = _choose_sizes(inputs, given, attempt)
    feed: Feed = {}
    for item in inputs:
        if item.name in given:
            feed[item.name] = given[item.name]
        else:
            drawn = [_draw_one(item, sizes, attempt.cap, rng) for _ in range(2 if item.wrapper == "sequence" else 1)]
            feed[item.name] = drawn if item.wrapper == "sequence" else drawn[0]
    return feed


def draw_runnable(
    inputs: list[Input], given: Mapping[str, Array], run: Run, samples: int, seed: int, label: str = "reference"
) -> list[tuple[Feed, list[Any]]]:
    """Input sets that `run` accepts (it raises RunError where not), each with its outputs; free dimensions vary.

    Raises InputError, which calls the model by `label`, when no drawn size or value is accepted.
    """
    results: list[tuple[Feed, list[Any]]] = []
    worked: _Attempt | None = None
    for sample in range(samples):
        attempts = _ALL if worked is None else _grown(worked, sample)
        feed, outputs, used = _first_accepted(inputs, given, run, attempts, [seed, sample], label)
        worked = worked or used
        results.append((feed, outputs))
    return results


def _first_accepted(
    inputs: list[Input], given: Mapping[str, Array], run: Run, attempts: list[_Attempt], seed: list[int], label: str
) -> tuple[Feed, list[Any], _Attempt]:
    failure, tried = "", set()
    capped = any(item.name not in given and item.dtype.kind in "iu" and item.kind != "mask" for item in inputs)
    for attempt in attempts:
        key = (tuple(sorted(_choose_sizes(inputs, given, attempt).items())), attempt.cap if capped else 0)
        if key in tried:
            continue
        tried.add(key)
        feed = _draw(inputs, given, attempt, np.random.default_rng(seed))
        try:
            return feed, run(feed), attempt
        except PartError:
            raise
        except RunError as error:
            failure = failure or str(error)
    free = [item.name for item in inputs if item.name not in given]
    if not free:
        raise InputError(f"the {label} model does not run on the given inputs: {failure}")
    advice = " ".join(f"--input {name}=FILE.npy" for name in free)
    raise InputError(f"no random input runs through the {label} model; pass {advice} (onnxruntime: {failure})")

"""What several commands share: options, arrays from files, the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Timer
from typing import TYPE_CHECKING

from onnxshrink.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxshrink.weights import Array

_PATIENCE = 1.0  # seconds without a sign of progress


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The options that say what a model is run on."""
    parser.add_argument(
        "--input",
        metavar="NAME=FILE.npy",
        action="append",
        default=[],
        dest="inputs",
        help="values of one input for the comparison; others are drawn at random (repeatable)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the random inputs (0)")


def add_masks(parser: argparse.ArgumentParser) -> None:
    """The options that say which weights count as zero."""
    parser.add_argument(
        "--masks", metavar="FILE", help="0/1 arrays by weight name: .npz, .pt, .pth or .safetensors; applied first"
    )
    parser.add_argument(
        "--zero-tolerance", metavar="T", type=float, default=0.0, help="weights up to T count as zero (0); lossy"
    )


def add_widths(parser: argparse.ArgumentParser) -> None:
    """The options that say how wide layers become."""
    parser.add_argument(
        "--align",
        metavar="none|auto|N",
        type=_align,
        default="auto",
        help="widths: the fewest parameters, what runs fastest here (the default), or multiples of N",
    )
    parser.add_argument("--no-timing", action="store_true", help="choose the fastest form by a cost model alone")


def _align(text: str) -> str | int:
    if text in ("none", "auto"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be none, auto, or a number from 1, not {text!r}")
    return int(text)


def read_inputs(given: Sequence[str]) -> Mapping[str, Array]:
    """`NAME=FILE.npy`, several times, as arrays by name. Raises InputError."""
    inputs: dict[str, Array] = {}
    for text in given:
        name, separator, path = text.rpartition("=")
        if not separator or not name or not path:
            raise InputError(f"--input {text}: must be NAME=FILE.npy")
        if name in inputs:
            raise InputError(f"--input {name}: is given twice")
        inputs[name] = _read_array(name, path)
    return inputs


def _read_array(name: str, path: str) -> Array:
    import numpy as np

    try:
        with open(path, "rb") as file:
            value = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"--input {name}: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"--input {name}: {path} is not a .npy file") from error
    if not isinstance(value, np.ndarray):
        raise InputError(f"--input {name}: {path} holds several arrays; save one with numpy.save")
    return value


def make_console() -> Console:
    """Where results are printed."""
    from rich.console import Console

    return Console(soft_wrap=False, highlight=False)


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line on the terminal that names the step, once it takes long enough to wonder."""
    if quiet or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console

    status = Console(stderr=True).status("starting")
    timer = Timer(_PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda name: status.update(f"{name} ...")
    finally:
        timer.cancel()
        timer.join()
        status.stop()

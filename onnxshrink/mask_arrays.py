"""Masks as arrays: checked, and named in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np

from onnxshrink.errors import MaskError


def kept_elements(name: str, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Check a 0/1 mask against the shape of its weight, and return it as bool: True where the weight stays.

    Raises MaskError, naming the mask, for another shape and for values other than 0 and 1.
    """
    if mask.shape != shape:
        raise MaskError(f"mask {name!r} has shape {list(mask.shape)}, its weight has {list(shape)}")
    if mask.dtype == np.bool_:
        return mask
    try:
        kept = np.asarray(mask == 1, dtype=np.bool_)
        other = ~(kept | np.asarray(mask == 0, dtype=np.bool_))
    except (TypeError, ValueError) as error:
        raise MaskError(f"mask {name!r} holds {mask.dtype} values; a mask holds only 0 and 1") from error
    if other.any():
        raise MaskError(f"mask {name!r} holds {mask[other].flat[0]!s}; a mask holds only 0 and 1")
    return kept


def near_names(name: str, names: Iterable[str]) -> str:
    """The end of an error message: up to three of `names` that look like `name`, or nothing."""
    near = difflib.get_close_matches(name, sorted(names), n=3)
    return f"; near names: {', '.join(map(repr, near))}" if near else ""

"""The collector of reference cycles, and when it does not help."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No search for reference cycles meanwhile; also a decorator.

    What makes many small objects that stay, and no cycles, is searched through again and again: of a graph of 10,000
    nodes that takes a fifth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

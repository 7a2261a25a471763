"""Peaks of resident memory: how much loading a model, and running it, adds to a process."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Peaks of the resident memory of a process, in bytes beyond what it held before it loaded the model.

    Attributes:
        loading: while the session was made.
        running: while the model ran; where the system cannot tell that apart, of loading and running.
    """

    loading: int
    running: int


@dataclass(frozen=True)
class OnDisk:
    """A model file that onnxruntime loads by itself, so that nothing else of it is in memory."""

    path: str

    def load(self, options: Any, exposed: Sequence[str]) -> Any:
        """The session."""
        import onnxruntime

        return onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])


def peaks(load: Callable[[], Callable[[], object]]) -> Memory | None:
    """What it takes to `load` something, and then to run what that gave. None where the system does not say.

    To be called in a process that has done little else: memory that was freed may be used again unseen.
    """
    gc.collect()
    _forget_peak()
    before = _resident()
    if before is None:
        return None
    run = load()
    loading = _peak() - before
    _forget_peak()
    run()
    return Memory(max(loading, 0), max(_peak() - before, 0))


def _forget_peak() -> None:
    """Let the peak start anew from what is resident now; Linux can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _field(name: str) -> int | None:
    """Bytes, from the process's status."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    return None if found is None else int(found[1]) * 1024


def _resident() -> int | None:
    """What is resident now; elsewhere than on Linux the peak so far, which only grows."""
    return _field("VmRSS") or _usage()


def _peak() -> int:
    return _field("VmHWM") or _usage() or 0


def _usage() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""Peaks of memory, in this process: arrays of known size."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

from onnxshrink.bench.memory import peaks

MEGABYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak never falls, and tests have run before")
def test_loading_and_running_have_a_peak_each() -> None:
    held = []

    def load() -> Callable[[], object]:
        np.ones(60 * MEGABYTE, np.uint8)  # needed only while loading
        held.append(np.ones(20 * MEGABYTE, np.uint8))
        return lambda: np.ones(30 * MEGABYTE, np.uint8)

    found = peaks(load)
    assert found is not None
    assert found.loading / MEGABYTE == pytest.approx(60, abs=5)
    assert found.running / MEGABYTE == pytest.approx(50, abs=5)

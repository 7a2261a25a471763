"""Inputs in a file: as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxshrink.bench.feeds import read_feed, write_feed


def test_inputs_come_back_as_they_were(tmp_path: Path) -> None:
    feed = {
        "a/b": np.arange(6, dtype=np.int64).reshape(2, 3),
        "list": [np.ones(2, np.float16), np.zeros((1, 2), np.float16)],
        "text": np.array(["x", "yz"], object),
        "number": np.array(3.0),
    }
    write_feed(feed, tmp_path / "feed")
    found = read_feed(tmp_path / "feed")
    assert list(found) == list(feed)
    np.testing.assert_array_equal(found["a/b"], feed["a/b"], strict=True)
    np.testing.assert_array_equal(found["number"], feed["number"], strict=True)
    assert [part.shape for part in found["list"]] == [(2,), (1, 2)]
    assert found["list"][0].dtype == np.float16
    assert found["text"].tolist() == ["x", "yz"]

"""What is measured of some models, each task in a process of its own: the caller's side."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from onnxshrink.bench.denormals import Denormals
from onnxshrink.bench.feeds import read_feed, write_feed
from onnxshrink.bench.memory import Memory
from onnxshrink.bench.operators import NodeTime
from onnxshrink.errors import InputError, OnnxshrinkError
from onnxshrink.graph import ModelLike
from onnxshrink.processes import python_command
from onnxshrink.runtime import Model
from onnxshrink.weights import Array

_ORDINALS = ("first", "second", "third")


def ordinal(index: int) -> str:
    """What messages call a model."""
    return _ORDINALS[index] if index < len(_ORDINALS) else f"{index + 1}th"


class Tasks:
    """Some models on disk, the inputs that they are run on, and the tasks that a worker carries out on them.

    Args:
        models: paths or `ModelProto`s; the latter are written to a temporary folder.
        given: input arrays by name.
        threads: how many threads one operator may use.
        seed: of the inputs that are not given.

    Raises InputError when a model cannot be read or an option is out of range.
    """

    def __init__(self, models: Sequence[ModelLike], given: Mapping[str, Array], threads: int, seed: int) -> None:
        if threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        if not models:
            raise InputError("there is no model to measure")
        self._kept = tempfile.TemporaryDirectory(prefix="onnxshrink-")
        self._folder = Path(self._kept.name)
        try:
            paths = [self._on_disk(model, index) for index, model in enumerate(models)]
            write_feed(given, self._folder / "given")
        except BaseException:
            self._kept.cleanup()
            raise
        self._job = {"models": [str(path.resolve()) for path in paths], "threads": threads, "seed": seed}

    def __enter__(self) -> Tasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._kept.cleanup()

    def _on_disk(self, source: ModelLike, index: int) -> Path:
        return Model(source, ordinal(index), self._folder / str(index)).on_disk()

    def time(self, seconds: float, rounds: int | None) -> list[Array]:
        """Per model, its latency in each round, in seconds."""
        if not (seconds > 0 and math.isfinite(seconds)):
            raise InputError(f"seconds must be more than 0, not {seconds}")
        if rounds is not None and rounds < 1:
            raise InputError(f"rounds must be at least 1, not {rounds}")
        return [np.array(taken) for taken in self._run("time", seconds=seconds, rounds=rounds)]

    def profile(self, seconds: float, rounds: int | None) -> list[list[NodeTime]]:
        """Per model, the time of each node."""
        return [[NodeTime(**node) for node in nodes] for nodes in self._run("profile", seconds=seconds, rounds=rounds)]

    def inspect(self, index: int) -> tuple[Memory | None, Denormals]:
        """What one model takes of memory (None where the system does not say), and its denormal numbers.

        Once it is known what it is run on.
        """
        found = self._run("inspect", index=index)
        memory = None if found["memory"] is None else Memory(**found["memory"])
        return memory, Denormals(**found["denormals"])

    def inputs(self) -> dict[str, str]:
        """What the models are run on: the type and shape of each input. Once that is known."""
        return {name: _describe(value) for name, value in read_feed(self._folder / "feed").items()}

    def _run(self, task: str, **options: Any) -> Any:
        """What a worker finds out. Raises what the worker raised."""
        job, result = self._folder / "job.json", self._folder / "result.json"
        job.write_text(json.dumps({**self._job, **options, "task": task, "folder": str(self._folder)}))
        result.unlink(missing_ok=True)
        command = python_command("onnxshrink.bench.worker", str(job), str(result))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if not result.is_file():
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise OnnxshrinkError(f"the process that runs the models ended with code {done.returncode}: {last}")
        found = json.loads(result.read_text())
        if "error" in found:
            raise (InputError if found["usage"] else OnnxshrinkError)(found["error"])
        return found["value"]


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_describe, value))}]"
    extents = ", ".join(map(str, value.shape))
    return f"{'text' if value.dtype.kind == 'U' else value.dtype}[{extents}]"

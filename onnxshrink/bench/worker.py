"""What is measured of some models, each task in a process of its own: the worker's side.

`python -m onnxshrink.bench.worker JOB.json RESULT.json`
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnxshrink.bench.denormals import count_denormals
from onnxshrink.bench.feeds import read_feed, write_feed
from onnxshrink.bench.memory import OnDisk, peaks
from onnxshrink.bench.operators import read_profile
from onnxshrink.bench.tasks import ordinal
from onnxshrink.bench.turns import in_turns
from onnxshrink.errors import InputError, OnnxshrinkError
from onnxshrink.inputs import Feed, RunError, draw_runnable, fixed_sizes
from onnxshrink.roles import describe
from onnxshrink.runtime import Loadable, LoadError, Model, Session

# The first session of a process decides for its main thread, and each session for the threads of its own.
FLUSH = {"session.set_denormal_as_zero": "1"}
_UNCOUNTED = 4  # runs before the first turn


@dataclass(frozen=True)
class Job:
    """What a worker is to do; the fields are those of `Tasks`."""

    models: list[str]
    threads: int
    seed: int
    folder: Path
    options: dict[str, Any]

    def model(self, index: int) -> Model:
        """One of the models."""
        return Model(self.models[index], ordinal(index), self.folder / f"worker-{index}")

    def session(self, index: int, model: Loadable | None = None, **options: Any) -> Session:
        """One of the models, loaded from its file or from `model`."""
        try:
            return Session(self.model(index) if model is None else model, threads=self.threads, **options)
        except RunError as error:
            label = ordinal(index)
            raise LoadError(f"the {label} model does not load in onnxruntime ({error})", label) from error

    def feed(self, session: Session) -> Feed:
        """Inputs that the first model, loaded in `session`, accepts: drawn once, then the same for every task."""
        stored = self.folder / "feed"
        if not stored.is_dir():
            described, given = describe(self.model(0).light), read_feed(self.folder / "given")
            fixed_sizes(described, given)
            write_feed(draw_runnable(described, given, session.run, 1, self.seed, ordinal(0))[0][0], stored)
        return read_feed(stored)


def _time(job: Job) -> list[list[float]]:
    """Seconds per model and round."""
    sessions = [job.session(index, entries=FLUSH) for index in range(len(job.models))]
    feed = job.feed(sessions[0])
    _check_inputs(sessions, feed)
    samples = in_turns([session.prepare(feed) for session in sessions], job.options["seconds"], job.options["rounds"])
    return [taken.tolist() for taken in samples]


def _profile(job: Job) -> list[list[dict[str, Any]]]:
    """Per model, the time of each node."""
    count = range(len(job.models))
    sessions = [job.session(index, entries=FLUSH, profile=job.folder / f"profile-{index}") for index in count]
    feed = job.feed(sessions[0])
    _check_inputs(sessions, feed)
    in_turns([session.prepare(feed) for session in sessions], job.options["seconds"], job.options["rounds"])
    files = [session.end_profile() for session in sessions]
    graphs = [job.model(index).light.graph for index in count]
    return [
        [asdict(node) for node in read_profile(file, graph, _UNCOUNTED)]
        for file, graph in zip(files, graphs, strict=True)
    ]


def _inspect(job: Job) -> dict[str, Any]:
    """Peaks of memory and denormal numbers of one model, in this order, in a process that does not flush the latter."""
    import onnxruntime  # noqa: F401 - its own memory is no model's

    index, feed = job.options["index"], read_feed(job.folder / "feed")

    def load() -> Callable[[], object]:
        return job.session(index, OnDisk(job.models[index])).prepare(feed)

    found = peaks(load)
    denormals = count_denormals(job.models[index], job.model(index), feed)
    return {"memory": None if found is None else asdict(found), "denormals": asdict(denormals)}


def _check_inputs(sessions: list[Session], feed: Feed) -> None:
    """Run each model once. Raises InputError where one does not take the inputs of the first."""
    for index, session in enumerate(sessions):
        try:
            session.run(feed)
        except RunError as error:
            message = f"the {ordinal(index)} model does not run on the inputs of the first: {error}"
            raise InputError(message) from error


_TASKS: dict[str, Callable[[Job], Any]] = {"time": _time, "profile": _profile, "inspect": _inspect}


def main(job_file: str, result_file: str) -> None:
    """Carry out one task and write what it finds out, or why it cannot."""
    warnings.simplefilter("ignore")
    options = json.loads(Path(job_file).read_text())
    task, folder = options.pop("task"), Path(options.pop("folder"))
    job = Job(options.pop("models"), options.pop("threads"), options.pop("seed"), folder, options)
    result: dict[str, Any]
    try:
        result = {"value": _TASKS[task](job)}
    except OnnxshrinkError as error:
        result = {"error": str(error), "usage": isinstance(error, InputError)}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

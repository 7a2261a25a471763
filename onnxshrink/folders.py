"""All models of a folder, each shrunk in a process of its own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnxshrink.errors import InputError
from onnxshrink.jobs import Finished, run_jobs
from onnxshrink.processes import python_command
from onnxshrink.save import sweep

_PREFIX = "onnxshrink: error: "


@dataclass(frozen=True)
class Outcome:
    """What became of one model.

    Attributes:
        model: its path below the folder, which is that of its result below the other folder too.
        exit_code: of the command line for this model alone; negative: the signal that killed its process.
        seconds: how long it took.
        error: why it failed, in one line; None where it did not.
        report: the report, as `--report` writes it; None where it failed.
    """

    model: str
    exit_code: int
    seconds: float
    error: str | None = None
    report: dict[str, Any] | None = None


def shrink_folder(
    folder: Path, output: Path, options: Sequence[str], jobs: int, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """Shrink every `*.onnx` file in a folder and the folders in it, `jobs` at a time.

    Args:
        folder: where the models are. Models below `output`, where that is another folder inside it, are results.
        output: where the results go, under the same names; it is made if need be. It may be `folder` itself.
        options: of `onnxshrink shrink`, the same for every model.
        jobs: how many models at a time.
        tell: called with the outcome of each model as it is known.

    Returns:
        The outcomes in order of the models' names. A model that fails, or whose process dies, keeps no other from
        being shrunk, and what was in its result's place is untouched.

    Raises InputError when there is no model or the output cannot be written.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, not {jobs}")
    models = find_models(folder, output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output}: is not a folder, and {folder} is one")
    made: list[Path] = []
    try:
        made += _make_folder(output)
        # The largest first: the last to end is then a short one.
        order = sorted(models, key=lambda model: -(folder / model).stat().st_size)
        with tempfile.TemporaryDirectory(prefix="onnxshrink-") as reports:
            batch = _Batch(folder, output, options, Path(reports), order, made, tell)
            batch.run(jobs)
            return sorted(batch.outcomes, key=lambda outcome: outcome.model)
    finally:
        _remove_empty(made)


def find_models(folder: Path, output: Path) -> list[Path]:
    """Every `*.onnx` file below a folder, relative to it, but for results. Raises InputError where there is none."""
    root, results = Path(os.path.realpath(folder)), Path(os.path.realpath(output))
    found = [path for path in sorted(root.rglob("*.onnx")) if path.is_file()]
    if results != root:
        found = [path for path in found if not path.is_relative_to(results)]
    if not found:
        raise InputError(f"{folder}: not a file, and a folder without any *.onnx file")
    return [path.relative_to(root) for path in found]


def _make_folder(path: Path) -> Iterator[Path]:
    """Make a folder and those that it lies in; those that were not there before, outermost first. Raises InputError."""
    missing = [path, *path.parents]
    for parent in reversed(missing[: next(i for i, parent in enumerate(missing) if parent.exists())]):
        try:
            parent.mkdir()
        except OSError as error:
            raise InputError(f"output {path}: cannot be made: {error.strerror or error}") from error
        yield parent


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were made for results that did not come."""
    for folder in reversed(folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class _Batch:
    """The models of a folder while they are being shrunk."""

    def __init__(
        self,
        folder: Path,
        output: Path,
        options: Sequence[str],
        reports: Path,
        models: Sequence[Path],
        made: list[Path],
        tell: Callable[[Outcome], None],
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._folder = folder
        self._output = output
        self._options = options
        self._reports = reports
        self._models = models
        self._made = made
        self._tell = tell

    def run(self, jobs: int) -> None:
        """Shrink them all."""
        run_jobs([self._command(index) for index in range(len(self._models))], jobs, self._start, self._end)

    def _command(self, index: int) -> list[str]:
        model = self._models[index]
        paths = ["-o", str(self._output / model), "--report", str(self._report(index)), "-q"]
        return python_command("onnxshrink", "shrink", str(self._folder / model), *paths, *self._options)

    def _report(self, index: int) -> Path:
        return self._reports / f"{index}.json"

    def _start(self, index: int) -> None:
        self._made += _make_folder((self._output / self._models[index]).parent)

    def _end(self, index: int, finished: Finished) -> None:
        model, report = self._models[index], self._report(index)
        if finished.code == 0:
            outcome = Outcome(model.as_posix(), 0, finished.seconds, None, json.loads(report.read_text()))
        else:
            if finished.code < 0:
                sweep(self._output / model)
            reason = finished.reason().removeprefix(_PREFIX)
            outcome = Outcome(model.as_posix(), finished.code, finished.seconds, reason)
        self.outcomes.append(outcome)
        self._tell(outcome)


def to_json(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as JSON."""
    return json.dumps({"models": [asdict(outcome) for outcome in outcomes]}, indent=2, ensure_ascii=False) + "\n"

"""Commands as processes, some at a time; one that dies takes no other with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

_PAUSE = 0.02  # seconds between two looks at the processes
_PATIENCE = 20.0  # seconds that processes have to clean up once they are told to stop
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Finished:
    """How a process ended.

    Attributes:
        code: its exit code; minus the number of the signal that killed it.
        error: what it wrote to its standard error.
        seconds: how long it ran.
    """

    code: int
    error: str
    seconds: float

    def reason(self) -> str:
        """One line that says why a process failed: the last one that it wrote, or which signal killed it."""
        if self.code < 0:
            try:
                name = signal.Signals(-self.code).name
            except ValueError:
                name = f"signal {-self.code}"
            return f"the process was killed by {name}" + (", out of memory perhaps" if name == "SIGKILL" else "")
        lines = self.error.strip().splitlines()
        return lines[-1] if lines else f"the process ended with code {self.code}"


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    error: IO[bytes]
    start: float

    def finished(self) -> Finished:
        self.error.seek(0)
        text = self.error.read().decode(errors="replace")
        self.error.close()
        return Finished(self.process.returncode, text, time.perf_counter() - self.start)


def run_jobs(
    commands: Sequence[Sequence[str]],
    most: int,
    started: Callable[[int], None],
    ended: Callable[[int, Finished], None],
) -> None:
    """Run every command, `most` at a time, each with one thread for arithmetic.

    Args:
        commands: programs with their arguments.
        most: how many run at once.
        started: called with the index of each command before it starts.
        ended: called with the index of each command that has ended, and how.

    When this is interrupted, by whatever exception, all processes are told to stop, have time to clean up, and have
    ended before it returns; `ended` is called for those too.
    """
    waiting = deque(range(len(commands)))
    running: dict[int, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                index = waiting.popleft()
                started(index)
                running[index] = _start(commands[index])
            for index in _over(running):
                ended(index, running.pop(index).finished())
            time.sleep(_PAUSE)
    finally:
        try:
            _stop([job.process for job in running.values()])
        finally:
            for index, job in running.items():
                ended(index, job.finished())


def _start(command: Sequence[str]) -> _Running:
    # A group of its own: an interrupt from the terminal then comes to this process alone, which tells the others once.
    # Told twice, they could be interrupted while they clean up.
    error = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
    environment = dict.fromkeys(_ONE_THREAD, "1") | os.environ
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=error,
        env=environment,
        start_new_session=True,
    )
    return _Running(process, error, time.perf_counter())


def _over(running: dict[int, _Running]) -> Iterator[int]:
    yield from [index for index, job in running.items() if job.process.poll() is not None]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell processes to stop, and kill those that have not after a while, or when that is interrupted too."""
    try:
        for process in processes:
            process.terminate()
        limit = time.monotonic() + _PATIENCE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()

"""Processes, some at a time: how each ended, and that none is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from onnxshrink.jobs import Finished, run_jobs


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def run(commands: list[list[str]], most: int = 2) -> dict[int, Finished]:
    found: dict[int, Finished] = {}
    run_jobs(commands, most, lambda index: None, found.__setitem__)
    return found


def test_every_end_is_told() -> None:
    found = run(
        [
            python("pass"),
            python("import sys; print('first', file=sys.stderr); sys.exit('the last\\n')"),
            python("import os; os.kill(os.getpid(), 9)"),
            python("import os; os.kill(os.getpid(), 11)"),
            python("import sys; sys.exit(7)"),
        ]
    )
    assert {index: finished.code for index, finished in found.items()} == {0: 0, 1: 1, 2: -9, 3: -11, 4: 7}
    assert {index: finished.reason() for index, finished in found.items() if index} == {
        1: "the last",
        2: "the process was killed by SIGKILL, out of memory perhaps",
        3: "the process was killed by SIGSEGV",
        4: "the process ended with code 7",
    }
    assert all(finished.seconds > 0 for finished in found.values())


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_run_at_once(most: int, tmp_path: Path) -> None:
    code = f"""
import os, time
name = {str(tmp_path)!r} + '/' + str(os.getpid())
open(name, 'x').close()
seen = len(os.listdir({str(tmp_path)!r}))
while seen < {most}:
    seen = max(seen, len(os.listdir({str(tmp_path)!r})))
    time.sleep(0.01)
time.sleep(0.1)
seen = max(seen, len(os.listdir({str(tmp_path)!r})))
os.unlink(name)
os._exit(seen)
"""
    found = run([python(code)] * most, most)
    assert [finished.code for finished in found.values()] == [most] * most


def test_they_start_in_order() -> None:
    started: list[int] = []
    run_jobs([python("pass")] * 4, 2, started.append, lambda index, finished: None)
    assert started == [0, 1, 2, 3]


def test_arithmetic_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")  # the user's word counts
    code = "import os; os._exit(int(os.environ['OMP_NUM_THREADS'] + os.environ['OPENBLAS_NUM_THREADS']))"
    assert run([python(code)])[0].code == 13


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({path!r}, 'x').close()
time.sleep(60)
"""
TIDY = """
import signal, sys, time
def stop(*args):
    time.sleep(0.2)
    open({path!r} + '.tidy', 'x').close()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
open({path!r}, 'x').close()
time.sleep(60)
"""


def interrupt(monkeypatch: pytest.MonkeyPatch, paths: list[str], times: int) -> None:
    """Interrupt this process, once those files are there, as often as that."""
    sleep, left = time.sleep, [KeyboardInterrupt() for _ in range(times)]

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if left and all(map(os.path.exists, paths)):
            raise left.pop()

    monkeypatch.setattr(time, "sleep", interrupted)


@pytest.mark.parametrize(
    ("code", "times", "ends"),
    [(TIDY, 1, 130), (STUBBORN, 1, -signal.SIGKILL), (STUBBORN, 2, -signal.SIGKILL)],
    ids=["tidy", "stubborn", "interrupted twice"],
)
def test_an_interrupt_stops_all_of_them(
    code: str, times: int, ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the second of three would wait so long.
    monkeypatch.setattr("onnxshrink.jobs._PATIENCE", 0.2 if (times, ends) == (1, -signal.SIGKILL) else 60.0)
    paths = [str(tmp_path / name) for name in "abc"]
    interrupt(monkeypatch, paths[:2], times)
    found: dict[int, Finished] = {}
    with pytest.raises(KeyboardInterrupt):
        run_jobs([python(code.format(path=path)) for path in paths], 2, lambda index: None, found.__setitem__)
    assert {index: finished.code for index, finished in found.items()} == {0: ends, 1: ends}  # the third never began
    assert [os.path.exists(path + ".tidy") for path in paths] == [ends == 130, ends == 130, False]

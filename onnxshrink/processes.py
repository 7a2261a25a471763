"""Processes of one's own: another Python that finds the same modules."""

from __future__ import annotations

import os
import sys


def python_command(module: str, *words: str) -> list[str]:
    """How to run a module as a program in a process of its own, with the module path of this one.

    As `python -m` does, but the working folder is searched for modules only where it is searched here.
    """
    paths = [os.path.abspath(path) for path in sys.path if isinstance(path, str)]
    start = (
        f"import runpy, sys; sys.path[:] = {paths!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", start, *words]

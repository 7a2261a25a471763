"""Time and memory of onnxshrink itself: `python tools/bench.py --own [--smoke] [--gigabytes G]`.

- `shrink` (without verification, fewest parameters) by `onnx.load` and `onnx.save` of the same file: in one process,
  and as processes of their own, where starting up counts;
- deep graphs of small layers: seconds by the number of nodes;
- weights in a file of their own: `shrink`, with and without verification, by `cp` of the files, with and without
  waiting for the disk; the most memory that was resident;
- where the time goes: the functions that take the most of it themselves.

What is compared runs in turns; figures are medians. Outputs are new files each time, inputs are in the system's cache.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
from _drawing import FULL, SMOKE, draw
from _timing import in_turns
from make_large import Encoder, bert, convolutional, deep_transformer, encoder, wide, write_external
from rich.console import Console
from rich.table import Table

from onnxshrink import shrink

_COPY = "import sys, onnx; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"
# The command line; then the most bytes that were resident. VmHWM starts anew with the program, unlike ru_maxrss.
_COMMAND = """
import re, sys
from onnxshrink.cli import main
code = main(sys.argv[1:])
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
sys.exit(code)
"""
FEWEST = ("--no-verify", "--align", "none")
_TOP = 12  # functions in a profile


def copy(path: Path, output: Path) -> None:
    """What cannot be avoided: reading and writing the file."""
    output.unlink(missing_ok=True)
    onnx.save(onnx.load(path), output)


def shrink_file(path: Path, output: Path) -> None:
    """Read, shrink, write."""
    output.unlink(missing_ok=True)
    shrink(path, output=output, verify=False, align="none")


def copy_process(path: Path, output: Path) -> None:
    """`copy` in a process of its own."""
    output.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-c", _COPY, path, output], check=True)


def command(path: Path, output: Path, options: tuple[str, ...], peaks: list[int]) -> None:
    """`onnxshrink shrink` in a process of its own; the most bytes that it held are added to `peaks`."""
    for old in output.parent.glob(f"{output.name}*"):
        old.unlink()
    words = ["shrink", str(path), "-o", str(output), "-q", *options]
    done = subprocess.run([sys.executable, "-c", _COMMAND, *words], stdout=subprocess.PIPE, text=True, check=True)
    peaks.append(int(done.stdout))


# --- what is measured ----------------------------------------------------------------------------------------------


def files(smoke: bool) -> dict[str, Callable[[], onnx.ModelProto]]:
    """Models in one file."""
    if smoke:
        return {
            SMOKE[1].name: lambda: draw(SMOKE[1], by_hand=False),
            "encoder": lambda: encoder(Encoder(1, 64, 4, 256, 500)),
        }
    return {FULL[1].name: lambda: draw(FULL[1], by_hand=False), "BERT-large, 6 layers": bert}


def make_file_table(smoke: bool, folder: Path) -> Table:
    """Shrinking by loading and saving; one row per model."""
    table = Table(title="shrink by load + save, of one file")
    for heading in (
        "",
        "file, MB",
        "load + save, s",
        "shrink, s",
        "ratio",
        "as processes, s",
        "",
        "ratio",
        "MB at most",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    rounds = 2 if smoke else 7
    for name, make in files(smoke).items():
        path, output = folder / "model.onnx", folder / "out.onnx"
        onnx.save(make(), path)
        inside = in_turns([partial(copy, path, output), partial(shrink_file, path, output)], rounds)
        peaks: list[int] = []
        processes = [partial(copy_process, path, output), partial(command, path, output, FEWEST, peaks)]
        apart = in_turns(processes, rounds)
        table.add_row(
            name,
            f"{path.stat().st_size / 1e6:.1f}",
            *(f"{seconds:.3f}" for seconds in inside),
            f"{inside[1] / inside[0]:.2f}",
            *(f"{seconds:.3f}" for seconds in apart),
            f"{apart[1] / apart[0]:.2f}",
            f"{max(peaks) / 1e6:.0f}",
        )
    return table


def make_node_table(smoke: bool, folder: Path) -> Table:
    """Deep graphs; one row per kind and number of nodes."""
    table = Table(title="shrink, deep graphs of small layers")
    for heading in ("", "nodes", "seconds", "ms per node"):
        table.add_column(heading, justify="right" if heading else "left")
    makers = {"residual convolutions": convolutional, "transformer": deep_transformer}
    for name, make in makers.items():
        for nodes in (50, 150) if smoke else (2_500, 5_000, 10_000):
            path = folder / "model.onnx"
            model = make(nodes)
            onnx.save(model, path)
            (seconds,) = in_turns([partial(shrink_file, path, folder / "out.onnx")], 1)
            count = len(model.graph.node)
            table.add_row(name, f"{count:,}", f"{seconds:.2f}", f"{1e3 * seconds / count:.2f}")
    return table


@dataclass(frozen=True)
class External:
    """A model whose weights lie in a file of their own, and a folder for what is made of it."""

    path: Path
    folder: Path

    def copy(self) -> None:
        """`cp` of both files."""
        subprocess.run(["cp", *self.path.parent.glob(f"{self.path.name}*"), self.folder], check=True)

    def synced(self, work: Callable[[], object]) -> None:
        """Some work, and all of it on disk."""
        work()
        for file in self.folder.iterdir():
            with file.open("rb") as written:
                os.fsync(written)

    def warm(self) -> None:
        """Nothing is left of earlier runs, and the model is in the system's cache."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        os.sync()
        for file in self.path.parent.glob(f"{self.path.name}*"):
            with file.open("rb") as read:
                while read.read(1 << 22):
                    pass


def make_external_table(smoke: bool, folder: Path, gigabytes: float) -> Table:
    """Shrinking by `cp`; one row per way to do it."""
    folders = [folder / name for name in ("in", "out")]
    for made in folders:
        made.mkdir()
    model = External(folders[0] / "model.onnx", folders[1])
    shape = Encoder(2, 128, 4, 512, 1000) if smoke else wide(gigabytes)
    size = write_external(model.path, shape)
    peaks: dict[str, list[int]] = {"shrink --no-verify --align none": [], "shrink --align none": []}
    works: dict[str, Callable[[], None]] = {"cp": model.copy}
    for words, found in peaks.items():
        works[words] = partial(command, model.path, model.folder / "out.onnx", tuple(words.split()[1:]), found)
    calls: list[Callable[[], None]] = []
    for work in works.values():
        calls += [model.warm, work, model.warm, partial(model.synced, work)]
    taken = in_turns(calls, 1 if smoke else 3)
    table = Table(title=f"{size / 1e9:.2f} GB of weights in a file of their own")
    for heading in ("", "seconds", "by cp", "with the disk, s", "by cp", "MB at most"):
        table.add_column(heading, justify="right" if heading else "left")
    for number, name in enumerate(works):
        seconds, synced = taken[4 * number + 1], taken[4 * number + 3]
        ratios = seconds / taken[1], synced / taken[3]
        cells = (f"{seconds:.2f}", f"{ratios[0]:.2f}", f"{synced:.2f}", f"{ratios[1]:.2f}")
        table.add_row(name, *cells, f"{max(peaks[name]) / 1e6:.0f}" if name in peaks else "")
    return table


def make_start_table() -> Table:
    """How long it takes until there is something to do."""
    table = Table(title="starting, as processes")
    table.add_column("")
    table.add_column("seconds", justify="right")
    programs = {
        "python": [sys.executable, "-c", ""],
        "onnxshrink shrink --help": [sys.executable, "-m", "onnxshrink", "shrink", "--help"],
        "import onnx": [sys.executable, "-c", "import onnx"],
        "all that shrink imports": [sys.executable, "-c", "import onnxshrink.shrink"],
    }
    calls = [partial(subprocess.run, words, stdout=subprocess.DEVNULL, check=True) for words in programs.values()]
    for name, seconds in zip(programs, in_turns(calls, 5), strict=True):
        table.add_row(name, f"{seconds:.3f}")
    return table


# --- where the time goes -------------------------------------------------------------------------------------------


def make_profile(name: str, model: onnx.ModelProto, folder: Path) -> Table:
    """The functions that take the most time themselves, while a model is shrunk; the profiler slows small ones down."""
    path, output = folder / "model.onnx", folder / "out.onnx"
    onnx.save(model, path)
    shrink_file(path, output)
    profile = cProfile.Profile()
    profile.runcall(shrink_file, path, output)
    stats = pstats.Stats(profile).get_stats_profile()
    table = Table(title=f"profile: {name}, {stats.total_tt:.2f} s")
    for heading in ("function", "calls", "own s", "with callees, s"):
        table.add_column(heading, justify="left" if heading == "function" else "right", no_wrap=True)
    functions = sorted(stats.func_profiles.items(), key=lambda item: item[1].tottime, reverse=True)
    for function, found in functions[:_TOP]:
        where = f"{Path(found.file_name).name}:{found.line_number} " if found.line_number else ""
        table.add_row(f"{where}{function}", found.ncalls, f"{found.tottime:.3f}", f"{found.cumtime:.3f}")
    return table


def run(smoke: bool, gigabytes: float) -> int:
    """Measure everything and print the tables."""
    console = Console(width=140 if not sys.stdout.isatty() else None)
    console.print(make_start_table())
    for make in (make_file_table, make_node_table):
        with tempfile.TemporaryDirectory() as folder:
            console.print(make(smoke, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        console.print(make_external_table(smoke, Path(folder), gigabytes))
    models = files(smoke) | {"deep residual": lambda: convolutional(50 if smoke else 2_500)}
    for name, drawn in models.items():
        with tempfile.TemporaryDirectory() as folder:
            console.print(make_profile(name, drawn(), Path(folder)))
    return 0

"""Real disasters: killed while writing, a full disk, a read-only folder. The old output is there, or the new one."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from models import build, draw

import onnxshrink
from onnxshrink.errors import InputError

TEXT = "agraph (float[N, 256] x) => (float[N, 256] y) { a = MatMul(x, w1) b = Relu(a) y = MatMul(b, w2) }"
KILLS = 12


def model(seed: int, units: int = 4096) -> onnx.ModelProto:
    """Half of the hidden units are dead; of 4096, 4 MB of weights remain."""
    first = draw(256, units, seed=seed)
    first[:, ::2] = 0
    return build(TEXT, w1=first, w2=draw(units, 256, seed=seed + 1))


def save(proto: onnx.ModelProto, path: Path, external: bool) -> Path:
    onnx.save(proto, path, save_as_external_data=external, location=f"{path.name}.data")
    return path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- killed --------------------------------------------------------------------------------------------------------

# Forks a process that shrinks two models in turns to one output, and kills it at a random moment, again and again.
# Prints what the output was each time, and how many temporary files were left.
KILLER = """
import json, os, random, signal, sys, time
import onnx, onnxshrink

sources, output, kills = sys.argv[1:3], sys.argv[3], int(sys.argv[4])

def shrink(path):
    return onnxshrink.shrink(path, output=output, verify=False, align="none")

def content(path):
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model.SerializeToString(deterministic=True)

expected = []
for path in sources:
    shrink(path)
    expected.append(content(output))
start = time.perf_counter()
shrink(sources[0])
taken = time.perf_counter() - start

moments = random.Random(0)
found, left = [], 0
while len(found) < kills or (left == 0 or len(set(found)) < 2) and len(found) < 20 * kills:
    number = len(found)
    child = os.fork()
    if child == 0:
        while True:
            number += 1  # the first is the one that is not there, as a rule
            shrink(sources[number % 2])
    time.sleep(moments.uniform(0, 2.5 * taken))
    os.kill(child, 9)
    os.waitpid(child, 0)
    left += sum(name.endswith(".tmp") for name in os.listdir(os.path.dirname(output)))
    now = content(output)
    found.append(expected.index(now) if now in expected else "a mixture")
shrink(sources[0])
print(json.dumps({"found": found, "left": left, "last": expected.index(content(output))}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_whoever_is_killed_leaves_the_old_output_or_the_new_one(tmp_path: Path, external: bool) -> None:
    folders = {name: tmp_path / name for name in ("in", "out", "elsewhere")}
    for folder in folders.values():
        folder.mkdir()
    sources = [save(model(seed), folders["in"] / f"{seed}.onnx", external) for seed in (0, 10)]
    before = {path: path.read_bytes() for path in folders["in"].iterdir()}
    output = folders["out"] / "out.onnx"
    (folders["out"] / "bystander").write_bytes(b"mine")
    command = [sys.executable, "-c", KILLER, *map(str, sources), str(output), str(KILLS)]
    environment = os.environ | dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME"), str(folders["elsewhere"]))
    environment["ORT_DISABLE_TELEMETRY"] = "1"  # the runtime's own files, see the command line
    paths = os.pathsep.join(filter(None, [str(Path(onnxshrink.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        cwd=folders["elsewhere"],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "a mixture" not in told["found"]
    assert set(told["found"]) == {0, 1}  # they did replace the output
    assert told["left"] > 0  # some were killed while they wrote
    assert told["last"] == 0
    left = names(folders["out"])
    data = [name for name in left if re.fullmatch(r"out\.onnx(\.[0-9a-f]{8})?\.data", name)]
    assert bool(data) == external
    assert [name for name in left if name not in data] == ["bystander", "out.onnx"]
    assert names(folders["elsewhere"]) == []
    assert {path: path.read_bytes() for path in folders["in"].iterdir()} == before


# --- a disk that is full, or read-only ------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", place], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip(f"mounting is not permitted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
@pytest.mark.parametrize("old", [False, True], ids=["no output yet", "an output"])
def test_a_full_disk(tmp_path: Path, disk: Path, external: bool, old: bool) -> None:
    """The result has 4 MB, the disk 3; an old output of 1 MB lies on it."""
    source, output = save(model(0), tmp_path / "model.onnx", external), disk / "out.onnx"
    if old:
        onnxshrink.shrink(save(model(5, 1024), tmp_path / "other.onnx", external), output=output, align="none")
    before = {path: path.read_bytes() for path in disk.iterdir()}
    assert len(before) == old * (1 + external)
    for what in (output, disk / "other.onnx"):
        with pytest.raises(InputError, match=rf"{what.name}: cannot be written: {os.strerror(errno.ENOSPC)}"):
            onnxshrink.shrink(source, output=what, verify=False, align="none")
        assert {path: path.read_bytes() for path in disk.iterdir()} == before


def test_a_full_disk_leaves_the_input_that_was_to_be_replaced(tmp_path: Path, disk: Path) -> None:
    whole = model(3, 1200)  # 2.4 MB, and 1.2 for the result
    path = save(whole, disk / "model.onnx", external=False)
    before = path.read_bytes()
    with pytest.raises(InputError, match=os.strerror(errno.ENOSPC)):
        onnxshrink.shrink(path, output=path, verify=False, align="none")
    assert names(disk) == ["model.onnx"]
    assert path.read_bytes() == before


def test_a_file_that_may_not_grow_so_large(tmp_path: Path) -> None:
    """What a quota does, on any system with limits: no need to mount anything."""
    source, output = save(model(0), tmp_path / "model.onnx", external=False), tmp_path / "out.onnx"
    output.write_bytes(b"before")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(InputError, match=rf"out.onnx: cannot be written: {os.strerror(errno.EFBIG)}"):
            onnxshrink.shrink(source, output=output, verify=False, align="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["model.onnx", "out.onnx"]
    assert output.read_bytes() == b"before"


def test_a_read_only_folder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # who may do everything; but for a file system that takes nothing
        folder: Path = request.getfixturevalue("disk")
        (folder / "out.onnx").write_bytes(b"before")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "out.onnx").write_bytes(b"before")
        folder.chmod(0o555)
    source = save(model(0, 64), tmp_path / "model.onnx", external=False)
    try:
        for output in (folder / "out.onnx", folder / "new.onnx"):
            with pytest.raises(InputError, match=rf"output {output}: the folder {folder} is not writable"):
                onnxshrink.shrink(source, output=output, align="none")
        with pytest.raises(InputError, match=rf"report {folder / 'r.json'}: the folder {folder} is not writable"):
            onnxshrink.shrink(source, output=tmp_path / "out.onnx", report=folder / "r.json", align="none")
        assert names(folder) == ["out.onnx"]
        assert (folder / "out.onnx").read_bytes() == b"before"
        assert not (tmp_path / "out.onnx").exists()
    finally:
        if os.geteuid() != 0:
            folder.chmod(0o755)


def test_models_hold_what_the_tests_count_on() -> None:
    result = onnxshrink.shrink(model(0), verify=False, align="none")
    assert result.report.after.parameters == 2 * 256 * 2048
    assert result.report.after.bytes == pytest.approx(4 * 2**20, rel=1e-3)
    small = onnxshrink.shrink(model(5, 1024), verify=False, align="none")
    assert small.report.after.bytes == pytest.approx(2**20, rel=1e-3)

"""Files are whole, or as they were; nothing else is left in their folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, draw

from onnxshrink import save
from onnxshrink.errors import InputError

TEXT = "agraph (float[N, 64] x) => (float[N, 64] y) { h = MatMul(x, a) k = Relu(h) s = MatMul(k, b) y = Add(s, c) }"


def model(seed: int = 0) -> onnx.ModelProto:
    return build(TEXT, a=draw(64, 64, seed=seed), b=draw(64, 64, seed=seed + 1), c=draw(64, seed=seed))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.onnx"


@pytest.fixture
def no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)


# --- one file ------------------------------------------------------------------------------------------------------


def test_a_model_in_one_file(target: Path) -> None:
    save.write_model(model(), target)
    assert names(target.parent) == ["out.onnx"]
    assert onnx.load(target) == model()


def test_an_existing_file_is_replaced_and_keeps_its_permissions(target: Path) -> None:
    target.write_bytes(b"before")
    target.chmod(0o640)
    save.write_model(model(), target)
    assert onnx.load(target) == model()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(target.parent) == ["out.onnx"]


def test_a_new_file_has_the_permissions_of_any_new_file(target: Path) -> None:
    other = target.with_name("other")
    other.touch()
    save.write_model(model(), target)
    assert target.stat().st_mode == other.stat().st_mode


def test_a_link_stays_a_link(target: Path) -> None:
    real = target.with_name("real.onnx")
    real.write_bytes(b"before")
    target.symlink_to(real)
    save.write_model(model(), target)
    assert target.is_symlink()
    assert onnx.load(real) == model()


@pytest.mark.usefixtures("no_rename")
def test_a_failure_at_the_last_step_leaves_everything_as_it_was(target: Path) -> None:
    target.write_bytes(b"before")
    with pytest.raises(InputError, match=r"out\.onnx: cannot be written: Permission denied"):
        save.write_model(model(), target)
    assert target.read_bytes() == b"before"
    assert names(target.parent) == ["out.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("external", [False, True])
def test_an_interrupt_or_a_full_disk_leaves_no_partial_file(
    monkeypatch: pytest.MonkeyPatch, target: Path, error: Any, external: bool
) -> None:
    def stop(number: int) -> None:
        raise error

    target.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", stop)
    expected = InputError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        save.write_model(model(), target, external=external)
    assert target.read_bytes() == b"before"
    assert names(target.parent) == ["out.onnx"]


def test_text(target: Path) -> None:
    save.write_text("größer", target)
    assert target.read_text(encoding="utf-8") == "größer"


# --- where nothing can be written ----------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        save.check_target(path, "output")
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_targets_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "nowhere" / "out.onnx")
    assert "does not exist" in refused(tmp_path / "file" / "out.onnx")
    assert "is not a regular file" in refused(tmp_path / "pipe")
    # The superuser may write anywhere, so the answer is made up.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in refused(tmp_path / "out.onnx")


def test_asking_writes_nothing(tmp_path: Path) -> None:
    assert save.check_target(tmp_path / "out.onnx", "output") == tmp_path / "out.onnx"
    assert not names(tmp_path)


# --- external data -------------------------------------------------------------------------------------------------


def test_weights_beside_the_model(target: Path) -> None:
    before = model()
    given = before.SerializeToString()
    save.write_model(before, target, external=True)
    assert names(target.parent) == ["out.onnx", "out.onnx.data"]
    assert before.SerializeToString() == given
    light = onnx.load(target, load_external_data=False)
    places = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in light.graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL
    }
    assert places.keys() == {"a", "b"}  # the bias is too small to be worth it
    assert {place["location"] for place in places.values()} == {"out.onnx.data"}
    assert all(int(place["offset"]) % 4096 == 0 for place in places.values())
    assert arrays(onnx.load(target)) == arrays(before)
    onnx.checker.check_model(str(target), full_check=True)


def arrays(proto: onnx.ModelProto) -> dict[str, list[Any]]:
    return {t.name: onnx.numpy_helper.to_array(t).tolist() for t in proto.graph.initializer}


def test_writing_again_leaves_one_data_file(target: Path) -> None:
    for seed in range(4):
        save.write_model(model(seed), target, external=True)
        assert len(names(target.parent)) == 2
        assert arrays(onnx.load(target)) == arrays(model(seed))
    save.write_model(model(9), target)
    assert names(target.parent) == ["out.onnx"]


def test_a_data_file_of_somebody_else_is_left_alone(target: Path) -> None:
    other = target.with_name("out.onnx.data")
    other.write_bytes(b"mine")
    save.write_model(model(), target, external=True)
    assert other.read_bytes() == b"mine"
    assert arrays(onnx.load(target)) == arrays(model())


def test_a_data_file_that_is_still_read_stays(target: Path) -> None:
    save.write_model(model(0), target, external=True)
    data = target.with_name("out.onnx.data")
    save.write_model(model(1), target, keep={data})
    assert names(target.parent) == ["out.onnx", "out.onnx.data"]


@pytest.mark.parametrize("call", [1, 2], ids=["the weights", "the model"])
def test_a_failure_leaves_the_old_pair(monkeypatch: pytest.MonkeyPatch, target: Path, call: int) -> None:
    save.write_model(model(0), target, external=True)
    real, calls = os.replace, []

    def fail(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == call:
            raise OSError(5, "Input/output error")
        real(*paths)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="Input/output error"):
        save.write_model(model(1), target, external=True)
    assert names(target.parent) == ["out.onnx", "out.onnx.data"]
    assert arrays(onnx.load(target)) == arrays(model(0))


def test_beyond_two_gigabytes_weights_are_external(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    monkeypatch.setattr(save, "LARGEST", 10_000)
    save.write_model(model(), target)
    assert names(target.parent) == ["out.onnx", "out.onnx.data"]


def test_weights_in_typed_fields_are_written_too(target: Path) -> None:
    proto = model()
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, tensor.data_type, values.shape, values.ravel()))
    save.write_model(proto, target, external=True)
    assert arrays(onnx.load(target)) == arrays(model())
    assert target.stat().st_size < np.prod((64, 64)) * 4


# --- what runs that were killed leave behind ----------------------------------------------------------------------


def leftover(target: Path, kind: str = "", text: str = "half") -> Path:
    path = target.with_name(f".{target.name}.{'0123456789abcdef'}{kind}.tmp")
    path.write_text(text)
    return path


@pytest.mark.parametrize("external", [False, True])
def test_leftovers_of_the_same_target_are_removed(target: Path, external: bool) -> None:
    stale = [leftover(target), leftover(target, ".data")]
    others = [leftover(target.with_name("other.onnx")), target.with_name(".out.onnx.mine.tmp")]
    others[1].write_text("mine")
    save.write_model(model(), target, external=external)
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("external", [False, True])
def test_what_another_run_is_writing_is_left_alone(target: Path, external: bool) -> None:
    with save.Staged(model(1), target, external=external) as staged:
        save.write_model(model(2), target, external=external)
        assert arrays(onnx.load(staged.path)) == arrays(model(1))
        staged.commit()
    assert arrays(onnx.load(target)) == arrays(model(1))
    assert len(names(target.parent)) == (2 if external else 1)


def test_a_file_that_is_swept_away_before_it_is_locked_is_made_again(
    monkeypatch: pytest.MonkeyPatch, target: Path
) -> None:
    real, calls = save._lock, []

    def late(file: Any) -> bool:
        calls.append(file.name)
        if len(calls) == 1:
            os.unlink(file.name)
        return real(file)

    monkeypatch.setattr(save, "_lock", late)
    save.write_model(model(), target)
    assert len(set(calls)) == 2
    assert onnx.load(target) == model()


def test_where_files_cannot_be_locked_nothing_is_swept(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    monkeypatch.setattr(save, "fcntl", None)
    stale = leftover(target)
    save.write_model(model(), target, external=True)
    assert stale.exists()
    assert arrays(onnx.load(target)) == arrays(model())


# --- before it takes its place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
def test_a_staged_model_is_complete_and_nobody_sees_it(target: Path, external: bool) -> None:
    save.write_model(model(0), target, external=external)
    before = {name: (target.parent / name).read_bytes() for name in names(target.parent)}
    with save.Staged(model(1), target, external=external) as staged:
        assert arrays(onnx.load(staged.path)) == arrays(model(1))
        assert staged.path.parent == target.parent
        assert arrays(onnx.load(target)) == arrays(model(0))
    assert {name: (target.parent / name).read_bytes() for name in names(target.parent)} == before

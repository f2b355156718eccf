"""A write happens whole or not at all, whatever fails and whenever the process dies."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apl_core import atomic
from apl_core.errors import StorageError


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_writer_writes(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "a" / "b.bin", b"x")
    atomic.write_text(str(tmp_path / "t.txt"), "é")
    atomic.write_json(tmp_path / "j.json", {"a": [1, "é"]})
    atomic.write_safetensors(tmp_path / "s.safetensors", {"w": torch.ones(3, 4).T}, {"k": "v"})
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"x" and (tmp_path / "t.txt").read_text("utf-8") == "é"
    assert json.loads((tmp_path / "j.json").read_text("utf-8")) == {"a": [1, "é"]}
    assert load_file(tmp_path / "s.safetensors")["w"].shape == (4, 3)
    assert files(tmp_path) == ["a", "j.json", "s.safetensors", "t.txt"]


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "may not write"), (errno.EROFS, "read-only"), (errno.EIO, "Check")],
)
def test_a_failing_disk_leaves_the_old_file(tmp_path: Path, monkeypatch, code: int, hint: str) -> None:
    target = tmp_path / "a.txt"
    atomic.write_text(target, "old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        atomic.write_text(target, "new")
    assert hint in caught.value.hint and str(target) in caught.value.message
    assert target.read_text() == "old" and files(tmp_path) == ["a.txt"]


def test_a_disk_full_inside_safetensors_is_named(tmp_path: Path, monkeypatch) -> None:
    class SafetensorError(Exception):
        pass

    def fail(tensors, name, metadata) -> None:
        Path(name).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(atomic, "save_file", fail)
    with pytest.raises(StorageError) as caught:
        atomic.write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    assert "disk is full" in caught.value.hint and files(tmp_path) == []


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("writer")

    with pytest.raises(RuntimeError, match="writer"):
        atomic.write_with(tmp_path / "a", half)
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "a", float("nan"))
    assert files(tmp_path) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Cannot write") as caught:
            atomic.write_text(tmp_path / "a", "x")
    finally:
        tmp_path.chmod(0o700)
    assert "permissions" in caught.value.hint


def test_a_folder_that_refuses_writing(tmp_path: Path, monkeypatch) -> None:
    """The same for a user whom permissions do not bind."""

    def refuse(self: Path, data: bytes) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        atomic.write_text(tmp_path / "a", "x")
    assert "choose another folder" in caught.value.hint and files(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError) as caught:
        atomic.write_text(tmp_path / "file" / "a.txt", "x")
    assert caught.value.hint and (tmp_path / "file").read_text() == "x"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        atomic.write_text(tmp_path / ("a" * 300), "x")
    assert "shorter" in caught.value.hint and files(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """Kill a process that rewrites a file without pause: what is found is always one whole version."""
    target = tmp_path / "a.json"
    script = (
        "import sys, itertools; from apl_core.atomic import write_json\n"
        "for n in itertools.count(): write_json(sys.argv[1], {'n': n, 'body': [n] * 20000})\n"
    )
    root = Path(atomic.__file__).resolve().parents[1]
    for pause in (0.0, 0.013, 0.031):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(target)], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            deadline = time.monotonic() + 60
            while not target.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(pause)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        found = json.loads(target.read_text("utf-8"))
        assert found["body"] == [found["n"]] * 20000
        target.unlink()


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_kill_between_writing_and_renaming(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    script = (
        "import os, signal, sys; from apl_core import atomic\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic.write_text(sys.argv[1], 'new')\n"
    )
    root = Path(atomic.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(target)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL and target.read_text() == "old"
    atomic.write_text(target, "next")  # what the killed process left is no obstacle
    assert target.read_text() == "next"

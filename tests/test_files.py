"""Files are written whole or not at all, by one process at a time, and a disk that refuses is told."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from mss_utils import files
from mss_utils.files import atomic_write, file_lock, safe_name, temporary_folder, write_text


def test_safe_names():
    assert safe_name("../a/b:c") == "_a_b_c"
    assert safe_name("Al James - Schoolboy Facination") == "Al James - Schoolboy Facination"
    assert safe_name("...") == "_"
    assert safe_name("日本語" * 40) == "日本語" * 13 + "日", (
        "a file name may have 255 bytes, not letters"
    )


def test_one_at_a_time(tmp_path):
    """The second waits until the first is out, in order and whatever happens inside."""
    order, inside = [], threading.Event()

    def first():
        with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "place"):
            inside.set()
            time.sleep(0.2)  # the other comes to wait
            order.append("first")
            raise ZeroDivisionError

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with file_lock(tmp_path / "place"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_said(error, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with file_lock(tmp_path / "drive"):
        assert "is on a disk without locks" in capsys.readouterr().err


def test_a_refusal_to_read_is_not_taken_for_one_to_write(tmp_path):
    with pytest.raises(PermissionError, match="song.wav"), temporary_folder(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "song.wav"))
    with (
        pytest.raises(OSError, match="cannot be written.*make its folder writable"),
        atomic_write(tmp_path / "table.csv") as part,
    ):
        raise PermissionError(13, "Permission denied", str(part))


def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path):
    """Parts of a process of this machine that is no more, of one whose number another has now, of one that lives, of another machine, of yesterday."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = lambda process: f".part-{files._here()}-{process}-1-a.txt"
    names = dict(
        ended=here(ended.pid),
        reused=here(os.getpid()),
        elsewhere=".part-elsewhere-1-1-a.txt",
        yesterday=".part-elsewhere-2-1-a.txt",
    )
    for name in names.values():
        (tmp_path / name).touch()
    os.utime(tmp_path / names["reused"], (time.time() - 3600, time.time() - 3600))
    os.utime(tmp_path / names["yesterday"], (0, 0))
    with atomic_write(tmp_path / "a.txt") as part:
        part.touch()
        files._remove_forgotten(tmp_path, "a.txt")
        assert {path.name for path in tmp_path.glob(".part-*")} == {part.name, names["elsewhere"]}


def test_half_a_file_is_never_left(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "whole")
    with pytest.raises(TypeError):
        write_text(tmp_path / "a" / "b.txt", None)
    assert (tmp_path / "a" / "b.txt").read_text() == "whole"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]

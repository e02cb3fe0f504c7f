"""Files are written whole or not at all, by one process at a time, and a disk that refuses is told."""

import os
import threading
import time

import pytest

from mss_utils import files
from mss_utils.files import one_at_a_time, replacing, safe_name, working_folder, write_text


def test_safe_names():
    assert safe_name("../a/b:c") == "_a_b_c"
    assert safe_name("Al James - Schoolboy Facination") == "Al James - Schoolboy Facination"
    assert safe_name("...") == "_"
    assert safe_name("日本語" * 40) == "日本語" * 13 + "日", "a file name may have 255 bytes, not letters"


def test_one_at_a_time(tmp_path):
    """The second waits until the first is out, in order and whatever happens inside."""
    order, inside = [], threading.Event()

    def first():
        with pytest.raises(ZeroDivisionError), one_at_a_time(tmp_path / "place"):
            inside.set()
            time.sleep(0.2)  # the other comes to wait
            order.append("first")
            raise ZeroDivisionError

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with one_at_a_time(tmp_path / "place"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr("mss_utils.files.FileLock.acquire", no_locks)
    with one_at_a_time(tmp_path / "drive"):
        assert "is on a disk without locks" in capsys.readouterr().err


def test_a_refusal_to_read_is_not_taken_for_one_to_write(tmp_path):
    with pytest.raises(PermissionError, match="song.wav"), working_folder(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "song.wav"))
    with pytest.raises(OSError, match="cannot be written.*make its folder writable"), replacing(tmp_path / "table.csv") as part:
        raise PermissionError(13, "Permission denied", str(part))


def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path):
    """Parts of a process of this machine that is no more, of one that lives, of another machine, and of yesterday."""
    with replacing(tmp_path / "a.txt") as part:
        alive = part.name
        part.touch()
        others = [alive.replace(str(os.getpid()), "999999999"), alive.replace("-", "-elsewhere", 1)]
        for name in (*others, f".part-old-1-1-{part.name.rpartition('-')[2]}"):
            (tmp_path / name).touch()
        os.utime(tmp_path / ".part-old-1-1-a.txt", (0, 0))
        files._remove_forgotten(tmp_path, "a.txt")
        assert {path.name for path in tmp_path.glob(".part-*")} == {alive, others[1]}


def test_half_a_file_is_never_left(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "whole")
    with pytest.raises(TypeError):
        write_text(tmp_path / "a" / "b.txt", None)
    assert (tmp_path / "a" / "b.txt").read_text() == "whole"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]

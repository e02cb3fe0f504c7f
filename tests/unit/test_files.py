import errno
import threading
import time

import pytest

from mss_utils.files import atomic_write, file_lock, safe_name, temporary_folder, write_text


def test_safe_name():
    assert safe_name("../a/b:c") == "_a_b_c"
    assert safe_name("...") == "_"
    assert len(safe_name("日本語" * 40).encode()) <= 120


def test_file_lock_lets_one_thread_in(tmp_path, capsys):
    order, inside = [], threading.Event()

    def first():
        with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "folder"):
            inside.set()
            time.sleep(0.2)
            order.append("first")
            raise ZeroDivisionError

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with file_lock(tmp_path / "folder"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert "Another process is working in" in capsys.readouterr().err


def test_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / ".part-b.txt").write_text("of a killed process")
    write_text(tmp_path / "b.txt", "whole")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "b.txt") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "b.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


@pytest.mark.parametrize(
    "number, words", [(errno.ENOSPC, "No space left to write"), (errno.EROFS, "Cannot write")]
)
def test_disk_error_says_what_to_do(number, words, tmp_path):
    with pytest.raises(OSError, match=f"{words}.*MSS_RESULTS"), temporary_folder(tmp_path) as part:
        raise OSError(number, "refused", str(part))
    assert not list(tmp_path.iterdir())


def test_read_error_is_not_a_write_error(tmp_path):
    with pytest.raises(PermissionError, match="song.wav"), temporary_folder(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", "/elsewhere/song.wav")

"""How files are written: whole or not at all, one process at a time, under names that fit, and plain about a disk that refuses."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import psutil

PART = ".part-"  # how the names of unfinished files and folders begin
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # what disks say that cannot be asked to
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
CLOCKS_DIFFER_S = 60.0  # at the most: that of a network disk and ours
MAX_NAME = (
    200  # bytes: of the 255 that a name may have, some are for what is put before and behind it
)
FORGOTTEN_S = 24 * 3600.0  # nobody works this long on one part


def safe_name(name: str) -> str:
    """`name` with everything but letters, digits, '.', '_', '-' and spaces inside replaced, in 120 bytes: fit for a file name."""
    kept = "".join(c if c.isalnum() or c in "._- " else "_" for c in name).strip(" .")
    return kept.encode()[:120].decode(errors="ignore") or "_"


def is_safe_file_name(name: object) -> bool:
    """Whether `name` can be a file's, or part of it, and stays where it is put: one part of a path, not a way out of its folder."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", "..")
        and "\0" not in name
        and len(os.fsencode(name)) <= MAX_NAME
    )


def printable_name(name: str | Path) -> str:
    """A name from the disk as tables, pages and pictures can hold it: those of old archives are not always UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader never sees half of it, see `atomic_write`."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` if all goes well, else it is removed.

    The content is on the disk before it has its name, so a machine that loses power keeps the old file or the new one. What killed
    processes left of `path` is removed. Raises OSError as `friendly_disk_errors` words it.
    """
    with friendly_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_forgotten(path.parent, path.name)
        part = path.with_name(_part_name(path.name))
        try:
            yield part
            flush(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder inside `parent`, on the same disk, that is or holds what is to be renamed when it is finished; removed in the end.

    What killed processes left there is removed too. Raises OSError as `friendly_disk_errors` words it.
    """
    with friendly_disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_forgotten(parent, "work")
        folder = parent / _part_name("work")
        folder.mkdir()
        try:
            yield folder
        finally:
            if folder.exists():
                shutil.rmtree(folder)


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Only one process (and one thread) works in `folder`; the others wait for it. A killed process lets go by itself.

    On a disk without locks (a cloud drive, say) it is said that nobody is kept out.
    """
    with friendly_disk_errors(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"Another process is working in {folder}; waiting for it.",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"{folder} is on a disk without locks: see to it that only one process works there.",
                file=sys.stderr,
                flush=True,
            )
        yield


@contextmanager
def friendly_disk_errors(path: Path) -> Iterator[None]:
    """An OSError that says what to do in the place of one from a full disk, or from a folder of `path` that may not be written to."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            found, mend = (
                f"No room left to write {path}",
                "free space there, or choose a folder on a larger disk",
            )
        elif error.errno in REFUSED and _concerns(path, Path(error.filename or "")):
            found, mend = (
                f"{path} cannot be written",
                "make its folder writable, or choose another one",
            )
        else:
            raise
        raise OSError(
            f"{found} ({error.strerror}). Earlier results stay, and the same command goes on: {mend} (MSS_RESULTS for results, "
            "MSS_CACHE for songs and stems, --out for a separated song)."
        ) from None


def _concerns(path: Path, refused: Path) -> bool:
    """Whether a refusal is about writing `path`: about it, a folder above it, or a part; not about something that was read."""
    return (
        path == refused
        or refused in path.parents
        or any(name.startswith(PART) for name in refused.parts)
    )


def flush(path: Path) -> None:
    """Wait until a file, or every file in a folder, is on the disk itself: what is renamed then is whole whatever happens."""
    for part in (
        [path] if path.is_file() else [inside for inside in path.rglob("*") if inside.is_file()]
    ):
        with part.open("rb") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FLUSH:
                    raise


def _part_name(name: str) -> str:
    return f"{PART}{_here()}-{os.getpid()}-{threading.get_ident()}-{name}"


@lru_cache
def _here() -> str:
    """This machine and container, since process numbers are counted in each, in few letters."""
    namespace = Path("/proc/self/ns/pid")
    return hashlib.sha256(
        f"{platform.node()} {os.readlink(namespace) if namespace.exists() else ''}".encode()
    ).hexdigest()[:12]


def _remove_forgotten(folder: Path, name: str) -> None:
    """Remove the parts of `name` that killed processes left in `folder`."""
    for left in folder.glob(f"{PART}*-{glob.escape(name)}"):
        if _is_forgotten(left):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(
                missing_ok=True
            )


def _is_forgotten(part: Path) -> bool:
    """Whether the process of a part, on this machine, is no more, or nobody has touched it for a day."""
    machine, process = part.name.removeprefix(PART).split("-")[:2]
    try:
        touched = part.stat().st_mtime
    except FileNotFoundError:  # finished in this moment
        return False
    return (
        machine == _here() and _is_gone(int(process), touched)
    ) or time.time() - touched > FORGOTTEN_S


def _is_gone(process: int, touched: float) -> bool:
    """Whether the process that wrote something at that time has ended; its number may be another's by now."""
    try:
        found = psutil.Process(process)
        return (
            found.status() == psutil.STATUS_ZOMBIE
            or found.create_time() > touched + CLOCKS_DIFFER_S
        )
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False

"""Atomic file writes, file locks, safe file names and readable disk errors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

MAX_NAME = 200  # bytes; the limit is 255, and some names get a prefix or suffix
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


def safe_name(name: str) -> str:
    """Return `name` as a file name: letters, digits, '.', '_', '-' and spaces, up to 120 bytes."""
    safe = "".join(c if c.isalnum() or c in "._- " else "_" for c in name).strip(" .")
    return safe.encode()[:120].decode(errors="ignore") or "_"


def is_safe_file_name(name: object) -> bool:
    """Whether `name` is one part of a path that does not lead out of its folder."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name:
        return False
    return Path(name).name == name and len(os.fsencode(name)) <= MAX_NAME


def printable_name(name: str | Path) -> str:
    """Return a file name as valid text; names in old archives are not always UTF-8."""
    return os.fsencode(name).decode(errors="replace")


@contextmanager
def friendly_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an OSError that says what to do."""
    try:
        yield
    except OSError as error:
        refused = Path(error.filename or path)
        about_path = path == refused or refused in path.parents or ".part-" in str(refused)
        if error.errno not in NO_SPACE and not (error.errno in NOT_WRITABLE and about_path):
            raise
        problem = "No space left to write" if error.errno in NO_SPACE else "Cannot write"
        raise OSError(
            f"{problem} {path}. Existing results are kept. Free disk space, or set MSS_RESULTS, "
            "MSS_CACHE or --out to a writable folder, then run the same command again."
        ) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that is renamed to `path` if no error occurs."""
    with friendly_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{path.name}")
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> Path:
    """Write a file atomically and return its path; a full disk is an OSError."""
    with atomic_write(path) as part:
        part.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder inside `parent`, on the same disk, and remove it at the end."""
    with friendly_disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".part-", dir=parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time work in `folder`; the others wait."""
    with friendly_disk_errors(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", thread_local=False)
        try:
            acquired = lock.acquire(timeout=0)
        except Timeout:
            print(f"Another process is working in {folder}; waiting.", file=sys.stderr, flush=True)
            acquired = lock.acquire()
    with acquired:
        yield

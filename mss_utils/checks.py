"""Requirements of a run, each with its state and what to do: `python -m mss_utils check`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from mss_utils.config import SPLITS, Settings, cache_folder, results_folder
from mss_utils.data import (
    Track,
    dataset_root,
    find_tracks,
    is_built_in,
    is_decoded,
    is_store,
    read_store,
)
from mss_utils.data.sources import SourceTrack
from mss_utils.environment import check_device
from mss_utils.files import atomic_write

MIN_PYTHON = (3, 11)
MIN_MEMORY_GB = 4.0  # the demo profile needs less
MIN_DISK_GB = 4.0  # songs, stems and results of the demo profile
FINE, WARNING, STOP = "fine", "warning", "stop"


@dataclass(frozen=True)
class Finding:
    """One requirement: its state (fine, warning, or stop) and what to do."""

    name: str
    found: str
    state: str = FINE
    remedy: str = ""


def requirements(settings: Settings) -> Iterator[Finding]:
    """Check what a run with these settings needs; nothing is downloaded, rendered or decoded."""
    yield _python()
    yield _packages()
    yield _device(settings)
    yield _memory()
    for content, folder, variable in (
        ("results", results_folder(), "MSS_RESULTS"),
        ("songs and stems", cache_folder(), "MSS_CACHE"),
    ):
        yield _disk_space(content, folder, variable)
        yield _writable(content, folder, variable)
    yield _ffmpeg(settings)
    yield _dataset(settings)


def _python() -> Finding:
    if sys.version_info >= MIN_PYTHON:
        return Finding("Python", platform.python_version())
    needed = ".".join(map(str, MIN_PYTHON))
    return Finding("Python", platform.python_version(), STOP, f"install Python {needed} or newer")


def _packages() -> Finding:
    """Compare installed packages with the dependencies in pyproject.toml."""
    remedy = "pip install -r requirements.txt, or make setup"
    try:
        needed = [Requirement(line) for line in requires("mss-utils") or []]
    except PackageNotFoundError:
        return Finding("packages", "mss-utils is not installed", WARNING, remedy)
    needed = [need for need in needed if need.marker is None or need.marker.evaluate()]
    missing, wrong = [], []
    for need in needed:
        try:
            installed = version(need.name)
        except PackageNotFoundError:
            missing.append(need.name)
            continue
        if not need.specifier.contains(installed, prereleases=True):
            wrong.append(f"{need} (installed: {installed})")
    if not missing and not wrong:
        return Finding("packages", f"all {len(needed)}")
    found = ", ".join([*(f"{name} (missing)" for name in missing), *wrong])
    state = STOP if missing else WARNING
    return Finding("packages", found, state, remedy)


def _device(settings: Settings) -> Finding:
    found = f"torch {torch.__version__}, no CUDA GPU, {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 2**30
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        found = f"torch {torch.__version__}, {gpus} with {memory_gb:.0f} GB"
    try:
        check_device(settings)
    except ValueError as error:
        return Finding("device", found, STOP, str(error))
    if settings.profile == "musdb18" and not torch.cuda.is_available():
        return Finding("device", found, WARNING, "use a GPU (weeks on a CPU), or profile musdb7")
    return Finding("device", found)


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":  # a container
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    found = f"{free / 2**30:.1f} GB available"
    if free / 2**30 >= MIN_MEMORY_GB:
        return Finding("memory", found)
    return Finding("memory", found, WARNING, "close other programs, or lower batch_size")


def _disk_space(content: str, folder: Path, variable: str) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gb = shutil.disk_usage(existing).free / 2**30
    found = f"{free_gb:.1f} GB free at {folder}"
    if free_gb >= MIN_DISK_GB:
        return Finding(f"disk for {content}", found)
    remedy = f"free disk space or set {variable}: the demo needs 4 GB, MUSDB18 6 to 32 GB"
    return Finding(f"disk for {content}", found, WARNING, remedy)


def _writable(content: str, folder: Path, variable: str) -> Finding:
    """Write a file: permissions alone do not tell (root, read-only disks)."""
    name, probe = f"write {content}", folder / ".writable"
    try:
        with atomic_write(probe) as part:
            part.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        return Finding(name, f"no ({error})", STOP, f"set {variable} to a writable folder")
    return Finding(name, "yes")


def _ffmpeg(settings: Settings) -> Finding:
    missing = [program for program in ("ffmpeg", "ffprobe") if not shutil.which(program)]
    if not missing:
        return Finding("ffmpeg", shutil.which("ffmpeg") or "")
    try:
        needed = settings.scorer == "museval" or _will_download(settings) or _must_decode(settings)
    except (ValueError, OSError):  # reported as the dataset's own finding
        needed = False
    remedy = "apt-get install ffmpeg (for MUSDB18, museval and compressed formats)"
    return Finding("ffmpeg", f"{', '.join(missing)} missing", STOP if needed else WARNING, remedy)


def _must_decode(settings: Settings) -> bool:
    if is_built_in(settings) or is_decoded(settings):
        return False
    return any(source.is_stem_file for source in find_tracks(dataset_root(settings)))


def _dataset(settings: Settings) -> Finding:
    if is_built_in(settings):
        count = settings.n_train_songs + settings.n_valid_songs + settings.n_test_songs
        return Finding("dataset", f"{count} built-in songs, rendered by the run")
    if _will_download(settings):
        return Finding("dataset", "MUSDB18 7-second excerpts, downloaded by the run (140 MB)")
    try:
        tracks = _tracks(settings)
    except (ValueError, OSError) as error:
        return Finding("dataset", str(error), STOP, "pass --data DIR, or set MUSDB_PATH")
    splits = [track.split for track in tracks]
    counts = ", ".join(f"{split} {splits.count(split)}" for split in SPLITS)
    return Finding("dataset", f"{dataset_root(settings)}: {counts}")


def _will_download(settings: Settings) -> bool:
    """Whether musdb downloads the dataset."""
    return settings.profile == "musdb7" and not (settings.data or os.environ.get("MUSDB_PATH"))


def _tracks(settings: Settings) -> Sequence[Track | SourceTrack]:
    root = dataset_root(settings)
    return read_store(root).tracks if is_store(root) else find_tracks(root)

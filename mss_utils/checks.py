"""Requirements of a run, each with its state and what to do: `python -m mss_utils check`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from mss_utils.config import SPLITS, Settings, cache_folder, results_folder
from mss_utils.data import (
    dataset_root,
    find_tracks,
    is_built_in,
    is_decoded,
    is_store,
    read_store,
)
from mss_utils.environment import check_device
from mss_utils.files import temporary_folder

MIN_GB = 4.0  # of memory, and of disk for songs, stems and results: enough for the demo profile
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
    yield Finding("Python", platform.python_version())
    yield _packages()
    yield _device(settings)
    yield _memory()
    yield _folder("results", results_folder(), "MSS_RESULTS")
    yield _folder("songs and stems", cache_folder(), "MSS_CACHE")
    yield _ffmpeg(settings)
    yield _dataset(settings)


def _finding(name: str, found: str, fine: bool, otherwise: str, remedy: str) -> Finding:
    """Return a fine finding, or one in the state `otherwise` with a remedy."""
    return Finding(name, found) if fine else Finding(name, found, otherwise, remedy)


def _packages() -> Finding:
    """Compare installed packages with the dependencies in pyproject.toml."""
    remedy = "pip install -r requirements.txt, or make setup"
    try:
        needed = [Requirement(line) for line in requires("mss-utils") or []]
    except PackageNotFoundError:
        return Finding("packages", "mss-utils is not installed", WARNING, remedy)
    needed = [need for need in needed if need.marker is None]  # the others are optional
    problems, state = [], WARNING
    for need in needed:
        try:
            if not need.specifier.contains(version(need.name), prereleases=True):
                problems.append(f"{need} (installed: {version(need.name)})")
        except PackageNotFoundError:
            problems.append(f"{need.name} (missing)")
            state = STOP
    found = ", ".join(problems) or f"all {len(needed)}"
    return _finding("packages", found, not problems, state, remedy)


def _device(settings: Settings) -> Finding:
    found = f"torch {torch.__version__}, no CUDA GPU, {os.cpu_count()} CPU cores"
    if has_gpu := torch.cuda.is_available():
        gpu, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
        memory_gb = gpu.total_memory / 2**30
        found = f"torch {torch.__version__}, {count} x {gpu.name} with {memory_gb:.0f} GB"
    try:
        check_device(settings)
    except ValueError as error:
        return Finding("device", found, STOP, str(error))
    fast_enough = has_gpu or settings.profile != "musdb18"
    remedy = "use a GPU (weeks on a CPU), or profile musdb7"
    return _finding("device", found, fast_enough, WARNING, remedy)


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":  # a container
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    free_gb, remedy = free / 2**30, "close other programs, or lower batch_size"
    return _finding("memory", f"{free_gb:.1f} GB available", free_gb >= MIN_GB, WARNING, remedy)


def _folder(content: str, folder: Path, variable: str) -> Finding:
    """Write in a folder, because permissions do not tell of read-only disks, and check its disk."""
    name = f"disk for {content}"
    try:
        with temporary_folder(folder):
            free_gb = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Finding(name, str(error), STOP, f"set {variable} to a writable folder")
    found = f"{free_gb:.1f} GB free at {folder}"
    remedy = f"free disk space or set {variable}: the demo needs 4 GB, MUSDB18 6 to 32 GB"
    return _finding(name, found, free_gb >= MIN_GB, WARNING, remedy)


def _ffmpeg(settings: Settings) -> Finding:
    missing = [program for program in ("ffmpeg", "ffprobe") if not shutil.which(program)]
    if not missing:
        return Finding("ffmpeg", shutil.which("ffmpeg") or "")
    try:
        needed = settings.scorer == "museval" or _will_download(settings)
        if not (needed or is_built_in(settings) or is_decoded(settings)):
            needed = any(track.is_stem_file for track in find_tracks(dataset_root(settings)))
    except (ValueError, OSError):  # reported as the dataset's own finding
        needed = False
    remedy = "apt-get install ffmpeg (for MUSDB18, museval and compressed formats)"
    return Finding("ffmpeg", f"{', '.join(missing)} missing", STOP if needed else WARNING, remedy)


def _will_download(settings: Settings) -> bool:
    """Whether musdb downloads the dataset."""
    return settings.profile == "musdb7" and not (settings.data or os.environ.get("MUSDB_PATH"))


def _dataset(settings: Settings) -> Finding:
    if is_built_in(settings):
        count = settings.n_train_songs + settings.n_valid_songs + settings.n_test_songs
        return Finding("dataset", f"{count} built-in songs, rendered by the run")
    if _will_download(settings):
        return Finding("dataset", "MUSDB18 7-second excerpts, downloaded by the run (140 MB)")
    try:
        root = dataset_root(settings)
        tracks = read_store(root).tracks if is_store(root) else find_tracks(root)
    except (ValueError, OSError) as error:
        return Finding("dataset", str(error), STOP, "pass --data DIR, or set MUSDB_PATH")
    splits = [track.split for track in tracks]
    counts = ", ".join(f"{split} {splits.count(split)}" for split in SPLITS)
    return Finding("dataset", f"{root}: {counts}")

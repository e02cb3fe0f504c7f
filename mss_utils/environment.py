"""What a run needs of a machine, and what machine and data it ran on.

    requirements: before a run, each with what was found and how to mend it --> python -m mss_utils check
    record_environment: with a run's results --> environment.json
    reset_peak_memory, peak_memory_mb: around a training --> model.json

Taught in notebook 01.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from mss_utils.config import ROOT, SPLITS, Run, Settings, cache_folder, results_folder
from mss_utils.data import (
    Store,
    Track,
    dataset_root,
    find_tracks,
    is_built_in,
    is_decoded,
    needs_ffmpeg,
    read_store,
)
from mss_utils.data.sources import MUSDB_STEMS, SourceTrack
from mss_utils.files import atomic_write, write_text

PACKAGES = (
    "torch",
    "torchaudio",
    "numpy",
    "musdb",
    "museval",
    "lightning-fabric",
    "papermill",
)  # whose versions a run records
NOT_FOR_RUNS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "playwright",
    "dask",
    "jupyter",
    "jupyterlab",
)  # tests, clusters, interactive use
MIN_PYTHON = (3, 11)
MEMORY_GB = 4.0  # a run on the built-in songs has enough with less
DISK_GB = 4.0  # songs, stems and results of the demo profile
FINE, WARNING, STOP = "fine", "warning", "stop"


@dataclass(frozen=True)
class Finding:
    """One requirement: what was found, whether that would stop a run, and what to do where it is not fine."""

    name: str
    found: str
    state: str = FINE  # or warning, or stop
    mend: str = ""


def requirements(settings: Settings) -> Iterator[Finding]:
    """What a run with these settings needs, one after the other; nothing is downloaded, rendered or decoded."""
    yield _python()
    yield _packages()
    yield _device(settings)
    yield _memory()
    for what, folder, variable in (
        ("results", results_folder(), "MSS_RESULTS"),
        ("songs and stems", cache_folder(), "MSS_CACHE"),
    ):
        yield _disk(what, folder, variable)
        yield _writable(what, folder, variable)
    yield _ffmpeg(settings)
    yield _dataset(settings)


def _python() -> Finding:
    enough = sys.version_info >= MIN_PYTHON
    wanted = ".".join(map(str, MIN_PYTHON))
    return Finding(
        "Python",
        platform.python_version(),
        FINE if enough else STOP,
        "" if enough else f"install Python {wanted} or newer",
    )


def _packages() -> Finding:
    """The packages of requirements.txt, which pip may not have installed, or in another version."""
    lines = [
        line.partition("#")[0].strip()
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    wanted = {
        need: _version(need.name)
        for line in lines
        if line and not line.startswith("-")
        for need in [Requirement(line)]
    }
    wrong = [
        need
        for need, found in wanted.items()
        if found is None or not need.specifier.contains(found, prereleases=True)
    ]
    if not wrong:
        return Finding("packages", f"all {len(wanted)} of requirements.txt")
    stops = any(wanted[need] is None and need.name not in NOT_FOR_RUNS for need in wrong)
    found = ", ".join(f"{need} ({wanted[need] or 'none'})" for need in wrong)
    return Finding(
        "packages",
        f"not as wanted: {found}",
        STOP if stops else WARNING,
        "pip install -r requirements.txt, or make setup",
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(settings: Settings) -> Finding:
    found = f"torch {torch.__version__}, "
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found += (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} with {memory:.0f} GB"
        )
    else:
        found += f"no CUDA GPU, {os.cpu_count()} CPU cores"
    try:
        check_device(settings)
    except ValueError as error:
        return Finding("device", found, STOP, str(error))
    if settings.profile == "musdb18" and not torch.cuda.is_available():
        return Finding(
            "device",
            found,
            WARNING,
            "a musdb18 run takes weeks without a GPU: use a machine with one, or profile musdb7",
        )
    return Finding("device", found)


def check_device(settings: Settings) -> None:
    """Raise ValueError when the device that the settings name is not here, or fewer of it than they ask for."""
    there = dict(
        cpu=max(2, os.cpu_count()),
        cuda=torch.cuda.device_count(),
        mps=int(torch.backends.mps.is_available()),
    )
    device = (
        settings.device
        if settings.device != "auto"
        else max(there, key=lambda kind: (kind != "cpu") * there[kind])
    )
    if settings.devices > there[device]:
        usable = ", ".join(f"{kind} ({count})" for kind, count in there.items() if count)
        raise ValueError(
            f"device={device} and devices={settings.devices}, but this machine has: {usable}. Set device=auto, or devices lower."
        )


def _memory() -> Finding:
    free = min(psutil.virtual_memory().available, _container_memory()) / 2**30
    mend = f"close other programs, or set batch_size lower: {MEMORY_GB:g} GB are enough for any profile but musdb18"
    return Finding(
        "memory", f"{free:.1f} GB available", *((FINE,) if free >= MEMORY_GB else (WARNING, mend))
    )


def _container_memory() -> float:
    """Bytes that are left of what a container or a batch system allows; infinite where nothing is set."""
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not (limit.exists() and used.exists()) or (allowed := limit.read_text().strip()) == "max":
        return math.inf
    return int(allowed) - int(used.read_text())


def _disk(what: str, folder: Path, variable: str) -> Finding:
    free = shutil.disk_usage(_nearest(folder)).free / 2**30
    mend = f"free space there, or set {variable} to a larger disk: the demo takes {DISK_GB:g} GB, MUSDB18 6 to 32 GB"
    return Finding(
        f"disk for {what}",
        f"{free:.1f} GB free at {folder}",
        *((FINE,) if free >= DISK_GB else (WARNING, mend)),
    )


def _writable(what: str, folder: Path, variable: str) -> Finding:
    """Tried, since root may write where permissions say no, and nobody may on a disk that is mounted read-only."""
    try:
        with atomic_write(folder / ".writable") as probe:
            probe.touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        return Finding(
            f"may write {what}", f"no ({error})", STOP, f"set {variable} to a folder of yours"
        )
    return Finding(f"may write {what}", "yes")


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def _ffmpeg(settings: Settings) -> Finding:
    missing = [program for program in ("ffmpeg", "ffprobe") if not shutil.which(program)]
    if not missing:
        return Finding("ffmpeg", shutil.which("ffmpeg"))
    try:
        needed = (
            settings.scorer == "museval" or _fetched(settings) or _decodes_with_ffmpeg(settings)
        )
    except (ValueError, OSError):  # told as the dataset's own finding
        needed = False
    why = (
        "MUSDB18 and museval need it"
        if needed
        else "MUSDB18, museval and songs in other formats than WAV and FLAC need it"
    )
    return Finding(
        "ffmpeg",
        f"no {' and no '.join(missing)} on the PATH",
        STOP if needed else WARNING,
        f"apt-get install ffmpeg ({why})",
    )


def _decodes_with_ffmpeg(settings: Settings) -> bool:
    return (
        not is_built_in(settings)
        and not is_decoded(settings)
        and any(map(needs_ffmpeg, _tracks(settings)))
    )


def _dataset(settings: Settings) -> Finding:
    if is_built_in(settings):
        count = settings.n_train_songs + settings.n_valid_songs + settings.n_test_songs
        return Finding("dataset", f"{count} built-in songs, rendered on the spot")
    if _fetched(settings):
        return Finding(
            "dataset",
            "the 7-second excerpts of MUSDB18, which musdb fetches where they are not there (140 MB)",
        )
    try:
        tracks = _tracks(settings)
    except (ValueError, OSError) as error:
        return Finding("dataset", str(error), STOP, "pass --data DIR, or set MUSDB_PATH")
    counts = ", ".join(
        f"{split} {sum(track.split == split for track in tracks)}" for split in SPLITS
    )
    return Finding("dataset", f"{dataset_root(settings)}: {counts}")


def _fetched(settings: Settings) -> bool:
    """Whether the run lets musdb fetch its dataset."""
    return settings.profile == "musdb7" and not (settings.data or os.environ.get("MUSDB_PATH"))


def _tracks(settings: Settings) -> Sequence[Track | SourceTrack]:
    """The tracks of somebody's dataset, as they lie there or in a store that was carried here."""
    root = dataset_root(settings)
    return read_store(root).tracks if (root / "index.json").exists() else find_tracks(root)


# --- what a run ran on --------------------------------------------------------------------------------------------------


def record_environment(run: Run, store: Store) -> dict:
    """Write `environment.json`: versions, hardware, git commit, seeds, and what the data were; return it."""
    run.write_settings()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = dict(
        python=platform.python_version(),
        **{package.replace("-", "_"): version(package) for package in PACKAGES},
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        gpu=gpu,
        git_commit=_git_commit(),
        seeds=list(range(run.settings.seeds)),
        data_hash=store.sha,
        date=date.today().isoformat(),
        dataset=describe_dataset(store),
        sample_rate=store.sample_rate,
    )
    write_text(run.folder / "environment.json", json.dumps(found, indent=2) + "\n")
    return found


def describe_dataset(store: Store) -> dict:
    """Name, stems, and tracks and hours per split of a store."""
    splits = {split: store.split(split) for split in SPLITS}
    hours = {
        split: sum(track.samples for track in tracks) / store.sample_rate / 3600
        for split, tracks in splits.items()
    }
    tracks = {split: len(tracks) for split, tracks in splits.items()}
    return dict(name=Path(store.source).name, stems=list(store.stems), tracks=tracks, hours=hours)


def dataset_kind(settings: Settings, dataset: dict) -> str:
    """What the data of a run are, for those who tell of it: songs (built-in), excerpts (of seven seconds), musdb (MUSDB18), or own.

    `dataset` is what `describe` says of them.
    """
    if is_built_in(settings):
        return "songs"
    named = not settings.data or "musdb" in dataset["name"].lower()
    alike = sorted(dataset["stems"]) == sorted(MUSDB_STEMS) and dataset["tracks"]["test"] == 50
    if not (named or alike):
        return "own"
    test_s = 3600 * dataset["hours"]["test"] / max(1, dataset["tracks"]["test"])
    return "excerpts" if settings.profile == "musdb7" or test_s < 15 else "musdb"


def _git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


# --- how much memory a training takes ---------------------------------------------------------------------------------


def on_gpu(settings: Settings) -> bool:
    """Whether a training with these settings runs on a CUDA GPU."""
    return settings.device in ("auto", "cuda") and torch.cuda.is_available()


def training_device(settings: Settings) -> torch.device:
    """The device that a run trains and separates on."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def reset_peak_memory(settings: Settings) -> None:
    """Begin anew to note the largest memory; where the kernel has no mark to set back (outside Linux), nothing happens."""
    if on_gpu(settings):
        torch.cuda.reset_peak_memory_stats()
    elif (mark := Path("/proc/self/clear_refs")).exists():
        mark.write_text("5")


def peak_memory_mb(settings: Settings) -> float:
    """Largest memory since `reset_peak_memory` in MB: of the GPU where that is used, else of this process."""
    if on_gpu(settings):
        return torch.cuda.max_memory_allocated() / 2**20
    if Path("/proc/self/status").exists():
        return resident_mb("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb(field: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (at the most) of this process in MB, as Linux counts it."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].removesuffix("kB")) / 1024

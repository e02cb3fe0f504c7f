"""Where a run was made (environment.json), its device, and the memory of a training."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mss_utils.config import ROOT, SPLITS, Run, Settings
from mss_utils.data import Store, is_built_in
from mss_utils.data.sources import MUSDB_STEMS
from mss_utils.files import write_text

PACKAGES = "torch torchaudio numpy musdb museval lightning-fabric papermill"  # with their versions


def record_environment(run: Run, store: Store) -> dict[str, Any]:
    """Write `environment.json`: versions, hardware, git commit, seeds and data; return it."""
    run.write_settings()
    facts = dict(
        python=platform.python_version(),
        **{package.replace("-", "_"): version(package) for package in PACKAGES.split()},
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        git_commit=_git_commit(),
        seeds=list(range(run.settings.seeds)),
        data_hash=store.sha,
        date=date.today().isoformat(),
        dataset=describe_dataset(store),
        sample_rate=store.sample_rate,
    )
    write_text(run.folder / "environment.json", json.dumps(facts, indent=2) + "\n")
    return facts


def describe_dataset(store: Store) -> dict[str, Any]:
    """Return name, stems, and tracks and hours of each split of a store."""
    tracks, hours = {}, {}
    for split in SPLITS:
        tracks[split] = len(store.split(split))
        samples = sum(track.samples for track in store.split(split))
        hours[split] = samples / store.sample_rate / 3600
    return dict(name=Path(store.source).name, stems=list(store.stems), tracks=tracks, hours=hours)


def dataset_kind(settings: Settings, dataset: dict[str, Any]) -> str:
    """Return songs (built-in), excerpts (of MUSDB18), musdb (MUSDB18) or own.

    `dataset` is the result of `describe_dataset`.
    """
    if is_built_in(settings):
        return "songs"
    n_test, test_s = dataset["tracks"]["test"], 3600 * dataset["hours"]["test"]
    is_named_musdb = not settings.data or "musdb" in dataset["name"].lower()
    is_like_musdb = sorted(dataset["stems"]) == sorted(MUSDB_STEMS) and n_test == 50
    if not is_named_musdb and not is_like_musdb:
        return "own"
    return "excerpts" if settings.profile == "musdb7" or test_s < 15 * n_test else "musdb"


def _git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "--verify", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)", info.read_text()) if info.exists() else None
    return name[1].strip() if name else platform.processor()


def check_device(settings: Settings) -> None:
    """Raise ValueError if this machine lacks the device, or enough devices, of the settings."""
    counts = dict(
        cpu=max(2, os.cpu_count() or 1),
        cuda=torch.cuda.device_count(),
        mps=int(torch.backends.mps.is_available()),
    )
    if settings.devices > counts[training_device(settings).type]:
        usable = ", ".join(f"{kind} ({count})" for kind, count in counts.items() if count)
        raise ValueError(
            f"device={settings.device} and devices={settings.devices}, but this machine has: "
            f"{usable}. Set device=auto, or lower devices."
        )


def training_device(settings: Settings) -> torch.device:
    """Return the device that a run trains and separates on."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def on_gpu(settings: Settings) -> bool:
    """Whether a training with these settings runs on a CUDA GPU."""
    return training_device(settings).type == "cuda"


def reset_peak_memory(settings: Settings) -> None:
    """Restart the measurement of `peak_memory_mb`; on CPUs only possible under Linux."""
    if on_gpu(settings):
        torch.cuda.reset_peak_memory_stats()
    elif (mark := Path("/proc/self/clear_refs")).exists():
        mark.write_text("5")


def peak_memory_mb(settings: Settings) -> float:
    """Return the peak memory since `reset_peak_memory` in MB: of the GPU, else of the process."""
    if on_gpu(settings):
        return torch.cuda.max_memory_allocated() / 2**20
    if Path("/proc/self/status").exists():
        return resident_mb("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb(field: str) -> float:
    """Return `VmRSS` (now), `VmHWM` (peak) or `RssAnon` of this process in MB, from /proc."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024

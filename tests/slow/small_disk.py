"""Run by test_disks.py in its own mount namespace: every stage on a full and a read-only disk.

    python small_disk.py DISK DATASET FINISHED_RUN

A small tmpfs is mounted on the empty folder DISK. Prints one line of JSON per stage and fault:
stage, fault, error, kind (class of the error), changed (files that the fault changed).
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import SMALL

from mss_utils.config import MODELS, create_or_load_run
from mss_utils.data import build_store, open_store
from mss_utils.environment import record_environment
from mss_utils.evaluation import evaluate
from mss_utils.models import load_model
from mss_utils.report.export import export
from mss_utils.separation import separate_file, write_estimates
from mss_utils.songs import render_songs
from mss_utils.training import train

DISK, DATASET, FINISHED = map(Path, sys.argv[1:])


def fill_disk():
    """Write a file until no space is left."""
    with (DISK / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def remount(mode):
    """Remount the disk read-only (`ro`) or writable (`rw`)."""
    subprocess.run(["mount", "-o", f"remount,{mode}", DISK], check=True)


def files():
    """Hash of every file on the disk."""
    skip = ("filler", ".lock")
    paths = [path for path in DISK.rglob("*") if path.is_file() and path.name not in skip]
    paths = [path for path in paths if not path.name.startswith(".part-")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def try_stage(stage, work):
    """Run a stage under every fault, then with space."""
    before = files()
    faults = {
        "full": (fill_disk, (DISK / "filler").unlink),
        "read-only": (lambda: remount("ro"), lambda: remount("rw")),
    }
    for fault, (begin, end) in faults.items():
        begin()
        try:
            work()
            error = None
        except Exception as caught:
            error = caught
        after = files()
        end()
        changed = [name for name, content in before.items() if after.get(name) != content]
        kind = type(error).__name__ if error else ""
        row = dict(stage=stage, fault=fault, error=str(error or ""), kind=kind, changed=changed)
        print(json.dumps(row), flush=True)
    work()
    print(json.dumps(dict(stage=stage, fault="none", written=files() != before)), flush=True)


subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", DISK], check=True)
run = create_or_load_run("smoke", "small", str(DATASET), "piano", SMALL)
songs = DISK / "songs"
try_stage(
    "songs", lambda: render_songs(songs, 1, 1, 1, duration_s=(4, 5), n_jobs=1, progress=False)
)
try_stage("store", lambda: build_store(DATASET, 16000, 1))
store = open_store(run.settings)
try_stage("training", lambda: [train(run, store, "piano", model) for model in MODELS])
try_stage("environment", lambda: record_environment(run, store))
try_stage("estimates", lambda: write_estimates(run, store))
try_stage("evaluation", lambda: evaluate(run, store))
song = DATASET / "test" / "test song 0" / "piano.wav"
model = load_model(run.model_folder("piano", "unet"))
try_stage("separate", lambda: separate_file(song, model, DISK / "separated"))
ignore = shutil.ignore_patterns("*.ckpt", "ablations", "data_study", "estimates")
shutil.copytree(FINISHED, DISK / "results" / "full" / "smoke", ignore=ignore)
try_stage("export", lambda: export("full", "copy"))

"""Run by test_disks.py in a mount namespace of its own: every stage on a disk that is full, nearly full or read-only, then with room again.

    python small_disk.py DISK DATASET FINISHED_RUN

DISK is an empty folder, on which a small tmpfs is mounted. Prints one line of JSON a stage and fault: stage, fault, error (its words),
kind (its class), changed (files of before that are not as they were), left (parts of files).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

DISK, DATASET, FINISHED = map(Path, sys.argv[1:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", DISK], check=True)
os.environ |= dict(MSS_RESULTS=str(DISK / "results"), MSS_CACHE=str(DISK / "cache"))

from conftest import SMALL, write_notebook

from mss_utils import figures, pipeline
from mss_utils.config import MODELS, Run, create_or_load_run
from mss_utils.data import build_store, open_store
from mss_utils.environment import record_environment
from mss_utils.evaluation.scores import evaluate
from mss_utils.listening.excerpts import cut_excerpt, write_excerpt
from mss_utils.models import load_model
from mss_utils.report.collections import export
from mss_utils.separation.song_files import separate_file
from mss_utils.songs import render_songs
from mss_utils.training.loop import train

NEARLY = 16 * 1024  # bytes that are left on a disk that is nearly full


def filled(left: int) -> None:
    """Fill the disk up to some bytes."""
    with (DISK / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - left))


def remount(mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", DISK], check=True)


FAULTS = {
    "full": (lambda: filled(0), lambda: (DISK / "filler").unlink()),
    "nearly full": (lambda: filled(NEARLY), lambda: (DISK / "filler").unlink()),
    "read-only": (lambda: remount("ro"), lambda: remount("rw")),
}


def files() -> dict[str, str]:
    """What lies on the disk, by content."""
    there = [
        path for path in DISK.rglob("*") if path.is_file() and path.name not in ("filler", ".lock")
    ]
    return {
        str(path.relative_to(DISK)): hashlib.sha256(path.read_bytes()).hexdigest() for path in there
    }


def tried(stage: str, work) -> None:
    """One stage under every fault, and then with room."""
    before = files()
    for fault, (strike, relent) in FAULTS.items():
        strike()
        try:
            work()
            found = dict(error="", kind="")
        except Exception as error:
            found = dict(error=str(error), kind=type(error).__name__)
        after = files()
        relent()
        changed = [name for name, content in before.items() if after.get(name) != content]
        print(
            json.dumps(
                dict(
                    stage=stage,
                    fault=fault,
                    changed=changed,
                    left=[str(path) for path in DISK.rglob(".part-*")],
                    **found,
                )
            ),
            flush=True,
        )
    work()
    grown = len(set(files().items()) - set(before.items()))
    print(
        json.dumps(
            dict(stage=stage, fault="none", error="", kind="", changed=[], left=[], written=grown)
        ),
        flush=True,
    )


def little_notebook(folder: Path) -> None:
    """A stage of 200 kB of output."""
    folder.mkdir()
    write_notebook(folder / "little.ipynb", "print('x' * 200_000)")
    pipeline.NOTEBOOKS = folder


run = create_or_load_run("smoke", "small", str(DATASET), "piano", SMALL)
tried(
    "songs",
    lambda: render_songs(DISK / "songs", 1, 1, 1, duration_s=(4, 5), n_jobs=1, progress=False),
)
tried("store", lambda: build_store(DATASET, 16000, 1))
store = open_store(run.settings)
tried("training", lambda: [train(run, store, "piano", model) for model in MODELS])
tried("environment", lambda: record_environment(run, store))
tried("figure", lambda: figures.save_vector(figures.pipeline(), run, "pipeline"))
tried("evaluation", lambda: evaluate(run, store))
mixture, stems = store.load(store.split("test")[0])
heard = cut_excerpt(dict(mixture=mixture, reference=stems[0]), "a track", "piano", 16000, 1.0)
tried("excerpts", lambda: write_excerpt(run, heard, 16000))
song = DATASET / "test" / "test song 0" / "piano.wav"
model = load_model(run.model_folder("piano", "unet"))
tried("separate", lambda: separate_file(song, model, DISK / "separated"))
tried("separate to flac", lambda: separate_file(song, model, DISK / "separated as flac", flac=True))
little_notebook(Path(os.environ["LITTLE"]))
tried("notebook", lambda: pipeline._execute(run, "little", "key"))
shutil.copytree(
    FINISHED,
    DISK / "results" / "full" / "smoke",
    ignore=shutil.ignore_patterns("*.ckpt", "ablations", "data_study"),
)
finished = Run(
    "full/smoke",
    create_or_load_run("smoke", "full/smoke").settings,
    DISK / "results" / "full" / "smoke",
)
tried("report", lambda: pipeline.build_report(finished))
tried("export", lambda: export("full", "copy"))

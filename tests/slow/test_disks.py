"""A full and a read-only disk at every stage: one clear error, earlier results unchanged.

The test runs this file as a script in its own mount namespace, where a small disk can be mounted:

    python test_disks.py DISK DATASET FINISHED_RUN
"""

import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import SMALL

from mss_utils.config import MODELS, ROOT, create_or_load_run
from mss_utils.data import build_store, open_store
from mss_utils.environment import record_environment
from mss_utils.evaluation import evaluate
from mss_utils.models import load_model
from mss_utils.report.export import export
from mss_utils.separation import separate_file, write_estimates
from mss_utils.songs import render_songs
from mss_utils.training import train


def test_unwritable_disk_is_one_error_and_loses_nothing(dataset, smoke_run, tmp_path):
    namespace = ["unshare", "--mount", "--map-root-user"]
    mount = [*namespace, "mount", "-t", "tmpfs", "none", "/mnt"]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not allow tests to mount a disk")
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        MSS_RESULTS=str(tmp_path / "results"),
        MSS_CACHE=str(tmp_path / "cache"),
    )
    script = [sys.executable, __file__, str(tmp_path), str(dataset), str(smoke_run[1])]
    done = subprocess.run([*namespace, *script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@contextmanager
def full(disk):
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    (disk / "filler").unlink()


@contextmanager
def read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def hashes(disk):
    paths = [path for path in disk.rglob("*") if path.is_file()]
    named = [path for path in paths if not path.name.startswith((".part-", ".lock", "filler"))]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in named}


def check_stage(disk, work):
    """Run a stage under every fault, then with space."""
    before = hashes(disk)
    for fault, words in ((full, "No space left to write"), (read_only, "Cannot write")):
        with fault(disk):
            with pytest.raises(OSError, match=words) as error:
                work()
            assert before.items() <= hashes(disk).items()
        assert type(error.value) is OSError and "\n" not in str(error.value), error.value
    work()
    assert hashes(disk) != before


def check_all_stages(disk, dataset, finished):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], check=True)
    run = create_or_load_run("smoke", "small", str(dataset), "piano", SMALL)
    songs = dict(duration_s=(4, 5), n_jobs=1, progress=False)
    check_stage(disk, lambda: render_songs(disk / "songs", 1, 1, 1, **songs))
    check_stage(disk, lambda: build_store(dataset, 16000, 1))
    store = open_store(run.settings)
    check_stage(disk, lambda: [train(run, store, "piano", model) for model in MODELS])
    check_stage(disk, lambda: record_environment(run, store))
    check_stage(disk, lambda: write_estimates(run, store))
    check_stage(disk, lambda: evaluate(run, store))
    song = dataset / "test" / "test song 0" / "piano.wav"
    model = load_model(run.model_folder("piano", "unet"))
    check_stage(disk, lambda: separate_file(song, model, disk / "separated"))
    ignore = shutil.ignore_patterns("*.ckpt", "ablations", "data_study", "estimates")
    shutil.copytree(finished, disk / "results" / "full" / "smoke", ignore=ignore)
    check_stage(disk, lambda: export("full", "copy"))


if __name__ == "__main__":
    check_all_stages(*map(Path, sys.argv[1:]))

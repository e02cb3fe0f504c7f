"""A run that is killed and restarted ends with the tables and weights of an undisturbed one."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import psutil
import pytest
import soundfile
from conftest import SMALL, command, start

from mss_utils.config import Run, create_or_load_run
from mss_utils.data import open_store
from mss_utils.files import atomic_write
from mss_utils.training import checkpoints, monitor, train

TIMING_COLUMNS = ["train_s", "audio_s_per_s", "inference_rtf", "peak_memory_mb"]


def kill_after(seconds, with_children, process):
    """Kill a process if it still runs after so many seconds."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True) if with_children else []
        for victim in (process, *children):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        process.communicate()


def results_of(folder):
    """Tables without timing columns, weights and data hash of a run."""
    results = {"data": json.loads((folder / "environment.json").read_text())["data_hash"]}
    for path in [*folder.glob("tables/*.csv"), *folder.rglob("history.csv")]:
        table = pd.read_csv(path).drop(columns=TIMING_COLUMNS, errors="ignore")
        results[path.relative_to(folder)] = table.to_csv()
    for path in folder.rglob("model.safetensors"):
        results[path.relative_to(folder)] = path.read_bytes()
    return results


def test_killed_run_ends_as_an_undisturbed_run(smoke_run, tmp_path):
    rng = random.Random(0)
    folders = dict(MSS_RESULTS=str(tmp_path / "results"), MSS_CACHE=str(tmp_path / "cache"))
    arguments = ["run", "--profile", "smoke", "--run", "killed"]
    for _ in range(10):
        process = start("mss_utils", *arguments, **folders)
        kill_after(rng.uniform(1, 14), rng.random() < 0.5, process)
    done = command(*arguments, **folders)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(tmp_path / "results" / "killed") == results_of(smoke_run[1])


def train_until_killed(count, arguments):
    """Train, and send SIGKILL to this process in the middle of a write of its checkpoint."""
    write_bytes, calls = checkpoints.write_bytes, itertools.count(1)

    def deadly(path, content):
        if next(calls) == count:
            atomic_write(path).__enter__().write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(path, content)

    checkpoints.write_bytes = deadly
    monitor.LOG_INTERVAL_S = monitor.SAVE_INTERVAL_S = 0.0  # save after every step
    run = create_or_load_run(*arguments)
    train(run, open_store(run.settings), "piano", "unet")


@pytest.mark.parametrize("count", [1, 3])
def test_kill_in_the_middle_of_a_write(count, small_run, store, tmp_path):
    arguments = ["smoke", "small", small_run.settings.data, "piano", SMALL]
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=train_until_killed, args=(count, arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole = Run("whole", small_run.settings, tmp_path / "whole")
    for run in (small_run, whole):
        train(run, store, "piano", "unet")
    files = [run.model_folder("piano", "unet") / "model.safetensors" for run in (whole, small_run)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_separation_leaves_no_files(sent, smoke_run, tmp_path):
    model = smoke_run[1] / "models/piano/unet/seed0"
    song, out = tmp_path / "song.wav", tmp_path / "out"
    out.mkdir()
    soundfile.write(song, 0.1 * np.random.default_rng(0).standard_normal(30 * 60 * 16000), 16000)
    process = start("mss_utils", "separate", song, "--model", model, "--out", out)
    deadline = time.monotonic() + 60
    while not list(out.rglob("*.wav")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1] and "Traceback" not in errors
    assert not list(out.iterdir())

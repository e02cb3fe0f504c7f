"""A run that is killed and restarted ends with the tables and weights of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import soundfile
from conftest import MSS_UTILS, command
from safetensors.torch import save_file

from mss_utils.config import ROOT, resolve_settings
from mss_utils.models import build_model

N_KILLS = 10
MAX_DELAY_S = 14.0
TIMING_COLUMNS = {"train_s", "audio_s_per_s", "inference_rtf", "peak_memory_mb"}


def start(arguments, **environment):
    """`python -m mss_utils ...` in the background."""
    return subprocess.Popen(
        [*MSS_UTILS, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def kill_after(seconds, with_children, arguments, **environment):
    """Start a command and kill it; False if it finished earlier."""
    process = start(arguments, **environment)
    try:
        process.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True) if with_children else []
        for victim in [psutil.Process(process.pid), *children]:
            if victim.is_running():
                victim.kill()
        process.communicate()
        return True


def results_of(folder):
    """Tables without timing columns, weights and data hash of a run."""
    results = {"data": json.loads((folder / "environment.json").read_text())["data_hash"]}
    for path in [*folder.glob("tables/*.csv"), *folder.rglob("history.csv")]:
        table = pd.read_csv(path).drop(columns=TIMING_COLUMNS, errors="ignore")
        results[str(path.relative_to(folder))] = table.to_csv()
    for path in folder.rglob("model.safetensors"):
        results[str(path.relative_to(folder))] = path.read_bytes()
    return results


def test_killed_run_ends_as_an_undisturbed_run(smoke_run, tmp_path):
    seed = int(os.environ.get("MSS_TEST_SEED", time.time()))
    print(f"repeat with MSS_TEST_SEED={seed}")
    rng = random.Random(seed)
    expected = results_of(smoke_run[1])
    folders = dict(MSS_RESULTS=str(tmp_path / "results"), MSS_CACHE=str(tmp_path / "cache"))
    arguments = ["run", "--profile", "smoke", "--run", "killed"]
    folder = tmp_path / "results" / "killed"
    kills = 0
    while kills < N_KILLS:
        if kill_after(rng.uniform(1, MAX_DELAY_S), rng.random() < 0.5, arguments, **folders):
            kills += 1
        else:  # the run finished: compare it and start again
            assert results_of(folder) == expected
            shutil.rmtree(tmp_path / "results")
            shutil.rmtree(tmp_path / "cache")
    done = command(*arguments, **folders)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(folder) == expected


@pytest.fixture(scope="module")
def song_and_model(tmp_path_factory):
    """A 30-minute song and an untrained model."""
    folder = tmp_path_factory.mktemp("song")
    settings = resolve_settings("smoke")
    weights = build_model("unet", settings).state_dict()
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors"
    )
    description = dict(model="unet", target="piano", settings=settings.model_dump(mode="json"))
    (folder / "model.json").write_text(json.dumps(description))
    noise = 0.1 * np.random.default_rng(0).standard_normal(30 * 60 * 16000)
    soundfile.write(folder / "song.wav", noise, 16000)
    return folder / "song.wav", folder


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_separation_leaves_no_files(sent, song_and_model, tmp_path):
    song, model = map(str, song_and_model)
    process = start(["separate", song, "--model", model, "--out", str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.wav")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1] and "Traceback" not in errors
    assert not list(tmp_path.iterdir())

import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, command

from mss_utils.config import ROOT, WAVEFORM_MODELS, Run
from mss_utils.training import reconstruction_check, train

# Train and send SIGKILL to this process at the n-th call of a function; save after every step.
KILLED = """
import os, signal, sys
from mss_utils.config import create_or_load_run
from mss_utils.data import open_store
from mss_utils.training import checkpoints, loop, monitor
name, count, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
module = loop if name == "train_step" else checkpoints
function, calls = getattr(module, name), 0
def deadly(*arguments):
    global calls
    calls += 1
    if calls == count:
        if name == "atomic_write":
            function(*arguments).__enter__().write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
setattr(module, name, deadly)
monitor.LOG_INTERVAL_S = monitor.SAVE_INTERVAL_S = 0.0
run = create_or_load_run(*arguments)
loop.train(run, open_store(run.settings), "piano", "unet")
"""


@pytest.mark.parametrize(
    "name, count", [("train_step", 5), ("atomic_write", 1), ("atomic_write", 3)]
)
def test_killed_training_resumes(small_run, store, small_settings, tmp_path, name, count):
    whole = Run("whole", small_run.settings, tmp_path / "whole")
    train(whole, store, "piano", "unet")
    arguments = [name, str(count), "smoke", "small", small_settings.data, "piano", SMALL]
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    train(small_run, store, "piano", "unet")
    files = [run.model_folder("piano", "unet") / "model.safetensors" for run in (whole, small_run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_processes_have_the_gradients_of_one(small_settings, tmp_path):
    """Adam's first moments after one step are the clipped gradients times 0.1."""
    moments = {}
    overrides = ["segment_s=0.5", "valid_s=2", "steps=1", "valid_every=1", "batch_size=4"]
    for processes in (1, 2):
        arguments = ["--profile", "smoke", "--run", f"run{processes}", "--target", "piano"]
        arguments += ["--data", small_settings.data, "--model", "demucs_attention"]
        arguments += ["--set", *overrides, "device=cpu", f"devices={processes}"]
        done = command("train", *arguments, MSS_RESULTS=str(tmp_path), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        folder = tmp_path / f"run{processes}" / "models/piano/demucs_attention/seed0"
        assert json.loads((folder / "model.json").read_text())["processes"] == processes
        parts = torch.load(folder / "last.ckpt", weights_only=True)["parts"]
        moments[processes] = [value["exp_avg"] for value in parts["optimizer"]["state"].values()]
    largest = max(tensor.abs().max().item() for tensor in moments[1])
    for one, two in zip(moments[1], moments[2], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("name", WAVEFORM_MODELS)
def test_waveform_models_reconstruct_an_unseen_track(name, songs_store):
    store, settings = songs_store
    assert reconstruction_check(name, store, settings, n_steps=100)["sdr_db"].max() >= 20

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mss_utils.config import WAVEFORM_MODELS
from mss_utils.training import reconstruction_check

COMMAND = """
import sys
from mss_utils.__main__ import main
from mss_utils.environment import resident_mb
assert main(sys.argv[1:]) == 0
print(resident_mb("VmHWM"))
"""


def peak_memory(minutes, model, folder):
    """Peak memory in MB of separating so many minutes of 44.1 kHz stereo, in a new process."""
    song = folder / "song.wav"
    block = 0.1 * np.random.default_rng(0).standard_normal((60 * 44100, 2))
    with soundfile.SoundFile(song, "w", 44100, 2, "PCM_16") as file:
        for _ in range(minutes):
            file.write(block)
    call = [sys.executable, "-c", COMMAND, "separate", song, "--model", model, "--out", folder]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("song.piano.wav", "song.piano.residual.wav"):
        assert soundfile.info(folder / name).frames == minutes * 60 * 44100
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_hour_long_song_needs_no_more_memory(smoke_run, tmp_path):
    model = smoke_run[1] / "models/piano/unet/seed0"
    short, long = (peak_memory(minutes, model, tmp_path) for minutes in (2, 60))
    assert long < short + 60


@pytest.mark.parametrize("name", WAVEFORM_MODELS)
def test_waveform_models_reconstruct_an_unseen_track(name, songs_store):
    store, settings = songs_store
    assert reconstruction_check(name, store, settings)["sdr_db"].max() >= 20

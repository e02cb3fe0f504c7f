"""An hour-long song, a thousand tracks, hours of music: memory must not grow with length."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_dataset

from mss_utils.config import resolve_settings
from mss_utils.data import build_store
from mss_utils.data import store as store_module
from mss_utils.data.store import Store, Track
from mss_utils.environment import resident_mb
from mss_utils.mixing import Mixer

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

SEPARATE = """
import sys
from pathlib import Path
from mss_utils.config import resolve_settings
from mss_utils.environment import resident_mb
from mss_utils.models import build_model
from mss_utils.separation import separate_file
model = build_model("unet", resolve_settings("smoke")).eval()
model.sample_rate, model.channels, model.segment_s, model.target = 16000, 1, 2.0, "piano"
separate_file(Path(sys.argv[1]), model, Path(sys.argv[2]))
print(resident_mb("VmHWM"))
"""


def peak_memory(minutes, folder):
    """Peak memory in MB of separating so many minutes of 44.1 kHz stereo, in a new process."""
    block = 0.1 * np.random.default_rng(0).standard_normal((60 * 44100, 2))
    song = folder / f"{minutes}.wav"
    with soundfile.SoundFile(song, "w", 44100, 2, "PCM_16") as file:
        for _ in range(minutes):
            file.write(block)
    command = [sys.executable, "-c", SEPARATE, str(song), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in ("", ".residual"):
        result = folder / f"{minutes}.piano{kind}.wav"
        assert soundfile.info(result).frames == minutes * 60 * 44100
        result.unlink()
    song.unlink()
    return float(done.stdout.splitlines()[-1])


def test_hour_long_song_needs_no_more_memory(tmp_path):
    short, long = peak_memory(2, tmp_path), peak_memory(60, tmp_path)
    print(f"peak memory: 2 minutes {short:.0f} MB, 60 minutes {long:.0f} MB")
    assert long < short + 60


def test_store_of_thousand_tracks_opens_fast(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 980, 10, 10, seconds=0.02)
    build_store(root, 16000, 1)
    monkeypatch.setattr(store_module, "read_track", lambda source: pytest.fail("decoded again"))
    started = time.perf_counter()
    assert len(build_store(root, 16000, 1).tracks) == 1000
    assert time.perf_counter() - started < 5


def long_store(hours, folder):
    """A store with one training track; the target is noise, everything else a hole in the file."""
    samples, stems = round(hours * 3600 * 16000), ("bass", "drums", "piano", "vocals")
    audio = np.lib.format.open_memmap(folder / "long.npy", "w+", np.int16, (5, 1, samples))
    noise = np.random.default_rng(0).integers(-3000, 3000, 60 * 16000, dtype=np.int16)
    for start in range(0, samples, len(noise)):
        audio[3, 0, start : start + len(noise)] = noise[: samples - start]
    audio.flush()
    track = Track(
        name="long",
        split="train",
        file="long.npy",
        source="",
        fingerprint="",
        sha="",
        samples=samples,
        scale=1 / 32767,
        source_rates=(16000,),
        source_samples=(samples,),
        rms=(0.1,) * 5,
        peak=(0.1,) * 5,
        residual_rms=0.0,
        active=((1,) * 5,) * 5,
        n_windows=1,
    )
    values = dict(folder=folder, source="", sample_rate=16000, channels=1)
    return Store(stems=stems, tracks=(track,), **values)


def test_loader_memory_does_not_grow_with_music_read(tmp_path):
    hours, settings_text = 3, "segment_s=6 batch_size=16 random_mix=False curriculum=False"
    settings = resolve_settings("demo", overrides=settings_text)
    mixer = Mixer(long_store(hours, tmp_path), settings, "piano")
    steps = round(hours * 3600 / (16 * 6))
    memory = []
    for step, _ in enumerate(mixer.draws(0, steps)):
        if step in (steps // 10, steps - 1):
            memory.append(resident_mb("RssAnon"))
    print(f"memory after a tenth and after all of {hours} h: {memory} MB")
    assert memory[1] < memory[0] + 60

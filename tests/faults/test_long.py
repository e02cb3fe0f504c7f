"""An hour of song, a thousand tracks, hours of training music: done in time, and in memory that does not grow."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import write_dataset

from mss_utils.config import resolve_settings
from mss_utils.data import build_store
from mss_utils.data import store as store_module
from mss_utils.data.store import Index, Store, Track
from mss_utils.environment import resident_mb
from mss_utils.mixing import Mixer

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from /proc"
)

# Memory at the most while a song is separated; by itself, for a process never gives back what it had at the most.
SEPARATE = """
import sys
from pathlib import Path
from mss_utils.models import build_model
from mss_utils.separation import separate_file
from mss_utils.settings import resolve_settings
from mss_utils.environment import resident_mb
settings = resolve_settings("smoke")
model = build_model("unet", settings).eval()
model.sample_rate, model.channels, model.segment_s, model.target = 16000, 1, 2.0, "piano"
separate_file(Path(sys.argv[1]), model, Path(sys.argv[2]))
print(resident_mb("VmHWM"))
"""


def song_of(minutes: float, rate: int, channels: int, path: Path) -> Path:
    """Noise, written a minute at a time."""
    block = (0.1 * np.random.default_rng(0).standard_normal((60 * rate, channels))).astype(
        np.float32
    )
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16") as file:
        for _ in range(round(minutes)):
            file.write(block)
    return path


def test_an_hour_is_separated_in_the_memory_of_two_minutes(tmp_path, long_form, count):
    minutes, rate, channels = (60, 44100, 2) if long_form else (8, 16000, 1)
    peaks = {}
    for length in (2, minutes):
        song = song_of(length, rate, channels, tmp_path / f"{length}.wav")
        done = subprocess.run(
            [sys.executable, "-c", SEPARATE, str(song), str(tmp_path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[length] = float(done.stdout)
        found = [
            soundfile.info(tmp_path / f"{length}.piano{kind}.wav") for kind in ("", ".residual")
        ]
        assert {(info.frames, info.samplerate, info.channels) for info in found} == {
            (length * 60 * rate, rate, channels)
        }
        for path in tmp_path.iterdir():
            path.unlink()
    print("MB at the most by minutes:", peaks)
    assert peaks[minutes] < peaks[2] + 60, peaks
    count("minutes of one song", minutes)


def test_a_thousand_tracks_are_decoded_and_opened(tmp_path, monkeypatch, count):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 980, 10, 10, seconds=0.02)
    build_store(root, 16000, 1)
    monkeypatch.setattr(store_module, "read_track", lambda source: pytest.fail("decoded again"))
    started = time.perf_counter()
    assert len(build_store(root, 16000, 1).tracks) == 1000
    seconds = time.perf_counter() - started
    print(f"a store of a thousand tracks opened in {seconds:.2f} s")
    assert seconds < 5
    count("tracks in a store", 1000)


def hours_of_music(hours: float, folder: Path) -> Store:
    """A store of one training track in which the target is noise and all else silence that takes no room on the disk."""
    samples, stems = round(hours * 3600 * 16000), ("bass", "drums", "piano", "vocals")
    audio = np.lib.format.open_memmap(folder / "long.npy", "w+", np.int16, (5, 1, samples))
    noise = np.random.default_rng(0).integers(-3000, 3000, 60 * 16000, dtype=np.int16)
    for start in range(0, samples, len(noise)):
        audio[3, 0, start : start + len(noise)] = noise[: samples - start]
    audio.flush()
    facts = dict(
        source="",
        fingerprint="",
        sha="",
        scale=1 / 32767,
        source_rates=(16000,),
        source_samples=(samples,),
        rms=(0.1,) * 5,
        peak=(0.1,) * 5,
    )
    track = Track(
        name="long",
        split="train",
        file="long.npy",
        samples=samples,
        residual_rms=0.0,
        active=((1,) * 5,) * 5,
        n_windows=1,
        **facts,
    )
    Index(format=2, source="", sample_rate=16000, channels=1, stems=stems, tracks=(track,))
    return Store(folder, "", 16000, 1, stems, (track,))


def test_three_hours_of_music_go_through_the_loader_in_flat_memory(tmp_path, long_form, count):
    """What the kernel keeps of the file it can drop; what this process holds must not grow with what it has read."""
    hours = 3
    store = hours_of_music(hours, tmp_path)
    settings = resolve_settings(
        "demo",
        overrides="segment_s=6 batch_size=16 random_mix=False curriculum=False loader_workers=2",
    )
    mixer, step_s = Mixer(store, settings, "piano"), 16 * 6
    steps = round(hours * 3600 / step_s) if not long_form else 4 * round(hours * 3600 / step_s)
    held, total = [], 0.0
    for step, draw in enumerate(mixer.draws(0, steps)):
        total += draw.segments.shape[0] * 6
        if step in (steps // 10, steps - 1):
            held.append(resident_mb("RssAnon"))
    print(f"MB held after a tenth and after all of {total / 3600:.1f} hours read: {held}")
    assert total >= hours * 3600 - step_s and held[1] < held[0] + 60, held
    assert torch.is_tensor(draw.segments)
    count("hours of training music", hours)

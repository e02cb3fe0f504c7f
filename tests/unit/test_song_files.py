import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from mss_utils.__main__ import main
from mss_utils.models import build_model
from mss_utils.separation import song_files
from mss_utils.separation.song_files import bandwidth_note, separate_file

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")


class Gain(torch.nn.Module):
    """Multiplies its input; fails at the third window if asked to."""

    sample_rate, channels, segment_s, target = 16000, 1, 0.5, "piano"

    def __init__(self, gain=1.0, fails=False):
        super().__init__()
        self.gain, self.windows_left = gain, 2 if fails else 10**9

    def forward(self, mixture):
        if self.windows_left == 0:
            raise FloatingPointError("third window")
        self.windows_left -= 1
        return self.gain * mixture


def noise(channels, samples, peak=0.5):
    return np.random.default_rng(0).uniform(-peak, peak, (channels, samples)).astype(np.float32)


def band_limited(channels, samples, rate, top_hz):
    """Noise from 50 Hz to `top_hz` that begins and ends in silence."""
    spectrum = np.fft.rfft(noise(channels, samples))
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    spectrum[:, (frequency < 50) | (frequency > top_hz)] = 0
    return (np.fft.irfft(spectrum, samples) * np.hanning(samples)).astype(np.float32)


def error_db(estimate, expected):
    assert estimate.shape == expected.shape
    return 10 * np.log10(np.sum((estimate - expected) ** 2.0) / np.sum(expected**2.0) + 1e-30)


def write(path, audio, rate=16000, subtype="FLOAT"):
    soundfile.write(path, audio.T, rate, subtype=subtype)
    return path


def read_results(paths):
    """Target and residual, each `(channels, samples)`, and their sample rate."""
    (target, rate), (residual, other) = (
        soundfile.read(path, dtype="float64", always_2d=True) for path in paths
    )
    assert rate == other
    return target.T, residual.T, rate


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", *arguments], check=True)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 22254])
@pytest.mark.parametrize("seconds", [0.1, 2.0])
def test_song_keeps_its_sample_rate(rate, seconds, tmp_path):
    song = band_limited(2, round(seconds * rate), rate, min(7000, 0.43 * rate))
    paths = separate_file(write(tmp_path / "song.wav", song, rate), Gain(), tmp_path / "out")
    target, residual, found_rate = read_results(paths)
    assert found_rate == rate
    assert error_db(target, song) < -80
    np.testing.assert_allclose(target + residual, song, atol=1e-6)
    assert [path.name for path in paths] == ["song.piano.wav", "song.piano.residual.wav"]
    assert set(paths) == set((tmp_path / "out").iterdir())


def test_high_frequencies_stay_in_the_residual(tmp_path):
    low, high = 0.2 * np.sin(2 * np.pi * np.array([[1000], [12000]]) * np.arange(44100) / 44100)
    song = write(tmp_path / "song.wav", (low + high)[None], 44100)
    target, residual, _ = read_results(separate_file(song, Gain(), tmp_path))
    assert error_db(target[0, 4000:-4000], low[4000:-4000]) < -80
    assert "8 to 22.05 kHz stay in the residual" in bandwidth_note(Gain(), 44100)
    assert bandwidth_note(Gain(), 16000) == bandwidth_note(Gain(), 8000) == ""


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("flac", [False, True])
def test_target_and_residual_add_up(subtype, flac, tmp_path):
    song = write(tmp_path / "song.wav", noise(2, 60000), 44100, subtype)
    exact, _ = soundfile.read(song)
    paths = separate_file(song, Gain(0.4), tmp_path / "out", flac)
    target, residual, _ = read_results(paths)
    assert {soundfile.info(path).subtype for path in paths} == {"PCM_24" if flac else "FLOAT"}
    assert np.abs(target + residual - exact.T).max() < 2**-23


def test_flac_is_clipped_at_full_scale(tmp_path, capsys):
    exact = noise(2, 30000, peak=0.9)
    song = write(tmp_path / "song.wav", exact)
    target, residual, _ = read_results(separate_file(song, Gain(4), tmp_path, flac=True))
    np.testing.assert_allclose(target, np.clip(4 * exact, -1, 1), atol=2**-22)
    not_clipped = np.abs(exact - np.clip(4 * exact, -1, 1)) < 1
    assert np.abs(target + residual - exact)[not_clipped].max() < 2**-22
    assert "above full scale are clipped (peak +11.1 dB)" in capsys.readouterr().out
    target, _, _ = read_results(separate_file(song, Gain(4), tmp_path))
    assert error_db(target, 4 * exact) < -100, "float WAV holds any level"
    separate_file(song, Gain(), tmp_path, flac=True)
    assert "clipped" not in capsys.readouterr().out


def test_long_wav_is_rf64(tmp_path, monkeypatch):
    song = write(tmp_path / "song.wav", noise(1, 10000))
    monkeypatch.setattr(song_files, "WAV_MAX_BYTES", 39999)
    paths = separate_file(song, Gain(), tmp_path / "out")
    assert {soundfile.info(path).format for path in paths} == {"RF64"}


@needs_ffmpeg
@pytest.mark.parametrize("name", ["song.mp3", "song.m4a", "song.ogg", "song.flac", "12:30 -x.mka"])
def test_any_format_is_read(name, tmp_path):
    stereo = band_limited(2, 3 * 44100, 44100, 5000)
    wav = write(tmp_path / "wav.wav", stereo / np.abs(stereo).max() / 2, 44100, "PCM_16")
    ffmpeg("-i", wav, f"file:{tmp_path / name}")
    target, residual, rate = read_results(separate_file(tmp_path / name, Gain(), tmp_path / "out"))
    assert rate == 44100 and target.shape[0] == 2 and abs(target.shape[1] / 44100 - 3) < 0.1
    song = (target + residual)[:, : stereo.shape[1]]
    original = soundfile.read(wav)[0].T[:, : song.shape[1]]
    assert error_db(song, original) < -10, "a shift by a few samples would be far above"


def test_missing_ffmpeg_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    soundfile.write(tmp_path / "song.ogg", noise(2, 10000).T, 44100)
    with pytest.raises(FileNotFoundError, match="song.ogg needs ffmpeg: install it"):
        separate_file(tmp_path / "song.ogg", Gain(), tmp_path)
    separate_file(write(tmp_path / "song.wav", noise(2, 10000)), Gain(), tmp_path)


BROKEN = {
    "none.wav": "none.wav",
    "folder.wav": "folder.wav",
    "text.mp3": "Cannot read .*text.mp3 .ffmpeg: .*expected a song",
    "empty.wav": "Cannot read .*empty.wav",
    "silent.mkv": "silent.mkv holds no sound",
    "nothing.wav": "holds no samples",
    "nan.wav": "NaN or infinite samples after [23] s",
    "absurd.wav": "absurd.wav has 7 samples a second; expected 1000 to 768000",
    "list.m3u": "is a list of files",
}


@pytest.fixture(scope="module")
def broken_songs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "folder.wav").mkdir()
    (folder / "empty.wav").touch()
    (folder / "text.mp3").write_text("not music " * 1000)
    (folder / "list.m3u").write_text("#EXTM3U\nother.wav\n")
    write(folder / "nothing.wav", np.zeros((1, 0)))
    write(folder / "absurd.wav", noise(1, 1000), 7)
    nan = noise(1, 64000)
    nan[0, 50000] = np.nan
    write(folder / "nan.wav", nan)
    if shutil.which("ffmpeg"):
        ffmpeg("-f", "lavfi", "-i", "color=d=0.1", "-an", folder / "silent.mkv")
    return folder


@needs_ffmpeg
@pytest.mark.parametrize("name", BROKEN)
def test_broken_song_is_one_sentence_and_leaves_nothing(name, broken_songs, tmp_path):
    with pytest.raises((ValueError, OSError), match=BROKEN[name]) as caught:
        separate_file(broken_songs / name, Gain(), tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_estimate_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="estimate is not finite"):
        separate_file(write(tmp_path / "song.wav", noise(1, 9000)), Gain(np.nan), tmp_path)


@pytest.mark.parametrize("flac", [False, True])
def test_failed_separation_keeps_old_results(flac, tmp_path):
    song, out = write(tmp_path / "song.wav", noise(1, 64000)), tmp_path / "out"
    before = {path: path.read_bytes() for path in separate_file(song, Gain(), out, flac)}
    with pytest.raises(FloatingPointError, match="third window"):
        separate_file(song, Gain(fails=True), out, flac)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_song_is_never_overwritten(tmp_path):
    stored = write(tmp_path / "song.piano.wav", noise(1, 3000))
    (tmp_path / "song.wav").symlink_to(stored)
    before = stored.read_bytes()
    with pytest.raises(ValueError, match="would be overwritten"):
        separate_file(tmp_path / "song.wav", Gain(), tmp_path)
    assert stored.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@needs_ffmpeg
def test_readable_part_of_a_damaged_song_is_separated(tmp_path, capsys):
    song = tmp_path / "song.mp3"
    soundfile.write(song, noise(1, 160000)[0], 16000, format="MP3")
    separate_file(song, Gain(), tmp_path / "out")
    assert "damaged" not in capsys.readouterr().err
    song.write_bytes(song.read_bytes()[:9000] + bytes(range(256)) * 40)
    separate_file(song, Gain(), tmp_path / "out")
    assert "song.mp3 is damaged, only a part was read" in capsys.readouterr().err


def test_flac_holds_eight_channels(tmp_path):
    song = write(tmp_path / "song.wav", noise(9, 1000))
    with pytest.raises(ValueError, match="FLAC cannot hold 9 channels"):
        separate_file(song, Gain(), tmp_path / "out", flac=True)


@pytest.mark.parametrize("stem", ["ü" * 120, "<b>&'", "...", "-rf", "a\nb", "caf\udce9"])
def test_song_names_stay_in_the_folder(stem, tmp_path):
    song = write(tmp_path / "song.wav", noise(1, 3000)).rename(tmp_path / f"{stem}.wav")
    paths = separate_file(song, Gain(), tmp_path / "out")
    assert set((tmp_path / "out").iterdir()) == set(paths)
    assert all(path.name.startswith(stem[:60]) for path in paths)


def test_command_separates_a_song(small_settings, tmp_path, capsys):
    weights = build_model("unet", small_settings).state_dict()
    save_file({name: w.contiguous() for name, w in weights.items()}, tmp_path / "model.safetensors")
    settings = small_settings.model_dump(mode="json")
    description = dict(model="unet", target="piano", settings=settings)
    (tmp_path / "model.json").write_text(json.dumps(description))
    song = str(write(tmp_path / "song.wav", noise(2, 44100), 44100, "PCM_16"))
    options = ["--model", str(tmp_path), "--out", str(tmp_path / "out"), "--flac"]
    assert main(["separate", song, *options]) == 0
    *paths, note = capsys.readouterr().out.splitlines()
    target, residual, _ = read_results(paths)
    assert np.abs(target + residual - soundfile.read(song)[0].T).max() < 2**-23
    assert note == bandwidth_note(Gain(), 44100)
    assert main(["separate", str(tmp_path / "none.wav"), *options]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch

from mss_utils import separation
from mss_utils.separation import separate, separate_file, separated_blocks

RATE = 16000
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")


class Gain(torch.nn.Module):
    """Multiplies its input and keeps the shapes; may fail at its third window."""

    target = "piano"

    def __init__(self, gain=1.0, channels=1, segment_s=0.5, sample_rate=RATE, fails=False):
        super().__init__()
        self.channels, self.segment_s, self.sample_rate = channels, segment_s, sample_rate
        self.gain, self.fails, self.shapes = gain, fails, []

    def forward(self, mixture):
        assert not self.training
        self.shapes.append(tuple(mixture.shape))
        if self.fails and len(self.shapes) == 3:
            raise FloatingPointError("third window")
        return self.gain * mixture


def noise(channels, samples, peak=0.5):
    return np.random.default_rng(0).uniform(-peak, peak, (channels, samples)).astype(np.float32)


def band_limited(samples, rate, top_hz):
    """Stereo noise from 50 Hz to `top_hz` that begins and ends in silence."""
    spectrum = np.fft.rfft(noise(2, samples))
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    spectrum[:, (frequency < 50) | (frequency > top_hz)] = 0
    return (np.fft.irfft(spectrum, samples) * np.hanning(samples)).astype(np.float32)


def error_db(estimate, expected):
    assert estimate.shape == expected.shape
    return 10 * np.log10(np.sum((estimate - expected) ** 2.0) / np.sum(expected**2.0) + 1e-30)


@pytest.mark.parametrize("samples", [1, 7999, 8001, 30000])
@pytest.mark.parametrize("chunk_s", [None, 0.001, 0.3, 3.0])
def test_identity_returns_its_input(samples, chunk_s):
    mixture, model = noise(1, samples), Gain().train()
    estimate = separate(model, mixture, RATE, chunk_s)
    assert estimate.dtype == np.float32 and model.training
    assert error_db(estimate, mixture) < -100


def test_chunks_meet_without_a_click_and_edges_of_windows_are_discarded():
    class Jumping(Gain):
        def forward(self, mixture):
            estimate = super().forward(mixture) * (0.5 if len(self.shapes) % 2 else 1.0)
            estimate[..., :1600] = estimate[..., -1600:] = 9
            return estimate

    estimate = separate(Jumping(), np.ones((1, 40000), np.float32), RATE)
    assert (estimate[:, :1600] == 9).all() and (estimate[:, -1600:] == 9).all()
    inner, fade = estimate[:, 1600:-1600], 0.25 * 0.3 * RATE
    assert inner.min() == pytest.approx(0.5) and inner.max() == pytest.approx(1.0)
    assert np.abs(np.diff(inner)).max() < 1.1 * 0.5 / fade


def test_blocks_of_an_hour_need_two_windows():
    samples, rate, reads, written = 360_000, 100, [], 0

    def read(start, stop):
        reads.append((start, stop))
        return np.zeros((2, stop - start), np.float32)

    model = Gain(channels=2, segment_s=3.0, sample_rate=rate)  # a window is a training segment
    for block in separated_blocks(model, read, samples, rate):
        written += block.shape[1]
        assert 0 <= reads[-1][1] - written < 300 and len(reads) <= 1 + written // 100
    assert written == samples
    assert {stop - start for start, stop in reads} == {300}
    assert reads == sorted(reads) and reads[0][0] == 0 and reads[-1][1] == samples


@pytest.mark.parametrize("channels, shape", [(6, (6, 1)), (1, (1, 2)), (3, (2, 2))])
def test_channels_keep_their_order(channels, shape):
    model, mixture = Gain(channels=shape[1]), noise(channels, 20000)
    blocks = separated_blocks(model, lambda start, stop: mixture[:, start:stop], 20000, RATE)
    assert error_db(np.concatenate(list(blocks), axis=1), mixture) < -100
    assert {shape[:2] for shape in model.shapes} == {shape}


def test_wrong_mixture_is_an_error():
    for mixture, rate, words in [
        (np.zeros(100), RATE, "shape .100,.*channels, samples"),
        (np.zeros((2, 100)), RATE, "channels 2, the model 1"),
        (np.zeros((1, 100)), 44100, "sample_rate 44100, the model 16000"),
        (np.full((1, 100), np.nan), RATE, "NaN"),
    ]:
        with pytest.raises(ValueError, match=words):
            separate(Gain(), mixture, rate)


def write(path, audio, rate=RATE, subtype="FLOAT"):
    soundfile.write(path, audio.T, rate, subtype=subtype)
    return path


def read_results(paths):
    """Target and residual, each `(channels, samples)`."""
    return (soundfile.read(path, always_2d=True)[0].T for path in paths)


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", *arguments], check=True)


@pytest.mark.parametrize("rate, seconds", [(8000, 2.0), (44100, 0.1), (48000, 2.0), (22254, 2.0)])
def test_song_keeps_its_sample_rate(rate, seconds, tmp_path):
    song = band_limited(round(seconds * rate), rate, min(7000, 0.43 * rate))
    paths = separate_file(write(tmp_path / "song.wav", song, rate), Gain(), tmp_path / "out")
    assert soundfile.info(paths[0]).samplerate == soundfile.info(paths[1]).samplerate == rate
    assert error_db(next(read_results(paths)), song) < -80
    assert [path.name for path in paths] == ["song.piano.wav", "song.piano.residual.wav"]
    assert set(paths) == set((tmp_path / "out").iterdir())


def test_high_frequencies_stay_in_the_residual(tmp_path, capsys):
    low, high = 0.2 * np.sin(2 * np.pi * np.array([[1000], [12000]]) * np.arange(44100) / 44100)
    song = write(tmp_path / "song.wav", (low + high)[None], 44100)
    target, residual = read_results(separate_file(song, Gain(), tmp_path))
    assert error_db(target[0, 4000:-4000], low[4000:-4000]) < -80
    assert "8 to 22.05 kHz stay in the residual" in capsys.readouterr().out
    separate_file(write(song, noise(1, 9000)), Gain(), tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("subtype, flac", [("PCM_16", True), ("PCM_24", False), ("PCM_24", True)])
def test_target_and_residual_add_up(subtype, flac, tmp_path):
    song = write(tmp_path / "song.wav", noise(2, 60000), 44100, subtype)
    exact, _ = soundfile.read(song)
    paths = separate_file(song, Gain(0.4), tmp_path / "out", flac)
    target, residual = read_results(paths)
    assert {soundfile.info(path).subtype for path in paths} == {"PCM_24" if flac else "FLOAT"}
    assert np.abs(target + residual - exact.T).max() < 2**-23


def test_flac_is_clipped_at_full_scale(tmp_path, capsys):
    exact = noise(2, 30000, peak=0.9)
    song = write(tmp_path / "song.wav", exact)
    target, residual = read_results(separate_file(song, Gain(4), tmp_path, flac=True))
    np.testing.assert_allclose(target, np.clip(4 * exact, -1, 1), atol=2**-22)
    not_clipped = np.abs(exact - np.clip(4 * exact, -1, 1)) < 1
    assert np.abs(target + residual - exact)[not_clipped].max() < 2**-22
    assert "above full scale are clipped (peak +11.1 dB)" in capsys.readouterr().out


def test_long_wav_is_rf64(tmp_path, monkeypatch):
    song = write(tmp_path / "song.wav", noise(1, 10000))
    monkeypatch.setattr(separation, "WAV_MAX_BYTES", 39999)
    paths = separate_file(song, Gain(), tmp_path / "out")
    assert {soundfile.info(path).format for path in paths} == {"RF64"}


@needs_ffmpeg
@pytest.mark.parametrize("name", ["song.mp3", "song.m4a", "12:30 -x.mka"])
def test_any_format_is_read(name, tmp_path):
    stereo = band_limited(3 * 44100, 44100, 5000)
    wav = write(tmp_path / "wav.wav", stereo / np.abs(stereo).max() / 2, 44100, "PCM_16")
    ffmpeg("-i", wav, f"file:{tmp_path / name}")
    paths = separate_file(tmp_path / name, Gain(), tmp_path / "out")
    target, residual = read_results(paths)
    assert soundfile.info(paths[0]).samplerate == 44100
    assert target.shape[0] == 2 and abs(target.shape[1] / 44100 - 3) < 0.1
    song = (target + residual)[:, : stereo.shape[1]]
    original = soundfile.read(wav)[0].T[:, : song.shape[1]]
    assert error_db(song, original) < -10, "a shift by a few samples would be far above"


def test_missing_ffmpeg_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    soundfile.write(tmp_path / "song.ogg", noise(2, 10000).T, 44100)
    with pytest.raises(FileNotFoundError, match="song.ogg needs ffmpeg: install it"):
        separate_file(tmp_path / "song.ogg", Gain(), tmp_path)


BROKEN = {
    "none.wav": (lambda path: None, "none.wav"),
    "text.mp3": (lambda path: path.write_text("no music " * 999), "Cannot read .*ffmpeg: .*song"),
    "list.m3u": (lambda path: path.write_text("#EXTM3U\nother.wav\n"), "is a list of files"),
    "silent.mkv": (lambda path: ffmpeg("-f", "lavfi", "-i", "color=d=0.1", path), "no streams"),
    "nothing.wav": (lambda path: write(path, np.zeros((1, 0))), "has 0 samples"),
    "nan.wav": (lambda path: write(path, np.full((1, 9000), np.nan)), "NaN or .* after 0 s"),
    "absurd.wav": (lambda path: write(path, noise(1, 1000), 7), "at 7 Hz; .*1000 to 768000 Hz"),
}


@needs_ffmpeg
@pytest.mark.parametrize("name", BROKEN)
def test_broken_song_is_one_sentence_and_leaves_nothing(name, tmp_path):
    make, words = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        separate_file(tmp_path / name, Gain(), tmp_path / "out")
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").glob("*"))


def test_result_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="weights are damaged"):
        separate_file(write(tmp_path / "song.wav", noise(1, 9000)), Gain(np.nan), tmp_path)
    with pytest.raises(ValueError, match="FLAC cannot hold 9 channels"):
        separate_file(write(tmp_path / "song.wav", noise(9, 900)), Gain(), tmp_path, flac=True)


def test_failed_separation_keeps_old_results(tmp_path):
    song, out = write(tmp_path / "song.wav", noise(1, 64000)), tmp_path / "out"
    before = {path: path.read_bytes() for path in separate_file(song, Gain(), out)}
    with pytest.raises(FloatingPointError, match="third window"):
        separate_file(song, Gain(fails=True), out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@needs_ffmpeg
def test_readable_part_of_a_damaged_song_is_separated(tmp_path, capsys):
    song = tmp_path / "song.mp3"
    soundfile.write(song, noise(1, 160000)[0], RATE, format="MP3")
    song.write_bytes(song.read_bytes()[:9000] + bytes(range(256)) * 40)
    separate_file(song, Gain(), tmp_path / "out")
    assert "song.mp3 is damaged, only a part was read" in capsys.readouterr().err


@pytest.mark.parametrize("stem", ["ü" * 120, "<b>&'", "...", "-rf", "a\nb", "caf\udce9"])
def test_song_names_stay_in_the_folder(stem, tmp_path):
    song = write(tmp_path / "song.wav", noise(1, 3000)).rename(tmp_path / f"{stem}.wav")
    paths = separate_file(song, Gain(), tmp_path / "out")
    assert set((tmp_path / "out").iterdir()) == set(paths)
    assert all(path.name.startswith(stem[:60]) for path in paths)

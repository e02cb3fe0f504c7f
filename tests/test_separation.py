import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from conftest import command

from mss_utils import separation
from mss_utils.__main__ import main
from mss_utils.models import build_model
from mss_utils.separation.overlap_add import separate, separated_blocks
from mss_utils.separation.song_files import bandwidth_note, separate_file

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")


class Identity(torch.nn.Module):
    """Returns what it hears, and keeps the shapes of it."""

    sample_rate, channels, segment_s, target = 16000, 1, 0.5, "piano"

    def __init__(self, **attributes):
        super().__init__()
        self.heard = []
        vars(self).update(attributes)

    def forward(self, mixture):
        self.heard.append(tuple(mixture.shape))
        return mixture


class Filter(Identity):
    """A fixed random convolution that reaches 0.1 s far on both sides; nothing is there beyond a window."""

    def __init__(self, **attributes):
        super().__init__(**attributes)
        reach = round(0.1 * self.sample_rate)
        self.register_buffer(
            "kernel", torch.randn(1, 1, 2 * reach + 1, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, mixture):
        return torch.nn.functional.conv1d(mixture, self.kernel, padding=self.kernel.shape[-1] // 2)


class Jumping(Identity):
    """Halves every other window."""

    def forward(self, mixture):
        return super().forward(mixture) * (0.5 if len(self.heard) % 2 else 1.0)


class Failing(Identity):
    """Gives up in the middle of a song."""

    def forward(self, mixture):
        if len(self.heard) == 2:
            raise FloatingPointError("the third window")
        return super().forward(mixture)


def noise(channels, samples, peak=0.5):
    return np.random.default_rng(0).uniform(-peak, peak, (channels, samples)).astype(np.float32)


def band_limited(channels, samples, rate, top_hz):
    """Noise between 50 Hz and `top_hz` that begins and ends in silence."""
    spectrum = np.fft.rfft(noise(channels, samples))
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    spectrum[:, (frequency < 50) | (frequency > top_hz)] = 0
    return (np.fft.irfft(spectrum, samples) * np.hanning(samples)).astype(np.float32)


def error_db(found, wanted):
    assert found.shape == wanted.shape
    return 10 * np.log10(np.sum((found - wanted) ** 2.0) / np.sum(wanted**2.0) + 1e-30)


def written(path, audio, rate=16000, subtype="FLOAT"):
    soundfile.write(path, audio.T, rate, subtype=subtype)
    return path


def result(paths):
    """Target and residual, each `(channels, samples)`, and their rate."""
    (target, rate), (residual, other) = (
        soundfile.read(path, dtype="float64", always_2d=True) for path in paths
    )
    assert rate == other
    return target.T, residual.T, rate


# --- windows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 1600, 3201, 7999, 8000, 8001, 30000])
@pytest.mark.parametrize("chunk_s", [None, 0.00001, 0.05, 0.1, 0.3, 3.0])
def test_an_identity_returns_the_input_for_any_chunk(samples, chunk_s):
    samples = min(samples, 4000) if chunk_s == 0.00001 else samples  # chunks of one sample
    mixture = noise(1, samples)
    estimate = separate(Identity(), mixture, 16000, chunk_s)
    assert estimate.dtype == np.float32
    assert error_db(estimate, mixture) < -100


@pytest.mark.parametrize("chunk_s", [None, 0.05, 0.07, 0.3, 1.0, 3.0])
def test_a_filter_comes_back_whole_for_any_chunk_in_memory_and_from_a_file(chunk_s, tmp_path):
    mixture = noise(1, 20001)
    model = Filter()
    wanted = model(torch.from_numpy(mixture)[None])[0].numpy()
    assert error_db(separate(model, mixture, 16000, chunk_s), wanted) < -80
    paths = separate_file(
        written(tmp_path / "song.wav", mixture), model, tmp_path / "out", chunk_s=chunk_s
    )
    assert error_db(result(paths)[0], wanted) < -80


def test_a_mixture_as_long_as_the_training_segment_is_one_window():
    for samples, n_windows in (
        (1, 1),
        (7999, 1),
        (8000, 1),
        (8001, 2),
        (8000 + 3600, 2),
        (8000 + 3601, 3),
    ):  # hop: 3/4 of 0.3 s
        model = Identity()
        separate(model, noise(1, samples), 16000)
        assert len(model.heard) == n_windows
        assert all(shape == (1, 1, min(samples, 8000)) for shape in model.heard)


def test_a_short_segment_leaves_room_for_a_chunk():
    model = Identity(segment_s=0.1)
    separate(model, noise(1, 16000), 16000)
    assert {shape[-1] for shape in model.heard} == {6400}


def test_there_is_no_click_where_chunks_meet():
    """On a constant, the only steps are those between windows: a fade spreads each over its whole length."""
    mixture = np.ones((1, 40000), np.float32)
    estimate = separate(Jumping(), mixture, 16000)
    fade = 0.25 * 0.3 * 16000
    assert estimate.min() == pytest.approx(0.5) and estimate.max() == pytest.approx(1.0)
    assert np.abs(np.diff(estimate)).max() < 1.1 * 0.5 / fade


def test_the_ends_of_a_window_are_thrown_away():
    class Ringing(Identity):
        def forward(self, mixture):
            estimate = super().forward(mixture).clone()
            estimate[..., :1600] = estimate[..., -1600:] = 9
            return estimate

    mixture = noise(1, 40000)
    estimate = separate(Ringing(), mixture, 16000)
    assert (estimate[:, :1600] == 9).all() and (
        estimate[:, -1600:] == 9
    ).all()  # nothing better is known of the song's own ends
    np.testing.assert_allclose(estimate[:, 1600:-1600], mixture[:, 1600:-1600], atol=1e-6)


def test_a_long_song_is_never_held():
    """An hour of silence that nobody stores: windows are asked for in order, blocks come out as they are finished."""
    samples, asked, given = 3600 * 100, [], 0

    def read(start, stop):
        asked.append((start, stop))
        return np.zeros((2, stop - start), np.float32)

    for block in separated_blocks(
        Identity(sample_rate=100, channels=2, segment_s=3.0), read, samples, 100
    ):
        assert block.shape[0] == 2 and 0 < block.shape[1] <= 300
        given += block.shape[1]
        assert 0 <= asked[-1][1] - given < 300 and len(asked) <= 1 + given // 100
    assert given == samples
    assert {stop - start for start, stop in asked} == {300}
    assert asked == sorted(asked) and asked[0][0] == 0 and asked[-1][1] == samples


@pytest.mark.parametrize(
    "mixture, rate, words",
    [
        (np.zeros(100), 16000, "shape .100,.*channels, samples"),
        (np.zeros((1, 0)), 16000, "at least one sample"),
        (np.zeros((2, 100)), 16000, "channels 2.*trained with 1"),
        (np.zeros((1, 100)), 44100, "sample_rate 44100.*trained with 16000"),
        (np.full((1, 100), np.nan), 16000, "NaN"),
    ],
)
def test_a_wrong_mixture_is_named(mixture, rate, words):
    with pytest.raises(ValueError, match=words):
        separate(Identity(), mixture, rate)


@pytest.mark.parametrize("chunk_s", [0, -1.0, float("nan")])
def test_a_wrong_chunk_is_named(chunk_s):
    with pytest.raises(ValueError, match=f"chunk_s is {chunk_s}"):
        separate(Identity(), noise(1, 100), 16000, chunk_s)


def test_separating_leaves_the_model_in_its_mode(small_settings):
    model = build_model("unet", small_settings).train()
    model.segment_s = 0.5
    separate(model, np.zeros((1, 9000), np.float32), 16000)
    assert model.training
    with pytest.raises(FloatingPointError):
        separate(failing := Failing().train(), np.zeros((1, 90000), np.float32), 16000)
    assert failing.training


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 22254])
@pytest.mark.parametrize("seconds", [0.1, 2.0])
def test_a_song_keeps_its_rate_and_what_the_model_hears_of_it(rate, seconds, tmp_path):
    song = band_limited(2, round(seconds * rate), rate, min(7000, 0.43 * rate))
    paths = separate_file(written(tmp_path / "song.wav", song, rate), Identity(), tmp_path / "out")
    assert [path.name for path in paths] == ["song.piano.wav", "song.piano.residual.wav"]
    target, residual, found_rate = result(paths)
    assert found_rate == rate
    assert error_db(target, song) < -80
    np.testing.assert_allclose(target + residual, song, atol=1e-6)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "song.piano.wav",
        "song.piano.residual.wav",
    }


def test_what_the_model_cannot_hear_stays_in_the_residual(tmp_path):
    time = np.arange(44100) / 44100
    song = 0.2 * np.sin(2 * np.pi * np.array([[1000.0], [12000.0]]) * time).sum(
        axis=0, keepdims=True
    )
    target, residual, _ = result(
        separate_file(written(tmp_path / "song.wav", song, 44100), Identity(), tmp_path)
    )
    assert (
        error_db(target[:, 4000:-4000], 0.2 * np.sin(2 * np.pi * 1000 * time)[None, 4000:-4000])
        < -80
    )
    assert (
        error_db(residual[:, 4000:-4000], 0.2 * np.sin(2 * np.pi * 12000 * time)[None, 4000:-4000])
        < -60
    )
    assert bandwidth_note(Identity(), 44100) == (
        "The model hears up to 8 kHz: what the song has above that, up to 22.05 kHz, stays in the residual."
    )
    assert bandwidth_note(Identity(), 16000) == bandwidth_note(Identity(), 8000) == ""


@pytest.mark.parametrize(
    "n_heard, channels, shape",
    [
        (1, 1, (1, 1)),
        (1, 2, (2, 1)),
        (1, 6, (6, 1)),
        (2, 1, (1, 2)),
        (2, 2, (1, 2)),
        (2, 3, (2, 2)),
        (2, 6, (3, 2)),
    ],
)
def test_every_channel_comes_back_in_its_place(n_heard, channels, shape, tmp_path):
    song = noise(channels, 20000)
    model = Identity(channels=n_heard)
    target, _, _ = result(
        separate_file(written(tmp_path / "song.wav", song), model, tmp_path / "out")
    )
    assert {heard[:2] for heard in model.heard} == {shape}
    assert error_db(target, song) < -100


def test_a_mono_song_is_heard_doubled_and_averaged(tmp_path):
    class Unequal(Identity):
        def forward(self, mixture):
            assert torch.equal(mixture[:, 0], mixture[:, 1])
            return mixture * torch.tensor([[0.2], [0.6]])

    song = noise(1, 3000)
    target, _, _ = result(
        separate_file(written(tmp_path / "song.wav", song), Unequal(channels=2), tmp_path / "out")
    )
    assert error_db(target, 0.4 * song) < -100


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("flac", [False, True])
def test_target_and_residual_add_up_to_the_song(subtype, flac, tmp_path):
    song = written(tmp_path / "song.wav", noise(2, 60000), 44100, subtype)
    exact, _ = soundfile.read(song)
    paths = separate_file(song, Jumping(), tmp_path / "out", flac)
    target, residual, _ = result(paths)
    assert {soundfile.info(path).subtype for path in paths} == {"PCM_24" if flac else "FLOAT"}
    assert np.abs(target + residual - exact.T).max() < 2**-23


def test_flac_is_lowered_where_it_would_clip(tmp_path, capsys):
    class Loud(Identity):
        def forward(self, mixture):
            return 4 * mixture

    exact = noise(2, 30000, peak=0.9)
    song = written(tmp_path / "song.wav", exact)
    target, residual, _ = result(separate_file(song, Loud(), tmp_path / "quiet", flac=True))
    gain = 1 / np.abs(4 * exact).max()
    assert f"{-20 * np.log10(gain):.2g} dB lower" in capsys.readouterr().out
    assert (
        error_db(target, gain * 4 * exact) < -100 and error_db(residual, gain * -3 * exact) < -100
    )
    assert np.abs(target + residual - gain * exact).max() < 2**-22
    target, _, _ = result(separate_file(song, Loud(), tmp_path / "float"))
    assert error_db(target, 4 * exact) < -100  # float WAV holds any level
    separate_file(song, Identity(), tmp_path / "same", flac=True)
    assert "dB lower" not in capsys.readouterr().out


def test_a_file_beyond_what_wav_can_count_is_rf64(tmp_path, monkeypatch):
    song = written(tmp_path / "song.wav", noise(1, 10000))
    assert {
        soundfile.info(path).format for path in separate_file(song, Identity(), tmp_path / "out")
    } == {"WAV"}
    monkeypatch.setattr(separation, "WAV_BYTES", 39999)
    paths = separate_file(song, Identity(), tmp_path / "out")
    assert {soundfile.info(path).format for path in paths} == {"RF64"}
    assert error_db(result(paths)[0], noise(1, 10000)) < -100


@needs_ffmpeg
@pytest.mark.parametrize(
    "name, options",
    [
        ("song.mp3", ["-q:a", "6"]),
        ("song.m4a", []),
        ("song.ogg", ["-c:a", "libvorbis"]),
        ("song.mka", ["-c:a", "pcm_s16le"]),
        ("12:30 -x.m4a", []),
    ],
)
def test_any_format_is_read(name, options, tmp_path):
    stereo = band_limited(2, 3 * 44100, 44100, 5000)
    wav = written(tmp_path / "original.wav", stereo / np.abs(stereo).max() / 2, 44100, "PCM_16")
    song = tmp_path / name
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, *options, f"file:{song}"], check=True)
    target, residual, rate = result(separate_file(song, Identity(), tmp_path / "out"))
    assert rate == 44100 and target.shape[0] == 2 and abs(target.shape[1] / 44100 - 3) < 0.1
    found = (target + residual)[:, : stereo.shape[1]]
    original = soundfile.read(wav)[0].T[:, : found.shape[1]]
    assert (
        error_db(found, original) < -10
    )  # the codec's own loss; a shift of a few samples would be far above
    assert len(list((tmp_path / "out").iterdir())) == 2


@needs_ffmpeg
def test_an_mp3_of_variable_rate_has_no_seams(tmp_path):
    """Between two reads libsndfile loses what an MP3 frame borrows from the last."""
    time = np.arange(200000)
    bursts = 0.1 * np.sin(0.05 * time) + noise(1, 200000, 0.3) * (time % 20000 < 3000)
    wav, song = written(tmp_path / "original.wav", bursts, 44100), tmp_path / "song.mp3"
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, "-q:a", "4", song], check=True)
    whole, _ = soundfile.read(song, always_2d=True)
    target, residual, _ = result(separate_file(song, Identity(), tmp_path / "out", chunk_s=0.03))
    assert target.shape[1] == len(whole) and np.abs(target + residual - whole.T).max() < 1e-4


@needs_ffmpeg
def test_a_flac_of_unknown_length_and_a_name_libsndfile_stumbles_over_are_read(tmp_path):
    song = noise(2, 40000)
    wav = written(tmp_path / "original.wav", song, 16000, "PCM_24")
    piped = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", wav, "-f", "flac", "-"], capture_output=True, check=True
    ).stdout
    (tmp_path / "piped.flac").write_bytes(piped)
    shutil.copy(wav, tmp_path / "song.raw")
    for name in ("piped.flac", "song.raw"):
        target, residual, rate = result(
            separate_file(tmp_path / name, Identity(), tmp_path / "out")
        )
        assert rate == 16000 and np.abs(target + residual - song).max() < 2**-22


def test_what_needs_ffmpeg_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    soundfile.write(tmp_path / "song.ogg", noise(2, 10000).T, 44100, format="OGG", subtype="VORBIS")
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    for name in ("song.ogg", "song.m4a"):
        with pytest.raises(FileNotFoundError, match=f"{name} needs ffmpeg on the PATH: install it"):
            separate_file(tmp_path / name, Identity(), tmp_path / "out")
    soundfile.write(tmp_path / "song.flac", noise(2, 10000).T, 44100)
    separate_file(tmp_path / "song.flac", Identity(), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "song.piano.wav",
        "song.piano.residual.wav",
    }


# --- mistakes -----------------------------------------------------------------------------------------------------------


def broken_songs(folder):
    """Every way a song can be no song, with what is said of it."""
    (folder / "text.mp3").write_text("not music " * 1000)
    (folder / "empty.wav").touch()
    (folder / "folder.wav").mkdir()
    written(folder / "nothing.wav", np.zeros((1, 0)))
    nan = noise(1, 64000)
    nan[0, 50000] = np.nan
    written(folder / "nan.wav", nan)
    return {
        "none.wav": "No file .*none.wav; expected",
        "text.mp3": "text.mp3",
        "empty.wav": "is empty .0 bytes",
        "folder.wav": "is a folder",
        "nothing.wav": "holds no samples",
        "nan.wav": "holds NaN or infinite samples after [23] s",
    }


def test_a_song_that_cannot_be_read_is_one_sentence_and_leaves_nothing(tmp_path):
    for name, words in broken_songs(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            separate_file(tmp_path / name, Identity(), tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@needs_ffmpeg
def test_a_text_and_a_picture_are_named(tmp_path):
    (tmp_path / "text.mp3").write_text("not music " * 1000)
    with pytest.raises(ValueError, match=r"Cannot read .*text.mp3 \(ffmpeg: .+\); expected a song"):
        separate_file(tmp_path / "text.mp3", Identity(), tmp_path)
    subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-f",
            "lavfi",
            "-i",
            "color=d=0.1",
            "-an",
            tmp_path / "silent.mkv",
        ],
        check=True,
    )
    with pytest.raises(ValueError, match="silent.mkv holds no sound"):
        separate_file(tmp_path / "silent.mkv", Identity(), tmp_path)


def test_a_song_cut_off_is_named(tmp_path):
    song = written(tmp_path / "song.flac", noise(1, 100000), subtype="PCM_16")
    whole = song.read_bytes()
    frame = whole.index(
        whole[whole.index(b"\xff\xf8") :][:4], 60000
    )  # where a FLAC frame begins, and nothing is cut in two
    for end in (60000, frame):
        song.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="Cannot finish .*song.flac .*damaged"):
            separate_file(song, Identity(), tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("flac", [False, True])
def test_a_separation_that_breaks_off_leaves_what_was_there(flac, tmp_path):
    song = written(tmp_path / "song.wav", noise(1, 64000))
    before = {
        path: path.read_bytes() for path in separate_file(song, Identity(), tmp_path / "out", flac)
    }
    with pytest.raises(FloatingPointError, match="third window"):
        separate_file(song, Failing(), tmp_path / "out", flac)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_song_itself_is_never_overwritten(tmp_path):
    stored = written(tmp_path / "song.piano.wav", noise(1, 3000))
    (tmp_path / "song.wav").symlink_to(stored)
    before = stored.read_bytes()
    with pytest.raises(ValueError, match="song.piano.wav is the song itself"):
        separate_file(tmp_path / "song.wav", Identity(), tmp_path)
    assert stored.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@needs_ffmpeg
def test_a_damaged_song_is_separated_as_far_as_it_goes_and_it_is_said(tmp_path, capsys):
    soundfile.write(tmp_path / "whole.mp3", noise(1, 160000)[0], 16000, format="MP3")
    whole = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "hole.mp3").write_bytes(
        whole[: len(whole) // 3] + bytes(range(256)) * 40 + whole[len(whole) // 2 :]
    )
    separate_file(tmp_path / "hole.mp3", Identity(), tmp_path / "out")
    assert (
        "hole.mp3 is damaged, and what could be read of it is separated (ffmpeg: "
        in capsys.readouterr().err
    )
    separate_file(tmp_path / "whole.mp3", Identity(), tmp_path / "out")
    assert "damaged" not in capsys.readouterr().err


def test_flac_holds_eight_channels(tmp_path):
    song = written(tmp_path / "song.wav", noise(9, 1000))
    with pytest.raises(ValueError, match="9 channels at .* and FLAC holds up to 8"):
        separate_file(song, Identity(), tmp_path / "out", flac=True)


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(small_settings, tmp_path_factory):
    """A model folder as training leaves it, with untrained weights."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    weights = build_model("unet", small_settings).state_dict()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    description = dict(
        model="unet", target="piano", settings=small_settings.model_dump(mode="json")
    )
    (folder / "model.json").write_text(json.dumps(description))
    return folder


def test_the_command_prints_the_paths_and_what_is_not_heard(model_folder, tmp_path):
    song = written(tmp_path / "song.wav", noise(2, 44100), 44100, "PCM_16")
    done = command(
        "separate",
        str(song),
        "--model",
        str(model_folder),
        "--out",
        str(tmp_path / "out"),
        "--flac",
    )
    assert done.returncode == 0, done.stderr
    target, residual, note = done.stdout.splitlines()
    assert [target, residual] == [
        str(tmp_path / "out" / f"song.{name}.flac") for name in ("piano", "piano.residual")
    ]
    assert note.startswith("The model hears up to 8 kHz")
    found, rest, rate = result([target, residual])
    assert rate == 44100 and np.abs(found + rest - soundfile.read(song)[0].T).max() < 2**-23


def test_mistakes_at_the_command_are_one_sentence(model_folder, tmp_path, capfd):
    broken_songs(tmp_path)
    good = written(tmp_path / "good.wav", noise(1, 3000))
    for song, model, words in (
        (tmp_path / "none.wav", model_folder, "No file"),
        (tmp_path / "text.mp3", model_folder, "text.mp3"),
        (tmp_path / "empty.wav", model_folder, "is empty"),
        (good, tmp_path / "no model", "No model.json in"),
    ):
        assert (
            main(["separate", str(song), "--model", str(model), "--out", str(tmp_path / "out")])
            == 1
        )
        printed = capfd.readouterr()  # also what libraries print past Python
        assert (
            printed.out == ""
            and len(printed.err.strip().splitlines()) == 1
            and words in printed.err
        )
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

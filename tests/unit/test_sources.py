"""Dataset folders: every form is read, every broken one is one clear error."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import soundfile
from conftest import STEMS, write_dataset

from mss_utils.config import expand_path, resolve_settings
from mss_utils.data import build_store, find_tracks, level_db, open_store, sources

MUSDB = expand_path(os.environ["MUSDB_PATH"]) if os.environ.get("MUSDB_PATH") else Path("none")
needs_musdb = pytest.mark.skipif(not MUSDB.is_dir(), reason="MUSDB_PATH is no folder")
MUSDB_STEMS = ("drums", "bass", "other", "vocals")
SPLITS = ("train", "valid", "test")


def chord(stem, seconds, rate, channels):
    """Return three tones under 3 kHz `(samples, channels)`, different for each stem."""
    time = np.arange(round(seconds * rate)) / rate
    pitches = [
        [110 * (stem + 1) * k + 7 * channel for k in (1, 3, 5)] for channel in range(channels)
    ]
    tones = [sum(np.sin(2 * np.pi * hz * time) for hz in chord) for chord in pitches]
    return 0.03 * (stem + 1) * np.stack(tones, axis=1)


def write_tracks(
    root, stems=STEMS, suffix=".wav", rate=44100, channels=2, mixture=False, **options
):
    """Write one track of two seconds per split; stem i is `chord(i)`."""
    for split in SPLITS:
        folder = root / split / f"Somebody - {split} song"
        folder.mkdir(parents=True)
        audio = {stem: chord(index, 2.0, rate, channels) for index, stem in enumerate(stems)}
        if mixture:
            audio["mixture"] = sum(audio.values())
        for name, sound in audio.items():
            soundfile.write(folder / f"{name}{suffix}", sound, rate, **options)
    return root


def assert_content(store, rate, channels, stems=STEMS, slack_s=0.0):
    """Check length, rate, stems, channels, level and timing of every stem."""
    assert (store.sample_rate, store.channels, set(store.stems)) == (rate, channels, set(stems))
    for track in store.tracks:
        assert abs(track.samples - 2 * rate) <= slack_s * rate
        mixture, audio = store.load(track)
        middle = slice(rate // 4, rate)
        for index, stem in enumerate(stems):
            expected = chord(index, 2.0, rate, 2).T[:channels, middle]
            found = audio[store.stem_index(stem)][:, middle]
            assert abs(level_db(found) - level_db(expected)) < 0.1
            assert lag(found[0], expected[0]) <= slack_s * rate
        assert level_db(mixture - audio.sum(axis=0)) - level_db(mixture) < -20  # lossy coding


def lag(found, expected):
    spectra = [np.fft.rfft(signal, 2 * len(found)) for signal in (found, expected)]
    shift = int(np.fft.irfft(spectra[0] * np.conj(spectra[1])).argmax())
    return min(shift, 2 * len(found) - shift)


@pytest.fixture(scope="module")
def stem_files(tmp_path_factory):
    """Return a dataset of three stem files, as stempeg writes them."""
    import stempeg

    root = tmp_path_factory.mktemp("stem files")
    stems = [chord(index, 2.0, 44100, 2) for index in range(4)]
    audio, writer = np.stack([sum(stems), *stems]), stempeg.StreamsWriter()
    stempeg.write_stems(str(root / "song.mp4"), audio, sample_rate=44100, writer=writer)
    for split in SPLITS:
        (root / split).mkdir()
        shutil.copy(root / "song.mp4", root / split / f"Somebody - {split} song.stem.mp4")
    return root


def spy(monkeypatch, name):
    """Record the calls of a function of `sources`."""
    calls, original = [], getattr(sources, name)
    monkeypatch.setattr(sources, name, lambda source: calls.append(source) or original(source))
    return calls


# --- every form


@pytest.mark.parametrize(
    "suffix, slack_s", [(".wav", 0), (".flac", 0), (".ogg", 0), (".mp3", 0.06), (".WAV", 0)]
)
@pytest.mark.parametrize("mixture", [False, True])
def test_folders_of_stems(tmp_path, suffix, slack_s, mixture):
    stems = ("Cello", "my drums", "zither")
    store = build_store(write_tracks(tmp_path, stems, suffix, mixture=mixture), 44100, 2)
    assert_content(store, 44100, 2, stems, slack_s)


@pytest.mark.parametrize("source_rate", [16000, 22050, 44100, 48000])
@pytest.mark.parametrize("rate", [16000, 22050, 44100])
def test_sample_rates(tmp_path, source_rate, rate):
    store = build_store(write_tracks(tmp_path, rate=source_rate), rate, 2)
    assert store.tracks[0].source_rates == (source_rate,)
    assert_content(store, rate, 2)


def test_channels(tmp_path):
    mono = build_store(write_tracks(tmp_path / "mono", rate=16000, channels=1), 16000, 2)
    _, stems = mono.load(mono.tracks[0])
    np.testing.assert_array_equal(stems[:, 0], stems[:, 1])
    assert_content(build_store(tmp_path / "mono", 16000, 1), 16000, 1)
    stereo = build_store(write_tracks(tmp_path / "stereo", rate=16000), 16000, 1)
    _, stems = stereo.load(stereo.tracks[0])
    mean = chord(2, 2, 16000, 2).T.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(stems[2], mean, atol=1e-3)


def test_stem_files_read_through_musdb(stem_files, monkeypatch):
    calls = spy(monkeypatch, "_read_musdb")
    store = build_store(stem_files, 44100, 2)
    assert len(calls) == 3
    assert_content(store, 44100, 2, MUSDB_STEMS, slack_s=0.06)


def test_musdb18_hq_read_through_musdb(tmp_path, monkeypatch):
    calls = spy(monkeypatch, "_read_musdb")
    store = build_store(write_tracks(tmp_path, MUSDB_STEMS, mixture=True), 44100, 2)
    assert len(calls) == 3
    assert_content(store, 44100, 2, MUSDB_STEMS)


def test_lookalike_of_musdb18_hq(tmp_path, monkeypatch):
    """musdb would clip loud float stems and ignore the number of channels."""
    calls = spy(monkeypatch, "_read_musdb")
    options = dict(mixture=True, channels=1, subtype="FLOAT")
    root = write_tracks(tmp_path, MUSDB_STEMS, **options)
    path = root / "test" / "Somebody - test song" / "bass.wav"
    soundfile.write(path, np.full(88200, 1.5), 44100, subtype="FLOAT")
    store = build_store(root, 44100, 2)
    _, stems = store.load(store.split("test")[0])
    assert not calls and abs(stems[store.stem_index("bass")].max() - 1.5) < 1e-3


def test_validation_split(tmp_path):
    def names(root):
        return [track.name for track in find_tracks(root) if track.split == "valid"]

    root = write_dataset(tmp_path, 12, 0, 1, seconds=0.1)
    assert names(root) == ["train song 7"]  # the tenth in alphabetical order
    (root / "train" / "train song 3").rename(root / "train" / "Actions - One Minute Smile")
    assert names(root) == ["Actions - One Minute Smile"]
    (root / "mus.yaml").write_text("validation_tracks: [train song 1, train song 2]")
    assert names(root) == ["train song 1", "train song 2"]
    shutil.copytree(root / "test", root / "valid")
    assert names(root) == ["test song 0"]


@needs_musdb
def test_official_validation_split():
    splits = [track.split for track in find_tracks(MUSDB)]
    assert [splits.count(split) for split in SPLITS] == [80, 14, 50]


@needs_musdb
def test_real_stem_files_as_musdb_reads_them(tmp_path):
    import musdb

    for track in (
        "train/Actions - One Minute Smile",
        "train/A Classic Education - NightOwl",
        "test/AM Contra - Heart Peripheral",
    ):
        (tmp_path / track).parent.mkdir(exist_ok=True)
        (tmp_path / f"{track}.stem.mp4").symlink_to((MUSDB / f"{track}.stem.mp4").resolve())
    store = build_store(tmp_path, 44100, 2)
    real = musdb.DB(root=str(tmp_path), subsets=["test"])[0]
    mixture, stems = store.load(store.split("test")[0])
    np.testing.assert_allclose(mixture, real.audio.T, atol=2 / 32767)
    for stem, audio in zip(store.stems, stems, strict=True):
        assert abs(level_db(audio) - level_db(real.targets[stem].audio)) < 0.1


def test_download_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path))
    monkeypatch.delenv("MUSDB_PATH", raising=False)

    class Musdb:
        interrupted = True

        def DB(self, root, download):  # noqa: N802
            write_tracks(Path(root), MUSDB_STEMS)
            if self.interrupted:
                raise URLError("connection lost")

    musdb = Musdb()
    monkeypatch.setattr(sources, "_import_musdb", lambda: musdb)
    settings = resolve_settings("musdb7")
    with pytest.raises(ConnectionError, match="connection lost.*--data DIR or set MUSDB_PATH"):
        open_store(settings)
    assert not list(tmp_path.iterdir())
    musdb.interrupted = False
    assert len(open_store(settings).tracks) == 3
    monkeypatch.setattr(sources, "_import_musdb", None)  # the second time nothing is downloaded
    assert len(open_store(settings).tracks) == 3


def test_names_with_unicode_and_quotes(tmp_path):
    names = ["Ólafur – \"Ärger\" & 'söhne' #1", "日本語 $(echo) ; * ?", "Ólafur – 'Ärger' #1"]
    root = write_tracks(tmp_path, rate=16000)
    for split, name in zip(SPLITS, names, strict=True):
        (root / split / f"Somebody - {split} song").rename(root / split / name)
    store = build_store(root, 16000, 2)
    assert [track.name for track in store.tracks] == names
    assert_content(store, 16000, 2)


# --- stem groups


def groups(text):
    return resolve_settings("smoke", overrides=[f"groups={text}"]).groups


def test_groups_are_summed(tmp_path):
    root = write_tracks(tmp_path, ("drums", "fx", "synth"), rate=16000)
    store = build_store(root, 16000, 2, groups("synth+fx->other"))
    assert store.stems == ("drums", "other")
    _, stems = store.load(store.tracks[0])
    expected = (chord(1, 2, 16000, 2) + chord(2, 2, 16000, 2)).T
    np.testing.assert_allclose(stems[1], expected, atol=1e-3)
    assert build_store(root, 16000, 2).stems == ("drums", "fx", "synth"), "a store of its own"


def test_groups_unite_different_stems(tmp_path):
    root = write_tracks(tmp_path, ("bass", "drums", "synth"), rate=16000)
    (root / "test" / "Somebody - test song" / "bass.wav").unlink()
    words = "2 have bass, drums, synth, but test/Somebody - test song lacks bass.*groups=synth"
    with pytest.raises(ValueError, match=words):
        build_store(root, 16000, 1)
    store = build_store(root, 16000, 1, groups("bass+synth->pitched"))
    assert store.stems == ("drums", "pitched")


@pytest.mark.parametrize(
    "text, words",
    [
        ("violin+synth->other", "Group 'other' adds 'violin', which no track has.*drums, fx"),
        ("synth+fx->drums", r"name of another stem: set groups=drums\+synth\+fx->drums"),
        ("synth+fx+drums->whole", "fewer than two stems"),
    ],
)
def test_impossible_group(tmp_path, text, words):
    root = write_tracks(tmp_path, ("drums", "fx", "synth"))
    with pytest.raises(ValueError, match=words):
        build_store(root, 16000, 1, groups(text))


# --- broken input: what is wrong, what to do


def first(root):
    return root / "train" / "train song 0"


def bass(root):
    return first(root) / "bass.wav"


def one_stem(root):
    for file in root.rglob("*.wav"):
        if file.stem != "bass":
            file.unlink()


def nested(root):
    inside = root.with_name("deeper")
    root.rename(inside)
    root.mkdir()
    inside.rename(root / "deeper")


def empty(root):
    shutil.rmtree(root)
    root.mkdir()


def nan(root):
    soundfile.write(bass(root), np.full(1600, np.nan), 16000, subtype="FLOAT")


BROKEN = {
    "missing folder": (shutil.rmtree, FileNotFoundError, "No dataset folder .*expected .*/train"),
    "empty folder": (empty, FileNotFoundError, "No train tracks under .* files, or folders with"),
    "no test tracks": (
        lambda root: shutil.rmtree(root / "test"),
        FileNotFoundError,
        "No test tracks",
    ),
    "folder too high": (nested, FileNotFoundError, "did you mean .*/deeper"),
    "missing stem": (
        lambda root: bass(root).unlink(),
        ValueError,
        "3 have bass, drums, piano, vocals, but train/train song 0 lacks bass. Add files",
    ),
    "one stem": (one_stem, ValueError, "fewer than two stems"),
    "wrong format": (
        lambda root: bass(root).write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200)),
        ValueError,
        "Cannot read .*bass.wav",
    ),
    "stem file among folders": (
        lambda root: shutil.copy(bass(root), root / "train" / "inside.stem.mp4"),
        ValueError,
        "train/inside lacks piano and has other too",
    ),
    "no samples": (
        lambda root: soundfile.write(bass(root), np.zeros(0), 16000),
        ValueError,
        "train song 0: bass has no samples",
    ),
    "empty file": (lambda root: bass(root).write_bytes(b""), ValueError, "Cannot read .*bass.wav"),
    "NaN": (nan, ValueError, "train song 0: bass has NaN or infinite samples"),
    "two files for a stem": (
        lambda root: shutil.copy(bass(root), first(root) / "bass.flac"),
        ValueError,
        "two files for stem 'bass'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_dataset(tmp_path, monkeypatch, case):
    damage, error, words = BROKEN[case]
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=0.1)
    damage(root)
    with pytest.raises(error, match=words) as raised:
        build_store(root, 16000, 1)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").rglob("*.part*"))
    assert not any('"complete":true' in path.read_text() for path in tmp_path.rglob("index.json"))


def test_all_broken_tracks_are_named(tmp_path):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=0.1)
    paths = [root / "train" / f"train song {index}" / "bass.wav" for index in (0, 2)]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"no audio")
    words = "2 of 5 tracks cannot be used:\n.*train song 0.*\n.*train song 2"
    with pytest.raises(ValueError, match=words):
        build_store(root, 16000, 1)
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert len(build_store(root, 16000, 1).tracks) == 5


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", *map(str, arguments)], check=True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def cut_with_header_first(path):
    ffmpeg("-i", path, "-map", "0", "-c", "copy", "-movflags", "faststart", path.parent / "f.mp4")
    (path.parent / "f.mp4").replace(path)
    cut(path)


def one_stream(path):
    ffmpeg("-i", path, "-map", "0:0", "-c", "copy", path.parent / "one.mp4")
    (path.parent / "one.mp4").replace(path)


def wav(path):
    soundfile.write(path, chord(0, 2, 44100, 2), 44100, format="WAV")


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, r"Cannot read .*song.stem.mp4 \(.*(moov|Invalid data).*expected MUSDB18's mixture"),
        (cut_with_header_first, r"song.stem.mp4.*(ends after|streams differ in length).*cut off"),
        (wav, r"1 audio streams\); expected MUSDB18's mixture and four stems"),
        (one_stream, r"1 audio streams\); expected MUSDB18's mixture and four stems"),
        (lambda path: path.write_text("not music"), "Cannot read .*train song.stem.mp4"),
    ],
)
def test_broken_stem_file(stem_files, tmp_path, damage, words):
    root = shutil.copytree(stem_files, tmp_path / "data")
    damage(root / "train" / "Somebody - train song.stem.mp4")
    with pytest.raises(ValueError, match=words):
        build_store(root, 16000, 1)


def test_missing_ffmpeg(tmp_path, monkeypatch):
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / f"{name}.stem.mp4").write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs ffmpeg and ffprobe.*apt-get install ffmpeg"):
        build_store(tmp_path, 16000, 1)


@contextmanager
def not_root():
    """Be another user for a while: root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "locked, words",
    [
        ("train", "No permission to open .*/train: chmod"),
        ("train/train song 0/bass.wav", "No permission to read .*bass.wav: chmod u"),
    ],
)
def test_no_permission(monkeypatch, tmp_path_factory, locked, words):
    base = Path("/tmp") / tmp_path_factory.mktemp("locked").name  # pytest's folder is private
    base.mkdir()
    root = write_dataset(base / "data", 2, 1, 1, seconds=0.1)
    try:
        (base / "cache").mkdir()
        (base / "cache").chmod(0o777)
        (root / locked).chmod(0)
        monkeypatch.setenv("MSS_CACHE", str(base / "cache"))
        with not_root(), pytest.raises(PermissionError, match=words):
            build_store(root, 16000, 1)
    finally:
        (root / locked).chmod(0o755)
        shutil.rmtree(base)

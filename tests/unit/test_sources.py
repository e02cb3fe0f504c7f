"""Dataset folders: every form is read, every broken one is one clear error."""

import shutil
import subprocess
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import soundfile
from conftest import STEMS, write_dataset

from mss_utils.config import resolve_settings
from mss_utils.data import build_store, find_tracks, level_db, open_store, sources

MUSDB_STEMS = ("drums", "bass", "other", "vocals")
SPLITS = ("train", "valid", "test")


def chord(stem, rate, channels=2):
    """Return two seconds of three tones `(samples, channels)`, different for each stem."""
    time = np.arange(2 * rate)[:, None, None] / rate
    pitches = 110 * (stem + 1) * np.array([[1], [3], [5]]) + 7 * np.arange(channels)
    return 0.03 * (stem + 1) * np.sin(2 * np.pi * pitches * time).sum(axis=1)


def write_tracks(root, stems=STEMS, suffix=".wav", rate=16000, channels=2, mixture=False):
    """Write one track of two seconds per split; stem i is `chord(i)`."""
    for split in SPLITS:
        folder = root / split / f"Somebody - {split} song"
        folder.mkdir(parents=True)
        audio = {stem: chord(index, rate, channels) for index, stem in enumerate(stems)}
        if mixture:
            audio["mixture"] = sum(audio.values())
        for name, sound in audio.items():
            soundfile.write(folder / f"{name}{suffix}", sound, rate)
    return root


def assert_content(store, stems=STEMS, max_error_db=-40):
    """Check stems and mixture of every track, except for the edges."""
    assert set(store.stems) == set(stems)
    for track in store.tracks:
        mixture, audio = store.load(track)
        middle = slice(store.sample_rate // 4, store.sample_rate)
        for index, stem in enumerate(stems):
            expected = chord(index, store.sample_rate).T[: store.channels, middle]
            error = audio[store.stem_index(stem)][:, middle] - expected
            assert level_db(error) - level_db(expected) < max_error_db
        assert level_db(mixture - audio.sum(axis=0)) - level_db(mixture) < -20  # lossy coding


@pytest.fixture(scope="module")
def stem_files(tmp_path_factory):
    """Return a dataset of three stem files, as stempeg writes them."""
    import stempeg

    root = tmp_path_factory.mktemp("stem files")
    stems = [chord(index, 44100) for index in range(4)]
    audio, writer = np.stack([sum(stems), *stems]), stempeg.StreamsWriter()
    stempeg.write_stems(str(root / "song.mp4"), audio, sample_rate=44100, writer=writer)
    for split in SPLITS:
        (root / split).mkdir()
        shutil.copy(root / "song.mp4", root / split / f"Somebody - {split} song.stem.mp4")
    return root


FORMS = [(".wav", 48000, 16000), (".flac", 16000, 44100), (".WAV", 44100, 22050)]
FORMS += [(".ogg", 44100, 44100), (".mp3", 44100, 44100)]


@pytest.mark.parametrize("suffix, source_rate, rate", FORMS)
def test_folders_of_stems(tmp_path, suffix, source_rate, rate):
    stems, mixture = ("Cello", "my drums", "zither"), suffix in (".flac", ".mp3")
    store = build_store(write_tracks(tmp_path, stems, suffix, source_rate, 2, mixture), rate, 2)
    assert store.tracks[0].source_rates == (source_rate,)
    assert_content(store, stems, max_error_db=-15 if suffix in (".ogg", ".mp3") else -40)


def test_channels(tmp_path):
    mono = build_store(write_tracks(tmp_path / "mono", channels=1), 16000, 2)
    _, stems = mono.load(mono.tracks[0])
    np.testing.assert_array_equal(stems[:, 0], stems[:, 1])
    assert_content(build_store(tmp_path / "mono", 16000, 1))
    stereo = build_store(write_tracks(tmp_path / "stereo"), 16000, 1)
    _, stems = stereo.load(stereo.tracks[0])
    np.testing.assert_allclose(stems[2, 0], chord(2, 16000).mean(axis=1), atol=1e-3)


@pytest.mark.parametrize("hq", [False, True])
def test_musdb18_as_musdb_reads_it(stem_files, tmp_path, hq):
    import musdb

    root = write_tracks(tmp_path, MUSDB_STEMS, rate=44100, mixture=True) if hq else stem_files
    store = build_store(root, 44100, 2)
    assert_content(store, MUSDB_STEMS, max_error_db=-40 if hq else -15)
    [expected] = musdb.DB(root=str(root), subsets="test", is_wav=hq)
    mixture, stems = store.load(store.split("test")[0])
    np.testing.assert_allclose(mixture, expected.audio.T, atol=2 / 32767)
    for stem, audio in zip(store.stems, stems, strict=True):
        np.testing.assert_allclose(audio, expected.targets[stem].audio.T, atol=2 / 32767)


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


def test_download_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path))
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    errors = [URLError("connection lost")]

    class Musdb:
        def DB(self, root, download):  # noqa: N802
            write_tracks(Path(root), MUSDB_STEMS)
            if errors:
                raise errors.pop()

    monkeypatch.setattr(sources, "_import_musdb", Musdb)
    settings = resolve_settings("musdb7")
    with pytest.raises(ConnectionError, match="connection lost.*--data DIR or set MUSDB_PATH"):
        open_store(settings)
    assert not list(tmp_path.iterdir())
    assert len(open_store(settings).tracks) == 3
    monkeypatch.setattr(sources, "_import_musdb", None)  # the second time nothing is downloaded
    assert len(open_store(settings).tracks) == 3


def test_names_with_unicode_and_quotes(tmp_path):
    names = ["Ólafur – \"Ärger\" & 'söhne' #1", "日本語 $(echo) ; * ?", "Ólafur – 'Ärger' #1"]
    root = write_tracks(tmp_path)
    for split, name in zip(SPLITS, names, strict=True):
        (root / split / f"Somebody - {split} song").rename(root / split / name)
    assert [track.name for track in build_store(root, 16000, 2).tracks] == names


def test_groups_are_summed(tmp_path):
    root = write_tracks(tmp_path, ("drums", "fx", "synth"))
    store = build_store(root, 16000, 2, {"other": ("synth", "fx")})
    assert store.stems == ("drums", "other")
    _, stems = store.load(store.tracks[0])
    np.testing.assert_allclose(stems[1].T, chord(1, 16000) + chord(2, 16000), atol=1e-3)
    assert build_store(root, 16000, 2).stems == ("drums", "fx", "synth"), "a store of its own"
    added = build_store(root, 16000, 2, {"drums": ("synth",)})
    assert added.stems == ("drums", "fx"), "a group may have the name of a stem"
    with pytest.raises(ValueError, match="'other' adds violin, which no track has.*drums, fx"):
        build_store(root, 16000, 1, {"other": ("violin", "synth")})
    with pytest.raises(ValueError, match="fewer than two stems"):
        build_store(root, 16000, 1, {"whole": ("synth", "fx", "drums")})


def test_groups_unite_different_stems(tmp_path):
    root = write_tracks(tmp_path, ("bass", "drums", "synth"))
    next(root.glob("test/*/bass.wav")).unlink()
    words = "2 have bass, drums, synth, but test/Somebody - test song has drums, synth.*groups="
    with pytest.raises(ValueError, match=words):
        build_store(root, 16000, 1)
    assert build_store(root, 16000, 1, {"low": ("bass", "synth")}).stems == ("drums", "low")


def write_samples(samples):
    return lambda bass: soundfile.write(bass, samples, 16000, subtype="FLOAT")


DAMAGES = {
    "No dataset folder .*expected .*/train": lambda bass: shutil.rmtree(bass.parents[2]),
    "No test tracks under": lambda bass: shutil.rmtree(bass.parents[2] / "test"),
    "no list validation_tracks": lambda bass: (bass.parents[2] / "mus.yaml").write_text("a: ["),
    "'train song 0' exists twice": lambda bass: bass.parent.with_suffix(".stem.mp4").touch(),
    "two files for stem 'bass'": lambda bass: shutil.copy(bass, bass.with_suffix(".flac")),
    "Cannot read .*bass.wav": lambda bass: bass.write_bytes(b"no audio"),
    "train song 0: bass has no samples": write_samples(np.zeros(0)),
    "train song 0: bass has NaN": write_samples(np.full(1600, np.nan)),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_broken_dataset(tmp_path, monkeypatch, words):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 2, 0, 1, seconds=0.1)
    DAMAGES[words](root / "train" / "train song 0" / "bass.wav")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        build_store(root, 16000, 1)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").rglob("*.part*"))
    assert not any('"complete":true' in path.read_text() for path in tmp_path.rglob("index.json"))


def test_all_broken_tracks_are_named(tmp_path):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=0.1)
    for index in (0, 2):
        (root / "train" / f"train song {index}" / "bass.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="2 of 5 tracks .*:\n.*train song 0.*\n.*train song 2"):
        build_store(root, 16000, 1)


CUT_OFF = {
    "+faststart": r"song.stem.mp4.*(ends after|streams differ in length).*cut off",  # header first
    "0": r"Cannot read .*song.stem.mp4 \(.*(moov|Invalid data).*expected MUSDB18's mixture",
}


@pytest.mark.parametrize("order", CUT_OFF)
def test_cut_off_stem_file(stem_files, tmp_path, order):
    root = shutil.copytree(stem_files, tmp_path / "data")
    path = root / "train" / "Somebody - train song.stem.mp4"
    options = ["-y", "-map", "0", "-c", "copy", "-movflags", order]
    subprocess.run(["ffmpeg", "-i", stem_files / "song.mp4", *options, path], check=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ValueError, match=CUT_OFF[order]):
        build_store(root, 16000, 1)


def test_missing_ffmpeg(stem_files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs ffmpeg and ffprobe.*apt-get install ffmpeg"):
        build_store(stem_files, 16000, 1)

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import STEMS, write_dataset

from mss_utils.data import audit, build_store, check_target, find_tracks, level_db, open_store, warnings_of
from mss_utils.settings import from_root, resolve

MUSDB = from_root(os.environ["MUSDB_PATH"]) if os.environ.get("MUSDB_PATH") else None
needs_musdb = pytest.mark.skipif(not (MUSDB and MUSDB.is_dir()), reason="MUSDB_PATH names no folder with MUSDB18 excerpts")


def test_the_store_holds_what_the_files_hold(dataset):
    store = build_store(dataset, 16000, 1)
    assert store.stems == STEMS
    assert [len(store.split(split)) for split in ("train", "valid", "test")] == [4, 1, 2]
    track = store.split("test")[0]
    mixture, stems = store.load(track)
    for name, audio in zip(store.stems, stems):
        wanted, _ = soundfile.read(dataset / "test" / track.name / f"{name}.wav", dtype="float32")
        np.testing.assert_allclose(audio[0], wanted, atol=track.scale)
    np.testing.assert_allclose(stems.sum(axis=0), mixture, atol=3 * track.scale)


@pytest.mark.parametrize("rate, channels", [(22050, 2), (44100, 1)])
def test_other_rates_and_channels_are_brought_to_the_working_ones(tmp_path, rate, channels):
    t = np.arange(2 * rate) / rate
    for split, name in (("train", "a"), ("valid", "b"), ("test", "c")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for stem, frequency in (("bass", 110), ("lead", 440)):
            soundfile.write(folder / f"{stem}.flac", np.stack([0.25 * np.sin(2 * np.pi * frequency * t)] * channels, 1), rate)
    store = build_store(tmp_path, 16000, 1)
    track = store.split("train")[0]
    _, stems = store.load(track)
    assert track.samples == 32000
    for audio, frequency in zip(stems, (110, 440)):
        assert abs(level_db(audio) - 20 * np.log10(0.25 / np.sqrt(2))) < 0.1
        assert abs(np.abs(np.fft.rfft(audio[0])).argmax() / 2 - frequency) <= 0.5


def test_samples_beyond_full_scale_are_kept(tmp_path):
    write_dataset(tmp_path, 2, 1, 1, seconds=1)
    loud = np.full((16000, 1), 0.9, np.float32)
    for stem in STEMS:
        soundfile.write(tmp_path / "test" / "test song 0" / f"{stem}.wav", loud, 16000, subtype="FLOAT")
    mixture, stems = (store := build_store(tmp_path, 16000, 1)).load(store.split("test")[0])
    assert abs(mixture.max() - 3.6) < 1e-3 and abs(stems.max() - 0.9) < 1e-3


def test_a_second_call_decodes_nothing_and_a_changed_song_is_decoded_again(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=1)
    first = build_store(root, 16000, 1)
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.glob("*.npy")}
    assert build_store(root, 16000, 1) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in first.folder.glob("*.npy")}
    soundfile.write(root / "train" / "train song 0" / "bass.wav", np.zeros(16000), 16000)
    changed = build_store(root, 16000, 1)
    assert changed.sha != first.sha
    assert sum(a != b for a, b in zip(first.tracks, changed.tracks)) == 1


def test_without_a_validation_folder_some_training_tracks_validate(tmp_path):
    root = write_dataset(tmp_path, 12, 0, 1, seconds=0.2)
    splits = {track.name: track.split for track in find_tracks(root)}
    assert sum(split == "valid" for split in splits.values()) == 1 and len(splits) == 13


@pytest.mark.parametrize("damage, words", [
    (lambda root: shutil.rmtree(root), "No dataset folder"),
    (lambda root: shutil.rmtree(root / "test"), "No test tracks"),
    (lambda root: (root / "train" / "train song 0" / "bass.wav").unlink(), "same two or more stems"),
])
def test_a_broken_dataset_is_one_clear_error(tmp_path, damage, words):
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=0.2)
    damage(root)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        build_store(root, 16000, 1)


def test_missing_ffmpeg_is_one_sentence(tmp_path, monkeypatch):
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / f"{name}.stem.mp4").write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs ffmpeg and ffprobe.*apt-get install ffmpeg"):
        build_store(tmp_path, 16000, 1)


def test_an_unknown_target_lists_the_stems(store, small_settings):
    with pytest.raises(ValueError, match="No stem 'violin'.*bass, drums, piano, vocals"):
        store.stem_index("violin")
    for settings in (small_settings, resolve("demo")):
        with pytest.raises(ValueError, match="No stem 'violin'.*piano"):
            check_target(settings.model_copy(update=dict(target="violin")))
    check_target(resolve("demo", target="all"))


def test_the_audit_finds_what_is_wrong(tmp_path):
    root = write_dataset(tmp_path, 2, 1, 1, seconds=0.6)
    soundfile.write(root / "train" / "train song 1" / "drums.wav", np.zeros(9600), 16000)
    soundfile.write(root / "train" / "train song 0" / "mixture.wav", np.full(9600, 0.5), 16000)
    store = open_store(resolve("smoke", str(root), "piano"))
    table = audit(store)
    assert len(table) == 4 * 5
    silent = table[(table["stem"] == "drums") & (table["track"] == "train song 1")].iloc[0]
    assert silent["silent_share"] == 1 and silent["level_db"] == -np.inf
    found = "\n".join(warnings_of(table, store))
    assert "train song 1: drums is silent throughout" in found
    assert "train song 0: the stems sum to the mixture only within" in found
    assert "test song 0: 0.60 s is shorter" in found


@needs_musdb
def test_real_stem_files_are_read_through_musdb(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / split).mkdir()
        for path in sorted((MUSDB / split).glob("*.stem.mp4"))[:count]:
            (tmp_path / split / path.name).symlink_to(path.resolve())
    store = build_store(tmp_path, 44100, 2)
    assert set(store.stems) == {"vocals", "drums", "bass", "other"}
    import musdb

    track = store.split("test")[0]
    real = musdb.DB(root=str(tmp_path), subsets=["test"])[0]
    mixture, stems = store.load(track)
    assert mixture.shape == real.audio.T.shape
    np.testing.assert_allclose(mixture, real.audio.T, atol=1e-3)
    for stem, audio in zip(store.stems, stems):
        assert abs(level_db(audio) - level_db(real.targets[stem].audio)) < 0.1


@needs_musdb
def test_the_official_validation_split_is_used():
    tracks = find_tracks(MUSDB)
    assert [sum(track.split == split for track in tracks) for split in ("train", "valid", "test")] == [80, 14, 50]

"""The audit of a store, its warnings, and the command `check` that prints them."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from conftest import STEMS, write_dataset
from test_sources import MUSDB, needs_musdb

from mss_utils.__main__ import main
from mss_utils.data import audit, audit_warnings, build_store, co_activity, level_db


def song(root, index=0):
    return root / "train" / f"train song {index}"


def different_lengths(root):
    soundfile.write(song(root) / "bass.wav", np.full(8000, 0.1), 16000)


def different_rates(root):
    soundfile.write(song(root) / "bass.wav", np.full(57600, 0.1), 48000)


def silent_stem(root):
    soundfile.write(song(root, 1) / "drums.wav", np.zeros(19200), 16000)


def wrong_mixture(root):
    soundfile.write(song(root) / "mixture.wav", np.full(19200, 0.5), 16000)


def no_audio(root):
    (root / "train" / "lost").mkdir()
    (root / "test" / "song.mp4").write_bytes(b"a stem file by another name")


def copied(root):
    shutil.copytree(song(root), root / "test" / "a copy")


def shared_artists(root):
    song(root, 1).rename(root / "train" / "Ada - One")
    (root / "valid" / "valid song 0").rename(root / "valid" / "Bob feat. Ada - Two")
    (root / "test" / "test song 0").rename(root / "test" / "Ada feat. Bob - Three")


@pytest.mark.parametrize(
    "damage, warning",
    [
        (different_lengths, "files of different lengths, the shorter ones end in silence: train"),
        (different_rates, "all resampled: train song 0 (16000, 48000 Hz)"),
        (silent_stem, "1 stem silent throughout: drums of train song 1"),
        (wrong_mixture, "1 track whose stems do not add up to the mixture: train song 0 (off by"),
        (no_audio, "2 folders without readable audio, ignored: train/lost, test/song.mp4"),
        (copied, "1 recording more than once: train/train song 0, test/a copy"),
        (shared_artists, "1 artist in both test and train or valid: Ada"),
    ],
)
def test_warning(tmp_path, damage, warning):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=1.2)
    damage(root)
    assert warning in "\n".join(audit_warnings(build_store(root, 16000, 1)))


def test_sound_dataset_has_no_warning(tmp_path):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=1.2)
    for folder in (root, root / "train", song(root)):  # hidden files are nobody's tracks
        (folder / ".ipynb_checkpoints").mkdir()
        shutil.copy(song(root) / "bass.wav", folder / ".ipynb_checkpoints" / "bass.wav")
    (song(root) / "._bass.wav").write_bytes(b"what a Mac leaves")
    (root / "train" / "read me.txt").write_text("hello")
    store = build_store(root, 16000, 1)
    assert len(store.tracks) == 5 and not audit_warnings(store)


def test_short_tracks(tmp_path):
    store = build_store(write_dataset(tmp_path, 2, 1, 1, seconds=0.6), 16000, 1)
    short, unused = audit_warnings(store, segment_s=1.5)
    assert short == "1 track shorter than a second, scored as one frame: test song 0 (0.60 s)"
    assert unused.startswith("2 tracks shorter than a training segment of 1.5 s, not used: train")


@needs_musdb
def test_real_excerpts(tmp_path):
    for track in (
        "train/Triviul - Angelsaint",
        "train/A Classic Education - NightOwl",
        "test/PR - Oh No",
        "test/Triviul feat. The Fiend - Widow",
    ):
        (tmp_path / track).parent.mkdir(exist_ok=True)
        (tmp_path / f"{track}.stem.mp4").symlink_to((MUSDB / f"{track}.stem.mp4").resolve())
    assert audit_warnings(build_store(tmp_path, 16000, 1)) == [
        "1 track whose stems do not add up to the mixture: PR - Oh No (off by -10 dB)",
        "1 artist in both test and train or valid: Triviul",
    ]


def test_audit_against_samples(store):
    table = audit(store).set_index(["split", "track", "stem"])
    for track in store.tracks:
        mixture, stems = store.load(track)
        for name, audio in zip(("mixture", *store.stems), (mixture, *stems), strict=True):
            row = table.loc[(track.split, track.name, name)]
            assert abs(row["level_db"] - level_db(audio)) < 0.01
            assert abs(row["peak"] - np.abs(audio).max()) < 2 * track.scale
        residual_db = level_db(mixture - stems.sum(axis=0)) - level_db(mixture)
        assert abs(max(row["residual_db"], -100) - max(residual_db, -100)) < 0.5


def test_co_activity(tmp_path):
    """Bass always, drums in the first half, piano in the second, vocals never."""
    root = write_dataset(tmp_path, 2, 1, 1, seconds=2)
    loud = np.full(32000, 0.1)
    half = np.where(np.arange(32000) < 16000, 0.1, 0)
    for folder in root.glob("*/*"):
        for stem, audio in zip(STEMS, (loud, half, 0.1 - half, 0 * loud), strict=True):
            soundfile.write(folder / f"{stem}.wav", audio, 16000)
    shares = co_activity(build_store(root, 16000, 1))
    assert shares.loc["bass"].tolist() == [1, 0.5, 0.5, 0]
    assert shares.loc["drums"].tolist() == [1, 1, 0, 0]
    assert shares.loc["piano"].tolist() == [1, 0, 1, 0]
    assert shares.loc["vocals"].isna().all()


def test_check_command(tmp_path, capsys):
    root = write_dataset(tmp_path / "data", 3, 1, 2, seconds=0.6)
    assert main(["check", "--data", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "train 3, valid 1, test 2" in printed and "2 tracks shorter than a second" in printed
    assert main(["check", "--data", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tracks"] == {"train": 3, "valid": 1, "test": 2}
    assert found["source_rates"] == [16000] and len(found["warnings"]) == 2
    (root / "test" / "test song 0" / "bass.wav").write_bytes(b"")
    assert main(["check", "--data", str(root)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("mss_utils check: Cannot read ")

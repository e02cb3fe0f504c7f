"""The audit of a store, its warnings, and the command `check` that prints them."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from conftest import STEMS, write_dataset

from mss_utils.__main__ import main
from mss_utils.data import audit, audit_warnings, build_store, co_activity, level_db


@pytest.mark.parametrize(
    "file, samples, warning",
    [
        ("song 0/bass", 8000, "files of different lengths, the shorter ones end in silence: train"),
        ("song 1/drums", 19200, "1 stem silent throughout: drums of train song 1"),
        ("song 0/mixture", 19200, "stems do not add up to the mixture: train song 0 (off by"),
    ],
)
def test_warning_about_a_file(tmp_path, file, samples, warning):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=1.2)
    soundfile.write(root / "train" / f"train {file}.wav", np.zeros(samples), 16000)
    assert warning in "\n".join(audit_warnings(build_store(root, 16000, 1)))


def test_warnings_about_tracks(tmp_path):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=1.2)
    shutil.copytree(root / "train" / "train song 0", root / "test" / "a copy")
    (root / "train" / "lost").mkdir()
    (root / "train" / "loose.mp3").touch()
    (root / "train" / "train song 1").rename(root / "train" / "Ada - One")
    (root / "valid" / "valid song 0").rename(root / "valid" / "Bob feat. Ada - Two")
    (root / "test" / "test song 0").rename(root / "test" / "Ada feat. Bob - Three")
    assert audit_warnings(build_store(root, 16000, 1)) == [
        "1 recording more than once: train/train song 0, test/a copy",
        "1 artist in both test and train or valid: Ada",
        "2 items without readable audio, ignored: train/loose.mp3, train/lost",
    ]


def test_sound_dataset_has_no_warning(tmp_path):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=1.2)
    song = root / "train" / "train song 0"
    for folder in (root, root / "train", song):  # hidden files are not tracks
        (folder / ".ipynb_checkpoints").mkdir()
        shutil.copy(song / "bass.wav", folder / ".ipynb_checkpoints" / "bass.wav")
    (song / "._bass.wav").write_bytes(b"what a Mac leaves")
    (root / "train" / "read me.txt").write_text("hello")
    store = build_store(root, 16000, 1)
    assert len(store.tracks) == 5 and not audit_warnings(store)


def test_audit_against_samples(store):
    table = audit(store).set_index(["split", "track", "stem"])
    for track in store.tracks:
        mixture, stems = store.load(track)
        for name, audio in dict(mixture=mixture, bass=stems[0], vocals=stems[3]).items():
            row = table.loc[(track.split, track.name, name)]
            assert abs(row["level_db"] - level_db(audio)) < 0.01
            assert abs(row["peak"] - np.abs(audio).max()) < 2 * track.scale
        residual_db = level_db(mixture - stems.sum(axis=0)) - level_db(mixture)
        assert abs(max(row["residual_db"], -100) - max(residual_db, -100)) < 0.5


def test_co_activity(tmp_path):
    """Bass always, drums in the first half, piano in the second, vocals never."""
    root = write_dataset(tmp_path, 2, 1, 1, seconds=2)
    loud, half = np.full(32000, 0.1), np.where(np.arange(32000) < 16000, 0.1, 0)
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
    assert found["source_rates"] == [16000]
    short, unused = found["warnings"]
    assert short.startswith("2 tracks shorter than a second, scored as one frame: test song 0 (0.6")
    assert unused.startswith("3 tracks shorter than a training segment of")
    (root / "test" / "test song 0" / "bass.wav").write_bytes(b"")
    assert main(["check", "--data", str(root)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("mss_utils check: Cannot read ")

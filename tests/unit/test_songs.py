"""The built-in songs: reproducible, read by musdb, with splits that share nothing."""

import json
from functools import partial

import librosa
import numpy as np
import pytest
import soundfile

from mss_utils import songs
from mss_utils.songs import composing, rendering

SHORT = (8.0, 12.0)  # seconds


def render(root, *counts, n_jobs=1, seed=0):
    return songs.render_songs(
        root, *counts, seed=seed, duration_s=SHORT, n_jobs=n_jobs, progress=False
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three training songs, one for validation, two for testing."""
    return render(tmp_path_factory.mktemp("songs"), 3, 1, 2)


def contents(root):
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root): path.read_bytes() for path in paths}


def read(folder, stem):
    return soundfile.read(folder / f"{stem}.flac", dtype="int16")[0] / 32768


def test_same_bytes_in_any_order(root, tmp_path):
    render(tmp_path, 1, 1, 1)
    render(tmp_path, 3, 1, 2, n_jobs=2)
    assert contents(tmp_path) == contents(root)


def test_finished_songs_are_kept(tmp_path):
    (song,) = render(tmp_path, 1, 0, 0).glob("train/*/song.json")
    song.write_text("mine")
    render(tmp_path, 1, 0, 0)
    assert song.read_text() == "mine"
    with pytest.raises(ValueError, match="was rendered with .* choose another folder"):
        render(tmp_path, 1, 0, 0, seed=1)


def test_stems_sum_without_clipping(root):
    for folder in root.glob("t*/*"):
        stems = [read(folder, stem) for stem in songs.STEMS]
        mixture = read(folder, "mixture")
        assert np.array_equal(mixture, sum(stems))
        assert 0.5 < np.abs(mixture).max() < 0.9
        for audio in stems:
            assert np.sqrt(np.mean(audio**2)) > 1e-3 and abs(audio.mean()) < 1e-4


def test_musdb_reads_it(root):
    import musdb

    database = partial(musdb.DB, root=str(root), setup_file="mus.yaml", is_wav=True)
    assert len(database(subsets="train", split="train")) == 3
    assert len(database(subsets="train", split="valid")) == 1
    track, _ = database(subsets="test")
    assert track.rate == songs.SAMPLE_RATE
    for stem in songs.STEMS:
        expected = read(root / "test" / track.name, stem)
        np.testing.assert_allclose(track.targets[stem].audio, expected, atol=1e-6)


@pytest.mark.parametrize("stem", ["drums", "piano"])
def test_energy_rises_at_the_onsets(root, stem):
    rises = []
    for folder in root.glob("t*/*"):
        audio = read(folder, stem).mean(axis=1)
        onsets = json.loads((folder / "onsets.json").read_text())[stem]
        for before, onset in zip(onsets, onsets[1:], strict=False):
            start = int(onset * songs.SAMPLE_RATE)
            if onset - before > 0.1 and start + 700 < len(audio):  # no rolls
                parts = audio[start - 620 : start - 20], audio[start : start + 600]
                low, high = (np.mean(np.diff(part) ** 2) + 1e-10 for part in parts)
                rises.append(high > low)
    assert len(rises) > 40 and np.mean(rises) > 0.85


def test_splits_share_no_tempo_harmony_or_groove():
    """Among 1,000 training songs nearly every tempo and pair turns up."""
    plans = [
        [composing._start(split, index, 0, (45.0, 90.0))[1] for index in range(count)]
        for split, count in zip(songs.SPLITS, (1000, 12, 20), strict=True)
    ]
    for fact in (lambda plan: plan.bpm, lambda plan: (plan.harmony, plan.groove)):
        train, valid, test = ({fact(plan) for plan in split} for split in plans)
        assert not train & valid and not train & test and not valid & test
    assert len({plan.harmony for plan in plans[2]}) > 8


@pytest.mark.parametrize("program, key", [(0, 48), (0, 72), (34, 40), (52, 62)])
def test_keys_are_in_tune(program, key):
    audio = rendering.key_sound(0, program, key, 1.0)[1500:18000].astype(float)
    pitch = librosa.yin(audio, fmin=60, fmax=2000, sr=songs.SAMPLE_RATE)
    assert abs(np.median(librosa.hz_to_midi(pitch)) - key) < 0.5

"""The built-in dataset: it is reproducible, its splits share nothing, musdb reads it, and it is neither easy nor silent."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from mss_utils import songs
from mss_utils.config import ROOT
from mss_utils.songs import composing, playing

SHORT_LABELS = (8.0, 12.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three training songs, one for validation, two for testing."""
    return songs.render_songs(
        tmp_path_factory.mktemp("songs"), 3, 1, 2, duration_s=SHORT_LABELS, n_jobs=1, progress=False
    )


def fingerprints(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def songs(root):
    return sorted(path for path in root.glob("t*/*"))


def read(song, stem):
    return soundfile.read(song / f"{stem}.flac", dtype="int16")[0]


def test_the_same_seed_gives_the_same_bytes_in_any_order(root, tmp_path):
    songs.render_songs(tmp_path, 1, 1, 1, duration_s=SHORT_LABELS, n_jobs=1, progress=False)
    songs.render_songs(tmp_path, 3, 1, 2, duration_s=SHORT_LABELS, n_jobs=2, progress=False)
    assert fingerprints(tmp_path) == fingerprints(root)


def test_what_a_killed_call_left_is_cleared_away(root, tmp_path):
    half = "import os, sys; from pathlib import Path; from mss_utils.files import temporary_folder\nwith temporary_folder(Path(sys.argv[1])) as work: (work / 'bass.flac').write_bytes(b'half'); os._exit(9)"
    assert subprocess.run(
        [sys.executable, "-c", half, str(tmp_path)], cwd=ROOT
    ).returncode == 9 and list(tmp_path.glob(".part-*"))
    songs.render_songs(tmp_path, 1, 0, 0, duration_s=SHORT_LABELS, n_jobs=1, progress=False)
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"] and len(songs(tmp_path)) == 1


def test_another_seed_gives_other_songs():
    first, second = (songs.compose("train", 0, seed, SHORT_LABELS) for seed in (0, 1))
    assert [part.notes for part in first.parts] != [part.notes for part in second.parts]


def test_finished_songs_are_kept_and_contradictions_refused(root, tmp_path):
    songs.render_songs(tmp_path, 1, 0, 0, duration_s=SHORT_LABELS, n_jobs=1, progress=False)
    (song,) = songs(tmp_path)
    (song / "song.json").write_text("mine")
    songs.render_songs(tmp_path, 1, 0, 0, duration_s=SHORT_LABELS, n_jobs=1, progress=False)
    assert (song / "song.json").read_text() == "mine"
    with pytest.raises(ValueError, match="rendered with.*asked for"):
        songs.render_songs(
            tmp_path, 1, 0, 0, seed=1, duration_s=SHORT_LABELS, n_jobs=1, progress=False
        )


@pytest.mark.parametrize(
    "arguments, message",
    [(("dev", 0), "unknown split"), (("train", 0, 0, (20.0, 10.0)), "duration_s")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        songs.compose(*arguments)


def test_stems_add_up_without_clipping(root):
    for song in songs(root):
        mixture = read(song, "mixture").astype(int)
        assert np.array_equal(mixture, sum(read(song, stem).astype(int) for stem in songs.STEMS))
        assert 0.5 < np.abs(mixture).max() / 32768 < 0.9
        for stem in songs.STEMS:
            sound = read(song, stem) / 32768
            assert np.sqrt(np.mean(sound**2)) > 1e-3, f"{stem} of {song.name} is silent"
            assert abs(sound.mean()) < 1e-4
            assert np.abs(sound[-20:]).max() < 1e-3


def test_musdb_reads_it(root):
    import musdb

    train, valid = (
        musdb.DB(root=str(root), setup_file="mus.yaml", is_wav=True, subsets="train", split=s)
        for s in ("train", "valid")
    )
    test = musdb.DB(root=str(root), setup_file="mus.yaml", is_wav=True, subsets="test")
    assert (len(train), len(valid), len(test)) == (3, 1, 2)
    track = test[0]
    assert track.rate == songs.SAMPLE_RATE and set(songs.STEMS) <= set(track.targets)
    total = sum(track.targets[stem].audio for stem in songs.STEMS)
    assert np.allclose(track.audio, total, atol=1e-6)
    assert np.allclose(
        track.targets["piano"].audio, read(root / "test" / track.name, "piano") / 32768, atol=1e-6
    )


@pytest.mark.parametrize("stem", ["drums", "piano"])
def test_energy_rises_at_the_onsets(root, stem):
    rises = []
    for song in songs(root):
        sound = (read(song, stem) / 32768).mean(1)
        for onset, before in zip(
            *(lambda t: (t[1:], t[:-1]))(json.loads((song / "onsets.json").read_text())[stem])
        ):
            at = int(onset * songs.SAMPLE_RATE)
            if onset - before > 0.1 and at + 700 < len(sound):  # chords and rolls aside
                power = [np.mean(np.diff(sound[a : a + 600]) ** 2) + 1e-10 for a in (at - 620, at)]
                rises.append(power[1] > power[0])
    assert len(rises) > 40 and np.mean(rises) > 0.85


def test_splits_share_no_seed_tempo_or_pair():
    """The plan is what `compose` draws first; over 1,000 training songs nearly every free tempo and pair turns up."""
    plans = {
        split: [composing._start(split, i, 0, (45.0, 90.0))[1] for i in range(n)]
        for split, n in zip(songs.SPLITS, (1000, 12, 20))
    }
    for what in (lambda plan: plan.bpm, lambda plan: (plan.harmony, plan.groove)):
        train, valid, test = ({what(plan) for plan in plans[split]} for split in songs.SPLITS)
        assert not train & valid and not train & test and not valid & test
    assert (
        len({plan.harmony for plan in plans["test"]}) > 8
        and len({plan.groove for plan in plans["test"]}) > 8
    )


def test_song_facts_are_the_plan_that_was_checked():
    songs = [
        songs.compose(split, i, 0, SHORT_LABELS).metadata
        for split in songs.SPLITS
        for i in range(4)
    ]
    assert len({tuple(song["seed"]) for song in songs}) == len(songs)
    for song in songs:
        plan = composing._start(song["split"], song["index"], 0, SHORT_LABELS)[1]
        assert (song["tempo_bpm"], song["harmony"], song["groove"]) == (
            plan.bpm,
            plan.harmony,
            plan.groove,
        )


def test_songs_have_a_form_and_every_player():
    for i in range(20):
        song = songs.compose("test", i)
        assert 45.0 <= song.duration_s <= 90.0
        assert sum(bars for _, bars in song.metadata["form"]) == song.metadata["bars"]
        onsets = song.onsets()
        assert all(len(onsets[stem]) > 10 for stem in songs.STEMS)
        assert all(0.0 <= times[0] and times[-1] < song.duration_s for times in onsets.values())
        gaps = np.diff([0.0, *onsets["piano"], song.duration_s])
        assert gaps[gaps > 4.0].sum() < 0.3 * song.duration_s


def test_the_piano_lies_below_the_mixture():
    """The unscaled mixture as the estimate of the piano, in dB: spread over songs around -6.5."""
    found = []
    for i in range(5):
        stems = songs.render(songs.compose("test", i, duration_s=SHORT_LABELS))
        mono = {stem: sound.astype(float).mean(1) for stem, sound in stems.items()}
        residual = sum(mono.values()) - mono["piano"]
        found.append(10 * np.log10(np.sum(mono["piano"] ** 2) / np.sum(residual**2)))
    assert -9.0 < np.median(found) < -5.0 and np.std(found) > 0.3


@pytest.mark.parametrize(
    "program, key", [(0, 48), (0, 72), (2, 60), (34, 40), (52, 62), (24, 55), (51, 66)]
)
def test_keys_are_in_tune(program, key):
    """The strongest comb of six partials lies within a quarter tone of the key, in every zone that is asked for."""
    sound = playing.key_sound(0, program, key, 1.0)[1500:18000]
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 16))
    cents = np.arange(-600, 601, 5)
    combs = [
        440 * 2 ** ((key - 69 + c / 100) / 12) * np.arange(1, 7) / songs.SAMPLE_RATE * (1 << 16)
        for c in cents
    ]
    strength = [
        sum(
            spectrum[k - 3 : k + 4].max()
            for k in np.round(comb).astype(int)
            if k < len(spectrum) - 4
        )
        for comb in combs
    ]
    assert abs(cents[int(np.argmax(strength))]) <= 50


def test_a_missing_program_is_named():
    with pytest.raises(ValueError, match="no program 7 in bank 128"):
        playing.zones(128, 7, 60)

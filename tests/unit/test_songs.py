"""The built-in songs: reproducible, read by musdb, with splits that share nothing."""

import hashlib
import json

import numpy as np
import pytest
import soundfile

from mss_utils import songs
from mss_utils.songs import composing, rendering

SHORT = (8.0, 12.0)  # seconds


def render(root, *counts, n_jobs=1, **options):
    options = dict(duration_s=SHORT, n_jobs=n_jobs, progress=False) | options
    return songs.render_songs(root, *counts, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return three training songs, one for validation, two for testing."""
    return render(tmp_path_factory.mktemp("songs"), 3, 1, 2)


def hashes(root):
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def folders(root):
    return sorted(root.glob("t*/*"))


def read(folder, stem):
    return soundfile.read(folder / f"{stem}.flac", dtype="int16")[0]


def test_same_bytes_in_any_order(root, tmp_path):
    render(tmp_path, 1, 1, 1)
    render(tmp_path, 3, 1, 2, n_jobs=2)
    assert hashes(tmp_path) == hashes(root)


def test_other_seed_other_songs():
    first, second = (songs.compose("train", 0, seed, SHORT) for seed in (0, 1))
    assert [part.notes for part in first.parts] != [part.notes for part in second.parts]


def test_finished_songs_are_kept(tmp_path):
    (folder,) = folders(render(tmp_path, 1, 0, 0))
    (folder / "song.json").write_text("mine")
    render(tmp_path, 1, 0, 0)
    assert (folder / "song.json").read_text() == "mine"
    with pytest.raises(ValueError, match="was rendered with .* choose another folder"):
        render(tmp_path, 1, 0, 0, seed=1)


@pytest.mark.parametrize(
    "arguments, message",
    [(("dev", 0), "unknown split"), (("train", 0, 0, (20.0, 10.0)), "duration_s")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        songs.compose(*arguments)


def test_unknown_program():
    with pytest.raises(ValueError, match="no program 7 in bank 128"):
        rendering.zones(128, 7, 60)


def test_stems_sum_without_clipping(root):
    for folder in folders(root):
        stems = {stem: read(folder, stem).astype(int) for stem in songs.STEMS}
        mixture = read(folder, "mixture")
        assert np.array_equal(mixture, sum(stems.values()))
        assert 0.5 < np.abs(mixture / 32768).max() < 0.9
        for audio in stems.values():
            audio = audio / 32768
            assert np.sqrt(np.mean(audio**2)) > 1e-3 and abs(audio.mean()) < 1e-4
            assert np.abs(audio[-20:]).max() < 1e-3


def test_musdb_reads_it(root):
    import musdb

    def database(**subset):
        return musdb.DB(root=str(root), setup_file="mus.yaml", is_wav=True, **subset)

    train, valid = (database(subsets="train", split=split) for split in ("train", "valid"))
    test = database(subsets="test")
    assert (len(train), len(valid), len(test)) == (3, 1, 2)
    track = test[0]
    assert track.rate == songs.SAMPLE_RATE and set(songs.STEMS) <= set(track.targets)
    total = sum(track.targets[stem].audio for stem in songs.STEMS)
    np.testing.assert_allclose(track.audio, total, atol=1e-6)
    piano = read(root / "test" / track.name, "piano") / 32768
    np.testing.assert_allclose(track.targets["piano"].audio, piano, atol=1e-6)


@pytest.mark.parametrize("stem", ["drums", "piano"])
def test_energy_rises_at_the_onsets(root, stem):
    rises = []
    for folder in folders(root):
        audio = (read(folder, stem) / 32768).mean(axis=1)
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
    plans = {
        split: [composing._start(split, index, 0, (45.0, 90.0))[1] for index in range(count)]
        for split, count in zip(songs.SPLITS, (1000, 12, 20), strict=True)
    }
    for fact in (lambda plan: plan.bpm, lambda plan: (plan.harmony, plan.groove)):
        train, valid, test = ({fact(plan) for plan in plans[split]} for split in songs.SPLITS)
        assert not train & valid and not train & test and not valid & test
    assert len({plan.harmony for plan in plans["test"]}) > 8
    assert len({plan.groove for plan in plans["test"]}) > 8


def test_metadata_is_the_plan():
    seeds = set()
    for split in songs.SPLITS:
        for index in range(4):
            facts = songs.compose(split, index, 0, SHORT).metadata
            plan = composing._start(split, index, 0, SHORT)[1]
            found = facts["tempo_bpm"], facts["harmony"], facts["groove"]
            assert found == (plan.bpm, plan.harmony, plan.groove)
            seeds.add(tuple(facts["seed"]))
    assert len(seeds) == 12


def test_form_and_players():
    for index in range(20):
        song = songs.compose("test", index)
        assert 45.0 <= song.duration_s <= 90.0
        assert sum(bars for _, bars in song.metadata["form"]) == song.metadata["bars"]
        onsets = song.onsets()
        for times in onsets.values():
            assert len(times) > 10 and times[0] >= 0 and times[-1] < song.duration_s
        gaps = np.diff([0.0, *onsets["piano"], song.duration_s])
        assert gaps[gaps > 4.0].sum() < 0.3 * song.duration_s


def test_piano_is_quieter_than_the_rest():
    ratios_db = []
    for index in range(5):
        stems = songs.render(songs.compose("test", index, duration_s=SHORT))
        mono = {stem: audio.astype(float).mean(axis=1) for stem, audio in stems.items()}
        rest = sum(mono.values()) - mono["piano"]
        ratios_db.append(10 * np.log10(np.sum(mono["piano"] ** 2) / np.sum(rest**2)))
    assert -9.0 < np.median(ratios_db) < -5.0 and np.std(ratios_db) > 0.3


def partials(spectrum, pitch_hz):
    """Return the summed magnitude of the first six partials of a pitch."""
    bins = np.round(pitch_hz * np.arange(1, 7) / songs.SAMPLE_RATE * (1 << 16)).astype(int)
    return sum(spectrum[k - 3 : k + 4].max() for k in bins if k < len(spectrum) - 4)


@pytest.mark.parametrize(
    "program, key", [(0, 48), (0, 72), (2, 60), (34, 40), (52, 62), (24, 55), (51, 66)]
)
def test_keys_are_in_tune(program, key):
    audio = rendering.key_sound(0, program, key, 1.0)[1500:18000]
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 1 << 16))
    cents = np.arange(-600, 601, 5)
    strength = [partials(spectrum, 440 * 2 ** ((key - 69 + c / 100) / 12)) for c in cents]
    assert abs(cents[int(np.argmax(strength))]) <= 50

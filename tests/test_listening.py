"""Excerpts: which track, which seconds, one common level in the files, and players that cannot be broken by a name."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from mss_utils import listening
from mss_utils.data import Track, level_db
from mss_utils.settings import MODELS, Run, Settings

RATE = 16000


@pytest.fixture
def versions():
    """Four seconds of noise at very different levels; the target is loud in the third second."""
    rng = np.random.default_rng(0)
    noise = lambda level: (level * rng.standard_normal((1, 4 * RATE))).astype(np.float32)
    reference = noise(0.01)
    reference[:, 2 * RATE : 3 * RATE] *= 10
    return {"mixture": noise(0.1), "reference": reference, "unet": noise(0.03), "demucs_lstm": noise(0.003)}


def tracks_table(scores):
    """The columns of tables/tracks.csv that a choice needs; `scores` is {track: one SDR per model}."""
    rows = [dict(target="piano", track=track, model=model, seed=0, SDR=sdr)
            for track, sdrs in scores.items() for model, sdr in zip(MODELS, sdrs)]
    return pd.DataFrame(rows)


def test_tracks_are_ranked_by_the_median_over_the_models():
    table = tracks_table({"a": (0, 1, 90), "b": (2, 2, 2), "c": (5, -9, -9), "d": (3, 3, 3), "e": (np.nan,) * 3})
    assert listening.chosen_tracks(table, "piano") == {"best": "d", "median": "b", "worst": "c"}


def test_mixture_oracle_and_other_targets_do_not_rank():
    table = tracks_table({"a": (1, 1, 1), "b": (2, 2, 2)})
    oracle, bass = tracks_table({"a": (50,)}).assign(model="irm"), tracks_table({"a": (50, 50, 50)}).assign(target="bass")
    assert listening.chosen_tracks(pd.concat([table, oracle, bass]), "piano")["best"] == "b"


def test_no_score_at_all_is_an_error():
    with pytest.raises(ValueError, match="tracks.csv"):
        listening.chosen_tracks(tracks_table({"a": (np.nan,) * 3}), "piano")


def test_the_excerpt_lies_where_the_target_has_most_energy(versions):
    excerpt = listening.cut_excerpt(versions, "song", "piano", RATE, 1.0)
    assert excerpt.start_s == pytest.approx(2.0, abs=0.01)
    assert {audio.shape for audio in excerpt.versions.values()} == {(1, RATE)}


@pytest.mark.parametrize("length", [4 * RATE, 9 * RATE])
def test_a_short_track_is_its_own_excerpt(versions, length):
    assert listening.loudest_start(versions["reference"], length) == 0


def test_one_gain_brings_the_loudest_version_to_one_db_below_full_scale(versions):
    excerpt = listening.cut_excerpt(versions, "song", "piano", RATE, 1.0)
    peaks = {name: np.abs(audio).max() for name, audio in excerpt.versions.items()}
    assert 20 * np.log10(max(peaks.values())) == pytest.approx(-1.0, abs=0.01)
    gains = [excerpt.versions[name] / versions[name][:, round(excerpt.start_s * RATE) :][:, :RATE] for name in versions]
    assert np.ptp([np.median(gain) for gain in gains]) < 1e-4


def test_silence_keeps_its_level():
    assert listening.common_gain({"mixture": np.zeros((1, 10))}) == 1.0


def test_the_files_keep_the_level_differences(versions, tmp_path):
    run = Run("r", Settings(), tmp_path)
    excerpt = listening.cut_excerpt(versions, "a/b <song>", "piano", RATE, 1.0)
    paths = listening.write_excerpt(run, excerpt, RATE)
    assert sorted(path.name for path in run.audio("a/b <song>", "piano").iterdir()) == sorted(f"{name}.mp3" for name in versions)
    decoded = {path.stem: level_db(soundfile.read(path, always_2d=True)[0][: RATE - 2000]) for path in paths}
    for name in versions:
        wanted = level_db(excerpt.versions[name]) - level_db(excerpt.versions["mixture"])
        # White noise loses its highest octave to the coder in every version alike.
        assert decoded[name] - decoded["mixture"] == pytest.approx(wanted, abs=0.1)


def test_players_share_one_gain_in_each_column(versions, monkeypatch):
    peaks = []
    monkeypatch.setattr(listening, "player", lambda audio, rate, label="": peaks.append(np.abs(audio).max()) or "")
    listening.player_table({"one": versions, "two": {"unet": versions["unet"]}}, RATE)
    at_the_limit = np.isclose(peaks, 10 ** (-1 / 20), rtol=1e-5)
    assert len(peaks) == 5 and at_the_limit.sum() == 2, "the loudest of each column and no other"
    assert max(peaks) == max(np.array(peaks)[at_the_limit])


@pytest.mark.parametrize("rate, channels", [(16000, 1), (22050, 2), (44100, 1)])
def test_ten_seconds_are_small(rate, channels):
    noise = 0.2 * np.random.default_rng(0).standard_normal((channels, 10 * rate))
    coded = listening.encode_mp3(noise, rate)
    assert len(coded) < 150_000
    assert soundfile.read(io.BytesIO(coded), always_2d=True)[0].shape[1] == channels


def test_names_are_escaped(versions):
    name = "<script>alert('x')</script> & \"y\""
    page = listening.player_table({name: {name: versions["unet"]}}, RATE, {name: {name: name}}).data
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<audio") == 1 and 'src="data:audio/mpeg;base64,' in page


def test_the_chooser_separates_on_demand_and_shows_its_first_state(versions, monkeypatch):
    shown, separated = [], []
    handle = SimpleNamespace(update=lambda content: shown.append(content.data))
    monkeypatch.setattr(listening, "display", lambda content, display_id=None: shown.append(content) or handle)
    track = Track("", "test", "file.npy", "", "", "", 4 * RATE, 1.0, (RATE,), (4 * RATE,), (), (), 0.0, (), 8)
    tracks = [replace(track, name=name) for name in ("<b>one</b>", "two")]
    store = SimpleNamespace(split=lambda _: tracks, sample_rate=RATE)
    everything = {name: versions["unet"] for name in listening.VERSIONS}
    run = SimpleNamespace(settings=Settings(excerpt_s=1.0))
    listening.chooser(run, store, "piano", lambda track: separated.append(track.name) or everything)
    menus, first = shown
    assert separated == ["<b>one</b>"] and "<b>one" not in first.data and "data:audio/mpeg" in first.data
    menus.children[1].value = "irm"
    menus.children[0].value = tracks[1]
    menus.children[0].value = tracks[0]
    assert separated == ["<b>one</b>", "two"], "a track that was heard is not separated again"
    assert "two" in shown[-3] and "data:image/png" in shown[-1]


def test_the_example_of_the_training_notebooks_is_a_validation_song(store, small_settings):
    model = torch.nn.Identity()
    model.segment_s = 0.5
    excerpt = listening.validation_excerpt(store, model, "unet", "piano", excerpt_s=1.0)
    assert excerpt.track == store.split("valid")[0].name
    assert list(excerpt.versions) == ["mixture", "reference", "unet"]
    assert excerpt.versions["unet"].shape == (1, RATE)
    assert excerpt.scores["unet"] == pytest.approx(excerpt.scores["mixture"])

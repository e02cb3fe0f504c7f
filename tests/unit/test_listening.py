import base64
import io
import re
from html import unescape
from itertools import product

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import soundfile

from mss_utils import analysis
from mss_utils.config import COMPARED_MODELS, SEQUENCE_MODELS
from mss_utils.data import level_db
from mss_utils.listening import excerpts, page, players, widgets
from mss_utils.listening.excerpts import choose_tracks, cut_excerpt, excerpt_scores
from mss_utils.listening.player import common_gain, encode_mp3, mp3_rate, reencode
from mss_utils.separation import ESTIMATED, estimate_paths
from mss_utils.training import train

RATE = 16000


def make_versions():
    """Four seconds of noise at different levels; the target is loud in the third second."""
    noise = np.random.default_rng(0).standard_normal((4, 1, 4 * RATE)).astype(np.float32)
    levels = np.array([0.1, 0.01, 0.03, 0.003], np.float32)[:, None, None]
    versions = dict(
        zip(("mixture", "reference", "unet", "demucs_lstm"), levels * noise, strict=True)
    )
    versions["reference"][:, 2 * RATE : 3 * RATE] *= 10
    return versions


def decode_sounds(page):
    """Every mp3 of a page, `(samples, channels)`."""
    mp3s = map(base64.b64decode, re.findall("data:audio/mpeg;base64,([A-Za-z0-9+/=]+)", page))
    return [soundfile.read(io.BytesIO(mp3), always_2d=True)[0] for mp3 in mp3s]


def test_tracks_are_chosen_by_rule():
    scores = dict(a=(0, 1, 90), b=(2, 2, 2), c=(5, -9, -9), d=(3, 3, 3), e=(np.nan,) * 3)
    rows = [
        (track, *row)
        for track in scores
        for row in zip(COMPARED_MODELS, scores[track], strict=True)
    ]
    table = pd.DataFrame(rows, columns=["track", "model", "SDR"]).assign(target="piano", frames=10)
    table.loc[table["track"] == "d", "frames"] = 100
    others = [table.assign(SDR=50, model="irm"), table.assign(SDR=50, target="bass")]
    attack = pd.DataFrame(dict(a=20, d=90, e=99).items(), columns=["track", "n_onsets"])
    attack = attack.assign(target="piano")
    chosen = choose_tracks(pd.concat([table, *others]), attack, "piano")
    assert chosen.pop("most onsets") == "a"  # per second, and e has no score
    assert chosen == {"best": "d", "median": "b", "worst": "c", "widest disagreement": "a"}
    same = choose_tracks(table.query("track == 'b'"), attack, "piano")
    assert list(same) == ["best", "median", "worst"]  # no onset, no disagreement
    with pytest.raises(ValueError, match="tracks.csv"):
        choose_tracks(table.query("track == 'e'"), attack, "piano")


def test_pair_has_equal_sdr_and_different_errors():
    a, b1, b2 = COMPARED_MODELS
    rows = [("t", a, 5.0, 12, 6), ("t", b1, 5.1, 6, 12), ("t", b2, 9.0, 30, 2)]
    rows += [("u", a, 5.0, 9, 8), ("u", b1, 5.1, 8, 9), ("u", b2, 5.1, 8, 9)]
    table = pd.DataFrame(rows, columns=["track", "model", "SDR", "SIR", "SAR"])
    table = table.assign(target="piano", seed=0)
    scores = {a: dict(SDR=5.0, SIR=12, SAR=6), b1: dict(SDR=5.1, SIR=6, SAR=12)}
    assert page.equal_score_pair(table, "piano") == ("t", scores)
    assert page.equal_score_pair(table.query("track == 't' and model != @b1"), "piano") == ("", {})


def test_excerpt_is_loudest_and_has_one_gain():
    versions = make_versions()
    versions["unet"] = -versions["mixture"]  # its residual is twice the mixture
    excerpt = cut_excerpt(versions, "track", RATE, 1.0)
    assert excerpt.start_s == pytest.approx(2.0, abs=0.01)
    peak = max(np.abs(excerpt.versions["mixture"] - x).max() for x in excerpt.versions.values())
    assert peak == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    start, gain = round(excerpt.start_s * RATE), 10 ** (excerpt.gain_db / 20)
    for name, audio in excerpt.versions.items():
        np.testing.assert_allclose(audio, gain * versions[name][:, start : start + RATE], rtol=1e-4)


def test_scores_are_those_of_the_excerpt():
    versions = make_versions() | dict(demucs_lstm=np.zeros((1, 4 * RATE), np.float32))
    versions["unet"] = np.float32(0.9) * versions["reference"]
    scores = excerpt_scores(versions, RATE)
    assert set(scores) == {"mixture", "unet"}, "a silent version has no score"
    assert scores["unet"]["SDR"] == pytest.approx(20, abs=0.1)


def test_versions_of_a_player_share_one_gain():
    versions = make_versions()
    large = players({"player": versions}, RATE).data
    smaller = reencode(large, 0.5)
    assert len(smaller) < 0.9 * len(large)
    pairs = zip(decode_sounds(smaller), versions.values(), strict=True)
    assert np.ptp([level_db(sound) - level_db(audio) for sound, audio in pairs]) < 0.2
    assert np.isfinite(common_gain({"mixture": np.zeros((1, 10))}))


@pytest.mark.parametrize("rate, channels", [(44100, 2), (96000, 6)])
def test_any_rate_and_channels_become_small_mp3(rate, channels):
    noise = 0.2 * np.random.default_rng(0).standard_normal((channels, 10 * rate))
    mp3 = encode_mp3(noise, rate)
    audio, new_rate = soundfile.read(io.BytesIO(mp3), always_2d=True)
    assert len(mp3) <= 300_000 and new_rate == mp3_rate(rate)
    assert audio.shape == (10 * new_rate, 1 if channels == 6 else 2)


def test_player_escapes_names_and_loads_nothing():
    name = "<script>alert('x')</script> & \"y\""
    frame = players({name: {name: make_versions()["unet"]}}, RATE, {name: {name: {name: 1.0}}})
    text = unescape(re.search('srcdoc="([^"]*)"', frame.data)[1])
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert text.count('<audio controls preload="none"') == 1  # plays without scripts, too


def test_menu_shows_the_chosen_track(small_run, store, monkeypatch):
    shown, excerpt = [], cut_excerpt(make_versions(), "track", RATE, 1.0)
    monkeypatch.setattr(widgets, "display", shown.append)
    for name in ("display", "update"):
        monkeypatch.setattr(widgets.DisplayHandle, name, lambda _, item: shown.append(item.data))
    monkeypatch.setattr(widgets, "track_excerpt", lambda *arguments: excerpt)
    widgets.track_menu(small_run, store, "piano")
    menu = shown[0]
    menu.value = menu.options[1]
    assert [menu.options[i] in shown[1 + i] for i in range(2)] == [True, True]


def test_own_song_is_separated_and_played(small_run, store, tmp_path, monkeypatch, capsys):
    train(small_run, store, "piano", "unet")
    song = 0.01 * np.random.default_rng(0).standard_normal((4 * 44100, 2))
    song[2 * 44100 : 3 * 44100] *= 20
    soundfile.write(tmp_path / "my <song>.wav", song, 44100)
    shown = []
    monkeypatch.setattr(ipywidgets.widgets.interaction, "display", shown.append)
    widgets.song_upload(small_run, ("piano",))
    _, path, _, button, _ = shown[0].children
    button.click()
    assert "No song: upload" in capsys.readouterr().out
    path.value = str(tmp_path / "my <song>.wav")
    button.click()
    html = shown[1].data
    assert "my <song>" not in html and "from 2 s" in html
    assert decode_sounds(html)[0].shape == (44100, 2)


@pytest.fixture
def table(small_run, store, monkeypatch):
    """Write estimates and one table that has the columns of all; no model is trained."""
    tracks = store.split("test")
    for track, model in product(tracks, ESTIMATED):
        path = estimate_paths(small_run, track, "piano", model)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.5 * store.load(track)[0].T, RATE, "FLOAT")
    rows = product([track.name for track in tracks], COMPARED_MODELS, analysis.CONDITIONS)
    table = pd.DataFrame(rows, columns=["track", "model", "condition"])
    table = table.assign(target="piano", seed=0, lag_s=0.25, band_low_hz=0, band_high_hz=8000)
    names = ("sdr", "sdr_true_phase", "attack_sdr", "sustain_sdr", "n_onsets", "SIR", "SAR")
    table[[*names]] = np.random.default_rng(0).random((len(table), len(names)))
    table = table.assign(frames=3, SDR=1.0)
    small_run.table("phase").parent.mkdir()
    for name in ("phase", "attack", "repetition"):
        table.to_csv(small_run.table(name), index=False)
    monkeypatch.setattr(analysis, "find_onsets", lambda *_: np.array([0.5, 1.0, 2.0]))
    return table


def test_page_separates_loops_only_and_names_gaps(small_run, store, table, monkeypatch):
    used = []
    monkeypatch.setattr(page, "load_model", lambda folder: folder.parent.name)
    monkeypatch.setattr(page, "separate", lambda model, audio, _: used.append(model) or audio)
    found = {"piano": excerpts(small_run, store, "piano", table)}
    names = {path.stem for path in small_run.folder.rglob("*.mp3")}
    assert names == {"mixture", "reference", *COMPARED_MODELS, "irm"}
    tracks = table[table["condition"] == "repeat"]
    html = page.listening_page(small_run, store, tracks, found, "</script>")
    assert sorted(used) == sorted(3 * SEQUENCE_MODELS)
    figures = html.split("<script>")[0].split("<figure")
    assert [figure.count("<li") for figure in figures[-9:]] == 9 * [4]
    assert "</script" not in html.split('id="test">')[1].split("}]")[0]
    for name in ("phase", "attack", "repetition"):
        table.iloc[:0].to_csv(small_run.table(name), index=False)
    html = page.listening_page(small_run, store, tracks.assign(seed=1), found, "run")
    for text in ("no estimate to improve", "Not askable", "No isolated onset", "No two models"):
        assert text in html

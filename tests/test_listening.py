"""Excerpts: which track, which seconds, one common level in the files, and players that cannot be broken by a name."""

import base64
import html
import io
import json
import re
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from scipy import stats

from mss_utils import listening
from mss_utils.config import MODELS, Run, Settings
from mss_utils.data import Track, level_db, loudest_start
from mss_utils.listening import widgets
from mss_utils.listening.blind_test import RATED, low_anchor, opinion, read_answers, screened
from mss_utils.listening.excerpts import excerpt_scores, write_excerpt
from mss_utils.listening.page import excerpts_section
from mss_utils.listening.player import coded_rate, common_gain, gain_with_residuals
from mss_utils.training.loop import train

RATE = 16000


def residuals_of(versions):
    return [versions["mixture"] - audio for audio in versions.values()]


@pytest.fixture
def versions():
    """Four seconds of noise at very different levels; the target is loud in the third second."""
    rng = np.random.default_rng(0)
    noise = lambda level: (level * rng.standard_normal((1, 4 * RATE))).astype(np.float32)
    reference = noise(0.01)
    reference[:, 2 * RATE : 3 * RATE] *= 10
    return {
        "mixture": noise(0.1),
        "reference": reference,
        "unet": noise(0.03),
        "demucs_lstm": noise(0.003),
    }


def tracks_table(scores, **columns):
    """The columns of tables/tracks.csv that a choice needs; `scores` is {track: one SDR per model}."""
    rows = [
        dict(target="piano", track=track, model=model, seed=0, SDR=sdr, frames=10) | columns
        for track, sdrs in scores.items()
        for model, sdr in zip(MODELS, sdrs)
    ]
    return pd.DataFrame(rows)


def onset_table(counts):
    return pd.DataFrame(
        [
            dict(target="piano", track=track, model=model, n_onsets=n)
            for track, n in counts.items()
            for model in MODELS
        ]
    )


def repeat_table(values):
    return pd.DataFrame(
        [
            dict(target="piano", probe="repetitiveness", item=track, value=value)
            for track, value in values.items()
        ]
    )


NOTHING = onset_table({"a": 0}), repeat_table({"a": np.nan})


def test_tracks_are_ranked_by_the_median_over_the_models():
    table = tracks_table(
        {"a": (0, 1, 90), "b": (2, 2, 2), "c": (5, -9, -9), "d": (3, 3, 3), "e": (np.nan,) * 3}
    )
    chosen = listening.chosen_tracks(table, *NOTHING, "piano")
    assert chosen == {"best": "d", "median": "b", "worst": "c", "widest disagreement": "a"}, (
        "nothing was measured of onsets and repeats"
    )


def test_mixture_oracle_and_other_targets_do_not_rank():
    table = tracks_table({"a": (1, 1, 1), "b": (2, 2, 2)})
    oracle, bass = (
        tracks_table({"a": (50,)}).assign(model="irm"),
        tracks_table({"a": (50, 50, 50)}).assign(target="bass"),
    )
    assert (
        listening.chosen_tracks(pd.concat([table, oracle, bass]), *NOTHING, "piano")["best"] == "b"
    )


def test_onsets_count_by_the_second_and_repeats_by_the_bar():
    table = tracks_table({"a": (1, 1, 1), "b": (2, 2, 2), "c": (3, 3, 3)})
    table.loc[table["track"] == "b", "frames"] = 100
    table = pd.concat([table, tracks_table({"unscored": (np.nan,) * 3}, frames=0)])
    onsets, repeats = (
        onset_table({"a": 20, "b": 90, "c": 5, "unscored": 99}),
        repeat_table({"a": 0.1, "b": np.nan, "c": 0.7, "unscored": 0.9}),
    )
    chosen = listening.chosen_tracks(table, onsets, repeats, "piano")
    assert (chosen["most onsets"], chosen["most repetitive"]) == ("a", "c")
    assert "widest disagreement" not in chosen, "the models agree everywhere"


def pair_table(rows):
    """`rows`: (track, model, SDR, SIR, SAR)."""
    return pd.DataFrame(
        [
            dict(target="piano", track=track, model=model, seed=0, SDR=sdr, SIR=sir, SAR=sar)
            for track, model, sdr, sir, sar in rows
        ]
    )


def test_the_pair_has_one_score_and_two_ways_to_be_wrong():
    a, b1, b2 = MODELS
    table = pair_table(
        [
            ("t", a, 5.0, 12, 6),
            ("t", b1, 5.1, 6, 12),
            ("t", b2, 9.0, 30, 2),  # A and B1: 12 dB apart in how they fail
            ("u", a, 5.0, 9, 8),
            ("u", b1, 5.1, 8, 9),
            ("u", b2, 5.1, 8, 9),
        ]
    )
    assert listening.same_score(table, "piano") == ("t", b1, a)
    assert listening.same_score(table[table["track"] == "t"].query("model != @b1"), "piano") is None


def test_no_score_at_all_is_an_error():
    with pytest.raises(ValueError, match="tracks.csv"):
        listening.chosen_tracks(tracks_table({"a": (np.nan,) * 3}), *NOTHING, "piano")


def test_the_excerpt_lies_where_the_target_has_most_energy(versions):
    excerpt = listening.cut_excerpt(versions, "song", "piano", RATE, 1.0)
    assert excerpt.start_s == pytest.approx(2.0, abs=0.01)
    assert {audio.shape for audio in excerpt.versions.values()} == {(1, RATE)}


@pytest.mark.parametrize("length", [4 * RATE, 9 * RATE])
def test_a_short_track_is_its_own_excerpt(versions, length):
    assert loudest_start(versions["reference"], length) == 0


def test_one_gain_brings_the_loudest_version_to_one_db_below_full_scale(versions):
    excerpt = listening.cut_excerpt(versions, "song", "piano", RATE, 1.0)
    peaks = {
        name: np.abs(audio).max()
        for name, audio in (*excerpt.versions.items(), *enumerate(residuals_of(excerpt.versions)))
    }
    assert 20 * np.log10(max(peaks.values())) == pytest.approx(-1.0, abs=0.01)
    gains = [
        excerpt.versions[name] / versions[name][:, round(excerpt.start_s * RATE) :][:, :RATE]
        for name in versions
    ]
    assert np.ptp([np.median(gain) for gain in gains]) < 1e-4


def test_silence_keeps_its_level():
    assert common_gain({"mixture": np.zeros((1, 10))}) == 1.0


def test_the_gain_has_room_for_the_residuals(versions):
    loud = versions | {"unet": -versions["mixture"]}  # mixture minus this is twice the mixture
    excerpt = listening.cut_excerpt(loud, "song", "piano", RATE, 1.0)
    assert max(np.abs(audio).max() for audio in residuals_of(excerpt.versions)) == pytest.approx(
        10 ** (-1 / 20), rel=1e-5
    )
    assert gain_with_residuals(excerpt.versions) == pytest.approx(1), (
        "a player leaves an excerpt as it is"
    )


def test_scores_are_those_of_the_excerpt(versions):
    scores = excerpt_scores(versions | {"unet": versions["reference"] * np.float32(0.9)}, RATE)
    assert set(scores) == {"mixture", "unet", "demucs_lstm"} and set(scores["unet"]) == {
        "SDR",
        "SIR",
        "SAR",
    }
    assert scores["unet"]["SDR"] == pytest.approx(20, abs=0.1), (
        "a tenth of the amplitude is missing"
    )


def test_the_files_keep_the_level_differences(versions, tmp_path):
    run = Run("r", Settings(), tmp_path)
    excerpt = listening.cut_excerpt(versions, "a/b <song>", "piano", RATE, 1.0)
    write_excerpt(run, excerpt, RATE)
    paths = sorted(run.audio("a/b <song>", "piano").iterdir())
    assert [path.name for path in paths] == sorted(f"{name}.mp3" for name in versions)
    decoded = {
        path.stem: level_db(soundfile.read(path, always_2d=True)[0][: RATE - 2000])
        for path in paths
    }
    for name in versions:
        wanted = level_db(excerpt.versions[name]) - level_db(excerpt.versions["mixture"])
        # White noise loses its highest octave to the coder in every version alike.
        assert decoded[name] - decoded["mixture"] == pytest.approx(wanted, abs=0.1)


def sounds(page):
    """Every mp3 in a piece of HTML, decoded: `(samples, channels)`."""
    coded = re.findall(r"data:audio/mpeg;base64,([A-Za-z0-9+/=]+)", page)
    return [soundfile.read(io.BytesIO(base64.b64decode(data)), always_2d=True)[0] for data in coded]


def test_players_share_one_gain_in_each_column(versions):
    heard = sounds(
        listening.players({"one": versions, "two": {"unet": versions["unet"]}}, RATE).data
    )
    gains = [
        level_db(audio) - level_db(versions[name])
        for audio, name in zip(heard, (*versions, "unet"))
    ]
    assert np.ptp(gains[:4]) < 0.1, "one gain in the first column"
    alone = 20 * np.log10(common_gain({"unet": versions["unet"]}) / gain_with_residuals(versions))
    assert gains[4] - gains[2] == pytest.approx(alone, abs=0.1), (
        "another in the second, where one version is alone"
    )


@pytest.mark.parametrize("rate, channels", [(16000, 1), (22050, 2), (44100, 2)])
def test_ten_seconds_are_small(rate, channels):
    noise = 0.2 * np.random.default_rng(0).standard_normal((channels, 10 * rate))
    coded = listening.encode_mp3(noise, rate)
    assert len(coded) <= 300_000
    assert soundfile.read(io.BytesIO(coded), always_2d=True)[0].shape == (10 * rate, channels)


@pytest.mark.parametrize("rate, channels", [(96000, 2), (37800, 1), (44100, 6)])
def test_what_mp3_cannot_hold_is_brought_to_what_it_can(rate, channels):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * np.ones((channels, 1))
    heard, new_rate = soundfile.read(io.BytesIO(listening.encode_mp3(tone, rate)), always_2d=True)
    assert (
        new_rate == coded_rate(rate)
        and len(heard) / new_rate == pytest.approx(1, abs=0.01)
        and heard.shape[1] == min(2, channels) - (channels > 2)
    )
    assert level_db(heard[2000:-2000]) == pytest.approx(level_db(tone), abs=0.3)


def test_names_are_escaped(versions):
    name = "<script>alert('x')</script> & \"y\""
    page = html.unescape(
        re.search(
            'srcdoc="([^"]*)"',
            listening.players(
                {name: {name: versions["unet"]}}, RATE, {name: {name: {name: name}}}
            ).data,
        )[1]
    )
    assert "<script>alert" not in page and page.count("&lt;script&gt;") == 8
    assert page.count("<audio controls") == 1 and 'src="data:audio/mpeg;base64,' in page


def test_what_no_script_replaces_is_a_plain_player(versions):
    page = html.unescape(listening.players({"song": versions}, RATE).data)
    assert page.count('<audio controls preload="none"') == 4


# --- the blind test -----------------------------------------------------------------------------------------------------


def answers_of(
    listener="ear",
    reference=95,
    run="r",
    models=None,
    n_pages=4,
    missed=0,
    order=RATED,
    tracks=None,
    **ratings,
):
    """What a listener hands back: `missed` excerpts have the hidden reference at 60."""
    given = dict(anchor=5, unet=60, demucs_lstm=50, demucs_attention=40) | ratings
    pages = [
        dict(
            track=track,
            target="piano",
            order=list(order),
            heard_s={},
            comment="",
            ratings=given | dict(reference=60 if page < missed else reference),
        )
        for page, track in enumerate(tracks or [f"t{page}" for page in range(n_pages)])
    ]
    return json.dumps(
        dict(
            format="mss-answers-1",
            run=run,
            models=models,
            listener=listener,
            started="",
            finished="",
            pages=pages,
        )
    ).encode()


def read(*files):
    return [read_answers(content, "file") for content in files]


def test_listeners_who_miss_the_reference_too_often_do_not_count():
    table = screened(
        read(answers_of("good", n_pages=7, missed=1), answers_of("poor", n_pages=6, missed=1)),
        "r",
        None,
    )
    kept = table.drop_duplicates("listener").set_index("listener")
    assert kept["kept"].tolist() == [True, False], "one of seven is 14 %, one of six 17 %"
    assert kept["reason"].tolist() == ["", "hidden reference under 90 on 1 of 6 excerpts"]


def test_answers_about_other_weights_do_not_count():
    table = screened(
        read(
            answers_of("one", models="old"), answers_of("two", models="new"), answers_of("another")
        ),
        "r",
        "new",
    )
    assert table.groupby("listener", sort=False)["kept"].first().tolist() == [False, True, True]


def test_the_mean_opinion_is_that_of_listeners_not_of_ratings():
    texts = [
        answers_of("one", unet=40, n_pages=8),
        answers_of("two", unet=50, n_pages=1),
        answers_of("three", unet=60, n_pages=1),
    ]
    row = opinion(screened(read(*texts), "r", None)).set_index("model").loc["unet"]
    half = stats.t.ppf(0.975, 2) * np.std([40, 50, 60], ddof=1) / 3**0.5
    assert [row["mean"], row["ci_low"], row["ci_high"]] == pytest.approx([50, 50 - half, 50 + half])
    assert (row["listeners"], row["ratings"], row["excerpts"]) == (3, 10, 8)


def test_one_name_is_one_listener_and_two_give_no_interval():
    table = opinion(
        screened(
            read(
                answers_of("same", unet=10),
                answers_of("same", unet=50),
                answers_of("other", unet=90),
            ),
            "r",
            None,
        )
    )
    assert list(table["model"]) == list(RATED)
    row = table.set_index("model").loc["unet"]
    assert (row["mean"], row["listeners"], row["ratings"]) == (60, 2, 12) and np.isnan(
        row["ci_low"]
    )


def test_an_interval_ends_where_the_scale_does():
    texts = [answers_of(name, unet=rating) for name, rating in (("a", 0), ("b", 100), ("c", 50))]
    row = opinion(screened(read(*texts), "r", None)).set_index("model").loc["unet"]
    assert (row["ci_low"], row["ci_high"]) == (0, 100)


def test_a_comment_about_a_letter_can_be_followed():
    table = screened(read(answers_of()), "r", None)
    assert dict(zip(table["letter"][:5], table["model"][:5])) == dict(zip("VWXYZ", RATED))


def test_answers_become_tables(tmp_path):
    run = Run("r", Settings(), tmp_path / "r")
    ratings, opinions = listening.write_ratings(run)
    assert ratings.empty and opinions.empty and pd.read_csv(run.table("ratings")).empty
    assert (
        listening.opinion_sentence(ratings, opinions, "piano")
        == "nobody has taken the blind test yet."
    )
    for name, content in (
        ("a.json", answers_of("../../x")),
        ("b.json", answers_of("poor", reference=50)),
        ("c.json", answers_of("../../x")),
    ):
        (tmp_path / name).write_bytes(content)
    assert (
        len(set(listening.import_responses(run, listening.response_files(str(tmp_path))))) == 2
    ), "the same answers are kept once"
    assert all(path.parent == run.folder / "answers" for path in (run.folder / "answers").iterdir())
    ratings, opinions = listening.write_ratings(run)
    assert (
        len(pd.read_csv(run.table("ratings"))) == 40 and len(pd.read_csv(run.table("opinion"))) == 5
    )
    assert (
        listening.opinion_sentence(ratings, opinions, "piano")
        == "2 listeners, 1 left out; mean opinion A 60, B1 50, B2 40 of 100."
    )


def test_what_is_put_into_the_folder_by_hand_is_looked_at_too(tmp_path):
    run = Run("r", Settings(), tmp_path / "r")
    folder = run.folder / "answers"
    folder.mkdir(parents=True)
    for name, content in {
        "a.json": answers_of("ear"),
        "a (1).json": answers_of("ear"),
        "b.json": b"\xef\xbb\xbf" + answers_of("with a mark of Windows"),
        "c.json": answers_of("elsewhere", run="another"),
        ".part-1-c.json": b'{"format"',
    }.items():
        (folder / name).write_bytes(content)
    ratings, opinions = listening.write_ratings(run)
    assert ratings.groupby("listener")["rating"].size().to_dict() == {
        "ear": 20,
        "elsewhere": 20,
        "with a mark of Windows": 20,
    }
    assert (
        ratings.groupby("listener")["reason"].first()["elsewhere"] == "about run another"
        and opinions["listeners"].max() == 2
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (b"not json", "holds no answers of the blind test"),
        (b"\xff\xfe", "holds no answers of the blind test"),
        (b"{}", "Field required"),
        (answers_of(order=["unet"] * 5), "expected each of reference, anchor"),
        (answers_of(order=[*RATED, "unet"]), "expected each of reference, anchor"),
        (answers_of(tracks=["t", "t"]), "rates an excerpt twice"),
        (answers_of(unet=101), "outside 0 to 100"),
        (answers_of(unet=float("nan")), "outside 0 to 100|finite"),
        (answers_of(extra=5), "expected each of reference, anchor"),
        (answers_of(n_pages=0), "at least 1"),
        (answers_of(run="other"), "about run 'other', this is 'r'"),
    ],
)
def test_other_files_are_refused_in_one_sentence_and_nothing_is_kept(content, words, tmp_path):
    run = Run("r", Settings(), tmp_path / "r")
    with pytest.raises(ValueError, match=words) as error:
        listening.import_responses(run, [("good.json", answers_of()), ("bad.json", content)])
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)
    assert not (run.folder / "answers").exists()


def test_no_answers_in_a_folder_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="No answers in"):
        listening.response_files(str(tmp_path))


def test_a_page_of_six_excerpts_in_stereo_has_room_for_the_rest():
    noise = {
        name: 0.1 * np.random.default_rng(0).standard_normal((2, 10 * 22050)).astype(np.float32)
        for name in listening.VERSIONS
    }
    section, _ = excerpts_section(
        "piano", {"best": listening.Excerpt("one", "piano", 0.0, 0.0, noise, {})}, 22050, 0
    )
    assert 6 * len(section) < 9e6, "noise is what mp3 needs most for"


def test_the_low_anchor_has_no_treble_and_the_level_of_the_mixture():
    mixture = 0.1 * np.random.default_rng(0).standard_normal((2, 2 * RATE)).astype(np.float32)
    spectrum = (
        np.abs(np.fft.rfft(low_anchor(mixture, RATE))) ** 2 / np.abs(np.fft.rfft(mixture)) ** 2
    )
    at = np.fft.rfftfreq(2 * RATE, 1 / RATE)
    assert low_anchor(mixture, RATE).shape == mixture.shape
    assert (
        np.median(spectrum[:, at < 3300]) == pytest.approx(1, abs=0.01)
        and np.median(spectrum[:, at > 3650]) < 1e-4
    )


# --- menus and fields ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """What widgets display and later put in its place."""
    found = []
    handle = SimpleNamespace(update=lambda content: found.append(content.data))
    monkeypatch.setattr(
        widgets, "display", lambda content, display_id=None: found.append(content) or handle
    )
    return found


def test_the_chooser_separates_on_demand_and_shows_its_first_state(versions, shown):
    separated = []
    track = Track(
        "", "test", "file.npy", "", "", "", 4 * RATE, 1.0, (RATE,), (4 * RATE,), (), (), 0.0, (), 8
    )
    tracks = [replace(track, name=name) for name in ("<b>one</b>", "two")]
    store = SimpleNamespace(split=lambda _: tracks, sample_rate=RATE)
    excerpt_of = lambda track: (
        separated.append(track.name)
        or listening.cut_excerpt(versions, track.name, "piano", RATE, 1.0)
    )
    listening.chooser(SimpleNamespace(settings=Settings(excerpt_s=1.0)), store, "piano", excerpt_of)
    menu, first = shown
    assert (
        separated == ["<b>one</b>"]
        and "<b>one" not in first.data
        and "data:audio/mpeg" in first.data
    )
    menu.value = tracks[1]
    menu.value = tracks[0]
    assert separated == ["<b>one</b>", "two"], "a track that was heard is not separated again"
    assert "two" in shown[-3] and "data:audio/mpeg" in shown[-1]


def test_uploaded_answers_are_taken_in_or_refused(tmp_path, shown):
    run = Run("r", Settings(), tmp_path / "r")
    listening.answers_upload(run)
    field = shown[0]
    upload = lambda content: setattr(
        field,
        "value",
        (
            {
                "name": "a.json",
                "type": "",
                "size": 1,
                "content": memoryview(content),
                "last_modified": datetime.now(),
            },
        ),
    )
    upload(answers_of(run="<b>other</b>"))
    assert "this is" in shown[-1] and "<b>" not in shown[-1]
    upload(answers_of())
    assert (
        shown[-1]
        == "Taken in. piano: 1 listener, 0 left out; mean opinion A 60, B1 50, B2 40 of 100."
        and len(pd.read_csv(run.table("opinion"))) == 5
    )


def test_a_song_of_ones_own_is_separated_and_played(small_run, store, tmp_path):
    train(small_run, store, "piano", "unet")
    song = tmp_path / "my <song>.wav"
    at = np.arange(44100 * 4)[:, None] / 44100
    quiet = 0.01 * np.sin(2 * np.pi * np.array([440, 660]) * at)
    quiet[44100 * 2 : 44100 * 3] *= 20
    soundfile.write(song, quiet, 44100)
    page = widgets.separated_song(small_run, song, "piano", "unet").data
    assert "my <song>" not in page and "from 2 s" in page
    mixture, _ = sounds(page)
    gain = np.sqrt(np.mean(mixture**2) / np.mean(quiet[44100 * 2 : 44100 * 3] ** 2))
    assert mixture.shape == (44100, 2) and np.mean(
        (mixture - gain * quiet[44100 * 2 : 44100 * 3]) ** 2
    ) < 0.01 * np.mean(mixture**2)
    names = {path.name for path in (small_run.folder / "songs" / "piano" / "unet").iterdir()}
    assert names == {"my <song>.piano.wav", "my <song>.piano.residual.wav"}


def test_the_example_of_the_training_notebooks_is_a_validation_song(store, small_settings):
    model = torch.nn.Identity()
    model.segment_s = 0.5
    excerpt = listening.validation_excerpt(store, model, "unet", "piano", excerpt_s=1.0)
    assert excerpt.track == store.split("valid")[0].name
    assert list(excerpt.versions) == ["mixture", "reference", "unet"]
    assert excerpt.versions["unet"].shape == (1, RATE)
    assert excerpt.sdr["unet"] == pytest.approx(excerpt.sdr["mixture"])

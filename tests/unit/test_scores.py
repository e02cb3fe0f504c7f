import shutil
from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import STEMS, write_dataset

from mss_utils.config import MODELS, resolve_settings
from mss_utils.data import open_store
from mss_utils.evaluation import scores
from mss_utils.evaluation.bsseval import TRACK_METRICS, bss_eval, utterance_sdr
from mss_utils.evaluation.scores import TABLES, cross_check, evaluate, score
from mss_utils.separation import ROWS, read_estimate, write_estimates

COLUMNS = {
    "frames": "references target track model seed frame SDR ISR SIR SAR",
    "tracks": "references target track model seed SDR ISR SIR SAR utterance_SDR SI_SDR frames "
    "usable_frames",
    "lost_frames": "references target track model seed reason frames",
    "cross_check": "metric scores largest_difference_db unequal_nan tracks",
    "summary": "references target model metric median mean ci_low ci_high tracks seeds",
    "paired": "target a b metric median_difference ci_low ci_high p_wilcoxon p_corrected tracks "
    "seeds",
    "cost": "target model seed parameters train_s steps audio_s_per_s inference_rtf peak_memory_mb",
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(scores, "MAX_SCORERS", 1)


@pytest.fixture(scope="module")
def separated(two_seed_run, store, tmp_path_factory):
    """A run of two seeds with its estimates."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    run = replace(two_seed_run, folder=shutil.copytree(two_seed_run.folder, folder))
    write_estimates(run, store)
    return run


def test_tables_of_a_run(separated, store):
    tables = evaluate(separated, store)
    assert tuple(COLUMNS) == TABLES
    for name, columns in COLUMNS.items():
        table = pd.read_csv(separated.table(name))
        assert list(table.columns) == columns.split() and len(table) == len(tables[name])
    rows = [(row, 0) for row in ROWS] + [(model, 1) for model in MODELS]
    assert sorted(tables["tracks"].groupby(["model", "seed"]).groups) == sorted(rows)
    assert len(tables["frames"]) == 2 * len(rows) * 3, "two test tracks of three seconds"
    assert len(tables["cost"]) == 8 and (tables["cost"]["inference_rtf"] > 0).all()
    track = store.split("test")[1]
    mixture, stems = store.load(track)
    target = stems[store.stem_index("piano")]
    references = np.stack([target, mixture - target]).swapaxes(1, 2)
    for model in ("mixture", "unet"):
        estimate = read_estimate(separated, store, track, "piano", model)
        rest = mixture if model == "mixture" else mixture - estimate
        expected = bss_eval(references, np.stack([estimate, rest]).swapaxes(1, 2), 16000)
        row = tables["tracks"].query("track == @track.name and model == @model and seed == 0")
        assert row["SDR"].item() == pytest.approx(np.median(expected["SDR"][0]))
        assert row["utterance_SDR"].item() == pytest.approx(utterance_sdr(target.T, estimate.T))


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    """Test tracks: the piano pauses in second 1; no piano; piano alone; one track of 0.3 s."""
    root = write_dataset(tmp_path_factory.mktemp("gaps"), n_test=4)
    tracks = [root / "test" / f"test song {index}" for index in range(4)]
    change(tracks[0] / "piano.wav", lambda audio: audio[16000:32000].fill(0))
    change(tracks[1] / "piano.wav", lambda audio: audio.fill(0))
    for stem in set(STEMS) - {"piano"}:
        change(tracks[2] / f"{stem}.wav", lambda audio: audio.fill(0))
    for stem in STEMS:
        change(tracks[3] / f"{stem}.wav", lambda audio: audio.resize(4800, refcheck=False))
    settings = resolve_settings("smoke", str(root), "piano", "cross_check_tracks=4 ablations=")
    return open_store(settings), settings


def change(path, edit):
    audio, rate = soundfile.read(path)
    edit(audio)
    soundfile.write(path, audio, rate)


def half_mixture(store, targets=1, factor=0.5):
    """Estimates of a model that returns a part of the mixture for every target."""
    return lambda track: {("half", 0): np.stack([factor * store.load(track)[0]] * targets)}


def test_worker_processes_make_the_same_tables(gaps, monkeypatch):
    store, settings = gaps
    alone = score(settings, store, half_mixture(store))
    monkeypatch.setattr(scores, "MAX_SCORERS", 2)
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda n_jobs: 2)
    together = score(settings, store, half_mixture(store))
    for name, table in alone.items():
        pd.testing.assert_frame_equal(table, together[name])


def test_lost_frames_are_counted_and_explained(gaps):
    store, settings = gaps
    tables = score(settings, store, half_mixture(store))
    tracks = tables["tracks"].set_index("track")
    assert tracks["frames"].tolist() == [3, 3, 3, 1]
    assert tracks["usable_frames"].tolist() == [2, 0, 3, 1]
    assert tracks.loc["test song 1", ["SDR", "utterance_SDR"]].isna().all()
    assert tracks.loc["test song 2", "SDR"] == pytest.approx(6.02, abs=0.01)
    assert np.isfinite(tracks.loc["test song 3", list(TRACK_METRICS)].astype(float)).all()
    lost = tables["lost_frames"].set_index("track")
    assert lost["frames"].to_dict() == {"test song 0": 1, "test song 1": 3}
    assert set(lost["reason"]) == {"silent: reference of piano"}
    assert set(tables["frames"]["frame"]) == {0, 1, 2}, "a lost frame keeps its row"
    tables = score(settings, store, half_mixture(store, factor=0))
    assert tables["tracks"]["utterance_SDR"][0] == 0 and tables["tracks"]["SDR"].isna().all()
    lost = tables["lost_frames"].query("track == 'test song 0'").set_index("reason")["frames"]
    assert lost.to_dict() == {"silent: estimate of piano": 2, "silent: reference of piano": 1}


def test_stems_beside_a_silent_one_are_scored(gaps):
    store, settings = gaps
    settings = settings.model_copy(update=dict(target="all"))
    tables = score(settings, store, half_mixture(store, len(STEMS)))
    assert set(tables["tracks"]["references"]) == {"stems"}
    usable = tables["tracks"].pivot(index="track", columns="target", values="usable_frames")
    assert usable.loc["test song 0"].tolist() == [2] * 4, "as in museval"
    assert usable.loc["test song 1"].to_dict() == dict(bass=3, drums=3, piano=0, vocals=3)
    lost = tables["lost_frames"].query("track == 'test song 2' and target == 'bass'")
    assert lost["reason"].tolist() == ["silent: reference of bass"]


def test_targets_are_scored_independently(gaps):
    store, settings = gaps
    both, alone = (
        score(settings.model_copy(update=dict(target=target)), store, half_mixture(store, n))
        for target, n in (("vocals,drums", 2), ("drums", 1))
    )
    for name in ("frames", "tracks", "lost_frames"):
        rows = both[name].query("target == 'drums'").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, alone[name])


@pytest.mark.parametrize("scorer", ["bss_eval", "museval"])
def test_cross_check_scores_the_shortest_tracks_again(gaps, museval, monkeypatch, scorer):
    store, settings = gaps
    settings = settings.model_copy(update=dict(scorer=scorer))
    frames = score(settings, store, half_mixture(store))["frames"]
    table = cross_check(settings, store, half_mixture(store), frames).set_index("metric")
    assert (table["tracks"] == 3).all(), "one of the four has no piano"
    assert 0 < table.loc["ISR", "largest_difference_db"] < 1e-6, "two programs round differently"
    monkeypatch.setattr("mss_utils.evaluation.bsseval.museval_is_available", lambda: False)
    with pytest.warns(UserWarning, match="Without ffmpeg"):
        assert cross_check(settings, store, half_mixture(store), frames).empty


def test_broken_estimate_names_model_and_track(store, small_settings):
    def estimates_of(track):
        broken = np.nan if track.name == "test song 1" else 1
        return {("unet", 0): broken * store.load(track)[0][None]}

    message = "unet, seed 0, on 'test song 1': estimates hold .* NaN"
    with pytest.raises(ValueError, match=message):
        score(small_settings, store, estimates_of)

"""Phase, repetition and studies on signals and models whose answer is known."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from mss_utils.analysis import (
    CONDITIONS,
    INTERVENTIONS,
    TABLES,
    analyse,
    combine_magnitude_phase,
    find_loops,
    intervention_loss,
    measurements,
    run_ablations,
    studies,
)
from mss_utils.analysis.bottleneck import measure_bottleneck
from mss_utils.analysis.phase import phase_scores
from mss_utils.analysis.repetition import lags_s, least_similar, loop_scores, loop_starts, make_loop
from mss_utils.config import SEQUENCE_MODELS, Run
from mss_utils.data import level_db, rms
from mss_utils.models.unet import STFT

RATE = 16000
STFT_A = STFT(1024, 256)
LEVEL = dict(
    mixture=1.0, unet=0.3, demucs_framewise=0.3, demucs_lstm=0.2, demucs_attention=0.1
)  # of the mixture


def noise(seconds=2, seed=0):
    return np.random.default_rng(seed).standard_normal((1, seconds * RATE)).astype(np.float32)


def whole_band(reference, estimate):
    return phase_scores(reference, estimate, RATE, STFT_A)[0]


def test_random_phase_error_is_half_pi():
    row = whole_band(noise(20, seed=1), noise(20, seed=2))
    assert row["phase_error_rad"] == pytest.approx(np.pi / 2, abs=0.03)
    assert row["sdr_true_magnitude"] == pytest.approx(-3.01, abs=0.1)  # E|1 - e^ia|^2 = 2


def test_phase_error_and_magnitude_error_are_separate():
    inverted, soft = whole_band(noise(), -noise()), whole_band(noise(), noise() / 2)
    assert inverted["phase_error_rad"] == pytest.approx(np.pi) and soft["phase_error_rad"] < 1e-6
    assert inverted["sdr"] == pytest.approx(-6.02, abs=0.01)
    assert inverted["sdr_true_phase"] == np.inf and soft["sdr_true_magnitude"] > 60
    assert soft["sdr"] == pytest.approx(6.02, abs=0.01) == soft["sdr_true_phase"]


def test_error_is_measured_in_its_band():
    time = np.arange(2 * RATE) / RATE
    tones = [np.sin(2 * np.pi * hz * time)[None].astype(np.float32) for hz in (400, 1500, 3000)]
    rows = phase_scores(sum(tones), tones[0] + tones[1] - tones[2], RATE, STFT_A)
    error = {row["band_low_hz"]: row["phase_error_rad"] for row in rows[1:]}
    assert error[2000] > 3.1 and error[250] < 0.05
    assert (rows[0]["band_high_hz"], rows[-1]["band_low_hz"]) == (8000, 4000)


def test_silence_has_no_phase():
    row = whole_band(noise(), 0 * noise())
    assert np.isnan([row["phase_error_rad"], row["sdr_true_magnitude"]]).all() and row["sdr"] == 0
    row = whole_band(0 * noise(), noise())
    assert np.isnan([row["phase_error_rad"], row["sdr"]]).all()


def test_interchannel_error():
    same, opposite = (np.concatenate([noise(), sign * noise()]) for sign in (1, -1))
    assert whole_band(opposite, opposite)["interchannel_error_rad"] < 1e-6
    assert whole_band(same, opposite)["interchannel_error_rad"] == pytest.approx(np.pi)
    assert np.isnan(whole_band(noise(), noise())["interchannel_error_rad"])


def test_phase_swap():
    assert np.abs(combine_magnitude_phase(noise(), noise(), STFT_A) - noise()).max() < 1e-4
    swapped = combine_magnitude_phase(2 * noise(), -noise(), STFT_A)
    assert np.abs(swapped + 2 * noise()).max() < 1e-3


def loop(samples=3 * RATE):
    return make_loop(noise(12), noise(12, seed=1), 4 * RATE, RATE, samples, RATE)


def level_model(x):
    """Scale the mixture by the level of its first second: uses context but no repetition."""
    level = x[..., :RATE].square().mean(dim=(1, 2), keepdim=True).sqrt()
    return x * (0.1 * level / (level + 0.001))


def test_only_copying_has_a_repetition_gain():
    scores = loop_scores(lambda x: torch.roll(x, RATE, dims=-1), loop())  # copies one lag earlier
    assert scores["repeat"] == np.inf and scores["different"] < 0 and scores["silent"] == 0
    scores = loop_scores(level_model, loop())
    assert scores["repeat"] == pytest.approx(scores["different"], abs=1e-3)
    assert abs(scores["different"] - scores["silent"]) > 0.1


def test_conditions_differ_only_around_the_damage():
    (repeat, truth, damage), (different, _, _), (silent, _, _) = (loop()[x] for x in CONDITIONS)
    assert damage == slice(RATE, 2 * RATE) and repeat.shape == (1, 3 * RATE)
    assert (repeat[:, damage] == different[:, damage]).all()
    assert (repeat[:, damage] == silent[:, damage]).all()
    assert rms(repeat[:, :RATE]) == pytest.approx(rms(different[:, :RATE]), rel=1e-5)
    assert rms(silent[:, :RATE]) == 0 and not np.allclose(repeat, different)
    assert np.array_equal(truth[:, damage], truth[:, :RATE])
    burst = repeat[:, damage] - truth[:, damage]
    assert level_db(truth[:, damage]) - level_db(burst) == pytest.approx(-10, abs=0.01)


@pytest.mark.parametrize("samples", [2 * RATE + 1, 7 * RATE])
def test_every_damaged_sample_has_a_clean_repeat(samples):
    mixture, truth, damage = loop(samples)["repeat"]
    inside = np.arange(damage.start, damage.stop)
    source = np.where(inside >= RATE, inside - RATE, inside + RATE)
    assert np.abs(mixture[0, source] - truth[0, damage]).max() < 1e-6
    assert np.array_equal(truth[:, damage], loop()["repeat"][1][:, :RATE])  # one whole repetition


def test_least_similar_stretch_is_found():
    hz = np.repeat([440, 2000, 440], [4 * RATE, RATE, 3 * RATE])
    target = np.sin(2 * np.pi * np.cumsum(hz) / RATE)[None].astype(np.float32)
    assert least_similar(target, 0, RATE, 1) == [4 * RATE]


def test_loops_need_repetitions_in_segment_and_track():
    assert lags_s(4.0) == {1: True, 2: True, 4: False} and list(lags_s(17.0)) == [1, 2, 4, 8]
    short = noise()
    assert loop_starts(short, short, RATE) == [] == loop_starts(noise(12), 0 * noise(12), RATE)
    assert make_loop(short, short, 0, RATE, 3 * RATE, RATE) == {}


def test_find_loops(songs_store, tmp_path):
    store, settings = songs_store
    run = Run("loops", settings.model_copy(update=dict(segment_s=2.0)), tmp_path)
    loops = find_loops(run, store, "piano", 1.0)
    assert loops and {name for name, _ in loops} <= {track.name for track in store.split("test")}
    mixture, truth, damage = next(iter(loops.values()))["silent"]
    assert mixture.shape == (1, 2 * RATE) and damage.stop - damage.start == RATE
    burst = (mixture - truth)[0, damage]
    assert abs(np.corrcoef(burst, truth[0, damage])[0, 1]) < 0.5  # made of the residual


@pytest.fixture
def trained(monkeypatch):
    """Replace training and reading of estimates; return the settings that were trained."""
    runs = []
    monkeypatch.setattr(studies, "train", lambda run, *rest: runs.append((run.settings, *rest[1:])))
    monkeypatch.setattr(studies, "write_estimates", lambda *arguments: None)

    def read_estimate(variant, store, track, target, model, seed):
        return np.float32(0.5 * LEVEL[model]) * store.load(track)[0]

    monkeypatch.setattr("mss_utils.separation.read_estimate", read_estimate)
    return runs


def all_estimates(store, track):
    mixture = store.load(track)[0]
    return {(model, 0): np.float32(level) * mixture[None] for model, level in LEVEL.items()}


def run_with(run, **changes):
    return Run("run", run.settings.model_copy(update=changes), run.folder)


def tracks_of(store, settings):
    return studies.score(settings, store, partial(all_estimates, store))["tracks"]


@pytest.mark.parametrize("on", [True, False])
def test_ablation_is_with_minus_without(small_run, store, trained, on):
    run = run_with(small_run, ablations=("unet",), random_mix=on, curriculum=on)
    tracks = tracks_of(store, run.settings)
    table = run_ablations(run, store, tracks)
    assert [(s.random_mix, s.curriculum) for s, *_ in trained] == [(not on, on), (on, not on)]
    row = table.query("ablation == 'curriculum' and metric == 'SDR'").iloc[0]
    own = tracks.query("model == 'unet'")["SDR"].median()
    assert row["with_it" if on else "without_it"] == own and row["with_it"] != row["without_it"]
    assert np.sign(row["median_difference"]) == np.sign(row["with_it"] - row["without_it"])
    assert row["tracks"] == 2 and row["steps"] == run.settings.steps
    assert len(pd.read_csv(run.table("ablations"))) == len(table) == 2 * table["metric"].nunique()


def test_data_study_trains_with_smaller_shares(small_run, store, trained):
    run = run_with(small_run, data_study=True, train_share=0.5)
    table = studies.data_amount(run, store, tracks_of(store, run.settings))
    assert {(s.train_share, model) for s, _, model, _ in trained} == {
        (share, model) for share in (0.05, 0.15) for model in SEQUENCE_MODELS
    }
    assert table.groupby(["model", "share"])["track"].nunique().tolist() == [2] * 6
    assert set(table["share"]) == {0.1, 0.3, 1.0} and table["SDR"].notna().all()


def test_analyse_without_studies_trains_nothing(small_run, store, trained, monkeypatch):
    monkeypatch.setattr(measurements, "read_all_estimates", lambda _, *rest: all_estimates(*rest))
    monkeypatch.setattr(measurements, "measure_bottleneck", lambda *_: [])
    run = run_with(small_run, ablations=(), data_study=False)
    tracks = tracks_of(store, run.settings)
    assert run_ablations(run, store, tracks).empty and run.table("ablations").exists()
    tables = analyse(run, store, tracks)
    assert tables["data_amount"].empty and not trained
    assert all(run.table(name).exists() for name in TABLES)
    assert set(tables["phase"]["model"]) == set(LEVEL) == set(tables["attack"]["model"])
    assert tables["repetition"]["reason"].str.startswith("not askable").all()  # segments of 0.5 s
    verdicts = tables["hypotheses"].set_index("id")["verdict"]
    assert verdicts["repetition_gain_b2_1s"] == "not askable" and "supported" not in set(verdicts)


def test_frame_by_frame_model_loses_nothing_without_order(two_seed_run, store):
    rows = pd.DataFrame(measure_bottleneck(two_seed_run, store, "piano"))
    assert set(rows["intervention"]) == {"none", *INTERVENTIONS} and rows["seed"].nunique() == 2
    for model in rows["model"].unique():
        loss = {
            name: intervention_loss(rows, model, name).abs().max().max() for name in INTERVENTIONS
        }
        assert loss.pop("constant") > 1e-5
        assert (max(loss.values()) < 1e-5) == (model == "demucs_framewise")

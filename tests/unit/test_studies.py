"""Studies and measurements of a run whose estimates are a part of the mixture."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from mss_utils.analysis import TABLES, analyse, measurements, run_ablations, studies
from mss_utils.config import WAVEFORM_MODELS, Run

LEVEL = dict(mixture=1.0, unet=0.3, demucs_lstm=0.2, demucs_attention=0.1)  # of the mixture


@pytest.fixture
def trained(monkeypatch):
    """Replace training and reading of estimates; return the settings that were trained."""
    runs = []
    monkeypatch.setattr(studies, "train", lambda run, *rest: runs.append((run.settings, *rest[1:])))
    monkeypatch.setattr(studies, "write_estimates", lambda *arguments: None)

    def read_estimate(variant, store, track, target, model, seed):
        return np.float32(0.5 * LEVEL[model]) * store.load(track)[0]

    monkeypatch.setattr(studies, "read_estimate", read_estimate)
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
        (share, model) for share in (0.05, 0.15) for model in WAVEFORM_MODELS
    }
    assert table.groupby(["model", "share"])["track"].nunique().tolist() == [2] * 6
    assert set(table["share"]) == {0.1, 0.3, 1.0} and table["SDR"].notna().all()


def test_analyse_without_studies_trains_nothing(small_run, store, trained, monkeypatch):
    monkeypatch.setattr(measurements, "read_all_estimates", lambda _, *rest: all_estimates(*rest))
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

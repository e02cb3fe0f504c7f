from itertools import product

import numpy as np
import pandas as pd
import pytest
import soundfile

from mss_utils import analysis
from mss_utils.config import MODELS, WAVEFORM_MODELS
from mss_utils.listening import excerpts, listening_page, page
from mss_utils.separation import ESTIMATED, estimate_paths


@pytest.fixture
def table(small_run, store, monkeypatch):
    """Write estimates and one table that has the columns of all; no model is trained."""
    tracks = store.split("test")
    for track, model in product(tracks, ESTIMATED):
        path = estimate_paths(small_run, track, "piano", model)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.5 * store.load(track)[0].T, store.sample_rate, "FLOAT")
    rows = product([track.name for track in tracks], MODELS, analysis.CONDITIONS)
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


def test_page_runs_models_on_loops_only_and_says_what_is_missing(
    small_run, store, table, monkeypatch
):
    used = []
    monkeypatch.setattr(page, "load_model", lambda folder: folder.parent.name)
    monkeypatch.setattr(page, "separate", lambda model, audio, _: used.append(model) or audio)
    found = {"piano": excerpts(small_run, store, "piano", table)}
    names = {path.stem for path in small_run.folder.rglob("*.mp3")}
    assert names == {"mixture", "reference", *MODELS, "irm"}
    tracks = table[table["condition"] == "repeat"]
    html = listening_page(small_run, store, tracks, found, "</script>")
    assert sorted(used) == sorted(3 * WAVEFORM_MODELS)
    figures = html.split("<script>")[0].split("<figure")
    assert [figure.count("<li") for figure in figures[-9:]] == 9 * [4]
    assert "</script" not in html.split('id="test">')[1].split("}]")[0]
    for name in ("phase", "attack", "repetition"):
        table.iloc[:0].to_csv(small_run.table(name), index=False)
    html = listening_page(small_run, store, tracks.assign(seed=1), found, "run")
    for text in ("no estimate to improve", "Not askable", "No isolated onset", "No two models"):
        assert text in html

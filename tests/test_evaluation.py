import math

import numpy as np
import pandas as pd
import pytest
from conftest import STEMS

from mss_utils.evaluation import ROWS, TRACK_METRICS, compare, estimates, evaluate, holm, median_interval, ratio_mask, sentence, summarise
from mss_utils.metrics import bss_eval, utterance_sdr
from mss_utils.settings import MODELS, Run
from mss_utils.training import train

COLUMNS = {
    "frames": "references target track model seed frame SDR ISR SIR SAR",
    "tracks": "references target track model seed SDR ISR SIR SAR utterance_SDR SI_SDR frames usable_frames",
    "summary": "references target model metric median mean ci_low ci_high tracks seeds",
    "paired": "target a b metric median_difference ci_low ci_high p_wilcoxon p_corrected tracks seeds",
    "cost": "target model seed parameters train_s steps audio_s_per_s inference_rtf peak_memory_mb",
}


@pytest.fixture(scope="module")
def evaluated(small_settings, store, tmp_path_factory):
    run = Run("scored", small_settings, tmp_path_factory.mktemp("scored"))
    for name in MODELS:
        train(run, store, "piano", name)
    return run, evaluate(run, store)


def test_the_tables_have_the_columns_of_the_contract(evaluated):
    run, tables = evaluated
    for name, columns in COLUMNS.items():
        written = pd.read_csv(run.table(name))
        assert list(written.columns) == columns.split()
        assert len(written) == len(tables[name]) > 0
    assert list(tables["tracks"]["model"].unique()) == list(ROWS)
    assert set(tables["tracks"]["references"]) == {"target+residual"}
    assert len(tables["frames"]) == 2 * len(ROWS) * 3, "two test tracks of three seconds"


def test_every_score_is_that_of_the_referee(evaluated, store):
    run, tables = evaluated
    track = store.split("test")[1]
    mixture, stems = store.load(track)
    target = stems[store.stem_index("piano")]
    found = estimates(run, store, track, "piano")
    assert list(found) == list(ROWS)
    for name, estimate in found.items():
        rest = mixture if name == "mixture" else mixture - estimate
        wanted = bss_eval(np.stack([target, mixture - target]).swapaxes(1, 2), np.stack([estimate, rest]).swapaxes(1, 2), 16000)
        rows = tables["frames"].query("track == @track.name and model == @name")
        np.testing.assert_allclose(rows["SAR"], wanted["SAR"][0])
        row = tables["tracks"].query("track == @track.name and model == @name").iloc[0]
        assert row["SDR"] == pytest.approx(np.median(wanted["SDR"][0]))
        assert row["utterance_SDR"] == pytest.approx(utterance_sdr(target.T, estimate.T))


def test_all_targets_are_scored_as_stems(small_settings, store, tmp_path):
    settings = small_settings.model_copy(update=dict(target="all", steps=1, warmup_steps=0, seeds=2))
    run = Run("all", settings, tmp_path)
    for target in STEMS:
        for name in MODELS:
            for seed in range(2):
                train(run, store, target, name, seed)
    tables = evaluate(run, store)
    assert set(tables["tracks"]["target"]) == set(STEMS) and set(tables["tracks"]["references"]) == {"stems"}
    assert set(tables["tracks"].query("model == 'unet'")["seed"]) == {0, 1}
    assert set(tables["summary"].query("model == 'unet'")["seeds"]) == {2}
    assert len(tables["cost"]) == len(STEMS) * len(MODELS) * 2


def test_the_oracle_is_far_above_the_mixture(store, small_settings):
    track = store.split("test")[0]
    mixture, stems = store.load(track)
    target = stems[store.stem_index("piano")]
    oracle = ratio_mask(mixture, target, mixture - target, small_settings)
    assert oracle.shape == mixture.shape
    assert utterance_sdr(target.T, oracle.T) > utterance_sdr(target.T, mixture.T) + 3


def track_table(differences, seeds=1):
    """Tracks on which B1 is better than A by `differences` dB in every metric, and B2 equals A."""
    rows = []
    for index, difference in enumerate(differences):
        for seed in range(seeds):
            for model, score in (("unet", 3.0 + index), ("demucs_lstm", 3.0 + index + difference), ("demucs_attention", 3.0 + index)):
                key = dict(references="target+residual", target="piano", track=f"t{index}", model=model, seed=seed)
                rows.append(key | {metric: score for metric in TRACK_METRICS})
    return pd.DataFrame(rows)


def test_paired_differences_and_their_sentences():
    differences = [0.5, 0.6, 0.7, 0.4, 0.6, 0.8, 0.5, 0.7]
    table = compare(track_table(differences)).query("metric == 'SDR'").set_index(["a", "b"])
    row = table.loc["demucs_lstm", "unet"]
    assert row["median_difference"] == pytest.approx(0.6) and row["ci_low"] > 0 and row["tracks"] == 8
    assert row["p_wilcoxon"] == pytest.approx(2 / 2**8) and row["p_corrected"] == pytest.approx(4 / 2**8)
    assert math.isnan(table.loc["demucs_attention", "unet"]["p_wilcoxon"])
    rows = table.reset_index()
    assert sentence(rows.iloc[0]).startswith("B1 is 0.60 dB better than A in SDR for these trained weights [0.")
    assert sentence(rows.iloc[1]).startswith("The data cannot tell B2 from A in SDR")
    assert sentence(rows.iloc[2]).startswith("B1 is 0.60 dB better than B2")
    three = compare(track_table(differences, seeds=3)).query("metric == 'SDR'").iloc[0]
    assert "trained weights" not in sentence(three) and "3 seeds" in sentence(three)


def test_summary_of_known_numbers():
    table = summarise(track_table([0.0] * 5)).query("model == 'unet' and metric == 'SDR'").iloc[0]
    assert (table["median"], table["mean"], table["tracks"]) == (5.0, 5.0, 5)
    assert 3.0 <= table["ci_low"] < 5 < table["ci_high"] <= 7


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [low <= 0 <= high for low, high in (median_interval(rng.standard_normal(30)) for _ in range(200))]
    assert 0.88 < np.mean(covered) <= 1
    assert all(math.isnan(bound) for bound in median_interval(np.array([1.0])))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.9])[0] == 1.0 and math.isnan(holm([0.5, math.nan, 0.9])[1])


def test_without_a_test_track_of_a_second_nothing_is_scored(store, small_settings, tmp_path):
    from dataclasses import replace

    short = replace(store, tracks=tuple(replace(track, samples=9000) for track in store.tracks))
    with pytest.raises(ValueError, match="one second"):
        evaluate(Run("short", small_settings, tmp_path), short)

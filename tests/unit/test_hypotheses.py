"""Signs of the effects, the verdict rule, and sentences, on tables whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from mss_utils.analysis.bottleneck import INTERVENTIONS
from mss_utils.analysis.hypotheses import evaluate_hypotheses, format_hypothesis, verdict
from mss_utils.analysis.repetition import CONDITIONS
from mss_utils.config import MODELS

ONE_MODEL = {"context_gain_b1_1s", "repetition_gain_b2_1s"}
B2_MINUS_B1 = {"repetition_gain_b2_minus_b1_1s", "sdr_b2_minus_b1", "data_gain_b2_minus_b1"}
MINUS_A = {"phase_true_magnitude_b1", "phase_true_magnitude_b2"}
BOTTLENECK = {"sequence_gain_b1", "sequence_gain_b2"}
BOTTLENECK |= {f"bottleneck_{name}_{b}" for name in INTERVENTIONS for b in ("b1", "b2")}
MINUS_A |= {"attack_minus_sustain_b1", "attack_minus_sustain_b2"}
ALL = ONE_MODEL | B2_MINUS_B1 | MINUS_A | BOTTLENECK


def tables(**quality):
    """Two targets, ten tracks, three seeds; a model is better by its quality in dB on piano."""
    rng = np.random.default_rng(0)
    rows = {
        name: []
        for name in ("tracks", "phase", "attack", "bottleneck", "repetition", "data_amount")
    }
    for i, track, m, seed in np.ndindex(2, 10, len(MODELS), 3):
        model = MODELS[m]
        q = i * quality.get(model, 0.0) + 0.02 * rng.standard_normal()
        key = dict(target=("bass", "piano")[i], track=f"t{track}", model=model, seed=seed)
        rows["tracks"].append(key | dict(SDR=5 + q))
        rows["phase"].append(key | dict(band_low_hz=0, band_high_hz=8000, sdr_true_magnitude=7 + q))
        low_band = dict(band_low_hz=0, band_high_hz=250, sdr_true_magnitude=7 - 2 * q)
        rows["phase"].append(key | low_band)
        rows["attack"].append(key | dict(attack_sdr=4 + q, sustain_sdr=4.0))
        for condition, sdr in zip(CONDITIONS, (3 + 2 * q, 3 + q, 3.0), strict=True):
            rows["repetition"].append(key | dict(lag_s=1.0, condition=condition, sdr=sdr))
            rows["repetition"].append(key | dict(lag_s=2.0, condition=condition, sdr=3.0))
        for intervention in ("none", *INTERVENTIONS):
            sdr = 5 + q * (intervention == "none")
            rows["bottleneck"].append(key | dict(intervention=intervention, sdr=sdr))
        for share in (0.1, 0.3, 1.0):
            rows["data_amount"].append(key | dict(share=share, SDR=5 + q * np.log10(share)))
    return {name: pd.DataFrame(table) for name, table in rows.items()}


@pytest.mark.parametrize(
    "quality, supported, not_supported",
    [
        (dict(demucs_lstm=1, demucs_attention=2), ALL, set()),
        (dict(demucs_lstm=2, demucs_attention=1), ALL - B2_MINUS_B1, B2_MINUS_B1),
        (dict(unet=1), set(), MINUS_A),
        (dict(demucs_framewise=1), set(), {"sequence_gain_b1", "sequence_gain_b2"}),
    ],
)
def test_hypotheses_predict_positive_effects(small_settings, quality, supported, not_supported):
    settings = small_settings.model_copy(update=dict(data_study=True, segment_s=3.0))
    table = evaluate_hypotheses(settings, tables(**quality))
    table = table[table["target"] == "piano"].set_index("id")
    assert set(table.index[table["seeds"] == 3]) == ALL
    assert set(table.index[table["verdict"] == "supported"]) == supported
    assert set(table.index[table["verdict"] == "not supported"]) >= not_supported
    effect = quality.get("demucs_attention", 0) - quality.get("demucs_lstm", 0)
    assert table.loc[list(B2_MINUS_B1), "effect"].to_numpy() == pytest.approx(effect, abs=0.05)
    assert (table.loc[table.index.str.endswith(("2s", "4s")), "verdict"] == "not askable").all()


def test_what_a_run_lacks_is_in_the_table(small_settings):
    made = tables() | dict(repetition=tables()["repetition"].iloc[:0])
    settings = small_settings.model_copy(update=dict(data_study=False, segment_s=3.0))
    table = evaluate_hypotheses(settings, made)
    verdicts = table[table["target"] == "piano"].set_index("id")["verdict"]
    assert verdicts["repetition_gain_b2_1s"] == "cannot tell"
    assert verdicts["data_gain_b2_minus_b1"] == "not run"


@pytest.mark.parametrize(
    "low, high, by_seed, expected",
    [
        (0.1, 0.9, [1, 1, 1], "supported"),
        (-0.9, -0.1, [-1], "not supported"),
        (0.1, 0.9, [1, 1, -1], "cannot tell"),  # too few seeds agree
        (-0.1, 0.15, [1], "not supported"),  # negligible
        (-0.5, 0.15, [1, 1, 1], "cannot tell"),
        (np.nan, np.nan, [1, 1, 1], "cannot tell"),
    ],
)
def test_verdict_rule(low, high, by_seed, expected):
    assert verdict(low, high, np.array(by_seed)) == expected


def test_sentence_of_a_hypothesis():
    row = dict(target="piano", measure="SDR, B2 − B1", unit="dB", effect=-0.25, tracks=20, seeds=1)
    row |= dict(ci_low=-0.5, ci_high=-0.125, verdict="not supported")
    text = "piano: SDR, B2 − B1: −0.25 dB [−0.50, −0.12], 20 tracks, 1 seed: **not supported**."
    assert format_hypothesis(row) == text
    row |= dict(effect=0.25, ci_low=0.125, ci_high=0.5, verdict="cannot tell")
    assert "3 seeds must agree" in format_hypothesis(row)
    row |= dict(effect=np.nan, ci_low=np.nan, ci_high=np.nan)
    assert "too few tracks" in format_hypothesis(row)
    assert format_hypothesis(row | dict(verdict="not run")) == "piano: SDR, B2 − B1: not run."

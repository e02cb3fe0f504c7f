"""The three questions: every measure on something whose answer is known beforehand."""

import itertools

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import write_dataset

from mss_utils import figures
from mss_utils.analysis import TABLES, analyse, attack, hypotheses, repetition
from mss_utils.analysis.onsets import beat_and_bar_s, find_onsets
from mss_utils.analysis.phase import (
    ONE_CHANNEL,
    bands,
    combine_magnitude_phase,
    phase_scores,
    phase_share,
)
from mss_utils.config import MODELS, create_or_load_run
from mss_utils.data import build_store, open_store
from mss_utils.evaluation.bsseval import utterance_sdr
from mss_utils.evaluation.scores import evaluate
from mss_utils.listening import questions
from mss_utils.mixing import Mixer, share_of
from mss_utils.models import build_model
from mss_utils.models.level import Level
from mss_utils.models.unet import STFT
from mss_utils.training.loop import train

RATE = 16000
STFT_A = STFT(1024, 256)


def noise(seconds=2.0, channels=1, seed=0):
    return (
        np.random.default_rng(seed)
        .standard_normal((channels, round(seconds * RATE)))
        .astype(np.float32)
    )


# --- phase ---------------------------------------------------------------------------------------------------------------


def whole(reference, estimate):
    return phase_scores(reference, estimate, RATE, STFT_A)[0]


def test_the_reference_has_no_phase_error_and_costs_nothing():
    reference = noise()
    for row in phase_scores(reference, reference, RATE, STFT_A):
        assert row["phase_error_rad"] < 1e-6 and row["sdr"] == row["sdr_true_phase"] == np.inf
        assert row["sdr_true_magnitude"] > 60  # cosines of rounded angles


def test_a_random_phase_is_off_by_a_right_angle_on_average():
    row = whole(noise(20, seed=1), noise(20, seed=2))
    assert row["phase_error_rad"] == pytest.approx(np.pi / 2, abs=0.03)
    assert row["sdr_true_magnitude"] == pytest.approx(
        -3.01, abs=0.1
    )  # |1 - e^ia|^2 is 2 on average


def test_an_inverted_signal_has_only_errors_of_phase_and_a_soft_one_only_errors_of_magnitude():
    reference = noise()
    inverted, soft = whole(reference, -reference), whole(reference, reference / 2)
    assert inverted["phase_error_rad"] == pytest.approx(np.pi) and inverted["sdr"] == pytest.approx(
        -6.02, abs=0.01
    )
    assert (
        inverted["sdr_true_phase"] == np.inf
        and phase_share(inverted["sdr"], inverted["sdr_true_phase"]) == 1
    )
    assert soft["phase_error_rad"] == pytest.approx(0, abs=1e-6) and soft["sdr"] == pytest.approx(
        6.02, abs=0.01
    )
    assert phase_share(soft["sdr"], soft["sdr_true_phase"]) == pytest.approx(0, abs=1e-6)


def test_the_error_falls_into_magnitude_and_phase_without_a_rest():
    reference, estimate = noise(seed=3), noise(seed=3) + 0.7 * noise(seed=4)
    true, found = (STFT_A(torch.from_numpy(audio)[None])[0] for audio in (reference, estimate))
    of_phase = (
        2 * true.abs() * found.abs() * (1 - torch.cos(torch.angle(found) - torch.angle(true)))
    ).sum()
    row = whole(reference, estimate)
    assert phase_share(row["sdr"], row["sdr_true_phase"]) == pytest.approx(
        float(of_phase / (true - found).abs().square().sum()), abs=1e-4
    )


def test_an_error_is_found_in_its_band():
    time = np.arange(2 * RATE) / RATE
    low, high = (np.sin(2 * np.pi * hz * time)[None].astype(np.float32) for hz in (400, 3000))
    rows = {
        row["band_low_hz"]: row for row in phase_scores(low + high, low - high, RATE, STFT_A)[1:]
    }
    assert rows[2000]["phase_error_rad"] > 3.1 and rows[250]["phase_error_rad"] < 0.05
    assert [row[:2] for row in bands(RATE)] == [
        (0, 8000),
        (0, 250),
        (250, 500),
        (500, 1000),
        (1000, 2000),
        (2000, 4000),
        (4000, 8000),
    ]


def test_silence_and_one_channel_have_a_reason():
    assert whole(noise(), noise())["reason"] == ONE_CHANNEL
    silent = whole(noise(), 0 * noise())
    assert (
        "estimate is silent" in silent["reason"]
        and np.isnan([silent["phase_error_rad"], silent["sdr_true_magnitude"]]).all()
    )
    nothing = whole(0 * noise(), noise())
    assert (
        "reference is silent" in nothing["reason"]
        and np.isnan([nothing["sdr"], nothing["phase_error_rad"]]).all()
    )


def test_the_angle_between_channels():
    mono = noise()
    both, across = np.concatenate([mono, mono]), np.concatenate([mono, -mono])
    assert whole(both, both)["interchannel_error_rad"] < 1e-6 and whole(both, both)["reason"] == ""
    assert whole(both, across)["interchannel_error_rad"] == pytest.approx(np.pi)


def test_a_signal_with_its_own_phase_is_itself():
    reference = noise()
    assert np.abs(combine_magnitude_phase(reference, reference, STFT_A) - reference).max() < 1e-4


# --- reach ---------------------------------------------------------------------------------------------------------------


class Convolution(torch.nn.Module):
    """A moving average over 385 samples, with or without what depends on all samples."""

    def __init__(self, normalised):
        super().__init__()
        self.level = Level() if normalised else None
        self.norm = torch.nn.GroupNorm(1, 1) if normalised else torch.nn.Identity()

    def forward(self, x):
        x = self.norm(x) / (self.level(x) if self.level else 1)
        return torch.nn.functional.conv1d(x, torch.ones(1, 1, 385) / 385, padding=192)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_reach_of_a_convolution_is_its_length_normalised_or_not(normalised):
    profile = repetition.reach_profile(Convolution(normalised), noise(0.5), block=64)
    assert profile.sum() == pytest.approx(1) and (profile[4:] == 0).all()
    assert [repetition.radius_s(profile, share, 64) for share in (0.5, 0.9, 0.99)] == [
        128,
        192,
        192,
    ]


def test_with_statistics_that_move_a_normalised_convolution_would_reach_everywhere():
    x = torch.from_numpy(noise(0.5))[None].requires_grad_()
    gradient = torch.autograd.grad(Convolution(True)(x)[0, 0, 4000], x)[0][0, 0]
    assert (gradient[:3000] != 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_holding_statistics_does_not_change_what_a_model_says(small_settings, name):
    model, audio = build_model(name, small_settings).eval(), torch.from_numpy(noise(0.5))[None]
    with torch.no_grad(), repetition.constant_statistics(model):
        held = model(audio)
    assert torch.allclose(held, model(audio), atol=1e-5)
    assert not any(layer._forward_hooks for layer in model.modules())


# --- attention -----------------------------------------------------------------------------------------------------------


def test_attention_at_one_lag_is_found_there():
    frames, lag = 40, 11
    weights = torch.zeros(2, 3, frames, frames)
    for i in range(frames):
        sides = [j for j in (i - lag, i + lag) if 0 <= j < frames]
        weights[..., i, sides] = 1 / max(1, len(sides))
    profile = repetition.by_lag(weights)
    assert profile.argmax() == lag and np.delete(profile, lag).max() == 0
    assert np.allclose(repetition.by_lag(torch.full((1, 1, frames, frames), 1 / frames)), 1)


def test_a_layer_whose_queries_are_zero_attends_uniformly(small_settings):
    model = build_model("demucs_attention", small_settings).eval()
    random = repetition.attention_by_lag(model, noise(0.5)[None])
    for layer in model.bottleneck.layers:
        torch.nn.init.zeros_(layer.self_attn.in_proj_weight)
        torch.nn.init.zeros_(layer.self_attn.in_proj_bias)
    uniform = repetition.attention_by_lag(model, noise(0.5)[None])
    assert (
        uniform.shape == random.shape == (3, 8)
        and np.allclose(uniform, 1, atol=1e-5)
        and not np.allclose(random, 1, atol=1e-5)
    )


def test_weight_at_the_bar_is_told_from_weight_near_it():
    profile = np.ones(50)
    assert repetition.at_the_bar_db(profile, 2.0, 0.064) == 0
    profile[31:33] = 10  # a bar of two seconds is 31.25 frames
    assert repetition.at_the_bar_db(profile, 2.0, 0.064) == pytest.approx(10)
    assert np.isnan(repetition.at_the_bar_db(profile, 2.6, 0.064))  # a bar and a quarter do not fit


# --- the damaged repeat --------------------------------------------------------------------------------------------------


class Copying(torch.nn.Module):
    """Takes what stood one lag earlier: right where music repeats, and nowhere else."""

    def forward(self, x):
        return torch.roll(x, RATE, dims=-1)


class Listening(torch.nn.Module):
    """Scales the mixture by the level of its first second: uses context, but knows nothing of repeats."""

    def forward(self, x):
        level = x[..., :RATE].square().mean(dim=(1, 2), keepdim=True).sqrt()
        return x * (0.1 * level / (level + 0.001))


@pytest.fixture(scope="module")
def loop():
    target, residual = noise(12, seed=5), noise(12, seed=6)
    return repetition.damaged_repeat(target, residual, 4 * RATE, RATE, 3 * RATE, RATE)


def test_a_model_that_copies_a_repeat_has_the_full_gain_and_one_that_does_not_has_none(loop):
    copying, listening = (
        repetition.repeat_scores(model, [loop])[0] for model in (Copying(), Listening())
    )
    assert copying["repeat"] == np.inf and copying["different"] < 0 and copying["silent"] == 0
    assert listening["repeat"] - listening["different"] == pytest.approx(0, abs=1e-3)
    assert abs(listening["different"] - listening["silent"]) > 0.1


def test_the_conditions_differ_only_around_the_damage(loop):
    (repeat, truth, where), (different, *_), (silent, *_) = (
        loop[name] for name in repetition.CONDITIONS
    )
    assert where == slice(RATE, 2 * RATE) and repeat.shape == (1, 3 * RATE)
    assert np.array_equal(repeat[:, where], different[:, where]) and np.array_equal(
        repeat[:, where], silent[:, where]
    )
    power = lambda audio: np.square(audio, dtype=float).mean()
    assert (
        power(repeat[:, :RATE]) == pytest.approx(power(different[:, :RATE]), rel=1e-5)
        and power(silent[:, :RATE]) == 0
    )
    damage_db = 10 * np.log10(power(truth[:, where]) / power(repeat[:, where] - truth[:, where]))
    assert damage_db == pytest.approx(repetition.BURST_DB, abs=0.01)
    assert np.array_equal(truth[:, where], truth[:, :RATE])


@pytest.mark.parametrize("samples", [2 * RATE, 2 * RATE + 1, 5 * RATE // 2, 7 * RATE])
def test_every_moment_of_the_damage_has_its_repeat_in_the_window(samples):
    found = repetition.damaged_repeat(
        noise(12, seed=5), noise(12, seed=6), 4 * RATE, RATE, samples, RATE
    )
    mixture, truth, where = found["repeat"]
    assert mixture.shape == (1, samples)
    inside = np.arange(where.start, where.stop)
    earlier, later = inside - RATE, inside + RATE
    again = np.where(
        earlier >= 0, mixture[0, np.maximum(earlier, 0)], mixture[0, np.minimum(later, samples - 1)]
    )
    assert np.abs(again - truth[0, where]).max() < 1e-6


def test_the_stretches_least_alike_are_taken_and_short_tracks_give_none():
    tone = lambda hz, seconds: np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)
    target = np.concatenate([tone(440, 4), tone(2000, 1), tone(440, 3)])[None].astype(np.float32)
    assert repetition.least_alike(target, 0, RATE, 1) == [4 * RATE]
    assert (
        repetition.damaged_repeat(
            target[:, : 3 * RATE // 2], target[:, : 3 * RATE // 2], 0, RATE, 2 * RATE, RATE
        )
        == {}
    )
    assert repetition.loop_starts(target[:, : 2 * RATE], target[:, : 2 * RATE], RATE) == []
    assert repetition.loop_starts(target, target, 2 * RATE) == [0, 2 * RATE, 4 * RATE, 6 * RATE]
    assert repetition.spread([0, 1, 2, 3, 4], 3) == [0, 2, 4] and repetition.spread([7], 3) == [7]


def test_lags_are_asked_where_a_repeat_fits_into_a_segment():
    assert repetition.lags_s(3.0) == (1, 2, 4) and repetition.lags_s(17.0) == (1, 2, 4, 8)
    assert [repetition.askable(lag, 4.0) for lag in (1, 2, 4)] == [True, True, False]


def test_repetitiveness_of_a_loop_and_of_noise():
    click = np.zeros(RATE // 4)
    click[:200] = np.random.default_rng(0).standard_normal(200)
    bar = np.concatenate([click, 0.3 * click, 0.6 * click, 0.1 * click])
    loop = np.tile(bar, 12)[None].astype(np.float32)
    assert repetition.repetitiveness(loop, RATE, 1.0) > 0.9
    assert abs(repetition.repetitiveness(noise(12), RATE, 1.0)) < 0.3
    assert np.isnan(repetition.repetitiveness(loop[:, : RATE * 3 // 2], RATE, 1.0)) and np.isnan(
        repetition.repetitiveness(0 * loop, RATE, 1.0)
    )


# --- attack --------------------------------------------------------------------------------------------------------------

TIMES = np.arange(0.5, 9.5, 0.5)


def clicks(rise_s=0.002, height=0.5, seconds=10.0):
    """A tone burst at every onset that rises in a straight line, then decays within 0.4 s."""
    time = np.arange(round(0.4 * RATE)) / RATE
    burst = (
        height
        * np.minimum(1, time / rise_s)
        * np.exp(-np.maximum(0, time - rise_s) / 0.08)
        * np.sin(2 * np.pi * 2000 * time)
    )
    audio = np.zeros(round(seconds * RATE))
    for onset in TIMES:
        audio[round(onset * RATE) : round(onset * RATE) + len(burst)] += burst
    return audio[None].astype(np.float32)


def test_a_smeared_click_has_the_pre_echo_that_was_put_in():
    reference = clicks()
    estimate = reference.copy()
    for onset in (TIMES * RATE).round().astype(int):
        energy = np.square(reference[:, onset : onset + 800], dtype=float).sum()
        estimate[:, onset - 800 : onset] += np.sqrt(0.01 * energy / 800)
    row = attack.transient_scores(reference, estimate, TIMES, RATE)
    assert (
        row["n_onsets"] == len(TIMES)
        and row["pre_echo_db"] == pytest.approx(-20, abs=0.05)
        and row["attack_sdr"] == np.inf
    )


def test_errors_are_counted_where_they_are():
    reference, estimate = clicks(), clicks()
    for onset in (TIMES * RATE).round().astype(int):
        estimate[:, onset : onset + 800] *= 0.9  # the first 50 ms
        estimate[:, onset + 800 : onset + 6400] *= 0.99
    row = attack.transient_scores(reference, estimate, TIMES, RATE)
    assert row["attack_sdr"] == pytest.approx(20, abs=0.01) and row["sustain_sdr"] == pytest.approx(
        40, abs=0.05
    )
    assert row["pre_echo_db"] == -np.inf and row["peak_error_db"] == pytest.approx(
        20 * np.log10(0.9), abs=0.05
    )


def test_a_slow_attack_is_late_by_what_it_is_slower():
    row = attack.transient_scores(clicks(0.002), clicks(0.032), TIMES, RATE)
    assert row["attack_time_error_ms"] == pytest.approx(
        0.8 * 30, abs=5
    )  # from a tenth to nine tenths, seen through 4 ms
    assert attack.transient_scores(clicks(), clicks(), TIMES, RATE)["attack_time_error_ms"] == 0


def test_attacks_too_smeared_to_be_seen_whole_count_as_late():
    smeared = (
        clicks()
        + 0.2 * np.sin(2 * np.pi * 1000 * np.arange(10 * RATE) / RATE, dtype=np.float32)[None]
    )  # never quiet before an onset
    late_ms = attack.transient_scores(clicks(), smeared, TIMES, RATE)["attack_time_error_ms"]
    assert 40 < late_ms < 60, "all that is looked at before an onset"
    some = clicks()
    some[:, : 4 * RATE] = smeared[:, : 4 * RATE]  # seven of the eighteen
    assert abs(attack.transient_scores(clicks(), some, TIMES, RATE)["attack_time_error_ms"]) < 2


def test_only_onsets_with_rest_before_them_count():
    at = attack.isolated(np.array([0.01, 0.5, 0.6, 0.8, 9.95]), RATE, 10 * RATE)
    assert (at / RATE).tolist() == [
        0.5,
        0.8,
    ]  # one too near the start, one after 100 ms, one too near the end
    row = attack.transient_scores(clicks(), clicks(), np.array([]), RATE)
    assert row["n_onsets"] == 0 and row["reason"] == attack.NO_ONSET and np.isnan(row["attack_sdr"])


def test_built_in_songs_know_their_onsets_and_bars_and_others_are_listened_to(
    songs_store, tmp_path
):
    store, _ = songs_store
    track = store.split("test")[0]
    assert len(find_onsets(store, track, "piano")) > 5
    beat_s, bar_s = beat_and_bar_s(store, track)
    assert 0.2 < beat_s < 1.5 and bar_s > 2 * beat_s - 1e-9
    for split in ("train", "valid", "test"):
        (tmp_path / split / "song").mkdir(parents=True)
        soundfile.write(
            tmp_path / split / "song" / "piano.wav", (clicks() + 0.003 * noise(10, seed=1)).T, RATE
        )
        soundfile.write(tmp_path / split / "song" / "rest.wav", 0.1 * noise(10).T, RATE)
    other = build_store(tmp_path, RATE, 1)
    found = find_onsets(other, other.split("test")[0], "piano")
    assert len(found) == len(TIMES) and np.abs(found - TIMES).max() < 0.03


# --- verdicts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "unit", "by_seed", "said"),
    [
        (0.1, 0.9, "dB", [1, 1, 1], "supported"),
        (0.1, 0.9, "dB", [1, 1], "cannot tell"),  # too few seeds
        (0.1, 0.9, "dB", [1, 1, -1], "cannot tell"),
        (-0.9, -0.1, "dB", [-1], "not supported"),
        (-0.1, 0.15, "dB", [1], "not supported"),  # too small to matter
        (-0.1, 0.15, "s", [1, 1, 1], "cannot tell"),  # what is small is said for dB only
        (-0.5, 0.9, "dB", [1, 1, 1], "cannot tell"),
        (np.nan, np.nan, "dB", [1, 1, 1], "cannot tell"),
    ],
)
def test_the_rule(low, high, unit, by_seed, said):
    assert hypotheses.verdict(0.5 * (low + high), low, high, unit, np.array(by_seed)) == said


def test_a_rank_correlation_is_found_with_its_interval():
    rng = np.random.default_rng(0)
    index = pd.Series(rng.random(30), [f"track {i}" for i in range(30)])
    found = hypotheses.rank_correlation(
        index, pd.DataFrame({0: index**3, 1: index, 2: np.exp(index)})
    )
    assert (
        found["effect"] == pytest.approx(1)
        and found["verdict"] == "supported"
        and found["tracks"] == 30
    )
    unrelated = hypotheses.rank_correlation(index, pd.DataFrame({0: rng.random(30)}, index.index))
    assert unrelated["ci_low"] < 0 < unrelated["ci_high"] and unrelated["verdict"] == "cannot tell"
    assert np.isnan(hypotheses.rank_correlation(index[:3], pd.DataFrame({0: index[:3]}))["effect"])


def made_up_tables(b1=0.0, b2=0.0, a=0.0):
    """Every table of a run with ten tracks and three seeds in which each model has one quality, with a little noise: higher is better.

    Better means: a truer phase, less error before an onset, attacks kept, more gained from a repeat and from what is around it, a wider
    reach, more attention at the bar, an SDR that rises with the track's repetitiveness and with the amount of music.
    """
    rng, quality = np.random.default_rng(0), dict(unet=a, demucs_lstm=b1, demucs_attention=b2)
    noisy = lambda value: value + 0.02 * rng.standard_normal()
    found = {name: [] for name in ("phase", "transients", "long_range", "tracks", "data_amount")}
    for index, (model, seed) in itertools.product(range(10), itertools.product(MODELS, range(3))):
        q, track = quality[model], f"t{index}"
        key = dict(target="piano", track=track, model=model, seed=seed)
        found["phase"].append(
            key
            | dict(
                band_low_hz=0,
                band_high_hz=8000,
                sdr=5.0,
                sdr_true_phase=noisy(9 - q),
                sdr_true_magnitude=noisy(7 + q),
            )
        )
        found["transients"].append(
            key | dict(attack_sdr=noisy(4 + q), sustain_sdr=4.0, pre_echo_db=noisy(-20 - q))
        )
        found["tracks"].append(key | dict(SDR=noisy(5 + q * index)))
        found["data_amount"] += [
            key | dict(share=share, SDR=noisy(5 + q * np.log10(share / 0.1)))
            for share in (0.1, 0.3, 1.0)
        ]
        probe = dict(target="piano", model=model, seed=seed, item=track)
        found["long_range"] += [
            probe | dict(probe="reach", condition="99 %", value=noisy(1 + q / 2)),
            probe
            | dict(probe="reach", condition="beyond 0.5 s", value=0.1 * 10 ** (noisy(q) / 10)),
            probe | dict(probe="attention_at_bar", value=noisy(q)),
            dict(target="piano", probe="repetitiveness", item=track, value=index / 10)
            if (model, seed) == ("unet", 0)
            else probe | dict(probe="none"),
        ]
        for condition, value in (("silent", 3.0), ("different", 3 + q), ("repeat", 3 + 2 * q)):
            loop = probe | dict(
                item=f"{track} @ 0.00 s", probe="damaged_repeat", lag_s=1.0, condition=condition
            )
            found["long_range"].append(loop | dict(value=noisy(value)))
    return {name: pd.DataFrame(rows) for name, rows in found.items()}


ABOUT_B2_AND_B1 = {
    "radius that holds 99 % of the gradient, B2 − B1",
    "gradient from beyond 0.5 s, B2 over B1",
    "repetition gain at 1 s, B2 − B1",
    "rank correlation of repetitiveness with the SDR of B2 − B1",
    "SDR, B2 − B1",
    "gain in SDR from ten times the music, B2 − B1",
}
ABOUT_ONE = {
    "attention at one bar over that near it",
    "context gain of B1 at 1 s",
    "repetition gain of B2 at 1 s",
}
ABOUT_A = {
    f"{measure} − A"
    for model in ("B1", "B2")
    for measure in (
        f"SDR of the true magnitude with a model's phase, {model}",
        f"SDR in the attack minus SDR in the sustain, {model}",
    )
} | {
    f"{measure}, A − {model}"
    for model in ("B1", "B2")
    for measure in ("share of the error that is phase", "pre-echo")
}


@pytest.mark.parametrize(
    "quality, positive, negative",
    [
        (dict(b1=1.0, b2=2.0), ABOUT_A | ABOUT_B2_AND_B1 | ABOUT_ONE, set()),
        (dict(b1=2.0, b2=1.0), ABOUT_A | ABOUT_ONE, ABOUT_B2_AND_B1),
        (dict(a=1.0), set(), ABOUT_A),
    ],
)
def test_every_effect_has_the_sign_that_its_hypothesis_says(
    small_settings, quality, positive, negative
):
    settings = small_settings.model_copy(update=dict(data_study=True, segment_s=3.0))
    table = hypotheses.hypotheses(settings, made_up_tables(**quality))
    table = table[~table["verdict"].eq("not askable")].assign(
        measure=lambda rows: rows["measure"].str.removeprefix("piano: ")
    )
    assert (
        set(table["measure"]) == ABOUT_A | ABOUT_B2_AND_B1 | ABOUT_ONE
        and (table["seeds"] == 3).all()
    )
    said = table.set_index("measure")["verdict"]
    assert {measure: said[measure] for measure in positive} == dict.fromkeys(positive, "supported")
    assert {measure: said[measure] for measure in negative} == dict.fromkeys(
        negative, "not supported"
    )


def test_the_slope_is_what_ten_times_the_music_brings():
    rows = [
        dict(track=f"track {i}", model=model, seed=0, share=share, SDR=i + gain * np.log10(share))
        for i in range(8)
        for model, gain in (("demucs_lstm", 2.0), ("demucs_attention", 3.0))
        for share in (0.1, 0.3, 1.0)
    ]
    for model, gain in (("demucs_lstm", 2.0), ("demucs_attention", 3.0)):
        assert np.allclose(hypotheses.slopes(pd.DataFrame(rows), model), gain)


def test_a_share_of_the_training_tracks_is_used_and_smaller_shares_lie_in_larger_ones(
    store, small_settings
):
    tracks = list(range(100))
    tenth, third = (share_of(tracks, share) for share in (0.1, 0.3))
    assert (
        len(tenth) == 10
        and len(third) == 30
        and set(tenth) < set(third)
        and share_of(tracks, 1.0) == tracks
    )
    assert len(share_of(tracks, 0.07)) == 7 and len(share_of(tracks[:3], 0.1)) == 1
    mixer = Mixer(store, small_settings.model_copy(update=dict(train_share=0.5)), "piano")
    assert len(mixer.tracks) == len(store.split("train")) // 2


# --- all of it -----------------------------------------------------------------------------------------------------------


def test_a_stereo_run_on_a_folder_has_every_table_and_says_what_it_lacks(tmp_path, monkeypatch):
    """Noise has no beat, tracks of three seconds no room for loops: rows without numbers, with a reason, and verdicts all the same."""
    root = write_dataset(tmp_path / "data", n_train=2, n_test=2, channels=2)
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path / "results"))
    changes = "channels=2 segment_s=0.5 valid_s=2 steps=2 valid_every=2 excerpt_s=1 demucs_channels=16 ablations= data_study=False"
    run = create_or_load_run("smoke", "stereo", str(root), "piano", changes)
    store = open_store(run.settings)
    for name in MODELS:
        train(run, store, "piano", name)
    tracks = evaluate(run, store)["tracks"]
    tables = analyse(run, store, tracks) | dict(tracks=tracks)
    assert all(run.table(name).exists() for name in TABLES)
    assert tables["phase"]["interchannel_error_rad"].notna().all() and set(
        tables["phase"]["model"]
    ) > set(MODELS)
    damaged = tables["long_range"].query("probe == 'damaged_repeat'")
    assert (
        damaged["reason"].str.startswith("not askable").all()
        and damaged["value"].isna().all()
        and len(damaged) == 3
    )
    said = tables["hypotheses"].set_index("measure")["verdict"]
    assert said["piano: repetition gain of B2 at 1 s"] == "not askable"
    assert said["piano: gain in SDR from ten times the music, B2 − B1"] == "not run"
    assert set(said) <= {
        "not askable",
        "not run",
        "cannot tell",
        "not supported",
    }  # one seed supports nothing
    assert set(tables["long_range"]["probe"]) >= {
        "reach",
        "reach_profile",
        "attention",
        "attention_at_bar",
        "repetitiveness",
        "tempo",
    }
    said = " ".join(
        text.get_text()
        for ax in figures.repeat(
            tables["long_range"], tables["tracks"], tables["hypotheses"], "piano"
        )
        for text in ax.texts
    )
    assert "not askable" in said


@pytest.fixture
def finished(smoke_run):
    """The finished smoke run with its store and tables as they are read back."""
    run = create_or_load_run("smoke")
    return (
        run,
        open_store(run.settings),
        {name: pd.read_csv(run.table(name)) for name in (*TABLES, "tracks")},
    )


def test_a_run_on_the_built_in_songs_asks_the_shortest_lag_and_the_amount_of_music(finished):
    _, store, tables = finished
    damaged = tables["long_range"].query("probe == 'damaged_repeat'")
    asked = damaged.dropna(subset="value")
    assert (
        set(asked["lag_s"]) == {1.0}
        and set(asked["condition"]) == set(repetition.CONDITIONS)
        and set(asked["model"]) == set(MODELS[1:])
    )
    assert set(damaged[damaged["value"].isna()]["lag_s"]) == {2.0, 4.0}
    amounts = tables["data_amount"].groupby(["model", "share"])["track"].nunique()
    assert (amounts == len(store.split("test"))).all() and len(amounts) == 6
    reach = tables["long_range"].query("probe == 'reach_profile'").groupby("model")["value"].sum()
    assert reach.to_numpy() == pytest.approx(1)
    truth = tables["envelopes"].query("model == 'reference'").set_index("time_ms")["level"]
    assert truth.loc[0:100].max() > 1.5 * truth.loc[-50:-1].mean()


def test_the_figures_show_what_the_tables_hold(finished):
    _, _, tables = finished
    phase = figures.phase(tables["phase"], "piano")
    of = lambda line: next(part for part in phase[0].lines if part.get_label() == line).get_ydata()
    rows = tables["phase"].query(
        "model == 'unet' and not (band_low_hz == 0 and band_high_hz == 8000)"
    )
    assert of("A") == pytest.approx(rows.groupby("band_low_hz")["phase_error_rad"].median())
    reach = figures.reach(tables["long_range"], "piano")
    assert [ax.get_title() for ax in reach] == [
        "Reach",
        "Attention of B2",
        "Attention of B2, by bar",
    ]
    repeat = figures.repeat(tables["long_range"], tables["tracks"], tables["hypotheses"], "piano")
    medians = (
        tables["long_range"]
        .query("probe == 'damaged_repeat' and model == 'demucs_lstm'")
        .groupby("condition")["value"]
        .median()
    )
    assert repeat[0].lines[0].get_ydata() == pytest.approx(
        medians[["silent", "different", "repeat"]]
    )
    attack = figures.attack(tables["envelopes"], tables["transients"], "piano")
    assert [line.get_label() for line in attack[0].lines[:4]] == ["reference", "A", "B1", "B2"]
    assert len(figures.data_amount(tables["data_amount"], "piano").get_xticks()) == 3
    assert len(figures.hypothesis_table(tables["hypotheses"])) == len(tables["hypotheses"])


def test_the_three_questions_can_be_heard(finished):
    run, store, tables = finished
    _, phase = questions.phase_versions(run, store, "piano", tables["phase"])
    assert len(phase) == 3
    for versions in phase.values():
        reference, estimate = versions["reference"], versions["as it is"]
        better = utterance_sdr(reference.T, versions["its magnitude, true phase"].T)
        assert (
            better > utterance_sdr(reference.T, estimate.T)
            and len({audio.shape for audio in versions.values()}) == 1
        )
    name, repeat = questions.repeat_versions(run, store, "piano", tables["long_range"])
    assert (
        " @ " in name
        and len(repeat) == 3
        and all(
            set(versions) == {"mixture", "reference", *MODELS[1:]} for versions in repeat.values()
        )
    )
    _, attack = questions.attack_versions(run, store, "piano", tables["transients"])
    fast, slow = (versions["reference"] for versions in attack.values())
    assert slow.shape[1] == 2 * fast.shape[1] > 0 and set(attack["as it is"]) == {
        "reference",
        *MODELS,
    }


def test_what_cannot_be_heard_is_empty(finished):
    run, store, tables = finished
    assert questions.repeat_versions(
        run, store, "piano", tables["long_range"].query("probe != 'damaged_repeat'")
    ) == ("no loop", {})
    assert questions.attack_versions(
        run, store, "piano", tables["transients"].assign(attack_sdr=np.nan)
    ) == ("no track", {})
    assert questions.phase_versions(run, store, "piano", tables["phase"].assign(sdr=np.nan)) == (
        "no track",
        {},
    )


def test_a_row_is_said_in_one_sentence():
    row = dict(
        measure="piano: SDR, B2 − B1",
        unit="dB",
        effect=-0.25,
        ci_low=-0.5,
        ci_high=-0.125,
        tracks=20,
        seeds=1,
        verdict="not supported",
    )
    assert (
        hypotheses.said(row)
        == "piano: SDR, B2 − B1: −0.25 dB [−0.50, −0.12], 20 tracks, 1 seed: **not supported**."
    )
    assert "takes 3 seeds that agree" in hypotheses.said(
        row | dict(effect=0.25, ci_low=0.125, ci_high=0.5, verdict="cannot tell")
    )
    assert (
        hypotheses.said(row | dict(effect=np.nan, verdict="not askable"))
        == "piano: SDR, B2 − B1: not askable."
    )
    assert "takes 6 tracks" in hypotheses.said(
        row | dict(ci_low=np.nan, ci_high=np.nan, tracks=3, verdict="cannot tell")
    )

import math
import os
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import STEMS, write_dataset

from mss_utils.config import MODELS, Run, resolve_settings
from mss_utils.data import open_store
from mss_utils.evaluation.bsseval import (
    METRICS,
    TRACK_METRICS,
    bss_eval,
    score_track,
    utterance_sdr,
)
from mss_utils.evaluation.scores import TABLES, evaluate, score
from mss_utils.evaluation.statistics import (
    compare,
    detectable_difference,
    holm,
    median_interval,
    paired_sentence,
    summarise,
)
from mss_utils.models.oracles import ORACLES, oracle, wiener
from mss_utils.separation.estimates import ROWS, estimates
from mss_utils.training.loop import train

COLUMNS = {
    "frames": "references target track model seed frame SDR ISR SIR SAR",
    "tracks": "references target track model seed SDR ISR SIR SAR utterance_SDR SI_SDR frames usable_frames",
    "lost_frames": "references target track model seed reason frames",
    "cross_check": "metric scores largest_difference_db unequal_nan tracks",
    "summary": "references target model metric median mean ci_low ci_high tracks seeds",
    "paired": "target a b metric median_difference ci_low ci_high p_wilcoxon p_corrected tracks seeds",
    "cost": "target model seed parameters train_s steps audio_s_per_s inference_rtf peak_memory_mb",
    "ablations": "target model ablation metric with_it without_it median_difference ci_low ci_high p_wilcoxon p_corrected tracks seeds steps",
}


@pytest.fixture(scope="module")
def evaluated(small_settings, store, tmp_path_factory):
    run = Run("scored", small_settings, tmp_path_factory.mktemp("scored"))
    for name in MODELS:
        train(run, store, "piano", name)
    return run, evaluate(run, store)


def without_ablations(settings, **changes):
    return settings.model_copy(update=dict(ablations=()) | changes)


def test_the_tables_have_the_columns_of_the_contract(evaluated):
    run, tables = evaluated
    assert tuple(COLUMNS) == TABLES
    for name, columns in COLUMNS.items():
        written = pd.read_csv(run.table(name))
        assert list(written.columns) == columns.split()
        assert len(written) == len(tables[name])
        assert len(written) > 0 or name in ("lost_frames", "cross_check")
    assert list(tables["tracks"]["model"].unique()) == list(ROWS)
    assert set(tables["tracks"]["references"]) == {"target+residual"}
    assert len(tables["frames"]) == 2 * len(ROWS) * 3, "two test tracks of three seconds"


def test_the_scores_of_a_track_are_those_of_its_estimates(evaluated, store):
    run, tables = evaluated
    track = store.split("test")[1]
    mixture, stems = store.load(track)
    target = stems[store.stem_index("piano")]
    found = estimates(run, store, track, "piano")
    assert list(found) == list(ROWS)
    for name, estimate in found.items():
        rest = mixture if name == "mixture" else mixture - estimate
        wanted = bss_eval(
            np.stack([target, mixture - target]).swapaxes(1, 2),
            np.stack([estimate, rest]).swapaxes(1, 2),
            16000,
        )
        rows = tables["frames"].query("track == @track.name and model == @name")
        np.testing.assert_allclose(rows["SAR"], wanted["SAR"][0])
        row = tables["tracks"].query("track == @track.name and model == @name").iloc[0]
        assert row["SDR"] == pytest.approx(np.median(wanted["SDR"][0]))
        assert row["utterance_SDR"] == pytest.approx(utterance_sdr(target.T, estimate.T))


def test_all_targets_are_scored_as_stems(small_settings, store, tmp_path):
    settings = without_ablations(small_settings, target="all", steps=1, warmup_steps=0, seeds=2)
    run = Run("all", settings, tmp_path)
    for target in STEMS:
        for name in MODELS:
            for seed in range(2):
                train(run, store, target, name, seed)
    tables = evaluate(run, store)
    assert set(tables["tracks"]["target"]) == set(STEMS) and set(
        tables["tracks"]["references"]
    ) == {"stems"}
    assert set(tables["tracks"].query("model == 'unet'")["seed"]) == {0, 1}
    assert set(tables["summary"].query("model == 'unet'")["seeds"]) == {2}
    assert len(tables["cost"]) == len(STEMS) * len(MODELS) * 2


def test_the_oracle_is_far_above_the_mixture(store, small_settings):
    track = store.split("test")[0]
    mixture, stems = store.load(track)
    target = stems[store.stem_index("piano")]
    for name in ORACLES:
        found = oracle(name, mixture, target, small_settings)
        assert found.shape == mixture.shape
        assert utterance_sdr(target.T, found.T) > utterance_sdr(target.T, mixture.T) + 3


def track_table(differences, seeds=1):
    """Tracks on which B1 is better than A by `differences` dB in every metric, and B2 equals A."""
    rows = []
    for index, difference in enumerate(differences):
        for seed in range(seeds):
            for model, score in (
                ("unet", 3.0 + index),
                ("demucs_lstm", 3.0 + index + difference),
                ("demucs_attention", 3.0 + index),
            ):
                key = dict(
                    references="target+residual",
                    target="piano",
                    track=f"t{index}",
                    model=model,
                    seed=seed,
                )
                rows.append(key | {metric: score for metric in TRACK_METRICS})
    return pd.DataFrame(rows)


def test_paired_differences_and_their_sentences():
    differences = [0.5, 0.6, 0.7, 0.4, 0.6, 0.8, 0.5, 0.7]
    table = compare(track_table(differences)).query("metric == 'SDR'").set_index(["a", "b"])
    row = table.loc["demucs_lstm", "unet"]
    assert (
        row["median_difference"] == pytest.approx(0.6) and row["ci_low"] > 0 and row["tracks"] == 8
    )
    assert row["p_wilcoxon"] == pytest.approx(2 / 2**8) and row["p_corrected"] == pytest.approx(
        4 / 2**8
    )
    assert math.isnan(table.loc["demucs_attention", "unet"]["p_wilcoxon"])
    rows = table.reset_index()
    assert paired_sentence(rows.iloc[0]).startswith(
        "B1 is 0.60 dB better than A in SDR for these trained weights [0."
    )
    assert paired_sentence(rows.iloc[1]).startswith("The data cannot tell B2 from A in SDR")
    assert paired_sentence(rows.iloc[2]).startswith("B1 is 0.60 dB better than B2")
    assert paired_sentence(rows.iloc[0]).endswith(", 8 tracks, 1 seed.")
    assert paired_sentence(dict(rows.iloc[0]) | dict(p_corrected=0.07)).endswith(
        "; the corrected Wilcoxon test does not confirm it."
    )
    three = compare(track_table(differences, seeds=3)).query("metric == 'SDR'").iloc[0]
    assert "trained weights" not in paired_sentence(three) and "3 seeds" in paired_sentence(three)
    one = compare(track_table(differences[:1])).query("metric == 'SDR'").iloc[0]
    assert (
        paired_sentence(one)
        == "B1 and A cannot be compared in SDR: 1 track, 1 seed with a score of both, at least 6 tracks are needed."
    )


def test_summary_of_known_numbers():
    tracks = track_table([0.0] * 7)
    table = summarise(tracks).query("model == 'unet' and metric == 'SDR'").iloc[0]
    assert (table["median"], table["mean"], table["tracks"]) == (6.0, 6.0, 7)
    assert 3.0 <= table["ci_low"] < 6 < table["ci_high"] <= 9
    tracks.loc[tracks["track"] == "t0", "SDR"] = np.inf
    table = summarise(tracks).query("model == 'unet' and metric == 'SDR'").iloc[0]
    assert table["mean"] == pytest.approx((80 + 4 + 5 + 6 + 7 + 8 + 9) / 7), (
        "above 80 dB a score counts as 80 dB"
    )
    assert (compare(tracks).query("metric == 'SDR'")["median_difference"] == 0).all()


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [
        low <= 0 <= high
        for low, high in (median_interval(rng.standard_normal(30)) for _ in range(200))
    ]
    assert 0.88 < np.mean(covered) <= 1
    assert all(math.isnan(bound) for bound in median_interval(np.arange(5.0))), (
        "the range of five holds the median 94 times in 100"
    )


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.9])[0] == 1.0 and math.isnan(holm([0.5, math.nan, 0.9])[1])


def test_seeds_are_not_tracks_but_their_luck_counts():
    rng = np.random.default_rng(0)
    songs, luck = rng.standard_normal((30, 1)), 3 * rng.standard_normal((1, 3))
    width = lambda values: np.subtract(*median_interval(values)[::-1])
    assert width(np.tile(songs, 3)) == pytest.approx(width(songs)), (
        "copies of a seed are no new tracks"
    )
    assert width(songs + luck) > 2 * width(songs)
    assert width((songs + luck)[:, :2]) == pytest.approx(width(songs)), (
        "two seeds say nothing about luck: their mean is taken as it is"
    )


@pytest.mark.parametrize("luck_db", [0.1, 3.0])
def test_the_interval_over_seeds_covers_the_truth_as_often_as_it_says(luck_db):
    rng = np.random.default_rng(2)
    draws = (
        rng.standard_normal((20, 1)) + luck_db * rng.standard_normal((1, 3)) for _ in range(150)
    )
    assert 0.88 < np.mean([low <= 0 <= high for low, high in map(median_interval, draws)]) <= 1


def test_a_detectable_difference_is_found_four_times_out_of_five():
    rng = np.random.default_rng(3)
    n, first = 40, rng.standard_normal(40)
    low, high = median_interval(first)
    size = np.mean(
        [
            detectable_difference(
                dict(zip(("ci_low", "ci_high"), median_interval(rng.standard_normal(n))))
            )
            for _ in range(40)
        ]
    )
    found = [median_interval(rng.standard_normal(n) + size)[0] > 0 for _ in range(300)]
    assert 0.7 < np.mean(found) < 0.92
    assert detectable_difference(dict(ci_low=low, ci_high=high)) == pytest.approx(
        (high - low) / 2 * 2.8 / 1.96, rel=0.01
    )


# --- oracles --------------------------------------------------------------------------------------------------------------


def test_the_wiener_filter_of_one_channel_is_the_power_ratio_mask():
    spectra = torch.randn(
        2, 1, 1, 5, 40, dtype=torch.complex64, generator=torch.manual_seed(0)
    )  # target and residual
    power = spectra.abs().square()
    expected = power[0] / power.sum(dim=0) * spectra.sum(dim=0)
    assert torch.allclose(wiener(spectra.sum(dim=0), *spectra, bins_at_once=2), expected, atol=1e-3)


def test_digital_silence_does_not_weaken_the_wiener_filter():
    spectra = torch.randn(2, 1, 1, 5, 40, dtype=torch.complex64, generator=torch.manual_seed(0))
    spectra[0, ..., 10:] = 0  # the target pauses for three quarters
    power = spectra.abs().square()
    assert torch.allclose(
        wiener(spectra.sum(dim=0), *spectra),
        power[0] / power.sum(dim=0) * spectra.sum(dim=0),
        atol=1e-3,
    )


def test_the_wiener_filter_uses_the_place_in_stereo():
    """Two sources in all bins and frames alike, one left, one right: no mask could tell them apart, the place does."""
    sources = torch.randn(2, 1, 1, 8, 50, dtype=torch.complex64, generator=torch.manual_seed(0))
    left, right = (
        sources * torch.tensor([[1.0, 0.2], [0.2, 1.0]])[:, None, :, None, None]
    )  # (1, channels, bins, frames)
    error = wiener(left + right, left, right) - left
    assert error.abs().square().sum() < 0.02 * left.abs().square().sum()


# --- what has no score ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    """Test songs of 3 s: the piano pauses in second 1; there is none; only the piano plays; and one song of 0.3 s."""
    root = write_dataset(tmp_path_factory.mktemp("gaps"), n_test=4)
    songs = [root / "test" / f"test song {index}" for index in range(4)]
    change(songs[0] / "piano.wav", lambda audio: audio[16000:32000].fill(0))
    change(songs[1] / "piano.wav", lambda audio: audio.fill(0))
    for stem in set(STEMS) - {"piano"}:
        change(songs[2] / f"{stem}.wav", lambda audio: audio.fill(0))
    for stem in STEMS:
        audio, rate = soundfile.read(songs[3] / f"{stem}.wav")
        soundfile.write(songs[3] / f"{stem}.wav", audio[:4800], rate)
    settings = without_ablations(
        resolve_settings("smoke", str(root), "piano", "cross_check_tracks=4")
    )
    return open_store(settings), settings


def change(path, edit):
    audio, rate = soundfile.read(path)
    edit(audio)
    soundfile.write(path, audio, rate)


def half_mixture(store, targets=1):
    """A model that returns half of the mixture for every target."""
    return lambda track: {("half", 0): np.stack([store.load(track)[0] / 2] * targets)}


def test_lost_frames_are_counted_and_explained(gaps):
    store, settings = gaps
    tables = score(settings, store, half_mixture(store), n_cross_check=0)
    tracks = tables["tracks"].set_index("track")
    assert tracks["frames"].tolist() == [3, 3, 3, 1] and tracks["usable_frames"].tolist() == [
        2,
        0,
        3,
        1,
    ]
    assert math.isnan(tracks.loc["test song 1", "SDR"]) and math.isnan(
        tracks.loc["test song 1", "utterance_SDR"]
    )
    assert tracks.loc["test song 2", "SDR"] == pytest.approx(6.02, abs=0.01), (
        "nothing but the piano, at half its level"
    )
    assert np.isfinite(tracks.loc["test song 3", list(TRACK_METRICS)].astype(float)).all(), (
        "0.3 s are one frame"
    )
    lost = tables["lost_frames"].set_index("track")
    assert dict(lost["reason"]) == dict.fromkeys(
        ["test song 0", "test song 1"], "silent: reference of piano"
    )
    assert dict(lost["frames"]) == {"test song 0": 1, "test song 1": 3}
    assert set(tables["frames"]["frame"]) == {0, 1, 2}, "a lost frame keeps its row"
    assert (
        tables["cross_check"].empty
        and list(tables["cross_check"].columns) == COLUMNS["cross_check"].split()
    )


def test_museval_checks_the_shortest_tracks(gaps, museval):
    store, settings = gaps
    referee = score(settings, store, half_mixture(store))["cross_check"].set_index("metric")
    assert (referee["tracks"] == 3).all(), "one of the four has no piano"
    assert (referee.loc[["SDR", "ISR"], "largest_difference_db"] < 1e-6).all()


def test_stems_beside_a_silent_one_are_scored(gaps):
    store, settings = gaps
    settings = settings.model_copy(update=dict(target="all", cross_check_tracks=0))
    tables = score(settings, store, half_mixture(store, len(STEMS)))
    usable = tables["tracks"].pivot(index="track", columns="target", values="usable_frames")
    assert usable.loc["test song 0"].tolist() == [2] * 4, (
        "where one is silent for a second, museval scores none"
    )
    assert usable.loc["test song 1"].to_dict() == dict(bass=3, drums=3, piano=0, vocals=3)
    assert usable.loc["test song 2"].to_dict() == dict(bass=0, drums=0, piano=3, vocals=0)
    reasons = tables["lost_frames"].query("track == 'test song 2' and target == 'bass'")["reason"]
    assert reasons.tolist() == ["silent: reference of bass"]


def test_several_targets_are_scored_as_if_each_were_alone(gaps):
    store, settings = gaps
    of = lambda target, n: score(
        settings.model_copy(update=dict(target=target)),
        store,
        half_mixture(store, n),
        n_cross_check=0,
    )
    alone = {target: of(target, 1) for target in ("vocals", "drums")}
    both = of("vocals,drums", 2)
    for name in ("frames", "tracks", "lost_frames"):
        for target, tables in alone.items():
            pd.testing.assert_frame_equal(
                both[name].query("target == @target").reset_index(drop=True), tables[name]
            )
    assert set(both["tracks"]["references"]) == {"target+residual"} and store.targets(
        "vocals,drums,vocals"
    ) == ("vocals", "drums")


def test_a_model_that_says_nothing_has_zero_db(gaps):
    store, settings = gaps
    silence = lambda track: {("silence", 0): np.zeros((1, 1, track.samples), np.float32)}
    tables = score(settings, store, silence, n_cross_check=0)
    assert (
        tables["tracks"]["utterance_SDR"].tolist()[0] == 0 and tables["tracks"]["SDR"].isna().all()
    )
    lost = tables["lost_frames"].query("track == 'test song 0'").set_index("reason")["frames"]
    assert lost.to_dict() == {"silent: estimate of piano": 2, "silent: reference of piano": 1}, (
        "the music goes before the model"
    )


@pytest.mark.parametrize(
    "broken, message",
    [
        (
            lambda estimate: estimate * np.nan,
            "unet, seed 0, on 'test song 1': estimates hold .* NaN",
        ),
        (
            lambda estimate: estimate[..., 1:],
            "unet, seed 0, on 'test song 1': the estimate has shape .*Trim or pad",
        ),
    ],
)
def test_a_broken_estimate_names_model_and_track_and_leaves_nothing(
    store, small_settings, tmp_path, monkeypatch, broken, message
):
    def estimates_of(run, store, track):
        mixture, _ = store.load(track)
        return {
            ("unet", 0): broken(mixture[None]) if track.name == "test song 1" else mixture[None]
        }

    monkeypatch.setattr("mss_utils.evaluation.all_estimates", estimates_of)
    with pytest.raises(ValueError, match=message):
        evaluate(Run("broken", small_settings, tmp_path), store)
    assert not list(tmp_path.iterdir())


class Fatal(int):
    """A sample rate that kills the process it is sent to."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_killed_scoring_process_costs_no_score(gaps):
    store, settings = gaps
    undisturbed = score(settings, store, half_mixture(store), n_cross_check=0)
    with pytest.warns(UserWarning, match="was killed"):
        again = score(
            settings, replace(store, sample_rate=Fatal(16000)), half_mixture(store), n_cross_check=0
        )
    for name in ("frames", "tracks", "lost_frames"):
        pd.testing.assert_frame_equal(again[name], undisturbed[name])


def test_without_ffmpeg_there_is_no_cross_check(gaps, monkeypatch):
    store, settings = gaps
    monkeypatch.setattr("mss_utils.evaluation.museval_is_available", lambda: False)
    with pytest.warns(UserWarning, match="Without ffmpeg"):
        assert score(settings, store, half_mixture(store))["cross_check"].empty


def test_museval_can_score_instead(gaps, museval):
    store, settings = gaps
    noise = 0.01 * np.random.default_rng(0).standard_normal((1, 1, 48000)).astype(np.float32)
    noisy = lambda track: {
        key: estimate + noise[..., : track.samples]
        for key, estimate in half_mixture(store)(track).items()
    }
    fast, slow = (
        score(settings.model_copy(update=dict(scorer=name)), store, noisy, 0)
        for name in ("bss_eval", "museval")
    )
    pd.testing.assert_frame_equal(slow["frames"], fast["frames"], rtol=0, atol=1e-4)
    assert not slow["frames"].equals(fast["frames"]), "rounding differs: two programs were at work"


# --- ablations, real music ------------------------------------------------------------------------------------------------


def test_an_ablation_is_the_same_training_without_one_thing(evaluated):
    run, tables = evaluated
    table = tables["ablations"]
    assert set(zip(table["model"], table["ablation"])) == {
        ("unet", "random_mix"),
        ("unet", "curriculum"),
    }
    row = table.query("ablation == 'curriculum' and metric == 'SDR'").iloc[0]
    assert (
        row["with_it"]
        == tables["summary"].query("model == 'unet' and metric == 'SDR'")["median"].item()
    )
    assert (
        row["steps"] == run.settings.steps
        and row["tracks"] == 2
        and row["with_it"] != row["without_it"]
    )
    kept = resolve_settings("smoke").model_validate_json(
        (run.folder / "ablations" / "curriculum" / "settings.json").read_text()
    )
    assert kept == without_ablations(run.settings, curriculum=False, data_study=False)


def test_without_the_setting_no_ablation_is_run(small_settings, store, tmp_path):
    from mss_utils.analysis.studies import ablate

    table = ablate(Run("none", without_ablations(small_settings), tmp_path), store, pd.DataFrame())
    assert (
        table.empty
        and list(table.columns) == COLUMNS["ablations"].split()
        and not list(tmp_path.iterdir())
    )


def test_the_mixture_scores_on_musdb_as_published():
    """Unscaled, the mixture of a song has an SDR and SIR of about -5 dB for vocals; by four, SiSEC's MIX row: ISR 2.5, SDR about 1 dB."""
    root = os.environ.get("MUSDB_PATH")
    if not root:
        pytest.skip("MUSDB_PATH does not name a MUSDB18 folder")
    import musdb

    medians = []
    for track in musdb.DB(root=root, subsets="test").tracks[::5]:
        mixture, *_, vocals = track.stems
        both = {"mixture": np.stack([mixture] * 2), "quarter": np.stack([mixture] * 2) / 4}
        found = score_track(np.stack([vocals, mixture - vocals]), both, track.rate)
        medians.append(
            {
                (name, metric): np.nanmedian(scores[metric][0])
                for name, scores in found.items()
                for metric in METRICS
            }
        )
    medians = pd.DataFrame(medians).median()
    assert -7 < medians["mixture", "SDR"] < -3 and -7 < medians["mixture", "SIR"] < -3
    assert (
        medians["quarter", "ISR"] == pytest.approx(2.5, abs=0.05)
        and 0 < medians["quarter", "SDR"] < 2
    )

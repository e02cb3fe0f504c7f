"""Figures: files, displayed outputs, and marks that show what the tables contain."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mss_utils import analysis, figures
from mss_utils.config import MODELS, SEQUENCE_MODELS, SPLITS, Run, Settings
from mss_utils.evaluation.statistics import compare, summarise
from mss_utils.figures import data, models, style

RATE = 16000
METRICS = ["SDR", "ISR", "SIR", "SAR", "utterance_SDR", "SI_SDR"]
HISTORY = pd.DataFrame(dict(step=[1, 2], train_loss_db=0.0, valid_sdr_db=0.0, train_s=800.0))
BASE_SDR = dict(mixture=-6, unet=3, demucs_framewise=1, demucs_lstm=2, demucs_attention=2.5)
BASE_SDR |= dict(irm=9, mwf=10)


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr(style, "display", lambda *objects: outputs.extend(objects))
    yield outputs
    plt.close("all")


def table(models, **columns):
    rows = itertools.product(models, range(8), (0, 1))
    rows = pd.DataFrame(rows, columns=["model", "track", "seed"])
    return rows.assign(target="piano", **columns)


@pytest.fixture(scope="module")
def tracks():
    """Create scores with a NaN, and the SAR of an unprocessed mixture."""
    rows = table(BASE_SDR, references="target+residual")
    noise = np.random.default_rng(0).normal(size=(len(rows), len(METRICS)))
    rows[METRICS] = rows["model"].map(BASE_SDR).to_numpy()[:, None] + noise
    rows.loc[rows["model"] == "mixture", "SAR"] = 150.0
    rows.loc[20, "SIR"] = np.nan
    return rows


def texts(axes):
    return " ".join(text.get_text() for text in style.figure_of(axes).findobj(plt.Text))


def medians(ax):
    return [bar.lines[0].get_ydata()[0] for bar in ax.containers]


def test_show_saves_displays_and_closes(tmp_path, shown):
    noise = np.random.default_rng(0).standard_normal((1, 3 * RATE))  # does not compress
    run, signals = Run("r", Settings(), tmp_path), {str(i): noise for i in range(6)}
    figures.show(figures.spectrograms(signals, RATE), run, "six/images", "Noise <b>")
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.name for file in files] == ["six_images.png", "six_images.svg"]
    assert max(file.stat().st_size for file in files) < 400_000
    assert shown[0].alt == "Noise <b>" and "Noise &lt;b&gt;" in shown[1].data
    first = files[1].read_bytes()
    figures.save(figures.spectrograms(signals, RATE), run, "six/images")
    assert files[1].read_bytes() == first and not plt.get_fignums()
    figures.show_diagram("unet", "Model A")
    assert "<svg" in shown[2].data and "Model A" in shown[3].data


def test_live_curves_update_one_output(monkeypatch):
    updates = []
    handle = type("Handle", (), dict(update=lambda self, output: updates.append(output)))()
    monkeypatch.setattr(models, "display", lambda display_id: handle)
    with figures.live_curves("unet") as live:
        live(HISTORY)
        live(HISTORY)
    assert len(updates) == 3 and updates[-1].data == "" and not plt.get_fignums()


def test_tone_appears_at_its_frequency_and_time():
    time = np.arange(2 * RATE) / RATE
    tone = np.where(time > 1, np.sin(2 * np.pi * 1000 * time), 0)[None]
    image = data.spectrogram_db(tone, RATE, columns=100)
    row = image[:, 75].argmax()
    centre = data.LOWEST_HZ * (RATE / 2 / data.LOWEST_HZ) ** ((row + 0.5) / len(image))
    assert centre == pytest.approx(1000, rel=0.05) and image[row, 20] < image[row, 75] - 60
    assert np.isfinite(data.spectrogram_db(np.ones((2, 5000)), RATE)).all()


def test_data_figures_accept_silence_and_dollar_signs():
    stems = ("mixture", "bass", "cash$ in $hand")
    rows = pd.DataFrame(itertools.product(SPLITS, stems), columns=["split", "stem"])
    audit = rows.assign(track="t", duration_s=60.0, level_db=-np.inf, silent_share=0.1)
    assert "cash$ in $hand" in texts(figures.data_levels(audit))
    assert "–" in texts(figures.co_activity(pd.DataFrame([[1, np.nan], [0.5, 1]], list("ab"))))
    example = np.zeros((3, 1, RATE), dtype=np.float32)
    assert figures.mixing(example, example, stems, "bass", RATE).shape == (2, 2)


def test_curves_and_lines_have_the_colours_of_models(tracks):
    axes = figures.training_curves({"unet": [HISTORY, HISTORY], "demucs_lstm": [HISTORY]})
    colours = [line.get_color() for line in axes[0, 0].lines]
    assert colours == [figures.COLOURS[name] for name in ("unet", "unet", "demucs_lstm")]
    axes = figures.track_lines(tracks, compare(tracks), "piano")
    means = tracks.groupby(["model", "track"])["SDR"].mean()
    for line, a, b1 in zip(axes[0].lines, means["unet"], means["demucs_lstm"], strict=True):
        assert line.get_ydata() == pytest.approx((a, b1))
        assert line.get_color() == figures.COLOURS["unet" if a > b1 else "demucs_lstm"]


def test_score_axes_fit_the_models(tracks):
    axes = figures.scores(tracks, summarise(tracks), "piano")
    assert axes[2].get_ylim()[1] < 20 and "> 80 dB" in texts(axes)  # SAR of the mixture
    low = tracks.assign(target="drums", SDR=tracks["SDR"] - 20)
    parts = {("songs", "piano"): (tracks, summarise(tracks)), ("x", "drums"): (low, summarise(low))}
    assert [ax.get_ylim()[0] for ax in figures.overview(parts)] == [-15, -15]


def test_score_figures_accept_one_track_and_no_intervals(tracks):
    one = tracks[tracks["track"] == 2]
    summary, differences = summarise(one), compare(one)
    cost = table(MODELS, train_s=10.0, inference_rtf=0.01)
    assert "ratio-mask oracle" in texts(figures.cost(cost, summary, "piano"))
    figures.track_lines(one, differences, "piano")
    figures.scores(one, summary, "piano")
    rows = pd.DataFrame(dict(target="piano", model=["reference", "unet"], mean=50.0))
    axes = figures.opinion(rows.assign(ci_low=np.nan, ci_high=60), summary, "piano")
    x = axes[1].containers[0].lines[0].get_xdata()
    assert x == pytest.approx(one[one["model"] == "unet"]["SDR"].mean())
    assert "B2\n− B1" in texts(figures.paired(one, differences, "piano"))
    assert len(figures.trade_off(one, summary, "piano")[0].collections) == 12  # no mixture


def test_tables_are_formatted_in_reading_order(tracks):
    scores = figures.score_table(summarise(tracks), "piano")
    assert list(scores.index) == [figures.LABELS[name] for name in BASE_SDR]
    assert list(scores) == ["SDR", "SIR", "SAR", "ISR", "utterance SDR", "SI-SDR"]
    assert scores.loc["mixture", "SAR"] == "> 80 [> 80, > 80]"
    assert "[" not in figures.score_table(summarise(tracks), "piano", "mean").loc["mixture", "SDR"]
    rows = pd.DataFrame(dict(effect=[0.5, np.nan], ci_low=[-0.1, np.nan], ci_high=1.0, unit="dB"))
    names = dict(target="piano", hypothesis="h", measure="m", tracks=9, seeds=1, verdict="not run")
    effects = figures.hypothesis_table(rows.assign(**names))["effect [95 % interval]"]
    assert list(effects) == ["+0.50 [−0.10, +1.00] dB", "–"]


def test_phase_and_repetition_show_medians_over_tracks():
    rows = table(MODELS, sdr=1, sdr_true_phase=2, sdr_true_magnitude=3, band_high_hz=8000)
    rows["phase_error_rad"] = 0.1 * rows["track"]
    parts = [rows.assign(band_low_hz=0), rows.assign(band_low_hz=500)]
    axes = figures.phase(pd.concat([*parts, parts[0].assign(band_high_hz=500)]), "piano")
    assert axes[0].lines[0].get_ydata() == pytest.approx([0.35, 0.35])
    assert axes[1].lines[0].get_ydata() == pytest.approx([1, 2, 3])
    rows = table(SEQUENCE_MODELS, start_s=0.0, lag_s=1.0)
    sdr = dict(silent=0.0, different=1.0, repeat=3.0)
    parts = [rows.assign(condition=name, sdr=sdr[name] + rows["track"]) for name in sdr]
    later = pd.DataFrame(dict(target=["piano"], lag_s=[2.0], reason=["too long"]))
    axes = figures.damaged_repeat(pd.concat([*parts, later]), "piano")
    assert axes[0].lines[0].get_ydata() == pytest.approx([3.5, 4.5, 6.5])
    assert medians(axes[1]) == pytest.approx([2, 2, 1, 1])  # repetition gain, then context gain
    assert "not askable" in texts(figures.damaged_repeat(later.assign(sdr=np.nan), "piano"))


def test_bottleneck_figure_shows_gains_and_losses(tracks):
    rows = [table(SEQUENCE_MODELS, intervention="none", sdr=5.0)]
    rows += [table(SEQUENCE_MODELS, intervention=name, sdr=4.0) for name in analysis.INTERVENTIONS]
    exact = tracks.assign(SDR=tracks["model"].map(BASE_SDR))
    axes = figures.bottleneck(pd.concat(rows), exact, "piano")
    assert medians(axes[0]) == [1, 1.5] and medians(axes[1]) == [1] * 6


def test_attack_and_sustain_are_shown_on_their_own():
    rows = table(MODELS, attack_sdr=4.0, sustain_sdr=2.0)
    envelope = table(("reference", *MODELS), level=0.5, time_ms=0)
    axes = figures.attack(envelope, rows, "piano")
    assert medians(axes[1]) == [4, 2] * 4
    assert [line.get_label() for line in axes[0].lines[:5]] == ["reference", "A", "B0", "B1", "B2"]
    figures.attack(envelope[:0], rows.assign(attack_sdr=np.nan), "piano")  # no onsets


def test_models_differ_in_a_grey_print():
    colours = [plt.matplotlib.colors.to_rgb(figures.COLOURS[name]) for name in ("irm", *MODELS)]
    lightness = np.sort(np.dot(colours, (0.2126, 0.7152, 0.0722)))
    assert np.diff(lightness).min() > 0.1
    assert len({style.MARKERS[name] for name in BASE_SDR}) == len(BASE_SDR)

"""Figures: axes come back, files are complete and small, and drawings say what the model is."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mss_utils import figures
from mss_utils.config import MODELS, Run, Settings, resolve_settings
from mss_utils.evaluation.statistics import compare, summarise
from mss_utils.figures.data import mean_between
from mss_utils.models import build_model, count_parameters

RATE = 16000


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tracks():
    """A table of test scores as evaluation writes it, with a NaN, a mixture without artifacts, and two seeds."""
    rng, rows = np.random.default_rng(0), []
    for track in range(6):
        for model, base in {
            "mixture": -6,
            "unet": 3,
            "demucs_lstm": 2,
            "demucs_attention": 2.5,
            "irm": 9,
            "mwf": 10,
        }.items():
            for seed in (0, 1) if model in MODELS else (0,):
                scores = {
                    metric: base + rng.normal()
                    for metric in ("SDR", "ISR", "SIR", "SAR", "utterance_SDR", "SI_SDR")
                }
                scores |= {"SAR": 150.0} if model == "mixture" else {}
                rows.append(
                    dict(
                        references="target+residual",
                        target="piano",
                        track=f"t{track}",
                        model=model,
                        seed=seed,
                    )
                    | scores
                )
    rows[1]["SIR"] = np.nan
    return pd.DataFrame(rows)


def texts(axes):
    """Every word in a figure, on one line."""
    return " ".join(
        text.get_text().replace("\n", " ") for text in np.ravel(axes)[0].figure.findobj(plt.Text)
    )


def test_a_figure_is_saved_twice_small_and_without_leftovers(tmp_path):
    run = Run("r", Settings(), tmp_path)
    noise = np.random.default_rng(0).standard_normal((1, 3 * RATE))
    axes = figures.spectrograms(
        {str(i): noise for i in range(6)}, RATE
    )  # the worst case: noise does not compress
    path = figures.save(axes[0, 0].figure, run, "six/pictures")
    assert axes.shape == (2, 3)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "six_pictures.png",
        "six_pictures.svg",
    ]
    assert max(file.stat().st_size for file in path.parent.iterdir()) < 400_000


def test_the_same_figure_is_the_same_file(tmp_path):
    run = Run("r", Settings(), tmp_path)
    draw = lambda: (
        figures.save(figures.curriculum(Settings(), 5).figure, run, "x")
        .with_suffix(".svg")
        .read_bytes()
    )
    assert draw() == draw()


def test_a_tone_appears_at_its_frequency_and_time():
    time = np.arange(2 * RATE) / RATE
    tone = np.where(time > 1, np.sin(2 * np.pi * 1000 * time), 0)[None]
    image = figures.spectrogram_db(tone, RATE, columns=100, rows=64)
    row = image[:, 75].argmax()
    centre = figures.LOWEST_HZ * (RATE / 2 / figures.LOWEST_HZ) ** ((row + 0.5) / 64)
    assert image.shape == (64, 100) and centre == pytest.approx(1000, rel=0.05)
    assert image[row, 20] < image[row, 75] - 60


@pytest.mark.parametrize("samples", [1, 100, 5000])
def test_a_very_short_signal_still_has_a_picture(samples):
    assert np.isfinite(figures.spectrogram_db(np.ones((2, samples)), RATE)).all()


def test_means_between_edges_keep_the_sum():
    values = np.random.default_rng(0).random((50, 3))
    edges = np.linspace(0, 50, 8)
    means = mean_between(values, edges)
    assert (means * np.diff(edges)[:, None]).sum(axis=0) == pytest.approx(values.sum(axis=0))


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_is_read_from_the_model(name):
    settings = resolve_settings("smoke", overrides="unet_channels=3 demucs_channels=6")
    model = build_model(name, settings)
    said = texts(figures.architecture(model.train(), settings))
    assert f"{count_parameters(model):,} parameters" in said
    assert ("3 channels" if name == "unet" else "6 channels") in said
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_given_axes_are_drawn_on():
    _, axes = plt.subplots(1, 2)
    assert figures.curriculum(Settings(), 5, axes[0]) is axes[0]
    assert figures.pipeline(axes[1]) is axes[1]


def test_the_curriculum_can_be_off():
    assert "5 sources" in texts(figures.curriculum(Settings(curriculum=False), 5))


def test_data_figures():
    rows = [
        dict(
            track=f"t{i}",
            split=split,
            stem=stem,
            duration_s=60.0,
            level_db=-20.0 if i else -np.inf,
            silent_share=0.1,
        )
        for i, split in enumerate(("train", "valid", "test"))
        for stem in ("mixture", "bass", "cash$ in $hand")
    ]
    assert len(figures.data_levels(pd.DataFrame(rows))) == 3
    example = np.random.default_rng(0).standard_normal((3, 1, RATE)).astype(np.float32)
    assert figures.mixing(example, example, ("a", "b", "c"), "b", RATE).shape == (2, 2)


def test_training_curves_use_one_colour_a_model():
    log = pd.DataFrame(
        dict(
            step=[10, 20],
            train_loss_db=[1.0, -2.0],
            valid_sdr_db=[0.0, 2.0],
            train_s=[400.0, 800.0],
        )
    )
    axes = figures.training_curves({"unet": [log, log], "demucs_lstm": [log]})
    assert [line.get_color() for line in axes[0, 0].lines] == [
        figures.COLOURS[name] for name in ("unet", "unet", "demucs_lstm")
    ]
    assert "min" in axes[1, 1].get_xlabel()


def test_score_figures(tracks):
    summary, pairs = summarise(tracks), compare(tracks)
    axes = figures.scores(tracks, summary, "piano")
    assert axes[2].get_ylim()[1] < 100 and "> 80 dB" in texts(axes), (
        "the mixture's SAR must not squash the rest"
    )
    labels = figures.paired(tracks, pairs, "piano")[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["B1 − A", "B2 − A", "B2 − B1"]
    cost = pd.DataFrame(
        [
            dict(
                target="piano", model=name, seed=0, parameters=1e6, train_s=10.0, inference_rtf=0.01
            )
            for name in MODELS
        ]
    )
    axes = figures.cost(cost, summary, "piano")
    assert "mixture" in texts(axes) and "ratio-mask oracle" in texts(axes)


def test_the_overview_has_an_axis_a_part_and_one_scale(tracks, tmp_path):
    """Every mark lies inside but for those below what is shown; the mixture's impossible SAR plays no part."""
    summary = summarise(tracks)
    low = tracks.assign(target="drums", SDR=tracks["SDR"] - 20)
    axes = figures.overview(
        {("excerpts", "piano"): (tracks, summary), ("songs", "drums"): (low, summarise(low))}
    )
    assert [ax.get_title() for ax in axes] == [
        "piano\nexcerpts",
        "drums\nsongs",
    ] and "U-Net" in texts(axes)
    bottom, top = axes[0].get_ylim()
    assert (
        axes[1].get_ylim() == (bottom, top)
        and bottom == -16
        and tracks["SDR"].max() < top < tracks["SDR"].max() + 3
    )
    figures.save_vector(axes, Run("r", Settings(), tmp_path), "overview")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == [
        "overview.svg"
    ] and not plt.get_fignums()


def test_a_slope_joins_the_scores_of_a_track_in_the_colour_of_the_better_model(tracks):
    axes = figures.track_lines(tracks, compare(tracks), "piano")
    means = tracks.groupby(["model", "track"])["SDR"].mean()
    for line, track in zip(axes[0].lines, sorted(tracks["track"].unique())):
        a, b1 = means["unet"][track], means["demucs_lstm"][track]
        assert line.get_ydata() == pytest.approx((a, b1))
        assert line.get_color() == figures.COLOURS["unet" if a > b1 else "demucs_lstm"]
    assert len(axes[0].lines) == 6 and "ahead on" in axes[0].get_title()


def test_the_trade_off_shows_every_track_but_no_mixture(tracks):
    axes = figures.trade_off(tracks, summarise(tracks), "piano")
    dots = [len(dots.get_offsets()) for dots in axes[0].collections]
    assert dots == [6] * 5 + [1] * 5 and axes[1].get_xlabel() == "SAR (dB)"


def test_opinion_stands_beside_the_scores_of_the_same_version(tracks):
    rows = [
        ("reference", 98.0, 95.0, 101.0),
        ("anchor", 5.0, np.nan, np.nan),
        *((name, 50.0, 40.0, 60.0) for name in MODELS),
    ]
    table = pd.DataFrame(
        [("piano", *row) for row in rows], columns=["target", "model", "mean", "ci_low", "ci_high"]
    )
    axes = figures.opinion(table, summarise(tracks), "piano")
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [
        figures.LABELS[name] for name, *_ in reversed(rows)
    ]
    assert len(axes[0].containers) == 5 and len(axes[1].containers) == 3, (
        "reference and anchor have no score"
    )


def test_scores_are_written_with_no_digits_of_noise():
    assert [figures.format_number(value) for value in (-1.234, 79.999, 80.01, np.inf)] == [
        "−1.23",
        "80.00",
        "> 80",
        "> 80",
    ]
    assert figures.format_number(0.5, 1, "+") == "+0.5" and figures.format_db(-3.0) == "−3.0 dB"


def test_figures_survive_a_table_without_intervals(tracks):
    one = tracks[tracks["track"] == "t2"]
    figures.track_lines(one, compare(one), "piano")
    figures.trade_off(one, summarise(one), "piano")
    figures.scores(one, summarise(one), "piano")
    figures.paired(one, compare(one), "piano")


def test_score_table_is_in_reading_order(tracks):
    table = figures.score_table(summarise(tracks), "piano")
    assert list(table.index) == [
        figures.LABELS[name] for name in ("mixture", *MODELS, "irm", "mwf")
    ]
    assert (
        list(table.columns) == ["SDR", "SIR", "SAR", "ISR", "utterance SDR", "SI-SDR"]
        and "[" in table.iloc[0, 0]
    )
    assert table.loc["mixture", "SAR"] == "> 80 [> 80, > 80]"
    means = figures.score_table(summarise(tracks), "piano", "mean")
    expected = tracks.query("model == 'unet'").groupby("track")["SDR"].mean().mean()
    assert means.loc[figures.LABELS["unet"], "SDR"] == f"{expected:.2f}"


def test_colours_differ_in_lightness():
    lightness = [
        np.dot(plt.matplotlib.colors.to_rgb(figures.COLOURS[name]), (0.2126, 0.7152, 0.0722))
        for name in ("irm", *MODELS)
    ]
    assert np.diff(lightness).min() > 0.1, (
        "readable on a grey print: oracle, A, B1, B2 from dark to light"
    )
    assert len(set(figures.MARKERS.values())) == len(figures.MARKERS)

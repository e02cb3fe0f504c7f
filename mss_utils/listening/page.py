"""`listening.html`: all excerpts and demonstrations of a run in one file, with the blind test."""

import json
from collections.abc import Iterator, Mapping
from html import escape

import numpy as np
import pandas as pd
from scipy.signal import resample_poly

from mss_utils import analysis
from mss_utils.config import COMPARED_MODELS, SEQUENCE_MODELS, Run
from mss_utils.data import Store
from mss_utils.evaluation.statistics import pivot_by_seed
from mss_utils.figures import LABELS, SHORT_LABELS, SHOWN_METRICS
from mss_utils.listening.blind_test import (
    ANCHOR,
    RATED,
    VERSION_LETTERS,
    low_anchor,
    weights_digest,
)
from mss_utils.listening.excerpts import Excerpt, find_track, read_versions, unscored_excerpt
from mss_utils.listening.player import (
    WEB,
    Scores,
    Versions,
    audio_html,
    document,
    fill,
    player_html,
)
from mss_utils.models import load_model
from mss_utils.models.unet import STFT
from mss_utils.separation import separate

EQUAL_DB = 0.2  # SDRs this close count as equal
ATTACKS_S = 3.0
LOOP_HEADINGS = ("its repeat around it", "other music around it", "silence around it")

Excerpts = Mapping[str, Mapping[str, Excerpt]]  # target -> rule -> excerpt
Players = Iterator[tuple[str, str, Versions]]  # heading, lead, versions; none without measurements


def listening_page(
    run: Run, store: Store, tracks: pd.DataFrame, excerpts: Excerpts, name: str
) -> str:
    """Return the text of `listening.html`.

    `tracks` is the table tracks.csv. `name` is the run that answers to the blind test name; an
    export has another name than `run`. Estimates are read; models run on loops only.
    """
    rate, sections, tested = store.sample_rate, "", []
    for target, by_rule in excerpts.items():
        html = ""
        for excerpt in {excerpt.track: excerpt for excerpt in by_rule.values()}.values():
            track, figure = excerpt.track, f"excerpt-{len(tested)}"
            rules = ", ".join(rule for rule, other in by_rule.items() if other.track == track)
            lead = f"{rules}; from {excerpt.start_s:.1f} s of the track"
            player = player_html(track, excerpt.versions, rate, excerpt.scores, lead)
            anchor = audio_html(low_anchor(excerpt.versions["mixture"], rate), rate, ANCHOR)
            html += fill("excerpt.html", figure=figure, player=player, name=ANCHOR, anchor=anchor)
            tested.append(dict(figure=figure, track=track, target=target, versions=RATED))
        values = dict(target=escape(target), excerpts=html, pair=_pair(run, store, target, tracks))
        sections += fill("target.html", **values, **_demonstrations(run, store, target))
    test = dict(run=name, models=weights_digest(run) if name == run.name else None)
    test |= dict(pages=tested, names=LABELS, letters=VERSION_LETTERS)
    body = fill(
        "page.html",
        targets=escape(" and ".join(excerpts)),
        run=escape(name),
        keys=fill("keys.html"),
        sections=sections,
        excerpts=f"{len(tested)} excerpt{'s' * (len(tested) != 1)}",
        n=len(RATED),
        licence=escape((WEB / "vendor" / "LICENSE").read_text(encoding="utf-8")),
        test=json.dumps(test).replace("<", r"\u003c"),  # no name can end the script
    )
    return document(body, f"Listening: {name}", blind_test=True)


def _pair(run: Run, store: Store, target: str, tracks: pd.DataFrame) -> str:
    """Return a player of two models with equal SDR that sound different."""
    name, scores = equal_score_pair(tracks, target)
    if not scores:
        return f"<p>No two models are within {EQUAL_DB:g} dB of SDR on any test track.</p>"
    versions = unscored_excerpt(run, store, target, name).versions
    versions = {version: versions[version] for version in ("mixture", "reference", *scores)}
    first, second = (SHORT_LABELS[model] for model in scores)
    player = player_html(name, versions, store.sample_rate, scores)
    return fill("pair.html", first=first, second=second, equal_db=f"{EQUAL_DB:g}", player=player)


def equal_score_pair(tracks: pd.DataFrame, target: str) -> tuple[str, Scores]:
    """Find a test track and two models with equal SDR that sound different, and their scores.

    Of all pairs within `EQUAL_DB` (first seed) it is the one whose SIR minus SAR differs most. See
    Manilow, Seetharaman, Salamon, "Open Source Tools & Data for Music Source Separation", 2020.
    """
    rows = tracks[tracks["target"].eq(target) & tracks["seed"].eq(0)]
    rows = rows[rows["model"].isin(COMPARED_MODELS)]
    pairs = rows.merge(rows, on="track", suffixes=("_a", "_b"))
    pairs = pairs[(pairs["SDR_a"] - pairs["SDR_b"]).abs() <= EQUAL_DB]
    contrast = (pairs["SIR_a"] - pairs["SAR_a"]) - (pairs["SIR_b"] - pairs["SAR_b"])
    contrast = contrast[np.isfinite(contrast)]
    if contrast.empty or contrast.max() == 0:  # a model and itself
        return "", {}
    track, *models = pairs.loc[contrast.idxmax(), ["track", "model_a", "model_b"]]
    rows = rows[rows["track"] == track].set_index("model")
    return track, rows.loc[models, list(SHOWN_METRICS)].to_dict("index")


def _demonstrations(run: Run, store: Store, target: str) -> dict[str, str]:
    """Return the players of the three questions by placeholder in `target.html`."""
    parts = {
        "phase": (_phase_swap, "phase", "Model A has no estimate to improve."),
        "repeat": (_damaged_repeat, "repetition", "Not askable: see notebook 05."),
        "attack": (_attacks, "attack", "No isolated onset in this run."),
    }
    html = {}
    for key, (demonstrate, table, missing) in parts.items():
        rows, players = pd.read_csv(run.table(table)), ""
        rows = rows[rows["target"] == target]
        for heading, lead, versions in demonstrate(run, store, target, rows):
            players += player_html(heading, versions, store.sample_rate, lead=lead)
        html[key] = players or f"<p>{missing}</p>"
    return html


def _best_track(values: pd.Series) -> str:
    """Return the index of the largest finite value, "" if there is none."""
    finite = values[np.isfinite(values.astype(float))]
    return "" if finite.empty else str(finite.idxmax())


def _phase_swap(run: Run, store: Store, target: str, phase: pd.DataFrame) -> Players:
    """Swap magnitude and phase with the truth where A's SDR gains most from the true phase."""
    rows = analysis.whole_band_rows(phase).query("model == 'unet'")
    name = _best_track((rows["sdr_true_phase"] - rows["sdr"]).groupby(rows["track"]).mean())
    if not name:
        return
    versions = unscored_excerpt(run, store, target, name).versions
    reference, stft = versions["reference"], STFT(run.settings.n_fft, run.settings.hop)
    swap = analysis.combine_magnitude_phase
    for model in COMPARED_MODELS:
        yield (
            LABELS[model],
            name,
            {
                "reference": reference,
                "as it is": versions[model],
                "its magnitude, true phase": swap(versions[model], reference, stft),
                "true magnitude, its phase": swap(reference, versions[model], stft),
            },
        )


def _damaged_repeat(run: Run, store: Store, target: str, repetition: pd.DataFrame) -> Players:
    """Separate a loop where the repetition gains of B1 and B2 differ most, at the shortest lag.

    Loops are not in the estimates; as in the analysis a loop is one chunk.
    """
    rows = repetition.dropna(subset="sdr")
    lag_s = rows["lag_s"].min()
    b1, b2 = (analysis.repetition_gains(rows, model, lag_s)[0] for model in SEQUENCE_MODELS)
    track = _best_track((b2.mean(axis=1) - b1.mean(axis=1)).abs())
    if not track:
        return
    loops = analysis.find_loops(run, store, target, lag_s)
    name, start_s = next(key for key in loops if key[0] == track)
    networks = {model: load_model(run.model_folder(target, model)) for model in SEQUENCE_MODELS}
    for condition, heading in zip(analysis.CONDITIONS, LOOP_HEADINGS, strict=True):
        mixture, reference, _ = loops[name, start_s][condition]
        versions = {"mixture": mixture, "reference": reference}
        for model, network in networks.items():
            versions[model] = separate(network, mixture, store.sample_rate)
        yield heading, f"{name}, from {start_s:.1f} s", versions


def _attacks(run: Run, store: Store, target: str, attack: pd.DataFrame) -> Players:
    """Cut many attacks, at full and half speed, where A's attack is worst compared with B1's."""
    rows = attack.assign(difference=attack["attack_sdr"] - attack["sustain_sdr"])
    b1, a = (pivot_by_seed(rows, model, "difference") for model in ("demucs_lstm", "unet"))
    name = _best_track((b1 - a).mean(axis=1))
    if not name:
        return
    track, rate = find_track(store, name), store.sample_rate
    onsets_s = analysis.find_onsets(store, track, target)
    onsets = analysis.isolated_onsets(onsets_s, rate, track.samples)
    length = round(ATTACKS_S * rate)
    counts = [((onsets >= first) & (onsets < first + length)).sum() for first in onsets]
    start = max(0, onsets[np.argmax(counts)] - rate // 10)
    versions = read_versions(run, store, target, name)
    keys = ("reference", *COMPARED_MODELS)
    versions = {key: versions[key][:, start : start + length] for key in keys}
    lead = f"{name}, from {start / rate:.1f} s"
    yield "as it is", lead, versions
    slow = {key: resample_poly(audio, 2, 1, axis=1) for key, audio in versions.items()}
    yield "at half speed", lead, slow

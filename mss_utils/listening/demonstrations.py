"""What of the three questions can be heard: versions of one track each, chosen by a rule from the tables of the analysis.

Each function returns what is heard, in words, and `{heading: {version: (channels, samples)}}`, empty where there is nothing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torchaudio

from mss_utils.analysis import (
    CONDITIONS,
    attack,
    combine_magnitude_phase,
    find_loops,
    find_onsets,
    pivot_by_seed,
    repetition_gains,
    whole_band_rows,
)
from mss_utils.config import MODELS, WAVEFORM_MODELS, Run
from mss_utils.data import Store
from mss_utils.figures import LABELS
from mss_utils.listening.excerpts import track_excerpt, track_named, track_versions
from mss_utils.models.unet import STFT
from mss_utils.separation import separate, trained_model

ATTACKS_S = 3.0

Heard = tuple[str, dict[str, dict[str, np.ndarray]]]


def phase_versions(run: Run, store: Store, target: str, phase: pd.DataFrame) -> Heard:
    """For each model an excerpt as it is, with the true phase, and with the true magnitude, beside the reference.

    Rule: the test track on which A's whole-band SDR gains most from the true phase.
    """
    rows = whole_band_rows(phase)
    rows = rows[(rows["target"] == target) & (rows["model"] == "unet")]
    cost = (
        (rows["sdr_true_phase"] - rows["sdr"])
        .groupby(rows["track"])
        .mean()
        .replace([np.inf, -np.inf], np.nan)
        .dropna()
    )
    if cost.empty:
        return "no track", {}
    name = cost.idxmax()
    excerpt = track_excerpt(run, store, target, track_named(store, name), ("reference", *MODELS))
    reference, stft = excerpt.versions["reference"], STFT(run.settings.n_fft, run.settings.hop)
    versions = {}
    for model in MODELS:
        estimate = excerpt.versions[model]
        versions[LABELS[model]] = {
            "reference": reference,
            "as it is": estimate,
            "its magnitude, true phase": combine_magnitude_phase(estimate, reference, stft),
            "true magnitude, its phase": combine_magnitude_phase(reference, estimate, stft),
        }
    return name, versions


def repeat_versions(run: Run, store: Store, target: str, long_range: pd.DataFrame) -> Heard:
    """One loop of the damaged repeat under each condition: mixture, reference, B1 and B2; empty where no lag was askable.

    Rule: at the shortest lag, on the track where the repetition gains of B1 and B2 differ most, its first loop.
    """
    rows = long_range[
        (long_range["target"] == target) & (long_range["probe"] == "damaged_repeat")
    ].dropna(subset="value")
    if rows.empty:
        return "no loop", {}
    lag_s = rows["lag_s"].min()
    b1, b2 = (repetition_gains(rows, model, lag_s)[0].mean(axis=1) for model in WAVEFORM_MODELS)
    track = (b2 - b1).abs().idxmax()
    name, loop = next(
        (name, loop)
        for name, loop in find_loops(run, store, target, lag_s).items()
        if name.startswith(f"{track} @ ")
    )
    around = dict(
        zip(CONDITIONS, ("its repeat around it", "other music around it", "silence around it"))
    )
    return name, {
        around[condition]: _loop_versions(run, store, target, *loop[condition][:2])
        for condition in CONDITIONS
    }


def _loop_versions(
    run: Run, store: Store, target: str, mixture: np.ndarray, reference: np.ndarray
) -> dict[str, np.ndarray]:
    """What is heard of one condition; the model meets the loop as one chunk, as when it was measured."""
    found = {
        model: separate(trained_model(run, target, model), mixture, store.sample_rate)
        for model in WAVEFORM_MODELS
    }
    return {"mixture": mixture, "reference": reference} | found


def attack_versions(run: Run, store: Store, target: str, table: pd.DataFrame) -> Heard:
    """Three seconds of attacks in the reference and the three models, at full and at half speed; empty where no track has an onset.

    Rule: the track on which B1's SDR in attacks minus that in sustains is furthest above A's; in it, the stretch with most isolated onsets.
    """
    rows = table[table["target"] == target].assign(
        kept=lambda rows: rows["attack_sdr"] - rows["sustain_sdr"]
    )
    ahead = (
        (pivot_by_seed(rows, "demucs_lstm", "kept") - pivot_by_seed(rows, "unet", "kept"))
        .mean(axis=1)
        .replace([np.inf, -np.inf], np.nan)
        .dropna()
    )
    if ahead.empty:
        return "no track", {}
    track = track_named(store, ahead.idxmax())
    versions = track_versions(run, store, track, target, ("reference", *MODELS))
    at = attack.isolated(find_onsets(store, track, target), store.sample_rate, track.samples)
    length = round(ATTACKS_S * store.sample_rate)
    start = max(
        0,
        max(at, key=lambda first: ((at >= first) & (at < first + length)).sum())
        - store.sample_rate // 10,
    )
    heard = {name: audio[:, start : start + length] for name, audio in versions.items()}
    slow = {
        name: torchaudio.functional.resample(torch.from_numpy(audio), 1, 2).numpy()
        for name, audio in heard.items()
    }
    return f"{track.name}, from {start / store.sample_rate:.1f} s", {
        "as it is": heard,
        "at half speed": slow,
    }

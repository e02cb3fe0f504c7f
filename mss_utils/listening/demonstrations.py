"""Sounds for the three questions, chosen by a rule from the tables of the analysis."""

import numpy as np
import pandas as pd
import torch
import torchaudio

from mss_utils import analysis
from mss_utils.config import MODELS, WAVEFORM_MODELS, Run
from mss_utils.data import Store
from mss_utils.evaluation.statistics import pivot_by_seed
from mss_utils.figures import LABELS
from mss_utils.listening.excerpts import find_track, read_versions, track_excerpt
from mss_utils.models import load_model
from mss_utils.models.unet import STFT
from mss_utils.separation import separate

ATTACKS_S = 3.0
LOOP_HEADINGS = ("its repeat around it", "other music around it", "silence around it")

# Track, and {heading: {version: (channels, samples)}}, which is empty where nothing was measured.
Demonstration = tuple[str, dict[str, dict[str, np.ndarray]]]


def _best_track(values: pd.Series) -> str | None:
    """Return the index of the largest finite value."""
    finite = values[np.isfinite(values.astype(float))]
    return None if finite.empty else str(finite.idxmax())


def phase_swap(run: Run, store: Store, target: str, phase: pd.DataFrame) -> Demonstration:
    """Give each model's magnitude the true phase, and the true magnitude each model's phase.

    Rule: the test track on which A's whole-band SDR gains most from the true phase.
    """
    rows = analysis.whole_band_rows(phase)
    rows = rows[(rows["target"] == target) & (rows["model"] == "unet")]
    gains = (rows["sdr_true_phase"] - rows["sdr"]).groupby(rows["track"]).mean()
    name = _best_track(gains)
    if name is None:
        return "", {}
    versions = track_excerpt(run, store, target, name).versions
    reference, stft = versions["reference"], STFT(run.settings.n_fft, run.settings.hop)
    swap, columns = analysis.combine_magnitude_phase, {}
    for model in MODELS:
        columns[LABELS[model]] = {
            "reference": reference,
            "as it is": versions[model],
            "its magnitude, true phase": swap(versions[model], reference, stft),
            "true magnitude, its phase": swap(reference, versions[model], stft),
        }
    return name, columns


def damaged_repeat(run: Run, store: Store, target: str, repetition: pd.DataFrame) -> Demonstration:
    """Separate one loop of the damaged repeat under each condition with B1 and B2.

    Rule: at the shortest lag, on the track where the repetition gains of B1 and B2 differ most, its
    first loop. Loops are not in the estimates; as in the analysis a loop is one chunk.
    """
    rows = repetition[repetition["target"] == target].dropna(subset="sdr")
    lag_s = rows["lag_s"].min()
    gains = [analysis.repetition_gains(rows, model, lag_s)[0] for model in WAVEFORM_MODELS]
    track = _best_track((gains[1].mean(axis=1) - gains[0].mean(axis=1)).abs())
    if track is None:
        return "", {}
    loops = analysis.find_loops(run, store, target, lag_s)
    name, start_s = next(key for key in loops if key[0] == track)
    columns = {}
    networks = {model: load_model(run.model_folder(target, model)) for model in WAVEFORM_MODELS}
    for condition, heading in zip(analysis.CONDITIONS, LOOP_HEADINGS, strict=True):
        mixture, reference, _ = loops[name, start_s][condition]
        columns[heading] = {"mixture": mixture, "reference": reference}
        for model, network in networks.items():
            columns[heading][model] = separate(network, mixture, store.sample_rate)
    return f"{name}, from {start_s:.1f} s", columns


def attacks(run: Run, store: Store, target: str, attack: pd.DataFrame) -> Demonstration:
    """Cut three seconds with many attacks, at full and at half speed.

    Rule: the track on which B1's attack SDR minus sustain SDR is furthest above A's, where most
    isolated onsets are.
    """
    rows = attack[attack["target"] == target]
    rows = rows.assign(difference=rows["attack_sdr"] - rows["sustain_sdr"])
    b1, a = (pivot_by_seed(rows, model, "difference") for model in ("demucs_lstm", "unet"))
    name = _best_track((b1 - a).mean(axis=1))
    if name is None:
        return "", {}
    track, rate = find_track(store, name), store.sample_rate
    onsets = analysis.find_onsets(store, track, target)
    onsets = analysis.isolated_onsets(onsets, rate, track.samples)
    length = round(ATTACKS_S * rate)
    counts = [((onsets >= first) & (onsets < first + length)).sum() for first in onsets]
    start = max(0, onsets[np.argmax(counts)] - rate // 10)
    versions, slow = {}, {}
    for version, audio in read_versions(run, store, target, name).items():
        if version in ("reference", *MODELS):
            versions[version] = audio[:, start : start + length]
            signal = torch.from_numpy(versions[version])
            slow[version] = torchaudio.functional.resample(signal, 1, 2).numpy()
    return f"{name}, from {start / rate:.1f} s", {"as it is": versions, "at half speed": slow}

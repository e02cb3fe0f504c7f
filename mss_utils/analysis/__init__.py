"""The three questions as measurements: phase (phase.py), repetition (repetition.py), attack (transients.py), and verdicts.

    trained models, test tracks --> phase, transients, long_range, data_amount --> hypotheses

Taught in notebook 05, heard in notebook 06. Every measure is taken on the test tracks; nothing is chosen by it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from mss_utils.analysis import attack, repetition
from mss_utils.analysis.hypotheses import (
    format_hypothesis,
    hypotheses,
    pivot_by_seed,
    repetition_gains,
    slopes,
    whole_band_rows,
)
from mss_utils.analysis.onsets import beat_and_bar_s, find_onsets
from mss_utils.analysis.phase import combine_magnitude_phase, phase_scores
from mss_utils.analysis.repetition import (
    CONDITIONS,
    askable,
    damaged_repeat,
    lags_s,
    loop_starts,
    spread,
)
from mss_utils.analysis.studies import score_variants
from mss_utils.config import MODELS, WAVEFORM_MODELS, Run
from mss_utils.data import Store, Track, loudest_start
from mss_utils.files import write_text
from mss_utils.models.unet import STFT
from mss_utils.separation import read_all_estimates, trained_model

__all__ = [
    "CONDITIONS",
    "TABLES",
    "analyse",
    "repetition_gains",
    "hypotheses",
    "find_loops",
    "find_onsets",
    "format_hypothesis",
    "slopes",
    "attack",
    "whole_band_rows",
    "pivot_by_seed",
    "combine_magnitude_phase",
]

TABLES = ("phase", "transients", "envelopes", "long_range", "data_amount", "hypotheses")
COLUMNS = dict(
    phase=[
        "target",
        "track",
        "model",
        "seed",
        "band_low_hz",
        "band_high_hz",
        "phase_error_rad",
        "sdr",
        "sdr_true_phase",
        "sdr_true_magnitude",
        "interchannel_error_rad",
        "reason",
    ],
    transients=[
        "target",
        "track",
        "model",
        "seed",
        "n_onsets",
        "attack_sdr",
        "sustain_sdr",
        "pre_echo_db",
        "attack_time_error_ms",
        "peak_error_db",
        "reason",
    ],
    envelopes=["target", "model", "seed", "time_ms", "level", "tracks"],
    long_range=[
        "target",
        "probe",
        "item",
        "model",
        "seed",
        "lag_s",
        "condition",
        "value",
        "unit",
        "reason",
    ],
    data_amount=["target", "track", "model", "seed", "share", "SDR"],
)
N_LOOPS = 40  # at least so many, the same number a track
N_REACH_TRACKS = 20
WINDOWS_AT_ONCE = 8
DATA_SHARES = (0.1, 0.3)  # and all of it, which is the run itself


def analyse(run: Run, store: Store, tracks: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Take all measurements, write each of `TABLES` as `tables/<name>.csv` and return them by name.

    `tracks` is the table of that name from the evaluation. With the setting `data_study`, models are trained for it first.
    What cannot be measured has a row without numbers whose `reason` says why.
    """
    tables = _by_track(run, store)
    tables["long_range"] = _table("long_range", long_range(run, store))
    tables["data_amount"] = data_amount(run, store, tracks)
    tables["hypotheses"] = hypotheses(run.settings, tables | dict(tracks=tracks))
    for name in TABLES:
        write_text(run.table(name), tables[name].to_csv(index=False))
    return tables


def _table(name: str, rows: Iterable[dict]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=COLUMNS[name])


# --- phase and attack: every estimate of every track --------------------------------------------------------------------


def _by_track(run: Run, store: Store) -> dict[str, pd.DataFrame]:
    """The tables phase, transients and envelopes."""
    stft = STFT(run.settings.n_fft, run.settings.hop)
    rows: dict[str, list] = dict(phase=[], transients=[], envelopes=[])
    for track in tqdm(store.split("test"), desc="Analysis", unit="track"):
        _, stems = store.load(track)
        found = read_all_estimates(run, store, track)
        for index, target in enumerate(store.targets(run.settings.target)):
            reference, times = stems[store.stem_index(target)], find_onsets(store, track, target)
            estimates = {key: estimate[index] for key, estimate in found.items()}
            for (model, seed), estimate in estimates.items():
                key = dict(target=target, track=track.name, model=model, seed=seed)
                rows["phase"] += [
                    key | row for row in phase_scores(reference, estimate, store.sample_rate, stft)
                ]
                rows["transients"].append(
                    key | attack.transient_scores(reference, estimate, times, store.sample_rate)
                )
            rows["envelopes"] += _envelopes(target, reference, estimates, times, store.sample_rate)
    tables = {name: _table(name, found) for name, found in rows.items()}
    return tables | dict(envelopes=_mean_envelopes(tables["envelopes"]))


def _envelopes(
    target: str, reference: np.ndarray, estimates: dict, times: np.ndarray, sample_rate: int
) -> Iterator[dict]:
    """The mean envelope around the onsets of one track, of each estimate and of the reference, whose peaks are 1."""
    curves, seconds = attack.envelopes(reference, times, sample_rate)
    sounding = curves.max(axis=1, initial=0) > 0
    if not sounding.any():
        return
    peaks = curves[sounding].max(axis=1, keepdims=True)
    for (model, seed), estimate in {("reference", 0): reference, **estimates}.items():
        levels = (attack.envelopes(estimate, times, sample_rate)[0][sounding] / peaks).mean(axis=0)
        for second, level in zip(seconds, levels):
            yield dict(
                target=target,
                model=model,
                seed=seed,
                time_ms=round(1000 * second),
                level=level,
                tracks=1,
            )


def _mean_envelopes(rows: pd.DataFrame) -> pd.DataFrame:
    """Averaged over tracks."""
    groups = rows.groupby(["target", "model", "seed", "time_ms"], sort=False)
    return groups.agg(level=("level", "mean"), tracks=("tracks", "sum")).reset_index()[
        COLUMNS["envelopes"]
    ]


# --- repetition ---------------------------------------------------------------------------------------------------------


def long_range(run: Run, store: Store) -> Iterator[dict]:
    """Rows of the table `long_range`: what each probe found, see repetition.py."""
    for target in store.targets(run.settings.target):
        for probe in (_tempo, _reach, _attention, _damaged_repeat):
            for row in tqdm(
                probe(run, store, target),
                desc=f"{probe.__name__[1:].replace('_', ' ')}, {target}",
                unit="row",
            ):
                yield dict(target=target) | row


def _tempo(_run: Run, store: Store, target: str) -> Iterator[dict]:
    """Length of beat and bar of every track, and how much the target repeats itself at the bar."""
    for track in store.split("test"):
        beat_s, bar_s = beat_and_bar_s(store, track)
        yield dict(probe="tempo", item=track.name, condition="beat", value=beat_s, unit="s")
        yield dict(probe="tempo", item=track.name, condition="bar", value=bar_s, unit="s")
        _, stems = store.load(track)
        index = repetition.repetitiveness(stems[store.stem_index(target)], store.sample_rate, bar_s)
        reason = "" if np.isfinite(index) else "no beat, no onset, or shorter than two bars"
        yield dict(
            probe="repetitiveness",
            item=track.name,
            lag_s=bar_s,
            value=index,
            unit="correlation",
            reason=reason,
        )


def _reach(run: Run, store: Store, target: str) -> Iterator[dict]:
    """Radii of every model on every track, and the mean profile of each model."""
    block = math.prod(run.settings.demucs_strides)
    block_s = block / store.sample_rate
    windows = {
        track.name: _loudest_window(run, store, track, target)
        for track in store.split("test")[:N_REACH_TRACKS]
    }
    for model, seed in itertools.product(MODELS, range(run.settings.seeds)):
        key, profiles = dict(model=model, seed=seed), []
        for name, window in windows.items():
            profiles.append(
                repetition.reach_profile(trained_model(run, target, model, seed), window, block)
            )
            for share in repetition.SHARES:
                radius = repetition.radius_s(profiles[-1], share, block_s)
                yield key | dict(
                    probe="reach", item=name, condition=f"{100 * share:g} %", value=radius, unit="s"
                )
            far = profiles[-1][math.ceil(repetition.FAR_S / block_s) :].sum()
            yield key | dict(
                probe="reach",
                item=name,
                condition=f"beyond {repetition.FAR_S:g} s",
                value=far,
                unit="share",
            )
        mean = _mean_of(profiles, beyond=0)
        for share in repetition.SHARES:
            radius = repetition.radius_s(mean, share, block_s)
            yield key | dict(
                probe="reach",
                item="all tracks",
                condition=f"{100 * share:g} %",
                value=radius,
                unit="s",
            )
        for index, value in enumerate(mean):
            yield key | dict(
                probe="reach_profile",
                item="all tracks",
                lag_s=(index + 1) * block_s,
                value=value,
                unit="share",
            )


def _loudest_window(run: Run, store: Store, track: Track, target: str) -> np.ndarray:
    """The training segment of the mixture, or the whole of a shorter track, in which the target is loudest."""
    mixture, stems = store.load(track)
    start = loudest_start(stems[store.stem_index(target)], run.settings.segment)
    return mixture[:, start : start + run.settings.segment]


def _mean_of(profiles: list[np.ndarray], beyond: float = np.nan) -> np.ndarray:
    """Mean of profiles that may differ in length; what is beyond the end of one counts as `beyond`, NaN: it does not count."""
    return pd.concat(list(map(pd.Series, profiles)), axis=1).fillna(beyond).mean(axis=1).to_numpy()


def _attention(run: Run, store: Store, target: str) -> Iterator[dict]:
    """Attention of B2 by lag: of every track over all layers, of every layer over all tracks; and at each track's bar."""
    frame_s = math.prod(run.settings.demucs_strides) / store.sample_rate
    for seed in range(run.settings.seeds):
        model, profiles = trained_model(run, target, "demucs_attention", seed), []
        key, by_lag = (
            dict(model="demucs_attention", seed=seed),
            dict(probe="attention", unit="times uniform"),
        )
        for track in store.split("test"):
            profiles.append(_attention_of(model, store.load(track)[0], run.settings.segment))
            mean, (_, bar_s) = profiles[-1].mean(axis=0), beat_and_bar_s(store, track)
            for index, value in enumerate(mean):
                yield (
                    key
                    | by_lag
                    | dict(
                        item=track.name, lag_s=index * frame_s, condition="all layers", value=value
                    )
                )
            at_bar = repetition.at_the_bar_db(mean, bar_s, frame_s)
            reason = (
                ""
                if np.isfinite(at_bar)
                else "a bar and a quarter are longer than a training segment"
            )
            yield key | dict(
                probe="attention_at_bar",
                item=track.name,
                lag_s=bar_s,
                value=at_bar,
                unit="dB",
                reason=reason,
            )
        for layer in range(len(profiles[0])):
            for index, value in enumerate(_mean_of([profile[layer] for profile in profiles])):
                yield (
                    key
                    | by_lag
                    | dict(
                        item="all tracks",
                        lag_s=index * frame_s,
                        condition=f"layer {layer + 1}",
                        value=value,
                    )
                )


def _attention_of(model, mixture: np.ndarray, segment: int) -> np.ndarray:
    """`attention_by_lag` of a track, cut into training segments end to end; a shorter track is one window."""
    length = min(segment, mixture.shape[1])
    windows = np.stack(
        np.split(
            mixture[:, : mixture.shape[1] // length * length], mixture.shape[1] // length, axis=1
        )
    )
    parts = [
        windows[first : first + WINDOWS_AT_ONCE]
        for first in range(0, len(windows), WINDOWS_AT_ONCE)
    ]
    return np.average(
        [repetition.attention_by_lag(model, part) for part in parts],
        axis=0,
        weights=[len(part) for part in parts],
    )


def _damaged_repeat(run: Run, store: Store, target: str) -> Iterator[dict]:
    """SDR of the damaged repetition of every loop, under each condition, by B1 and B2."""
    for lag_s in lags_s(run.settings.segment_s):
        key = dict(probe="damaged_repeat", lag_s=lag_s, unit="dB")
        if not askable(lag_s, run.settings.segment_s):
            yield key | dict(
                reason=f"not askable: training segments last {run.settings.segment_s:g} s, less than twice the lag"
            )
            continue
        loops = find_loops(run, store, target, lag_s)
        if not loops:
            yield key | dict(
                reason="no track in which target and residual sound has three stretches so long"
            )
        for model, seed in itertools.product(WAVEFORM_MODELS, range(run.settings.seeds)):
            found = repetition.repeat_scores(
                trained_model(run, target, model, seed), list(loops.values())
            )
            for item, scores in zip(loops, found):
                yield from (
                    key
                    | dict(item=item, model=model, seed=seed, condition=name, value=scores[name])
                    for name in CONDITIONS
                )


def find_loops(run: Run, store: Store, target: str, lag_s: float) -> dict[str, dict]:
    """The loops of `damaged_repeat` by "track @ start": as many from every test track as it takes to have 40, where there is room."""
    lag, found = round(lag_s * store.sample_rate), {}

    def load(track: Track) -> tuple[np.ndarray, np.ndarray]:
        mixture, stems = store.load(track)
        reference = stems[store.stem_index(target)]
        return reference, mixture - reference

    places = {track: loop_starts(*load(track), lag) for track in store.split("test")}
    places = {track: starts for track, starts in places.items() if starts}
    for track, starts in places.items():
        reference, residual = load(track)
        for start in spread(starts, math.ceil(N_LOOPS / len(places))):
            loop = damaged_repeat(
                reference, residual, start, lag, run.settings.segment, store.sample_rate
            )
            found |= {f"{track.name} @ {start / store.sample_rate:.2f} s": loop} if loop else {}
    return found


# --- how much training music --------------------------------------------------------------------------------------------


def data_amount(run: Run, store: Store, tracks: pd.DataFrame) -> pd.DataFrame:
    """SDR of B1 and B2 on every test track, trained with a tenth, three tenths and all of the training tracks for as many steps."""
    if not run.settings.data_study:
        return _table("data_amount", [])
    label = lambda share: f"with {100 * share:g} %"
    smaller = {
        label(share): run.variant(
            f"data_study/{100 * share:g}-percent", train_share=share * run.settings.train_share
        )
        for share in DATA_SHARES
    }
    scored = score_variants(run, store, smaller, WAVEFORM_MODELS)
    named = {
        f"{model} {label(share)}": (model, share)
        for model, share in itertools.product(WAVEFORM_MODELS, DATA_SHARES)
    }
    named |= {model: (model, 1.0) for model in WAVEFORM_MODELS}
    rows = pd.concat([scored, tracks[tracks["model"].isin(WAVEFORM_MODELS)]])
    models, shares = zip(*rows["model"].map(named))
    return rows.assign(model=models, share=shares)[COLUMNS["data_amount"]].reset_index(drop=True)

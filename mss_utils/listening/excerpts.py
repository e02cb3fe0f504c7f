"""Excerpts to listen to: rules choose the tracks, the loudest seconds are cut, one gain for all."""

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from mss_utils.config import COMPARED_MODELS, Run
from mss_utils.data import Store, Track, loudest_start
from mss_utils.evaluation.bsseval import score_track, utterance_sdr
from mss_utils.figures import SHOWN_METRICS
from mss_utils.files import safe_name, write_bytes
from mss_utils.listening.player import Scores, Versions, common_gain, encode_mp3
from mss_utils.separation import read_estimate, separate


@dataclass(frozen=True)
class Excerpt:
    """The loudest seconds of the target in one track, in every version, at one common level.

    `versions` are `(channels, samples)` after `gain_db`; `scores` in dB by version and metric.
    """

    track: str
    start_s: float
    gain_db: float
    versions: dict[str, np.ndarray]
    scores: Scores = field(default_factory=dict)

    @property
    def sdr(self) -> dict[str, float]:
        """SDR in dB of every version except the reference."""
        return {name: scores["SDR"] for name, scores in self.scores.items()}


def choose_tracks(tracks: pd.DataFrame, attack: pd.DataFrame, target: str) -> dict[str, str]:
    """Choose test tracks by rule from the tables of these names: `{rule: track name}`.

    best, median, worst: by the median over the models of their SDR (mean over seeds). widest
    disagreement: largest range of the models' SDR. most onsets: isolated onsets per second.
    """
    rows = tracks[(tracks["target"] == target) & tracks["model"].isin(COMPARED_MODELS)]
    scores = rows.groupby(["track", "model"])["SDR"].mean().unstack()
    ranked = scores.median(axis=1).dropna().sort_values(ascending=False, kind="stable").index
    if ranked.empty:
        raise ValueError(f"No SDR of {target!r} in tables/tracks.csv: run notebook 05.")
    chosen = dict(best=ranked[0], median=ranked[(len(ranked) - 1) // 2], worst=ranked[-1])
    onsets = attack[attack["target"] == target].groupby("track")["n_onsets"].max()
    measures = {
        "widest disagreement": scores.max(axis=1) - scores.min(axis=1),
        "most onsets": onsets / rows.groupby("track")["frames"].max(),
    }
    for rule, values in measures.items():
        values = values.reindex(ranked).replace(np.inf, np.nan)
        if values.max() > 0:
            chosen[rule] = values.idxmax()
    return chosen


def cut_excerpt(versions: Versions, track: str, sample_rate: int, excerpt_s: float) -> Excerpt:
    """Cut the seconds in which the reference has most energy, and apply one common gain.

    `versions` are whole tracks `(channels, samples)` by name, `reference` among them.
    """
    length = round(excerpt_s * sample_rate)
    start = loudest_start(versions["reference"], length)
    parts = {name: audio[:, start : start + length] for name, audio in versions.items()}
    gain = common_gain(parts)
    parts = {name: audio * np.float32(gain) for name, audio in parts.items()}
    return Excerpt(track, start / sample_rate, 20 * np.log10(gain), parts)


def excerpt_scores(versions: Versions, sample_rate: int) -> dict[str, dict[str, float]]:
    """Compute SDR, SIR and SAR in dB of every version of an excerpt, medians over its seconds."""
    mixture, medians = versions["mixture"], {}
    stems = {name: (audio, mixture - audio) for name, audio in versions.items()}
    stems["mixture"] = (mixture, mixture)
    signals = {name: np.stack(pair).swapaxes(1, 2) for name, pair in stems.items()}
    for name, scores in score_track(signals.pop("reference"), signals, sample_rate).items():
        frames = pd.DataFrame({metric: scores[metric][0] for metric in SHOWN_METRICS})
        if len(frames := frames.dropna()):  # none of a silent excerpt
            medians[name] = frames.median().to_dict()
    return medians


def find_track(store: Store, name: str) -> Track:
    """Return the test track of that name."""
    return next(track for track in store.split("test") if track.name == name)


def read_versions(run: Run, store: Store, target: str, name: str) -> dict[str, np.ndarray]:
    """Read mixture, reference and estimates (first seed, with the ratio mask) of a test track."""
    track = find_track(store, name)
    mixture, stems = store.load(track)
    versions = {"mixture": mixture, "reference": stems[store.stem_index(target)]}
    for model in (*COMPARED_MODELS, "irm"):
        versions[model] = read_estimate(run, store, track, target, model)
    return versions


def unscored_excerpt(run: Run, store: Store, target: str, name: str) -> Excerpt:
    """Cut the excerpt of a test track."""
    versions = read_versions(run, store, target, name)
    return cut_excerpt(versions, name, store.sample_rate, run.settings.excerpt_s)


def track_excerpt(run: Run, store: Store, target: str, name: str) -> Excerpt:
    """Cut the excerpt of a test track, with the scores of just these seconds."""
    excerpt = unscored_excerpt(run, store, target, name)
    return replace(excerpt, scores=excerpt_scores(excerpt.versions, store.sample_rate))


def excerpts(run: Run, store: Store, target: str, tracks: pd.DataFrame) -> dict[str, Excerpt]:
    """Cut and score the excerpts of the chosen tracks: `{rule: Excerpt}`.

    Reads the estimates and the table `attack`; `tracks` is the table of that name. Writes
    `audio/<track>/<target>/<version>.mp3`.
    """
    chosen = choose_tracks(tracks, pd.read_csv(run.table("attack")), target)
    by_track = {}
    for name in dict.fromkeys(chosen.values()):
        by_track[name] = excerpt = track_excerpt(run, store, target, name)
        folder = run.folder / "audio" / safe_name(name) / target
        for version, audio in excerpt.versions.items():
            write_bytes(folder / f"{version}.mp3", encode_mp3(audio, store.sample_rate))
    return {rule: by_track[name] for rule, name in chosen.items()}


def validation_excerpt(
    store: Store, model: torch.nn.Module, name: str, target: str, excerpt_s: float
) -> Excerpt:
    """Separate the first validation track and cut its excerpt, for notebooks 02 to 04.

    Scores are utterance SDR of the whole track in dB. Test tracks stay unused until the evaluation.
    """
    track = store.split("valid")[0]
    mixture, stems = store.load(track)
    reference = stems[store.stem_index(target)]
    estimate = separate(model, mixture, store.sample_rate)
    versions = {"mixture": mixture, "reference": reference, name: estimate}
    excerpt = cut_excerpt(versions, track.name, store.sample_rate, excerpt_s)
    sdr = {key: utterance_sdr(reference.T, versions[key].T) for key in ("mixture", name)}
    return replace(excerpt, scores={key: dict(SDR=value) for key, value in sdr.items()})

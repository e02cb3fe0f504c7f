"""Excerpts to listen to: rules choose the tracks, the loudest seconds are cut, one gain for all."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML

from mss_utils.config import MODELS, Run
from mss_utils.data import Store, Track, loudest_start
from mss_utils.evaluation.bsseval import score_track, utterance_sdr
from mss_utils.figures import SHOWN_METRICS
from mss_utils.files import atomic_write, safe_name
from mss_utils.listening.player import Scores, Versions, common_gain, encode_mp3, players
from mss_utils.separation import read_estimate, separate

VERSIONS = ("mixture", "reference", *MODELS, "irm")
RANKS = ("best", "median", "worst")
EQUAL_DB = 0.2  # SDRs this close count as equal


@dataclass(frozen=True)
class Excerpt:
    """The loudest seconds of the target in one track, in every version, at one common level.

    `versions` are `(channels, samples)` after `gain_db`; `scores` in dB by version and metric.
    """

    track: str
    target: str
    start_s: float
    gain_db: float
    versions: dict[str, np.ndarray]
    scores: Scores = field(default_factory=dict)

    @property
    def sdr(self) -> dict[str, float]:
        """SDR in dB of every version that has one."""
        return {name: scores["SDR"] for name, scores in self.scores.items() if "SDR" in scores}


def choose_tracks(tracks: pd.DataFrame, attack: pd.DataFrame, target: str) -> dict[str, str]:
    """Choose test tracks by rule from the tables of these names: `{rule: track name}`.

    best, median, worst: by the median over the models of their SDR (mean over seeds). widest
    disagreement: largest range of the models' SDR. most onsets: isolated onsets per second.
    """
    rows = tracks[(tracks["target"] == target) & tracks["model"].isin(MODELS)]
    scores = rows.groupby(["track", "model"])["SDR"].mean().unstack()
    medians = scores.median(axis=1).dropna().sort_index()
    ranked = medians.sort_values(ascending=False, kind="stable").index
    if ranked.empty:
        raise ValueError(f"No SDR of {target!r} in tables/tracks.csv: run notebook 05.")
    middle = ranked[(len(ranked) - 1) // 2]
    chosen: dict[str, str] = dict(best=ranked[0], median=middle, worst=ranked[-1])
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


def equal_score_pair(tracks: pd.DataFrame, target: str) -> tuple[str, str, str] | None:
    """Find a test track and two models with equal SDR that sound different: (track, model, model).

    Of all pairs within `EQUAL_DB` (first seed) it is the one whose SIR minus SAR differs most. See
    Manilow, Seetharaman, Salamon, "Open Source Tools & Data for Music Source Separation", 2020.
    """
    rows = tracks[tracks["target"].eq(target) & tracks["seed"].eq(0) & tracks["model"].isin(MODELS)]
    pairs = rows.merge(rows, on="track", suffixes=("_a", "_b"))
    equal = (pairs["SDR_a"] - pairs["SDR_b"]).abs() <= EQUAL_DB
    pairs = pairs[equal & (pairs["model_a"] < pairs["model_b"])]
    contrast = (pairs["SIR_a"] - pairs["SAR_a"]) - (pairs["SIR_b"] - pairs["SAR_b"])
    contrast = contrast.abs().replace(np.inf, np.nan).dropna()
    if contrast.empty:
        return None
    return tuple(pairs.loc[contrast.idxmax(), ["track", "model_a", "model_b"]])


def cut_excerpt(
    versions: Versions, track: str, target: str, sample_rate: int, excerpt_s: float
) -> Excerpt:
    """Cut the seconds in which the reference has most energy, and apply one common gain.

    `versions` are whole tracks `(channels, samples)` by name, `reference` among them.
    """
    length = round(excerpt_s * sample_rate)
    start = loudest_start(versions["reference"], length)
    parts = {name: audio[:, start : start + length] for name, audio in versions.items()}
    gain = common_gain(parts)
    parts = {name: audio * np.float32(gain) for name, audio in parts.items()}
    return Excerpt(track, target, start / sample_rate, 20 * np.log10(gain), parts)


def excerpt_scores(versions: Versions, sample_rate: int) -> dict[str, dict[str, float]]:
    """Compute SDR, SIR and SAR in dB of every version of an excerpt, medians over its seconds."""
    mixture, medians = versions["mixture"], {}
    stems = {name: (audio, mixture - audio) for name, audio in versions.items()}
    stems["mixture"] = (mixture, mixture)
    signals = {name: np.stack(pair).swapaxes(1, 2) for name, pair in stems.items()}
    for name, values in score_track(signals.pop("reference"), signals, sample_rate).items():
        frames = pd.DataFrame({metric: values[metric][0] for metric in SHOWN_METRICS}).dropna()
        if len(frames):
            medians[name] = frames.median().to_dict()
    return medians


def find_track(store: Store, name: str) -> Track:
    """Return the test track of that name."""
    return next(track for track in store.split("test") if track.name == name)


def read_versions(run: Run, store: Store, target: str, name: str) -> dict[str, np.ndarray]:
    """Read all `VERSIONS` of a whole test track; estimates are those of the first seed."""
    track = find_track(store, name)
    mixture, stems = store.load(track)
    versions = {"mixture": mixture, "reference": stems[store.stem_index(target)]}
    for model in VERSIONS[2:]:
        versions[model] = read_estimate(run, store, track, target, model)
    return versions


def track_excerpt(run: Run, store: Store, target: str, name: str) -> Excerpt:
    """Cut the excerpt of a test track, without scores."""
    versions = read_versions(run, store, target, name)
    return cut_excerpt(versions, name, target, store.sample_rate, run.settings.excerpt_s)


def scored_excerpt(run: Run, store: Store, target: str, name: str) -> Excerpt:
    """Cut the excerpt of a test track, with the scores of just these seconds."""
    excerpt = track_excerpt(run, store, target, name)
    return replace(excerpt, scores=excerpt_scores(excerpt.versions, store.sample_rate))


def excerpts(run: Run, store: Store, target: str, tracks: pd.DataFrame) -> dict[str, Excerpt]:
    """Cut and score the excerpts of the chosen tracks: `{rule: Excerpt}`.

    Reads the estimates and the table `attack`; `tracks` is the table of that name. Writes
    `audio/<track>/<target>/<version>.mp3`.
    """
    chosen = choose_tracks(tracks, pd.read_csv(run.table("attack")), target)
    by_track = {}
    for name in dict.fromkeys(chosen.values()):
        by_track[name] = excerpt = scored_excerpt(run, store, target, name)
        folder = run.folder / "audio" / safe_name(name) / target
        for version, audio in excerpt.versions.items():
            with atomic_write(folder / f"{version}.mp3") as part:
                part.write_bytes(encode_mp3(audio, store.sample_rate))
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
    estimates = {"mixture": mixture, name: separate(model, mixture, store.sample_rate)}
    scores = {key: {"SDR": utterance_sdr(reference.T, e.T)} for key, e in estimates.items()}
    versions = {"mixture": mixture, "reference": reference, name: estimates[name]}
    excerpt = cut_excerpt(versions, track.name, target, store.sample_rate, excerpt_s)
    return replace(excerpt, scores=scores)


def excerpt_players(excerpts: Mapping[str, Excerpt], sample_rate: int) -> HTML:
    """Return one player per excerpt, `{heading: Excerpt}`, with its scores."""
    by_heading = {f"{name}: {excerpt.track}": excerpt for name, excerpt in excerpts.items()}
    columns = {heading: excerpt.versions for heading, excerpt in by_heading.items()}
    scores = {heading: excerpt.scores for heading, excerpt in by_heading.items()}
    return players(columns, sample_rate, scores)

"""Excerpts to listen to: which tracks, which seconds, one common level, small mp3 files.

Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML

from mss_utils.config import MODELS, Run
from mss_utils.data import Store, Track, loudest_start
from mss_utils.evaluation.bsseval import score_track, utterance_sdr
from mss_utils.figures import format_db
from mss_utils.figures.style import SHOWN_METRICS
from mss_utils.files import atomic_write
from mss_utils.listening.player import encode_mp3, gain_with_residuals, players
from mss_utils.separation import read_estimates, separate

VERSIONS = ("mixture", "reference", *MODELS, "irm")
RANKS = ("best", "median", "worst")
SAME_DB = 0.2  # scores this close count as the same

Scores = Mapping[str, Mapping[str, float]]  # version -> metric -> dB


@dataclass(frozen=True)
class Excerpt:
    """The loudest seconds of the target in one track, in every version, at one common level.

    `versions` is `{name: (channels, samples)}` after the gain of `gain_db`; `scores` says of which part they are where it is made.
    """

    track: str
    target: str
    start_s: float
    gain_db: float
    versions: dict[str, np.ndarray]
    scores: Scores

    @property
    def sdr(self) -> dict[str, float]:
        """SDR in dB of every version that has one."""
        return {name: scores["SDR"] for name, scores in self.scores.items() if "SDR" in scores}

    @property
    def notes(self) -> dict[str, dict[str, str]]:
        """The scores as a player shows them."""
        return {
            name: {metric: format_db(value) for metric, value in scores.items()}
            for name, scores in self.scores.items()
        }


def chosen_tracks(
    tracks: pd.DataFrame, transients: pd.DataFrame, long_range: pd.DataFrame, target: str
) -> dict[str, str]:
    """`{rule: name of the test track}` from the tables of those names: nobody picks by ear.

    best, median, worst: by the median over the three models of their SDR (mean over seeds); of an even number of tracks the median
    is the better of the two in the middle. widest disagreement: largest range of the three models' SDR. most onsets: isolated onsets
    a second. most repetitive: autocorrelation of the target's onsets at the bar. The last two are left out where nothing was
    measured. Raises ValueError when no track has a score.
    """
    rows = tracks[(tracks["target"] == target) & tracks["model"].isin(MODELS)]
    scores = rows.groupby(["track", "model"])["SDR"].mean().unstack()
    ranked = (
        scores.median(axis=1)
        .dropna()
        .sort_index()
        .sort_values(ascending=False, kind="stable")
        .index
    )
    if ranked.empty:
        raise ValueError(
            f"No track has an SDR for {target!r}; expected tables/tracks.csv to score {', '.join(MODELS)}: run notebook 05."
        )
    chosen = dict(zip(RANKS, (ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1])))
    onsets = (
        transients[transients["target"] == target].groupby("track")["n_onsets"].max()
        / rows.groupby("track")["frames"].max()
    )
    repeats = long_range[
        (long_range["target"] == target) & (long_range["probe"] == "repetitiveness")
    ].set_index("item")["value"]
    others = {
        "widest disagreement": scores.max(axis=1) - scores.min(axis=1),
        "most onsets": onsets,
        "most repetitive": repeats,
    }
    others = {
        rule: values.reindex(ranked).replace(np.inf, np.nan) for rule, values in others.items()
    }
    return chosen | {rule: values.idxmax() for rule, values in others.items() if values.max() > 0}


def same_score(tracks: pd.DataFrame, target: str) -> tuple[str, str, str] | None:
    """Test track and two models that have the same SDR there and sound different; None where no two are within `SAME_DB`.

    Rule: of all pairs of models on one track (first seed) with SDRs that close, the one whose SIR minus SAR differs most, that is
    where one lets more of the other instruments through and the other adds more artifacts. Such pairs after E. Manilow, P. Seetharaman,
    J. Salamon, "Open Source Tools & Data for Music Source Separation", ISMIR tutorial 2020.
    """
    rows = tracks[
        (tracks["target"] == target) & (tracks["seed"] == 0) & tracks["model"].isin(MODELS)
    ]
    both = rows.merge(rows, on="track", suffixes=("_a", "_b"))
    both = both[
        (both["model_a"] < both["model_b"]) & ((both["SDR_a"] - both["SDR_b"]).abs() <= SAME_DB)
    ]
    kind = (
        ((both["SIR_a"] - both["SAR_a"]) - (both["SIR_b"] - both["SAR_b"]))
        .abs()
        .replace(np.inf, np.nan)
        .dropna()
    )
    return None if kind.empty else tuple(both.loc[kind.idxmax(), ["track", "model_a", "model_b"]])


def cut_excerpt(
    versions: Mapping[str, np.ndarray],
    track: str,
    target: str,
    sample_rate: int,
    excerpt_s: float,
    scores: Scores | None = None,
) -> Excerpt:
    """Cut one excerpt of `excerpt_s` out of every version of a track and bring all, and their residuals, to one level.

    Rule: the excerpt is where the target's reference holds most energy over `excerpt_s` seconds, so that there is
    something to separate; nobody picks it by ear. `versions` are whole tracks `(channels, samples)`, among them `reference`.
    """
    length = round(excerpt_s * sample_rate)
    start = loudest_start(versions["reference"], length)
    parts = {name: audio[:, start : start + length] for name, audio in versions.items()}
    gain = gain_with_residuals(parts)
    parts = {name: audio * np.float32(gain) for name, audio in parts.items()}
    return Excerpt(
        track, target, start / sample_rate, 20 * np.log10(gain), parts, dict(scores or {})
    )


def excerpt_scores(
    versions: Mapping[str, np.ndarray], sample_rate: int
) -> dict[str, dict[str, float]]:
    """SDR, SIR and SAR in dB of just these seconds, median over seconds; references are target and residual, as for one target."""
    reference, mixture = versions["reference"], versions["mixture"]
    pair = lambda target, rest: np.stack([target, rest]).swapaxes(
        1, 2
    )  # (stems, samples, channels)
    found = {
        name: pair(audio, mixture - audio)
        for name, audio in versions.items()
        if name not in ("mixture", "reference")
    }
    found = {"mixture": pair(mixture, mixture)} | found
    scored = score_track(pair(reference, mixture - reference), found, sample_rate)
    tables = {
        name: pd.DataFrame({metric: values[metric][0] for metric in SHOWN_METRICS}).dropna()
        for name, values in scored.items()
    }
    return {name: table.median().to_dict() for name, table in tables.items() if len(table)}


def track_versions(
    run: Run, store: Store, track: Track, target: str, names: Sequence[str] = VERSIONS
) -> dict[str, np.ndarray]:
    """Those of `VERSIONS` that `names` lists, of a whole track: mixture, reference, estimates of the models (first seed) and the oracle."""
    _, stems = store.load(track)
    everything = {
        "reference": stems[store.stem_index(target)],
        **read_estimates(
            run, store, track, target, [name for name in names if name != "reference"]
        ),
    }
    return {name: everything[name] for name in names}


def track_named(store: Store, name: str) -> Track:
    """The test track of that name."""
    return next(track for track in store.split("test") if track.name == name)


def track_excerpt(
    run: Run,
    store: Store,
    target: str,
    track: Track,
    names: Sequence[str] = VERSIONS,
    scores: Scores | None = None,
) -> Excerpt:
    """The excerpt of a test track in the versions that `names` lists, `reference` among them."""
    versions = track_versions(run, store, track, target, names)
    return cut_excerpt(
        versions, track.name, target, store.sample_rate, run.settings.excerpt_s, scores
    )


def scored_excerpt(run: Run, store: Store, target: str, track: Track) -> Excerpt:
    """The excerpt of a test track in `VERSIONS`, with the scores of just that excerpt."""
    excerpt = track_excerpt(run, store, target, track)
    return replace(excerpt, scores=excerpt_scores(excerpt.versions, store.sample_rate))


def excerpts(run: Run, store: Store, target: str, tracks: pd.DataFrame) -> dict[str, Excerpt]:
    """`{rule: excerpt}` of the test tracks that `chosen_tracks` names, also written as `audio/<track>/<target>/<version>.mp3`.

    A track that two rules choose is one excerpt under two names.
    """
    chosen = chosen_tracks(
        tracks, *(pd.read_csv(run.table(name)) for name in ("transients", "long_range")), target
    )
    found = {
        name: scored_excerpt(run, store, target, track_named(store, name))
        for name in dict.fromkeys(chosen.values())
    }
    for excerpt in found.values():
        write_excerpt(run, excerpt, store.sample_rate)
    return {rule: found[name] for rule, name in chosen.items()}


def write_excerpt(run: Run, excerpt: Excerpt, sample_rate: int) -> None:
    """Write every version of an excerpt as mp3, each through a temporary name."""
    for name, audio in excerpt.versions.items():
        with atomic_write(run.audio(excerpt.track, excerpt.target) / f"{name}.mp3") as part:
            part.write_bytes(encode_mp3(audio, sample_rate))


def validation_excerpt(
    store: Store, model: torch.nn.Module, name: str, target: str, excerpt_s: float
) -> Excerpt:
    """Mixture, reference and the estimate of one model in the first validation song; scores are utterance SDR of the song in dB.

    Used by notebooks 02 to 04: the test songs stay untouched until the evaluation.
    """
    song = store.split("valid")[0]
    mixture, stems = store.load(song)
    reference = stems[store.stem_index(target)]
    found = {"mixture": mixture, name: separate(model, mixture, store.sample_rate)}
    scores = {
        version: {"SDR": utterance_sdr(reference.T, audio.T)} for version, audio in found.items()
    }
    return cut_excerpt(
        {"mixture": mixture, "reference": reference} | found,
        song.name,
        target,
        store.sample_rate,
        excerpt_s,
        scores,
    )


def excerpt_players(found: Mapping[str, Excerpt], sample_rate: int) -> HTML:
    """One player an excerpt, `{heading: excerpt}`, with its scores."""
    heading = {name: f"{name}: {excerpt.track}" for name, excerpt in found.items()}
    versions = {heading[name]: excerpt.versions for name, excerpt in found.items()}
    return players(
        versions, sample_rate, {heading[name]: excerpt.notes for name, excerpt in found.items()}
    )

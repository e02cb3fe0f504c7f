"""Excerpts to listen to: which tracks, which seconds, one common level, small mp3 files, players that survive an export.

Taught in notebook 06; the players are used in notebooks 01 to 04 too.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, Mapping

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio
from IPython.display import HTML, display

from mss_utils import figures
from mss_utils.analysis import CONDITIONS, gains, loops_of, onsets, transients, whole_band, wide, with_phase_of
from mss_utils.data import Store, Track, loudest_start
from mss_utils.evaluation import estimates, model_of
from mss_utils.figures import LABELS
from mss_utils.metrics import utterance_sdr
from mss_utils.models.unet import STFT
from mss_utils.separation import separate
from mss_utils.settings import MODELS, WAVEFORM_MODELS, Run, replacing

PEAK_DB = -1.0
ATTACKS_S = 3.0
VERSIONS = ("mixture", "reference", *MODELS, "irm")


@dataclass(frozen=True)
class Excerpt:
    """The loudest seconds of the target in one track, in every version, at one common level.

    `versions` is `{name: (channels, samples)}` after the gain of `gain_db`; `scores` the SDR of the whole track in dB.
    """

    track: str
    target: str
    start_s: float
    gain_db: float
    versions: dict[str, np.ndarray]
    scores: dict[str, float]


def chosen_tracks(tracks: pd.DataFrame, target: str) -> dict[str, str]:
    """Names of the best, the median and the worst test track of a target, from the table `tracks`.

    Tracks are ranked by the median over the three models of their SDR (of the mean over seeds); with an even number of
    tracks the median is the better of the two in the middle. Raises ValueError when no track has a score.
    """
    rows = tracks[(tracks["target"] == target) & tracks["model"].isin(MODELS)]
    ranks = rows.groupby(["track", "model"])["SDR"].mean().groupby("track").median().dropna()
    ranks = ranks.sort_index().sort_values(ascending=False, kind="stable")
    if ranks.empty:
        raise ValueError(f"No track has an SDR for {target!r}; expected tables/tracks.csv to score {', '.join(MODELS)}: run notebook 05.")
    return {"best": ranks.index[0], "median": ranks.index[(len(ranks) - 1) // 2], "worst": ranks.index[-1]}


def track_scores(tracks: pd.DataFrame, track: str, target: str) -> dict[str, float]:
    """SDR in dB of one test track for every model, mean over seeds; models without a score are left out."""
    rows = tracks[(tracks["target"] == target) & (tracks["track"] == track)]
    return rows.groupby("model")["SDR"].mean().dropna().to_dict()


def common_gain(versions: Mapping[str, np.ndarray], peak_db: float = PEAK_DB) -> float:
    """The one factor that brings the loudest sample of all versions to `peak_db` below full scale; 1 for silence.

    Never one factor each: louder sounds better, and models would be compared at different levels.
    """
    peak = max(float(np.abs(audio).max(initial=0)) for audio in versions.values())
    return 10 ** (peak_db / 20) / peak if peak > 0 else 1.0


def cut_excerpt(
    versions: Mapping[str, np.ndarray], track: str, target: str, sample_rate: int, excerpt_s: float,
    scores: Mapping[str, float] | None = None,
) -> Excerpt:
    """Cut one excerpt of `excerpt_s` out of every version of a track and bring all to one level.

    Rule: the excerpt is where the target's reference holds most energy over `excerpt_s` seconds, so that there is
    something to separate; nobody picks it by ear. `versions` are whole tracks `(channels, samples)`, among them `reference`.
    """
    length = round(excerpt_s * sample_rate)
    start = loudest_start(versions["reference"], length)
    parts = {name: audio[:, start : start + length] for name, audio in versions.items()}
    gain = common_gain(parts)
    parts = {name: audio * np.float32(gain) for name, audio in parts.items()}
    return Excerpt(track, target, start / sample_rate, 20 * np.log10(gain), parts, dict(scores or {}))


def track_versions(run: Run, store: Store, track: Track, target: str) -> dict[str, np.ndarray]:
    """Mixture, reference, the three models' estimates (first seed) and the oracle's, of a whole track."""
    _, stems = store.load(track)
    everything = {"reference": stems[store.stem_index(target)], **estimates(run, store, track, target, rows=set(VERSIONS) - {"reference"})}
    return {name: everything[name] for name in VERSIONS}


def validation_excerpt(store: Store, model: torch.nn.Module, name: str, target: str, excerpt_s: float) -> Excerpt:
    """Mixture, reference and the estimate of one model in the first validation song; scores are utterance SDR in dB.

    Used by notebooks 02 to 04: the test songs stay untouched until the evaluation.
    """
    song = store.split("valid")[0]
    mixture, stems = store.load(song)
    reference = stems[store.stem_index(target)]
    found = {"mixture": mixture, name: separate(model, mixture, store.sample_rate)}
    scores = {version: utterance_sdr(reference.T, audio.T) for version, audio in found.items()}
    return cut_excerpt({"mixture": mixture, "reference": reference} | found, song.name, target, store.sample_rate, excerpt_s, scores)


def excerpts(run: Run, store: Store, target: str, tracks: pd.DataFrame) -> dict[str, Excerpt]:
    """Excerpts of the best, median and worst test track, also written as `audio/<track>/<target>/<version>.mp3`."""
    by_name = {track.name: track for track in store.split("test")}
    found = {}
    for rank, name in chosen_tracks(tracks, target).items():
        versions = track_versions(run, store, by_name[name], target)
        found[rank] = cut_excerpt(
            versions, name, target, store.sample_rate, run.settings.excerpt_s, track_scores(tracks, name, target)
        )
        write_excerpt(run, found[rank], store.sample_rate)
    return found


def write_excerpt(run: Run, excerpt: Excerpt, sample_rate: int) -> list[Path]:
    """Write every version of an excerpt as mp3, each through a temporary name; returns the paths."""
    folder = run.audio(excerpt.track, excerpt.target)
    paths = []
    for name, audio in excerpt.versions.items():
        path = folder / f"{name}.mp3"
        with replacing(path) as part:
            part.write_bytes(encode_mp3(audio, sample_rate))
        paths.append(path)
    return paths


def encode_mp3(audio: np.ndarray, sample_rate: int) -> bytes:
    """`(channels, samples)` in full-scale floats as mp3: about 5 kB a second in mono at 16 kHz, at most 12 kB at 44.1 kHz."""
    buffer = io.BytesIO()
    # A variable rate holds the quality, so that no version suffers more from the coding than another.
    soundfile.write(buffer, np.clip(audio.T, -1, 1), sample_rate, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    return buffer.getvalue()


def player(audio: np.ndarray, sample_rate: int, label: str = "") -> str:
    """HTML of one player with the audio inside it, at the level it has: nothing is normalised here."""
    data = base64.b64encode(encode_mp3(audio, sample_rate)).decode()
    return (
        f'<audio controls preload="none" style="width:100%;min-width:220px;max-width:300px;height:34px" '
        f'aria-label="{html.escape(label, quote=True)}" src="data:audio/mpeg;base64,{data}"></audio>'
    )


def player_table(
    columns: Mapping[str, Mapping[str, np.ndarray]], sample_rate: int, notes: Mapping[str, Mapping[str, str]] | None = None
) -> HTML:
    """Players in a table, one column a heading and one row a version: `{heading: {version: (channels, samples)}}`.

    All versions in a column share one gain. `notes` holds a short text for a cell. Names are escaped.
    """
    versions = list(dict.fromkeys(name for column in columns.values() for name in column))
    gains = {heading: common_gain(column) for heading, column in columns.items()}
    head = "".join(f'<th style="text-align:left;padding:4px 10px">{html.escape(heading)}</th>' for heading in columns)
    rows = []
    for name in versions:
        cells = "".join(_cell(heading, name, column, gains[heading], sample_rate, notes) for heading, column in columns.items())
        rows.append(f'<tr><th scope="row" style="text-align:left;white-space:nowrap;padding:4px 10px">{_chip(name)}</th>{cells}</tr>')
    return HTML(f'<table style="border-collapse:collapse"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>')


def _cell(heading: str, name: str, column: Mapping[str, np.ndarray], gain: float, sample_rate: int, notes) -> str:
    if name not in column:
        return "<td></td>"
    note = html.escape((notes or {}).get(heading, {}).get(name, ""))
    sound = player(column[name] * np.float32(gain), sample_rate, f"{LABELS.get(name, name)}, {heading}")
    return f'<td style="padding:4px 10px;text-align:left">{sound}<br><small>{note}</small></td>'


def _chip(name: str) -> str:
    """The display name behind a square of the version's colour."""
    colour = figures.COLOURS.get(name, "transparent")
    square = f'<span style="display:inline-block;width:10px;height:10px;background:{colour};margin-right:6px"></span>'
    return square + html.escape(LABELS.get(name, name))


def excerpt_players(found: Mapping[str, Excerpt], sample_rate: int) -> HTML:
    """The players of `excerpts`: one column a track, one row a version, the track's SDR under each player."""
    heading = {rank: f"{rank}: {excerpt.track}" for rank, excerpt in found.items()}
    notes = {
        heading[rank]: {name: f"SDR {figures.decibels(score)}" for name, score in excerpt.scores.items()}
        for rank, excerpt in found.items()
    }
    return player_table({heading[rank]: excerpt.versions for rank, excerpt in found.items()}, sample_rate, notes)


# --- the three questions -----------------------------------------------------------------------------------------------


def phase_versions(run: Run, store: Store, target: str, phase: pd.DataFrame) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """For each model an excerpt as it is, with the true phase, and with the true magnitude, beside the reference.

    Rule: the test track on which A's whole-band SDR gains most from the true phase. Returns its name and what `player_table` takes,
    empty where no track has such a gain.
    """
    rows = whole_band(phase)
    rows = rows[(rows["target"] == target) & (rows["model"] == "unet")]
    cost = (rows["sdr_true_phase"] - rows["sdr"]).groupby(rows["track"]).mean().replace([np.inf, -np.inf], np.nan).dropna()
    if cost.empty:
        return "no track", {}
    excerpt = _excerpt_of(run, store, target, cost.idxmax())
    reference, stft = excerpt.versions["reference"], STFT(run.settings.n_fft, run.settings.hop)
    versions = {}
    for model in MODELS:
        estimate = excerpt.versions[model]
        versions[LABELS[model]] = {
            "reference": reference, "as it is": estimate, "its magnitude, true phase": with_phase_of(estimate, reference, stft),
            "true magnitude, its phase": with_phase_of(reference, estimate, stft),
        }
    return excerpt.track, versions


def _excerpt_of(run: Run, store: Store, target: str, name: str) -> Excerpt:
    """The excerpt of the test track of that name."""
    track = next(track for track in store.split("test") if track.name == name)
    return cut_excerpt(track_versions(run, store, track, target), name, target, store.sample_rate, run.settings.excerpt_s)


def repeat_versions(run: Run, store: Store, target: str, long_range: pd.DataFrame) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """One loop of the damaged repeat under each condition: mixture, reference, B1 and B2; empty where no lag was askable.

    Rule: at the shortest lag, on the track where the repetition gains of B1 and B2 differ most, its first loop.
    """
    rows = long_range[(long_range["target"] == target) & (long_range["probe"] == "damaged_repeat")].dropna(subset="value")
    if rows.empty:
        return "no loop", {}
    lag_s = rows["lag_s"].min()
    b1, b2 = (gains(rows, model, lag_s)[0].mean(axis=1) for model in WAVEFORM_MODELS)
    track = (b2 - b1).abs().idxmax()
    name, loop = next((name, loop) for name, loop in loops_of(run, store, target, lag_s).items() if name.startswith(f"{track} @ "))
    around = dict(zip(CONDITIONS, ("its repeat around it", "other music around it", "silence around it")))
    return name, {around[condition]: _loop_versions(run, store, target, *loop[condition][:2]) for condition in CONDITIONS}


def _loop_versions(run: Run, store: Store, target: str, mixture: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    """What is heard of one condition; the model meets the loop as one chunk, as when it was measured."""
    found = {model: separate(model_of(run, target, model), mixture, store.sample_rate) for model in WAVEFORM_MODELS}
    return {"mixture": mixture, "reference": reference} | found


def attack_versions(run: Run, store: Store, target: str, table: pd.DataFrame) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """Three seconds of attacks in the reference and the three models, at full and at half speed; empty where no track has an onset.

    Rule: the track on which B1's SDR in attacks minus that in sustains is furthest above A's; in it, the stretch with most isolated onsets.
    """
    rows = table[table["target"] == target].assign(kept=lambda rows: rows["attack_sdr"] - rows["sustain_sdr"])
    ahead = (wide(rows, "demucs_lstm", "kept") - wide(rows, "unet", "kept")).mean(axis=1).replace([np.inf, -np.inf], np.nan).dropna()
    if ahead.empty:
        return "no track", {}
    track = next(track for track in store.split("test") if track.name == ahead.idxmax())
    versions = track_versions(run, store, track, target)
    at = transients.isolated(onsets(store, track, target), store.sample_rate, track.samples)
    length = round(ATTACKS_S * store.sample_rate)
    start = max(0, max(at, key=lambda first: ((at >= first) & (at < first + length)).sum()) - store.sample_rate // 10)
    heard = {name: versions[name][:, start : start + length] for name in ("reference", *MODELS)}
    slow = {name: torchaudio.functional.resample(torch.from_numpy(audio), 1, 2).numpy() for name, audio in heard.items()}
    return f"{track.name}, from {start / store.sample_rate:.1f} s", {"as it is": heard, "at half speed": slow}


# --- any track ---------------------------------------------------------------------------------------------------------


def chooser(run: Run, store: Store, target: str, versions_of: Callable[[Track], Mapping[str, np.ndarray]] | None = None) -> None:
    """Menus for track and version; the player and the spectrogram below follow them. Separates on demand.

    Displays the menus (empty in an exported page) and, as plain output, the first state, which every copy of the page keeps.
    `versions_of` gives the versions of a whole track; by default those of `track_versions`.
    """
    versions_of = versions_of or (lambda track: track_versions(run, store, track, target))

    @lru_cache(maxsize=4)  # a few songs in memory: going back and forth costs nothing
    def excerpt_of(track: Track) -> Excerpt:
        return cut_excerpt(versions_of(track), track.name, target, store.sample_rate, run.settings.excerpt_s)

    tracks = store.split("test")
    track_menu = ipywidgets.Dropdown(options=[(track.name, track) for track in tracks], description="track")
    version_menu = ipywidgets.Dropdown(options=[(LABELS[name], name) for name in VERSIONS], value="unet", description="version")
    display(ipywidgets.HBox([track_menu, version_menu]))
    view = lambda: _chosen_view(excerpt_of(track_menu.value), version_menu.value, store.sample_rate)
    below = display(view(), display_id=True)

    def update(_change) -> None:
        below.update(HTML(f"Separating {html.escape(track_menu.value.name)} …"))
        below.update(view())

    for menu in (track_menu, version_menu):
        menu.observe(update, names="value")


def _chosen_view(excerpt: Excerpt, version: str, sample_rate: int) -> HTML:
    """Player and spectrogram of one version as a single piece of HTML."""
    title = f"{LABELS[version]}, {excerpt.track}, from {excerpt.start_s:.0f} s"
    axes = figures.spectrograms({version: excerpt.versions[version]}, sample_rate, {version: ""}, start_s=excerpt.start_s)
    picture = io.BytesIO()
    axes[0, 0].figure.savefig(picture, format="png", dpi=110)
    plt.close(axes[0, 0].figure)
    data = base64.b64encode(picture.getvalue()).decode()
    sound = player(excerpt.versions[version], sample_rate, title)
    image = f'<img alt="spectrogram: {html.escape(title, quote=True)}" src="data:image/png;base64,{data}">'
    return HTML(f"<p><b>{html.escape(title)}</b></p>{sound}<br>{image}")

"""The audit of a store: what is in it, and what a user should know before days of training. Taught in notebook 01."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from mss_utils.data.levels import to_db
from mss_utils.data.sources import MIXTURE, ignored, named
from mss_utils.data.store import Store, Track

BAD_SUM_DB = -20.0  # the lossy coding of MUSDB18's stem files leaves -25 to -40 dB; more is a stem that is missing or changed
FRAME_S = 1.0  # the scores' frame: a shorter test track is one frame
UNEVEN_S = (
    0.05  # files of one track may differ by this much, a codec's padding, before it is worth a word
)


def audit(store: Store) -> pd.DataFrame:
    """One row per track and stem (and the mixture), read from the index alone.

    Columns: track, split, stem, duration_s, source_rate (Hz), level_db, peak, silent_share (of half seconds; NaN when the
    track is shorter), and residual_db: the level of mixture minus sum of stems relative to the mixture, the same for
    every stem of a track.
    """
    return pd.DataFrame([row for track in store.tracks for row in _audit_track(store, track)])


def _audit_track(store: Store, track: Track) -> list[dict]:
    common = dict(
        track=track.name,
        split=track.split,
        duration_s=track.samples / store.sample_rate,
        source_rate=max(track.source_rates),
        residual_db=to_db(track.residual_rms) - to_db(track.rms[0]),
    )
    return [
        common
        | dict(
            stem=name,
            level_db=to_db(track.rms[row]),
            peak=track.peak[row],
            silent_share=1 - track.active[row][row] / track.n_windows
            if track.n_windows
            else np.nan,
        )
        for row, name in enumerate((MIXTURE, *store.stems))
    ]


def co_activity(store: Store) -> pd.DataFrame:
    """Share of the half seconds in which the row's stem sounds where the column's stem sounds too; NaN if it never does."""
    counts = sum(np.array(track.active)[1:, 1:] for track in store.tracks)
    with np.errstate(invalid="ignore"):
        share = counts / np.diag(counts)[:, None]
    return pd.DataFrame(share, index=store.stems, columns=store.stems)


def audit_warnings(store: Store, segment_s: float = 0.0) -> list[str]:
    """What a user should know of a store, one sentence for each kind of finding, with its count and names.

    `segment_s` is the length of a training segment: training tracks shorter than it are not used.
    """
    table = audit(store)
    mixtures, stems = table[table["stem"] == MIXTURE], table[table["stem"] != MIXTURE]
    short = mixtures[(mixtures["split"] == "test") & (mixtures["duration_s"] < FRAME_S)]
    unused = mixtures[(mixtures["split"] == "train") & (mixtures["duration_s"] < segment_s)]
    off = mixtures[mixtures["residual_db"] > BAD_SUM_DB].sort_values("residual_db", ascending=False)
    silent = stems[(stems["silent_share"] == 1) | (stems["level_db"] == -np.inf)]
    found = {
        "whose stems do not add up to the mixture": [
            f"{row.track} (off by {row.residual_db:.0f} dB)" for row in off.itertuples()
        ],
        "shorter than a second, scored as one frame": [
            f"{row.track} ({row.duration_s:.2f} s)" for row in short.itertuples()
        ],
        f"shorter than a training segment of {segment_s:g} s, not used": [
            f"{row.track} ({row.duration_s:.2f} s)" for row in unused.itertuples()
        ],
        "with files of different lengths, the shorter ones end in silence": _uneven(store),
        "with files of different sample rates, all resampled": [
            f"{track.name} ({', '.join(map(str, track.source_rates))} Hz)"
            for track in store.tracks
            if len(track.source_rates) > 1
        ],
    }
    found = {f"track {text}": names for text, names in found.items()}
    found["stem silent throughout"] = [f"{row.stem} of {row.track}" for row in silent.itertuples()]
    return [
        _counted(text, names)
        for text, names in (found | _leaks(store) | _not_tracks(store)).items()
        if names
    ]


def _uneven(store: Store) -> list[str]:
    spread_s = [
        (track.source_samples[-1] - track.source_samples[0]) / store.sample_rate
        for track in store.tracks
    ]
    return [
        f"{track.name} (by {seconds:.2f} s)"
        for track, seconds in zip(store.tracks, spread_s)
        if seconds > UNEVEN_S
    ]


def _leaks(store: Store) -> dict[str, list[str]]:
    """What stands on both sides of the split: the same samples, or the same artist."""
    tracks, artists = defaultdict(list), defaultdict(set)
    for track in store.tracks:
        tracks[track.sha].append(track)
        if artist := _artist(track.name):
            artists[artist].add("test" if track.split == "test" else "train or valid")
    copies = [
        ", ".join(f"{track.split}/{track.name}" for track in same)
        for same in tracks.values()
        if len(same) > 1
    ]
    both = sorted(artist for artist, sides in artists.items() if len(sides) == 2)
    return {
        "recording more than once": copies,
        "artist on both sides of the split, in test and in train or valid": both,
    }


def _artist(name: str) -> str:
    """Who made a track called "artist feat. guest - title"; nobody where the name has no such form."""
    artist, dash, _ = name.partition(" - ")
    return re.split(r" (?:feat|ft)\b", artist, flags=re.IGNORECASE)[0].strip() if dash else ""


def _not_tracks(store: Store) -> dict[str, list[str]]:
    return {"folder without any audio that can be read, ignored": ignored(Path(store.source))}


def _counted(text: str, names: list[str]) -> str:
    """How many, of what, and which: the first word of `text` is what is counted."""
    noun, space, rest = text.partition(" ")
    return f"{len(names)} {noun}{'s' * (len(names) != 1)}{space}{rest}: {named(names)}"

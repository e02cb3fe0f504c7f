"""The audit of a store: its content and what deserves a warning. Taught in notebook 01."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from mss_utils.data.levels import to_db
from mss_utils.data.sources import MIXTURE, ignored_entries, join_names
from mss_utils.data.store import Store, Track

MAX_RESIDUAL_DB = -20.0  # lossy stem files leave -25 to -40 dB; more is a missing or changed stem
FRAME_S = 1.0  # of the scores; a shorter test track is one frame
MAX_UNEVEN_S = 0.05  # files of a track may differ by a codec's padding


def audit(store: Store) -> pd.DataFrame:
    """Return one row per track and stem (and the mixture), from the index alone.

    Columns: track, split, stem, duration_s, source_rate (Hz), level_db, peak, silent_share (of half
    seconds; NaN for shorter tracks), and residual_db: level of mixture minus sum of stems relative
    to the mixture, the same for every stem of a track.
    """
    rows = []
    for track in store.tracks:
        for row, name in enumerate((MIXTURE, *store.stems)):
            active = track.active[row][row] / track.n_windows if track.n_windows else np.nan
            rows.append(
                dict(
                    track=track.name,
                    split=track.split,
                    stem=name,
                    duration_s=track.samples / store.sample_rate,
                    source_rate=max(track.source_rates),
                    level_db=to_db(track.rms[row]),
                    peak=track.peak[row],
                    silent_share=1 - active,
                    residual_db=to_db(track.residual_rms) - to_db(track.rms[0]),
                )
            )
    return pd.DataFrame(rows)


def co_activity(store: Store) -> pd.DataFrame:
    """Return the share of half seconds with the row's stem that also have the column's stem."""
    counts = np.sum([np.array(track.active)[1:, 1:] for track in store.tracks], axis=0)
    table = pd.DataFrame(counts, index=list(store.stems), columns=list(store.stems))
    return table.div(np.diag(counts), axis=0)


def audit_warnings(store: Store, segment_s: float = 0.0) -> list[str]:
    """Return one sentence per kind of problem, with count and names.

    `segment_s` is the length of a training segment: shorter training tracks are not used.
    """
    table = audit(store)
    mixtures, stems = table[table["stem"] == MIXTURE], table[table["stem"] != MIXTURE]
    wrong_sum = mixtures[mixtures["residual_db"] > MAX_RESIDUAL_DB]
    wrong_sum = wrong_sum.sort_values("residual_db", ascending=False)
    short = mixtures[(mixtures["split"] == "test") & (mixtures["duration_s"] < FRAME_S)]
    unused = mixtures[(mixtures["split"] == "train") & (mixtures["duration_s"] < segment_s)]
    silent = stems[(stems["silent_share"] == 1) | (stems["level_db"] == -np.inf)]
    uneven = []
    for track in store.tracks:
        spread_s = (track.source_samples[-1] - track.source_samples[0]) / store.sample_rate
        if spread_s > MAX_UNEVEN_S:
            uneven.append(f"{track.name} (by {spread_s:.2f} s)")
    problems = {
        "track whose stems do not add up to the mixture": [
            f"{row.track} (off by {row.residual_db:.0f} dB)" for row in wrong_sum.itertuples()
        ],
        "track shorter than a second, scored as one frame": _with_durations(short),
        f"track shorter than a training segment of {segment_s:g} s, not used": (
            _with_durations(unused)
        ),
        "track with files of different lengths, the shorter ones end in silence": uneven,
        "stem silent throughout": [f"{row.stem} of {row.track}" for row in silent.itertuples()],
        "recording more than once": _copies(store.tracks),
        "artist in both test and train or valid": _shared_artists(store.tracks),
        "item without readable audio, ignored": ignored_entries(Path(store.source)),
    }
    return [_count(text, names) for text, names in problems.items() if names]


def _with_durations(rows: pd.DataFrame) -> list[str]:
    return [f"{row.track} ({row.duration_s:.2f} s)" for row in rows.itertuples()]


def _copies(tracks: tuple[Track, ...]) -> list[str]:
    by_sha = defaultdict(list)
    for track in tracks:
        by_sha[track.sha].append(f"{track.split}/{track.name}")
    return [", ".join(names) for names in by_sha.values() if len(names) > 1]


def _shared_artists(tracks: tuple[Track, ...]) -> list[str]:
    sides = defaultdict(set)
    for track in tracks:
        artist, dash, _ = track.name.partition(" - ")
        if dash:
            artist = re.split(r" (?:feat|ft)\b", artist, flags=re.IGNORECASE)[0].strip()
            sides[artist].add(track.split == "test")
    return sorted(artist for artist, both in sides.items() if artist and len(both) == 2)


def _count(text: str, names: list[str]) -> str:
    """Put the number before the first word of `text`, and the names behind it."""
    noun, space, rest = text.partition(" ")
    return f"{len(names)} {noun}{'s' * (len(names) != 1)}{space}{rest}: {join_names(names)}"

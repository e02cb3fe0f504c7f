"""Time museval against `bss_eval` on the same tracks and estimates, and compare the scores.

    python benchmarks/metrics.py --data DIR [--formats 44100x2 16000x1] [--tracks N]

The ratio-mask oracle makes the estimates, for every stem of every test track. museval scores one
track after the other with all threads of numpy. `bss_eval` scores one track per core in parallel;
its time includes the start of the processes. Only scores below 80 dB are compared. Compare times
of one run only, measured on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import time

import joblib
import numpy as np
import pandas as pd
from throughput import print_table
from tqdm.auto import tqdm

from mss_utils.config import Settings, resolve_settings
from mss_utils.data import Store, Track, open_store
from mss_utils.evaluation.bsseval import METRICS, MusevalScorer, bss_eval, disagreement
from mss_utils.models.oracles import oracle


def main() -> None:
    """Run the benchmark and print one row per format."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", default="", metavar="DIR", help="dataset root (default: the profile's own)"
    )
    parser.add_argument("--profile", default="demo")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings on top of the profile"
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["44100x2", "16000x1"],
        metavar="RATExCHANNELS",
        help="formats of the audio",
    )
    parser.add_argument(
        "--tracks", type=int, default=None, help="number of test tracks (default: all)"
    )
    arguments = parser.parse_args()
    rows = []
    for rate, channels in (text.split("x") for text in arguments.formats):
        settings = resolve_settings(
            arguments.profile,
            arguments.data,
            "",
            [*arguments.set, f"sample_rate={rate}", f"channels={channels}"],
        )
        rows.append(compare(settings, open_store(settings), arguments.tracks))
    print_table("BSSEval of all stems", pd.DataFrame(rows))


def compare(settings: Settings, store: Store, n_tracks: int | None) -> dict:
    """Score the first `n_tracks` test tracks with both programs; compare times and scores.

    Returns
    -------
    dict
        One row of the table: format, number of stems and tracks, seconds of music, seconds of both
        programs, their ratio, and the columns of `compare_scores`.
    """
    tracks = store.split("test")[:n_tracks]
    pairs = [references_and_estimates(settings, store, track) for track in tracks]
    started = time.perf_counter()
    ours = joblib.Parallel(n_jobs=-1)(
        joblib.delayed(bss_eval)(*pair, store.sample_rate) for pair in pairs
    )
    ours_s = time.perf_counter() - started
    started = time.perf_counter()
    theirs = [
        MusevalScorer(pair[0], store.sample_rate).score(pair[1])
        for pair in tqdm(pairs, desc="museval", unit="track")
    ]
    museval_s = time.perf_counter() - started
    music_s = sum(track.samples for track in tracks) / store.sample_rate
    row = dict(
        sample_rate=store.sample_rate,
        channels=store.channels,
        stems=len(store.stems),
        tracks=len(tracks),
        music_s=music_s,
    )
    return (
        row
        | dict(museval_s=museval_s, ours_s=ours_s, times_faster=museval_s / ours_s)
        | compare_scores(ours, theirs)
    )


def references_and_estimates(
    settings: Settings, store: Store, track: Track
) -> tuple[np.ndarray, np.ndarray]:
    """Load all stems and their oracle estimates, both `(stems, samples, channels)`."""
    mixture, stems = store.load(track)
    estimates = np.stack([oracle("irm", mixture, stem, settings) for stem in stems])
    return stems.swapaxes(1, 2), estimates.swapaxes(1, 2)


def compare_scores(ours: list[dict], theirs: list[dict]) -> dict:
    """Compare all scores of both programs; each list has one dict of scores per track.

    Returns the number of scores, the largest difference in dB, and how many scores are NaN in only
    one program.
    """
    both = [
        np.concatenate([track[metric].ravel() for track in scores for metric in METRICS])
        for scores in (ours, theirs)
    ]
    names = ("scores", "largest_difference_db", "unequal_nan")
    return dict(zip(names, disagreement(*both), strict=True))


if __name__ == "__main__":
    main()

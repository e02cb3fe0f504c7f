"""Score tables of the models, the mixture and two oracles on the test tracks of a run.

    estimates -> frames (one row a second) -> tracks (medians) -> summary, paired (statistics.py)

Taught in notebook 05. Test tracks are scored to report the scores, never to choose settings.
"""

from __future__ import annotations

import itertools
import json
import os
import timeit
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from mss_utils.config import MODELS, Run, Settings, expand_path
from mss_utils.data import MIXTURE, Store, Track
from mss_utils.environment import training_device
from mss_utils.evaluation import bsseval
from mss_utils.evaluation.bsseval import METRICS, WHOLE_TRACK
from mss_utils.evaluation.statistics import compare, summarise
from mss_utils.files import write_text
from mss_utils.models import load_model
from mss_utils.separation import read_all_estimates, separate

TABLES = ("frames", "tracks", "lost_frames", "cross_check", "summary", "paired", "cost")
KEY = ["references", "target", "track", "model", "seed"]
COLUMNS = dict(
    frames=[*KEY, "frame", *METRICS],
    tracks=[*KEY, *METRICS, *WHOLE_TRACK, "frames", "usable_frames"],
    lost_frames=[*KEY, "reason", "frames"],
)
MAX_SCORERS = 8  # processes; a four-minute stereo track with all its estimates takes 1 GB

Estimates = dict[tuple[str, int], np.ndarray]  # (model, seed) -> (targets, channels, samples)


def evaluate(run: Run, store: Store) -> dict[str, pd.DataFrame]:
    """Score the estimates that `write_estimates` wrote; write and return all of `TABLES`."""
    estimates_of = partial(read_all_estimates, run, store)
    tables = score(run.settings, store, estimates_of)
    tables["cross_check"] = cross_check(run.settings, store, estimates_of, tables["frames"])
    tables["summary"] = summarise(tables["tracks"])
    tables["paired"] = compare(tables["tracks"])
    tables["cost"] = cost(run, store)
    for name, table in tables.items():
        write_text(run.table(name), table.to_csv(index=False))
    return tables


def score(
    settings: Settings,
    store: Store,
    estimates_of: Callable[[Track], Estimates],
    tracks: list[Track] | None = None,
    scorer: str = "",
) -> dict[str, pd.DataFrame]:
    """Score estimates of tracks, by default every test track: frames, tracks and lost_frames.

    `estimates_of(track)` returns arrays (targets, channels, samples) by (model, seed). One target
    is scored beside its residual, whose estimate is the mixture minus that of the target; with
    `target=all` the targets are scored beside each other. The default scorer is that of the run.
    """
    tracks, scorer = tracks or store.split("test"), scorer or settings.scorer
    parts = []
    with _workers() as n_jobs, tqdm(total=len(tracks), desc=scorer, unit="track") as bar:
        for i in range(0, len(tracks), n_jobs):  # no more estimates in memory than there are jobs
            calls = [
                joblib.delayed(_score_one)(settings, store, track, estimates_of(track), scorer)
                for track in tracks[i : i + n_jobs]
            ]
            parts += joblib.Parallel(n_jobs)(calls)
            bar.update(len(calls))
    return {
        name: pd.DataFrame([row for part in parts for row in part[name]], columns=columns)
        for name, columns in COLUMNS.items()
    }


def cross_check(
    settings: Settings,
    store: Store,
    estimates_of: Callable[[Track], Estimates],
    frames: pd.DataFrame,
) -> pd.DataFrame:
    """Compare the table `frames` with the other scorer: first seeds of `cross_check_tracks` tracks.

    They are the shortest test tracks with sound in every target, because museval is slow.
    """
    tracks, rows = sorted(store.split("test"), key=lambda track: (track.samples, track.name)), []
    for target in store.targets(settings.target):
        row = 1 + store.stem_index(target)  # row 0 is the mixture
        tracks = [track for track in tracks if track.peak[row] > track.scale / 2]  # not rounding
    tracks = tracks[: settings.cross_check_tracks]
    if tracks and not bsseval.museval_is_available():
        warnings.warn("Without ffmpeg museval cannot cross-check the scores.", stacklevel=2)
    elif tracks:

        def first_seed(track: Track) -> Estimates:
            return {key: value for key, value in estimates_of(track).items() if key[1] == 0}

        other = "museval" if settings.scorer == "bss_eval" else "bss_eval"
        again = score(settings, store, first_seed, tracks, other)["frames"]
        both = frames.merge(again, on=[*KEY, "frame"], suffixes=("", "_other"))
        for metric in METRICS:
            ours, theirs = both[metric].to_numpy(), both[f"{metric}_other"].to_numpy()
            rows.append((metric, *bsseval.disagreement(ours, theirs), len(tracks)))
    columns = ["metric", "scores", "largest_difference_db", "unequal_nan", "tracks"]
    return pd.DataFrame(rows, columns=columns)


@contextmanager
def _workers() -> Iterator[int]:
    """Yield the number of parallel jobs: processes, or workers of the Dask cluster in MSS_DASK."""
    if not os.environ.get("MSS_DASK"):
        yield min(joblib.effective_n_jobs(-1), MAX_SCORERS)
        return
    scheduler = expand_path(os.environ["MSS_DASK"])
    if not scheduler.is_file():
        start = "start one with dask scheduler --scheduler-file FILE"
        raise FileNotFoundError(f"MSS_DASK names no scheduler file ({scheduler}): {start}.")
    from dask.distributed import Client

    with Client(scheduler_file=str(scheduler)), joblib.parallel_config("dask"):
        yield min(joblib.effective_n_jobs(-1), 2 * MAX_SCORERS)


def _score_one(
    settings: Settings, store: Store, track: Track, estimates: Estimates, scorer: str
) -> dict[str, list[dict]]:
    """Rows of the tables in `COLUMNS` for one track; runs in a worker."""
    targets = store.targets(settings.target)
    mixture, stems = store.load(track)
    references = stems[[store.stem_index(target) for target in targets]]
    scheme, groups = "stems", [slice(None)]
    if settings.target != "all":
        scheme, groups = "target+residual", [slice(i, i + 1) for i in range(len(targets))]
    tables = {name: [] for name in COLUMNS}
    for group in groups:
        true, labels, named = references[group], [*targets[group]], {}
        if scheme == "target+residual":
            true = np.concatenate([true, mixture - true])
            labels.append("residual")
        for (model, seed), estimate in estimates.items():
            estimate = estimate[group]
            if scheme == "target+residual":
                # The mixture minus itself would be silence, which has no score.
                residual = mixture if model == MIXTURE else mixture - estimate[0]
                estimate = np.stack([estimate[0], residual])
            named[f"{model}, seed {seed}, on {track.name!r}"] = estimate.swapaxes(1, 2)
        results = bsseval.score_track(true.swapaxes(1, 2), named, store.sample_rate, scorer)
        for key, scores in zip(estimates, results.values(), strict=True):
            for row, target in enumerate(targets[group]):
                index = dict(zip(KEY, (scheme, target, track.name, *key), strict=True))
                _add_rows(tables, index, scores, row, labels)
    return tables


def _add_rows(tables: dict, index: dict, scores: dict, row: int, labels: list[str]) -> None:
    """Add the scores of one estimate of one stem to the tables; `labels` name all stems."""
    frames = np.stack([scores[metric][row] for metric in METRICS])  # (metrics, frames)
    for i, values in enumerate(frames.T):
        tables["frames"].append(index | dict(frame=i) | dict(zip(METRICS, values, strict=True)))
    usable = frames[:, ~np.isnan(frames).any(axis=0)]
    medians = np.median(usable, axis=1) if usable.size else [np.nan] * len(METRICS)
    whole = {metric: scores[metric][row] for metric in WHOLE_TRACK}
    counts = dict(frames=frames.shape[1], usable_frames=usable.shape[1])
    tables["tracks"].append(index | dict(zip(METRICS, medians, strict=True)) | whole | counts)
    reasons = Counter()
    for i in np.flatnonzero(np.isnan(frames[0])):
        reason = "museval stopped"
        # A stem that is silent throughout does not cost the others a frame, see `score_track`.
        for kind, silent in zip(("estimate", "reference"), scores["silent"][::-1], strict=True):
            blamed = silent[:, i] & (~silent.all(axis=1) | (np.arange(len(silent)) == row))
            if blamed.any():
                stems = itertools.compress(labels, blamed)
                reason = "silent: " + " and ".join(f"{kind} of {stem}" for stem in stems)
        reasons[reason] += 1
    tables["lost_frames"] += [index | dict(reason=r, frames=n) for r, n in reasons.items()]


def cost(run: Run, store: Store) -> pd.DataFrame:
    """Tabulate size, training time and memory, and inference speed of each trained model."""
    rows, settings = [], run.settings
    targets = store.targets(settings.target)
    for target, model, seed in itertools.product(targets, MODELS, range(settings.seeds)):
        folder = run.model_folder(target, model, seed)
        row = json.loads((folder / "model.json").read_text("utf-8"))
        row |= dict(target=target, model=model, seed=seed)
        audio_s = row["steps"] * settings.batch_size * settings.segment_s
        row["audio_s_per_s"] = audio_s / row["train_s"]
        network = load_model(folder).to(training_device(settings))
        rows.append(row | dict(inference_rtf=real_time_factor(network, store)))
    columns = "target model seed parameters train_s steps audio_s_per_s inference_rtf"
    return pd.DataFrame(rows, columns=[*columns.split(), "peak_memory_mb"])


def real_time_factor(model: torch.nn.Module, store: Store) -> float:
    """Measure seconds of computing per second of audio on a validation track; best of three."""
    track = max(store.split("valid"), key=lambda track: track.samples)
    mixture, _ = store.load(track, 0, min(track.samples, 30 * store.sample_rate))
    call = partial(separate, model, mixture, store.sample_rate)
    return min(timeit.repeat(call, number=1, repeat=3)) / (mixture.shape[1] / store.sample_rate)

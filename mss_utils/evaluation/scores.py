"""Score tables: the three models, the untouched mixture and two oracles, on the test tracks of a run.

    estimates -> frames (one row per second) -> tracks (medians) --statistics.py--> summary and paired differences

Taught in notebook 05. The test set is scored to report it, never to choose anything.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from mss_utils.config import MODELS, Run, Settings, expand_path
from mss_utils.data import MIXTURE, Store, Track
from mss_utils.evaluation.bsseval import (
    METRICS,
    WHOLE_TRACK,
    disagreement,
    museval_is_available,
    score_track,
)
from mss_utils.evaluation.statistics import compare, summarise
from mss_utils.files import write_text
from mss_utils.separation import read_all_estimates, separate, trained_model

TABLES = ("frames", "tracks", "lost_frames", "cross_check", "summary", "paired", "cost")
KEY = ["references", "target", "track", "model", "seed"]
CROSS_SCORER = {"bss_eval": "museval", "museval": "bss_eval"}
MAX_SCORERS = 8  # a four-minute stereo track with all its estimates takes about a gigabyte

Estimates = dict[tuple[str, int], np.ndarray]  # by model and seed: (targets, channels, samples)
Job = tuple[Track, tuple[str, ...]]  # a track, and the targets that are scored together in it


def evaluate(run: Run, store: Store) -> dict[str, pd.DataFrame]:
    """Score every test track, write all of `TABLES` as `tables/<name>.csv` and return them by name.

    The estimates are read, see `write_estimates`. Raises ValueError naming model
    and track when an estimate cannot be scored (another length, NaN), FileNotFoundError when a model is not trained.
    """
    tables = score(run.settings, store, lambda track: read_all_estimates(run, store, track))
    tables["summary"] = summarise(tables["tracks"])
    tables["paired"] = compare(tables["tracks"])
    tables["cost"] = cost(run, store)
    for name, table in tables.items():
        write_text(run.table(name), table.to_csv(index=False))
    return tables


# --- scores -------------------------------------------------------------------------------------------------------------


def score(
    settings: Settings,
    store: Store,
    estimates_of: Callable[[Track], Estimates],
    n_cross_check: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Score what `estimates_of` makes of every test track: tables frames, tracks, lost_frames and referee.

    `n_cross_check` tracks (default: the setting) are scored by the other program too, see `_cross_check_tracks`, with the estimates of the
    first seed.
    """
    jobs = list(itertools.product(store.split("test"), scored_together(settings, store)))
    cross_checked = _cross_check_tracks(
        settings, store, settings.cross_check_tracks if n_cross_check is None else n_cross_check
    )
    cross_checked = [job for job in jobs if job[0] in cross_checked]
    targets, found_in = store.targets(settings.target), lru_cache(maxsize=1)(estimates_of)
    keys, kept = {}, {}  # keys: what the label of an estimate, which errors name, stands for

    def arguments(job: Job) -> tuple:
        track, together = job
        rows = [targets.index(target) for target in together]
        references, pairs = references_and(
            store, job, {key: found[rows] for key, found in found_in(track).items()}
        )
        labels = {
            f"{model}, seed {seed}, on {track.name!r}": (model, seed) for model, seed in pairs
        }
        keys.update(labels)
        if job in cross_checked:
            first = {label: pairs[key] for label, key in labels.items() if key[1] == 0}
            kept[job] = references, first, store.sample_rate, CROSS_SCORER[settings.scorer]
        return (
            references,
            {label: pairs[key] for label, key in labels.items()},
            store.sample_rate,
            settings.scorer,
        )

    def rows(job: Job, scored: dict[str, dict]) -> dict[str, pd.DataFrame]:
        return _rows(job, {keys[label]: scores for label, scores in scored.items()})

    scored = tqdm(
        _in_parallel(score_track, jobs, arguments), desc="Evaluation", unit="track", total=len(jobs)
    )
    parts = list(map(rows, jobs, list(scored)))  # to its end, so that the bar gets there too
    tables = {
        name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]
    }
    again = [
        rows(job, scored)["frames"]
        for job, scored in zip(cross_checked, _in_parallel(score_track, cross_checked, kept.get))
    ]
    return tables | dict(cross_check=_cross_check_table(tables["frames"], again))


def scored_together(settings: Settings, store: Store) -> list[tuple[str, ...]]:
    """The targets that are each other's references: all of them for `all`, else each alone, beside its residual."""
    targets = store.targets(settings.target)
    return [targets] if settings.target == "all" else [(target,) for target in targets]


def _cross_check_tracks(settings: Settings, store: Store, count: int) -> list[Track]:
    """The `count` shortest test tracks in which every target sounds: museval takes minutes for a song."""
    if count and not museval_is_available():
        warnings.warn(
            "Without ffmpeg and ffprobe museval cannot be imported: no score is checked by it.",
            stacklevel=3,
        )
        return []
    rows = [
        1 + store.stem_index(target) for target in store.targets(settings.target)
    ]  # row 0 is the mixture
    # A peak above half a step is what 16 bits have kept.
    sounding = [
        track
        for track in store.split("test")
        if all(track.peak[row] > track.scale / 2 for row in rows)
    ]
    return sorted(sounding, key=lambda track: (track.samples, track.name))[:count]


def references_and(store: Store, job: Job, found: Estimates) -> tuple[np.ndarray, dict]:
    """References and estimates of a track and the targets that are scored together, for BSSEval: `(stems, samples, channels)`.

    One target is scored beside its residual, whose estimate is the mixture minus that of the target; several are scored beside
    each other. Raises ValueError for an estimate of another shape.
    """
    track, targets = job
    mixture, stems = store.load(track)
    references = stems[[store.stem_index(target) for target in targets]]
    for (model, seed), estimate in found.items():
        if estimate.shape != references.shape:
            raise ValueError(
                f"{model}, seed {seed}, on {track.name!r}: the estimate has shape {estimate.shape}, expected (targets, channels, samples) "
                f"{references.shape}. Trim or pad it to the length of the track."
            )
    if len(targets) == 1:
        references = np.stack([references[0], mixture - references[0]])
        # mixture - mixture would be silence, which has no score: the mixture stands for both.
        rest = lambda model, estimate: mixture if model == MIXTURE else mixture - estimate
        found = {
            key: np.stack([estimate[0], rest(key[0], estimate[0])])
            for key, estimate in found.items()
        }
    return references.swapaxes(1, 2), {
        key: estimate.swapaxes(1, 2) for key, estimate in found.items()
    }


def _in_parallel(function: Callable, jobs: list, arguments: Callable[[object], tuple]) -> Iterator:
    """`function(*arguments(job))` of every job, in order, several at once, see `_workers`; `arguments` runs in this process.

    What a killed process of this machine was at is done again here, one job after the other; Dask sees to its own workers.
    """
    with _workers() as n_at_once:
        for first in range(0, len(jobs), n_at_once):
            calls = [arguments(job) for job in jobs[first : first + n_at_once]]
            try:
                results = joblib.Parallel(n_at_once, batch_size=1)(
                    joblib.delayed(function)(*call) for call in calls
                )
            except BrokenProcessPool:
                warnings.warn(
                    "A scoring process was killed, most likely because memory ran out. Its jobs are done again, one after the other; "
                    "if that happens often, set LOKY_MAX_CPU_COUNT=1.",
                    stacklevel=2,
                )
                results = (function(*call) for call in calls)
            yield from results


@contextmanager
def _workers() -> Iterator[int]:
    """How many jobs at once: up to `MAX_SCORERS` processes here, or twice as many on the Dask cluster whose scheduler file MSS_DASK names."""
    cluster = os.environ.get("MSS_DASK")
    if not cluster:
        yield min(joblib.effective_n_jobs(-1), MAX_SCORERS)
        return
    if not expand_path(cluster).is_file():
        raise FileNotFoundError(
            f"MSS_DASK names no scheduler file ({expand_path(cluster)}); start one with: dask scheduler --scheduler-file FILE"
        )
    from dask.distributed import Client

    with Client(scheduler_file=str(expand_path(cluster))), joblib.parallel_config("dask"):
        yield min(
            joblib.effective_n_jobs(-1), 2 * MAX_SCORERS
        )  # all they are given is held here first


def _rows(job: Job, found: dict[tuple[str, int], dict]) -> dict[str, pd.DataFrame]:
    """Rows of one track and what is scored together in the tables frames, tracks and lost_frames."""
    track, targets = job
    scheme, labels = (
        ("stems", targets) if len(targets) > 1 else ("target+residual", (*targets, "residual"))
    )
    frames, tracks, lost = [], [], []
    for (model, seed), scores in found.items():
        for row, target in enumerate(targets):
            key = dict(zip(KEY, (scheme, target, track.name, model, seed)))
            table = pd.DataFrame({metric: scores[metric][row] for metric in METRICS})
            usable = table.dropna()
            frames.append(
                pd.DataFrame([key] * len(table)).assign(frame=range(len(table))).join(table)
            )
            whole = {metric: scores[metric][row] for metric in WHOLE_TRACK}
            tracks.append(
                key
                | usable.median().to_dict()
                | whole
                | dict(frames=len(table), usable_frames=len(usable))
            )
            counts = _why_lost(scores["silent"], labels, row)[table["SDR"].isna()].value_counts(
                sort=False
            )
            lost += [key | dict(reason=reason, frames=count) for reason, count in counts.items()]
    columns = [*KEY, "reason", "frames"]
    return dict(
        frames=pd.concat(frames, ignore_index=True),
        tracks=pd.DataFrame(tracks),
        lost_frames=pd.DataFrame(lost, columns=columns),
    )


def _why_lost(silent: tuple[np.ndarray, np.ndarray], stems: Sequence[str], row: int) -> pd.Series:
    """In words, which references are silent in each frame, or if none is, which estimates; `silent` holds bool arrays (stems, frames).

    Another stem that is silent throughout costs the stem of `row` no frames, see `score_track`.
    """
    mine = np.arange(len(stems))[:, None] == row
    references, estimates = (
        signals & (mine | ~signals.all(axis=1, keepdims=True)) for signals in silent
    )
    named = [f"{kind} of {stem}" for kind in ("reference", "estimate") for stem in stems]
    blamed = np.concatenate([references, estimates & ~references.any(axis=0)])
    reason = lambda frame: (
        "silent: " + " and ".join(itertools.compress(named, frame))
        if frame.any()
        else "museval stopped"
    )
    return pd.Series(list(map(reason, blamed.T)), dtype=str)


def _cross_check_table(frames: pd.DataFrame, again: list[pd.DataFrame]) -> pd.DataFrame:
    """What the two programs differ by in each metric, see `disagreement`."""
    columns = ["metric", "scores", "largest_difference_db", "unequal_nan", "tracks"]
    if not again:
        return pd.DataFrame(columns=columns)
    both = frames.merge(
        pd.concat(again), on=[*KEY, "frame"], suffixes=("", " again"), validate="one_to_one"
    )
    rows = []
    for metric in METRICS:
        count, largest, _, unequal = disagreement(
            both[metric].to_numpy(), both[f"{metric} again"].to_numpy()
        )
        rows.append((metric, count, largest, unequal, len(again)))
    return pd.DataFrame(rows, columns=columns)


# --- cost ---------------------------------------------------------------------------------------------------------------


def cost(run: Run, store: Store) -> pd.DataFrame:
    """What each trained model cost: parameters, training time and speed, inference time and memory."""
    rows = []
    for target, name, seed in itertools.product(
        store.targets(run.settings.target), MODELS, range(run.settings.seeds)
    ):
        folder = run.model_folder(target, name, seed)
        known = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        trained_s = known["steps"] * run.settings.batch_size * run.settings.segment_s
        rows.append(
            dict(
                target=target,
                model=name,
                seed=seed,
                parameters=known["parameters"],
                train_s=known["train_s"],
                steps=known["steps"],
                audio_s_per_s=trained_s / known["train_s"],
                inference_rtf=real_time_factor(trained_model(run, target, name, seed), store),
                peak_memory_mb=known["peak_memory_mb"],
            )
        )
    return pd.DataFrame(rows)


def real_time_factor(model: torch.nn.Module, store: Store, repeats: int = 3) -> float:
    """Seconds of computing per second of audio when separating up to 30 s of a validation track; best of `repeats`."""
    track = max(store.split("valid"), key=lambda track: track.samples)
    mixture, _ = store.load(track, 0, min(track.samples, 30 * store.sample_rate))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        separate(model, mixture, store.sample_rate)
        times.append(time.perf_counter() - started)
    return min(times) / (mixture.shape[1] / store.sample_rate)

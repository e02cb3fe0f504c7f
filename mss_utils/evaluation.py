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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from mss_utils.data import MIXTURE, Store, Track
from mss_utils.files import write_text
from mss_utils.metrics import METRICS, WHOLE_TRACK, disagreement, museval_works, score_track
from mss_utils.models import load_model
from mss_utils.models.unet import STFT
from mss_utils.separation import separate
from mss_utils.settings import MODELS, Run, Settings, from_root
from mss_utils.statistics import by_seed, compare, summarise
from mss_utils.training import train

ORACLES = ("irm", "mwf")
ROWS = (MIXTURE, *MODELS, *ORACLES)
ABLATIONS = ("random_mix", "curriculum")  # settings that are turned round
TABLES = ("frames", "tracks", "lost_frames", "referee", "summary", "paired", "cost", "ablations")
ABLATION_COLUMNS = [
    "target",
    "model",
    "ablation",
    "metric",
    "with_it",
    "without_it",
    "median_difference",
    "ci_low",
    "ci_high",
    "p_wilcoxon",
    "p_corrected",
    "tracks",
    "seeds",
    "steps",
]
KEY = ["references", "target", "track", "model", "seed"]
OTHER_SCORER = {"bss_eval": "museval", "museval": "bss_eval"}
MAX_SCORERS = 8  # a four-minute stereo track with all its estimates takes about a gigabyte

Estimates = dict[tuple[str, int], np.ndarray]  # by model and seed: (targets, channels, samples)
Job = tuple[Track, tuple[str, ...]]  # a track, and the targets that are scored together in it


def evaluate(run: Run, store: Store) -> dict[str, pd.DataFrame]:
    """Score every test track, write all of `TABLES` as `tables/<name>.csv` and return them by name.

    Nothing is written before every model is scored; the ablations, which train more, come last. Raises ValueError naming model
    and track when an estimate cannot be scored (another length, NaN), FileNotFoundError when a model is not trained.
    """
    tables = score(run.settings, store, lambda track: all_estimates(run, store, track))
    tables["summary"] = summarise(tables["tracks"])
    tables["paired"] = compare(tables["tracks"])
    tables["cost"] = cost(run, store)
    for name, table in tables.items():
        write_text(run.table(name), table.to_csv(index=False))
    tables["ablations"] = ablate(run, store, tables["tracks"])
    write_text(run.table("ablations"), tables["ablations"].to_csv(index=False))
    return tables


# --- estimates ----------------------------------------------------------------------------------------------------------


def estimates(
    run: Run, store: Store, track: Track, target: str, seed: int = 0, rows: Iterable[str] = ROWS
) -> dict[str, np.ndarray]:
    """Estimates of `target` in one track by these rows of the score table, each `(channels, samples)` float32."""
    mixture, stems = store.load(track)
    reference = stems[store.stem_index(target)]

    def row(name: str) -> np.ndarray:
        if name in MODELS:
            return estimate_of(run, store, mixture, target, name, seed)
        return oracle(name, mixture, reference, run.settings) if name in ORACLES else mixture

    return {name: row(name) for name in rows}


def estimate_of(
    run: Run, store: Store, mixture: np.ndarray, target: str, model: str, seed: int = 0
) -> np.ndarray:
    """Estimate of `target` by one trained model of a run, `(channels, samples)` like the mixture."""
    return separate(model_of(run, target, model, seed), mixture, store.sample_rate)


def oracle(name: str, mixture: np.ndarray, target: np.ndarray, settings: Settings) -> np.ndarray:
    """What a filter that knows the true target makes of the mixture, with the STFT of model A; all arrays `(channels, samples)`.

    `irm` is the ideal ratio mask |T| / (|T| + |R|) with R the residual; it keeps the mixture's phase, as A does. `mwf` is the
    multichannel Wiener filter, for one channel the mask |T|^2 / (|T|^2 + |R|^2). Both are reference points for A, no bounds
    for B. Source: F.-R. Stoeter et al., "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018, section 3.2.
    """
    stft = STFT(settings.n_fft, settings.hop)
    signals = [
        torch.from_numpy(np.ascontiguousarray(signal))[None]
        for signal in (mixture, target, mixture - target)
    ]
    mixed, wanted, rest = map(stft, signals)  # (1, channels, bins, frames)
    found = (
        mixed * (wanted.abs() / (wanted.abs() + rest.abs() + 1e-10))
        if name == "irm"
        else wiener(mixed, wanted, rest)
    )
    return stft.inverse(found, mixture.shape[-1])[0].numpy()


def wiener(
    mixed: torch.Tensor, wanted: torch.Tensor, rest: torch.Tensor, bins_at_once: int = 64
) -> torch.Tensor:
    """The mixture under the Wiener filter of the true target and residual, all complex `(1, channels, bins, frames)`.

    Target and residual are Gaussian with a power v of their own in every bin and frame and one spatial covariance R a bin; the
    filter is v_T R_T (v_T R_T + v_R R_R)^-1. Source: N. Duong, E. Vincent, R. Gribonval, "Under-determined reverberant audio
    source separation using a full-rank spatial covariance model", IEEE TASLP 18(7), 2010.
    """
    blocks = []
    for parts in zip(*(signal[0].split(bins_at_once, dim=1) for signal in (mixed, wanted, rest))):
        x, t, r = (
            part.permute(1, 2, 0)[..., None] for part in parts
        )  # (bins, frames, channels, 1)
        target, residual = _gaussian(t), _gaussian(r)
        floor = 1e-10 * torch.eye(len(mixed[0]), dtype=mixed.dtype)
        blocks.append(
            (target @ torch.linalg.solve(target + residual + floor, x))[..., 0].permute(2, 0, 1)
        )
    return torch.cat(blocks, dim=1)[None]


def _gaussian(vectors: torch.Tensor, n_iterations: int = 2) -> torch.Tensor:
    """v R of every bin and frame, `(bins, frames, channels, channels)`, fitted to complex `(bins, frames, channels, 1)`."""
    outer, n_channels = vectors @ vectors.mH, vectors.shape[2]
    unit = torch.eye(n_channels, dtype=vectors.dtype)
    spatial = unit.expand(len(vectors), 1, n_channels, n_channels)
    for _ in range(n_iterations):
        power = (
            torch.linalg.solve(spatial, outer).diagonal(dim1=-2, dim2=-1).sum(-1).real / n_channels
        )  # (bins, frames)
        power = power.clamp(min=1e-12)[..., None, None]
        sounding = (
            (power > 1e-12).sum(dim=1, keepdim=True).clamp(min=1)
        )  # frames of digital silence say nothing of the place
        spatial = (outer / power).sum(dim=1, keepdim=True) / sounding + 1e-5 * unit
    return power * spatial


def model_of(run: Run, target: str, model: str, seed: int = 0) -> torch.nn.Module:
    """One trained model of a run, in evaluation mode."""
    folder = run.model_folder(target, model, seed)
    written = folder / "model.json"
    return _loaded(folder, written.stat().st_mtime_ns if written.exists() else 0)


@lru_cache(maxsize=32)
def _loaded(folder: Path, _written_ns: int) -> torch.nn.Module:
    """A model stays in memory until its folder is written anew."""
    return load_model(folder)


def all_estimates(run: Run, store: Store, track: Track) -> Estimates:
    """Estimates of one track by every row of the score table; what is not trained has one seed."""
    found = {}
    for seed in range(run.settings.seeds):
        names = MODELS if seed else ROWS
        by_target = [
            estimates(run, store, track, target, seed, names)
            for target in store.targets(run.settings.target)
        ]
        found |= {(name, seed): np.stack([rows[name] for rows in by_target]) for name in names}
    return found


# --- scores -------------------------------------------------------------------------------------------------------------


def score(
    settings: Settings,
    store: Store,
    estimates_of: Callable[[Track], Estimates],
    n_referee: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Score what `estimates_of` makes of every test track: tables frames, tracks, lost_frames and referee.

    `n_referee` tracks (default: the setting) are scored by the other program too, see `_refereed`, with the estimates of the
    first seed.
    """
    jobs = list(itertools.product(store.split("test"), scored_together(settings, store)))
    refereed = _refereed(
        settings, store, settings.referee_tracks if n_referee is None else n_referee
    )
    refereed = [job for job in jobs if job[0] in refereed]
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
        if job in refereed:
            first = {label: pairs[key] for label, key in labels.items() if key[1] == 0}
            kept[job] = references, first, store.sample_rate, OTHER_SCORER[settings.scorer]
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
        for job, scored in zip(refereed, _in_parallel(score_track, refereed, kept.get))
    ]
    return tables | dict(referee=_referee(tables["frames"], again))


def scored_together(settings: Settings, store: Store) -> list[tuple[str, ...]]:
    """The targets that are each other's references: all of them for `all`, else each alone, beside its residual."""
    targets = store.targets(settings.target)
    return [targets] if settings.target == "all" else [(target,) for target in targets]


def _refereed(settings: Settings, store: Store, count: int) -> list[Track]:
    """The `count` shortest test tracks in which every target sounds: museval takes minutes for a song."""
    if count and not museval_works():
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
    if not from_root(cluster).is_file():
        raise FileNotFoundError(
            f"MSS_DASK names no scheduler file ({from_root(cluster)}); start one with: dask scheduler --scheduler-file FILE"
        )
    from dask.distributed import Client

    with Client(scheduler_file=str(from_root(cluster))), joblib.parallel_config("dask"):
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


def _referee(frames: pd.DataFrame, again: list[pd.DataFrame]) -> pd.DataFrame:
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


# --- ablations ----------------------------------------------------------------------------------------------------------


def ablation_runs(run: Run) -> dict[str, Run]:
    """For every ablation the same run with that one setting turned round: what was on is off."""
    return {
        name: run.variant(f"ablations/{name}", **{name: not getattr(run.settings, name)})
        for name in ABLATIONS
    }


def ablate(run: Run, store: Store, tracks: pd.DataFrame) -> pd.DataFrame:
    """What random mixing and the curriculum bring: differences of a model trained with to one trained without, on the test tracks.

    Trains what is missing, `steps` steps like the run's own models, whose scores are in `tracks`. Columns: those of `compare` but
    for a and b: model, the setting that was left out, and the medians with and without it. Nothing is chosen by these scores.
    """
    if not run.settings.ablations:
        return pd.DataFrame(columns=ABLATION_COLUMNS)
    runs = ablation_runs(run)
    both = pd.concat([tracks, score_variants(run, store, runs, run.settings.ablations)])
    # In a run that goes without by its settings it is the ablation that has it.
    pair_of = lambda model, name: (model, f"{model} {name}")[
        :: 1 if getattr(run.settings, name) else -1
    ]
    pairs = {
        (model, name): pair_of(model, name)
        for model, name in itertools.product(run.settings.ablations, runs)
    }
    keys = {pair: dict(zip(("model", "ablation"), key)) for key, pair in pairs.items()}

    def median(target: str, label: str, metric: str) -> float:
        return (
            by_seed(both[(both["target"] == target) & (both["model"] == label)], metric)
            .mean(axis=1)
            .median()
        )

    rows = []
    for row in compare(both, list(keys)).to_dict("records"):
        target, metric, sides = row["target"], row["metric"], (row["a"], row["b"])
        scores = dict(
            zip(("with_it", "without_it"), (median(target, side, metric) for side in sides))
        )
        rows.append(row | keys[sides] | scores | dict(steps=run.settings.steps))
    return pd.DataFrame(rows, columns=ABLATION_COLUMNS).sort_values(
        ["target", "model", "ablation"], kind="stable", ignore_index=True
    )


def score_variants(
    run: Run, store: Store, variants: Mapping[str, Run], models: Iterable[str]
) -> pd.DataFrame:
    """Train what is missing of `models` in each variant of a run, and score it on the test tracks.

    Returns the table `tracks` of them; a model is called "<model> <variant>" there.
    """
    targets = store.targets(run.settings.target)
    todo = list(itertools.product(models, variants, range(run.settings.seeds)))
    for model, name, seed in todo:
        for target in targets:
            train(variants[name], store, target, model, seed)

    def estimates_of(track: Track) -> Estimates:
        mixture, _ = store.load(track)
        of = lambda model, name, seed: np.stack(
            [estimate_of(variants[name], store, mixture, target, model, seed) for target in targets]
        )
        return {(f"{model} {name}", seed): of(model, name, seed) for model, name, seed in todo}

    return score(run.settings, store, estimates_of, n_referee=0)["tracks"]


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
                inference_rtf=real_time_factor(model_of(run, target, name, seed), store),
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

"""Score tables: the three models, the untouched mixture and the ratio-mask oracle, on the test tracks of a run.

    estimates -> frames (one row per second) -> tracks (medians) -> summary and paired differences -> sentences

Taught in notebook 05. The test set is scored here and nowhere else.
"""

from __future__ import annotations

import itertools
import json
import time
from functools import lru_cache
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm.auto import tqdm

from mss_utils.data import MIXTURE, Store, Track
from mss_utils.metrics import METRICS, BSSEval, si_sdr, utterance_sdr
from mss_utils.models import load_model
from mss_utils.models.unet import STFT
from mss_utils.separation import separate
from mss_utils.settings import MODELS, Run, Settings, write_text

ORACLE = "irm"
ROWS = (MIXTURE, *MODELS, ORACLE)
PAIRS = (("demucs_lstm", "unet"), ("demucs_attention", "unet"), ("demucs_attention", "demucs_lstm"))
TRACK_METRICS = (*METRICS, "utterance_SDR", "SI_SDR")
N_BOOTSTRAP = 10_000


def evaluate(run: Run, store: Store) -> dict[str, pd.DataFrame]:
    """Score every test track and write `tables/{frames,tracks,summary,paired,cost}.csv`; return them by name.

    Raises ValueError when no test track is as long as one frame of BSSEval (1 s).
    """
    tracks = [track for track in store.split("test") if track.samples >= store.sample_rate]
    if not tracks:
        raise ValueError(f"No test track in {store.source} lasts one second, the length of a frame: nothing can be scored.")
    # Separation uses every core; scoring a track uses one, so tracks are scored beside the separation of the next.
    jobs = (joblib.delayed(_score_track)(run, store, track, *_all_estimates(run, store, track)) for track in tracks)
    parallel = joblib.Parallel(n_jobs=-1, prefer="threads", pre_dispatch="n_jobs", return_as="generator")
    scored = list(tqdm(parallel(jobs), total=len(tracks), desc="Evaluation", unit="track"))
    tables = {"frames": pd.concat([frames for frames, _ in scored], ignore_index=True),
              "tracks": pd.concat([tracks for _, tracks in scored], ignore_index=True)}
    tables["summary"] = summarise(tables["tracks"])
    tables["paired"] = compare(tables["tracks"])
    tables["cost"] = cost(run, store)
    for name, table in tables.items():
        write_text(run.table(name), table.to_csv(index=False))
    return tables


def estimates(run: Run, store: Store, track: Track, target: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Estimates of `target` in one track by every row of the score table, each `(channels, samples)` float32."""
    mixture, stems = store.load(track)
    reference = stems[store.stem_index(target)]
    rows = {MIXTURE: mixture}
    for name in MODELS:
        rows[name] = separate(_model(run.model_folder(target, name, seed)), mixture, store.sample_rate)
    others = stems.sum(axis=0, keepdims=True) - reference if run.settings.target == "all" else mixture - reference
    rows[ORACLE] = ratio_mask(mixture, reference, others, run.settings)
    return rows


def ratio_mask(mixture: np.ndarray, target: np.ndarray, residual: np.ndarray, settings: Settings) -> np.ndarray:
    """Oracle: the mixture under the mask |T| / (|T| + |R|) of the true target and residual, with the STFT of model A.

    All arrays `(channels, samples)`. It keeps the mixture's phase, as A does: a reference point for A, not a bound for B.
    """
    stft = STFT(settings.n_fft, settings.hop)
    signals = [torch.from_numpy(np.ascontiguousarray(signal))[None] for signal in (mixture, target, residual.reshape(target.shape))]
    mixed, wanted, rest = map(stft, signals)
    mask = wanted.abs() / (wanted.abs() + rest.abs() + 1e-10)
    return stft.inverse(mixed * mask, mixture.shape[-1])[0].numpy()


def _model(folder: Path) -> torch.nn.Module:
    return _loaded(folder, (folder / "model.json").stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _loaded(folder: Path, _written_ns: int) -> torch.nn.Module:
    """A model stays in memory until its folder is written anew."""
    return load_model(folder)


def _all_estimates(run: Run, store: Store, track: Track) -> tuple[dict, tuple[str, ...]]:
    """Estimates of one track as `{(model, seed): (targets, channels, samples)}`, and the targets they are of."""
    targets, found = store.targets(run.settings.target), {}
    for seed in range(run.settings.seeds):
        rows = [estimates(run, store, track, target, seed) for target in targets]
        for name in ROWS:
            if seed == 0 or name in MODELS:
                found[name, seed] = np.stack([row[name] for row in rows])
    return found, targets


def _score_track(run: Run, store: Store, track: Track, found: dict, targets: tuple[str, ...]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Frame rows and track rows of one track. See DESIGN's *Scores*: one target is scored beside its residual."""
    mixture, stems = store.load(track)
    wanted = stems[[store.stem_index(target) for target in targets]]
    single = len(targets) == 1
    references = np.stack([wanted[0], mixture - wanted[0]]) if single else wanted
    scorer = BSSEval(references.swapaxes(1, 2), store.sample_rate)
    frames, tracks = [], []
    for (name, seed), estimate in found.items():
        # mixture - mixture would be silence, which has no score: the mixture stands for both.
        rest = mixture if name == MIXTURE else mixture - estimate[0]
        scores = scorer.score((np.stack([estimate[0], rest]) if single else estimate).swapaxes(1, 2))
        for row, target in enumerate(targets):
            key = dict(references="target+residual" if single else "stems", target=target, track=track.name, model=name, seed=seed)
            table = pd.DataFrame({metric: scores[metric][row] for metric in METRICS})
            frames.append(pd.DataFrame([key] * len(table)).assign(frame=range(len(table))).join(table))
            tracks.append(key | _track_scores(table, wanted[row], estimate[row]))
    return pd.concat(frames, ignore_index=True), pd.DataFrame(tracks)


def _track_scores(frames: pd.DataFrame, reference: np.ndarray, estimate: np.ndarray) -> dict:
    """Medians over the frames that have a score, and the two scores of the whole track."""
    usable = frames.dropna()
    medians = {metric: usable[metric].median() for metric in METRICS}
    whole = dict(utterance_SDR=utterance_sdr(reference.T, estimate.T), SI_SDR=si_sdr(reference.T, estimate.T))
    return medians | whole | dict(frames=len(frames), usable_frames=len(usable))


def summarise(tracks: pd.DataFrame) -> pd.DataFrame:
    """Median over tracks with a bootstrap 95 % interval, and mean, of every metric; seeds are averaged per track first."""
    rows = []
    for (references, target, model), group in tracks.groupby(["references", "target", "model"], sort=False):
        for metric in TRACK_METRICS:
            values = group.groupby("track")[metric].mean().dropna()
            low, high = median_interval(values.to_numpy())
            rows.append(dict(
                references=references, target=target, model=model, metric=metric, median=values.median(), mean=values.mean(),
                ci_low=low, ci_high=high, tracks=len(values), seeds=group["seed"].nunique(),
            ))
    return pd.DataFrame(rows)


def compare(tracks: pd.DataFrame) -> pd.DataFrame:
    """Paired differences a - b over the tracks: median, bootstrap 95 % interval, Wilcoxon signed-rank p, Holm-corrected.

    The correction covers the three pairs of one target and metric.
    """
    rows = []
    for target, metric in itertools.product(tracks["target"].unique(), TRACK_METRICS):
        part = tracks[tracks["target"] == target]
        values = part.groupby(["track", "model"])[metric].mean().unstack()
        family = [_paired_row(target, metric, a, b, (values[a] - values[b]).dropna(), part) for a, b in PAIRS]
        for row, corrected in zip(family, holm([row["p_wilcoxon"] for row in family])):
            rows.append(row | dict(p_corrected=corrected))
    columns = ["target", "a", "b", "metric", "median_difference", "ci_low", "ci_high", "p_wilcoxon", "p_corrected", "tracks", "seeds"]
    return pd.DataFrame(rows)[columns]


def _paired_row(target: str, metric: str, a: str, b: str, difference: pd.Series, tracks: pd.DataFrame) -> dict:
    low, high = median_interval(difference.to_numpy())
    p = stats.wilcoxon(difference).pvalue if len(difference) and difference.any() else np.nan
    return dict(
        target=target, a=a, b=b, metric=metric, median_difference=difference.median(), ci_low=low, ci_high=high, p_wilcoxon=p,
        tracks=len(difference), seeds=tracks.loc[tracks["model"] == a, "seed"].nunique(),
    )


def median_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of `values` (Efron, 1979); NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    draws = np.random.default_rng(0).integers(len(values), size=(N_BOOTSTRAP, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values (Holm, 1979); NaN stays NaN and does not count."""
    p = np.asarray(p_values, float)
    corrected, largest = np.full(len(p), np.nan), 0.0
    tested = [index for index in np.argsort(p) if np.isfinite(p[index])]
    for rank, index in enumerate(tested):
        largest = max(largest, min(1.0, p[index] * (len(tested) - rank)))
        corrected[index] = largest
    return corrected.tolist()


def sentence(row: pd.Series | dict) -> str:
    """One row of the paired table as a plain sentence; with fewer than three seeds it speaks of these trained weights."""
    label = {"unet": "A", "demucs_lstm": "B1", "demucs_attention": "B2"}
    a, b = label[row["a"]], label[row["b"]]
    metric = row["metric"].replace("_", " ")
    where = f"{row['tracks']} tracks, {row['seeds']} seed{'s' if row['seeds'] != 1 else ''}"
    whose = "" if row["seeds"] >= 3 else " for these trained weights"
    interval = f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
    if not (row["ci_low"] > 0 or row["ci_high"] < 0):
        return f"The data cannot tell {a} from {b} in {metric}{whose}: {row['median_difference']:+.2f} dB {interval}, {where}."
    better, worse = (a, b) if row["median_difference"] > 0 else (b, a)
    size, bounds = abs(row["median_difference"]), sorted(abs(row[key]) for key in ("ci_low", "ci_high"))
    return f"{better} is {size:.2f} dB better than {worse} in {metric}{whose} [{bounds[0]:.2f}, {bounds[1]:.2f}], {where}."


def cost(run: Run, store: Store) -> pd.DataFrame:
    """What each trained model cost: parameters, training time and speed, inference time and memory."""
    rows = []
    for target, name, seed in itertools.product(store.targets(run.settings.target), MODELS, range(run.settings.seeds)):
        folder = run.model_folder(target, name, seed)
        known = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        trained_s = known["steps"] * run.settings.batch_size * run.settings.segment_s
        rows.append(dict(
            target=target, model=name, seed=seed, parameters=known["parameters"], train_s=known["train_s"], steps=known["steps"],
            audio_s_per_s=trained_s / known["train_s"], inference_rtf=real_time_factor(_model(folder), store),
            peak_memory_mb=known["peak_memory_mb"],
        ))
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

"""The estimates of a run: every test track is separated once, and everything after that reads the files.

    results/<run>/estimates/<model>-seed<k>/test/<track>/<target>.wav             the estimate
    results/<run>/estimates/<model>-seed<k>/test/<track>/no_<target>.wav          mixture minus estimate
    results/<run>/estimates/<model>-seed<k>/<target>.json                         what they were made from

For vocals the residual is called `accompaniment.wav`: this is the folder layout that museval evaluates. Files are
32-bit float WAV, so nothing is rounded. Taught in notebook 05.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm.auto import tqdm

from mss_utils.config import MODELS, Run
from mss_utils.data import MIXTURE, Store, Track
from mss_utils.environment import training_device
from mss_utils.files import atomic_write, is_safe_file_name, safe_name, write_text
from mss_utils.models import load_model
from mss_utils.models.oracles import ORACLES, oracle
from mss_utils.separation.overlap_add import separate

ESTIMATED = (*MODELS, *ORACLES)  # systems whose estimates are files
ROWS = (MIXTURE, *ESTIMATED)  # rows of the score table


def write_estimates(
    run: Run, store: Store, models: Iterable[str] = ESTIMATED, trained: Run | None = None
) -> None:
    """Separate every test track with the trained models and oracles of a run; skip what is up to date.

    Parameters
    ----------
    run : Run
        The estimates are written to its folder.
    store : Store
        Its test tracks are separated.
    models : iterable of str
        Which of `ESTIMATED` to write; models in every seed of the run, oracles once.
    trained : Run, optional
        The run that holds the trained models, if it is another one.

    Raises
    ------
    FileNotFoundError
        A model is not trained.
    """
    trained = trained or run
    for model, target in itertools.product(models, store.targets(run.settings.target)):
        for seed in range(1 if model in ORACLES else run.settings.seeds):
            manifest = estimates_folder(run, model, seed) / f"{target}.json"
            key = _key(trained, store, target, model, seed)
            if not _is_current(manifest, key, run, store, target, model, seed):
                _write_all(run, store, target, model, seed, trained)
                write_text(manifest, json.dumps(key, indent=2) + "\n")


def _write_all(run: Run, store: Store, target: str, model: str, seed: int, trained: Run) -> None:
    network = None
    if model in MODELS:
        device = training_device(run.settings)
        network = load_model(trained.model_folder(target, model, seed)).to(device)
    for track in tqdm(store.split("test"), desc=f"estimates of {target}, {model}", unit="track"):
        mixture, stems = store.load(track)
        if network is None:
            estimate = oracle(model, mixture, stems[store.stem_index(target)], run.settings)
        else:
            estimate = separate(network, mixture, store.sample_rate)
        paths = estimate_paths(run, track, target, model, seed)
        for path, audio in zip(paths, (estimate, mixture - estimate), strict=True):
            with atomic_write(path) as part:
                soundfile.write(part, audio.T, store.sample_rate, "FLOAT", format="WAV")


def estimates_folder(run: Run, model: str, seed: int = 0) -> Path:
    """`results/<run>/estimates/<model>-seed<k>`, the folder that museval evaluates."""
    return run.folder / "estimates" / f"{model}-seed{seed}"


def estimate_paths(
    run: Run, track: Track, target: str, model: str, seed: int = 0
) -> tuple[Path, Path]:
    """Files of the estimate of a target and of its residual, in one test track."""
    name = track.name if is_safe_file_name(track.name) else safe_name(track.name)
    folder = estimates_folder(run, model, seed) / "test" / name
    residual = "accompaniment" if target == "vocals" else f"no_{target}"
    return folder / f"{target}.wav", folder / f"{residual}.wav"


def read_estimate(
    run: Run, store: Store, track: Track, target: str, model: str, seed: int = 0
) -> np.ndarray:
    """One estimate of a test track, `(channels, samples)` float32; the estimate of `mixture` is the mixture.

    Raises
    ------
    FileNotFoundError
        The estimate has not been written.
    """
    if model == MIXTURE:
        return store.load(track)[0]
    path, _ = estimate_paths(run, track, target, model, seed)
    if not path.is_file():
        raise FileNotFoundError(
            f"No estimate {path}: run notebook 05, or write_estimates(run, store)."
        )
    audio, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return np.ascontiguousarray(audio.T)


def read_estimates(
    run: Run, store: Store, track: Track, target: str, models: Iterable[str] = ROWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Estimates of one test track by model name, each `(channels, samples)` float32; oracles have seed 0 only."""
    return {
        model: read_estimate(run, store, track, target, model, 0 if model in ORACLES else seed)
        for model in models
    }


def read_all_estimates(run: Run, store: Store, track: Track) -> dict[tuple[str, int], np.ndarray]:
    """Every estimate of one test track by (model, seed), each `(targets, channels, samples)` float32."""
    targets = store.targets(run.settings.target)
    keys = [(model, 0) for model in ROWS]
    keys += [(model, seed) for seed in range(1, run.settings.seeds) for model in MODELS]
    return {
        (model, seed): np.stack(
            [read_estimate(run, store, track, target, model, seed) for target in targets]
        )
        for model, seed in keys
    }


def trained_model(run: Run, target: str, model: str, seed: int = 0) -> torch.nn.Module:
    """One trained model of a run in evaluation mode, on the CPU; kept in memory until its folder changes."""
    folder = run.model_folder(target, model, seed)
    written = folder / "model.json"
    return _cached_model(folder, written.stat().st_mtime_ns if written.exists() else 0)


@lru_cache(maxsize=32)
def _cached_model(folder: Path, _written_ns: int) -> torch.nn.Module:
    return load_model(folder)


def _key(trained: Run, store: Store, target: str, model: str, seed: int) -> dict[str, str]:
    """What the estimates depend on: the test tracks, and the weights or the STFT of the oracles."""
    key = dict(data=store.sha)
    if model in ORACLES:
        return key | dict(n_fft=trained.settings.n_fft, hop=trained.settings.hop)
    weights = trained.model_folder(target, model, seed) / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"No trained model in {weights.parent}: train it first (notebooks 02 to 04)."
        )
    return key | dict(weights=hashlib.sha256(weights.read_bytes()).hexdigest())


def _is_current(
    manifest: Path, key: dict, run: Run, store: Store, target: str, model: str, seed: int
) -> bool:
    try:
        if json.loads(manifest.read_text(encoding="utf-8")) != key:
            return False
    except (OSError, ValueError):
        return False
    paths = [estimate_paths(run, track, target, model, seed) for track in store.split("test")]
    return all(path.is_file() for pair in paths for path in pair)

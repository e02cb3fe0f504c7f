"""Estimates of a run: every test track is separated once, later stages only read the files.

    results/<run>/estimates/<model>-seed<k>/test/<track>/<target>.wav      estimate
    results/<run>/estimates/<model>-seed<k>/test/<track>/no_<target>.wav   mixture minus estimate
    results/<run>/estimates/<model>-seed<k>/<target>.json                  hash of data and weights

This is the layout of `museval.eval_mus_dir`, which takes references at the run's sample rate and
channels. It scores vocals beside their residual, therefore named `accompaniment.wav`. It ignores
`no_<target>.wav`: other targets in a folder are scored beside each other, a single one not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.io import wavfile
from tqdm.auto import tqdm

from mss_utils.config import MODELS, Run
from mss_utils.data import MIXTURE, Store, Track
from mss_utils.environment import training_device
from mss_utils.files import (
    atomic_write,
    friendly_disk_errors,
    is_safe_file_name,
    safe_name,
    write_text,
)
from mss_utils.models import load_model
from mss_utils.models.oracles import ORACLES, oracle
from mss_utils.separation.overlap_add import separate

ESTIMATED = (*MODELS, *ORACLES)  # systems whose estimates are files
ROWS = (MIXTURE, *ESTIMATED)  # rows of the score table


def write_estimates(
    run: Run, store: Store, models: Iterable[str] = ESTIMATED, trained: Run | None = None
) -> None:
    """Separate every test track with trained models and oracles, unless the files are up to date.

    Parameters
    ----------
    run : Run
        Its folder receives the estimates.
    store : Store
        Its test tracks are separated.
    models : iterable of str
        Some of `ESTIMATED`: models in every seed of the run, oracles once.
    trained : Run, optional
        The run that holds the trained models, if it is another one.
    """
    for model, target in itertools.product(models, store.targets(run.settings.target)):
        for seed in range(1 if model in ORACLES else run.settings.seeds):
            model_folder = (trained or run).model_folder(target, model, seed)
            source: dict = dict(n_fft=run.settings.n_fft, hop=run.settings.hop)
            if model not in ORACLES:
                weights = (model_folder / "model.safetensors").read_bytes()
                source = dict(weights=hashlib.sha256(weights).hexdigest())
            content = json.dumps(dict(data=store.sha) | source, indent=2) + "\n"
            files = [run.folder / "estimates" / f"{model}-seed{seed}" / f"{target}.json"]
            for track in store.split("test"):
                files += estimate_paths(run, track, target, model, seed)
            if all(file.is_file() for file in files) and files[0].read_text("utf-8") == content:
                continue
            with friendly_disk_errors(files[0]):
                files[0].unlink(missing_ok=True)
            _separate_tracks(run, store, target, model, seed, model_folder)
            write_text(files[0], content)


def _separate_tracks(
    run: Run, store: Store, target: str, model: str, seed: int, model_folder: Path
) -> None:
    device = training_device(run.settings)
    network = load_model(model_folder).to(device) if model in MODELS else None
    for track in tqdm(store.split("test"), f"Estimates of {target}, {model}", unit="track"):
        mixture, stems = store.load(track)
        if network is None:
            estimate = oracle(model, mixture, stems[store.stem_index(target)], run.settings)
        else:
            estimate = separate(network, mixture, store.sample_rate)
        paths = estimate_paths(run, track, target, model, seed)
        for path, audio in zip(paths, (estimate, mixture - estimate), strict=True):
            with atomic_write(path) as part:
                wavfile.write(part, store.sample_rate, audio.T)  # 32-bit float


def estimate_paths(
    run: Run, track: Track, target: str, model: str, seed: int = 0
) -> tuple[Path, Path]:
    """Return the paths of an estimate and of its residual for one test track."""
    # museval looks for the exact name of the track.
    name = track.name if is_safe_file_name(track.name) else safe_name(track.name)
    residual = "accompaniment" if target == "vocals" else f"no_{target}"
    folder = run.folder / "estimates" / f"{model}-seed{seed}" / "test" / name
    return folder / f"{target}.wav", folder / f"{residual}.wav"


def read_estimate(
    run: Run, store: Store, track: Track, target: str, model: str, seed: int = 0
) -> np.ndarray:
    """Return an estimate of one test track, `(channels, samples)` float32.

    The model `mixture` returns the mixture. Raises FileNotFoundError for an unwritten estimate.
    """
    if model == MIXTURE:
        return store.load(track)[0]
    path, _ = estimate_paths(run, track, target, model, seed)
    if not path.is_file():
        raise FileNotFoundError(f"No estimate {path}: call write_estimates(run, store) first.")
    audio, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return np.ascontiguousarray(audio.T)


def read_estimates(
    run: Run, store: Store, track: Track, target: str, models: Iterable[str] = ROWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return estimates by model as `read_estimate` does; oracles are those of seed 0."""
    return {
        model: read_estimate(run, store, track, target, model, 0 if model in ORACLES else seed)
        for model in models
    }


def read_all_estimates(run: Run, store: Store, track: Track) -> dict[tuple[str, int], np.ndarray]:
    """Return estimates by (model, seed), each `(targets, channels, samples)` float32."""
    targets = store.targets(run.settings.target)
    keys = [(model, 0) for model in ROWS]
    keys += [(model, seed) for seed in range(1, run.settings.seeds) for model in MODELS]
    return {
        key: np.stack([read_estimate(run, store, track, target, *key) for target in targets])
        for key in keys
    }


def trained_model(run: Run, target: str, model: str, seed: int = 0) -> torch.nn.Module:
    """Load a trained model of a run in evaluation mode, on the CPU."""
    return load_model(run.model_folder(target, model, seed))

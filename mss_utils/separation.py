"""Separate mixtures by overlap-add, write the estimates of a run, and separate song files.

Overlap-add separates audio of any length chunk by chunk (notebook 02). Neighbouring chunks overlap
by a quarter. The estimate of each chunk is multiplied by weights that rise and fall over the
overlap, the products are added, and the sum is divided by the sum of the weights. A model that
returns its input therefore returns the whole song.

Every test track of a run is separated once, later stages only read the files:

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
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.io import wavfile
from scipy.signal import firwin, resample_poly
from tqdm.auto import tqdm

from mss_utils.config import MODELS, Run
from mss_utils.data import MIXTURE, Store, Track
from mss_utils.data.sources import RATES
from mss_utils.environment import training_device
from mss_utils.files import atomic_write, is_safe_file_name, safe_name, temporary_folder, write_text
from mss_utils.models import load_model
from mss_utils.models.oracles import ORACLES, oracle

CONTEXT_S = 0.1  # extra context on each side of a chunk, discarded: windows have edge artifacts
OVERLAP = 0.25  # share of a chunk that it has in common with the next one
MAX_RATIO = 20_000  # of two sample rates: exact for all usual ones, else off by under one sample
ESTIMATED = (*MODELS, *ORACLES)  # systems whose estimates are files
ROWS = (MIXTURE, *ESTIMATED)  # rows of the score table
PLAYLISTS = (b"ffconcat", b"#EXTM3U", b"[playlist]")  # ffmpeg would open the files they list
WAV_MAX_BYTES = 2**32 - 2**16  # longer files have an RF64 header


def separate(
    model: torch.nn.Module, mixture: np.ndarray, sample_rate: int, chunk_s: float | None = None
) -> np.ndarray:
    """Separate a mixture in memory by overlap-add of chunks.

    Parameters
    ----------
    model : torch.nn.Module
        Maps `(batch, channels, samples)` to the same shape. Its attributes `sample_rate` and
        `channels`, if it has them, must fit the mixture.
    mixture : np.ndarray, shape (channels, samples)
    sample_rate : int
        Hz.
    chunk_s : float, optional
        Seconds; by default a chunk with its context is as long as a training segment.

    Returns
    -------
    np.ndarray, shape (channels, samples), float32
        The estimate of the target.
    """
    mixture = np.ascontiguousarray(mixture, dtype=np.float32)
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(f"The mixture has shape {mixture.shape}; expected (channels, samples).")
    for name, value in (("sample_rate", sample_rate), ("channels", len(mixture))):
        expected = getattr(model, name, value)
        if value != expected:
            raise ValueError(f"The mixture has {name} {value}, the model {expected}: convert it.")
    if not np.isfinite(mixture).all():
        raise ValueError("The mixture holds NaN or infinite samples: repair the file.")
    size = mixture.shape[1]
    blocks = separated_blocks(model, lambda i, j: mixture[:, i:j], size, sample_rate, chunk_s)
    return np.concatenate(list(blocks), axis=1)


def separated_blocks(
    model: torch.nn.Module,
    read: Callable[[int, int], np.ndarray],
    samples: int,
    sample_rate: int,
    chunk_s: float | None = None,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the overlap-add of the estimates in blocks `(channels, any)`, in constant memory.

    `read(start, stop)` returns a part of the mixture of `samples`, `(channels, stop - start)`
    float32, at any rate and with any number of channels. The model is applied to windows: a chunk
    with context on both sides. All are equally long; the first begins and the last ends with the
    audio.
    """
    segment_s = max(getattr(model, "segment_s", 0.0), 4 * CONTEXT_S)  # the chunk is at least half
    window_s = chunk_s + 2 * CONTEXT_S if chunk_s else segment_s
    context = round(CONTEXT_S * sample_rate)
    window = min(max(round(window_s * sample_rate), 2 * context + 1), samples)
    chunk = max(1, window - 2 * context)
    overlap = int(OVERLAP * chunk)
    rise = np.clip((np.arange(window, dtype=np.float32) + 1 - context) / (overlap + 1), 0, 1)
    starts = [*range(0, samples - window, chunk - overlap), samples - window]
    # Sums of weighted estimates, and of weights, where the next window also covers the audio.
    pending, pending_weight = np.zeros((1, 0), np.float32), np.zeros(0, np.float32)
    for i, start in enumerate(tqdm(starts, "Separating", unit="window", disable=not progress)):
        first, last = i == 0, i == len(starts) - 1
        kept = slice(0 if first else context, window if last else window - context)
        weight = (np.maximum(rise, first) * np.maximum(rise[::-1], last))[kept]
        total = _estimate(model, read(start, start + window), sample_rate)[:, kept] * weight
        total[:, : pending.shape[1]] += pending
        weight[: len(pending_weight)] += pending_weight
        finished = len(weight) if last else starts[i + 1] + context - start - kept.start
        yield total[:, :finished] / weight[:finished]
        pending, pending_weight = total[:, finished:], weight[finished:]


def _estimate(model: torch.nn.Module, window: np.ndarray, sample_rate: int) -> np.ndarray:
    """Apply the model to one window `(channels, samples)` of any sample rate.

    Channels are split into groups of `model.channels`; the last channel is repeated to fill the
    last group, and its estimates are averaged.
    """
    model_rate = getattr(model, "sample_rate", sample_rate)
    model_channels = getattr(model, "channels", len(window))
    n_groups = math.ceil(len(window) / model_channels)
    channel_index = np.minimum(np.arange(n_groups * model_channels), len(window) - 1)
    model_input = torch.from_numpy(_resample(window, sample_rate, model_rate)[channel_index])
    model_input = model_input.unflatten(0, (n_groups, model_channels))  # (groups, channels, n)
    device = next(iter(model.parameters()), model_input).device
    was_training = model.training
    with torch.inference_mode():
        output = model.eval()(model_input.to(device)).flatten(0, 1).cpu().numpy()
    model.train(was_training)
    channels = [output[channel_index == channel].mean(axis=0) for channel in range(len(window))]
    return _resample(np.stack(channels), model_rate, sample_rate)[:, : window.shape[1]]


def _resample(audio: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Resample `(channels, samples)`; torchaudio would need much memory for odd ratios."""
    if old_rate == new_rate:
        return audio
    ratio = Fraction(min(old_rate, new_rate), max(old_rate, new_rate))
    small, large = ratio.limit_denominator(MAX_RATIO).as_integer_ratio()
    up, down = (large, small) if new_rate > old_rate else (small, large)
    return resample_poly(audio, up, down, axis=1, window=_low_pass(large))


@lru_cache(maxsize=2)
def _low_pass(factor: int) -> np.ndarray:
    """Filter that keeps 93 % of the band; there and back the error is below -100 dB."""
    taps = firwin(128 * factor + 1, 1 / factor, window=("kaiser", 10.0))  # pyright: ignore
    return np.asarray(taps, np.float32)


# --- estimates of a run ---------------------------------------------------------------------------


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
    device = training_device(run.settings)
    for model, target in itertools.product(models, store.targets(run.settings.target)):
        for seed in range(1 if model in ORACLES else run.settings.seeds):
            folder = (trained or run).model_folder(target, model, seed)
            source: dict = dict(n_fft=run.settings.n_fft, hop=run.settings.hop)
            if model not in ORACLES:
                weights = (folder / "model.safetensors").read_bytes()
                source = dict(weights=hashlib.sha256(weights).hexdigest())
            content = json.dumps(dict(data=store.sha) | source, indent=2) + "\n"
            manifest = run.folder / "estimates" / f"{model}-seed{seed}" / f"{target}.json"
            files = [manifest]
            for track in store.split("test"):
                files += estimate_paths(run, track, target, model, seed)
            if all(file.is_file() for file in files) and manifest.read_text("utf-8") == content:
                continue
            write_text(manifest, "")  # in case of an interruption
            network = None if model in ORACLES else load_model(folder).to(device)
            _separate_tracks(run, store, target, model, seed, network)
            write_text(manifest, content)


def _separate_tracks(
    run: Run, store: Store, target: str, model: str, seed: int, network: torch.nn.Module | None
) -> None:
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


def read_all_estimates(
    run: Run, store: Store, track: Track, keys: Iterable[tuple[str, int]] = ()
) -> dict[tuple[str, int], np.ndarray]:
    """Return estimates by (model, seed), each `(targets, channels, samples)` float32.

    `keys` are the models and seeds, by default those of the score tables.
    """
    targets = store.targets(run.settings.target)
    if not keys:
        keys = [(model, 0) for model in ROWS]
        keys += [(model, seed) for seed in range(1, run.settings.seeds) for model in MODELS]
    return {
        key: np.stack([read_estimate(run, store, track, target, *key) for target in targets])
        for key in keys
    }


# --- song files -----------------------------------------------------------------------------------


def separate_file(song: Path, model: torch.nn.Module, out: Path, flac: bool = False) -> list[Path]:
    """Separate a song file in constant memory into target and residual, which add up to the song.

    Parameters
    ----------
    song : Path
        In any format that ffmpeg reads, and of any length, sample rate and number of channels.
    model : torch.nn.Module
        A trained model as `load_model` returns it.
    out : Path
        Folder for the results.
    flac : bool
        Write 24-bit FLAC, clipped at full scale, instead of 32-bit float WAV (RF64 above 4 GB).

    Returns
    -------
    list of Path
        `<song>.<target>.wav` and `<song>.<target>.residual.wav`, or `.flac`.
    """
    stem, suffix = song.stem, ".flac" if flac else ".wav"
    while stem and not is_safe_file_name(f"{stem}.{model.target}.residual{suffix}"):  # too long
        stem = stem[:-1]
    paths = [out / f"{stem}.{model.target}{part}{suffix}" for part in ("", ".residual")]
    with song.open("rb") as stream:
        if stream.read(16).lstrip().startswith(PLAYLISTS):
            raise ValueError(f"{song} is a list of files, not a song: separate what it lists.")
    with temporary_folder(out) as work:
        parts = [work / f"target{suffix}", work / f"residual{suffix}"]
        wav = song if song.suffix.lower() == ".wav" else _decode(song, work / "song.wav")
        try:
            with soundfile.SoundFile(os.fsencode(wav)) as source:  # names need not be UTF-8
                _write_parts(model, source, parts)
        except soundfile.LibsndfileError as error:
            (work / "probe").write_bytes(bytes(2**20))  # raises OSError if the disk is full
            raise ValueError(f"Cannot read {song} ({error.error_string}): is it damaged?") from None
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    return paths


def _decode(song: Path, wav: Path) -> Path:
    """Decode the first audio stream with ffmpeg: libsndfile seeks badly in other formats."""
    if not shutil.which("ffmpeg"):
        raise FileNotFoundError(f"{song} needs ffmpeg: install it (apt-get install ffmpeg).")
    options = ["-map", "0:a:0", "-c:a", "pcm_f32le", "-rf64", "auto"]
    # `file:` stops ffmpeg from reading a colon or a dash in a name as a protocol or an option.
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{song}", *options, f"file:{wav}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    reason = " ".join(done.stderr.split())[:200]
    if done.returncode:
        raise ValueError(f"Cannot read {song} (ffmpeg: {reason}); expected a song.")
    if reason:
        print(f"{song} is damaged, only a part was read ({reason}).", file=sys.stderr)
    return wav


def _write_parts(model: torch.nn.Module, source: soundfile.SoundFile, parts: list[Path]) -> None:
    rate, channels, samples = source.samplerate, source.channels, source.frames
    if samples == 0 or not RATES[0] <= rate <= RATES[1]:
        expected = f"expected sound at {RATES[0]} to {RATES[1]} Hz"
        raise ValueError(f"The song has {samples} samples at {rate} Hz; {expected}.")
    flac = parts[0].suffix == ".flac"
    if flac and (channels > 8 or rate > 655_350):
        raise ValueError(f"FLAC cannot hold {channels} channels at {rate} Hz: leave --flac out.")
    wav = "WAV" if 4 * channels * samples <= WAV_MAX_BYTES else "RF64"
    form, subtype = ("FLAC", "PCM_24") if flac else (wav, "FLOAT")
    files = [soundfile.SoundFile(part, "w", rate, channels, subtype, format=form) for part in parts]

    def read(start: int, stop: int) -> np.ndarray:
        source.seek(start)
        return source.read(stop - start, "float32", always_2d=True).T

    start, peak = 0, 0.0
    with files[0], files[1]:
        for target in separated_blocks(model, read, samples, rate, progress=True):
            mixture = read(start, start + target.shape[1])
            residual = mixture - target
            if not np.isfinite(residual).all():
                reason = "the song or the weights are damaged, or the song is too loud"
                raise ValueError(f"NaN or infinite samples after {start / rate:.0f} s: {reason}.")
            start += target.shape[1]
            if flac:
                peak = max(peak, np.abs(target).max(), np.abs(residual).max())
                target, residual = _to_24_bit(mixture, target)
            files[0].write(target.T)
            files[1].write(residual.T)
    if peak > 1:
        print(f"FLAC: samples above full scale are clipped (peak {20 * np.log10(peak):+.1f} dB).")
    low, high = getattr(model, "sample_rate", rate) / 2000, rate / 2000
    if low < high:
        print(f"The model covers 0 to {low:g} kHz: {low:g} to {high:g} kHz stay in the residual.")


def _to_24_bit(mixture: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Target and mixture minus rounded target as int32, of which FLAC keeps the upper 24 bits."""
    lowest, highest = -(2**23), 2**23 - 1
    target = np.rint(target * 2.0**23).clip(lowest, highest)
    residual = (np.rint(mixture * 2.0**23) - target).clip(lowest, highest)
    return target.astype(np.int32) << 8, residual.astype(np.int32) << 8

"""From a song of any length to the target in it: overlapping chunks, faded and added.

Taught in notebook 02.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm.auto import tqdm

OVERLAP = 0.25


@torch.inference_mode()
def separate(model: torch.nn.Module, mixture: np.ndarray, sample_rate: int, chunk_s: float | None = None, progress: bool = False) -> np.ndarray:
    """Target estimate `(channels, samples)` for a mixture of that shape; float32, same length.

    The mixture is cut into chunks of `chunk_s` (default: the model's training segment) that overlap by a quarter; each
    is weighted by a trapezium and the sum divided by the sum of the weights, so an identity returns its input.
    Raises ValueError for a wrong shape, rate or number of channels, and for samples that are not finite.
    """
    mixture = _checked(model, mixture, sample_rate)
    samples = mixture.shape[1]
    chunk = min(max(1, round((chunk_s or model.segment_s) * sample_rate)), max(1, samples))
    hop = max(1, round(chunk * (1 - OVERLAP)))
    weight = _trapezium(chunk, chunk - hop)
    device = next(iter(model.parameters()), torch.empty(0)).device
    total, weights = np.zeros_like(mixture), np.zeros(samples, np.float32)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, max(1, samples - chunk + hop), hop), desc="Separating", unit="chunk", disable=not progress):
        part = mixture[:, start : start + chunk]
        length = part.shape[1]
        estimate = model(torch.from_numpy(part)[None].to(device))[0].cpu().numpy()
        total[:, start : start + length] += estimate * weight[:length]
        weights[start : start + length] += weight[:length]
    model.train(was_training)
    return total / weights


def _checked(model: torch.nn.Module, mixture: np.ndarray, sample_rate: int) -> np.ndarray:
    mixture = np.ascontiguousarray(mixture, dtype=np.float32)
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(f"The mixture has shape {mixture.shape}; expected (channels, samples) with at least one sample.")
    for name, found in (("sample_rate", sample_rate), ("channels", mixture.shape[0])):
        expected = getattr(model, name, found)
        if found != expected:
            raise ValueError(f"The mixture has {name} {found}, the model was trained with {expected}: convert the mixture first.")
    if not np.isfinite(mixture).all():
        raise ValueError("The mixture holds NaN or infinite samples; expected finite ones: mend the file.")
    return mixture


def _trapezium(length: int, fade: int) -> np.ndarray:
    """Weights that rise over `fade` samples, stay at 1 and fall again; never 0, so every sample has a weight."""
    ramp = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)) / (fade + 1)
    return np.minimum(1, ramp).astype(np.float32)


def separate_file(song: Path, model: torch.nn.Module, out: Path) -> list[Path]:
    """Write the target and the residual of an audio file as 32-bit float WAV at the file's own rate; return the paths.

    The song is brought to the model's rate and channels, separated, and the estimate brought back; the residual is the
    song minus the target, so that the two add up to the song. Raises FileNotFoundError or ValueError for unreadable input.
    """
    if not song.is_file():
        raise FileNotFoundError(f"No file {song}; expected a WAV, FLAC, OGG or MP3 file.")
    try:
        audio, rate = soundfile.read(song, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"Cannot read {song} ({error.error_string}); expected a WAV, FLAC, OGG or MP3 file.") from None
    audio = audio.T  # (channels, samples)
    heard = np.stack([audio.mean(axis=0)] * model.channels) if audio.shape[0] != model.channels else audio
    target = separate(model, _resample(heard, rate, model.sample_rate), model.sample_rate, progress=True)
    target = _resample(target, model.sample_rate, rate)[:, : audio.shape[1]]
    target = np.broadcast_to(target, audio.shape) if target.shape[0] != audio.shape[0] else target
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{song.stem}.{model.target}.wav", out / f"{song.stem}.residual.wav"]
    for path, signal in zip(paths, (target, audio - target)):
        soundfile.write(path, signal.T, rate, subtype="FLOAT")
    return paths


def _resample(audio: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    return torchaudio.functional.resample(torch.from_numpy(np.ascontiguousarray(audio)), rate, new_rate).numpy()

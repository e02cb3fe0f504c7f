"""Separate a song file of any format and length into target and residual. See notebook 06."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch

from mss_utils.data.sources import RATES
from mss_utils.files import MAX_NAME, temporary_folder
from mss_utils.separation.overlap_add import separated_blocks

PLAYLISTS = (b"ffconcat", b"#EXTM3U", b"[playlist]")  # ffmpeg would open the files they list
WAV_MAX_BYTES = 2**32 - 2**16  # longer files have an RF64 header


def separate_file(
    song: Path, model: torch.nn.Module, out: Path, flac: bool = False, chunk_s: float | None = None
) -> list[Path]:
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
    chunk_s : float, optional
        Length of a chunk in seconds, see `separate`.

    Returns
    -------
    list of Path
        `<song>.<target>.wav` and `<song>.<target>.residual.wav`, or `.flac`.
    """
    stem, suffix = song.stem, ".flac" if flac else ".wav"
    while len(os.fsencode(f"{stem}.{model.target}.residual{suffix}")) > MAX_NAME:
        stem = stem[:-1]
    paths = [out / f"{stem}.{model.target}{part}{suffix}" for part in ("", ".residual")]
    with song.open("rb") as stream:
        if stream.read(16).lstrip().startswith(PLAYLISTS):
            raise ValueError(f"{song} is a list of files, not a song: separate what it lists.")
    if any(path.exists() and path.samefile(song) for path in paths):
        raise ValueError(f"{song} would be overwritten: choose another folder with --out.")
    with temporary_folder(out) as work:
        parts = [work / f"target{suffix}", work / f"residual{suffix}"]
        try:
            with _open_song(song, work) as source:
                _write_separated(model, source, parts, chunk_s)
        except soundfile.LibsndfileError as error:
            (work / "probe").write_bytes(bytes(2**20))  # raises OSError if the disk is full
            raise ValueError(f"Cannot read {song} ({error.error_string}): is it damaged?") from None
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    return paths


def bandwidth_note(model: torch.nn.Module, sample_rate: int) -> str:
    """Say which frequencies of a song (sample rate in Hz) the model leaves out; "" if none."""
    model_rate = int(getattr(model, "sample_rate", sample_rate))
    if sample_rate <= model_rate:
        return ""
    low, high = model_rate / 2000, sample_rate / 2000
    return f"The model covers 0 to {low:g} kHz: {low:g} to {high:g} kHz stay in the residual."


@contextmanager
def _open_song(song: Path, work: Path) -> Iterator[soundfile.SoundFile]:
    """Open a WAV file, or decode to one in `work`: in other formats libsndfile seeks badly."""
    path = song if song.suffix.lower() == ".wav" else _decode(song, work / "song.wav")
    with path.open("rb") as stream, soundfile.SoundFile(stream) as source:
        if source.frames == 0:
            raise ValueError(f"{song} holds no samples: copy or download it again.")
        rate, (lowest, highest) = source.samplerate, RATES
        if not lowest <= rate <= highest:
            raise ValueError(f"{song} has {rate} samples a second; expected {lowest} to {highest}.")
        yield source


def _decode(song: Path, wav: Path) -> Path:
    """Decode the first audio stream with ffmpeg at its own sample rate and channels."""
    if not shutil.which("ffmpeg"):
        raise FileNotFoundError(f"{song} needs ffmpeg: install it (apt-get install ffmpeg).")
    options = ["-map", "0:a:0", "-c:a", "pcm_f32le", "-rf64", "auto"]
    # `file:` stops ffmpeg from reading a colon or a dash in a name as a protocol or an option.
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{song}", *options, f"file:{wav}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    messages = done.stderr.strip().splitlines() or ["no reason"]
    if "matches no streams" in done.stderr:
        raise ValueError(f"{song} holds no sound; expected a song.")
    if done.returncode:
        raise ValueError(f"Cannot read {song} (ffmpeg: {messages[-1]}); expected a song.")
    if done.stderr:
        print(f"{song} is damaged, only a part was read ({messages[0]}).", file=sys.stderr)
    return wav


def _write_separated(
    model: torch.nn.Module, source: soundfile.SoundFile, parts: list[Path], chunk_s: float | None
) -> None:
    rate, channels, samples = source.samplerate, source.channels, source.frames
    flac = parts[0].suffix == ".flac"
    if flac and (channels > 8 or rate > 655_350):
        raise ValueError(f"FLAC cannot hold {channels} channels at {rate} Hz: leave --flac out.")
    form, subtype = ("FLAC", "PCM_24") if flac else ("WAV", "FLOAT")
    if form == "WAV" and 4 * channels * samples > WAV_MAX_BYTES:
        form = "RF64"
    files = [soundfile.SoundFile(part, "w", rate, channels, subtype, format=form) for part in parts]

    def read(start: int, stop: int) -> np.ndarray:
        source.seek(start)
        block = source.read(stop - start, "float32", always_2d=True).T
        if not np.isfinite(block).all():
            raise ValueError(f"NaN or infinite samples after {start / rate:.0f} s: repair it.")
        return block

    start, peak = 0, 0.0
    with files[0], files[1]:
        for target in separated_blocks(model, read, samples, rate, chunk_s, progress=True):
            if not np.isfinite(target).all():
                raise ValueError("The estimate is not finite: song too loud or damaged weights.")
            mixture = read(start, start + target.shape[1])
            start += target.shape[1]
            residual = mixture - target
            if flac:
                peak = max(peak, np.abs(target).max(), np.abs(residual).max())
                target, residual = _to_24_bit(mixture, target)
            files[0].write(target.T)
            files[1].write(residual.T)
    if peak > 1:
        print(f"FLAC: samples above full scale are clipped (peak {20 * np.log10(peak):+.1f} dB).")


def _to_24_bit(mixture: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Target and mixture minus rounded target as int32, of which FLAC keeps the upper 24 bits."""
    lowest, highest = -(2**23), 2**23 - 1
    target = np.rint(target * 2.0**23).clip(lowest, highest)
    residual = (np.rint(mixture * 2.0**23) - target).clip(lowest, highest)
    return target.astype(np.int32) << 8, residual.astype(np.int32) << 8

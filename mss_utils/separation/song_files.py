"""Separate a song file of any format and length into target and residual files.

Taught in notebook 06.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from mss_utils.data.sources import RATES
from mss_utils.files import MAX_NAME, flush, temporary_folder
from mss_utils.separation.overlap_add import Read, separated_blocks

BLOCK = 2**20  # samples of every channel that are copied at once
PLAYLISTS = (b"ffconcat", b"#EXTM3U", b"[playlist]")  # ffmpeg would open the files they list
FLAC_HZ = 655350
WAV_BYTES = 2**32 - 2**16  # the largest WAV header count; RF64 above it


# --- from file to file --------------------------------------------------------------------------------------------------


def separate_file(
    song: Path, model: torch.nn.Module, out: Path, flac: bool = False, chunk_s: float | None = None
) -> list[Path]:
    """Write the target and the residual of a song of any format and length into the folder `out`; return the two paths.

    Both keep the song's rate and channels, as 32-bit float WAV (RF64 beyond 4 GB), or as 24-bit FLAC. The residual is the song
    minus the target, so that the two add up to the song. Where FLAC would clip, both are lowered alike, and it is said by how
    much. Nothing is left behind of a separation that breaks off. Raises FileNotFoundError for a missing song, or a song that
    needs ffmpeg where there is none; ValueError for a file that cannot be read, is empty, holds NaN or would be overwritten.
    """
    paths = [
        out / _named(song.stem, f".{name}.{'flac' if flac else 'wav'}")
        for name in (model.target, f"{model.target}.residual")
    ]
    _check(song, paths)
    # The working folder is in `out`: there is room where the results are to go, and renaming them costs nothing.
    with temporary_folder(out) as work, _libsndfile_told(song, work), _opened(song, work) as source:
        if flac and (source.channels > 8 or source.samplerate > FLAC_HZ):
            found = f"{source.channels} channels at {source.samplerate} Hz"
            raise ValueError(
                f"{song} has {found} and FLAC holds up to 8 at {FLAC_HZ} Hz: leave --flac out."
            )
        read = partial(_read, source, song)
        parts = [work / "target.wav", work / "residual.wav"]
        peak = _write(model, source, read, parts, chunk_s)
        if flac:
            parts = _as_flac(source, read, parts[0], min(1.0, 1 / max(peak, 1e-9)))
        for part, path in zip(parts, paths):
            flush(part)
            os.replace(part, path)
    return paths


@contextmanager
def _libsndfile_told(song: Path, work: Path) -> Iterator[None]:
    """libsndfile calls a full disk a system error, and says little of a damaged file."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        _check_room(work)
        raise ValueError(
            f"Cannot finish {song} ({error.error_string.strip(' .')}): the file may be damaged."
        ) from None


def _named(stem: str, ending: str) -> str:
    """`stem` and `ending`, the stem cut so that a file may be called so."""
    room = MAX_NAME - len(os.fsencode(ending))
    return (
        stem if len(os.fsencode(stem)) <= room else os.fsencode(stem)[:room].decode(errors="ignore")
    ) + ending


def _check_room(work: Path) -> None:
    """Raise the OSError that a full disk, or a quota, answers with."""
    (work / "room").write_bytes(bytes(BLOCK))


def bandwidth_note(model: torch.nn.Module, sample_rate: int) -> str:
    """One sentence on what a song at `sample_rate` (Hz) has above the frequencies the model hears; empty if it has nothing there."""
    if sample_rate <= model.sample_rate:
        return ""
    heard, there = (f"{rate / 2000:g} kHz" for rate in (model.sample_rate, sample_rate))
    return f"The model hears up to {heard}: what the song has above that, up to {there}, stays in the residual."


def _check(song: Path, paths: list[Path]) -> None:
    if not song.is_file():
        found = f"{song} is a folder" if song.is_dir() else f"No file {song}"
        raise FileNotFoundError(f"{found}; expected a song in any format that ffmpeg reads.")
    if song.stat().st_size == 0:
        raise ValueError(f"{song} is empty (0 bytes); expected a song: copy or download it again.")
    with song.open("rb") as stream:
        if stream.read(16).lstrip().startswith(PLAYLISTS):
            raise ValueError(f"{song} is a list of files, not a song: separate what it lists.")
    for path in paths:
        if path.parent.exists() and not path.parent.is_dir():
            raise ValueError(
                f"{path.parent} is a file; expected a folder for the two results: choose another one with --out."
            )
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder, in the place of a result: choose another folder with --out."
            )
        if path.exists() and path.samefile(song):
            raise ValueError(
                f"{path} is the song itself and would be overwritten: choose another folder with --out."
            )


def _write(
    model: torch.nn.Module,
    source: soundfile.SoundFile,
    read: Read,
    parts: list[Path],
    chunk_s: float | None,
) -> float:
    """Write target and residual as WAV while the song is separated; return the highest absolute sample of the two."""
    start, peak = 0, 0.0
    header = "RF64" if 4 * source.channels * source.frames > WAV_BYTES else "WAV"
    with (
        _created(parts[0], source, header, "FLOAT") as target_file,
        _created(parts[1], source, header, "FLOAT") as residual_file,
    ):
        for target in separated_blocks(
            model, read, source.frames, source.samplerate, chunk_s, progress=True
        ):
            if not np.isfinite(target).all():
                raise ValueError(
                    f"What the model makes of the song after {start / source.samplerate:.0f} s is not finite: the song is absurdly loud there, "
                    "or the weights are damaged (train the model again)."
                )
            residual = read(start, start + target.shape[1]) - target
            target_file.write(target.T)
            residual_file.write(residual.T)
            start += target.shape[1]
            peak = max(peak, float(np.abs(target).max()), float(np.abs(residual).max()))
    return peak


def _as_flac(source: soundfile.SoundFile, read: Read, target_part: Path, gain: float) -> list[Path]:
    """Write both once more in 24 bits, `gain` times as high; return the paths. The residual is what the rounded target leaves."""
    if gain < 1:
        print(
            f"Target and residual are {-20 * math.log10(gain):.2g} dB lower than in the song: FLAC would have clipped them."
        )
    paths = [target_part.with_suffix(".flac"), target_part.with_name("residual.flac")]
    created = (_created(path, source, "FLAC", "PCM_24") for path in paths)
    with (
        soundfile.SoundFile(target_part) as found,
        next(created) as target_file,
        next(created) as residual_file,
    ):
        for start in range(0, source.frames, BLOCK):
            song = read(start, min(start + BLOCK, source.frames))
            target = _steps(found.read(BLOCK, always_2d=True), gain)
            residual = _steps(song.T, gain) - target
            for file, steps in ((target_file, target), (residual_file, residual)):
                file.write(
                    np.clip(steps, -(2**23), 2**23 - 1).astype(np.int32) << 8
                )  # 32-bit input; FLAC keeps the upper 24
    return paths


def _steps(audio: np.ndarray, gain: float) -> np.ndarray:
    """Samples between -1 and 1 as whole numbers of 24-bit steps, int64."""
    return np.rint(audio * np.float64(gain) * 2**23).astype(np.int64)


def _created(
    path: Path, source: soundfile.SoundFile, header: str, subtype: str
) -> soundfile.SoundFile:
    return soundfile.SoundFile(
        path, "w", source.samplerate, source.channels, subtype, format=header
    )


# --- reading ------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(song: Path, work: Path) -> Iterator[soundfile.SoundFile]:
    """The song, or what it was unpacked to in the folder `work`, open to be read from any place."""
    with open(_seekable(song, work), "rb") as stream, soundfile.SoundFile(stream) as source:
        if source.frames == 0:
            raise ValueError(
                f"{song} holds no samples; expected a song: copy or download it again."
            )
        if not RATES[0] <= source.samplerate <= RATES[1]:
            raise ValueError(
                f"{song} has {source.samplerate} samples a second; expected {RATES[0]} to {RATES[1]}: convert it first."
            )
        yield source


def _seekable(song: Path, work: Path) -> Path:
    """A file of the song in which every sample can be gone to: itself, or what ffmpeg made of it in the folder `work`.

    libsndfile also reads Ogg and MP3, but goes to the wrong sample in them, and guesses how long they are.
    """
    with open(
        song, "rb"
    ) as stream:  # a stream, for by its name libsndfile would take any text called .mp3 for one
        try:
            with soundfile.SoundFile(stream) as source:
                if (
                    source.subtype.startswith(("PCM", "FLOAT", "DOUBLE")) and source.frames < 2**62
                ):  # a FLAC out of a pipe has no length
                    return song
        except (soundfile.LibsndfileError, TypeError):  # TypeError: a name that ends in .raw
            pass  # ffmpeg may know more, and says what is wrong if it does not
    return _decoded(song, work / "song.wav")


def _decoded(song: Path, wav: Path) -> Path:
    """Have ffmpeg write the first audio stream of `song` to `wav`, at its own rate and channels."""
    if not shutil.which("ffmpeg"):
        raise FileNotFoundError(
            f"Reading {song} needs ffmpeg on the PATH: install it (apt-get install ffmpeg), or convert it to WAV."
        )
    options = ["-map", "0:a:0", "-c:a", "pcm_f32le", "-rf64", "auto"]
    # `file:` keeps a colon or a dash in the song's name from meaning something to ffmpeg
    call = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{song}", *options, f"file:{wav}"]
    done = subprocess.run(call, capture_output=True, text=True, errors="replace")
    if "matches no streams" in done.stderr:
        raise ValueError(f"{song} holds no sound, only other streams; expected a song.")
    if done.returncode:
        _check_room(wav.parent)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].rpartition(": ")[2]
        raise ValueError(
            f"Cannot read {song} (ffmpeg: {reason}); expected a song in any format that ffmpeg reads."
        )
    if done.stderr:
        print(
            f"{song} is damaged, and what could be read of it is separated (ffmpeg: {done.stderr.strip().splitlines()[0]}).",
            file=sys.stderr,
        )
    return wav


def _read(source: soundfile.SoundFile, song: Path, start: int, stop: int) -> np.ndarray:
    """Samples `start` to `stop` of the song, `(channels, samples)` float32; raises ValueError where they are not finite."""
    source.seek(start)
    block = source.read(stop - start, "float32", always_2d=True).T
    if not np.isfinite(block).all():
        second = start / source.samplerate
        raise ValueError(
            f"{song} holds NaN or infinite samples after {second:.0f} s; expected finite ones: mend the file."
        )
    return block

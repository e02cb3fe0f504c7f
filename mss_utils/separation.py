"""From a song of any length to the target in it: overlapping windows, faded and added.

Taught in notebook 02.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import firwin, resample_poly
from tqdm.auto import tqdm

from mss_utils.data.sources import RATES
from mss_utils.files import MAX_NAME, flush, working_folder

CONTEXT_S = 0.1  # heard on both sides of a chunk for its sake alone: at the ends of a window models pad and resamplers ring
FADE = 0.25  # share of a chunk over which it fades in, and again out
BLOCK = 2**20  # samples of every channel that are copied at once
MAX_RATIO = (
    20_000  # all usual rates are met exactly; of the others a window is off by less than a sample
)
PLAYLISTS = (b"ffconcat", b"#EXTM3U", b"[playlist]")  # ffmpeg would open whatever stands in them
FLAC_HZ = 655350
WAV_BYTES = 2**32 - 2**16  # a WAV header cannot count further; an RF64 header can
Read = Callable[
    [int, int], np.ndarray
]  # (start, stop) in samples -> (channels, stop - start) float32


# --- in memory ----------------------------------------------------------------------------------------------------------


def separate(
    model: torch.nn.Module,
    mixture: np.ndarray,
    sample_rate: int,
    chunk_s: float | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Target estimate `(channels, samples)` for a mixture of that shape; float32, same length.

    The windows are those of `separated_blocks`; a mixture no longer than one is heard in one piece. Raises ValueError for a
    wrong shape, rate or number of channels, and for samples that are not finite.
    """
    mixture = _checked(model, mixture, sample_rate)
    blocks = separated_blocks(
        model,
        lambda start, stop: mixture[:, start:stop],
        mixture.shape[1],
        sample_rate,
        chunk_s,
        progress,
    )
    return np.concatenate(list(blocks), axis=1)


def _checked(model: torch.nn.Module, mixture: np.ndarray, sample_rate: int) -> np.ndarray:
    mixture = np.ascontiguousarray(mixture, dtype=np.float32)
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(
            f"The mixture has shape {mixture.shape}; expected (channels, samples) with at least one sample."
        )
    for name, found in (("sample_rate", sample_rate), ("channels", mixture.shape[0])):
        expected = getattr(model, name, found)
        if found != expected:
            raise ValueError(
                f"The mixture has {name} {found}, the model was trained with {expected}: convert the mixture first."
            )
    if not np.isfinite(mixture).all():
        raise ValueError(
            "The mixture holds NaN or infinite samples; expected finite ones: mend the file."
        )
    return mixture


# --- window by window ---------------------------------------------------------------------------------------------------


def separated_blocks(
    model: torch.nn.Module,
    read: Read,
    samples: int,
    rate: int,
    chunk_s: float | None = None,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """The target in a song of any length and rate, block after block: each `(channels, any number)`, together `samples` long.

    The model hears windows: a chunk of `chunk_s` and CONTEXT_S on either side, of which the estimate is thrown away. By
    default a window is as long as the segments of the training. Chunks overlap by a quarter; each is weighted by a trapezium
    and the sum divided by the sum of the weights, so an identity returns its input. The first window begins and the last
    one ends with the song, all are full, and no more is held than two of them. Raises ValueError for a chunk that is not positive.
    """
    window, context = _lengths(model, rate, chunk_s)
    window = min(
        window, samples
    )  # with one window there is no seam, and `context` and `hop` no longer matter
    chunk = max(1, window - 2 * context)
    hop = chunk - int(FADE * chunk)
    last = samples - window
    held, held_weight = (
        np.float32(0),
        np.zeros(0, np.float32),
    )  # what earlier windows say of samples that are not finished
    for start in tqdm(
        range(0, last + hop, hop), desc="Separating", unit="window", disable=not progress
    ):
        start = min(start, last)
        weight = _weight(window, context, chunk - hop, start == 0, start == last)
        kept = np.flatnonzero(weight)  # a run of samples that begins where the finished ones end
        total, weight = (
            estimate(model, read(start, start + window), rate)[:, kept] * weight[kept],
            weight[kept],
        )
        total[:, : len(held_weight)] += held
        weight[: len(held_weight)] += held_weight
        finished = (
            len(kept) if start == last else min(start + hop, last) + context - start - kept[0]
        )
        yield total[:, :finished] / weight[:finished]
        held, held_weight = total[:, finished:], weight[finished:]


def _lengths(model: torch.nn.Module, rate: int, chunk_s: float | None) -> tuple[int, int]:
    """Samples of a window and of the context on either side."""
    if chunk_s is not None and not chunk_s > 0:
        raise ValueError(
            f"chunk_s is {chunk_s}; expected seconds above 0, or none for the length the model was trained on."
        )
    window_s = (
        chunk_s + 2 * CONTEXT_S if chunk_s else max(model.segment_s, 4 * CONTEXT_S)
    )  # at least half of it is kept
    context = round(CONTEXT_S * rate)
    return max(round(window_s * rate), 2 * context + 1), context


def _weight(window: int, context: int, fade: int, first: bool, last: bool) -> np.ndarray:
    """Weights of a window `(samples,)`: none in the context, a rise over `fade`, 1, and the same backwards; 1 to the song's ends."""
    rise = np.clip((np.arange(window, dtype=np.float32) + 1 - context) / (fade + 1), 0, 1)
    return np.maximum(rise, first) * np.maximum(rise[::-1], last)


def estimate(model: torch.nn.Module, window: np.ndarray, rate: int) -> np.ndarray:
    """What the model makes of one window `(channels, samples)` of any rate and number of channels: same shape, float32.

    The channels are seated in groups as large as the model's, in their order; the last one also takes what seats are left.
    So a model of one channel hears each by itself, one of two channels hears a mono song doubled and 5.1 pair by pair.
    """
    model_rate, n_heard = (
        getattr(model, "sample_rate", rate),
        getattr(model, "channels", len(window)),
    )
    seats = np.minimum(np.arange(math.ceil(len(window) / n_heard) * n_heard), len(window) - 1)
    heard = _resampled(window, rate, model_rate)[seats]
    batch = torch.from_numpy(heard).unflatten(
        0, (-1, n_heard)
    )  # (groups, model's channels, samples)
    with _evaluating(model), torch.inference_mode():
        found = (
            model(batch.to(next(iter(model.parameters()), batch).device))
            .flatten(0, 1)
            .cpu()
            .numpy()
        )  # (seats, samples)
    found = np.stack([found[seats == channel].mean(axis=0) for channel in range(len(window))])
    return _resampled(found, model_rate, rate)[:, : window.shape[1]]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _resampled(audio: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """`(channels, samples)` at another rate; any two rates, in little memory, which torchaudio's kernels are not."""
    if rate == new_rate:
        return audio
    ratio = Fraction(min(rate, new_rate), max(rate, new_rate)).limit_denominator(MAX_RATIO)
    up, down = (ratio.numerator, ratio.denominator)[:: 1 if new_rate < rate else -1]
    return resample_poly(audio, up, down, axis=1, window=_low_pass(max(up, down)))


@lru_cache(maxsize=2)
def _low_pass(factor: int, zero_crossings: int = 64) -> np.ndarray:
    """Keeps what lies under 0.93 of half the lower rate, there and back within -100 dB; reaches 64 of its samples far, 4 ms at 16 kHz."""
    return firwin(2 * zero_crossings * factor + 1, 1 / factor, window=("kaiser", 10.0)).astype(
        np.float32
    )


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
    with working_folder(out) as work, _libsndfile_told(song, work), _opened(song, work) as source:
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

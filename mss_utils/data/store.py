"""The stem store: every track decoded once, at the working rate, ready to be cut into segments.

    SourceTrack --read_track--> stems at their own rate --build_store--> Store (memory-mapped)

Training and separation read only the store: they need neither musdb nor ffmpeg. Taught in
notebook 01.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
import torch
import torchaudio
from pydantic import AfterValidator, BaseModel, Field, model_validator
from tqdm.auto import tqdm

from mss_utils import songs
from mss_utils.config import SPLITS, Settings, cache_folder, is_valid_stem_name
from mss_utils.data.levels import active_windows, rms
from mss_utils.data.sources import (
    MIXTURE,
    Groups,
    Recording,
    SourceTrack,
    common_stems,
    dataset_root,
    find_tracks,
    group_of,
    is_built_in,
    join_names,
    read_track,
    sha,
)
from mss_utils.files import (
    atomic_write,
    file_lock,
    is_safe_file_name,
    printable_name,
    safe_name,
    write_text,
)

FULL_SCALE = 32767
FORMAT = 2
MAX_PEAK = 1000.0  # times full scale; beyond it 16 bits would keep nothing else of a track
MAX_RATIO = 1000  # of two sample rates; 44.1 kHz to 16 kHz is 441 to 160
MAX_READERS = 8  # a four-minute track of MUSDB18 takes up to 1.3 GB while it is decoded


def _check_file_name(name: str) -> str:
    if not is_safe_file_name(name):
        raise ValueError(f"{name[:100]!r} is no file name")
    return name


def _check_stem_name(name: str) -> str:
    if not is_valid_stem_name(name):
        raise ValueError(f"{name[:100]!r} is no stem name")
    return name


@dataclass(frozen=True)
class Track:
    """One track of a store. Rows are the mixture, then the stems; levels are of full scale."""

    name: str
    split: Literal["train", "valid", "test"]
    file: Annotated[str, AfterValidator(_check_file_name)]
    source: str
    fingerprint: str
    sha: str
    samples: Annotated[int, Field(ge=1)]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # float sample = scale * int16
    source_rates: tuple[int, ...]  # Hz, of the files
    source_samples: tuple[int, ...]  # lengths of the files in samples of the store
    rms: tuple[float, ...]  # per row
    peak: tuple[float, ...]  # per row
    residual_rms: float  # mixture minus sum of stems
    active: tuple[tuple[int, ...], ...]  # half seconds in which two rows are both active
    n_windows: int  # half seconds of the track


class Index(BaseModel):
    """The content of index.json: dataset and tracks decoded so far."""

    format: Literal[2]  # raised when the content of a store changes
    source: str
    sample_rate: int = Field(ge=1)
    channels: int = Field(ge=1)
    stems: tuple[Annotated[str, AfterValidator(_check_stem_name)], ...] = Field(min_length=2)
    tracks: tuple[Track, ...]
    complete: bool = False

    @model_validator(mode="after")
    def _check_rows(self) -> Index:
        n_rows = 1 + len(self.stems)
        for track in self.tracks:
            lengths = {len(track.rms), len(track.peak), len(track.active), *map(len, track.active)}
            if lengths != {n_rows}:
                raise ValueError(f"track {track.name!r} has not one value per stem")
        return self


@dataclass(frozen=True)
class Store:
    """Decoded tracks of one dataset; arrays are `(1 + stems, channels, samples)`, mixture first."""

    folder: Path
    source: str
    sample_rate: int
    channels: int
    stems: tuple[str, ...]
    tracks: tuple[Track, ...]

    def split(self, name: str) -> list[Track]:
        """Return the tracks of 'train', 'valid' or 'test'."""
        return [track for track in self.tracks if track.split == name]

    def raw(self, track: Track) -> np.ndarray:
        """Return the memory-mapped int16 samples `(1 + stems, channels, samples)` of a track."""
        return np.load(self.folder / track.file, mmap_mode="r")

    def load(
        self, track: Track, start: int = 0, length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read a track, or a part of it.

        Returns
        -------
        tuple of ndarray
            Mixture `(channels, samples)` and stems `(stems, channels, samples)`, float32.
        """
        end = track.samples if length is None else start + length
        audio = self.raw(track)[..., start:end].astype(np.float32) * np.float32(track.scale)
        return audio[0], audio[1:]

    def stem_index(self, stem: str) -> int:
        """Return the row of `stem` among the stems; ValueError lists the stems."""
        if stem not in self.stems:
            known = ", ".join(self.stems)
            raise ValueError(f"No stem {stem!r} in {self.source}; there are: {known}.")
        return self.stems.index(stem)

    def targets(self, target: str) -> tuple[str, ...]:
        """Return the stems of the setting `target`: all, or those separated by commas."""
        if target == "all":
            return self.stems
        names = dict.fromkeys(target.split(","))
        return tuple(self.stems[self.stem_index(name)] for name in names)

    @property
    def n_bytes(self) -> int:
        """Size of all samples on disk."""
        n_samples = sum(track.samples for track in self.tracks)
        return 2 * (1 + len(self.stems)) * self.channels * n_samples

    @property
    def sha(self) -> str:
        """Hash of the samples of every track: runs with the same hash saw the same data."""
        return sha([(track.name, track.split, track.sha) for track in self.tracks])


def open_store(settings: Settings) -> Store:
    """Return the store of a run's dataset; it is built first if it is missing.

    A dataset folder may be a store itself, made on another machine; ValueError if it does not fit.
    """
    root = dataset_root(settings)
    if not (root / "index.json").exists():
        return build_store(root, settings.sample_rate, settings.channels, settings.groups)
    store = read_store(root)
    for name in ("sample_rate", "channels"):
        own, wanted = getattr(store, name), getattr(settings, name)
        if own != wanted:
            raise ValueError(
                f"The stem store {root} has {name}={own}, the run asks for {wanted}: set "
                f"{name}={own}, or give the dataset itself."
            )
    if settings.groups:
        raise ValueError(
            f"The stem store {root} has the stems {', '.join(store.stems)}: leave groups out, or "
            "give the dataset itself."
        )
    return store


def check_target_exists(settings: Settings) -> None:
    """Raise ValueError if the dataset lacks a target; nothing is rendered or decoded."""
    if is_built_in(settings):
        source = "the built-in songs"
        stems = tuple(dict.fromkeys(group_of(stem, settings.groups) for stem in songs.STEMS))
    else:
        source = dataset_root(settings)
        if (source / "index.json").exists():
            stems = read_store(source).stems
        else:
            stems = common_stems(find_tracks(source), source, settings.groups)
    for target in settings.target.split(","):
        if target not in (*stems, "all"):
            known = ", ".join(stems)
            raise ValueError(f"No stem {target!r} in {source}; there are: {known} (or 'all').")


def read_store(folder: Path) -> Store:
    """Return the finished store in `folder`; ValueError if it is damaged or unfinished."""
    remedy = "copy the whole folder, or build it again from the dataset"
    try:
        index = Index.model_validate_json((folder / "index.json").read_bytes())
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / 'index.json'} is damaged ({reason}): {remedy}.") from None
    if not index.complete or {track.split for track in index.tracks} != set(SPLITS):
        raise ValueError(f"The stem store {folder} is not finished: {remedy}.")
    missing = [track.file for track in index.tracks if not _is_whole(folder, track, index)]
    if missing:
        raise ValueError(f"The stem store {folder} lacks {join_names(missing)}: {remedy}.")
    return Store(folder, index.source, index.sample_rate, index.channels, index.stems, index.tracks)


# --- building -------------------------------------------------------------------------------------


def build_store(
    root: Path,
    sample_rate: int,
    channels: int,
    groups: Groups = MappingProxyType({}),
    n_jobs: int | None = None,
) -> Store:
    """Decode every track under `root` that the store lacks, and return the store.

    Tracks are decoded by `n_jobs` threads (default: one per core, up to 8) and enter the index when
    they are complete, so an interrupted build resumes. A second builder waits for the first.

    Raises
    ------
    ValueError, FileNotFoundError, PermissionError
        As `find_tracks` and `read_track`; one error names all unreadable tracks.
    """
    folder, wanted, head = _plan(root, sample_rate, channels, groups)
    if not _is_current(folder, wanted, head):
        with file_lock(folder):
            tracks = _current_tracks(folder, _load_index(folder), wanted, head)
            n_jobs = n_jobs or min(os.cpu_count() or 1, MAX_READERS)
            _decode_missing(folder, wanted, tracks, head, groups, n_jobs)
            _write_index(folder, wanted, tracks, head.model_copy(update=dict(complete=True)))
            for path in folder.iterdir():  # tracks that left the dataset, parts of killed builds
                if path.is_file() and path.name not in (*wanted, "index.json", ".lock"):
                    path.unlink()
    return read_store(folder)


def is_decoded(settings: Settings) -> bool:
    """Whether the store of a dataset is complete; nothing is decoded to find out."""
    root = dataset_root(settings)
    if (root / "index.json").exists():
        return True
    plan = _plan(root, settings.sample_rate, settings.channels, settings.groups)
    return _is_current(*plan)


def _plan(
    root: Path, sample_rate: int, channels: int, groups: Groups
) -> tuple[Path, dict[str, SourceTrack], Index]:
    """Return the folder of a store, the file of each track, and an index without tracks."""
    sources = find_tracks(root)
    head = Index(
        format=FORMAT,
        source=printable_name(root),
        sample_rate=sample_rate,
        channels=channels,
        stems=common_stems(sources, root, groups),
        tracks=(),
    )
    sorted_groups = sorted((name, sorted(members)) for name, members in groups.items())
    key = sha((str(root.resolve()), sample_rate, channels, sorted_groups))[:8]
    name = safe_name(f"{root.resolve().name}-{sample_rate}-{channels}ch-{key}")
    wanted = {
        f"{source.split}-{safe_name(source.name)}-{sha(source.name)[:6]}.npy": source
        for source in sources
    }
    return cache_folder() / "stores" / name, wanted, head


def _is_current(folder: Path, wanted: dict[str, SourceTrack], head: Index) -> bool:
    """Whether the store is finished and has exactly the tracks of the dataset."""
    index = _load_index(folder)
    if index is None or not index.complete or len(index.tracks) != len(wanted):
        return False
    return len(_current_tracks(folder, index, wanted, head)) == len(wanted)


def _current_tracks(
    folder: Path, index: Index | None, wanted: dict[str, SourceTrack], head: Index
) -> dict[str, Track]:
    """Return the tracks that are complete and whose source has not changed, by file."""
    if index is None or index.stems != head.stems:
        return {}
    if (index.sample_rate, index.channels) != (head.sample_rate, head.channels):
        return {}
    return {
        track.file: track
        for track in index.tracks
        if track.file in wanted
        and wanted[track.file].fingerprint == track.fingerprint
        and _is_whole(folder, track, index)
    }


def _is_whole(folder: Path, track: Track, index: Index) -> bool:
    """Whether the file of a track has all its samples."""
    path, shape = folder / track.file, (1 + len(index.stems), index.channels, track.samples)
    header = _npy_header(shape)
    if not path.is_file() or path.stat().st_size != len(header) + 2 * math.prod(shape):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _decode_missing(
    folder: Path,
    wanted: dict[str, SourceTrack],
    tracks: dict[str, Track],
    head: Index,
    groups: Groups,
    n_jobs: int,
) -> None:
    """Decode what `tracks` lacks; one error names all tracks that failed."""
    errors: list[Exception] = []
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tracks are resampled in parallel
    pool = ThreadPoolExecutor(n_jobs)
    jobs = {
        pool.submit(_decode_track, source, head, groups, folder / file): file
        for file, source in wanted.items()
        if file not in tracks
    }
    try:
        bar = tqdm(total=len(jobs), desc="Stem store", unit="track", disable=not jobs)
        for job in as_completed(jobs):
            try:
                tracks[jobs[job]] = job.result()
            except (ValueError, PermissionError) as error:
                errors.append(error)
            _write_index(folder, wanted, tracks, head)
            bar.update()
        bar.close()
    finally:  # if interrupted, the tracks in progress are finished and kept
        pool.shutdown(cancel_futures=True)
        for job, file in jobs.items():
            if not job.cancelled() and not job.exception():
                tracks[file] = job.result()
        torch.set_num_threads(torch_threads)
        _write_index(folder, wanted, tracks, head)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        messages = join_names(sorted(map(str, errors)), "\n")
        raise ValueError(f"{len(errors)} of {len(wanted)} tracks cannot be used:\n{messages}")


def _load_index(folder: Path) -> Index | None:
    """Return the index of a store in the cache, or None if it has to be built."""
    try:
        return Index.model_validate_json((folder / "index.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _write_index(
    folder: Path, wanted: dict[str, SourceTrack], tracks: dict[str, Track], head: Index
) -> None:
    """Write the index with the tracks in the order of the dataset."""
    ordered = tuple(tracks[file] for file in wanted if file in tracks)
    index = head.model_copy(update=dict(tracks=ordered))
    write_text(folder / "index.json", index.model_dump_json())


def _decode_track(source: SourceTrack, head: Index, groups: Groups, path: Path) -> Track:
    """Write one track as int16 `(1 + stems, channels, samples)`.

    A scale per track keeps samples beyond full scale. Shorter files end in silence.
    """
    recordings = read_track(source)
    rates = sorted({rate for _, rate in recordings.values()})
    parts = {
        name: _conform(recording, head.sample_rate, head.channels)
        for name, recording in recordings.items()
    }
    lengths = sorted({part.shape[-1] for part in parts.values()})
    audio = _stack(parts, head.stems, groups, lengths[-1])  # (1 + stems, channels, samples)
    peak = np.abs(audio).max(axis=(1, 2))
    if not peak.max() < MAX_PEAK:  # also true for NaN
        raise ValueError(
            f"{source.path} reaches {peak.max():.3g} times full scale: fix its files or remove it."
        )
    scale = max(1.0, float(peak.max())) / FULL_SCALE
    samples = np.round(audio / scale).astype(np.int16)
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(_npy_header(samples.shape))
        file.write(samples.data)
    active = active_windows(audio, head.sample_rate).astype(np.int64)  # (1 + stems, windows)
    return Track(
        name=source.name,
        split=source.split,  # type: ignore[arg-type]
        file=path.name,
        source=printable_name(source.path),
        fingerprint=source.fingerprint,
        sha=hashlib.sha256(samples.tobytes()).hexdigest(),
        samples=lengths[-1],
        scale=scale,
        source_rates=tuple(rates),
        source_samples=tuple(lengths),
        rms=tuple(map(rms, audio)),
        peak=tuple(peak.tolist()),
        residual_rms=scale * rms(samples[0] - samples[1:].sum(axis=0, dtype=np.int32)),
        active=tuple(map(tuple, (active @ active.T).tolist())),
        n_windows=active.shape[1],
    )


def _conform(recording: Recording, sample_rate: int, channels: int) -> np.ndarray:
    """Convert `(samples, any channels)` to `(channels, samples)` at the working rate, float32.

    Mono is the mean of all channels; stereo is the first two, or a single one twice. Odd sample
    rates are resampled by a near ratio: the exact filter could take gigabytes.
    """
    audio, rate = recording[0].T, recording[1]
    if channels == 1:
        audio = audio.mean(axis=0, keepdims=True)
    else:
        audio = np.resize(audio[:channels], (channels, audio.shape[1]))
    ratio = Fraction(rate, sample_rate).limit_denominator(MAX_RATIO)
    tensor = torch.from_numpy(np.ascontiguousarray(audio))
    resample = torchaudio.functional.resample
    return resample(tensor, ratio.numerator, ratio.denominator).numpy()


def _stack(
    parts: dict[str, np.ndarray], stems: tuple[str, ...], groups: Groups, length: int
) -> np.ndarray:
    """Stack mixture and stems; without a mixture file the mixture is the sum of the stems."""
    channels = next(iter(parts.values())).shape[0]
    audio = np.zeros((1 + len(stems), channels, length), np.float32)
    for name, part in parts.items():
        row = 0 if name == MIXTURE else 1 + stems.index(group_of(name, groups))
        audio[row, :, : part.shape[-1]] += part
    if MIXTURE not in parts:
        audio[0] = audio[1:].sum(axis=0)
    return audio


def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    description = dict(descr="<i2", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()

"""The stem store: every track decoded once, at the working rate, ready to be cut into segments.

    SourceTrack --read_track--> stems at their own rate --build_store--> Store (memory-mapped)

Training and separation read only the store: they need neither musdb nor ffmpeg. Taught in
notebook 01.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from threading import Lock
from tokenize import TokenError
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
import torch
import torchaudio
from pydantic import BaseModel, Field, model_validator
from tqdm.auto import tqdm

from mss_utils import songs
from mss_utils.config import Settings, cache_folder, is_valid_stem_name
from mss_utils.data.levels import SILENCE_DB, rms, window_levels_db
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
MAX_RATIO = 1000  # of two sample rates; the exact filter of odd ones could take gigabytes
MAX_READERS = 8  # a four-minute track of MUSDB18 takes up to 1.3 GB while it is decoded


@dataclass(frozen=True)
class Track:
    """One track of a store. Rows are the mixture, then the stems; levels are of full scale."""

    name: str
    split: Literal["train", "valid", "test"]
    file: str
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


class Store(BaseModel, frozen=True):
    """Decoded tracks of one dataset; arrays are `(1 + stems, channels, samples)`, mixture first.

    index.json in the folder of the store has all its other values.
    """

    folder: Path = Field(Path(), exclude=True)
    format: Literal[2] = 2  # raised when the content of a store changes
    source: str
    sample_rate: int = Field(ge=1)
    channels: int = Field(ge=1)
    stems: tuple[str, ...] = Field(min_length=2)
    tracks: tuple[Track, ...] = ()
    complete: bool = False  # no track of the dataset is missing

    @model_validator(mode="after")
    def _check_names_and_rows(self) -> Store:
        """Refuse names that lead out of a folder, and rows that are not those of the stems."""
        n_rows = 1 + len(self.stems)
        if not all(map(is_valid_stem_name, self.stems)):
            raise ValueError("a stem has no valid name")
        for track in self.tracks:
            rows = (track.rms, track.peak, track.active, *track.active)
            if not is_safe_file_name(track.file) or {len(row) for row in rows} != {n_rows}:
                raise ValueError(f"track {track.name[:100]!r} has a wrong file name or rows")
        return self

    def split(self, name: str) -> list[Track]:
        """Return the tracks of 'train', 'valid' or 'test'."""
        return [track for track in self.tracks if track.split == name]

    def raw(self, track: Track) -> np.ndarray:
        """Return the memory-mapped int16 samples `(1 + stems, channels, samples)` of a track."""
        return np.lib.format.open_memmap(self.folder / track.file, mode="r")

    def has(self, track: Track) -> bool:
        """Whether the file of a track is there with all its samples."""
        try:
            samples = self.raw(track)
        except (OSError, ValueError, OverflowError, TokenError):  # a damaged header
            return False
        shape = (1 + len(self.stems), self.channels, track.samples)
        return samples.shape == shape and samples.dtype == np.int16

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
        names = self.stems if target == "all" else dict.fromkeys(target.split(","))
        return tuple(self.stems[self.stem_index(name)] for name in names)

    @property
    def sha(self) -> str:
        """Hash of names, splits and samples (without their scale) of all tracks."""
        return sha([(track.name, track.split, track.sha) for track in self.tracks])


def open_store(settings: Settings) -> Store:
    """Return the store of a run's dataset; it is built first if it is missing.

    A dataset folder may be a store itself, made on another machine; ValueError if it does not fit.
    """
    root = dataset_root(settings)
    if not is_store(root):
        return build_store(root, *_shape(settings))
    store = read_store(root)
    is_same = (store.sample_rate, store.channels) == (settings.sample_rate, settings.channels)
    if not is_same or settings.groups:
        raise ValueError(
            f"The stem store {root} has sample_rate={store.sample_rate}, channels={store.channels} "
            f"and the stems {', '.join(store.stems)}: set these and no groups, or give the "
            "dataset itself."
        )
    return store


def check_target_exists(settings: Settings) -> None:
    """Raise ValueError if the dataset lacks a target; nothing is rendered or decoded."""
    if is_built_in(settings):
        stems = tuple(dict.fromkeys(group_of(stem, settings.groups) for stem in songs.STEMS))
        store = Store.model_construct(source="the built-in songs", stems=stems)
    else:
        root = dataset_root(settings)
        store = read_store(root) if is_store(root) else _plan(root, *_shape(settings))[0]
    store.targets(settings.target)


def is_store(folder: Path) -> bool:
    """Whether a dataset folder is a stem store."""
    return (folder / "index.json").exists()


def read_store(folder: Path) -> Store:
    """Return the finished store in `folder`; ValueError if it is damaged or unfinished."""
    remedy = "copy the whole folder, or build it again from the dataset"
    try:
        store = _read_index(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / 'index.json'} is damaged ({reason}): {remedy}.") from None
    missing = [track.file for track in store.tracks if not store.has(track)]
    if missing or not store.complete:
        problem = f"lacks {join_names(missing)}" if missing else "is not finished"
        raise ValueError(f"The stem store {folder} {problem}: {remedy}.")
    return store


def _read_index(folder: Path) -> Store:
    store = Store.model_validate_json((folder / "index.json").read_bytes())
    return store.model_copy(update=dict(folder=folder))


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
    ValueError, OSError
        As `find_tracks` and `read_track`; one error names all unreadable tracks.
    """
    head, wanted = _plan(root, sample_rate, channels, groups)
    store = _find_store(head, wanted)
    if not store.complete:
        with file_lock(head.folder):
            n_jobs = n_jobs or min(os.cpu_count() or 1, MAX_READERS)
            store = _decode_missing(_find_store(head, wanted), wanted, groups, n_jobs)
            # Remove tracks that left the dataset, and parts of killed builds.
            for path in head.folder.iterdir():
                if path.is_file() and path.name not in (*wanted, "index.json", ".lock"):
                    path.unlink()
    return store


def is_decoded(settings: Settings) -> bool:
    """Whether the dataset is a store, or its store is complete; nothing is decoded."""
    root = dataset_root(settings)
    return is_store(root) or _find_store(*_plan(root, *_shape(settings))).complete


def _shape(settings: Settings) -> tuple[int, int, Groups]:
    return settings.sample_rate, settings.channels, settings.groups


def _plan(
    root: Path, sample_rate: int, channels: int, groups: Groups
) -> tuple[Store, dict[str, SourceTrack]]:
    """Return a store without tracks, and the tracks of the dataset by the file they go to."""
    sources = find_tracks(root)
    sorted_groups = sorted((name, sorted(members)) for name, members in groups.items())
    key = sha((str(root.resolve()), sample_rate, channels, sorted_groups))[:8]
    name = safe_name(f"{root.resolve().name}-{sample_rate}-{channels}ch-{key}")
    head = Store(
        folder=cache_folder() / "stores" / name,
        source=printable_name(root),
        sample_rate=sample_rate,
        channels=channels,
        stems=common_stems(sources, root, groups),
    )
    wanted = {
        f"{source.split}-{safe_name(source.name)}-{sha(source.name)[:6]}.npy": source
        for source in sources
    }
    return head, wanted


def _find_store(head: Store, wanted: dict[str, SourceTrack]) -> Store:
    """Return the store with the tracks that are decoded and whose source has not changed."""
    try:
        index = _read_index(head.folder)
    except (FileNotFoundError, ValueError):
        return head
    tracks = [
        track
        for track in index.tracks
        if track.file in wanted
        and wanted[track.file].fingerprint == track.fingerprint
        and head.has(track)
    ]
    is_complete = index.complete and len(tracks) == len(index.tracks) == len(wanted)
    return head.model_copy(update=dict(tracks=tuple(tracks), complete=is_complete))


def _decode_missing(
    store: Store, wanted: dict[str, SourceTrack], groups: Groups, n_jobs: int
) -> Store:
    """Decode the tracks that `store` lacks; one error names all tracks that failed."""
    tracks, lock = {track.file: track for track in store.tracks}, Lock()
    errors: list[Exception] = []

    def decode(file: str) -> None:
        track = _decode_track(wanted[file], store, groups, store.folder / file)
        with lock:
            tracks[file] = track
            _write_index(store, wanted, tracks)

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tracks are resampled in parallel
    pool = ThreadPoolExecutor(n_jobs)
    jobs = [pool.submit(decode, file) for file in wanted if file not in tracks]
    try:
        done = as_completed(jobs)
        for job in tqdm(done, "Stem store", len(jobs), unit="track", disable=not jobs):
            try:
                job.result()
            except (ValueError, PermissionError) as error:
                errors.append(error)
    finally:  # if interrupted, the tracks in progress are finished and kept
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        messages = join_names(sorted(map(str, errors)), "\n")
        raise ValueError(f"{len(errors)} of {len(wanted)} tracks cannot be used:\n{messages}")
    return _write_index(store, wanted, tracks)


def _write_index(store: Store, wanted: dict[str, SourceTrack], tracks: dict[str, Track]) -> Store:
    """Write the index with the tracks in the order of the dataset; return the store."""
    ordered = tuple(tracks[file] for file in wanted if file in tracks)
    store = store.model_copy(update=dict(tracks=ordered, complete=len(tracks) == len(wanted)))
    write_text(store.folder / "index.json", store.model_dump_json())
    return store


def _decode_track(source: SourceTrack, head: Store, groups: Groups, path: Path) -> Track:
    """Write one track as int16 `(1 + stems, channels, samples)`, scaled to keep loud samples."""
    recordings = read_track(source)
    parts = {
        name: _conform(recording, head.sample_rate, head.channels)
        for name, recording in recordings.items()
    }
    lengths = sorted({part.shape[-1] for part in parts.values()})
    audio = np.zeros((1 + len(head.stems), head.channels, lengths[-1]), np.float32)
    for name, part in parts.items():
        row = 0 if name == MIXTURE else 1 + head.stem_index(group_of(name, groups))
        audio[row, :, : part.shape[-1]] += part
    if MIXTURE not in parts:
        audio[0] = audio[1:].sum(axis=0)
    peak = np.abs(audio).max(axis=(1, 2))
    scale = max(1.0, float(peak.max())) / FULL_SCALE
    samples = np.round(audio / scale).astype(np.int16)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(samples)  # numpy.save hides a full disk
        np.lib.format.write_array_header_1_0(file, header)
        file.write(samples.data)
    active = (window_levels_db(audio, head.sample_rate) > SILENCE_DB).astype(np.int64)
    return Track(
        name=source.name,
        split=source.split,  # type: ignore[arg-type]
        file=path.name,
        source=printable_name(source.path),
        fingerprint=source.fingerprint,
        sha=hashlib.sha256(samples.tobytes()).hexdigest(),
        samples=lengths[-1],
        scale=scale,
        source_rates=tuple(sorted({rate for _, rate in recordings.values()})),
        source_samples=tuple(lengths),
        rms=tuple(map(rms, audio)),
        peak=tuple(peak.tolist()),
        residual_rms=scale * rms(samples[0] - samples[1:].sum(axis=0, dtype=np.int32)),
        active=tuple(map(tuple, (active @ active.T).tolist())),
        n_windows=active.shape[1],
    )


def _conform(recording: Recording, sample_rate: int, channels: int) -> np.ndarray:
    """Convert `(samples, any channels)` to `(channels, samples)` at the working rate, float32.

    Mono is the mean of all channels; stereo is the first two, or a single one twice.
    """
    audio, rate = recording[0].T, recording[1]
    if channels == 1:
        audio = np.ascontiguousarray(audio).mean(axis=0, keepdims=True)
    else:
        audio = np.resize(audio[:channels], (channels, audio.shape[1]))
    ratio = Fraction(rate, sample_rate).limit_denominator(MAX_RATIO)
    resample = torchaudio.functional.resample
    return resample(torch.from_numpy(audio), ratio.numerator, ratio.denominator).numpy()

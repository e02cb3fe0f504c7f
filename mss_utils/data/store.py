"""The stem store: every track decoded once, at the working rate, ready to be cut into segments.

    SourceTrack --read_track--> stems at their own rate --build_store--> Store (memory-mapped int16 and an index)

Whoever trains or separates reads the store alone: neither musdb nor ffmpeg is needed. Taught in notebook 01.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
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
    named,
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
BUILD_AGAIN = "build it again from the dataset"
LOUDEST = 1000.0  # times full scale; 16 bits would keep nothing else of a track
MAX_RATIO = 1000  # 44.1 kHz to 16 kHz is 441 to 160
MAX_READERS = 8  # a four-minute track of MUSDB18 takes up to 1.3 GB while it is decoded


def _checked(name: str, right: Callable[[str], bool]) -> str:
    if not right(name):
        raise ValueError(f"{name[:100]!r} is no name for it")
    return name


FileName = Annotated[str, AfterValidator(partial(_checked, right=is_safe_file_name))]
StemName = Annotated[str, AfterValidator(partial(_checked, right=is_valid_stem_name))]


@dataclass(frozen=True)
class Track:
    """One track of a store. Rows are the mixture, then the stems; `scale` makes floats of int16."""

    name: str
    split: Literal[SPLITS]
    file: FileName
    source: str
    fingerprint: str
    sha: str
    samples: Annotated[int, Field(ge=1)]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source_rates: tuple[int, ...]  # Hz, each rate that the track's files have
    source_samples: tuple[int, ...]  # each length in samples of the store that they have
    rms: tuple[float, ...]  # of each row, relative to full scale, as all levels here
    peak: tuple[float, ...]  # of each row
    residual_rms: float  # mixture minus sum of stems
    active: tuple[
        tuple[int, ...], ...
    ]  # how many half seconds two rows are both above -60 dB; on the diagonal, each row by itself
    n_windows: int


class Index(BaseModel):
    """What index.json holds: of which dataset the store is, and every track that is decoded so far."""

    format: Literal[
        FORMAT
    ]  # to be raised when what a store holds changes: stores of another format are not read
    source: str
    sample_rate: int = Field(ge=1)
    channels: int = Field(ge=1)
    stems: tuple[StemName, ...] = Field(min_length=2)
    tracks: tuple[Track, ...]
    complete: bool = False

    @model_validator(mode="after")
    def _one_row_a_stem(self) -> Index:
        for track in self.tracks:
            if {len(track.rms), len(track.peak), len(track.active), *map(len, track.active)} != {
                1 + len(self.stems)
            }:
                raise ValueError(
                    f"track {track.name!r} has not one value for the mixture and each stem"
                )
        return self


@dataclass(frozen=True)
class Store:
    """Decoded tracks of one dataset at one rate; every array is `(1 + stems, channels, samples)`, mixture first."""

    folder: Path
    source: str
    sample_rate: int
    channels: int
    stems: tuple[str, ...]
    tracks: tuple[Track, ...]

    def split(self, name: str) -> list[Track]:
        """The tracks of 'train', 'valid' or 'test'."""
        return [track for track in self.tracks if track.split == name]

    def raw(self, track: Track) -> np.ndarray:
        """The memory-mapped int16 samples of a track, `(1 + stems, channels, samples)`."""
        return np.load(self.folder / track.file, mmap_mode="r")

    def load(
        self, track: Track, start: int = 0, length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mixture `(channels, samples)` and stems `(stems, channels, samples)` as float32."""
        end = track.samples if length is None else start + length
        audio = self.raw(track)[..., start:end].astype(np.float32) * np.float32(track.scale)
        return audio[0], audio[1:]

    def stem_index(self, stem: str) -> int:
        """Row of `stem`; ValueError with the list of stems when there is none of that name."""
        if stem not in self.stems:
            raise ValueError(
                f"No stem {stem!r} in {self.source}; there are: {', '.join(self.stems)}."
            )
        return self.stems.index(stem)

    def targets(self, target: str) -> tuple[str, ...]:
        """The stems to train for: all of them for 'all', else those that `target` names, with commas between."""
        return (
            self.stems
            if target == "all"
            else tuple(
                dict.fromkeys(self.stems[self.stem_index(stem)] for stem in target.split(","))
            )
        )

    @property
    def n_bytes(self) -> int:
        """Size of all samples on disk."""
        return sum(
            2 * (1 + len(self.stems)) * self.channels * track.samples for track in self.tracks
        )

    @property
    def sha(self) -> str:
        """Hash of the decoded samples of every track: two runs with the same hash saw the same data."""
        return sha([(track.name, track.split, track.sha) for track in self.tracks])


def open_store(settings: Settings) -> Store:
    """The decoded store of a run's dataset, built (and the built-in songs rendered) where it is missing.

    A dataset folder may be a stem store itself, made elsewhere and carried here; ValueError when it does not fit.
    """
    root = dataset_root(settings)
    if not (root / "index.json").exists():
        return build_store(root, settings.sample_rate, settings.channels, settings.groups)
    store = read_store(root)  # somebody's, who may have called it what he likes
    for name in ("sample_rate", "channels"):
        if getattr(store, name) != getattr(settings, name):
            raise ValueError(
                f"The stem store {root} has {name}={getattr(store, name)}, the run asks for {getattr(settings, name)}: "
                f"set {name}={getattr(store, name)}, or give the dataset it was made from."
            )
    if settings.groups:
        stems = ", ".join(store.stems)
        raise ValueError(
            f"The stem store {root} is decoded already, into {stems}: leave groups out, or give the dataset it was made from."
        )
    return store


def check_target_exists(settings: Settings) -> None:
    """Raise ValueError listing the stems when the dataset has no stem `settings.target`; nothing is rendered or decoded."""
    stems = _stems_of(settings)
    for target in settings.target.split(",") if settings.target != "all" else []:
        if target not in stems:
            where = "the built-in songs" if is_built_in(settings) else dataset_root(settings)
            raise ValueError(
                f"No stem {target!r} in {where}; there are: {', '.join(stems)} (or 'all')."
            )


def _stems_of(settings: Settings) -> tuple[str, ...]:
    if is_built_in(settings):
        return tuple(dict.fromkeys(group_of(stem, settings.groups) for stem in songs.STEMS))
    root = dataset_root(settings)
    return (
        read_store(root).stems
        if (root / "index.json").exists()
        else common_stems(find_tracks(root), root, settings.groups)
    )


def read_store(folder: Path) -> Store:
    """The finished store in `folder`. Raises ValueError when its index is damaged, of another format or unfinished, or files are missing."""
    try:
        index = Index.model_validate_json((folder / "index.json").read_bytes())
    except ValueError as error:  # pydantic's is one
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(
            f"{folder / 'index.json'} is no index of a stem store of format {FORMAT} ({where}: {first['msg']}); {BUILD_AGAIN}."
        ) from None
    if not index.complete or {track.split for track in index.tracks} != set(SPLITS):
        raise ValueError(
            f"The stem store {folder} is not finished, it lacks tracks; {BUILD_AGAIN}."
        )
    store = Store(
        folder, index.source, index.sample_rate, index.channels, index.stems, index.tracks
    )
    missing = [track.file for track in store.tracks if not _is_whole(folder, track, index)]
    if missing:
        raise ValueError(
            f"The stem store {folder} lacks {len(missing)} files or parts of them, {missing[0]} first: copy the whole folder, or build it again."
        )
    return store


# --- building -----------------------------------------------------------------------------------------------------------


def build_store(
    root: Path,
    sample_rate: int,
    channels: int,
    groups: Groups = MappingProxyType({}),
    n_jobs: int | None = None,
) -> Store:
    """Decode every track under `root` that the store does not hold yet, and return the store.

    Tracks are decoded in parallel by `n_jobs` threads (default: one a core, up to 8); ffmpeg, libsndfile and torch
    release the interpreter lock. Each track enters the index when it is complete, so an interrupted build goes on where
    it was; of several builders one works and the others wait for it. `groups` are stems added up under a new name.
    Raises what `find_tracks` and `read_track` raise, for all unreadable tracks at once, and OSError for a full disk.
    """
    folder, wanted, head = _plan(root, sample_rate, channels, groups)
    if not _is_current(folder, wanted, head):
        with file_lock(folder):
            tracks = _current(folder, _index_of(folder), wanted, head)
            _decode_missing(
                folder, wanted, tracks, head, groups, n_jobs or min(os.cpu_count(), MAX_READERS)
            )
            _write_index(folder, wanted, tracks, head.model_copy(update=dict(complete=True)))
            _clear(folder, {*wanted, "index.json", ".lock"})
    return read_store(folder)


def is_decoded(settings: Settings) -> bool:
    """Whether the store of somebody's dataset is there and needs nothing more to be read; nothing is decoded to find out."""
    root = dataset_root(settings)
    return (root / "index.json").exists() or _is_current(
        *_plan(root, settings.sample_rate, settings.channels, settings.groups)
    )


def _plan(
    root: Path, sample_rate: int, channels: int, groups: Groups
) -> tuple[Path, dict[str, SourceTrack], Index]:
    """Folder of a store, which file each track becomes, and the head of its index."""
    sources = find_tracks(root)
    head = Index(
        format=FORMAT,
        source=printable_name(root),
        sample_rate=sample_rate,
        channels=channels,
        stems=common_stems(sources, root, groups),
        tracks=(),
    )
    place = (
        str(root.resolve()),
        sample_rate,
        channels,
        sorted((name, sorted(members)) for name, members in groups.items()),
    )
    folder = (
        cache_folder()
        / "stores"
        / safe_name(f"{root.resolve().name}-{sample_rate}-{channels}ch-{sha(place)[:8]}")
    )
    return folder, {_file_name(source): source for source in sources}, head


def _file_name(source: SourceTrack) -> str:
    return f"{source.split}-{safe_name(source.name)}-{sha(source.name)[:6]}.npy"


def _is_current(folder: Path, wanted: dict[str, SourceTrack], head: Index) -> bool:
    """Whether the store is finished and holds the tracks of the dataset, no fewer and no more."""
    index = _index_of(folder)
    return (
        index is not None
        and index.complete
        and len(index.tracks) == len(wanted) == len(_current(folder, index, wanted, head))
    )


def _current(
    folder: Path, index: Index | None, wanted: dict[str, SourceTrack], head: Index
) -> dict[str, Track]:
    """The tracks of the index whose samples are there and whose source has not changed since."""
    if index is None or (index.sample_rate, index.channels, index.stems) != (
        head.sample_rate,
        head.channels,
        head.stems,
    ):
        return {}
    fits = lambda track: (
        track.file in wanted
        and wanted[track.file].fingerprint == track.fingerprint
        and _is_whole(folder, track, index)
    )
    return {track.file: track for track in index.tracks if fits(track)}


def _is_whole(folder: Path, track: Track, index: Index) -> bool:
    """Whether the samples of a track are there, all of them."""
    path, shape = folder / track.file, (1 + len(index.stems), index.channels, track.samples)
    header = _header(shape)
    if not (path.is_file() and path.stat().st_size == len(header) + 2 * math.prod(shape)):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _decode_missing(
    folder: Path, wanted: dict, tracks: dict[str, Track], head: Index, groups: Groups, n_jobs: int
) -> None:
    """Decode what `tracks` lacks and add it there and to the index, track by track; one error names all that failed."""
    missing = {file: source for file, source in wanted.items() if file not in tracks}
    failed: list[Exception] = []
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every core has a track of its own to resample
    pool = ThreadPoolExecutor(n_jobs)
    jobs = {
        pool.submit(_decode_track, source, head, groups, folder / file): file
        for file, source in missing.items()
    }
    try:
        for job in tqdm(
            as_completed(jobs), total=len(jobs), desc="Stem store", unit="track", disable=not jobs
        ):
            try:
                tracks[jobs[job]] = job.result()
            except (
                ValueError,
                PermissionError,
            ) as error:  # what is wrong with one track is told together with the others
                failed.append(error)
            _write_index(folder, wanted, tracks, head)
    finally:  # also when interrupted: the tracks that were under way are finished and kept
        pool.shutdown(cancel_futures=True)
        tracks.update(
            {
                file: job.result()
                for job, file in jobs.items()
                if not job.cancelled() and not job.exception()
            }
        )
        torch.set_num_threads(torch_threads)
        _write_index(folder, wanted, tracks, head)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(wanted)} tracks cannot be used:\n"
            + named(sorted(map(str, failed)), "\n")
        )


def _clear(folder: Path, kept: set[str]) -> None:
    """Take away what no track of the index owns: songs that left the dataset, and parts that a killed build left."""
    for path in folder.iterdir():
        if path.name not in kept and path.is_file():
            path.unlink()


def _index_of(folder: Path) -> Index | None:
    """The index of a store in the cache; None where it has to be built, also because its index is damaged or of another format."""
    try:
        return Index.model_validate_json((folder / "index.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _write_index(folder: Path, wanted: dict, tracks: dict[str, Track], head: Index) -> None:
    """The index in the order of the dataset, whatever order the tracks came in."""
    write_text(
        folder / "index.json",
        head.model_copy(
            update=dict(tracks=tuple(tracks[file] for file in wanted if file in tracks))
        ).model_dump_json(),
    )


def _decode_track(source: SourceTrack, head: Index, groups: Groups, path: Path) -> Track:
    """Write one track as int16 `(1 + stems, channels, samples)`; a per-track scale keeps samples beyond full scale.

    Files of other rates are brought to the working rate, and the shorter ones end in silence; the index says so.
    """
    parts = read_track(source)
    rates = sorted({rate for _, rate in parts.values()})
    parts = {name: _conform(part, head.sample_rate, head.channels) for name, part in parts.items()}
    lengths = sorted({audio.shape[-1] for audio in parts.values()})
    audio = _stack(parts, head.stems, groups, lengths[-1])
    peak = np.abs(audio).max(axis=(1, 2))
    if not peak.max() < LOUDEST:  # also where a sum of floats is no number any more
        raise ValueError(
            f"{source.path} reaches {peak.max():.3g} times full scale; expected music: mend its files or remove the track."
        )
    scale = max(1.0, float(peak.max())) / FULL_SCALE
    samples = np.round(audio / scale).astype(np.int16)
    _write_samples(path, samples)
    active = active_windows(audio, head.sample_rate).astype(np.int64)  # (1 + stems, windows)
    return Track(
        name=source.name,
        split=source.split,
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
    """`(samples, any channels)` at any rate -> `(channels, samples)` at the working rate, float32.

    One channel is the mean of all; two are the first two, or the only one twice. Rates without a small ratio, which would need a
    filter of gigabytes, are off by less than a millionth.
    """
    audio, rate = recording[0].T, recording[1]
    audio = (
        audio.mean(axis=0, keepdims=True)
        if channels == 1
        else np.resize(audio[:channels], (channels, audio.shape[1]))
    )
    ratio = Fraction(rate, sample_rate).limit_denominator(MAX_RATIO)
    return torchaudio.functional.resample(
        torch.from_numpy(np.ascontiguousarray(audio)), ratio.numerator, ratio.denominator
    ).numpy()


def _stack(
    parts: dict[str, np.ndarray], stems: list[str], groups: Groups, length: int
) -> np.ndarray:
    """Mixture and stems `(1 + stems, channels, length)`; without a mixture file the mixture is the sum of the stems."""
    channels = next(iter(parts.values())).shape[0]
    audio = np.zeros((1 + len(stems), channels, length), np.float32)
    for name, part in parts.items():
        row = 0 if name == MIXTURE else 1 + stems.index(group_of(name, groups))
        audio[row, :, : part.shape[-1]] += part
    if MIXTURE not in parts:
        audio[0] = audio[1:].sum(axis=0)
    return audio


def _write_samples(path: Path, samples: np.ndarray) -> None:
    """As `np.save` does, but with an error that says why where the disk is full."""
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(_header(samples.shape))
        file.write(samples.data)


def _header(shape: tuple[int, ...]) -> bytes:
    """What an .npy file of int16 begins with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, dict(descr="<i2", fortran_order=False, shape=shape)
    )
    return header.getvalue()

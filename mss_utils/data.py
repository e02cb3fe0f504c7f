"""From a dataset folder to a stem store: every track decoded once, at the working rate, ready to be cut into segments.

    dataset root --find_tracks--> SourceTrack --build_store--> Store (memory-mapped int16) --> segments, whole tracks, audit

Taught in notebook 01.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio
import yaml
from tqdm.auto import tqdm

from mss_utils import demo
from mss_utils.settings import Settings, cache_folder, from_root, replacing, safe_name, write_text

MIXTURE = "mixture"
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MUSDB_STEMS = ("drums", "bass", "other", "vocals")
FULL_SCALE = 32767
SILENCE_DB = -60.0


@dataclass(frozen=True)
class SourceTrack:
    """One track as it lies in the dataset: a stem file, or a folder with one file per stem."""

    name: str
    split: str
    path: Path
    files: tuple[Path, ...]

    @property
    def is_stem_file(self) -> bool:
        return self.path.suffix == ".mp4"

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever a file of the track changes: names, sizes and modification times, hashed."""
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return _sha(json.dumps(facts))

    @property
    def stems(self) -> tuple[str, ...]:
        if self.is_stem_file:
            return MUSDB_STEMS
        return tuple(sorted(file.stem for file in self.files if file.stem != MIXTURE))


@dataclass(frozen=True)
class Track:
    """One track of a store. `scale` turns its int16 samples back into full-scale floats."""

    name: str
    split: str
    file: str
    samples: int
    scale: float
    fingerprint: str
    sha: str


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

    def load(self, track: Track, start: int = 0, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mixture `(channels, samples)` and stems `(stems, channels, samples)` as float32."""
        end = track.samples if length is None else start + length
        audio = self.raw(track)[..., start:end].astype(np.float32) * np.float32(track.scale)
        return audio[0], audio[1:]

    def stem_index(self, stem: str) -> int:
        """Row of `stem`; ValueError with the list of stems when there is none of that name."""
        if stem not in self.stems:
            raise ValueError(f"No stem {stem!r} in {self.source}; there are: {', '.join(self.stems)}.")
        return self.stems.index(stem)

    def targets(self, target: str) -> tuple[str, ...]:
        """The stems to train for: all of them for 'all', else the one that `target` names."""
        return self.stems if target == "all" else (self.stems[self.stem_index(target)],)

    @property
    def sha(self) -> str:
        """Hash of the decoded samples of every track: two runs with the same hash saw the same data."""
        return _sha(json.dumps([(track.name, track.split, track.sha) for track in self.tracks]))


def open_store(settings: Settings) -> Store:
    """The decoded store of a run's dataset, built (and the built-in songs rendered) where it is missing."""
    return build_store(dataset_root(settings), settings.sample_rate, settings.channels)


def check_target(settings: Settings) -> None:
    """Raise ValueError listing the stems when the dataset has no stem `settings.target`; nothing is rendered or decoded."""
    root = None if _is_built_in(settings) else dataset_root(settings)
    stems = demo.STEMS if root is None else _common_stems(find_tracks(root), root)
    if settings.target not in ("all", *stems):
        raise ValueError(f"No stem {settings.target!r} in {root or 'the built-in songs'}; there are: {', '.join(stems)} (or 'all').")


def _is_built_in(settings: Settings) -> bool:
    return not settings.data and settings.profile in ("smoke", "demo")


def dataset_root(settings: Settings) -> Path:
    """Folder of the run's dataset; the built-in songs are rendered and the 7-second excerpts fetched where missing."""
    if settings.data:
        return from_root(settings.data)
    if not _is_built_in(settings):
        return _musdb_root(settings.profile)
    counts = settings.n_train_songs, settings.n_valid_songs, settings.n_test_songs
    durations = settings.song_min_s, settings.song_max_s
    name = "songs-{}-{:g}-{:g}s".format("-".join(map(str, counts)), *durations)
    return demo.render_songs(cache_folder() / name, *counts, duration_s=durations)


def _musdb_root(profile: str) -> Path:
    if os.environ.get("MUSDB_PATH"):
        return from_root(os.environ["MUSDB_PATH"])
    if profile == "musdb18":
        raise FileNotFoundError("The musdb18 profile needs the dataset: pass --data DIR or set MUSDB_PATH to the MUSDB18 folder.")
    root = cache_folder() / "musdb18-7"
    if not (root / "train").is_dir():
        _import_musdb().DB(root=str(root), download=True)
    return root


def _import_musdb():
    """musdb imports stempeg, which needs ffmpeg: say so in one sentence rather than in stempeg's traceback."""
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise FileNotFoundError("Reading stem files needs ffmpeg and ffprobe on the PATH; install them with: apt-get install ffmpeg")
    import musdb

    return musdb


def find_tracks(root: Path) -> list[SourceTrack]:
    """Every track under `<root>/{train,valid,test}`: MUSDB stem files, or folders with one audio file per stem.

    Without a `valid` folder, validation tracks are those a `mus.yaml` in the root names, else MUSDB18's official 14,
    else every tenth training track. Raises FileNotFoundError when there is nothing to train, validate or test on.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"No dataset folder {root}; expected {root}/train and {root}/test.")
    tracks = [track for split in ("train", "valid", "test") for track in _find_split(root / split, split)]
    if not any(track.split == "valid" for track in tracks):
        tracks = _with_validation(tracks, _validation_names(root))
    for split in ("train", "valid", "test"):
        if not any(track.split == split for track in tracks):
            raise FileNotFoundError(
                f"No {split} tracks under {root}; expected *.stem.mp4 files or folders with one "
                f"{'/'.join(AUDIO_SUFFIXES)} file per stem in {root}/train and {root}/test."
            )
    return tracks


def _find_split(folder: Path, split: str) -> list[SourceTrack]:
    tracks = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue
        if path.name.endswith(".stem.mp4"):
            tracks.append(SourceTrack(path.name.removesuffix(".stem.mp4"), split, path, (path,)))
        elif path.is_dir():
            files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES))
            if files:
                tracks.append(SourceTrack(path.name, split, path, files))
    return tracks


def _validation_names(root: Path) -> set[str]:
    """Names in `validation_tracks` of the dataset's own mus.yaml, else of the one musdb ships (read without importing it)."""
    setup = root / "mus.yaml"
    if not setup.exists():
        setup = Path(importlib.util.find_spec("musdb").origin).parent / "configs" / "mus.yaml"
    return set(yaml.safe_load(setup.read_text(encoding="utf-8"))["validation_tracks"])


def _with_validation(tracks: list[SourceTrack], names: set[str]) -> list[SourceTrack]:
    train = [track.name for track in tracks if track.split == "train"]
    valid = names & set(train) or set(train[9::10] or train[-1:] if len(train) > 1 else [])
    moved = lambda track: track.split == "train" and track.name in valid
    return [SourceTrack(t.name, "valid", t.path, t.files) if moved(t) else t for t in tracks]


def build_store(root: Path, sample_rate: int, channels: int, n_jobs: int | None = None) -> Store:
    """Decode every track under `root` that the store does not hold yet, and return the store.

    Tracks are decoded in parallel; ffmpeg, libsndfile and torch release the interpreter lock, so threads are enough.
    """
    sources = find_tracks(root)
    stems = _common_stems(sources, root)
    label = f"{root.resolve().name}-{_sha(str(root.resolve()))[:8]}-{sample_rate}-{channels}ch"
    folder = cache_folder() / "stores" / safe_name(label)
    known = {track["file"]: Track(**track) for track in _read_index(folder) if (folder / track["file"]).exists()}

    def decode(source: SourceTrack) -> Track:
        file = f"{source.split}-{safe_name(source.name)}-{_sha(source.name)[:6]}.npy"
        if file in known and known[file].fingerprint == source.fingerprint:
            return known[file]
        return _decode_track(source, stems, folder / file, sample_rate, channels)

    with ThreadPoolExecutor(n_jobs or os.cpu_count()) as pool:
        jobs = pool.map(decode, sources)
        tracks = tuple(tqdm(jobs, total=len(sources), desc="Stem store", unit="track", disable=len(known) == len(sources)))
    index = dict(source=str(root), sample_rate=sample_rate, channels=channels, stems=stems)
    write_text(folder / "index.json", json.dumps(index | {"tracks": [vars(track) for track in tracks]}, indent=1))
    return Store(folder, str(root), sample_rate, channels, stems, tracks)


def _read_index(folder: Path) -> list[dict]:
    index = folder / "index.json"
    return json.loads(index.read_text(encoding="utf-8"))["tracks"] if index.exists() else []


def _common_stems(sources: list[SourceTrack], root: Path) -> tuple[str, ...]:
    stems = sorted(set.intersection(*(set(source.stems) for source in sources)))
    odd = next((source for source in sources if set(source.stems) != set(stems)), None)
    if odd or len(stems) < 2:
        found = f"{odd.path.name} has {', '.join(odd.stems)}" if odd else f"found {stems}"
        raise ValueError(f"Every track under {root} must have the same two or more stems; {found}, common to all: {stems}.")
    return tuple(stems)


def _decode_track(source: SourceTrack, stems: tuple[str, ...], path: Path, sample_rate: int, channels: int) -> Track:
    """Write one track as int16 `(1 + stems, channels, samples)`; a per-track scale keeps samples beyond full scale."""
    parts = _read_stem_file(source) if source.is_stem_file else _read_folder(source)
    parts = {name: _conform(audio, rate, sample_rate, channels) for name, (audio, rate) in parts.items()}
    length = max(audio.shape[-1] for audio in parts.values())
    padded = {name: np.pad(audio, ((0, 0), (0, length - audio.shape[-1]))) for name, audio in parts.items()}
    stacked = np.stack([padded[stem] for stem in stems])
    audio = np.concatenate([padded.get(MIXTURE, stacked.sum(axis=0))[None], stacked])
    scale = max(1.0, float(np.abs(audio).max())) / FULL_SCALE
    samples = np.round(audio / scale).astype(np.int16)
    with replacing(path) as part, part.open("wb") as file:
        np.save(file, samples)
    sha = hashlib.sha256(samples.tobytes()).hexdigest()
    return Track(source.name, source.split, path.name, length, scale, source.fingerprint, sha)


def _read_stem_file(source: SourceTrack) -> dict[str, tuple[np.ndarray, int]]:
    """All streams of a MUSDB stem file through musdb, as `{name: ((samples, channels), rate)}`."""
    musdb = _import_musdb()
    track = musdb.MultiTrack(path=str(source.path), name=source.name, stem_id=0, is_wav=False)
    return {name: (audio, int(track.rate)) for name, audio in zip((MIXTURE, *MUSDB_STEMS), track.stems)}


def _read_folder(source: SourceTrack) -> dict[str, tuple[np.ndarray, int]]:
    return {file.stem: soundfile.read(file, dtype="float32", always_2d=True) for file in source.files}


def _conform(audio: np.ndarray, rate: int, sample_rate: int, channels: int) -> np.ndarray:
    """`(samples, any channels)` at `rate` -> `(channels, samples)` at the working rate, float32."""
    audio = audio.T.astype(np.float32)
    if channels == 1:
        audio = audio.mean(axis=0, keepdims=True)
    elif audio.shape[0] != channels:
        audio = np.repeat(audio[:1], channels, axis=0)
    return torchaudio.functional.resample(torch.from_numpy(audio), rate, sample_rate).numpy()


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def level_db(audio: np.ndarray) -> float:
    """RMS level in dB relative to full scale, over every axis; -inf for silence."""
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    return 10 * np.log10(power) if power > 0 else -np.inf


def audit(store: Store) -> pd.DataFrame:
    """One row per track and stem: split, duration, level, peak, silent share, and how far the stems miss the mixture.

    `residual_db` is the level of mixture minus sum of stems relative to the mixture, the same for all stems of a track.
    """
    return pd.DataFrame([row for track in store.tracks for row in _audit_track(store, track)])


def _audit_track(store: Store, track: Track) -> list[dict]:
    mixture, stems = store.load(track)
    residual_db = level_db(mixture - stems.sum(axis=0)) - level_db(mixture)
    rows = []
    for name, audio in zip((MIXTURE, *store.stems), (mixture, *stems)):
        rows.append(dict(
            track=track.name, split=track.split, stem=name, duration_s=track.samples / store.sample_rate,
            level_db=level_db(audio), peak=float(np.abs(audio).max()), silent_share=silent_share(audio, store.sample_rate),
            residual_db=residual_db,
        ))
    return rows


def warnings_of(table: pd.DataFrame, store: Store) -> list[str]:
    """What in an audit table a user should know of, one sentence each: stems that miss the mixture, short tracks, silence."""
    mixtures, stems = table[table["stem"] == MIXTURE], table[table["stem"] != MIXTURE]
    found = [f"{row.track}: the stems sum to the mixture only within {row.residual_db:.0f} dB."
             for row in mixtures[mixtures["residual_db"] > -30].itertuples()]
    found += [f"{row.track}: {row.duration_s:.2f} s is shorter than the one-second frame of the scores."
              for row in mixtures[(mixtures["duration_s"] < 1) & (mixtures["split"] == "test")].itertuples()]
    found += [f"{row.track}: {row.stem} is silent throughout." for row in stems[stems["silent_share"] == 1].itertuples()]
    return found


def silent_share(audio: np.ndarray, sample_rate: int, window_s: float = 0.5) -> float:
    """Share of `window_s` windows of `(channels, samples)` whose level is under -60 dB; NaN when shorter than one window."""
    levels = window_levels_db(audio, sample_rate, window_s)
    return float(np.mean(levels < SILENCE_DB)) if len(levels) else np.nan


def window_levels_db(audio: np.ndarray, sample_rate: int, window_s: float = 0.5) -> np.ndarray:
    """RMS level in dB of successive windows of `(channels, samples)`, -120 dB at the least."""
    window = round(window_s * sample_rate)
    frames = audio[:, : audio.shape[1] // window * window].reshape(audio.shape[0], -1, window)
    return 10 * np.log10(np.mean(np.square(frames, dtype=np.float64), axis=(0, 2)) + 1e-12)

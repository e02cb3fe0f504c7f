"""Dataset folders: recognise them, list their tracks, read a track.

    MUSDB18, MUSDB18-7    <root>/{train,test}/<artist> - <title>.stem.mp4
    MUSDB18-HQ            <root>/{train,test}/<track>/{mixture,drums,bass,other,vocals}.wav
    anything else         <root>/{train,valid,test}/<track>/<stem>.{wav,flac,ogg,mp3}

Stem files are read through musdb, all others through soundfile. A `mixture` file and a `valid`
folder are optional. Taught in notebook 01.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

from mss_utils import songs
from mss_utils.config import SPLITS, Settings, cache_folder, expand_path, is_valid_stem_name
from mss_utils.files import printable_name, temporary_folder

MIXTURE = "mixture"
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
STEM_SUFFIX = ".stem.mp4"
MUSDB_STEMS = ("drums", "bass", "other", "vocals")
MAX_NAMED = 5  # tracks that an error or a warning names
RATES = (1000, 768_000)  # accepted sample rates in Hz
MAX_PEAK = 1000.0  # times full scale; beyond it 16 bits would keep nothing else of a track
TRUNCATED_S = 0.1  # a stem file that is so much shorter than declared was cut off

Recording = tuple[np.ndarray, int]  # float32 (samples, channels), and the sample rate in Hz
Groups = Mapping[str, tuple[str, ...]]  # stem -> the stems that are added under its name


@dataclass(frozen=True)
class SourceTrack:
    """One track of a dataset: a stem file, or a folder with one file per stem."""

    name: str
    split: str
    path: Path
    files: tuple[Path, ...]

    @property
    def is_stem_file(self) -> bool:
        """Whether the track is one .stem.mp4 file."""
        return self.files == (self.path,)

    @property
    def stems(self) -> set[str]:
        """Names of the stems."""
        if self.is_stem_file:
            return set(MUSDB_STEMS)
        return {printable_name(file.stem) for file in self.files} - {MIXTURE}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, sizes and modification times of the files."""
        states = [(file.name, file.stat()) for file in self.files]
        return sha([(name, state.st_size, state.st_mtime_ns) for name, state in states])


def sha(facts: object) -> str:
    """Return 16 hexadecimal digits of the hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# --- datasets -------------------------------------------------------------------------------------


def is_built_in(settings: Settings) -> bool:
    """Whether the run uses the built-in songs."""
    return not settings.data and settings.profile in ("smoke", "demo")


def dataset_root(settings: Settings) -> Path:
    """Return the dataset folder; renders built-in songs and downloads excerpts if missing."""
    if settings.data:
        return expand_path(settings.data)
    if is_built_in(settings):
        counts = settings.n_train_songs, settings.n_valid_songs, settings.n_test_songs
        durations = settings.song_min_s, settings.song_max_s
        name = "songs-{}-{:g}-{:g}s".format("-".join(map(str, counts)), *durations)
        return songs.render_songs(cache_folder() / name, *counts, duration_s=durations)
    if os.environ.get("MUSDB_PATH"):
        return expand_path(os.environ["MUSDB_PATH"])
    if settings.profile == "musdb18":
        raise FileNotFoundError(
            "The musdb18 profile needs the dataset: pass --data DIR or set MUSDB_PATH."
        )
    root = cache_folder() / "musdb18-7"
    if not root.is_dir():
        _download_excerpts(root)
    return root


def _download_excerpts(root: Path) -> None:
    """Download the 7-second excerpts with musdb; `root` appears when they are complete."""
    musdb = _import_musdb()
    with temporary_folder(root.parent) as part:
        try:
            musdb.DB(root=str(part / root.name), download=True)
        except OSError as error:
            raise ConnectionError(
                f"musdb could not download the 7-second excerpts ({error}): "
                "pass --data DIR or set MUSDB_PATH to their folder."
            ) from None
        os.replace(part / root.name, root)


def _import_musdb() -> Any:
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise FileNotFoundError(
            "Reading MUSDB18 needs ffmpeg and ffprobe on the PATH: apt-get install ffmpeg"
        )
    import musdb

    return musdb


# --- tracks ---------------------------------------------------------------------------------------


def find_tracks(root: Path) -> list[SourceTrack]:
    """List every track under `<root>/{train,valid,test}`.

    Without a `valid` folder, the validation tracks are those that a `mus.yaml` in the root names,
    else MUSDB18's official 14, else every tenth training track.

    Raises
    ------
    FileNotFoundError
        A split has no tracks.
    ValueError
        A track exists twice, or has two files for a stem; mus.yaml is damaged.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"No dataset folder {root}; expected {root}/train and {root}/test.")
    tracks = [
        SourceTrack(printable_name(path.name.removesuffix(STEM_SUFFIX)), split, path, files)
        for split in SPLITS
        for path, files in _list_entries(root / split)
        if files
    ]
    if not any(track.split == "valid" for track in tracks):
        names = _choose_validation(root, [track.name for track in tracks if track.split == "train"])
        for i, track in enumerate(tracks):
            if track.split == "train" and track.name in names:
                tracks[i] = replace(track, split="valid")
    for split in SPLITS:
        if not any(track.split == split for track in tracks):
            raise FileNotFoundError(
                f"No {split} tracks under {root}; expected *{STEM_SUFFIX} files, or folders with "
                f"one {'/'.join(AUDIO_SUFFIXES)} file per stem, in train/ and test/."
            )
    for (split, name), count in Counter((track.split, track.name) for track in tracks).items():
        if count > 1:
            raise ValueError(f"Track {name!r} exists twice in {split}: remove one of them.")
    for track in tracks:
        stem, count = Counter(file.stem for file in track.files).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{track.path} has two files for stem {stem!r}: remove one of them.")
    return tracks


def ignored_entries(root: Path) -> list[str]:
    """List folders and files between the tracks that have no readable audio, as `split/name`."""
    return [
        f"{split}/{path.name}"
        for split in SPLITS
        for path, files in _list_entries(root / split)
        if not files
    ]


def _list_entries(folder: Path) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """List what could be a track with its audio files."""
    for path in _list_folder(folder) if folder.is_dir() else []:
        if path.is_dir():
            files = [file for file in _list_folder(path) if file.suffix.lower() in AUDIO_SUFFIXES]
            yield path, tuple(files)
        elif path.name.endswith(STEM_SUFFIX):
            yield path, (path,)
        elif path.suffix.lower() in (".mp4", ".m4a", *AUDIO_SUFFIXES):
            yield path, ()


def _list_folder(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _choose_validation(root: Path, train: list[str]) -> set[str]:
    path = root / "mus.yaml"
    if not path.is_file():
        folder = distribution("musdb").locate_file("musdb")  # importing musdb needs ffmpeg
        path = Path(str(folder)) / "configs" / "mus.yaml"
    try:
        named = set(yaml.safe_load(path.read_bytes())["validation_tracks"])
    except (yaml.YAMLError, KeyError, TypeError):
        raise ValueError(f"{path} has no list validation_tracks: fix it or remove it.") from None
    return named & set(train) or set(train[9::10] or train[1:][-1:])


# --- stems ----------------------------------------------------------------------------------------


def common_stems(sources: list[SourceTrack], root: Path, groups: Groups) -> tuple[str, ...]:
    """Return the stems that every track has once `groups` are formed, sorted.

    Raises
    ------
    ValueError
        Tracks have different stems, fewer than two stems, or a stem with a reserved name.
    """
    known = {stem for source in sources for stem in source.stems}
    for group, members in groups.items():
        if unknown := sorted(set(members) - known):
            raise ValueError(
                f"Group {group!r} adds {', '.join(unknown)}, which no track has; there are: "
                f"{', '.join(sorted(known))}."
            )
    by_track = {
        f"{source.split}/{source.name}": frozenset(group_of(stem, groups) for stem in source.stems)
        for source in sources
    }
    stems, count = Counter(by_track.values()).most_common(1)[0]
    odd = [f"{name} has {', '.join(sorted(own))}" for name, own in by_track.items() if own != stems]
    if odd:
        raise ValueError(
            f"All tracks under {root} need the same stems: {count} have "
            f"{', '.join(sorted(stems))}, but {join_names(odd, '; ')}. Add files, or form "
            "groups: --set 'groups=synth+fx->other'."
        )
    if len(stems) < 2:
        raise ValueError(f"The tracks under {root} have fewer than two stems each.")
    if invalid := [stem[:100] for stem in sorted(stems) if not is_valid_stem_name(stem)]:
        raise ValueError(
            f"A stem under {root} cannot be called {invalid[0]!r}: rename its files, or group it."
        )
    return tuple(sorted(stems))


def join_names(names: list[str], separator: str = ", ") -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return separator.join(names[:MAX_NAMED]) + more


def group_of(stem: str, groups: Groups) -> str:
    """Return the group that `stem` belongs to, or its own name."""
    for group, members in groups.items():
        if stem in members:
            return group
    return stem


# --- reading --------------------------------------------------------------------------------------


def read_track(source: SourceTrack) -> dict[str, Recording]:
    """Read the mixture (if there is one) and the stems of a track.

    Returns
    -------
    dict
        Name -> (float32 samples `(samples, channels)`, sample rate in Hz).

    Raises
    ------
    ValueError
        A file cannot be decoded, is empty, was cut off, has NaN, or an absurd level or rate.
    FileNotFoundError
        ffmpeg is missing.
    """
    if source.is_stem_file:
        parts = _read_stem_file(source.path)
    else:
        parts = {printable_name(file.stem): _read_file(file) for file in source.files}
    for name, (audio, rate) in parts.items():
        if not RATES[0] <= rate <= RATES[1]:
            problem = f"has a sample rate of {rate} Hz; expected {RATES[0]} to {RATES[1]} Hz"
        elif not audio.size:
            problem = "has no samples"
        elif not np.abs(audio).max() < MAX_PEAK:
            problem = f"has NaN, or samples above {MAX_PEAK:g} times full scale"
        else:
            continue
        raise ValueError(f"{source.path}: {name} {problem}: replace the file or remove the track.")
    return parts


def _read_file(file: Path) -> Recording:
    try:
        with file.open("rb") as stream:  # by its name, libsndfile takes any text for an mp3
            return soundfile.read(stream, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, MemoryError) as error:
        reason = getattr(error, "error_string", error)
        raise ValueError(
            f"Cannot read {file} ({reason}): replace it with a {'/'.join(AUDIO_SUFFIXES)} file, or "
            "remove the track."
        ) from None


def _read_stem_file(path: Path) -> dict[str, Recording]:
    musdb = _import_musdb()
    import ffmpeg

    names = (MIXTURE, *MUSDB_STEMS)
    try:
        track = musdb.MultiTrack(path=str(path), name=path.name, stem_id=0)
        if track.info.nb_audio_streams != len(names):
            raise ValueError(f"it has {track.info.nb_audio_streams} audio streams")
        audio = track.stems.astype(np.float32)  # (1 + stems, samples, channels)
        if audio.shape[1] < track.samples - TRUNCATED_S * track.rate:
            raise ValueError(f"it ends after {audio.shape[1] / track.rate:.1f} s, it was cut off")
    except AttributeError:  # stempeg's own warning about this is a broken call
        reason = "its streams differ in length, it was cut off"
    except ffmpeg.Error as error:
        reason = error.stderr.decode(errors="replace").strip().split("\n")[-1]
    except (Warning, LookupError, ValueError, RuntimeError) as error:
        reason = str(error)
    else:
        return {name: (part, int(track.rate)) for name, part in zip(names, audio, strict=True)}
    raise ValueError(
        f"Cannot read {path} ({reason}); expected MUSDB18's mixture and four stems: download it "
        "again or remove it."
    )

"""Dataset folders: recognise them, list their tracks, read a track.

    MUSDB18, MUSDB18-7    <root>/{train,test}/<artist> - <title>.stem.mp4
    MUSDB18-HQ            <root>/{train,test}/<track>/{mixture,drums,bass,other,vocals}.wav
    anything else         <root>/{train,valid,test}/<track>/<stem>.{wav,flac,ogg,mp3}

The first two are read through musdb, the third through soundfile. A `mixture` file and a `valid`
folder are optional. Taught in notebook 01.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
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
MUSDB_RATE = 44100
MAX_NAMED = 5  # tracks that an error or a warning names
RATES = (1000, 768_000)  # accepted sample rates in Hz
TRUNCATED_S = 0.1  # a stem file that is so much shorter than declared was cut off

Recording = tuple[np.ndarray, int]  # float32 (samples, channels), and the sample rate in Hz
Groups = Mapping[str, tuple[str, ...]]  # new stem -> the stems that are added under its name


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
        return self.path.name.endswith(STEM_SUFFIX)

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the stems, sorted."""
        if self.is_stem_file:
            return MUSDB_STEMS
        names = [printable_name(file.stem) for file in self.files]
        return tuple(sorted(name for name in names if name != MIXTURE))

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
    import ffmpeg
    import musdb

    if not hasattr(ffmpeg.probe, "cache_clear"):  # stempeg probes every file twice
        ffmpeg.probe = lru_cache(maxsize=64)(ffmpeg.probe)
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
        A track or a stem exists twice.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"No dataset folder {root}; expected {root}/train and {root}/test.")
    tracks = [track for split in SPLITS for track in _find_split(root, split)]
    if not any(track.split == "valid" for track in tracks):
        tracks = _with_validation(tracks, _validation_names(root))
    for split in SPLITS:
        if not any(track.split == split for track in tracks):
            raise FileNotFoundError(
                f"No {split} tracks under {root}; expected *{STEM_SUFFIX} files, or folders with "
                f"one {'/'.join(AUDIO_SUFFIXES)} file per stem, in train/ and test/{_hint(root)}."
            )
    for (split, name), count in Counter((track.split, track.name) for track in tracks).items():
        if count > 1:
            raise ValueError(f"Track {name!r} exists twice in {split}: remove one of them.")
    return tracks


def _hint(root: Path) -> str:
    """Name a folder above or below that looks like a dataset."""
    if (root / "train").is_dir():
        return ""
    for folder in (root.parent, *sorted(root.iterdir())):
        if (folder / "train").is_dir():
            return f"; did you mean {folder}?"
    return ""


def ignored_entries(root: Path) -> list[str]:
    """List folders and files between the tracks that have no readable audio, as `split/name`."""
    return [
        f"{split}/{path.name}"
        for split in SPLITS
        for path, files in _entries(root / split)
        if not files
    ]


def _entries(folder: Path) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """List what could be a track with its audio files; hidden entries are skipped."""
    for path in _list_folder(folder) if folder.is_dir() else []:
        if path.name.endswith(STEM_SUFFIX) and path.is_file():
            yield path, (path,)
        elif path.is_dir():
            files = [file for file in _list_folder(path) if file.is_file()]
            yield path, tuple(file for file in files if file.suffix.lower() in AUDIO_SUFFIXES)
        elif path.suffix.lower() in (".mp4", ".m4a", *AUDIO_SUFFIXES):
            yield path, ()


def _list_folder(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        raise PermissionError(
            f"No permission to open {folder}: chmod u+rx, or move it out of the dataset."
        ) from None


def _find_split(root: Path, split: str) -> Iterator[SourceTrack]:
    for path, files in _entries(root / split):
        for stem, count in Counter(file.stem for file in files).items():
            if count > 1:
                raise ValueError(f"{path} has two files for stem {stem!r}: remove one of them.")
        if files:
            name = printable_name(path.name.removesuffix(STEM_SUFFIX))
            yield SourceTrack(name, split, path, files)


def _validation_names(root: Path) -> set[str]:
    """Read `validation_tracks` of the dataset's mus.yaml, else of the one in musdb."""
    path = root / "mus.yaml"
    if not path.is_file():
        spec = importlib.util.find_spec("musdb")  # does not import musdb, which needs ffmpeg
        assert spec is not None and spec.origin is not None
        path = Path(spec.origin).parent / "configs" / "mus.yaml"
    try:
        names = yaml.safe_load(path.read_bytes())["validation_tracks"]
        return {str(name) for name in list(names)} if not isinstance(names, str) else {names}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} has no list validation_tracks: fix it or remove it.") from None


def _with_validation(tracks: list[SourceTrack], names: set[str]) -> list[SourceTrack]:
    train = [track.name for track in tracks if track.split == "train"]
    valid = names & set(train)
    if not valid and len(train) > 1:
        valid = set(train[9::10] or train[-1:])
    return [
        replace(track, split="valid") if track.split == "train" and track.name in valid else track
        for track in tracks
    ]


# --- stems ----------------------------------------------------------------------------------------


def common_stems(sources: list[SourceTrack], root: Path, groups: Groups) -> tuple[str, ...]:
    """Return the stems that every track has once `groups` are formed, sorted.

    Raises
    ------
    ValueError
        Tracks have different stems, fewer than two stems, or a stem with a reserved name.
    """
    _check_groups(groups, {stem for source in sources for stem in source.stems})
    by_track = [
        (source, frozenset(group_of(stem, groups) for stem in source.stems)) for source in sources
    ]
    counts = Counter(stems for _, stems in by_track).most_common()
    stems, count = counts[0]
    if len(counts) > 1:
        odd = [
            f"{source.split}/{source.name} {_difference(own, stems)}"
            for source, own in by_track
            if own != stems
        ]
        raise ValueError(
            f"All tracks under {root} need the same stems: {count} have "
            f"{', '.join(sorted(stems))}, but {join_names(odd, '; ')}. Add files, or form "
            "groups: --set 'groups=synth+fx->other'."
        )
    if len(stems) < 2:
        raise ValueError(f"The tracks under {root} have fewer than two stems each.")
    for stem in sorted(stems):
        if not is_valid_stem_name(stem):
            raise ValueError(
                f"A stem under {root} cannot be called {stem[:100]!r}: rename its files, or group "
                "it."
            )
    return tuple(sorted(stems))


def _difference(own: frozenset[str], stems: frozenset[str]) -> str:
    parts = []
    if stems - own:
        parts.append(f"lacks {', '.join(sorted(stems - own))}")
    if own - stems:
        parts.append(f"has {', '.join(sorted(own - stems))} too")
    return " and ".join(parts)


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


def _check_groups(groups: Groups, stems: set[str]) -> None:
    for group, members in groups.items():
        for stem in members:
            if stem not in stems:
                known = ", ".join(sorted(stems))
                raise ValueError(
                    f"Group {group!r} adds {stem!r}, which no track has; there are: {known}."
                )
        if group in stems - set(members):
            fixed = f"groups={'+'.join((group, *members))}->{group}"
            raise ValueError(f"Group {group!r} has the name of another stem: set {fixed}.")


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
        A file cannot be decoded, is empty, was cut off, has NaN, or an absurd sample rate.
    PermissionError
        A file may not be read.
    FileNotFoundError
        ffmpeg is missing.
    """
    for file in source.files:
        try:
            file.open("rb").close()
        except PermissionError:
            raise PermissionError(
                f"No permission to read {file}: chmod u+r, or remove the track."
            ) from None
    if needs_ffmpeg(source):
        parts = _read_musdb(source)
    else:
        parts = {printable_name(file.stem): _read_file(file) for file in source.files}
    for name, (audio, rate) in parts.items():
        if not RATES[0] <= rate <= RATES[1]:
            problem = f"has a sample rate of {rate} Hz; expected {RATES[0]} to {RATES[1]} Hz"
        elif not audio.size:
            problem = "has no samples"
        elif not np.isfinite(audio).all():
            problem = "has NaN or infinite samples"
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


def needs_ffmpeg(source: SourceTrack) -> bool:
    """Whether a track is read through musdb: a stem file, or a folder of MUSDB18-HQ."""
    return source.is_stem_file or _is_musdb_hq(source)


def _is_musdb_hq(source: SourceTrack) -> bool:
    """Check names and headers: musdb clips float files and ignores other channel counts."""
    if {file.name for file in source.files} != {f"{name}.wav" for name in (MIXTURE, *MUSDB_STEMS)}:
        return False
    try:
        infos = [soundfile.info(file) for file in source.files]
    except soundfile.LibsndfileError:
        return False
    formats = {(info.samplerate, info.channels, info.subtype) for info in infos}
    return formats == {(MUSDB_RATE, 2, "PCM_16")}


def _read_musdb(source: SourceTrack) -> dict[str, Recording]:
    musdb = _import_musdb()
    import ffmpeg

    mixture = source.path if source.is_stem_file else source.path / f"{MIXTURE}.wav"
    try:
        track = musdb.MultiTrack(
            path=str(mixture), name=source.name, stem_id=0, is_wav=not source.is_stem_file
        )
        if source.is_stem_file:
            n_streams = track.info.nb_audio_streams
            if n_streams != 1 + len(MUSDB_STEMS):
                raise ValueError(f"{n_streams} audio streams")
            parts = dict(zip((MIXTURE, *MUSDB_STEMS), track.stems, strict=True))
        else:
            parts = {MIXTURE: track.audio}
            for name in MUSDB_STEMS:
                path = str(source.path / f"{name}.wav")
                parts[name] = musdb.audio_classes.Source(track, name, path, 0).audio
    except (ffmpeg.Error, Warning, LookupError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Cannot read {source.path} ({_musdb_reason(error)}); expected MUSDB18's mixture and "
            "four stems: download the file again or remove it."
        ) from None
    finally:
        ffmpeg.probe.cache_clear()  # the file may have changed by the next call
    for name, audio in parts.items():
        if len(audio) < track.samples - TRUNCATED_S * track.rate:
            length_s, expected_s = len(audio) / track.rate, track.samples / track.rate
            raise ValueError(
                f"{source.path}: {name} ends after {length_s:.1f} of {expected_s:.1f} s, the file "
                "was cut off: download it again or remove it."
            )
    return {name: (audio.astype(np.float32), int(track.rate)) for name, audio in parts.items()}


def _musdb_reason(error: Exception) -> str:
    """Return the last line of the message of ffmpeg or stempeg."""
    if isinstance(error, AttributeError):  # stempeg's own warning about this is a broken call
        return "its streams differ in length, it was cut off"
    message = getattr(error, "stderr", None) or str(error).encode()
    lines = message.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__

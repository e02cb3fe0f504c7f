"""Datasets as they lie on disk: found by looking, every track read into one array per stem.

    MUSDB18, MUSDB18-7    <root>/{train,test}/<artist> - <title>.stem.mp4                       read through musdb
    MUSDB18-HQ            <root>/{train,test}/<track>/{mixture,drums,bass,other,vocals}.wav     read through musdb
    anything else         <root>/{train,valid,test}/<track>/<stem>.{wav,flac,ogg,mp3}           read through soundfile

A `mixture` file and a `valid` folder are optional. Taught in notebook 01.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Iterator, Mapping

import numpy as np
import soundfile
import yaml

from mss_utils import songs
from mss_utils.config import SPLITS, Settings, cache_folder, expand_path, is_valid_stem_name
from mss_utils.files import flush, printable_name, temporary_folder

MIXTURE = "mixture"
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
STEM_SUFFIX = ".stem.mp4"
MUSDB_STEMS = ("drums", "bass", "other", "vocals")
MUSDB_RATE = 44100
MAX_NAMED = 5  # tracks that an error or a warning names
RATES = (1000, 768_000)  # samples a second of what can be music
TRUNCATED_S = 0.1  # a stem file that decodes to this much less than it declares was cut off

Recording = tuple[np.ndarray, int]  # samples as float32 `(samples, channels)`, and their rate in Hz
Groups = Mapping[str, tuple[str, ...]]  # new stem -> the stems that are added up to it


@dataclass(frozen=True)
class SourceTrack:
    """One track as it lies in the dataset: a stem file, or a folder with one file per stem."""

    name: str
    split: str
    path: Path
    files: tuple[Path, ...]

    @property
    def is_stem_file(self) -> bool:
        return self.path.name.endswith(STEM_SUFFIX)

    @property
    def stems(self) -> tuple[str, ...]:
        if self.is_stem_file:
            return MUSDB_STEMS
        return tuple(
            sorted(printable_name(file.stem) for file in self.files if file.stem != MIXTURE)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever a file of the track changes: names, sizes and modification times, hashed."""
        return sha(
            [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        )


def sha(facts: object) -> str:
    """Sixteen digits that differ where `facts`, anything JSON can hold, differ."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# --- which dataset ------------------------------------------------------------------------------------------------------


def is_built_in(settings: Settings) -> bool:
    """Whether the run uses the songs that are composed here."""
    return not settings.data and settings.profile in ("smoke", "demo")


def dataset_root(settings: Settings) -> Path:
    """Folder of the run's dataset; the built-in songs are rendered and the 7-second excerpts fetched where missing."""
    if settings.data:
        return expand_path(settings.data)
    if not is_built_in(settings):
        return _musdb_root(settings.profile)
    counts = settings.n_train_songs, settings.n_valid_songs, settings.n_test_songs
    durations = settings.song_min_s, settings.song_max_s
    name = "songs-{}-{:g}-{:g}s".format("-".join(map(str, counts)), *durations)
    return songs.render_songs(cache_folder() / name, *counts, duration_s=durations)


def _musdb_root(profile: str) -> Path:
    if os.environ.get("MUSDB_PATH"):
        return expand_path(os.environ["MUSDB_PATH"])
    if profile == "musdb18":
        raise FileNotFoundError(
            "The musdb18 profile needs the dataset: pass --data DIR or set MUSDB_PATH to the MUSDB18 folder."
        )
    root = cache_folder() / "musdb18-7"
    if not root.is_dir():
        _download_excerpts(root)
    return root


def _download_excerpts(root: Path) -> None:
    """Let musdb fetch the 7-second excerpts; `root` appears only when all of them are there."""
    musdb = import_musdb()
    with temporary_folder(root.parent) as part:
        try:
            musdb.DB(root=str(part / root.name), download=True)
        except OSError as error:
            raise ConnectionError(
                f"musdb could not fetch the 7-second excerpts ({error}); pass --data DIR or set MUSDB_PATH to a folder that holds them."
            ) from None
        flush(part)
        os.replace(part / root.name, root)


def import_musdb():
    """musdb imports stempeg, which needs ffmpeg: say so in one sentence rather than in stempeg's traceback."""
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise FileNotFoundError(
            "Reading MUSDB18 needs ffmpeg and ffprobe on the PATH; install them with: apt-get install ffmpeg"
        )
    import ffmpeg
    import musdb

    # stempeg asks ffprobe about a file twice, and starting ffprobe takes a tenth of a second: the first answer will do.
    if not hasattr(ffmpeg.probe, "cache_clear"):
        ffmpeg.probe = lru_cache(maxsize=64)(ffmpeg.probe)
    return musdb


# --- which tracks -------------------------------------------------------------------------------------------------------


def find_tracks(root: Path) -> list[SourceTrack]:
    """Every track under `<root>/{train,valid,test}`: MUSDB stem files, or folders with one audio file per stem.

    Without a `valid` folder, validation tracks are those a `mus.yaml` in the root names, else MUSDB18's official 14,
    else every tenth training track. Raises FileNotFoundError when there is nothing to train, validate or test on, and
    ValueError for a track or a stem that lies there twice.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"No dataset folder {root}; expected {root}/train and {root}/test.")
    tracks = [track for split in SPLITS for track in _find_split(root, split)]
    if not any(track.split == "valid" for track in tracks):
        tracks = _with_validation(tracks, _validation_names(root))
    for split in SPLITS:
        if not any(track.split == split for track in tracks):
            raise FileNotFoundError(
                f"No {split} tracks under {root}; expected *{STEM_SUFFIX} files or folders with one "
                f"{'/'.join(AUDIO_SUFFIXES)} file per stem in {root}/train and {root}/test{_hint(root)}."
            )
    for (split, name), count in Counter((track.split, track.name) for track in tracks).items():
        if count > 1:
            raise ValueError(
                f"Track {name!r} lies in {split} twice, say as a stem file and as a folder: remove one of them."
            )
    return tracks


def _hint(root: Path) -> str:
    """Where the user may have meant, when a folder above or below looks like a dataset."""
    near = [place for place in (root.parent, *sorted(root.iterdir())) if (place / "train").is_dir()]
    return f"; did you mean {near[0]}?" if near and not (root / "train").is_dir() else ""


def ignored(root: Path) -> list[str]:
    """Folders and stem-like files between the tracks that hold no audio we can read, as `split/name`."""
    return [
        f"{split}/{path.name}"
        for split in SPLITS
        for path, files in _entries(root / split)
        if not files
    ]


def _entries(folder: Path) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """What could be a track, each with its audio files; hidden files and folders are nobody's tracks."""
    for path in _listing(folder) if folder.is_dir() else []:
        if path.name.endswith(STEM_SUFFIX) and path.is_file():
            yield path, (path,)
        elif path.is_dir():
            yield (
                path,
                tuple(
                    file
                    for file in _listing(path)
                    if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
                ),
            )
        elif path.suffix.lower() in (".mp4", ".m4a", *AUDIO_SUFFIXES):
            yield path, ()


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        message = f"No permission to look into {folder}: make it readable (chmod u+rx) or leave it out of the dataset."
        raise PermissionError(message) from None


def _find_split(root: Path, split: str) -> Iterator[SourceTrack]:
    for path, files in _entries(root / split):
        twice = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
        if twice:
            raise ValueError(f"{path} holds two files for stem {twice[0]!r}: remove one of them.")
        if files:
            yield SourceTrack(
                printable_name(path.name.removesuffix(STEM_SUFFIX)), split, path, files
            )


def _validation_names(root: Path) -> set[str]:
    """Names in `validation_tracks` of the dataset's own mus.yaml, else of the one musdb ships (read without importing it)."""
    setup = root / "mus.yaml"
    if not setup.is_file():
        setup = Path(importlib.util.find_spec("musdb").origin).parent / "configs" / "mus.yaml"
    try:
        names = yaml.safe_load(setup.read_bytes())["validation_tracks"]
        if not isinstance(names, list):
            raise TypeError(f"found {names!r}")
        return set(map(str, names))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{setup} names no validation_tracks ({type(error).__name__}: {reason[:200]}); expected a list of them: mend it or remove it."
        ) from None


def _with_validation(tracks: list[SourceTrack], names: set[str]) -> list[SourceTrack]:
    train = [track.name for track in tracks if track.split == "train"]
    valid = names & set(train) or set(train[9::10] or train[-1:] if len(train) > 1 else [])
    moved = lambda track: track.split == "train" and track.name in valid
    return [replace(track, split="valid") if moved(track) else track for track in tracks]


# --- which stems --------------------------------------------------------------------------------------------------------


def common_stems(sources: list[SourceTrack], root: Path, groups: Groups) -> tuple[str, ...]:
    """The stems, in alphabetical order, that every track has once `groups` are formed; ValueError when they differ."""
    there = set().union(*(source.stems for source in sources))
    _check_groups(groups, there)
    by_track = {
        source: frozenset(group_of(stem, groups) for stem in source.stems) for source in sources
    }
    (stems, count), *others = Counter(by_track.values()).most_common()
    if others:
        odd = [
            f"{source.split}/{source.name} {_difference(own, stems)}"
            for source, own in by_track.items()
            if own != stems
        ]
        raise ValueError(
            f"All tracks under {root} must have the same stems: {count} have {', '.join(sorted(stems))}, but {named(odd, '; ')}. "
            "Complete or remove what differs, or form groups, as in --set 'groups=synth+fx->other'."
        )
    if len(stems) < 2:
        only = ", ".join(stems) or "(none)"
        raise ValueError(
            f"The tracks under {root} have the stem {only} only; expected two or more stems in each."
        )
    if odd := sorted(stem for stem in stems if not is_valid_stem_name(stem)):
        message = f"A stem under {root} cannot be called {odd[0][:100]!r}: it becomes a folder, a target and a word on pages"
        raise ValueError(f"{message}. Rename its files, or name it by a group.")
    return tuple(sorted(stems))


def _difference(own: frozenset[str], stems: frozenset[str]) -> str:
    lacks, more = ", ".join(sorted(stems - own)), ", ".join(sorted(own - stems))
    return " and ".join([f"lacks {lacks}"] * bool(lacks) + [f"has {more} too"] * bool(more))


def named(items: list[str], between: str = ", ") -> str:
    """The first few of `items`, and how many more there are."""
    return between.join(items[:MAX_NAMED]) + (
        f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    )


def group_of(stem: str, groups: Groups) -> str:
    """The group that `stem` belongs to, or its own name."""
    return next((group for group, members in groups.items() if stem in members), stem)


def _check_groups(groups: Groups, there: set[str]) -> None:
    for group, members in groups.items():
        unknown = [stem for stem in members if stem not in there]
        if unknown:
            raise ValueError(
                f"Group {group!r} adds up {unknown[0]!r}, which no track has; there are: {', '.join(sorted(there))}."
            )
        if group in there - set(members):
            better = f"groups={'+'.join((group, *members))}->{group}"
            raise ValueError(
                f"Group {group!r} has the name of a stem that it leaves out: add it, as in {better}."
            )


# --- reading ------------------------------------------------------------------------------------------------------------


def read_track(source: SourceTrack) -> dict[str, Recording]:
    """Mixture (where there is one) and stems of a track, `{name: (samples as float32 (samples, channels), rate)}`.

    Raises ValueError for a file that cannot be decoded, has no samples or an absurd rate, was cut off, or holds NaN; PermissionError
    for one that may not be read; FileNotFoundError where ffmpeg is missing.
    """
    for file in source.files:
        _check_readable(file)
    parts = (
        _read_musdb(source)
        if needs_ffmpeg(source)
        else {printable_name(file.stem): _read_file(file) for file in source.files}
    )
    for name, (audio, rate) in parts.items():
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(
                f"{source.path}: {name} has {rate} samples a second; expected {RATES[0]} to {RATES[1]}: convert or remove the track."
            )
        if not audio.size:
            raise ValueError(
                f"{source.path}: {name} has no samples; expected audio: replace the file or remove the track."
            )
        if not np.isfinite(audio).all():
            message = f"{source.path}: {name} holds NaN or infinite samples; expected finite ones: mend the file or remove the track."
            raise ValueError(message)
    return parts


def _check_readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except PermissionError:
        raise PermissionError(
            f"No permission to read {file}: make it readable (chmod u+r) or remove the track."
        ) from None


def _read_file(file: Path) -> Recording:
    try:
        with file.open(
            "rb"
        ) as stream:  # a stream, for by its name libsndfile would take any text called .mp3 for one
            return soundfile.read(stream, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, MemoryError) as error:
        kinds, reason = "/".join(AUDIO_SUFFIXES), getattr(error, "error_string", error)
        raise ValueError(
            f"Cannot read {file} ({reason}); expected a {kinds} file: replace it or remove the track."
        ) from None


def needs_ffmpeg(source: SourceTrack) -> bool:
    """Whether a track goes through musdb, which needs ffmpeg: a stem file, or a folder of MUSDB18-HQ."""
    return source.is_stem_file or _is_musdb_hq(source)


def _is_musdb_hq(source: SourceTrack) -> bool:
    """Whether a folder is a track of MUSDB18-HQ by its names and headers: five 16-bit stereo WAV files at 44.1 kHz.

    Others of the same names go through soundfile: musdb reads every file with the channels of the mixture and clips
    samples beyond full scale.
    """
    if {file.name for file in source.files} != {f"{name}.wav" for name in (MIXTURE, *MUSDB_STEMS)}:
        return False
    try:
        infos = [soundfile.info(file) for file in source.files]
    except soundfile.LibsndfileError:
        return False
    return {(info.samplerate, info.channels, info.subtype) for info in infos} == {
        (MUSDB_RATE, 2, "PCM_16")
    }


def _read_musdb(source: SourceTrack) -> dict[str, Recording]:
    """A stem file, or a folder of MUSDB18-HQ, through musdb."""
    musdb = import_musdb()
    import ffmpeg

    mixture = source.path if source.is_stem_file else source.path / f"{MIXTURE}.wav"
    try:
        track = musdb.MultiTrack(
            path=str(mixture), name=source.name, stem_id=0, is_wav=not source.is_stem_file
        )
        found = _musdb_stems(track) if source.is_stem_file else _musdb_files(musdb, track, source)
    # stempeg raises bare Warnings and fails on streams that are no audio
    except (
        ffmpeg.Error,
        Warning,
        AttributeError,
        KeyError,
        IndexError,
        ValueError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"Cannot read {source.path} ({_reason(error)}); expected MUSDB18's mixture and four stems: fetch the file again or remove it."
        ) from None
    finally:
        ffmpeg.probe.cache_clear()  # the file may be another one by the next time
    for name, audio in found.items():
        if len(audio) < track.samples - TRUNCATED_S * track.rate:
            raise ValueError(
                f"{source.path}: {name} ends after {len(audio) / track.rate:.1f} s of {track.samples / track.rate:.1f} s; "
                "the file was cut off: fetch it again or remove it."
            )
    return {name: (audio.astype(np.float32), int(track.rate)) for name, audio in found.items()}


def _musdb_stems(track) -> dict[str, np.ndarray]:
    if track.info.nb_audio_streams != 1 + len(MUSDB_STEMS):
        raise ValueError(f"{track.info.nb_audio_streams} audio streams")
    return dict(zip((MIXTURE, *MUSDB_STEMS), track.stems))


def _musdb_files(musdb, track, source: SourceTrack) -> dict[str, np.ndarray]:
    files = {
        name: musdb.audio_classes.Source(track, name, str(source.path / f"{name}.wav"), 0)
        for name in MUSDB_STEMS
    }
    return {MIXTURE: track.audio, **{name: file.audio for name, file in files.items()}}


def _reason(error: Exception) -> str:
    """The last line of what ffmpeg or stempeg said; stempeg's warning of unequal streams is itself a broken call."""
    if isinstance(error, AttributeError):
        return "its streams differ in length, it was cut off"
    text = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
    return text.splitlines()[-1].strip() if text else type(error).__name__

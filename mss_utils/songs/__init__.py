"""The built-in dataset: songs composed and rendered here, written as a MUSDB-style folder.

    composing.py --Song--> rendering.py --stems--> render_songs writes

    <root>/mus.yaml                           set-up file for `musdb`, with the validation songs
    <root>/train/<song>/{mixture,vocals,drums,bass,piano,other}.flac, onsets.json, song.json
    <root>/test/<song>/...

The sounds are those of the SoundFont inside `pretty_midi`; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import soundfile
import yaml
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from tqdm.auto import tqdm

from mss_utils.files import file_lock, temporary_folder, write_text
from mss_utils.songs.composing import SPLITS, STEMS, Song, compose
from mss_utils.songs.rendering import SAMPLE_RATE, render

RECIPE = 1  # raise it if the same seed gives other songs; older folders are then refused


def render_songs(
    root,
    n_train: int,
    n_valid: int,
    n_test: int,
    seed: int = 0,
    duration_s: tuple[float, float] = (45.0, 90.0),
    n_jobs: int | None = None,
    progress: bool = True,
) -> Path:
    """Compose and render songs into a MUSDB-style folder; return the folder.

    The same seed gives the same bytes, whatever `n_jobs` (None: one process per core). Existing
    songs are kept, so a stopped run resumes. A song gets its name when it is complete.

    Raises
    ------
    ValueError
        The folder was rendered with another seed, duration or recipe.
    """
    root = Path(root)
    low_s, high_s = duration_s
    with file_lock(root):
        _claim(root, {"recipe": RECIPE, "seed": seed, "duration_s": [float(d) for d in duration_s]})
        wanted = [
            (s, i)
            for s, n in zip(SPLITS, (n_train, n_valid, n_test), strict=True)
            for i in range(n)
        ]
        done = _finished(root)
        todo = [
            (str(root), s, i, seed, (low_s, high_s))
            for s, i in wanted
            if f"{s}-{i:03d}" not in done
        ]
        _write_yaml(root, seed, n_valid, (low_s, high_s))
        _work(todo, n_jobs or os.cpu_count() or 1, progress)
    return root


def _finished(root: Path) -> set[str]:
    """Return the existing songs as split-index."""
    return {
        "-".join(path.name.split("-")[:2])
        for path in root.glob("*/*")
        if path.is_dir() and path.name.split("-")[0] in SPLITS
    }


def _claim(root: Path, parameters: dict) -> None:
    """Store the parameters of a folder, or check that they are the same."""
    path = root / "demo.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != parameters:
            raise ValueError(
                f"{root} was rendered with {found}, not {parameters}: choose another folder, or "
                "delete it."
            )
        return
    root.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(parameters))


def _write_yaml(root: Path, seed: int, n_valid: int, duration_s: tuple[float, float]) -> None:
    """Write the file for `musdb.DB(root=root, setup_file="mus.yaml", is_wav=True)`."""
    there = {path.name for path in root.glob("train/valid-*")}
    accompaniment = {stem: 1 for stem in STEMS if stem != "vocals"}
    setup = dict(
        sample_rate=SAMPLE_RATE,
        mixture="mixture.flac",
        stem_ids={stem: i for i, stem in enumerate(("mixture", *STEMS))},
        sources={stem: f"{stem}.flac" for stem in STEMS},
        targets={stem: {stem: 1} for stem in STEMS}
        | dict(accompaniment=accompaniment, linear_mixture={stem: 1 for stem in STEMS}),
        validation_tracks=sorted(
            there | {compose("valid", i, seed, duration_s).name for i in range(n_valid)}
        ),
    )
    write_text(root / "mus.yaml", yaml.safe_dump(setup, sort_keys=False))


def _work(todo: list[tuple], n_jobs: int, progress: bool) -> None:
    """Render the songs in several processes, with a progress bar."""
    if not todo:
        return
    results = Parallel(min(n_jobs, len(todo)), return_as="generator_unordered")(
        delayed(_write_song)(job) for job in todo
    )
    seconds = 0.0
    try:
        with tqdm(total=len(todo), desc="Built-in songs", unit="song", disable=not progress) as bar:
            for duration_s in results:
                seconds += duration_s
                bar.set_postfix_str(f"{seconds:.0f} s of music", refresh=False)
                bar.update()
    finally:
        get_reusable_executor().shutdown()  # otherwise idle workers stay for minutes


def _write_song(job: tuple) -> float:
    """Compose, render and write one song; return its seconds."""
    root, split, index, seed, duration_s = job
    song = compose(split, index, seed, duration_s)
    target = Path(root) / ("test" if split == "test" else "train") / song.name
    stems = render(song)
    total = np.sum([sound.astype(np.int32) for sound in stems.values()], axis=0)
    stems["mixture"] = total.astype(np.int16)
    with temporary_folder(Path(root)) as work:
        for name, sound in stems.items():
            path = work / f"{name}.flac"
            path.write_bytes(_flac(sound))  # libsndfile itself raises no OSError on a full disk
        (work / "onsets.json").write_text(json.dumps(song.onsets()))
        (work / "song.json").write_text(json.dumps(song.metadata, indent=1))
        target.parent.mkdir(parents=True, exist_ok=True)
        work.rename(target)
    return song.duration_s


def _flac(sound: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(
        file, sound, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=0.625
    )
    return file.getvalue()

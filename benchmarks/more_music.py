"""Measure what more music brings to MUSDB18's seven-second excerpts, on validation tracks only.

    python benchmarks/more_music.py --data DIR --songs DIR --steps 3000 --out FILE.csv

Each row of the table adds one thing to the row before, except the last two, which add to the third:

    songs as they are    nine minutes of excerpts, stems of one song together, no augmentation
    + random mixing      stems of different songs half the time, gains within 3 dB, polarity
    + pitch and tempo    two semitones up or down: the profile musdb7
    + full songs         a folder of songs beside the excerpts; all but vocals and drums is one stem
    + pre-training       starts from a model trained for as many steps on the built-in songs

No test track is scored. A finished training is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pandas as pd

from mss_utils.config import (
    MODELS,
    Run,
    cache_folder,
    expand_path,
    resolve_settings,
    results_folder,
)
from mss_utils.data import open_store
from mss_utils.files import write_text
from mss_utils.training.loop import train

PLAIN = ("random_mix=False", "gain_db=0", "flip_polarity=False", "speed_semitones=0")
REST = "groups=bass+other+synth+fx->rest"
COLUMNS = [
    "target",
    "music",
    "model",
    "train_tracks",
    "train_minutes",
    "steps",
    "best_step",
    "valid_sdr",
    "train_s",
]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        required=True,
        help="folder of the excerpts, MUSDB18 stem files in train/ and test/",
    )
    parser.add_argument(
        "--songs", required=True, help="folder of songs, one folder with one file a stem each"
    )
    parser.add_argument(
        "--leave-out",
        nargs="*",
        default=[],
        metavar="SONG",
        help="songs that nothing is trained on, kept to listen to",
    )
    parser.add_argument("--target", default="vocals")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--model", nargs="+", default=("unet", "demucs_lstm"), choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="the table, CSV")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all trainings"
    )
    given = parser.parse_args()

    excerpts = expand_path(given.data)
    both = with_songs(excerpts, expand_path(given.songs), given.leave_out)
    own = [f"steps={given.steps}", f"valid_every={max(1, given.steps // 12)}", *given.set]

    def of(profile, data, *overrides):
        return resolve_settings(profile, str(data or ""), given.target, [*own, *overrides])

    same_size = ["unet_full_band_channels=64", "ema_decay=0.998"]  # as in musdb7
    conditions = {
        "built-in songs, to start from": of("demo", None, *same_size),
        "songs as they are": of("musdb7", excerpts, *PLAIN),
        "+ random mixing": of("musdb7", excerpts, "speed_semitones=0"),
        "+ pitch and tempo": of("musdb7", excerpts),
        "+ full songs": of("musdb7", both, REST),
        "+ pre-training": of(
            "musdb7", excerpts, f"start_from={name_of('built-in songs, to start from')}"
        ),
    }
    rows = []
    for model in given.model:
        for music, settings in conditions.items():
            rows.append(row_of(music, settings, given.target, model))
            print(rows[-1], flush=True)
    write_text(given.out, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))


def with_songs(excerpts: Path, songs: Path, left_out: list[str]) -> Path:
    """Make a dataset of links to the excerpts and, for training, to the songs not left out."""
    root = cache_folder() / "excerpts-and-songs"
    for link in root.glob("*/*"):
        link.unlink()
    entries = {
        path.relative_to(excerpts): path
        for split in ("train", "test")
        for path in (excerpts / split).glob("*.stem.mp4")
    }
    entries |= {
        Path("train") / path.name: path
        for path in songs.iterdir()
        if path.is_dir() and path.name not in left_out
    }
    for relative, path in entries.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).symlink_to(os.path.abspath(path))
    return root


def name_of(music: str) -> str:
    """Return the name of the run that trains a condition."""
    return "more_music/" + "-".join("".join(c if c.isalnum() else " " for c in music).split())


def row_of(music: str, settings, target: str, model: str) -> dict:
    """Train unless it is trained; return the validation score of the kept weights."""
    run = Run(name_of(music), settings, results_folder() / name_of(music))
    store = open_store(settings)
    train(run, store, target, model)
    known = json.loads((run.model_folder(target, model) / "model.json").read_text(encoding="utf-8"))
    minutes = sum(track.samples for track in store.split("train")) / store.sample_rate / 60
    return dict(
        target=target,
        music=music,
        model=model,
        train_tracks=len(store.split("train")),
        train_minutes=round(minutes, 1),
        steps=known["steps"],
        best_step=known["best_step"],
        valid_sdr=known["valid_sdr"],
        train_s=known["train_s"],
    )


if __name__ == "__main__":
    main()

"""Measure how more training music changes the validation SDR on MUSDB18's seven-second excerpts.

    python benchmarks/more_music.py --data DIR --songs DIR --steps 3000 --out FILE.csv

Each condition adds one thing to the one before. The last two both add to "+ pitch and tempo":

    songs as they are    nine minutes of excerpts, all stems from one track, no augmentation
    + random mixing      half of the examples mix stems of different tracks; random gain within 3 dB
                         and random polarity
    + pitch and tempo    up to two semitones up or down: the profile musdb7
    + full songs         full-length tracks beside the excerpts; all stems except vocals and drums
                         are one stem
    + pre-training       starts from a model trained for as many steps on the built-in songs

The script scores validation tracks only, never test tracks. It skips finished trainings.
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
    Settings,
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


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        required=True,
        help="folder of the excerpts: MUSDB18 stem files in train/ and test/",
    )
    parser.add_argument(
        "--songs",
        required=True,
        help="folder of full-length tracks: one folder per track, one file per stem",
    )
    parser.add_argument(
        "--leave-out",
        nargs="*",
        default=[],
        metavar="SONG",
        help="full-length tracks to exclude from training, to listen to them later",
    )
    parser.add_argument("--target", default="vocals")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--model", nargs="+", default=("unet", "demucs_lstm"), choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="path of the table (CSV)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all trainings"
    )
    return parser.parse_args()


def main() -> None:
    """Train every model under every condition and write the table."""
    arguments = parse_arguments()
    excerpts = expand_path(arguments.data)
    both = link_dataset(excerpts, expand_path(arguments.songs), arguments.leave_out)
    steps = arguments.steps
    common = [f"steps={steps}", f"valid_every={max(1, steps // 12)}", *arguments.set]

    def resolve(profile: str, data: Path | None, *overrides: str) -> Settings:
        return resolve_settings(profile, str(data or ""), arguments.target, [*common, *overrides])

    same_size = ["unet_full_band_channels=64", "ema_decay=0.998"]  # as in the profile musdb7
    conditions = {
        "built-in songs, to start from": resolve("demo", None, *same_size),
        "songs as they are": resolve("musdb7", excerpts, *PLAIN),
        "+ random mixing": resolve("musdb7", excerpts, "speed_semitones=0"),
        "+ pitch and tempo": resolve("musdb7", excerpts),
        "+ full songs": resolve("musdb7", both, REST),
        "+ pre-training": resolve(
            "musdb7", excerpts, f"start_from={run_name('built-in songs, to start from')}"
        ),
    }
    rows = []
    for model in arguments.model:
        for music, settings in conditions.items():
            rows.append(train_condition(music, settings, arguments.target, model))
            print(rows[-1], flush=True)
    write_text(arguments.out, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))


def link_dataset(excerpts: Path, songs: Path, excluded: list[str]) -> Path:
    """Make a dataset of symbolic links to the excerpts and to full-length tracks.

    Parameters
    ----------
    excerpts : Path
        Folder with the stem files of the excerpts in train/ and test/.
    songs : Path
        Folder of full-length tracks, one folder per track. They become training tracks.
    excluded : list of str
        Names of full-length tracks that are not linked.

    Returns
    -------
    Path
        Root folder of the dataset, in the cache.
    """
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
        if path.is_dir() and path.name not in excluded
    }
    for relative, path in entries.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).symlink_to(os.path.abspath(path))
    return root


def run_name(music: str) -> str:
    """Return the name of the run that trains the condition `music`."""
    return "more_music/" + "-".join("".join(c if c.isalnum() else " " for c in music).split())


def train_condition(music: str, settings: Settings, target: str, model: str) -> dict:
    """Train a model, or load it if it is trained already.

    Returns
    -------
    dict
        One row of the table with the keys `COLUMNS`; `valid_sdr` in dB is the best of all
        validations.
    """
    name = run_name(music)
    run = Run(name, settings, results_folder() / name)
    store = open_store(settings)
    train(run, store, target, model)
    path = run.model_folder(target, model) / "model.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    minutes = sum(track.samples for track in store.split("train")) / store.sample_rate / 60
    return dict(
        target=target,
        music=music,
        model=model,
        train_tracks=len(store.split("train")),
        train_minutes=round(minutes, 1),
        steps=description["steps"],
        best_step=description["best_step"],
        valid_sdr=description["valid_sdr"],
        train_s=description["train_s"],
    )


if __name__ == "__main__":
    main()

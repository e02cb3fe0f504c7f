"""Export a collection small enough to commit, and score it again with its own weights.

results/full/<run>/ --export--> results/reference/<run>/ --rescore--> results/reference-rescored/
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
from safetensors.torch import load_file

from mss_utils import listening
from mss_utils.config import MODELS, Run, collection_runs, expand_path, results_folder
from mss_utils.data import Store, is_built_in, open_store
from mss_utils.evaluation import score
from mss_utils.evaluation.bsseval import MAX_SCORE_DB, TRACK_METRICS
from mss_utils.files import file_lock, temporary_folder, write_bytes, write_text
from mss_utils.listening.player import reencode
from mss_utils.report import tables
from mss_utils.report.facts import reported_parts
from mss_utils.report.typesetting import COLLECTION_FILES, find_collection
from mss_utils.separation import read_all_estimates, write_estimates
from mss_utils.training.checkpoints import write_tensors

TEXT_FILES = ["settings.json", "environment.json"]
TEXT_FILES += ["models/*/*/seed*/model.json", "models/*/*/seed*/history.csv"]
MAX_TABLE = 60_000  # characters; a longer table is packed
MAX_OUTPUT = 20_000  # characters of an output in a notebook; longer ones are removed
HEAVY_OUTPUTS = ('"name": "stderr"', '"image/', "widget-view", "data:audio")  # in their JSON
COMPRESSION = 0.5  # of the audio in an exported listening page, see `encode_mp3`
NUMBER_FORMAT = "%.6g"  # in exported tables


def export(
    source: str, name: str, complete: Collection[str] = (), listen: Collection[str] = ()
) -> Path:
    """Copy a collection to `results/<name>/`, small enough to commit; return that folder.

    Kept are settings, environment, tables, notebooks without heavy outputs, training histories,
    half-precision weights, a listening page of built-in songs, and answers of an older export.

    Parameters
    ----------
    complete
        Targets of which the weights of all models are kept; of the others only the best model.
    listen
        Targets in the listening page (default: all).

    Raises
    ------
    ValueError
        No collection, an unknown target, or a folder that is no export.
    """
    runs, folder = find_collection(source), results_folder() / name
    if not collection_runs(name) and folder.exists() or name == source:
        raise ValueError(f"{folder} is the source or no collection: export to another name.")
    known = sorted({target for run in runs for target in tables.evaluated_targets(run)})
    if unknown := {*complete, *listen}.difference(known):
        raise ValueError(f"{source!r} has no target {min(unknown)!r}; use {', '.join(known)}.")
    with file_lock(folder.parent), temporary_folder(folder.parent) as part:
        new = part / "new"
        for run in runs:
            copy, answers = new / run.folder.name, folder / run.folder.name / "answers"
            _export_run(run, copy)
            if is_built_in(run.settings) and not tables.is_study(run):
                page = _listening_page(run, f"{name}/{run.folder.name}", listen)
                write_text(copy / "listening.html", page)
            if answers.is_dir():
                shutil.copytree(answers, copy / "answers")
        for run, path in kept_weights(runs, complete):
            _export_weights(path, new / run.folder.name / path.relative_to(run.folder))
        for file in COLLECTION_FILES:
            if (results_folder() / source / file).exists():
                shutil.copy(results_folder() / source / file, new / file)
        if folder.exists():
            os.replace(folder, part / "old")
        os.replace(new, folder)
    return folder


def kept_weights(runs: list[Run], complete: Collection[str] = ()) -> list[tuple[Run, Path]]:
    """Return run and path of the weights that an export keeps (first seeds).

    Each target is kept once, from the first run that has it: all models of the targets in
    `complete`, else the best on validation.
    """
    kept = []
    first_parts = {part.target: part for part in reversed(reported_parts(runs))}
    for target, part in first_parts.items():
        contents = {model: tables.read_model_json(part.run, target, model) for model in MODELS}
        scores = {model: content["valid_sdr"] for model, content in contents.items()}
        models = MODELS if target in complete else [max(scores, key=scores.__getitem__)]
        for model in models:
            kept.append((part.run, part.run.model_folder(target, model) / "model.safetensors"))
    return kept


def _export_run(run: Run, folder: Path) -> None:
    """Copy settings, tables, histories and notebooks."""
    for pattern in TEXT_FILES:
        for path in run.folder.glob(pattern):
            write_text(folder / path.relative_to(run.folder), path.read_text(encoding="utf-8"))
    for name in tables.TABLES:
        text = tables.read_table(run, name).to_csv(index=False, float_format=NUMBER_FORMAT)
        path = folder / "tables" / f"{name}.csv"
        if len(text) < MAX_TABLE:
            write_text(path, text)
        else:
            write_bytes(path.with_suffix(".csv.gz"), gzip.compress(text.encode(), mtime=0))
    for path in sorted(run.folder.glob("notebooks/*.ipynb")):
        light = strip_heavy_outputs(tables.read_notebook(path))
        write_text(folder / "notebooks" / path.name, nbformat.writes(light))


def strip_heavy_outputs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove audio, images, progress bars and other long outputs from a notebook."""
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if len(text := json.dumps(output)) <= MAX_OUTPUT
                and not any(heavy in text for heavy in HEAVY_OUTPUTS)
            ]
    for key in ("papermill", "widgets"):  # times, and folders of this machine
        notebook.metadata.pop(key, None)
    return notebook


def _export_weights(path: Path, copy: Path) -> None:
    """Write a copy in half precision."""
    weights = load_file(path).items()
    half = {key: x.half() if x.is_floating_point() else x for key, x in weights}
    for key, tensor in half.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} does not fit into half precision.")
    write_tensors(copy, half)


def _listening_page(run: Run, name: str, listen: Collection[str]) -> str:
    """Return the listening page of an export; answers to it are about `name`."""
    store, tracks = open_store(run.settings), tables.read_table(run, "tracks")
    excerpts = {
        target: listening.excerpts(run, store, target, tracks)
        for target in tables.evaluated_targets(run)
        if not listen or target in listen
    }
    page = listening.listening_page(run, store, tracks, excerpts, name)
    return reencode(page, COMPRESSION)


def rescore(name: str, data: str) -> pd.DataFrame:
    """Separate and score the test tracks again with the weights of a collection.

    `data` is the dataset of the runs on real music; built-in test songs are rendered. Scores are
    written to `results/<name>-rescored/`.

    Returns
    -------
    DataFrame
        run, target, model, tracks, largest_track_db (over tracks and metrics), largest_median_db.

    Raises
    ------
    ValueError
        The collection has no weights, or the data are not those of the run.
    """
    parts = [
        (run, target) for run in find_collection(name) for target in tables.evaluated_targets(run)
    ]
    parts = [part for part in parts if _models_with_weights(*part)]
    if not parts:
        raise ValueError(f"No weights in {results_folder() / name}: nothing can be scored again.")
    stores = [_test_store(run, data) for run, _ in parts]  # wrong data is reported first
    output, differences = results_folder() / f"{name}-rescored", []
    for store, (run, target) in zip(stores, parts, strict=True):
        tracks = _score_again(run, target, store, output / run.folder.name)
        path = output / run.folder.name / "tables" / f"tracks-{target}.csv"
        write_text(path, tracks.to_csv(index=False))
        differences.append(_differences(run, tracks))
    table = pd.concat(differences)
    write_text(output / "differences.csv", table.to_csv(index=False))
    return table


def _models_with_weights(run: Run, target: str) -> list[str]:
    weights = {model: run.model_folder(target, model) / "model.safetensors" for model in MODELS}
    return [model for model, path in weights.items() if path.exists()]


def _test_store(run: Run, data: str) -> Store:
    """Return a store with the test tracks of a run; of built-in songs few others are rendered."""
    changes = dict(n_train_songs=1, n_valid_songs=1)
    if not is_built_in(run.settings):
        changes = dict(data=str(expand_path(data)))
    store = open_store(run.settings.model_copy(update=changes))
    scored = tables.read_table(run, "tracks").groupby("track")["frames"].max().to_dict()
    rate, test = store.sample_rate, store.split("test")
    if scored != {track.name: max(1, track.samples // rate) for track in test}:
        raise ValueError(
            f"{store.source} does not have the test tracks of run {run.name!r}, or not in their "
            "full length: give its own dataset."
        )
    return store


def _score_again(run: Run, target: str, store: Store, folder: Path) -> pd.DataFrame:
    """Separate and score the test tracks with the models of a run; estimates go to `folder`."""
    settings = run.settings.model_copy(update=dict(target=target, seeds=1))
    own, models = Run(run.name, settings, folder), _models_with_weights(run, target)
    write_estimates(own, store, models, trained=run)
    estimates_of = partial(read_all_estimates, own, store, keys=[(name, 0) for name in models])
    return score(settings, store, estimates_of)["tracks"]


def _differences(run: Run, again: pd.DataFrame) -> pd.DataFrame:
    """Return how far the scores of each model moved."""
    key, metrics = ["target", "model"], list(TRACK_METRICS)
    committed = tables.read_table(run, "tracks").query("seed == 0")
    after = again.set_index([*key, "track"])[metrics]
    before = committed.set_index([*key, "track"])[metrics].reindex(after.index)
    if not before.isna().equals(after.isna()):
        raise ValueError(f"Some tracks of run {run.name!r} have a score in one table only.")
    moved = (before - after).abs().max(axis=1).groupby(key, sort=False)
    medians = [
        table.clip(upper=MAX_SCORE_DB).groupby(key, sort=False).median()
        for table in (before, after)
    ]
    table = pd.DataFrame(dict(tracks=moved.size(), largest_track_db=moved.max())).reset_index()
    table["largest_median_db"] = (medians[0] - medians[1]).abs().max(axis=1).to_numpy()
    table.insert(0, "run", run.folder.name)
    return table

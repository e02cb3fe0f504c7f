"""Export a collection small enough to commit, and score it again with its own weights.

results/full/<run>/ --export--> results/reference/<run>/ --rescore--> results/reference-rescored/
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from safetensors.torch import load_file

from mss_utils import listening
from mss_utils.config import MODELS, Run, collection_runs, expand_path, results_folder
from mss_utils.data import Store, Track, is_built_in, open_store
from mss_utils.evaluation import score
from mss_utils.evaluation.bsseval import MAX_SCORE_DB, TRACK_METRICS
from mss_utils.files import atomic_write, file_lock, safe_name, temporary_folder, write_text
from mss_utils.listening.player import reencode
from mss_utils.report.facts import RunData
from mss_utils.report.notebooks import read_notebook, strip_heavy_outputs
from mss_utils.report.tables import TABLES, evaluated_targets, read_model_json, read_table
from mss_utils.report.typesetting import COLLECTION_FILES, find_collection
from mss_utils.separation import read_estimate, write_estimates
from mss_utils.training.checkpoints import write_tensors

TEXT_FILES = ["settings.json", "environment.json"]
TEXT_FILES += ["models/*/*/seed*/model.json", "models/*/*/seed*/history.csv"]
MAX_TABLE = 60_000  # characters; a longer table is packed
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
    _check_arguments(source, name, runs, {*complete, *listen})
    with file_lock(folder.parent), temporary_folder(folder.parent) as part:
        weights = kept_weights(runs, complete)
        for run in runs:
            copy = part / "new" / run.folder.name
            _export_run(run, copy, [item[1:] for item in weights if item[0] == run])
            if is_built_in(run.settings) and not RunData(run).is_study:
                page = _listening_page(run, f"{name}/{run.folder.name}", listen)
                write_text(copy / "listening.html", page)
            answers = folder / run.folder.name / "answers"
            if answers.is_dir():
                shutil.copytree(answers, copy / "answers")
        for file in COLLECTION_FILES:
            if (results_folder() / source / file).exists():
                shutil.copy(results_folder() / source / file, part / "new" / file)
        if folder.exists():
            os.replace(folder, part / "old")
        os.replace(part / "new", folder)
    return folder


def _check_arguments(source: str, name: str, runs: list[Run], targets: set[str]) -> None:
    """Refuse unknown targets, and to replace a folder that is not an older export."""
    folder = results_folder() / name
    if safe_name(name) != name:
        raise ValueError(f"A collection name has letters, digits, '.', '_', '-', not {name!r}.")
    if folder.resolve() == (results_folder() / source).resolve():
        raise ValueError(f"{folder} is the collection itself: export to another name.")
    if folder.exists() and not collection_runs(name):
        raise ValueError(f"{folder} exists and is no collection: export to another name.")
    known = {target for run in runs for target in evaluated_targets(run)}
    if unknown := targets - known:
        names = ", ".join(sorted(known))
        raise ValueError(f"{source!r} has no target {min(unknown)!r}; there are: {names}.")


def kept_weights(runs: Iterable[Run], complete: Collection[str] = ()) -> list[tuple[Run, str, str]]:
    """Return run, target and model of the weights that an export keeps (first seeds).

    Each target is kept once, from the first run that has it: all models of the targets in
    `complete`, else the best on validation.
    """
    kept: list[tuple[Run, str, str]] = []
    for run in [run for run in runs if not RunData(run).is_study]:
        for target in evaluated_targets(run):
            if target in [item[1] for item in kept]:
                continue
            scores = {name: read_model_json(run, target, name)["valid_sdr"] for name in MODELS}
            models = MODELS if target in complete else [max(MODELS, key=scores.__getitem__)]
            kept += [(run, target, model) for model in models]
    return kept


def _export_run(run: Run, folder: Path, weights: list[tuple[str, str]]) -> None:
    for pattern in TEXT_FILES:
        for path in run.folder.glob(pattern):
            write_text(folder / path.relative_to(run.folder), path.read_text(encoding="utf-8"))
    for name in TABLES:
        _write_table(read_table(run, name), folder / "tables" / f"{name}.csv")
    for path in sorted(run.folder.glob("notebooks/*.ipynb")):
        light = strip_heavy_outputs(read_notebook(path))
        write_text(folder / "notebooks" / path.name, nbformat.writes(light))
    for target, model in weights:
        path = run.model_folder(target, model) / "model.safetensors"
        tensors = load_file(path)
        for key, tensor in tensors.items():
            tensors[key] = tensor.half() if tensor.is_floating_point() else tensor
            if not tensors[key].isfinite().all():
                raise ValueError(f"{path}: {key} does not fit into half precision.")
        write_tensors(folder / path.relative_to(run.folder), tensors)


def _listening_page(run: Run, name: str, listen: Collection[str]) -> str:
    """Return the listening page of an export; answers to it are about `name`."""
    store, tracks = open_store(run.settings), read_table(run, "tracks")
    excerpts = {
        target: listening.excerpts(run, store, target, tracks)
        for target in evaluated_targets(run)
        if not listen or target in listen
    }
    page = listening.listening_page(run, store, tracks, excerpts, name)
    return reencode(page, COMPRESSION)


def _write_table(table: pd.DataFrame, path: Path) -> None:
    text = table.to_csv(index=False, float_format=NUMBER_FORMAT)
    if len(text) < MAX_TABLE:
        write_text(path, text)
    else:
        with atomic_write(path.with_suffix(".csv.gz")) as part:
            part.write_bytes(gzip.compress(text.encode(), mtime=0))


# --- score again ----------------------------------------------------------------------------------


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
    runs = [run for run in find_collection(name) if _models_with_weights(run)]
    if not runs:
        raise ValueError(f"No weights in {results_folder() / name}: nothing can be scored again.")
    stores = [_test_store(run, data) for run in runs]  # wrong data is reported before separating
    output = results_folder() / f"{name}-rescored"
    rows = []
    for run, store in zip(runs, stores, strict=True):
        scores = []
        for target, models in _models_with_weights(run).items():
            settings = run.settings.model_copy(update=dict(target=target, seeds=1))
            own = Run(f"{name}-rescored", settings, output / run.folder.name)
            scores.append(score_again(own, run, store, models))
        tracks = pd.concat(scores, ignore_index=True)
        write_text(output / run.folder.name / "tables" / "tracks.csv", tracks.to_csv(index=False))
        rows += _differences(run, read_table(run, "tracks"), tracks)
    table = pd.DataFrame(rows)
    write_text(output / "differences.csv", table.to_csv(index=False))
    return table


def _models_with_weights(run: Run) -> dict[str, list[str]]:
    """Return target -> models whose weights the run has."""
    models: dict[str, list[str]] = {}
    for target in evaluated_targets(run):
        for model in MODELS:
            if (run.model_folder(target, model) / "model.safetensors").exists():
                models.setdefault(target, []).append(model)
    return models


def _test_store(run: Run, data: str) -> Store:
    """Return a store with the test tracks of a run; of built-in songs few others are rendered."""
    changes = dict(n_train_songs=1, n_valid_songs=1)
    if not is_built_in(run.settings):
        changes = dict(data=str(expand_path(data)))
    store = open_store(run.settings.model_copy(update=changes))
    scored = set(read_table(run, "tracks")[["track", "frames"]].itertuples(index=False, name=None))
    rate, test = store.sample_rate, store.split("test")
    lengths = {(track.name, max(1, track.samples // rate)) for track in test}
    if scored != lengths:
        track, length_s = min(scored ^ lengths)
        raise ValueError(
            f"{store.source} does not have the test tracks of run {run.name!r} ({track!r}, "
            f"{length_s} s, is in one of the two only): give its own dataset."
        )
    return store


def score_again(own: Run, trained: Run, store: Store, models: list[str]) -> pd.DataFrame:
    """Separate and score the test tracks with the models of `trained`; estimates go to `own`."""
    write_estimates(own, store, models, trained=trained)
    target = own.settings.target

    def estimates_of(track: Track) -> dict[tuple[str, int], np.ndarray]:
        return {(name, 0): read_estimate(own, store, track, target, name)[None] for name in models}

    return score(own.settings, store, estimates_of)["tracks"]


def _differences(run: Run, committed: pd.DataFrame, again: pd.DataFrame) -> Iterator[dict]:
    """Return how far the scores of each model moved, first seeds."""
    metrics = list(TRACK_METRICS)
    for (target, model), rows in again.groupby(["target", "model"], sort=False):
        old = committed.query("seed == 0 and target == @target and model == @model")
        before = old.set_index("track")[metrics]
        after = rows.set_index("track")[metrics].reindex(before.index)
        lost = (before.isna() != after.isna()).any(axis=1)
        if lost.any():
            raise ValueError(f"{lost.idxmax()!r} has a score of {model} in one table only.")
        medians = [table.clip(upper=MAX_SCORE_DB).median() for table in (before, after)]
        yield dict(
            run=run.folder.name,
            target=target,
            model=model,
            tracks=len(rows),
            largest_track_db=(before - after).abs().max().max(),
            largest_median_db=(medians[0] - medians[1]).abs().max(),
        )
